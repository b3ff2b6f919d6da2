//! Who may ask: API keys before every route but the health ones, and the guard of admin routes.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::header::{AUTHORIZATION, HOST, ORIGIN};
use http::uri::Authority;
use http::{HeaderMap, Method, StatusCode};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use super::dashboard;
use super::error::ApiError;
use super::state::AppState;

/// Routes that answer without a key: what load balancers and kubelets ask.
const OPEN_ROUTES: [&str; 3] = ["/health", "/livez", "/readyz"];
/// Below these, everything that is not a plain read changes the server.
const ADMIN_PREFIXES: [&str; 2] = ["/v1/experts", "/v1/routing"];

/// Address of the client at the other end of a connection; `connection` puts it on every request.
#[derive(Debug, Clone, Copy)]
pub struct Peer(pub SocketAddr);

/// The keys that open the server; none at all leaves it open to everyone.
#[derive(Clone, Default)]
pub struct ApiKeys {
    /// Of equal length whatever the keys are, so that a comparison tells nothing about theirs.
    digests: Vec<[u8; 32]>,
}

impl std::fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ApiKeys({})", self.digests.len())
    }
}

impl ApiKeys {
    /// Takes keys of at least one character each.
    pub fn new<'a>(keys: impl IntoIterator<Item = &'a str>) -> Self {
        ApiKeys { digests: keys.into_iter().map(digest).collect() }
    }

    /// No key is asked for.
    pub fn is_empty(&self) -> bool {
        self.digests.is_empty()
    }

    /// Whether `given` is one of the keys. Takes the same time for every wrong key.
    fn holds(&self, given: &str) -> bool {
        let given = digest(given);
        let found = self.digests.iter().fold(Choice::from(0), |found, key| found | key.ct_eq(&given));
        found.into()
    }
}

fn digest(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

/// The layer before all routes.
pub async fn guard(State(state): State<Arc<AppState>>, request: Request, next: Next) -> Response {
    match check(&state.options.api_keys, &request) {
        Ok(()) => next.run(request).await,
        Err(error) => refusal(&request, error),
    }
}

/// A browser cannot show a key by itself: where it opens the dashboard, that asks for one.
fn refusal(request: &Request, error: ApiError) -> Response {
    let page = match error.status {
        StatusCode::UNAUTHORIZED => {
            dashboard::locked(request.method(), request.uri().path(), request.headers())
        }
        _ => None,
    };
    page.unwrap_or_else(|| error.into_response())
}

fn check(keys: &ApiKeys, request: &Request) -> Result<(), ApiError> {
    let path = request.uri().path();
    if OPEN_ROUTES.contains(&path) {
        return Ok(());
    }
    if !keys.is_empty() {
        return match bearer(request.headers()) {
            Some(key) if keys.holds(key) => Ok(()),
            Some(_) => Err(ApiError::unauthorized("The API key is wrong.")),
            None => Err(ApiError::unauthorized(
                "This server asks for an API key in the header `Authorization: Bearer KEY`.",
            )),
        };
    }
    let local =
        request.extensions().get::<Peer>().is_some_and(|peer| peer.0.ip().to_canonical().is_loopback());
    let admin = is_admin(request.method(), path);
    if admin && is_foreign(request.headers()) {
        return Err(ApiError::forbidden(
            "A server without an API key takes this request from its own page on this machine only, not from that of another origin.",
        ));
    }
    if admin && !local {
        return Err(ApiError::forbidden(
            "A server without an API key takes this request from the loopback interface only.",
        ));
    }
    Ok(())
}

/// Whether a request would change the server rather than use it.
fn is_admin(method: &Method, path: &str) -> bool {
    let below =
        |prefix| path.strip_prefix(prefix).is_some_and(|rest: &str| rest.is_empty() || rest.starts_with('/'));
    let reads = matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS);
    !reads && ADMIN_PREFIXES.into_iter().any(below)
}

/// Whether a browser asks for the page of somebody else: it runs on this machine, but not for its operator. A name that
/// only resolves to this machine could be anyone's, so it is not enough.
fn is_foreign(headers: &HeaderMap) -> bool {
    let Some(origin) = headers.get(ORIGIN) else { return false };
    let Some(authority) = origin.to_str().ok().and_then(|origin| origin.strip_prefix("http://")) else {
        return true;
    };
    let same = headers.get(HOST).is_some_and(|host| host.as_bytes() == authority.as_bytes());
    let host = authority.parse::<Authority>().ok();
    let host = host.as_ref().map_or("", |authority| authority.host().trim_matches(['[', ']']));
    let local = host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
    !(same && local)
}

