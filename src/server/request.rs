//! `/v1/completions` as asked: parsed, every value inside its range, nothing ignored.

use super::error::ApiError;
use super::fields::{Fields, Neutral, Unsupported, typed};
use super::id::random_u64;
use crate::engine::request::Sampling;

/// Tokens generated when the client does not say: OpenAI's default.
pub const DEFAULT_MAX_TOKENS: usize = 16;
/// Most prompts of one request.
const MAX_PROMPTS: usize = 1024;
/// Most stop strings, as OpenAI has it.
const MAX_STOPS: usize = 4;
/// Longest stop string in bytes: so much text can be held back while it may still match.
const MAX_STOP_BYTES: usize = 1024;
/// Most `stop_token_ids`; each generated token is compared with all of them.
const MAX_STOP_TOKENS: usize = 128;
/// Most alternatives per token.
const MAX_LOGPROBS: i64 = 20;

/// Fields of OpenAI and vLLM that do not work here yet.
const UNSUPPORTED: &[Unsupported] = &[
    Unsupported { name: "n", neutral: Neutral::Number(1.0) },
    Unsupported { name: "best_of", neutral: Neutral::Number(1.0) },
    Unsupported { name: "echo", neutral: Neutral::Bool(false) },
    Unsupported { name: "suffix", neutral: Neutral::Empty },
    Unsupported { name: "logit_bias", neutral: Neutral::Empty },
    Unsupported { name: "presence_penalty", neutral: Neutral::Number(0.0) },
    Unsupported { name: "frequency_penalty", neutral: Neutral::Number(0.0) },
    Unsupported { name: "repetition_penalty", neutral: Neutral::Number(1.0) },
    Unsupported { name: "length_penalty", neutral: Neutral::Number(1.0) },
    Unsupported { name: "min_p", neutral: Neutral::Number(0.0) },
    Unsupported { name: "min_tokens", neutral: Neutral::Number(0.0) },
    Unsupported { name: "include_stop_str_in_output", neutral: Neutral::Bool(false) },
    Unsupported { name: "skip_special_tokens", neutral: Neutral::Bool(true) },
    Unsupported { name: "spaces_between_special_tokens", neutral: Neutral::Bool(true) },
    Unsupported { name: "use_beam_search", neutral: Neutral::Bool(false) },
    Unsupported { name: "return_token_ids", neutral: Neutral::Bool(false) },
    Unsupported { name: "return_tokens_as_token_ids", neutral: Neutral::Bool(false) },
    Unsupported { name: "routed_experts", neutral: Neutral::Bool(false) },
    Unsupported { name: "prompt_logprobs", neutral: Neutral::Null },
    Unsupported { name: "truncate_prompt_tokens", neutral: Neutral::Null },
    Unsupported { name: "priority", neutral: Neutral::Number(0.0) },
    Unsupported { name: "request_id", neutral: Neutral::Null },
    Unsupported { name: "cache_salt", neutral: Neutral::Null },
    Unsupported { name: "allowed_token_ids", neutral: Neutral::Null },
    Unsupported { name: "bad_words", neutral: Neutral::Empty },
    Unsupported { name: "response_format", neutral: Neutral::Null },
    Unsupported { name: "structured_outputs", neutral: Neutral::Null },
    Unsupported { name: "guided_json", neutral: Neutral::Null },
    Unsupported { name: "guided_regex", neutral: Neutral::Null },
    Unsupported { name: "guided_choice", neutral: Neutral::Null },
    Unsupported { name: "guided_grammar", neutral: Neutral::Null },
    Unsupported { name: "stream_interval", neutral: Neutral::Number(1.0) },
];

/// Fields inside `stream_options` that do not work here yet.
const UNSUPPORTED_STREAM_OPTIONS: &[Unsupported] = &[
    Unsupported { name: "continuous_usage_stats", neutral: Neutral::Bool(false) },
    Unsupported { name: "include_obfuscation", neutral: Neutral::Bool(false) },
];

/// Sampling parameters of requests that do not give them: generation_config.json's, where it has them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplingDefaults {
    /// See [`Sampling::temperature`].
    pub temperature: f32,
    /// See [`Sampling::top_p`].
    pub top_p: f32,
    /// See [`Sampling::top_k`].
    pub top_k: usize,
}

