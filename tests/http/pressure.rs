//! More work than fits: the answers stay the same, and when everybody has left nothing is left behind.

use std::time::Duration;

use moeyard::engine::scripted::Fault;
use moeyard::server::Stage;
use serde_json::{Value, json};

use crate::client::Client;
use crate::harness::{Config, Server, greedy};
use crate::numbers::Numbers;
use crate::patience::eventually;

/// A KV pool far too small for what is asked of it at the same time.
fn tight() -> Config {
    let mut config = Config::default();
    config.engine.kv_blocks = 24;
    config.engine.max_waiting = 512;
    config.engine.max_num_seqs = 16;
    config
}

/// Runs `work` for each number on a thread of its own, and `then` when all have begun; the results in order.
fn at_once<T: Send>(count: usize, work: impl Fn(usize) -> T + Sync, then: impl FnOnce()) -> Vec<T> {
    std::thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = (0..count).map(|i| scope.spawn(move || work(i))).collect();
        then();
        threads.into_iter().map(|thread| thread.join().expect("a client failed")).collect()
    })
}

/// 64 requests at once get what they get one after another: greedy, sampled, with penalties and several choices.
#[test]
fn concurrent_answers_are_those_of_a_quiet_server() {
    let request = |i: usize| -> Value {
        let common = json!({"model": "demo", "prompt": format!("Once {} upon a time {i}", "very ".repeat(i % 7)),
            "max_tokens": 20 + i % 30, "ignore_eos": true});
        let more = match i % 4 {
            0 | 1 => json!({"temperature": 0}),
            2 => json!({"temperature": 1, "seed": i, "n": 2, "top_p": 0.9}),
            _ => json!({"temperature": 0.7, "seed": i, "repetition_penalty": 1.2, "frequency_penalty": 0.5}),
        };
        let fields = common.as_object().unwrap().clone().into_iter();
        Value::Object(fields.chain(more.as_object().unwrap().clone()).collect())
    };
    let ask = |server: &Server, i: usize| -> Value {
        let response = server.client().post("/v1/completions", &request(i));
        assert_eq!(response.status, 200, "{}", response.body);
        response.json()["choices"].clone()
    };
    let quiet = Server::start();
    let expected: Vec<Value> = (0..64).map(|i| ask(&quiet, i)).collect();
    let server = Server::held(tight());
    // A quarter of them has two choices.
    let all_there = || {
        eventually("all are there", || server.stats().running + server.stats().waiting == 64 + 16);
        server.release();
    };
    assert_eq!(at_once(64, |i| ask(&server, i), all_there), expected);
    assert!(server.stats().preemptions > 0, "no pressure: {:?}", server.stats());
    server.idle();
}

