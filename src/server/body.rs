//! Request bodies: JSON, bounded in size and in time.

use axum::extract::Request;
use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use http_body_util::{BodyExt, LengthLimitError, Limited};

use super::error::ApiError;
use super::options::ServerOptions;

/// The whole body of a request that says it is JSON.
///
/// # Errors
/// 415 for another content type, 413 beyond the size limit (before anything is read, where the length is announced),
/// 408 beyond the time limit, 400 when the client breaks off or sends no chunks where it said so.
pub async fn read_json(request: Request, options: &ServerOptions) -> Result<Bytes, ApiError> {
    check_content_type(&request)?;
    let announced =
        request.headers().get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    if announced.is_some_and(|length| length > options.max_body_bytes) {
        return Err(ApiError::body_too_large(options.max_body_bytes));
    }
    let body = Limited::new(request.into_body(), options.max_body_bytes).collect();
    match tokio::time::timeout(options.body_read_timeout, body).await {
        Err(_) => Err(ApiError::body_timeout(options.body_read_timeout)),
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            Err(ApiError::body_too_large(options.max_body_bytes))
        }
        Ok(Err(_)) => {
            Err(ApiError::bad_request("The request body ended early, or its chunks are malformed."))
        }
    }
}

/// A missing content type is taken for JSON, as plain HTTP clients leave it out.
fn check_content_type(request: &Request) -> Result<(), ApiError> {
    let Some(value) = request.headers().get(CONTENT_TYPE) else { return Ok(()) };
    let text = String::from_utf8_lossy(value.as_bytes());
    let mime = text.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    let subtype_is_json = mime.starts_with("application/") && mime.ends_with("+json");
    if mime == "application/json" || subtype_is_json {
        Ok(())
    } else {
        Err(ApiError::unsupported_media_type(&text))
    }
}
