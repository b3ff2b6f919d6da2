//! What a good request gets.

use serde_json::json;

use crate::harness::{EOS, Server, greedy};
use crate::patience::eventually;

const PROMPT: &str = "The old house stood";

#[test]
fn a_completion_has_text_usage_and_identity() {
    let server = Server::start();
    let response = server.complete(json!({"prompt": PROMPT, "max_tokens": 12}));
    assert_eq!(response.status, 200, "{}", response.body);
    let body = response.json();
    assert_eq!(body["choices"][0]["text"], server.expected_text(PROMPT, 12));
    assert_eq!(body["choices"][0]["index"], 0);
    assert_eq!(body["choices"][0]["finish_reason"], "length");
    assert!(body["choices"][0]["stop_reason"].is_null() && body["choices"][0]["logprobs"].is_null());
    assert_eq!(body["object"], "text_completion");
    assert_eq!(body["model"], "demo");
    assert!(body["id"].as_str().unwrap().starts_with("cmpl-"));
    let prompt_tokens = server.tokenizer.encode(PROMPT, true).unwrap().len();
    assert_eq!(
        body["usage"],
        json!({"prompt_tokens": prompt_tokens, "completion_tokens": 12, "total_tokens": prompt_tokens + 12,
            "prompt_tokens_details": {"cached_tokens": 0}})
    );
}

#[test]
fn a_repeated_prompt_is_found_in_the_cache() {
    let server = Server::start();
    let prompt: Vec<u32> = (100..140).collect();
    let first = server.complete(json!({"prompt": prompt, "max_tokens": 4})).json();
    let second = server.complete(json!({"prompt": prompt, "max_tokens": 4})).json();
    assert_eq!(first["choices"][0]["text"], second["choices"][0]["text"]);
    assert_eq!(second["usage"]["prompt_tokens_details"]["cached_tokens"], 32);
}

#[test]
fn a_stream_joined_is_the_completion() {
    let server = Server::start();
    let request = json!({"prompt": PROMPT, "max_tokens": 40, "stream": true,
        "stream_options": {"include_usage": true}});
    let response = server.complete(request);
    assert_eq!(response.status, 200);
    assert!(response.header("content-type").unwrap().starts_with("text/event-stream"));
    let mut chunks = response.chunks();
    let last = chunks.pop().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["completion_tokens"], 40);
    let text: String = chunks.iter().map(|chunk| chunk["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(text, server.expected_text(PROMPT, 40));
    assert!(chunks.len() > 10, "{} chunks are no stream", chunks.len());
    for chunk in &chunks {
        assert_eq!(chunk["id"], last["id"]);
        assert_eq!(chunk["usage"], json!(null));
    }
    let ends: Vec<bool> =
        chunks.iter().map(|chunk| !chunk["choices"][0]["finish_reason"].is_null()).collect();
    assert_eq!(ends.iter().position(|&end| end), Some(ends.len() - 1));

    let plain = server.complete(json!({"prompt": PROMPT, "max_tokens": 2, "stream": true}));
    assert!(plain.chunks().iter().all(|chunk| chunk.get("usage").is_none()), "{}", plain.body);
}

#[test]
fn all_prompt_forms_agree() {
    let server = Server::start();
    let other = "A letter came";
    let ids = |text: &str| server.tokenizer.encode(text, true).unwrap();
    let texts = |request| -> Vec<String> {
        let body = server.complete(request).json();
        let mut choices: Vec<_> = body["choices"].as_array().expect("choices").clone();
        choices.sort_by_key(|choice| choice["index"].as_u64());
        choices.iter().map(|choice| choice["text"].as_str().unwrap().to_owned()).collect()
    };
    let one = vec![server.expected_text(PROMPT, 8)];
    let two = vec![one[0].clone(), server.expected_text(other, 8)];
    assert_eq!(texts(json!({"prompt": PROMPT, "max_tokens": 8})), one);
    assert_eq!(texts(json!({"prompt": ids(PROMPT), "max_tokens": 8})), one);
    assert_eq!(texts(json!({"prompt": [PROMPT, other], "max_tokens": 8})), two);
    assert_eq!(texts(json!({"prompt": [ids(PROMPT), ids(other)], "max_tokens": 8})), two);

    let stream = server.complete(json!({"prompt": [PROMPT, other], "max_tokens": 8, "stream": true}));
    let mut streamed = vec![String::new(); 2];
    for chunk in stream.chunks() {
        let choice = &chunk["choices"][0];
        streamed[choice["index"].as_u64().unwrap() as usize].push_str(choice["text"].as_str().unwrap());
    }
    assert_eq!(streamed, two);
}

#[test]
fn a_stop_string_ends_the_text_before_it_wherever_tokens_break() {
    let server = Server::start();
    let whole = server.expected_text(PROMPT, 30);
    let chars: Vec<char> = whole.chars().collect();
    for start in [5, 17, 40] {
        let stop: String = chars[start..start + 6].iter().collect();
        let cut = whole.find(&stop).unwrap();
        for stream in [false, true] {
            let request =
                json!({"prompt": PROMPT, "max_tokens": 30, "stop": ["\u{1F9ED}", stop], "stream": stream});
            let response = server.complete(request);
            let choices = if stream {
                response.chunks().iter().map(|chunk| chunk["choices"][0].clone()).collect()
            } else {
                vec![response.json()["choices"][0].clone()]
            };
            let text: String = choices.iter().map(|choice| choice["text"].as_str().unwrap()).collect();
            assert_eq!(text, whole[..cut], "stop {stop:?}, stream {stream}");
            let last = choices.last().unwrap();
            assert_eq!(last["finish_reason"], "stop");
            assert_eq!(last["stop_reason"], stop);
        }
    }
    eventually("what stop strings ended is gone", || server.stats().running == 0);
}

#[test]
fn a_stop_token_ends_the_text_and_is_not_part_of_it() {
    let server = Server::start();
    let tokens = server.expected_tokens(PROMPT, 10);
    let stop = tokens[6];
    assert!(!tokens[..6].contains(&stop));
    let body = server.complete(json!({"prompt": PROMPT, "max_tokens": 10, "stop_token_ids": [stop]})).json();
    let choice = &body["choices"][0];
    assert_eq!(choice["text"], server.tokenizer.decode(&tokens[..6], true));
    assert_eq!(choice["finish_reason"], "stop");
    assert_eq!(choice["stop_reason"], stop);
    assert_eq!(body["usage"]["completion_tokens"], 7);
}

#[test]
fn eos_ends_the_text_without_a_reason_unless_ignored() {
    let server = Server::start();
    // The scripted model reaches EOS from some prompt of one token: find it.
    let prompt = (3..4096).find(|&token| server.script.greedy(&[token], 3)[2] == EOS).expect("an EOS");
    let body = server.complete(json!({"prompt": [prompt], "max_tokens": 6, "ignore_eos": false})).json();
    assert_eq!(body["choices"][0]["finish_reason"], "stop", "{body}");
    assert!(body["choices"][0]["stop_reason"].is_null());
    assert_eq!(body["usage"]["completion_tokens"], 3);
    let body = server.complete(json!({"prompt": [prompt], "max_tokens": 6})).json();
    assert_eq!(body["usage"]["completion_tokens"], 6);
}

#[test]
fn logprobs_have_one_entry_per_token_in_each_list() {
    let server = Server::start();
    let request = |count: u32, stream: bool| json!({"prompt": PROMPT, "max_tokens": 9, "logprobs": count, "stream": stream});
    for count in [0, 1, 5] {
        let body = server.complete(request(count, false)).json();
        let logprobs = &body["choices"][0]["logprobs"];
        for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
            assert_eq!(logprobs[list].as_array().unwrap().len(), 9, "{list}");
        }
        for (i, top) in logprobs["top_logprobs"].as_array().unwrap().iter().enumerate() {
            let (top, own) = (top.as_object().unwrap(), logprobs["token_logprobs"][i].as_f64().unwrap());
            assert!((1..=count as usize + 1).contains(&top.len()), "{count}: {top:?}");
            assert_eq!(top[logprobs["tokens"][i].as_str().unwrap()], own);
            assert!(
                own < 0.0 && top.values().all(|other| other.as_f64().unwrap() <= own),
                "greedy is the best"
            );
        }
        let offsets: Vec<u64> =
            logprobs["text_offset"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).collect();
        assert!(offsets[0] == 0 && offsets.is_sorted(), "{offsets:?}");

        let chunks = server.complete(request(count, true)).chunks();
        let streamed: Vec<_> = chunks
            .iter()
            .flat_map(|chunk| {
                chunk["choices"][0]["logprobs"]["tokens"].as_array().cloned().unwrap_or_default()
            })
            .collect();
        assert_eq!(&streamed, logprobs["tokens"].as_array().unwrap());
    }
}

