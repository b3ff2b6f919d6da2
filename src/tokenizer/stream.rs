//! Incremental detokenisation: tokens in, complete characters out.

use super::Tokenizer;
use super::pieces::{Pieces, Rules};
use std::str::from_utf8;
use std::sync::Arc;

/// Turns a stream of tokens into text, one token at a time.
///
/// A character whose bytes are spread over several tokens comes out once, whole, with its last byte. Bytes that cannot
/// become a character come out as U+FFFD as soon as that is certain. The pieces and [`Detokenizer::finish`] joined
/// equal [`Tokenizer::decode`] of the whole list. A push costs the token's own bytes, and at most three bytes of an
/// unfinished character are kept, whatever came before.
///
/// For byte-fallback vocabularies (`<0xE2>` tokens) each character of a run of byte tokens stands on its own: one
/// malformed byte is one U+FFFD. The `tokenizers` crate would replace the whole run, good characters included, which
/// no stream can follow without holding all of it back; for well-formed runs both agree.
#[derive(Clone)]
pub struct Detokenizer {
    pieces: Arc<Pieces>,
    skip_special: bool,
    unfinished: Unfinished,
    /// No token has contributed yet.
    at_start: bool,
    /// Leading characters that may still be stripped.
    strip_left: usize,
}

impl Detokenizer {
    /// A stream at the start of a text; special tokens are dropped when `skip_special`.
    pub fn new(tokenizer: &Tokenizer, skip_special: bool) -> Detokenizer {
        let pieces = Arc::clone(&tokenizer.pieces);
        let strip_left = pieces.rules.strip_start.map_or(0, |(_, count)| count);
        Detokenizer { pieces, skip_special, unfinished: Unfinished::default(), at_start: true, strip_left }
    }

    /// Takes the next token and returns the text it completes, which may be empty.
    pub fn push(&mut self, token: u32) -> String {
        let mut text = String::new();
        self.push_to(token, &mut text);
        text
    }

    /// The text ended: an unfinished character becomes U+FFFD.
    pub fn finish(&mut self) -> String {
        let mut text = String::new();
        self.unfinished.give_up(self.pieces.rules.lone_bytes(), &mut text);
        text
    }

    /// [`Detokenizer::push`], appending to `text`.
    pub(super) fn push_to(&mut self, token: u32, text: &mut String) {
        let pieces = Arc::clone(&self.pieces);
        let Some(piece) = pieces.get(token).filter(|piece| !(self.skip_special && piece.special)) else {
            return;
        };
        let start = text.len();
        let at_start = std::mem::replace(&mut self.at_start, false);
        let rules: &Rules = &pieces.rules;
        if rules.space_between && !at_start {
            text.push(' ');
        }
        if piece.joins_bytes {
            self.unfinished.extend(piece.bytes, rules.lone_bytes(), text);
        } else {
            self.unfinished.give_up(rules.lone_bytes(), text);
            let bytes = if at_start { pieces.first_bytes(token).unwrap_or(piece.bytes) } else { piece.bytes };
            text.push_str(
                from_utf8(bytes).expect("only pieces that join bytes may hold parts of characters"),
            );
        }
        self.strip(start, text);
    }

    /// Removes from `text[start..]` what the decoder strips at the start of the whole text.
    fn strip(&mut self, start: usize, text: &mut String) {
        let Some((content, _)) = self.pieces.rules.strip_start else { return };
        while self.strip_left > 0 && start < text.len() {
            if !text[start..].starts_with(content) {
                self.strip_left = 0;
                return;
            }
            text.remove(start);
            self.strip_left -= 1;
        }
    }
}

/// How many U+FFFD a malformed sequence of several bytes becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LoneBytes {
    /// One for the sequence, as `String::from_utf8_lossy` does (byte-level vocabularies).
    OneForAll,
    /// One for each byte (byte-fallback vocabularies).
    OneForEach,
}

/// The first bytes of a character whose end has not come yet: at most three.
#[derive(Clone, Default)]
struct Unfinished {
    bytes: Vec<u8>,
}

impl Unfinished {
    /// Adds bytes and moves all that is decided to `text`.
    fn extend(&mut self, bytes: &[u8], lone: LoneBytes, text: &mut String) {
        self.bytes.extend_from_slice(bytes);
        let mut done = 0;
        loop {
            let rest = &self.bytes[done..];
            let error = match from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    done = self.bytes.len();
                    break;
                }
                Err(error) => error,
            };
            let valid = error.valid_up_to();
            text.push_str(from_utf8(&rest[..valid]).expect("checked by valid_up_to"));
            done += valid;
            let Some(malformed) = error.error_len() else { break };
            replace(malformed, lone, text);
            done += malformed;
        }
        self.bytes.drain(..done);
    }

    /// No more bytes will come for this character.
    fn give_up(&mut self, lone: LoneBytes, text: &mut String) {
        if !self.bytes.is_empty() {
            replace(self.bytes.len(), lone, text);
            self.bytes.clear();
        }
    }
}

fn replace(malformed: usize, lone: LoneBytes, text: &mut String) {
    let count = match lone {
        LoneBytes::OneForAll => 1,
        LoneBytes::OneForEach => malformed,
    };
    text.extend(std::iter::repeat_n(char::REPLACEMENT_CHARACTER, count));
}
