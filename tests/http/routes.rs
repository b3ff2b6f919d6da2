//! The small routes.

use moeyard::server::{ServerOptions, Stage, while_loading};
use serde_json::json;

use crate::client::Client;
use crate::harness::{Config, Server, greedy};
use crate::patience::eventually;

#[test]
fn models_are_listed_and_found_by_name() {
    let server = Server::start();
    let list = server.client().get("/v1/models").json();
    assert_eq!(list["object"], "list");
    let ids: Vec<_> = list["data"].as_array().unwrap().iter().map(|card| card["id"].clone()).collect();
    assert_eq!(ids, ["demo", "org/alias"]);
    assert_eq!(list["data"][0]["max_model_len"], 512);
    for path in ["/v1/models/org/alias", "/v1/models/org%2Falias"] {
        let card = server.client().get(path).json();
        assert_eq!(card["id"], "org/alias", "{path}");
        assert_eq!(card["root"], "demo");
        assert_eq!(card["object"], "model");
    }
}

#[test]
fn health_and_version() {
    let server = Server::start();
    let health = server.client().get("/health");
    assert_eq!((health.status, health.body.as_str()), (200, ""));
    assert_eq!(server.client().get("/version").json()["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(server.client().request("HEAD", "/health", &[], b"").status, 200);
    for (method, path) in [("GET", "/livez"), ("GET", "/readyz"), ("GET", "/ping"), ("POST", "/ping")] {
        assert_eq!(server.client().request(method, path, &[], b"").status, 200, "{method} {path}");
    }
    assert_eq!(server.client().get("/load").json(), json!({"server_load": 0}));
}

#[test]
fn a_draining_server_is_alive_and_not_ready() {
    let server = Server::held(Config::default());
    let mut running = server.client();
    running.send_json("/v1/completions", &greedy(json!({"prompt": "x", "max_tokens": 400, "stream": true})));
    eventually("it runs", || server.stats().running == 1);
    assert_eq!(server.client().get("/load").json(), json!({"server_load": 1}));
    server.shutdown.advance(Stage::Draining);
    let not_ready = server.client().get("/readyz");
    assert_eq!(not_ready.status, 503);
    assert!(not_ready.header("retry-after").is_some(), "{}", not_ready.body);
    assert_eq!(not_ready.error()["type"], "ServiceUnavailable");
    assert_eq!(server.client().get("/livez").status, 200);
    assert_eq!(server.client().get("/health").status, 200);
}

#[test]
fn a_server_that_loads_is_alive_and_not_ready() {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    let (loaded, loading) = tokio::sync::oneshot::channel::<u32>();
    let serving = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            while_loading(&listener, &ServerOptions::default(), loading).await
        })
    });
    assert_eq!(Client::connect(address).get("/livez").status, 200);
    for path in ["/readyz", "/health", "/v1/models", "/nowhere"] {
        let answer = Client::connect(address).get(path);
        assert_eq!(answer.status, 503, "{path}");
        assert!(answer.error()["message"].as_str().unwrap().contains("loaded"), "{}", answer.body);
        assert!(answer.header("retry-after").is_some() && answer.header("x-request-id").is_some());
    }
    let asked = json!({"prompt": "x"});
    assert_eq!(Client::connect(address).post("/v1/completions", &asked).status, 503);
    loaded.send(7).unwrap();
    assert_eq!(serving.join().unwrap(), Ok(7));
}

#[test]
fn every_answer_has_a_request_id() {
    let server = Server::start();
    let id = |headers: &[(&str, &str)], path| {
        let response = server.client().request("GET", path, headers, b"");
        response.header("x-request-id").expect(path).to_owned()
    };
    assert_eq!(id(&[("X-Request-Id", "client-1.2:3")], "/health"), "client-1.2:3");
    for bad in ["two words", "{}", &"x".repeat(129)] {
        assert!(id(&[("X-Request-Id", bad)], "/health").starts_with("req-"), "{bad}");
    }
    assert_ne!(id(&[], "/nowhere"), id(&[], "/nowhere"));
    let stream = server.complete(json!({"prompt": "x", "max_tokens": 2, "stream": true}));
    assert!(stream.header("x-request-id").is_some());
}
