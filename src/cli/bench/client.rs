//! A client of OpenAI-compatible servers that times what it receives. Plain HTTP; connections are used again.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use http::{Method, Request, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;

use crate::error::{Error, Result};

/// Most bytes of an answer that is no stream, and of one line of a stream.
const MAX_TEXT_BYTES: usize = 16 << 20;
/// As much of a server's error as a report repeats.
const MAX_ERROR_CHARS: usize = 300;

/// A server.
pub(super) struct Client {
    host: String,
    port: u16,
    /// Path before the routes, without a slash at its end.
    base: String,
    api_key: Option<String>,
    /// Connections without a request. A std lock: held for a push or a pop.
    idle: Mutex<Vec<SendRequest<Full<Bytes>>>>,
}

/// What a stream of tokens took.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Timing {
    /// To the first piece of text.
    pub first_s: f64,
    /// Between pieces.
    pub between_s: Vec<f64>,
    /// To the end.
    pub total_s: f64,
    /// As the server counts them, else one per piece of text.
    pub output_tokens: usize,
    /// As the server counts them.
    pub prompt_tokens: Option<usize>,
}

impl Client {
    /// A client of `url`, such as `http://127.0.0.1:8000` or `http://host/v1`. Nothing is sent yet.
    ///
    /// # Errors
    /// [`Error::Config`] for what is no such URL, `https` included.
    pub(super) fn new(url: &str, api_key: Option<String>) -> Result<Client> {
        let refuse = |why: String| Err(Error::config("URL", why));
        let Ok(uri) = url.parse::<Uri>() else {
            return refuse(format!("expected one such as http://127.0.0.1:8000, found {url:?}"));
        };
        match (uri.scheme_str(), uri.host()) {
            (Some("http"), Some(host)) => {
                let path = uri.path().trim_end_matches('/');
                Ok(Client {
                    host: host.trim_matches(['[', ']']).to_owned(),
                    port: uri.port_u16().unwrap_or(80),
                    base: path.strip_suffix("/v1").unwrap_or(path).to_owned(),
                    api_key,
                    idle: Mutex::default(),
                })
            }
            (Some(scheme), _) if scheme != "http" => {
                refuse(format!("{scheme} is not supported: expected http, found {url:?}"))
            }
            _ => refuse(format!("expected one such as http://127.0.0.1:8000, found {url:?}")),
        }
    }

    /// The first model that the server lists.
    ///
    /// # Errors
    /// [`Error::Io`] when nobody answers, [`Error::Remote`] with what is wrong with the answer.
    pub(super) async fn first_model(&self) -> Result<String> {
        let answer = self.whole(Method::GET, "/v1/models", Bytes::new()).await?;
        let id = answer["data"][0]["id"].as_str().map(str::to_owned);
        id.ok_or_else(|| Error::Remote("the server lists no model: name one with --model".into()))
    }

    /// Sends a request whose answer is one JSON object.
    async fn whole(&self, method: Method, route: &str, body: Bytes) -> Result<Value> {
        let (status, body, connection) = self.send(method, route, body).await?;
        let bytes = collect(body).await?;
        self.give_back(connection);
        if !status.is_success() {
            return Err(refused(status, &bytes));
        }
        serde_json::from_slice(&bytes).map_err(|e| Error::Remote(format!("{route} answered no JSON: {e}")))
    }

    /// Sends a request whose answer is an event stream, and reads it to its end.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Remote`] when the server refuses, fails half-way, or ends early.
    pub(super) async fn stream(&self, route: &str, body: &Value) -> Result<Timing> {
        let began = Instant::now();
        let (status, mut body, connection) =
            self.send(Method::POST, route, Bytes::from(body.to_string())).await?;
        if !status.is_success() {
            let text = collect(body).await?;
            self.give_back(connection);
            return Err(refused(status, &text));
        }
        let mut events = Events::default();
        let mut answer = Answer::default();
        while !answer.done {
            let Some(frame) = body.frame().await else { break };
            let frame = frame.map_err(|e| Error::Remote(format!("the stream broke: {e}")))?;
            let arrived = began.elapsed();
            for event in events.take(frame.data_ref().map_or(&[], |data| data))? {
                answer.take(&event, arrived)?;
            }
        }
        // The last bytes of the body, so that the connection can be used again.
        while let Some(Ok(_)) = body.frame().await {}
        self.give_back(connection);
        answer.timing(began.elapsed())
    }

