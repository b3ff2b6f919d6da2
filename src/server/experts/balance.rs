//! Balance of the ranks over the last minutes, second by second: a page that is opened now sees the past.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use router_sim::bounds::sampling_floor;
use serde::Serialize;

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
    layers: usize,
    ranks: usize,
    /// `[phase][layer][rank]`, as of the latest second.
    latest: Vec<u64>,
    version: u64,
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

/// See [`Point::views`]. Ratios are maximum over mean, minus 1.
#[derive(Clone, Copy)]
struct View {
    imbalance: f64,
    floor: f64,
}

/// Another placement came into force.
#[derive(Debug, Clone, Serialize)]
struct Mark {
    unix_seconds: f64,
    placement_version: u64,
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
    imbalance_ratio: ByPhase,
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
    pub fn new(now: Instant, unix_s: f64, (layers, ranks): (usize, usize), by_rank: Vec<u64>, version: u64) -> Self {
        Balance {
            began: now,
            began_unix_s: unix_s,
            layers,
            ranks,
            latest: by_rank,
            version,
            points: VecDeque::new(),
            first: 0,
            marks: VecDeque::new(),
        }
    }

    /// Another second has passed.
    pub fn tick(&mut self, now: Instant, by_rank: Vec<u64>, version: u64) {
        let unix_s = self.began_unix_s + now.saturating_duration_since(self.began).as_secs_f64();
        let unix_s = (unix_s * 10.0).round() / 10.0;
        if std::mem::replace(&mut self.version, version) != version {
            self.marks.push_back(Mark { unix_seconds: unix_s, placement_version: version });
        }
        let new: Vec<u64> = by_rank.iter().zip(&self.latest).map(|(n, t)| n.saturating_sub(*t)).collect();
        self.latest = by_rank;
        let rows = new.iter().sum();
        if rows > 0 {
            let phase = |phase: Phase| &new[phase as usize * new.len() / 2..][..new.len() / 2];
            let [prefill, decode] = Phase::ALL.map(phase);
            let both: Vec<u64> = prefill.iter().zip(decode).map(|(a, b)| a + b).collect();
            let views = [&both[..], prefill, decode].map(|counts| self.view(counts));
            self.points.push_back(Point { unix_s, rows, views });
        }
        let horizon = unix_s - KEPT.as_secs_f64();
        while self.points.front().is_some_and(|point| point.unix_s <= horizon) {
            self.points.pop_front();
            self.first += 1;
        }
        while self.marks.len() > MAX_MARKS || self.marks.front().is_some_and(|mark| mark.unix_seconds <= horizon) {
            self.marks.pop_front();
        }
    }

    /// The slowest rank of each layer decides how long the layer takes, so layers are summed after taking the maximum.
    fn view(&self, counts: &[u64]) -> View {
        let slowest: u64 = counts.chunks_exact(self.ranks).map(|ranks| ranks.iter().max().unwrap_or(&0)).sum();
        let rows: u64 = counts.iter().sum();
        if rows == 0 {
            return View { imbalance: f64::NAN, floor: f64::NAN };
        }
        View {
            imbalance: (slowest * self.ranks as u64) as f64 / rows as f64 - 1.0,
            floor: sampling_floor(rows / self.layers as u64, self.ranks),
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
            imbalance_ratio: by_phase(|view| view.imbalance),
            sampling_floor_ratio: by_phase(|view| view.floor),
            marks: &self.marks,
        };
        serde_json::to_string(&told).expect("numbers are JSON")
    }
}

/// More digits than a line on a screen shows would be noise.
fn round(ratio: f64) -> f64 {
    (ratio * 1e4).round() / 1e4
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    /// One layer on two ranks.
    fn balance(start: Instant) -> Balance {
        Balance::new(start, 1000.0, (1, 2), vec![5, 5, 5, 5], 0)
    }

    fn told(balance: &Balance, since: u64) -> Value {
        serde_json::from_str(&balance.json(since)).unwrap()
    }

    #[test]
    fn each_second_has_its_imbalance_and_idle_ones_are_left_out() {
        let start = Instant::now();
        let mut balance = balance(start);
        let at = |seconds| start + Duration::from_secs(seconds);
        balance.tick(at(1), vec![8, 6, 5, 5], 0);
        balance.tick(at(2), vec![8, 6, 5, 5], 1);
        balance.tick(at(3), vec![8, 6, 6, 8], 1);
        let all = told(&balance, 0);
        assert_eq!(all["unix_seconds"], json!([1001.0, 1003.0]));
        assert_eq!(all["rows"], json!([4, 4]));
        assert_eq!(
            all["imbalance_ratio"],
            json!({"both": [0.5, 0.5], "prefill": [0.5, null], "decode": [null, 0.5]})
        );
        assert_eq!(all["marks"], json!([{"unix_seconds": 1002.0, "placement_version": 1}]));
        let floor = all["sampling_floor_ratio"]["both"][0].as_f64().unwrap();
        assert!((floor - sampling_floor(4, 2)).abs() < 1e-4, "{floor}");
        let news = told(&balance, 1);
        assert_eq!((&news["first"], &news["next"], &news["rows"]), (&json!(1), &json!(2), &json!([4])));
        assert_eq!(told(&balance, u64::MAX)["rows"], json!([]));
    }

    #[test]
    fn ten_minutes_are_kept_and_numbers_go_on() {
        let start = Instant::now();
        let mut balance = balance(start);
        for second in 1..=1000 {
            balance.tick(start + Duration::from_secs(second), vec![5 + second, 5, 5, 5], second);
        }
        let all = told(&balance, 0);
        assert_eq!((&all["first"], &all["next"]), (&json!(400), &json!(1000)));
        assert_eq!(all["rows"].as_array().unwrap().len(), 600);
        assert_eq!(all["marks"].as_array().unwrap().len(), MAX_MARKS);
        assert!(balance.json(0).len() < 40_000, "{} bytes", balance.json(0).len());
    }
}
