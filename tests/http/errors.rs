//! What a bad request gets: a status, OpenAI's error object, the field to blame.

use moeyard::engine::scripted::Fault;
use serde_json::{Value, json};

use crate::harness::{Config, Server, greedy};
use crate::patience::eventually;

#[test]
fn refusals_name_their_field() {
    let server = Server::start();
    let over: Vec<u32> = vec![5; 600];
    for (fields, status, param) in [
        (json!({"prompt": ""}), 400, "prompt"),
        (json!({"prompt": [4096]}), 400, "prompt"),
        (json!({"prompt": [-1]}), 400, "prompt"),
        (json!({"prompt": over}), 400, "prompt"),
        (json!({"prompt": "x", "max_tokens": 513}), 400, "max_tokens"),
        (json!({"prompt": "x", "max_tokens": 4_000_000_000u32}), 400, "max_tokens"),
        (json!({"prompt": "x", "temperature": 3}), 400, "temperature"),
        (json!({"prompt": "x", "n": 4}), 400, "n"),
        (json!({"prompt": "x", "max_tokens": 0}), 400, "max_tokens"),
        (json!({"prompt": "x", "logit_bias": {"4096": 1}}), 400, "logit_bias"),
        (json!({"prompt": "x", "allowed_token_ids": [1, 4096]}), 400, "allowed_token_ids"),
        (json!({"prompt": "x", "min_tokens": 9, "max_tokens": 8}), 400, "min_tokens"),
        (json!({"prompt": "x", "best_of": 2}), 400, "best_of"),
        (json!({"prompt": "x", "stop": ""}), 400, "stop"),
        (json!({"prompt": "x", "stream_options": {"include_usage": true}}), 400, "stream_options"),
        (json!({"prompt": "x", "surprise": 1}), 400, "surprise"),
        (json!({"prompt": "x", "model": "gpt-4"}), 404, "model"),
    ] {
        let shown: String = fields.to_string().chars().take(80).collect();
        for stream in [false, true] {
            let mut request = greedy(fields.clone());
            if stream && param != "stream_options" {
                request["stream"] = json!(true);
            }
            let response = server.client().post("/v1/completions", &request);
            assert_eq!(response.status, status, "{shown}: {}", response.body);
            assert_eq!(response.error()["param"], param, "{shown}: {}", response.body);
        }
    }
    assert_eq!(server.stats().running, 0);
    let rejected = server.metric(r#"moeyard_requests_total{endpoint="completions",outcome="rejected"}"#);
    assert_eq!(rejected, 34.0);
}

#[test]
fn the_context_phrase_is_the_one_clients_look_for() {
    let server = Server::start();
    let long_text = "word ".repeat(1_000_000);
    for request in [
        json!({"prompt": "x", "max_tokens": 600}),
        json!({"prompt": vec![7; 600]}),
        json!({"prompt": "word ".repeat(2000)}),
        json!({"prompt": long_text}),
    ] {
        let error = server.complete(request).error();
        let message = error["message"].as_str().unwrap();
        assert!(
            message.starts_with("This model's maximum context length is 512 tokens. However, "),
            "{message}"
        );
    }
}

/// Fault row 12: prompts of millions of characters are refused while others are served; a full context is no error, one
/// token more is.
#[test]
fn huge_prompts_hold_up_nobody_and_the_context_ends_exactly() {
    let mut config = Config::default();
    config.options.max_body_bytes = 16 << 20;
    let server = Server::with(config);
    let huge = json!({"prompt": "w\u{f6}rd ".repeat(2_000_000), "max_tokens": 1});
    std::thread::scope(|scope| {
        let ask = || server.client().post("/v1/completions", &huge);
        let clients: Vec<_> = (0..4).map(|_| scope.spawn(ask)).collect();
        // However long those take, they are not in the way of others.
        while clients.iter().any(|client| !client.is_finished()) {
            assert_eq!(server.client().get("/health").status, 200);
            assert_eq!(server.complete(json!({"prompt": "x", "max_tokens": 2})).status, 200);
        }
        for client in clients {
            let refused = client.join().unwrap();
            assert_eq!(refused.status, 400);
            let message = refused.error()["message"].as_str().unwrap().to_owned();
            assert!(
                message.starts_with("This model's maximum context length is 512 tokens. However, "),
                "{message}"
            );
        }
    });
    for (prompt, max_tokens, status) in
        [(511, 1, 200), (1, 511, 200), (512, 1, 400), (511, 2, 400), (513, 1, 400)]
    {
        let response = server.complete(json!({"prompt": vec![7; prompt], "max_tokens": max_tokens}));
        assert_eq!(response.status, status, "{prompt} + {max_tokens}: {}", response.body);
    }
}

/// CVE-2025-62164: a tensor in a request was unpacked unchecked. This server takes none.
#[test]
fn cve_2025_62164_no_tensors_are_taken() {
    let server = Server::start();
    for field in ["prompt_embeds", "prompt_embeds_base64", "kv_transfer_params"] {
        let mut request = greedy(json!({"prompt": "x"}));
        request[field] = json!({"tensor": "gAJjdG9yY2g="});
        for path in ["/v1/completions", "/v1/chat/completions"] {
            let response = server.client().post(path, &request);
            assert_eq!(response.status, 400, "{path} {field}");
            let param = response.error()["param"].clone();
            assert!(param == field || param == "prompt" || param == "messages", "{path} {field}: {param}");
        }
    }
}

/// CVE-2026-21869: a number of a request went unchecked into an index. Each has a range; whatever lies outside is refused by
/// name, with sign, size and fraction.
#[test]
fn cve_2026_21869_every_number_has_a_range() {
    let server = Server::start();
    let integers = [
        "n",
        "max_tokens",
        "min_tokens",
        "top_k",
        "logprobs",
        "prompt_logprobs",
        "best_of",
        "truncate_prompt_tokens",
        "priority",
        "stream_interval",
    ];
    let numbers =
        ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"];
    for (name, is_integer) in integers.iter().map(|n| (*n, true)).chain(numbers.iter().map(|n| (*n, false))) {
        for value in [
            "-9223372036854775809",
            "-2147483649",
            "-3",
            "18446744073709551616",
            "1e300",
            "-1e300",
            "1e999",
            "1.5",
            "\"1\"",
            "[1]",
            "{}",
        ] {
            // Nothing is wrong with fractions, and with large penalties of repetition.
            let fits = (value == "1.5" && !is_integer) || (value.len() == 20 && name == "repetition_penalty");
            if fits && !value.starts_with('-') {
                continue;
            }
            let body = format!(r#"{{"prompt": "x", "stream": true, "{name}": {value}}}"#);
            let headers = [("Content-Type", "application/json")];
            let response = server.client().request("POST", "/v1/completions", &headers, body.as_bytes());
            assert_eq!(response.status, 400, "{body}: {}", response.body);
            // Beyond every number there is, the body is no JSON.
            let param = response.error()["param"].clone();
            assert!(param == name || (value == "1e999" && param.is_null()), "{body}: {param}");
        }
    }
    for body in [r#"{"tokens": [-1]}"#, r#"{"tokens": [4294967296]}"#, r#"{"tokens": [1.5]}"#] {
        let response = server.client().request("POST", "/detokenize", &[], body.as_bytes());
        assert_eq!(response.status, 400, "{body}");
    }
    assert_eq!(server.stats().running, 0);
}

#[test]
fn bodies_that_are_no_json_object_are_refused_quickly() {
    let server = Server::start();
    let deep = format!(r#"{{"prompt": {}"x"{}}}"#, "[".repeat(100_000), "]".repeat(100_000));
    let long_key = format!(r#"{{"prompt": "x", "{}": 1}}"#, "k".repeat(1_000_000));
    let many_stops = format!(r#"{{"prompt": "x", "stop": [{}"y"]}}"#, r#""y","#.repeat(1_000_000));
    let many_fields: String = (0..200_000).map(|i| format!(r#""f{i}": 1, "#)).collect();
    let many_fields = format!(r#"{{{many_fields}"prompt": "x"}}"#);
    for body in [
        "",
        "null",
        "[]",
        "{\"prompt\": ",
        "{\"prompt\": \"x\"} {}",
        "{\"prompt\": \"x\", \"prompt\": \"y\"}",
        "{\"prompt\": \"x\", \"temperature\": NaN}",
        deep.as_str(),
        long_key.as_str(),
        many_stops.as_str(),
        many_fields.as_str(),
    ] {
        let head: String = body.chars().take(40).collect();
        let headers = [("Content-Type", "application/json")];
        let response = server.client().request("POST", "/v1/completions", &headers, body.as_bytes());
        assert_eq!(response.status, 400, "{head}: {}", response.body);
        assert_eq!(response.error()["type"], "BadRequestError");
        assert!(response.body.len() < 4000, "{head}: answered with {} bytes", response.body.len());
    }
    let response = server.client().request(
        "POST",
        "/v1/completions",
        &[("Content-Type", "application/json")],
        b"{\"a\": \"\xff\"}",
    );
    assert_eq!(response.status, 400);
}

#[test]
fn other_content_types_are_refused() {
    let server = Server::start();
    let body = json!({"prompt": "x", "max_tokens": 1}).to_string();
    let status = |content_type: &str| {
        let headers = [("Content-Type", content_type)];
        server.client().request("POST", "/v1/completions", &headers, body.as_bytes()).status
    };
    assert_eq!(status("application/json; charset=utf-8"), 200);
    assert_eq!(status("Application/JSON"), 200);
    assert_eq!(status("text/plain"), 415);
    assert_eq!(status("application/x-www-form-urlencoded"), 415);
    assert_eq!(server.client().request("POST", "/v1/completions", &[], body.as_bytes()).status, 200);
}

#[test]
fn unknown_routes_and_methods_answer_in_the_same_shape() {
    let server = Server::start();
    for (method, path, status, kind) in [
        ("GET", "/", 404, "NotFoundError"),
        ("POST", "/v1/embeddings", 404, "NotFoundError"),
        ("GET", "/v1/models/none", 404, "NotFoundError"),
        ("GET", "/v1/completions", 405, "MethodNotAllowed"),
        ("DELETE", "/v1/models", 405, "MethodNotAllowed"),
        ("POST", "/metrics", 405, "MethodNotAllowed"),
    ] {
        let response = server.client().request(method, path, &[], b"");
        assert_eq!(response.status, status, "{method} {path}");
        assert_eq!(response.error()["type"], kind, "{method} {path}");
        let allowed = match path {
            _ if status == 404 => None,
            "/v1/completions" => Some("POST"),
            _ => Some("GET,HEAD"),
        };
        assert_eq!(response.header("allow"), allowed, "{method} {path}");
    }
}

#[test]
fn a_full_queue_is_429_with_a_time_to_retry() {
    let mut config = Config::default();
    config.engine.max_num_seqs = 1;
    config.engine.max_waiting = 2;
    let server = Server::held(config);
    let long = greedy(json!({"prompt": [9], "max_tokens": 400, "stream": true}));
    let mut running = server.client();
    running.send_json("/v1/completions", &long);
    eventually("the first runs", || server.stats().running == 1);
    let mut waiting = [server.client(), server.client()];
    waiting.iter_mut().for_each(|client| client.send_json("/v1/completions", &long));
    eventually("the others wait", || server.stats().waiting == 2);

    let refused = server.complete(json!({"prompt": "x", "stream": true}));
    assert_eq!(refused.status, 429, "{}", refused.body);
    assert_eq!(refused.error()["type"], "RateLimitError");
    assert!(refused.header("retry-after").unwrap().parse::<u32>().unwrap() >= 1);
    assert_eq!(server.metric(r#"moeyard_admission_rejections_total{reason="queue_full"}"#), 1.0);

    // A list of prompts is taken as a whole or not at all.
    let [left, stays] = waiting;
    drop(left);
    eventually("the server notices", || server.aborted() == 1.0);
    server.script.brake.release_for(1);
    eventually("one left", || server.stats().waiting == 1);
    assert_eq!(server.complete(json!({"prompt": ["a", "b"]})).status, 429);
    assert_eq!(server.stats().waiting, 1);
    drop(stays);
    assert_eq!(server.metric(r#"moeyard_requests_total{endpoint="completions",outcome="rejected"}"#), 2.0);
}

#[test]
fn a_failed_sequence_is_a_500_or_an_error_chunk_and_others_go_on() {
    // The token after which logits turn NaN is in one prompt only.
    let server = Server::with(Config { fault: Fault::NanAfter(4000), ..Config::default() });
    let failed = server.complete(json!({"prompt": [4000]}));
    assert_eq!(failed.status, 500);
    let error = failed.error();
    assert!(!error["message"].as_str().unwrap().contains("NaN"), "{error}");

    let failed = server.complete(json!({"prompt": [4000], "stream": true}));
    assert_eq!(failed.status, 200);
    let chunks: Vec<Value> = failed.chunks();
    assert_eq!(chunks.last().unwrap()["error"]["code"], 500, "{}", failed.body);

    assert_eq!(server.complete(json!({"prompt": [41], "max_tokens": 3})).status, 200);
}
