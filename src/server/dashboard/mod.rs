//! `GET /experts`: expert load to look at. One document with its style and its script inside and nothing from elsewhere;
//! it holds no data and asks the JSON routes once a second. So it is also the body of its own 401, where it asks for the
//! key that it then sends as every client does.

use std::sync::LazyLock;

use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::header::{
    ACCEPT, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG, IF_NONE_MATCH, REFERRER_POLICY,
    X_CONTENT_TYPE_OPTIONS,
};
use http::{HeaderMap, Method, StatusCode};
use sha2::{Digest, Sha256};

/// Where the page is.
pub(super) const PATH: &str = "/experts";

const HTML: &str = include_str!("page.html");
const STYLE: &str = include_str!("page.css");
/// One script, in reading order.
const SCRIPTS: [&str; 11] = [
    include_str!("text.js"),
    include_str!("api.js"),
    include_str!("world.js"),
    include_str!("surface.js"),
    include_str!("heat.js"),
    include_str!("balance.js"),
    include_str!("ranks.js"),
    include_str!("traffic.js"),
    include_str!("replicas.js"),
    include_str!("rebalancer.js"),
    include_str!("page.js"),
];

static PAGE: LazyLock<Page> = LazyLock::new(Page::new);

/// The document with what goes before it.
struct Page {
    document: String,
    etag: String,
    /// Nothing runs and nothing styles but what is in the document, by its hash; nothing is fetched but from here.
    policy: String,
}

impl Page {
    fn new() -> Page {
        let script = SCRIPTS.concat();
        let document = HTML.replace("{{style}}", STYLE).replace("{{script}}", &script);
        let etag = format!("\"{}\"", &hash(&document)[..22]);
        let policy = format!(
            "default-src 'none'; script-src 'sha256-{}'; style-src 'sha256-{}'; img-src data:; connect-src 'self'; \
             base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
            hash(&script),
            hash(STYLE)
        );
        Page { document, etag, policy }
    }

    fn respond(&'static self, status: StatusCode) -> Response {
        let headers = [
            (CONTENT_TYPE, "text/html; charset=utf-8"),
            (CONTENT_SECURITY_POLICY, &self.policy),
            (X_CONTENT_TYPE_OPTIONS, "nosniff"),
            (REFERRER_POLICY, "no-referrer"),
            (CACHE_CONTROL, "no-cache"),
            (ETAG, &self.etag),
        ];
        (status, headers, self.document.as_str()).into_response()
    }
}

fn hash(text: &str) -> String {
    STANDARD.encode(Sha256::digest(text.as_bytes()))
}

/// The page.
pub(super) async fn page(headers: HeaderMap) -> Response {
    let known = headers.get_all(IF_NONE_MATCH).iter().any(|tag| tag.as_bytes() == PAGE.etag.as_bytes());
    match known {
        true => (StatusCode::NOT_MODIFIED, [(ETAG, PAGE.etag.as_str())]).into_response(),
        false => PAGE.respond(StatusCode::OK),
    }
}

/// What a browser that shows no key gets instead of an error object; `None` for everything else.
pub(super) fn locked(method: &Method, path: &str, headers: &HeaderMap) -> Option<Response> {
    let browser = headers.get(ACCEPT).is_some_and(|types| types.as_bytes().starts_with(b"text/html"));
    (*method == Method::GET && path == PATH && browser).then(|| PAGE.respond(StatusCode::UNAUTHORIZED))
}
