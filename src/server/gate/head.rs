//! Heads of requests: request line and headers.

use http::{Method, Uri};
use httparse::{Header, Status};

use super::framing::Framing;
use crate::server::error::ApiError;
use crate::server::options::ServerOptions;

/// What a head may be.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Headers.
    pub headers: usize,
    /// Bytes of the head, line breaks included.
    pub bytes: usize,
    /// Bytes of a body, to be told where a length is beyond counting.
    body_bytes: usize,
}

impl Limits {
    pub fn of(options: &ServerOptions) -> Self {
        let &ServerOptions {
            max_headers: headers, max_header_bytes: bytes, max_body_bytes: body_bytes, ..
        } = options;
        Limits { headers, bytes, body_bytes }
    }
}

/// A head that is in order.
#[derive(Debug, PartialEq, Eq)]
pub struct Head {
    /// Of the head.
    pub bytes: usize,
    /// Of the body that follows it.
    pub body: Framing,
}

/// The head at the start of `bytes`, which does not start with a line break; `None` while it is not whole.
///
/// # Errors
/// 400 for what is no HTTP/1, or leaves in doubt where the body ends: whoever else reads the stream might see other
/// requests in it. 431 beyond the limits.
pub fn judge(bytes: &[u8], limits: &Limits) -> Result<Option<Head>, ApiError> {
    let mut headers = vec![httparse::EMPTY_HEADER; limits.headers];
    let mut request = httparse::Request::new(&mut headers);
    let length = match request.parse(bytes) {
        Ok(Status::Complete(length)) if length <= limits.bytes => length,
        Ok(Status::Partial) if bytes.len() <= limits.bytes => return Ok(None),
        Ok(_) => {
            let message = format!("Request line and headers may have at most {} bytes.", limits.bytes);
            return Err(ApiError::headers_too_large(message));
        }
        Err(httparse::Error::TooManyHeaders) => {
            let message = format!("A request may have at most {} headers.", limits.headers);
            return Err(ApiError::headers_too_large(message));
        }
        Err(error) => return Err(malformed(error)),
    };
    let (method, path) = (request.method.unwrap_or_default(), request.path.unwrap_or_default());
    Method::from_bytes(method.as_bytes()).map_err(malformed)?;
    path.parse::<Uri>().map_err(malformed)?;
    let is_http_11 = request.version == Some(1);
    check_host(request.headers, is_http_11)?;
    let body = framing(request.headers, is_http_11, limits)?;
    Ok(Some(Head { bytes: length, body }))
}

fn malformed(error: impl std::fmt::Display) -> ApiError {
    ApiError::bad_request(format!("The request line or a header is no valid HTTP/1.1: {error}."))
}

