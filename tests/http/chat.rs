//! `/v1/chat/completions`: what a good request gets and a bad one is told.

use serde_json::{Value, json};

use crate::client::Response;
use crate::harness::{Config, Server, greedy};

/// A chat template in the style of Qwen's: thoughts, and tools called as Hermes models do.
pub const TOOL_TEMPLATE: &str = "{% if tools %}{{ tools | tojson }}<tool_call>{\"name\": , \"arguments\": }</tool_call>{% endif %}\
    {% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}{% for call in m.tool_calls or [] %}\
    {{ call.function.arguments | tojson }}{% endfor %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\
    {% if enable_thinking %}<think>{% endif %}{% endif %}{# </think> #}";

fn hello() -> Value {
    json!([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello \u{1F9ED}"}])
}

pub fn chat(server: &Server, fields: Value) -> Response {
    let mut request = greedy(json!({"messages": hello()}));
    for (name, value) in fields.as_object().unwrap() {
        request[name] = value.clone();
    }
    server.client().post("/v1/chat/completions", &request)
}

/// The text a stream's chunks add up to, of one choice.
pub fn streamed(chunks: &[Value], index: usize) -> String {
    let own =
        chunks.iter().filter_map(|chunk| chunk["choices"].get(0)).filter(|choice| choice["index"] == index);
    own.filter_map(|choice| choice["delta"]["content"].as_str()).collect()
}

#[test]
fn a_chat_continues_what_its_template_renders() {
    let server = Server::start();
    let rendered = "<s><|system|>Be kind.<|end|><|user|>Hello \u{1F9ED}<|end|><|assistant|>";
    let tokenized = server.client().post("/tokenize", &json!({"messages": hello()})).json();
    let prompt: Vec<u32> = serde_json::from_value(tokenized["tokens"].clone()).unwrap();
    let text = server.client().post("/detokenize", &json!({"tokens": prompt})).json()["prompt"].clone();
    assert!(text.as_str().unwrap().ends_with(&rendered[3..]), "{text}");

    let response = chat(&server, json!({"max_tokens": 12}));
    assert_eq!(response.status, 200, "{}", response.body);
    let body = response.json();
    let completion = server.complete(json!({"prompt": prompt, "max_tokens": 12})).json();
    assert_eq!(body["choices"][0]["message"]["content"], completion["choices"][0]["text"]);
    assert_eq!(body["choices"][0]["message"]["role"], "assistant");
    assert_eq!(body["choices"][0]["finish_reason"], "length");
    assert_eq!((&body["object"], &body["model"]), (&json!("chat.completion"), &json!("demo")));
    assert!(body["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(body["usage"]["prompt_tokens"], prompt.len());
    assert_eq!(body["usage"]["completion_tokens"], 12);
}

#[test]
fn a_stream_opens_with_the_role_and_ends_with_reason_and_usage() {
    let server = Server::start();
    let whole = chat(&server, json!({"max_tokens": 30})).json()["choices"][0]["message"]["content"].clone();
    let request = json!({"max_tokens": 30, "stream": true, "stream_options": {"include_usage": true}});
    let mut chunks = chat(&server, request).chunks();
    let usage = chunks.pop().unwrap();
    assert_eq!((&usage["choices"], &usage["usage"]["completion_tokens"]), (&json!([]), &json!(30)));
    assert_eq!(chunks[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert_eq!(streamed(&chunks, 0), whole);
    let last = chunks.last().unwrap();
    assert_eq!(
        (&last["choices"][0]["finish_reason"], &last["choices"][0]["delta"]),
        (&json!("length"), &json!({}))
    );
    for chunk in &chunks {
        assert_eq!((&chunk["id"], &chunk["object"]), (&usage["id"], &json!("chat.completion.chunk")));
        assert_eq!(chunk["usage"], json!(null));
        assert!(chunk == last || chunk["choices"][0]["finish_reason"].is_null());
    }
    let plain = chat(&server, json!({"max_tokens": 2, "stream": true}));
    assert!(plain.chunks().iter().all(|chunk| chunk.get("usage").is_none()), "{}", plain.body);
}

#[test]
fn choices_of_a_seed_are_the_same_streamed_or_not() {
    let server = Server::start();
    let fields = json!({"n": 3, "temperature": 1.0, "seed": 5, "max_tokens": 10});
    let whole = chat(&server, fields.clone()).json();
    let texts: Vec<_> = whole["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|choice| choice["message"]["content"].clone())
        .collect();
    assert_eq!(texts.len(), 3);
    assert_ne!(texts[0], texts[1]);
    let mut stream = fields;
    stream["stream"] = json!(true);
    let chunks = chat(&server, stream).chunks();
    for (index, text) in texts.iter().enumerate() {
        assert_eq!(streamed(&chunks, index), *text, "choice {index}");
    }
}

#[test]
fn logprobs_have_bytes_and_as_many_alternatives_as_asked_for() {
    let server = Server::start();
    let body = chat(&server, json!({"max_tokens": 6, "logprobs": true, "top_logprobs": 2})).json();
    let content = body["choices"][0]["logprobs"]["content"].as_array().unwrap().clone();
    assert_eq!(content.len(), 6);
    let mut bytes = Vec::new();
    for entry in &content {
        let top = entry["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 2);
        assert_eq!(
            (&top[0]["token"], &top[0]["logprob"]),
            (&entry["token"], &entry["logprob"]),
            "greedy is the best"
        );
        bytes.extend(entry["bytes"].as_array().unwrap().iter().map(|byte| byte.as_u64().unwrap() as u8));
    }
    assert_eq!(String::from_utf8_lossy(&bytes), body["choices"][0]["message"]["content"].as_str().unwrap());
    let chunks =
        chat(&server, json!({"max_tokens": 6, "logprobs": true, "top_logprobs": 2, "stream": true})).chunks();
    let streamed: Vec<Value> = chunks
        .iter()
        .flat_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array().cloned().unwrap_or_default())
        .collect();
    assert_eq!(streamed, content);
    let bare = chat(&server, json!({"max_tokens": 2, "logprobs": true})).json();
    assert_eq!(bare["choices"][0]["logprobs"]["content"][0]["top_logprobs"], json!([]));
    assert!(chat(&server, json!({"max_tokens": 2})).json()["choices"][0]["logprobs"].is_null());
}

#[test]
fn without_a_limit_an_answer_fills_the_context() {
    let server = Server::start();
    let usage = chat(&server, json!({})).json()["usage"].clone();
    assert_eq!(usage["total_tokens"], 512);
    let both = chat(&server, json!({"max_tokens": 9, "max_completion_tokens": 4})).json();
    assert_eq!(both["usage"]["completion_tokens"], 4, "the newer name wins");
}

#[test]
fn a_final_message_is_continued() {
    let server = Server::start();
    let messages = json!([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "so be"}]);
    let fields = json!({"messages": messages, "continue_final_message": true, "add_generation_prompt": false, "max_tokens": 5});
    let prompt = server
        .client()
        .post("/tokenize", &json!({"messages": messages, "continue_final_message": true}))
        .json()["tokens"]
        .clone();
    let expected = server.complete(json!({"prompt": prompt, "max_tokens": 5})).json();
    assert_eq!(
        chat(&server, fields).json()["choices"][0]["message"]["content"],
        expected["choices"][0]["text"]
    );
}

#[test]
fn refusals_name_their_field() {
    let server = Server::start();
    let tool = json!({"type": "function", "function": {"name": "f"}});
    let long = "word ".repeat(2000);
    for (fields, status, param) in [
        (json!({"messages": null}), 400, "messages"),
        (json!({"messages": []}), 400, "messages"),
        (json!({"messages": [{"role": "user", "content": long}]}), 400, "prompt"),
        (json!({"model": "gpt-4"}), 404, "model"),
        (json!({"prompt": "x"}), 400, "prompt"),
        (json!({"max_tokens": 0}), 400, "max_tokens"),
        (json!({"max_completion_tokens": 0}), 400, "max_completion_tokens"),
        (json!({"max_tokens": 512}), 400, "max_tokens"),
        (json!({"logprobs": 3}), 400, "logprobs"),
        (json!({"top_logprobs": 3}), 400, "top_logprobs"),
        (json!({"logprobs": true, "top_logprobs": 21}), 400, "top_logprobs"),
        (json!({"temperature": 3}), 400, "temperature"),
        (json!({"n": 2}), 400, "n"),
        (json!({"n": 200, "temperature": 1}), 400, "n"),
        (json!({"tools": [tool]}), 400, "tools"),
        (json!({"tool_choice": "auto"}), 400, "tool_choice"),
        (json!({"functions": [{"name": "f"}]}), 400, "functions"),
        (json!({"store": true}), 400, "store"),
        (json!({"service_tier": "flex"}), 400, "service_tier"),
        (json!({"modalities": ["audio"]}), 400, "modalities"),
        (json!({"guided_json": {}}), 400, "guided_json"),
        (json!({"response_format": {"type": "structural_tag"}}), 400, "response_format.type"),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}}),
            400,
            "response_format",
        ),
        (json!({"structured_outputs": {"regex": "("}}), 400, "structured_outputs"),
        (json!({"reasoning_effort": "low"}), 400, "reasoning_effort"),
        (json!({"stream_options": {"include_usage": true}}), 400, "stream_options"),
        (json!({"surprise": 1}), 400, "surprise"),
    ] {
        let shown: String = fields.to_string().chars().take(80).collect();
        let response = chat(&server, fields);
        assert_eq!(response.status, status, "{shown}: {}", response.body);
        assert_eq!(response.error()["param"], param, "{shown}: {}", response.body);
    }
    assert_eq!(server.stats().running, 0);
}

#[test]
fn a_model_without_a_template_says_so() {
    let server = Server::with(Config { chat_template: Some(""), ..Config::default() });
    let error = chat(&server, json!({})).error();
    assert!(error["message"].as_str().unwrap().contains("/v1/completions"), "{error}");
}

#[test]
fn what_a_template_raises_is_told() {
    let template =
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}x";
    let server = Server::with(Config { chat_template: Some(template), ..Config::default() });
    let response = chat(&server, json!({}));
    assert_eq!((response.status, &response.error()["message"]), (400, &json!("no system messages")));
}

fn weather() -> Value {
    json!([
        {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "additionalProperties": false,
            "required": ["city"], "properties": {"city": {"$ref": "#/$defs/City"}}, "$defs": {"City": {"enum": ["Oslo", "Rome"]}}}}},
        {"type": "function", "function": {"name": "now"}},
    ])
}

