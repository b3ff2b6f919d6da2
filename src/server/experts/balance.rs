//! Balance of the ranks over the last minutes, second by second: a page that is opened now sees the past.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use router_sim::bounds::sampling_floor;
use router_sim::load::balancedness;
use serde::Serialize;

use crate::engine::RebalanceStatus;
use crate::metrics::Phase;

/// Seconds that are kept, with marks.
const KEPT: Duration = Duration::from_secs(600);
/// Marks that are kept, however close.
const MAX_MARKS: usize = 100;

/// The last [`KEPT`] of a world.
pub(super) struct Balance {
    began: Instant,
    /// Unix time of `began`: later times are counted from it, so a clock that is set does not bend the line.
    began_unix_s: f64,
    ranks: usize,
    /// `[phase][layer][rank]`, as of the latest second.
    latest: Vec<u64>,
    version: u64,
    /// A migration was under way a second ago.
    migrating: bool,
    /// It has its mark.
    marked: bool,
    /// Step of the decision that a mark tells of.
    foretold: Option<u64>,
    /// Oldest first; seconds without tokens are left out.
    points: VecDeque<Point>,
    /// Number of the first of them, counted since the start.
    first: u64,
    marks: VecDeque<Mark>,
}

/// One second.
struct Point {
    unix_s: f64,
    rows: u64,
    /// Both phases, prefill, decode.
    views: [View; 3],
}

/// See [`Point::views`]; not a number without tokens.
#[derive(Clone, Copy)]
struct View {
    /// Mean over layers.
    balancedness: f64,
    /// Imbalance ratio that chance leaves with as many tokens.
    floor: f64,
}

/// Another placement came into force; a migration that ends in several steps is one mark.
#[derive(Debug, Clone, Serialize)]
struct Mark {
    unix_seconds: f64,
    placement_version: u64,
    /// Balancedness, where the rebalancer made the placement.
    predicted: Option<f64>,
    /// Balancedness that it then had, once that is known.
    achieved: Option<f64>,
}

/// What is told.
#[derive(Serialize)]
struct Told<'a> {
    object: &'static str,
    /// Number of the first second, and what to ask for next.
    first: u64,
    next: u64,
    unix_seconds: Vec<f64>,
    /// Expert rows of each second, over all layers.
    rows: Vec<u64>,
    balancedness: ByPhase,
    sampling_floor_ratio: ByPhase,
    marks: &'a VecDeque<Mark>,
}

/// Nothing where a second had no token of the phase.
#[derive(Serialize)]
struct ByPhase {
    both: Vec<Option<f64>>,
    prefill: Vec<Option<f64>>,
    decode: Vec<Option<f64>>,
}

impl Balance {
    /// Begins with the counts as they are.
    pub fn new(now: Instant, unix_s: f64, ranks: usize, by_rank: Vec<u64>, version: u64) -> Self {
        Balance {
            began: now,
            began_unix_s: unix_s,
            ranks,
            latest: by_rank,
            version,
            migrating: false,
            marked: false,
            foretold: None,
            points: VecDeque::new(),
            first: 0,
            marks: VecDeque::new(),
        }
    }

    /// Another second has passed; `version` is the placement's that is in force.
    pub fn tick(&mut self, now: Instant, by_rank: Vec<u64>, version: u64, rebalancing: &RebalanceStatus) {
        let unix_s = self.began_unix_s + now.saturating_duration_since(self.began).as_secs_f64();
        let unix_s = (unix_s * 10.0).round() / 10.0;
        self.mark(unix_s, version, rebalancing);
        let new: Vec<u64> = by_rank.iter().zip(&self.latest).map(|(n, t)| n.saturating_sub(*t)).collect();
        self.latest = by_rank;
        let rows = new.iter().sum();
        if rows > 0 {
            let phase = |phase: Phase| &new[phase as usize * new.len() / 2..][..new.len() / 2];
            let [prefill, decode] = Phase::ALL.map(phase);
            let both: Vec<u64> = prefill.iter().zip(decode).map(|(a, b)| a + b).collect();
            let views = [&both[..], prefill, decode].map(|counts| View::of(counts, self.ranks));
            self.points.push_back(Point { unix_s, rows, views });
        }
        let horizon = unix_s - KEPT.as_secs_f64();
        while self.points.front().is_some_and(|point| point.unix_s <= horizon) {
            self.points.pop_front();
            self.first += 1;
        }
        let old = |mark: &Mark| mark.unix_seconds <= horizon;
        while self.marks.len() > MAX_MARKS || self.marks.front().is_some_and(old) {
            self.marks.pop_front();
        }
    }

