//! The routes, and the layers around all of them.

use std::any::Any;
use std::sync::Arc;

use axum::Router;
use axum::extract::{MatchedPath, Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use http::{Method, Uri};
use tower_http::catch_panic::CatchPanicLayer;

use super::error::ApiError;
use super::state::AppState;
use super::{
    auth, chat, completions, dashboard, experts, gate, models, openapi, operators, request_id, tokenize,
};

/// All routes over `state`.
pub fn router(state: Arc<AppState>) -> Router {
    Router::new()
        .route("/v1/completions", post(completions::create))
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::one))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/health", get(operators::health))
        .route("/livez", get(operators::live))
        .route("/readyz", get(operators::ready))
        .route("/ping", get(operators::health).post(operators::health))
        .route("/load", get(operators::load))
        .route("/version", get(operators::version))
        .route("/metrics", get(operators::metrics))
        .route("/openapi.json", get(openapi::document))
        .route("/v1/experts", get(experts::load))
        .route("/v1/experts/balance", get(experts::balance))
        .route("/v1/experts/placement", get(experts::placement).put(experts::control::put_placement))
        .route("/v1/experts/rebalance", get(experts::rebalancer).post(experts::control::rebalance))
        .route(dashboard::PATH, get(dashboard::page))
        .fallback(unknown_route)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(middleware::from_fn_with_state(Arc::clone(&state), auth::guard))
        .layer(middleware::from_fn(gate::answer))
        // Inside the counting layer: a panic is a response too.
        .layer(CatchPanicLayer::custom(panicked))
        .layer(middleware::from_fn_with_state(Arc::clone(&state), count_response))
        .layer(middleware::from_fn(request_id::attach))
        .with_state(state)
}

/// The routes of a server whose model is still being loaded.
pub fn while_loading() -> Router {
    let loading = || async { ApiError::unavailable("The model is being loaded.") };
    Router::new()
        .route("/livez", get(operators::live))
        .fallback(loading)
        .method_not_allowed_fallback(loading)
        .layer(middleware::from_fn(gate::answer))
        .layer(middleware::from_fn(request_id::attach))
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
    use http::StatusCode;
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
