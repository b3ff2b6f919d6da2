//! Streams of requests, broken at every place, through the gate alone and through hyper behind it.

use super::*;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::poll_fn;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::body::Body;
use axum::response::IntoResponse;
use http::Request;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use proptest::prelude::*;
use proptest::sample::select;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn options() -> ServerOptions {
    ServerOptions { max_headers: 6, max_header_bytes: 300, ..ServerOptions::default() }
}

/// A socket whose client sends these pieces and then nothing.
struct Pieces(VecDeque<Vec<u8>>);

impl Pieces {
    fn of(stream: &[u8], size: usize) -> Self {
        Pieces(stream.chunks(size.max(1)).map(<[u8]>::to_vec).collect())
    }
}

impl AsyncRead for Pieces {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Some(mut piece) = self.0.pop_front() else { return Poll::Ready(Ok(())) };
        if piece.len() > out.remaining() {
            self.0.push_front(piece.split_off(out.remaining()));
        }
        out.put_slice(&piece);
        Poll::Ready(Ok(()))
    }
}

/// What the gate lets through of a stream.
#[derive(Debug, PartialEq)]
struct Passed {
    bytes: Vec<u8>,
    requests: u64,
    /// Status of the request that it refuses.
    refused: Option<u16>,
    /// Chunks were malformed.
    broken: bool,
}

/// Reads everything, `room` bytes at a time.
async fn pass(socket: Pieces, room: usize) -> Passed {
    let mut gate = Gate::new(socket, &options());
    let mut passed = Passed { bytes: Vec::new(), requests: 0, refused: None, broken: false };
    let mut buffer = vec![0; room];
    loop {
        let read = poll_fn(|context| {
            let mut out = ReadBuf::new(&mut buffer);
            let polled = Pin::new(&mut gate).poll_read(context, &mut out);
            // A refusal leaves the reader waiting for good.
            Poll::Ready(polled.map_ok(|()| out.filled().len()))
        });
        match read.await {
            Poll::Ready(Ok(1..)) if gate.refusals.any() && gate.held.is_empty() => break,
            Poll::Ready(Ok(0)) => break,
            Poll::Ready(Ok(length)) => passed.bytes.extend(&buffer[..length]),
            Poll::Ready(Err(_)) => {
                passed.broken = true;
                break;
            }
            Poll::Pending => break,
        }
    }
    passed.requests = gate.requests;
    let mut marked = Request::new(());
    gate.refusals.mark(gate.requests, &mut marked);
    passed.refused = marked.extensions().get::<ApiError>().map(|error| error.status.as_u16());
    if passed.refused.is_some() {
        let end = passed
            .bytes
            .windows(13)
            .rposition(|window| window == b"GET /refused " || window == b"HEAD /refused");
        passed.bytes.truncate(end.unwrap_or(passed.bytes.len()));
    }
    passed
}

