//! What every token adds to a text, worked out once from the checkpoint's decoder.
//!
//! A decoder of `tokenizer.json` is a pipeline over the whole token list. The pipelines that language models use need
//! far less: each token has fixed bytes, and a few rules say how neighbours join. Compiling the pipeline to that makes
//! decoding a table look-up and streaming exact.

use super::guard::guarded;
use super::stream::LoneBytes;
use crate::error::Problems;
use std::collections::HashMap;
use tokenizers::{Decoder, DecoderWrapper};

/// The bytes of every token, and how they join.
pub(super) struct Pieces {
    /// Bytes of all tokens, id after id.
    bytes: Vec<u8>,
    tokens: Vec<Entry>,
    /// Tokens that differ when they come first in a text.
    first: HashMap<u32, Box<[u8]>>,
    pub(super) rules: Rules,
}

/// One id of the vocabulary; ids without a token have no bytes.
#[derive(Clone, Copy)]
struct Entry {
    /// End of its bytes; they start where the entry before ends.
    end: usize,
    known: bool,
    special: bool,
    joins_bytes: bool,
}

/// One token.
#[derive(Clone, Copy)]
pub(super) struct Piece<'a> {
    /// What it adds to a text. UTF-8 unless `joins_bytes`.
    pub(super) bytes: &'a [u8],
    /// A special token, dropped on demand.
    pub(super) special: bool,
    /// Its bytes may be part of a character that neighbours complete.
    pub(super) joins_bytes: bool,
}

/// How tokens join.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Rules {
    /// GPT-2's byte-to-character alphabet: every token is bytes. Else only `<0x..>` tokens may be.
    byte_level: bool,
    /// `<0x..>` tokens are bytes.
    byte_fallback: bool,
    /// No decoder at all: tokens are words, joined by spaces.
    pub(super) space_between: bool,
    /// Strip up to so many of this character from the start of the text.
    pub(super) strip_start: Option<(char, usize)>,
}

impl Rules {
    pub(super) fn lone_bytes(&self) -> LoneBytes {
        if self.byte_level { LoneBytes::OneForAll } else { LoneBytes::OneForEach }
    }
}

impl Pieces {
    /// Compiles the decoder of `tokenizer` for ids below `vocab_size`; `None` after noting a problem.
    pub(super) fn compile(
        tokenizer: &tokenizers::Tokenizer,
        vocab_size: usize,
        problems: &mut Problems,
    ) -> Option<Pieces> {
        let plan = match Plan::of(tokenizer.get_decoder()) {
            Ok(plan) => plan,
            Err(found) => {
                let expected =
                    "ByteLevel, or Replace, Metaspace and ByteFallback before Fuse and a leading Strip";
                problems.add("tokenizer.json", "decoder".to_string(), expected, found);
                return None;
            }
        };
        match guarded(|| Pieces::build(tokenizer, vocab_size, plan)) {
            Ok(pieces) => Some(pieces),
            Err(why) => {
                problems.add(
                    "tokenizer.json",
                    "decoder".to_string(),
                    "a decoder that decodes its vocabulary",
                    why,
                );
                None
            }
        }
    }

    fn build(tokenizer: &tokenizers::Tokenizer, vocab_size: usize, plan: Plan) -> tokenizers::Result<Pieces> {
        let written: Vec<Option<String>> =
            (0..vocab_size).map(|id| tokenizer.id_to_token(u32::try_from(id).ok()?)).collect();
        let inside = plan.decode_each(&written)?;
        let mut pieces = Pieces {
            bytes: Vec::new(),
            tokens: Vec::with_capacity(vocab_size),
            first: HashMap::new(),
            rules: plan.rules.clone(),
        };
        let added = tokenizer.get_added_vocabulary();
        let alphabet = byte_alphabet();
        for (token, text) in written.iter().zip(&inside) {
            let raw = token.as_deref().unwrap_or("");
            let byte = pieces.rules.byte_fallback.then(|| fallback_byte(raw)).flatten();
            match byte {
                Some(byte) => pieces.bytes.push(byte),
                None if pieces.rules.byte_level => pieces.bytes.extend(level_bytes(raw, &alphabet)),
                None => pieces.bytes.extend_from_slice(text.as_bytes()),
            }
            pieces.tokens.push(Entry {
                end: pieces.bytes.len(),
                known: token.is_some(),
                special: added.is_special_token(raw),
                joins_bytes: byte.is_some() || pieces.rules.byte_level,
            });
        }
        if plan.first_differs {
            for (id, token) in written.iter().enumerate() {
                let Some(token) = token else { continue };
                let text = plan.decode_first(token)?;
                if text.as_bytes() != inside[id].as_bytes() {
                    pieces.first.insert(id as u32, text.into_bytes().into());
                }
            }
        }
        Ok(pieces)
    }

