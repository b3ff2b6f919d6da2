//! Text to tokens and back: a checkpoint's `tokenizer.json`, its special tokens and its chat template.
//!
//! Encoding is the `tokenizers` crate's. Decoding is `pieces`: every token becomes bytes once, at load, so that whole
//! texts and streams ([`Detokenizer`]) go through the same few lines and agree by construction.

pub mod chat;
mod files;
pub mod grammar;
mod guard;
mod pieces;
mod pyjson;
mod pymethods;
mod special;
mod stop;
mod strftime;
mod stream;
pub mod turn;

pub use chat::{ChatError, ChatInput, ChatTemplate};
pub use files::TokenizerFiles;
pub use grammar::{Grammar, GrammarSource, GrammarStart, GrammarState, Grammars};
pub use stop::{Scan, StopMatcher};
pub use stream::Detokenizer;

use crate::error::{Error, Problems, Result};
use guard::guarded;
use pieces::Pieces;
use special::SpecialTokens;
use std::sync::Arc;

/// A checkpoint's tokenizer. Shared by reference or `Arc`; all methods take `&self`.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    pieces: Arc<Pieces>,
    special: SpecialTokens,
    chat_template: Option<ChatTemplate>,
}

impl Tokenizer {
    /// Builds the tokenizer of a model whose embedding has `embedding_rows` rows.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] with every problem found: no `tokenizer.json` (the message names the conversion step), a
    /// file that does not parse, a decoder that cannot be streamed, a token id at or above `embedding_rows`, a BOS or
    /// EOS token that the vocabulary lacks, a chat template with a syntax error. Fewer tokens than rows is fine: the
    /// surplus ids decode to nothing.
    pub fn from_parts(files: &TokenizerFiles<'_>, embedding_rows: usize) -> Result<Tokenizer> {
        let mut problems = Problems::new(files.checkpoint);
        let config = files.config(&mut problems);
        let chat_template = files.chat_template(&config, &mut problems);
        let special = SpecialTokens::read(&config, &files.special_tokens(&mut problems));
        let inner = files.tokenizer(&mut problems);
        let loaded = inner.and_then(|mut inner| {
            let vocab_size = files::check_vocabulary(&inner, embedding_rows, &mut problems)?;
            let special = special.resolve(&inner, &mut problems);
            special.apply_bos_eos(&config, &mut inner, &mut problems);
            let pieces = Pieces::compile(&inner, vocab_size, &mut problems)?;
            Some((inner, Arc::new(pieces), special))
        });
        problems.into_result()?;
        let (inner, pieces, special) = loaded.expect("a step that yields nothing notes a problem");
        Ok(Tokenizer { inner, pieces, special, chat_template })
    }

    /// Tokens of `text`. Special tokens written out in `text` become their ids, as in transformers; `add_special` also
    /// adds what the post-processor adds (a BOS, for most checkpoints that want one). A rendered chat template brings
    /// its own special tokens: encode it with `add_special` false.
    ///
    /// Time and memory are linear in the text: some microseconds and up to 180 bytes per character (10 million
    /// characters of prose took 60 s and 1.7 GiB on one busy core). Bound the length first, and keep long texts off
    /// threads that serve sockets.
    ///
    /// # Errors
    /// [`Error::Request`] when the text exhausts a limit of the regular-expression engine; a run of ten million
    /// spaces does.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        match guarded(|| self.inner.encode_fast(text, add_special)) {
            Ok(encoding) => Ok(encoding.get_ids().to_vec()),
            Err(why) => Err(Error::Request {
                param: None,
                message: format!("a text of {} bytes cannot be tokenised: {why}", text.len()),
            }),
        }
    }

    /// Text of `ids`, without special tokens when `skip_special`. Ids outside the vocabulary are nothing; bytes that
    /// form no UTF-8 character become U+FFFD. Equals what a [`Detokenizer`] yields for the same ids.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut stream = Detokenizer::new(self, skip_special);
        let mut text = String::new();
        for &id in ids {
            stream.push_to(id, &mut text);
        }
        text.push_str(&stream.finish());
        text
    }

    /// Text of one token inside a longer text: a leading space stays. Half a character is U+FFFD, see
    /// [`Tokenizer::token_bytes`]. Empty for ids outside the vocabulary.
    pub fn token_text(&self, id: u32) -> String {
        String::from_utf8_lossy(self.token_bytes(id)).into_owned()
    }

    /// Bytes one token adds to a longer text. Empty for ids outside the vocabulary.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.pieces.get(id).map_or(&[], |piece| piece.bytes)
    }

    /// The id of a vocabulary entry or added token, written as in `tokenizer.json`.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Whether `id` is a special token, which `skip_special` drops.
    pub fn is_special(&self, id: u32) -> bool {
        self.pieces.get(id).is_some_and(|piece| piece.special)
    }

    /// One more than the highest id; at most the model's embedding rows.
    pub fn vocab_size(&self) -> usize {
        self.pieces.len()
    }

    /// Whether the decoder puts a space between tokens, special ones included.
    pub fn separates_tokens(&self) -> bool {
        self.pieces.rules.space_between
    }

    /// The token that begins a text, where the checkpoint names one.
    pub fn bos_id(&self) -> Option<u32> {
        self.special.bos_id
    }

    /// The token that ends a text, where the tokenizer files name one. generation_config.json may name more.
    pub fn eos_id(&self) -> Option<u32> {
        self.special.eos_id
    }

    /// The checkpoint's default chat template.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.chat_template.as_ref()
    }

    /// Renders a chat with the checkpoint's template and its special tokens. Encode the result with `add_special` false.
    ///
    /// # Errors
    /// [`ChatError`], which converts to [`Error::Request`].
    pub fn render_chat(&self, input: &ChatInput) -> Result<String, ChatError> {
        let template = self.chat_template.as_ref().ok_or(ChatError::Missing)?;
        self.render_chat_with(template, input)
    }

    /// [`Tokenizer::render_chat`] with another template.
    ///
    /// # Errors
    /// As there.
    pub fn render_chat_with(&self, template: &ChatTemplate, input: &ChatInput) -> Result<String, ChatError> {
        template.render(input, &self.special.named)
    }
}
