//! The metrics page, against the rules of its format and against what was done.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use moeyard::engine::EngineStats;
use moeyard::metrics::{ExpertDetail, FAMILIES, Kind, LoadSnapshot, LoadSource};
use moeyard::server::{Info, Metrics, RankMemory, SeriesOptions, Sources, Stage};
use router_sim::load::LoadWindow;
use router_sim::placement::{ClusterShape, Linear, Placement, PlacementPolicy};
use serde_json::json;

use crate::experts::table;
use crate::harness::{Config, Server, greedy};
use crate::patience::eventually;

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
        (r#"moeyard_requests_total{endpoint="chat_completions",outcome="stop"}"#, 0.0),
        ("moeyard_requests_running", 0.0),
        ("moeyard_request_queue_duration_seconds_count", 2.0),
        ("moeyard_request_prefill_duration_seconds_count", 2.0),
        ("moeyard_request_decode_duration_seconds_count", 2.0),
        (r#"moeyard_rank_up{rank="0"}"#, 1.0),
        (r#"moeyard_rank_heartbeat_age_seconds{rank="0"}"#, 0.0),
        (r#"moeyard_comm_bytes_total{rank="0",op="dispatch",dir="sent"}"#, 0.0),
        (r#"moeyard_rebalances_total{outcome="applied"}"#, 0.0),
        ("moeyard_tokens_dropped_total", 0.0),
        (r#"moeyard_memory_bytes{rank="0",kind="weights"}"#, 3145728.0),
        (
            r#"moeyard_model_info{model="demo",dtype="f32",expert_dtype="f32",layers="2",experts="8",top_k="2"}"#,
            1.0,
        ),
    ] {
        assert_eq!(server.metric(series), value, "{series}");
    }
}

#[test]
fn what_is_turned_away_is_counted_by_reason() {
    let server = Server::start();
    let rejections =
        |reason| server.metric(&format!("moeyard_admission_rejections_total{{reason=\"{reason}\"}}"));
    let reasons = ["queue_full", "tokens", "draining", "too_long"];
    assert_eq!(reasons.map(rejections), [0.0; 4], "all are there from the start");
    // Too long by its tokens, by what it asks for, and by its bytes alone.
    for fields in [
        json!({"prompt": vec![5; 600]}),
        json!({"prompt": [5], "max_tokens": 600}),
        json!({"prompt": "x".repeat(1 << 20)}),
    ] {
        let error = server.complete(fields).error();
        assert!(
            error["message"]
                .as_str()
                .unwrap()
                .starts_with("This model's maximum context length is 512 tokens.")
        );
    }
    assert_eq!(server.complete(json!({"prompt": [5], "temperature": -1})).status, 400);
    assert_eq!(reasons.map(rejections), [0.0, 0.0, 0.0, 3.0], "other refusals are no rejections");
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

/// The load of a large model, without tokens.
struct Large;

impl LoadSource for Large {
    fn snapshot(&self) -> LoadSnapshot {
        LoadSnapshot::zeros((3..61).collect(), 256, 8)
    }

    fn step_imbalance(&self) -> f64 {
        0.0
    }

    fn placement(&self) -> Arc<Placement> {
        let layers: Vec<usize> = (3..61).collect();
        Arc::new(
            Linear.place(&LoadWindow::new(&layers, 256), &ClusterShape { ranks: 8, redundant: 0 }).unwrap(),
        )
    }
}

/// Metrics of a server of that model on eight ranks.
fn large(expert_detail: Option<ExpertDetail>, max_series: usize) -> moeyard::Result<Metrics> {
    let ranks = (0..8).map(|_| Arc::default()).collect();
    let sources = Sources { load: Some(Arc::new(Large)), ranks, ..Sources::default() };
    let info = Info { memory: vec![RankMemory::default(); 8], ..Info::default() };
    Metrics::new(&info, sources, SeriesOptions { expert_detail, max_series })
}

fn series(page: &str) -> usize {
    page.lines().filter(|line| !line.starts_with('#') && !line.is_empty()).count()
}

/// How long it takes to write is measured by benches/metrics.rs.
#[test]
fn the_page_of_a_large_model_stays_small() {
    let metrics = large(None, 1400).unwrap();
    let page = metrics.render(&EngineStats::default());
    assert!(series(&page) <= 1400, "{} series", series(&page));
    assert!(page.len() <= 150_000, "{} bytes", page.len());
    let full = large(Some(ExpertDetail::Expert), 20_000).unwrap();
    let page = full.render(&EngineStats::default());
    assert!(series(&page) > 58 * 256, "{} series", series(&page));
}

#[test]
fn a_detail_beyond_the_limit_is_refused_with_the_count() {
    let page = large(Some(ExpertDetail::Expert), 20_000).unwrap().render(&EngineStats::default());
    let error = large(Some(ExpertDetail::Expert), 1000).err().expect("refused").to_string();
    let expected =
        format!("expert detail \"expert\" makes {} series, more than max_series = 1000", series(&page));
    assert!(error.contains(&expected), "{error}");
}

#[test]
fn a_hundred_scrapes_at_once_disturb_nobody() {
    // The engine generates while all of them read.
    let server = Server::with(Config { load: Some(table()), ..Config::default() });
    let running = AtomicBool::new(true);
    std::thread::scope(|scope| {
        let load = scope.spawn(|| {
            let mut answers = 0;
            while running.load(Ordering::Relaxed) || answers == 0 {
                let answer = server.complete(json!({"prompt": [50, 51, 52], "max_tokens": 20}));
                assert_eq!(answer.status, 200);
                answers += 1;
            }
            answers
        });
        let scrapes: Vec<_> = (0..100)
            .map(|_| {
                scope.spawn(|| {
                    let mut before = 0.0;
                    for _ in 0..3 {
                        let page = server.client().get("/metrics").body;
                        let steps = value(&page, "moeyard_steps_total");
                        assert!(steps >= before, "counters only grow: {steps} after {before}");
                        before = steps;
                    }
                })
            })
            .collect();
        scrapes.into_iter().for_each(|scrape| scrape.join().unwrap());
        running.store(false, Ordering::Relaxed);
        assert!(load.join().unwrap() > 0);
    });
}

fn value(page: &str, series: &str) -> f64 {
    let line = page.lines().find(|line| line.rsplit_once(' ').is_some_and(|(name, _)| name == series));
    line.unwrap_or_else(|| panic!("{series} is not in\n{page}")).rsplit_once(' ').unwrap().1.parse().unwrap()
}

#[test]
fn the_page_is_whole_while_the_server_shuts_down() {
    let server = Server::held(Config::default());
    let mut busy = server.client();
    busy.send_json("/v1/completions", &greedy(json!({"prompt": [50], "max_tokens": 100, "stream": true})));
    eventually("it runs", || server.stats().running == 1);
    server.shutdown.advance(Stage::Draining);
    let page = server.client().get("/metrics");
    assert_eq!(page.status, 200);
    assert!(page.body.ends_with('\n'), "{}", page.body);
    assert_eq!(value(&page.body, "moeyard_requests_running"), 1.0);
}
