//! What rebalancing did, does, and why, as JSON: `GET /v1/experts/rebalance`.

use serde::Serialize;

use super::answer::Answer;
use super::query::Format;
use crate::engine::RebalanceStatus;
use crate::engine::rebalance::{LastDecision, MigrationProgress};

/// What passes with time alone, and so is left out of the tag.
#[derive(Serialize)]
struct Ages {
    /// Of the placement in force.
    placement: f64,
    /// Since the load was last looked at.
    look: Option<f64>,
    decision: Option<f64>,
    last_applied: Option<f64>,
}

#[derive(Serialize)]
struct Body<'a> {
    mode: String,
    policy: &'a str,
    window_steps: u64,
    placement_version: u64,
    rebalances: Rebalances,
    moved_experts: u64,
    moved_bytes: u64,
    last_duration_seconds: Option<f64>,
    migration: Option<Migration>,
    decision: Option<Decision<'a>>,
    /// The latest decision that moved experts; it may be the same.
    last_applied: Option<Decision<'a>>,
    achieved_balancedness: Option<f64>,
}

#[derive(Serialize)]
struct Rebalances {
    applied: u64,
    skipped: u64,
    failed: u64,
}

#[derive(Serialize)]
struct Migration {
    arrived: u64,
    arrivals: u64,
    bytes: u64,
    total_bytes: u64,
}

#[derive(Serialize)]
struct Decision<'a> {
    step: u64,
    trigger: &'a str,
    reason: &'a str,
    applied: bool,
    balancedness: Foreseen,
    sampling_floor_ratio: f64,
    gain_us_per_step: f64,
    moves: u64,
    bytes: u64,
}

#[derive(Serialize)]
struct Foreseen {
    before: f64,
    after: f64,
    /// The best that any placement with as many slots allows.
    bound: f64,
}

impl From<MigrationProgress> for Migration {
    fn from(progress: MigrationProgress) -> Self {
        let MigrationProgress { arrived, arrivals, bytes, total_bytes } = progress;
        Migration { arrived, arrivals, bytes, total_bytes }
    }
}

impl<'a> From<&'a LastDecision> for Decision<'a> {
    fn from(last: &'a LastDecision) -> Self {
        Decision {
            step: last.step,
            trigger: &last.trigger,
            reason: &last.reason,
            applied: last.applied,
            balancedness: Foreseen {
                before: round(last.balance_before),
                after: round(last.balance_after),
                bound: round(last.balance_bound),
            },
            sampling_floor_ratio: round(last.sampling_floor),
            gain_us_per_step: round(last.gain_us_per_step),
            moves: last.moves,
            bytes: last.bytes,
        }
    }
}

/// The answer.
pub(super) fn answer(status: &RebalanceStatus) -> Answer {
    let ages = Ages {
        placement: seconds(status.placement_age),
        look: status.since_look.map(seconds),
        decision: status.last.as_ref().map(|last| seconds(last.age)),
        last_applied: status.last_applied.as_ref().map(|last| seconds(last.age)),
    };
    let body = Body {
        mode: status.mode.to_string(),
        policy: status.policy,
        window_steps: status.window_steps,
        placement_version: status.placement_version,
        rebalances: Rebalances { applied: status.applied, skipped: status.skipped, failed: status.failed },
        moved_experts: status.moved_experts,
        moved_bytes: status.moved_bytes,
        last_duration_seconds: status.last_duration.map(|duration| duration.as_secs_f64()),
        migration: status.migration.map(Migration::from),
        decision: status.last.as_ref().map(Decision::from),
        last_applied: status.last_applied.as_ref().map(Decision::from),
        achieved_balancedness: status.achieved.map(round),
    };
    let ages = serde_json::to_string(&ages).expect("numbers are JSON");
    let mut text = format!("{{\"object\":\"rebalancer\",\"age_seconds\":{ages},");
    let time_ends = text.len();
    // The rest goes on inside the same braces.
    text += &serde_json::to_string(&body).expect("texts and numbers are JSON")[1..];
    Answer::since(Format::Json, text, time_ends)
}

/// More digits than anybody reads would be noise.
fn round(figure: f64) -> f64 {
    (figure * 1e4).round() / 1e4
}

fn seconds(age: std::time::Duration) -> f64 {
    (age.as_secs_f64() * 10.0).round() / 10.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use std::time::Duration;

    #[test]
    fn ages_change_the_body_but_not_the_tag() {
        let young = RebalanceStatus::default();
        let old = RebalanceStatus { placement_age: Duration::from_secs(90), ..young.clone() };
        assert_eq!(answer(&young).etag, answer(&old).etag);
        assert_ne!(answer(&young).body, answer(&old).body);
        let looked = RebalanceStatus { skipped: 1, ..young.clone() };
        assert_ne!(answer(&young).etag, answer(&looked).etag);
    }

    #[test]
    fn a_decision_is_told_with_its_figures() {
        let last = LastDecision {
            step: 640,
            age: Duration::from_millis(2540),
            trigger: "auto".into(),
            reason: "gains more than it costs".into(),
            applied: true,
            balance_before: 0.7,
            balance_after: 0.9,
            balance_bound: 0.95,
            sampling_floor: 0.04,
            gain_us_per_step: 12.5,
            moves: 3,
            bytes: 3 << 20,
        };
        let progress = MigrationProgress { arrived: 1, arrivals: 3, bytes: 1 << 20, total_bytes: 3 << 20 };
        let status =
            RebalanceStatus { last: Some(last), migration: Some(progress), ..RebalanceStatus::default() };
        let body: Value = serde_json::from_str(&answer(&status).body).unwrap();
        assert_eq!(body["mode"], "off");
        assert_eq!(
            body["age_seconds"],
            json!({"placement": 0.0, "look": null, "decision": 2.5, "last_applied": null})
        );
        assert_eq!(body["decision"]["balancedness"], json!({"before": 0.7, "after": 0.9, "bound": 0.95}));
        assert_eq!(body["migration"]["arrivals"], 3);
    }
}
