//! How a product is cut into tasks. Nothing here can change a result: an output element is computed alike in whatever task
//! it lands.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::CpuBackend;
use super::panel::PANEL;

/// Most rows that pass over a panel at a time: their sums (45 KiB) stay in the L2 cache. Whole strips of 6 and of 8.
const BLOCK_ROWS: usize = 240;
/// Fewest rows worth a block of their own when there are too few panels for all threads.
const MIN_BLOCK_ROWS: usize = 24;
/// Tasks per thread that even out what threads get.
const TASKS_PER_THREAD: usize = 4;
/// Multiplications that are worth a task (128 KiB of bf16 weights at one row): some microseconds.
const TASK_PRODUCTS: usize = 1 << 16;

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

/// One unit times a block of rows.
pub struct Item {
    /// Whose weights.
    pub slot: usize,
    /// Rows of the activations.
    pub rows: Range<usize>,
    /// Panel, or pair of panels.
    pub unit: usize,
}

/// A block of rows with all its units, cut into tasks of several units.
struct Block {
    slot: usize,
    rows: Range<usize>,
    units: usize,
    units_per_task: usize,
    first_task: usize,
}

/// A list of tasks. Its memory is kept from call to call.
#[derive(Default)]
pub struct Work {
    blocks: Vec<Block>,
    tasks: usize,
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
    /// Lists the tasks of these segments; `products` is the number of multiplications per row and unit.
    pub fn plan(
        &mut self,
        backend: &CpuBackend,
        products: usize,
        segments: impl Iterator<Item = Segment> + Clone,
    ) {
        let threads = backend.pool().threads();
        let row_units: usize = segments.clone().map(|s| s.rows.len() * s.units).sum();
        let fair = row_units / (threads * TASKS_PER_THREAD);
        let worth = TASK_PRODUCTS.div_ceil(products.max(1));
        self.blocks.clear();
        self.tasks = 0;
        for Segment { slot, rows, units } in segments {
            // Enough panels: tall blocks. Few panels: blocks as low as a fair share asks for.
            let height =
                (fair / units.max(1)).clamp(MIN_BLOCK_ROWS, BLOCK_ROWS).next_multiple_of(MIN_BLOCK_ROWS);
            for start in rows.clone().step_by(height) {
                let rows = start..rows.end.min(start + height);
                let units_per_task = worth.div_ceil(rows.len()).min(units.max(1));
                self.blocks.push(Block { slot, rows, units, units_per_task, first_task: self.tasks });
                self.tasks += units.div_ceil(units_per_task);
            }
        }
    }

    /// Calls `body` for each item, on the backend's threads.
    pub fn run(&self, backend: &CpuBackend, body: &(dyn Fn(Item) + Sync)) {
        backend.pool().run(self.tasks, &|task| {
            let block = &self.blocks[self.blocks.partition_point(|b| b.first_task <= task) - 1];
            let first = (task - block.first_task) * block.units_per_task;
            for unit in first..block.units.min(first + block.units_per_task) {
                body(Item { slot: block.slot, rows: block.rows.clone(), unit });
            }
        });
    }
}

/// Multiplications per row of one panel.
pub fn panel_products(k: usize) -> usize {
    k * PANEL
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_unit_meets_every_row_once() {
        for threads in [1, 2, 5] {
            let backend = CpuBackend::detect(threads).unwrap();
            for (k, counts) in
                [(1, vec![1, 0, 3]), (64, vec![700, 2, 0, 0, 241]), (4096, vec![1, 1]), (64, vec![])]
            {
                let units = 7;
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
                work.plan(
                    &backend,
                    panel_products(k),
                    list.map(|(slot, rows)| Segment { slot, rows: rows.clone(), units }),
                );
                let seen = Mutex::new(vec![0; rows * units]);
                work.run(&backend, &|item| {
                    let inside = &segments[item.slot];
                    assert!(inside.start <= item.rows.start && item.rows.end <= inside.end);
                    let mut seen = seen.lock().unwrap();
                    item.rows.for_each(|row| seen[row * units + item.unit] += 1);
                });
                assert!(seen.into_inner().unwrap().iter().all(|&n| n == 1));
            }
        }
    }
}
