//! Expert load over HTTP: `GET /v1/experts` tells what every expert of every layer was given over a window of the past,
//! `GET /v1/experts/placement` where the experts live. A heat map needs no time series per expert for it.

use std::collections::VecDeque;
use std::fmt::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::{RawQuery, State};
use axum::response::{IntoResponse, Response};
use http::header::{CACHE_CONTROL, CONTENT_TYPE, ETAG, IF_NONE_MATCH};
use http::{HeaderMap, StatusCode};
use router_sim::placement::Placement;
use serde_json::json;

use super::error::ApiError;
use super::state::AppState;
use crate::metrics::{LoadSnapshot, LoadSource, Phase};

/// The longest window.
const MAX_WINDOW_S: u64 = 300;
/// Where a request names none.
const DEFAULT_WINDOW_S: u64 = 60;
/// Snapshots of the past are this far apart; so is the shortest window.
const SPACING_S: u64 = 5;
/// An answer is given again for this long.
const FRESH: Duration = Duration::from_secs(1);
/// Answers that are kept for that.
const MAX_ANSWERS: usize = 8;

/// `GET /v1/experts?window=60s&format=json|csv`.
pub(super) async fn load(
    State(state): State<Arc<AppState>>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let asked = Asked::parse(query.as_deref().unwrap_or_default())?;
    let experts = state.experts.as_ref().ok_or_else(no_experts)?;
    Ok(experts.answer(asked, Instant::now()).respond(&headers))
}

/// `GET /v1/experts/placement`: a placement file, as `--placement` and router-sim read it.
pub(super) async fn placement(
    State(state): State<Arc<AppState>>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let experts = state.experts.as_ref().ok_or_else(no_experts)?;
    let body = experts.source.placement().to_json();
    Ok(Answer::new(Format::Json, body).respond(&headers))
}

fn no_experts() -> ApiError {
    ApiError::unavailable("The engine does not tell where its experts live.")
}

/// What a client wants to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Asked {
    window_s: u64,
    format: Format,
}

/// How it wants it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Json,
    Csv,
}

impl Asked {
    fn parse(query: &str) -> Result<Asked, ApiError> {
        let mut asked = Asked { window_s: DEFAULT_WINDOW_S, format: Format::Json };
        let mut seen = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            if seen.contains(&key) {
                return Err(ApiError::bad_param(clip(key), format!("\"{}\" is given twice.", clip(key))));
            }
            seen.push(key);
            match key {
                "window" => asked.window_s = window(value)?,
                "format" => {
                    asked.format = match value {
                        "json" => Format::Json,
                        "csv" => Format::Csv,
                        other => {
                            let why = format!("format is \"{}\", but must be json or csv.", clip(other));
                            return Err(ApiError::bad_param("format", why));
                        }
                    }
                }
                other => {
                    let why =
                        format!("There is no parameter \"{}\"; known are window and format.", clip(other));
                    return Err(ApiError::bad_param(clip(other), why));
                }
            }
        }
        Ok(asked)
    }
}

/// Seconds out of "90s", "5m" or "90".
fn window(text: &str) -> Result<u64, ApiError> {
    let (number, unit) = match text.strip_suffix('m') {
        Some(minutes) => (minutes, 60),
        None => (text.strip_suffix('s').unwrap_or(text), 1),
    };
    let digits = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    let seconds = digits.then(|| number.parse::<u64>().ok()?.checked_mul(unit)).flatten();
    seconds.filter(|seconds| (SPACING_S..=MAX_WINDOW_S).contains(seconds)).ok_or_else(|| {
        let given = clip(text);
        let why = format!(
            "window is \"{given}\", but must be {SPACING_S}s to {MAX_WINDOW_S}s, such as 60s or 5m: older counts are not kept."
        );
        ApiError::bad_param("window", why)
    })
}

/// As much of a client's text as an answer repeats.
fn clip(text: &str) -> String {
    text.chars().take(50).collect()
}

/// The expert load of the last minutes.
pub(super) struct ExpertLoad {
    source: Arc<dyn LoadSource>,
    /// A std lock: held while an answer is made, never across an await.
    past: Mutex<Past>,
}

struct Past {
    /// Oldest first, [`SPACING_S`] apart.
    snapshots: VecDeque<(Instant, LoadSnapshot)>,
    /// Latest first.
    answers: VecDeque<(Instant, Asked, Arc<Answer>)>,
}

impl ExpertLoad {
    pub(super) fn new(source: Arc<dyn LoadSource>) -> Self {
        let first = (Instant::now(), source.snapshot());
        ExpertLoad { source, past: Mutex::new(Past { snapshots: [first].into(), answers: VecDeque::new() }) }
    }

