//! Clients that leave, or stay and read nothing: their sequences end and their blocks come back.

use std::time::Duration;

use serde_json::json;

use crate::harness::{Config, Server, eventually, greedy};

fn slow() -> Config {
    Config { pause: Duration::from_millis(5), ..Config::default() }
}

fn is_idle(server: &Server) -> bool {
    let stats = server.stats();
    stats.running == 0 && stats.waiting == 0 && stats.kv.used == 0
}

#[test]
fn a_client_that_leaves_is_aborted() {
    let server = Server::with(slow());
    for (case, stream, prompts) in [("stream", true, 1), ("no stream", false, 1), ("several", true, 5)] {
        let prompts: Vec<String> = (0..prompts).map(|i| format!("prompt {i}")).collect();
        let mut client = server.client();
        let request = greedy(json!({"prompt": prompts, "max_tokens": 450, "stream": stream}));
        client.send_json("/v1/completions", &request);
        eventually(case, || server.stats().running == prompts.len());
        if stream {
            assert_eq!(client.head().status, 200);
            client.chunk();
        }
        drop(client);
        eventually(case, || is_idle(&server));
    }
    assert_eq!(server.metric(r#"moeyard_requests_total{endpoint="completions",outcome="abort"}"#), 7.0);
    assert!(server.stats().generated_tokens < 7 * 450, "they ran to the end");
}

#[test]
fn a_client_that_leaves_the_queue_is_forgotten() {
    let mut config = slow();
    config.engine.max_num_seqs = 1;
    let server = Server::with(config);
    let request = greedy(json!({"prompt": "x", "max_tokens": 450, "stream": true}));
    let mut first = server.client();
    first.send_json("/v1/completions", &request);
    eventually("one runs", || server.stats().running == 1);
    let mut second = server.client();
    second.send_json("/v1/completions", &request);
    eventually("one waits", || server.stats().waiting == 1);
    drop(second);
    eventually("none waits", || server.stats().waiting == 0);
    assert_eq!(server.stats().running, 1);
    drop(first);
    eventually("idle", || is_idle(&server));
}

#[test]
fn a_client_that_does_not_read_is_dropped_and_holds_up_nobody() {
    let mut config = Config::default();
    config.engine.max_model_len = 16_384;
    config.engine.kv_blocks = 2048;
    config.options.stalled_reader_timeout = Duration::from_millis(200);
    // Fast enough to fill what the sockets buffer, slow enough not to be done before that.
    config.pause = Duration::from_micros(100);
    let server = Server::with(config);
    let mut deaf = server.client();
    let request = greedy(json!({"prompt": "x", "max_tokens": 16_000, "stream": true, "logprobs": 20}));
    deaf.send_json("/v1/completions", &request);
    eventually("it runs", || server.stats().running == 1);
    assert_eq!(server.complete(json!({"prompt": "y", "max_tokens": 4})).status, 200);
    eventually("it was aborted", || is_idle(&server));
    assert_eq!(server.metric(r#"moeyard_requests_total{endpoint="completions",outcome="abort"}"#), 1.0);
}
