//! `/v1/models`: the names under which the model is served.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};

use super::error::ApiError;
use super::state::AppState;
use super::types::{ModelCard, ModelList};

/// All of them.
pub async fn list(State(state): State<Arc<AppState>>) -> Response {
    let data = state.served_names.iter().map(|name| card(&state, name)).collect();
    Json(ModelList { object: "list", data }).into_response()
}

/// One by its name, which may hold slashes.
pub async fn one(
    State(state): State<Arc<AppState>>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Response, ApiError> {
    let Path(id) = id.map_err(|_| ApiError::bad_request("The path is no UTF-8."))?;
    let name = state.model_name(Some(&id))?;
    Ok(Json(card(&state, &name)).into_response())
}

fn card<'a>(state: &'a AppState, id: &'a str) -> ModelCard<'a> {
    ModelCard {
        id,
        object: "model",
        created: state.created,
        owned_by: "moeyard",
        root: &state.served_names[0],
        max_model_len: state.engine.options().max_model_len,
    }
}
