//! Errors as a client sees them: OpenAI's error object, and the one match that turns [`Error`] into a status.

use axum::Json;
use axum::response::{IntoResponse, Response};
use http::header::{CONNECTION, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderValue, StatusCode};
use serde::Serialize;
use utoipa::ToSchema;

use crate::error::Error;

/// Longest message sent, in characters: a client must not be able to make a small request answer with megabytes.
const MAX_MESSAGE_CHARS: usize = 1000;
/// Longest piece of a client's input repeated inside a message, in characters.
const MAX_ECHO_CHARS: usize = 200;
/// Seconds a client is asked to wait while the server starts, stops or has lost its engine.
const UNAVAILABLE_RETRY_S: u32 = 5;

/// A refused or failed request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    /// Status line; inside a stream it only travels as `code`.
    pub status: StatusCode,
    /// OpenAI's `type`.
    pub kind: &'static str,
    /// Names the parameter, the limit and the value.
    pub message: String,
    /// The JSON field to blame.
    pub param: Option<String>,
    /// Seconds for the Retry-After header.
    pub retry_after_s: Option<u32>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        ApiError { status, kind, message: message.into(), param: None, retry_after_s: None }
    }

    /// 400: the field `param` is refused.
    pub fn bad_param(param: impl Into<String>, message: impl Into<String>) -> Self {
        ApiError { param: Some(param.into()), ..Self::bad_request(message) }
    }

    /// 400 without one field to blame.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "BadRequestError", message)
    }

    /// 401: no key, or a wrong one.
    pub fn unauthorized(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "AuthenticationError", message)
    }

    /// 403: not for this client, whatever it sends.
    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "PermissionDeniedError", message)
    }

    /// 404 for an unknown model.
    pub fn unknown_model(model: &str) -> Self {
        let message = format!("The model `{}` does not exist.", clip(model));
        let error = Self::new(StatusCode::NOT_FOUND, "NotFoundError", message);
        ApiError { param: Some("model".into()), ..error }
    }

    /// 404 for an unknown route.
    pub fn unknown_route(method: &http::Method, path: &str) -> Self {
        let message = format!("There is no route {} {}.", clip(method.as_str()), clip(path));
        Self::new(StatusCode::NOT_FOUND, "NotFoundError", message)
    }

    /// 405; axum adds the methods that are.
    pub fn method_not_allowed(method: &http::Method, path: &str) -> Self {
        let message = format!("{} does not take the method {}.", clip(path), clip(method.as_str()));
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed", message)
    }

    /// 408: the body did not arrive in time.
    pub fn body_timeout(limit: std::time::Duration) -> Self {
        let message = format!("The request body was not received within {} s.", limit.as_secs_f64());
        Self::new(StatusCode::REQUEST_TIMEOUT, "RequestTimeout", message)
    }

    /// 409: not as this server is now.
    pub fn conflict(message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, "ConflictError", message)
    }

    /// 413: the body is longer than `limit` bytes.
    pub fn body_too_large(limit: usize) -> Self {
        let message = format!("The request body is larger than the limit of {limit} bytes.");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "RequestTooLarge", message)
    }

    /// 415: the body is not said to be JSON.
    pub fn unsupported_media_type(found: &str) -> Self {
        let message = format!("The content type must be application/json, got {:?}.", clip(found));
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "UnsupportedMediaType", message)
    }

    /// 431: more or longer headers than allowed.
    pub fn headers_too_large(message: impl Into<String>) -> Self {
        Self::new(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "HeaderTooLarge", message)
    }

    /// 500 with a generic text; `logged` goes to the log only, under an id the client is told.
    pub fn internal(logged: &dyn std::fmt::Display) -> Self {
        let id = super::id::unique("err");
        tracing::error!(%id, "internal error: {logged}");
        let message = format!("Internal server error; the log has it under {id}.");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "InternalServerError", message)
    }

    /// 503: the server is not able to serve now.
    pub fn unavailable(message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "ServiceUnavailable", message);
        ApiError { retry_after_s: Some(UNAVAILABLE_RETRY_S), ..error }
    }

    /// The JSON object, also sent inside a stream.
    pub fn body(&self) -> ErrorBody {
        ErrorBody {
            error: ErrorObject {
                message: truncate(&self.message, MAX_MESSAGE_CHARS),
                kind: self.kind,
                param: self.param.as_deref().map(clip),
                code: self.status.as_u16(),
            },
        }
    }
}

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        match error {
            Error::Request { param: Some(param), message } => Self::bad_param(param, message),
            Error::Request { param: None, message } => Self::bad_request(message),
            Error::Busy { message, retry_after_s, .. } => {
                let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "RateLimitError", message);
                ApiError { retry_after_s: Some(retry_after_s), ..error }
            }
            Error::Conflict(message) => Self::conflict(message),
            Error::Stopped(why) => {
                tracing::warn!("refused a request: the engine has stopped: {why}");
                Self::unavailable("The engine has stopped.")
            }
            Error::Peer { rank, why } => {
                tracing::error!("rank {rank}: {why}");
                Self::unavailable("A rank of the engine was lost.")
            }
            Error::Device { device, why } => {
                tracing::error!("{device}: {why}");
                Self::unavailable("A device of the engine failed.")
            }
            // These belong to start-up; met here they are our bug, and their text names files and devices.
            other @ (Error::Checkpoint(_)
            | Error::Config { .. }
            | Error::Memory { .. }
            | Error::Io { .. }
            | Error::Remote(_)
            | Error::Routing(_)) => Self::internal(&other),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after_s {
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if matches!(
            self.status,
            StatusCode::REQUEST_TIMEOUT
                | StatusCode::PAYLOAD_TOO_LARGE
                | StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE
        ) {
            // The rest of the body is not read, so the connection cannot carry another request.
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

/// OpenAI's error object in its envelope.
#[derive(Debug, Serialize, ToSchema)]
pub struct ErrorBody {
    /// What went wrong.
    error: ErrorObject,
}

#[derive(Debug, Serialize, ToSchema)]
struct ErrorObject {
    /// Names the parameter, the limit and the value.
    message: String,
    #[serde(rename = "type")]
    kind: &'static str,
    /// The JSON field to blame.
    param: Option<String>,
    /// The status.
    code: u16,
}

/// A client's input as it may be repeated in a message.
pub fn clip(input: &str) -> String {
    truncate(input, MAX_ECHO_CHARS)
}

fn truncate(text: &str, max_chars: usize) -> String {
    match text.char_indices().nth(max_chars) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}...", &text[..end]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::QueueLimit;

    #[test]
    fn every_error_has_its_status_type_and_param() {
        let busy = Error::Busy { limit: QueueLimit::Tokens, message: "full".into(), retry_after_s: 3 };
        let io = Error::io("/secret/path", std::io::Error::other("disk"));
        for (error, status, kind, param, retry) in [
            (Error::request("n", "n must be 1"), 400, "BadRequestError", Some("n"), None),
            (Error::Request { param: None, message: "no".into() }, 400, "BadRequestError", None, None),
            (busy, 429, "RateLimitError", None, Some(3)),
            (Error::Stopped("rank 1 panicked".into()), 503, "ServiceUnavailable", None, Some(5)),
            (Error::Peer { rank: 1, why: "gone".into() }, 503, "ServiceUnavailable", None, Some(5)),
            (Error::config("--x", "y"), 500, "InternalServerError", None, None),
            (io, 500, "InternalServerError", None, None),
        ] {
            let said = error.to_string();
            let api = ApiError::from(error);
            assert_eq!(api.status.as_u16(), status, "{said}");
            assert_eq!(api.kind, kind, "{said}");
            assert_eq!(api.param.as_deref(), param, "{said}");
            assert_eq!(api.retry_after_s, retry, "{said}");
            if status >= 500 {
                assert!(!api.message.contains(&said), "leaked: {}", api.message);
            }
        }
    }

    #[test]
    fn an_answer_stays_small_whatever_was_sent() {
        let huge = "é".repeat(1_000_000);
        for error in [
            ApiError::bad_request(huge.clone()),
            ApiError::bad_param(huge.clone(), huge.clone()),
            ApiError::unknown_model(&huge),
            ApiError::unknown_route(&http::Method::GET, &huge),
            ApiError::unsupported_media_type(&huge),
        ] {
            let json = serde_json::to_string(&error.body()).unwrap();
            assert!(json.len() < 3000, "{} bytes", json.len());
        }
    }
}
