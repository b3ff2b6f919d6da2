//! One sequence as its reader sees it: engine events in, text, log-probabilities and the end out. Pure, so that what a
//! client receives can be tested without an engine or a socket.

use std::sync::Arc;

use super::error::ApiError;
use super::types::{Logprobs, StopReason, TopLogprobs};
use crate::engine::request::{Event, FinishReason, TokenEvent};
use crate::error::Result;
use crate::tokenizer::{Detokenizer, StopMatcher, Tokenizer};

/// How a sequence is to be told.
#[derive(Debug, Clone, Copy)]
pub struct Rules<'a> {
    /// Strings that end the text.
    pub stop: &'a [String],
    /// Tokens that end the text and are reported as its reason.
    pub stop_token_ids: &'a [u32],
    /// Tokens that end the text without further reason.
    pub eos_token_ids: &'a [u32],
    /// Log-probabilities of this many alternatives per token.
    pub logprobs: Option<usize>,
}

/// What one event led to.
#[derive(Debug, Default)]
pub struct Piece {
    /// Complete characters that hold no part of a stop string.
    pub text: String,
    /// Of the tokens since the last piece.
    pub logprobs: Option<Logprobs>,
    /// Set in the last piece.
    pub end: Option<End>,
}

impl Piece {
    /// Nothing that a client would want to know.
    pub fn is_empty(&self) -> bool {
        self.text.is_empty() && self.logprobs.is_none() && self.end.is_none()
    }
}

/// How a sequence ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    /// "stop" or "length".
    pub finish_reason: &'static str,
    /// The stop string or token.
    pub stop_reason: Option<StopReason>,
    /// Generated tokens, the last one included whatever it was.
    pub completion_tokens: usize,
    /// Prompt tokens found in the prefix cache; 0 when a stop string ended the text before the engine had told.
    pub cached_tokens: usize,
}

/// The text of one sequence in the making.
pub struct Transcript {
    tokenizer: Arc<Tokenizer>,
    detokenizer: Detokenizer,
    stops: StopMatcher,
    stop: Vec<String>,
    stop_token_ids: Vec<u32>,
    eos_token_ids: Vec<u32>,
    logprobs: Option<usize>,
    /// Characters of the text so far, those held back included.
    chars: usize,
    tokens: usize,
    last_token: Option<u32>,
}

impl Transcript {
    /// An empty text.
    ///
    /// # Errors
    /// [`crate::Error::Request`] for a stop string that can never be matched.
    pub fn new(tokenizer: Arc<Tokenizer>, rules: Rules<'_>) -> Result<Self> {
        Ok(Transcript {
            detokenizer: Detokenizer::new(&tokenizer, true),
            tokenizer,
            stops: StopMatcher::new(rules.stop)?,
            stop: rules.stop.to_vec(),
            stop_token_ids: rules.stop_token_ids.to_vec(),
            eos_token_ids: rules.eos_token_ids.to_vec(),
            logprobs: rules.logprobs,
            chars: 0,
            tokens: 0,
            last_token: None,
        })
    }

    /// Takes the next event. After a piece with an end nothing more is to be taken: what a stop string ended may well
    /// still be running.
    ///
    /// # Errors
    /// When the engine failed or stopped.
    pub fn take(&mut self, event: Event) -> Result<Piece, ApiError> {
        let finished = match event {
            Event::Token(token) => return Ok(self.token(&token)),
            Event::Finished(finished) => finished,
        };
        match finished.reason {
            FinishReason::Stop => Ok(self.finish("stop", finished.cached_tokens)),
            FinishReason::Length => Ok(self.finish("length", finished.cached_tokens)),
            FinishReason::Aborted => {
                Err(ApiError::unavailable("The request was aborted: the engine is stopping."))
            }
            FinishReason::Error(why) => Err(ApiError::internal(&why)),
        }
    }

    fn token(&mut self, event: &TokenEvent) -> Piece {
        let logprobs = self.logprobs.map(|count| self.logprobs_of(event, count));
        self.tokens += 1;
        self.last_token = Some(event.token);
        let ends = self.eos_token_ids.contains(&event.token) || self.stop_token_ids.contains(&event.token);
        let text = if ends { String::new() } else { self.detokenizer.push(event.token) };
        Piece { logprobs, ..self.emit(&text) }
    }

