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
use super::generation::{Generation, Truncation};
use super::metrics::{Endpoint, Metrics, Outcome};
use super::shutdown::{Shutdown, Stage};
use super::state::AppState;
use super::structured::Structured;
use super::transcript::{Piece, Prompt, Rules, Transcript};
use super::types::Usage;
use crate::engine::RequestStream;
use crate::engine::request::{Capture, Event, Request};

/// Pieces that wait for the client, over all sequences of a request; more stay with the engine, whose queue is bounded
/// by the request's `max_tokens`.
const PIECES_AHEAD: usize = 32;

/// What the sequences of one HTTP request have in common.
#[derive(Clone)]
pub struct Common<'a> {
    /// Where they were asked for, for the metrics.
    pub endpoint: Endpoint,
    /// The fields of all endpoints.
    pub generation: &'a Generation,
    /// As asked for.
    pub max_tokens: Option<usize>,
    /// When nothing is asked for; bends to what the context leaves.
    pub default_max_tokens: usize,
    /// Log-probability of each token and of this many best ones.
    pub logprobs: Option<usize>,
    /// The text begins with the prompt, and so do its log-probabilities.
    pub echo: bool,
    /// A grammar that every text follows.
    pub structured: Option<&'a Structured>,
    /// Special tokens that are part of the text all the same.
    pub kept_tokens: Vec<u32>,
}

/// A piece, and the number of its sequence: choice k of prompt p is `p * n + k`.
pub type Numbered = (usize, Result<Piece, ApiError>);

/// The running sequences of one HTTP request.
pub struct Sequences {
    pieces: mpsc::Receiver<Numbered>,
    /// Sequences whose end has not been handed out.
    unfinished: usize,
    prompts: Vec<Arc<Prompt>>,
    /// Choices per prompt.
    n: usize,
    /// Its drop ends the tasks.
    tasks: JoinSet<()>,
}

impl Sequences {
    /// Submits the choices of every prompt. When one is refused, none runs.
    pub fn start(state: &AppState, mut prompts: Vec<Prompt>, common: Common<'_>) -> Result<Self, ApiError> {
        let common = &common;
        let generation = common.generation;
        generation.check(&state.tokenizer)?;
        let (max_model_len, most) =
            (state.engine.options().max_model_len, state.engine.options().max_waiting);
        // Refused before it costs memory.
        let count = prompts.len() * generation.n;
        if count > most {
            let message =
                format!("The request has {count} sequences (prompts times `n`), but only {most} may wait.");
            return Err(ApiError::bad_param("n", message));
        }
        prompts.iter_mut().for_each(|prompt| truncate(prompt, common, max_model_len));
        let prompts: Vec<Arc<Prompt>> = prompts.into_iter().map(Arc::new).collect();
        let rules = Arc::new(rules(state, common));
        let bad_words = generation.bad_word_tokens(&state.tokenizer)?;

        let (mut transcripts, mut requests) = (Vec::new(), Vec::new());
        for prompt in &prompts {
            for k in 0..generation.n {
                let (tokenizer, rules) = (Arc::clone(&state.tokenizer), Arc::clone(&rules));
                transcripts.push(Transcript::new(tokenizer, Arc::clone(&rules), Arc::clone(prompt))?);
                let sampling = generation.sampling_of(k, &bad_words);
                requests.push(Request { sampling, ..engine_request(prompt, common, &rules, max_model_len) });
            }
        }
        let streams = state.engine.submit_all(requests);
        let streams = streams.inspect_err(|error| state.metrics.count_refusal(error))?;
        let unfinished = streams.len();
        let (sender, pieces) = mpsc::channel(PIECES_AHEAD);
        let mut tasks = JoinSet::new();
        for (index, (stream, transcript)) in streams.into_iter().zip(transcripts).enumerate() {
            let reader = Reader {
                index,
                stream,
                transcript,
                gathered: Piece::default(),
                cut: Cut::of(common),
                captures: generation.routed_experts,
                pieces: sender.clone(),
                patience: state.options.stalled_reader_timeout,
                outcome: Counted {
                    metrics: Arc::clone(&state.metrics),
                    endpoint: common.endpoint,
                    outcome: Outcome::Abort,
                },
            };
            tasks.spawn(reader.run(state.shutdown.clone()));
        }
        Ok(Sequences { pieces, unfinished, prompts, n: generation.n, tasks })
    }

    /// The prompt that sequence `index` continues.
    pub fn prompt(&self, index: usize) -> &Prompt {
        &self.prompts[index / self.n]
    }

