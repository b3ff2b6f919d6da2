//! The engine from outside: [`EngineHandle`] takes requests, [`RequestStream`] hands out what they report.
//!
//! Back-pressure: the queue of a request's events has room for all it can ever report (`max_tokens` and the end), so
//! the engine never waits for a reader and a slow one costs only what was admitted with its request. A caller that
//! wants to give up on a reader drops the stream.

use super::RequestId;
use super::migration::{Experts, MigrationProgress, MoveCost, check_shape};
use super::mover::{MigrationOrder, MigrationReport, UnderWay};
use super::options::{EngineOptions, SchedulingPolicy};
use super::queue::Queue;
use super::rebalance::{RebalanceStatus, Record};
use super::request::{Event, FinishReason, Finished, Request, Sampling};
use super::stats::EngineStats;
use crate::error::{CONTEXT_PHRASE, Error, Result};
use router_sim::placement::Placement;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, mpsc as sync_mpsc};
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};

/// What the engine thread is told.
pub(super) enum Command {
    /// More requests.
    Submit(Vec<Submission>),
    /// Its caller left.
    Abort(RequestId),
    /// Let the experts live elsewhere.
    Move(MigrationOrder),
    /// Finish what is there until then, abort the rest, and end.
    Shutdown(Instant),
}

/// A validated request on its way to the scheduler.
pub(super) struct Submission {
    pub id: RequestId,
    pub request: Arc<Request>,
    pub events: mpsc::Sender<Event>,
    pub submitted: Instant,
}

/// What handles and the engine thread share.
pub(super) struct Shared {
    pub options: EngineOptions,
    /// No rank failed and the engine thread runs.
    pub alive: AtomicBool,
    /// New requests are taken.
    pub open: AtomicBool,
    /// Requests submitted and not yet admitted for the first time. As `stats`.
    pub queue: Mutex<Queue>,
    pub rejected: AtomicU64,
    /// A std lock: held for a copy of plain numbers, never across an await.
    pub stats: Mutex<EngineStats>,
    /// What became of rebalancing. As `stats`.
    pub rebalancing: Arc<Mutex<Record>>,
    /// Why the engine died, once it has.
    pub failure: Mutex<Option<Failure>>,
    /// Where the experts live, if the engine knows.
    experts: Option<Experts>,
    /// The migration under way.
    pub under_way: Arc<UnderWay>,
    next_id: AtomicU64,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// The engine thread has nothing more to do.
    ended: (Mutex<bool>, Condvar),
}

/// Why the engine died.
pub(super) struct Failure {
    pub why: String,
    /// The device that failed or is full, where that is why.
    pub device: Option<String>,
}

impl Shared {
    pub(super) fn new(options: EngineOptions, stats: EngineStats, experts: Option<Experts>) -> Self {
        Shared {
            options,
            alive: AtomicBool::new(true),
            open: AtomicBool::new(true),
            queue: Mutex::default(),
            rejected: AtomicU64::new(0),
            stats: Mutex::new(stats),
            rebalancing: Arc::default(),
            failure: Mutex::new(None),
            experts,
            under_way: Arc::default(),
            next_id: AtomicU64::new(0),
            thread: Mutex::new(None),
            ended: Default::default(),
        }
    }

    /// Tells those who wait for the end.
    pub(super) fn note_end(&self) {
        *lock(&self.ended.0) = true;
        self.ended.1.notify_all();
    }

    /// Why no more requests are taken.
    fn stopped(&self) -> Error {
        let failure = lock(&self.failure);
        Error::Stopped(failure.as_ref().map_or("it is shutting down", |failure| &failure.why).to_owned())
    }
}

/// Locks plain data; a panic of another holder leaves it as valid as before.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// A running engine. Clones are handles to the same engine.
#[derive(Clone)]
pub struct EngineHandle {
    shared: Arc<Shared>,
    commands: sync_mpsc::Sender<Command>,
}

impl EngineHandle {
    pub(super) fn new(
        shared: Arc<Shared>,
        commands: sync_mpsc::Sender<Command>,
        thread: JoinHandle<()>,
    ) -> Self {
        *lock(&shared.thread) = Some(thread);
        EngineHandle { shared, commands }
    }