/// RFC 9112, section 3.2.
fn check_host(headers: &[Header<'_>], is_http_11: bool) -> Result<(), ApiError> {
    match named(headers, "Host").count() {
        1 => Ok(()),
        0 if !is_http_11 => Ok(()),
        0 => Err(ApiError::bad_request("A request of HTTP/1.1 must have the header Host.")),
        n => Err(ApiError::bad_request(format!("A request may have the header Host once, got {n}."))),
    }
}

/// RFC 9112, section 6.3, and stricter: what is allowed there for old clients only serves to smuggle requests today.
fn framing(headers: &[Header<'_>], is_http_11: bool, limits: &Limits) -> Result<Framing, ApiError> {
    let refused = |message: &str| Err(ApiError::bad_request(message));
    let (mut codings, mut lengths) = (named(headers, "Transfer-Encoding"), named(headers, "Content-Length"));
    match (codings.next(), lengths.next()) {
        (None, None) => Ok(Framing::NONE),
        (Some(_), Some(_)) => {
            refused("A request has either the header Content-Length or Transfer-Encoding, got both.")
        }
        (Some(_), _) if !is_http_11 => refused("A request of HTTP/1.0 has no header Transfer-Encoding."),
        (Some(coding), _) if codings.next().is_none() && coding.eq_ignore_ascii_case(b"chunked") => {
            Ok(Framing::CHUNKED)
        }
        (Some(_), _) => refused("The only Transfer-Encoding of requests is chunked, once."),
        (_, Some(length)) if lengths.next().is_none() => match std::str::from_utf8(length) {
            Ok(digits) if !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()) => {
                // hyper counts up to almost 2^64.
                let length = digits.parse::<u64>().ok().filter(|&length| length <= i64::MAX as u64);
                length.map(Framing::Length).ok_or_else(|| ApiError::body_too_large(limits.body_bytes))
            }
            _ => refused("The header Content-Length must be one number."),
        },
        (_, Some(_)) => refused("A request may have the header Content-Length once."),
    }
}

/// Values of the headers with this name, without the spaces around them.
fn named<'h>(headers: &'h [Header<'h>], name: &'h str) -> impl Iterator<Item = &'h [u8]> {
    let of_name = headers.iter().filter(move |header| header.name.eq_ignore_ascii_case(name));
    of_name.map(|header| header.value.trim_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { headers: 8, bytes: 400, body_bytes: 1000 };

    fn judged(lines: &str) -> Result<Framing, u16> {
        let head = format!("{}\r\n\r\n", lines.replace('\n', "\r\n"));
        match judge(format!("{head}more").as_bytes(), &LIMITS) {
            Ok(Some(found)) => {
                assert_eq!(found.bytes, head.len(), "{lines}");
                Ok(found.body)
            }
            Ok(None) => panic!("{lines}: not whole"),
            Err(error) => Err(error.status.as_u16()),
        }
    }

    #[test]
    fn heads_tell_their_bodies() {
        for (headers, body) in [
            ("", Ok(Framing::NONE)),
            ("\nContent-Length: 0", Ok(Framing::NONE)),
            ("\ncontent-length:  17 ", Ok(Framing::Length(17))),
            ("\nContent-Length: 0017", Ok(Framing::Length(17))),
            ("\nTransfer-Encoding: chunked", Ok(Framing::CHUNKED)),
            ("\ntransfer-encoding: Chunked ", Ok(Framing::CHUNKED)),
            ("\nContent-Length: 5\nTransfer-Encoding: chunked", Err(400)),
            ("\nTransfer-Encoding: chunked\nContent-Length: 5", Err(400)),
            ("\nTransfer-Encoding: chunked\nContent-Length: x", Err(400)),
            ("\nTransfer-Encoding: gzip", Err(400)),
            ("\nTransfer-Encoding: gzip, chunked", Err(400)),
            ("\nTransfer-Encoding: chunked, identity", Err(400)),
            ("\nTransfer-Encoding: chunked\nTransfer-Encoding: chunked", Err(400)),
            ("\nTransfer-Encoding: chunked\nTransfer-Encoding: identity", Err(400)),
            ("\nTransfer-Encoding: xchunked", Err(400)),
            ("\nTransfer-Encoding:", Err(400)),
            ("\nContent-Length: 5\nContent-Length: 6", Err(400)),
            ("\nContent-Length: 5\nContent-Length: 5", Err(400)),
            ("\nContent-Length: 5, 5", Err(400)),
            ("\nContent-Length: +5", Err(400)),
            ("\nContent-Length: -5", Err(400)),
            ("\nContent-Length: 5 5", Err(400)),
            ("\nContent-Length: 0x5", Err(400)),
            ("\nContent-Length:", Err(400)),
            ("\nContent-Length: 18446744073709551615", Err(413)),
            ("\nContent-Length: 99999999999999999999999", Err(413)),
            // Folded lines, names with spaces, values with control characters.
            ("\nX-Folded: a\n b", Err(400)),
            ("\n Content-Length: 5", Err(400)),
            ("\nContent-Length : 5", Err(400)),
            ("\nContent Length: 5", Err(400)),
            ("\nX: a\0b", Err(400)),
            ("\nX: a\rb", Err(400)),
            ("\n: x", Err(400)),
            ("\nno colon", Err(400)),
            ("\nHost: b", Err(400)),
        ] {
            assert_eq!(judged(&format!("POST /v1/x HTTP/1.1\nHost: a{headers}")), body, "{headers:?}");
        }
        for (head, body) in [
            ("GET / HTTP/1.1", Err(400)),
            ("GET / HTTP/1.0", Ok(Framing::NONE)),
            ("POST / HTTP/1.0\nContent-Length: 3", Ok(Framing::Length(3))),
            ("POST / HTTP/1.0\nTransfer-Encoding: chunked", Err(400)),
            ("GET / HTTP/2.0\nHost: a", Err(400)),
            ("GET / HTTP/1.1 \nHost: a", Err(400)),
            ("GET  / HTTP/1.1\nHost: a", Err(400)),
            ("GET /\nHost: a", Err(400)),
            ("G\u{1}T / HTTP/1.1\nHost: a", Err(400)),
            ("GET /a{b HTTP/1.1\nHost: a", Ok(Framing::NONE)),
            ("GET a:b:c HTTP/1.1\nHost: a", Err(400)),
        ] {
            assert_eq!(judged(head), body, "{head:?}");
        }
    }

    #[test]
    fn limits_hold_to_the_byte() {
        let head = |padding: usize| format!("GET / HTTP/1.1\nHost: a\nX: {}", "x".repeat(padding));
        let fixed = head(0).replace('\n', "\r\n").len() + 4;
        assert_eq!(judged(&head(LIMITS.bytes - fixed)), Ok(Framing::NONE));
        assert_eq!(judged(&head(LIMITS.bytes - fixed + 1)), Err(431));
        let many = |count: usize| format!("GET / HTTP/1.1\nHost: a{}", "\nX: 1".repeat(count - 1));
        assert_eq!(judged(&many(LIMITS.headers)), Ok(Framing::NONE));
        assert_eq!(judged(&many(LIMITS.headers + 1)), Err(431));
        assert_eq!(judge(&[b'a'; 400], &LIMITS), Ok(None));
        assert_eq!(judge(&[b'a'; 401], &LIMITS).unwrap_err().status.as_u16(), 431);
    }
}
