//! The log: a reader that blocks costs lines and nothing else, and what clients send never appears in it.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};

use serde_json::json;
use tempfile::TempDir;

use crate::client::Client;
use crate::process::{Served, end_of};

/// A server whose log is read until it listens and then no more; killed when dropped.
struct Unread {
    child: Child,
    address: SocketAddr,
    _log: BufReader<std::process::ChildStderr>,
}

impl Unread {
    fn start() -> Unread {
        let mut child = Command::new(env!("CARGO_BIN_EXE_moeyard"))
            .args(["serve", "--port", "0", "--threads", "1", "--kv-cache-memory", "16MiB"])
            .env("MOEYARD_LOG", "debug")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let mut log = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        let address = loop {
            line.clear();
            assert!(log.read_line(&mut line).expect("the log is UTF-8") > 0, "it ended");
            if let Some((_, rest)) = line.split_once("listening on http://") {
                break rest.split_whitespace().next().unwrap().parse().expect("an address");
            }
        };
        Unread { child, address, _log: log }
    }

    fn dropped_lines(&self) -> f64 {
        let page = Client::connect(self.address).get("/metrics").body;
        let line = page
            .lines()
            .find(|line| line.starts_with("moeyard_log_dropped_lines_total "))
            .expect("the series");
        line.rsplit_once(' ').unwrap().1.parse().unwrap()
    }
}

impl Drop for Unread {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_log_that_nobody_reads_costs_lines_and_no_time() {
    let mut server = Unread::start();
    assert_eq!(server.dropped_lines(), 0.0);
    // Every connection that speaks no HTTP is a line; the pipe and the queue hold a few thousand.
    let mut sent = 0;
    while server.dropped_lines() == 0.0 {
        for _ in 0..500 {
            TcpStream::connect(server.address)
                .unwrap()
                .write_all(b"\x16\x03 this is no HTTP\r\n\r\n")
                .unwrap();
        }
        sent += 500;
        assert!(sent < 20_000, "{sent} lines and none was dropped");
    }
    let ask = json!({"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0, "ignore_eos": true});
    let answer = Client::connect(server.address).post("/v1/completions", &ask);
    assert_eq!(answer.json()["usage"]["completion_tokens"], 8);
    // And it ends, although its last words find no room either.
    // SAFETY: a plain system call; the child has not been waited for, so its id is its own.
    assert_eq!(unsafe { libc::kill(server.child.id() as i32, libc::SIGTERM) }, 0);
    assert_eq!(end_of(&mut server.child), Some(0));
}

#[test]
fn neither_prompts_nor_keys_are_logged() {
    const CANARY: &str = "canary7f3a";
    let folder = TempDir::new().unwrap();
    let key = format!("{CANARY}-key");
    let flags = ["--threads", "1", "--kv-cache-memory", "16MiB", "--api-key", &key];
    let server = Served::start(folder.path(), flags);
    let bearer = format!("Bearer {key}");
    let wrong = format!("Bearer {CANARY}-wrong");
    let json = ("Content-Type", "application/json");
    let post = |key: &str, path: &str, body: serde_json::Value| {
        server
            .client()
            .request("POST", path, &[json, ("Authorization", key)], body.to_string().as_bytes())
            .status
    };
    let prompt = json!({"prompt": format!("{CANARY} {CANARY}"), "max_tokens": 4, "user": CANARY});
    assert_eq!(post(&bearer, "/v1/completions", prompt.clone()), 200);
    assert_eq!(post(&wrong, "/v1/completions", prompt), 401);
    assert_eq!(post(&bearer, "/v1/completions", json!({"prompt": CANARY, "temperature": CANARY})), 400);
    assert_eq!(post(&bearer, "/v1/completions", json!({"prompt": CANARY, CANARY: 1})), 400);
    assert_eq!(post(&bearer, "/v1/completions", json!({"prompt": CANARY, "model": CANARY})), 404);
    assert_eq!(post(&bearer, &format!("/{CANARY}"), json!({})), 404);
    // A client that leaves in the middle of its answer.
    let stream = json!({"prompt": CANARY, "max_tokens": 200, "stream": true, "ignore_eos": true}).to_string();
    let mut leaver = server.client();
    leaver.send("POST", "/v1/completions", &[json, ("Authorization", &bearer)], stream.as_bytes());
    assert_eq!(leaver.head().status, 200);
    drop(leaver);
    let (code, log) = server.terminate();
    assert_eq!(code, Some(0));
    assert!(log.contains("listening on"), "the log was read: {log}");
    assert!(!log.contains(CANARY), "{log}");
}