    async fn send(
        &self,
        method: Method,
        route: &str,
        body: Bytes,
    ) -> Result<(http::StatusCode, Incoming, SendRequest<Full<Bytes>>)> {
        let mut connection = self.connection().await?;
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{route}", self.base))
            .header(HOST, format!("{}:{}", self.host, self.port))
            .header(CONTENT_TYPE, "application/json");
        if let Some(key) = &self.api_key {
            request = request.header(AUTHORIZATION, format!("Bearer {key}"));
        }
        let request = request.body(Full::new(body)).map_err(|e| Error::config("request", e.to_string()))?;
        let response = connection.send_request(request).await;
        let response = response.map_err(|e| Error::Remote(format!("the server gave no answer: {e}")))?;
        let (head, body) = response.into_parts();
        Ok((head.status, body, connection))
    }

    /// One that is idle, or a new one.
    async fn connection(&self) -> Result<SendRequest<Full<Bytes>>> {
        loop {
            let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let Some(mut connection) = idle else { break };
            if connection.ready().await.is_ok() {
                return Ok(connection);
            }
        }
        let address = (self.host.as_str(), self.port);
        let socket = TcpStream::connect(address).await;
        let socket = socket.map_err(|e| Error::io(format!("{}:{}", self.host, self.port), e))?;
        // Small requests must not wait for more. Failing to say so only costs latency.
        let _ = socket.set_nodelay(true);
        let (sender, connection) = handshake(TokioIo::new(socket))
            .await
            .map_err(|e| Error::Remote(format!("{}:{} speaks no HTTP: {e}", self.host, self.port)))?;
        tokio::spawn(async move {
            // Its failures are seen by the request that it carries.
            let _ = connection.await;
        });
        Ok(sender)
    }

    fn give_back(&self, connection: SendRequest<Full<Bytes>>) {
        if !connection.is_closed() {
            self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
        }
    }
}

async fn collect(body: Incoming) -> Result<Bytes> {
    let whole = Limited::new(body, MAX_TEXT_BYTES).collect().await;
    Ok(whole.map_err(|e| Error::Remote(format!("the answer broke: {e}")))?.to_bytes())
}

/// What a server said instead of answering.
fn refused(status: http::StatusCode, body: &[u8]) -> Error {
    let message = serde_json::from_slice::<Value>(body).ok();
    let message = message.and_then(|json| json["error"]["message"].as_str().map(str::to_owned));
    let message = message.unwrap_or_else(|| String::from_utf8_lossy(body).into_owned());
    Error::Remote(format!("{status}: {}", message.chars().take(MAX_ERROR_CHARS).collect::<String>()))
}

/// Cuts a byte stream into the data of its events.
#[derive(Default)]
struct Events {
    line: Vec<u8>,
}

impl Events {
    fn take(&mut self, bytes: &[u8]) -> Result<Vec<String>> {
        let mut found = Vec::new();
        for &byte in bytes {
            if byte != b'\n' {
                self.line.push(byte);
                if self.line.len() > MAX_TEXT_BYTES {
                    return Err(Error::Remote(format!(
                        "a line of the stream exceeds {MAX_TEXT_BYTES} bytes"
                    )));
                }
                continue;
            }
            let line = String::from_utf8_lossy(&self.line).into_owned();
            self.line.clear();
            // Comments and other fields say nothing about tokens.
            if let Some(data) = line.strip_prefix("data:") {
                found.push(data.trim().to_owned());
            }
        }
        Ok(found)
    }
}

/// What the events of one answer came to.
#[derive(Default)]
struct Answer {
    done: bool,
    latest: Option<Duration>,
    pieces: usize,
    usage: Option<(usize, usize)>,
    timing: Timing,
}

