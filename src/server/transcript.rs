//! One sequence as its reader sees it: engine events in, text, tokens and the end out. Pure, so that what a client receives
//! can be tested without an engine or a socket.

use std::sync::Arc;

use super::error::ApiError;
use super::types::StopReason;
use crate::engine::request::{Event, FinishReason, PromptEvent, TokenEvent};
use crate::error::Result;
use crate::model::Routing;
use crate::tokenizer::{Detokenizer, StopMatcher, Tokenizer};

/// How the sequences of a request are to be told.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Rules {
    /// Strings that end the text.
    pub stop: Vec<String>,
    /// What ended the text, string or token, is part of it.
    pub include_stop: bool,
    /// Tokens that end the text and are reported as its reason.
    pub stop_token_ids: Vec<u32>,
    /// Tokens that end the text without further reason.
    pub eos_token_ids: Vec<u32>,
    /// The text of so many first tokens may hold stop strings.
    pub min_tokens: usize,
    /// Special tokens are no part of the text.
    pub skip_special_tokens: bool,
    /// But these are.
    pub kept_tokens: Vec<u32>,
    /// The text begins with the prompt.
    pub echo: bool,
}

/// What is to be continued.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Prompt {
    /// As tokens; never empty.
    pub tokens: Vec<u32>,
    /// As the client wrote it; `None` for a prompt of token ids.
    pub text: Option<String>,
}

/// What one or several events led to.
#[derive(Debug, Default, PartialEq)]
pub struct Piece {
    /// Complete characters that hold no part of a stop string.
    pub text: String,
    /// The tokens since the last piece.
    pub tokens: Vec<TokenPiece>,
    /// Set in the first piece: tokens of the prompt, when their log-probabilities were asked for; the first has none.
    pub prompt: Option<Vec<TokenPiece>>,
    /// Set in the last piece.
    pub end: Option<End>,
}

/// A token, and its place in the text.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenPiece {
    /// Which, and how likely it was.
    pub event: TokenEvent,
    /// Characters of the text that were complete before it.
    pub offset: usize,
}

impl Piece {
    /// Adds what came later.
    pub fn append(&mut self, later: Piece) {
        self.text.push_str(&later.text);
        self.tokens.extend(later.tokens);
        self.prompt = self.prompt.take().or(later.prompt);
        self.end = later.end;
    }
}

/// How a sequence ended.
#[derive(Debug, Clone, PartialEq)]
pub struct End {
    /// "stop" or "length".
    pub finish_reason: &'static str,
    /// The stop string or token.
    pub stop_reason: Option<StopReason>,
    /// Generated tokens, the last one included whatever it was.
    pub completion_tokens: usize,
    /// Prompt tokens found in the prefix cache.
    pub cached_tokens: usize,
    /// Expert choices of every position computed, where captured.
    pub routing: Option<Routing>,
}

/// The text of one sequence in the making.
pub struct Transcript {
    tokenizer: Arc<Tokenizer>,
    rules: Arc<Rules>,
    prompt: Arc<Prompt>,
    detokenizer: Detokenizer,
    stops: StopMatcher,
    /// Characters of the text so far, those held back included.
    chars: usize,
    tokens: usize,
    last_token: Option<u32>,
    cached_tokens: usize,
}

impl Transcript {
    /// An empty text.
    ///
    /// # Errors
    /// [`crate::Error::Request`] for a stop string that can never be matched.
    pub fn new(tokenizer: Arc<Tokenizer>, rules: Arc<Rules>, prompt: Arc<Prompt>) -> Result<Self> {
        Ok(Transcript {
            detokenizer: Detokenizer::continuing(&tokenizer, rules.skip_special_tokens)
                .keeping(&rules.kept_tokens),
            tokenizer,
            stops: StopMatcher::new(&rules.stop)?,
            rules,
            prompt,
            chars: 0,
            tokens: 0,
            last_token: None,
            cached_tokens: 0,
        })
    }

