//! Expert load over HTTP: `GET /v1/experts` tells what every expert of every layer was given over a window of the past,
//! `GET /v1/experts/balance` how evenly the ranks were loaded each second, `GET /v1/experts/placement` where the experts
//! live, `GET /v1/experts/rebalance` what moves them. A heat map needs no time series per expert for it.

mod query;
mod answer;
mod report;
mod balance;
mod status;
mod forecast;
pub(super) mod control;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::{RawQuery, State};
use axum::response::Response;
use http::{HeaderMap, HeaderName};

use self::answer::Answer;
use self::balance::Balance;
use self::query::{Asked, Format, clip, pairs};
use self::report::Report;
use super::error::ApiError;
use super::state::AppState;
use crate::engine::RebalanceStatus;
use crate::metrics::{LoadSnapshot, LoadSource};

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
/// The number of the placement in an answer whose body, a placement file, has none.
const PLACEMENT_VERSION: HeaderName = HeaderName::from_static("x-placement-version");

/// `GET /v1/experts?window=60s&format=json|csv&phase=both|prefill|decode&owners=true|false`.
pub(super) async fn load(
    State(state): State<Arc<AppState>>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let asked = Asked::parse(query.as_deref().unwrap_or_default())?;
    Ok(experts(&state)?.answer(asked, Instant::now()).respond(&headers))
}

/// `GET /v1/experts/balance?since=N`: the seconds from number N on.
pub(super) async fn balance(
    State(state): State<Arc<AppState>>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let since = since(query.as_deref().unwrap_or_default())?;
    let body = locked(&experts(&state)?.balance).json(since);
    Ok(Answer::new(Format::Json, body).respond(&headers))
}

/// `GET /v1/experts/placement`: a placement file, as `--placement` and router-sim read it.
pub(super) async fn placement(
    State(state): State<Arc<AppState>>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let placement = experts(&state)?.source.placement();
    let answer = Answer::new(Format::Json, placement.to_json());
    Ok(answer.with(PLACEMENT_VERSION, placement.version()).respond(&headers))
}

/// `GET /v1/experts/rebalance`: what the rebalancer did, does, and why.
pub(super) async fn rebalancer(State(state): State<Arc<AppState>>, headers: HeaderMap) -> Response {
    status::answer(&state.engine.rebalance_status()).respond(&headers)
}

fn experts(state: &AppState) -> Result<&ExpertLoad, ApiError> {
    let missing = || ApiError::unavailable("The engine does not tell where its experts live.");
    state.experts.as_ref().ok_or_else(missing)
}

/// What every reader of JSON takes for an integer.
pub(super) const MAX_SINCE: u64 = (1 << 53) - 1;

fn since(query: &str) -> Result<u64, ApiError> {
    let mut since = None;
    for (key, value) in pairs(query) {
        if key != "since" || since.is_some() {
            let why = format!("The only parameter is since, once; got \"{}\".", clip(key));
            return Err(ApiError::bad_param(clip(key), why));
        }
        let number = value.parse().ok().filter(|number| *number <= MAX_SINCE);
        since = Some(number.ok_or_else(|| {
            let why = format!(
                "since is \"{}\", but must be a number of a second up to {MAX_SINCE}, such as \"next\" of the last answer.",
                clip(value)
            );
            ApiError::bad_param("since", why)
        })?);
    }
    Ok(since.unwrap_or(0))
}

/// The expert load of the last minutes.
pub(super) struct ExpertLoad {
    source: Arc<dyn LoadSource>,
    /// Of one token on its way to an expert; 0 where it is not known.
    row_bytes: usize,
    /// A std lock: held while an answer is made, never across an await.
    past: Mutex<Past>,
    /// As `past`.
    balance: Mutex<Balance>,
}

struct Past {
    /// Oldest first, [`SPACING_S`] apart.
    snapshots: VecDeque<(Instant, LoadSnapshot)>,
    /// Latest first.
    answers: VecDeque<(Instant, Asked, Arc<Answer>)>,
}

impl ExpertLoad {
    /// Begins now, at `unix_s` by the system's clock.
    pub(super) fn new(source: Arc<dyn LoadSource>, row_bytes: usize, unix_s: f64) -> Self {
        let (now, load) = (Instant::now(), source.snapshot());
        let version = source.placement().version();
        let balance = Balance::new(now, unix_s, load.ranks, load.by_rank.clone(), version);
        let past = Past { snapshots: [(now, load)].into(), answers: VecDeque::new() };
        ExpertLoad { source, row_bytes, past: Mutex::new(past), balance: Mutex::new(balance) }
    }