impl Answer {
    fn take(&mut self, event: &str, arrived: Duration) -> Result<()> {
        if event == "[DONE]" {
            self.done = true;
            return Ok(());
        }
        let chunk: Value =
            serde_json::from_str(event).map_err(|e| Error::Remote(format!("an event is no JSON: {e}")))?;
        if let Some(error) = chunk.get("error").filter(|error| !error.is_null()) {
            let message = error["message"].as_str().unwrap_or("(no message)");
            return Err(Error::Remote(message.chars().take(MAX_ERROR_CHARS).collect()));
        }
        if let Some(usage) = chunk["usage"].as_object() {
            let count = |key| usage.get(key).and_then(Value::as_u64).map(|n| n as usize);
            self.usage = count("prompt_tokens").zip(count("completion_tokens"));
        }
        let choices = chunk["choices"].as_array().map_or(&[][..], Vec::as_slice);
        if !choices.iter().any(has_text) {
            return Ok(());
        }
        self.pieces += 1;
        match self.latest {
            None => self.timing.first_s = arrived.as_secs_f64(),
            Some(latest) => self.timing.between_s.push((arrived - latest).as_secs_f64()),
        }
        self.latest = Some(arrived);
        Ok(())
    }

    fn timing(mut self, total: Duration) -> Result<Timing> {
        if !self.done {
            return Err(Error::Remote("the stream ended without [DONE]".into()));
        }
        if self.latest.is_none() {
            return Err(Error::Remote("the stream held no text".into()));
        }
        self.timing.total_s = total.as_secs_f64();
        self.timing.prompt_tokens = self.usage.map(|(prompt, _)| prompt);
        self.timing.output_tokens = self.usage.map_or(self.pieces, |(_, output)| output);
        Ok(self.timing)
    }
}

/// A choice that brings text: a completion's, a chat's, or the thoughts before one. Token ids count where a server
/// sends them, as a token need not be text.
fn has_text(choice: &Value) -> bool {
    let full = |value: &Value| value.as_str().is_some_and(|text| !text.is_empty());
    let delta = &choice["delta"];
    full(&choice["text"])
        || full(&delta["content"])
        || full(&delta["reasoning_content"])
        || choice["token_ids"].as_array().is_some_and(|ids| !ids.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn urls_are_read_and_refused() {
        let client = Client::new("http://[::1]:8000/prefix/v1/", None).unwrap();
        assert_eq!((client.host.as_str(), client.port, client.base.as_str()), ("::1", 8000, "/prefix"));
        assert_eq!(Client::new("http://host", None).unwrap().port, 80);
        for (url, part) in
            [("https://host", "https is not supported"), ("host:1", "http://127.0.0.1:8000"), ("", "such as")]
        {
            let error = Client::new(url, None).err().expect(url).to_string();
            assert!(error.contains(part), "{url}: {error}");
        }
    }

    #[test]
    fn events_are_found_wherever_the_bytes_are_cut() {
        let stream = ": keep-alive\n\ndata: {\"a\": 1}\r\n\r\nevent: x\ndata:[DONE]\n\n";
        for size in 1..stream.len() {
            let mut events = Events::default();
            let found: Vec<_> =
                stream.as_bytes().chunks(size).flat_map(|bytes| events.take(bytes).unwrap()).collect();
            assert_eq!(found, ["{\"a\": 1}", "[DONE]"], "pieces of {size}");
        }
    }

    #[test]
    fn times_are_those_of_pieces_with_text() {
        let mut answer = Answer::default();
        for (event, ms) in [
            (r#"{"choices": [{"delta": {"role": "assistant", "content": ""}}]}"#, 1),
            (r#"{"choices": [{"delta": {"content": "a"}}]}"#, 5),
            (r#"{"choices": [{"text": "b"}]}"#, 7),
            (r#"{"choices": [{"text": "", "finish_reason": "length"}]}"#, 8),
            (r#"{"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 3}}"#, 9),
            ("[DONE]", 9),
        ] {
            answer.take(event, at(ms)).unwrap();
        }
        let timing = answer.timing(at(10)).unwrap();
        assert_eq!((timing.first_s, timing.total_s), (0.005, 0.010));
        assert_eq!((timing.between_s.as_slice(), timing.output_tokens), (&[0.002][..], 3));
        assert_eq!(timing.prompt_tokens, Some(4));
    }

    #[test]
    fn a_broken_answer_is_an_error() {
        let mut answer = Answer::default();
        let error = answer.take(r#"{"error": {"message": "overloaded"}}"#, at(1)).unwrap_err().to_string();
        assert!(error.contains("overloaded"), "{error}");
        assert!(answer.take("{", at(1)).is_err());
        answer.take(r#"{"choices": [{"text": "b"}]}"#, at(2)).unwrap();
        assert!(answer.timing(at(3)).unwrap_err().to_string().contains("without [DONE]"));
        assert!(Answer { done: true, ..Answer::default() }.timing(at(1)).is_err());
    }
}
