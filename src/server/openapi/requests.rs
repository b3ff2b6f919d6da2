//! Request bodies as `/openapi.json` describes them. The server takes requests apart by hand, to name the field at fault;
//! a test holds these types against what it takes.
#![expect(dead_code, reason = "only their schemas are used")]

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::Value;
use utoipa::ToSchema;

/// Body of `/v1/completions`.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CompletionBody {
    prompt: Prompt,
    #[serde(flatten)]
    generation: GenerationFields,
    /// Log-probability of each token and of this many best ones.
    #[schema(minimum = 0, maximum = 20)]
    logprobs: Option<u32>,
    /// The text begins with the prompt, and so do its log-probabilities.
    echo: Option<bool>,
    /// Tokens to generate; 16 unless given. 0 is allowed with `echo`.
    #[schema(minimum = 1)]
    max_tokens: Option<u32>,
    /// Encode with the tokens that the tokenizer puts around a text; true unless given.
    add_special_tokens: Option<bool>,
}

/// A text, several texts, token ids, or several lists of them.
#[derive(Deserialize, ToSchema)]
#[serde(untagged)]
pub enum Prompt {
    /// One text.
    Text(Text),
    /// Several.
    Texts(Texts),
    /// One, as token ids.
    Tokens(TokenList),
    /// Several, as token ids.
    TokenLists(TokenLists),
}

/// Several texts.
#[derive(Deserialize, ToSchema)]
#[schema(min_items = 1, max_items = 1024)]
pub struct Texts(Vec<Text>);

/// Several lists of token ids.
#[derive(Deserialize, ToSchema)]
#[schema(min_items = 1, max_items = 1024)]
pub struct TokenLists(Vec<TokenList>);

/// A text that is not empty.
#[derive(Deserialize, ToSchema)]
#[schema(min_length = 1)]
pub struct Text(String);

/// The number of a token in the model's vocabulary.
#[derive(Deserialize, ToSchema)]
#[schema(minimum = 0)]
pub struct TokenId(u32);

/// Token ids.
#[derive(Deserialize, ToSchema)]
#[schema(min_items = 1)]
pub struct TokenList(Vec<TokenId>);

/// Body of `/v1/chat/completions`.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ChatBody {
    #[serde(flatten)]
    chat: ChatFields,
    #[serde(flatten)]
    generation: GenerationFields,
    /// Tell the log-probability of each token.
    logprobs: Option<bool>,
    /// And of this many best ones; needs `logprobs`.
    #[schema(minimum = 0, maximum = 20)]
    top_logprobs: Option<u32>,
    /// Tokens to generate; what the context leaves unless given.
    #[schema(minimum = 1)]
    max_completion_tokens: Option<u32>,
    /// The older name of `max_completion_tokens`, which goes before it.
    #[schema(minimum = 1)]
    max_tokens: Option<u32>,
    /// none, auto, required, or the function to call.
    tool_choice: Option<ToolChoice>,
    /// Several calls in one answer are allowed; true unless given.
    parallel_tool_calls: Option<bool>,
    /// Tell the thoughts of a thinking model; true unless given.
    include_reasoning: Option<bool>,
    /// Names the user to other systems; without effect here.
    safety_identifier: Option<String>,
    /// Names a cache to other systems; without effect here.
    prompt_cache_key: Option<String>,
}

/// Fields of a chat that its template turns into a prompt.
#[derive(Deserialize, ToSchema)]
pub struct ChatFields {
    /// The conversation.
    #[schema(min_items = 1)]
    messages: Vec<Message>,
    /// Functions that may be called, where the model's template knows tools.
    #[schema(min_items = 1)]
    tools: Option<Vec<Tool>>,
    /// End the prompt with the header of the assistant's turn; true unless given.
    add_generation_prompt: Option<bool>,
    /// Go on with the last message instead of answering it.
    continue_final_message: Option<bool>,
    /// A Jinja template instead of the model's, where the server trusts clients.
    chat_template: Option<String>,
    /// Further variables for the template.
    chat_template_kwargs: Option<HashMap<String, Value>>,
    /// Documents to ground the answer on, where the template knows them.
    documents: Option<Vec<HashMap<String, Value>>>,
    /// Where the template knows it.
    reasoning_effort: Option<ReasoningEffort>,
    /// Encode with the tokens that the tokenizer puts around a text; false unless given: templates write them.
    add_special_tokens: Option<bool>,
}

