//! How a product is shared out among threads. Nothing here can change a result: an output element is computed alike by whatever
//! thread it is.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::CpuBackend;

/// Most rows that pass over a panel at a time: their sums (45 KiB) stay in the L2 cache.
const BLOCK_ROWS: usize = 240;
/// Heights of blocks are multiples of this: whole strips of the largest registers.
const STRIP: usize = 8;
/// Items are small enough for so many of them per thread. More would split the rows of a decode step, and read weights twice.
const ITEMS_PER_THREAD: usize = 4;
/// A thread takes this part of its share at a time: long runs first, whose weights follow each other in memory, and short ones in the
/// end, so that threads finish together, and that one which loses its core holds up little.
const PART: u32 = 4;

/// Rows that share weights: each of `units` (panels, or pairs of them) is to be multiplied with all of them.
#[derive(Clone)]
pub struct Segment {
    /// Whose weights.
    pub slot: usize,
    /// Rows of the activations.
    pub rows: Range<usize>,
    /// Panels, or pairs of panels.
    pub units: usize,
}

/// Some units, each times the same block of rows.
pub struct Items {
    /// Whose weights.
    pub slot: usize,
    /// Rows of the activations.
    pub rows: Range<usize>,
    /// Panels, or pairs of panels.
    pub units: Range<usize>,
}

/// A block of rows with all its units.
struct Block {
    slot: usize,
    rows: Range<usize>,
    /// Number of its first item, and of the one after its last.
    items: Range<usize>,
}

/// A list of items. Its memory is kept from call to call.
#[derive(Default)]
pub struct Work {
    blocks: Vec<Block>,
    /// One of each thread.
    shares: Vec<Share>,
}

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

/// A [`Work`] to borrow.
#[derive(Default)]
pub struct WorkList(Mutex<Work>);

impl WorkList {
    /// Waits while another thread uses it.
    pub fn lock(&self) -> MutexGuard<'_, Work> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Work {
    /// Lists the items of these segments.
    pub fn plan(&mut self, backend: &CpuBackend, segments: impl Iterator<Item = Segment> + Clone) {
        let threads = backend.pool().threads();
        let row_units: usize = segments.clone().map(|s| s.rows.len() * s.units).sum();
        let most =
            (row_units / (threads * ITEMS_PER_THREAD)).next_multiple_of(STRIP).clamp(STRIP, BLOCK_ROWS);
        self.blocks.clear();
        let mut first = 0;
        for Segment { slot, rows, units } in segments {
            // Of like heights.
            let height = rows.len().div_ceil(rows.len().div_ceil(most).max(1)).next_multiple_of(STRIP);
            for start in rows.clone().step_by(height.max(1)) {
                let rows = start..rows.end.min(start + height);
                self.blocks.push(Block { slot, rows, items: first..first + units });
                first += units;
            }
        }
    }

    /// Calls `body` for all items, on the backend's threads, with as many of one slot at a time as a thread has taken: what belongs to
    /// the slot has left the caches by the time it is its turn, and should be fetched once.
    pub fn run(&mut self, backend: &CpuBackend, body: &(dyn Fn(Items) + Sync)) {
        let items = u32::try_from(self.items()).expect("fewer items than 2^32");
        let threads = backend.pool().threads().min(items as usize);
        self.shares.resize_with(self.shares.len().max(threads), Share::default);
        let border = |thread: usize| (u64::from(items) * thread as u64 / threads as u64) as u32;
        for (thread, share) in self.shares[..threads].iter().enumerate() {
            share.fill(border(thread)..border(thread + 1));
        }
        let work = &*self;
        backend.pool().run(threads, &|thread| {
            let (before, from) = work.shares[..threads].split_at(thread);
            let (own, after) = from.split_first().expect("a share for each thread");
            loop {
                while let Some(items) = own.take() {
                    work.visit(items.start as usize..items.end as usize, body);
                }
                match after.iter().chain(before).find_map(Share::steal) {
                    Some(items) => own.fill(items),
                    None => break,
                }
            }
        });
    }

    /// Calls `body` for some items, block by block.
    fn visit(&self, items: Range<usize>, body: &(dyn Fn(Items) + Sync)) {
        let mut at = items.start;
        for block in &self.blocks[self.blocks.partition_point(|b| b.items.end <= at)..] {
            let end = block.items.end.min(items.end);
            let units = at - block.items.start..end - block.items.start;
            body(Items { slot: block.slot, rows: block.rows.clone(), units });
            at = end;
            if at == items.end {
                break;
            }
        }
    }

    /// Items in all.
    fn items(&self) -> usize {
        self.blocks.last().map_or(0, |block| block.items.end)
    }
}

#[cfg(test)]
mod tests {
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
    fn every_unit_meets_every_row_once() {
        for threads in [1, 2, 5] {
            let backend = CpuBackend::detect(threads).unwrap();
            for (units, counts) in [
                (7, vec![1, 0, 3]),
                (7, vec![700, 2, 0, 0, 241]),
                (1, vec![32]),
                (100, vec![1, 1]),
                (7, vec![]),
                (0, vec![3]),
            ] {
                let rows: usize = counts.iter().sum();
                let mut start = 0;
                let segments: Vec<_> = counts
                    .iter()
                    .map(|n| {
                        start += n;
                        start - n..start
                    })
                    .collect();
                let mut work = Work::default();
                let list = segments.iter().enumerate();
                work.plan(&backend, list.map(|(slot, rows)| Segment { slot, rows: rows.clone(), units }));
                let seen = Mutex::new(vec![0; rows * units]);
                work.run(&backend, &|items| {
                    let inside = &segments[items.slot];
                    assert!(inside.start <= items.rows.start && items.rows.end <= inside.end);
                    assert!(!items.units.is_empty());
                    let mut seen = seen.lock().unwrap();
                    for unit in items.units {
                        items.rows.clone().for_each(|row| seen[row * units + unit] += 1);
                    }
                });
                assert!(seen.into_inner().unwrap().iter().all(|&n| n == 1));
            }
        }
    }
}