    /// Queues a request and returns the stream of its events. Never waits.
    ///
    /// # Errors
    /// * [`Error::Request`] when it can never run: ids outside the vocabulary, longer than the context or than the KV
    ///   pool, sampling parameters out of range. Each names the parameter, the limit and the value.
    /// * [`Error::Busy`] when the queue is full.
    /// * [`Error::Stopped`] when the engine has failed or is shutting down.
    pub fn submit(&self, request: Request) -> Result<RequestStream> {
        let mut streams = self.submit_all(vec![request])?;
        Ok(streams.pop().expect("one stream for one request"))
    }

    /// [`Self::submit`] for several requests that belong together: all are queued, next to one another, or none.
    ///
    /// # Errors
    /// As there, and [`Error::Request`] for more of them than the queue could ever hold.
    pub fn submit_all(&self, requests: Vec<Request>) -> Result<Vec<RequestStream>> {
        let rejected = |error: Error| {
            self.shared.rejected.fetch_add(1, Ordering::Relaxed);
            error
        };
        let options = &self.shared.options;
        requests.iter().try_for_each(|request| validate(request, options)).map_err(rejected)?;
        if !self.shared.open.load(Ordering::Acquire) {
            return Err(rejected(self.shared.stopped()));
        }
        let count = requests.len();
        let tokens = requests.iter().map(|request| request.prompt.len()).sum();
        lock(&self.shared.queue).enter(count, tokens, options).map_err(rejected)?;

        let first_id = self.shared.next_id.fetch_add(count as u64, Ordering::Relaxed);
        let (submissions, streams) =
            (first_id..).zip(requests).map(|(id, request)| self.open(id, request)).unzip();
        if let Err(refused) = self.commands.send(Command::Submit(submissions)) {
            let Command::Submit(submissions) = refused.0 else { unreachable!("it was just sent") };
            let mut queue = lock(&self.shared.queue);
            submissions.iter().for_each(|submission| queue.leave(submission.request.prompt.len()));
            return Err(rejected(self.shared.stopped()));
        }
        Ok(streams)
    }

    /// Both ends of one request.
    fn open(&self, id: RequestId, request: Request) -> (Submission, RequestStream) {
        // Room for the prompt's event, every token and the end.
        let (events, received) = mpsc::channel(request.max_tokens.saturating_add(2));
        let submission = Submission { id, request: Arc::new(request), events, submitted: Instant::now() };
        (submission, RequestStream { id, events: received, handle: self.clone(), ended: false })
    }

    /// Gauges and counters after the latest step: one short lock, no waiting for the engine.
    pub fn stats(&self) -> EngineStats {
        let mut stats = *lock(&self.shared.stats);
        stats.outcomes.rejected = self.shared.rejected.load(Ordering::Relaxed);
        // Those the scheduler has not seen yet wait too.
        stats.waiting = stats.waiting.max(lock(&self.shared.queue).requests());
        stats
    }

    /// What rebalancing did, does, and why: one short lock, no waiting for the engine.
    pub fn rebalance_status(&self) -> RebalanceStatus {
        let mut status = lock(&self.shared.rebalancing).status(Instant::now());
        if let Some(experts) = &self.shared.experts {
            status.placement_version = experts.in_force.placement().version();
            status.placement_age = experts.in_force.age();
        }
        status.migration = self.migration();
        status
    }

    /// Where the experts live now; `None` when the engine does not know. The ranks of the next step know the same.
    pub fn placement(&self) -> Option<Arc<Placement>> {
        self.shared.experts.as_ref().map(|experts| experts.in_force.placement())
    }

    /// How long they have lived there; `None` when the engine does not know.
    pub fn placement_age(&self) -> Option<Duration> {
        self.shared.experts.as_ref().map(|experts| experts.in_force.age())
    }

    /// The migration under way, if there is one.
    pub fn migration(&self) -> Option<MigrationProgress> {
        *lock(&self.shared.under_way)
    }

