//! `/openapi.json` is true: its routes exist, its fields are taken, and nothing else is.

use serde_json::{Value, json};

use crate::harness::{Config, Server};

fn document(server: &Server) -> Value {
    let response = server.client().get("/openapi.json");
    assert_eq!(response.status, 200, "{}", response.body);
    response.json()
}

/// Follows references and joins the parts of a schema; the names of all its properties.
fn properties(document: &Value, schema: &Value) -> Vec<String> {
    let mut names = Vec::new();
    if let Some(reference) = schema["$ref"].as_str() {
        let target = document.pointer(&reference[1..]).unwrap_or_else(|| panic!("{reference} leads nowhere"));
        names.extend(properties(document, target));
    }
    for kind in ["allOf", "oneOf", "anyOf"] {
        for part in schema[kind].as_array().into_iter().flatten() {
            names.extend(properties(document, part));
        }
    }
    for kind in ["properties", "x-dependent-properties"] {
        names.extend(schema[kind].as_object().into_iter().flat_map(|map| map.keys().cloned()));
    }
    names
}

#[test]
fn every_route_is_there_and_takes_the_methods_it_names() {
    let server = Server::start();
    let document = document(&server);
    let paths = document["paths"].as_object().unwrap();
    assert!(paths.len() >= 15, "{} routes", paths.len());
    for (path, methods) in paths {
        for method in ["get", "post", "put", "delete", "patch"] {
            let status = server
                .client()
                .request(&method.to_uppercase(), &path.replace("{id}", "demo"), &[], b"")
                .status;
            match methods.get(method) {
                Some(operation) => {
                    assert!(
                        operation["responses"].get(status.to_string()).is_some(),
                        "{method} {path}: {status}"
                    );
                    assert!(
                        ![404, 405].contains(&status) || path.starts_with("/v1/experts"),
                        "{method} {path}: {status}"
                    );
                }
                None => assert_eq!(status, 405, "{method} {path}"),
            }
        }
    }
}

#[test]
fn every_field_is_taken_and_no_other() {
    let server = Server::start();
    let document = document(&server);
    for (path, minimal) in [
        ("/v1/completions", json!({"prompt": "x", "max_tokens": 1})),
        ("/v1/chat/completions", json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 1})),
        ("/tokenize", json!({"messages": [{"role": "user", "content": "x"}]})),
        ("/detokenize", json!({"tokens": [5]})),
    ] {
        let schema = &document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"];
        let names = properties(&document, schema);
        assert!(names.len() >= 2, "{path}: {names:?}");
        for name in names {
            if minimal.get(&name).is_some() || (path == "/tokenize" && name == "prompt") {
                continue;
            }
            // Null is as good as absent, for a field that is known.
            let mut body = minimal.clone();
            body[&name] = Value::Null;
            let response = server.client().post(path, &body);
            assert_eq!(response.status, 200, "{path} {name}: {}", response.body);
        }
        let mut body = minimal;
        body["not_a_field"] = Value::Null;
        assert_eq!(server.client().post(path, &body).status, 400, "{path}");
    }
}

#[test]
fn limits_and_keys_are_those_of_the_server() {
    let mut config = Config::default();
    config.options.api_keys = moeyard::server::ApiKeys::new(["k"]);
    let server = Server::with(config);
    assert_eq!(server.client().get("/openapi.json").status, 401);
    let response = server.client().request("GET", "/openapi.json", &[("Authorization", "Bearer k")], b"");
    let document = response.json();
    assert_eq!(document["components"]["schemas"]["TokenId"]["maximum"], 4095);
    assert_eq!(document["security"], json!([{"key": []}]));
    assert_eq!(document["paths"]["/health"]["get"]["security"], json!([]));
    assert!(!response.body.contains("null,\"null"), "{}", response.body);
}

/// What depends on the template, on other fields and on the server's options is described as it is here.
#[test]
fn dependent_fields_are_described() {
    let server = Server::start();
    let schemas = document(&server)["components"]["schemas"].clone();
    for (body, beside, own) in [
        ("CompletionBody", "max_tokens", "stream_options"),
        ("ChatBody", "continue_final_message", "top_logprobs"),
        ("TokenizeChat", "continue_final_message", "messages"),
    ] {
        assert!(schemas[body]["x-dependent-properties"][beside].is_object(), "{body}: {beside}");
        assert!(schemas[body]["properties"].get(beside).is_none(), "{body}: {beside}");
        assert!(schemas[body]["properties"][own].is_object(), "{body}: {own}");
    }
    assert_eq!(schemas["ChatBody"]["properties"]["priority"]["enum"], json!([0, null]));
    assert_eq!(schemas["Content"]["type"], "string");
    assert_eq!(schemas["Content"]["x-dependent-properties"]["content"]["$ref"], "#/components/schemas/Parts");
    assert_eq!((&schemas["Parts"]["minItems"], &schemas["Parts"]["maxItems"]), (&json!(1), &json!(1024)));
    let assistant = |schemas: &Value| {
        let roles = schemas["Message"]["oneOf"].as_array().unwrap().clone();
        roles.into_iter().find(|role| role["properties"]["role"]["enum"] == json!(["assistant"])).unwrap()
    };
    assert!(assistant(&schemas)["properties"].get("tool_calls").is_none());
    let template = Some(crate::chat::TOOL_TEMPLATE);
    let server = Server::with(Config { chat_template: template, ..Config::default() });
    let schemas = document(&server)["components"]["schemas"].clone();
    assert!(assistant(&schemas)["properties"]["tool_calls"].is_object());
    assert!(!assistant(&schemas)["required"].as_array().unwrap().contains(&json!("content")));
    assert!(schemas["ChatBody"]["properties"]["tool_choice"].is_object());
}