    /// Takes a snapshot when one is due; called about once a second.
    pub(super) fn tick(&self, now: Instant) {
        let mut past = self.past.lock().unwrap_or_else(PoisonError::into_inner);
        let latest = past.snapshots.back().expect("there is always one").0;
        if now.saturating_duration_since(latest) < Duration::from_secs(SPACING_S) {
            return;
        }
        past.snapshots.push_back((now, self.source.snapshot()));
        // One snapshot at or before the begin of the longest window stays.
        let horizon = Duration::from_secs(MAX_WINDOW_S);
        while past.snapshots.get(1).is_some_and(|(taken, _)| now.saturating_duration_since(*taken) >= horizon)
        {
            past.snapshots.pop_front();
        }
    }

    /// The answer as of `now`, or one that is still fresh.
    fn answer(&self, asked: Asked, now: Instant) -> Arc<Answer> {
        let mut past = self.past.lock().unwrap_or_else(PoisonError::into_inner);
        past.answers.retain(|(made, ..)| now.saturating_duration_since(*made) < FRESH);
        if let Some((.., answer)) = past.answers.iter().find(|(_, known, _)| *known == asked) {
            return Arc::clone(answer);
        }
        let window = Duration::from_secs(asked.window_s);
        // The latest snapshot that is old enough; a server that has not run for so long has its first.
        let old_enough =
            past.snapshots.iter().rev().find(|(taken, _)| now.saturating_duration_since(*taken) >= window);
        let (began, then) =
            old_enough.unwrap_or_else(|| past.snapshots.front().expect("there is always one"));
        let report = Report {
            seconds: now.saturating_duration_since(*began).as_secs_f64(),
            load: self.source.snapshot().since(then),
            placement: self.source.placement(),
        };
        let body = match asked.format {
            Format::Json => report.json(),
            Format::Csv => report.csv(),
        };
        let answer = Arc::new(Answer::new(asked.format, body));
        past.answers.truncate(MAX_ANSWERS - 1);
        past.answers.push_front((now, asked, Arc::clone(&answer)));
        answer
    }
}

/// A window of load with where it was computed.
struct Report {
    /// Length of the window.
    seconds: f64,
    load: LoadSnapshot,
    placement: Arc<Placement>,
}

impl Report {
    /// Ranks that hold an expert of a layer, ascending, each once.
    fn owners(&self, layer: usize, expert: usize) -> Vec<usize> {
        let per_rank = self.placement.slots_per_rank();
        let slots = self.placement.layer(layer).replicas(expert);
        let mut ranks: Vec<usize> = slots.iter().map(|&slot| slot as usize / per_rank).collect();
        ranks.dedup();
        ranks
    }

    fn replicas(&self, layer: usize, expert: usize) -> usize {
        self.placement.layer(layer).replicas(expert).len()
    }

    fn json(&self) -> String {
        let load = &self.load;
        let layers = 0..load.layer_ids.len();
        let counts = |phase| layers.clone().map(|l| load.experts_of(phase, l)).collect::<Vec<_>>();
        let ranks = |phase| layers.clone().map(|l| load.ranks_of(phase, l)).collect::<Vec<_>>();
        let owners: Vec<Vec<Vec<usize>>> =
            layers.clone().map(|l| (0..load.experts).map(|e| self.owners(l, e)).collect()).collect();
        let replicas: Vec<Vec<usize>> =
            layers.clone().map(|l| (0..load.experts).map(|e| self.replicas(l, e)).collect()).collect();
        json!({
            "object": "expert_load",
            "window_seconds": (self.seconds * 1e3).round() / 1e3,
            "placement_version": self.placement.version(),
            "ranks": load.ranks,
            "experts": load.experts,
            "layer_ids": load.layer_ids,
            "expert_tokens": {"prefill": counts(Phase::Prefill), "decode": counts(Phase::Decode)},
            "rank_tokens": {"prefill": ranks(Phase::Prefill), "decode": ranks(Phase::Decode)},
            "owner_ranks": owners,
            "replicas": replicas,
        })
        .to_string()
    }

    /// One line per layer and expert; owner ranks are separated by semicolons.
    fn csv(&self) -> String {
        let mut csv = String::from("layer,expert,prefill_tokens,decode_tokens,replicas,owner_ranks\n");
        for (layer, id) in self.load.layer_ids.iter().enumerate() {
            let prefill = self.load.experts_of(Phase::Prefill, layer);
            let decode = self.load.experts_of(Phase::Decode, layer);
            for expert in 0..self.load.experts {
                let owners =
                    self.owners(layer, expert).iter().map(usize::to_string).collect::<Vec<_>>().join(";");
                let (prefill, decode, replicas) =
                    (prefill[expert], decode[expert], self.replicas(layer, expert));
                writeln!(csv, "{id},{expert},{prefill},{decode},{replicas},{owners}")
                    .expect("a String takes all");
            }
        }
        csv
    }
}

/// A body with its tag.
struct Answer {
    format: Format,
    body: String,
    etag: String,
}

impl Answer {
    /// The tag is a hash (FNV-1a) of the body, so equal bodies have equal tags.
    fn new(format: Format, body: String) -> Self {
        let hash = body.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        Answer { format, body, etag: format!("\"{hash:016x}\"") }
    }

