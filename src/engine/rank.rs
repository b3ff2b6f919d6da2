//! One rank: an OS thread that runs the model on every plan and samples the logit rows it owns.

use super::Hooks;
use super::mover::{Orders, SliceAnswer};
use super::options::EngineOptions;
use super::plan::{RowResult, StepPlan, SubPlan};
use super::request::TokenEvent;
use super::sampler::{Sampler, draw_of};
use crate::backend::draw::Draw;
use crate::backend::{Backend, DType, Tensor};
use crate::error::{Error, Result};
use crate::metrics::{self, RankMeter};
use crate::model::{Model, Routing, StepOutput};
use crate::moe::migrate::{Slice, Switch};
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// One rank as the engine takes it over. The ranks of one tensor-parallel group have the same `dp_rank`; together they
/// own every row of its sub-plan exactly once.
pub struct RankSetup {
    /// This rank's shard, with its communicators and KV cache inside.
    pub model: Box<dyn Model>,
    /// Reads the logits.
    pub backend: Arc<dyn Backend>,
    /// Reused by every step; `logits` is `[at least max_logit_rows, vocab_size]` f32.
    pub output: StepOutput,
    /// Which sub-plan this rank computes, from 0 without gaps.
    pub dp_rank: usize,
    /// What the rank's time goes into: the model writes its own work, the engine the sampling.
    pub meter: Arc<RankMeter>,
}

/// Watches every step on every rank, from that rank's own thread, which waits meanwhile: implementations copy what
/// they need and return.
pub trait StepObserver: Send + Sync {
    /// Asked once before each step, from the engine thread: must the model fill [`StepOutput::routing`]?
    fn wants_routing(&self) -> bool {
        true
    }

    /// The step is computed. `rank` is the index of the [`RankSetup`]; `output` describes the rows it owns of
    /// `plan.sub_plans[dp_rank]`.
    /// It took `duration` on this rank.
    fn on_step(&self, plan: &StepPlan, rank: usize, dp_rank: usize, output: &StepOutput, duration: Duration);
}

/// Refuses setups that do not fit together or not the options.
pub(super) fn check_setups(ranks: &[RankSetup], options: &EngineOptions) -> Result<()> {
    let dp_size = dp_size(ranks);
    for dp_rank in 0..dp_size.max(1) {
        if !ranks.iter().any(|rank| rank.dp_rank == dp_rank) {
            return Err(Error::config(
                "--data-parallel-size",
                format!("no rank computes sub-plan {dp_rank} of {}", dp_size.max(1)),
            ));
        }
    }
    for (index, rank) in ranks.iter().enumerate() {
        let logits = &rank.output.logits;
        let fits = logits.dtype() == DType::F32
            && logits.cols() == options.vocab_size
            && logits.rows() >= options.max_logit_rows;
        if !fits {
            return Err(Error::config(
                "max_logit_rows",
                format!(
                    "rank {index} has room for [{}, {}] {:?} logits, [{}, {}] F32 are needed",
                    logits.rows(),
                    logits.cols(),
                    logits.dtype(),
                    options.max_logit_rows,
                    options.vocab_size
                ),
            ));
        }
    }
    Ok(())
}

/// DP ranks among these ranks.
pub(super) fn dp_size(ranks: &[RankSetup]) -> usize {
    ranks.iter().map(|rank| rank.dp_rank + 1).max().unwrap_or(0)
}

/// What one rank hands back; its buffers travel to the rank and back.
#[derive(Default)]
pub(super) struct RankReport {
    /// Results of the logit rows it owns.
    pub rows: Vec<RowResult>,
    /// Expert choices of its rows, where captured.
    pub routing: Option<Routing>,
}

/// Why a rank can no longer go on.
pub(super) struct RankFailure {
    pub why: String,
    /// It only saw another rank fail.
    pub from_peer: bool,
    /// The device that failed or is full, where that is why.
    pub device: Option<String>,
}

impl RankFailure {
    fn of(error: &Error) -> RankFailure {
        let device = match error {
            Error::Device { device, .. } | Error::Memory { device, .. } => Some(device.clone()),
            _ => None,
        };
        RankFailure { why: error.to_string(), from_peer: matches!(error, Error::Peer { .. }), device }
    }
}

/// What a rank answers.
pub(super) enum RankAnswer {
    /// To a plan.
    Step(RankReport),
    /// To a slice of expert weights.
    Slice(SliceAnswer),
    /// It can no longer go on.
    Failed(RankFailure),
}

/// What one rank does next, in this order.
struct Work {
    switch: Option<Arc<Switch>>,
    step: Option<(Arc<StepPlan>, RankReport)>,
    slice: Option<Arc<Slice>>,
}

