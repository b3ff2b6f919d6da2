//! `/v1/chat/completions` as asked.

use std::sync::Arc;

use super::chat_prompt::ChatPrompt;
use super::error::ApiError;
use super::fields::{Fields, Neutral, Unsupported};
use super::generation::{Generation, MAX_LOGPROBS};
use super::state::AppState;
use super::structured::{self, Asked};
use super::tools::{self, ToolChoice};
use crate::tokenizer::turn::{Callable, TurnStyle};

/// Fields of OpenAI and vLLM's chat that do not work here.
const UNSUPPORTED: &[Unsupported] = &[
    Unsupported { name: "store", neutral: Neutral::Bool(false) },
    Unsupported { name: "metadata", neutral: Neutral::Empty },
    Unsupported { name: "service_tier", neutral: Neutral::Text("auto") },
    Unsupported { name: "audio", neutral: Neutral::Null },
    Unsupported { name: "prediction", neutral: Neutral::Null },
    Unsupported { name: "verbosity", neutral: Neutral::Text("medium") },
    Unsupported { name: "web_search_options", neutral: Neutral::Null },
    Unsupported { name: "moderation", neutral: Neutral::Null },
    Unsupported { name: "prompt_cache_retention", neutral: Neutral::Null },
    Unsupported { name: "functions", neutral: Neutral::Empty },
    Unsupported { name: "function_call", neutral: Neutral::Null },
    Unsupported { name: "echo", neutral: Neutral::Bool(false) },
    Unsupported { name: "best_of", neutral: Neutral::Number(1.0) },
    Unsupported { name: "mm_processor_kwargs", neutral: Neutral::Empty },
    Unsupported { name: "media_io_kwargs", neutral: Neutral::Empty },
    Unsupported { name: "thinking_token_budget", neutral: Neutral::Null },
];

/// A valid request for a chat completion. Whether it fits the model is checked when it is submitted.
pub struct ChatRequest {
    /// The name asked for; `None` takes the served model.
    pub model: Option<String>,
    /// The conversation.
    pub prompt: ChatPrompt,
    /// `None` was not given: what the context leaves.
    pub max_tokens: Option<usize>,
    /// How.
    pub generation: Generation,
    /// Log-probability of each token and of this many best ones.
    pub logprobs: Option<usize>,
    /// The functions that may be called; `None` where the answer is text.
    pub tools: Option<Arc<[Callable]>>,
    /// Some function must be called.
    pub must_call: bool,
    /// Several calls are allowed.
    pub parallel_calls: bool,
    /// Rules of the text.
    pub structured: Option<Asked>,
    /// Tell thoughts.
    pub include_reasoning: bool,
}

impl ChatRequest {
    /// Parses a request body.
    ///
    /// # Errors
    /// 400 that names the field, the limit and the value.
    pub fn parse(body: &[u8], state: &AppState) -> Result<Self, ApiError> {
        let mut fields = Fields::parse(body)?;
        let model = fields.take("model", "a string")?;
        // Other systems' ways to tell users and caches apart; nothing here depends on them.
        fields.take::<String>("safety_identifier", "a string")?;
        fields.take::<String>("prompt_cache_key", "a string")?;
        let modalities: Option<Vec<String>> = fields.take("modalities", "[\"text\"]")?;
        if modalities.is_some_and(|list| list != ["text"]) {
            return Err(ApiError::bad_param(
                "modalities",
                "`modalities` must be [\"text\"]: this model says nothing else.",
            ));
        }
        let tools = tools::definitions(&mut fields)?;
        let choice = tools::choice(&mut fields, tools.as_ref())?;
        let parallel = fields.boolean("parallel_tool_calls")?;
        // Tools that may not be called are not shown to the model.
        let shown = tools.as_ref().filter(|_| choice != ToolChoice::None);
        let prompt = ChatPrompt::take(&mut fields, shown.map(tools::Tools::for_template), body.len(), state)?;
        if let Some(tools) = shown
            && !prompt.style(state).is_some_and(|style| TurnStyle::calls_tools(&style))
        {
            let message = format!(
                "`tools`: the format in which this model calls its {} tools is not known here.",
                tools.list.len()
            );
            return Err(ApiError::bad_param("tools", message));
        }
        let structured = structured::take(&mut fields)?;
        let must_call = matches!(choice, ToolChoice::Required | ToolChoice::Named(_));
        if let Some(asked) = structured.as_ref().filter(|_| must_call) {
            let message = format!(
                "`{}` is only allowed with a `tool_choice` that allows text: auto or none.",
                asked.param
            );
            return Err(ApiError::bad_param(asked.param, message));
        }
        let callable = |function: &tools::Function| Callable {
            name: function.name.clone(),
            parameters: function.parameters.clone(),
        };
        let callables = shown.map(|tools| match &choice {
            ToolChoice::Named(name) => tools.find(name).map(callable).into_iter().collect(),
            _ => tools.list.iter().map(callable).collect(),
        });
        let deprecated = fields.integer("max_tokens", 1, u32::MAX.into())?;
        let max_tokens = fields.integer("max_completion_tokens", 1, u32::MAX.into())?.or(deprecated);
        let request = ChatRequest {
            model,
            prompt,
            max_tokens: max_tokens.map(|n| n as usize),
            logprobs: logprobs(&mut fields)?,
            generation: Generation::take(&mut fields, &state.sampling_defaults)?,
            tools: callables,
            must_call,
            // One call ends the turn unless several are asked for: a model that is made to call need not know when to stop.
            parallel_calls: parallel.unwrap_or(false) && !matches!(choice, ToolChoice::Named(_)),
            structured,
            include_reasoning: fields.boolean("include_reasoning")?.unwrap_or(true),
        };
        fields.finish(UNSUPPORTED)?;
        Ok(request)
    }
}

fn logprobs(fields: &mut Fields<'_>) -> Result<Option<usize>, ApiError> {
    let wanted = fields.boolean("logprobs")?.unwrap_or(false);
    let top = fields.integer("top_logprobs", 0, MAX_LOGPROBS)?;
    match (wanted, top) {
        (false, Some(1..)) => {
            Err(ApiError::bad_param("top_logprobs", "`top_logprobs` is only allowed with `logprobs`: true."))
        }
        (false, _) => Ok(None),
        (true, top) => Ok(Some(top.unwrap_or(0) as usize)),
    }
}