impl Default for SamplingDefaults {
    /// OpenAI's defaults.
    fn default() -> Self {
        SamplingDefaults { temperature: 1.0, top_p: 1.0, top_k: 0 }
    }
}

/// A valid request for completions. Whether it fits the model is checked when it is submitted.
#[derive(Debug, Clone, PartialEq)]
pub struct CompletionRequest {
    /// The name asked for; `None` takes the served model.
    pub model: Option<String>,
    /// What to continue.
    pub prompts: Prompts,
    /// `None` was not given: [`DEFAULT_MAX_TOKENS`], or what the context leaves.
    pub max_tokens: Option<usize>,
    /// With the defaults filled in and a seed drawn where none was given.
    pub sampling: Sampling,
    /// Strings that end the text.
    pub stop: Vec<String>,
    /// Tokens that end the text besides EOS.
    pub stop_token_ids: Vec<u32>,
    /// EOS does not end the text.
    pub ignore_eos: bool,
    /// Log-probability of each token and of this many best ones.
    pub logprobs: Option<usize>,
    /// Encode with the tokens the tokenizer puts around a text (BOS).
    pub add_special_tokens: bool,
    /// Answer as server-sent events.
    pub stream: bool,
    /// End the stream with a chunk that has the usage.
    pub include_usage: bool,
}

/// The four forms of `prompt`; the single ones are lists of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompts {
    /// Texts, none empty.
    Texts(Vec<String>),
    /// Token ids, no list empty.
    Tokens(Vec<Vec<u32>>),
}

impl Default for Prompts {
    /// None at all, which is what a request has once its prompts were taken out.
    fn default() -> Self {
        Prompts::Tokens(Vec::new())
    }
}

impl CompletionRequest {
    /// Parses a request body.
    ///
    /// # Errors
    /// 400 that names the field, the limit and the value.
    pub fn parse(body: &[u8], defaults: &SamplingDefaults) -> Result<Self, ApiError> {
        let mut fields = Fields::parse(body)?;
        fields.take::<String>("user", "a string")?;
        let stream = fields.boolean("stream")?.unwrap_or(false);
        let request = CompletionRequest {
            model: fields.take("model", "a string")?,
            prompts: prompts(&mut fields)?,
            max_tokens: fields.integer("max_tokens", 1, u32::MAX.into())?.map(|n| n as usize),
            sampling: sampling(&mut fields, defaults)?,
            stop: stops(&mut fields)?,
            stop_token_ids: stop_tokens(&mut fields)?,
            ignore_eos: fields.boolean("ignore_eos")?.unwrap_or(false),
            logprobs: fields.integer("logprobs", 0, MAX_LOGPROBS)?.map(|n| n as usize),
            add_special_tokens: fields.boolean("add_special_tokens")?.unwrap_or(true),
            stream,
            include_usage: include_usage(&mut fields, stream)?,
        };
        fields.finish(UNSUPPORTED)?;
        Ok(request)
    }
}

fn prompts(fields: &mut Fields<'_>) -> Result<Prompts, ApiError> {
    let expected = "a string, a list of strings, a list of token ids or a list of such lists";
    let Some(raw) = fields.raw("prompt") else {
        return Err(ApiError::bad_param("prompt", format!("`prompt` is required: {expected}.")));
    };
    // The first two characters tell the forms apart, which an untagged enum could only do by buffering the whole.
    let mut start = raw.chars().filter(|c| !c.is_ascii_whitespace());
    let prompts = match (start.next(), start.next()) {
        (Some('['), Some('"')) => Prompts::Texts(typed("prompt", raw, expected)?),
        (Some('['), Some('[')) => Prompts::Tokens(typed("prompt", raw, expected)?),
        (Some('['), _) => Prompts::Tokens(vec![typed("prompt", raw, expected)?]),
        _ => Prompts::Texts(vec![typed("prompt", raw, expected)?]),
    };
    let (count, empty) = match &prompts {
        Prompts::Texts(texts) => (texts.len(), texts.iter().position(String::is_empty)),
        Prompts::Tokens(lists) => (lists.len(), lists.iter().position(Vec::is_empty)),
    };
    if count > MAX_PROMPTS {
        let message = format!("`prompt` may be a list of at most {MAX_PROMPTS} prompts, got {count}.");
        return Err(ApiError::bad_param("prompt", message));
    }
    match empty {
        Some(at) => {
            Err(ApiError::bad_param("prompt", format!("`prompt` must not be empty, but prompt {at} is.")))
        }
        None => Ok(prompts),
    }
}

