//! Every field that says how text is generated and told, through the whole server.

use std::collections::HashSet;

use base64::Engine as _;
use moeyard::engine::SchedulingPolicy;
use moeyard::engine::scripted::{LAYERS, Script, TOP_K};
use serde_json::{Value, json};

use crate::client::Response;
use crate::harness::{Config, Server};
use crate::patience::eventually;

const PROMPT: &str = "The old house stood";

fn texts(response: &Response) -> Vec<String> {
    assert_eq!(response.status, 200, "{}", response.body);
    let body = response.json();
    let choices = body["choices"].as_array().unwrap();
    for (i, choice) in choices.iter().enumerate() {
        assert_eq!(choice["index"], i);
    }
    choices.iter().map(|choice| choice["text"].as_str().unwrap().to_owned()).collect()
}

/// The choices of a stream put together again, and the last chunk if it has no choices.
fn joined(response: &Response) -> (Vec<Value>, Option<Value>) {
    let mut choices: Vec<Value> = Vec::new();
    let mut usage = None;
    for chunk in response.chunks() {
        let Some(part) = chunk["choices"].get(0) else {
            usage = Some(chunk);
            continue;
        };
        let index = part["index"].as_u64().unwrap() as usize;
        if choices.len() <= index {
            choices.resize(index + 1, json!({"text": "", "token_ids": [], "ended": false}));
        }
        let choice = &mut choices[index];
        assert_eq!(choice["ended"], false, "a chunk after the last");
        choice["text"] = json!(choice["text"].as_str().unwrap().to_owned() + part["text"].as_str().unwrap());
        if let Some(ids) = part["token_ids"].as_array() {
            choice["token_ids"].as_array_mut().unwrap().extend(ids.iter().cloned());
        }
        for field in ["prompt_token_ids", "routed_experts"] {
            if let Some(value) = part.get(field) {
                assert!(choice.get(field).is_none(), "{field} twice");
                choice[field] = value.clone();
            }
        }
        choice["ended"] = json!(!part["finish_reason"].is_null());
    }
    (choices, usage)
}

#[test]
fn n_choices_are_numbered_seeded_and_counted() {
    let server = Server::start();
    let request = |seed: i64, stream: bool| {
        json!({"prompt": [PROMPT, "A letter came"], "n": 3, "temperature": 1, "seed": seed, "max_tokens": 8,
            "stream": stream, "return_token_ids": true})
    };
    let first = server.complete(request(7, false));
    let all = texts(&first);
    assert_eq!(all.len(), 6);
    assert_eq!(all.iter().collect::<HashSet<_>>().len(), 6, "every choice has a stream of its own: {all:?}");
    assert_eq!(texts(&server.complete(request(7, false))), all);
    assert_ne!(texts(&server.complete(request(8, false))), all);
    // Choice k of a seed is choice 0 of the seed k further on.
    let one = server.complete(json!({"prompt": PROMPT, "temperature": 1, "seed": 9, "max_tokens": 8}));
    assert_eq!(texts(&one)[0], all[2]);

    let usage = &first.json()["usage"];
    let prompts: usize =
        [PROMPT, "A letter came"].map(|text| server.tokenizer.encode(text, true).unwrap().len()).iter().sum();
    assert_eq!((&usage["prompt_tokens"], &usage["completion_tokens"]), (&json!(prompts), &json!(48)));

    let (streamed, _) = joined(&server.complete(request(7, true)));
    for (choice, text) in streamed.iter().zip(&all) {
        assert_eq!(choice["text"], *text);
        assert_eq!(choice["token_ids"].as_array().unwrap().len(), 8);
        assert!(choice["prompt_token_ids"].is_array() && choice["ended"] == true);
    }
    let unseeded = json!({"prompt": [PROMPT, PROMPT], "temperature": 1, "max_tokens": 8});
    let unseeded = texts(&server.complete(unseeded));
    assert_ne!(unseeded[0], unseeded[1]);
}

