//! A reusable barrier of threads that anyone can end, so that nobody waits for the dead.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Result};

/// Where the ranks of a group wait for each other.
pub(super) struct Meeting {
    size: usize,
    arrived: AtomicUsize,
    /// Completed meetings.
    generation: AtomicU64,
    broken: AtomicBool,
    /// Why no further meeting will complete, once that is so.
    ended: Mutex<Option<String>>,
    changed: Condvar,
    /// Polls before a waiting thread sleeps: none when there are more ranks than cores.
    spins: u32,
}

impl Meeting {
    /// Of so many ranks.
    pub fn new(size: usize) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Meeting {
            size,
            arrived: AtomicUsize::new(0),
            generation: AtomicU64::new(0),
            broken: AtomicBool::new(false),
            ended: Mutex::new(None),
            changed: Condvar::new(),
            spins: if size <= cores { 4_000 } else { 0 },
        }
    }

    /// Waits until all ranks are here. `rank` is the one that asks.
    ///
    /// # Errors
    /// [`Error::Peer`] once the meeting has ended.
    pub fn wait(&self, rank: usize) -> Result<()> {
        let generation = self.generation.load(Ordering::Acquire);
        if self.arrived.fetch_add(1, Ordering::AcqRel) + 1 == self.size {
            self.arrived.store(0, Ordering::Relaxed);
            // The lock orders this store against a waiter that has checked and is about to sleep.
            let guard = self.lock();
            self.generation.store(generation + 1, Ordering::Release);
            drop(guard);
            self.changed.notify_all();
            return Ok(());
        }
        for _ in 0..self.spins {
            if self.generation.load(Ordering::Acquire) != generation {
                return Ok(());
            }
            if self.broken.load(Ordering::Acquire) {
                break;
            }
            std::hint::spin_loop();
        }
        let mut ended = self.lock();
        loop {
            // A completed meeting counts even when somebody left right after it.
            if self.generation.load(Ordering::Acquire) != generation {
                return Ok(());
            }
            if let Some(why) = &*ended {
                return Err(Error::Peer { rank, why: why.clone() });
            }
            ended = self.changed.wait(ended).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// No further meeting completes; the first reason given is the one told.
    pub fn end(&self, why: String) {
        self.lock().get_or_insert(why);
        self.broken.store(true, Ordering::Release);
        self.changed.notify_all();
    }

    /// Whether it was ended.
    pub fn has_ended(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    fn lock(&self) -> MutexGuard<'_, Option<String>> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