    /// Takes the next event. After a piece with an end nothing more is to be taken: what a stop string ended may well
    /// still be running.
    ///
    /// # Errors
    /// When the engine failed or stopped, or the request's own rules leave no token.
    pub fn take(&mut self, event: Event) -> Result<Piece, ApiError> {
        let finished = match event {
            Event::Prompt(prompt) => return Ok(self.prompt(prompt)),
            Event::Token(token) => return Ok(self.token(token)),
            Event::Finished(finished) => finished,
        };
        match finished.reason {
            FinishReason::Stop => Ok(self.finish("stop")),
            FinishReason::Length => Ok(self.finish("length")),
            FinishReason::Aborted => {
                Err(ApiError::unavailable("The request was aborted: the engine is stopping."))
            }
            FinishReason::Refused(why) => Err(ApiError::bad_request(why)),
            FinishReason::Error(why) => Err(ApiError::internal(&why)),
        }
    }

    fn prompt(&mut self, event: PromptEvent) -> Piece {
        self.cached_tokens = event.cached_tokens;
        let mut text = Detokenizer::new(&self.tokenizer, self.rules.skip_special_tokens);
        let mut chars = 0;
        let mut tokens = Vec::new();
        if !event.scores.is_empty() || self.prompt.tokens.len() == 1 {
            let first = TokenEvent { token: self.prompt.tokens[0], logprob: None, rank: 0, top: Vec::new() };
            for event in std::iter::once(first).chain(event.scores) {
                let offset = chars;
                chars += text.push(event.token).chars().count();
                tokens.push(TokenPiece { event, offset });
            }
        }
        let text = if self.rules.echo { self.prompt_text() } else { String::new() };
        self.chars += text.chars().count();
        Piece { text, prompt: Some(tokens), ..Piece::default() }
    }

    fn prompt_text(&self) -> String {
        let Prompt { tokens, text } = &*self.prompt;
        text.clone().unwrap_or_else(|| self.tokenizer.decode(tokens, self.rules.skip_special_tokens))
    }

    fn token(&mut self, event: TokenEvent) -> Piece {
        let token = event.token;
        let offset = self.chars;
        self.tokens += 1;
        self.last_token = Some(token);
        let Rules { stop_token_ids, eos_token_ids, include_stop, .. } = &*self.rules;
        let ends = eos_token_ids.contains(&token) || stop_token_ids.contains(&token);
        let text = if ends && !include_stop { String::new() } else { self.detokenizer.push(token) };
        Piece { tokens: vec![TokenPiece { event, offset }], ..self.emit(text) }
    }

    /// Text that became certain, and the end if it held a stop string.
    fn emit(&mut self, text: String) -> Piece {
        self.chars += text.chars().count();
        if self.tokens <= self.rules.min_tokens && self.rules.min_tokens > 0 {
            return Piece { text, ..Piece::default() };
        }
        let mut scan = self.stops.push(&text);
        let end = scan.stop.map(|which| {
            let stop = self.rules.stop[which].clone();
            if self.rules.include_stop {
                scan.text.push_str(&stop);
            }
            self.end("stop", Some(StopReason::Text(stop)))
        });
        Piece { text: scan.text, end, ..Piece::default() }
    }

    fn finish(&mut self, finish_reason: &'static str) -> Piece {
        let tail = self.detokenizer.finish();
        let mut piece = self.emit(tail);
        if piece.end.is_none() {
            piece.text.push_str(&self.stops.finish());
            let reason = self.stop_token().filter(|_| finish_reason == "stop").map(StopReason::Token);
            piece.end = Some(self.end(finish_reason, reason));
        }
        piece
    }

    /// The last token, if it is one the client named; EOS is an end without a reason.
    fn stop_token(&self) -> Option<u32> {
        self.last_token.filter(|token| !self.rules.eos_token_ids.contains(token))
    }

