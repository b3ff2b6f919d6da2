//! How a product is shared out among threads. Nothing here can change a result: an output element is computed alike by whatever
//! thread it is.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::CpuBackend;
use super::progress::Progress;
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
    /// Number of the segment that it belongs to.
    segment: usize,
    slot: usize,
    rows: Range<usize>,
    /// Number of its first item, and of the one after its last.
    items: Range<usize>,
}

/// What is to be done in two passes over segments, each with units of its own.
pub struct TwoPasses<'a> {
    /// The first pass of some units.
    pub first: &'a (dyn Fn(Items) + Sync),
    /// Called once with each slot and its rows, between its passes.
    pub between: Option<&'a (dyn Fn(usize, Range<usize>) + Sync)>,
    /// The second pass of some units.
    pub second: &'a (dyn Fn(Items) + Sync),
}

/// Lists of items. Their memory is kept from call to call.
#[derive(Default)]
pub struct Work {
    pass: Pass,
    /// The segments of two passes: as they are in the first, and their units in the second.
    segments: Vec<(Segment, usize)>,
    progress: Progress,
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
    /// Calls `body` for all units of these segments, on the backend's threads.
    pub fn run(
        &mut self,
        backend: &CpuBackend,
        segments: impl Iterator<Item = Segment> + Clone,
        body: &(dyn Fn(Items) + Sync),
    ) {
        self.pass.run(backend, segments, &|_, items| body(items));
    }

    /// Makes two passes over segments, given with the units of the first, and the units of the second.
    pub fn run_both(
        &mut self,
        backend: &CpuBackend,
        segments: impl Iterator<Item = (Segment, usize)>,
        passes: &TwoPasses<'_>,
    ) {
        let Work { pass, segments: list, progress } = self;
        list.clear();
        list.extend(segments);
        let list = &list[..];
        let first = list.iter().map(|(segment, _)| segment.clone());
        match passes.between {
            None => pass.run(backend, first, &|_, items| (passes.first)(items)),
            Some(between) => {
                progress.start(list.iter().map(|(segment, _)| segment.rows.len() * segment.units));
                pass.run(backend, first, &|segment, items| {
                    let done = items.rows.len() * items.units.len();
                    (passes.first)(items);
                    if progress.is_last(segment, done) {
                        let (Segment { slot, rows, .. }, _) = list[segment].clone();
                        between(slot, rows);
                    }
                });
            }
        }
        let second = list.iter().map(|(segment, units)| Segment { units: *units, ..segment.clone() });
        pass.run(backend, second, &|_, items| (passes.second)(items));
    }
}

/// The items of one pass over segments.
#[derive(Default)]
struct Pass {
    blocks: Vec<Block>,
    shares: Shares,
}

impl Pass {
    /// Lists the items of these segments.
    fn plan(&mut self, threads: usize, segments: impl Iterator<Item = Segment> + Clone) {
        let row_units: usize = segments.clone().map(|s| s.rows.len() * s.units).sum();
        let most =
            (row_units / (threads * ITEMS_PER_THREAD)).next_multiple_of(STRIP).clamp(STRIP, BLOCK_ROWS);
        self.blocks.clear();
        let mut first = 0;
        for (segment, Segment { slot, rows, units }) in segments.enumerate() {
            // Of like heights.
            let height = rows.len().div_ceil(rows.len().div_ceil(most).max(1)).next_multiple_of(STRIP);
            for start in rows.clone().step_by(height.max(1)) {
                let rows = start..rows.end.min(start + height);
                self.blocks.push(Block { segment, slot, rows, items: first..first + units });
                first += units;
            }
        }
    }

    /// Items in all.
    fn items(&self) -> usize {
        self.blocks.last().map_or(0, |block| block.items.end)
    }

    /// Calls `body` for all items of these segments, with as many of one slot at a time as a thread has taken: what belongs to the slot
    /// has left the caches by the time it is its turn, and should be fetched once.
    fn run(
        &mut self,
        backend: &CpuBackend,
        segments: impl Iterator<Item = Segment> + Clone,
        body: &(dyn Fn(usize, Items) + Sync),
    ) {
        self.plan(backend.pool().threads(), segments);
        let items = u32::try_from(self.items()).expect("fewer items than 2^32");
        let Pass { blocks, shares } = self;
        shares.deal(backend.pool(), items, &|items| {
            visit(blocks, items.start as usize..items.end as usize, body);
        });
    }
}

