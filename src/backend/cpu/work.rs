//! How a product is shared out among threads. Nothing here can change a result: an output element is computed alike by whatever
//! thread it is.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::CpuBackend;
use super::share::Shares;

/// Most rows that pass over a panel at a time: their sums (45 KiB) stay in the L2 cache.
const BLOCK_ROWS: usize = 240;
/// Heights of blocks are multiples of this: whole strips of the largest registers.
const STRIP: usize = 8;
/// Items are small enough for so many of them per thread. More would split the rows of a decode step, and read weights twice.
const ITEMS_PER_THREAD: usize = 4;

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
    shares: Shares,
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
        let Work { blocks, shares } = self;
        shares.deal(backend.pool(), items, &|items| {
            visit(blocks, items.start as usize..items.end as usize, body)
        });
    }

    /// Items in all.
    fn items(&self) -> usize {
        self.blocks.last().map_or(0, |block| block.items.end)
    }
}

/// Calls `body` for some items, block by block.
fn visit(blocks: &[Block], items: Range<usize>, body: &(dyn Fn(Items) + Sync)) {
    let mut at = items.start;
    for block in &blocks[blocks.partition_point(|b| b.items.end <= at)..] {
        let end = block.items.end.min(items.end);
        let units = at - block.items.start..end - block.items.start;
        body(Items { slot: block.slot, rows: block.rows.clone(), units });
        at = end;
        if at == items.end {
            break;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
