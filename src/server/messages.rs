//! `messages` of a chat: checked field by field, then in the form that chat templates were written for (transformers'
//! `apply_chat_template`): content as one string, arguments of tool calls as objects.

use serde_json::{Map, Value, json};

use super::error::{ApiError, clip};
use super::fields::{Fields, Neutral, Unsupported, typed};

/// Most messages of one chat.
const MAX_MESSAGES: usize = 16_384;
/// Most parts of one message's content.
const MAX_PARTS: usize = 1024;
/// Most calls of one assistant message.
const MAX_CALLS: usize = 128;

/// What OpenAI's client writes back when an answer becomes a message, without meaning for a template.
const ECHOED: &[Unsupported] = &[
    Unsupported { name: "refusal", neutral: Neutral::Empty },
    Unsupported { name: "audio", neutral: Neutral::Null },
    Unsupported { name: "annotations", neutral: Neutral::Empty },
    Unsupported { name: "function_call", neutral: Neutral::Null },
];

/// A checked conversation.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Messages {
    /// In order, each an object with `role`, `content` and what else its role has.
    pub list: Vec<Value>,
    /// Some message calls a tool.
    pub call_tools: bool,
}

impl Messages {
    /// Takes `messages` off a request.
    pub fn take(fields: &mut Fields<'_>) -> Result<Messages, ApiError> {
        let expected = "a list of messages";
        let Some(list) = fields.list("messages", expected, MAX_MESSAGES)? else {
            return Err(ApiError::bad_param("messages", format!("`messages` is required: {expected}.")));
        };
        if list.is_empty() {
            return Err(ApiError::bad_param("messages", "`messages` must hold at least one message, got 0."));
        }
        let mut messages = Messages::default();
        for (at, raw) in list.iter().enumerate() {
            let fields = Fields::nested(&format!("messages[{at}]"), raw.get())?;
            messages.list.push(message(fields, &mut messages.call_tools)?);
        }
        Ok(messages)
    }

    /// The content of the last message, when it has one.
    pub fn final_content(&self) -> Option<&str> {
        self.list.last()?.get("content")?.as_str().filter(|content| !content.is_empty())
    }
}

fn message(mut fields: Fields<'_>, call_tools: &mut bool) -> Result<Value, ApiError> {
    const ROLES: &str = "system, developer, user, assistant or tool";
    let role: String = required(&mut fields, "role", ROLES)?;
    let mut message = Map::new();
    message.insert("role".into(), json!(role));
    let content = content(&mut fields)?;
    match role.as_str() {
        "system" | "developer" | "user" => {
            let Some(content) = content else {
                return Err(missing(&fields, "content", "a string or text parts"));
            };
            message.insert("content".into(), json!(content));
        }
        "assistant" => {
            let calls = tool_calls(&mut fields)?;
            if content.is_none() && calls.is_none() {
                return Err(missing(
                    &fields,
                    "content",
                    "a string or text parts, unless there are tool_calls",
                ));
            }
            message.insert("content".into(), json!(content));
            if let Some(reasoning) = reasoning(&mut fields)? {
                // Templates know it under either name.
                message.insert("reasoning_content".into(), json!(reasoning));
                message.insert("thinking".into(), json!(reasoning));
            }
            if let Some(calls) = calls {
                *call_tools = true;
                message.insert("tool_calls".into(), json!(calls));
            }
        }
        "tool" => {
            let Some(content) = content else {
                return Err(missing(&fields, "content", "a string or text parts"));
            };
            message.insert("content".into(), json!(content));
            let id: String = required(&mut fields, "tool_call_id", "the id of a tool call")?;
            message.insert("tool_call_id".into(), json!(id));
        }
        other => return Err(fields.refused("role", ROLES, format_args!("{:?}", clip(other)))),
    }
    if let Some(name) = fields.take::<String>("name", "a string")? {
        message.insert("name".into(), json!(name));
    }
    fields.finish(ECHOED)?;
    Ok(Value::Object(message))
}

