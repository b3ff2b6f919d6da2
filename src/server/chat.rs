//! `POST /v1/chat/completions`.

use std::sync::Arc;
use std::task::{Context, Poll};

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};

use super::chat_request::ChatRequest;
use super::chat_types::{
    ChatChoice, ChatChunk, ChatCompletion, ChatDelta, ChatLogprob, ChatLogprobs, ChatMessage, ChunkChoice,
    FunctionCall, ToolCall, TopLogprob,
};
use super::error::ApiError;
use super::logprobs::{TokenNames, finite};
use super::metrics::{Endpoint, Outcome};
use super::sequences::{Common, Sequences};
use super::state::{AppState, unix_seconds};
use super::structured::{Asked, Structured};
use super::transcript::{End, Piece, Prompt, TokenPiece};
use super::types::{SYSTEM_FINGERPRINT, Usage};
use super::{body, id, npy, sse};
use crate::tokenizer::GrammarStart;
use crate::tokenizer::turn::{Callable, Delta, TurnParser, TurnStyle};

/// Answers a conversation, as one object or as a stream of chunks.
pub async fn create(State(state): State<Arc<AppState>>, request: Request) -> Result<Response, ApiError> {
    match start(&state, request).await {
        Ok((teller, sequences)) if teller.asked.stream.is_some() => {
            Ok(sse::response(ChatStream::new(teller, sequences), &state.options))
        }
        Ok((teller, sequences)) => collect(teller, sequences).await,
        Err(error) => {
            state.metrics.count_sequence(Endpoint::Chat, Outcome::Rejected);
            Err(error)
        }
    }
}

/// Everything that can be refused, before the first byte of an answer.
async fn start(state: &Arc<AppState>, request: Request) -> Result<(Teller, Sequences), ApiError> {
    state.check_serving()?;
    let body = body::read_json(request, &state.options).await?;
    let asked = ChatRequest::parse(&body, state)?;
    drop(body);
    let model = state.model_name(asked.model.as_deref())?;
    let style = asked.prompt.style(state);
    let rendered = asked.prompt.render(state).await?;
    let calls = asked.tools.as_deref().map(|tools| Calls {
        tools,
        required: asked.must_call,
        parallel: asked.parallel_calls,
    });
    let structured = structured(state, style, asked.structured, calls, &rendered.text).await?;
    let common = Common {
        endpoint: Endpoint::Chat,
        generation: &asked.generation,
        max_tokens: asked.max_tokens,
        default_max_tokens: usize::MAX,
        logprobs: asked.logprobs,
        echo: false,
        structured: structured.as_ref(),
        kept_tokens: style.map_or_else(Vec::new, |style| style.kept_tokens(&state.tokenizer)),
    };
    let prompt = Prompt { tokens: rendered.tokens, text: None };
    let sequences = Sequences::start(state, vec![prompt], common)?;
    // A grammar from the first token on leaves no room for thoughts, even where the template has opened them.
    let no_thoughts = structured.as_ref().is_some_and(|rules| rules.start == GrammarStart::default());
    let before = if no_thoughts { "" } else { &rendered.text };
    let turn = style.map(|style| style.parser(before, asked.tools.clone()));
    let teller = Teller {
        id: asked
            .generation
            .request_id
            .as_ref()
            .map_or_else(|| id::unique("chatcmpl"), |id| format!("chatcmpl-{id}")),
        created: unix_seconds(),
        model,
        turns: (0..sequences.len()).map(|_| Turn::new(turn.clone())).collect(),
        asked: asked.generation,
        logprobs: asked.logprobs,
        include_reasoning: asked.include_reasoning,
        must_call: asked.must_call,
        state: Arc::clone(state),
    };
    Ok((teller, sequences))
}

/// The calls that an answer may or must have.
struct Calls<'a> {
    tools: &'a [Callable],
    required: bool,
    parallel: bool,
}

