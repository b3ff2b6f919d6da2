//! One rank's communicator: calls into NCCL, what came of them, and its end.

use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Arc, Mutex, TryLockError};
use std::time::{Duration, Instant};

use super::library::{Code, Config, Functions, Handle, IN_PROGRESS, SUCCESS, Stream, UniqueId};
use super::under_way::{Late, UnderWay};
use super::watch::Watch;
use crate::backend::{Backend, DeviceId};
use crate::comm::local::{Alarm, lock};
use crate::error::{Error, Result};

/// What a rank is given that waits for one that left, and a call or an exchange under way at the end.
const GRACE: Duration = Duration::from_secs(2);
/// How long an end in order may take before it becomes an abort: shorter, so that a rank that fails tells why before others tell
/// that it left.
const FINALIZE_GRACE: Duration = Duration::from_millis(500);
/// Polls without a pause: most calls are done by then.
const SPINS: u32 = 10_000;
const PAUSE: Duration = Duration::from_micros(50);

/// A communicator of NCCL.
pub(super) struct Link {
    /// NCCL writes it while it connects.
    handle: AtomicPtr<c_void>,
    /// Held during every call, so that a communicator is aborted between calls only; whether that has happened, or its end in order.
    closed: Mutex<bool>,
    /// What is under way in the stream.
    under_way: Mutex<UnderWay>,
    watch: Arc<Watch>,
    backend: Arc<dyn Backend>,
    /// Of the hosts' meetings of this group.
    alarm: Alarm,
    rank: usize,
}

/// Why everything must end.
pub(super) struct Trouble {
    pub why: String,
    /// It began with this rank, as far as it knows.
    pub own: bool,
}

/// Where a call stands in line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Line {
    /// In the backend's stream.
    Own,
    /// Beside what it is given next: see [`Backend::fork`].
    Beside,
}

/// Who connects to whom.
pub(super) struct Seat<'a> {
    pub rank: usize,
    pub size: usize,
    pub id: UniqueId,
    pub backend: &'a Arc<dyn Backend>,
    pub alarm: Alarm,
}

impl Link {
    /// Becomes a rank of the group `id`. Returns once all ranks have come.
    ///
    /// # Errors
    /// [`Error::Device`] with what NCCL says, [`Error::Peer`] when another rank fails.
    pub fn open(watch: &Arc<Watch>, seat: Seat<'_>) -> Result<Arc<Link>> {
        let Seat { rank, size, id, backend, alarm } = seat;
        let link = Arc::new(Link {
            handle: AtomicPtr::default(),
            closed: Mutex::default(),
            under_way: Mutex::default(),
            watch: Arc::clone(watch),
            backend: Arc::clone(backend),
            alarm,
            rank,
        });
        watch.add(&link);
        let mut config = Config::non_blocking();
        let opened = link.put("connecting", Line::Own, watch.options.connect_timeout, |functions, _, _| {
            // SAFETY: the handle's place lives as long as the link, which is kept should NCCL never end with it; NCCL copies the
            // configuration; `stream` made the device current.
            unsafe {
                (functions.comm_init)(link.handle.as_ptr(), size as c_int, id, rank as c_int, &mut config)
            }
        });
        match opened {
            Ok(()) => Ok(link),
            Err(error) => {
                link.close();
                Err(error)
            }
        }
    }

    /// Makes one call, or one group of calls, and waits until NCCL has put it into the stream.
    ///
    /// # Errors
    /// As [`Link::open`].
    pub fn call(
        &self,
        what: &str,
        line: Line,
        body: impl FnOnce(&Functions, Handle, Stream) -> Code,
    ) -> Result<()> {
        self.put(what, line, self.watch.options.timeout, body)
    }

    fn put(
        &self,
        what: &str,
        line: Line,
        limit: Duration,
        body: impl FnOnce(&Functions, Handle, Stream) -> Code,
    ) -> Result<()> {
        self.check()?;
        let stream = match line {
            Line::Own => self.backend.stream()?,
            Line::Beside => self.backend.fork()?,
        };
        let code = {
            let closed = lock(&self.closed);
            if *closed {
                drop(closed);
                return Err(self.ended());
            }
            body(&self.watch.library.functions, self.handle.load(Ordering::Acquire), stream.0 as Stream)
        };
        match code {
            SUCCESS | IN_PROGRESS => self.settle(what, limit),
            code => Err(self.fail(what, code)),
        }
    }

