//! Chat templates: a conversation as the text its model was trained on.
//!
//! Templates are Jinja2 programs that come with a checkpoint and were written for transformers'
//! `apply_chat_template`. The environment here gives them the same variables, filters, functions, Python string
//! methods and white-space rules; the extra bounds are on steps (fuel) and on depth.

use super::strftime::strftime;
use super::{pyjson, pymethods};
use crate::error::Error;
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, Value, context};
use std::collections::HashSet;
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
    source: String,
    /// Variables it reads without setting them first.
    variables: HashSet<String>,
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
    pub fn compile(source: &str) -> Result<ChatTemplate, String> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| e.to_string())?);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(pymethods::unknown_method);
        environment.add_filter("tojson", pyjson::tojson);
        environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            let error = minijinja::Error::new(ErrorKind::InvalidOperation, "raise_exception");
            Err(error.with_source(Raised(message)))
        });
        let source = without_generation_tags(source);
        environment.add_template_owned(NAME, source.clone()).map_err(|e| format!("{e:#}"))?;
        let variables =
            environment.get_template(NAME).map_err(|e| e.to_string())?.undeclared_variables(false);
        Ok(ChatTemplate { environment, source, variables })
    }

    /// Whether its text depends on the variable `name`.
    pub fn reads(&self, name: &str) -> bool {
        self.variables.contains(name)
    }

    /// Whether `text` stands in its source, which tells the tokens and roles it was written for.
    pub fn mentions(&self, text: &str) -> bool {
        self.source.contains(text)
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value as Json, json};
    use std::time::{Duration, UNIX_EPOCH};

    fn input(context: &Json) -> ChatInput {
        let extra = context.as_object().unwrap().iter().map(|(name, value)| (name.clone(), from_json(value)));
        ChatInput {
            messages: context.get("messages").map(from_json).unwrap_or_default(),
            add_generation_prompt: false,
            tools: context.get("tools").map(from_json),
            documents: None,
            extra: extra.filter(|(name, _)| name != "messages" && name != "tools").collect(),
            now: UNIX_EPOCH + Duration::from_secs(1_721_923_200),
        }
    }

    fn render(template: &str, context: &Json) -> Result<String, ChatError> {
        ChatTemplate::compile(template).unwrap().render(&input(context), &[("bos_token", "<s>".into())])
    }

    /// chat_cases.json holds what transformers 5.17 renders: `_compile_jinja_template(template).render(**context)`.
    #[test]
    fn templates_render_as_in_transformers() {
        let cases: Vec<Json> = serde_json::from_str(include_str!("chat_cases.json")).unwrap();
        let wrong = cases.iter().filter_map(|case| {
            let expected = case["expected"].as_str().unwrap();
            let template = case["template"].as_str().unwrap();
            let got = ChatTemplate::compile(template)
                .and_then(|t| t.render(&input(&case["context"]), &[]).map_err(|e| e.to_string()));
            (got.as_deref() != Ok(expected))
                .then(|| format!("{template:?}\n  expected {expected:?}\n  got {got:?}"))
        });
        let wrong: Vec<String> = wrong.collect();
        assert!(wrong.is_empty(), "{} of {} templates:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
    }

    #[test]
    fn raise_exception_is_the_templates_own_message() {
        let refused = |message: &str| Err(ChatError::Refused(message.into()));
        assert_eq!(
            render("a{{ raise_exception('roles must alternate') }}", &json!({})),
            refused("roles must alternate")
        );
        let in_macro =
            "{% macro f() %}{% for i in [1] %}{{ raise_exception('no') }}{% endfor %}{% endmacro %}{{ f() }}";
        assert_eq!(render(in_macro, &json!({})), refused("no"));
        let error = Error::from(ChatError::Refused("no".into()));
        assert!(
            matches!(error, Error::Request { param: Some(p), message } if p == "messages" && message == "no")
        );
    }

    #[test]
    fn a_template_without_end_runs_out_of_fuel() {
        let endless = "{% for a in range(99999) %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}";
        assert_eq!(render(endless, &json!({})), Err(ChatError::OutOfFuel { limit: FUEL }));
        let macros = "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}";
        assert!(render(macros, &json!({})).is_err());
    }

    #[test]
    fn a_long_chat_has_fuel_to_spare() {
        let messages: Vec<Json> =
            (0..10_000).map(|i| json!({"role": "user", "content": format!("{i}")})).collect();
        let template =
            "{% for m in messages %}{% if m.role == 'user' %}<{{ m.content | trim }}>{% endif %}{% endfor %}";
        assert!(render(template, &json!({ "messages": messages })).unwrap().ends_with("<9999>"));
    }

    #[test]
    fn failures_name_the_line_and_syntax_errors_are_found_at_load() {
        let failed = render("\n{{ messages[0].content + 1 }}", &json!({"messages": [{"content": "x"}]}));
        assert!(
            matches!(&failed, Err(ChatError::Failed(why)) if why.contains("chat_template:2")),
            "{failed:?}"
        );
        let broken = ChatTemplate::compile("{% for m in messages %}\n{% if %}").err().unwrap();
        assert!(broken.contains("chat_template:2"), "{broken}");
        assert!(ChatTemplate::compile("{% unknown_tag %}").is_err());
    }

    #[test]
    fn a_template_tells_what_it_reads() {
        let source = "{% if not tools is defined %}{% set tools = none %}{% endif %}{% set x = y %}\
            {% for m in messages %}{{ m.role }}{% if enable_thinking %}{{ x }}{% endif %}{% endfor %}";
        let template = ChatTemplate::compile(source).unwrap();
        for (name, read) in [
            ("messages", true),
            ("tools", true),
            ("enable_thinking", true),
            ("y", true),
            ("x", false),
            ("m", false),
            ("role", false),
        ] {
            assert_eq!(template.reads(name), read, "{name}");
        }
        assert!(template.mentions("enable_thinking") && !template.mentions("documents"));
    }

    #[test]
    fn dates_and_special_tokens_are_variables() {
        let template = "{{ bos_token }}{{ strftime_now('%d %b %Y') }}{{ eos_token is defined }}";
        assert_eq!(render(template, &json!({})).unwrap(), "<s>25 Jul 2024False");
        assert!(render("{{ strftime_now('%Q') }}", &json!({})).is_err());
    }

    #[test]
    fn further_variables_do_not_replace_the_conversation() {
        let mut chat = input(&json!({"messages": ["m"]}));
        chat.extra = vec![("messages".into(), Value::from("x")), ("bos_token".into(), Value::from("B"))];
        let template = ChatTemplate::compile("{{ messages[0] }}{{ bos_token }}").unwrap();
        assert_eq!(template.render(&chat, &[("bos_token", "<s>".into())]).unwrap(), "mB");
    }

    #[test]
    fn json_that_python_would_refuse_is_an_error() {
        for bad in ["{{ nothing|tojson }}", "{{ 1|tojson(nonsense=1) }}", "{{ 1|tojson(separators=[',']) }}"]
        {
            assert!(matches!(render(bad, &json!({})), Err(ChatError::Failed(_))), "{bad}");
        }
        let deep = "{% set ns = namespace(x=1) %}{% for i in range(1000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x|tojson }}";
        assert!(
            matches!(render(deep, &json!({})), Err(ChatError::Failed(why)) if why.contains("deeper than 200"))
        );
    }
}