/// The grammar that the text must follow, if any.
async fn structured(
    state: &AppState,
    style: Option<TurnStyle>,
    asked: Option<Asked>,
    calls: Option<Calls<'_>>,
    prompt: &str,
) -> Result<Option<Structured>, ApiError> {
    let tokenizer = &state.tokenizer;
    let (asked, start) = match (asked, calls, style) {
        (Some(Asked { source, param }), Some(Calls { tools, parallel, .. }), Some(style)) => {
            let both = style.answer_or_calls(&source, tokenizer, tools, parallel, prompt);
            let refused = |why| ApiError::bad_param(param, format!("`{param}` with `tools`: {why}."));
            let (source, start) = both.map_err(refused)?;
            (Asked { source, param }, start)
        }
        (Some(asked), _, style) => {
            let start = style.map(|style| style.grammar_start(tokenizer, prompt)).unwrap_or_default();
            (asked, start)
        }
        (None, Some(Calls { tools, required: true, parallel }), Some(style)) => {
            let required = style.required_calls(tokenizer, tools, parallel, prompt);
            let refused = |why| ApiError::bad_param("tools", format!("`tools` cannot be enforced: {why}"));
            let (source, start) = required.map_err(refused)?;
            (Asked { source, param: "tools" }, start)
        }
        (None, _, _) => return Ok(None),
    };
    let grammar = state.compiler.compile(asked, tokenizer, &state.eos_token_ids).await?;
    Ok(Some(Structured { grammar, start }))
}

/// Makes answers, whole ones and chunks, out of pieces.
struct Teller {
    id: String,
    created: u64,
    model: String,
    asked: super::generation::Generation,
    logprobs: Option<usize>,
    include_reasoning: bool,
    /// Nothing but calls was asked for: what the length limit left of one is no text.
    must_call: bool,
    /// One per choice.
    turns: Vec<Turn>,
    state: Arc<AppState>,
}

/// One choice in the making.
struct Turn {
    parser: Option<TurnParser>,
    calls: usize,
}

impl Turn {
    fn new(parser: Option<TurnParser>) -> Self {
        Turn { parser, calls: 0 }
    }

    /// What more text leads to; `ended` when it is the last.
    fn take(&mut self, text: String, ended: bool) -> ChatDelta {
        let mut deltas = Vec::new();
        match &mut self.parser {
            None if text.is_empty() => {}
            None => deltas.push(Delta::Content(text)),
            Some(parser) => {
                parser.push(&text, &mut deltas);
                if ended {
                    parser.finish(&mut deltas);
                }
            }
        }
        let mut told = ChatDelta::default();
        for delta in deltas {
            match delta {
                Delta::Reasoning(text) => told.reasoning_content.get_or_insert_default().push_str(&text),
                Delta::Content(text) => told.content.get_or_insert_default().push_str(&text),
                Delta::Call { name } => {
                    let function = FunctionCall { name: Some(name), arguments: String::new() };
                    let (index, id) = (Some(self.calls), Some(id::unique("call")));
                    told.tool_calls.push(ToolCall { index, id, kind: Some("function"), function });
                    self.calls += 1;
                }
                Delta::Arguments(text) => {
                    if told.tool_calls.is_empty() {
                        let index = self.calls.checked_sub(1);
                        told.tool_calls.push(ToolCall { index, ..ToolCall::default() });
                    }
                    let call = told.tool_calls.last_mut().expect("pushed if there was none");
                    call.function.arguments.push_str(&text);
                }
            }
        }
        told
    }

    /// A turn that ended by itself with calls ended for them.
    fn finish_reason(&self, end: &End) -> &'static str {
        if self.calls > 0 && end.finish_reason == "stop" { "tool_calls" } else { end.finish_reason }
    }
}

impl Teller {
    fn delta(&mut self, index: usize, text: String, ended: bool) -> ChatDelta {
        let mut delta = self.turns[index].take(text, ended);
        delta.reasoning_content = delta.reasoning_content.filter(|_| self.include_reasoning);
        delta.content = delta.content.filter(|_| !self.must_call);
        delta
    }

