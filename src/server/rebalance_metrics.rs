//! What rebalancing did, as metrics.

use std::sync::{Mutex, PoisonError};

use metrics::{Counter, Gauge, Histogram};

use super::registry::Registry;
use crate::engine::RebalanceStatus;
use crate::engine::rebalance::Mode;
use crate::metrics as family;

/// Handles of the families about rebalancing and the placement in force.
pub(super) struct RebalanceMetrics {
    applied: Counter,
    skipped: Counter,
    failed: Counter,
    duration: Histogram,
    moved_experts: Counter,
    moved_bytes: Counter,
    predicted_before: Gauge,
    predicted_after: Gauge,
    achieved: Gauge,
    sampling_floor: Gauge,
    in_progress: Gauge,
    enabled: Gauge,
    look_age: Gauge,
    version: Gauge,
    age: Gauge,
    /// Migrations whose duration is in the histogram. A std lock: held for a comparison.
    timed: Mutex<u64>,
}

impl RebalanceMetrics {
    pub(super) fn new(registry: &Registry) -> Self {
        let outcome = |outcome| registry.counter(&family::REBALANCES_TOTAL, &[outcome]);
        let predicted = |when| registry.gauge(&family::REBALANCE_PREDICTED_IMBALANCE_RATIO, &[when]);
        let metrics = RebalanceMetrics {
            applied: outcome("applied"),
            skipped: outcome("skipped"),
            failed: outcome("failed"),
            duration: registry.histogram(&family::REBALANCE_DURATION_SECONDS, &[]),
            moved_experts: registry.counter(&family::REBALANCE_MOVED_EXPERTS_TOTAL, &[]),
            moved_bytes: registry.counter(&family::REBALANCE_MOVED_BYTES_TOTAL, &[]),
            predicted_before: predicted("before"),
            predicted_after: predicted("after"),
            achieved: registry.gauge(&family::REBALANCE_ACHIEVED_IMBALANCE_RATIO, &[]),
            sampling_floor: registry.gauge(&family::REBALANCE_SAMPLING_FLOOR_RATIO, &[]),
            in_progress: registry.gauge(&family::REBALANCE_IN_PROGRESS, &[]),
            enabled: registry.gauge(&family::REBALANCER_ENABLED, &[]),
            look_age: registry.gauge(&family::REBALANCER_LOOK_AGE_SECONDS, &[]),
            version: registry.gauge(&family::PLACEMENT_VERSION, &[]),
            age: registry.gauge(&family::PLACEMENT_AGE_SECONDS, &[]),
            timed: Mutex::new(0),
        };
        metrics.update(&RebalanceStatus::default());
        metrics
    }

    /// Takes over the status as it is now; called at least once a second.
    pub(super) fn update(&self, status: &RebalanceStatus) {
        for (counter, count) in [
            (&self.applied, status.applied),
            (&self.skipped, status.skipped),
            (&self.failed, status.failed),
            (&self.moved_experts, status.moved_experts),
            (&self.moved_bytes, status.moved_bytes),
        ] {
            counter.absolute(count);
        }
        self.time(status);
        if let Some(last) = &status.last_applied {
            self.predicted_before.set(imbalance(last.balance_before));
            self.predicted_after.set(imbalance(last.balance_after));
        }
        if let Some(last) = &status.last {
            self.sampling_floor.set(last.sampling_floor);
        }
        self.achieved.set(status.achieved.map_or(0.0, imbalance));
        self.in_progress.set(f64::from(u8::from(status.migration.is_some())));
        self.enabled.set(f64::from(u8::from(status.mode != Mode::Off)));
        self.look_age.set(status.since_look.map_or(0.0, |age| age.as_secs_f64()));
        self.version.set(status.placement_version as f64);
        self.age.set(status.placement_age.as_secs_f64());
    }