#[test]
fn echo_repeats_the_prompt_and_scores_it() {
    let server = Server::start();
    let ids = server.tokenizer.encode(PROMPT, true).unwrap();
    let ask = |fields: Value| {
        let mut request = json!({"prompt": PROMPT, "echo": true, "logprobs": 2, "max_tokens": 1});
        request.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let response = server.complete(request);
        assert_eq!(response.status, 200, "{}", response.body);
        response.json()["choices"][0].clone()
    };
    let whole = server.expected_text(PROMPT, 1);
    for (fields, generated) in [
        (json!({}), 1),
        (json!({"prompt": ids}), 1),
        (json!({"max_tokens": 0}), 0),
        (json!({"prompt": ids, "max_tokens": 0}), 0),
    ] {
        let choice = ask(fields);
        let text = choice["text"].as_str().unwrap();
        let expected = if generated == 1 { format!("{PROMPT}{whole}") } else { PROMPT.to_owned() };
        assert_eq!(text, expected);
        assert_eq!(choice["finish_reason"], "length");
        let logprobs = &choice["logprobs"];
        for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
            assert_eq!(logprobs[list].as_array().unwrap().len(), ids.len() + generated, "{list}");
        }
        assert!(logprobs["token_logprobs"][0].is_null() && logprobs["top_logprobs"][0].is_null());
        for i in 1..ids.len() + generated {
            let own = logprobs["token_logprobs"][i].as_f64().unwrap();
            assert_eq!(logprobs["top_logprobs"][i][logprobs["tokens"][i].as_str().unwrap()], own);
            let offset = logprobs["text_offset"][i].as_u64().unwrap() as usize;
            let token = logprobs["tokens"][i].as_str().unwrap();
            let tail: String = text.chars().skip(offset).collect();
            assert!(
                token.starts_with("bytes:")
                    || tail.starts_with(token.trim_start())
                    || tail.starts_with(token),
                "{tail:?} {token:?}"
            );
        }
    }
    // The same numbers by the field made for it.
    let prompt_logprobs =
        ask(json!({"echo": false, "prompt_logprobs": 1, "logprobs": null}))["prompt_logprobs"].clone();
    let echoed = ask(json!({}))["logprobs"].clone();
    assert_eq!(prompt_logprobs.as_array().unwrap().len(), ids.len());
    assert!(prompt_logprobs[0].is_null());
    for (i, id) in ids.iter().enumerate().skip(1) {
        let known = &prompt_logprobs[i][id.to_string()];
        assert_eq!(known["logprob"], echoed["token_logprobs"][i]);
        assert_eq!(known["decoded_token"], server.tokenizer.token_text(*id));
        assert!(known["rank"].as_u64().unwrap() >= 1);
    }
    let (streamed, _) =
        joined(&server.complete(json!({"prompt": PROMPT, "echo": true, "max_tokens": 4, "stream": true})));
    assert_eq!(streamed[0]["text"], format!("{PROMPT}{}", server.expected_text(PROMPT, 4)));
}

