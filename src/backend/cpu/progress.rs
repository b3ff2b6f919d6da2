//! How far a pass over some segments is, so that whoever does the last part of one can do what follows for it at once.

use std::sync::atomic::{AtomicUsize, Ordering};

/// What is left to do of each segment. Its memory is kept from call to call.
#[derive(Default)]
pub struct Progress(Vec<Left>);

/// Parts that are left. Mostly one thread counts them all, undisturbed in a line of its own.
#[repr(align(64))]
struct Left(AtomicUsize);

impl Progress {
    /// Begins with segments of so many parts each.
    pub fn start(&mut self, segments: impl Iterator<Item = usize>) {
        self.0.clear();
        self.0.extend(segments.map(|parts| Left(AtomicUsize::new(parts))));
    }

    /// Some parts of a segment are done: whether they were the last. If so, this thread sees what all others have written for it.
    pub fn is_last(&self, segment: usize, parts: usize) -> bool {
        let before = self.0[segment].0.fetch_sub(parts, Ordering::AcqRel);
        assert!(before >= parts, "{parts} parts of a segment done, {before} were left");
        before == parts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_is_done_with_its_last_part() {
        let mut progress = Progress::default();
        progress.start([3, 1].into_iter());
        assert!(!progress.is_last(0, 2));
        assert!(progress.is_last(1, 1));
        assert!(progress.is_last(0, 1));
        progress.start([1].into_iter());
        assert!(progress.is_last(0, 1));
    }
}
