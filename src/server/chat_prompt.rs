//! The prompt of a chat: the fields that decide what the template writes, and the text it writes.

use std::sync::Arc;
use std::time::SystemTime;

use serde_json::{Map, Value};

use super::error::{ApiError, clip};
use super::fields::Fields;
use super::messages::Messages;
use super::state::{AppState, INLINE_BYTES};
use crate::tokenizer::chat::{TemplateValue, from_json};
use crate::tokenizer::turn::TurnStyle;
use crate::tokenizer::{ChatError, ChatInput, ChatTemplate, Tokenizer};

/// Longest template a request may bring, in bytes.
const MAX_TEMPLATE_BYTES: usize = 64 << 10;
/// Most documents of a request.
const MAX_DOCUMENTS: usize = 1024;
/// Variables of a template that have fields of their own.
const OWN_VARIABLES: [&str; 6] =
    ["messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template"];
/// What OpenAI's `reasoning_effort` may be.
const EFFORTS: [&str; 6] = ["none", "minimal", "low", "medium", "high", "xhigh"];

/// What is to be rendered.
pub struct ChatPrompt {
    messages: Messages,
    add_generation_prompt: bool,
    continue_final_message: bool,
    /// The request's own template, compiled; `None` takes the checkpoint's.
    template: Option<Arc<ChatTemplate>>,
    tools: Option<Vec<Value>>,
    documents: Option<Vec<Value>>,
    /// Further variables.
    variables: Map<String, Value>,
    add_special_tokens: bool,
    /// Bytes of text that the request brought.
    bytes: usize,
}

/// A rendered chat.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// The prompt as text: tells how the assistant's turn begins.
    pub text: String,
    /// The prompt as tokens.
    pub tokens: Vec<u32>,
}

impl ChatPrompt {
    /// Takes the fields off a request whose body has `bytes` bytes. `tools` have been checked.
    ///
    /// # Errors
    /// 400 naming the field; also for what the template in use does not know.
    pub fn take(
        fields: &mut Fields<'_>,
        tools: Option<Vec<Value>>,
        bytes: usize,
        state: &AppState,
    ) -> Result<Self, ApiError> {
        let template = own_template(fields, state.options.trust_chat_template)?;
        let reads = reader(template.as_deref(), &state.tokenizer)?;
        if tools.is_some() && !reads("tools") {
            return Err(unknown_to_template("tools", "tools"));
        }
        let messages = Messages::take(fields)?;
        if messages.call_tools && !reads("tools") {
            return Err(unknown_to_template("messages", "tool calls"));
        }
        let continue_final_message = fields.boolean("continue_final_message")?.unwrap_or(false);
        let add_generation_prompt = fields.boolean("add_generation_prompt")?;
        if continue_final_message && add_generation_prompt == Some(true) {
            let message = "`continue_final_message` and `add_generation_prompt` cannot both be true.";
            return Err(ApiError::bad_param("continue_final_message", message));
        }
        if continue_final_message && messages.final_content().is_none() {
            let message = "`continue_final_message` needs a last message with content to continue.";
            return Err(ApiError::bad_param("continue_final_message", message));
        }
        let documents = documents(fields)?;
        if documents.is_some() && !reads("documents") {
            return Err(unknown_to_template("documents", "documents"));
        }
        let variables = variables(fields, &reads)?;
        let add_special_tokens = fields.boolean("add_special_tokens")?.unwrap_or(false);
        drop(reads);
        Ok(ChatPrompt {
            messages,
            add_generation_prompt: add_generation_prompt.unwrap_or(!continue_final_message),
            continue_final_message,
            variables,
            template,
            tools,
            documents,
            add_special_tokens,
            bytes,
        })
    }

    /// How the model writes its turn, by the template in use; `None` when it writes text and nothing else.
    pub fn style(&self, state: &AppState) -> Option<TurnStyle> {
        TurnStyle::of(self.template.as_deref().or(state.tokenizer.chat_template())?)
    }

    /// Renders and tokenises.
    ///
    /// # Errors
    /// 400 when the template refuses the messages or does not end, and as [`Tokenizer::encode`].
    pub async fn render(self, state: &AppState) -> Result<Rendered, ApiError> {
        let short = self.bytes <= INLINE_BYTES && self.template.is_none();
        let tokenizer = Arc::clone(&state.tokenizer);
        let add_special_tokens = self.add_special_tokens;
        let (text, tokenizer) = state.prepare(short, move || Ok((self.text(&tokenizer)?, tokenizer))).await?;
        state.check_length("messages", &text)?;
        let short = text.len() <= INLINE_BYTES;
        state
            .prepare(short, move || {
                let tokens = tokenizer.encode(&text, add_special_tokens)?;
                Ok(Rendered { text, tokens })
            })
            .await
    }

