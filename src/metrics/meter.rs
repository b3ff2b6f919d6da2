//! What each rank spends its time on and what it exchanges. A rank writes its own [`RankMeter`] through a
//! [`WorkClock`]; anyone reads. Nothing here locks, allocates or looks up a label: a lap costs two clock reads' worth of
//! nanoseconds.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What a rank does inside a step. Norms and residual additions count with the sublayer they belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Attention with its projections.
    Attention,
    /// Choosing experts.
    Router,
    /// Agreeing on who computes what, and rows on their way to their experts.
    Dispatch,
    /// Expert MLPs, the shared one included.
    Expert,
    /// Rows on their way home, and their weighted sums.
    Combine,
    /// Gathering rows and summing parts within the tensor-parallel group.
    AllReduce,
    /// Embedding, dense MLPs and the head.
    Dense,
    /// Choosing tokens.
    Sample,
    /// Waiting for a device that was given everything it has to do.
    Device,
    /// Waiting for other ranks, whatever for.
    Wait,
}

impl Work {
    /// All, in the order of their numbers.
    pub const ALL: [Work; 10] = [
        Work::Attention,
        Work::Router,
        Work::Dispatch,
        Work::Expert,
        Work::Combine,
        Work::AllReduce,
        Work::Dense,
        Work::Sample,
        Work::Device,
        Work::Wait,
    ];

    /// As the metrics call it.
    pub fn label(self) -> &'static str {
        match self {
            Work::Attention => "attention",
            Work::Router => "router",
            Work::Dispatch => "dispatch",
            Work::Expert => "expert",
            Work::Combine => "combine",
            Work::AllReduce => "allreduce",
            Work::Dense => "dense",
            Work::Sample => "sample",
            Work::Device => "device",
            Work::Wait => "wait",
        }
    }
}

/// How a piece of a step ran on a device that knows such pieces again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepKind {
    /// Operation by operation.
    Run,
    /// As one unit of work, known from an earlier step.
    Replayed,
    /// Made such a unit; it was replayed at once.
    Captured,
}

impl StepKind {
    /// All, in the order of their numbers.
    pub const ALL: [StepKind; 3] = [StepKind::Run, StepKind::Replayed, StepKind::Captured];

    /// As the metrics call it.
    pub fn label(self) -> &'static str {
        match self {
            StepKind::Run => "run",
            StepKind::Replayed => "replayed",
            StepKind::Captured => "captured",
        }
    }
}

/// Why rows travel between ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CommOp {
    /// To the ranks of their experts.
    Dispatch,
    /// Back to their owners.
    Combine,
    /// Gathered and summed within the tensor-parallel group.
    AllReduce,
    /// Weights of experts that move.
    Migrate,
}

impl CommOp {
    /// All, in the order of their numbers.
    pub const ALL: [CommOp; 4] = [CommOp::Dispatch, CommOp::Combine, CommOp::AllReduce, CommOp::Migrate];

    /// As the metrics call it.
    pub fn label(self) -> &'static str {
        match self {
            CommOp::Dispatch => "dispatch",
            CommOp::Combine => "combine",
            CommOp::AllReduce => "allreduce",
            CommOp::Migrate => "migrate",
        }
    }
}

/// Time and traffic of one rank since it started. Written by that rank's thread alone.
#[derive(Debug)]
pub struct RankMeter {
    began: Instant,
    work_ns: [AtomicU64; Work::ALL.len()],
    sent_bytes: [AtomicU64; CommOp::ALL.len()],
    received_bytes: [AtomicU64; CommOp::ALL.len()],
    steps: [AtomicU64; StepKind::ALL.len()],
    /// Nanoseconds after `began`, plus 1, at the last sign of life inside a step; 0 between steps.
    pulse: AtomicU64,
    up: AtomicBool,
}

impl Default for RankMeter {
    fn default() -> Self {
        RankMeter {
            began: Instant::now(),
            work_ns: Default::default(),
            sent_bytes: Default::default(),
            received_bytes: Default::default(),
            steps: Default::default(),
            pulse: AtomicU64::new(0),
            up: AtomicBool::new(false),
        }
    }
}

impl RankMeter {
    /// Time spent on `work`.
    pub fn spent(&self, work: Work) -> Duration {
        Duration::from_nanos(self.work_ns[work as usize].load(Ordering::Relaxed))
    }

    /// Bytes sent to other ranks for `op`.
    pub fn sent_bytes(&self, op: CommOp) -> u64 {
        self.sent_bytes[op as usize].load(Ordering::Relaxed)
    }

    /// Bytes received from other ranks for `op`.
    pub fn received_bytes(&self, op: CommOp) -> u64 {
        self.received_bytes[op as usize].load(Ordering::Relaxed)
    }

