//! Chat templates: a conversation as the text its model was trained on.
//!
//! Templates are Jinja2 programs that come with a checkpoint and were written for transformers'
//! `apply_chat_template`. The environment here gives them the same variables, filters, functions, Python string
//! methods and white-space rules; the extra bounds are on steps (fuel) and on depth.

use super::pyjson;
use super::strftime::strftime;
use crate::error::Error;
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, Value, context};
use std::time::SystemTime;

/// A value that a template sees.
pub use minijinja::Value as TemplateValue;

/// Template instructions one rendering may take. A chat of ten thousand messages takes about a tenth of it; an endless
/// loop is stopped within a second.
const FUEL: u64 = 5_000_000;

/// The name templates go by in error messages.
const NAME: &str = "chat_template";

/// A compiled chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
}

/// One conversation to render.
#[derive(Debug, Clone)]
pub struct ChatInput {
    /// A list of messages, each a map with `role`, `content` and whatever else its template reads.
    pub messages: TemplateValue,
    /// End with the header of the assistant's turn.
    pub add_generation_prompt: bool,
    /// A list of tool descriptions (JSON schemas).
    pub tools: Option<TemplateValue>,
    /// A list of documents to ground the answer on.
    pub documents: Option<TemplateValue>,
    /// Further variables (`chat_template_kwargs`), such as `enable_thinking`.
    pub extra: Vec<(String, TemplateValue)>,
    /// What `strftime_now` formats, in UTC.
    pub now: SystemTime,
}

/// Why a conversation was not rendered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChatError {
    /// The checkpoint has no chat template.
    #[error("this model has no chat template: send a prompt to /v1/completions instead")]
    Missing,
    /// The template called `raise_exception` with this message.
    #[error("{0}")]
    Refused(String),
    /// The template did not end within the limit.
    #[error("the chat template did not end within {limit} steps")]
    OutOfFuel {
        /// Instructions it was given.
        limit: u64,
    },
    /// The template could not deal with these messages.
    #[error("the chat template cannot render these messages: {0}")]
    Failed(String),
}

impl From<ChatError> for Error {
    fn from(error: ChatError) -> Error {
        Error::request("messages", error.to_string())
    }
}

/// Carries the message of `raise_exception` through the template engine.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

impl ChatTemplate {
    /// Compiles a template.
    ///
    /// # Errors
    /// The syntax error with its line.
    pub(super) fn compile(source: &str) -> Result<ChatTemplate, String> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| e.to_string())?);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", pyjson::tojson);
        environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            let error = minijinja::Error::new(ErrorKind::InvalidOperation, "raise_exception");
            Err(error.with_source(Raised(message)))
        });
        let source = without_generation_tags(source);
        environment.add_template_owned(NAME, source).map_err(|e| format!("{e:#}"))?;
        Ok(ChatTemplate { environment })
    }

    /// Renders a conversation; `special` are the variables for special tokens.
    pub(super) fn render(
        &self,
        input: &ChatInput,
        special: &[(&'static str, String)],
    ) -> Result<String, ChatError> {
        let now = input.now;
        let strftime_now = move |format: String| {
            let unknown = || format!("strftime_now does not know all directives of {format:?}");
            strftime(&format, now)
                .ok_or_else(|| minijinja::Error::new(ErrorKind::InvalidOperation, unknown()))
        };
        let named = special.iter().map(|(name, token)| (name.to_string(), Value::from(token.as_str())));
        let variables = Value::from_pairs(named.chain(input.extra.iter().cloned()));
        let variables = context! {
            messages => input.messages.clone(),
            add_generation_prompt => input.add_generation_prompt,
            tools => input.tools.clone(),
            documents => input.documents.clone(),
            strftime_now => Value::from_function(strftime_now),
            ..variables
        };
        let template = self.environment.get_template(NAME).expect("compiled when the checkpoint was loaded");
        template.render(variables).map_err(|error| explain(&error))
    }
}

/// A value from JSON; objects keep their order.
pub fn from_json(json: &serde_json::Value) -> TemplateValue {
    match json {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(b) => Value::from(*b),
        serde_json::Value::Number(n) => match (n.as_i64(), n.as_u64()) {
            (Some(n), _) => Value::from(n),
            (None, Some(n)) => Value::from(n),
            (None, None) => Value::from(n.as_f64().unwrap_or(f64::NAN)),
        },
        serde_json::Value::String(s) => Value::from(s.as_str()),
        serde_json::Value::Array(list) => Value::from_iter(list.iter().map(from_json)),
        serde_json::Value::Object(map) => {
            Value::from_pairs(map.iter().map(|(key, value)| (key.as_str(), from_json(value))))
        }
    }
}

fn explain(error: &minijinja::Error) -> ChatError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(e) = cause {
        if let Some(Raised(message)) = e.downcast_ref() {
            return ChatError::Refused(message.clone());
        }
        if e.downcast_ref().is_some_and(|e: &minijinja::Error| e.kind() == ErrorKind::OutOfFuel) {
            return ChatError::OutOfFuel { limit: FUEL };
        }
        cause = e.source();
    }
    ChatError::Failed(error.to_string())
}

/// Replaces `{% generation %}` and `{% endgeneration %}`, with which transformers marks the assistant's tokens for
/// training, by an `if true` block: the text is the same.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        let end = tag.find("%}").map_or(tag.len(), |end| end + 2);
        let (tag, after) = tag.split_at(end);
        let inner = tag.trim_start_matches("{%").trim_end_matches("%}").trim_matches(['-', '+']).trim();
        match inner {
            "generation" => out.push_str(&tag.replacen("generation", "if true", 1)),
            "endgeneration" => out.push_str(&tag.replacen("endgeneration", "endif", 1)),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out + rest
}
