//! Text that must follow a grammar: which tokens may come next.
//!
//! Grammars are compiled and followed by `llguidance` (an Earley parser over lexemes with derivative-based regular
//! expressions, walked along a trie of the vocabulary's bytes). Its limits are set here, so that no grammar a client
//! sends costs more than milliseconds per token or megabytes per sequence.

use super::Tokenizer;
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory, regex_to_lark};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

/// Compiled grammars kept for the next request with the same one; the least recently used goes first.
const CACHED: usize = 32;
/// Tokens, beyond those that closing takes from the start, at which a text that must end begins to close.
const CLOSING_MARGIN: usize = 12;
/// No text takes more tokens to close, as far as is looked.
const MAX_CLOSING: usize = 256;
/// Longest source in bytes.
const MAX_SOURCE_BYTES: usize = 256 << 10;
/// States of one sequence's lexer, about 2 KiB each.
const MAX_LEXER_STATES: usize = 20_000;
/// White space of a JSON text is fixed, as Python writes it: small models would go on with it for ever.
const JSON_SEPARATORS: (&str, &str) = (", ", ": ");

/// What a text is to follow.
#[derive(Debug, Clone, PartialEq)]
pub enum GrammarSource {
    /// A JSON text that this schema admits.
    JsonSchema(Value),
    /// A text that this regular expression (syntax of the `regex` crate) matches as a whole.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A grammar in llguidance's variant of Lark.
    Lark(String),
}

impl GrammarSource {
    /// Any JSON object.
    pub fn json_object() -> Self {
        GrammarSource::JsonSchema(json!({"type": "object"}))
    }

    /// As the right side of a Lark rule; `None` for a grammar, which has rules of its own.
    ///
    /// # Errors
    /// For a schema with `x-guidance`, which would change the rules made here.
    pub fn rule(&self) -> Result<Option<String>, String> {
        Ok(Some(match self {
            GrammarSource::JsonSchema(schema) => json_rule(schema)?,
            GrammarSource::Regex(pattern) => format!("/{}/", regex_to_lark(pattern, "")),
            GrammarSource::Choice(texts) => {
                let texts: Vec<String> = texts.iter().map(|text| lark_string(text)).collect();
                texts.join(" | ")
            }
            GrammarSource::Lark(_) => return Ok(None),
        }))
    }

    /// As Lark.
    ///
    /// # Errors
    /// As [`Self::rule`].
    pub fn to_lark(&self) -> Result<String, String> {
        Ok(match (self, self.rule()?) {
            (GrammarSource::Lark(source), _) => source.clone(),
            (_, rule) => format!("start: {}\n", rule.unwrap_or_default()),
        })
    }
}

/// A Lark expression for JSON that `schema` admits.
///
/// # Errors
/// For a schema with `x-guidance`.
pub fn json_rule(schema: &Value) -> Result<String, String> {
    let mut schema = match schema {
        Value::Bool(true) => json!({}),
        other => other.clone(),
    };
    let Some(object) = schema.as_object_mut() else { return Err("a JSON schema must be an object".into()) };
    if object.contains_key("x-guidance") {
        return Err("the key `x-guidance` is not for requests".into());
    }
    object.insert("x-guidance".into(), json!({"whitespace_flexible": false, "item_separator": JSON_SEPARATORS.0, "key_separator": JSON_SEPARATORS.1}));
    Ok(format!("%json {schema}"))
}

/// A Lark string literal: JSON's, but that it may not hold the control character U+007F.
pub fn lark_string(text: &str) -> String {
    serde_json::to_string(text).expect("a string is JSON").replace('\u{7f}', "\\u007f")
}

/// Compiles grammars for one vocabulary.
pub struct Grammars {
    factory: ParserFactory,
    /// Tokens that end a text.
    eos: Arc<[u32]>,
    /// How soon each token leads to the end of a text: low ones first. `[vocab]`.
    haste: Arc<[u16]>,
    /// Most recently used first. A std lock: held for look-ups, never while compiling.
    cache: Mutex<Vec<([u8; 32], Grammar)>>,
}

