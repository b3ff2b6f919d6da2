//! `POST /v1/completions`.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};

use super::body;
use super::error::ApiError;
use super::generation::Generation;
use super::id;
use super::logprobs::TokenNames;
use super::metrics::{Endpoint, Outcome};
use super::npy;
use super::request::{CompletionRequest, DEFAULT_MAX_TOKENS, Prompts};
use super::sequences::{Common, Sequences};
use super::sse;
use super::state::{AppState, unix_seconds};
use super::structured::Structured;
use super::transcript::{Piece, Prompt};
use super::types::{Choice, Completion, SYSTEM_FINGERPRINT, Usage};
use crate::tokenizer::GrammarStart;

/// Continues the prompts, as one object or as a stream of chunks.
pub async fn create(State(state): State<Arc<AppState>>, request: Request) -> Result<Response, ApiError> {
    match start(&state, request).await {
        Ok((teller, sequences)) if teller.asked.generation.stream.is_some() => {
            Ok(sse::response(CompletionStream::new(teller, sequences), &state.options))
        }
        Ok((teller, sequences)) => collect(&teller, sequences).await,
        Err(error) => {
            state.metrics.count_sequence(Endpoint::Completions, Outcome::Rejected);
            Err(error)
        }
    }
}

/// Everything that can be refused, before the first byte of an answer.
async fn start(state: &Arc<AppState>, request: Request) -> Result<(Teller, Sequences), ApiError> {
    state.check_serving()?;
    let body = body::read_json(request, &state.options).await?;
    let mut asked = CompletionRequest::parse(&body, &state.sampling_defaults)?;
    drop(body);
    let model = state.model_name(asked.model.as_deref())?;
    let prompts = tokenize(state, &mut asked).await?;
    let structured = match asked.structured.take() {
        None => None,
        Some(rules) => {
            let grammar = state.compiler.compile(rules, &state.tokenizer, &state.eos_token_ids).await?;
            Some(Structured { grammar, start: GrammarStart::default() })
        }
    };
    let common = Common {
        endpoint: Endpoint::Completions,
        generation: &asked.generation,
        max_tokens: asked.max_tokens,
        default_max_tokens: DEFAULT_MAX_TOKENS,
        logprobs: asked.logprobs,
        echo: asked.echo,
        structured: structured.as_ref(),
        kept_tokens: Vec::new(),
    };
    let sequences = Sequences::start(state, prompts, common)?;
    let teller = Teller {
        id: answer_id(&asked.generation),
        created: unix_seconds(),
        model,
        asked,
        state: Arc::clone(state),
    };
    Ok((teller, sequences))
}

/// The prompts as tokens; as texts too, where they are to be repeated.
async fn tokenize(state: &AppState, asked: &mut CompletionRequest) -> Result<Vec<Prompt>, ApiError> {
    let prompts = std::mem::take(&mut asked.prompts);
    let texts: Vec<Option<String>> = match &prompts {
        Prompts::Texts(texts) if asked.echo => texts.iter().cloned().map(Some).collect(),
        _ => Vec::new(),
    };
    let tokens = state.tokenize(prompts, asked.add_special_tokens).await?;
    let texts = texts.into_iter().chain(std::iter::repeat(None));
    Ok(tokens.into_iter().zip(texts).map(|(tokens, text)| Prompt { tokens, text }).collect())
}

fn answer_id(generation: &Generation) -> String {
    generation.request_id.as_ref().map_or_else(|| id::unique("cmpl"), |id| format!("cmpl-{id}"))
}

/// Makes answers, whole ones and chunks, out of pieces.
struct Teller {
    id: String,
    created: u64,
    model: String,
    asked: CompletionRequest,
    state: Arc<AppState>,
}

impl Teller {
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

