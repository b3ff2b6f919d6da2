//! `x-request-id`: every answer has one, so that a client's report leads to the server's log. A client may choose it.

use axum::extract::Request;
use axum::middleware::Next;
use axum::response::Response;
use http::HeaderValue;
use http::header::HeaderName;
use tracing::Instrument;

use super::id;

const HEADER: HeaderName = HeaderName::from_static("x-request-id");
/// Longest id taken over from a client.
const MAX_BYTES: usize = 128;

/// The outermost layer: log lines of the request carry its id too.
pub async fn attach(request: Request, next: Next) -> Response {
    let own = request.headers().get(HEADER).filter(|value| is_sane(value.as_bytes())).cloned();
    let id = own.unwrap_or_else(|| {
        HeaderValue::from_str(&id::unique("req")).expect("hexadecimal digits are header text")
    });
    let span = tracing::error_span!("request", id = id.to_str().unwrap_or_default());
    let mut response = next.run(request).instrument(span).await;
    response.headers_mut().insert(HEADER, id);
    response
}

/// Fit for a log line and a header: letters, digits and `-_.:`. Another id is not refused but replaced.
fn is_sane(id: &[u8]) -> bool {
    let plain = |&byte: &u8| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte);
    !id.is_empty() && id.len() <= MAX_BYTES && id.iter().all(plain)
}

#[cfg(test)]
mod tests {
    use super::is_sane;

    #[test]
    fn ids_are_short_and_plain() {
        for id in ["a", "req-0123456789abcdef", "7f8c4b1e-8a0b-4e4f", "trace:1.2_3", &"x".repeat(128)] {
            assert!(is_sane(id.as_bytes()), "{id}");
        }
        for id in ["", "two words", "a\tb", "\x1b[31m", "é", "{\"a\":1}", &"x".repeat(129)] {
            assert!(!is_sane(id.as_bytes()), "{id}");
        }
    }
}
