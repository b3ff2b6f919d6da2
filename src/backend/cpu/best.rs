//! The greatest element of each row.

use super::CpuBackend;
use super::memory::{Rows, RowsMut};
use super::rows::for_rows;
use crate::backend::{View, ViewMut, check};
use crate::error::Result;

/// See [`crate::backend::Backend::best`].
pub(super) fn best(backend: &CpuBackend, x: View<'_>, out: ViewMut<'_>) -> Result<()> {
    check::best(&x, &out);
    let (x, out) = (Rows::<f32>::new(x), RowsMut::<i32>::new(out));
    for_rows(backend, x.rows(), x.cols(), &|range| {
        for i in range {
            // SAFETY: each row is written by one task.
            unsafe { out.part(i, 0..2) }.copy_from_slice(&best_of(x.row(i)));
        }
    });
    Ok(())
}

/// The column, and how many elements are not finite.
fn best_of(row: &[f32]) -> [i32; 2] {
    // One maximum per lane: the compiler turns this into vector instructions, which a single running maximum forbids.
    const LANES: usize = 16;
    let (mut lanes, mut infinite) = ([f32::NEG_INFINITY; LANES], [0i32; LANES]);
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for ((lane, infinite), &x) in lanes.iter_mut().zip(&mut infinite).zip(chunk) {
            *lane = if x > *lane { x } else { *lane };
            *infinite += i32::from(!x.is_finite());
        }
    }
    let max = lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |max, &x| max.max(x));
    let infinite = infinite.iter().sum::<i32>() + rest.iter().filter(|x| !x.is_finite()).count() as i32;
    let column = row.iter().position(|&x| x == max).unwrap_or(0);
    [column as i32, infinite]
}