    /// The stream up to here is watched.
    pub fn note(&self) -> Result<()> {
        lock(&self.under_way).note(Instant::now(), |event| self.backend.record(event))
    }

    /// Waits until the device has done everything noted.
    pub fn drain(&self) -> Result<()> {
        let mut polls = 0;
        while !self.idle()? {
            self.check()?;
            pause(&mut polls);
        }
        self.check()
    }

    /// Whether everything noted is done.
    fn idle(&self) -> Result<bool> {
        lock(&self.under_way).idle(|event| self.backend.passed(event))
    }

    /// Why everything must end, if so.
    pub fn trouble(&self, now: Instant) -> Option<Trouble> {
        let timeout = self.watch.options.timeout;
        let own = |why| Some(Trouble { why, own: true });
        let state = match self.closed.try_lock() {
            Ok(closed) if *closed => return None,
            Ok(_) => self.state(),
            // A call is being made.
            Err(_) => IN_PROGRESS,
        };
        if !matches!(state, SUCCESS | IN_PROGRESS) {
            return own(format!("rank {}: {}", self.rank, self.message("an exchange under way", state)));
        }
        match self.idle() {
            Err(error) => return own(format!("rank {}: {error}", self.rank)),
            Ok(true) => return None,
            Ok(false) => {}
        }
        match lock(&self.under_way).late(now, timeout, self.alarm.raised(), GRACE)? {
            Late::Deserted => {
                let why = format!("rank {} waits for a rank that failed or left", self.rank);
                Some(Trouble { why, own: false })
            }
            Late::Overdue => {
                own(format!("rank {}: an exchange has not ended within {}", self.rank, seconds(timeout)))
            }
        }
    }

    /// Nothing computed on this rank's device counts from now on, and nobody waits on its host. `own`: it began here.
    pub fn condemn(&self, why: &str, own: bool) {
        self.backend.poison(why, (!own).then_some(self.rank));
        self.alarm.raise(why);
    }

    /// Ends the communicator at once, wherever its peers are. Returns whether NCCL has let go of it: not while a call does not
    /// return.
    pub fn abort(&self) -> bool {
        let started = Instant::now();
        let mut closed = loop {
            match self.closed.try_lock() {
                Ok(closed) => break closed,
                Err(TryLockError::Poisoned(closed)) => break closed.into_inner(),
                Err(TryLockError::WouldBlock) if started.elapsed() > GRACE => return false,
                Err(TryLockError::WouldBlock) => std::thread::sleep(PAUSE),
            }
        };
        if !*closed {
            self.abort_now(&mut closed);
        }
        true
    }

    fn abort_now(&self, closed: &mut bool) {
        *closed = true;
        let handle = self.handle.load(Ordering::Acquire);
        if !handle.is_null() {
            // SAFETY: a live communicator, which nobody uses after this: it is closed.
            let _ = unsafe { (self.watch.library.functions.comm_abort)(handle) };
        }
    }

    /// Ends the communicator: in order where its exchanges end and its peers come too, by an abort otherwise. Returns in any case.
    pub fn close(self: &Arc<Self>) {
        if !self.comes_to_rest() {
            // The others wait for what this rank will never do.
            self.watch.fail(format!("rank {} left while an exchange was under way", self.rank), None);
        }
        if self.watch.failure().is_none() {
            self.finalize();
        } else if !self.abort() {
            // NCCL may still write into it.
            std::mem::forget(Arc::clone(self));
        }
    }

