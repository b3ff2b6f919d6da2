//! Structured output: `response_format` and `structured_outputs` as asked, and the compilation of their grammars under
//! limits of time and number.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::error::{ApiError, clip};
use super::fields::{Fields, Neutral, Unsupported};
use crate::engine::request::Constraint;
use crate::tokenizer::{Grammar, GrammarSource, GrammarStart, GrammarState, Grammars, Tokenizer};

/// Grammars compiled at the same time; more wait.
const COMPILERS: usize = 2;
/// A grammar must be compiled within this time, waiting included.
const PATIENCE: Duration = Duration::from_secs(10);
/// Most texts of a choice.
const MAX_CHOICES: usize = 1024;

/// Fields of `structured_outputs` that do not work here.
const UNSUPPORTED: &[Unsupported] = &[
    Unsupported { name: "structural_tag", neutral: Neutral::Null },
    Unsupported { name: "disable_fallback", neutral: Neutral::Bool(false) },
    Unsupported { name: "disable_any_whitespace", neutral: Neutral::Bool(false) },
    Unsupported { name: "disable_additional_properties", neutral: Neutral::Bool(false) },
    Unsupported { name: "whitespace_pattern", neutral: Neutral::Null },
];

/// A grammar that a client asked for, and the field to blame for it.
#[derive(Debug, Clone, PartialEq)]
pub struct Asked {
    /// What the text is to follow.
    pub source: GrammarSource,
    /// Where it was asked for.
    pub param: &'static str,
}

/// A compiled grammar, and where texts begin to follow it.
#[derive(Debug, Clone)]
pub struct Structured {
    /// Shared with other requests.
    pub grammar: Grammar,
    /// After the thoughts of a model that has some.
    pub start: GrammarStart,
}

impl Structured {
    /// The rule of one more text of at most `max_tokens`.
    pub fn constraint(&self, max_tokens: usize) -> Arc<dyn Constraint> {
        Arc::new(self.grammar.follow(self.start.clone(), max_tokens))
    }
}

impl Constraint for GrammarState {
    fn restrict(&self, generated: &[u32], allowed: &mut [u32]) -> Result<(), String> {
        GrammarState::restrict(self, generated, allowed)
    }
}

/// Takes both fields off a request; `None` when neither asks for anything.
///
/// # Errors
/// 400 naming the field.
pub fn take(fields: &mut Fields<'_>) -> Result<Option<Asked>, ApiError> {
    let format = response_format(fields)?;
    let outputs = structured_outputs(fields)?;
    match (format, outputs) {
        (Some(_), Some(_)) => {
            let message = "`response_format` and `structured_outputs` cannot be asked for together.";
            Err(ApiError::bad_param("structured_outputs", message))
        }
        (format, outputs) => Ok(format.or(outputs)),
    }
}

fn response_format(fields: &mut Fields<'_>) -> Result<Option<Asked>, ApiError> {
    const TYPES: &str = "text, json_object or json_schema";
    let Some(mut format) = fields.object("response_format")? else { return Ok(None) };
    let kind: String = format.take("type", TYPES)?.unwrap_or_default();
    let source = match kind.as_str() {
        "text" => None,
        "json_object" => Some(GrammarSource::json_object()),
        "json_schema" => {
            let path = format.path("json_schema");
            let Some(mut given) = format.object("json_schema")? else {
                return Err(ApiError::bad_param(
                    path.clone(),
                    format!("`{path}` is required with this type: an object."),
                ));
            };
            // Name and description tell a model what the schema is for; here it is enforced, strictly in every case.
            given.take::<String>("name", "a string")?;
            given.take::<String>("description", "a string")?;
            given.boolean("strict")?;
            let schema = schema(&mut given, "schema")?;
            given.finish(&[])?;
            Some(schema.unwrap_or_else(GrammarSource::json_object))
        }
        "structural_tag" => {
            let message = "`response_format.type` structural_tag is not supported yet: it must be text, json_object or json_schema.";
            return Err(ApiError::bad_param("response_format.type", message));
        }
        other => return Err(format.refused("type", TYPES, format_args!("{:?}", clip(other)))),
    };
    format.finish(&[])?;
    Ok(source.map(|source| Asked { source, param: "response_format" }))
}

fn structured_outputs(fields: &mut Fields<'_>) -> Result<Option<Asked>, ApiError> {
    let Some(mut given) = fields.object("structured_outputs")? else { return Ok(None) };
    let choice: Option<Vec<String>> = given.take("choice", "a list of strings")?;
    if choice.as_ref().is_some_and(|texts| {
        texts.is_empty() || texts.len() > MAX_CHOICES || texts.iter().any(String::is_empty)
    }) {
        let expected = format!("1 to {MAX_CHOICES} strings, none empty");
        return Err(given.refused("choice", &expected, choice.map_or(0, |texts| texts.len())));
    }
    let sources = [
        schema(&mut given, "json")?,
        given.boolean("json_object")?.filter(|&wanted| wanted).map(|_| GrammarSource::json_object()),
        given.take("regex", "a regular expression as a string")?.map(GrammarSource::Regex),
        choice.map(GrammarSource::Choice),
        given.take("grammar", "a Lark grammar as a string")?.map(GrammarSource::Lark),
    ];
    given.finish(UNSUPPORTED)?;
    let mut asked = sources.into_iter().flatten();
    match (asked.next(), asked.next()) {
        (Some(source), None) => Ok(Some(Asked { source, param: "structured_outputs" })),
        _ => {
            let message =
                "`structured_outputs` must have exactly one of json, json_object, regex, choice and grammar.";
            Err(ApiError::bad_param("structured_outputs", message))
        }
    }
}

