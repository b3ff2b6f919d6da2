//! A body that clients keep: its tag tells whether theirs is still the same.

use axum::response::{IntoResponse, Response};
use http::header::{CACHE_CONTROL, CONTENT_TYPE, ETAG, IF_NONE_MATCH};
use http::{HeaderMap, HeaderName, StatusCode};

use super::query::Format;

/// A body with its tag.
pub(super) struct Answer {
    format: Format,
    pub body: String,
    /// Weak: equal for answers that say the same, be it at another time.
    pub etag: String,
    extra: Option<(HeaderName, String)>,
}

impl Answer {
    /// The tag is a hash (FNV-1a) of the body, so equal bodies have equal tags.
    pub fn new(format: Format, body: String) -> Self {
        Answer::since(format, body, 0)
    }

    /// A body whose first bytes, up to `start`, say when it was made: they are left out of the tag.
    pub fn since(format: Format, body: String, start: usize) -> Self {
        let hash = body.bytes().skip(start).fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        Answer { format, body, etag: format!("W/\"{hash:016x}\""), extra: None }
    }

    /// The same with one more header.
    pub fn with(self, name: HeaderName, value: impl ToString) -> Self {
        Answer { extra: Some((name, value.to_string())), ..self }
    }

    /// 304 for a client that has this body already.
    pub fn respond(&self, headers: &HeaderMap) -> Response {
        let own = self.etag.trim_start_matches("W/");
        let tags = headers.get_all(IF_NONE_MATCH).iter().filter_map(|value| value.to_str().ok());
        let mut tags = tags.flat_map(|list| list.split(',')).map(|tag| tag.trim().trim_start_matches("W/"));
        let caching = [(ETAG, self.etag.as_str()), (CACHE_CONTROL, "private, max-age=1")];
        if tags.any(|tag| tag == "*" || tag == own) {
            return (StatusCode::NOT_MODIFIED, caching).into_response();
        }
        let mime = match self.format {
            Format::Json => "application/json",
            Format::Csv => "text/csv; charset=utf-8",
        };
        let extra = self.extra.iter().map(|(name, value)| (name.clone(), value.clone()));
        let extra = axum::response::AppendHeaders(extra.collect::<Vec<_>>());
        (caching, [(CONTENT_TYPE, mime)], extra, self.body.clone()).into_response()
    }
}
