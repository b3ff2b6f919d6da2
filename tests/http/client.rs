//! The smallest HTTP client that can also misbehave.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};

use serde_json::Value;

use crate::patience::PATIENCE;

/// One connection.
pub struct Client {
    stream: BufReader<TcpStream>,
}

/// A whole response.
#[derive(Debug)]
pub struct Response {
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Response {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    /// The `data:` payloads of an event stream.
    pub fn events(&self) -> Vec<String> {
        self.body.lines().filter_map(|line| line.strip_prefix("data: ")).map(str::to_owned).collect()
    }

    /// The chunks of a stream that must end with `[DONE]`.
    pub fn chunks(&self) -> Vec<Value> {
        let mut events = self.events();
        assert_eq!(events.pop().as_deref(), Some("[DONE]"), "{}", self.body);
        events.iter().map(|event| serde_json::from_str(event).expect(event)).collect()
    }

    /// The error object, after checking its shape.
    pub fn error(&self) -> Value {
        let error = self.json()["error"].clone();
        assert_eq!(error["code"], self.status, "{}", self.body);
        assert!(error["message"].is_string() && error["type"].is_string(), "{}", self.body);
        assert!(error.get("param").is_some(), "{}", self.body);
        error
    }
}

impl Client {
    pub fn connect(address: SocketAddr) -> Client {
        Client::try_connect(address).expect("a server that listens")
    }

    /// `None` when nobody listens there any more.
    pub fn try_connect(address: SocketAddr) -> Option<Client> {
        let stream = TcpStream::connect(address).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Some(Client { stream: BufReader::new(stream) })
    }

    pub fn get(&mut self, path: &str) -> Response {
        self.request("GET", path, &[], b"")
    }

    /// As [`Self::get`]; `None` when the server closes the connection without an answer, as it may while it shuts down.
    pub fn try_get(&mut self, path: &str) -> Option<Response> {
        self.send("GET", path, &[], b"");
        let answered = self.stream.fill_buf().is_ok_and(|bytes| !bytes.is_empty());
        answered.then(|| self.response())
    }

    pub fn post(&mut self, path: &str, body: &Value) -> Response {
        self.request("POST", path, &[("Content-Type", "application/json")], body.to_string().as_bytes())
    }

    pub fn request(&mut self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Response {
        self.send(method, path, headers, body);
        self.response()
    }

    /// Sends a request and reads nothing.
    pub fn send(&mut self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) {
        let mut head =
            format!("{method} {path} HTTP/1.1\r\nHost: test\r\nContent-Length: {}\r\n", body.len());
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        self.raw(head.as_bytes());
        self.raw(body);
    }

    pub fn send_json(&mut self, path: &str, body: &Value) {
        self.send("POST", path, &[("Content-Type", "application/json")], body.to_string().as_bytes());
    }

    /// Sends bytes as they are. A server that closes early is not an error here.
    pub fn raw(&mut self, bytes: &[u8]) {
        let _ = self.stream.get_mut().write_all(bytes);
    }

    /// Reads one whole response.
    pub fn response(&mut self) -> Response {
        let mut response = self.head();
        let mut body = Vec::new();
        if response.header("transfer-encoding") == Some("chunked") {
            while let Some(mut chunk) = self.chunk() {
                body.append(&mut chunk);
            }
        } else if let Some(length) = response.header("content-length") {
            body.resize(length.parse().unwrap(), 0);
            self.stream.read_exact(&mut body).expect("body");
        }
        response.body = String::from_utf8(body).expect("UTF-8");
        response
    }

    /// Reads status and headers.
    pub fn head(&mut self) -> Response {
        let status_line = self.line();
        let status = status_line.split(' ').nth(1).and_then(|code| code.parse().ok());
        let mut headers = Vec::new();
        loop {
            let line = self.line();
            if line.is_empty() {
                break;
            }
            let (name, value) = line.split_once(':').expect(&line);
            headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
        let status = status.unwrap_or_else(|| panic!("status line {status_line:?}"));
        Response { status, headers, body: String::new() }
    }

    /// The next chunk of a chunked body; `None` after the last.
    pub fn chunk(&mut self) -> Option<Vec<u8>> {
        let size = usize::from_str_radix(&self.line(), 16).expect("chunk size");
        let mut chunk = vec![0; size + 2];
        self.stream.read_exact(&mut chunk).expect("chunk");
        chunk.truncate(size);
        (size > 0).then_some(chunk)
    }

    /// Reads until the server closes; bytes that came before.
    pub fn until_closed(&mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "still open"),
        }
        rest
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.stream.read_line(&mut line).expect("line");
        line.trim_end().to_owned()
    }
}
