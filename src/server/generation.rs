//! The fields of completions and of chat alike: how text is generated, when it ends, and what is told about it.

use std::fmt;
use std::sync::Arc;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use super::error::{ApiError, clip};
use super::fields::{Fields, Neutral, Unsupported, Whole, typed};
use super::id::random_u64;
use crate::engine::request::Sampling;
use crate::tokenizer::Tokenizer;

/// Most choices per prompt.
const MAX_CHOICES: i64 = 128;
/// Most stop strings, as OpenAI has it.
const MAX_STOPS: usize = 4;
/// Longest stop string in bytes: so much text can be held back while it may still match.
const MAX_STOP_BYTES: usize = 1024;
/// Most `stop_token_ids`; each generated token is compared with all of them.
const MAX_STOP_TOKENS: usize = 128;
/// Most alternatives per token.
pub const MAX_LOGPROBS: i64 = 20;
/// Most tokens in `logit_bias`.
const MAX_BIASED_TOKENS: usize = 4096;
/// Most `allowed_token_ids`.
const MAX_ALLOWED_TOKENS: usize = 1 << 18;
/// Most `bad_words`, each at most this long in bytes.
const MAX_BAD_WORDS: usize = 256;
const MAX_BAD_WORD_BYTES: usize = 256;
/// Longest `cache_salt` in bytes.
const MAX_CACHE_SALT: usize = 1024;
/// Longest `request_id` in characters.
const MAX_REQUEST_ID: usize = 128;

/// Fields of OpenAI and vLLM that do not work here, for both endpoints.
const UNSUPPORTED: &[Unsupported] = &[
    Unsupported { name: "use_beam_search", neutral: Neutral::Bool(false) },
    Unsupported { name: "length_penalty", neutral: Neutral::Number(1.0) },
    Unsupported { name: "guided_json", neutral: Neutral::Null },
    Unsupported { name: "guided_regex", neutral: Neutral::Null },
    Unsupported { name: "guided_choice", neutral: Neutral::Null },
    Unsupported { name: "guided_grammar", neutral: Neutral::Null },
    Unsupported { name: "guided_decoding_backend", neutral: Neutral::Null },
    Unsupported { name: "guided_whitespace_pattern", neutral: Neutral::Null },
    Unsupported { name: "logits_processors", neutral: Neutral::Empty },
    Unsupported { name: "prompt_embeds", neutral: Neutral::Null },
    Unsupported { name: "kv_transfer_params", neutral: Neutral::Empty },
    Unsupported { name: "vllm_xargs", neutral: Neutral::Empty },
];

/// Fields inside `stream_options` that do not work here.
const UNSUPPORTED_STREAM_OPTIONS: &[Unsupported] =
    &[Unsupported { name: "include_obfuscation", neutral: Neutral::Bool(false) }];

/// Sampling parameters of requests that do not give them: generation_config.json's, where it has them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplingDefaults {
    /// See [`Sampling::temperature`].
    pub temperature: f32,
    /// See [`Sampling::top_p`].
    pub top_p: f32,
    /// See [`Sampling::top_k`].
    pub top_k: usize,
    /// See [`Sampling::min_p`].
    pub min_p: f32,
    /// See [`Sampling::repetition_penalty`].
    pub repetition_penalty: f32,
}

impl Default for SamplingDefaults {
    /// OpenAI's defaults.
    fn default() -> Self {
        SamplingDefaults { temperature: 1.0, top_p: 1.0, top_k: 0, min_p: 0.0, repetition_penalty: 1.0 }
    }
}