fn check_calls(calls: &Value, name: Option<&str>) {
    let calls = calls.as_array().unwrap();
    assert!(!calls.is_empty());
    for call in calls {
        assert!(call["id"].as_str().unwrap().starts_with("call-") && call["type"] == "function", "{call}");
        let arguments: Value = serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
        match call["function"]["name"].as_str().unwrap() {
            "weather" => assert!(["Oslo", "Rome"].contains(&arguments["city"].as_str().unwrap()), "{call}"),
            other => assert_eq!((other, arguments), ("now", json!({}))),
        }
        assert!(name.is_none_or(|name| call["function"]["name"] == name), "{call}");
    }
}

/// The calls of a stream, put together as clients do: the first chunk of each has its name, the others have arguments.
fn streamed_calls(chunks: &[Value]) -> Vec<Value> {
    let mut calls: Vec<Value> = Vec::new();
    let (mut pieces, mut arguments) = (0, String::new());
    for chunk in chunks {
        for part in chunk["choices"][0]["delta"]["tool_calls"].as_array().into_iter().flatten() {
            let index = part["index"].as_u64().unwrap() as usize;
            if index == calls.len() {
                assert!(part["function"]["name"].is_string(), "{part}");
                calls.push(part.clone());
                arguments.clear();
            } else {
                assert_eq!(index + 1, calls.len(), "{part}");
                assert!(part.get("id").is_none() && part["function"].get("name").is_none(), "{part}");
                pieces += 1;
            }
            arguments +=
                if index + 1 == calls.len() { part["function"]["arguments"].as_str().unwrap() } else { "" };
            calls[index]["function"]["arguments"] = json!(arguments);
        }
    }
    assert!(
        pieces > 1 || calls.iter().all(|call| call["function"]["name"] == "now"),
        "{pieces} pieces: {calls:?}"
    );
    calls
}

