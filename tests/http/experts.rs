//! `GET /v1/experts` and its placement.

use std::sync::{Arc, Mutex};

use moeyard::metrics::{LoadSnapshot, LoadSource};
use router_sim::load::LoadWindow;
use router_sim::placement::{ClusterShape, Expected, Linear, Placement, PlacementPolicy};
use serde_json::json;

use crate::harness::{Config, Server};

/// A load that a test sets by hand.
pub struct Table(Mutex<LoadSnapshot>);

impl LoadSource for Table {
    fn snapshot(&self) -> LoadSnapshot {
        self.0.lock().unwrap().clone()
    }

    fn step_imbalance(&self) -> f64 {
        0.3
    }

    fn placement(&self) -> Arc<Placement> {
        let shape = ClusterShape { ranks: 2, redundant: 0 };
        Arc::new(Linear.place(&LoadWindow::new(&[1, 2], 4), &shape).unwrap())
    }
}

pub fn table() -> Arc<Table> {
    let mut load = LoadSnapshot::zeros(vec![1, 2], 4, 2);
    // [phase][layer][expert]; rank 0 has experts 0 and 1, rank 1 the others.
    load.by_expert = vec![6, 2, 2, 2, 1, 1, 1, 1, 3, 0, 0, 1, 0, 0, 0, 0];
    load.by_rank = vec![8, 4, 2, 2, 3, 1, 0, 0];
    Arc::new(Table(Mutex::new(load)))
}

/// A server whose load has grown since it started: expert 3 of layer 2 took 5 more tokens while decoding.
pub fn grown() -> Server {
    let table = table();
    let server = Server::with(Config { load: Some(table.clone()), ..Config::default() });
    let mut load = table.0.lock().unwrap();
    load.by_expert[15] += 5;
    load.by_rank[7] += 5;
    load.sent[7] += 5;
    drop(load);
    server
}

#[test]
fn the_window_has_what_came_since_it_began() {
    let server = grown();
    let response = server.client().get("/v1/experts?window=60s&format=json");
    assert_eq!((response.status, response.header("content-type")), (200, Some("application/json")));
    let load = response.json();
    assert_eq!(load["object"], "expert_load");
    assert_eq!(
        (&load["layer_ids"], &load["experts"], &load["ranks"]),
        (&json!([1, 2]), &json!(4), &json!(2))
    );
    assert_eq!(
        load["expert_tokens"]["prefill"],
        json!([[0, 0, 0, 0], [0, 0, 0, 0]]),
        "older than the server"
    );
    assert_eq!(load["expert_tokens"]["decode"], json!([[0, 0, 0, 0], [0, 0, 0, 5]]));
    assert_eq!(load["rank_tokens"]["decode"], json!([[0, 0], [0, 5]]));
    assert_eq!(load["owner_ranks"], json!([[[0], [0], [1], [1]], [[0], [0], [1], [1]]]));
    assert_eq!(load["replicas"], json!([[1, 1, 1, 1], [1, 1, 1, 1]]));
    assert_eq!(load["sent_tokens"]["decode"], json!([[0, 0], [0, 5]]));
    let window = load["window_seconds"].as_f64().unwrap();
    assert!((0.0..60.0).contains(&window), "the server is younger than the window: {window}");
}

#[test]
fn csv_has_a_line_per_expert() {
    let response = grown().client().get("/v1/experts?format=csv");
    assert_eq!(response.header("content-type"), Some("text/csv; charset=utf-8"));
    let lines: Vec<_> = response.body.lines().collect();
    assert_eq!(lines.len(), 1 + 2 * 4);
    assert_eq!(lines[0], "layer,expert,prefill_tokens,decode_tokens,replicas,owner_ranks");
    assert_eq!((lines[1], lines[8]), ("1,0,0,0,1,0", "2,3,0,5,1,1"));
}

#[test]
fn a_client_that_has_the_answer_gets_304() {
    let server = grown();
    for path in ["/v1/experts?window=30s", "/v1/experts/placement"] {
        // The answer is kept for a second; a slow machine may need a second try.
        let unchanged = (0..20).any(|_| {
            let etag = server.client().get(path).header("etag").expect("a tag").to_owned();
            let again = server.client().request("GET", path, &[("If-None-Match", &etag)], b"");
            assert_eq!(again.header("cache-control"), Some("private, max-age=1"));
            assert!(again.status == 200 || again.body.is_empty());
            again.status == 304
        });
        assert!(unchanged, "{path}");
        let other = server.client().request("GET", path, &[("If-None-Match", "\"other\"")], b"");
        assert_eq!(other.status, 200, "{path}");
    }
}

#[test]
fn the_placement_is_a_file_that_the_flag_takes() {
    let body = grown().client().get("/v1/experts/placement").body;
    let expected = Expected { ranks: Some(2), experts: 4, layer_ids: &[1, 2] };
    assert_eq!(Placement::from_json(&body, &expected).unwrap(), *table().placement());
}

#[test]
fn bad_queries_are_refused_by_name() {
    let server = grown();
    for (query, param, part) in [
        ("window=1h", "window", "5s to 300s"),
        ("window=86400s", "window", "86400s"),
        ("format=svg", "format", "json or csv"),
        ("layers=3", "layers", "known are window, format, phase and owners"),
        ("window=60s&window=5s", "window", "given twice"),
    ] {
        let response = server.client().get(&format!("/v1/experts?{query}"));
        let error = response.error();
        assert_eq!((response.status, &error["param"]), (400, &json!(param)), "{query}");
        assert!(error["message"].as_str().unwrap().contains(part), "{query}: {error}");
    }
    let without = Server::start();
    assert_eq!(without.client().get("/v1/experts").status, 503, "no load, no answer");
    assert_eq!(server.client().post("/v1/experts", &json!({})).status, 405);
}
