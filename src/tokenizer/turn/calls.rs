//! Formats of tool calls, as data.

use super::Callable;
use crate::tokenizer::chat::ChatTemplate;
use serde_json::{Map, Value, json};

/// How one family of models writes calls.
#[derive(Debug, PartialEq, Eq)]
pub struct CallFormat {
    /// What it is known as.
    pub name: &'static str,
    /// A template for it mentions all of these.
    evidence: &'static [&'static str],
    /// What stands around all calls of a turn; may be empty.
    pub section: (&'static str, &'static str),
    /// What stands around one call. Without an end, a call ends where the next begins or the turn ends.
    pub call: (&'static str, &'static str),
    /// What stands between.
    pub body: Body,
}

/// What stands between the marks of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Body {
    /// `{"name": ..., "arguments": {...}}`.
    Object,
    /// A list of such objects.
    List,
    /// The name between `before` and `between`, then the arguments as JSON, then `after`.
    Named {
        /// Before the name.
        before: &'static str,
        /// Between name and arguments.
        between: &'static str,
        /// After the arguments.
        after: &'static str,
    },
    /// The name, then a line for each argument: its key and its value, each between tags.
    KeyValueTags {
        /// Around a key.
        key: (&'static str, &'static str),
        /// Around a value.
        value: (&'static str, &'static str),
    },
    /// `<function=NAME>`, then `<parameter=KEY>` VALUE `</parameter>` for each argument, then `</function>`.
    NamedTags,
}

/// Specific ones before those they look like.
const FORMATS: &[CallFormat] = &[
    CallFormat {
        name: "glm4",
        evidence: &["<tool_call>", "<arg_key>"],
        section: ("", ""),
        call: ("<tool_call>", "</tool_call>"),
        body: Body::KeyValueTags { key: ("<arg_key>", "</arg_key>"), value: ("<arg_value>", "</arg_value>") },
    },
    CallFormat {
        name: "qwen3_coder",
        evidence: &["<tool_call>", "<function="],
        section: ("", ""),
        call: ("<tool_call>", "</tool_call>"),
        body: Body::NamedTags,
    },
    CallFormat {
        name: "hermes",
        evidence: &["<tool_call>"],
        section: ("", ""),
        call: ("<tool_call>", "</tool_call>"),
        body: Body::Object,
    },
    CallFormat {
        name: "mistral_args",
        evidence: &["[TOOL_CALLS]", "[ARGS]"],
        section: ("", ""),
        call: ("[TOOL_CALLS]", ""),
        body: Body::Named { before: "", between: "[ARGS]", after: "" },
    },
    CallFormat {
        name: "mistral",
        evidence: &["[TOOL_CALLS]"],
        section: ("", ""),
        call: ("[TOOL_CALLS]", ""),
        body: Body::List,
    },
    CallFormat {
        name: "deepseek_v3",
        evidence: &["<｜tool▁call▁begin｜>", "```json"],
        section: ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        call: ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),
        body: Body::Named { before: "function<｜tool▁sep｜>", between: "\n```json\n", after: "\n```" },
    },
    CallFormat {
        name: "deepseek_v31",
        evidence: &["<｜tool▁call▁begin｜>"],
        section: ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        call: ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),
        body: Body::Named { before: "", between: "<｜tool▁sep｜>", after: "" },
    },
    CallFormat {
        name: "kimi_k2",
        evidence: &["<|tool_call_argument_begin|>"],
        section: ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        call: ("<|tool_call_begin|>", "<|tool_call_end|>"),
        body: Body::Named { before: "functions.", between: "<|tool_call_argument_begin|>", after: "" },
    },
    CallFormat {
        name: "granite",
        evidence: &["<|tool_call|>"],
        section: ("", ""),
        call: ("<|tool_call|>", ""),
        body: Body::List,
    },
];

