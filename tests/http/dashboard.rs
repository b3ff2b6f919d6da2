//! The page at `/experts`: one document that runs nothing and loads nothing but itself, on data that stays small; and, where
//! a Chromium is installed, what a browser makes of it.

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use moeyard::metrics::{LoadSnapshot, LoadSource};
use moeyard::server::ApiKeys;
use router_sim::load::LoadWindow;
use router_sim::placement::{ClusterShape, Linear, Placement, PlacementPolicy};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::experts::table;
use crate::harness::{Config, Server};

fn served() -> Server {
    Server::with(Config { load: Some(table()), ..Config::default() })
}

/// The text between two marks of the document.
fn between<'a>(document: &'a str, from: &str, to: &str) -> &'a str {
    let start = document.find(from).unwrap_or_else(|| panic!("no {from}")) + from.len();
    &document[start..start + document[start..].find(to).unwrap_or_else(|| panic!("no {to} after {from}"))]
}

/// What stands in double quotes after each `mark`.
fn quoted<'a>(text: &'a str, mark: &'a str) -> Vec<&'a str> {
    text.match_indices(mark).map(|(at, _)| text[at + mark.len()..].split('"').next().unwrap()).collect()
}

#[test]
fn the_document_runs_and_loads_nothing_but_itself() {
    let response = served().client().get("/experts");
    assert_eq!((response.status, response.header("content-type")), (200, Some("text/html; charset=utf-8")));
    let document = &response.body;
    assert!(document.len() < 80_000, "{} bytes", document.len());
    let (style, script) = (
        between(document, "<style>", "</style>"),
        between(document, "<script type=\"module\">", "</script>"),
    );
    let hash = |text: &str| format!("'sha256-{}'", STANDARD.encode(Sha256::digest(text.as_bytes())));
    let policy = response.header("content-security-policy").expect("a policy");
    for rule in [
        "default-src 'none'".to_owned(),
        format!("script-src {}", hash(script)),
        format!("style-src {}", hash(style)),
        "connect-src 'self'".to_owned(),
        "frame-ancestors 'none'".to_owned(),
    ] {
        assert!(policy.split("; ").any(|found| found == rule), "{rule} is not in {policy}");
    }
    assert!(!policy.contains("unsafe"), "{policy}");
    assert_eq!(response.header("x-content-type-options"), Some("nosniff"));

    let markup = document.replace(style, "").replace(script, "");
    for banned in [" src=", "@import", "url(", " style=", " onclick", " onload", " onerror", "javascript:"] {
        assert!(!markup.contains(banned) && !style.contains(banned), "{banned}");
    }
    for banned in ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "localStorage"]
    {
        assert!(!script.contains(banned), "{banned}");
    }
    let links: Vec<_> = document.match_indices("http").map(|(at, _)| &document[at..at + 12]).collect();
    assert!(links.iter().all(|link| link.starts_with("http://www.w")), "only a namespace: {links:?}");
}

#[test]
fn the_script_finds_its_elements_and_its_routes() {
    let server = served();
    let document = server.client().get("/experts").body;
    let ids = quoted(&document, " id=\"");
    let wanted = quoted(&document, "$(\"");
    assert!(ids.len() > 20 && wanted.len() > 20, "{ids:?} {wanted:?}");
    for id in &wanted {
        assert!(ids.contains(id), "no element {id}");
    }
    for id in &ids {
        assert_eq!(ids.iter().filter(|other| *other == id).count(), 1, "{id} twice");
    }
    for route in ["v1/experts", "v1/experts/balance", "v1/experts/placement", "v1/experts/rebalance"] {
        assert!(document.contains(route), "{route} is not asked");
        assert_eq!(server.client().get(&format!("/{route}")).status, 200, "{route}");
    }
}

