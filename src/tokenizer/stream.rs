//! Incremental detokenisation: tokens in, complete characters out.

use super::Tokenizer;
use super::pieces::Pieces;
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
    /// Special tokens that are not dropped; few.
    kept: Box<[u32]>,
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
        Detokenizer {
            pieces,
            skip_special,
            kept: Box::default(),
            unfinished: Unfinished::default(),
            at_start: true,
            strip_left,
        }
    }

    /// A stream that continues a text: what only happens at the start of one is behind it.
    pub fn continuing(tokenizer: &Tokenizer, skip_special: bool) -> Detokenizer {
        Detokenizer { at_start: false, strip_left: 0, ..Detokenizer::new(tokenizer, skip_special) }
    }

    /// The same stream, with these special tokens left in the text.
    pub fn keeping(self, tokens: &[u32]) -> Detokenizer {
        Detokenizer { kept: tokens.into(), ..self }
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
        let drops = self.skip_special && !self.kept.contains(&token);
        let Some(piece) = self.pieces.get(token).filter(|piece| !(drops && piece.special)) else {
            return;
        };
        let rules = &self.pieces.rules;
        let start = text.len();
        let at_start = std::mem::replace(&mut self.at_start, false);
        if rules.space_between && !at_start {
            text.push(' ');
        }
        if piece.joins_bytes {
            self.unfinished.extend(piece.bytes, rules.lone_bytes(), text);
        } else {
            self.unfinished.give_up(rules.lone_bytes(), text);
            let first = at_start.then(|| self.pieces.first_bytes(token)).flatten();
            let bytes = first.unwrap_or(piece.bytes);
            text.push_str(
                from_utf8(bytes).expect("only pieces that join bytes may hold parts of characters"),
            );
        }
        if let Some((content, _)) = rules.strip_start {
            strip(content, &mut self.strip_left, start, text);
        }
    }
}

/// Removes up to `left` times `content` from the front of `text[start..]`; `left` becomes 0 at the first other
/// character.
fn strip(content: char, left: &mut usize, start: usize, text: &mut String) {
    while *left > 0 && start < text.len() {
        if text[start..].starts_with(content) {
            text.remove(start);
            *left -= 1;
        } else {
            *left = 0;
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn decode(pieces: &[&[u8]], lone: LoneBytes) -> String {
        let mut unfinished = Unfinished::default();
        let mut text = String::new();
        for piece in pieces {
            unfinished.extend(piece, lone, &mut text);
            assert!(unfinished.bytes.len() <= 3, "{} bytes kept", unfinished.bytes.len());
        }
        unfinished.give_up(lone, &mut text);
        text
    }

    #[test]
    fn each_lone_byte_or_each_sequence() {
        let bytes: [&[u8]; 3] = [b"a\xF0\x9F", b"\x99b\xE2", b"\x82"];
        assert_eq!(decode(&bytes, LoneBytes::OneForAll), "a\u{FFFD}b\u{FFFD}");
        assert_eq!(decode(&bytes, LoneBytes::OneForEach), "a\u{FFFD}\u{FFFD}\u{FFFD}b\u{FFFD}\u{FFFD}");
        assert_eq!(decode(&[b"\xF0", b"\x9F", b"\x99", b"\x82!"], LoneBytes::OneForEach), "🙂!");
    }

    proptest! {
        #[test]
        fn any_split_of_any_bytes_equals_the_lossy_whole(
            bytes in prop::collection::vec(prop_oneof![any::<u8>(), 0x7Fu8..0xA0, 0xE0u8..0xF5], 0..40),
            size in 1usize..5,
        ) {
            let pieces: Vec<&[u8]> = bytes.chunks(size).collect();
            prop_assert_eq!(decode(&pieces, LoneBytes::OneForAll), String::from_utf8_lossy(&bytes));
        }
    }
}