#[test]
fn what_may_be_chosen_can_be_told() {
    let server = Server::start();
    let ids = |fields: Value| -> Vec<u64> {
        let mut request = json!({"prompt": PROMPT, "max_tokens": 6, "return_token_ids": true});
        request.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let response = server.complete(request);
        assert_eq!(response.status, 200, "{}", response.body);
        response.json()["choices"][0]["token_ids"]
            .as_array()
            .unwrap()
            .iter()
            .map(|id| id.as_u64().unwrap())
            .collect()
    };
    let free: Vec<u64> = server.expected_tokens(PROMPT, 6).into_iter().map(u64::from).collect();
    assert_eq!(ids(json!({})), free);
    assert_eq!(ids(json!({"logit_bias": {"77": 100}})), [77; 6]);
    assert_ne!(ids(json!({"logit_bias": {free[0].to_string(): -100}}))[0], free[0]);
    assert!(ids(json!({"allowed_token_ids": [90, 91]})).iter().all(|id| [90, 91].contains(id)));
    assert_eq!(ids(json!({"temperature": 1, "top_k": 1})), free);
    assert_eq!(ids(json!({"temperature": 1, "top_p": 1e-9})), free);
    let penalized = ids(json!({"logit_bias": {"77": 9, "78": 9}, "frequency_penalty": 2}));
    assert!(penalized.contains(&77) && penalized.contains(&78), "{penalized:?}");
    // A stop token waits for min_tokens.
    let stop = free[0];
    assert_eq!(ids(json!({"stop_token_ids": [stop]})).len(), 1);
    let later = ids(json!({"stop_token_ids": [stop], "min_tokens": 6}));
    assert!(later.len() == 6 && !later.contains(&stop));
    // A bad word never appears, whatever speaks for it.
    let is_word = |id: &u32| {
        let text = server.tokenizer.token_text(*id);
        text.trim_start() == text && text.len() > 1 && server.tokenizer.encode(&text, false).unwrap() == [*id]
    };
    let word = (100..4096).find(is_word).expect("a token that is a word");
    let forced = json!({word.to_string(): 100});
    assert_eq!(ids(json!({"logit_bias": forced})), [u64::from(word); 6]);
    let banned = ids(json!({"logit_bias": forced, "bad_words": [server.tokenizer.token_text(word)]}));
    assert!(!banned.contains(&word.into()), "{banned:?}");
    let spaced = |id: &u32| {
        let text = server.tokenizer.token_text(*id);
        text.starts_with(' ')
            && server.tokenizer.encode(&text, false).unwrap() == [*id]
            && server.tokenizer.encode(text.trim_start(), false).unwrap().len() > 1
    };
    let word = (100..4096).find(spaced).expect("a word that is one token only after a space");
    let forced = json!({word.to_string(): 100});
    let text = server.tokenizer.token_text(word);
    for bad in [text.as_str(), text.trim_start()] {
        let banned = ids(json!({"logit_bias": forced, "bad_words": [bad]}));
        assert!(!banned.contains(&word.into()), "{bad:?}: {banned:?}");
    }
    let refused = server.complete(
        json!({"prompt": PROMPT, "allowed_token_ids": [5], "stop_token_ids": [5], "min_tokens": 1}),
    );
    assert_eq!(refused.status, 400, "{}", refused.body);
    assert!(refused.error()["message"].as_str().unwrap().contains("no token"));
}

#[test]
fn tokens_are_told_by_id_where_asked_for() {
    let server = Server::start();
    let tokens = server.expected_tokens(PROMPT, 3);
    let body = server
        .complete(
            json!({"prompt": PROMPT, "max_tokens": 3, "logprobs": 0, "return_tokens_as_token_ids": true,
            "return_token_ids": true}),
        )
        .json();
    let choice = &body["choices"][0];
    assert_eq!(choice["token_ids"], json!(tokens));
    assert_eq!(choice["prompt_token_ids"], json!(server.tokenizer.encode(PROMPT, true).unwrap()));
    let names: Vec<String> = tokens.iter().map(|id| format!("token_id:{id}")).collect();
    assert_eq!(choice["logprobs"]["tokens"], json!(names));
    let plain = server.complete(json!({"prompt": PROMPT, "max_tokens": 3})).json();
    for field in ["token_ids", "prompt_token_ids", "prompt_logprobs", "routed_experts"] {
        assert!(plain["choices"][0].get(field).is_none(), "{field} unasked");
    }
}

#[test]
fn a_prompt_can_be_truncated_to_its_end() {
    let server = Server::start();
    let long: Vec<u32> = (0..600).map(|i| 3 + i % 500).collect();
    for (keep, expected) in [(json!(5), 5), (json!(512 - 4), 508), (json!(-1), 508)] {
        let request = json!({"prompt": long, "max_tokens": 4, "truncate_prompt_tokens": keep, "return_token_ids": true});
        let body = server.complete(request).json();
        assert_eq!(body["usage"]["prompt_tokens"], expected, "{body}");
        assert_eq!(body["choices"][0]["prompt_token_ids"], json!(long[600 - expected..]));
    }
}

/// ids `[positions][layers][k]` of a .npy in base64.
fn experts(value: &Value) -> Vec<Vec<Vec<u32>>> {
    let bytes = base64::engine::general_purpose::STANDARD.decode(value.as_str().expect("base64")).unwrap();
    let header = 10 + u16::from_le_bytes([bytes[8], bytes[9]]) as usize;
    assert!(std::str::from_utf8(&bytes[10..header]).unwrap().contains("'|u1'"), "8 experts fit a byte");
    let rows = bytes[header..].chunks(LAYERS * TOP_K);
    rows.map(|row| row.chunks(TOP_K).map(|ids| ids.iter().map(|&id| id.into()).collect()).collect()).collect()
}