/// A string, or the texts of a list of parts joined by line breaks; `None` when absent.
fn content(fields: &mut Fields<'_>) -> Result<Option<String>, ApiError> {
    let path = fields.path("content");
    let expected = "a string or a list of text parts";
    let Some(raw) = fields.raw("content") else { return Ok(None) };
    if !raw.starts_with('[') {
        return typed(&path, raw, expected).map(Some);
    }
    let parts: Vec<&serde_json::value::RawValue> = typed(&path, raw, expected)?;
    if !(1..=MAX_PARTS).contains(&parts.len()) {
        let message = format!("`{path}` must have 1 to {MAX_PARTS} parts, got {}.", parts.len());
        return Err(ApiError::bad_param(path, message));
    }
    let texts = parts.iter().enumerate().map(|(at, raw)| {
        let mut part = Fields::nested(&format!("{path}[{at}]"), raw.get())?;
        let kind: String = required(&mut part, "type", "text")?;
        if kind != "text" {
            return Err(part.refused(
                "type",
                "text: this model takes no other parts",
                format_args!("{:?}", clip(&kind)),
            ));
        }
        let text: String = required(&mut part, "text", "a string")?;
        part.finish(&[])?;
        Ok(text)
    });
    Ok(Some(texts.collect::<Result<Vec<_>, _>>()?.join("\n")))
}

/// `reasoning_content`, or `reasoning` as newer clients call it.
fn reasoning(fields: &mut Fields<'_>) -> Result<Option<String>, ApiError> {
    let (old, new) = (fields.take("reasoning_content", "a string")?, fields.take("reasoning", "a string")?);
    Ok(new.or(old))
}

/// Calls of an assistant message, with their arguments parsed; `None` when absent or empty.
fn tool_calls(fields: &mut Fields<'_>) -> Result<Option<Vec<Value>>, ApiError> {
    let path = fields.path("tool_calls");
    let Some(list) = fields.list("tool_calls", "a list of tool calls", MAX_CALLS)? else { return Ok(None) };
    let calls = list.iter().enumerate().map(|(at, raw)| tool_call(&format!("{path}[{at}]"), raw.get()));
    let calls = calls.collect::<Result<Vec<_>, ApiError>>()?;
    Ok((!calls.is_empty()).then_some(calls))
}

fn tool_call(path: &str, raw: &str) -> Result<Value, ApiError> {
    let mut call = Fields::nested(path, raw)?;
    let id: Option<String> = call.take("id", "a string")?;
    if let Some(kind) = call.take::<String>("type", "function")?
        && kind != "function"
    {
        return Err(call.refused("type", "function", format_args!("{:?}", clip(&kind))));
    }
    // Streams number their calls, and clients that put a message together keep the numbers.
    call.integer("index", 0, i64::MAX)?;
    let Some(mut function) = call.object("function")? else {
        return Err(missing(&call, "function", "an object with name and arguments"));
    };
    let name: String = required(&mut function, "name", "a string")?;
    let written: String =
        function.take("arguments", "a string that holds a JSON object")?.unwrap_or_default();
    let arguments: Map<String, Value> = match written.trim() {
        "" => Map::new(),
        text => typed(&function.path("arguments"), text, "a string that holds a JSON object")?,
    };
    function.finish(&[])?;
    call.finish(&[])?;
    let function = json!({"name": name, "arguments": arguments});
    Ok(match id {
        Some(id) => json!({"id": id, "type": "function", "function": function}),
        None => json!({"type": "function", "function": function}),
    })
}

fn required<T: serde::de::DeserializeOwned>(
    fields: &mut Fields<'_>,
    name: &str,
    expected: &str,
) -> Result<T, ApiError> {
    fields.take(name, expected)?.ok_or_else(|| missing(fields, name, expected))
}

