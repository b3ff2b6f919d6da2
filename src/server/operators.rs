//! What operators and load balancers ask: health, readiness, load, version, metrics.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use http::header::CONTENT_TYPE;

use super::error::ApiError;
use super::shutdown::Stage;
use super::state::AppState;
use super::types::{ServerLoad, Version};

/// Whether the engine runs; a server that drains is still healthy.
pub async fn health(State(state): State<Arc<AppState>>) -> Result<StatusCode, ApiError> {
    if state.engine.is_alive() {
        Ok(StatusCode::OK)
    } else {
        Err(ApiError::unavailable("The engine has stopped."))
    }
}

/// Whether the process answers at all.
pub async fn live() -> StatusCode {
    StatusCode::OK
}

/// Whether new requests are taken: the weights are loaded, all ranks work, and no shutdown has begun.
pub async fn ready(State(state): State<Arc<AppState>>) -> Result<StatusCode, ApiError> {
    if state.shutdown.stage() > Stage::Serving {
        return Err(ApiError::unavailable("The server is shutting down."));
    }
    if !state.engine.is_open() {
        return Err(ApiError::unavailable("The engine has stopped."));
    }
    Ok(StatusCode::OK)
}

/// Sequences that run or wait.
pub async fn load(State(state): State<Arc<AppState>>) -> Json<ServerLoad> {
    let stats = state.engine.stats();
    Json(ServerLoad { server_load: stats.running + stats.waiting })
}

/// Of this program.
pub async fn version() -> Json<Version> {
    Json(Version { version: env!("CARGO_PKG_VERSION") })
}

/// The page that Prometheus scrapes.
pub async fn metrics(State(state): State<Arc<AppState>>) -> Response {
    state.metrics.note_rebalancing(&state.engine.rebalance_status());
    let page = state.metrics.render(&state.engine.stats());
    ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], page).into_response()
}