    /// The token with this id, if the vocabulary has one.
    pub(super) fn get(&self, id: u32) -> Option<Piece<'_>> {
        let id = usize::try_from(id).ok()?;
        let entry = self.tokens.get(id).filter(|entry| entry.known)?;
        let start = if id == 0 { 0 } else { self.tokens[id - 1].end };
        let bytes = &self.bytes[start..entry.end];
        Some(Piece { bytes, special: entry.special, joins_bytes: entry.joins_bytes })
    }

    /// What a token adds when it comes first in a text, where that differs.
    pub(super) fn first_bytes(&self, id: u32) -> Option<&[u8]> {
        self.first.get(&id).map(|bytes| &**bytes)
    }

    /// One more than the highest id.
    pub(super) fn len(&self) -> usize {
        self.tokens.len()
    }
}

/// A decoder, taken apart.
struct Plan {
    rules: Rules,
    /// Stages that look at one token at a time.
    each: Vec<DecoderWrapper>,
    /// One of them treats the first token differently.
    first_differs: bool,
}

impl Plan {
    /// Takes a decoder apart; the error names the stage that has no place in a stream.
    fn of(decoder: Option<&DecoderWrapper>) -> Result<Plan, String> {
        let mut plan = Plan { rules: Rules::default(), each: Vec::new(), first_differs: false };
        let Some(decoder) = decoder else {
            plan.rules.space_between = true;
            return Ok(plan);
        };
        let mut stages = Vec::new();
        flatten(decoder, &mut stages);
        let mut fused = false;
        for (at, &stage) in stages.iter().enumerate() {
            let before = std::mem::replace(&mut fused, true);
            match stage {
                DecoderWrapper::ByteLevel(_) if at == 0 => plan.rules.byte_level = true,
                DecoderWrapper::Fuse(_) => {}
                DecoderWrapper::Strip(strip)
                    if before && strip.stop == 0 && plan.rules.strip_start.is_none() =>
                {
                    plan.rules.strip_start = Some((strip.content, strip.start));
                }
                DecoderWrapper::Replace(_) | DecoderWrapper::Metaspace(_) if !before => {
                    plan.first_differs |= matches!(stage, DecoderWrapper::Metaspace(_));
                    plan.each.push(stage.clone());
                    fused = false;
                }
                DecoderWrapper::ByteFallback(_) if !before => {
                    plan.rules.byte_fallback = true;
                    fused = false;
                }
                _ => return Err(describe(&stages, at)),
            }
        }
        Ok(plan)
    }

    /// What each token becomes inside a text, not first.
    fn decode_each(&self, written: &[Option<String>]) -> tokenizers::Result<Vec<String>> {
        let tokens = written.iter().map(|token| token.clone().unwrap_or_default());
        let mut list: Vec<String> = std::iter::once(String::new()).chain(tokens).collect();
        for stage in &self.each {
            list = stage.decode_chain(list)?;
        }
        list.remove(0);
        assert_eq!(list.len(), written.len(), "stages that look at one token keep the number of tokens");
        Ok(list)
    }

    /// What a token becomes at the start of a text.
    fn decode_first(&self, token: &str) -> tokenizers::Result<String> {
        let mut list = vec![token.to_string()];
        for stage in &self.each {
            list = stage.decode_chain(list)?;
        }
        Ok(list.concat())
    }
}

/// The stages of a decoder with nested sequences laid open.
fn flatten<'a>(decoder: &'a DecoderWrapper, stages: &mut Vec<&'a DecoderWrapper>) {
    match decoder {
        DecoderWrapper::Sequence(sequence) => {
            sequence.get_decoders().iter().for_each(|inner| flatten(inner, stages));
        }
        stage => stages.push(stage),
    }
}

/// "Strip as stage 2 of Replace, Strip".
fn describe(stages: &[&DecoderWrapper], at: usize) -> String {
    let name = |stage: &DecoderWrapper| {
        let debug = format!("{stage:?}");
        debug.split(|c: char| !c.is_alphanumeric()).next().unwrap_or("?").to_string()
    };
    let all: Vec<String> = stages.iter().map(|stage| name(stage)).collect();
    format!("{} as stage {} of {}", all[at], at + 1, all.join(", "))
}

/// The byte of a token written `<0xE2>`.
fn fallback_byte(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if hex.len() == 2 && hex.bytes().all(|c| c.is_ascii_hexdigit()) {
        u8::from_str_radix(hex, 16).ok()
    } else {
        None
    }
}