/// How much a model is to think.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ReasoningEffort {
    None,
    Minimal,
    Low,
    Medium,
    High,
    Xhigh,
}

/// One message.
#[derive(Deserialize, ToSchema)]
#[serde(tag = "role", rename_all = "lowercase")]
pub enum Message {
    /// Instructions.
    System(Said),
    /// Instructions, by their newer name.
    Developer(Said),
    /// The user's words.
    User(Said),
    /// The model's.
    Assistant(Answered),
    /// A tool's.
    Tool(Returned),
}

/// What was said.
#[derive(Deserialize, ToSchema)]
pub struct Said {
    content: Content,
    /// Of the speaker.
    name: Option<String>,
}

/// What the model said.
#[derive(Deserialize, ToSchema)]
pub struct Answered {
    content: Content,
    /// Of the speaker.
    name: Option<String>,
    /// What the model thought.
    reasoning_content: Option<String>,
    /// The newer name of `reasoning_content`.
    reasoning: Option<String>,
    /// Tools that the model called, where its template knows tools; then there may be no content.
    #[schema(max_items = 128)]
    tool_calls: Option<Vec<Called>>,
}

/// A call of a tool.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Called {
    /// As it was told.
    id: Option<String>,
    function: CalledFunction,
}

/// See [`Called`].
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CalledFunction {
    /// Of the tool.
    name: String,
    /// A JSON object as text.
    arguments: Option<String>,
}

/// What a tool said.
#[derive(Deserialize, ToSchema)]
pub struct Returned {
    content: Content,
    /// Of the call that it answers.
    tool_call_id: String,
    /// Of the tool.
    name: Option<String>,
}

/// Whether the answer calls tools.
#[derive(Deserialize, ToSchema)]
#[serde(untagged)]
pub enum ToolChoice {
    /// In general.
    Mode(ToolMode),
    /// This one.
    Named(NamedTool),
}

/// The tool to call.
#[derive(Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum NamedTool {
    /// The only kind there is.
    Function {
        /// Which.
        function: ToolName,
    },
}

/// See [`NamedTool`].
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ToolName {
    /// Of one of `tools`.
    name: String,
}

/// See [`ToolChoice`].
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ToolMode {
    None,
    Auto,
    Required,
}

/// Text, whole or in parts.
#[derive(Deserialize, ToSchema)]
#[serde(untagged)]
pub enum Content {
    /// Whole.
    Text(String),
    /// In parts.
    Parts(Parts),
}

/// The parts of a message.
#[derive(Deserialize, ToSchema)]
#[schema(min_items = 1, max_items = 1024)]
pub struct Parts(Vec<Part>);

/// A part of a message.
#[derive(Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Part {
    /// Text; the only kind that this server takes.
    Text {
        /// The text.
        text: String,
    },
}

/// A function.
#[derive(Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Tool {
    /// The only kind there is.
    Function {
        /// What it is.
        function: Function,
    },
}

/// See [`Tool`].
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Function {
    /// Letters, digits, `_`, `-` and `.`.
    #[schema(min_length = 1, max_length = 64, pattern = "^[A-Za-z0-9_.-]+$")]
    name: String,
    /// For the model.
    description: Option<String>,
    /// JSON schema of its arguments.
    parameters: Option<HashMap<String, Value>>,
    /// Without effect: what is enforced is enforced strictly.
    strict: Option<bool>,
}