/// The rank threads as the engine thread sees them.
pub(super) struct Ranks {
    dp_ranks: Vec<usize>,
    work: Vec<SyncSender<Work>>,
    answers: Receiver<(usize, RankAnswer)>,
    threads: Vec<JoinHandle<()>>,
}

impl Ranks {
    /// Starts one thread per setup.
    pub fn start(setups: Vec<RankSetup>, hooks: &Hooks) -> Self {
        let (sender, answers) = channel();
        let dp_ranks = setups.iter().map(|setup| setup.dp_rank).collect();
        let mut work = Vec::new();
        let mut threads = Vec::new();
        for (index, setup) in setups.into_iter().enumerate() {
            let (work_sender, work_receiver) = sync_channel(1);
            let rank = Rank {
                index,
                setup,
                observer: hooks.steps.clone(),
                sampler: Sampler::default(),
                logits: Vec::new(),
                chosen: Chosen::default(),
            };
            let answers = sender.clone();
            let thread = std::thread::Builder::new()
                .name(format!("rank-{index}"))
                .spawn(move || rank.run(work_receiver, answers))
                .expect("the system refuses one more thread");
            work.push(work_sender);
            threads.push(thread);
        }
        Ranks { dp_ranks, work, answers, threads }
    }

    /// Ranks.
    pub fn len(&self) -> usize {
        self.work.len()
    }

    /// The sub-plan that a rank computes.
    pub fn dp_rank(&self, rank: usize) -> usize {
        self.dp_ranks[rank]
    }

    /// Gives one rank its work. A rank that has died answers by its failure, not here.
    pub fn send(&self, rank: usize, step: Option<(Arc<StepPlan>, RankReport)>, orders: &Orders) {
        let Orders { switch, slice } = orders;
        // The channel has room: a rank gets new work only after it has answered the last step.
        let _ = self.work[rank].send(Work { switch: switch.clone(), step, slice: slice.clone() });
    }

    /// Answers in the order they come.
    pub fn answers(&self) -> &Receiver<(usize, RankAnswer)> {
        &self.answers
    }

    /// Ends the threads: all of them are idle now.
    pub fn join(self) {
        drop(self.work);
        for thread in self.threads {
            // A panic inside was caught and answered.
            let _ = thread.join();
        }
    }
}

/// The state of one rank thread.
struct Rank {
    index: usize,
    setup: RankSetup,
    observer: Option<Arc<dyn StepObserver>>,
    sampler: Sampler,
    /// Some logit rows in host memory; `[rows][vocab]`.
    logits: Vec<f32>,
    chosen: Chosen,
}

/// What the device chose.
#[derive(Default)]
struct Chosen {
    /// How the token of each logit row is drawn; that of one that asks for more is greedy, and does not count.
    draws: Vec<Draw>,
    /// The token of each logit row, and its elements that are not finite: on the device, and copied to the host.
    on_device: Option<Tensor>,
    found: Vec<[i32; 2]>,
    /// The token of each logit row that asks for no more.
    tokens: Vec<Option<u32>>,
}

/// Logits that are copied to the host at once: enough that a GPU is asked rarely, few enough for the caches of a CPU.
const LOGIT_BYTES: usize = 4 << 20;

impl Rank {
    fn run(mut self, work: Receiver<Work>, answers: Sender<(usize, RankAnswer)>) {
        let index = self.index;
        for work in work {
            let outcome = catch_unwind(AssertUnwindSafe(|| self.work(work, &answers)));
            let failure = match outcome {
                Ok(Ok(())) => continue,
                Ok(Err(error)) => RankFailure::of(&error),
                Err(panic) => RankFailure { why: panic_text(panic.as_ref()), from_peer: false, device: None },
            };
            // The model goes first: with it goes this rank's end of the communicator, which frees the others.
            drop(self);
            let _ = answers.send((index, RankAnswer::Failed(failure)));
            return;
        }
    }

    fn work(&mut self, work: Work, answers: &Sender<(usize, RankAnswer)>) -> Result<()> {
        let Work { switch, step, slice } = work;
        if let Some(switch) = switch {
            self.setup.model.switch(&switch);
        }
        // An engine thread that no longer listens gives no more work either.
        if let Some((plan, mut report)) = step {
            self.step(&plan, &mut report)?;
            // The engine thread writes the next plan into the same memory as soon as it has all answers.
            drop(plan);
            let _ = answers.send((self.index, RankAnswer::Step(report)));
        }
        if let Some(slice) = slice {
            let answer = self.transfer(&slice)?;
            drop(slice);
            let _ = answers.send((self.index, RankAnswer::Slice(answer)));
        }
        Ok(())
    }

