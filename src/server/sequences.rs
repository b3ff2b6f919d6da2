//! The sequences of one HTTP request while they run: one task each reads the engine's events, and dropping the whole
//! ends the tasks, drops their streams and so aborts what still runs.

use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::error::ApiError;
use super::metrics::{Metrics, Outcome};
use super::request::{CompletionRequest, DEFAULT_MAX_TOKENS};
use super::shutdown::{Shutdown, Stage};
use super::state::AppState;
use super::transcript::{Piece, Rules, Transcript};
use crate::engine::RequestStream;
use crate::engine::request::{Capture, Request};

/// Pieces that wait for the client, over all sequences of a request; more stay with the engine, whose queue is bounded
/// by the request's `max_tokens`.
const PIECES_AHEAD: usize = 32;

/// A piece, and the number of the prompt it continues.
pub type Numbered = (usize, Result<Piece, ApiError>);

/// The running sequences of one HTTP request.
pub struct Sequences {
    pieces: mpsc::Receiver<Numbered>,
    /// Sequences whose end has not been handed out.
    unfinished: usize,
    /// Prompt tokens of each sequence.
    prompt_tokens: Vec<usize>,
    /// Held for its drop, which ends the tasks.
    _tasks: JoinSet<()>,
}

impl Sequences {
    /// Submits one sequence per prompt. When one is refused, none runs.
    pub fn start(
        state: &AppState,
        prompts: Vec<Vec<u32>>,
        asked: &CompletionRequest,
    ) -> Result<Self, ApiError> {
        let rules = Rules {
            stop: &asked.stop,
            stop_token_ids: &asked.stop_token_ids,
            eos_token_ids: if asked.ignore_eos { &[] } else { &state.eos_token_ids },
            logprobs: asked.logprobs,
        };
        let prompt_tokens: Vec<usize> = prompts.iter().map(Vec::len).collect();
        // All are submitted before the first is read: a refusal drops, and so aborts, those before it.
        let mut submitted = Vec::with_capacity(prompts.len());
        for prompt in prompts {
            let transcript = Transcript::new(Arc::clone(&state.tokenizer), rules)?;
            let request = engine_request(prompt, asked, rules, state.engine.options().max_model_len);
            let stream =
                state.engine.submit(request).inspect_err(|error| state.metrics.count_refusal(error))?;
            submitted.push((stream, transcript));
        }
        let unfinished = submitted.len();
        let (sender, pieces) = mpsc::channel(PIECES_AHEAD);
        let mut tasks = JoinSet::new();
        for (index, (stream, transcript)) in submitted.into_iter().enumerate() {
            let reader = Reader {
                index,
                stream,
                transcript,
                pieces: sender.clone(),
                patience: state.options.stalled_reader_timeout,
                outcome: Counted { metrics: Arc::clone(&state.metrics), outcome: Outcome::Abort },
            };
            tasks.spawn(reader.run(state.shutdown.clone()));
        }
        Ok(Sequences { pieces, unfinished, prompt_tokens, _tasks: tasks })
    }

    /// Prompt tokens of sequence `index`.
    pub fn prompt_tokens(&self, index: usize) -> usize {
        self.prompt_tokens[index]
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.prompt_tokens.len()
    }

    /// The next piece of any sequence; `None` when all have ended. After an error the others go on, but their request
    /// has failed.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Numbered>> {
        if self.unfinished == 0 {
            return Poll::Ready(None);
        }
        let Some((index, piece)) = ready!(self.pieces.poll_recv(context)) else {
            // The tasks are gone without having said so: one of them panicked.
            self.unfinished = 0;
            return Poll::Ready(Some((0, Err(ApiError::internal(&"a reader task ended early")))));
        };
        if piece.as_ref().map_or(true, |piece| piece.end.is_some()) {
            self.unfinished -= 1;
        }
        Poll::Ready(Some((index, piece)))
    }

    /// See [`Self::poll_next`].
    pub async fn next(&mut self) -> Option<Numbered> {
        std::future::poll_fn(|context| self.poll_next(context)).await
    }
}

fn engine_request(
    prompt: Vec<u32>,
    asked: &CompletionRequest,
    rules: Rules<'_>,
    max_model_len: usize,
) -> Request {
    // A default that was not asked for bends to what the context leaves; a full context is refused by the engine.
    let room = max_model_len.saturating_sub(prompt.len()).max(1);
    Request {
        max_tokens: asked.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS.min(room)),
        prompt,
        sampling: asked.sampling.clone(),
        stop_tokens: rules.eos_token_ids.iter().chain(rules.stop_token_ids).copied().collect(),
        logprobs: asked.logprobs,
        capture: Capture::default(),
    }
}

/// Task that turns one sequence's events into pieces.
struct Reader {
    index: usize,
    stream: RequestStream,
    transcript: Transcript,
    pieces: mpsc::Sender<Numbered>,
    /// How long the client may take nothing.
    patience: Duration,
    outcome: Counted,
}

impl Reader {
    /// Ends after the last piece, or when nobody takes pieces any more; the drop of `self` then aborts the sequence.
    async fn run(mut self, shutdown: Shutdown) {
        let mut aborting = pin!(shutdown.reached(Stage::Aborting));
        loop {
            let piece = tokio::select! {
                event = self.stream.next() => match event {
                    Some(event) => self.transcript.take(event),
                    None => Err(ApiError::internal(&"the engine's events ended without an end")),
                },
                () = &mut aborting => Err(ApiError::unavailable("The server is shutting down.")),
            };
            let outcome = match &piece {
                Ok(piece) if piece.is_empty() => continue,
                Ok(piece) => piece.end.as_ref().map(|end| Outcome::of(end.finish_reason)),
                Err(_) => Some(Outcome::Error),
            };
            let taken = timeout(self.patience, self.pieces.send((self.index, piece))).await;
            if let Some(outcome) = outcome {
                self.outcome.outcome = outcome;
                return;
            }
            if !matches!(taken, Ok(Ok(()))) {
                return;
            }
        }
    }
}

/// Counts a sequence's outcome once, however its task ends; a task that is dropped was aborted.
struct Counted {
    metrics: Arc<Metrics>,
    outcome: Outcome,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.metrics.count_sequence(self.outcome);
    }
}