/// A request in order: its bytes, and those of its body.
fn good() -> impl Strategy<Value = (Vec<u8>, Vec<u8>)> {
    let method = select(vec!["GET", "POST", "HEAD", "PUT"]);
    let extra = select(vec!["", "X-A: b\r\n", "x-c:  d e \r\nX-Empty:\r\n", "Expect: 100-continue\r\n"]);
    let body = prop_oneof![
        Just(None),
        prop::collection::vec(any::<u8>(), 0..60).prop_map(|body| Some((body, 0))),
        (prop::collection::vec(any::<u8>(), 0..60), 1..20usize).prop_map(Some),
        // A body that looks like a request.
        Just(Some((b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n".to_vec(), 0))),
        Just(Some((b"0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n".to_vec(), 9))),
    ];
    (select(vec!["", "\r\n", "\n"]), method, extra, body).prop_map(|(before, method, extra, body)| {
        let mut bytes = format!("{before}{method} /path HTTP/1.1\r\nHost: a\r\n{extra}").into_bytes();
        match &body {
            None => bytes.extend(b"\r\n"),
            Some((body, 0)) => {
                bytes.extend(format!("Content-Length: {}\r\n\r\n", body.len()).bytes());
                bytes.extend(body);
            }
            Some((body, size)) => {
                bytes.extend(b"Transfer-Encoding: chunked\r\n\r\n");
                for chunk in body.chunks(*size) {
                    bytes.extend(format!("{:x};x\r\n", chunk.len()).bytes());
                    bytes.extend(chunk);
                    bytes.extend(b"\r\n");
                }
                bytes.extend(b"0\r\nTrailer: t\r\n\r\n");
            }
        }
        (bytes, body.map(|(body, _)| body).unwrap_or_default())
    })
}

/// A request that is refused, and with which status.
fn bad() -> impl Strategy<Value = (Vec<u8>, u16)> {
    let wrong = select(vec![
        ("Content-Length: 3\r\nTransfer-Encoding: chunked\r\n", 400),
        ("Transfer-Encoding: chunked\r\nContent-Length: 3\r\n", 400),
        ("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", 400),
        ("Transfer-Encoding: gzip\r\n", 400),
        ("Content-Length: 3\r\nContent-Length: 3\r\n", 400),
        ("Content-Length: 3\r\nContent-Length: 4\r\n", 400),
        ("Content-Length: 99999999999999999999\r\n", 413),
        ("X: folded\r\n value\r\n", 400),
        ("Host: b\r\n", 400),
        ("A: 1\r\nB: 1\r\nC: 1\r\nD: 1\r\nE: 1\r\nF: 1\r\n", 431),
    ]);
    let headers = (wrong, any::<bool>()).prop_map(|((headers, status), head)| {
        let method = if head { "HEAD" } else { "POST" };
        (format!("{method} / HTTP/1.1\r\nHost: a\r\n{headers}\r\nabc").into_bytes(), status)
    });
    let long = (300..3000usize).prop_map(|length| {
        (format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n", "x".repeat(length)).into_bytes(), 431)
    });
    prop_oneof![4 => headers, 1 => long, 1 => Just((b"\x16\x03\x01 no HTTP\r\n\r\n".to_vec(), 400))]
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

/// The stream through the gate and hyper, as a server runs them: length and hash of each body that the service saw, and
/// the statuses that the client read.
async fn serve(stream: &[u8], size: usize) -> (Vec<Vec<u8>>, Vec<u16>) {
    let (mut client, server) = tokio::io::duplex(size.max(1));
    let gate =
        Gate::new(server, &ServerOptions { header_read_timeout: Duration::from_millis(20), ..options() });
    let refusals = gate.refusals();
    let requests = AtomicU64::new(0);
    let (bodies, mut seen) = tokio::sync::mpsc::unbounded_channel();
    let service = service_fn(move |mut request: Request<Incoming>| {
        refusals.mark(requests.fetch_add(1, Ordering::Relaxed), &mut request);
        let bodies = bodies.clone();
        async move {
            if let Some(error) = request.extensions_mut().remove::<ApiError>() {
                return Ok::<_, Infallible>(error.into_response());
            }
            assert_eq!(request.uri().path(), "/path");
            let Ok(body) = request.into_body().collect().await else {
                return Ok(ApiError::bad_request("broken body").into_response());
            };
            bodies.send(body.to_bytes().to_vec()).unwrap();
            Ok(axum::response::Response::new(Body::empty()))
        }
    });
    let connection = http1::Builder::new().serve_connection(TokioIo::new(gate), service);
    let talk = async {
        let (mut from, mut to) = tokio::io::split(&mut client);
        let mut answers = Vec::new();
        // A server that closes early breaks the writing off.
        let write = async {
            let _ = to.write_all(stream).await;
            let _ = to.shutdown().await;
        };
        let (_, read) = tokio::join!(write, from.read_to_end(&mut answers));
        read.unwrap();
        answers
    };
    let (_, answers) = tokio::join!(connection, talk);
    let text = String::from_utf8_lossy(&answers).into_owned();
    // The last answer may be cut: hyper stops writing to a client that has stopped sending.
    let statuses = text.split("HTTP/1.1 ").skip(1).filter_map(|answer| answer.get(..3));
    let statuses = statuses.map(|status| status.parse().unwrap());
    let statuses: Vec<u16> = statuses.filter(|&status| status != 100).collect();
    let mut told = Vec::new();
    while let Ok(body) = seen.try_recv() {
        told.push(body);
    }
    (told, statuses)
}

proptest! {
    /// Requests in order pass byte for byte; what is not in order ends the stream there, however it is cut.
    #[test]
    fn the_gate_passes_what_is_in_order(requests in prop::collection::vec(good(), 0..4), bad in prop::option::of(bad()), behind in prop::option::of(good())) {
        let in_order: Vec<u8> = requests.iter().flat_map(|(bytes, _)| bytes.clone()).collect();
        let mut stream = in_order.clone();
        stream.extend(bad.iter().flat_map(|(bytes, _)| bytes.clone()));
        stream.extend(behind.iter().filter(|_| bad.is_some()).flat_map(|(bytes, _)| bytes.clone()));
        let expected = Passed {
            // Empty lines before a request say nothing.
            bytes: requests.iter().flat_map(|(bytes, _)| bytes[line_break(bytes).unwrap_or(0)..].to_vec()).collect(),
            requests: requests.len() as u64,
            refused: bad.as_ref().map(|&(_, status)| status),
            broken: false,
        };
        block_on(async {
            for (size, room) in [(1, 7), (usize::MAX, 1), (2, 4096), (usize::MAX, 4096), (13, 64)] {
                assert_eq!(pass(Pieces::of(&stream, size), room).await, expected, "pieces of {size}, room for {room}");
            }
            for cut in 0..stream.len() {
                let pieces = Pieces([stream[..cut].to_vec(), stream[cut..].to_vec()].into_iter().filter(|p| !p.is_empty()).collect());
                assert_eq!(pass(pieces, 4096).await, expected, "cut at {cut}");
            }
        });
    }

    /// Whatever comes, the way it is cut decides nothing.
    #[test]
    fn pieces_decide_nothing(requests in prop::collection::vec(good(), 1..4), spoilt in prop::collection::vec((any::<prop::sample::Index>(), select(b"\r\n :,0;aG\0\xff".to_vec())), 1..4)) {
        let mut stream: Vec<u8> = requests.into_iter().flat_map(|(bytes, _)| bytes).collect();
        for (at, byte) in spoilt {
            let at = at.index(stream.len());
            stream[at] = byte;
        }
        block_on(async {
            let whole = pass(Pieces::of(&stream, usize::MAX), 4096).await;
            for (size, room) in [(1, 4096), (3, 5), (usize::MAX, 1), (17, 4096)] {
                assert_eq!(pass(Pieces::of(&stream, size), room).await, whole, "pieces of {size}, room for {room}");
            }
        });
    }

    /// hyper sees the same requests and bodies as the gate, and answers the refused one last.
    #[test]
    fn hyper_sees_the_same_requests(requests in prop::collection::vec(good(), 0..4), bad in prop::option::of(bad()), size in select(vec![1, 7, 100, 100_000])) {
        let mut stream: Vec<u8> = requests.iter().flat_map(|(bytes, _)| bytes.clone()).collect();
        stream.extend(bad.iter().flat_map(|(bytes, _)| bytes.clone()));
        let (bodies, statuses) = block_on(serve(&stream, size));
        let mut expected = vec![200; requests.len()];
        expected.extend(bad.map(|(_, status)| status));
        // A client that stops sending has left: hyper need not answer what it had not answered by then.
        prop_assert!(expected.starts_with(&statuses), "{:?} instead of {:?}", statuses, expected);
        let sent: Vec<Vec<u8>> = requests.into_iter().map(|(_, body)| body).collect();
        prop_assert!(sent.starts_with(&bodies), "{:?} instead of {:?}", bodies, sent);
    }
}

/// A refused client that goes on sending gets its answer all the same.
#[test]
fn a_refusal_is_heard_whatever_is_sent() {
    block_on(async {
        let mut stream = b"GET / HTTP/1.1\r\nHost: a\r\nX: ".to_vec();
        stream.resize(1 << 20, b'x');
        let (bodies, statuses) = serve(&stream, 1000).await;
        assert_eq!((bodies.len(), &statuses[..]), (0, &[431][..]));
    });
}