impl Grammars {
    /// Prepares the vocabulary, which takes up to a second for large ones. `eos` are the tokens that end a text.
    ///
    /// # Errors
    /// When none of `eos` is in the vocabulary: then no text could end where its grammar does.
    pub fn new(tokenizer: &Tokenizer, eos: &[u32]) -> Result<Grammars, String> {
        let size = tokenizer.vocab_size();
        let eos: Arc<[u32]> = eos.iter().copied().filter(|&id| (id as usize) < size).collect();
        let Some(&first) = eos.first() else { return Err("this model has no token that ends a text".into()) };
        let words: Vec<Vec<u8>> = (0..size as u32).map(|id| word(tokenizer, id)).collect();
        let mut haste: Vec<u16> = words.iter().map(|word| haste(word)).collect();
        eos.iter().for_each(|&id| haste[id as usize] = 0);
        let trie = TokTrie::from(&TokRxInfo::new(size as u32, first), &words).with_eos_tokens(&eos);
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let capabilities = InferenceCapabilities::default();
        let slices = llguidance::earley::SlicedBiasComputer::general_slices();
        let mut factory =
            ParserFactory::new(&environment, capabilities, &slices).map_err(|e| e.to_string())?;
        factory.quiet();
        let limits = factory.limits_mut();
        limits.max_lexer_states = MAX_LEXER_STATES;
        limits.verbose_errors = false;
        Ok(Grammars { factory, eos, haste: haste.into(), cache: Mutex::new(Vec::new()) })
    }

    /// Compiles a grammar, or takes it from the cache. Takes up to some hundred milliseconds.
    ///
    /// # Errors
    /// What is wrong with it, in at most a few lines.
    pub fn compile(&self, source: &GrammarSource) -> Result<Grammar, String> {
        let lark = source.to_lark()?;
        if lark.len() > MAX_SOURCE_BYTES {
            return Err(format!(
                "it has {} bytes, and no more than {MAX_SOURCE_BYTES} are allowed",
                lark.len()
            ));
        }
        let key: [u8; 32] = Sha256::digest(&lark).into();
        if let Some(known) = self.cached(&key) {
            return Ok(known);
        }
        let grammar = TopLevelGrammar::from_lark(lark);
        let compiled = llguidance::panic_utils::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let mut matcher = Matcher::new(self.factory.create_parser(grammar));
            // The first mask does what the compiler left for later, and finds grammars without any text.
            matcher.compute_mask()?;
            Ok(matcher)
        }));
        let matcher = compiled.map_err(|error| first_lines(&error.to_string()))?;
        let grammar = Grammar {
            closing: closing_tokens(matcher.deep_clone(), &self.haste),
            matcher: Arc::new(Mutex::new(matcher)),
            eos: Arc::clone(&self.eos),
            haste: Arc::clone(&self.haste),
        };
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        cache.insert(0, (key, grammar.clone()));
        cache.truncate(CACHED);
        Ok(grammar)
    }

    fn cached(&self, key: &[u8; 32]) -> Option<Grammar> {
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        let at = cache.iter().position(|(known, _)| known == key)?;
        let entry = cache.remove(at);
        let grammar = entry.1.clone();
        cache.insert(0, entry);
        Some(grammar)
    }
}

/// Bytes of a token as grammars see them: special tokens are set apart, so that no text can stand for one.
fn word(tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
    let bytes = tokenizer.token_bytes(id);
    match tokenizer.is_special(id) && !bytes.is_empty() {
        true => [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat(),
        false => bytes.to_vec(),
    }
}

/// What matters of a library's message; the rest repeats the grammar.
fn first_lines(message: &str) -> String {
    let text: String = message.split("<state>").next().unwrap_or_default().chars().take(300).collect();
    text.trim().to_owned()
}

/// A compiled grammar. Clones share it.
#[derive(Clone)]
pub struct Grammar {
    /// At its start; only copied from.
    matcher: Arc<Mutex<Matcher>>,
    eos: Arc<[u32]>,
    haste: Arc<[u16]>,
    /// Tokens of a short text, its end included.
    closing: usize,
}

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Grammar")
    }
}