    fn choice(&mut self, index: usize, prompt: &Prompt, piece: Piece) -> ChatChoice {
        let (token_ids, logprobs, routed_experts) = self.details(prompt, &piece);
        let delta = self.delta(index, piece.text, true);
        let end = piece.end.expect("a whole sequence has an end");
        let no_calls = delta.tool_calls.is_empty();
        let message = ChatMessage {
            role: "assistant",
            content: delta.content.or_else(|| (no_calls && !self.must_call).then(String::new)),
            refusal: None,
            reasoning_content: delta.reasoning_content,
            tool_calls: delta.tool_calls.into_iter().map(|call| ToolCall { index: None, ..call }).collect(),
        };
        ChatChoice {
            index,
            message,
            logprobs,
            finish_reason: self.turns[index].finish_reason(&end),
            stop_reason: end.stop_reason,
            token_ids,
            routed_experts,
        }
    }

    /// What is told about tokens beside their text, where asked for.
    fn details(
        &self,
        prompt: &Prompt,
        piece: &Piece,
    ) -> (Option<Vec<u32>>, Option<ChatLogprobs>, Option<String>) {
        let ids =
            self.asked.return_token_ids.then(|| piece.tokens.iter().map(|token| token.event.token).collect());
        let logprobs = self.logprobs.map(|count| self.logprobs_of(&piece.tokens, count));
        let routing = piece.end.as_ref().and_then(|end| Some((end.completion_tokens, end.routing.as_ref()?)));
        let experts = self.state.engine.options().experts;
        // The last token is never computed.
        let routed = routing.map(|(generated, routing)| {
            npy::routed_experts(routing, prompt.tokens.len() + generated - 1, experts)
        });
        (ids, logprobs, routed)
    }

    fn logprobs_of(&self, tokens: &[TokenPiece], count: usize) -> ChatLogprobs {
        let tokenizer = &self.state.tokenizer;
        let names = TokenNames { tokenizer, by_id: self.asked.tokens_as_ids };
        let bytes = |token: u32| tokenizer.token_bytes(token).to_vec();
        let entry = |piece: &TokenPiece| {
            let event = &piece.event;
            let top = event.top.iter().take(count);
            let top = top.map(|&(token, logprob)| TopLogprob {
                token: names.of(token),
                logprob: finite(logprob),
                bytes: bytes(token),
            });
            ChatLogprob {
                token: names.of(event.token),
                logprob: finite(event.logprob.unwrap_or(f32::NEG_INFINITY)),
                bytes: bytes(event.token),
                top_logprobs: top.collect(),
            }
        };
        ChatLogprobs { content: tokens.iter().map(entry).collect() }
    }
}

/// Waits for all choices. A client that leaves drops this future, and the sequences with it.
async fn collect(mut teller: Teller, mut sequences: Sequences) -> Result<Response, ApiError> {
    let mut wholes: Vec<Piece> = (0..sequences.len()).map(|_| Piece::default()).collect();
    let mut usage = Usage::default();
    while let Some((index, piece)) = sequences.next().await {
        let piece = piece?;
        sequences.add_usage(&mut usage, index, &piece);
        wholes[index].append(piece);
    }
    let prompt = sequences.prompt(0).clone();
    let names = TokenNames { tokenizer: &teller.state.tokenizer, by_id: false };
    let prompt_logprobs = wholes[0].prompt.as_ref().zip(teller.asked.prompt_logprobs);
    let prompt_logprobs = prompt_logprobs.map(|(tokens, count)| names.prompt(tokens, count));
    let choices =
        wholes.into_iter().enumerate().map(|(index, whole)| teller.choice(index, &prompt, whole)).collect();
    let answer = ChatCompletion {
        id: &teller.id,
        object: "chat.completion",
        created: teller.created,
        model: &teller.model,
        choices,
        usage,
        system_fingerprint: SYSTEM_FINGERPRINT,
        prompt_logprobs,
        prompt_token_ids: teller.asked.return_token_ids.then_some(prompt.tokens),
    };
    Ok(Json(answer).into_response())
}

/// The chunks of a streamed answer.
struct ChatStream {
    teller: Teller,
    sequences: Sequences,
    usage: Usage,
    /// Tokens told so far of each choice.
    told: Vec<usize>,
    /// Choices whose role is still to be told: first of all, so that clients see an answer begin.
    unopened: std::ops::Range<usize>,
    /// The end of a choice, after what it said last.
    ending: Option<String>,
}

