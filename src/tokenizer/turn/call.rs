//! A call while it is written: its name as soon as it is certain, then its arguments as they come.
//!
//! Only a call of a tool that was offered, in the usual order (name, then arguments), can be told early. Others are told
//! when they are whole, and text that turns out to be no call is text. What was decided never depends on where the pieces
//! of a turn break.

use super::calls::{Body, CallFormat, typed};
use super::{Callable, Delta, find_first, held_back};
use serde_json::Value;

/// Bytes in which the head of a call must be found: longer than any name and what stands around it.
const MAX_HEAD_BYTES: usize = 512;

/// The call of a turn that was begun last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenCall {
    at: At,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum At {
    /// Before the arguments; in a list of calls, the first one or another.
    Head { first: bool },
    /// In the arguments, which are JSON.
    Json(Nesting),
    /// Between arguments that stand in tags.
    Tags(Tagged),
    /// Behind the arguments, in the object that has them.
    Tail(Nesting),
    /// Behind a call of a list.
    List,
    /// Behind everything that says something.
    Rest,
    /// Only the whole can tell whether this is a call.
    Whole,
}

/// What is to be done next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// More text is needed.
    More,
    /// Another step.
    Again,
    /// The call has ended, and text may follow.
    Text,
    /// The call has ended with the mark of the next one.
    Call,
}

impl OpenCall {
    /// Just behind the mark that begins a call.
    pub fn new() -> Self {
        OpenCall { at: At::Head { first: true } }
    }

    /// Decides about the front of `held`. `ended`: nothing will follow it.
    pub fn step(
        &mut self,
        format: &CallFormat,
        tools: &[Callable],
        held: &mut String,
        ended: bool,
        out: &mut Vec<Delta>,
    ) -> Step {
        let end = if format.call.1.is_empty() { format.call.0 } else { format.call.1 };
        match &mut self.at {
            At::Head { first } => {
                let found = held.find(end);
                let text = &held[..found.unwrap_or(held.len())];
                match head(format, tools, text, *first) {
                    Ok((name, from)) => {
                        held.drain(..from);
                        out.push(Delta::Call { name: name.clone() });
                        self.at = match format.body {
                            Body::KeyValueTags { .. } | Body::NamedTags => {
                                At::Tags(Tagged { name, keys: Vec::new() })
                            }
                            Body::Object | Body::List | Body::Named { .. } => At::Json(Nesting::default()),
                        };
                    }
                    Err(Undecided::Unfinished) if found.is_none() && !ended => return Step::More,
                    Err(Undecided::Unfinished) if !*first => {
                        held.drain(..found.unwrap_or(held.len()));
                        self.at = At::Rest;
                    }
                    Err(Undecided::Never) if !*first => {
                        // What is left of the list is one too.
                        held.insert(0, '[');
                        self.at = At::Whole;
                    }
                    Err(_) => self.at = At::Whole,
                }
                Step::Again
            }
            At::Json(nesting) => {
                let (length, pause) = nesting.follow(held, end);
                let told: String = held.drain(..length).collect();
                if !told.is_empty() {
                    out.push(Delta::Arguments(told));
                }
                match pause {
                    Pause::More if ended => held.clear(),
                    Pause::More => return Step::More,
                    Pause::Mark => {}
                    Pause::Whole if matches!(format.body, Body::Object | Body::List) => {
                        self.at = At::Tail(Nesting::inside());
                        return Step::Again;
                    }
                    Pause::Whole => {}
                }
                self.at = At::Rest;
                Step::Again
            }
            At::Tail(nesting) => {
                let (length, pause) = nesting.follow(held, end);
                held.drain(..length);
                match pause {
                    Pause::More if ended => held.clear(),
                    Pause::More => return Step::More,
                    Pause::Mark => {}
                    Pause::Whole if format.body == Body::List => {
                        self.at = At::List;
                        return Step::Again;
                    }
                    Pause::Whole => {}
                }
                self.at = At::Rest;
                Step::Again
            }
            At::List => {
                skip_space(held);
                if held.is_empty() && !ended {
                    return Step::More;
                }
                self.at = if held.starts_with(',') { At::Head { first: false } } else { At::Rest };
                if held.starts_with([',', ']']) {
                    held.remove(0);
                }
                Step::Again
            }
            At::Tags(tagged) => tagged.step(format, tools, held, ended, out),
            At::Rest if format.call.1.is_empty() => {
                skip_space(held);
                match held.is_empty() && !ended {
                    true => Step::More,
                    false => Step::Text,
                }
            }
            At::Rest => match held.find(end) {
                Some(at) => {
                    held.drain(..at + end.len());
                    Step::Text
                }
                None => {
                    let kept = if ended { 0 } else { held_back(held, [end]) };
                    held.drain(..held.len() - kept);
                    if ended { Step::Text } else { Step::More }
                }
            },
            At::Whole => {
                let (body, mark) = match held.find(end) {
                    Some(at) => {
                        let rest = held.split_off(at + end.len());
                        let mut body = std::mem::replace(held, rest);
                        body.truncate(at);
                        (body, format.call.1)
                    }
                    None if ended => (std::mem::take(held), ""),
                    None => return Step::More,
                };
                match format.read(&body, tools) {
                    Some(calls) => {
                        out.extend(calls.into_iter().flat_map(|(name, arguments)| {
                            [Delta::Call { name }, Delta::Arguments(arguments)]
                        }))
                    }
                    None => out.push(Delta::Content(format!("{}{body}{mark}", format.call.0))),
                }
                // A call without an end of its own was ended by the next one's beginning.
                if format.call.1.is_empty() && !ended { Step::Call } else { Step::Text }
            }
        }
    }
}

