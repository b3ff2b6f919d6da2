//! Moving experts by hand: `PUT /v1/experts/placement` and `POST /v1/experts/rebalance`.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use moeyard::engine::Experts;
use moeyard::engine::scripted::{EXPERTS, LAYERS, experts};
use moeyard::metrics::{LoadSnapshot, LoadSource};
use router_sim::placement::Placement;
use serde_json::{Value, json};

use crate::client::Response;
use crate::harness::{Config, Server, greedy};
use crate::patience::eventually;

const RANKS: usize = 2;
/// Per layer, over all ranks.
const SLOTS: usize = EXPERTS + 2;

/// The load that a test sets, computed where the engine's experts live.
struct World {
    load: Mutex<LoadSnapshot>,
    experts: Experts,
}

impl LoadSource for World {
    fn snapshot(&self) -> LoadSnapshot {
        self.load.lock().unwrap().clone()
    }

    fn step_imbalance(&self) -> f64 {
        0.0
    }

    fn placement(&self) -> Arc<Placement> {
        self.experts.in_force.placement()
    }
}

impl World {
    /// In every layer, expert 2 takes half of the tokens.
    fn heat(&self) {
        let mut load = self.load.lock().unwrap();
        for row in load.by_expert.chunks_exact_mut(EXPERTS) {
            row.iter_mut().for_each(|tokens| *tokens += 100);
            row[2] += 700;
        }
    }
}

/// A server whose experts can move, with spare slots; weights travel at `bandwidth`.
fn movable(bandwidth: Option<u64>) -> (Server, Arc<World>) {
    let experts = Experts { bandwidth, ..experts(RANKS, SLOTS - EXPERTS, 1) };
    let load = Mutex::new(LoadSnapshot::zeros((0..LAYERS).collect(), EXPERTS, RANKS));
    let world = Arc::new(World { load, experts: experts.clone() });
    let config = Config { load: Some(world.clone()), experts: Some(experts), ..Config::default() };
    (Server::with(config), world)
}

fn put(server: &Server, query: &str, body: &str) -> Response {
    let path = format!("/v1/experts/placement{query}");
    server.client().request("PUT", &path, &[("Content-Type", "application/json")], body.as_bytes())
}

fn rebalance(server: &Server, body: &Value) -> Response {
    server.client().post("/v1/experts/rebalance", body)
}

/// The same map in every layer, rank-major.
fn file(map: [i32; SLOTS]) -> Value {
    json!({
        "version": 1, "ranks": RANKS, "slots_per_rank": SLOTS / RANKS, "layer_ids": (0..LAYERS).collect::<Vec<_>>(),
        "physical_to_logical_map": vec![map.to_vec(); LAYERS],
    })
}

/// Experts in reverse, with second copies of 2 and 7 on the other rank.
const REVERSED: [i32; SLOTS] = [7, 6, 5, 4, 2, 3, 2, 1, 0, 7];
/// Experts in order, without copies.
const FORWARD: [i32; SLOTS] = [0, 1, 2, 3, -1, 4, 5, 6, 7, -1];

fn version(server: &Server) -> u64 {
    let placement = server.client().get("/v1/experts/placement");
    placement.header("x-placement-version").expect("a version").parse().unwrap()
}

fn arrived(server: &Server, target: u64) {
    eventually("all experts have arrived", || version(server) == target);
    eventually("the migration has ended", || {
        server.client().get("/v1/experts/rebalance").json()["migration"].is_null()
    });
}

#[test]
fn experts_go_where_a_file_says_and_everything_follows() {
    let (server, _world) = movable(None);
    let wanted = file(REVERSED);
    let response = put(&server, "", &wanted.to_string());
    let change = response.json();
    assert_eq!(
        (response.status, &change["object"], &change["started"]),
        (202, &json!("placement_change"), &json!(true))
    );
    assert!(change["moves"].as_u64().unwrap() > 0 && change["bytes"].as_u64().unwrap() > 0, "{change}");
    let target = change["target_version"].as_u64().unwrap();
    assert!(target > change["placement_version"].as_u64().unwrap());
    arrived(&server, target);
    let now = server.client().get("/v1/experts/placement").json();
    assert_eq!(now["physical_to_logical_map"], wanted["physical_to_logical_map"]);
    assert_eq!(server.metric("moeyard_placement_version"), target as f64);
    eventually("the load tells the version", || {
        let load = server.client().get("/v1/experts?owners=true").json();
        load["placement_version"] == target && load["owner_ranks"][0][2] == json!([0, 1])
    });
    let again = put(&server, "", &wanted.to_string());
    let change = again.json();
    assert_eq!((again.status, &change["started"], &change["moves"]), (200, &json!(false), &json!(0)));
    assert_eq!(change["reason"], "that placement is in force already");

    // SGLang's form: the map alone; to JSON Schema, 3.0 is an integer.
    let floats = FORWARD.map(f64::from);
    let bare = json!({"physical_to_logical_map": vec![floats.to_vec(); LAYERS]});
    let response = put(&server, "", &bare.to_string());
    assert_eq!(response.status, 202, "{}", response.body);
    arrived(&server, response.json()["target_version"].as_u64().unwrap());
}

