//! The files of a checkpoint that make a tokenizer.

use super::chat::ChatTemplate;
use super::guard::guarded;
use crate::error::Problems;
use serde_json::{Map, Value};

/// A parsed JSON object.
pub(super) type Object = Map<String, Value>;

/// What to do when a checkpoint comes without `tokenizer.json`.
const CONVERSION: &str = "tokenizer.json (make it with transformers: \
     AutoTokenizer.from_pretrained(DIR, use_fast=True).save_pretrained(DIR))";

/// Contents of a checkpoint's tokenizer files, where it has them.
#[derive(Debug, Clone, Copy, Default)]
pub struct TokenizerFiles<'a> {
    /// The checkpoint folder as given, for messages.
    pub checkpoint: &'a str,
    /// `tokenizer.json`; needed.
    pub tokenizer_json: Option<&'a [u8]>,
    /// `tokenizer_config.json`: special tokens, BOS and EOS switches, often the chat template.
    pub tokenizer_config: Option<&'a [u8]>,
    /// `special_tokens_map.json`: special tokens that the file above does not name.
    pub special_tokens_map: Option<&'a [u8]>,
    /// `chat_template.jinja`; goes before the one in `tokenizer_config.json`.
    pub chat_template: Option<&'a [u8]>,
}

impl TokenizerFiles<'_> {
    /// `tokenizer_config.json`; empty where absent.
    pub(super) fn config(&self, problems: &mut Problems) -> Object {
        object("tokenizer_config.json", self.tokenizer_config, problems)
    }

    /// `special_tokens_map.json`; empty where absent.
    pub(super) fn special_tokens(&self, problems: &mut Problems) -> Object {
        object("special_tokens_map.json", self.special_tokens_map, problems)
    }

    /// `tokenizer.json` without truncation and padding, which would silently change prompts; `None` after noting a
    /// problem.
    pub(super) fn tokenizer(&self, problems: &mut Problems) -> Option<tokenizers::Tokenizer> {
        let Some(bytes) = self.tokenizer_json else {
            problems.add("tokenizer.json", None, CONVERSION, "no such file");
            return None;
        };
        let loaded = guarded(|| {
            let mut tokenizer = tokenizers::Tokenizer::from_bytes(bytes)?;
            tokenizer.with_truncation(None)?;
            tokenizer.with_padding(None);
            // A post-processor that names a token it does not define fails here rather than in a request.
            tokenizer.encode_fast("a", true)?;
            Ok(tokenizer)
        });
        loaded
            .map_err(|why| problems.add("tokenizer.json", None, "a tokenizer of the tokenizers library", why))
            .ok()
    }

    /// The default chat template: `chat_template.jinja`, else `chat_template` of `tokenizer_config.json`, which is a
    /// string or a list of `{name, template}`. `None` without a template or after noting a problem.
    pub(super) fn chat_template(&self, config: &Object, problems: &mut Problems) -> Option<ChatTemplate> {
        let (file, item, source) = match self.chat_template {
            Some(bytes) => match std::str::from_utf8(bytes) {
                Ok(source) => ("chat_template.jinja", None, source),
                Err(e) => {
                    problems.add("chat_template.jinja", None, "UTF-8 text", e.to_string());
                    return None;
                }
            },
            None => {
                let item = Some("chat_template".to_string());
                match default_template(config) {
                    Ok(source) => ("tokenizer_config.json", item, source?),
                    Err(found) => {
                        let expected = "a string, or a list of {name, template} with one named default";
                        problems.add("tokenizer_config.json", item, expected, found);
                        return None;
                    }
                }
            }
        };
        ChatTemplate::compile(source).map_err(|why| problems.add(file, item, "a Jinja template", why)).ok()
    }
}

/// Ids at or above this are refused whatever the embedding says: a table of all ids is kept, and published
/// vocabularies end below 2^19.
const MAX_IDS: usize = 1 << 24;

/// One more than the highest token id, which must fit the embedding; `None` after noting a problem.
pub(super) fn check_vocabulary(
    tokenizer: &tokenizers::Tokenizer,
    embedding_rows: usize,
    problems: &mut Problems,
) -> Option<usize> {
    let Some((highest, token)) = tokenizer.get_vocab(true).into_iter().map(|(token, id)| (id, token)).max()
    else {
        problems.add(
            "tokenizer.json",
            "model.vocab".to_string(),
            "at least one token",
            "an empty vocabulary",
        );
        return None;
    };
    if highest as usize >= embedding_rows.min(MAX_IDS) {
        let expected =
            format!("token ids below {MAX_IDS} and below the {embedding_rows} rows of the embedding");
        let found = format!("{} tokens up to id {highest} ({token:?})", tokenizer.get_vocab_size(true));
        problems.add("tokenizer.json", "model.vocab".to_string(), expected, found);
        return None;
    }
    Some(highest as usize + 1)
}

/// The default entry of `chat_template` in `tokenizer_config.json`; the error says what stands there instead.
fn default_template(config: &Object) -> Result<Option<&str>, String> {
    match config.get("chat_template") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(source)) => Ok(Some(source)),
        Some(Value::Array(list)) => {
            let default =
                list.iter().find(|entry| entry.get("name").and_then(Value::as_str) == Some("default"));
            match default.and_then(|entry| entry.get("template")?.as_str()) {
                Some(source) => Ok(Some(source)),
                None => {
                    let names: Vec<_> = list.iter().filter_map(|entry| entry.get("name")?.as_str()).collect();
                    Err(format!("{} templates named {names:?}", list.len()))
                }
            }
        }
        Some(other) => Err(other.to_string().chars().take(80).collect()),
    }
}

fn object(file: &str, bytes: Option<&[u8]>, problems: &mut Problems) -> Object {
    match bytes.map(serde_json::from_slice::<Object>) {
        None => Object::new(),
        Some(Ok(object)) => object,
        Some(Err(e)) => {
            problems.add(file, None, "a JSON object", e.to_string());
            Object::new()
        }
    }
}
