//! The engine thread: collects requests, plans, lets the ranks work, and reports.

use super::handle::{Command, EngineHandle, Failure, Shared, Submission, lock};
use super::mover::{Mover, Orders};
use super::options::EngineOptions;
use super::plan::{Phase, StepPlan, SubResults};
use super::rank::{RankAnswer, RankFailure, RankReport, RankSetup, Ranks, StepObserver, dp_size, panic_text};
use super::rebalance::Balancer;
use super::request::{Event, FinishReason, Finished, Request};
use super::scheduler::{Scheduler, Update};
use super::stats::{RequestTiming, StepTiming, TimingObserver};
use super::watchdog::Watchdog;
use super::{Hooks, RequestId};
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, channel};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// How long the engine listens for the cause after the first rank reported a failure: the others see only a peer
/// that is gone.
const FAILURE_GRACE: Duration = Duration::from_millis(500);

/// The wait for the ranks' answers is counted in pieces of this length.
const WAITING_SLICE: Duration = Duration::from_millis(50);

/// Starts all threads. The setups and options have been checked.
pub(super) fn start(setups: Vec<RankSetup>, options: EngineOptions, hooks: Hooks) -> EngineHandle {
    let dp_ranks = dp_size(&setups);
    let ranks = Ranks::start(setups, &hooks);
    // The pools are empty before the first step.
    let mut stats = super::EngineStats::default();
    stats.kv.free = options.kv_blocks * dp_ranks;
    let shared = Arc::new(Shared::new(options, stats, hooks.experts.clone()));
    let (commands, received) = channel();
    let for_thread = Arc::clone(&shared);
    let thread = std::thread::Builder::new()
        .name("engine".into())
        .spawn(move || run(for_thread, ranks, dp_ranks, received, hooks))
        .expect("the system refuses one more thread");
    EngineHandle::new(shared, commands, thread)
}

/// The body of the engine thread. Whatever happens inside, every request gets its end and the handle learns of it.
fn run(shared: Arc<Shared>, ranks: Ranks, dp_ranks: usize, commands: Receiver<Command>, hooks: Hooks) {
    let mover = hooks.experts.map(|experts| Mover::new(experts, ranks.len(), Arc::clone(&shared.under_way)));
    let balancer = hooks
        .rebalancing
        .zip(mover.as_ref())
        .map(|(sources, mover)| Balancer::new(sources, Arc::clone(&shared.rebalancing), &mover.placement()));
    let callers =
        Callers { live: HashMap::new(), shared: Arc::clone(&shared), timing: hooks.timing, admitted: 0 };
    let mut driver = Driver {
        scheduler: Scheduler::new(shared.options.clone(), dp_ranks),
        plan: Arc::new(StepPlan::default()),
        reports: (0..ranks.len()).map(|_| RankReport::default()).collect(),
        results: (0..dp_ranks).map(|_| SubResults::default()).collect(),
        updates: Vec::new(),
        deadline: None,
        observer: hooks.steps,
        watchdog: Watchdog::new(shared.options.step_timeout),
        lost_device: None,
        mover,
        balancer,
        ranks,
        commands,
        callers,
    };
    let outcome = catch_unwind(AssertUnwindSafe(|| driver.serve()));
    let failure = match outcome {
        Ok(Ok(())) => None,
        Ok(Err(why)) => Some(why),
        Err(panic) => Some(format!("the engine {}", panic_text(panic.as_ref()))),
    };
    shared.open.store(false, Ordering::Release);
    let Driver { mut callers, ranks, commands, mover, lost_device: device, .. } = driver;
    if let Some(mut mover) = mover {
        mover.abandon(failure.as_deref().unwrap_or("the engine has stopped"));
    }
    if let Some(why) = failure {
        tracing::error!("the engine stops: {why}");
        *lock(&shared.failure) = Some(Failure { why: why.clone(), device });
        shared.alive.store(false, Ordering::Release);
        callers.fail_all(&why);
        // Ranks may be stuck in a device call: their threads are left alone and end when they can.
    } else {
        shared.alive.store(false, Ordering::Release);
        ranks.join();
    }
    // Requests that came too late: dropping their channels ends their streams.
    drop(commands);
    shared.note_end();
}

