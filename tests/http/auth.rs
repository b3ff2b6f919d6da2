//! API keys, as ECOSYSTEM's rule has it: before every route but the health ones.

use moeyard::server::ApiKeys;
use serde_json::json;

use crate::harness::{Config, Server};

fn locked() -> Server {
    let mut config = Config::default();
    config.options.api_keys = ApiKeys::new(["right", "another"]);
    Server::with(config)
}

/// CVE-2025-59425: the comparison itself is constant in time by `subtle`; here, that it decides and guards all.
#[test]
fn cve_2025_59425_keys_guard_every_route_but_the_health_ones() {
    let server = locked();
    let body = json!({"prompt": "x", "max_tokens": 1}).to_string();
    let status = |method, path, authorization: Option<&str>| {
        let mut headers = vec![("Content-Type", "application/json")];
        headers.extend(authorization.map(|value| ("Authorization", value)));
        server.client().request(method, path, &headers, body.as_bytes()).status
    };
    for (method, path, opened) in [
        ("POST", "/v1/completions", 200),
        ("GET", "/v1/models", 200),
        ("GET", "/v1/models/demo", 200),
        ("POST", "/tokenize", 400),
        ("POST", "/detokenize", 400),
        ("GET", "/metrics", 200),
        ("GET", "/version", 200),
        ("GET", "/load", 200),
        ("GET", "/ping", 200),
        ("GET", "/experts", 200),
        ("GET", "/v1/experts/rebalance", 200),
        ("GET", "/nowhere", 404),
        ("DELETE", "/v1/models", 405),
        ("OPTIONS", "/v1/completions", 405),
        ("GET", "//health", 404),
        ("PUT", "/v1/experts/placement", 404),
    ] {
        for wrong in [None, Some("Bearer wrong"), Some("Bearer "), Some("right"), Some("Basic right")] {
            assert_eq!(status(method, path, wrong), 401, "{method} {path} {wrong:?}");
        }
        for right in ["Bearer right", "bearer another"] {
            let found = status(method, path, Some(right));
            assert!(
                found == opened || (path.starts_with("/v1/experts") && found >= 400 && found != 401),
                "{method} {path}: {found}"
            );
        }
    }
    for path in ["/health", "/livez", "/readyz"] {
        assert_eq!(status("GET", path, None), 200, "{path}");
    }
}

#[test]
fn a_401_is_an_error_object_with_a_challenge_and_tells_no_key() {
    let server = locked();
    let response =
        server.client().request("GET", "/v1/models", &[("Authorization", "Bearer wrong-canary")], b"");
    assert_eq!(response.status, 401);
    assert_eq!(response.error()["type"], "AuthenticationError");
    assert_eq!(response.header("www-authenticate"), Some("Bearer"));
    assert!(!response.body.contains("canary") && !response.body.contains("right"), "{}", response.body);
}

#[test]
fn a_server_without_keys_is_open_and_ignores_what_clients_send() {
    let server = Server::start();
    let response = server.client().request("GET", "/v1/models", &[("Authorization", "Bearer whatever")], b"");
    assert_eq!(response.status, 200);
}