    /// Moves expert weights. A failure that leaves the ranks in step ends the migration, not the rank.
    fn transfer(&mut self, slice: &Slice) -> Result<SliceAnswer> {
        let started = Instant::now();
        let RankSetup { model, meter, .. } = &mut self.setup;
        meter.beat();
        let outcome = match model.transfer(slice) {
            Err(gone @ Error::Peer { .. }) => return Err(gone),
            other => other.map_err(|error| error.to_string()),
        };
        meter.rest();
        Ok(SliceAnswer { outcome, took: started.elapsed() })
    }

    fn step(&mut self, plan: &StepPlan, report: &mut RankReport) -> Result<()> {
        let started = Instant::now();
        let RankSetup { model, output, dp_rank, .. } = &mut self.setup;
        let sub = &plan.sub_plans[*dp_rank];
        model.forward(&sub.batch(sub.capture_routing || plan.observe_routing), output)?;

        report.routing = sub.capture_routing.then(|| output.routing.clone());
        let computed = Instant::now();
        self.sample(plan, report)?;
        self.setup.meter.spend(metrics::Work::Sample, computed.elapsed());
        if let Some(observer) = &self.observer {
            let RankSetup { dp_rank, output, .. } = &self.setup;
            observer.on_step(plan, self.index, *dp_rank, output, started.elapsed());
        }
        self.setup.meter.rest();
        Ok(())
    }

    /// Does the jobs of the logit rows that this rank owns. Logits come to the host for those alone that ask for more than a token.
    fn sample(&mut self, plan: &StepPlan, report: &mut RankReport) -> Result<()> {
        self.choose(plan)?;
        let RankSetup { backend, output, dp_rank, .. } = &self.setup;
        let sub = &plan.sub_plans[*dp_rank];
        let tokens = &self.chosen.tokens;
        let vocab = output.logits.cols();
        let at_once = (LOGIT_BYTES / (vocab * DType::F32.bytes())).max(1);
        report.rows.clear();
        let mut next = 0;
        while let Some(&row) = output.logit_rows.get(next) {
            if let Some(token) = tokens[next] {
                let event = TokenEvent { token, logprob: None, rank: 0, top: Vec::new() };
                let job = job_of(self.index, sub, row) as u32;
                report.rows.push(RowResult { job, outcome: Ok(Some(event)), logits: None });
                next += 1;
                continue;
            }
            let rows = tokens[next..].iter().take(at_once).take_while(|token| token.is_none()).count();
            self.logits.resize(rows * vocab, 0.0);
            let logits = output.logits.view().rows_range(next..next + rows);
            backend.download(logits, bytemuck::cast_slice_mut(&mut self.logits))?;
            let wanted = &output.logit_rows[next..next + rows];
            for (&row, logits) in wanted.iter().zip(self.logits.chunks_exact(vocab)) {
                let job = job_of(self.index, sub, row);
                let (index, job) = (job as u32, &sub.jobs[job]);
                report.rows.push(self.sampler.run(index, job, sub.history_of(job), logits));
            }
            next += rows;
        }
        Ok(())
    }

    /// Lets the device choose the tokens of rows that ask for no more, if there are any.
    fn choose(&mut self, plan: &StepPlan) -> Result<()> {
        let RankSetup { backend, output, dp_rank, .. } = &self.setup;
        let sub = &plan.sub_plans[*dp_rank];
        let Chosen { draws, on_device, found, tokens } = &mut self.chosen;
        let rows = output.logit_rows.len();
        draws.clear();
        tokens.clear();
        for &row in &output.logit_rows {
            let draw = draw_of(&sub.jobs[job_of(self.index, sub, row)]);
            draws.push(draw.unwrap_or(Draw::GREEDY));
            // A placeholder where the device will say.
            tokens.push(draw.map(|_| 0));
        }
        if tokens.iter().all(Option::is_none) {
            return Ok(());
        }
        if on_device.as_ref().is_none_or(|chosen| chosen.rows() < rows) {
            *on_device = Some(backend.alloc(DType::I32, output.logits.rows(), 2)?);
        }
        let on_device = on_device.as_mut().expect("made above");
        backend.sample(output.logits.head(rows), draws, on_device.head_mut(rows))?;
        found.resize(rows, [0; 2]);
        backend.download(on_device.head(rows), bytemuck::cast_slice_mut(found))?;
        for (token, &[chosen, infinite]) in tokens.iter_mut().zip(found.iter()) {
            // What is wrong with a row, its logits tell.
            *token = token.and_then(|_| (infinite == 0).then_some(chosen as u32));
        }
        Ok(())
    }
}

/// Which job a logit row is for.
fn job_of(rank: usize, sub: &SubPlan, row: u32) -> usize {
    let job = sub.logit_rows.binary_search(&row);
    job.unwrap_or_else(|_| panic!("rank {rank} returned logits of row {row} unasked"))
}

/// What a panic said.
pub(super) fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("panicked: {}", text.unwrap_or("(no message)"))
}
