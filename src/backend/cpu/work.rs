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

/// What is to be done in two passes over segments, each with units of its own: the second pass of a segment needs all of its first.
pub struct TwoPasses<'a> {
    /// The first pass of some units.
    pub first: &'a (dyn Fn(Items) + Sync),
    /// Called once with each slot and its rows, between its passes.
    pub between: &'a (dyn Fn(usize, Range<usize>) + Sync),
    /// The second pass of some units.
    pub second: &'a (dyn Fn(Items) + Sync),
}

/// Lists of items. Their memory is kept from call to call.
#[derive(Default)]
pub struct Work {
    first: Pass,
    second: Pass,
    /// Slots and rows of the segments of two passes.
    segments: Vec<(usize, Range<usize>)>,
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
        let pass = &mut self.first;
        pass.plan(backend.pool().threads(), segments);
        let threads = backend.pool().threads().min(pass.items());
        pass.fill(threads);
        backend.pool().run_each(threads, &|thread| pass.serve(thread, &|_, items| body(items)));
    }

    /// Makes two passes over segments, given with the units of the first, and the units of the second. Threads go from one to the other
    /// without meeting.
    pub fn run_both(
        &mut self,
        backend: &CpuBackend,
        segments: impl Iterator<Item = (Segment, usize)> + Clone,
        passes: &TwoPasses<'_>,
    ) {
        let threads = backend.pool().threads();
        self.first.plan(threads, segments.clone().map(|(segment, _)| segment));
        self.second.plan(threads, segments.clone().map(|(segment, units)| Segment { units, ..segment }));
        self.progress.start(segments.clone().map(|(segment, _)| segment.rows.len() * segment.units));
        self.segments.clear();
        self.segments.extend(segments.map(|(segment, _)| (segment.slot, segment.rows)));

        let threads = threads.min(self.first.items().max(self.second.items()));
        self.first.fill(threads);
        self.second.fill(threads);
        let Work { first, second, segments, progress } = &*self;
        backend.pool().run_each(threads, &|thread| {
            let watch = progress.watch();
            first.serve(thread, &|segment, items| {
                let done = items.rows.len() * items.units.len();
                (passes.first)(items);
                progress.done(segment, done, || {
                    let (slot, rows) = segments[segment].clone();
                    (passes.between)(slot, rows);
                });
            });
            drop(watch);
            second.serve(thread, &|segment, items| {
                if progress.wait(segment) {
                    (passes.second)(items);
                }
            });
        });
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

    /// Shares them out among so many threads.
    fn fill(&mut self, threads: usize) {
        let items = u32::try_from(self.items()).expect("fewer items than 2^32");
        self.shares.fill(threads, items);
    }

    /// Calls `body` for a thread's items, with as many of one slot at a time as it has taken: what belongs to the slot has left the
    /// caches by the time it is its turn, and should be fetched once.
    fn serve(&self, thread: usize, body: &dyn Fn(usize, Items)) {
        self.shares.serve(thread, &|items| {
            visit(&self.blocks, items.start as usize..items.end as usize, body);
        });
    }
}

/// Calls `body` for some items, block by block, with the segment of each.
fn visit(blocks: &[Block], items: Range<usize>, body: &dyn Fn(usize, Items)) {
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
    use std::panic::{AssertUnwindSafe, catch_unwind};

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
                            between: &|slot, of| {
                                assert_eq!(of, rows[slot]);
                                assert!(first.all_once(of));
                                between.lock().unwrap()[slot] += 1;
                            },
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

    #[test]
    fn a_panic_in_the_first_pass_ends_both() {
        for threads in [1, 2, 5] {
            let backend = CpuBackend::detect(threads).unwrap();
            let mut work = Work::default();
            let counts = [40, 3, 9];
            for bad in 0..3 {
                let run = catch_unwind(AssertUnwindSafe(|| {
                    let passes = TwoPasses {
                        first: &|items| assert!(items.slot != bad, "slot {bad} fails"),
                        between: &|_, _| (),
                        second: &|items| assert!(items.slot != bad, "slot {bad} was not done"),
                    };
                    work.run_both(&backend, segments(&counts, 9).map(|segment| (segment, 9)), &passes);
                }));
                let message = *run.unwrap_err().downcast::<String>().unwrap();
                assert!(message.contains(&format!("slot {bad} fails")), "{message}");
            }
        }
    }
}