#[test]
fn an_answer_in_a_format_or_a_call_where_both_are_allowed() {
    let server = Server::with(Config { chat_template: Some(TOOL_TEMPLATE), ..Config::default() });
    let format = json!({"type": "json_schema", "json_schema": {"name": "a", "schema": {
        "type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": false}}});
    let (mut answers, mut calls) = (0, 0);
    for seed in 0..12 {
        let fields = json!({"tools": weather(), "response_format": format, "temperature": 1.5, "seed": seed,
            "ignore_eos": false, "messages": [{"role": "user", "content": "x"}]});
        let body = chat(&server, fields).json();
        let message = &body["choices"][0]["message"];
        if message["tool_calls"].is_array() {
            calls += 1;
            check_calls(&message["tool_calls"], None);
            assert!(message["content"].is_null(), "{body}");
        } else {
            answers += 1;
            let answer: Value = serde_json::from_str(message["content"].as_str().unwrap()).unwrap();
            assert!(answer["ok"].is_boolean(), "{body}");
        }
    }
    assert!(answers > 0 && calls > 0, "{answers} answers, {calls} calls");
    // A call that must come leaves no room for an answer, and a grammar none for calls.
    let both = json!({"tools": weather(), "tool_choice": "required", "response_format": format});
    assert_eq!(chat(&server, both).error()["param"], "response_format");
    let grammar = json!({"tools": weather(), "structured_outputs": {"grammar": "start: \"a\""}});
    assert_eq!(chat(&server, grammar).error()["param"], "structured_outputs");
}

