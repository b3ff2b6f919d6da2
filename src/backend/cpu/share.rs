//! Sharing out items among threads. Each thread starts with a share of its own, the same from call to call: what it touched in one
//! operation is in its cache for the next.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use super::pool::Pool;

/// A thread takes this part of its share at a time: long runs first, whose data follow each other in memory, and short ones in the end,
/// so that threads finish together, and that one which loses its core holds up little.
const PART: u32 = 4;

/// Items that a thread has before it: it takes them from the front, and those who have none left steal from the back. Almost always a
/// thread touches its own only, which stays in its cache. Nothing else is published through shares.
#[derive(Default)]
#[repr(align(128))]
struct Share(AtomicU64);

impl Share {
    /// Replaces what is left, which is nothing.
    fn fill(&self, items: Range<u32>) {
        self.0.store(pack(&items), Ordering::Relaxed);
    }

    /// The next items, for the thread whose share it is.
    fn take(&self) -> Option<Range<u32>> {
        self.split(|left| left.start + (left.len() as u32 / PART).max(1), |front, _| front)
    }

    /// Half of what is left, or the last item, for another thread.
    fn steal(&self) -> Option<Range<u32>> {
        self.split(|left| left.start + left.len() as u32 / 2, |_, back| back)
    }

    /// Cuts what is left at `border` and takes away the part that `which` chooses.
    ///
    /// What a thread has seen and then finds again has not changed in between: items that were taken never come back.
    fn split(
        &self,
        border: impl Fn(&Range<u32>) -> u32,
        which: impl Fn(Range<u32>, Range<u32>) -> Range<u32>,
    ) -> Option<Range<u32>> {
        let parts = |left: Range<u32>| {
            let at = border(&left);
            let taken = which(left.start..at, at..left.end);
            let rest = if taken.start == left.start { taken.end..left.end } else { left.start..taken.start };
            (taken, rest)
        };
        let update = |left| (!unpack(left).is_empty()).then(|| pack(&parts(unpack(left)).1));
        let before = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, update).ok()?;
        Some(parts(unpack(before)).0)
    }
}

fn pack(range: &Range<u32>) -> u64 {
    u64::from(range.start) << 32 | u64::from(range.end)
}

fn unpack(range: u64) -> Range<u32> {
    (range >> 32) as u32..range as u32
}

/// The shares of a pool's threads. Their memory is kept from call to call.
#[derive(Default)]
pub struct Shares(Vec<Share>);

impl Shares {
    /// Calls `body` for ranges of items that together are `0..items`, on the threads of the pool.
    pub fn deal(&mut self, pool: &Pool, items: u32, body: &(dyn Fn(Range<u32>) + Sync)) {
        let threads = pool.threads().min(items as usize);
        self.0.resize_with(self.0.len().max(threads), Share::default);
        let shares = &self.0[..threads];
        let border = |thread: usize| (u64::from(items) * thread as u64 / threads as u64) as u32;
        for (thread, share) in shares.iter().enumerate() {
            share.fill(border(thread)..border(thread + 1));
        }
        // Whoever does not come has its share stolen.
        pool.run_each(threads, &|thread| {
            let (before, from) = shares.split_at(thread);
            let (own, after) = from.split_first().expect("a share for each thread");
            loop {
                while let Some(items) = own.take() {
                    body(items);
                }
                match after.iter().chain(before).find_map(Share::steal) {
                    Some(items) => own.fill(items),
                    None => break,
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn a_share_is_taken_from_both_ends() {
        let share = Share::default();
        assert_eq!((share.take(), share.steal()), (None, None));
        share.fill(10..20);
        assert_eq!(share.take(), Some(10..12));
        assert_eq!(share.steal(), Some(16..20));
        assert_eq!((share.take(), share.take()), (Some(12..13), Some(13..14)));
        assert_eq!((share.steal(), share.steal()), (Some(15..16), Some(14..15)));
        assert_eq!((share.take(), share.steal()), (None, None));
    }

    #[test]
    fn every_item_comes_once() {
        for threads in [1, 2, 3, 7] {
            let pool = Pool::new(threads).unwrap();
            let mut shares = Shares::default();
            for items in [0, 1, 2, 5, 6, 1000] {
                let seen = Mutex::new(vec![0; items]);
                shares.deal(&pool, items as u32, &|range| {
                    assert!(!range.is_empty());
                    let mut seen = seen.lock().unwrap();
                    range.for_each(|item| seen[item as usize] += 1);
                });
                assert_eq!(seen.into_inner().unwrap(), vec![1; items], "{items} items, {threads} threads");
            }
        }
    }
}