#[test]
fn the_answers_have_what_the_script_reads() {
    let server = served();
    let script = server.client().get("/experts").body;
    let get = |path: &str| server.client().get(path).json();
    let load = get("/v1/experts?window=60s&phase=both&owners=false");
    assert!(load.get("owner_ranks").is_none() && load.get("replicas").is_none(), "{load}");
    for (answer, object, fields) in [
        (&load, "load", &["window_seconds", "placement_version", "layer_ids", "experts", "ranks"][..]),
        (&load, "load", &["expert_tokens", "rank_tokens", "sent_tokens", "row_bytes"]),
        (&get("/v1/experts/placement"), "placement", &["ranks", "slots_per_rank", "physical_to_logical_map"]),
        (
            &get("/v1/experts/balance"),
            "news",
            &["first", "next", "unix_seconds", "rows", "balancedness", "sampling_floor_ratio", "marks"],
        ),
        (
            &get("/v1/experts/rebalance"),
            "state",
            &["placement_version", "rebalances", "moved_experts", "moved_bytes", "achieved_balancedness"],
        ),
    ] {
        for field in fields {
            assert!(answer.get(field).is_some(), "{field} is not in {answer}");
            assert!(script.contains(&format!("{object}.{field}")), "nobody reads {object}.{field}");
        }
    }
    for (phase, keys) in [("both", &["both"][..]), ("prefill", &["prefill"]), ("decode", &["decode"])] {
        let load = get(&format!("/v1/experts?phase={phase}&owners=false"));
        let found: Vec<_> = load["sent_tokens"].as_object().unwrap().keys().collect();
        assert_eq!(found, keys);
    }
}

#[test]
fn a_page_that_is_known_is_not_sent_again() {
    let server = served();
    let etag = server.client().get("/experts").header("etag").expect("a tag").to_owned();
    let again = server.client().request("GET", "/experts", &[("If-None-Match", &etag)], b"");
    assert_eq!((again.status, again.body.as_str()), (304, ""));
}

#[test]
fn behind_a_key_a_browser_is_asked_for_it_and_nobody_else_sees_a_page() {
    let mut config = Config { load: Some(table()), ..Config::default() };
    config.options.api_keys = ApiKeys::new(["right"]);
    let server = Server::with(config);
    let get = |path: &str, headers: &[(&str, &str)]| server.client().request("GET", path, headers, b"");
    let accept = ("Accept", "text/html,application/xhtml+xml,*/*;q=0.8");
    let page = get("/experts", &[accept]);
    assert_eq!((page.status, page.header("content-type")), (401, Some("text/html; charset=utf-8")));
    assert!(page.header("content-security-policy").is_some() && page.body.contains("id=\"secret\""));
    // It says nothing about the server.
    assert_eq!(page.body, get("/experts", &[accept, ("Authorization", "Bearer right")]).body);
    for (path, headers) in [
        ("/experts", &[][..]),
        ("/experts", &[("Accept", "*/*")]),
        ("/experts?key=right", &[("Accept", "application/json")]),
        ("/experts/", &[accept]),
        ("/v1/experts", &[accept]),
        ("/v1/experts?api_key=right", &[accept]),
        ("/v1/models", &[accept]),
    ] {
        let refused = get(path, headers);
        assert_eq!(
            (refused.status, &refused.error()["type"]),
            (401, &"AuthenticationError".into()),
            "{path}"
        );
    }
}

/// DeepSeek-V3's size on 64 ranks after hours of traffic, with a hot expert in each layer.
struct Large {
    load: LoadSnapshot,
    placement: Arc<Placement>,
}

impl Large {
    fn new() -> Large {
        let layers: Vec<usize> = (3..61).collect();
        let shape = ClusterShape { ranks: 64, redundant: 64 };
        let placement = Linear.place(&LoadWindow::new(&layers, 256), &shape).unwrap();
        Large { load: LoadSnapshot::zeros(layers, 256, 64), placement: Arc::new(placement) }
    }

    /// The same a window of heavy traffic later.
    fn grown(mut self) -> Large {
        let mut state = 7_u64;
        let mut draw = |most: u64| {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            (state >> 33) % most
        };
        self.load.by_expert.iter_mut().for_each(|tokens| *tokens = 10_000 + draw(20_000));
        self.load.by_expert.iter_mut().step_by(256).for_each(|tokens| *tokens += 200_000);
        self.load.by_rank.iter_mut().for_each(|tokens| *tokens = 60_000 + draw(40_000));
        self.load.sent.iter_mut().for_each(|tokens| *tokens = 60_000 + draw(40_000));
        self
    }
}