#[test]
fn required_and_named_tools_are_called_whatever_the_model_would_rather_say() {
    let server = Server::with(Config { chat_template: Some(TOOL_TEMPLATE), ..Config::default() });
    let named = json!({"type": "function", "function": {"name": "weather"}});
    for (choice, name) in [(json!("required"), None), (named, Some("weather"))] {
        for temperature in [0.0, 1.3] {
            let fields = json!({"tools": weather(), "tool_choice": choice, "temperature": temperature, "seed": 3,
                "ignore_eos": false, "messages": [{"role": "user", "content": "x"}]});
            let body = chat(&server, fields.clone()).json();
            let answer = &body["choices"][0];
            assert_eq!(answer["finish_reason"], "tool_calls", "{body}");
            assert!(answer["message"]["content"].is_null(), "{body}");
            check_calls(&answer["message"]["tool_calls"], name);
            assert_eq!(answer["message"]["tool_calls"].as_array().unwrap().len(), 1);

            let mut fields = fields;
            fields["stream"] = json!(true);
            let chunks = chat(&server, fields).chunks();
            let calls = streamed_calls(&chunks);
            assert_eq!(calls.len(), 1);
            check_calls(&json!(calls), name);
            assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");
            assert_eq!(streamed(&chunks, 0), "");
        }
    }
}

#[test]
fn a_conversation_with_calls_and_their_answers_is_rendered() {
    let server = Server::with(Config { chat_template: Some(TOOL_TEMPLATE), ..Config::default() });
    let messages = json!([
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": null, "tool_calls": [
            {"id": "call-1", "type": "function", "function": {"name": "weather", "arguments": "{\"city\": \"Oslo\"}"}}]},
        {"role": "tool", "tool_call_id": "call-1", "content": "rain"},
    ]);
    let response = chat(&server, json!({"messages": messages, "tools": weather(), "max_tokens": 3}));
    assert_eq!(response.status, 200, "{}", response.body);
    let tokens = server.client().post("/tokenize", &json!({"messages": messages})).json()["tokens"].clone();
    let text = server.client().post("/detokenize", &json!({"tokens": tokens})).json()["prompt"].clone();
    assert!(text.as_str().unwrap().ends_with("{\"city\": \"Oslo\"}<|tool|>rain<|assistant|>"), "{text}");
}

#[test]
fn thoughts_are_told_apart_from_the_answer() {
    let server = Server::with(Config { chat_template: Some(TOOL_TEMPLATE), ..Config::default() });
    let fields = json!({"chat_template_kwargs": {"enable_thinking": true}, "max_tokens": 8});
    let message = chat(&server, fields.clone()).json()["choices"][0]["message"].clone();
    assert!(!message["reasoning_content"].as_str().unwrap().is_empty(), "{message}");
    assert_eq!(message["content"], "");
    let mut silent = fields.clone();
    silent["include_reasoning"] = json!(false);
    assert!(chat(&server, silent).json()["choices"][0]["message"].get("reasoning_content").is_none());
    let mut stream = fields;
    stream["stream"] = json!(true);
    let chunks = chat(&server, stream).chunks();
    let thoughts: String = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["delta"]["reasoning_content"].as_str())
        .collect();
    assert_eq!(json!(thoughts), message["reasoning_content"]);
    assert_eq!(streamed(&chunks, 0), "");
}
