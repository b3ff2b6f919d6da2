//! Grammars for turns that must call a tool.

use super::Callable;
use super::calls::{Body, CallFormat, is_text};
use crate::tokenizer::Tokenizer;
use crate::tokenizer::grammar::{GrammarSource, json_rule, lark_string};
use serde_json::{Value, json};

/// Most calls of one turn.
const MAX_CALLS: usize = 32;

/// Calls in a format.
pub fn marked(
    format: &CallFormat,
    tokenizer: &Tokenizer,
    tools: &[Callable],
    parallel: bool,
) -> Result<String, String> {
    let (calls, rules) = calls(format, tokenizer, tools, parallel)?;
    Ok(format!("start: {calls}\n{rules}"))
}

/// Calls in a format, or a text that follows `answer`.
pub fn answer_or_marked(
    answer: &GrammarSource,
    format: &CallFormat,
    tokenizer: &Tokenizer,
    tools: &[Callable],
    parallel: bool,
) -> Result<String, String> {
    let Some(answer) = answer.rule()? else { return Err("a grammar cannot be combined with tools".into()) };
    let (calls, rules) = calls(format, tokenizer, tools, parallel)?;
    Ok(format!("start: answer | calls\nanswer: {answer}\ncalls: {calls}\n{rules}"))
}

/// An expression for all calls of a turn, and the rules that it refers to.
fn calls(
    format: &CallFormat,
    tokenizer: &Tokenizer,
    tools: &[Callable],
    parallel: bool,
) -> Result<(String, String), String> {
    let most = if parallel { MAX_CALLS } else { 1 };
    let mark = |text: &str| mark(tokenizer, text);
    let call = one_of(tools, |tool| {
        let body = body(format.body, tool, &mark)?;
        match format.body {
            Body::List => Ok(body),
            _ => Ok(format!("{} {body} {}", mark(format.call.0), mark(format.call.1))),
        }
    })?;
    if format.body == Body::List {
        let more = if parallel { format!(" (\", \" call){{0,{}}}", most - 1) } else { String::new() };
        return Ok((format!("{} \"[\" call{more} \"]\"", mark(format.call.0)), call));
    }
    let between = if format.section.0.is_empty() && !format.call.1.is_empty() { "\"\\n\" " } else { "" };
    let more = if parallel { format!(" ({between}call){{0,{}}}", most - 1) } else { String::new() };
    let (open, close) = (mark(format.section.0), mark(format.section.1));
    Ok((format!("{open} call{more} {close}"), call))
}

/// A call on the channel commentary, thoughts before it allowed.
pub fn harmony(tokenizer: &Tokenizer, tools: &[Callable]) -> Result<String, String> {
    let mark = |text: &str| mark(tokenizer, text);
    let (channel, message) = (mark("<|channel|>"), mark("<|message|>"));
    let thoughts = format!(
        "thoughts: {channel} \"analysis\" {message} /(.|\\n)*/ {} {} \"assistant\"\n",
        mark("<|end|>"),
        mark("<|start|>")
    );
    let call = one_of(tools, |tool| {
        let header = lark_string(&format!("commentary to=functions.{} ", tool.name));
        Ok(format!(
            "{channel} {header} {} \"json\" {message} {}",
            mark("<|constrain|>"),
            json_rule(&tool.parameters)?
        ))
    })?;
    Ok(format!("start: thoughts? call\n{thoughts}{call}"))
}

/// `call`, as one rule per tool.
fn one_of(tools: &[Callable], rule: impl Fn(&Callable) -> Result<String, String>) -> Result<String, String> {
    let names: Vec<String> = (0..tools.len()).map(|at| format!("call_{at}")).collect();
    let mut lark = format!("call: {}\n", names.join(" | "));
    for (name, tool) in names.iter().zip(tools) {
        lark.push_str(&format!("{name}: {}\n", rule(tool)?));
    }
    Ok(lark)
}

fn body(body: Body, tool: &Callable, mark: &impl Fn(&str) -> String) -> Result<String, String> {
    let name = lark_string(&tool.name);
    match body {
        Body::Named { before, between, after } => {
            let number = if before == "functions." { "\":0\" " } else { "" };
            Ok(format!(
                "{} {name} {number}{} {} {}",
                text(before),
                mark(between),
                json_rule(&tool.parameters)?,
                text(after)
            ))
        }
        Body::KeyValueTags { key, value } => {
            let arguments = arguments(tool, |at| {
                format!(
                    "{} {} {} \"\\n\" {} {{}} {} \"\\n\"",
                    mark(key.0),
                    lark_string(at),
                    mark(key.1),
                    mark(value.0),
                    mark(value.1)
                )
            })?;
            Ok(format!("{name} \"\\n\" {arguments}"))
        }
        Body::NamedTags => {
            let arguments = arguments(tool, |at| {
                format!("{} \"\\n\" {{}} \"\\n</parameter>\\n\"", lark_string(&format!("<parameter={at}>")))
            })?;
            Ok(format!(
                "\"\\n\" {} \"\\n\" {arguments} \"</function>\\n\"",
                lark_string(&format!("<function={}>", tool.name))
            ))
        }
        Body::Object => Ok(format!("\"\\n\" {} \"\\n\"", object(tool)?)),
        Body::List => object(tool),
    }
}

/// The arguments of a tool in the order of its schema, optional ones optional; `tags` stands around `{}`, the value.
fn arguments(tool: &Callable, tags: impl Fn(&str) -> String) -> Result<String, String> {
    let Some(properties) = tool.parameters["properties"].as_object() else { return Ok(String::new()) };
    let required = tool.parameters["required"].as_array();
    let mut lark = Vec::new();
    for (key, schema) in properties {
        let value = match (is_text(schema), schema["enum"].as_array()) {
            (true, Some(texts)) => {
                let texts: Vec<String> = texts.iter().filter_map(Value::as_str).map(lark_string).collect();
                format!("({})", texts.join(" | "))
            }
            (true, None) => match schema["maxLength"].as_u64() {
                Some(most) => format!("/[^<]{{0,{most}}}/"),
                None => "/[^<]*/".to_owned(),
            },
            (false, _) => json_rule(schema)?,
        };
        let argument = tags(key).replacen("{}", &value, 1);
        let needed = required.is_some_and(|list| list.iter().any(|name| name == key));
        lark.push(if needed { argument } else { format!("({argument})?") });
    }
    Ok(lark.join(" "))
}

/// A call written as an object. Its arguments are a JSON text of their own, so that references in their schema hold.
fn object(tool: &Callable) -> Result<String, String> {
    let head = lark_string(&format!("{{\"name\": {}, \"arguments\": ", json!(tool.name)));
    Ok(format!("{head} {} \"}}\"", json_rule(&tool.parameters)?))
}

/// A mark as Lark: the token itself where it is a special one, else its text.
fn mark(tokenizer: &Tokenizer, mark: &str) -> String {
    match tokenizer.token_id(mark).filter(|&id| tokenizer.is_special(id)) {
        Some(id) => format!("<[{id}]>"),
        None => text(mark),
    }
}

fn text(text: &str) -> String {
    if text.is_empty() { String::new() } else { lark_string(text) }
}