#[test]
fn a_dry_run_tells_and_changes_nothing() {
    let (server, world) = movable(None);
    world.heat();
    let response = put(&server, "?dry_run=true", &file(REVERSED).to_string());
    let change = response.json();
    assert_eq!((response.status, &change["dry_run"], &change["started"]), (200, &json!(true), &json!(false)));
    let forecast = &change["balancedness"];
    assert!(forecast["before"].as_f64() < forecast["after"].as_f64(), "{change}");
    assert!(change["target_version"].as_u64() > Some(0) && change["moves"].as_u64() > Some(0), "{change}");
    assert_eq!((version(&server), server.stats().running), (0, 0));
    assert!(server.client().get("/v1/experts/rebalance").json()["migration"].is_null());
}

#[test]
fn a_placement_that_does_not_fit_is_refused_by_layer_slot_limit_and_value() {
    let (server, _world) = movable(None);
    let changed = |path: &str, value: Value| {
        let mut file = file(FORWARD);
        *file.pointer_mut(path).unwrap() = value;
        file.to_string()
    };
    let mut unknown = file(FORWARD);
    unknown["extra"] = json!(1);
    for (body, part) in [
        (
            changed("/physical_to_logical_map/1/3", json!(8)),
            "layer 1, slot 3 (rank 0): expert 8 is neither below 8",
        ),
        (changed("/physical_to_logical_map/1/3", json!(-2)), "expert -2"),
        (changed("/physical_to_logical_map/0/8", json!(0)), "layer 0: expert 7 has no slot"),
        (changed("/physical_to_logical_map/1", json!([0, 1])), "layer 1 lists 2 slots"),
        (changed("/ranks", json!(4)), "made for 4 ranks, but there are 2"),
        (changed("/layer_ids", json!([0, 5])), "layer_ids [0, 5] are not the model's MoE layers [0, 1]"),
        (changed("/version", json!(9)), "version 9 is unknown"),
        (changed("/physical_to_logical_map/1/3", json!("x")), "physical_to_logical_map[1][3]: invalid type"),
        (changed("/physical_to_logical_map/1/3", json!(1.5)), "physical_to_logical_map[1][3]: invalid type"),
        (unknown.to_string(), "unknown field `extra`"),
        (
            json!({"physical_to_logical_map": vec![vec![0, 1, 2, 3, 4, 5, 6, 7]; LAYERS]}).to_string(),
            "4 slots per rank, but the engine runs with 5",
        ),
        ("{}".into(), "physical_to_logical_map"),
        ("[".into(), "EOF"),
        (String::new(), "EOF"),
    ] {
        let response = put(&server, "", &body);
        let message = response.error()["message"].as_str().unwrap().to_owned();
        let no_placement = ["unknown field `extra`", "physical_to_logical_map", "EOF"];
        let status = if no_placement.iter().any(|sign| part.starts_with(sign)) { 400 } else { 409 };
        assert_eq!(response.status, status, "{body}");
        assert!(message.contains(part), "{message:?} should contain {part:?}");
    }
    let binary = server.client().request("PUT", "/v1/experts/placement", &[], b"\xff\xfe");
    assert_eq!(binary.status, 400);
    let form =
        server.client().request("PUT", "/v1/experts/placement", &[("Content-Type", "text/plain")], b"{}");
    assert_eq!(form.status, 415);
    for (query, param) in
        [("?dry_run=yes", "dry_run"), ("?force=true", "force"), ("?dry_run=true&dry_run=true", "dry_run")]
    {
        let response = put(&server, query, &file(REVERSED).to_string());
        assert_eq!((response.status, &response.error()["param"]), (400, &json!(param)), "{query}");
    }
    assert_eq!(version(&server), 0);
}