/// Why the head of a call is none yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Undecided {
    Unfinished,
    /// Whatever follows.
    Never,
}

/// The name in the head of a call, and where its arguments begin.
fn head(
    format: &CallFormat,
    tools: &[Callable],
    text: &str,
    first: bool,
) -> Result<(String, usize), Undecided> {
    let mut cursor = Cursor { text, at: 0 };
    cursor.skip_space();
    let name = match format.body {
        Body::Object => cursor.object()?,
        Body::List => {
            if first {
                cursor.literal("[")?;
                cursor.skip_space();
            }
            cursor.object()?
        }
        Body::Named { before, between, .. } => {
            let name = cursor.until(between.trim())?;
            cursor.skip_space();
            cursor.literal("{")?;
            cursor.at -= 1;
            CallFormat::bare_name(name, before).to_owned()
        }
        Body::KeyValueTags { key, .. } => {
            let name = cursor.until(key.0)?.trim().to_owned();
            cursor.at -= key.0.len();
            name
        }
        Body::NamedTags => {
            cursor.literal("<function=")?;
            cursor.until(">")?.trim().to_owned()
        }
    };
    match tools.iter().any(|tool| tool.name == name) {
        true => Ok((name, cursor.at)),
        false => Err(Undecided::Never),
    }
}

/// A place in the text of a head.
struct Cursor<'t> {
    text: &'t str,
    at: usize,
}

