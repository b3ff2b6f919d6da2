//! Records the routing of every step to a trace: each rank writes its own rows, none waits for another, and a disk that
//! fails or stalls costs the trace only.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use router_sim::load::Phase;
use router_sim::placement::Placement;
use router_sim::rebalance::Rebalancing;
use router_sim::simulate::header;
use router_sim::split::Split;
use router_sim::trace::{
    Degrees, Event, Piece, RowInfo, StepInfo, TraceCounters, TraceHeader, TraceWriter, WeightFormat,
};

use super::plan::{StepPlan, SubPlan};
use super::rank::StepObserver;
use super::rebalance::RebalanceOptions;
use crate::error::{Error, Result};
use crate::model::{StepOutput, world};
use crate::spec::ModelSpec;

/// A [`StepObserver`] that writes a routing trace.
pub struct Recorder {
    began: Instant,
    counters: Arc<TraceCounters>,
    /// Ranks take turns for the microseconds it takes to pack their rows; `None` once finished.
    writer: Mutex<Option<Open>>,
}

/// How the recorded run serves: what a replay sets likewise.
#[derive(Debug, Clone, Copy)]
pub struct ServingSettings {
    /// How rows are shared out among replicas.
    pub split: Split,
    /// When and how experts move.
    pub rebalance: RebalanceOptions,
    /// Experts on their way to a rank at once.
    pub staging_slots: usize,
    /// Weights of one expert.
    pub expert_bytes: u64,
}

struct Open {
    writer: TraceWriter,
    /// Reused from step to step.
    rows: Vec<RowInfo>,
    /// Of the step recorded last: its ranks measure it apart, but the pieces of one step must agree on it.
    info: Option<StepInfo>,
}

impl Recorder {
    /// Starts a trace at `path`.
    ///
    /// # Errors
    /// [`Error::Routing`] when the file cannot be created.
    pub fn create(
        path: &Path,
        spec: &ModelSpec,
        degrees: world::Degrees,
        placement: &Placement,
        serving: ServingSettings,
    ) -> Result<Recorder> {
        let ServingSettings { split, rebalance, staging_slots, expert_bytes } = serving;
        let mut policy =
            Rebalancing::to_header(rebalance.mode, rebalance.policy, rebalance.settings().as_ref());
        policy.insert(header::SPLIT.to_owned(), split.to_string());
        let cost = [(header::STAGING_SLOTS, staging_slots as f64), ("expert_bytes", expert_bytes as f64)];

        let header = TraceHeader {
            spec_digest: spec_digest(spec),
            family: spec.family.to_owned(),
            top_k: spec.moe.top_k,
            degrees: Degrees {
                tensor: degrees.tensor_parallel,
                data: degrees.data_parallel,
                expert: degrees.expert_parallel(),
                pipeline: 1,
            },
            node_of_rank: vec![0; degrees.world()],
            policy,
            cost: cost.map(|(name, value)| (name.to_owned(), value)).into(),
            weights: WeightFormat::None,
            placement: placement.clone(),
        };
        let writer = TraceWriter::create(path, header).map_err(Error::Routing)?;
        Ok(Recorder {
            began: Instant::now(),
            counters: writer.counters(),
            writer: Mutex::new(Some(Open { writer, rows: Vec::new(), info: None })),
        })
    }

    /// Takes down something between two steps.
    pub fn event(&self, event: &Event) {
        let mut guard = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Open { writer, .. }) = guard.as_mut() {
            writer.event(event);
        }
    }

    /// What becomes of the records; stays valid after the trace.
    pub fn counters(&self) -> Arc<TraceCounters> {
        Arc::clone(&self.counters)
    }

    /// Ends the trace and waits up to `patience` for it to be written.
    ///
    /// # Errors
    /// [`Error::Routing`] with the first failure of the trace.
    pub fn finish(&self, patience: Duration) -> Result<()> {
        let open = self.writer.lock().unwrap_or_else(PoisonError::into_inner).take();
        open.map_or(Ok(()), |open| Ok(open.writer.finish(patience)?))
    }
}

impl StepObserver for Recorder {
    fn on_step(&self, plan: &StepPlan, rank: usize, dp_rank: usize, output: &StepOutput, duration: Duration) {
        let routing = &output.routing;
        if routing.rows == 0 {
            return;
        }
        let end_us = self.began.elapsed().as_micros() as u64;
        let duration_us = duration.as_micros() as u64;
        let mut guard = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Open { writer, rows, info: latest }) = guard.as_mut() else { return };
        owned_rows(&plan.sub_plans[dp_rank], routing.first_row, routing.rows, rows);
        let info = latest.filter(|info| info.step == plan.step).unwrap_or_else(|| StepInfo {
            step: plan.step,
            start_us: end_us.saturating_sub(duration_us),
            duration_us,
            placement_version: plan.placement_version,
            rows: plan.rows() as u64,
        });
        *latest = Some(info);
        writer.step(&info, &[Piece { rank, rows, ids: &routing.ids, weights: &routing.weights }]);
    }
}

/// Describes `count` batch rows from `first` on.
fn owned_rows(sub: &SubPlan, first: usize, count: usize, rows: &mut Vec<RowInfo>) {
    rows.clear();
    for (span, info) in sub.spans.iter().zip(&sub.infos) {
        for i in 0..span.rows {
            let row = (span.row + i) as usize;
            if row < first || row >= first + count {
                continue;
            }
            let position = span.position + i;
            rows.push(RowInfo {
                request: info.request,
                position: u64::from(position),
                phase: if position < span.prompt_len { Phase::Prefill } else { Phase::Decode },
                recomputed: i < info.recomputed,
            });
        }
    }
    assert_eq!(rows.len(), count, "rows {first}..{} of a step", first + count);
}

/// Equal for models that route alike: FNV-1a over the specification's text.
fn spec_digest(spec: &ModelSpec) -> String {
    let hash = format!("{spec:?}").bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{hash:016x}")
}