    /// Of several migrations that ended since the last call, which only tiny ones do, the last one's time stands for all.
    fn time(&self, status: &RebalanceStatus) {
        let mut timed = self.timed.lock().unwrap_or_else(PoisonError::into_inner);
        let ended = status.applied + status.failed;
        if let Some(duration) = status.last_duration {
            (*timed..ended).for_each(|_| self.duration.record(duration));
        }
        *timed = ended.max(*timed);
    }
}

/// From balancedness (mean over maximum).
fn imbalance(balancedness: f64) -> f64 {
    if balancedness > 0.0 { 1.0 / balancedness - 1.0 } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::rebalance::LastDecision;
    use std::time::Duration;

    fn value(registry: &Registry, series: &str) -> f64 {
        let page = registry.render();
        let line = page.lines().find(|line| line.rsplit_once(' ').is_some_and(|(name, _)| name == series));
        line.unwrap_or_else(|| panic!("{series} is not in\n{page}"))
            .rsplit_once(' ')
            .unwrap()
            .1
            .parse()
            .unwrap()
    }

    #[test]
    fn every_series_is_there_from_the_start() {
        let registry = Registry::new().unwrap();
        RebalanceMetrics::new(&registry);
        for series in [
            r#"moeyard_rebalances_total{outcome="failed"}"#,
            r#"moeyard_rebalance_duration_seconds_bucket{le="+Inf"}"#,
            r#"moeyard_rebalance_predicted_imbalance_ratio{when="after"}"#,
            "moeyard_rebalancer_enabled",
            "moeyard_placement_version",
        ] {
            assert_eq!(value(&registry, series), 0.0, "{series}");
        }
    }

    #[test]
    fn a_status_becomes_series_and_each_duration_counts_once() {
        let registry = Registry::new().unwrap();
        let metrics = RebalanceMetrics::new(&registry);
        let last = LastDecision {
            step: 640,
            age: Duration::ZERO,
            trigger: "auto".into(),
            reason: "pays".into(),
            applied: true,
            balance_before: 0.5,
            balance_after: 0.8,
            balance_bound: 0.9,
            sampling_floor: 0.04,
            gain_us_per_step: 1.0,
            moves: 3,
            bytes: 30,
        };
        let status = RebalanceStatus {
            mode: Mode::Auto,
            applied: 2,
            skipped: 5,
            moved_experts: 3,
            moved_bytes: 30,
            placement_version: 4,
            placement_age: Duration::from_secs(9),
            last_duration: Some(Duration::from_millis(300)),
            last: Some(last.clone()),
            last_applied: Some(last),
            achieved: Some(0.625),
            since_look: Some(Duration::from_secs(7)),
            ..RebalanceStatus::default()
        };
        metrics.update(&status);
        metrics.update(&status);
        for (series, expected) in [
            (r#"moeyard_rebalances_total{outcome="applied"}"#, 2.0),
            (r#"moeyard_rebalances_total{outcome="skipped"}"#, 5.0),
            ("moeyard_rebalance_duration_seconds_count", 2.0),
            (r#"moeyard_rebalance_duration_seconds_bucket{le="0.5"}"#, 2.0),
            ("moeyard_rebalance_moved_experts_total", 3.0),
            ("moeyard_rebalance_moved_bytes_total", 30.0),
            (r#"moeyard_rebalance_predicted_imbalance_ratio{when="before"}"#, 1.0),
            (r#"moeyard_rebalance_predicted_imbalance_ratio{when="after"}"#, 0.25),
            ("moeyard_rebalance_achieved_imbalance_ratio", 0.6),
            ("moeyard_rebalance_sampling_floor_ratio", 0.04),
            ("moeyard_rebalance_in_progress", 0.0),
            ("moeyard_rebalancer_enabled", 1.0),
            ("moeyard_rebalancer_look_age_seconds", 7.0),
            ("moeyard_placement_version", 4.0),
            ("moeyard_placement_age_seconds", 9.0),
        ] {
            assert!((value(&registry, series) - expected).abs() < 1e-9, "{series}");
        }
    }
}