/// How the texts of one request are generated and told. Whether that fits the model is checked when they are submitted.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// Choices per prompt.
    pub n: usize,
    /// With the defaults filled in; seed and bad words are for [`Generation::sampling_of`] to add.
    sampling: Sampling,
    /// The client's own.
    seed: Option<u64>,
    bad_words: Vec<String>,
    /// Strings that end the text.
    pub stop: Vec<String>,
    /// What ended the text, string or token, is part of it.
    pub include_stop: bool,
    /// Tokens that end the text besides EOS.
    pub stop_token_ids: Vec<u32>,
    /// EOS does not end the text.
    pub ignore_eos: bool,
    /// Log-probability of each prompt token but the first and of this many best ones.
    pub prompt_logprobs: Option<usize>,
    /// Special tokens are no part of the text.
    pub skip_special_tokens: bool,
    /// Special tokens in the text are separated as others are.
    spaces_between_special_tokens: bool,
    /// Tell the ids of prompt and text.
    pub return_token_ids: bool,
    /// Log-probabilities name tokens by id: "token_id:7".
    pub tokens_as_ids: bool,
    /// Keep only the last tokens of a prompt.
    pub truncate: Option<Truncation>,
    /// Tell the experts that every token was sent to.
    pub routed_experts: bool,
    /// Lower goes first.
    pub priority: i32,
    /// Prefixes are shared only among requests with the same salt.
    pub cache_salt: Option<Arc<str>>,
    /// The client's name for this request, part of the answer's id.
    pub request_id: Option<String>,
    /// Answer as server-sent events, and how; `None` answers with one object.
    pub stream: Option<StreamOptions>,
}

/// `truncate_prompt_tokens`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Truncation {
    /// Keep this many tokens.
    Keep(usize),
    /// Keep what the context has room for.
    ToContext,
}

/// How a stream is cut into chunks and what they say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamOptions {
    /// End with a chunk that has the usage.
    pub include_usage: bool,
    /// Every chunk says the usage so far.
    pub continuous_usage: bool,
    /// Tokens per chunk, after the first, which is sent at once.
    pub interval: usize,
}

impl Generation {
    /// Takes the shared fields off a request.
    ///
    /// # Errors
    /// 400 that names the field, the limit and the value.
    pub fn take(fields: &mut Fields<'_>, defaults: &SamplingDefaults) -> Result<Self, ApiError> {
        fields.refuse(UNSUPPORTED)?;
        fields.take::<String>("user", "a string")?;
        let stream = stream_options(fields)?;
        let generation = Generation {
            n: fields.integer("n", 1, MAX_CHOICES)?.unwrap_or(1) as usize,
            sampling: sampling(fields, defaults)?,
            seed: fields.integer("seed", i64::MIN, i64::MAX)?.map(i64::cast_unsigned),
            bad_words: bad_words(fields)?,
            stop: stops(fields)?,
            include_stop: fields.boolean("include_stop_str_in_output")?.unwrap_or(false),
            stop_token_ids: token_ids(fields, "stop_token_ids", MAX_STOP_TOKENS)?.unwrap_or_default(),
            ignore_eos: fields.boolean("ignore_eos")?.unwrap_or(false),
            prompt_logprobs: fields.integer("prompt_logprobs", 0, MAX_LOGPROBS)?.map(|n| n as usize),
            skip_special_tokens: fields.boolean("skip_special_tokens")?.unwrap_or(true),
            spaces_between_special_tokens: fields.boolean("spaces_between_special_tokens")?.unwrap_or(true),
            return_token_ids: fields.boolean("return_token_ids")?.unwrap_or(false),
            tokens_as_ids: fields.boolean("return_tokens_as_token_ids")?.unwrap_or(false),
            truncate: truncation(fields)?,
            routed_experts: fields.boolean("routed_experts")?.unwrap_or(false),
            priority: fields.integer("priority", i32::MIN.into(), i32::MAX.into())?.unwrap_or(0) as i32,
            cache_salt: cache_salt(fields)?,
            request_id: request_id(fields)?,
            stream,
        };
        if generation.n > 1 && generation.sampling.temperature == 0.0 {
            let n = generation.n;
            let message =
                format!("`n` must be 1 with temperature 0, whose choices are all the same, got {n}.");
            return Err(ApiError::bad_param("n", message));
        }
        if generation.prompt_logprobs.is_some() && generation.stream.is_some() {
            let message = "`prompt_logprobs` is not available with `stream`: true.";
            return Err(ApiError::bad_param("prompt_logprobs", message));
        }
        Ok(generation)
    }

