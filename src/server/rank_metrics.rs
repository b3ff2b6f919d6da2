//! What each rank's time goes into, as metrics.

use std::sync::Arc;

use metrics::{Counter, Gauge};

use super::registry::Registry;
use crate::metrics::{self as family, CommOp, RankMeter, StepKind, Work};

/// Handles of the families that are kept by rank.
pub(super) struct RankMetrics {
    ranks: Vec<RankHandles>,
}

struct RankHandles {
    /// As the label says it.
    rank: String,
    up: Gauge,
    heartbeat_age: Gauge,
    /// `[op]`: sent, received.
    bytes: [(Counter, Counter); CommOp::ALL.len()],
    /// By [`StepKind`].
    steps: [Counter; StepKind::ALL.len()],
}

impl RankMetrics {
    pub(super) fn new(registry: &Registry, ranks: usize) -> Self {
        let handles = |rank: usize| {
            let rank = rank.to_string();
            let bytes = CommOp::ALL.map(|op| {
                let counter =
                    |dir| registry.counter(&family::COMM_BYTES_TOTAL, &[rank.as_str(), op.label(), dir]);
                (counter("sent"), counter("received"))
            });
            let steps = StepKind::ALL
                .map(|kind| registry.counter(&family::GRAPH_STEPS_TOTAL, &[rank.as_str(), kind.label()]));
            RankHandles {
                steps,
                up: registry.gauge(&family::RANK_UP, &[&rank]),
                heartbeat_age: registry.gauge(&family::RANK_HEARTBEAT_AGE_SECONDS, &[&rank]),
                bytes,
                rank,
            }
        };
        RankMetrics { ranks: (0..ranks).map(handles).collect() }
    }

    /// Takes over what the ranks have written so far.
    pub(super) fn update(&self, registry: &Registry, meters: &[Arc<RankMeter>]) {
        for (handles, meter) in self.ranks.iter().zip(meters) {
            handles.up.set(f64::from(u8::from(meter.is_up())));
            handles.heartbeat_age.set(meter.heartbeat_age().as_secs_f64());
            for (op, (sent, received)) in CommOp::ALL.into_iter().zip(&handles.bytes) {
                sent.absolute(meter.sent_bytes(op));
                received.absolute(meter.received_bytes(op));
            }
            for (kind, steps) in StepKind::ALL.into_iter().zip(&handles.steps) {
                steps.absolute(meter.steps(kind));
            }
            for work in Work::ALL {
                let labels = [handles.rank.as_str(), work.label()];
                registry.set_seconds(&family::PHASE_SECONDS_TOTAL, &labels, meter.spent(work).as_secs_f64());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn every_rank_has_its_own_series() {
        let registry = Registry::new().unwrap();
        let meters: Vec<Arc<RankMeter>> = (0..2).map(|_| Arc::default()).collect();
        let metrics = RankMetrics::new(&registry, 2);
        meters[1].exchange(CommOp::Combine, 7, 9);
        meters[1].spend(Work::Expert, Duration::from_millis(1500));
        meters[0].set_steps(StepKind::Replayed, 5);
        metrics.update(&registry, &meters);
        metrics.update(&registry, &meters);
        let page = registry.render();
        for line in [
            r#"moeyard_rank_up{rank="0"} 0"#,
            r#"moeyard_rank_heartbeat_age_seconds{rank="1"} 0"#,
            r#"moeyard_comm_bytes_total{rank="1",op="combine",dir="received"} 9"#,
            r#"moeyard_comm_bytes_total{rank="0",op="migrate",dir="sent"} 0"#,
            r#"moeyard_phase_seconds_total{rank="1",phase="expert"} 1.5"#,
            r#"moeyard_phase_seconds_total{rank="0",phase="wait"} 0"#,
            r#"moeyard_graph_steps_total{rank="0",how="replayed"} 5"#,
            r#"moeyard_graph_steps_total{rank="1",how="captured"} 0"#,
            "# TYPE moeyard_phase_seconds_total counter",
        ] {
            assert_eq!(page.lines().filter(|l| *l == line).count(), 1, "{line} in\n{page}");
        }
    }
}