/// A JSON schema: an object, or one written as a string.
fn schema(fields: &mut Fields<'_>, name: &str) -> Result<Option<GrammarSource>, ApiError> {
    let given: Option<Value> = fields.take(name, "a JSON schema")?;
    let schema = match given {
        None => return Ok(None),
        Some(Value::String(text)) => serde_json::from_str(&text).unwrap_or(Value::Null),
        Some(value) => value,
    };
    match schema {
        Value::Object(_) => Ok(Some(GrammarSource::JsonSchema(schema))),
        Value::Bool(true) => Ok(Some(GrammarSource::JsonSchema(json!({})))),
        other => Err(fields.refused(name, "a JSON schema, which is an object", clip(&other.to_string()))),
    }
}

/// Compiles grammars for the served model.
pub struct Compiler {
    /// Prepared when first needed: it takes a while and many servers never do.
    grammars: Arc<OnceLock<Result<Grammars, String>>>,
    permits: Arc<Semaphore>,
}

impl Default for Compiler {
    fn default() -> Self {
        Compiler { grammars: Arc::default(), permits: Arc::new(Semaphore::new(COMPILERS)) }
    }
}

impl Compiler {
    /// Compiles off the threads that serve sockets, a few grammars at a time. One that takes too long is refused; its
    /// thread is bounded by the limits of [`Grammars`] and keeps its place until it ends.
    ///
    /// # Errors
    /// 400 that blames the field.
    pub async fn compile(
        &self,
        asked: Asked,
        tokenizer: &Arc<Tokenizer>,
        eos: &[u32],
    ) -> Result<Grammar, ApiError> {
        let Asked { source, param } = asked;
        let (grammars, tokenizer, eos) = (Arc::clone(&self.grammars), Arc::clone(tokenizer), eos.to_vec());
        let permits = Arc::clone(&self.permits);
        let compiled = timeout(PATIENCE, async move {
            let permit = permits.acquire_owned().await;
            tokio::task::spawn_blocking(move || {
                let _permit = permit;
                let grammars = grammars.get_or_init(|| Grammars::new(&tokenizer, &eos));
                grammars.as_ref().map_err(Clone::clone)?.compile(&source)
            })
            .await
        });
        match compiled.await {
            Ok(Ok(Ok(grammar))) => Ok(grammar),
            Ok(Ok(Err(why))) => {
                Err(ApiError::bad_param(param, format!("`{param}` cannot be followed: {why}")))
            }
            Ok(Err(panic)) => Err(ApiError::internal(&panic)),
            Err(_) => {
                let message = format!("`{param}` was not compiled within {} s.", PATIENCE.as_secs());
                Err(ApiError::bad_param(param, message))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(request: Value) -> Result<Option<GrammarSource>, ApiError> {
        let body = request.to_string();
        Ok(take(&mut Fields::parse(body.as_bytes()).unwrap())?.map(|asked| asked.source))
    }

    #[test]
    fn what_is_asked_for() {
        let schema = json!({"type": "integer"});
        for (request, expected) in [
            (json!({}), None),
            (json!({"response_format": {"type": "text"}}), None),
            (json!({"response_format": {"type": "json_object"}}), Some(GrammarSource::json_object())),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": true}}}),
                Some(GrammarSource::JsonSchema(schema.clone())),
            ),
            (
                json!({"structured_outputs": {"json": schema}}),
                Some(GrammarSource::JsonSchema(schema.clone())),
            ),
            (
                json!({"structured_outputs": {"json": schema.to_string()}}),
                Some(GrammarSource::JsonSchema(schema.clone())),
            ),
            (json!({"structured_outputs": {"json_object": true}}), Some(GrammarSource::json_object())),
            (json!({"structured_outputs": {"regex": "a+"}}), Some(GrammarSource::Regex("a+".into()))),
            (
                json!({"structured_outputs": {"choice": ["a"], "regex": null}}),
                Some(GrammarSource::Choice(vec!["a".into()])),
            ),
            (
                json!({"structured_outputs": {"grammar": "start: \"a\""}}),
                Some(GrammarSource::Lark("start: \"a\"".into())),
            ),
        ] {
            assert_eq!(parse(request.clone()).unwrap(), expected, "{request}");
        }
    }

    #[test]
    fn a_refusal_names_its_field() {
        for (request, param) in [
            (json!({"response_format": "json"}), "response_format"),
            (json!({"response_format": {}}), "response_format.type"),
            (json!({"response_format": {"type": "xml"}}), "response_format.type"),
            (json!({"response_format": {"type": "structural_tag"}}), "response_format.type"),
            (json!({"response_format": {"type": "json_schema"}}), "response_format.json_schema"),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"schema": 3}}}),
                "response_format.json_schema.schema",
            ),
            (json!({"response_format": {"type": "json_object", "more": 1}}), "response_format.more"),
            (json!({"structured_outputs": {}}), "structured_outputs"),
            (json!({"structured_outputs": {"json": {}, "regex": "a"}}), "structured_outputs"),
            (json!({"structured_outputs": {"json": "{"}}), "structured_outputs.json"),
            (json!({"structured_outputs": {"choice": []}}), "structured_outputs.choice"),
            (json!({"structured_outputs": {"choice": [""]}}), "structured_outputs.choice"),
            (json!({"structured_outputs": {"structural_tag": "x"}}), "structured_outputs.structural_tag"),
            (
                json!({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}),
                "structured_outputs",
            ),
        ] {
            let error = parse(request.clone()).expect_err(&request.to_string());
            assert_eq!(error.param.as_deref(), Some(param), "{request}: {}", error.message);
        }
    }
}
