//! Turns of text with marked thoughts and calls.

use super::call::{OpenCall, Step};
use super::calls::CallFormat;
use super::{Callable, Delta, Thoughts, find_first, held_back};
use std::sync::Arc;

/// See [`super::TurnStyle::Marked`].
#[derive(Debug, Clone)]
pub struct Parser {
    thoughts: Option<Thoughts>,
    calls: Option<(&'static CallFormat, Arc<[Callable]>)>,
    state: State,
    /// In [`State::Call`].
    call: OpenCall,
    /// Not decided yet.
    held: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Thoughts may begin here.
    Start,
    /// Just after their mark: line breaks here are no part of them.
    BeforeThoughts,
    Thinking,
    /// Just after thoughts: line breaks that part them from the text belong to neither.
    AfterThoughts,
    Text,
    /// Behind the mark that begins a call.
    Call,
}

impl Parser {
    pub(super) fn new(
        thoughts: Option<Thoughts>,
        prompt: &str,
        calls: Option<(&'static CallFormat, Arc<[Callable]>)>,
    ) -> Self {
        let state = match thoughts {
            Some(thoughts) if thoughts.begun_in(prompt) => State::BeforeThoughts,
            Some(_) => State::Start,
            None => State::Text,
        };
        Parser { thoughts, calls, state, call: OpenCall::new(), held: String::new() }
    }

    pub(super) fn push(&mut self, text: &str, out: &mut Vec<Delta>) {
        self.held.push_str(text);
        while self.step(out) {}
    }

    pub(super) fn finish(&mut self, out: &mut Vec<Delta>) {
        while self.state == State::Call {
            self.call(true, out);
        }
        let rest = std::mem::take(&mut self.held);
        match self.state {
            State::BeforeThoughts | State::Thinking => say(out, Delta::Reasoning(rest)),
            State::Start | State::AfterThoughts | State::Text | State::Call => say(out, Delta::Content(rest)),
        }
    }

    /// Decides about the front of what is held; false when more text is needed for that.
    fn step(&mut self, out: &mut Vec<Delta>) -> bool {
        match self.state {
            State::Start => self.start(),
            State::Thinking => {
                let close = self.thoughts.expect("only models that think are thinking").close;
                match self.take_until([close]) {
                    Ok((before, _)) => {
                        say(out, Delta::Reasoning(before.trim_end_matches('\n').to_owned()));
                        self.state = State::AfterThoughts;
                        true
                    }
                    Err(certain) => {
                        // Line breaks before the end of the thoughts are no part of them.
                        let kept = certain.trim_end_matches('\n').len();
                        self.held.insert_str(0, &certain[kept..]);
                        say(out, Delta::Reasoning(certain[..kept].to_owned()));
                        false
                    }
                }
            }
            State::BeforeThoughts => self.skip_breaks(State::Thinking),
            State::AfterThoughts => self.skip_breaks(State::Text),
            State::Text => self.text(out),
            State::Call => self.call(false, out),
        }
    }

    /// Drops line breaks up to the first other character, with which `next` begins.
    fn skip_breaks(&mut self, next: State) -> bool {
        let breaks = self.held.len() - self.held.trim_start_matches(['\n', '\r']).len();
        self.held.drain(..breaks);
        if !self.held.is_empty() {
            self.state = next;
        }
        !self.held.is_empty()
    }

    fn start(&mut self) -> bool {
        let open = self.thoughts.expect("only models that think may begin to").open;
        let text = self.held.trim_start();
        if let Some(rest) = text.strip_prefix(open) {
            self.held = rest.to_owned();
            self.state = State::BeforeThoughts;
            return true;
        }
        if open.starts_with(text) {
            return false;
        }
        self.state = State::Text;
        true
    }

    fn text(&mut self, out: &mut Vec<Delta>) -> bool {
        let Some((format, _)) = &self.calls else {
            let text = std::mem::take(&mut self.held);
            say(out, Delta::Content(text));
            return false;
        };
        let marks = [format.call.0, format.section.0, format.section.1];
        match self.take_until(marks) {
            Ok((before, mark)) => {
                let is_call = mark == marks[0];
                // White space between text and a call parts them and belongs to neither.
                say(out, Delta::Content(before.trim_end().to_owned()));
                if is_call {
                    (self.state, self.call) = (State::Call, OpenCall::new());
                }
                true
            }
            Err(certain) => {
                let kept = certain.trim_end().len();
                self.held.insert_str(0, &certain[kept..]);
                say(out, Delta::Content(certain[..kept].to_owned()));
                false
            }
        }
    }

    fn call(&mut self, ended: bool, out: &mut Vec<Delta>) -> bool {
        let (format, tools) = self.calls.as_ref().expect("calls are only looked for where they are known");
        match self.call.step(format, tools, &mut self.held, ended, out) {
            Step::More => return false,
            Step::Again => {}
            Step::Text => self.state = State::Text,
            Step::Call => self.call = OpenCall::new(),
        }
        true
    }

    /// Splits at the first of the marks; else takes what certainly holds none.
    fn take_until<'m, const N: usize>(&mut self, marks: [&'m str; N]) -> Result<(String, &'m str), String> {
        if let Some((at, mark)) = find_first(&self.held, marks) {
            let rest = self.held.split_off(at + mark.len());
            let mut before = std::mem::replace(&mut self.held, rest);
            before.truncate(at);
            return Ok((before, mark));
        }
        let undecided = self.held.split_off(self.held.len() - held_back(&self.held, marks));
        Err(std::mem::replace(&mut self.held, undecided))
    }
}

/// Adds what is not empty.
fn say(out: &mut Vec<Delta>, delta: Delta) {
    let empty = matches!(&delta, Delta::Reasoning(text) | Delta::Content(text) if text.is_empty());
    if !empty {
        out.push(delta);
    }
}