    fn choice(&self, index: usize, prompt: &Prompt, piece: Piece) -> Choice {
        let generation = &self.asked.generation;
        let names = TokenNames { tokenizer: &self.state.tokenizer, by_id: generation.tokens_as_ids };
        let echoed = piece.prompt.iter().flatten().filter(|_| self.asked.echo);
        let echoed: Vec<_> = echoed.collect();
        // The last chunk of a stream may only tell the end.
        let tells_tokens = generation.stream.is_none() || echoed.len() + piece.tokens.len() > 0;
        let logprobs = self.asked.logprobs.filter(|_| tells_tokens);
        let prompt_logprobs = piece.prompt.as_ref().zip(generation.prompt_logprobs);
        let ids = |tokens: &[u32]| generation.return_token_ids.then(|| tokens.to_vec());
        let tokens: Vec<u32> = piece.tokens.iter().map(|token| token.event.token).collect();
        let routing = piece.end.as_ref().and_then(|end| Some((end.completion_tokens, end.routing.as_ref()?)));
        let experts = self.state.engine.options().experts;
        Choice {
            index,
            logprobs: logprobs.map(|n| names.completion(echoed.into_iter().chain(&piece.tokens), n)),
            token_ids: ids(&tokens),
            prompt_token_ids: piece.prompt.as_ref().and_then(|_| ids(&prompt.tokens)),
            prompt_logprobs: prompt_logprobs.map(|(tokens, n)| names.prompt(tokens, n)),
            routed_experts: routing.map(|(generated, routing)| {
                // The last token is never computed.
                npy::routed_experts(routing, prompt.tokens.len() + generated - 1, experts)
            }),
            text: piece.text,
            finish_reason: piece.end.as_ref().map(|end| end.finish_reason),
            stop_reason: piece.end.and_then(|end| end.stop_reason),
        }
    }
}

/// Waits for all sequences. A client that leaves drops this future, and the sequences with it.
async fn collect(teller: &Teller, mut sequences: Sequences) -> Result<Response, ApiError> {
    let mut wholes: Vec<Piece> = (0..sequences.len()).map(|_| Piece::default()).collect();
    let mut usage = Usage::default();
    while let Some((index, piece)) = sequences.next().await {
        let piece = piece?;
        sequences.add_usage(&mut usage, index, &piece);
        wholes[index].append(piece);
    }
    let choice = |(index, whole)| teller.choice(index, sequences.prompt(index), whole);
    let choices = wholes.into_iter().enumerate().map(choice).collect();
    Ok(Json(teller.completion(choices, Some(Some(usage)))).into_response())
}

/// The chunks of a streamed answer.
struct CompletionStream {
    teller: Teller,
    sequences: Sequences,
    usage: Usage,
    /// Tokens told so far of each sequence.
    told: Vec<usize>,
}

impl CompletionStream {
    fn new(teller: Teller, sequences: Sequences) -> Self {
        CompletionStream { teller, told: vec![0; sequences.len()], sequences, usage: Usage::default() }
    }

    fn chunk(&mut self, index: usize, piece: Piece) -> String {
        self.sequences.add_usage(&mut self.usage, index, &piece);
        self.told[index] += piece.tokens.len();
        let prompt = self.sequences.prompt(index);
        let stream = self.teller.asked.generation.stream.expect("only streams have chunks");
        let so_far = stream.continuous_usage.then(|| {
            let mut usage = Usage::default();
            usage.add(prompt.tokens.len(), self.told[index], 0);
            usage
        });
        let usage = stream.include_usage.then_some(so_far);
        let choice = self.teller.choice(index, prompt, piece);
        sse::json(&self.teller.completion(vec![choice], usage))
    }
}

impl sse::Source for CompletionStream {
    fn poll_chunk(&mut self, context: &mut std::task::Context<'_>) -> std::task::Poll<Option<sse::Chunk>> {
        self.sequences.poll_next(context).map(|next| {
            let (index, piece) = next?;
            Some(piece.map(|piece| self.chunk(index, piece)))
        })
    }

    fn last_chunk(&mut self) -> Option<String> {
        let include = self.teller.asked.generation.stream.is_some_and(|stream| stream.include_usage);
        include.then(|| sse::json(&self.teller.completion(Vec::new(), Some(Some(self.usage)))))
    }
}
