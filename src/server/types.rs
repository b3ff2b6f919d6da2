//! What goes over the wire: OpenAI's response objects. Edge types only; nothing inward of the server sees them.

use serde::{Serialize, Serializer};
use utoipa::ToSchema;

use super::logprobs::IdMap;

/// Answer of `/v1/completions`, and one chunk of its stream.
#[derive(Debug, Serialize, ToSchema)]
pub struct Completion<'a> {
    /// "cmpl-..."; equal in all chunks of a stream.
    pub id: &'a str,
    /// "text_completion".
    pub object: &'static str,
    /// Unix time in seconds.
    pub created: u64,
    /// The name the client used.
    pub model: &'a str,
    /// One per prompt; empty in the last chunk of a stream with usage.
    pub choices: Vec<Choice>,
    /// `Some(None)` is written as null: in chunks, where the usage comes at the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Usage>)]
    pub usage: Option<Option<Usage>>,
    /// Which engine answered.
    pub system_fingerprint: &'static str,
}

/// Name and version of this engine, which with a seed stand for reproducible text.
pub const SYSTEM_FINGERPRINT: &str = concat!("moeyard-", env!("CARGO_PKG_VERSION"));

/// One continued prompt.
#[derive(Debug, Serialize, ToSchema)]
pub struct Choice {
    /// Number of the prompt.
    pub index: usize,
    /// Generated text, without the stop string.
    pub text: String,
    /// When asked for.
    pub logprobs: Option<Logprobs>,
    /// Null until the last chunk.
    pub finish_reason: Option<&'static str>,
    /// The stop string or the id from `stop_token_ids` that ended the text.
    pub stop_reason: Option<StopReason>,
    /// Ids of the text's tokens, when asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
    /// Ids of the prompt's tokens, when asked for; in a stream, in the first chunk of each choice.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
    /// One per prompt token, when asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Option<HashMap<String, PromptLogprob>>>>)]
    pub prompt_logprobs: Option<Vec<Option<IdMap>>>,
    /// Experts of every token but the last, when asked for; see the module `npy`. In a stream, in the last chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub routed_experts: Option<String>,
}

/// What is known about a token at one place of the prompt.
#[derive(Debug, Serialize, ToSchema)]
pub struct PromptLogprob {
    /// Natural logarithm of its probability there.
    pub logprob: f32,
    /// Its place among all tokens, from 1.
    pub rank: u32,
    /// Its text.
    pub decoded_token: String,
}

/// What ended a text besides its natural end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(untagged)]
pub enum StopReason {
    /// One of `stop`.
    Text(String),
    /// One of `stop_token_ids`.
    Token(u32),
}

/// Log-probabilities, one entry per token in each list. The first token of an echoed prompt has none.
#[derive(Debug, Default, Serialize, ToSchema)]
pub struct Logprobs {
    /// Text of the tokens.
    pub tokens: Vec<String>,
    /// Natural logarithm of each token's probability.
    pub token_logprobs: Vec<Option<f32>>,
    /// The token itself, then the best ones, best first.
    #[schema(value_type = Vec<Option<HashMap<String, f32>>>)]
    pub top_logprobs: Vec<Option<TopLogprobs>>,
    /// Characters of the text that were complete before each token.
    pub text_offset: Vec<usize>,
}

/// An object from token text to log-probability that keeps its order.
#[derive(Debug, PartialEq)]
pub struct TopLogprobs(pub Vec<(String, f32)>);

impl Serialize for TopLogprobs {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(text, logprob)| (text, logprob)))
    }
}

/// Tokens of a request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct Usage {
    /// Tokens of all prompts.
    pub prompt_tokens: usize,
    /// Both together.
    pub total_tokens: usize,
    /// Generated tokens, the one that ended the text included.
    pub completion_tokens: usize,
    /// More about the prompt tokens.
    pub prompt_tokens_details: PromptTokensDetails,
}

/// See [`Usage`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct PromptTokensDetails {
    /// Prompt tokens found in the prefix cache.
    pub cached_tokens: usize,
}

impl Usage {
    /// Adds one sequence.
    pub fn add(&mut self, prompt_tokens: usize, completion_tokens: usize, cached_tokens: usize) {
        self.prompt_tokens += prompt_tokens;
        self.completion_tokens += completion_tokens;
        self.total_tokens += prompt_tokens + completion_tokens;
        self.prompt_tokens_details.cached_tokens += cached_tokens;
    }
}

/// Answer of `/v1/models`.
#[derive(Debug, Serialize, ToSchema)]
pub struct ModelList<'a> {
    /// "list".
    pub object: &'static str,
    /// One per served name.
    pub data: Vec<ModelCard<'a>>,
}

/// One served model.
#[derive(Debug, Serialize, ToSchema)]
pub struct ModelCard<'a> {
    /// The name to ask for.
    pub id: &'a str,
    /// "model".
    pub object: &'static str,
    /// Unix time in seconds at which it was loaded.
    pub created: u64,
    /// "moeyard".
    pub owned_by: &'static str,
    /// The first served name; the others are aliases.
    pub root: &'a str,
    /// Longest sequence in tokens, prompt and generated text together.
    pub max_model_len: usize,
}

/// Answer of `/version`.
#[derive(Debug, Serialize, ToSchema)]
pub struct Version {
    /// Of this crate.
    pub version: &'static str,
}

/// Answer of `/load`.
#[derive(Debug, Serialize, ToSchema)]
pub struct ServerLoad {
    /// Sequences that run or wait.
    pub server_load: usize,
}

/// Answer of `/tokenize`.
#[derive(Debug, Serialize, ToSchema)]
pub struct Tokenized {
    /// How many tokens.
    pub count: usize,
    /// How many a request may have, answer included.
    pub max_model_len: usize,
    /// Their ids.
    pub tokens: Vec<u32>,
    /// Their texts, where asked for.
    pub token_strs: Option<Vec<String>>,
}

/// Answer of `/detokenize`.
#[derive(Debug, Serialize, ToSchema)]
pub struct Detokenized {
    /// The text.
    pub prompt: String,
}
