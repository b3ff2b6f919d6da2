//! `/openapi.json`: the routes, their bodies and answers, from the types that go over the wire and the limits of the served
//! model.

mod dependent;
mod requests;

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use router_sim::placement::Placement;
use serde_json::{Map, Value, json};
use utoipa::OpenApi;

use super::state::AppState;
use super::{chat_types, error, experts, types};
use crate::engine::SchedulingPolicy;

/// Everything that has a schema.
#[derive(OpenApi)]
#[openapi(components(schemas(
    requests::CompletionBody,
    requests::ChatBody,
    requests::TokenizeBody,
    requests::DetokenizeBody,
    requests::RebalanceBody,
    requests::PlacementBody,
    types::Completion,
    chat_types::ChatCompletion,
    types::ModelList,
    types::ModelCard,
    types::Tokenized,
    types::Detokenized,
    types::Version,
    types::ServerLoad,
    error::ErrorBody,
)))]
struct Schemas;

/// The document.
pub async fn document(State(state): State<Arc<AppState>>) -> Json<Value> {
    Json(describe(&state))
}

fn describe(state: &AppState) -> Value {
    let mut document = serde_json::to_value(Schemas::openapi()).expect("a description is JSON");
    document["info"] = json!({
        "title": "moeyard",
        "version": env!("CARGO_PKG_VERSION"),
        "description": "An OpenAI-compatible endpoint of a Mixture-of-Experts engine; docs/serving.md says more.",
        "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
    });
    document["paths"] = paths();
    let schemas = &mut document["components"]["schemas"];
    fill_in(schemas, state);
    if let Some(placement) = state.engine.placement() {
        limit_to(&mut schemas["PlacementBody"]["properties"], &placement);
    }
    if !state.options.api_keys.is_empty() {
        document["components"]["securitySchemes"] = json!({"key": {"type": "http", "scheme": "bearer"}});
        document["security"] = json!([{"key": []}]);
        for open in ["/health", "/livez", "/readyz"] {
            document["paths"][open]["get"]["security"] = json!([]);
        }
    }
    document
}

/// A placement file fits one engine: its ranks, slots, layers and experts.
fn limit_to(file: &mut Value, placement: &Placement) {
    let exactly =
        |n: usize, items: Value| json!({"type": "array", "minItems": n, "maxItems": n, "items": items});
    let expert = json!({"type": "integer", "minimum": -1, "maximum": placement.experts() - 1});
    let map = exactly(placement.layers(), exactly(placement.slots(), expert));
    for (name, schema) in [
        ("version", json!({"const": 1})),
        ("ranks", json!({"const": placement.ranks()})),
        ("slots_per_rank", json!({"const": placement.slots_per_rank()})),
        ("layer_ids", json!({"const": placement.layer_ids()})),
        ("physical_to_logical_map", map),
    ] {
        for (key, value) in schema.as_object().into_iter().flatten() {
            if key == "const" {
                file[name].as_object_mut().expect("a schema").shift_remove("type");
            }
            file[name][key] = value.clone();
        }
    }
}

/// Limits that belong to the served model.
fn fill_in(schemas: &mut Value, state: &AppState) {
    schemas["TokenId"]["maximum"] = json!(state.engine.options().vocab_size - 1);
    let names =
        json!(state.served_names.iter().map(|name| json!(name)).chain([Value::Null]).collect::<Vec<_>>());
    for body in [
        "CompletionBody",
        "ChatBody",
        "TokenizeChat",
        "Message",
        "Part",
        "Tool",
        "NamedTool",
        "ResponseFormat",
    ] {
        let flat = flattened(&schemas[body], schemas);
        schemas[body] = flat;
    }
    let template = state.tokenizer.chat_template();
    let unread = ["tools", "documents", "reasoning_effort"]
        .into_iter()
        .filter(|name| !template.is_some_and(|template| template.reads(name)));
    let mut refused: Vec<&str> = unread.collect();
    if refused.contains(&"tools") {
        refused.extend(["tool_choice", "parallel_tool_calls", "tool_calls"]);
    }
    if !state.options.trust_chat_template {
        refused.push("chat_template");
    }
    if !refused.contains(&"tool_calls") {
        content_is_optional(&mut schemas["Message"]);
    }
    let by_priority = state.engine.options().scheduling_policy == SchedulingPolicy::Priority;
    each_object(schemas, &mut |object| {
        refused.iter().for_each(|name| drop(object.shift_remove(*name)));
        if let Some(truncate) = object.get_mut("truncate_prompt_tokens") {
            *truncate = json!({"oneOf": [{"const": -1}, {"type": "integer", "minimum": 1, "maximum": u32::MAX}, {"type": "null"}]});
        }
        if let Some(stops) = object.get_mut("stop_token_ids").filter(|stops| stops.get("items").is_some()) {
            stops["items"]["maximum"] = json!(u32::MAX);
        }
        if let Some(bias) = object.get_mut("logit_bias") {
            // Ids of fewer digits than the vocabulary's size: a pattern cannot compare.
            let digits = state.engine.options().vocab_size.ilog10().saturating_sub(1);
            bias["propertyNames"] = json!({"pattern": format!("^(0|[1-9][0-9]{{0,{digits}}})$")});
            bias["additionalProperties"] = json!({"type": "number", "minimum": -100, "maximum": 100});
        }
        if let Some(priority) = object.get_mut("priority").filter(|_| !by_priority) {
            *priority = json!({"description": "As this server runs, there is only one.", "enum": [0, null]});
        }
        if let Some(words) = object.get_mut("bad_words") {
            words["items"]["pattern"] = json!("\\S");
        }
        // The width of a type is no limit that this server has.
        for field in object.values_mut().filter_map(Value::as_object_mut) {
            field.shift_remove("format");
            if let Some(Value::Object(items)) = field.get_mut("items") {
                items.shift_remove("format");
            }
        }
        let is_request = object.contains_key("prompt")
            || object.contains_key("messages")
            || object.contains_key("n")
            || object.contains_key("tokens");
        if let Some(model) = object.get_mut("model").filter(|_| is_request) {
            model["enum"] = names.clone();
        }
    });
    dependent::describe_parts(&mut schemas["Content"]);
    schemas["StructuredOutputs"] = structured_outputs(&schemas["StructuredOutputs"]);
    for body in ["CompletionBody", "ChatBody", "TokenizeChat", "RebalanceBody"] {
        dependent::describe(body, &mut schemas[body]);
    }
}

