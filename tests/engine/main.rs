//! The engine from outside, threads included, over the scripted model: streams, refusals, faults and the end.

mod answers;
mod ends;
mod faults;
mod gate;
mod observers;
#[path = "../support/patience.rs"]
mod patience;
mod refusals;

use std::sync::Arc;

use moeyard::backend::Backend;
use moeyard::backend::reference::ReferenceBackend;
use moeyard::engine::request::{Event, Finished, Request, TokenEvent};
use moeyard::engine::scripted::{Script, setups};
use moeyard::engine::{Engine, EngineHandle, EngineOptions, Hooks, RequestStream};

fn request(prompt: Vec<u32>, max_tokens: usize) -> Request {
    Request::greedy(prompt, max_tokens)
}

fn prompt(salt: u32, len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| (i * 7 + salt * 13) % 60).collect()
}

fn backend() -> Arc<dyn Backend> {
    Arc::new(ReferenceBackend)
}

/// An engine of `tp * dp` scripted ranks.
fn start(options: &EngineOptions, (tp, dp): (usize, usize), hooks: Hooks) -> EngineHandle {
    let ranks = setups(&Script::of(options), tp, dp, options.max_logit_rows, &backend()).unwrap();
    Engine::start(ranks, options.clone(), hooks).unwrap()
}

/// Reads a stream to its end.
fn collect(mut stream: RequestStream) -> (Vec<TokenEvent>, Finished) {
    let mut tokens = Vec::new();
    while let Some(event) = stream.blocking_next() {
        match event {
            Event::Prompt(_) => {}
            Event::Token(token) => tokens.push(token),
            Event::Finished(finished) => {
                assert!(stream.blocking_next().is_none(), "an event after the end");
                return (tokens, finished);
            }
        }
    }
    panic!("a stream without an end");
}

fn ids(tokens: &[TokenEvent]) -> Vec<u32> {
    tokens.iter().map(|event| event.token).collect()
}
