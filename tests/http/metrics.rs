//! The metrics page, against the rules of its format and against what was done.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};

use moeyard::metrics::{FAMILIES, Kind, LoadSnapshot, LoadSource};
use serde_json::json;

use crate::harness::{Config, Server};

/// A load that a test sets by hand.
struct Table(Mutex<LoadSnapshot>);

impl LoadSource for Table {
    fn snapshot(&self) -> LoadSnapshot {
        self.0.lock().unwrap().clone()
    }
}

fn table() -> Arc<Table> {
    let mut load = LoadSnapshot::zeros(vec![1, 2], 4, 2);
    // [phase][layer][expert]; rank 0 has experts 0 and 1, rank 1 the others.
    load.by_expert = vec![6, 2, 2, 2, 1, 1, 1, 1, 3, 0, 0, 1, 0, 0, 0, 0];
    load.by_rank = vec![8, 4, 2, 2, 3, 1, 0, 0];
    Arc::new(Table(Mutex::new(load)))
}

fn served() -> Server {
    let server = Server::with(Config { load: Some(table()), ..Config::default() });
    assert_eq!(server.complete(json!({"prompt": [50, 51, 52], "max_tokens": 5})).status, 200);
    assert_eq!(server.complete(json!({"prompt": [60, 61], "max_tokens": 3, "stream": true})).status, 200);
    assert_eq!(server.client().get("/nowhere").status, 404);
    server
}

#[test]
fn every_family_is_on_the_page_with_help_and_type() {
    let response = served().client().get("/metrics");
    assert!(response.header("content-type").unwrap().starts_with("text/plain; version=0.0.4"));
    let page = response.body;
    let lines_of = |kind: &str| -> HashMap<&str, &str> {
        let lines: Vec<_> =
            page.lines().filter_map(|line| line.strip_prefix(kind)?.split_once(' ')).collect();
        let map: HashMap<_, _> = lines.iter().copied().collect();
        assert_eq!(lines.len(), map.len(), "a family twice");
        map
    };
    let (helps, types) = (lines_of("# HELP "), lines_of("# TYPE "));
    for family in FAMILIES {
        let kind = match family.kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram(_) => "histogram",
        };
        assert_eq!(types.get(family.name), Some(&kind), "{}", family.name);
        assert_eq!(helps.get(family.name), Some(&family.help), "{}", family.name);
    }
    assert_eq!(types.len(), FAMILIES.len(), "{types:?}");
}

#[test]
fn every_series_belongs_to_a_family_has_its_labels_and_occurs_once() {
    let page = served().client().get("/metrics").body;
    let mut seen = HashSet::new();
    for line in page.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
        let (series, value) = line.rsplit_once(' ').expect(line);
        assert!(seen.insert(series), "{series} twice");
        assert!(value.parse::<f64>().is_ok_and(f64::is_finite), "{line}");
        let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
        let family = FAMILIES
            .iter()
            .find(|family| {
                let histogram = matches!(family.kind, Kind::Histogram(_));
                let suffixes: &[&str] = if histogram { &["_bucket", "_sum", "_count"] } else { &[""] };
                suffixes.iter().any(|suffix| name.strip_suffix(suffix) == Some(family.name))
            })
            .unwrap_or_else(|| panic!("{name} has no family"));
        let labels = labels.trim_end_matches('}');
        let mut names: Vec<_> =
            labels.split("\",").filter_map(|label| label.split_once('=')).map(|(name, _)| name).collect();
        names.retain(|&name| name != "le");
        assert_eq!(names, family.labels, "{line}");
    }
    assert!(page.len() < 150_000, "{} bytes", page.len());
}

#[test]
fn the_counts_are_those_of_what_was_done() {
    let server = served();
    for (series, value) in [
        ("moeyard_prompt_tokens_total", 5.0),
        ("moeyard_generation_tokens_total", 8.0),
        (r#"moeyard_requests_total{endpoint="completions",outcome="length"}"#, 2.0),
        (r#"moeyard_requests_total{endpoint="completions",outcome="abort"}"#, 0.0),
        (r#"moeyard_http_responses_total{route="/v1/completions",code="200"}"#, 2.0),
        (r#"moeyard_http_responses_total{route="other",code="404"}"#, 1.0),
        (r#"moeyard_time_to_first_token_seconds_bucket{le="+Inf"}"#, 2.0),
        ("moeyard_inter_token_latency_seconds_count", 6.0),
        ("moeyard_request_prompt_tokens_sum", 5.0),
        ("moeyard_request_generation_tokens_sum", 8.0),
        (r#"moeyard_step_tokens_sum{phase="prefill"}"#, 5.0),
        ("moeyard_requests_running", 0.0),
        (r#"moeyard_memory_bytes{rank="0",kind="weights"}"#, 3145728.0),
        (r#"moeyard_model_info{model="demo",dtype="f32",layers="2",experts="8",top_k="2"}"#, 1.0),
    ] {
        assert_eq!(server.metric(series), value, "{series}");
    }
}

#[test]
fn expert_load_is_counted_by_rank_layer_and_expert() {
    let server = served();
    for (series, value) in [
        (r#"moeyard_rank_expert_tokens_total{rank="0",phase="prefill"}"#, 10.0),
        (r#"moeyard_rank_expert_tokens_total{rank="1",phase="decode"}"#, 1.0),
        (r#"moeyard_layer_expert_tokens_total{layer="1"}"#, 16.0),
        (r#"moeyard_layer_expert_tokens_total{layer="2"}"#, 4.0),
        (r#"moeyard_expert_tokens_total{layer="1",expert="0"}"#, 9.0),
    ] {
        assert_eq!(server.metric(series), value, "{series}");
    }
}

#[test]
fn the_page_is_served_to_many_at_once() {
    let server = served();
    std::thread::scope(|scope| {
        for _ in 0..20 {
            scope.spawn(|| assert_eq!(server.client().get("/metrics").status, 200));
        }
    });
}
