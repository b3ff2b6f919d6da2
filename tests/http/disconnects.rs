//! Clients that leave, or stay and read nothing: their sequences end and their blocks come back.

use std::time::Duration;

use serde_json::json;

use crate::harness::{Config, Server, greedy};
use crate::patience::eventually;

/// What runs when a client leaves is held until the server has noticed: the engine frees its blocks before the next step.
fn left(server: &Server, aborted: usize) {
    eventually("the server notices", || server.aborted() == aborted as f64);
    let steps = server.stats().steps;
    server.release();
    server.idle();
    let more = server.stats().steps - steps;
    assert!(more <= 1, "{more} steps after the one that was held");
    server.hold();
}

#[test]
fn a_client_that_leaves_is_aborted() {
    let server = Server::held(Config::default());
    let mut aborted = 0;
    for (case, stream, prompts) in [("stream", true, 1), ("no stream", false, 1), ("several", true, 5)] {
        let prompts: Vec<String> = (0..prompts).map(|i| format!("prompt {i}")).collect();
        let mut client = server.client();
        let request = greedy(json!({"prompt": prompts, "max_tokens": 450, "stream": stream}));
        server.script.brake.release_for(20);
        client.send_json("/v1/completions", &request);
        eventually(case, || server.stats().running == prompts.len());
        if stream {
            assert_eq!(client.head().status, 200);
            client.chunk();
        }
        drop(client);
        aborted += prompts.len();
        left(&server, aborted);
    }
}

#[test]
fn a_client_that_leaves_the_queue_is_forgotten() {
    let mut config = Config::default();
    config.engine.max_num_seqs = 1;
    let server = Server::held(config);
    let request = greedy(json!({"prompt": "x", "max_tokens": 450, "stream": true}));
    let mut first = server.client();
    first.send_json("/v1/completions", &request);
    eventually("one runs", || server.stats().running == 1);
    let mut second = server.client();
    second.send_json("/v1/completions", &request);
    eventually("one waits", || server.stats().waiting == 1);
    drop(second);
    eventually("the server notices", || server.aborted() == 1.0);
    server.script.brake.release_for(1);
    eventually("none waits", || server.stats().waiting == 0);
    assert_eq!(server.stats().running, 1);
    drop(first);
    left(&server, 2);
}

#[test]
fn a_client_that_does_not_read_is_dropped_and_holds_up_nobody() {
    const DEAF: usize = 8;
    let mut config = Config::default();
    config.engine.max_model_len = 2048;
    config.engine.kv_blocks = 2048;
    config.options.stalled_reader_timeout = Duration::from_millis(200);
    let server = Server::held(config);
    let mut deaf = server.client();
    // About 20 MB, far more than the sockets buffer.
    let request =
        greedy(json!({"prompt": vec!["x"; DEAF], "max_tokens": 2000, "stream": true, "logprobs": 20}));
    deaf.send_json("/v1/completions", &request);
    eventually("they run", || server.stats().running == DEAF);
    server.script.brake.release_for(1950);
    assert_eq!(server.complete(json!({"prompt": "y", "max_tokens": 4})).status, 200);
    left(&server, DEAF);
}