/// The state of the engine thread.
struct Driver {
    scheduler: Scheduler,
    callers: Callers,
    ranks: Ranks,
    commands: Receiver<Command>,
    /// Reused: all ranks have given it back before it is written again.
    plan: Arc<StepPlan>,
    /// Reused: one per rank, on its way there and back.
    reports: Vec<RankReport>,
    /// Reused: one per DP rank.
    results: Vec<SubResults>,
    /// Reused.
    updates: Vec<(RequestId, Update)>,
    /// When a shutdown aborts what is left.
    deadline: Option<Instant>,
    observer: Option<Arc<dyn StepObserver>>,
    watchdog: Watchdog,
    /// The device that ended it all, where one did.
    lost_device: Option<String>,
    /// Where the engine knows its experts.
    mover: Option<Mover>,
    /// Where they are to move by themselves, or on request.
    balancer: Option<Balancer>,
}

/// What the engine thread waits for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Awaited {
    /// Every rank's results of a step.
    Step,
    /// Every rank's answers to the slices of expert weights it was given.
    Slices,
}

impl Driver {
    /// Serves until a shutdown ends or everyone has left. `Err` when a rank failed.
    fn serve(&mut self) -> Result<(), String> {
        loop {
            let everyone_left = !self.take_commands();
            let expired = self.deadline.is_some_and(|deadline| Instant::now() >= deadline);
            if everyone_left || expired {
                self.scheduler.end_all(&FinishReason::Aborted);
            }
            if self.scheduler.is_idle() {
                self.report();
                if everyone_left || self.deadline.is_some() {
                    return Ok(());
                }
                self.move_experts()?;
                continue;
            }
            self.step()?;
            self.report();
        }
    }

