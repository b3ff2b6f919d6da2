//! Structured output: whatever the model would rather say, the text follows its rules.

use serde_json::{Value, json};

use crate::chat::{chat, streamed};
use crate::harness::{Config, Server};
use crate::patience::eventually;

fn schema() -> Value {
    json!({"type": "object", "additionalProperties": false, "required": ["name", "age", "tags"], "properties": {
        "name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "maxItems": 2, "items": {"enum": ["a", "b"]}}}})
}

fn check(text: &str) {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text:?}"));
    assert!((0..=150).contains(&value["age"].as_i64().unwrap()), "{text}");
    assert!(
        value["name"].as_str().unwrap().chars().count() <= 6 && value["tags"].as_array().unwrap().len() <= 2
    );
    assert_eq!(value.as_object().unwrap().len(), 3);
}

fn format() -> Value {
    json!({"type": "json_schema", "json_schema": {"name": "person", "schema": schema(), "strict": true}})
}

#[test]
fn every_answer_follows_its_schema() {
    let server = Server::start();
    for (temperature, n) in [(0.0, 1), (1.0, 4), (2.0, 4)] {
        let fields = json!({"response_format": format(), "temperature": temperature, "n": n, "seed": 11, "ignore_eos": false});
        let body = chat(&server, fields.clone()).json();
        for choice in body["choices"].as_array().unwrap() {
            assert_eq!(choice["finish_reason"], "stop", "{body}");
            check(choice["message"]["content"].as_str().unwrap());
        }
        let mut stream = fields;
        stream["stream"] = json!(true);
        let chunks = chat(&server, stream).chunks();
        for index in 0..n {
            assert_eq!(json!(streamed(&chunks, index)), body["choices"][index]["message"]["content"]);
        }
    }
}

/// Strings without a limit, from a model that would never end them.
#[test]
fn an_answer_is_whole_before_its_tokens_run_out() {
    let server = Server::start();
    let schema = json!({"type": "object", "required": ["name", "story"], "properties": {"name": {"type": "string"}, "story": {"type": "string"}}});
    let format = json!({"type": "json_schema", "json_schema": {"schema": schema}});
    for (temperature, max_tokens) in [(0.0, json!(80)), (1.0, json!(80)), (1.0, json!(null))] {
        let fields = json!({"response_format": format, "temperature": temperature, "max_tokens": max_tokens});
        let body = chat(&server, fields).json();
        let text = body["choices"][0]["message"]["content"].as_str().unwrap();
        let value: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {body}"));
        assert!(value["name"].is_string() && value["story"].is_string(), "{body}");
        assert_eq!(body["choices"][0]["finish_reason"], "stop");
    }
}

#[test]
fn completions_take_every_kind_of_rule() {
    let server = Server::start();
    for (rule, holds) in [
        (
            json!({"json": schema()}),
            (|text| {
                check(text);
                true
            }) as fn(&str) -> bool,
        ),
        (json!({"regex": "[0-9]{3}-[ab]"}), |text| text.len() == 5 && text.as_bytes()[3] == b'-'),
        (json!({"choice": ["yes", "no way"]}), |text| ["yes", "no way"].contains(&text)),
        (json!({"grammar": "start: \"x\" | \"yy\""}), |text| ["x", "yy"].contains(&text)),
    ] {
        for temperature in [0.0, 1.5] {
            // Neither a wish for more tokens nor one to go on after the end outweighs the rule.
            let fields = json!({"prompt": "Once", "structured_outputs": rule, "temperature": temperature, "max_tokens": 300,
                "min_tokens": 100, "ignore_eos": true});
            let body = server.complete(fields).json();
            let choice = &body["choices"][0];
            assert!(holds(choice["text"].as_str().unwrap()), "{rule}: {body}");
            assert_eq!(choice["finish_reason"], "stop", "{rule}: {body}");
        }
    }
}

#[test]
fn rules_survive_preemption_and_company() {
    let alone = Server::start();
    let fields = |seed: usize| {
        json!({"prompt": format!("prompt {seed}"), "structured_outputs": {"json": schema()},
        "temperature": 1.0, "seed": seed, "max_tokens": 120})
    };
    let expected: Vec<Value> =
        (0..8).map(|seed| alone.complete(fields(seed)).json()["choices"][0]["text"].clone()).collect();
    let mut config = Config::default();
    config.engine.kv_blocks = 10;
    config.engine.max_model_len = 150;
    let tight = Server::held(config);
    std::thread::scope(|scope| {
        let asked: Vec<_> = (0..8)
            .map(|seed| {
                scope.spawn({
                    let tight = &tight;
                    move || tight.complete(fields(seed)).json()
                })
            })
            .collect();
        eventually("all are there", || tight.stats().running + tight.stats().waiting == 8);
        tight.release();
        for (answer, expected) in asked.into_iter().zip(&expected) {
            let answer = answer.join().unwrap();
            assert_eq!(answer["choices"][0]["text"], *expected, "{answer}");
            check(expected.as_str().unwrap());
        }
    });
    assert!(tight.stats().preemptions > 0, "the pool was too large to test anything");
    tight.idle();
}

/// CVE-2025-48944 and its kin: a bad pattern killed a worker, and caches of grammars grew without bound.
#[test]
fn cve_2025_48944_bad_grammars_are_400_and_hurt_nobody() {
    let server = Server::start();
    let deep = format!("{}a{}", "(".repeat(50_000), ")".repeat(50_000));
    let nested =
        (0..100).fold(json!({"type": "integer"}), |inner, _| json!({"type": "array", "items": inner}));
    for rule in [
        json!({"regex": "("}),
        json!({"regex": "a(?=b)"}),
        json!({"regex": deep}),
        json!({"regex": "x".repeat(1 << 20)}),
        json!({"grammar": "start: missing"}),
        json!({"json": {"type": "string", "pattern": "[" }}),
        json!({"json": {"$ref": "#/nowhere"}}),
        json!({"json": {"allOf": [{"type": "string"}, {"type": "null"}]}}),
        json!({"json": {"x-guidance": {"lenient": true}}}),
    ] {
        let shown: String = rule.to_string().chars().take(60).collect();
        let response = server.complete(json!({"prompt": "x", "structured_outputs": rule}));
        assert_eq!(response.status, 400, "{shown}: {}", response.body);
        assert_eq!(response.error()["param"], "structured_outputs", "{shown}: {}", response.body);
        assert!(response.body.len() < 4000, "{shown}: {} bytes", response.body.len());
    }
    for rule in [json!({"json": nested}), json!({"regex": "((a{1,100}){1,100}b?){1,100}"})] {
        let status =
            server.complete(json!({"prompt": "x", "structured_outputs": rule, "max_tokens": 5})).status;
        assert!(status == 200 || status == 400, "{status}");
    }
    assert_eq!(server.complete(json!({"prompt": "x", "max_tokens": 3})).status, 200);
}
