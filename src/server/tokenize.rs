//! `/tokenize` and `/detokenize`: what the model sees of a text, and the text of tokens.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};

use super::body;
use super::chat_prompt::ChatPrompt;
use super::error::ApiError;
use super::fields::{Fields, Whole};
use super::request::Prompts;
use super::state::AppState;
use super::tools;
use super::types::{Detokenized, Tokenized};

/// Tokens of a prompt or of a chat.
pub async fn tokenize(
    State(state): State<Arc<AppState>>,
    request: Request,
) -> Result<Json<Tokenized>, ApiError> {
    let body = body::read_json(request, &state.options).await?;
    let mut fields = Fields::parse(&body)?;
    state.model_name(fields.take::<String>("model", "a string")?.as_deref())?;
    let with_texts = fields.boolean("return_token_strs")?.unwrap_or(false);
    let tokens = match fields.take::<String>("prompt", "a string")? {
        Some(prompt) => {
            let add_special = fields.boolean("add_special_tokens")?.unwrap_or(true);
            fields.finish(&[])?;
            let lists = state.tokenize(Prompts::Texts(vec![prompt]), add_special).await?;
            lists.into_iter().next().unwrap_or_default()
        }
        None => {
            let tools = tools::definitions(&mut fields)?;
            let tools = tools.map(|tools| tools.for_template());
            let chat = ChatPrompt::take(&mut fields, tools, body.len(), &state)?;
            fields.finish(&[])?;
            chat.render(&state).await?.tokens
        }
    };
    Ok(Json(Tokenized {
        count: tokens.len(),
        max_model_len: state.engine.options().max_model_len,
        token_strs: with_texts
            .then(|| tokens.iter().map(|&token| state.tokenizer.token_text(token)).collect()),
        tokens,
    }))
}

/// Text of tokens, special ones included.
pub async fn detokenize(
    State(state): State<Arc<AppState>>,
    request: Request,
) -> Result<Json<Detokenized>, ApiError> {
    let body = body::read_json(request, &state.options).await?;
    let mut fields = Fields::parse(&body)?;
    state.model_name(fields.take::<String>("model", "a string")?.as_deref())?;
    let Some(tokens) = fields.take::<Vec<Whole<u32>>>("tokens", "a list of token ids")? else {
        return Err(ApiError::bad_param("tokens", "`tokens` is required: a list of token ids."));
    };
    fields.finish(&[])?;
    let tokens: Vec<u32> = tokens.into_iter().map(|Whole(id)| id).collect();
    let limit = state.engine.options().vocab_size;
    if let Some(id) = tokens.iter().find(|&&id| id as usize >= limit) {
        return Err(ApiError::bad_param("tokens", format!("`tokens` must be ids below {limit}, got {id}.")));
    }
    let short = tokens.len() <= super::state::INLINE_BYTES;
    let tokenizer = Arc::clone(&state.tokenizer);
    let prompt = state.prepare(short, move || Ok(tokenizer.decode(&tokens, false))).await?;
    Ok(Json(Detokenized { prompt }))
}