impl Grammar {
    /// A text that begins to follow the grammar where `start` says. It shares nothing with other texts, so that none can
    /// use up another's limits. When few of its `max_tokens` are left it is led to its end by a short way, so that a text
    /// is whole wherever its grammar has one of that length.
    pub fn follow(&self, start: GrammarStart, max_tokens: usize) -> GrammarState {
        let matcher = self.matcher.lock().unwrap_or_else(PoisonError::into_inner).deep_clone();
        GrammarState {
            eos: Arc::clone(&self.eos),
            haste: Arc::clone(&self.haste),
            close_at: max_tokens.saturating_sub(self.closing + CLOSING_MARGIN + start.after.len()),
            start,
            progress: Mutex::new(Progress { matcher, seen: 0, free: None }),
        }
    }
}

/// Where a text begins to follow its grammar.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GrammarStart {
    /// After this run of tokens, which ends the model's thoughts; empty begins at once.
    pub after: Vec<u32>,
    /// Thoughts only come when the text begins with this token; else it follows the grammar from its start.
    pub unless_begun_by: Option<u32>,
}

/// The grammar of one text.
pub struct GrammarState {
    eos: Arc<[u32]>,
    haste: Arc<[u16]>,
    /// Tokens after which the text is led to its end.
    close_at: usize,
    start: GrammarStart,
    /// A std lock: one thread at a time asks, so nobody waits.
    progress: Mutex<Progress>,
}

struct Progress {
    matcher: Matcher,
    /// Tokens of the text looked at.
    seen: usize,
    /// Tokens before the grammar begins, once known.
    free: Option<usize>,
}

impl fmt::Debug for GrammarState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GrammarState({:?})", self.start)
    }
}

impl GrammarState {
    /// Clears, in `allowed`, the bit of every token that must not follow `generated`: bit `id % 32` of word `id / 32`. Only
    /// tokens that end a text are left where the grammar is complete. `generated` grows from call to call.
    ///
    /// # Errors
    /// When a token was generated that the grammar does not have, or following it exceeds a limit.
    pub fn restrict(&self, generated: &[u32], allowed: &mut [u32]) -> Result<(), String> {
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        if !progress.find_start(&self.start, generated) {
            self.eos.iter().for_each(|&id| set(allowed, id, false));
            if generated.len() >= self.close_at {
                allowed.fill(0);
                set(allowed, self.start.next_after(generated), true);
            }
            return Ok(());
        }
        let fresh = &generated[progress.seen..];
        let consumed = progress.matcher.consume_tokens(fresh);
        progress.seen = generated.len();
        let mask = consumed.and_then(|()| progress.matcher.compute_mask_or_eos());
        let mask = mask.map_err(|error| first_lines(&error.to_string()))?;
        let words = mask.as_slice();
        for (at, word) in allowed.iter_mut().enumerate() {
            *word &= words.get(at).copied().unwrap_or(0);
        }
        if generated.is_empty()
            && let Some(opener) = self.start.unless_begun_by
        {
            set(allowed, opener, true);
        }
        if generated.len() >= self.close_at {
            keep_hastiest(allowed, &self.haste);
        }
        Ok(())
    }
}

impl GrammarStart {
    /// The token that comes next in the run that ends thoughts, as far as the text has come with it.
    fn next_after(&self, generated: &[u32]) -> u32 {
        let begun = (0..self.after.len()).rev().find(|&n| generated.ends_with(&self.after[..n]));
        self.after[begun.expect("every text ends with nothing")]
    }
}

/// How soon a token leads to the end of a text, judged by its bytes: quotes and closing marks first, then what parts values, then
/// values, of which longer pieces come sooner; opening marks and white space last.
fn haste(word: &[u8]) -> u16 {
    let class = match word {
        // First of all: braces are plain characters inside a string.
        [b'"'] => 1,
        [b'}' | b']'] => 2,
        [b',' | b':'] => 3,
        [digit] if digit.is_ascii_digit() => 4,
        [] | [b' ' | b'\n' | b'\r' | b'\t', ..] => 8,
        [b'{' | b'['] => 7,
        [first, ..] if first.is_ascii_alphanumeric() => 5,
        _ => 6,
    };
    class << 8 | (255 - word.len().min(255) as u16)
}

