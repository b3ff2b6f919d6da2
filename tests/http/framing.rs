//! Requests that leave in doubt where they end: whoever else reads the stream, a proxy above all, might see others.

use serde_json::json;

use crate::harness::{Config, Server};

const BODY: &str = r#"{"prompt": "x", "max_tokens": 1}"#;

/// Sends `headers` and `body`, and another request behind them. The first must be refused and the other not be seen.
fn refused(server: &Server, headers: &str, body: &str, status: u16) {
    let mut client = server.client();
    let next = "GET /health HTTP/1.1\r\nHost: t\r\n\r\n";
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n{headers}\r\n"
    );
    client.raw(format!("{head}{body}{next}").as_bytes());
    let response = client.response();
    assert_eq!(response.status, status, "{headers}: {}", response.body);
    assert!(response.error()["message"].as_str().unwrap().len() > 10, "{headers}");
    assert_eq!(response.header("connection"), Some("close"), "{headers}");
    assert!(response.header("x-request-id").is_some(), "{headers}");
    let rest = client.until_closed();
    assert_eq!(rest, b"", "{headers}: answered more than once");
}

/// What follows could not be told from the body that nobody read.
#[test]
fn an_answer_before_the_body_says_that_the_connection_ends() {
    let server = Server::start();
    let mut client = server.client();
    client.raw(b"POST /nowhere HTTP/1.1\r\nHost: t\r\nContent-Length: 10\r\n\r\n");
    let response = client.response();
    assert_eq!((response.status, response.header("connection")), (404, Some("close")));
    client.raw(b"0123456789");
    assert_eq!(client.until_closed(), b"");
    let mut client = server.client();
    let ask: serde_json::Value = serde_json::from_str(BODY).unwrap();
    for path in ["/v1/completions", "/v1/completions"] {
        let response = client.post(path, &ask);
        assert_eq!((response.status, response.header("connection")), (200, None), "{path}");
    }
    assert_eq!(client.get("/nowhere").header("connection"), None, "there was no body to read");
    assert_eq!(client.get("/health").status, 200);
}

/// Fault row 10: both a length and chunks.
#[test]
fn a_length_beside_chunks_is_400_and_the_connection_closes() {
    let server = Server::start();
    let length = format!("Content-Length: {}\r\n", BODY.len());
    let chunks = format!("{:x}\r\n{BODY}\r\n0\r\n\r\n", BODY.len());
    refused(&server, &format!("{length}Transfer-Encoding: chunked\r\n"), &chunks, 400);
    refused(&server, &format!("Transfer-Encoding: chunked\r\n{length}"), &chunks, 400);
    refused(&server, "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n", &chunks, 400);
    assert_eq!(server.stats().running, 0);
    assert_eq!(server.metric(r#"moeyard_http_responses_total{route="other",code="400"}"#), 3.0);
}

#[test]
fn other_doubts_about_the_end_of_a_body_are_refused() {
    let server = Server::start();
    for (headers, status) in [
        ("Content-Length: 5\r\nContent-Length: 6\r\n", 400),
        ("Content-Length: 5\r\nContent-Length: 5\r\n", 400),
        ("Content-Length: 5, 6\r\n", 400),
        ("Content-Length: -1\r\n", 400),
        ("Content-Length: x\r\n", 400),
        ("Content-Length: 99999999999999999999999\r\n", 413),
        ("Transfer-Encoding: gzip\r\n", 400),
        ("Transfer-Encoding: gzip, chunked\r\n", 400),
        ("Transfer-Encoding: chunked, identity\r\n", 400),
        ("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", 400),
        ("Content-Length : 5\r\n", 400),
        ("X-Folded: a\r\n b\r\n", 400),
    ] {
        refused(&server, headers, "hello", status);
    }
}

#[test]
fn what_is_no_http_gets_an_error_object_too() {
    let server = Server::start();
    for bytes in [
        &b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 a handshake of TLS"[..],
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"hello\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: t\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: t\r\nno colon\r\n\r\n",
    ] {
        let mut client = server.client();
        client.raw(bytes);
        let response = client.response();
        assert_eq!(
            (response.status, &response.error()["type"]),
            (400, &json!("BadRequestError")),
            "{bytes:?}"
        );
        assert_eq!(client.until_closed(), b"");
    }
}

#[test]
fn malformed_chunks_are_400() {
    let server = Server::start();
    for chunks in
        ["zz\r\nabc\r\n", "ffffffffffffffffff\r\nabc\r\n", "-5\r\nabc\r\n", "3\r\nabcdef\r\n0\r\n\r\n"]
    {
        let mut client = server.client();
        client.raw(b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n");
        client.raw(chunks.as_bytes());
        let response = client.response();
        assert_eq!(
            (response.status, &response.error()["type"]),
            (400, &json!("BadRequestError")),
            "{chunks}"
        );
        assert_eq!(client.until_closed(), b"", "{chunks}");
    }
}

/// Whole requests of all framings in one go, and byte by byte.
#[test]
fn pipelined_requests_are_answered_in_order_until_one_is_refused() {
    let server = Server::start();
    let post = "POST /v1/completions HTTP/1.1\r\nHost: t\r\n";
    let stream = format!(
        "{post}Content-Length: {}\r\n\r\n{BODY}\
         GET /version HTTP/1.1\r\nHost: t\r\n\r\n\
         {post}Transfer-Encoding: chunked\r\n\r\n{:x};x=y\r\n{BODY}\r\n0\r\nTrailer: t\r\n\r\n\
         \r\nHEAD /health HTTP/1.1\r\nHost: t\r\n\r\n\
         GET /livez HTTP/1.1\r\nHost: t\r\nHost: u\r\n\r\n\
         GET /livez HTTP/1.1\r\nHost: t\r\n\r\n",
        BODY.len(),
        BODY.len()
    );
    for piece in [1, 10, stream.len()] {
        let mut client = server.client();
        for piece in stream.as_bytes().chunks(piece) {
            client.raw(piece);
        }
        for _ in 0..3 {
            assert_eq!(client.response().status, 200, "{piece}");
        }
        assert_eq!(client.head().status, 200, "{piece}");
        assert_eq!(client.response().status, 400, "{piece}");
        assert_eq!(client.until_closed(), b"", "{piece}");
    }
}

/// A client that sends a body which is not wanted hears so, though it reads only when it is done.
#[test]
fn a_refused_body_may_be_sent_to_its_end() {
    let mut config = Config::default();
    config.options.max_body_bytes = 1000;
    let server = Server::with(config);
    let mut client = server.client();
    client.raw(b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Length: 16777216\r\n\r\n");
    for _ in 0..256 {
        client.raw(&[b' '; 64 << 10]);
    }
    let response = client.response();
    assert_eq!((response.status, &response.error()["type"]), (413, &json!("RequestTooLarge")));
    assert_eq!(client.until_closed(), b"");
}
