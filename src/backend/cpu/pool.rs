//! A fork-join pool: one per rank, the calling thread included. Made for steps of a few microseconds to a few
//! milliseconds that follow each other closely, on machines where ranks x threads may exceed the cores:
//! * a run allocates nothing; tasks are dealt by one atomic counter, so a slow core simply takes fewer, or by those who run
//!   them ([`Pool::run_each`]), who then need no counter;
//! * the caller never waits for a worker that has not started: a worker joins a run only while it is open, and
//!   a caller who has dealt the last task closes it;
//! * workers spin for a short, adaptive while and then park.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use crate::error::{Error, Result};

/// Bit of [`Shared::state`]: workers may join the current run.
const OPEN: u64 = 1;
/// One worker inside the current run, in [`Shared::state`].
const ACTIVE: u64 = 2;
/// All bits of the count of workers.
const ACTIVE_MASK: u64 = (1 << 32) - 2;
/// One run, in [`Shared::state`]; the number wraps around.
const RUN: u64 = 1 << 32;

/// Looks at the state between two yields of the core.
const SPINS_PER_YIELD: u32 = 512;
/// Longest and shortest wait before parking, in yields. A yield lets another rank's thread have the core.
const MAX_YIELDS: u32 = 16;
const MIN_YIELDS: u32 = 1;

/// A task body with its lifetime erased: it lives until its run is closed and left by all.
type Body = *const (dyn Fn(usize) + Sync);

/// What a worker needs to know about the current run.
#[derive(Clone, Copy)]
struct Job {
    body: Option<Body>,
    /// Tasks, or threads where each has its own.
    tasks: usize,
    dealing: Dealing,
}

/// Who runs which task.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Dealing {
    /// Whoever is free takes the next.
    Next,
    /// Each thread the one of its number.
    Own,
}

/// Keeps a hot atomic in a cache line of its own.
#[repr(align(128))]
struct OwnLine<T>(T);

struct Shared {
    /// In one line, so that a worker that sees an open run has its job too.
    run: OwnLine<Run>,
    /// The next task to deal.
    next: OwnLine<AtomicUsize>,
    /// The first panic of the current run.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// Where the caller waits for the last worker to leave.
    left: (Mutex<()>, Condvar),
    /// Workers that sleep, or are just about to.
    parked: AtomicUsize,
    stopping: AtomicBool,
}

struct Run {
    /// `RUN * run number | ACTIVE * workers inside | OPEN`.
    state: AtomicU64,
    /// Written by the caller while the state is closed with no worker inside; read by workers inside.
    job: UnsafeCell<Job>,
}

// SAFETY: `job` is the only field that is not Sync by itself. It is written only by the caller that holds `Pool::caller`,
// while the state is closed and no worker is inside (nobody reads); a worker reads it only after entering an open
// run (acquire), which the write precedes (release).
unsafe impl Sync for Shared {}
// SAFETY: the pointer in `job` refers to a `Sync` closure, which any thread may call.
unsafe impl Send for Shared {}

/// A fork-join pool of OS threads.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held by the thread whose run the workers serve.
    caller: Mutex<()>,
}