/// The key of `Authorization: Bearer KEY`. Of several such headers none counts: who sent which is unknown.
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let (Some(only), None) = (values.next(), values.next()) else { return None };
    let (scheme, key) = only.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::Body;

    fn request(method: &str, path: &str, peer: &str, authorization: &[&str]) -> Request {
        let mut request = Request::builder().method(method).uri(path);
        for value in authorization {
            request = request.header(AUTHORIZATION, *value);
        }
        let mut request = request.body(Body::empty()).unwrap();
        request.extensions_mut().insert(Peer(peer.parse().unwrap()));
        request
    }

    #[test]
    fn keys_open_every_route_and_nothing_else_does() {
        let keys = ApiKeys::new(["first key?no", "second"]);
        for (authorization, open) in [
            (&["Bearer second"][..], true),
            (&["bearer  second"], true),
            (&["Bearer first key?no"], true),
            (&["Bearer secon"], false),
            (&["Bearer second2"], false),
            (&["Bearer "], false),
            (&["Bearer"], false),
            (&["Basic second"], false),
            (&["second"], false),
            (&["Bearer second", "Bearer second"], false),
            (&[], false),
        ] {
            let status = |path| {
                check(&keys, &request("GET", path, "127.0.0.1:9", authorization))
                    .map_err(|e| e.status.as_u16())
            };
            let expected = if open { Ok(()) } else { Err(401) };
            for path in ["/v1/models", "/metrics", "/version", "/health/", "/nowhere", "/openapi.json"] {
                assert_eq!(status(path), expected, "{path} {authorization:?}");
            }
            for path in OPEN_ROUTES {
                assert_eq!(status(path), Ok(()), "{path} {authorization:?}");
            }
        }
    }

    #[test]
    fn admin_requests_without_a_key_come_from_this_machine() {
        let none = ApiKeys::default();
        for (method, path, peer, allowed) in [
            ("POST", "/v1/experts/rebalance", "127.0.0.1:9", true),
            ("POST", "/v1/experts/rebalance", "[::1]:9", true),
            ("POST", "/v1/experts/rebalance", "[::ffff:127.0.0.1]:9", true),
            ("POST", "/v1/experts/rebalance", "10.0.0.7:9", false),
            ("PUT", "/v1/experts/placement", "[2001:db8::1]:9", false),
            ("POST", "/v1/routing/start", "10.0.0.7:9", false),
            ("GET", "/v1/experts/placement", "10.0.0.7:9", true),
            ("POST", "/v1/expertsX", "10.0.0.7:9", true),
            ("POST", "/v1/completions", "10.0.0.7:9", true),
        ] {
            let outcome = check(&none, &request(method, path, peer, &[])).map_err(|e| e.status.as_u16());
            assert_eq!(outcome, if allowed { Ok(()) } else { Err(403) }, "{method} {path} from {peer}");
        }
        for (host, origin, allowed) in [
            ("127.0.0.1:8000", "http://127.0.0.1:8000", true),
            ("localhost:8000", "http://localhost:8000", true),
            ("[::1]:8000", "http://[::1]:8000", true),
            ("127.0.0.1:8000", "http://127.0.0.1:8001", false),
            ("127.0.0.1:8000", "https://evil.example", false),
            ("127.0.0.1:8000", "null", false),
            // A name that somebody else lets resolve to this machine.
            ("evil.example:8000", "http://evil.example:8000", false),
        ] {
            let mut request = request("POST", "/v1/experts/rebalance", "127.0.0.1:9", &[]);
            request.headers_mut().insert(HOST, host.parse().unwrap());
            request.headers_mut().insert(ORIGIN, origin.parse().unwrap());
            let outcome = check(&none, &request).map_err(|e| e.status.as_u16());
            assert_eq!(outcome, if allowed { Ok(()) } else { Err(403) }, "{origin} at {host}");
        }
        let keyed = ApiKeys::new(["k"]);
        assert!(check(&keyed, &request("PUT", "/v1/experts/placement", "10.0.0.7:9", &["Bearer k"])).is_ok());
        let mut unknown = request("PUT", "/v1/experts/placement", "127.0.0.1:9", &[]);
        unknown.extensions_mut().clear();
        assert!(check(&none, &unknown).is_err());
    }
}
