//! What a test holds a scripted model with.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Lets the steps of one rank begin as a test wills, so that the test, and not the speed of a machine, decides what happens
/// during a step. Released at first; clones are the same brake.
#[derive(Debug, Clone)]
pub struct Brake(Arc<Steps>);

#[derive(Debug)]
struct Steps {
    /// Those that may begin; [`u64::MAX`] is any number.
    allowed: Mutex<u64>,
    changed: Condvar,
}

impl Default for Brake {
    fn default() -> Self {
        Brake(Arc::new(Steps { allowed: Mutex::new(u64::MAX), changed: Condvar::new() }))
    }
}

impl Brake {
    /// Holds the next step, and all that follow.
    pub fn hold(&self) {
        self.release_for(0);
    }

    /// Lets `steps` more steps begin, and holds those that follow.
    pub fn release_for(&self, steps: u64) {
        *self.allowed() = steps;
        self.0.changed.notify_all();
    }

    /// Holds no more.
    pub fn release(&self) {
        self.release_for(u64::MAX);
    }

    /// A step waits here until it may begin.
    pub(super) fn pass(&self) {
        let held = self.0.changed.wait_while(self.allowed(), |allowed| *allowed == 0);
        let mut allowed = held.unwrap_or_else(PoisonError::into_inner);
        if *allowed != u64::MAX {
            *allowed -= 1;
        }
    }

    fn allowed(&self) -> MutexGuard<'_, u64> {
        self.0.allowed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