/// Empty until it is told to begin, then [`Large::grown`].
struct Growing(Large, AtomicBool);

impl LoadSource for Growing {
    fn snapshot(&self) -> LoadSnapshot {
        match self.1.load(Ordering::Relaxed) {
            false => Large::new().load,
            true => self.0.load.clone(),
        }
    }

    fn step_imbalance(&self) -> f64 {
        0.0
    }

    fn placement(&self) -> Arc<Placement> {
        Arc::clone(&self.0.placement)
    }
}

/// A server over that world, which has seen the traffic.
fn large() -> Server {
    let source = Arc::new(Growing(Large::new().grown(), AtomicBool::new(false)));
    let server = Server::with(Config { load: Some(source.clone()), ..Config::default() });
    source.1.store(true, Ordering::Relaxed);
    server
}

#[test]
fn the_data_of_a_large_world_is_small() {
    let server = large();
    let mut client = server.client();
    client.get("/v1/experts/placement");
    for (path, most_bytes) in [
        ("/v1/experts?window=60s&phase=both&owners=false", 170_000),
        ("/v1/experts/balance?since=0", 40_000),
        ("/v1/experts/rebalance", 1_000),
        ("/v1/experts/placement", 100_000),
    ] {
        let response = client.get(path);
        assert_eq!(response.status, 200, "{path}");
        assert!(response.body.len() <= most_bytes, "{path}: {} bytes", response.body.len());
    }
}

/// What Chromium makes of a page after its first polls; `None`, and said so, where there is none.
fn rendered(server: &Server, path: &str) -> Option<String> {
    let profile = tempfile::tempdir().unwrap();
    let url = format!("http://{}{path}", server.address);
    for program in ["chromium", "chromium-browser", "google-chrome"] {
        let browser = Command::new(program)
            .args(["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000", "--dump-dom"])
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .arg(&url)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .output();
        if let Ok(output) = browser {
            return Some(String::from_utf8_lossy(&output.stdout).into_owned());
        }
    }
    eprintln!("skipped: no chromium to look at {path} with (Debian has it in the package chromium)");
    None
}

#[test]
fn a_browser_shows_the_load() {
    let server = large();
    let Some(page) = rendered(&server, "/experts") else { return };
    assert!(page.contains("58 MoE layers of 256 experts on 64 ranks"), "{page}");
    assert_eq!(between(&page, "id=\"pulse\" role=\"status\" class=\"", "\""), "live");
    let hottest = between(&page, "id=\"heat-reading\" aria-live=\"polite\">", "</p>");
    assert!(hottest.starts_with("Hottest: layer <b>") && hottest.contains("expert <b>0</b>"), "{hottest}");
    assert_eq!(page.matches("class=\"tile\"").count(), 5);
    assert!(page.contains("64 slots per layer beyond one per expert"), "{page}");
}

#[test]
fn a_browser_is_told_that_nothing_came_yet() {
    let server = served();
    let Some(page) = rendered(&server, "/experts") else { return };
    assert!(page.contains("<section id=\"empty\">") && page.contains("<div id=\"live\" hidden"), "{page}");
    assert!(page.contains(&format!("curl http://{}/v1/completions", server.address)), "{page}");
}

#[test]
fn a_browser_without_a_key_sees_the_form_and_no_data() {
    let mut config = Config { load: Some(table()), ..Config::default() };
    config.options.api_keys = ApiKeys::new(["right"]);
    let server = Server::with(config);
    let Some(page) = rendered(&server, "/experts") else { return };
    assert!(page.contains("<section id=\"locked\">") && page.contains("<div id=\"live\" hidden"), "{page}");
    assert!(!page.contains("MoE layers of"), "{page}");
}

#[test]
fn counts_of_a_window_are_told_by_phase_as_asked() {
    let server = crate::experts::grown();
    let get = |phase: &str| -> Value {
        server.client().get(&format!("/v1/experts?phase={phase}&owners=false")).json()["expert_tokens"]
            .clone()
    };
    assert_eq!(get("both")["both"][1][3], 5);
    assert_eq!(get("decode")["decode"][1][3], 5);
    assert_eq!(get("prefill")["prefill"][1][3], 0);
}