fn missing(fields: &Fields<'_>, name: &str, expected: &str) -> ApiError {
    let path = fields.path(name);
    let message = format!("`{path}` is required: {expected}.");
    ApiError::bad_param(path, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(messages: Value) -> Result<Messages, ApiError> {
        let body = json!({ "messages": messages }).to_string();
        Messages::take(&mut Fields::parse(body.as_bytes()).unwrap())
    }

    #[test]
    fn messages_take_the_form_that_templates_know() {
        let messages = take(json!([
            {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "user", "content": "hi", "name": "ann"},
            {"role": "assistant", "content": null, "refusal": null, "annotations": [], "reasoning_content": "hm",
             "tool_calls": [{"id": "c1", "type": "function", "index": 0,
                             "function": {"name": "f", "arguments": "{\"z\": 1, \"a\": [2]}"}}]},
            {"role": "tool", "tool_call_id": "c1", "content": "42"},
            {"role": "assistant", "content": "done", "tool_calls": []},
        ]))
        .unwrap();
        assert!(messages.call_tools);
        assert_eq!(messages.final_content(), Some("done"));
        assert_eq!(
            json!(messages.list),
            json!([
                {"role": "developer", "content": "a\nb"},
                {"role": "user", "content": "hi", "name": "ann"},
                {"role": "assistant", "content": null, "reasoning_content": "hm", "thinking": "hm", "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"z": 1, "a": [2]}}}]},
                {"role": "tool", "content": "42", "tool_call_id": "c1"},
                {"role": "assistant", "content": "done"},
            ])
        );
    }

    #[test]
    fn a_refusal_names_the_message_and_its_field() {
        let call = |function: Value| json!([{"role": "assistant", "tool_calls": [{"id": "x", "function": function}]}]);
        for (messages, param) in [
            (json!([]), "messages"),
            (json!("hi"), "messages"),
            (json!(["hi"]), "messages[0]"),
            (json!([{"content": "x"}]), "messages[0].role"),
            (json!([{"role": "user"}]), "messages[0].content"),
            (json!([{"role": "user", "content": 3}]), "messages[0].content"),
            (json!([{"role": "user", "content": []}]), "messages[0].content"),
            (
                json!([{"role": "user", "content": "x"}, {"role": "robot", "content": "x"}]),
                "messages[1].role",
            ),
            (json!([{"role": "user", "content": "x", "surprise": 1}]), "messages[0].surprise"),
            (
                json!([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
                "messages[0].content[0].type",
            ),
            (json!([{"role": "user", "content": [{"type": "text"}]}]), "messages[0].content[0].text"),
            (
                json!([{"role": "user", "content": [{"type": "text", "text": "a", "b": 1}]}]),
                "messages[0].content[0].b",
            ),
            (json!([{"role": "assistant", "content": null}]), "messages[0].content"),
            (json!([{"role": "assistant", "content": "x", "audio": {"id": "a"}}]), "messages[0].audio"),
            (json!([{"role": "user", "content": "x", "tool_calls": []}]), "messages[0].tool_calls"),
            (json!([{"role": "tool", "content": "x"}]), "messages[0].tool_call_id"),
            (call(json!({"arguments": "{}"})), "messages[0].tool_calls[0].function.name"),
            (call(json!({"name": "f", "arguments": "{"})), "messages[0].tool_calls[0].function.arguments"),
            (call(json!({"name": "f", "arguments": "[1]"})), "messages[0].tool_calls[0].function.arguments"),
            (
                call(json!({"name": "f", "arguments": {"a": 1}})),
                "messages[0].tool_calls[0].function.arguments",
            ),
        ] {
            let shown = messages.to_string();
            let error = take(messages).expect_err(&shown);
            assert_eq!(error.param.as_deref(), Some(param), "{shown}: {}", error.message);
            assert!(error.message.contains(param), "{shown}: {}", error.message);
        }
    }
}