    /// Lets the experts live where `target` says, while requests go on: weights move between steps, and each of the
    /// valid placements on the way comes into force on all ranks at once. Returns at once; the receiver hears how it ended, and
    /// fails when the engine does. The version number of `target` does not matter: versions in force count up.
    ///
    /// # Errors
    /// * [`Error::Config`] when experts cannot move in this engine.
    /// * [`Error::Routing`] when `target` is for other ranks, slots, layers or experts.
    /// * [`Error::Conflict`] while another migration is under way.
    /// * [`Error::Stopped`] when the engine has failed or is shutting down.
    pub fn move_to(&self, target: Placement) -> Result<oneshot::Receiver<MigrationReport>> {
        check_shape(&self.movable()?.in_force.placement(), &target)?;
        if !self.shared.open.load(Ordering::Acquire) {
            return Err(self.shared.stopped());
        }
        {
            let mut under_way = lock(&self.shared.under_way);
            check_idle(*under_way)?;
            *under_way = Some(MigrationProgress::default());
        }
        let (caller, report) = oneshot::channel();
        let gains = gains(&target);
        let order = MigrationOrder { target, gains, caller: Some(caller) };
        self.commands.send(Command::Move(order)).map_err(|_| {
            *lock(&self.shared.under_way) = None;
            self.shared.stopped()
        })?;
        Ok(report)
    }

    /// What [`Self::move_to`] the same target would take. Plans the whole way: milliseconds for large models.
    ///
    /// # Errors
    /// [`Error::Config`] and [`Error::Routing`], as there.
    pub fn move_cost(&self, target: &Placement) -> Result<MoveCost> {
        let experts = self.movable()?;
        check_shape(&experts.in_force.placement(), target)?;
        Ok(experts.cost(target, &gains(target)))
    }

    /// Whether [`Self::move_to`] could begin now, whatever its target.
    ///
    /// # Errors
    /// [`Error::Config`] and [`Error::Conflict`], as there.
    pub fn can_move(&self) -> Result<()> {
        self.movable()?;
        check_idle(self.migration())
    }

    /// The experts, if they can move at all.
    fn movable(&self) -> Result<&Experts> {
        let fixed = |why: &str| Error::config("placement", why);
        let experts = self.shared.experts.as_ref();
        let experts = experts.ok_or_else(|| fixed("this engine does not know where its experts live"))?;
        if experts.staging_slots == 0 {
            return Err(fixed("experts stay where they are: there is no staging place (--staging-slots 0)"));
        }
        Ok(experts)
    }

    /// What the engine runs with.
    pub fn options(&self) -> &EngineOptions {
        &self.shared.options
    }

    /// All ranks work; false after a failure and after the end of a shutdown.
    pub fn is_alive(&self) -> bool {
        self.shared.alive.load(Ordering::Acquire)
    }

    /// [`Error::Device`] when the engine died because of a device: what was on it is lost, and only a new process can use it again.
    pub fn lost_device(&self) -> Option<Error> {
        let failure = lock(&self.shared.failure);
        let Failure { why, device } = failure.as_ref()?;
        Some(Error::Device { device: device.clone()?, why: why.clone() })
    }

    /// New requests are taken; false from the first moment of a shutdown on.
    pub fn is_open(&self) -> bool {
        self.is_alive() && self.shared.open.load(Ordering::Acquire)
    }

    /// Takes no more requests, lets those there finish for up to `drain`, aborts the rest, and waits for the engine's
    /// threads. Blocks: call it from a blocking context. A second call with a shorter time hastens the end of the first.
    pub fn shutdown(&self, drain: Duration) {
        self.shutdown_within(drain, Duration::MAX);
    }