    fn end(&self, finish_reason: &'static str, stop_reason: Option<StopReason>) -> End {
        let (completion_tokens, cached_tokens) = (self.tokens, self.cached_tokens);
        End { finish_reason, stop_reason, completion_tokens, cached_tokens, routing: None }
    }
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

    fn scored(token: u32) -> TokenEvent {
        TokenEvent { token, logprob: Some(-0.5), rank: 1, top: vec![(token, -0.5)] }
    }

    fn finished(reason: FinishReason) -> Event {
        Event::Finished(Finished { reason, cached_tokens: 3, captured: None })
    }

    fn transcript(rules: Rules) -> Transcript {
        Transcript::new(tokenizer(), Arc::new(rules), Arc::default()).unwrap()
    }

    /// Feeds tokens and a reason; everything up to the end.
    fn run(rules: Rules, tokens: &[u32], reason: FinishReason) -> Piece {
        let mut transcript = transcript(rules);
        let prompt = Event::Prompt(PromptEvent { cached_tokens: 3, scores: vec![] });
        let tokens = tokens.iter().map(|&token| Event::Token(scored(token)));
        let mut whole = Piece::default();
        for event in [prompt].into_iter().chain(tokens).chain([finished(reason)]) {
            whole.append(transcript.take(event).unwrap());
            if whole.end.is_some() {
                return whole;
            }
        }
        panic!("no end");
    }

    fn rules(stop: &[&str], stop_token_ids: &[u32]) -> Rules {
        Rules {
            stop: stop.iter().map(|s| s.to_string()).collect(),
            stop_token_ids: stop_token_ids.to_vec(),
            eos_token_ids: vec![EOS],
            skip_special_tokens: true,
            ..Rules::default()
        }
    }

    #[test]
    fn ends_have_their_reasons() {
        let tokens = tokenizer().encode("one two three four", false).unwrap();
        let with = |last: u32| [&tokens[..], &[last]].concat();
        let whole = "one two three four";
        let text = |reason: &str| Some(StopReason::Text(reason.into()));
        for (stop, ids, tokens, reason, expected, finish, stop_reason) in [
            (&[][..], &[][..], tokens.clone(), FinishReason::Length, whole, "length", None),
            (&[], &[], with(EOS), FinishReason::Stop, whole, "stop", None),
            (&[], &[70], with(70), FinishReason::Stop, whole, "stop", Some(StopReason::Token(70))),
            (&[], &[EOS], with(EOS), FinishReason::Stop, whole, "stop", None),
            (&["three"], &[], tokens.clone(), FinishReason::Length, "one two ", "stop", text("three")),
            (
                &["three", "wo thr"],
                &[],
                tokens.clone(),
                FinishReason::Length,
                "one t",
                "stop",
                text("wo thr"),
            ),
        ] {
            let said = run(rules(stop, ids), &tokens, reason);
            let end = said.end.unwrap();
            assert_eq!(said.text.trim_start(), expected);
            assert_eq!((end.finish_reason, end.stop_reason), (finish, stop_reason), "{stop:?} {ids:?}");
            assert_eq!(end.cached_tokens, 3);
        }
    }

    #[test]
    fn what_ended_the_text_can_be_part_of_it() {
        let tokens = tokenizer().encode("one two three four", false).unwrap();
        let included = |stop: &[&str], ids: &[u32]| {
            run(Rules { include_stop: true, ..rules(stop, ids) }, &tokens, FinishReason::Stop)
        };
        assert_eq!(included(&["three"], &[]).text.trim_start(), "one two three");
        let last = tokens[tokens.len() - 1];
        assert_eq!(included(&[], &[last]).text.trim_start(), "one two three four");
    }

    #[test]
    fn stop_strings_wait_for_min_tokens() {
        let tokenizer = tokenizer();
        let tokens = tokenizer.encode("one two one two one", false).unwrap();
        let early = tokenizer.decode(&tokens[..2], true).len();
        let said = run(Rules { min_tokens: 2, ..rules(&["one"], &[]) }, &tokens, FinishReason::Length);
        assert_eq!(said.end.unwrap().finish_reason, "stop");
        assert!(said.text.len() >= early && said.text.contains("one"), "{:?}", said.text);
        assert!(!said.text[early..].contains("one"), "{:?}", said.text);
    }