/// A message that calls tools need say nothing.
fn content_is_optional(message: &mut Value) {
    let alternatives = message["oneOf"].as_array_mut().expect("a message has a role");
    for alternative in alternatives.iter_mut().filter(|role| role["properties"].get("tool_calls").is_some()) {
        alternative["required"].as_array_mut().expect("a role is required").retain(|name| name != "content");
        let content = alternative["properties"]["content"].take();
        alternative["properties"]["content"] = json!({"anyOf": [content, {"type": "null"}]});
    }
}

/// Exactly one of its fields, each not null. A grammar is left out: no schema says which texts are one.
fn structured_outputs(flat: &Value) -> Value {
    let choice = flat["properties"]["choice"]["items"].clone();
    let alternatives = [
        ("json", json!({"type": "object"})),
        ("json_object", json!({"const": true})),
        ("regex", json!({"type": "string", "format": "regex"})),
        ("choice", json!({"type": "array", "minItems": 1, "maxItems": 1024, "items": choice})),
    ];
    let object = |(name, field): &(&str, Value)| {
        json!({
            "type": "object", "required": [name], "properties": {*name: field}, "additionalProperties": false,
        })
    };
    json!({
        "description": "One of json, json_object, regex, choice and (a text in llguidance's variant of Lark) grammar.",
        "oneOf": alternatives.iter().map(object).collect::<Vec<_>>(),
    })
}

/// A schema with what it is composed of as one object that takes no other keys; alternatives each for themselves.
fn flattened(schema: &Value, all: &Value) -> Value {
    let mut schema = schema.clone();
    while let Some(name) = schema["$ref"].as_str().and_then(|path| path.rsplit('/').next()) {
        schema = all[name].clone();
    }
    if let Some(Value::Array(alternatives)) = schema.get_mut("oneOf") {
        alternatives.iter_mut().for_each(|part| *part = flattened(part, all));
        return schema;
    }
    if let Some(Value::Array(parts)) = schema.as_object_mut().and_then(|object| object.shift_remove("allOf"))
    {
        for part in parts.iter().map(|part| flattened(part, all)) {
            let properties = part["properties"].as_object().cloned().unwrap_or_default();
            let required = part["required"].as_array().cloned().unwrap_or_default();
            let object = schema.as_object_mut().expect("a schema with parts is an object");
            let own = object.entry("properties").or_insert_with(|| json!({}));
            own.as_object_mut().expect("properties are an object").extend(properties);
            let own = object.entry("required").or_insert_with(|| json!([]));
            own.as_array_mut().expect("required is a list").extend(required);
        }
        schema["type"] = json!("object");
    }
    if schema.get("properties").is_some() {
        schema["additionalProperties"] = json!(false);
    }
    schema
}

/// Calls `change` with the properties of every object in a schema.
fn each_object(schema: &mut Value, change: &mut impl FnMut(&mut Map<String, Value>)) {
    match schema {
        Value::Object(map) => {
            if let Some(Value::Object(properties)) = map.get_mut("properties") {
                change(properties);
            }
            map.values_mut().for_each(|value| each_object(value, change));
        }
        Value::Array(list) => list.iter_mut().for_each(|value| each_object(value, change)),
        _ => {}
    }
}