impl<'t> Cursor<'t> {
    fn rest(&self) -> &'t str {
        &self.text[self.at..]
    }

    fn skip_space(&mut self) {
        self.at = self.text.len() - self.rest().trim_start().len();
    }

    fn literal(&mut self, word: &str) -> Result<(), Undecided> {
        if self.rest().starts_with(word) {
            self.at += word.len();
            return Ok(());
        }
        Err(if word.starts_with(self.rest()) { Undecided::Unfinished } else { Undecided::Never })
    }

    /// What stands before `mark`, which is skipped.
    fn until(&mut self, mark: &str) -> Result<&'t str, Undecided> {
        match self.rest().find(mark) {
            Some(length) => {
                let before = &self.rest()[..length];
                self.at += length + mark.len();
                Ok(before)
            }
            None if self.rest().len() > MAX_HEAD_BYTES => Err(Undecided::Never),
            None => Err(Undecided::Unfinished),
        }
    }

    /// The name in `{"name": "...", "arguments": {`, up to that last brace.
    fn object(&mut self) -> Result<String, Undecided> {
        for word in ["{", "\"name\"", ":"] {
            self.literal(word)?;
            self.skip_space();
        }
        self.literal("\"")?;
        // Names have no escapes.
        let name = self.until("\"")?.to_owned();
        self.skip_space();
        self.literal(",")?;
        self.skip_space();
        let old = self.literal("\"parameters\"");
        if old.is_err() {
            self.literal("\"arguments\"")
                .map_err(|new| if old == Err(Undecided::Unfinished) { Undecided::Unfinished } else { new })?;
        }
        self.skip_space();
        self.literal(":")?;
        self.skip_space();
        self.literal("{")?;
        self.at -= 1;
        Ok(name)
    }
}

/// How deep in brackets a piece of JSON is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Nesting {
    depth: usize,
    in_string: bool,
    escaped: bool,
}

/// Why a piece of JSON goes no further.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pause {
    /// There is no more text.
    More,
    /// Its outermost bracket closed.
    Whole,
    /// The mark of a call's end stands where no JSON goes on.
    Mark,
}

impl Nesting {
    /// Behind a first bracket.
    fn inside() -> Self {
        Nesting { depth: 1, ..Nesting::default() }
    }

    /// Follows JSON; how many bytes belong to it, and what comes then.
    fn follow(&mut self, text: &str, end: &str) -> (usize, Pause) {
        for (at, c) in text.char_indices() {
            if self.in_string {
                self.in_string = self.escaped || c != '"';
                self.escaped = !self.escaped && c == '\\';
                continue;
            }
            if text[at..].starts_with(end) {
                return (at, Pause::Mark);
            }
            if end.starts_with(&text[at..]) {
                return (at, Pause::More);
            }
            match c {
                '"' => self.in_string = true,
                '{' | '[' => self.depth += 1,
                '}' | ']' => self.depth = self.depth.saturating_sub(1),
                _ => {}
            }
            if self.depth == 0 {
                return (at + c.len_utf8(), Pause::Whole);
            }
        }
        (text.len(), Pause::More)
    }
}

/// A call whose arguments stand in tags: each is told as JSON when it is whole.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Tagged {
    /// Of the tool.
    name: String,
    /// Of the arguments told.
    keys: Vec<String>,
}

impl Tagged {
    fn step(
        &mut self,
        format: &CallFormat,
        tools: &[Callable],
        held: &mut String,
        ended: bool,
        out: &mut Vec<Delta>,
    ) -> Step {
        let next = find_first(held, [format.body.argument_mark(), format.call.1]);
        let argument = next.filter(|(_, mark)| *mark != format.call.1);
        if let Some((key, text, length)) = argument.and_then(|(at, _)| {
            let (key, text, length) = format.body.argument(&held[at..])?;
            Some((key.to_owned(), typed(text, tools, &self.name, key), at + length))
        }) {
            held.drain(..length);
            if !self.keys.contains(&key) {
                let before = if self.keys.is_empty() { '{' } else { ',' };
                out.push(Delta::Arguments(format!("{before}{}:{text}", Value::from(key.as_str()))));
                self.keys.push(key);
            }
            return Step::Again;
        }
        match next {
            Some((at, mark)) if mark == format.call.1 => drop(held.drain(..at + mark.len())),
            _ if ended => held.clear(),
            _ => return Step::More,
        }
        out.push(Delta::Arguments(if self.keys.is_empty() { "{}" } else { "}" }.to_owned()));
        Step::Text
    }
}

fn skip_space(held: &mut String) {
    let spaces = held.len() - held.trim_start().len();
    held.drain(..spaces);
}