    #[test]
    fn half_a_stop_string_is_held_back_and_handed_out_at_the_end() {
        let tokens = tokenizer().encode("one two three", false).unwrap();
        let said = run(rules(&["three four"], &[]), &tokens, FinishReason::Length);
        assert_eq!(said.text.trim_start(), "one two three");
        assert_eq!(said.end.unwrap().finish_reason, "length");
    }

    #[test]
    fn a_stop_string_of_replacement_characters_may_only_appear_at_the_end() {
        let tokenizer = tokenizer();
        let half = tokenizer.encode("\u{1F9ED}", false).unwrap()[0];
        assert!(std::str::from_utf8(tokenizer.token_bytes(half)).is_err(), "a half character");
        let said = run(rules(&["\u{FFFD}"], &[]), &[half], FinishReason::Length);
        assert_eq!(said.text.trim_start(), "");
        assert_eq!(said.end.unwrap().finish_reason, "stop");
    }

    #[test]
    fn special_tokens_are_text_where_asked_for() {
        let tokens = [&tokenizer().encode("one", false).unwrap()[..], &[EOS, EOS]].concat();
        let spoken = Rules { skip_special_tokens: false, eos_token_ids: vec![], ..rules(&[], &[]) };
        let eos = tokenizer().token_text(EOS);
        assert!(!eos.is_empty());
        let said = run(spoken.clone(), &tokens, FinishReason::Length);
        assert_eq!(said.text.trim_start(), format!("one{eos}{eos}"));
        let silent = run(Rules { skip_special_tokens: true, ..spoken }, &tokens, FinishReason::Length);
        assert_eq!(silent.text.trim_start(), "one");
    }

    #[test]
    fn an_echo_comes_first_and_moves_the_offsets() {
        let tokenizer = tokenizer();
        let tokens = tokenizer.encode("one two", true).unwrap();
        for (text, expected) in [(Some("one two".to_string()), "one two"), (None, "one two")] {
            let rules = Arc::new(Rules { echo: true, ..rules(&[], &[]) });
            let prompt = Arc::new(Prompt { tokens: tokens.clone(), text });
            let mut transcript = Transcript::new(Arc::clone(&tokenizer), rules, prompt).unwrap();
            let scores = tokens[1..].iter().map(|&token| scored(token)).collect();
            let echo = transcript.take(Event::Prompt(PromptEvent { cached_tokens: 0, scores })).unwrap();
            assert_eq!(echo.text.trim_start(), expected);
            let scores = echo.prompt.unwrap();
            assert_eq!(scores.iter().map(|piece| piece.event.token).collect::<Vec<_>>(), tokens);
            assert_eq!((scores[0].event.logprob, scores[0].offset), (None, 0));
            assert!(scores.is_sorted_by_key(|piece| piece.offset));
            let next = transcript.take(Event::Token(scored(tokens[0]))).unwrap();
            assert_eq!(next.tokens[0].offset, echo.text.chars().count());
        }
    }

    #[test]
    fn failures_become_errors_without_their_inner_text() {
        let take = |reason| transcript(rules(&[], &[])).take(finished(reason));
        let error = take(FinishReason::Error("rank 3: address 0x7f".into())).unwrap_err();
        assert_eq!(error.status.as_u16(), 500);
        assert!(!error.message.contains("rank"), "{}", error.message);
        assert_eq!(take(FinishReason::Aborted).unwrap_err().status.as_u16(), 503);
        let refused = take(FinishReason::Refused("nothing is left".into())).unwrap_err();
        assert_eq!((refused.status.as_u16(), &refused.message[..]), (400, "nothing is left"));
    }
}
