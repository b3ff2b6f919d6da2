//! `/v1/completions` as asked: parsed, every value inside its range, nothing ignored.

use super::error::ApiError;
use super::fields::{Fields, Neutral, Unsupported, Whole, typed};
use super::generation::{Generation, MAX_LOGPROBS, SamplingDefaults};
use super::structured::{self, Asked};

/// Tokens generated when the client does not say: OpenAI's default.
pub const DEFAULT_MAX_TOKENS: usize = 16;
/// Most prompts of one request.
const MAX_PROMPTS: usize = 1024;

/// Fields of OpenAI and vLLM's completions that do not work here.
const UNSUPPORTED: &[Unsupported] = &[Unsupported { name: "suffix", neutral: Neutral::Empty }];

/// A valid request for completions. Whether it fits the model is checked when it is submitted.
#[derive(Debug, Clone, PartialEq)]
pub struct CompletionRequest {
    /// The name asked for; `None` takes the served model.
    pub model: Option<String>,
    /// What to continue.
    pub prompts: Prompts,
    /// `None` was not given: [`DEFAULT_MAX_TOKENS`], or what the context leaves.
    pub max_tokens: Option<usize>,
    /// How.
    pub generation: Generation,
    /// Log-probability of each token and of this many best ones.
    pub logprobs: Option<usize>,
    /// The text begins with the prompt, and so do its log-probabilities.
    pub echo: bool,
    /// Rules of the text.
    pub structured: Option<Asked>,
    /// Encode with the tokens the tokenizer puts around a text (BOS).
    pub add_special_tokens: bool,
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
        let echo = fields.boolean("echo")?.unwrap_or(false);
        let least = if echo { 0 } else { 1 };
        let structured = structured::take(&mut fields)?;
        let request = CompletionRequest {
            structured,
            model: fields.take("model", "a string")?,
            prompts: prompts(&mut fields)?,
            max_tokens: fields.integer("max_tokens", least, u32::MAX.into())?.map(|n| n as usize),
            generation: Generation::take(&mut fields, defaults)?,
            logprobs: fields.integer("logprobs", 0, MAX_LOGPROBS)?.map(|n| n as usize),
            echo,
            add_special_tokens: fields.boolean("add_special_tokens")?.unwrap_or(true),
        };
        let n = request.generation.n;
        if let Some(best_of) = fields.integer("best_of", 1, i64::MAX)?.filter(|&best_of| best_of != n as i64)
        {
            let message = format!("`best_of` must equal `n`, which is {n}, got {best_of}.");
            return Err(ApiError::bad_param("best_of", message));
        }
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
        (Some('['), Some('[')) => {
            let lists: Vec<Vec<Whole<u32>>> = typed("prompt", raw, expected)?;
            Prompts::Tokens(lists.into_iter().map(ids).collect())
        }
        (Some('['), _) => Prompts::Tokens(vec![ids(typed("prompt", raw, expected)?)]),
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

fn ids(list: Vec<Whole<u32>>) -> Vec<u32> {
    list.into_iter().map(|Whole(id)| id).collect()
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
            (r#""max_tokens": 0"#, "max_tokens"),
            (r#""max_tokens": -1, "echo": true"#, "max_tokens"),
            (r#""max_tokens": "16""#, "max_tokens"),
            (r#""max_tokens": 99999999999"#, "max_tokens"),
            (r#""n": 0"#, "n"),
            (r#""best_of": 2"#, "best_of"),
            (r#""best_of": 1, "n": 2"#, "best_of"),
            (r#""echo": 1"#, "echo"),
            (r#""suffix": "x""#, "suffix"),
            (r#""logprobs": 21"#, "logprobs"),
            (r#""logprobs": -1"#, "logprobs"),
            (r#""logprobs": true"#, "logprobs"),
            (r#""messages": []"#, "messages"),
        ] {
            let prompt = if fields.contains("\"prompt\"") { "" } else { r#""prompt": "x", "# };
            let error = parse(&format!("{{{prompt}{fields}}}")).expect_err(fields);
            assert_eq!(error.param.as_deref(), Some(param), "{fields}: {}", error.message);
            assert!(error.message.contains(param), "{fields}: {}", error.message);
        }
        let many = format!(r#"{{"prompt": [{}"x"]}}"#, r#""x","#.repeat(1024));
        assert!(parse(&many).unwrap_err().message.contains("got 1025"));
    }

    #[test]
    fn values_that_change_nothing_are_taken() {
        let json = r#"{"model": "m", "prompt": "x", "n": 1, "best_of": 1, "echo": true, "suffix": "", "logit_bias": {},
            "presence_penalty": 0, "frequency_penalty": 0.0, "user": "u", "stop": null, "max_tokens": 0,
            "repetition_penalty": 1.0, "use_beam_search": false, "logprobs": 0, "add_special_tokens": false}"#;
        let request = parse(json).unwrap();
        assert!(request.echo && !request.add_special_tokens);
        assert_eq!((request.max_tokens, request.logprobs), (Some(0), Some(0)));
        assert!(parse(r#"{"prompt": "x", "n": 3, "best_of": 3}"#).is_ok());
    }
}