    fn finalize(&self) {
        let mut closed = lock(&self.closed);
        let functions = &self.watch.library.functions;
        let handle = self.handle.load(Ordering::Acquire);
        if *closed || handle.is_null() {
            *closed = true;
            return;
        }
        // SAFETY: a live communicator.
        let mut state = unsafe { (functions.comm_finalize)(handle) };
        let (started, mut polls) = (Instant::now(), 0);
        while matches!(state, SUCCESS | IN_PROGRESS) && started.elapsed() < FINALIZE_GRACE {
            state = self.state();
            if state == SUCCESS {
                *closed = true;
                // SAFETY: a communicator that has come to its end, and that nobody uses after this.
                let _ = unsafe { (functions.comm_destroy)(handle) };
                return;
            }
            pause(&mut polls);
        }
        self.abort_now(&mut closed);
    }

    /// Whether everything under way ends within the time it is given.
    fn comes_to_rest(&self) -> bool {
        let (started, mut polls) = (Instant::now(), 0);
        loop {
            match self.idle() {
                Ok(true) | Err(_) => return true,
                Ok(false) if self.watch.failure().is_some() => return true,
                Ok(false) if started.elapsed() > GRACE => return false,
                Ok(false) => pause(&mut polls),
            }
        }
    }

    /// Waits until NCCL has accepted what it was given.
    fn settle(&self, what: &str, limit: Duration) -> Result<()> {
        let (started, mut polls) = (Instant::now(), 0);
        loop {
            self.check()?;
            let state = {
                let closed = lock(&self.closed);
                if *closed {
                    drop(closed);
                    return Err(self.ended());
                }
                self.state()
            };
            match state {
                SUCCESS => return Ok(()),
                IN_PROGRESS => {}
                code => return Err(self.fail(what, code)),
            }
            if started.elapsed() > limit {
                return Err(self.end(format!("NCCL: {what} has not ended within {}", seconds(limit))));
            }
            pause(&mut polls);
        }
    }

    /// What NCCL says of the communicator, which is open and locked.
    fn state(&self) -> Code {
        let handle = self.handle.load(Ordering::Acquire);
        if handle.is_null() {
            return IN_PROGRESS;
        }
        let mut state = SUCCESS;
        // SAFETY: a live communicator: it is not closed, and cannot be meanwhile.
        match unsafe { (self.watch.library.functions.comm_async_error)(handle, &mut state) } {
            SUCCESS => state,
            code => code,
        }
    }

    /// # Errors
    /// [`Error::Peer`] once everything has ended. The communicator is aborted by then: NCCL writes nowhere any more.
    pub fn check(&self) -> Result<()> {
        match self.watch.failure() {
            None => Ok(()),
            Some(_) => Err(self.ended()),
        }
    }

    fn ended(&self) -> Error {
        self.abort();
        let why = self.watch.failure().unwrap_or("its communicator is closed").to_owned();
        Error::Peer { rank: self.rank, why }
    }

    /// Ends everything because of an error of NCCL.
    fn fail(&self, what: &str, code: Code) -> Error {
        self.end(self.message(what, code))
    }

    fn end(&self, why: String) -> Error {
        self.watch.fail(format!("rank {}: {why}", self.rank), Some(self));
        self.abort();
        let device = match self.backend.device() {
            DeviceId::Cpu => "cpu".to_owned(),
            DeviceId::Cuda(ordinal) => format!("cuda:{ordinal}"),
        };
        Error::Device { device, why }
    }

    /// "NCCL: WHAT: unhandled cuda error (what NCCL adds)"
    fn message(&self, what: &str, code: Code) -> String {
        let library = &self.watch.library;
        let closed = lock(&self.closed);
        let handle = if *closed { std::ptr::null_mut() } else { self.handle.load(Ordering::Acquire) };
        let (name, more) = (library.error_text(code), library.last_error(handle));
        drop(closed);
        match more.is_empty() {
            true => format!("NCCL: {what}: {name}"),
            false => format!("NCCL: {what}: {name} ({more})"),
        }
    }
}

fn pause(polls: &mut u32) {
    *polls += 1;
    if *polls < SPINS { std::thread::yield_now() } else { std::thread::sleep(PAUSE) }
}

fn seconds(duration: Duration) -> String {
    format!("{} s", duration.as_secs_f32())
}