    /// Counts a sequence that `piece` ends. A prompt counts once, whatever the number of its choices.
    pub fn add_usage(&self, usage: &mut Usage, index: usize, piece: &Piece) {
        let Some(end) = &piece.end else { return };
        let prompt_tokens = self.prompt(index).tokens.len();
        let leads = index.is_multiple_of(self.n);
        let (prompt_tokens, cached_tokens) = if leads { (prompt_tokens, end.cached_tokens) } else { (0, 0) };
        usage.add(prompt_tokens, end.completion_tokens, cached_tokens);
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.prompts.len() * self.n
    }

    /// The next piece of any sequence; `None` when all have ended. After an error the others go on, but their request
    /// has failed.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Numbered>> {
        if self.unfinished == 0 {
            return Poll::Ready(None);
        }
        let (index, piece) = ready!(self.poll_piece(context));
        if piece.as_ref().map_or(true, |piece| piece.end.is_some()) {
            self.unfinished -= 1;
        }
        Poll::Ready(Some((index, piece)))
    }

    /// The next piece, or what became of a task that cannot send any more.
    fn poll_piece(&mut self, context: &mut Context<'_>) -> Poll<Numbered> {
        loop {
            match self.pieces.poll_recv(context) {
                Poll::Ready(Some(numbered)) => return Poll::Ready(numbered),
                Poll::Ready(None) => {
                    return Poll::Ready((0, Err(ApiError::internal(&"the reader tasks ended early"))));
                }
                // All that was sent has been taken: a task that has ended by now has said all it had to say.
                Poll::Pending => {}
            }
            match ready!(self.tasks.poll_join_next(context)) {
                Some(Err(panic)) => return Poll::Ready((0, Err(ApiError::internal(&panic)))),
                Some(Ok(())) => {}
                None => return Poll::Pending,
            }
        }
    }

    /// See [`Self::poll_next`].
    pub async fn next(&mut self) -> Option<Numbered> {
        std::future::poll_fn(|context| self.poll_next(context)).await
    }
}

/// Keeps the end of a prompt, as far as `truncate_prompt_tokens` says.
fn truncate(prompt: &mut Prompt, common: &Common<'_>, max_model_len: usize) {
    let keep = match common.generation.truncate {
        None => return,
        Some(Truncation::Keep(keep)) => keep,
        Some(Truncation::ToContext) => max_model_len.saturating_sub(common.max_tokens.unwrap_or(1)).max(1),
    };
    if prompt.tokens.len() > keep {
        prompt.tokens.drain(..prompt.tokens.len() - keep);
        prompt.text = None;
    }
}

fn rules(state: &AppState, common: &Common<'_>) -> Rules {
    let generation = common.generation;
    Rules {
        stop: generation.stop.clone(),
        include_stop: generation.include_stop,
        stop_token_ids: generation.stop_token_ids.clone(),
        // A grammar's end is the text's, whatever else may follow an EOS.
        eos_token_ids: match generation.ignore_eos && common.structured.is_none() {
            true => Vec::new(),
            false => state.eos_token_ids.clone(),
        },
        min_tokens: generation.min_tokens(),
        skip_special_tokens: generation.skip_special_tokens,
        kept_tokens: common.kept_tokens.clone(),
        echo: common.echo,
    }
}

/// One choice of `prompt`, but for its sampling.
fn engine_request(prompt: &Prompt, common: &Common<'_>, rules: &Rules, max_model_len: usize) -> Request {
    let &Common { generation, max_tokens, default_max_tokens, logprobs, echo, .. } = common;
    // A default that was not asked for bends to what the context leaves; a full context is refused by the engine.
    let room = max_model_len.saturating_sub(prompt.tokens.len()).max(1);
    let max_tokens = max_tokens.unwrap_or(default_max_tokens.min(room));
    Request {
        stop_tokens: rules.eos_token_ids.iter().chain(&rules.stop_token_ids).copied().collect(),
        logprobs,
        prompt_logprobs: generation.prompt_logprobs.max(logprobs.filter(|_| echo)),
        constraint: common.structured.map(|structured| structured.constraint(max_tokens)),
        capture: Capture { routing: generation.routed_experts, ..Capture::default() },
        priority: generation.priority,
        cache_salt: generation.cache_salt.clone(),
        ..Request::greedy(prompt.tokens.clone(), max_tokens)
    }
}

/// When a sequence's text is handed out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cut {
    /// Tokens per piece, after the first.
    interval: usize,
    /// Also without new text: the client asked about tokens.
    tells_tokens: bool,
}