#[test]
fn one_migration_at_a_time() {
    // A byte a second: the first one does not end while this test runs.
    let (server, world) = movable(Some(1));
    world.heat();
    let bodies = [file(REVERSED), file(FORWARD)].map(|file| file.to_string());
    let answers: Vec<_> = std::thread::scope(|scope| {
        let puts: Vec<_> = (0..8)
            .map(|i| {
                scope.spawn({
                    let (server, bodies) = (&server, &bodies);
                    move || put(server, "", &bodies[i % 2])
                })
            })
            .collect();
        puts.into_iter().map(|put| put.join().unwrap()).collect()
    });
    let started = answers.iter().filter(|answer| answer.status == 202).count();
    assert_eq!(started, 1, "{answers:?}");
    for answer in answers.iter().filter(|answer| answer.status != 202) {
        assert_eq!(answer.status, 409);
        assert!(
            answer.error()["message"].as_str().unwrap().contains("another migration is under way"),
            "{}",
            answer.body
        );
    }
    assert_eq!(rebalance(&server, &json!({})).status, 409);
    assert_eq!(rebalance(&server, &json!({"dry_run": true})).status, 200, "asking is allowed");
    let migration = server.client().get("/v1/experts/rebalance").json()["migration"].clone();
    assert!(migration["arrivals"].as_u64() > Some(0) && migration["arrived"] == 0, "{migration}");
    assert_eq!(server.metric("moeyard_rebalance_in_progress"), 1.0);
    // Requests are answered meanwhile.
    assert_eq!(server.complete(json!({"prompt": [50, 51], "max_tokens": 5})).status, 200);
}

#[test]
fn moving_under_load_leaves_every_text_as_it_is() {
    let (server, _world) = movable(None);
    let running = AtomicBool::new(true);
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..3)
            .map(|i| {
                let (server, running) = (&server, &running);
                scope.spawn(move || {
                    let mut texts = 0;
                    while running.load(Ordering::Relaxed) || texts == 0 {
                        let prompt = format!("client {i} asks for text {texts}");
                        let answer = server.complete(json!({"prompt": prompt, "max_tokens": 24}));
                        assert_eq!(answer.status, 200, "{}", answer.body);
                        assert_eq!(answer.json()["choices"][0]["text"], server.expected_text(&prompt, 24));
                        texts += 1;
                    }
                    texts
                })
            })
            .collect();
        for round in 0..12 {
            let map = if round % 2 == 0 { REVERSED } else { FORWARD };
            let change = put(&server, "", &file(map).to_string()).json();
            arrived(&server, change["target_version"].as_u64().unwrap());
        }
        running.store(false, Ordering::Relaxed);
        let texts: usize = clients.into_iter().map(|client| client.join().unwrap()).sum();
        assert!(texts >= 3, "{texts} texts");
    });
    assert!(version(&server) >= 12);
}

#[test]
fn a_rebalance_goes_where_the_load_would_have_the_experts() {
    let (server, world) = movable(None);
    let idle = rebalance(&server, &json!({})).json();
    assert_eq!(
        (&idle["started"], &idle["moves"], &idle["balancedness"]),
        (&json!(false), &json!(0), &Value::Null)
    );
    assert!(idle["reason"].as_str().unwrap().contains("no token was routed"), "{idle}");

    world.heat();
    let asked = rebalance(&server, &json!({"dry_run": true}));
    let foreseen = asked.json();
    assert_eq!((asked.status, &foreseen["object"], version(&server)), (200, &json!("rebalance"), 0));
    let figure = |of: &str| foreseen["balancedness"][of].as_f64().unwrap();
    assert!(figure("before") < figure("after") && figure("after") <= figure("bound") + 1e-9, "{foreseen}");
    assert!(foreseen["gain_ratio"].as_f64() > Some(0.1), "{foreseen}");

    let response = rebalance(&server, &json!({"max_transfers": null}));
    let change = response.json();
    assert_eq!((response.status, &change["moves"]), (202, &foreseen["moves"]));
    arrived(&server, change["target_version"].as_u64().unwrap());
    let load = server.client().get("/v1/experts").json();
    assert!(load["replicas"].as_array().unwrap().iter().all(|layer| layer[2].as_u64() > Some(1)), "{load}");
    let settled = rebalance(&server, &json!({})).json();
    assert_eq!(settled["started"], false, "{settled}");
}

