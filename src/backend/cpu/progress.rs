//! How far the first of two passes is, so that the second may follow it without a barrier: whoever has nothing left to do in the first
//! goes on with what the second has of segments that are done.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

/// Looks at a segment between two yields of the core.
const SPINS_PER_YIELD: u32 = 512;

/// What is left to do of each segment in the first pass. Its memory is kept from call to call.
#[derive(Default)]
pub struct Progress {
    left: Vec<Left>,
    /// A thread has panicked: what it had taken will never be done.
    abandoned: AtomicBool,
}

/// Parts of a segment that are left, and one more for what follows the last of them. Mostly one thread counts them all, undisturbed in a
/// line of its own.
#[repr(align(64))]
struct Left(AtomicUsize);

impl Progress {
    /// Begins with segments of so many parts each.
    pub fn start(&mut self, segments: impl Iterator<Item = usize>) {
        *self.abandoned.get_mut() = false;
        self.left.clear();
        let left = |parts| Left(AtomicUsize::new(if parts == 0 { 0 } else { parts + 1 }));
        self.left.extend(segments.map(left));
    }

    /// Some parts of a segment are done; `last` is called, by one thread, once all are.
    pub fn done(&self, segment: usize, parts: usize, last: impl FnOnce()) {
        let Left(left) = &self.left[segment];
        // Acquires what the others have written, for `last`; releases what this thread and it write.
        if left.fetch_sub(parts, Ordering::AcqRel) == parts + 1 {
            last();
            left.store(0, Ordering::Release);
        }
    }

    /// Waits until a segment is done. False where it never will be.
    ///
    /// It is others who have the rest of it in hand: a thread waits only after it has found nothing more to take in the first pass. Nobody
    /// waits before that, so they finish.
    pub fn wait(&self, segment: usize) -> bool {
        let mut spins = 0u32;
        while self.left[segment].0.load(Ordering::Acquire) != 0 {
            if self.abandoned.load(Ordering::Relaxed) {
                return false;
            }
            spins = spins.wrapping_add(1);
            if spins.is_multiple_of(SPINS_PER_YIELD) {
                thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
        }
        true
    }

    /// Held by a thread in the first pass: frees those who wait for it if it panics.
    pub fn watch(&self) -> impl Drop + '_ {
        Watch(&self.abandoned)
    }
}

/// See [`Progress::watch`].
struct Watch<'a>(&'a AtomicBool);

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    #[test]
    fn a_segment_is_done_with_its_last_part() {
        let mut progress = Progress::default();
        progress.start([3, 0, 1].into_iter());
        assert!(progress.wait(1), "nothing to do");
        let last = Cell::new(0);
        let count = || last.set(last.get() + 1);
        progress.done(0, 2, count);
        assert_eq!(last.get(), 0);
        progress.done(2, 1, count);
        assert!(progress.wait(2));
        progress.done(0, 1, count);
        assert!(progress.wait(0));
        assert_eq!(last.get(), 2);
    }

    #[test]
    fn who_panics_is_not_waited_for() {
        let mut progress = Progress::default();
        progress.start([1].into_iter());
        let fail = || {
            let _watch = progress.watch();
            panic!("a task fails");
        };
        assert!(catch_unwind(AssertUnwindSafe(fail)).is_err());
        assert!(!progress.wait(0));
        progress.start([1].into_iter());
        drop(progress.watch());
        progress.done(0, 1, || ());
        assert!(progress.wait(0));
    }
}