    fn text(&self, tokenizer: &Tokenizer) -> Result<String, ApiError> {
        let template = self
            .template
            .as_deref()
            .or(tokenizer.chat_template())
            .ok_or_else(|| refused(ChatError::Missing))?;
        // Templates that know no developer know the system, which is what developers were called before.
        let rename = !template.mentions("developer");
        let list = self.messages.list.iter().map(|message| match message.get("role") {
            Some(Value::String(role)) if rename && role == "developer" => {
                let mut message = message.clone();
                message["role"] = "system".into();
                from_json(&message)
            }
            _ => from_json(message),
        });
        let values = |list: &Vec<Value>| list.iter().map(from_json).collect::<TemplateValue>();
        let input = ChatInput {
            messages: list.collect(),
            add_generation_prompt: self.add_generation_prompt,
            tools: self.tools.as_ref().map(values),
            documents: self.documents.as_ref().map(values),
            extra: self.variables.iter().map(|(name, value)| (name.clone(), from_json(value))).collect(),
            now: SystemTime::now(),
        };
        let text = tokenizer.render_chat_with(template, &input).map_err(refused)?;
        match self.messages.final_content() {
            Some(last) if self.continue_final_message => cut_after(text, last),
            _ => Ok(text),
        }
    }
}

/// What the template in use reads.
///
/// # Errors
/// 400 when the model has no template and the request brings none.
pub fn reader<'a>(
    own: Option<&'a ChatTemplate>,
    tokenizer: &'a Tokenizer,
) -> Result<impl Fn(&str) -> bool + use<'a>, ApiError> {
    let template = own.or(tokenizer.chat_template()).ok_or_else(|| refused(ChatError::Missing))?;
    Ok(move |name: &str| template.reads(name))
}

/// The error for a field that the template in use would not look at.
pub fn unknown_to_template(param: &str, what: &str) -> ApiError {
    let message = format!("`{param}`: this model's chat template knows no {what}.");
    ApiError::bad_param(param, message)
}

fn refused(error: ChatError) -> ApiError {
    ApiError::from(crate::Error::from(error))
}

fn own_template(fields: &mut Fields<'_>, trusted: bool) -> Result<Option<Arc<ChatTemplate>>, ApiError> {
    let refused = |why: String| Err(ApiError::bad_param("chat_template", format!("`chat_template` {why}.")));
    let Some(source) = fields.take::<String>("chat_template", "a Jinja template as a string")? else {
        return Ok(None);
    };
    if !trusted {
        return refused(
            "is refused: this server does not render clients' templates (see --trust-request-chat-template)"
                .into(),
        );
    }
    if source.len() > MAX_TEMPLATE_BYTES {
        return refused(format!("may have at most {MAX_TEMPLATE_BYTES} bytes, got {}", source.len()));
    }
    match ChatTemplate::compile(&source) {
        Ok(template) => Ok(Some(Arc::new(template))),
        Err(why) => refused(format!("is no valid template: {}", clip(&why))),
    }
}

fn documents(fields: &mut Fields<'_>) -> Result<Option<Vec<Value>>, ApiError> {
    let expected = "a list of objects";
    let Some(list) = fields.list("documents", expected, MAX_DOCUMENTS)? else { return Ok(None) };
    let document = |(at, raw): (usize, &&serde_json::value::RawValue)| {
        let object: Map<String, Value> =
            super::fields::typed(&format!("documents[{at}]"), raw.get(), "an object")?;
        Ok(Value::Object(object))
    };
    list.iter().enumerate().map(document).collect::<Result<Vec<_>, ApiError>>().map(Some)
}

/// `chat_template_kwargs` and `reasoning_effort`. A template ignores variables it does not know, so kwargs may hold any
/// but those with a field of their own; a field must do what it says.
fn variables(fields: &mut Fields<'_>, reads: impl Fn(&str) -> bool) -> Result<Map<String, Value>, ApiError> {
    let kwargs: Option<Map<String, Value>> = fields.take("chat_template_kwargs", "an object")?;
    let mut variables = kwargs.unwrap_or_default();
    if let Some(name) = OWN_VARIABLES.into_iter().find(|name| variables.contains_key(*name)) {
        let path = format!("chat_template_kwargs.{name}");
        let message = format!("`{path}` is refused: `{name}` is a field of its own.");
        return Err(ApiError::bad_param(path, message));
    }
    if let Some(effort) = fields.take::<String>("reasoning_effort", &EFFORTS.join(", "))? {
        if !EFFORTS.contains(&effort.as_str()) {
            let expected = format!("one of {}", EFFORTS.join(", "));
            return Err(fields.refused("reasoning_effort", &expected, format_args!("{:?}", clip(&effort))));
        }
        if !reads("reasoning_effort") {
            return Err(unknown_to_template("reasoning_effort", "reasoning effort"));
        }
        variables.insert("reasoning_effort".into(), effort.into());
    }
    Ok(variables)
}

/// The text up to the end of the last message's content, as transformers does it: what the template writes after it
/// would end the turn that is to go on.
fn cut_after(mut text: String, content: &str) -> Result<String, ApiError> {
    for content in [content, content.trim()] {
        if let Some(at) = text.rfind(content) {
            text.truncate(at + content.len());
            return Ok(text);
        }
    }
    let message = "`continue_final_message`: the chat template does not write the last message as it is.";
    Err(ApiError::bad_param("continue_final_message", message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_final_message_is_continued_where_it_ends() {
        for (text, content, expected) in [
            ("<u>hi</u><a>so be</a>", "so be", "<u>hi</u><a>so be"),
            ("<u>so be</u><a>so be </a>", "so be ", "<u>so be</u><a>so be "),
            ("<a>so be</a>", " so be\n", "<a>so be"),
        ] {
            assert_eq!(cut_after(text.into(), content).unwrap(), expected);
        }
        let error = cut_after("<a>SO BE</a>".into(), "so be").unwrap_err();
        assert_eq!(error.param.as_deref(), Some("continue_final_message"));
    }
}