fn paths() -> Value {
    let json_answer = |name: &str| json!({"application/json": {"schema": reference(name)}});
    let stream = |name: &str| {
        let mut content = json_answer(name);
        // Each event's data is a chunk as JSON, the last one's is [DONE]; readers differ on what a schema of
        // events describes.
        content["text/event-stream"] = json!({"schema": {}});
        content
    };
    let text = |mime: &str| json!({ mime: {"schema": {"type": "string"}} });
    let nothing = || json!({});
    let object = || json!({"application/json": {"schema": {"type": "object"}}});
    json!({
        "/v1/completions": {"post": operation("Continue prompts", Some("CompletionBody"), stream("Completion"), &[])},
        "/v1/chat/completions": {"post": operation("Answer a conversation", Some("ChatBody"), stream("ChatCompletion"), &[])},
        "/v1/models": {"get": operation("Served names", None, json_answer("ModelList"), &[])},
        "/v1/models/{id}": {"get": operation("One served name", None, json_answer("ModelCard"), &[
            json!({"name": "id", "in": "path", "required": true, "schema": {"type": "string", "minLength": 1}}),
        ])},
        "/tokenize": {"post": operation("Tokens of a prompt or a chat", Some("TokenizeBody"), json_answer("Tokenized"), &[])},
        "/detokenize": {"post": operation("Text of tokens", Some("DetokenizeBody"), json_answer("Detokenized"), &[])},
        "/v1/experts": {"get": operation("Expert load over a window", None, json!({
            "application/json": {"schema": {"type": "object"}}, "text/csv": {"schema": {"type": "string"}},
        }), &[
            json!({"name": "window", "in": "query", "schema": {"type": "string", "enum": ["10s", "30s", "60s", "5m"]}}),
            json!({"name": "format", "in": "query", "schema": {"type": "string", "enum": ["json", "csv"]}}),
        ])},
        "/v1/experts/balance": {"get": operation("Balance of the ranks, second by second", None, object(), &[
            json!({"name": "since", "in": "query", "schema": {"type": "integer", "minimum": 0, "maximum": experts::MAX_SINCE}}),
        ])},
        "/v1/experts/rebalance": {
            "get": operation("What the rebalancer did, does, and why", None, object(), &[]),
            "post": optional_body(moving(operation("Move experts to where the recent load would have them", Some("RebalanceBody"), object(), &[]))),
        },
        "/experts": {"get": operation("Expert load to look at", None, text("text/html"), &[])},
        "/v1/experts/placement": {
            "get": operation("Where experts live", None, object(), &[]),
            "put": moving(operation("Move experts to where a placement file says", Some("PlacementBody"), object(), &[
                json!({"name": "dry_run", "in": "query", "schema": {"type": "boolean"}}),
            ])),
        },
        "/health": {"get": operation("Whether the engine runs", None, nothing(), &[])},
        "/livez": {"get": operation("Whether the process answers", None, nothing(), &[])},
        "/readyz": {"get": operation("Whether requests are taken", None, nothing(), &[])},
        "/ping": {
            "get": operation("Whether the engine runs", None, nothing(), &[]),
            "post": operation("Whether the engine runs", None, nothing(), &[]),
        },
        "/load": {"get": operation("Sequences that run or wait", None, json_answer("ServerLoad"), &[])},
        "/version": {"get": operation("Of the program", None, json_answer("Version"), &[])},
        "/metrics": {"get": operation("For Prometheus", None, text("text/plain"), &[])},
        "/openapi.json": {"get": operation("This document", None, object(), &[])},
    })
}

fn operation(summary: &str, body: Option<&str>, answer: Value, parameters: &[Value]) -> Value {
    let error = json!({"description": "An error object", "content": {"application/json": {"schema": reference("ErrorBody")}}});
    let mut success = json!({"description": "OK"});
    if answer.as_object().is_some_and(|content| !content.is_empty()) {
        success["content"] = answer;
    }
    let mut responses = json!({"200": success});
    // 304 is for /v1/experts, which knows entity tags; no other route sends one.
    let always = [401, 403, 404, 405, 431, 500, 503];
    let with_body = [400, 408, 413, 415, 429];
    let codes =
        always.iter().chain(if body.is_some() || !parameters.is_empty() { &with_body[..] } else { &[] });
    for code in codes {
        responses[code.to_string()] = error.clone();
    }
    let mut operation = json!({"summary": summary, "responses": responses});
    if !parameters.is_empty() {
        operation["parameters"] = json!(parameters);
    }
    if let Some(name) = body {
        let content = json!({"application/json": {"schema": reference(name)}});
        operation["requestBody"] = json!({"required": true, "content": content});
    }
    operation
}

/// Answers of what moves experts: begun, or not now.
fn moving(mut operation: Value) -> Value {
    operation["responses"]["202"] = operation["responses"]["200"].clone();
    operation["responses"]["202"]["description"] = json!("Experts have begun to move");
    operation["responses"]["409"] = operation["responses"]["400"].clone();
    operation
}

/// Nothing is as good as an empty object.
fn optional_body(mut operation: Value) -> Value {
    operation["requestBody"]["required"] = json!(false);
    operation
}

fn reference(name: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{name}")})
}