    /// [`Self::shutdown`] that waits for a step under way no longer than `patience` beyond `drain`. `false` when the
    /// engine still computes then: its threads are left alone.
    pub fn shutdown_within(&self, drain: Duration, patience: Duration) -> bool {
        let far = Duration::from_secs(365 * 24 * 3600);
        // An engine that has ended already no longer listens, which is as good.
        let _ = self.commands.send(Command::Shutdown(Instant::now() + drain.min(far)));
        self.shared.open.store(false, Ordering::Release);
        let (ended, end) = &self.shared.ended;
        let limit = drain.min(far).saturating_add(patience.min(far));
        let ended = end.wait_timeout_while(lock(ended), limit, |ended| !*ended);
        let ended = *ended.unwrap_or_else(std::sync::PoisonError::into_inner).0;
        // Held while waiting, so that a second caller waits as well.
        let mut thread = lock(&self.shared.thread);
        if let Some(thread) = thread.take_if(|_| ended) {
            // Its panic was caught and reported to every request.
            let _ = thread.join();
        }
        ended
    }
}

/// The events of one request: tokens, then exactly one [`Event::Finished`], then nothing. Dropping it aborts the
/// request and frees its KV blocks before the next step.
pub struct RequestStream {
    id: RequestId,
    events: mpsc::Receiver<Event>,
    handle: EngineHandle,
    ended: bool,
}

impl RequestStream {
    /// The request's number, as in plans and traces.
    pub fn id(&self) -> RequestId {
        self.id
    }

    /// The next event; `None` after the end.
    pub async fn next(&mut self) -> Option<Event> {
        std::future::poll_fn(|context| self.poll_event(context)).await
    }

    /// The next event, for callers outside async code.
    ///
    /// # Panics
    /// Inside an async context, where it would block a socket thread.
    pub fn blocking_next(&mut self) -> Option<Event> {
        if self.ended {
            return None;
        }
        let event = self.events.blocking_recv();
        Some(self.checked(event))
    }

    /// Ends the request early. Its events go on until [`Event::Finished`], which has what was captured until then.
    pub fn abort(&self) {
        if !self.ended {
            // A stopped engine has nothing to abort.
            let _ = self.handle.commands.send(Command::Abort(self.id));
        }
    }

    fn poll_event(&mut self, context: &mut Context<'_>) -> Poll<Option<Event>> {
        if self.ended {
            return Poll::Ready(None);
        }
        self.events.poll_recv(context).map(|event| Some(self.checked(event)))
    }

    /// Notes the end, and makes one up when the engine vanished without saying so.
    fn checked(&mut self, event: Option<Event>) -> Event {
        let event = event.unwrap_or_else(|| {
            let reason = FinishReason::Error(self.handle.shared.stopped().to_string());
            Event::Finished(Finished { reason, cached_tokens: 0, captured: None })
        });
        self.ended = matches!(event, Event::Finished(_));
        event
    }
}

impl tokio_stream::Stream for RequestStream {
    type Item = Event;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Event>> {
        self.get_mut().poll_event(context)
    }
}

impl Drop for RequestStream {
    fn drop(&mut self) {
        self.abort();
    }
}

/// Refuses a second migration.
fn check_idle(under_way: Option<MigrationProgress>) -> Result<()> {
    match under_way {
        None => Ok(()),
        Some(MigrationProgress { arrived, arrivals, .. }) => Err(Error::Conflict(format!(
            "another migration is under way: {arrived} of {arrivals} experts have arrived; try again when it has ended"
        ))),
    }
}

/// Who asks for a placement wants all of it: no layer goes first for what it wins.
fn gains(target: &Placement) -> Vec<f64> {
    vec![1.0; target.layers()]
}

