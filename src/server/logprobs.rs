//! Log-probabilities as completions tell them.

use serde::Serialize;

use super::transcript::TokenPiece;
use super::types::{Logprobs, PromptLogprob, TopLogprobs};
use crate::engine::request::TokenEvent;
use crate::tokenizer::Tokenizer;

/// How tokens are called in log-probabilities.
#[derive(Clone, Copy)]
pub struct TokenNames<'a> {
    /// Has their texts.
    pub tokenizer: &'a Tokenizer,
    /// By id, "token_id:7", rather than by text.
    pub by_id: bool,
}

impl TokenNames<'_> {
    /// A token's text, or OpenAI's `bytes:\xe2\x82` where it is no whole character; or its id.
    pub fn of(&self, token: u32) -> String {
        if self.by_id {
            return format!("token_id:{token}");
        }
        let bytes = self.tokenizer.token_bytes(token);
        match std::str::from_utf8(bytes) {
            Ok(text) => text.to_owned(),
            Err(_) => bytes.iter().fold("bytes:".to_owned(), |name, byte| format!("{name}\\x{byte:02x}")),
        }
    }

    /// The four lists about these tokens, with `count` alternatives each.
    pub fn completion<'p>(&self, tokens: impl IntoIterator<Item = &'p TokenPiece>, count: usize) -> Logprobs {
        let mut lists = Logprobs::default();
        for TokenPiece { event, offset } in tokens {
            let own = self.of(event.token);
            let logprob = event.logprob.map(finite);
            lists.top_logprobs.push(logprob.map(|logprob| self.top(event, &own, logprob, count)));
            lists.tokens.push(own);
            lists.token_logprobs.push(logprob);
            lists.text_offset.push(*offset);
        }
        lists
    }

    /// The token itself, then the best others: up to `count + 1` entries.
    fn top(&self, event: &TokenEvent, own: &str, logprob: f32, count: usize) -> TopLogprobs {
        let mut top = vec![(own.to_owned(), logprob)];
        for &(token, logprob) in event.top.iter().take(count) {
            let name = self.of(token);
            // Two ids may share a text; JSON keys may not repeat, and the better one comes first.
            if token != event.token && top.iter().all(|(seen, _)| *seen != name) {
                top.push((name, finite(logprob)));
            }
        }
        TopLogprobs(top)
    }

    /// vLLM's `prompt_logprobs`: for each prompt token an object from ids to what is known about them; the first is null.
    pub fn prompt(&self, tokens: &[TokenPiece], count: usize) -> Vec<Option<IdMap>> {
        let entry = |token, logprob, rank| {
            let decoded_token = self.tokenizer.token_text(token);
            (token, PromptLogprob { logprob: finite(logprob), rank, decoded_token })
        };
        let of_token = |piece: &TokenPiece| {
            let event = &piece.event;
            let own = entry(event.token, event.logprob?, event.rank);
            let best = event.top.iter().take(count).zip(1..);
            let others = best.filter(|((token, _), _)| *token != event.token);
            let others = others.map(|(&(token, logprob), rank)| entry(token, logprob, rank));
            Some(IdMap([own].into_iter().chain(others).collect()))
        };
        tokens.iter().map(of_token).collect()
    }
}

/// An object from token ids that keeps its order.
#[derive(Debug)]
pub struct IdMap(Vec<(u32, PromptLogprob)>);

impl Serialize for IdMap {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(token, known)| (token, known)))
    }
}

/// JSON has no infinity; vLLM's floor stands for "never".
pub fn finite(logprob: f32) -> f32 {
    logprob.max(-9999.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::TokenizerFiles;

    fn tokenizer() -> Tokenizer {
        let files = TokenizerFiles {
            checkpoint: "demo-mixtral",
            tokenizer_json: Some(include_bytes!("../../models/demo-mixtral/tokenizer.json")),
            tokenizer_config: Some(include_bytes!("../../models/demo-mixtral/tokenizer_config.json")),
            ..TokenizerFiles::default()
        };
        Tokenizer::from_parts(&files, 4096).unwrap()
    }

    fn piece(token: u32) -> TokenPiece {
        let top = vec![(token + 1, -0.25), (token, -0.5), (token + 2, f32::NEG_INFINITY)];
        TokenPiece { event: TokenEvent { token, logprob: Some(-0.5), rank: 2, top }, offset: 7 }
    }

    #[test]
    fn tokens_are_named_and_have_no_infinity() {
        let tokenizer = tokenizer();
        let names = TokenNames { tokenizer: &tokenizer, by_id: false };
        let tokens = tokenizer.encode("a \u{1F9ED} b", false).unwrap();
        let pieces: Vec<TokenPiece> = tokens.iter().map(|&token| piece(token)).collect();
        let all = names.completion(&pieces, 3);
        for (name, &token) in all.tokens.iter().zip(&tokens) {
            match std::str::from_utf8(tokenizer.token_bytes(token)) {
                Ok(text) => assert_eq!(name, text),
                Err(_) => assert!(name.starts_with("bytes:\\x"), "{name}"),
            }
        }
        for (top, name) in all.top_logprobs.iter().zip(&all.tokens) {
            let top = &top.as_ref().unwrap().0;
            assert_eq!(top[0], (name.clone(), -0.5));
            assert!(top.len() <= 4 && top.iter().all(|(_, logprob)| logprob.is_finite()));
        }
        assert_eq!(all.text_offset, vec![7; tokens.len()]);
        assert!(serde_json::to_string(&all).is_ok());
        let by_id = TokenNames { by_id: true, ..names }.completion(&pieces[..1], 0);
        assert_eq!(by_id.tokens, [format!("token_id:{}", tokens[0])]);
        assert_eq!(by_id.top_logprobs[0].as_ref().unwrap().0.len(), 1);
    }

    #[test]
    fn prompt_tokens_have_ranks_and_the_first_has_nothing() {
        let tokenizer = tokenizer();
        let names = TokenNames { tokenizer: &tokenizer, by_id: false };
        let first = TokenEvent { token: 40, logprob: None, rank: 0, top: vec![] };
        let prompt = [TokenPiece { event: first, offset: 0 }, piece(50)];
        let json = serde_json::to_value(names.prompt(&prompt, 1)).unwrap();
        assert!(json[0].is_null());
        assert_eq!((&json[1]["50"]["rank"], &json[1]["51"]["rank"]), (&2.into(), &1.into()));
        assert_eq!(json[1].as_object().unwrap().len(), 2);
        assert_eq!(json[1]["50"]["decoded_token"], tokenizer.token_text(50));
    }
}
