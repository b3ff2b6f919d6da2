//! Sums over ranks, made here in rank order from rows that NCCL only moves.

use std::ffi::c_void;
use std::sync::Arc;

use super::Nccl;
use super::library::BYTES;
use super::link::Line;
use super::rows::Rows;
use crate::backend::{View, ViewMut};
use crate::comm::Communicator;
use crate::error::Result;

/// Sums of up to so many bytes are gathered whole by every rank: one exchange instead of two, for more bytes.
const GATHERED_SUM_BYTES: usize = 256 << 10;

impl Nccl {
    /// [`Communicator::all_reduce_sum`].
    pub(super) fn sum(&mut self, x: ViewMut<'_>) -> Result<()> {
        let bytes = x.rows() * x.cols() * x.dtype().bytes();
        if bytes <= GATHERED_SUM_BYTES { self.sum_gathered(x) } else { self.sum_divided(x) }
    }

    /// Adds up what all ranks sent, `out.rows()` rows each in `arrived`, in rank order; `own` in place of what this rank sent.
    pub(super) fn add_up(&self, own: Option<View<'_>>, mut out: ViewMut<'_>) -> Result<()> {
        let (rows, cols, size) = (out.rows(), out.cols(), self.host.size());
        if rows == 0 {
            return Ok(());
        }
        let arrived = self.arrived.view(out.dtype(), rows * size, cols);
        for r in 0..size {
            let term = match own {
                Some(own) if r == self.host.rank() => own,
                _ => arrived.rows_range(r * rows..(r + 1) * rows),
            };
            match r {
                0 => self.backend.copy_rows(term, out.reborrow())?,
                _ => self.backend.add_scaled(term, 1.0, out.reborrow())?,
            }
        }
        Ok(())
    }

    /// The sum of few bytes: every rank gets the rows of all.
    fn sum_gathered(&mut self, x: ViewMut<'_>) -> Result<()> {
        let (rows, cols, dtype) = (x.rows(), x.cols(), x.dtype());
        let backend = Arc::clone(&self.backend);
        let all = self.arrived.take(backend.as_ref(), dtype, rows * self.host.size(), cols)?;
        let into = all.as_view().address() as *mut c_void;
        let own = Rows::of(self.packed.pack(backend.as_ref(), x.as_view())?).piece(self.host.rank(), 0..rows);
        if own.bytes == 0 {
            return Ok(());
        }
        self.enter()?;
        self.link.call("a sum over ranks", Line::Own, |functions, handle, stream| {
            let from = own.address as *const c_void;
            // SAFETY: device memory of `bytes` and `bytes * size`, kept until the stream has passed.
            unsafe { (functions.all_gather)(from, into, own.bytes, BYTES, handle, stream) }
        })?;
        self.leave()?;
        self.add_up(None, x)
    }

    /// The sum of many bytes: every rank adds up a part of the rows, and all gather the parts.
    fn sum_divided(&mut self, mut x: ViewMut<'_>) -> Result<()> {
        let (rank, size, rows) = (self.host.rank(), self.host.size(), x.rows());
        let mut counts = std::mem::take(&mut self.counts);
        counts.clear();
        counts.extend((0..size).map(|r| rows * (r + 1) / size - rows * r / size));
        let mut part = std::mem::take(&mut self.part);
        let backend = Arc::clone(&self.backend);
        let mut sum = part.take(backend.as_ref(), x.dtype(), counts[rank], x.cols())?;
        self.reduce_scatter_rows(x.as_view(), &counts, sum.reborrow())?;
        self.all_gather_rows(sum.as_view(), &counts, x.reborrow())?;
        (self.part, self.counts) = (part, counts);
        Ok(())
    }
}