#[test]
fn the_same_seed_gives_the_same_text_alone_and_in_company() {
    let server = Server::start();
    let request = json!({"model": "demo", "prompt": PROMPT, "max_tokens": 20, "temperature": 1.0, "seed": 7,
        "ignore_eos": true});
    let text =
        |request| server.client().post("/v1/completions", request).json()["choices"][0]["text"].clone();
    let alone = text(&request);
    std::thread::scope(|scope| {
        let company: Vec<_> = (0..8).map(|_| scope.spawn(|| text(&request))).collect();
        for other in company {
            assert_eq!(other.join().unwrap(), alone);
        }
    });
    let mut unseeded = request.clone();
    unseeded["seed"] = json!(null);
    assert_ne!(text(&unseeded), text(&unseeded));
}

#[test]
fn text_in_a_stream_is_never_broken() {
    let server = Server::start();
    // Random tokens of a byte-level vocabulary hold halves of characters in plenty.
    let response = server.complete(json!({"prompt": [77], "max_tokens": 400, "stream": true}));
    let text: String = response
        .chunks()
        .iter()
        .map(|chunk| chunk["choices"][0]["text"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(text, server.tokenizer.decode(&server.script.greedy(&[77], 400), true));
}

#[test]
fn what_was_not_asked_for_is_a_default() {
    let server = Server::start();
    let body = server.client().post("/v1/completions", &json!({"prompt": "x", "ignore_eos": true})).json();
    assert_eq!(body["usage"]["completion_tokens"], 16);
    assert_eq!(body["model"], "demo");
    // The default bends to the context, a wish does not.
    let prompt: Vec<u32> = (0..505).map(|i| 10 + i % 50).collect();
    let body = server.complete(json!({"prompt": prompt})).json();
    assert_eq!(body["usage"]["completion_tokens"], 7);
    assert_eq!(server.complete(json!({"prompt": prompt, "max_tokens": 16})).status, 400);
    let alias =
        server.client().post("/v1/completions", &greedy(json!({"model": "org/alias", "prompt": "x"})));
    assert_eq!(alias.json()["model"], "org/alias");
}