    /// Text that became certain, and the end if it held a stop string.
    fn emit(&mut self, text: &str) -> Piece {
        self.chars += text.chars().count();
        let scan = self.stops.push(text);
        let end =
            scan.stop.map(|which| self.end("stop", Some(StopReason::Text(self.stop[which].clone())), 0));
        Piece { text: scan.text, logprobs: None, end }
    }

    fn finish(&mut self, finish_reason: &'static str, cached_tokens: usize) -> Piece {
        let tail = self.detokenizer.finish();
        let mut piece = self.emit(&tail);
        match &mut piece.end {
            Some(end) => end.cached_tokens = cached_tokens,
            None => {
                piece.text.push_str(&self.stops.finish());
                let reason = self.stop_token().filter(|_| finish_reason == "stop").map(StopReason::Token);
                piece.end = Some(self.end(finish_reason, reason, cached_tokens));
            }
        }
        piece
    }

    /// The last token, if it is one the client named; EOS is an end without a reason.
    fn stop_token(&self) -> Option<u32> {
        self.last_token.filter(|token| !self.eos_token_ids.contains(token))
    }

    fn end(&self, finish_reason: &'static str, stop_reason: Option<StopReason>, cached_tokens: usize) -> End {
        End { finish_reason, stop_reason, completion_tokens: self.tokens, cached_tokens }
    }

    fn logprobs_of(&self, event: &TokenEvent, count: usize) -> Logprobs {
        let own = self.token_name(event.token);
        let logprob = finite(event.logprob.unwrap_or(f32::NEG_INFINITY));
        let mut top = vec![(own.clone(), logprob)];
        for &(token, logprob) in event.top.iter().take(count) {
            let name = self.token_name(token);
            // Two ids may share a text; JSON keys may not repeat, and the better one comes first.
            if token != event.token && top.iter().all(|(seen, _)| *seen != name) {
                top.push((name, finite(logprob)));
            }
        }
        Logprobs {
            tokens: vec![own],
            token_logprobs: vec![logprob],
            top_logprobs: vec![TopLogprobs(top)],
            text_offset: vec![self.chars],
        }
    }

    /// A token's text, or OpenAI's `bytes:\xe2\x82` where it is no whole character.
    fn token_name(&self, token: u32) -> String {
        let bytes = self.tokenizer.token_bytes(token);
        match std::str::from_utf8(bytes) {
            Ok(text) => text.to_owned(),
            Err(_) => bytes.iter().fold("bytes:".to_owned(), |name, byte| format!("{name}\\x{byte:02x}")),
        }
    }
}

