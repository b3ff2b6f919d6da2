//! Clients that send too much, too slowly, or never stop.

use std::time::Duration;

use serde_json::json;

use crate::client::Client;
use crate::harness::{Config, Server};

/// What is awaited in vain need not be awaited for long.
const IN_VAIN: Duration = Duration::from_millis(200);

fn small_bodies() -> Config {
    let mut config = Config::default();
    config.options.max_body_bytes = 100_000;
    config
}

#[test]
fn an_announced_body_over_the_limit_is_413_before_it_is_sent() {
    let server = Server::with(small_bodies());
    let mut client = server.client();
    client.raw(b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\nContent-Length: 100001\r\n\r\n");
    let response = client.response();
    assert_eq!(response.status, 413);
    assert!(response.error()["message"].as_str().unwrap().contains("100000"));
    assert_eq!(response.header("connection"), Some("close"));
}

#[test]
fn a_chunked_body_is_counted_while_it_comes() {
    let server = Server::with(small_bodies());
    let mut client = server.client();
    client.raw(b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n");
    let chunk = format!("{:x}\r\n{}\r\n", 20_000, "x".repeat(20_000));
    for _ in 0..6 {
        client.raw(chunk.as_bytes());
    }
    assert_eq!(client.response().status, 413);
}

#[test]
fn a_body_of_the_full_size_is_read() {
    let server = Server::with(small_bodies());
    let mut body = json!({"prompt": "x", "max_tokens": 1, "user": ""}).to_string();
    let padding = 100_000 - body.len();
    body.insert_str(body.len() - 2, &"u".repeat(padding));
    let response = server.client().request(
        "POST",
        "/v1/completions",
        &[("Content-Type", "application/json")],
        body.as_bytes(),
    );
    assert_eq!(response.status, 200, "{}", response.body);
}

#[test]
fn a_body_that_does_not_come_is_408() {
    let mut config = Config::default();
    config.options.body_read_timeout = IN_VAIN;
    let server = Server::with(config);
    let mut client = server.client();
    client.raw(b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{");
    let response = client.response();
    assert_eq!(response.status, 408);
    assert_eq!(response.error()["type"], "RequestTimeout");
}

/// A hundred clients that stop in the middle of their headers.
fn half_sent(server: &Server) -> Vec<Client> {
    let mut half: Vec<Client> = (0..100).map(|_| server.client()).collect();
    half.iter_mut().for_each(|client| client.raw(b"GET /health HTTP/1.1\r\nHost: "));
    half
}

#[test]
fn half_sent_headers_hold_up_nobody() {
    let server = Server::start();
    let _half = half_sent(&server);
    assert_eq!(server.client().get("/health").status, 200);
}

#[test]
fn half_sent_headers_are_cut_off() {
    let mut config = Config::default();
    config.options.header_read_timeout = IN_VAIN;
    for mut client in half_sent(&Server::with(config)) {
        client.until_closed();
    }
}

#[test]
fn too_many_or_too_large_headers_are_431() {
    let server = Server::start();
    let mut client = server.client();
    client.raw(b"GET /health HTTP/1.1\r\nHost: t\r\n");
    client.raw("X-Many: 1\r\n".repeat(150).as_bytes());
    client.raw(b"\r\n");
    let response = client.response();
    assert_eq!((response.status, &response.error()["type"]), (431, &json!("HeaderTooLarge")));

    let mut client = server.client();
    client.raw(b"GET /health HTTP/1.1\r\nHost: t\r\nX-Large: ");
    client.raw("x".repeat(80 << 10).as_bytes());
    client.raw(b"\r\n\r\n");
    let response = client.response();
    assert_eq!((response.status, &response.error()["type"]), (431, &json!("HeaderTooLarge")));
}

/// CVE-2025-48956: huge headers ate memory. The client, which goes on sending far beyond the limit, hears why all the same;
/// that nothing is kept is seen in tests/cli, where the server is alone in its process.
#[test]
fn cve_2025_48956_huge_headers_are_431() {
    let server = Server::start();
    for kilobytes in [256, 16 << 10] {
        let mut client = server.client();
        client.raw(b"GET /health HTTP/1.1\r\nHost: t\r\nX-Large: ");
        for _ in 0..kilobytes / 64 {
            client.raw(&[b'x'; 64 << 10]);
        }
        client.raw(b"\r\n\r\n");
        let response = client.response();
        assert_eq!((response.status, &response.error()["type"]), (431, &json!("HeaderTooLarge")));
        assert_eq!(response.header("connection"), Some("close"));
        assert_eq!(client.until_closed(), b"");
    }
    assert_eq!(server.client().get("/health").status, 200);
    assert_eq!(server.metric(r#"moeyard_http_responses_total{route="other",code="431"}"#), 2.0);
}

#[test]
fn a_request_without_a_host_and_a_path_that_is_no_text_are_400() {
    let server = Server::start();
    let mut client = server.client();
    client.raw(b"GET /health HTTP/1.1\r\n\r\n");
    let response = client.response();
    assert_eq!((response.status, &response.error()["type"]), (400, &json!("BadRequestError")));
    let response = server.client().get("/v1/models/%ff");
    assert_eq!((response.status, &response.error()["type"]), (400, &json!("BadRequestError")));
}

#[test]
fn a_connection_carries_many_requests() {
    let server = Server::start();
    let mut client = server.client();
    for _ in 0..3 {
        assert_eq!(client.get("/health").status, 200);
        assert_eq!(client.post("/v1/completions", &json!({"prompt": "x", "max_tokens": 2})).status, 200);
        assert_eq!(client.post("/v1/completions", &json!({"prompt": "x", "n": 0})).status, 400);
    }
}