    /// Time since the rank last got on with its step; zero between steps.
    pub fn heartbeat_age(&self) -> Duration {
        match self.pulse.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            beat => self.began.elapsed().saturating_sub(Duration::from_nanos(beat - 1)),
        }
    }

    /// The rank holds a model that answers steps.
    pub fn is_up(&self) -> bool {
        self.up.load(Ordering::Relaxed)
    }

    /// Adds time spent on `work`.
    pub fn spend(&self, work: Work, time: Duration) {
        add(&self.work_ns[work as usize], time.as_nanos() as u64);
    }

    /// Pieces of steps of a kind that the rank's device has counted.
    pub fn set_steps(&self, kind: StepKind, steps: u64) {
        self.steps[kind as usize].store(steps, Ordering::Relaxed);
    }

    /// See [`RankMeter::set_steps`].
    pub fn steps(&self, kind: StepKind) -> u64 {
        self.steps[kind as usize].load(Ordering::Relaxed)
    }

    /// Counts rows that went to and came from other ranks.
    pub fn exchange(&self, op: CommOp, sent_bytes: usize, received_bytes: usize) {
        add(&self.sent_bytes[op as usize], sent_bytes as u64);
        add(&self.received_bytes[op as usize], received_bytes as u64);
    }

    /// The rank is alive, inside a step.
    pub fn beat(&self) {
        self.pulse.store(self.began.elapsed().as_nanos() as u64 + 1, Ordering::Relaxed);
    }

    /// The step is over: silence means nothing from now on.
    pub fn rest(&self) {
        self.pulse.store(0, Ordering::Relaxed);
    }
}

/// A plain load and store: there is one writer, so no locked read-modify-write is needed.
fn add(counter: &AtomicU64, amount: u64) {
    counter.store(counter.load(Ordering::Relaxed) + amount, Ordering::Relaxed);
}

/// Divides a rank's time among kinds of [`Work`] without gaps: each lap takes what passed since the one before. The rank
/// counts as up for as long as its clock exists.
#[derive(Debug)]
pub struct WorkClock {
    meter: Arc<RankMeter>,
    lap_began: Instant,
    /// All waiting so far, as of the latest lap.
    waited: Duration,
}

impl WorkClock {
    /// A clock that writes to `meter`.
    pub fn new(meter: Arc<RankMeter>) -> Self {
        meter.up.store(true, Ordering::Relaxed);
        WorkClock { meter, lap_began: Instant::now(), waited: Duration::ZERO }
    }

    /// Where this clock writes.
    pub fn meter(&self) -> &RankMeter {
        &self.meter
    }

    /// Begins a step: what passed since the last lap is nobody's. `waited` as for [`Self::lap`].
    pub fn start(&mut self, waited: Duration) {
        (self.lap_began, self.waited) = (Instant::now(), waited);
        self.meter.beat();
    }

    /// What passed since the last lap was `work`, but for the waiting in it. `waited` is all the waiting for other ranks
    /// since the communicators were made.
    pub fn lap(&mut self, work: Work, waited: Duration) {
        let now = Instant::now();
        let waiting = waited.saturating_sub(self.waited);
        self.meter.spend(work, (now - self.lap_began).saturating_sub(waiting));
        self.meter.spend(Work::Wait, waiting);
        self.meter.beat();
        (self.lap_began, self.waited) = (now, waited);
    }
}

impl Drop for WorkClock {
    fn drop(&mut self) {
        self.meter.up.store(false, Ordering::Relaxed);
        self.meter.rest();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn laps_leave_no_gap_and_waiting_is_taken_out() {
        let meter = Arc::new(RankMeter::default());
        let mut clock = WorkClock::new(Arc::clone(&meter));
        let began = Instant::now();
        clock.start(Duration::from_secs(7));
        clock.lap(Work::Router, Duration::from_secs(7));
        // More waiting than time: the lap itself cannot be negative.
        clock.lap(Work::Dispatch, Duration::from_secs(8));
        clock.lap(Work::Expert, Duration::from_secs(8));
        let passed = began.elapsed();
        assert_eq!(
            meter.spent(Work::Wait),
            Duration::from_secs(1),
            "waiting before the step is not the step's"
        );
        assert_eq!(meter.spent(Work::Dispatch), Duration::ZERO);
        let laps: Duration = Work::ALL.map(|work| meter.spent(work)).iter().sum();
        assert!(laps - Duration::from_secs(1) <= passed, "{laps:?} in {passed:?}");
    }

    #[test]
    fn a_rank_is_up_while_its_clock_exists_and_has_a_pulse_inside_steps_only() {
        let meter = Arc::new(RankMeter::default());
        assert!(!meter.is_up());
        let mut clock = WorkClock::new(Arc::clone(&meter));
        assert!(meter.is_up());
        assert_eq!(meter.heartbeat_age(), Duration::ZERO);
        clock.start(Duration::ZERO);
        while meter.heartbeat_age() < Duration::from_micros(10) {
            std::hint::spin_loop();
        }
        meter.rest();
        assert_eq!(meter.heartbeat_age(), Duration::ZERO);
        clock.start(Duration::ZERO);
        drop(clock);
        assert!(!meter.is_up());
        assert_eq!(meter.heartbeat_age(), Duration::ZERO, "a rank that is gone is not late");
    }

    #[test]
    fn traffic_is_kept_by_direction_and_reason() {
        let meter = RankMeter::default();
        meter.exchange(CommOp::Dispatch, 3, 5);
        meter.exchange(CommOp::Dispatch, 10, 0);
        meter.exchange(CommOp::AllReduce, 1, 1);
        let both = |op| (meter.sent_bytes(op), meter.received_bytes(op));
        assert_eq!(CommOp::ALL.map(both), [(13, 5), (0, 0), (1, 1), (0, 0)]);
    }
}
