//! A model behind the real engine, as the command line starts it.

use std::time::Duration;

use moeyard::cli::launch::{Launched, Needs, Prepared};
use moeyard::cli::model::OpenModel;
use moeyard::config::RawOptions;
use moeyard::config::flags::DtypeChoice;
use moeyard::config::size::ByteSize;
use moeyard::engine::rebalance::Mode;
use moeyard::engine::request::{Event, FinishReason, Finished, Request, TokenEvent};
use moeyard::engine::{EngineHandle, EngineStats, RequestStream};

use super::model_dir;

/// A running engine with what it was made from.
pub struct Launch {
    pub prepared: Prepared,
    launched: Launched,
}

/// Options of a test run: one thread per rank, a cache that costs no time to clear, and experts that stay unless the test
/// moves them.
pub fn options(dtype: DtypeChoice) -> RawOptions {
    RawOptions {
        dtype: Some(dtype),
        threads: Some(1),
        block_size: Some(16),
        max_model_len: Some(256),
        kv_cache_memory: Some(ByteSize(16 << 20)),
        rebalance: Some(Mode::Off),
        ..RawOptions::default()
    }
}

impl Launch {
    pub fn of(model: &str, raw: RawOptions) -> Launch {
        let model = OpenModel::open(Some(&model_dir(model))).unwrap();
        let prepared = Prepared::new(model, raw, Needs::default()).unwrap();
        let launched = prepared.launch(Needs::default(), None).unwrap();
        Launch { prepared, launched }
    }

    pub fn submit(&self, request: Request) -> RequestStream {
        self.launched.engine.submit(request).unwrap()
    }

    /// Runs requests side by side; answers in their order.
    pub fn run(&self, requests: Vec<Request>) -> Vec<Answer> {
        let streams: Vec<_> = requests.into_iter().map(|request| self.submit(request)).collect();
        streams.into_iter().map(Answer::of).collect()
    }

    pub fn engine(&self) -> &EngineHandle {
        &self.launched.engine
    }

    pub fn stats(&self) -> EngineStats {
        self.launched.engine.stats()
    }

    /// Ends the engine and completes the trace, if there is one.
    pub fn finish(self) -> Prepared {
        self.launched.finish(Duration::ZERO, Duration::MAX).unwrap();
        self.prepared
    }
}

/// A token, the bits of its log-probability, and those of the best tokens.
pub type TokenBits = (u32, u32, Vec<(u32, u32)>);

/// Greedy, with log-probabilities and without end-of-text tokens.
pub fn greedy(prompt: &[u32], max_tokens: usize) -> Request {
    Request { logprobs: Some(5), ..Request::greedy(prompt.to_vec(), max_tokens) }
}

/// All events of one request.
pub struct Answer {
    pub id: u64,
    pub tokens: Vec<TokenEvent>,
    pub finished: Finished,
}

impl Answer {
    pub fn of(mut stream: RequestStream) -> Answer {
        let mut tokens = Vec::new();
        loop {
            match stream.blocking_next().expect("a stream without an end") {
                Event::Prompt(_) => {}
                Event::Token(token) => tokens.push(token),
                Event::Finished(finished) => {
                    assert_eq!(finished.reason, FinishReason::Length);
                    return Answer { id: stream.id(), tokens, finished };
                }
            }
        }
    }

    pub fn ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|event| event.token).collect()
    }

    /// Tokens and the bits of every log-probability reported.
    pub fn bits(&self) -> Vec<TokenBits> {
        let top = |event: &TokenEvent| event.top.iter().map(|&(id, p)| (id, p.to_bits())).collect();
        self.tokens.iter().map(|t| (t.token, t.logprob.unwrap().to_bits(), top(t))).collect()
    }
}
