//! Special tokens: their names in the tokenizer files, their ids, and whether a BOS or EOS is added.

use super::files::Object;
use super::guard::guarded;
use crate::error::Problems;
use serde_json::Value;
use tokenizers::processors::template::TemplateProcessing;

/// The names that transformers gives to special tokens and to the variables of chat templates.
const NAMES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// The special tokens a checkpoint names.
#[derive(Debug, Default)]
pub(super) struct SpecialTokens {
    /// (`bos_token`, `<s>`) and so on, only those that have a value: the variables of chat templates.
    pub(super) named: Vec<(&'static str, String)>,
    pub(super) bos_id: Option<u32>,
    pub(super) eos_id: Option<u32>,
}

impl SpecialTokens {
    /// Names from tokenizer_config.json, then from special_tokens_map.json. A token is a string or an object with
    /// `content`.
    pub(super) fn read(config: &Object, map: &Object) -> SpecialTokens {
        let text = |value: &Value| match value {
            Value::String(text) => Some(text.clone()),
            Value::Object(token) => token.get("content").and_then(Value::as_str).map(str::to_string),
            _ => None,
        };
        let named = NAMES.into_iter().filter_map(|name| {
            let token = config.get(name).and_then(text).or_else(|| map.get(name).and_then(text))?;
            Some((name, token))
        });
        SpecialTokens { named: named.collect(), bos_id: None, eos_id: None }
    }

    /// Looks up the ids of BOS and EOS; one that is named but not in the vocabulary is a problem.
    pub(super) fn resolve(
        mut self,
        tokenizer: &tokenizers::Tokenizer,
        problems: &mut Problems,
    ) -> SpecialTokens {
        let mut id = |name: &str| {
            let token = self.get(name)?;
            let id = tokenizer.token_to_id(token);
            if id.is_none() {
                let expected = "a token of the vocabulary in tokenizer.json";
                problems.add("tokenizer_config.json", name.to_string(), expected, format!("{token:?}"));
            }
            id
        };
        let (bos_id, eos_id) = (id("bos_token"), id("eos_token"));
        (self.bos_id, self.eos_id) = (bos_id, eos_id);
        self
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.named.iter().find(|(n, _)| *n == name).map(|(_, token)| token.as_str())
    }

    /// Llama-class checkpoints say with `add_bos_token` and `add_eos_token` what is added, whatever the post-processor
    /// in tokenizer.json does (transformers' `LlamaTokenizerFast.update_post_processor`; published DeepSeek files rely
    /// on it). For other classes the post-processor alone decides.
    pub(super) fn apply_bos_eos(
        &self,
        config: &Object,
        tokenizer: &mut tokenizers::Tokenizer,
        problems: &mut Problems,
    ) {
        let class = config.get("tokenizer_class").and_then(Value::as_str).unwrap_or("");
        let (bos, eos) = (config.get("add_bos_token"), config.get("add_eos_token"));
        if class.strip_suffix("Fast").unwrap_or(class) != "LlamaTokenizer" || (bos.is_none() && eos.is_none())
        {
            return;
        }
        let wanted = |switch: Option<&Value>, default| switch.and_then(Value::as_bool).unwrap_or(default);
        let bos = self.get("bos_token").zip(self.bos_id).filter(|_| wanted(bos, true));
        let eos = self.get("eos_token").zip(self.eos_id).filter(|_| wanted(eos, false));
        let expected: Vec<u32> = bos.iter().chain(&eos).map(|&(_, id)| id).collect();
        let replaced = guarded(|| {
            if tokenizer.encode_fast("", true)?.get_ids() == expected {
                return Ok(());
            }
            let pieces = |kind: &str| {
                let special = |token: Option<(&str, u32)>| token.map(|(text, _)| text.to_string());
                special(bos).into_iter().chain([kind.to_string()]).chain(special(eos)).collect::<Vec<_>>()
            };
            let processor = TemplateProcessing::builder()
                .try_single(pieces("$A"))?
                .special_tokens(
                    bos.iter().chain(&eos).map(|&(text, id)| (text.to_string(), id)).collect::<Vec<_>>(),
                )
                .build()?;
            tokenizer.with_post_processor(Some(processor));
            Ok(())
        });
        if let Err(why) = replaced {
            problems.add(
                "tokenizer_config.json",
                "add_bos_token".to_string(),
                "tokens that can be added",
                why,
            );
        }
    }
}
