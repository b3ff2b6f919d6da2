//! `/tokenize` and `/detokenize`.

use serde_json::{Value, json};

use crate::harness::Server;

fn post(server: &Server, path: &str, body: Value) -> Value {
    let response = server.client().post(path, &body);
    assert_eq!(response.status, 200, "{body}: {}", response.body);
    response.json()
}

#[test]
fn a_prompt_becomes_tokens_and_comes_back() {
    let server = Server::start();
    let text = "The old house \u{1F9ED} stood";
    let tokens = server.tokenizer.encode(text, true).unwrap();
    let answer = post(&server, "/tokenize", json!({"model": "demo", "prompt": text}));
    assert_eq!(
        answer,
        json!({"count": tokens.len(), "max_model_len": 512, "tokens": tokens, "token_strs": null})
    );
    let bare = post(
        &server,
        "/tokenize",
        json!({"prompt": text, "add_special_tokens": false, "return_token_strs": true}),
    );
    assert_eq!(bare["tokens"], json!(server.tokenizer.encode(text, false).unwrap()));
    assert_eq!(bare["token_strs"].as_array().unwrap().len(), bare["tokens"].as_array().unwrap().len());
    let back = post(&server, "/detokenize", json!({"tokens": bare["tokens"]}));
    assert_eq!(back["prompt"].as_str().unwrap().trim_start(), text);
    assert_eq!(
        post(&server, "/tokenize", json!({"prompt": ""}))["count"],
        server.tokenizer.encode("", true).unwrap().len()
    );
    assert_eq!(post(&server, "/detokenize", json!({"tokens": []}))["prompt"], "");
}

#[test]
fn a_chat_is_rendered_first() {
    let server = Server::start();
    let text = |body: Value| {
        let tokens = post(&server, "/tokenize", body)["tokens"].clone();
        post(&server, "/detokenize", json!({ "tokens": tokens }))["prompt"].as_str().unwrap().to_owned()
    };
    let messages = json!([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "so be"}]);
    let opened = text(json!({ "messages": messages }));
    assert!(opened.ends_with("so be<|end|><|assistant|>"), "{opened}");
    let closed = text(json!({"messages": messages, "add_generation_prompt": false}));
    assert!(closed.ends_with("so be<|end|>"), "{closed}");
    let continued = text(json!({"messages": messages, "continue_final_message": true}));
    assert!(continued.ends_with("so be"), "{continued}");
    // Templates that know no developer are given a system message.
    let developer = text(json!({"messages": [{"role": "developer", "content": "be kind"}]}));
    assert!(developer.contains("<|system|>be kind"), "{developer}");
}

#[test]
fn refusals_name_their_field() {
    let server = Server::start();
    let chat = |extra: Value| {
        let mut body = json!({"messages": [{"role": "user", "content": "hi"}]});
        extra.as_object().unwrap().iter().for_each(|(name, value)| body[name] = value.clone());
        body
    };
    let tool = json!({"type": "function", "function": {"name": "f"}});
    for (path, body, status, param) in [
        ("/tokenize", json!({}), 400, "messages"),
        ("/tokenize", json!({"prompt": 3}), 400, "prompt"),
        ("/tokenize", json!({"prompt": "x", "messages": []}), 400, "messages"),
        ("/tokenize", json!({"prompt": "x", "surprise": 1}), 400, "surprise"),
        ("/tokenize", json!({"prompt": "x", "model": "gpt-4"}), 404, "model"),
        ("/tokenize", json!({"prompt": "word ".repeat(1_000_000)}), 400, "prompt"),
        ("/tokenize", chat(json!({"tools": [tool]})), 400, "tools"),
        ("/tokenize", chat(json!({"documents": [{}]})), 400, "documents"),
        ("/tokenize", chat(json!({"reasoning_effort": "low"})), 400, "reasoning_effort"),
        ("/tokenize", chat(json!({"reasoning_effort": "huge"})), 400, "reasoning_effort"),
        ("/tokenize", chat(json!({"chat_template": "x"})), 400, "chat_template"),
        (
            "/tokenize",
            chat(json!({"chat_template_kwargs": {"messages": []}})),
            400,
            "chat_template_kwargs.messages",
        ),
        (
            "/tokenize",
            chat(json!({"continue_final_message": true, "add_generation_prompt": true})),
            400,
            "continue_final_message",
        ),
        ("/detokenize", json!({}), 400, "tokens"),
        ("/detokenize", json!({"tokens": [4096]}), 400, "tokens"),
        ("/detokenize", json!({"tokens": [-1]}), 400, "tokens"),
        ("/detokenize", json!({"tokens": "x"}), 400, "tokens"),
    ] {
        let response = server.client().post(path, &body);
        let shown: String = body.to_string().chars().take(80).collect();
        assert_eq!(response.status, status, "{shown}: {}", response.body);
        assert_eq!(response.error()["param"], param, "{shown}: {}", response.body);
    }
}

#[test]
fn a_trusted_client_may_bring_its_template_and_its_steps_are_counted() {
    let mut config = crate::harness::Config::default();
    config.options.trust_chat_template = true;
    let server = Server::with(config);
    let ask = |template: &str| {
        let body = json!({"messages": [{"role": "user", "content": "hi"}], "chat_template": template,
            "chat_template_kwargs": {"mood": "kind"}});
        server.client().post("/tokenize", &body)
    };
    let tokens = ask("{{ mood }}:{{ messages[0].content }}").json()["tokens"].clone();
    assert_eq!(tokens, json!(server.tokenizer.encode("kind:hi", false).unwrap()));
    let endless = "{% for a in range(99999) %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}";
    for bad in [endless, "{% if %}", "{{ raise_exception('no') }}", &"x".repeat(70_000)] {
        let response = ask(bad);
        assert_eq!(response.status, 400, "{}", response.body);
        assert!(response.body.len() < 4000);
    }
}