    /// 304 for a client that has this body already.
    fn respond(&self, headers: &HeaderMap) -> Response {
        let tags = headers.get_all(IF_NONE_MATCH).iter().filter_map(|value| value.to_str().ok());
        let mut tags = tags.flat_map(|list| list.split(',')).map(|tag| tag.trim().trim_start_matches("W/"));
        let caching = [(ETAG, self.etag.as_str()), (CACHE_CONTROL, "private, max-age=1")];
        if tags.any(|tag| tag == "*" || tag == self.etag) {
            return (StatusCode::NOT_MODIFIED, caching).into_response();
        }
        let mime = match self.format {
            Format::Json => "application/json",
            Format::Csv => "text/csv; charset=utf-8",
        };
        (caching, [(CONTENT_TYPE, mime)], self.body.clone()).into_response()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use router_sim::load::LoadWindow;
    use router_sim::placement::{ClusterShape, Linear, PlacementPolicy};

    /// Two layers of three experts on two ranks; expert 0 of every layer gets one more token at every look.
    struct Growing(Mutex<LoadSnapshot>);

    impl LoadSource for Growing {
        fn snapshot(&self) -> LoadSnapshot {
            let mut load = self.0.lock().unwrap();
            load.by_expert[0] += 1;
            load.by_rank[0] += 1;
            load.clone()
        }

        fn step_imbalance(&self) -> f64 {
            0.0
        }

        fn placement(&self) -> Arc<Placement> {
            let shape = ClusterShape { ranks: 2, redundant: 1 };
            Arc::new(Linear.place(&LoadWindow::new(&[1, 4], 3), &shape).unwrap())
        }
    }

    fn experts() -> ExpertLoad {
        ExpertLoad::new(Arc::new(Growing(Mutex::new(LoadSnapshot::zeros(vec![1, 4], 3, 2)))))
    }

    fn counted(experts: &ExpertLoad, window_s: u64, now: Instant) -> (f64, u64) {
        let answer = experts.answer(Asked { window_s, format: Format::Json }, now);
        let json: serde_json::Value = serde_json::from_str(&answer.body).unwrap();
        let tokens = &json["expert_tokens"]["prefill"][0][0];
        (json["window_seconds"].as_f64().unwrap().round(), tokens.as_u64().unwrap())
    }

    #[test]
    fn windows_reach_back_as_far_as_asked_and_no_more_is_kept() {
        let experts = experts();
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        // Before the window has passed once, the answer says how long it really is.
        assert_eq!(counted(&experts, 60, at(3)), (3.0, 1));
        for second in 4..=1000 {
            experts.tick(at(second));
        }
        assert_eq!(counted(&experts, 5, at(1000)).0, 5.0);
        // Twelve snapshots since second 940, and one of each answer.
        assert_eq!(counted(&experts, 60, at(1000)), (60.0, 14));
        assert_eq!(counted(&experts, 300, at(1000)).0, 300.0);
        let kept = experts.past.lock().unwrap().snapshots.len() as u64;
        assert_eq!(kept, MAX_WINDOW_S / SPACING_S + 1);
    }

    #[test]
    fn an_answer_is_given_again_while_it_is_fresh() {
        let experts = experts();
        let now = Instant::now();
        let asked = Asked { window_s: 60, format: Format::Csv };
        let first = experts.answer(asked, now);
        assert!(Arc::ptr_eq(&first, &experts.answer(asked, now + FRESH / 2)));
        let later = experts.answer(asked, now + FRESH);
        assert_ne!(first.etag, later.etag);
        for window_s in SPACING_S..SPACING_S + 50 {
            experts.answer(Asked { window_s, ..asked }, now + FRESH);
        }
        assert!(experts.past.lock().unwrap().answers.len() <= MAX_ANSWERS);
    }

    #[test]
    fn queries_are_read_and_refused_by_name() {
        let of = |query: &str| Asked::parse(query).map(|asked| (asked.window_s, asked.format));
        assert_eq!(of(""), Ok((60, Format::Json)));
        assert_eq!(of("window=5m&format=csv"), Ok((300, Format::Csv)));
        assert_eq!(of("window=7"), Ok((7, Format::Json)));
        for (query, param) in [
            ("window=", "window"),
            ("window=4s", "window"),
            ("window=301s", "window"),
            ("window=-60s", "window"),
            ("window=6m", "window"),
            ("window=99999999999999999999m", "window"),
            ("window=1e2", "window"),
            ("format=npy", "format"),
            ("format", "format"),
            ("since=3", "since"),
            ("window=60s&window=5s", "window"),
        ] {
            let error = of(query).unwrap_err();
            assert_eq!((error.status.as_u16(), error.param.as_deref()), (400, Some(param)), "{query}");
        }
        assert!(of("window=301s").unwrap_err().message.contains("5s to 300s"));
    }
}
