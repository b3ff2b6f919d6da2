//! How a server ends.

use std::time::Duration;

use moeyard::engine::scripted::Fault;
use moeyard::server::{Shutdown, Stage};
use serde_json::{Value, json};

use crate::harness::{Config, Server, greedy};
use crate::patience::eventually;

/// Nobody waits as long: whatever ends does not wait for the end of the drain time.
const FOR_EVER: Duration = Duration::from_secs(365 * 24 * 3600);

fn patient() -> Config {
    let mut config = Config::default();
    config.options.drain_timeout = FOR_EVER;
    config.options.dead_engine_grace = FOR_EVER;
    config
}

fn long_stream() -> Value {
    greedy(json!({"prompt": "x", "max_tokens": 100, "stream": true}))
}

#[test]
fn an_idle_server_ends_at_once_and_open_connections_do_not_hold_it() {
    let mut server = Server::with(patient());
    let mut idle = server.client();
    assert_eq!(idle.get("/health").status, 200);
    server.shutdown.advance(Stage::Draining);
    server.ended().unwrap();
}

#[test]
fn running_requests_finish_and_new_ones_are_told() {
    let mut server = Server::held(patient());
    let mut running = server.client();
    running.send_json("/v1/completions", &long_stream());
    eventually("it runs", || server.stats().running == 1);
    server.shutdown.advance(Stage::Draining);

    let refused = server.complete(json!({"prompt": "x"}));
    assert_eq!(refused.status, 503);
    assert_eq!(refused.error()["type"], "ServiceUnavailable");
    assert!(refused.header("retry-after").is_some());
    assert_eq!(server.client().get("/health").status, 200);

    server.release();
    let response = running.response();
    assert_eq!(response.chunks().last().unwrap()["choices"][0]["finish_reason"], "length");
    server.ended().unwrap();
}

#[test]
fn after_the_drain_time_streams_end_with_an_error() {
    let mut config = patient();
    config.options.drain_timeout = Duration::from_millis(100);
    let mut server = Server::held(config);
    let mut running = server.client();
    running.send_json("/v1/completions", &long_stream());
    eventually("it runs", || server.stats().running == 1);
    server.shutdown.advance(Stage::Draining);
    let response = running.response();
    assert_eq!(response.chunks().last().unwrap()["error"]["code"], 503, "{}", response.body);
    server.ended().unwrap();
    server.release();
    server.idle();
    assert_eq!(server.stats().outcomes.aborted, 1);
}

#[test]
fn a_second_signal_does_not_wait() {
    let mut server = Server::held(patient());
    let mut running = server.client();
    running.send_json("/v1/completions", &greedy(json!({"prompt": "x", "max_tokens": 500})));
    eventually("it runs", || server.stats().running == 1);
    server.shutdown.advance(Stage::Draining);
    server.shutdown.advance(Stage::Aborting);
    assert_eq!(running.response().status, 503);
    server.ended().unwrap();
}

#[test]
fn a_dead_engine_is_reported_everywhere() {
    for fault in [Fault::PanicAt(10), Fault::ErrorAt(10)] {
        let mut server = Server::with(Config { fault, ..patient() });
        let response = server.client().post("/v1/completions", &long_stream());
        assert_eq!(response.chunks().last().unwrap()["error"]["code"], 500, "{}", response.body);
        let health = server.client().get("/health");
        assert_eq!((health.status, health.error()["type"].as_str()), (503, Some("ServiceUnavailable")));
        assert_eq!(server.complete(json!({"prompt": "x"})).status, 503);
        // Who ends the server while clients may still read is told why it would have ended.
        server.shutdown.advance(Stage::Draining);
        assert!(server.ended().is_err());
    }
}

#[test]
fn a_dead_engine_ends_the_server() {
    let mut config = Config { fault: Fault::PanicAt(10), ..patient() };
    config.options.dead_engine_grace = Duration::ZERO;
    let mut server = Server::with(config);
    let mut client = server.client();
    client.send_json("/v1/completions", &long_stream());
    assert!(server.ended().is_err());
}

#[test]
fn the_first_signal_drains_the_second_aborts_and_a_hangup_does_nothing() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let shutdown = runtime.block_on(async { Shutdown::on_signals() }).expect("handlers");
    let send = |signal: &str| {
        let kill = format!("kill -{signal} {}", std::process::id());
        assert!(std::process::Command::new("sh").args(["-c", &kill]).status().unwrap().success());
    };
    send("HUP");
    send("TERM");
    runtime.block_on(shutdown.reached(Stage::Draining));
    assert_eq!(shutdown.stage(), Stage::Draining);
    send("INT");
    runtime.block_on(shutdown.reached(Stage::Aborting));
}