    /// How the next token of choice `k` is chosen. A seed of the client's gives each choice a stream of its own; without
    /// one, every sequence draws another.
    pub fn sampling_of(&self, k: usize, bad_words: &[Vec<u32>]) -> Sampling {
        Sampling {
            seed: self.seed.map_or_else(random_u64, |seed| seed.wrapping_add(k as u64)),
            bad_words: bad_words.to_vec(),
            ..self.sampling.clone()
        }
    }

    /// Refuses what this tokenizer cannot do.
    pub fn check(&self, tokenizer: &Tokenizer) -> Result<(), ApiError> {
        // Most decoders put nothing between tokens, so that both values mean the same text.
        if self.spaces_between_special_tokens || self.skip_special_tokens || !tokenizer.separates_tokens() {
            return Ok(());
        }
        let message = "`spaces_between_special_tokens` must be true for this model, whose tokenizer puts spaces between \
                       all tokens.";
        Err(ApiError::bad_param("spaces_between_special_tokens", message))
    }

    /// Tokens of the text's first part that none of the stops may end.
    pub fn min_tokens(&self) -> usize {
        self.sampling.min_tokens
    }

    /// The bad words as tokens: as they stand at the start of a text, inside one, and as they were given. (vLLM lets a word
    /// inside a text pass whose tokens there are more or fewer.)
    ///
    /// # Errors
    /// When a word has no tokens, or cannot be tokenised.
    pub fn bad_word_tokens(&self, tokenizer: &Tokenizer) -> Result<Vec<Vec<u32>>, ApiError> {
        let mut all = Vec::new();
        for word in &self.bad_words {
            let bare = word.trim_start();
            for form in [bare, &format!(" {bare}"), word] {
                let tokens = tokenizer.encode(form, false)?;
                if tokens.is_empty() {
                    let message = format!("`bad_words` has {:?}, which is no token.", clip(word));
                    return Err(ApiError::bad_param("bad_words", message));
                }
                if !all.contains(&tokens) {
                    all.push(tokens);
                }
            }
        }
        Ok(all)
    }
}

fn sampling(fields: &mut Fields<'_>, defaults: &SamplingDefaults) -> Result<Sampling, ApiError> {
    let temperature = fields.number("temperature", "between 0 and 2", |t| (0.0..=2.0).contains(&t))?;
    let top_p = fields.number("top_p", "above 0 and at most 1", |p| p > 0.0 && p <= 1.0)?;
    let top_k = fields.integer("top_k", -1, u32::MAX.into())?;
    let min_p = fields.number("min_p", "between 0 and 1", |p| (0.0..=1.0).contains(&p))?;
    let repetition =
        fields.number("repetition_penalty", "above 0 and at most 1e30", |r| r > 0.0 && r <= 1e30)?;
    let mut penalty = |name| fields.number(name, "between -2 and 2", |p| (-2.0..=2.0).contains(&p));
    let (presence, frequency) = (penalty("presence_penalty")?, penalty("frequency_penalty")?);
    Ok(Sampling {
        temperature: temperature.map_or(defaults.temperature, |t| t as f32),
        // A number too small for f32 still keeps the best token.
        top_p: top_p.map_or(defaults.top_p, |p| (p as f32).max(f32::MIN_POSITIVE)),
        // -1 and 0 both mean "off".
        top_k: top_k.map_or(defaults.top_k, |k| k.max(0) as usize),
        min_p: min_p.map_or(defaults.min_p, |p| p as f32),
        repetition_penalty: repetition
            .map_or(defaults.repetition_penalty, |r| (r as f32).max(f32::MIN_POSITIVE)),
        presence_penalty: presence.unwrap_or(0.0) as f32,
        frequency_penalty: frequency.unwrap_or(0.0) as f32,
        logit_bias: logit_bias(fields)?,
        allowed_tokens: allowed_tokens(fields)?,
        bad_words: Vec::new(),
        min_tokens: fields.integer("min_tokens", 0, u32::MAX.into())?.unwrap_or(0) as usize,
        seed: 0,
    })
}

