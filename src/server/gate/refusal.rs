//! The way of a refusal from the gate, which has no voice, to the router, which answers.

use std::sync::{Arc, OnceLock};

use axum::extract::Request;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::HeaderValue;
use http::header::CONNECTION;

use crate::server::error::ApiError;

/// What the gate of a connection refused, if anything; nothing follows a refusal.
#[derive(Debug, Clone, Default)]
pub struct Refusals(Arc<OnceLock<Refused>>);

#[derive(Debug)]
struct Refused {
    /// Number of the request on its connection.
    request: u64,
    error: ApiError,
}

impl Refusals {
    /// Refuses the connection's request with this number.
    pub(super) fn refuse(&self, request: u64, error: ApiError) {
        let earlier = self.0.set(Refused { request, error });
        assert!(earlier.is_ok(), "a connection's second refusal, of request {request}");
    }

    /// The gate lets nothing pass any more.
    pub(super) fn any(&self) -> bool {
        self.0.get().is_some()
    }

    /// Marks the connection's request with this number when it is the refused one.
    pub fn mark<B>(&self, number: u64, request: &mut http::Request<B>) {
        if let Some(refused) = self.0.get().filter(|refused| refused.request == number) {
            request.extensions_mut().insert(refused.error.clone());
        }
    }
}

/// The layer that answers what the gate refused.
pub async fn answer(mut request: Request, next: Next) -> Response {
    let Some(error) = request.extensions_mut().remove::<ApiError>() else { return next.run(request).await };
    tracing::debug!("a request was refused before it was read: {}", error.message);
    let mut response = error.into_response();
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    response
}
