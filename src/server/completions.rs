//! `POST /v1/completions`.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};

use super::body;
use super::error::ApiError;
use super::id;
use super::metrics::Outcome;
use super::request::CompletionRequest;
use super::sequences::Sequences;
use super::sse;
use super::state::{AppState, unix_seconds};
use super::transcript::Piece;
use super::types::{Choice, Completion, SYSTEM_FINGERPRINT, Usage};

/// Continues the prompts, as one object or as a stream of chunks.
pub async fn create(State(state): State<Arc<AppState>>, request: Request) -> Result<Response, ApiError> {
    match start(&state, request).await {
        Ok((head, sequences, asked)) if asked.stream => {
            let include_usage = asked.include_usage;
            Ok(sse::response(CompletionStream::new(head, sequences, include_usage), &state.options))
        }
        Ok((head, sequences, _)) => collect(&head, sequences).await,
        Err(error) => {
            state.metrics.count_sequence(Outcome::Rejected);
            Err(error)
        }
    }
}

/// Everything that can be refused, before the first byte of an answer.
async fn start(state: &AppState, request: Request) -> Result<(Head, Sequences, CompletionRequest), ApiError> {
    state.check_serving()?;
    let body = body::read_json(request, &state.options).await?;
    let mut asked = CompletionRequest::parse(&body, &state.sampling_defaults)?;
    drop(body);
    let head = Head {
        id: id::unique("cmpl"),
        created: unix_seconds(),
        model: state.model_name(asked.model.as_deref())?,
    };
    let prompts = std::mem::take(&mut asked.prompts);
    let prompts = state.tokenize(prompts, asked.add_special_tokens).await?;
    let sequences = Sequences::start(state, prompts, &asked)?;
    Ok((head, sequences, asked))
}

/// What all chunks of an answer have in common.
struct Head {
    id: String,
    created: u64,
    model: String,
}

impl Head {
    fn completion(&self, choices: Vec<Choice>, usage: Option<Option<Usage>>) -> Completion<'_> {
        Completion {
            id: &self.id,
            object: "text_completion",
            created: self.created,
            model: &self.model,
            choices,
            usage,
            system_fingerprint: SYSTEM_FINGERPRINT,
        }
    }
}

/// Waits for all sequences. A client that leaves drops this future, and the sequences with it.
async fn collect(head: &Head, mut sequences: Sequences) -> Result<Response, ApiError> {
    let mut choices: Vec<Choice> =
        (0..sequences.len()).map(|index| choice(index, Piece::default())).collect();
    let mut usage = Usage::default();
    while let Some((index, piece)) = sequences.next().await {
        let piece = piece?;
        add_usage(&mut usage, &sequences, index, &piece);
        let (whole, part) = (&mut choices[index], choice(index, piece));
        whole.text.push_str(&part.text);
        match (&mut whole.logprobs, part.logprobs) {
            (Some(whole), Some(part)) => whole.append(part),
            (whole @ None, part) => *whole = part,
            (Some(_), None) => {}
        }
        whole.finish_reason = part.finish_reason;
        whole.stop_reason = part.stop_reason;
    }
    Ok(Json(head.completion(choices, Some(Some(usage)))).into_response())
}

fn choice(index: usize, piece: Piece) -> Choice {
    let (finish_reason, stop_reason) = match piece.end {
        Some(end) => (Some(end.finish_reason), end.stop_reason),
        None => (None, None),
    };
    Choice { index, text: piece.text, logprobs: piece.logprobs, finish_reason, stop_reason }
}

fn add_usage(usage: &mut Usage, sequences: &Sequences, index: usize, piece: &Piece) {
    if let Some(end) = &piece.end {
        usage.add(sequences.prompt_tokens(index), end.completion_tokens, end.cached_tokens);
    }
}

/// The chunks of a streamed answer.
struct CompletionStream {
    head: Head,
    sequences: Sequences,
    usage: Usage,
    include_usage: bool,
}

impl CompletionStream {
    fn new(head: Head, sequences: Sequences, include_usage: bool) -> Self {
        CompletionStream { head, sequences, usage: Usage::default(), include_usage }
    }
}

impl sse::Source for CompletionStream {
    fn poll_chunk(&mut self, context: &mut std::task::Context<'_>) -> std::task::Poll<Option<sse::Chunk>> {
        self.sequences.poll_next(context).map(|next| {
            let (index, piece) = next?;
            Some(piece.map(|piece| {
                add_usage(&mut self.usage, &self.sequences, index, &piece);
                let usage = self.include_usage.then_some(None);
                sse::json(&self.head.completion(vec![choice(index, piece)], usage))
            }))
        })
    }

    fn last_chunk(&mut self) -> Option<String> {
        self.include_usage.then(|| sse::json(&self.head.completion(Vec::new(), Some(Some(self.usage)))))
    }
}