impl Pool {
    /// A pool of `threads` threads, the caller of [`Pool::run`] counting as one; 0 is taken as 1.
    ///
    /// # Errors
    /// [`Error::Memory`] when the operating system refuses a thread.
    pub fn new(threads: usize) -> Result<Pool> {
        let shared = Arc::new(Shared {
            run: OwnLine(Run {
                state: AtomicU64::new(0),
                job: UnsafeCell::new(Job { body: None, tasks: 0, dealing: Dealing::Next }),
            }),
            next: OwnLine(AtomicUsize::new(0)),
            panic: Mutex::new(None),
            left: (Mutex::new(()), Condvar::new()),
            parked: AtomicUsize::new(0),
            stopping: AtomicBool::new(false),
        });
        let mut pool = Pool { shared, workers: Vec::new(), caller: Mutex::new(()) };
        for number in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let worker = thread::Builder::new()
                .name(format!("compute-{number}"))
                .spawn(move || shared.serve(number))
                .map_err(|why| Error::Memory {
                    device: "cpu".into(),
                    sum: format!("thread {number} of {threads}: {why}"),
                })?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// Threads that work on a run, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `body(0)`, ..., `body(tasks - 1)`, each once, in any order and on any thread of the pool; returns when
    /// all have returned. A run from inside a task, or while another thread's run is going on, stays on its caller.
    ///
    /// # Panics
    /// With the first panic of a task, once no task is running; tasks not yet started are dropped. The pool stays usable.
    pub fn run(&self, tasks: usize, body: &(dyn Fn(usize) + Sync)) {
        if !self.start(tasks, Dealing::Next, body) {
            (0..tasks).for_each(body);
        }
    }

    /// Calls `body(0)` on this thread and, meanwhile, each other number below `threads` once at most, on a thread of its own: a
    /// thread that comes too late is not waited for, so `body(0)` must see to it that nothing is left undone. Where [`Pool::run`] would
    /// stay on its caller, this does.
    ///
    /// # Panics
    /// As [`Pool::run`].
    pub fn run_each(&self, threads: usize, body: &(dyn Fn(usize) + Sync)) {
        if !self.start(threads, Dealing::Own, body) && threads > 0 {
            body(0);
        }
    }

    /// Runs it with the workers, unless they are not there, not needed, or busy.
    fn start(&self, tasks: usize, dealing: Dealing, body: &(dyn Fn(usize) + Sync)) -> bool {
        if self.workers.is_empty() || tasks <= 1 {
            return false;
        }
        let Some(_caller) = try_lock(&self.caller) else {
            return false;
        };
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. The pointer is followed by workers inside this run only, and this
        // function returns (or unwinds) only after `close` has seen the last of them leave.
        let body: Body = unsafe { std::mem::transmute(std::ptr::from_ref(body)) };
        let job = Job { body: Some(body), tasks, dealing };
        shared.open(job);
        for worker in self.workers.iter().take(tasks - 1) {
            worker.thread().unpark();
        }
        shared.work(job, 0);
        shared.close();
        let panic = lock(&shared.panic).take();
        if let Some(panic) = panic {
            drop(_caller);
            resume_unwind(panic);
        }
        true
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Release);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches the panics of tasks and has no others.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// Starts a run. The state is closed and nobody is inside.
    fn open(&self, job: Job) {
        if job.dealing == Dealing::Next {
            self.next.0.store(0, Ordering::Relaxed);
        }
        // SAFETY: see `unsafe impl Sync`: nobody else reads or writes while the state is closed and empty.
        unsafe { *self.run.0.job.get() = job };
        let state = self.run.0.state.load(Ordering::Relaxed);
        assert_eq!(state & (OPEN | ACTIVE_MASK), 0, "a run is going on: state {state:#x}");
        self.run.0.state.store(state.wrapping_add(RUN) | OPEN, Ordering::Release);
    }

    /// Ends a run: lets nobody in any more and waits until nobody is inside.
    fn close(&self) {
        let mut inside = self.run.0.state.fetch_and(!OPEN, Ordering::Acquire) & ACTIVE_MASK;
        for spins in 1..=SPINS_PER_YIELD * MAX_YIELDS {
            if inside == 0 {
                return;
            }
            if spins.is_multiple_of(SPINS_PER_YIELD) {
                thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
            inside = self.run.0.state.load(Ordering::Acquire) & ACTIVE_MASK;
        }
        let (mutex, left) = &self.left;
        let mut guard = lock(mutex);
        while self.run.0.state.load(Ordering::Acquire) & ACTIVE_MASK != 0 {
            guard = left.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// What thread `number` has to do in a run: tasks until none is left, or its own.
    fn work(&self, job: Job, number: usize) {
        let body = job.body.expect("an open run has a body");
        let call = |task: usize| {
            let there_is = task < job.tasks;
            if there_is {
                // SAFETY: the run is open or this thread is inside it, so its caller is still in `start` and the body lives.
                unsafe { (*body)(task) };
            }
            there_is
        };
        let deal = || match job.dealing {
            Dealing::Next => while call(self.next.0.fetch_add(1, Ordering::Relaxed)) {},
            Dealing::Own => _ = call(number),
        };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(deal)) {
            // Deal no more; far from overflow, however many threads still count up.
            self.next.0.store(usize::MAX / 2, Ordering::Relaxed);
            lock(&self.panic).get_or_insert(panic);
        }
    }

    /// The life of a worker.
    fn serve(&self, number: usize) {
        let mut last_run = 0;
        let mut patience = MAX_YIELDS;
        while let Some(run) = self.enter(last_run, &mut patience) {
            last_run = run;
            // SAFETY: this thread is inside an open run; see `unsafe impl Sync`.
            let job = unsafe { *self.run.0.job.get() };
            self.work(job, number);
            let before = self.run.0.state.fetch_sub(ACTIVE, Ordering::Release);
            if before & (OPEN | ACTIVE_MASK) == ACTIVE {
                // Taking the lock makes sure that the caller is either not yet looking or already waiting.
                drop(lock(&self.left.0));
                self.left.1.notify_one();
            }
        }
    }

    /// Waits for an open run other than `last_run` and enters it; `None` when the pool ends. `patience` adapts: a
    /// wait that paid off doubles it, one that ended in parking halves it.
    fn enter(&self, last_run: u64, patience: &mut u32) -> Option<u64> {
        let mut spins = 0u32;
        let mut parked = false;
        loop {
            let state = self.run.0.state.load(Ordering::Acquire);
            if state & OPEN != 0 && state / RUN != last_run {
                let entered = state + ACTIVE;
                let done = self.run.0.state.compare_exchange_weak(
                    state,
                    entered,
                    Ordering::Acquire,
                    Ordering::Relaxed,
                );
                if done.is_ok() {
                    *patience = if parked { *patience / 2 } else { *patience * 2 };
                    *patience = (*patience).clamp(MIN_YIELDS, MAX_YIELDS);
                    return Some(state / RUN);
                }
                continue;
            }
            if self.stopping.load(Ordering::Acquire) {
                return None;
            }
            spins += 1;
            if !spins.is_multiple_of(SPINS_PER_YIELD) {
                std::hint::spin_loop();
            } else if spins / SPINS_PER_YIELD < *patience {
                thread::yield_now();
            } else {
                // Whoever opens a run after the look at the state above has left a token, with which this returns at once.
                self.parked.fetch_add(1, Ordering::Relaxed);
                thread::park();
                self.parked.fetch_sub(1, Ordering::Relaxed);
                parked = true;
                spins = 0;
            }
        }
    }
}

/// Locks a mutex whose data stays valid whatever happens: a panic elsewhere is no reason to fail.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// [`lock`], or `None` when another thread (or this one, further up) holds it.
pub(super) fn try_lock<T>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    match mutex.try_lock() {
        Ok(guard) => Some(guard),
        Err(std::sync::TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        Err(std::sync::TryLockError::WouldBlock) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::support::patience::eventually;

    fn count_each(pool: &Pool, tasks: usize) {
        let hits: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
        pool.run(tasks, &|t| {
            hits[t].fetch_add(1, Ordering::Relaxed);
        });
        assert!(hits.iter().all(|h| h.load(Ordering::Relaxed) == 1), "{tasks} tasks");
    }

    #[test]
    fn every_task_runs_once() {
        for threads in [0, 1, 2, 3, 7] {
            let pool = Pool::new(threads).unwrap();
            assert_eq!(pool.threads(), threads.max(1));
            for round in 0..300 {
                count_each(&pool, round % 19);
            }
        }
    }

    #[test]
    fn each_thread_has_a_number_of_its_own() {
        for threads in [1, 2, 3, 7] {
            let pool = Pool::new(threads).unwrap();
            for wanted in [0, 1, 2, 5, 9] {
                for _ in 0..100 {
                    let calls: Vec<AtomicUsize> =
                        (0..threads.max(wanted)).map(|_| AtomicUsize::new(0)).collect();
                    pool.run_each(wanted, &|number| {
                        calls[number].fetch_add(1, Ordering::Relaxed);
                    });
                    let calls: Vec<_> = calls.iter().map(|n| n.load(Ordering::Relaxed)).collect();
                    assert!(calls.iter().all(|&n| n <= 1), "{calls:?}");
                    assert_eq!(calls.first().copied().unwrap_or(0), wanted.min(1));
                    assert!(calls[wanted..].iter().all(|&n| n == 0), "{calls:?} of {wanted}");
                }
            }
        }
    }

    #[test]
    fn a_parked_pool_wakes() {
        let pool = Pool::new(3).unwrap();
        for _ in 0..3 {
            eventually("workers park", || pool.shared.parked.load(Ordering::Relaxed) == 2);
            // The caller would do all by itself if nobody came. Here tasks wait for each other, so each of three threads has one.
            let begun = AtomicUsize::new(0);
            pool.run(3, &|_| {
                begun.fetch_add(1, Ordering::Relaxed);
                eventually("workers wake", || begun.load(Ordering::Relaxed) == 3);
            });
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_survives() {
        for threads in [1, 2, 4] {
            let pool = Pool::new(threads).unwrap();
            for bad in [0, 5, 15] {
                let result = catch_unwind(AssertUnwindSafe(|| {
                    pool.run(16, &|t| assert!(t != bad, "task {t} fails"));
                }));
                let message = *result.unwrap_err().downcast::<String>().unwrap();
                assert!(message.contains(&format!("task {bad} fails")), "{message}");
                count_each(&pool, 16);
            }
            assert!(catch_unwind(AssertUnwindSafe(|| pool.run_each(2, &|_| panic!("each")))).is_err());
            count_each(&pool, 16);
        }
    }

    #[test]
    fn nested_and_concurrent_runs_stay_on_their_caller() {
        let pool = Pool::new(3).unwrap();
        let inner = AtomicUsize::new(0);
        let nest = || {
            pool.run(8, &|_| {
                pool.run(4, &|_| {
                    inner.fetch_add(1, Ordering::Relaxed);
                })
            });
        };
        thread::scope(|s| {
            s.spawn(nest);
            s.spawn(nest);
        });
        assert_eq!(inner.load(Ordering::Relaxed), 64);
    }
}