impl CallFormat {
    /// The format that a template was written for.
    pub fn of(template: &ChatTemplate) -> Option<&'static CallFormat> {
        FORMATS.iter().find(|format| format.evidence.iter().all(|text| template.mentions(text)))
    }

    /// The format with this name.
    #[cfg(test)]
    pub fn named(name: &str) -> Option<&'static CallFormat> {
        FORMATS.iter().find(|format| format.name == name)
    }

    /// All marks that tell calls from text and from one another.
    pub fn marks(&self) -> impl Iterator<Item = &'static str> + use<> {
        let between = match self.body {
            Body::Named { between, .. } => between,
            _ => "",
        };
        let marks = [self.section.0, self.section.1, self.call.0, self.call.1, between];
        marks.into_iter().filter(|mark| !mark.is_empty())
    }

    /// The calls in what stood between the marks; `None` when it is not what it should be.
    pub fn read(&self, body: &str, tools: &[Callable]) -> Option<Vec<(String, String)>> {
        let body = body.trim();
        match self.body {
            Body::Object | Body::List => json_calls(body),
            Body::Named { before, between, after } => {
                // Models that write lists under the older format of the same family are understood too.
                if before.is_empty() && body.starts_with('[') {
                    return json_calls(body);
                }
                let (name, arguments) = body.split_once(between.trim())?;
                let name = CallFormat::bare_name(name, before);
                let arguments = arguments.trim();
                let arguments = arguments.strip_suffix(after.trim()).unwrap_or(arguments).trim();
                let arguments = if arguments.is_empty() { "{}" } else { arguments };
                serde_json::from_str::<Map<String, Value>>(arguments).ok()?;
                Some(vec![(name.to_owned(), arguments.to_owned())])
            }
            Body::KeyValueTags { key, .. } => {
                let (name, rest) = body.split_at(body.find(key.0).unwrap_or(body.len()));
                (!name.trim().is_empty()).then_some(())?;
                self.read_tags(name.trim(), rest, tools)
            }
            Body::NamedTags => {
                let (name, rest) = body.strip_prefix("<function=")?.split_once('>')?;
                self.read_tags(name.trim(), rest, tools)
            }
        }
    }

    fn read_tags(&self, name: &str, mut rest: &str, tools: &[Callable]) -> Option<Vec<(String, String)>> {
        let mut arguments = Map::new();
        while let Some(at) = rest.find(self.body.argument_mark()) {
            let (key, text, length) = self.body.argument(&rest[at..])?;
            arguments.insert(key.to_owned(), typed(text, tools, name, key));
            rest = &rest[at + length..];
        }
        Some(vec![(name.to_owned(), Value::Object(arguments).to_string())])
    }

    /// A name without what some models write around it: "functions.name:0", whose number counts calls.
    pub fn bare_name<'t>(written: &'t str, before: &str) -> &'t str {
        let name = written.trim();
        let name = name.strip_prefix(before).unwrap_or(name);
        name.rsplit_once(':').filter(|(_, n)| n.parse::<u32>().is_ok()).map_or(name, |(name, _)| name)
    }
}

impl Body {
    /// What begins an argument; empty where arguments are JSON.
    pub fn argument_mark(&self) -> &'static str {
        match self {
            Body::KeyValueTags { key, .. } => key.0,
            Body::NamedTags => "<parameter=",
            Body::Object | Body::List | Body::Named { .. } => "",
        }
    }

    /// The argument at the start of `text`, which begins with its mark: key, value as text, and bytes of all of it.
    pub fn argument<'t>(&self, text: &'t str) -> Option<(&'t str, &'t str, usize)> {
        let (key, value, rest) = match self {
            Body::KeyValueTags { key, value } => {
                let (key, after) = between_tags(text, *key)?;
                let (value, rest) = between_tags(after, *value)?;
                (key, value, rest)
            }
            _ => {
                let (key, after) = text.strip_prefix(self.argument_mark())?.split_once('>')?;
                let (value, rest) = after.split_once("</parameter>")?;
                let value = value.strip_prefix('\n').unwrap_or(value);
                (key, value.strip_suffix('\n').unwrap_or(value), rest)
            }
        };
        Some((key.trim(), value, text.len() - rest.len()))
    }
}

/// Calls written as JSON: one object or a list of them.
fn json_calls(body: &str) -> Option<Vec<(String, String)>> {
    let list = match serde_json::from_str(body).ok()? {
        Value::Array(list) => list,
        object => vec![object],
    };
    list.iter().map(json_call).collect()
}

fn json_call(call: &Value) -> Option<(String, String)> {
    let name = call.get("name")?.as_str()?;
    let arguments = match call.get("arguments").or_else(|| call.get("parameters")) {
        None | Some(Value::Null) => "{}".to_owned(),
        // Twice encoded, as some models do it.
        Some(Value::String(text)) => {
            serde_json::from_str::<Map<String, Value>>(text).ok()?;
            text.clone()
        }
        Some(Value::Object(arguments)) => json!(arguments).to_string(),
        Some(_) => return None,
    };
    Some((name.to_owned(), arguments))
}

/// What stands between the next two tags, and what follows them.
fn between_tags<'a>(text: &'a str, tags: (&str, &str)) -> Option<(&'a str, &'a str)> {
    text.split_once(tags.0)?.1.split_once(tags.1)
}

/// A value written as text: a string where the schema says so, else JSON where it is JSON.
pub fn typed(text: &str, tools: &[Callable], name: &str, key: &str) -> Value {
    let schema = tools.iter().find(|tool| tool.name == name).map(|tool| &tool.parameters["properties"][key]);
    let is_text = schema.is_some_and(is_text);
    let json = if is_text { None } else { serde_json::from_str(text.trim()).ok() };
    json.unwrap_or_else(|| Value::String(text.to_owned()))
}

/// Whether a schema admits text and nothing else.
pub fn is_text(schema: &Value) -> bool {
    schema["type"] == "string"
        || schema["enum"].as_array().is_some_and(|list| list.iter().all(Value::is_string))
}
