//! Who moves experts on the engine thread: hands slices and switches to the ranks, puts their answers together, and
//! tells everyone how far it is.

use super::handle::lock;
use super::migration::{Experts, Migration, MigrationProgress};
use super::pace::Pace;
use crate::moe::migrate::{Checksums, MAX_SLICE_BYTES, Slice, Switch};
use router_sim::placement::Placement;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// How a migration ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MigrationReport {
    /// `Err` says why it was given up; what is in force then is a valid placement on the way.
    pub outcome: Result<(), String>,
    /// Version of the placement in force at its end.
    pub version: u64,
    /// Placements on the way that came into force.
    pub switches: u64,
    /// How far it came.
    pub progress: MigrationProgress,
    /// From the order to the last switch.
    pub duration: Duration,
}

/// What handles see of a migration: `None` while there is none. Whoever puts one in has the right to begin it.
pub(super) type UnderWay = Mutex<Option<MigrationProgress>>;

/// A change of placement that was claimed.
pub(super) struct MigrationOrder {
    pub target: Placement,
    /// What each layer wins, in any unit: those that win most per expert go first.
    pub gains: Vec<f64>,
    /// Who asked from outside.
    pub caller: Option<oneshot::Sender<MigrationReport>>,
}

/// What one rank says of a slice.
pub(super) struct SliceAnswer {
    pub outcome: Result<Checksums, String>,
    pub took: Duration,
}

/// What the ranks are told besides the plan.
#[derive(Default)]
pub(super) struct Orders {
    /// Before the step.
    pub switch: Option<Arc<Switch>>,
    /// After it.
    pub slice: Option<Arc<Slice>>,
}

/// See the module.
pub(super) struct Mover {
    experts: Experts,
    /// Ranks of the world.
    world: usize,
    under_way: Arc<UnderWay>,
    running: Option<Running>,
    /// Counts migrations, so that late answers are told apart.
    begun: u64,
    /// Slices whose answers are not all in, oldest first.
    in_flight: VecDeque<InFlight>,
    pace: Pace,
    born: Instant,
    ended: Option<MigrationReport>,
}

struct Running {
    migration: Migration,
    caller: Option<oneshot::Sender<MigrationReport>>,
    began: Instant,
}

struct InFlight {
    slice: Arc<Slice>,
    bytes: u64,
    /// Which migration it belongs to.
    of: u64,
    /// By rank.
    answers: Vec<Option<SliceAnswer>>,
}

impl Mover {
    pub fn new(experts: Experts, world: usize, under_way: Arc<UnderWay>) -> Mover {
        let pace = Pace::new(experts.bandwidth, MAX_SLICE_BYTES.min(experts.expert_bytes.max(1)));
        Mover {
            experts,
            world,
            under_way,
            running: None,
            begun: 0,
            in_flight: VecDeque::new(),
            pace,
            born: Instant::now(),
            ended: None,
        }
    }

    /// Version of the placement in force.
    pub fn version(&self) -> u64 {
        self.experts.in_force.placement().version()
    }

    /// Begins a change that was claimed in `under_way`.
    pub fn begin(&mut self, order: MigrationOrder) {
        let MigrationOrder { target, gains, caller } = order;
        assert!(self.running.is_none(), "two migrations at once");
        let began = Instant::now();
        self.begun += 1;
        match Migration::new(&self.experts, &target, &gains) {
            Some(migration) => {
                let progress = migration.progress();
                tracing::debug!(
                    "a migration begins: {} experts, {} bytes",
                    progress.arrivals,
                    progress.total_bytes
                );
                *lock(&self.under_way) = Some(progress);
                self.running = Some(Running { migration, caller, began });
            }
            None => {
                let duration = began.elapsed();
                let (version, progress) = (self.version(), MigrationProgress::default());
                self.tell(
                    caller,
                    MigrationReport { outcome: Ok(()), version, switches: 0, progress, duration },
                );
            }
        }
    }

    /// How long there is nothing to do; `None` when no migration is under way.
    pub fn pause(&self) -> Option<Duration> {
        self.running.as_ref().map(|_| self.pace.pause(self.born.elapsed()))
    }