fn logit_bias(fields: &mut Fields<'_>) -> Result<Vec<(u32, f32)>, ApiError> {
    let refused = |message: String| Err(ApiError::bad_param("logit_bias", message));
    let expected = "an object from token ids to numbers between -100 and 100";
    let Some(Pairs(pairs)) = fields.take("logit_bias", expected)? else { return Ok(Vec::new()) };
    let mut biases = Vec::with_capacity(pairs.len());
    for (key, bias) in pairs {
        let Ok(token) = key.parse::<u32>() else {
            return refused(format!("A key of `logit_bias` must be a token id, got {:?}.", clip(&key)));
        };
        if !(-100.0..=100.0).contains(&bias) {
            return refused(format!(
                "A value of `logit_bias` must be between -100 and 100, got {bias} for {token}."
            ));
        }
        biases.push((token, bias as f32));
    }
    biases.sort_unstable_by_key(|&(token, _)| token);
    match biases.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        Some(pair) => refused(format!("`logit_bias` has the token {} twice.", pair[0].0)),
        None => Ok(biases),
    }
}

fn allowed_tokens(fields: &mut Fields<'_>) -> Result<Option<Arc<[u32]>>, ApiError> {
    let Some(mut ids) = token_ids(fields, "allowed_token_ids", MAX_ALLOWED_TOKENS)? else { return Ok(None) };
    if ids.is_empty() {
        return Err(ApiError::bad_param("allowed_token_ids", "`allowed_token_ids` must not be empty."));
    }
    ids.sort_unstable();
    ids.dedup();
    Ok(Some(ids.into()))
}

fn bad_words(fields: &mut Fields<'_>) -> Result<Vec<String>, ApiError> {
    let words: Vec<String> = fields.take("bad_words", "a list of strings")?.unwrap_or_default();
    let refused = |message: String| Err(ApiError::bad_param("bad_words", message));
    if words.len() > MAX_BAD_WORDS {
        return refused(format!("`bad_words` may hold at most {MAX_BAD_WORDS} words, got {}.", words.len()));
    }
    match words.iter().find(|word| word.trim_start().is_empty() || word.len() > MAX_BAD_WORD_BYTES) {
        Some(word) => refused(format!(
            "A word of `bad_words` must have 1 to {MAX_BAD_WORD_BYTES} bytes, not all of them spaces, got {}.",
            word.len()
        )),
        None => Ok(words),
    }
}

fn stops(fields: &mut Fields<'_>) -> Result<Vec<String>, ApiError> {
    let expected = "a string or a list of strings";
    let stops: Vec<String> = match fields.raw("stop") {
        None => Vec::new(),
        Some(raw) if raw.starts_with('[') => typed("stop", raw, expected)?,
        Some(raw) => vec![typed("stop", raw, expected)?],
    };
    let refused = |message: String| Err(ApiError::bad_param("stop", message));
    if stops.len() > MAX_STOPS {
        return refused(format!("`stop` may be at most {MAX_STOPS} strings, got {}.", stops.len()));
    }
    if stops.iter().any(String::is_empty) {
        return refused("`stop` must not hold an empty string.".into());
    }
    if let Some(long) = stops.iter().map(String::len).find(|&bytes| bytes > MAX_STOP_BYTES) {
        return refused(format!("A string of `stop` may have at most {MAX_STOP_BYTES} bytes, got {long}."));
    }
    Ok(stops)
}