#[test]
fn a_rebalance_keeps_to_its_limit() {
    let (server, world) = movable(None);
    world.heat();
    let few = rebalance(&server, &json!({"dry_run": true, "max_transfers": 1})).json();
    assert!(few["moves"].as_u64().unwrap() <= LAYERS as u64, "at most one in each layer: {few}");
    assert!(few["balancedness"]["before"].as_f64() < few["balancedness"]["after"].as_f64(), "{few}");
}

#[test]
fn a_rebalance_is_planned_by_the_policy_asked_for() {
    let (server, world) = movable(None);
    world.heat();
    let by = |policy| rebalance(&server, &json!({"dry_run": true, "policy": policy})).json();
    let (own, eplb) = (by("moeyard"), by("eplb"));
    assert_eq!(own, rebalance(&server, &json!({"dry_run": true})).json(), "the default where none runs");
    let after = |change: &Value| change["balancedness"]["after"].as_f64().unwrap();
    assert!(after(&own) >= after(&eplb), "{own} {eplb}");
    assert!(own["moves"].as_u64() < eplb["moves"].as_u64(), "from scratch, more moves: {own} {eplb}");
}

#[test]
fn bad_rebalances_are_refused_by_name() {
    let (server, _world) = movable(None);
    for (body, param, part) in [
        (json!({"dryrun": true}), "dryrun", "Unknown field"),
        (json!({"dry_run": "yes"}), "dry_run", "true or false"),
        (json!({"max_transfers": 0}), "max_transfers", "between 1 and 16777216"),
        (json!({"max_transfers": 16777217}), "max_transfers", "16777217"),
        (json!({"max_transfers": 1.5}), "max_transfers", "integer"),
        (json!({"policy": "linear"}), "policy", "moeyard or eplb"),
        (json!({"policy": 3}), "policy", "the name of a policy"),
        (json!({"policy": "eplb", "max_transfers": 2}), "max_transfers", "keeps to no limit"),
    ] {
        let response = rebalance(&server, &body);
        let error = response.error();
        assert_eq!((response.status, &error["param"]), (400, &json!(param)), "{body}");
        assert!(error["message"].as_str().unwrap().contains(part), "{body}: {error}");
    }
    assert_eq!(rebalance(&server, &json!([1])).status, 400);
    let empty = server.client().request("POST", "/v1/experts/rebalance", &[], b"");
    assert_eq!(empty.status, 200, "{}", empty.body);
}

#[test]
fn where_experts_cannot_move_both_are_refused_with_the_flag_to_blame() {
    let server_of = |ranks, staging| {
        let experts = experts(ranks, 0, staging);
        let load = Mutex::new(LoadSnapshot::zeros((0..LAYERS).collect(), EXPERTS, ranks));
        let world = World { load, experts: experts.clone() };
        world.heat();
        let config = Config { load: Some(Arc::new(world)), experts: Some(experts), ..Config::default() };
        Server::with(config)
    };
    for (ranks, staging, flag) in [(1, 0, "--expert-parallel-size"), (2, 0, "--staging-slots")] {
        let server = server_of(ranks, staging);
        let map = vec![(0..EXPERTS).rev().collect::<Vec<_>>(); LAYERS];
        let file = json!({"physical_to_logical_map": map}).to_string();
        for response in [
            put(&server, "", &file),
            rebalance(&server, &json!({})),
            rebalance(&server, &json!({"dry_run": true})),
        ] {
            assert_eq!(response.status, 409, "{}", response.body);
            assert!(response.error()["message"].as_str().unwrap().contains(flag), "{}", response.body);
        }
    }
    let without = Server::start();
    assert_eq!(rebalance(&without, &json!({})).status, 503);
}

#[test]
fn a_page_of_another_origin_cannot_move_experts() {
    let (server, _world) = movable(None);
    let address = server.address.to_string();
    let ask = |host: &str, origin: &str| {
        let mut client = server.client();
        client.raw(
            format!("POST /v1/experts/rebalance HTTP/1.1\r\nHost: {host}\r\nOrigin: {origin}\r\nContent-Length: 0\r\n\r\n")
                .as_bytes(),
        );
        client.response().status
    };
    assert_eq!(ask(&address, &format!("http://{address}")), 200);
    assert_eq!(ask(&address, "https://evil.example"), 403);
    assert_eq!(ask("evil.example", "http://evil.example"), 403, "a name that resolves to this machine");
    // What changes nothing is not concerned.
    assert_eq!(
        server
            .client()
            .request(
                "POST",
                "/v1/completions",
                &[("Origin", "https://evil.example")],
                greedy(json!({"prompt": [50], "max_tokens": 1})).to_string().as_bytes()
            )
            .status,
        200
    );
}