#[test]
fn routed_experts_are_those_of_every_token_but_the_last() {
    let server = Server::start();
    let prompt = server.tokenizer.encode(PROMPT, true).unwrap();
    let stop: String = server.expected_text(PROMPT, 12).chars().skip(8).take(4).collect();
    for (fields, stream) in [
        (json!({}), false),
        (json!({}), true),
        (json!({"stop": stop}), false),
        (json!({"stop": stop, "stream": true}), true),
        (json!({"echo": true, "max_tokens": 0}), false),
    ] {
        let mut request = json!({"prompt": PROMPT, "max_tokens": 12, "routed_experts": true, "return_token_ids": true,
            "stream": stream});
        request.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let response = server.complete(request);
        assert_eq!(response.status, 200, "{}", response.body);
        let choice =
            if stream { joined(&response).0.remove(0) } else { response.json()["choices"][0].clone() };
        let mut sequence = prompt.clone();
        sequence.extend(choice["token_ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32));
        let found = experts(&choice["routed_experts"]);
        assert_eq!(found.len(), sequence.len() - 1, "{fields}");
        for (position, layers) in found.iter().enumerate() {
            let history = server.script.history(&sequence[..=position], prompt.len());
            for (layer, ids) in layers.iter().enumerate() {
                assert_eq!(ids[..], Script::experts(history, layer)[..], "{fields} {position} {layer}");
            }
        }
    }
    eventually("what stop strings ended is gone", || server.stats().running == 0);
}

#[test]
fn streams_are_cut_and_counted_as_asked() {
    let server = Server::start();
    let stream = |fields: Value| {
        let mut request =
            json!({"prompt": PROMPT, "max_tokens": 21, "stream": true, "return_token_ids": true});
        request.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        server.complete(request).chunks()
    };
    let sizes = |chunks: &[Value]| -> Vec<usize> {
        chunks.iter().map(|chunk| chunk["choices"][0]["token_ids"].as_array().unwrap().len()).collect()
    };
    let every = stream(json!({}));
    assert!(sizes(&every).iter().all(|&size| size <= 1), "{:?}", sizes(&every));
    let fifth = sizes(&stream(json!({"stream_interval": 5})));
    assert_eq!(fifth.iter().sum::<usize>(), 21);
    assert_eq!(fifth[..4], [1, 5, 5, 5], "{fifth:?}");

    let counted = json!({"stream_options": {"include_usage": true, "continuous_usage_stats": true}});
    let mut chunks = stream(counted);
    let last = chunks.pop().unwrap();
    let prompt = server.tokenizer.encode(PROMPT, true).unwrap().len();
    let mut told = 0;
    for chunk in &chunks {
        told += chunk["choices"][0]["token_ids"].as_array().unwrap().len();
        assert_eq!(chunk["usage"]["completion_tokens"], told);
        assert_eq!(chunk["usage"]["total_tokens"], told + prompt);
    }
    assert_eq!((told, &last["choices"], &last["usage"]["completion_tokens"]), (21, &json!([]), &json!(21)));
}

#[test]
fn requests_are_named_salted_and_ordered() {
    let server = Server::start();
    let body = server.complete(json!({"prompt": PROMPT, "max_tokens": 1, "request_id": "my-request"})).json();
    assert_eq!(body["id"], "cmpl-my-request");
    let long: Vec<u32> = (100..140).collect();
    for (salt, cached) in [(json!(null), 0), (json!("a"), 0), (json!("a"), 32), (json!("b"), 0)] {
        let body = server.complete(json!({"prompt": long, "max_tokens": 1, "cache_salt": salt})).json();
        assert_eq!(body["usage"]["prompt_tokens_details"]["cached_tokens"], cached, "{salt}");
    }
    assert_eq!(server.complete(json!({"prompt": "x", "priority": 0})).status, 200);
    assert_eq!(server.complete(json!({"prompt": "x", "priority": 1})).error()["param"], "priority");
    let mut config = Config::default();
    config.engine.scheduling_policy = SchedulingPolicy::Priority;
    let server = Server::with(config);
    assert_eq!(server.complete(json!({"prompt": "x", "priority": -5})).status, 200);
}