#[test]
fn a_queue_full_of_tokens_is_429() {
    let mut config = Config::default();
    config.engine.max_num_seqs = 1;
    config.engine.max_waiting_tokens = 100;
    let server = Server::held(config);
    let long = |prompt: Vec<u32>| greedy(json!({"prompt": prompt, "max_tokens": 300, "stream": true}));
    let mut running = server.client();
    running.send_json("/v1/completions", &long(vec![9]));
    eventually("the first runs", || server.stats().running == 1);
    let mut waiting = server.client();
    waiting.send_json("/v1/completions", &long((0..90).map(|i| 5 + i).collect()));
    eventually("the second waits", || server.stats().waiting == 1);
    let refused = server.client().post("/v1/completions", &long((0..11).map(|i| 5 + i).collect()));
    assert_eq!(refused.status, 429, "{}", refused.body);
    assert!(refused.error()["message"].as_str().unwrap().contains("exceed 100"));
    assert!(refused.header("retry-after").unwrap().parse::<u32>().unwrap() >= 1);
    assert_eq!(server.stats().waiting, 1, "what was refused took no place");
    assert_eq!(server.metric(r#"moeyard_admission_rejections_total{reason="tokens"}"#), 1.0);
    // More sequences than can ever wait are no matter of time.
    let request = json!({"prompt": vec!["x"; 10], "n": 8, "temperature": 1});
    assert_eq!(server.client().post("/v1/completions", &request).status, 400);
}

#[test]
fn who_leaves_with_many_choices_frees_all_of_them() {
    let server = Server::held(tight());
    for (stream, aborted) in [(false, 8.0), (true, 16.0)] {
        server.script.brake.release_for(3);
        let mut client = server.client();
        let request = json!({"model": "demo", "prompt": "x", "n": 8, "temperature": 1, "max_tokens": 100,
            "ignore_eos": true, "stream": stream});
        client.send_json("/v1/completions", &request);
        eventually("they run", || server.stats().running > 0);
        drop(client);
        eventually("the server notices", || server.aborted() == aborted);
        server.release();
        server.idle();
    }
    assert!(server.stats().generated_tokens < 16 * 100, "they ran to the end");
}

#[test]
fn a_hung_step_is_503_an_error_chunk_and_the_end() {
    let mut config = Config { fault: Fault::HangAt(10), ..Config::default() };
    config.engine.step_timeout = Duration::from_millis(500);
    config.options.dead_engine_grace = Duration::from_secs(365 * 24 * 3600);
    let mut server = Server::with(config);
    let stream = greedy(json!({"prompt": "x", "max_tokens": 100, "stream": true}));
    let response = server.client().post("/v1/completions", &stream);
    assert_eq!(response.chunks().last().unwrap()["error"]["code"], 500, "{}", response.body);
    assert_eq!(server.client().get("/health").status, 503);
    server.shutdown.advance(Stage::Draining);
    assert!(server.ended().is_err());
}

fn random_request(dice: &mut Numbers) -> Value {
    let prompts: Vec<String> =
        (0..1 + dice.below(2)).map(|_| "lorem ipsum ".repeat(1 + dice.below(12))).collect();
    let (n, temperature) = if dice.below(3) == 0 { (1 + dice.below(4), 1) } else { (1, 0) };
    json!({"model": "demo", "prompt": prompts, "n": n, "temperature": temperature, "max_tokens": 1 + dice.below(80),
        "stream": dice.below(2) == 0, "priority": dice.below(5) as i64 - 2, "ignore_eos": true,
        "logprobs": if dice.below(4) == 0 { json!(dice.below(5)) } else { Value::Null },
        "echo": dice.below(5) == 0, "routed_experts": dice.below(6) == 0,
        "stop": if dice.below(4) == 0 { json!("e") } else { Value::Null }})
}

/// Random connects, aborts, lengths and priorities: when all have left, every block is back and nothing runs.
#[test]
fn a_soak_of_random_clients_leaves_nothing_behind() {
    let mut config = tight();
    config.pause = Duration::from_micros(200);
    config.engine.max_waiting = 24;
    config.engine.scheduling_policy = moeyard::engine::SchedulingPolicy::Priority;
    let server = Server::with(config);
    let statuses = at_once(
        8,
        |seed| {
            let mut dice = Numbers(seed as u64 * 7919 + 1);
            let mut answered = [0, 0];
            for _ in 0..25 {
                let mut client: Client = server.client();
                client.send_json("/v1/completions", &random_request(&mut dice));
                match dice.below(5) {
                    // Leaves before, or in the middle of, its answer.
                    0 => {}
                    1 => drop(client.head()),
                    _ => match client.response().status {
                        200 => answered[0] += 1,
                        429 => answered[1] += 1,
                        other => panic!("status {other}"),
                    },
                }
            }
            answered
        },
        || (),
    );
    let [served, refused] = statuses.iter().fold([0, 0], |sum, s| [sum[0] + s[0], sum[1] + s[1]]);
    assert!(served > 20, "{served} answers, {refused} refusals");
    server.idle();
    let stats = server.stats();
    assert_eq!(stats.kv.free + stats.kv.cached, 24, "blocks leaked: {stats:?}");
    assert_eq!(stats.outcomes.error, 0);
    // What ran before still runs right.
    let body = server.complete(json!({"prompt": "after the storm", "max_tokens": 30})).json();
    assert_eq!(body["choices"][0]["text"], server.expected_text("after the storm", 30));
}