/// Fields of both endpoints.
#[derive(Deserialize, ToSchema)]
pub struct GenerationFields {
    /// A served name; the first one unless given.
    model: Option<String>,
    /// Without effect.
    user: Option<String>,
    /// Choices per prompt; 1 with temperature 0.
    #[schema(minimum = 1, maximum = 128)]
    n: Option<u32>,
    /// 0 takes the most probable token.
    #[schema(minimum = 0, maximum = 2)]
    temperature: Option<f64>,
    /// Keep the smallest set of best tokens with this probability.
    #[schema(exclusive_minimum = 0, maximum = 1)]
    top_p: Option<f64>,
    /// Keep this many best tokens; 0 and -1 keep all.
    #[schema(minimum = -1, maximum = 4294967295i64)]
    top_k: Option<i64>,
    /// Keep tokens with this share of the best one's probability.
    #[schema(minimum = 0, maximum = 1)]
    min_p: Option<f64>,
    /// Same seed, same text, in any batch.
    #[schema(minimum = -9223372036854775808i64, maximum = 9223372036854775807i64)]
    seed: Option<i64>,
    /// Above 0; 1 is off.
    #[schema(exclusive_minimum = 0, maximum = 1e30)]
    repetition_penalty: Option<f64>,
    /// 0 is off.
    #[schema(minimum = -2, maximum = 2)]
    presence_penalty: Option<f64>,
    /// 0 is off.
    #[schema(minimum = -2, maximum = 2)]
    frequency_penalty: Option<f64>,
    /// Added to the logits of tokens, by id: -100 to 100.
    logit_bias: Option<HashMap<String, f64>>,
    /// Only these tokens.
    #[schema(min_items = 1)]
    allowed_token_ids: Option<Vec<TokenId>>,
    /// Words that must not occur.
    #[schema(max_items = 256)]
    bad_words: Option<Vec<String>>,
    /// Texts that end the answer: one, or up to 4.
    stop: Option<Stop>,
    /// Tokens that end the answer.
    #[schema(max_items = 128)]
    stop_token_ids: Option<Vec<u32>>,
    /// What ended the answer is part of it.
    include_stop_str_in_output: Option<bool>,
    /// Go on after the model's own end.
    ignore_eos: Option<bool>,
    /// No end before this many tokens; not above `max_tokens`.
    #[schema(minimum = 0)]
    min_tokens: Option<u32>,
    /// Special tokens are no part of the text; true unless given.
    skip_special_tokens: Option<bool>,
    /// Special tokens are separated as others are; true unless given.
    spaces_between_special_tokens: Option<bool>,
    /// Log-probability of each prompt token and of this many best ones; not with `stream`.
    #[schema(minimum = 0, maximum = 20)]
    prompt_logprobs: Option<u32>,
    /// Keep this many last tokens of a prompt; -1 keeps what the context has room for.
    #[schema(minimum = -1)]
    truncate_prompt_tokens: Option<i64>,
    /// Tell the ids of prompt and text.
    return_token_ids: Option<bool>,
    /// Log-probabilities name tokens by id.
    return_tokens_as_token_ids: Option<bool>,
    /// Tell the experts of every token.
    routed_experts: Option<bool>,
    /// Low ones go first; only with the scheduling policy `priority`.
    priority: Option<i32>,
    /// Requests share cached prefixes only with those of the same salt.
    #[schema(min_length = 1)]
    cache_salt: Option<String>,
    /// Part of the answer's id.
    #[schema(min_length = 1, max_length = 128, pattern = "^[!-~]+$")]
    request_id: Option<String>,
    /// Answer as server-sent events.
    stream: Option<bool>,
    /// Only with `stream`.
    stream_options: Option<StreamOptionsBody>,
    /// Tokens per event after the first; only with `stream`.
    #[schema(minimum = 1, maximum = 4294967295i64)]
    stream_interval: Option<u32>,
    /// `{"type": "text" | "json_object" | "json_schema", ...}`.
    response_format: Option<ResponseFormat>,
    /// One of json, json_object, regex, choice and grammar.
    structured_outputs: Option<StructuredOutputs>,
}

