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
    /// To a function; whether arguments have been told.
    Call {
        begun: bool,
    },
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
            let (state, name) = self.state_after(header);
            out.extend(name.map(|name| Delta::Call { name }));
            self.held = rest.to_owned();
            self.state = state;
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
        let undecided = self.held.split_off(self.held.len() - held_back(&self.held, ENDS));
        let certain = std::mem::replace(&mut self.held, undecided);
        self.tell(&state, certain, false, out);
        false
    }

    /// What a message with this header is, and the function that it is for.
    fn state_after(&self, header: &str) -> (State, Option<String>) {
        let recipient = header.split_once("to=functions.").map(|(_, rest)| {
            rest.split(|c: char| c.is_whitespace() || c == '<').next().unwrap_or_default().to_owned()
        });
        let channel = header.split_once(CHANNEL).map(|(_, name)| name.trim_start());
        match recipient.filter(|name| self.calls && !name.is_empty()) {
            Some(name) => (State::Call { begun: false }, Some(name)),
            None if channel.is_some_and(|name| name.starts_with("analysis")) => (State::Analysis, None),
            None => (State::Text, None),
        }
    }

    /// Tells `text` of a message; `whole` when it is the message's end.
    fn tell(&mut self, state: &State, text: String, whole: bool, out: &mut Vec<Delta>) {
        match state {
            State::Call { begun } => {
                // White space around arguments is none of them; inside, it comes with what follows it.
                let told = if *begun { text.trim_end() } else { text.trim() };
                if !whole {
                    let kept = text.trim_end().len();
                    self.held.insert_str(0, &text[kept..]);
                }
                if !told.is_empty() {
                    out.push(Delta::Arguments(told.to_owned()));
                    self.state = State::Call { begun: true };
                } else if whole && !begun {
                    out.push(Delta::Arguments("{}".to_owned()));
                }
            }
            _ if text.is_empty() => {}
            State::Analysis => out.push(Delta::Reasoning(text)),
            State::Text | State::Header => out.push(Delta::Content(text)),
        }
    }
}