fn sampling(fields: &mut Fields<'_>, defaults: &SamplingDefaults) -> Result<Sampling, ApiError> {
    let temperature = fields.number("temperature", "between 0 and 2", |t| (0.0..=2.0).contains(&t))?;
    let top_p = fields.number("top_p", "above 0 and at most 1", |p| p > 0.0 && p <= 1.0)?;
    let top_k = fields.integer("top_k", -1, u32::MAX.into())?;
    let seed = fields.integer("seed", i64::MIN, i64::MAX)?;
    Ok(Sampling {
        temperature: temperature.map_or(defaults.temperature, |t| t as f32),
        // A probability too small for f32 still keeps the best token.
        top_p: top_p.map_or(defaults.top_p, |p| (p as f32).max(f32::MIN_POSITIVE)),
        // -1 and 0 both mean "off".
        top_k: top_k.map_or(defaults.top_k, |k| k.max(0) as usize),
        seed: seed.map_or_else(random_u64, i64::cast_unsigned),
    })
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

fn stop_tokens(fields: &mut Fields<'_>) -> Result<Vec<u32>, ApiError> {
    let ids: Vec<u32> = fields.take("stop_token_ids", "a list of token ids")?.unwrap_or_default();
    if ids.len() > MAX_STOP_TOKENS {
        let message = format!("`stop_token_ids` may hold at most {MAX_STOP_TOKENS} ids, got {}.", ids.len());
        return Err(ApiError::bad_param("stop_token_ids", message));
    }
    Ok(ids)
}

fn include_usage(fields: &mut Fields<'_>, stream: bool) -> Result<bool, ApiError> {
    let Some(mut options) = fields.object("stream_options")? else { return Ok(false) };
    if !stream {
        let message = "`stream_options` is only allowed with `stream`: true.";
        return Err(ApiError::bad_param("stream_options", message));
    }
    let include = options.boolean("include_usage")?.unwrap_or(false);
    options.finish(UNSUPPORTED_STREAM_OPTIONS)?;
    Ok(include)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<CompletionRequest, ApiError> {
        CompletionRequest::parse(json.as_bytes(), &SamplingDefaults::default())
    }

    #[test]
    fn the_four_forms_of_a_prompt() {
        let texts = |list: &[&str]| Prompts::Texts(list.iter().map(|s| s.to_string()).collect());
        for (prompt, expected) in [
            (r#""hi""#, texts(&["hi"])),
            (r#"[ "a", "b" ]"#, texts(&["a", "b"])),
            ("[1, 2]", Prompts::Tokens(vec![vec![1, 2]])),
            ("[ [1], [2, 3] ]", Prompts::Tokens(vec![vec![1], vec![2, 3]])),
        ] {
            assert_eq!(parse(&format!("{{\"prompt\": {prompt}}}")).expect(prompt).prompts, expected);
        }
    }

    #[test]
    fn defaults_come_from_the_request_then_the_checkpoint_then_openai() {
        let checkpoint = SamplingDefaults { temperature: 0.8, top_p: 0.95, top_k: 40 };
        let request = CompletionRequest::parse(br#"{"prompt": "x", "top_p": 0.5}"#, &checkpoint).unwrap();
        assert_eq!(request.sampling.temperature, 0.8);
        assert_eq!(request.sampling.top_p, 0.5);
        assert_eq!(request.sampling.top_k, 40);
        assert_eq!(request.max_tokens, None);
        let request = parse(r#"{"prompt": "x", "top_k": -1, "seed": -1}"#).unwrap();
        assert_eq!(request.sampling, Sampling { temperature: 1.0, top_p: 1.0, top_k: 0, seed: u64::MAX });
        let drawn = |_| parse(r#"{"prompt": "x"}"#).unwrap().sampling.seed;
        assert_ne!(drawn(0), drawn(1));
    }

    #[test]
    fn a_refusal_names_its_field() {
        for (fields, param) in [
            (r#""prompt": null"#, "prompt"),
            (r#""prompt": """#, "prompt"),
            (r#""prompt": []"#, "prompt"),
            (r#""prompt": [[]]"#, "prompt"),
            (r#""prompt": ["a", ""]"#, "prompt"),
            (r#""prompt": ["a", 1]"#, "prompt"),
            (r#""prompt": [-1]"#, "prompt"),
            (r#""prompt": [1.5]"#, "prompt"),
            (r#""prompt": {"a": 1}"#, "prompt"),
            (r#""model": 3"#, "model"),
            (r#""user": 3"#, "user"),
            (r#""max_tokens": 0"#, "max_tokens"),
            (r#""max_tokens": -1"#, "max_tokens"),
            (r#""max_tokens": "16""#, "max_tokens"),
            (r#""max_tokens": 99999999999"#, "max_tokens"),
            (r#""temperature": -0.1"#, "temperature"),
            (r#""temperature": 2.01"#, "temperature"),
            (r#""top_p": 0"#, "top_p"),
            (r#""top_p": 1.1"#, "top_p"),
            (r#""top_k": -2"#, "top_k"),
            (r#""top_k": 1.5"#, "top_k"),
            (r#""seed": 1e3"#, "seed"),
            (r#""seed": 9223372036854775808"#, "seed"),
            (r#""n": 2"#, "n"),
            (r#""n": 0"#, "n"),
            (r#""best_of": 2"#, "best_of"),
            (r#""echo": true"#, "echo"),
            (r#""suffix": "x""#, "suffix"),
            (r#""logprobs": 21"#, "logprobs"),
            (r#""logprobs": -1"#, "logprobs"),
            (r#""logprobs": true"#, "logprobs"),
            (r#""stop": """#, "stop"),
            (r#""stop": ["a", ""]"#, "stop"),
            (r#""stop": ["a", "b", "c", "d", "e"]"#, "stop"),
            (r#""stop": [1]"#, "stop"),
            (r#""stop_token_ids": [-1]"#, "stop_token_ids"),
            (r#""stream": 1"#, "stream"),
            (r#""stream_options": {"include_usage": true}"#, "stream_options"),
            (r#""stream": true, "stream_options": {"include_usage": 1}"#, "stream_options.include_usage"),
            (r#""stream": true, "stream_options": {"what": 1}"#, "stream_options.what"),
            (r#""stream": true, "stream_options": []"#, "stream_options"),
            (r#""guided_json": {}"#, "guided_json"),
            (r#""logit_bias": {"5": 1}"#, "logit_bias"),
            (r#""messages": []"#, "messages"),
        ] {
            let prompt = if fields.contains("\"prompt\"") { "" } else { r#""prompt": "x", "# };
            let error = parse(&format!("{{{prompt}{fields}}}")).expect_err(fields);
            assert_eq!(error.param.as_deref(), Some(param), "{fields}: {}", error.message);
            assert!(error.message.contains(param), "{fields}: {}", error.message);
        }
        let long = format!(r#"{{"prompt": "x", "stop": "{}"}}"#, "y".repeat(2000));
        assert!(parse(&long).unwrap_err().message.contains("got 2000"));
        let many = format!(r#"{{"prompt": [{}"x"]}}"#, r#""x","#.repeat(1024));
        assert!(parse(&many).unwrap_err().message.contains("got 1025"));
        let many = format!(r#"{{"prompt": "x", "stop_token_ids": [{}0]}}"#, "0,".repeat(200));
        assert!(parse(&many).unwrap_err().message.contains("got 201"));
    }

    #[test]
    fn values_that_change_nothing_are_taken() {
        let json = r#"{"model": "m", "prompt": "x", "n": 1, "best_of": 1, "echo": false, "suffix": "", "logit_bias": {},
            "presence_penalty": 0, "frequency_penalty": 0.0, "user": "u", "stop": null, "max_tokens": null,
            "repetition_penalty": 1.0, "stream": true, "stream_options": {"include_usage": true}, "logprobs": 0,
            "top_p": 1e-60, "ignore_eos": true, "stop_token_ids": [3], "add_special_tokens": false}"#;
        let request = parse(json).unwrap();
        assert!(request.include_usage && request.ignore_eos && !request.add_special_tokens);
        assert_eq!(request.logprobs, Some(0));
        assert!(request.sampling.top_p > 0.0);
        assert_eq!(request.stop_token_ids, [3]);
    }
}