/// Calls `body` for some items, block by block, with the segment of each.
fn visit(blocks: &[Block], items: Range<usize>, body: &(dyn Fn(usize, Items) + Sync)) {
    let mut at = items.start;
    for block in &blocks[blocks.partition_point(|b| b.items.end <= at)..] {
        let end = block.items.end.min(items.end);
        let units = at - block.items.start..end - block.items.start;
        body(block.segment, Items { slot: block.slot, rows: block.rows.clone(), units });
        at = end;
        if at == items.end {
            break;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows of each slot.
    fn ranges(counts: &[usize]) -> Vec<Range<usize>> {
        let mut start = 0;
        counts
            .iter()
            .map(|n| {
                start += n;
                start - n..start
            })
            .collect()
    }

    /// Counts what a pass is called with.
    struct Seen {
        segments: Vec<Range<usize>>,
        units: usize,
        times: Mutex<Vec<usize>>,
    }

    impl Seen {
        fn new(counts: &[usize], units: usize) -> Seen {
            let rows: usize = counts.iter().sum();
            Seen { segments: ranges(counts), units, times: Mutex::new(vec![0; rows * units]) }
        }

        fn see(&self, items: Items) {
            let inside = &self.segments[items.slot];
            assert!(inside.start <= items.rows.start && items.rows.end <= inside.end);
            assert!(!items.units.is_empty());
            let mut times = self.times.lock().unwrap();
            for unit in items.units {
                items.rows.clone().for_each(|row| times[row * self.units + unit] += 1);
            }
        }

        /// All units have met these rows, once.
        fn all_once(&self, rows: Range<usize>) -> bool {
            let times = self.times.lock().unwrap();
            times[rows.start * self.units..rows.end * self.units].iter().all(|&n| n == 1)
        }
    }

    fn segments(counts: &[usize], units: usize) -> impl Iterator<Item = Segment> + Clone {
        ranges(counts).into_iter().enumerate().map(move |(slot, rows)| Segment { slot, rows, units })
    }

    const CASES: [(usize, &[usize]); 6] =
        [(7, &[1, 0, 3]), (7, &[700, 2, 0, 0, 241]), (1, &[32]), (100, &[1, 1]), (7, &[]), (0, &[3])];

    #[test]
    fn every_unit_meets_every_row_once() {
        for threads in [1, 2, 5] {
            let backend = CpuBackend::detect(threads).unwrap();
            for (units, counts) in CASES {
                let seen = Seen::new(counts, units);
                Work::default().run(&backend, segments(counts, units), &|items| seen.see(items));
                assert!(seen.all_once(0..counts.iter().sum()));
            }
        }
    }

    #[test]
    fn a_second_pass_follows_all_of_the_first() {
        for threads in [1, 2, 5] {
            let backend = CpuBackend::detect(threads).unwrap();
            let mut work = Work::default();
            for (units, counts) in CASES {
                for second_units in [1, 3, 40] {
                    let (first, second) = (Seen::new(counts, units), Seen::new(counts, second_units));
                    let between = Mutex::new(vec![0; counts.len()]);
                    let rows = ranges(counts);
                    work.run_both(
                        &backend,
                        segments(counts, units).map(|segment| (segment, second_units)),
                        &TwoPasses {
                            first: &|items| first.see(items),
                            between: Some(&|slot, of| {
                                assert_eq!(of, rows[slot]);
                                assert!(first.all_once(of));
                                between.lock().unwrap()[slot] += 1;
                            }),
                            second: &|items| {
                                let (slot, of) = (items.slot, rows[items.slot].clone());
                                assert!(first.all_once(of));
                                assert!(between.lock().unwrap()[slot] == 1 || units == 0);
                                second.see(items);
                            },
                        },
                    );
                    let all = 0..counts.iter().sum();
                    assert!(first.all_once(all.clone()) && second.all_once(all));
                    let called = counts.iter().map(|&rows| usize::from(rows * units > 0));
                    assert_eq!(between.into_inner().unwrap(), called.collect::<Vec<_>>());
                }
            }
        }
    }
}
