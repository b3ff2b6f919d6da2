//! The small routes.

use crate::harness::Server;

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
}
