//! Answers of `/v1/chat/completions` as they go over the wire.

use serde::Serialize;
use utoipa::ToSchema;

use super::logprobs::IdMap;
use super::types::{PromptLogprob, StopReason, Usage};

/// A whole answer.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatCompletion<'a> {
    /// "chatcmpl-...".
    pub id: &'a str,
    /// "chat.completion".
    pub object: &'static str,
    /// Unix time in seconds.
    pub created: u64,
    /// The name the client used.
    pub model: &'a str,
    /// As many as `n`.
    pub choices: Vec<ChatChoice>,
    /// Tokens of the request.
    pub usage: Usage,
    /// Which engine answered.
    pub system_fingerprint: &'static str,
    /// One per prompt token, when asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Option<HashMap<String, PromptLogprob>>>>)]
    pub prompt_logprobs: Option<Vec<Option<IdMap>>>,
    /// Ids of the prompt's tokens, when asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
}

/// One answer of several.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatChoice {
    /// Number of the choice.
    pub index: usize,
    /// What the assistant says.
    pub message: ChatMessage,
    /// When asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// "stop", "length" or "tool_calls".
    pub finish_reason: &'static str,
    /// The stop string or token that ended the text.
    pub stop_reason: Option<StopReason>,
    /// Ids of the generated tokens, when asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
    /// Experts of every token but the last, when asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub routed_experts: Option<String>,
}

/// The assistant's message.
#[derive(Debug, Default, Serialize, ToSchema)]
pub struct ChatMessage {
    /// "assistant".
    pub role: &'static str,
    /// Text for the user; null where there are only calls.
    pub content: Option<String>,
    /// Always null: this server refuses requests, not models their answers.
    pub refusal: Option<String>,
    /// What a thinking model thought.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
    /// Calls, where there are any.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
}

/// One call; in a stream, a part of one: the first has id, type and name, the others more of the arguments.
#[derive(Debug, Default, Serialize, ToSchema)]
pub struct ToolCall {
    /// Number of the call in a stream.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub index: Option<usize>,
    /// "call_...".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// "function".
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<&'static str>,
    /// What is called.
    pub function: FunctionCall,
}

/// See [`ToolCall`].
#[derive(Debug, Default, Serialize, ToSchema)]
pub struct FunctionCall {
    /// Of the tool.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// A JSON object as text.
    pub arguments: String,
}

/// One event of a stream.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatChunk<'a> {
    /// Equal in all chunks of a stream.
    pub id: &'a str,
    /// "chat.completion.chunk".
    pub object: &'static str,
    /// Unix time in seconds.
    pub created: u64,
    /// The name the client used.
    pub model: &'a str,
    /// One; none in the last chunk of a stream with usage.
    pub choices: Vec<ChunkChoice>,
    /// `Some(None)` is written as null.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Usage>)]
    pub usage: Option<Option<Usage>>,
    /// Which engine answered.
    pub system_fingerprint: &'static str,
}

/// What is new of one choice.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChunkChoice {
    /// Number of the choice.
    pub index: usize,
    /// To be added to the message.
    pub delta: ChatDelta,
    /// Of the tokens since the last chunk, when asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// Null until the last chunk of the choice.
    pub finish_reason: Option<&'static str>,
    /// The stop string or token that ended the text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_reason: Option<StopReason>,
    /// Ids of the tokens since the last chunk, when asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
    /// Experts of every token but the last, when asked for; in the last chunk of the choice.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub routed_experts: Option<String>,
}

/// A part of a message.
#[derive(Debug, Default, Serialize, ToSchema)]
pub struct ChatDelta {
    /// "assistant", in the first chunk of the choice.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    /// More text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    /// More thoughts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
    /// Calls and more of their arguments.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
}

impl ChatDelta {
    /// Nothing new.
    pub fn is_empty(&self) -> bool {
        self.role.is_none()
            && self.content.is_none()
            && self.reasoning_content.is_none()
            && self.tool_calls.is_empty()
    }
}

/// Log-probabilities, one entry per token.
#[derive(Debug, Default, Serialize, ToSchema)]
pub struct ChatLogprobs {
    /// Of all generated tokens, those that ended the text or stand around its parts included.
    pub content: Vec<ChatLogprob>,
}

/// One token.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatLogprob {
    /// Its text.
    pub token: String,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// Its bytes, also where they are no whole character.
    pub bytes: Vec<u8>,
    /// As many of the best tokens as were asked for, best first.
    pub top_logprobs: Vec<TopLogprob>,
}

/// One of the best tokens.
#[derive(Debug, Serialize, ToSchema)]
pub struct TopLogprob {
    /// Its text.
    pub token: String,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// Its bytes.
    pub bytes: Vec<u8>,
}
