//! Choosing a token from each row.

use std::sync::Mutex;

use super::CpuBackend;
use super::memory::{Rows, RowsMut};
use super::pool::{lock, try_lock};
use super::rows::for_rows;
use crate::backend::draw::{Draw, Drawer};
use crate::backend::{View, ViewMut, check};
use crate::error::Result;

/// What threads draw with, one each.
#[derive(Default)]
pub(super) struct Drawers(Vec<Mutex<Drawer>>);

impl Drawers {
    /// Takes memory for rows of `vocab` tokens, now rather than when a thread meets its first.
    fn reserve(&mut self, threads: usize, vocab: usize) {
        self.0.resize_with(threads, Mutex::default);
        self.0.iter_mut().for_each(|drawer| {
            drawer.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner()).reserve(vocab);
        });
    }

    /// Draws with one that no other thread is using.
    fn draw(&self, logits: &[f32], best: u32, draw: &Draw) -> u32 {
        let free = self.0.iter().find_map(try_lock);
        free.expect("as many as threads").draw(logits, best, draw)
    }
}

/// See [`crate::backend::Backend::sample`].
pub(super) fn sample(backend: &CpuBackend, x: View<'_>, draws: &[Draw], out: ViewMut<'_>) -> Result<()> {
    check::sample(&x, draws, &out);
    let mut drawers = lock(&backend.scratch.drawers);
    if draws.iter().any(|draw| !draw.is_greedy()) {
        drawers.reserve(backend.pool().threads(), x.cols());
    }
    let (x, out) = (Rows::<f32>::new(x), RowsMut::<i32>::new(out));
    for_rows(backend, x.rows(), x.cols(), &|range| {
        for i in range {
            let [best, infinite] = best_of(x.row(i));
            let drawn = infinite == 0 && !draws[i].is_greedy();
            let token = if drawn { drawers.draw(x.row(i), best, &draws[i]) } else { best };
            // SAFETY: each row is written by one task.
            unsafe { out.part(i, 0..2) }.copy_from_slice(&[token as i32, infinite as i32]);
        }
    });
    Ok(())
}

/// The column of the greatest element, and how many are not finite.
fn best_of(row: &[f32]) -> [u32; 2] {
    // One maximum per lane: the compiler turns this into vector instructions, which a single running maximum forbids.
    const LANES: usize = 16;
    let (mut lanes, mut infinite) = ([f32::NEG_INFINITY; LANES], [0u32; LANES]);
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for ((lane, infinite), &x) in lanes.iter_mut().zip(&mut infinite).zip(chunk) {
            *lane = if x > *lane { x } else { *lane };
            *infinite += u32::from(!x.is_finite());
        }
    }
    let max = lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |max, &x| max.max(x));
    let infinite = infinite.iter().sum::<u32>() + rest.iter().filter(|x| !x.is_finite()).count() as u32;
    let column = row.iter().position(|&x| x == max).unwrap_or(0);
    [column as u32, infinite]
}

#[cfg(test)]
mod tests;