    /// What the ranks do next for the migration. The placement that a switch brings is in force for everyone who looks
    /// from now on. `idle` when no step waits for the slice.
    pub fn orders(&mut self, idle: bool) -> Orders {
        let Some(running) = &mut self.running else { return Orders::default() };
        let switch = running.migration.switch();
        if let Some(switch) = &switch {
            self.experts.in_force.switch(Arc::clone(&switch.placement));
            *lock(&self.under_way) = Some(running.migration.progress());
        }
        if running.migration.is_done() {
            self.finish(Ok(()));
            return Orders { switch, slice: None };
        }
        let left = running.migration.left_of_wave();
        let bytes = self.pace.bytes(self.born.elapsed(), left, idle);
        let slice = if bytes > 0 { running.migration.slice(bytes) } else { None };
        if let Some(slice) = &slice {
            self.in_flight.push_back(InFlight {
                slice: Arc::clone(slice),
                bytes,
                of: self.begun,
                answers: (0..self.world).map(|_| None).collect(),
            });
        }
        Orders { switch, slice }
    }

    /// Thinks ahead while the ranks compute.
    pub fn prepare(&mut self) {
        if let Some(running) = &mut self.running {
            running.migration.prepare();
        }
    }

    /// A step took so long.
    pub fn note_step(&mut self, took: Duration) {
        self.pace.note_step(took);
    }

    /// A rank's answer to its oldest slice that it has not answered.
    pub fn note_answer(&mut self, rank: usize, answer: SliceAnswer) {
        let slice = self.in_flight.iter_mut().find(|slice| slice.answers[rank].is_none());
        slice.unwrap_or_else(|| panic!("rank {rank} answers a slice that it was not given")).answers[rank] =
            Some(answer);
        let complete = |slice: &InFlight| slice.answers.iter().all(Option::is_some);
        let Some(InFlight { slice, bytes, of, answers }) = self.in_flight.pop_front_if(|s| complete(s))
        else {
            return;
        };
        let answers: Vec<SliceAnswer> = answers.into_iter().flatten().collect();
        // The others have waited for the rank that came last.
        let took = answers.iter().map(|answer| answer.took).min().unwrap_or_default();
        self.pace.note_slice(bytes, took);
        if let Some(running) = self.running.as_mut().filter(|_| of == self.begun) {
            let outcomes: Vec<_> = answers.into_iter().map(|answer| answer.outcome).collect();
            let checked = running.migration.check(&slice, &outcomes);
            *lock(&self.under_way) = Some(running.migration.progress());
            if let Err(why) = checked {
                self.finish(Err(why));
            }
        }
    }

    /// Some rank has not answered a slice.
    pub fn awaits_answers(&self) -> bool {
        !self.in_flight.is_empty()
    }

    /// Ranks that have not answered a slice.
    pub fn silent(&self) -> impl Iterator<Item = usize> {
        let silent = |rank: &usize| self.in_flight.iter().any(|slice| slice.answers[*rank].is_none());
        (0..self.world).filter(silent)
    }

    /// Ends a migration under way, because the engine ends.
    pub fn abandon(&mut self, why: &str) {
        self.finish(Err(why.to_owned()));
    }

    fn finish(&mut self, outcome: Result<(), String>) {
        if let Some(Running { migration, caller, began }) = self.running.take() {
            let report = MigrationReport {
                outcome,
                version: self.version(),
                switches: migration.switched(),
                progress: migration.progress(),
                duration: began.elapsed(),
            };
            self.tell(caller, report);
        }
    }

    fn tell(&mut self, caller: Option<oneshot::Sender<MigrationReport>>, report: MigrationReport) {
        match &report.outcome {
            Ok(()) => tracing::debug!(
                "placement {} is in force: {} experts moved in {:.1} s",
                report.version,
                report.progress.arrived,
                report.duration.as_secs_f64()
            ),
            Err(why) => {
                tracing::warn!("a migration was given up at placement {}: {why}", report.version);
            }
        }
        // Whoever hears of the end may begin the next one.
        *lock(&self.under_way) = None;
        if let Some(caller) = caller {
            // Nobody has to wait for it.
            let _ = caller.send(report.clone());
        }
        self.ended = Some(report);
    }

    /// The placement in force.
    pub fn placement(&self) -> Arc<Placement> {
        self.experts.in_force.placement()
    }

    /// Ranks that share each expert.
    pub fn expert_tp(&self) -> usize {
        self.experts.expert_tp
    }

    /// Bytes of one rank's share of one expert.
    pub fn expert_bytes(&self) -> u64 {
        self.experts.expert_bytes
    }

    /// How fast a rank has copied weights of late.
    pub fn bytes_per_second(&self) -> f64 {
        self.pace.rate()
    }

    /// Takes the right to begin a migration; `false` while somebody else has it.
    pub fn claim(&self) -> bool {
        let mut under_way = lock(&self.under_way);
        let free = under_way.is_none();
        under_way.get_or_insert_default();
        free
    }

    /// The end of the latest migration, once.
    pub fn take_ended(&mut self) -> Option<MigrationReport> {
        self.ended.take()
    }
}