/// One text or several.
#[derive(Deserialize, ToSchema)]
#[serde(untagged)]
pub enum Stop {
    /// One.
    One(StopText),
    /// Several.
    Several(StopTexts),
}

/// Up to four texts.
#[derive(Deserialize, ToSchema)]
#[schema(max_items = 4)]
pub struct StopTexts(Vec<StopText>);

/// A text that ends the answer.
#[derive(Deserialize, ToSchema)]
#[schema(min_length = 1, max_length = 1024)]
pub struct StopText(String);

/// See [`GenerationFields::stream_options`].
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StreamOptionsBody {
    /// End with an event that tells the usage.
    include_usage: Option<bool>,
    /// Every event tells the usage so far.
    continuous_usage_stats: Option<bool>,
}

/// What form the text has.
#[derive(Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ResponseFormat {
    /// Any.
    Text {},
    /// A JSON object.
    JsonObject {},
    /// What a JSON schema admits.
    JsonSchema {
        /// With a name.
        json_schema: NamedSchema,
    },
}

/// A JSON schema with a name.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NamedSchema {
    /// For the model.
    name: Option<String>,
    /// For the model.
    description: Option<String>,
    /// Any JSON object unless given.
    schema: Option<HashMap<String, Value>>,
    /// Without effect: schemas are enforced strictly.
    strict: Option<bool>,
}

/// Exactly one of them.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StructuredOutputs {
    /// A JSON schema.
    json: Option<HashMap<String, Value>>,
    /// Any JSON object.
    json_object: Option<bool>,
    /// A regular expression for the whole text.
    regex: Option<String>,
    /// One of these texts.
    #[schema(min_items = 1, max_items = 1024)]
    choice: Option<Vec<Text>>,
    /// In llguidance's variant of Lark.
    grammar: Option<String>,
}

/// Body of `/tokenize`: a prompt, or the fields of a chat.
#[derive(Deserialize, ToSchema)]
#[serde(untagged)]
pub enum TokenizeBody {
    /// A prompt.
    Prompt(TokenizePrompt),
    /// A chat.
    Chat(TokenizeChat),
}

/// See [`TokenizeBody`].
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenizePrompt {
    /// A served name.
    model: Option<String>,
    /// The text.
    prompt: String,
    /// Add the tokens that the tokenizer puts around a text; true unless given.
    add_special_tokens: Option<bool>,
    /// Tell the tokens' texts.
    return_token_strs: Option<bool>,
}

/// See [`TokenizeBody`].
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenizeChat {
    /// A served name.
    model: Option<String>,
    #[serde(flatten)]
    chat: ChatFields,
    /// Tell the tokens' texts.
    return_token_strs: Option<bool>,
}

/// Body of `/detokenize`.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DetokenizeBody {
    /// A served name.
    model: Option<String>,
    /// Token ids.
    tokens: Vec<TokenId>,
}

/// Body of `/v1/experts/rebalance`.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RebalanceBody {
    /// Say what would be done, and do nothing.
    dry_run: Option<bool>,
    /// Experts of a layer that may move, at most; all that help when absent. Not with the policy eplb.
    #[schema(minimum = 1, maximum = 16777216)]
    max_transfers: Option<i64>,
    /// Who plans; the server's --rebalance-policy when absent.
    policy: Option<RebalancePolicy>,
}

/// A placement policy that looks at load.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum RebalancePolicy {
    /// moeyard's own.
    Moeyard,
    /// DeepSeek's, from scratch each time.
    Eplb,
}

/// A placement file: all of its fields, or SGLang's, the map alone.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PlacementBody {
    /// Of the format: 1.
    version: Option<u32>,
    /// Expert-parallel ranks.
    ranks: Option<u32>,
    /// Slots of a rank in each layer.
    slots_per_rank: Option<u32>,
    /// Absolute indices of the MoE layers, ascending.
    layer_ids: Option<Vec<u32>>,
    /// The expert of each slot, rank-major, for each MoE layer; -1 is an empty slot.
    physical_to_logical_map: Vec<Vec<i32>>,
}