    fn mark(&mut self, unix_s: f64, version: u64, rebalancing: &RebalanceStatus) {
        let changed = std::mem::replace(&mut self.version, version) != version;
        let goes_on = std::mem::replace(&mut self.migrating, rebalancing.migration.is_some());
        if changed {
            // Of a migration that goes on, the last version stands for all.
            let earlier = if goes_on && self.marked { self.marks.pop_back() } else { None };
            let applied = rebalancing.last.as_ref().filter(|last| last.applied);
            let news = applied.filter(|last| self.foretold.replace(last.step) != Some(last.step));
            let predicted = match earlier {
                Some(mark) => mark.predicted,
                None => news.map(|last| round(last.balance_after)),
            };
            let mark = Mark { unix_seconds: unix_s, placement_version: version, predicted, achieved: None };
            self.marks.push_back(mark);
        }
        self.marked = self.migrating && (changed || (goes_on && self.marked));
        let latest = self.marks.back_mut().filter(|mark| mark.placement_version == version);
        if let Some(mark) = latest.filter(|mark| mark.predicted.is_some()) {
            mark.achieved = rebalancing.achieved.map(round);
        }
    }

    /// The seconds from number `since` on, as JSON.
    pub fn json(&self, since: u64) -> String {
        let skip = since.saturating_sub(self.first).min(self.points.len() as u64);
        let points = || self.points.iter().skip(skip as usize);
        let column = |of: fn(&View) -> f64, view: usize| {
            points().map(|point| Some(round(of(&point.views[view]))).filter(|x| x.is_finite())).collect()
        };
        let by_phase = |of| ByPhase { both: column(of, 0), prefill: column(of, 1), decode: column(of, 2) };
        let told = Told {
            object: "expert_balance",
            first: self.first + skip,
            next: self.first + self.points.len() as u64,
            unix_seconds: points().map(|point| point.unix_s).collect(),
            rows: points().map(|point| point.rows).collect(),
            balancedness: by_phase(|view| view.balancedness),
            sampling_floor_ratio: by_phase(|view| view.floor),
            marks: &self.marks,
        };
        serde_json::to_string(&told).expect("numbers are JSON")
    }
}

impl View {
    /// `counts` `[layer][rank]`; every layer has the same number of tokens.
    fn of(counts: &[u64], ranks: usize) -> View {
        let rows: u64 = counts.iter().sum();
        if rows == 0 {
            return View { balancedness: f64::NAN, floor: f64::NAN };
        }
        let layers = counts.len() / ranks;
        let balancedness = counts.chunks_exact(ranks).map(balancedness).sum::<f64>() / layers as f64;
        View { balancedness, floor: sampling_floor(rows / layers as u64, ranks) }
    }
}

