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
/// What came of a placement is judged on the load of so many seconds after it.
const JUDGED_S: f64 = 60.0;
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
    /// Step of the rebalancer's decision that a mark tells of.
    decided: Option<u64>,
    /// What an operator's placement of this version is to bring.
    foretold: Option<(u64, f64)>,
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
    /// Balancedness that was expected, where anybody expected something.
    predicted: Option<f64>,
    /// Balancedness of the load that came since, of the first minute at most.
    achieved: Option<f64>,
    /// `[phase][layer][rank]`, as it came into force.
    #[serde(skip)]
    before: Vec<u64>,
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
            decided: None,
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
        self.judge(unix_s);
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

    /// An operator's placement will come into force as this version, with this balancedness if all goes well.
    pub fn foretell(&mut self, version: u64, balancedness: Option<f64>) {
        self.foretold = balancedness.map(|balancedness| (version, balancedness));
    }

    fn mark(&mut self, unix_s: f64, version: u64, rebalancing: &RebalanceStatus) {
        let changed = std::mem::replace(&mut self.version, version) != version;
        let goes_on = std::mem::replace(&mut self.migrating, rebalancing.migration.is_some());
        if changed {
            // Of a migration that goes on, the last version stands for all.
            let earlier = if goes_on && self.marked { self.marks.pop_back() } else { None };
            let news = rebalancing.last_applied.as_ref();
            let news = news.filter(|last| self.decided.replace(last.step) != Some(last.step));
            let asked = self.foretold.filter(|(foretold, _)| *foretold == version).map(|(_, after)| after);
            let predicted = asked.or(earlier.and_then(|mark| mark.predicted));
            let predicted = predicted.or(news.map(|last| round(last.balance_after)));
            self.marks.push_back(Mark {
                unix_seconds: unix_s,
                placement_version: version,
                predicted,
                achieved: None,
                before: self.latest.clone(),
            });
        }
        self.marked = self.migrating && (changed || (goes_on && self.marked));
    }

    /// What came of the placement in force so far.
    fn judge(&mut self, unix_s: f64) {
        let Some(mark) = self.marks.back_mut().filter(|mark| unix_s - mark.unix_seconds <= JUDGED_S) else {
            return;
        };
        let half = self.latest.len() / 2;
        let since = |i: usize| self.latest[i].saturating_sub(mark.before[i]);
        let counts: Vec<u64> = (0..half).map(|i| since(i) + since(half + i)).collect();
        let balancedness = View::of(&counts, self.ranks).balancedness;
        mark.achieved = Some(round(balancedness)).filter(|x| x.is_finite());
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
            json!({"unix_seconds": 1002.0, "placement_version": 1, "predicted": null, "achieved": 0.625});
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
        let progress = MigrationProgress { arrived: 0, arrivals: 2, bytes: 0, total_bytes: 2 };
        let moving = RebalanceStatus {
            last_applied: Some(last),
            migration: Some(progress),
            ..RebalanceStatus::default()
        };
        let moved = RebalanceStatus { migration: None, ..moving.clone() };
        let mut second = 0;
        let mut tick = |balance: &mut Balance, version, status: &RebalanceStatus| {
            second += 1;
            let now = start + Duration::from_secs(second);
            // Four tokens to three, second by second.
            balance.tick(now, vec![5 + 4 * second, 5 + 3 * second, 5, 5], version, status);
        };
        for (version, status) in [(0, &moving), (1, &moving), (2, &moving), (3, &moved)] {
            tick(&mut balance, version, status);
        }
        tick(&mut balance, 3, &moved);
        let one =
            json!({"unix_seconds": 1004.0, "placement_version": 3, "predicted": 0.91, "achieved": 0.875});
        assert_eq!(told(&balance, 0)["marks"], json!([one]));
        // The next changes are others: nobody foretold the first, an operator the second.
        tick(&mut balance, 4, &moved);
        balance.foretell(6, Some(0.95));
        tick(&mut balance, 6, &moved);
        let marks = told(&balance, 0)["marks"].clone();
        assert_eq!((&marks[0], marks.as_array().unwrap().len()), (&one, 3));
        assert_eq!((&marks[1]["predicted"], &marks[1]["achieved"]), (&Value::Null, &json!(0.875)));
        assert_eq!((&marks[2]["predicted"], &marks[2]["placement_version"]), (&json!(0.95), &json!(6)));
        // After a minute the judgement stands.
        for _ in 0..100 {
            tick(&mut balance, 6, &moved);
        }
        let judged = told(&balance, 0)["marks"][2]["achieved"].clone();
        tick(&mut balance, 6, &moved);
        assert_eq!(told(&balance, 0)["marks"][2]["achieved"], judged);
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