/// JSON has no infinity; vLLM's floor stands for "never".
fn finite(logprob: f32) -> f32 {
    logprob.max(-9999.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::request::Finished;
    use crate::tokenizer::TokenizerFiles;

    const EOS: u32 = 1;

    fn tokenizer() -> Arc<Tokenizer> {
        let files = TokenizerFiles {
            checkpoint: "demo-mixtral",
            tokenizer_json: Some(include_bytes!("../../models/demo-mixtral/tokenizer.json")),
            tokenizer_config: Some(include_bytes!("../../models/demo-mixtral/tokenizer_config.json")),
            ..TokenizerFiles::default()
        };
        Arc::new(Tokenizer::from_parts(&files, 4096).unwrap())
    }

    fn event(token: u32) -> Event {
        let top = vec![(token, -0.5), (token + 1, -1.0), (token + 2, f32::NEG_INFINITY)];
        Event::Token(TokenEvent { token, logprob: Some(-0.5), top })
    }

    fn finished(reason: FinishReason) -> Event {
        Event::Finished(Finished { reason, cached_tokens: 3, captured: None })
    }

    /// Feeds tokens and a reason; the joined text and the end.
    fn run(rules: Rules<'_>, tokens: &[u32], reason: FinishReason) -> (String, End) {
        let mut transcript = Transcript::new(tokenizer(), rules).unwrap();
        let mut text = String::new();
        let events = tokens.iter().map(|&token| event(token)).chain([finished(reason)]);
        for event in events {
            let piece = transcript.take(event).unwrap();
            text.push_str(&piece.text);
            if let Some(end) = piece.end {
                return (text, end);
            }
        }
        panic!("no end");
    }

    fn rules<'a>(stop: &'a [String], stop_token_ids: &'a [u32]) -> Rules<'a> {
        Rules { stop, stop_token_ids, eos_token_ids: &[EOS], logprobs: None }
    }

    #[test]
    fn ends_have_their_reasons() {
        let tokenizer = tokenizer();
        let tokens = tokenizer.encode("one two three four", false).unwrap();
        let with = |last: u32| [&tokens[..], &[last]].concat();
        let stop = ["three".to_string(), "wo thr".to_string()];
        let whole = "one two three four";
        let text = |reason: &str| StopReason::Text(reason.into());
        for (stop, ids, tokens, reason, expected, finish, stop_reason, cached) in [
            (&[][..], &[][..], tokens.clone(), FinishReason::Length, whole, "length", None, 3),
            (&[], &[], with(EOS), FinishReason::Stop, whole, "stop", None, 3),
            (&[], &[70], with(70), FinishReason::Stop, whole, "stop", Some(StopReason::Token(70)), 3),
            (&[], &[EOS], with(EOS), FinishReason::Stop, whole, "stop", None, 3),
            (
                &stop[..1],
                &[],
                tokens.clone(),
                FinishReason::Length,
                "one two ",
                "stop",
                Some(text("three")),
                0,
            ),
            (&stop[..], &[], tokens.clone(), FinishReason::Length, "one t", "stop", Some(text("wo thr")), 0),
        ] {
            let (said, end) = run(rules(stop, ids), &tokens, reason);
            assert_eq!(said.trim_start(), expected);
            assert_eq!((end.finish_reason, &end.stop_reason), (finish, &stop_reason), "{stop:?} {ids:?}");
            assert_eq!(end.cached_tokens, cached);
        }
    }

    #[test]
    fn half_a_stop_string_is_held_back_and_handed_out_at_the_end() {
        let tokens = tokenizer().encode("one two three", false).unwrap();
        let (text, end) = run(rules(&["three four".into()], &[]), &tokens, FinishReason::Length);
        assert_eq!(text.trim_start(), "one two three");
        assert_eq!(end.finish_reason, "length");
    }

    #[test]
    fn a_stop_string_of_replacement_characters_may_only_appear_at_the_end() {
        let tokenizer = tokenizer();
        let half = tokenizer.encode("\u{1F9ED}", false).unwrap()[0];
        assert!(std::str::from_utf8(tokenizer.token_bytes(half)).is_err(), "a half character");
        let (text, end) = run(rules(&["\u{FFFD}".into()], &[]), &[half], FinishReason::Length);
        assert_eq!(text.trim_start(), "");
        assert_eq!((end.finish_reason, end.cached_tokens), ("stop", 3));
    }

    #[test]
    fn logprobs_name_tokens_and_have_no_infinity() {
        let tokenizer = tokenizer();
        let tokens = tokenizer.encode("a \u{1F9ED} b", false).unwrap();
        let rules = Rules { logprobs: Some(2), ..rules(&[], &[]) };
        let mut transcript = Transcript::new(Arc::clone(&tokenizer), rules).unwrap();
        let mut all = Logprobs::default();
        let mut offsets = Vec::new();
        let mut chars = 0;
        for &token in &tokens {
            offsets.push(chars);
            let piece = transcript.take(event(token)).unwrap();
            chars += piece.text.chars().count();
            all.append(piece.logprobs.unwrap());
        }
        assert_eq!(all.text_offset, offsets);
        for (name, &token) in all.tokens.iter().zip(&tokens) {
            match std::str::from_utf8(tokenizer.token_bytes(token)) {
                Ok(text) => assert_eq!(name, text),
                Err(_) => assert!(name.starts_with("bytes:\\x"), "{name}"),
            }
        }
        for (top, name) in all.top_logprobs.iter().zip(&all.tokens) {
            assert_eq!(top.0[0], (name.clone(), -0.5));
            assert!(top.0.len() <= 3 && top.0.iter().all(|(_, logprob)| logprob.is_finite()));
        }
        assert!(serde_json::to_string(&all).is_ok());
    }

    #[test]
    fn failures_become_errors_without_their_inner_text() {
        let take = |reason| Transcript::new(tokenizer(), rules(&[], &[])).unwrap().take(finished(reason));
        let error = take(FinishReason::Error("rank 3: address 0x7f".into())).unwrap_err();
        assert_eq!(error.status.as_u16(), 500);
        assert!(!error.message.contains("rank"), "{}", error.message);
        assert_eq!(take(FinishReason::Aborted).unwrap_err().status.as_u16(), 503);
    }
}