    /// Takes all commands there are; waits for one when there is nothing to compute. `false` when no handle and no
    /// stream is left.
    fn take_commands(&mut self) -> bool {
        if self.scheduler.is_idle() && self.deadline.is_none() {
            let command = match self.mover.as_ref().and_then(Mover::pause) {
                None => self.commands.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(pause) => self.commands.recv_timeout(pause),
            };
            match command {
                Ok(command) => self.take(command),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return false,
            }
        }
        loop {
            match self.commands.try_recv() {
                Ok(command) => self.take(command),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn take(&mut self, command: Command) {
        match command {
            Command::Submit(submissions) => {
                for submission in submissions {
                    self.scheduler.add(submission.id, Arc::clone(&submission.request));
                    self.callers.add(submission);
                }
            }
            Command::Abort(id) => self.scheduler.abort(id),
            Command::Move(order) => {
                let mover = self.mover.as_mut().expect("only an engine that knows its experts takes it");
                if let Some(balancer) = &mut self.balancer {
                    balancer.note_order(&order.target, mover);
                }
                mover.begin(order);
            }
            Command::Shutdown(deadline) => {
                self.deadline = Some(self.deadline.map_or(deadline, |earlier| earlier.min(deadline)));
            }
        }
    }

    /// Plans and computes one step.
    fn step(&mut self) -> Result<(), String> {
        let plan = Arc::get_mut(&mut self.plan).expect("every rank has given the last plan back");
        self.scheduler.plan(plan);
        plan.observe_routing = self.observer.as_ref().is_some_and(|observer| observer.wants_routing());
        // Who was admitted or aborted need not wait for the step.
        self.report();
        let started = Instant::now();
        let orders = self.orders(false);
        for (rank, report) in self.reports.drain(..).enumerate() {
            self.ranks.send(rank, Some((Arc::clone(&self.plan), report)), &orders);
        }
        self.prepare();
        self.collect()?;
        let (rows, duration) = (self.plan.rows(), started.elapsed());
        self.watchdog.note(rows, duration);
        if let Some(mover) = &mut self.mover {
            mover.note_step(duration);
            if let Some(balancer) = &mut self.balancer {
                balancer.after_step(&self.plan, mover);
            }
        }
        self.callers.note_pace(duration);
        if let Some(timing) = &self.callers.timing {
            timing.on_step(&StepTiming {
                duration,
                prefill_rows: self.plan.rows_in(Phase::Prefill),
                decode_rows: self.plan.rows_in(Phase::Decode),
            });
        }
        self.scheduler.finish_step(&self.plan, &mut self.results);
        Ok(())
    }

    /// Moves experts while there is nothing to compute.
    fn move_experts(&mut self) -> Result<(), String> {
        let orders = self.orders(true);
        if orders.switch.is_some() || orders.slice.is_some() {
            (0..self.ranks.len()).for_each(|rank| self.ranks.send(rank, None, &orders));
            self.prepare();
        }
        self.wait_for(Awaited::Slices)
    }

    /// What the ranks do for a migration with the next work.
    fn orders(&mut self, idle: bool) -> Orders {
        let Some(mover) = &mut self.mover else { return Orders::default() };
        let orders = mover.orders(idle);
        if let Some(balancer) = &mut self.balancer {
            balancer.note_orders(&orders, mover);
        }
        if !idle {
            let plan = Arc::get_mut(&mut self.plan).expect("the plan is not handed out yet");
            plan.placement_version = mover.version();
        }
        orders
    }

    fn prepare(&mut self) {
        if let Some(mover) = &mut self.mover {
            mover.prepare();
        }
    }

    /// Waits for every rank and puts their results together.
    fn collect(&mut self) -> Result<(), String> {
        self.results.iter_mut().for_each(SubResults::clear);
        self.reports.resize_with(self.ranks.len(), RankReport::default);
        self.wait_for(Awaited::Step)?;
        for (results, sub) in self.results.iter_mut().zip(&self.plan.sub_plans) {
            results.settle(sub)?;
        }
        Ok(())
    }

    /// Waits until all ranks have answered. Those that answer a step may have to answer the slice before it first.
    fn wait_for(&mut self, awaited: Awaited) -> Result<(), String> {
        let mut computing = vec![awaited == Awaited::Step; self.ranks.len()];
        let rows = if awaited == Awaited::Step { self.plan.rows() } else { 1 };
        let allowance = self.watchdog.allowance(rows);
        let mut left = allowance;
        while match awaited {
            Awaited::Step => computing.contains(&true),
            Awaited::Slices => self.mover.as_ref().is_some_and(Mover::awaits_answers),
        } {
            let Some((rank, answer)) = self.answer(&mut left)? else {
                let (silent, what): (Vec<usize>, _) = match awaited {
                    Awaited::Step => (
                        (0..computing.len()).filter(|&rank| computing[rank]).collect(),
                        format!("a step of {rows} rows"),
                    ),
                    Awaited::Slices => (
                        self.mover.iter().flat_map(Mover::silent).collect(),
                        "moving expert weights".to_owned(),
                    ),
                };
                let seconds = allowance.as_secs_f64();
                return Err(format!(
                    "ranks {silent:?} have not answered: {what} took more than {seconds:.1} s"
                ));
            };
            match answer {
                RankAnswer::Step(mut report) => {
                    let results = &mut self.results[self.ranks.dp_rank(rank)];
                    results.rows.append(&mut report.rows);
                    results.routing.extend(report.routing.take());
                    self.reports[rank] = report;
                    computing[rank] = false;
                }
                RankAnswer::Slice(answer) => {
                    self.mover.as_mut().expect("slices come from there").note_answer(rank, answer);
                }
                RankAnswer::Failed(failure) => return Err(self.cause(rank, failure)),
            }
        }
        Ok(())
    }

    /// The next answer; `None` when none comes in the time `left`, which becomes less by the waiting.
    fn answer(&self, left: &mut Duration) -> Result<Option<(usize, RankAnswer)>, String> {
        loop {
            match self.ranks.answers().recv_timeout(WAITING_SLICE) {
                Ok(answer) => return Ok(Some(answer)),
                Err(RecvTimeoutError::Timeout) if left.is_zero() => return Ok(None),
                // By slices, not by the clock: a process that was stopped for a while, ranks and all, accuses nobody.
                Err(RecvTimeoutError::Timeout) => *left = left.saturating_sub(WAITING_SLICE),
                // The ranks' threads hold the other end until they have answered.
                Err(RecvTimeoutError::Disconnected) => return Err("all ranks are gone".to_string()),
            }
        }
    }

    /// What went wrong first, as far as the ranks say so within a short time.
    fn cause(&mut self, rank: usize, failure: RankFailure) -> String {
        let mut found = (rank, failure);
        let until = Instant::now() + FAILURE_GRACE;
        while found.1.from_peer {
            let left = until.saturating_duration_since(Instant::now());
            match self.ranks.answers().recv_timeout(left) {
                Ok((rank, RankAnswer::Failed(failure))) => found = (rank, failure),
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
            }
        }
        self.lost_device = found.1.device;
        format!("rank {} failed: {}", found.0, found.1.why)
    }

    /// Publishes the numbers, then tells the callers: who sees the end of a request sees it counted.
    fn report(&mut self) {
        *lock(&self.callers.shared.stats) = self.scheduler.stats();
        self.scheduler.take_updates(&mut self.updates);
        for (id, update) in self.updates.drain(..) {
            self.callers.tell(id, update);
        }
    }
}

/// Everyone who waits for events.
struct Callers {
    live: HashMap<RequestId, Caller>,
    shared: Arc<Shared>,
    timing: Option<Arc<dyn TimingObserver>>,
    /// Requests admitted since this was last looked at.
    admitted: usize,
}

/// One request as its caller sees it.
struct Caller {
    events: mpsc::Sender<Event>,
    request: Arc<Request>,
    submitted: Instant,
    admitted: Option<Instant>,
    first_token: Option<Instant>,
    latest_token: Option<Instant>,
    tokens: usize,
}

impl Callers {
    fn add(&mut self, submission: Submission) {
        let Submission { id, request, events, submitted } = submission;
        let caller = Caller {
            events,
            request,
            submitted,
            admitted: None,
            first_token: None,
            latest_token: None,
            tokens: 0,
        };
        self.live.insert(id, caller);
    }

    /// A step took so long; those admitted with it are counted where others still wait.
    fn note_pace(&mut self, duration: Duration) {
        let mut queue = lock(&self.shared.queue);
        let admitted = std::mem::take(&mut self.admitted);
        if queue.requests() > 0 {
            queue.note_pace(admitted, duration);
        }
    }

    fn tell(&mut self, id: RequestId, update: Update) {
        match update {
            Update::Admitted => {
                if let Some(caller) = self.live.get_mut(&id) {
                    caller.admitted = Some(Instant::now());
                    self.admitted += 1;
                    lock(&self.shared.queue).leave(caller.request.prompt.len());
                }
            }
            Update::Event(Event::Finished(finished)) => self.finish(id, finished),
            Update::Event(event) => {
                let Some(caller) = self.live.get_mut(&id) else { return };
                if let Event::Token(_) = event {
                    caller.note_token(self.timing.as_deref());
                }
                caller.send(event);
            }
        }
    }

    fn finish(&mut self, id: RequestId, finished: Finished) {
        let Some(caller) = self.live.remove(&id) else { return };
        if caller.admitted.is_none() {
            lock(&self.shared.queue).leave(caller.request.prompt.len());
        }
        if let Some(timing) = &self.timing {
            timing.on_finish(&caller.timing(&finished.reason));
        }
        caller.send(Event::Finished(finished));
    }

    /// Ends every request with an error, after the scheduler's state is lost.
    fn fail_all(&mut self, why: &str) {
        let reason = FinishReason::Error(why.to_string());
        {
            let mut stats = lock(&self.shared.stats);
            stats.running = 0;
            stats.waiting = 0;
            self.live.values().for_each(|_| stats.outcomes.count(&reason));
        }
        let ids: Vec<RequestId> = self.live.keys().copied().collect();
        for id in ids {
            self.finish(id, Finished { reason: reason.clone(), cached_tokens: 0, captured: None });
        }
    }
}

impl Caller {
    fn note_token(&mut self, timing: Option<&dyn TimingObserver>) {
        let now = Instant::now();
        if let Some(timing) = timing {
            match self.latest_token {
                None => timing.on_first_token(now - self.submitted),
                Some(latest) => timing.on_next_token(now - latest),
            }
        }
        self.first_token.get_or_insert(now);
        self.latest_token = Some(now);
        self.tokens += 1;
    }

    /// The queue has room for all events of a request, so the only failure is a caller that has left.
    fn send(&self, event: Event) {
        if let Err(mpsc::error::TrySendError::Full(_)) = self.events.try_send(event) {
            panic!("more than {} events of one request", self.events.max_capacity());
        }
    }

    fn timing(&self, reason: &FinishReason) -> RequestTiming {
        let now = Instant::now();
        RequestTiming {
            queue: self.admitted.map(|admitted| admitted - self.submitted),
            prefill: self.admitted.zip(self.first_token).map(|(admitted, first)| first - admitted),
            decode: self.first_token.map(|first| now - first),
            total: now - self.submitted,
            prompt_tokens: self.request.prompt.len(),
            generated_tokens: self.tokens,
            reason: reason.clone(),
        }
    }
}