/// Refuses what could never run.
fn validate(request: &Request, options: &EngineOptions) -> Result<()> {
    let prompt = request.prompt.len();
    if prompt == 0 {
        return Err(Error::request("prompt", "the prompt is empty; it needs at least 1 token"));
    }
    if let Some((at, id)) = first_outside(&request.prompt, options.vocab_size) {
        return Err(Error::request(
            "prompt",
            format!("token {at} of the prompt is {id}, but ids are below {}", options.vocab_size),
        ));
    }
    let total = prompt.saturating_add(request.max_tokens);
    if total > options.max_model_len {
        let param = if prompt > options.max_model_len { "prompt" } else { "max_tokens" };
        return Err(Error::request(
            param,
            format!(
                "{CONTEXT_PHRASE} {} tokens. However, you requested {total} tokens ({prompt} in \
                 the prompt, {} to generate). Please reduce the length of either.",
                options.max_model_len, request.max_tokens
            ),
        ));
    }
    // The last generated token is reported, never stored.
    let stored = prompt + request.max_tokens.saturating_sub(1);
    if stored > options.kv_tokens() {
        return Err(Error::request(
            "max_tokens",
            format!(
                "{prompt} prompt tokens and {} to generate need room for {stored}, but the KV cache holds {} ({} blocks \
                 of {})",
                request.max_tokens,
                options.kv_tokens(),
                options.kv_blocks,
                options.block_size
            ),
        ));
    }
    if request.priority != 0 && options.scheduling_policy != SchedulingPolicy::Priority {
        let message = format!(
            "priority is {}, but must be 0: this server runs requests in order of arrival (--scheduling-policy)",
            request.priority
        );
        return Err(Error::request("priority", message));
    }
    validate_sampling(request, options)
}

fn validate_sampling(request: &Request, options: &EngineOptions) -> Result<()> {
    let Sampling { temperature, top_p, min_p, repetition_penalty, .. } = request.sampling;
    let Sampling { presence_penalty, frequency_penalty, min_tokens, .. } = request.sampling;
    let numbers = [
        ("temperature", temperature, temperature >= 0.0, "0 or more"),
        ("top_p", top_p, top_p > 0.0 && top_p <= 1.0, "above 0 and at most 1"),
        ("min_p", min_p, (0.0..=1.0).contains(&min_p), "between 0 and 1"),
        ("repetition_penalty", repetition_penalty, repetition_penalty > 0.0, "above 0"),
        ("presence_penalty", presence_penalty, true, "finite"),
        ("frequency_penalty", frequency_penalty, true, "finite"),
    ];
    for (name, value, allowed, expected) in numbers {
        if !allowed || !value.is_finite() {
            return Err(Error::request(name, format!("{name} is {value}, but must be {expected}")));
        }
    }
    if min_tokens > request.max_tokens {
        let message = format!("min_tokens is {min_tokens}, but max_tokens is {}", request.max_tokens);
        return Err(Error::request("min_tokens", message));
    }
    for (name, count) in [("logprobs", request.logprobs), ("prompt_logprobs", request.prompt_logprobs)] {
        if let Some(n) = count.filter(|&n| n > options.vocab_size) {
            let message = format!("{name} is {n}, but the vocabulary has {} tokens", options.vocab_size);
            return Err(Error::request(name, message));
        }
    }
    validate_token_lists(&request.sampling, options.vocab_size)
}

fn validate_token_lists(sampling: &Sampling, vocab_size: usize) -> Result<()> {
    let biased: Vec<u32> = sampling.logit_bias.iter().map(|&(token, _)| token).collect();
    let allowed = sampling.allowed_tokens.as_deref();
    let lists = sampling.bad_words.iter().map(|word| ("bad_words", &word[..]));
    let lists =
        lists.chain([("logit_bias", &biased[..])]).chain(allowed.map(|list| ("allowed_token_ids", list)));
    for (name, ids) in lists {
        if let Some((_, id)) = first_outside(ids, vocab_size) {
            let message = format!("{name} has the token {id}, but ids are below {vocab_size}");
            return Err(Error::request(name, message));
        }
        if ids.is_empty() && name != "logit_bias" {
            return Err(Error::request(name, format!("{name} must not hold an empty list")));
        }
    }
    if let Some(&(token, bias)) = sampling.logit_bias.iter().find(|(_, bias)| !bias.is_finite()) {
        let message = format!("logit_bias of token {token} is {bias}, but must be finite");
        return Err(Error::request("logit_bias", message));
    }
    Ok(())
}

/// The first id that is no token: its place and value.
fn first_outside(ids: &[u32], vocab_size: usize) -> Option<(usize, u32)> {
    ids.iter().copied().enumerate().find(|&(_, id)| id as usize >= vocab_size)
}
