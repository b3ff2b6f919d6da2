//! gpt-oss's turns: messages with a header that names a channel and perhaps a recipient, as OpenAI's harmony format has it.

use super::{Delta, find_first, held_back};

const CHANNEL: &str = "<|channel|>";
const MESSAGE: &str = "<|message|>";
const CONSTRAIN: &str = "<|constrain|>";
const ENDS: [&str; 4] = ["<|end|>", "<|call|>", "<|return|>", "<|start|>"];

/// Tokens that structure a turn.
pub(super) const MARKS: [&str; 7] = [CHANNEL, MESSAGE, CONSTRAIN, ENDS[0], ENDS[1], ENDS[2], ENDS[3]];

/// See [`super::TurnStyle::Harmony`].
#[derive(Debug, Clone)]
pub struct Parser {
    /// Messages to functions are calls.
    calls: bool,
    state: State,
    /// Not decided yet.
    held: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    /// Up to the message itself.
    Header,
    Analysis,
    /// Commentary and final.
    Text,
    /// To this function.
    Call(String),
}

impl Parser {
    pub(super) fn new(calls: bool) -> Self {
        Parser { calls, state: State::Header, held: String::new() }
    }

    pub(super) fn push(&mut self, text: &str, out: &mut Vec<Delta>) {
        self.held.push_str(text);
        while self.step(out) {}
    }

    pub(super) fn finish(&mut self, out: &mut Vec<Delta>) {
        let rest = std::mem::take(&mut self.held);
        match self.state.clone() {
            // No message came of it: a model that leaves its format is still to be heard.
            State::Header => {
                if !rest.trim_start_matches(ENDS[3]).trim_start_matches("assistant").trim().is_empty() {
                    out.push(Delta::Content(rest));
                }
            }
            state => self.tell(&state, rest, true, out),
        }
    }

    fn step(&mut self, out: &mut Vec<Delta>) -> bool {
        if self.state == State::Header {
            let Some((header, rest)) = self.held.split_once(MESSAGE) else { return false };
            self.state = self.state_after(header);
            self.held = rest.to_owned();
            return true;
        }
        let state = self.state.clone();
        if let Some((at, mark)) = find_first(&self.held, ENDS) {
            let rest = self.held.split_off(at + mark.len());
            let mut body = std::mem::replace(&mut self.held, rest);
            body.truncate(at);
            self.tell(&state, body, true, out);
            self.state = State::Header;
            return true;
        }
        if !matches!(state, State::Call(_)) {
            let undecided = self.held.split_off(self.held.len() - held_back(&self.held, ENDS));
            let certain = std::mem::replace(&mut self.held, undecided);
            self.tell(&state, certain, false, out);
        }
        false
    }

    fn state_after(&self, header: &str) -> State {
        let recipient = header.split_once("to=functions.").map(|(_, rest)| {
            rest.split(|c: char| c.is_whitespace() || c == '<').next().unwrap_or_default().to_owned()
        });
        match recipient {
            Some(name) if self.calls && !name.is_empty() => State::Call(name),
            _ if header
                .split_once(CHANNEL)
                .is_some_and(|(_, name)| name.trim_start().starts_with("analysis")) =>
            {
                State::Analysis
            }
            _ => State::Text,
        }
    }

    fn tell(&self, state: &State, text: String, whole: bool, out: &mut Vec<Delta>) {
        match state {
            _ if text.is_empty() && !whole => {}
            State::Call(name) => {
                let arguments = if text.trim().is_empty() { "{}".to_owned() } else { text.trim().to_owned() };
                out.push(Delta::Call { name: name.clone(), arguments });
            }
            _ if text.is_empty() => {}
            State::Analysis => out.push(Delta::Reasoning(text)),
            State::Text | State::Header => out.push(Delta::Content(text)),
        }
    }
}
