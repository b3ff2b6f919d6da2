//! The routes, and the layers around all of them.

use std::any::Any;
use std::sync::Arc;

use axum::extract::{MatchedPath, Path, Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use http::header::CONTENT_TYPE;
use http::{Method, StatusCode, Uri};
use tower_http::catch_panic::CatchPanicLayer;

use super::completions;
use super::error::ApiError;
use super::state::AppState;
use super::types::{ModelCard, ModelList, Version};

/// All routes over `state`.
pub fn router(state: Arc<AppState>) -> Router {
    Router::new()
        .route("/v1/completions", post(completions::create))
        .route("/v1/models", get(list_models))
        .route("/v1/models/{*id}", get(one_model))
        .route("/health", get(health))
        .route("/version", get(version))
        .route("/metrics", get(metrics))
        .fallback(unknown_route)
        .method_not_allowed_fallback(method_not_allowed)
        // Inside the counting layer: a panic is a response too.
        .layer(CatchPanicLayer::custom(panicked))
        .layer(middleware::from_fn_with_state(Arc::clone(&state), count_response))
        .with_state(state)
}

async fn list_models(State(state): State<Arc<AppState>>) -> Response {
    let data = state.served_names.iter().map(|name| card(&state, name)).collect();
    Json(ModelList { object: "list", data }).into_response()
}

async fn one_model(State(state): State<Arc<AppState>>, Path(id): Path<String>) -> Result<Response, ApiError> {
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

/// Whether the engine runs; a server that drains is still healthy.
async fn health(State(state): State<Arc<AppState>>) -> Result<StatusCode, ApiError> {
    if state.engine.is_alive() {
        Ok(StatusCode::OK)
    } else {
        Err(ApiError::unavailable("The engine has stopped."))
    }
}

async fn version() -> Json<Version> {
    Json(Version { version: env!("CARGO_PKG_VERSION") })
}

async fn metrics(State(state): State<Arc<AppState>>) -> Response {
    let page = state.metrics.render(&state.engine.stats());
    ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], page).into_response()
}

async fn unknown_route(method: Method, uri: Uri) -> ApiError {
    ApiError::unknown_route(&method, uri.path())
}

async fn method_not_allowed(method: Method, uri: Uri) -> ApiError {
    ApiError::method_not_allowed(&method, uri.path())
}

fn panicked(panic: Box<dyn Any + Send>) -> Response {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    ApiError::internal(&format_args!("panic: {}", text.as_deref().unwrap_or("of unknown kind")))
        .into_response()
}

async fn count_response(
    State(state): State<Arc<AppState>>,
    route: Option<MatchedPath>,
    request: Request,
    next: Next,
) -> Response {
    let response = next.run(request).await;
    state.metrics.count_response(route.as_ref().map_or("other", MatchedPath::as_str), response.status());
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt;
    use tower::ServiceExt;

    #[tokio::test]
    async fn a_panic_is_a_500_that_keeps_its_text_to_itself() {
        async fn fall_over() {
            panic!("secret {}", 42)
        }
        let router = Router::new().route("/", get(fall_over)).layer(CatchPanicLayer::custom(panicked));
        let request = Request::get("/").body(axum::body::Body::empty()).unwrap();
        let response = router.oneshot(request).await.unwrap();
        assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let text = String::from_utf8(body.to_vec()).unwrap();
        assert!(text.contains("InternalServerError") && !text.contains("secret"), "{text}");
    }
}