impl ChatStream {
    fn new(teller: Teller, sequences: Sequences) -> Self {
        let choices = sequences.len();
        ChatStream {
            teller,
            sequences,
            usage: Usage::default(),
            told: vec![0; choices],
            unopened: 0..choices,
            ending: None,
        }
    }

    fn chunk(&self, choices: Vec<ChunkChoice>, usage: Option<Option<Usage>>) -> String {
        sse::json(&ChatChunk {
            id: &self.teller.id,
            object: "chat.completion.chunk",
            created: self.teller.created,
            model: &self.teller.model,
            choices,
            usage,
            system_fingerprint: SYSTEM_FINGERPRINT,
        })
    }

    fn opening(&self, index: usize) -> String {
        let delta =
            ChatDelta { role: Some("assistant"), content: Some(String::new()), ..ChatDelta::default() };
        let choice = ChunkChoice {
            index,
            delta,
            logprobs: None,
            finish_reason: None,
            stop_reason: None,
            token_ids: None,
            routed_experts: None,
        };
        self.chunk(vec![choice], self.usage_so_far(index))
    }

    fn usage_so_far(&self, index: usize) -> Option<Option<Usage>> {
        let stream = self.teller.asked.stream.expect("only streams have chunks");
        let so_far = stream.continuous_usage.then(|| {
            let mut usage = Usage::default();
            usage.add(self.sequences.prompt(index).tokens.len(), self.told[index], 0);
            usage
        });
        stream.include_usage.then_some(so_far)
    }

    /// The chunk that a piece leads to, if it says anything.
    fn told(&mut self, index: usize, piece: Piece) -> Option<String> {
        self.sequences.add_usage(&mut self.usage, index, &piece);
        self.told[index] += piece.tokens.len();
        let (token_ids, logprobs, routed_experts) = self.teller.details(self.sequences.prompt(index), &piece);
        let delta = self.teller.delta(index, piece.text, piece.end.is_some());
        let plain = |delta| ChunkChoice {
            index,
            delta,
            logprobs: None,
            finish_reason: None,
            stop_reason: None,
            token_ids: None,
            routed_experts: None,
        };
        let tells_tokens = !piece.tokens.is_empty() && (logprobs.is_some() || token_ids.is_some());
        let says_something = !delta.is_empty() || tells_tokens;
        let choice = ChunkChoice { logprobs, token_ids, ..plain(delta) };
        let said = says_something.then(|| self.chunk(vec![choice], self.usage_so_far(index)));
        let Some(end) = piece.end else { return said };
        let finish_reason = Some(self.teller.turns[index].finish_reason(&end));
        let stop_reason = end.stop_reason;
        let last = ChunkChoice { finish_reason, stop_reason, routed_experts, ..plain(ChatDelta::default()) };
        let last = self.chunk(vec![last], self.usage_so_far(index));
        if said.is_none() {
            return Some(last);
        }
        self.ending = Some(last);
        said
    }
}

impl sse::Source for ChatStream {
    fn poll_chunk(&mut self, context: &mut Context<'_>) -> Poll<Option<sse::Chunk>> {
        if let Some(index) = self.unopened.next() {
            return Poll::Ready(Some(Ok(self.opening(index))));
        }
        if let Some(ending) = self.ending.take() {
            return Poll::Ready(Some(Ok(ending)));
        }
        loop {
            let next = std::task::ready!(self.sequences.poll_next(context));
            let Some((index, piece)) = next else { return Poll::Ready(None) };
            match piece.map(|piece| self.told(index, piece)) {
                Ok(Some(chunk)) => return Poll::Ready(Some(Ok(chunk))),
                Ok(None) => {}
                Err(error) => return Poll::Ready(Some(Err(error))),
            }
        }
    }

    fn last_chunk(&mut self) -> Option<String> {
        let include = self.teller.asked.stream.is_some_and(|stream| stream.include_usage);
        include.then(|| self.chunk(Vec::new(), Some(Some(self.usage))))
    }
}