    /// Notes the balance of the last second, and takes a snapshot when one is due; called about once a second.
    pub(super) fn tick(&self, now: Instant, rebalancing: &RebalanceStatus) {
        let version = self.source.placement().version();
        locked(&self.balance).tick(now, self.source.by_rank(), version, rebalancing);
        let mut past = locked(&self.past);
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

    /// Load of the latest `window_s` seconds.
    fn recent(&self, window_s: u64, now: Instant) -> LoadSnapshot {
        let past = locked(&self.past);
        let (_, then) = past.before(window_s, now);
        self.source.snapshot().since(then)
    }

    /// The answer as of `now`, or one that is still fresh.
    fn answer(&self, asked: Asked, now: Instant) -> Arc<Answer> {
        let mut past = locked(&self.past);
        past.answers.retain(|(made, ..)| now.saturating_duration_since(*made) < FRESH);
        if let Some((.., answer)) = past.answers.iter().find(|(_, known, _)| *known == asked) {
            return Arc::clone(answer);
        }
        let (began, then) = past.before(asked.window_s, now);
        let report = Report {
            seconds: now.saturating_duration_since(*began).as_secs_f64(),
            load: self.source.snapshot().since(then),
            row_bytes: self.row_bytes,
            placement: self.source.placement(),
        };
        let answer = Arc::new(report.answer(asked));
        past.answers.truncate(MAX_ANSWERS - 1);
        past.answers.push_front((now, asked, Arc::clone(&answer)));
        answer
    }
}

impl Past {
    /// The latest snapshot that is old enough for a window; a server that has not run for so long has its first.
    fn before(&self, window_s: u64, now: Instant) -> &(Instant, LoadSnapshot) {
        let window = Duration::from_secs(window_s);
        let old_enough =
            |(taken, _): &&(Instant, LoadSnapshot)| now.saturating_duration_since(*taken) >= window;
        let found = self.snapshots.iter().rev().find(old_enough);
        found.unwrap_or_else(|| self.snapshots.front().expect("there is always one"))
    }
}

/// Locks plain data; a panic of another holder leaves it as valid as before.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use router_sim::load::LoadWindow;
    use router_sim::placement::{ClusterShape, Linear, Placement, PlacementPolicy};

    /// Two layers of three experts on two ranks; expert 0 of every layer gets one more token at every look.
    struct Growing(Mutex<LoadSnapshot>);

    impl LoadSource for Growing {
        fn snapshot(&self) -> LoadSnapshot {
            let mut load = self.0.lock().unwrap();
            load.by_expert[0] += 1;
            load.by_rank[0] += 1;
            load.clone()
        }

        fn by_rank(&self) -> Vec<u64> {
            self.0.lock().unwrap().by_rank.clone()
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
        ExpertLoad::new(Arc::new(Growing(Mutex::new(LoadSnapshot::zeros(vec![1, 4], 3, 2)))), 0, 0.0)
    }

    fn counted(experts: &ExpertLoad, window_s: u64, now: Instant) -> (f64, u64) {
        let answer = experts.answer(Asked { window_s, ..Asked::default() }, now);
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
            experts.tick(at(second), &RebalanceStatus::default());
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
        let asked = Asked { format: Format::Csv, ..Asked::default() };
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
    fn the_tag_of_a_load_is_that_of_its_counts() {
        let still = LoadSnapshot::zeros(vec![1, 4], 3, 2);
        let report = |seconds, tokens| {
            let mut load = still.clone();
            load.by_expert[0] = tokens;
            let placement = Growing(Mutex::new(still.clone())).placement();
            Report { seconds, load, row_bytes: 128, placement }.answer(Asked::default())
        };
        assert_eq!(report(5.0, 7).etag, report(5.25, 7).etag);
        assert_ne!(report(5.0, 7).etag, report(5.0, 8).etag);
        assert!(report(5.25, 7).body.starts_with(r#"{"object":"expert_load","window_seconds":5.25,"#));
    }

    #[test]
    fn seconds_are_asked_for_by_number() {
        assert_eq!((since("").unwrap(), since("since=42").unwrap()), (0, 42));
        for (query, param) in
            [("since=-1", "since"), ("since=", "since"), ("to=3", "to"), ("since=1&since=2", "since")]
        {
            assert_eq!(since(query).unwrap_err().param.as_deref(), Some(param), "{query}");
        }
    }
}