/// More digits than a line on a screen shows would be noise.
fn round(ratio: f64) -> f64 {
    (ratio * 1e4).round() / 1e4
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::rebalance::{LastDecision, MigrationProgress};
    use serde_json::{Value, json};

    /// One layer on two ranks.
    fn balance(start: Instant) -> Balance {
        Balance::new(start, 1000.0, 2, vec![5, 5, 5, 5], 0)
    }

    fn told(balance: &Balance, since: u64) -> Value {
        serde_json::from_str(&balance.json(since)).unwrap()
    }

    #[test]
    fn each_second_has_its_balance_and_idle_ones_are_left_out() {
        let start = Instant::now();
        let mut balance = balance(start);
        let nothing = RebalanceStatus::default();
        let mut tick = |second, counts: [u64; 4], version| {
            balance.tick(start + Duration::from_secs(second), counts.to_vec(), version, &nothing);
        };
        tick(1, [8, 6, 5, 5], 0);
        tick(2, [8, 6, 5, 5], 1);
        tick(3, [8, 6, 6, 9], 1);
        let all = told(&balance, 0);
        assert_eq!(all["unix_seconds"], json!([1001.0, 1003.0]));
        assert_eq!(all["rows"], json!([4, 5]));
        let expected = json!({"both": [0.6667, 0.625], "prefill": [0.6667, null], "decode": [null, 0.625]});
        assert_eq!(all["balancedness"], expected);
        let mark =
            json!({"unix_seconds": 1002.0, "placement_version": 1, "predicted": null, "achieved": null});
        assert_eq!(all["marks"], json!([mark]));
        let floor = all["sampling_floor_ratio"]["both"][0].as_f64().unwrap();
        assert!((floor - sampling_floor(4, 2)).abs() < 1e-4, "{floor}");
        let news = told(&balance, 1);
        assert_eq!((&news["first"], &news["next"], &news["rows"]), (&json!(1), &json!(2), &json!([5])));
        assert_eq!(told(&balance, u64::MAX)["rows"], json!([]));
    }

    #[test]
    fn a_migration_of_many_versions_is_one_mark_with_what_was_foreseen_and_what_came() {
        let start = Instant::now();
        let mut balance = balance(start);
        let counts = || vec![5; 4];
        let last = LastDecision {
            step: 1,
            age: Duration::ZERO,
            trigger: "auto".into(),
            reason: String::new(),
            applied: true,
            balance_before: 0.5,
            balance_after: 0.91,
            balance_bound: 1.0,
            sampling_floor: 0.0,
            gain_us_per_step: 1.0,
            moves: 2,
            bytes: 2,
        };
        let progress = MigrationProgress { arrivals: 2, total_bytes: 2, ..MigrationProgress::default() };
        let moving =
            RebalanceStatus { last: Some(last), migration: Some(progress), ..RebalanceStatus::default() };
        let moved = RebalanceStatus { migration: None, achieved: Some(0.88), ..moving.clone() };
        let at = |second| start + Duration::from_secs(second);
        for (second, version, status) in [(1, 0, &moving), (2, 1, &moving), (3, 2, &moving), (4, 3, &moved)] {
            balance.tick(at(second), counts(), version, status);
        }
        let one =
            json!([{"unix_seconds": 1004.0, "placement_version": 3, "predicted": 0.91, "achieved": 0.88}]);
        assert_eq!(told(&balance, 0)["marks"], one);
        // The next change is another, and nobody foretold it.
        balance.tick(at(5), counts(), 4, &moved);
        let marks = told(&balance, 0)["marks"].clone();
        assert_eq!(marks[0], one[0]);
        let second =
            json!({"unix_seconds": 1005.0, "placement_version": 4, "predicted": null, "achieved": null});
        assert_eq!(marks[1], second);
    }

    #[test]
    fn ten_minutes_are_kept_and_numbers_go_on() {
        let start = Instant::now();
        let mut balance = balance(start);
        for second in 1..=1000 {
            let now = start + Duration::from_secs(second);
            balance.tick(now, vec![5 + second, 5, 5, 5], second, &RebalanceStatus::default());
        }
        let all = told(&balance, 0);
        assert_eq!((&all["first"], &all["next"]), (&json!(400), &json!(1000)));
        assert_eq!(all["rows"].as_array().unwrap().len(), 600);
        assert_eq!(all["marks"].as_array().unwrap().len(), MAX_MARKS);
        assert!(balance.json(0).len() < 40_000, "{} bytes", balance.json(0).len());
    }
}