fn token_ids(fields: &mut Fields<'_>, name: &str, most: usize) -> Result<Option<Vec<u32>>, ApiError> {
    let ids: Option<Vec<Whole<u32>>> = fields.take(name, "a list of token ids")?;
    let ids: Option<Vec<u32>> = ids.map(|ids| ids.into_iter().map(|Whole(id)| id).collect());
    if let Some(count) = ids.as_ref().map(Vec::len).filter(|&count| count > most) {
        let message = format!("`{name}` may hold at most {most} ids, got {count}.");
        return Err(ApiError::bad_param(name, message));
    }
    Ok(ids)
}

fn truncation(fields: &mut Fields<'_>) -> Result<Option<Truncation>, ApiError> {
    match fields.integer("truncate_prompt_tokens", -1, u32::MAX.into())? {
        None => Ok(None),
        Some(-1) => Ok(Some(Truncation::ToContext)),
        Some(0) => {
            let message = "`truncate_prompt_tokens` must keep at least 1 token, or be -1, got 0.";
            Err(ApiError::bad_param("truncate_prompt_tokens", message))
        }
        Some(keep) => Ok(Some(Truncation::Keep(keep as usize))),
    }
}

fn cache_salt(fields: &mut Fields<'_>) -> Result<Option<Arc<str>>, ApiError> {
    let salt: Option<String> = fields.take("cache_salt", "a string")?;
    match salt.as_ref().filter(|salt| !(1..=MAX_CACHE_SALT).contains(&salt.len())) {
        Some(salt) => {
            let message = format!("`cache_salt` must have 1 to {MAX_CACHE_SALT} bytes, got {}.", salt.len());
            Err(ApiError::bad_param("cache_salt", message))
        }
        None => Ok(salt.map(Into::into)),
    }
}

fn request_id(fields: &mut Fields<'_>) -> Result<Option<String>, ApiError> {
    let id: Option<String> = fields.take("request_id", "a string")?;
    let plain =
        |id: &String| (1..=MAX_REQUEST_ID).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic());
    match id.as_ref().filter(|id| !plain(id)) {
        Some(id) => {
            let message = format!(
                "`request_id` must be 1 to {MAX_REQUEST_ID} printable ASCII characters without spaces, got {:?}.",
                clip(id)
            );
            Err(ApiError::bad_param("request_id", message))
        }
        None => Ok(id),
    }
}

fn stream_options(fields: &mut Fields<'_>) -> Result<Option<StreamOptions>, ApiError> {
    let stream = fields.boolean("stream")?.unwrap_or(false);
    let interval = fields.integer("stream_interval", 1, u32::MAX.into())?;
    let options = fields.object("stream_options")?;
    if !stream {
        for (name, given) in [("stream_options", options.is_some()), ("stream_interval", interval.is_some())]
        {
            if given {
                let message = format!("`{name}` is only allowed with `stream`: true.");
                return Err(ApiError::bad_param(name, message));
            }
        }
        return Ok(None);
    }
    let mut stream = StreamOptions {
        include_usage: false,
        continuous_usage: false,
        interval: interval.unwrap_or(1) as usize,
    };
    if let Some(mut options) = options {
        stream.include_usage = options.boolean("include_usage")?.unwrap_or(false);
        let continuous = options.boolean("continuous_usage_stats")?.unwrap_or(false);
        stream.continuous_usage = continuous && stream.include_usage;
        options.finish(UNSUPPORTED_STREAM_OPTIONS)?;
    }
    Ok(Some(stream))
}

/// Keys and numbers of an object, as many as `logit_bias` may have: reading ends at the first one too many.
struct Pairs(Vec<(String, f64)>);

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Pairs;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of numbers")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    if pairs.len() == MAX_BIASED_TOKENS {
                        return Err(A::Error::custom(format_args!("more than {MAX_BIASED_TOKENS} tokens")));
                    }
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(Collect)
    }
}

#[cfg(test)]
mod tests;
