//! The assistant's turn, taken apart: thoughts, text, tool calls. The reverse of a chat template, and like it different
//! from family to family; the differences are data ([`calls`]) picked by what the template itself mentions.

mod call;
mod calls;
mod harmony;
mod marked;
mod required;

use super::Tokenizer;
use super::chat::ChatTemplate;
use super::grammar::{GrammarSource, GrammarStart};
use calls::CallFormat;
use serde_json::Value;
use std::sync::Arc;

/// How a model writes its turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TurnStyle {
    /// Text, with marked thoughts before it and marked calls in it, where the model knows them.
    Marked {
        /// How thoughts begin and end.
        thoughts: Option<Thoughts>,
        /// How tools are called.
        calls: Option<&'static CallFormat>,
    },
    /// gpt-oss: messages on the channels analysis, commentary and final.
    Harmony {
        /// The template shows tools to the model.
        calls: bool,
    },
}

/// What stands around thoughts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Thoughts {
    open: &'static str,
    close: &'static str,
}

const THOUGHTS: [Thoughts; 2] =
    [Thoughts { open: "<think>", close: "</think>" }, Thoughts { open: "[THINK]", close: "[/THINK]" }];

/// A function that may be called.
#[derive(Debug, Clone, PartialEq)]
pub struct Callable {
    /// Its name.
    pub name: String,
    /// JSON schema of its arguments.
    pub parameters: Value,
}

/// A part of a turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Delta {
    /// More thoughts.
    Reasoning(String),
    /// More text for the user.
    Content(String),
    /// A call of this function begins.
    Call {
        /// Of the function.
        name: String,
    },
    /// More of the arguments of the call that began last: of the text of a JSON object.
    Arguments(String),
}

impl TurnStyle {
    /// The style that `template` was written for; `None` for a model that writes text and nothing else.
    pub fn of(template: &ChatTemplate) -> Option<TurnStyle> {
        let calls = template.reads("tools");
        if template.mentions("<|channel|>") {
            return Some(TurnStyle::Harmony { calls });
        }
        let thoughts = THOUGHTS.into_iter().find(|thoughts| template.mentions(thoughts.close));
        let calls = calls.then(|| CallFormat::of(template)).flatten();
        (thoughts.is_some() || calls.is_some()).then_some(TurnStyle::Marked { thoughts, calls })
    }

    /// It can call tools, in a format known here.
    pub fn calls_tools(&self) -> bool {
        match self {
            TurnStyle::Marked { calls, .. } => calls.is_some(),
            TurnStyle::Harmony { calls } => *calls,
        }
    }

    /// Special tokens that tell the parts apart and so must not be dropped from the text.
    pub fn kept_tokens(&self, tokenizer: &Tokenizer) -> Vec<u32> {
        let texts: Vec<&str> = match self {
            TurnStyle::Harmony { .. } => harmony::MARKS.to_vec(),
            TurnStyle::Marked { thoughts, calls } => {
                let thoughts = thoughts.iter().flat_map(|thoughts| [thoughts.open, thoughts.close]);
                thoughts.chain(calls.iter().flat_map(|calls| calls.marks())).collect()
            }
        };
        let ids = texts.into_iter().filter_map(|text| tokenizer.token_id(text));
        ids.filter(|&id| tokenizer.is_special(id)).collect()
    }

    /// Where a turn after `prompt` begins to follow a grammar for its text.
    pub fn grammar_start(&self, tokenizer: &Tokenizer, prompt: &str) -> GrammarStart {
        match self {
            TurnStyle::Harmony { .. } => {
                let after = tokenizer.encode("<|channel|>final<|message|>", false).unwrap_or_default();
                GrammarStart { after, unless_begun_by: None }
            }
            TurnStyle::Marked { thoughts: Some(thoughts), .. } => {
                let (open, close) = (tokenizer.token_id(thoughts.open), tokenizer.token_id(thoughts.close));
                match (open, close) {
                    (Some(open), Some(close)) => GrammarStart {
                        after: vec![close],
                        unless_begun_by: (!thoughts.begun_in(prompt)).then_some(open),
                    },
                    _ => GrammarStart::default(),
                }
            }
            TurnStyle::Marked { .. } => GrammarStart::default(),
        }
    }