/// Leaves only those of the allowed tokens that lead to the end soonest.
fn keep_hastiest(allowed: &mut [u32], haste: &[u16]) {
    let is_set = |allowed: &[u32], id: usize| allowed[id / 32] >> (id % 32) & 1 == 1;
    let known = haste.len().min(allowed.len() * 32);
    let best = (0..known).filter(|&id| is_set(allowed, id)).map(|id| haste[id]).min();
    for (id, &rank) in haste[..known].iter().enumerate() {
        if Some(rank) > best {
            set(allowed, id as u32, false);
        }
    }
}

/// Tokens of a short text, its end included; [`MAX_CLOSING`] when none is found that is shorter.
fn closing_tokens(mut matcher: Matcher, haste: &[u16]) -> usize {
    let mut allowed = vec![0; haste.len().div_ceil(32)];
    for count in 1..MAX_CLOSING {
        let Ok(mask) = matcher.compute_mask_or_eos() else { return MAX_CLOSING };
        let words = mask.as_slice();
        allowed.iter_mut().enumerate().for_each(|(at, word)| *word = words.get(at).copied().unwrap_or(0));
        keep_hastiest(&mut allowed, haste);
        let Some(id) = (0..haste.len()).find(|&id| allowed[id / 32] >> (id % 32) & 1 == 1) else {
            return MAX_CLOSING;
        };
        if haste[id] == 0 {
            return count;
        }
        if matcher.consume_token(id as u32).is_err() {
            return MAX_CLOSING;
        }
    }
    MAX_CLOSING
}

impl Progress {
    /// Whether the grammar has begun; then `seen` is past what comes before it.
    fn find_start(&mut self, start: &GrammarStart, generated: &[u32]) -> bool {
        if self.free.is_some() {
            return true;
        }
        let thinks = match (start.unless_begun_by, generated.first()) {
            (Some(opener), Some(&first)) => first == opener,
            // The first token decides.
            (Some(_), None) => return true,
            (None, _) => true,
        };
        let at = if start.after.is_empty() || !thinks {
            Some(0)
        } else {
            // A run may have begun in what was looked at before.
            let from = self.seen.saturating_sub(start.after.len() - 1);
            let runs = generated[from..].windows(start.after.len());
            runs.enumerate().find(|(_, run)| *run == start.after).map(|(at, _)| from + at + start.after.len())
        };
        self.free = at;
        self.seen = at.unwrap_or(generated.len());
        at.is_some()
    }
}

