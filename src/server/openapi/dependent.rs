//! Fields of requests that others allow or forbid.

use serde_json::{Map, Value, json};

/// Where [`BESIDE`] are described.
const EXTENSION: &str = "x-dependent-properties";

/// Fields whose limits are no matter of JSON: the tokens that a prompt has and the context leaves, what the last message
/// holds, which tokens a grammar admits, how many sequences may wait. A schema of the body with them would admit requests
/// that are refused, so they are described beside it.
const BESIDE: [&str; 6] =
    ["max_tokens", "max_completion_tokens", "min_tokens", "n", "allowed_token_ids", "continue_final_message"];

/// Moves [`BESIDE`] out of a body's schema, and adds what its other fields allow each other.
pub fn describe(name: &str, body: &mut Value) {
    let properties = body["properties"].as_object_mut().expect("a body has properties");
    let beside: Map<String, Value> = BESIDE
        .iter()
        .filter_map(|name| Some(((*name).to_owned(), properties.shift_remove(*name)?)))
        .collect();
    let conditions: Vec<Value> = conditions(name)
        .into_iter()
        .filter(|(fields, _)| fields.iter().all(|field| properties.contains_key(*field)))
        .map(|(_, condition)| condition)
        .collect();
    if !conditions.is_empty() {
        body["allOf"] = json!(conditions);
    }
    if !beside.is_empty() {
        let text = body["description"].as_str().unwrap_or_default();
        let names: Vec<&str> = beside.keys().map(String::as_str).collect();
        let more =
            format!("Takes {} too, whose limits depend on other fields: see {EXTENSION}.", names.join(", "));
        body["description"] = json!(format!("{text} {more}").trim_start());
        body[EXTENSION] = Value::Object(beside);
    }
}

/// Describes the parts of a message beside its text: their lengths add up to what the context has room for, and random ones
/// would not fit.
pub fn describe_parts(content: &mut Value) {
    let alternatives = content["oneOf"].take();
    let Some([text, parts]) = alternatives.as_array().map(Vec::as_slice) else {
        panic!("text or parts, not {alternatives}");
    };
    let mut text = text.clone();
    text["description"] = json!(format!("The text. Takes a list of its parts too: see {EXTENSION}."));
    text[EXTENSION] = json!({"content": parts});
    *content = text;
}

/// What the fields of a body allow each other: the fields, and a schema.
fn conditions(body: &str) -> Vec<(&'static [&'static str], Value)> {
    let absent = || json!({"type": "null"});
    let generates = ["CompletionBody", "ChatBody"].contains(&body);
    let mut conditions: Vec<(&[&str], Value)> = Vec::new();
    if generates {
        let streamed = json!({
            "required": ["stream"],
            "properties": {"stream": {"const": true}, "prompt_logprobs": absent()},
        });
        let whole = json!({"properties": {
            "stream": {"enum": [false, null]}, "stream_options": absent(), "stream_interval": absent(),
        }});
        conditions.push((&["stream"], json!({"anyOf": [streamed, whole]})));
        let format = json!({"properties": {"structured_outputs": absent()}});
        let outputs = json!({"properties": {"response_format": {"anyOf": [
            absent(), {"type": "object", "properties": {"type": {"const": "text"}}},
        ]}}});
        conditions.push((&["response_format"], json!({"anyOf": [format, outputs]})));
    }
    if body == "ChatBody" {
        let told = json!({"required": ["logprobs"], "properties": {"logprobs": {"const": true}}});
        let untold = json!({"properties": {"top_logprobs": {"enum": [0, null]}}});
        conditions.push((&["top_logprobs"], json!({"anyOf": [told, untold]})));
    }
    if body == "RebalanceBody" {
        let limited = json!({"properties": {"policy": {"enum": ["moeyard", null]}}});
        let unlimited = json!({"properties": {"max_transfers": absent()}});
        conditions.push((&["policy", "max_transfers"], json!({"anyOf": [limited, unlimited]})));
    }
    conditions
}