/// Bytes of a byte-level token; one with a character outside the alphabet (an added token) stands for itself.
fn level_bytes(token: &str, alphabet: &HashMap<char, u8>) -> Vec<u8> {
    let bytes: Option<Vec<u8>> = token.chars().map(|c| alphabet.get(&c).copied()).collect();
    bytes.unwrap_or_else(|| token.as_bytes().to_vec())
}

/// GPT-2's alphabet (`bytes_to_unicode` of its encoder.py): bytes that print stand for themselves, the others for the
/// characters from U+0100 on, in order.
fn byte_alphabet() -> HashMap<char, u8> {
    let prints = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let (visible, hidden): (Vec<u8>, Vec<u8>) = (0..=255).partition(prints);
    let moved = ('\u{100}'..).zip(hidden);
    visible.into_iter().map(|byte| (char::from(byte), byte)).chain(moved).collect()
}

#[cfg(test)]
mod tests {
    use super::super::{Detokenizer, Tokenizer, TokenizerFiles};
    use serde_json::{Value, json};

    /// A tokenizer of a few words with this decoder, ours and the library's.
    fn with_decoder(decoder: Value) -> (crate::Result<Tokenizer>, tokenizers::Tokenizer) {
        let words = ["▁", "▁▁", "▁a", "a▁b", "b", " ", "<0xE2>", "<0x82>", "<0xAC>", "<0xZZ>", "Ġ", "é", ""];
        let vocab: serde_json::Map<String, Value> =
            words.iter().enumerate().map(|(id, word)| (word.to_string(), json!(id * 2))).collect();
        let json = json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null,
            "post_processor": null, "decoder": decoder,
            "added_tokens": [{"id": 2, "content": "▁▁", "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true}],
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "b"},
        });
        let bytes = json.to_string().into_bytes();
        let files = TokenizerFiles { tokenizer_json: Some(&bytes), ..TokenizerFiles::default() };
        (Tokenizer::from_parts(&files, 64), tokenizers::Tokenizer::from_bytes(&bytes).unwrap())
    }

    /// Every list of up to three ids, gaps in the vocabulary included, against the library. The byte tokens are those of
    /// one character, so that no run of three holds both a good and a malformed one (see [`Detokenizer`]).
    fn check(decoder: Value) {
        let (ours, library) = with_decoder(decoder.clone());
        let ours = ours.unwrap();
        let n = ours.vocab_size() as u32 + 1;
        for code in 0..n * n * n {
            let list = [code % n, code / n % n, code / n / n];
            for (ids, skip) in
                [(&list[..], true), (&list[..], false), (&list[..2], true), (&list[..1], false)]
            {
                let expected = library.decode(ids, skip).unwrap();
                let mut stream = Detokenizer::new(&ours, skip);
                let text: String = ids.iter().map(|&id| stream.push(id)).collect();
                assert_eq!(text + &stream.finish(), expected, "{ids:?} skip {skip} {decoder}");
            }
        }
    }

    #[test]
    fn pipelines_equal_the_library() {
        let replace = json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "});
        let regex = json!({"type": "Replace", "pattern": {"Regex": "[ab]"}, "content": "xy"});
        let metaspace = |scheme: &str| json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": true});
        let strip = |start: usize| json!({"type": "Strip", "content": " ", "start": start, "stop": 0});
        let (bytes, fuse) = (json!({"type": "ByteFallback"}), json!({"type": "Fuse"}));
        let sequence = |decoders: &[&Value]| json!({"type": "Sequence", "decoders": decoders});
        check(Value::Null);
        check(
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}),
        );
        check(metaspace("always"));
        check(metaspace("never"));
        check(sequence(&[&replace, &bytes, &fuse, &strip(1)]));
        check(sequence(&[&sequence(&[&replace, &regex]), &fuse, &strip(2)]));
        check(sequence(&[&bytes, &fuse]));
        check(sequence(&[&metaspace("first"), &bytes, &fuse]));
    }

    #[test]
    fn pipelines_that_cannot_be_streamed_are_refused_by_name() {
        let refused = |decoder: Value, found: &str| {
            let message = with_decoder(decoder).0.err().expect("a refusal").to_string();
            assert!(message.contains(found), "{message}");
        };
        let strip = json!({"type": "Strip", "content": " ", "start": 1, "stop": 0});
        let fuse = json!({"type": "Fuse"});
        refused(
            json!({"type": "WordPiece", "prefix": "##", "cleanup": true}),
            "WordPiece as stage 1 of WordPiece",
        );
        refused(strip.clone(), "Strip as stage 1 of Strip");
        refused(
            json!({"type": "Sequence", "decoders": [fuse, strip, strip]}),
            "Strip as stage 3 of Fuse, Strip, Strip",
        );
        refused(
            json!({"type": "Sequence", "decoders": [fuse, {"type": "ByteFallback"}]}),
            "ByteFallback as stage 2",
        );
    }
}