    /// A Lark grammar for a turn that calls at least one of `tools`, and no more than one unless `parallel`; and where
    /// it begins.
    ///
    /// # Errors
    /// When a schema is none, or the style knows no calls.
    pub fn required_calls(
        &self,
        tokenizer: &Tokenizer,
        tools: &[Callable],
        parallel: bool,
        prompt: &str,
    ) -> Result<(GrammarSource, GrammarStart), String> {
        let (lark, start) = match self {
            TurnStyle::Harmony { .. } => (required::harmony(tokenizer, tools)?, GrammarStart::default()),
            TurnStyle::Marked { calls, .. } => {
                let calls = calls.ok_or("this model knows no tool calls")?;
                (required::marked(calls, tokenizer, tools, parallel)?, self.grammar_start(tokenizer, prompt))
            }
        };
        Ok((GrammarSource::Lark(lark), start))
    }

    /// A grammar for a turn that either calls tools, as [`Self::required_calls`] has it, or is a text that follows
    /// `answer`; and where it begins.
    ///
    /// # Errors
    /// As [`Self::required_calls`], and when `answer` is a grammar, which cannot be part of another one.
    pub fn answer_or_calls(
        &self,
        answer: &GrammarSource,
        tokenizer: &Tokenizer,
        tools: &[Callable],
        parallel: bool,
        prompt: &str,
    ) -> Result<(GrammarSource, GrammarStart), String> {
        let start = self.grammar_start(tokenizer, prompt);
        match self {
            // Calls have a channel of their own, where no grammar holds.
            TurnStyle::Harmony { .. } => Ok((answer.clone(), start)),
            TurnStyle::Marked { calls, .. } => {
                let calls = calls.ok_or("this model knows no tool calls")?;
                let lark = required::answer_or_marked(answer, calls, tokenizer, tools, parallel)?;
                Ok((GrammarSource::Lark(lark), start))
            }
        }
    }

    /// A parser for a turn after `prompt`; without `tools`, calls are text like other text.
    pub fn parser(&self, prompt: &str, tools: Option<Arc<[Callable]>>) -> TurnParser {
        match *self {
            TurnStyle::Harmony { .. } => TurnParser::Harmony(harmony::Parser::new(tools.is_some())),
            TurnStyle::Marked { thoughts, calls } => {
                let calls = calls.zip(tools);
                TurnParser::Marked(marked::Parser::new(thoughts, prompt, calls))
            }
        }
    }
}

impl Thoughts {
    /// The template has opened them already.
    fn begun_in(&self, prompt: &str) -> bool {
        prompt.trim_end().ends_with(self.open)
    }
}

/// Takes a turn apart while it is written, wherever its pieces break.
#[derive(Debug, Clone)]
pub enum TurnParser {
    /// See [`TurnStyle::Marked`].
    Marked(marked::Parser),
    /// See [`TurnStyle::Harmony`].
    Harmony(harmony::Parser),
}

impl TurnParser {
    /// Takes more of the turn; what became certain.
    pub fn push(&mut self, text: &str, out: &mut Vec<Delta>) {
        match self {
            TurnParser::Marked(parser) => parser.push(text, out),
            TurnParser::Harmony(parser) => parser.push(text, out),
        }
    }

    /// The turn ended.
    pub fn finish(&mut self, out: &mut Vec<Delta>) {
        match self {
            TurnParser::Marked(parser) => parser.finish(out),
            TurnParser::Harmony(parser) => parser.finish(out),
        }
    }
}

/// Where the first of `marks` stands in `text`: byte, and which.
fn find_first<'m>(text: &str, marks: impl IntoIterator<Item = &'m str>) -> Option<(usize, &'m str)> {
    let found =
        marks.into_iter().filter(|mark| !mark.is_empty()).filter_map(|mark| Some((text.find(mark)?, mark)));
    // Of two at one place the longer one.
    found.min_by_key(|&(at, mark)| (at, std::cmp::Reverse(mark.len())))
}

/// Bytes at the end of `text` that may be the beginning of one of `marks`.
fn held_back<'m>(text: &str, marks: impl IntoIterator<Item = &'m str>) -> usize {
    let beginning =
        |mark: &str| (1..mark.len()).rev().find(|&n| mark.is_char_boundary(n) && text.ends_with(&mark[..n]));
    marks.into_iter().filter_map(beginning).max().unwrap_or(0)
}

#[cfg(test)]
mod tests;