fn set(allowed: &mut [u32], id: u32, value: bool) {
    if let Some(word) = allowed.get_mut(id as usize / 32) {
        let bit = 1 << (id % 32);
        *word = if value { *word | bit } else { *word & !bit };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::TokenizerFiles;

    const EOS: u32 = 1;

    fn tokenizer() -> Tokenizer {
        let files = TokenizerFiles {
            checkpoint: "demo-mixtral",
            tokenizer_json: Some(include_bytes!("../../models/demo-mixtral/tokenizer.json")),
            tokenizer_config: Some(include_bytes!("../../models/demo-mixtral/tokenizer_config.json")),
            ..TokenizerFiles::default()
        };
        Tokenizer::from_parts(&files, 4096).unwrap()
    }

    fn allowed(state: &GrammarState, generated: &[u32]) -> Vec<u32> {
        let mut bits = vec![u32::MAX; 4096 / 32];
        state.restrict(generated, &mut bits).unwrap();
        (0..4096).filter(|id| bits[*id as usize / 32] >> (id % 32) & 1 == 1).collect()
    }

    /// A text made of allowed tokens, chosen by `choose`, up to its end.
    fn walk(tokenizer: &Tokenizer, state: &GrammarState, choose: impl Fn(&[u32]) -> u32) -> String {
        let mut tokens = Vec::new();
        loop {
            let allowed = allowed(state, &tokens);
            assert!(!allowed.is_empty(), "nothing may follow {:?}", tokenizer.decode(&tokens, true));
            let token = choose(&allowed);
            if token == EOS {
                let bytes: Vec<u8> =
                    tokens.iter().flat_map(|&token| tokenizer.token_bytes(token)).copied().collect();
                return String::from_utf8(bytes).unwrap();
            }
            tokens.push(token);
            assert!(tokens.len() < 3000, "no end");
        }
    }

    #[test]
    fn every_walk_through_a_grammar_follows_it() {
        let tokenizer = tokenizer();
        let grammars = Grammars::new(&tokenizer, &[EOS]).unwrap();
        let schema = json!({"type": "object", "additionalProperties": false, "required": ["name", "age", "mood"],
            "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 150},
                "mood": {"enum": ["kind", "sad"]}, "tags": {"type": "array", "maxItems": 2, "items": {"type": "boolean"}}}});
        type Holds = fn(&str) -> bool;
        let cases: [(GrammarSource, Holds); 4] = [
            (GrammarSource::JsonSchema(schema), |text| {
                let value: Value = serde_json::from_str(text).unwrap();
                value["age"].as_i64().is_some_and(|age| (0..=150).contains(&age))
                    && value["name"].is_string()
                    && ["kind", "sad"].contains(&value["mood"].as_str().unwrap())
            }),
            (GrammarSource::Regex("[0-9]{3}-(a|b)/\\?".into()), |text| {
                text.len() == 7 && text.ends_with("/?")
            }),
            (GrammarSource::Choice(vec!["yes".into(), "no \"way\" é\n\0\u{7f}\u{85}".into()]), |text| {
                text == "yes" || text == "no \"way\" é\n\0\u{7f}\u{85}"
            }),
            (GrammarSource::Lark("start: \"a\"+ b\nb: /x{2}/\n".into()), |text| text.ends_with("axx")),
        ];
        for (source, holds) in cases {
            let grammar = grammars.compile(&source).unwrap();
            for step in [1usize, 3, 7, 11, 29] {
                let state = grammar.follow(GrammarStart::default(), 100_000);
                let calls = std::cell::Cell::new(0);
                let text = walk(&tokenizer, &state, |allowed| {
                    calls.set(calls.get() + step);
                    // Ends when it may, after a while.
                    if calls.get() > 40 && allowed.contains(&EOS) {
                        EOS
                    } else {
                        allowed[calls.get() * 31 % allowed.len()]
                    }
                });
                assert!(holds(&text), "{source:?}: {text:?}");
            }
        }
    }

    /// A string without an end of its own, in an object within a list: the text is whole all the same.
    #[test]
    fn a_text_is_closed_before_its_tokens_run_out() {
        let tokenizer = tokenizer();
        let grammars = Grammars::new(&tokenizer, &[EOS]).unwrap();
        let schema = json!({"type": "object", "required": ["list", "last"], "additionalProperties": false, "properties": {
            "list": {"type": "array", "items": {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}},
            "last": {"type": "boolean"}}});
        let grammar = grammars.compile(&GrammarSource::JsonSchema(schema)).unwrap();
        for (step, max_tokens) in [(1usize, 60usize), (7, 100), (31, 200), (5, 400)] {
            let state = grammar.follow(GrammarStart::default(), max_tokens);
            let calls = std::cell::Cell::new(0);
            let text = walk(&tokenizer, &state, |allowed| {
                calls.set(calls.get() + 1);
                // Never ends by itself.
                let others: Vec<u32> =
                    allowed.iter().copied().filter(|&id| id != EOS || allowed.len() == 1).collect();
                others[calls.get() * step * 13 % others.len()]
            });
            assert!(calls.get() <= max_tokens, "{} tokens of {max_tokens}: {text}", calls.get());
            let value: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
            assert!(value["list"].is_array() && value["last"].is_boolean(), "{text}");
        }
        // Thoughts are ended in time too.
        let start = GrammarStart { after: vec![70, 71], unless_begun_by: None };
        let state = grammar.follow(start, 100);
        assert_eq!(allowed(&state, &[90; 99]), [70]);
        let begun = [&[90; 98][..], &[70]].concat();
        assert_eq!(allowed(&state, &begun), [71]);
    }

    #[test]
    fn thoughts_come_first_and_are_free() {
        let tokenizer = tokenizer();
        let grammars = Grammars::new(&tokenizer, &[EOS]).unwrap();
        let grammar = grammars.compile(&GrammarSource::Choice(vec!["yes".into()])).unwrap();
        let yes = allowed(&grammar.follow(GrammarStart::default(), 100_000), &[]);
        let free: Vec<u32> = (0..4096).filter(|&id| id != EOS).collect();

        let state = grammar.follow(GrammarStart { after: vec![70, 71], unless_begun_by: None }, 100_000);
        for generated in [&[][..], &[70], &[70, 70]] {
            assert_eq!(allowed(&state, generated), free, "{generated:?}");
        }
        assert_eq!(allowed(&state, &[70, 70, 71]), yes);

        let optional = GrammarStart { after: vec![71], unless_begun_by: Some(70) };
        let state = grammar.follow(optional.clone(), 100_000);
        let mut either = yes.clone();
        either.push(70);
        either.sort_unstable();
        assert_eq!(allowed(&state, &[]), either);
        assert_eq!(allowed(&state, &[70]), free);
        assert_eq!(allowed(&state, &[70, 90, 71]), yes);
        let state = grammar.follow(optional, 100_000);
        allowed(&state, &[]);
        let whole = tokenizer.token_id("yes");
        let first = whole.unwrap_or(yes[0]);
        assert!(!allowed(&state, &[first]).contains(&70));
    }

    #[test]
    fn bad_grammars_are_refused_in_few_words() {
        let grammars = Grammars::new(&tokenizer(), &[EOS]).unwrap();
        let deep = format!("{}a{}", "(".repeat(5000), ")".repeat(5000));
        for source in [
            GrammarSource::Regex("(".into()),
            GrammarSource::Regex("a(?=b)".into()),
            GrammarSource::Regex(deep),
            GrammarSource::Lark("start: missing".into()),
            GrammarSource::Lark("root ::= \"a\"".into()),
            GrammarSource::Lark("x".repeat(300 << 10)),
            GrammarSource::JsonSchema(json!({"type": "nonsense"})),
            GrammarSource::JsonSchema(json!({"type": "string", "pattern": "("})),
            GrammarSource::JsonSchema(json!({"$ref": "#/nowhere"})),
            GrammarSource::JsonSchema(json!({"type": "object", "x-guidance": {}})),
            GrammarSource::JsonSchema(json!({"allOf": [{"type": "string"}, {"type": "number"}]})),
            GrammarSource::JsonSchema(json!([])),
        ] {
            let why = grammars
                .compile(&source)
                .expect_err(&format!("{source:?}").chars().take(80).collect::<String>());
            assert!(!why.is_empty() && why.len() <= 1200 && !why.contains("panic"), "{why}");
        }
    }

    #[test]
    fn the_cache_is_bounded_and_an_old_grammar_still_compiles() {
        let grammars = Grammars::new(&tokenizer(), &[EOS]).unwrap();
        for i in 0..CACHED + 5 {
            grammars.compile(&GrammarSource::Choice(vec![format!("text {i}")])).unwrap();
        }
        assert_eq!(grammars.cache.lock().unwrap().len(), CACHED);
        assert!(grammars.compile(&GrammarSource::Choice(vec!["text 0".into()])).is_ok());
    }

    #[test]
    fn a_model_without_an_end_of_text_is_refused() {
        assert!(Grammars::new(&tokenizer(), &[]).is_err());
        assert!(Grammars::new(&tokenizer(), &[9999]).is_err());
    }
}