impl Cut {
    fn of(common: &Common<'_>) -> Self {
        let generation = common.generation;
        match generation.stream {
            // One object is made of one piece per sequence.
            None => Cut { interval: usize::MAX, tells_tokens: false },
            Some(stream) => Cut {
                interval: stream.interval,
                tells_tokens: common.logprobs.is_some()
                    || generation.return_token_ids
                    || stream.continuous_usage,
            },
        }
    }

    fn is_due(self, gathered: &Piece, first: bool) -> bool {
        let enough = gathered.tokens.len() >= self.interval || (first && self.interval < usize::MAX);
        let worth_it = !gathered.text.is_empty() || (self.tells_tokens && !gathered.tokens.is_empty());
        gathered.end.is_some() || (enough && worth_it)
    }
}

/// Task that turns one sequence's events into pieces.
struct Reader {
    index: usize,
    stream: RequestStream,
    transcript: Transcript,
    /// Not handed out yet.
    gathered: Piece,
    cut: Cut,
    /// The engine's last event has what was captured: it is waited for.
    captures: bool,
    pieces: mpsc::Sender<Numbered>,
    /// How long the client may take nothing.
    patience: Duration,
    outcome: Counted,
}

impl Reader {
    /// Ends after the last piece, or when nobody takes pieces any more; the drop of `self` then aborts the sequence.
    async fn run(mut self, shutdown: Shutdown) {
        let mut aborting = pin!(shutdown.reached(Stage::Aborting));
        let mut first = true;
        loop {
            let piece = tokio::select! {
                piece = self.next() => piece,
                () = &mut aborting => Err(ApiError::unavailable("The server is shutting down.")),
            };
            let piece = match piece {
                Ok(piece) => {
                    self.gathered.append(piece);
                    if !self.cut.is_due(&self.gathered, first) {
                        continue;
                    }
                    Ok(std::mem::take(&mut self.gathered))
                }
                Err(error) => Err(error),
            };
            first = false;
            let outcome = match &piece {
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

    /// What the next event of the engine leads to.
    async fn next(&mut self) -> Result<Piece, ApiError> {
        const NO_END: &str = "the engine's events ended without an end";
        let Some(mut event) = self.stream.next().await else { return Err(ApiError::internal(&NO_END)) };
        let mut captured = match &mut event {
            Event::Finished(finished) => finished.captured.take(),
            Event::Prompt(_) | Event::Token(_) => None,
        };
        let mut piece = self.transcript.take(event)?;
        let Some(end) = &mut piece.end else { return Ok(piece) };
        if self.captures && captured.is_none() {
            // A stop string ended the text; the engine ends with it and tells what it has.
            self.stream.abort();
            while let Some(event) = self.stream.next().await {
                if let Event::Finished(finished) = event {
                    captured = finished.captured;
                }
            }
        }
        end.routing = captured.map(|captured| captured.routing);
        Ok(piece)
    }
}

/// Counts a sequence's outcome once, however its task ends; a task that is dropped was aborted.
struct Counted {
    metrics: Arc<Metrics>,
    endpoint: Endpoint,
    outcome: Outcome,
}

impl Drop for Counted {
    fn drop(&mut self) {
        let outcome = if std::thread::panicking() { Outcome::Error } else { self.outcome };
        self.metrics.count_sequence(self.endpoint, outcome);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A panic in the task of one sequence is an error of its request, at once, and ends nothing else.
    #[tokio::test]
    async fn a_panicking_task_is_a_500_while_others_go_on() {
        let (sender, pieces) = mpsc::channel(4);
        let mut tasks = JoinSet::new();
        tasks.spawn(async { panic!("secret") });
        let other = sender.clone();
        tasks.spawn(async move {
            other.send((1, Ok(Piece { text: "x".into(), ..Piece::default() }))).await.unwrap();
            std::future::pending::<()>().await;
        });
        drop(sender);
        let prompts = vec![Arc::default(), Arc::default()];
        let mut sequences = Sequences { pieces, unfinished: 2, prompts, n: 1, tasks };
        let (mut failed, mut told) = (0, 0);
        for _ in 0..2 {
            match sequences.next().await {
                Some((1, Ok(piece))) if piece.text == "x" => told += 1,
                Some((_, Err(error))) => {
                    assert_eq!(error.status.as_u16(), 500);
                    assert!(!error.message.contains("secret"), "{}", error.message);
                    failed += 1;
                }
                other => panic!("{other:?}"),
            }
        }
        assert_eq!((failed, told, sequences.unfinished), (1, 1, 1));
    }
}
