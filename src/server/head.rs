//! Heads of requests, judged before anything else: hyper's own limits lie above these, and its refusals have no body.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::header::HOST;
use http::{HeaderMap, Version};

use super::error::ApiError;
use super::options::ServerOptions;
use super::state::AppState;

/// Bytes of ": " and the line break of a header.
const HEADER_OVERHEAD: usize = 4;

/// The layer that refuses heads which are too large or say too little.
pub async fn limit(State(state): State<Arc<AppState>>, request: Request, next: Next) -> Response {
    match check(&request, &state.options) {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

fn check(request: &Request, options: &ServerOptions) -> Result<(), ApiError> {
    let headers = request.headers();
    if headers.len() > options.max_headers {
        let message =
            format!("A request may have at most {} headers, got {}.", options.max_headers, headers.len());
        return Err(ApiError::headers_too_large(message));
    }
    let bytes = request.uri().path_and_query().map_or(0, |path| path.as_str().len()) + header_bytes(headers);
    if bytes > options.max_header_bytes {
        let limit = options.max_header_bytes;
        return Err(ApiError::headers_too_large(format!(
            "Path and headers may have at most {limit} bytes, got {bytes}."
        )));
    }
    // RFC 9112, section 3.2.
    if request.version() == Version::HTTP_11 && !headers.contains_key(HOST) {
        return Err(ApiError::bad_request("A request of HTTP/1.1 must have the header Host."));
    }
    Ok(())
}

fn header_bytes(headers: &HeaderMap) -> usize {
    headers.iter().map(|(name, value)| name.as_str().len() + value.len() + HEADER_OVERHEAD).sum()
}
