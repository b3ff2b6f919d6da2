//! Rows without gaps in device memory, which is what NCCL can move, and room for those that have gaps.

use std::collections::HashMap;
use std::ops::Range;

use super::pieces::Piece;
use crate::backend::{Backend, DType, Tensor, View, ViewMut};
use crate::error::Result;

/// Rows in device memory without gaps.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows {
    address: usize,
    row_bytes: usize,
    pub rows: usize,
}

impl Rows {
    /// Those of a view.
    pub fn of(view: View<'_>) -> Rows {
        assert!(
            view.is_contiguous(),
            "rows with gaps: {} of {} elements, {} apart",
            view.rows(),
            view.cols(),
            view.stride()
        );
        Rows { address: view.address(), row_bytes: view.cols() * view.dtype().bytes(), rows: view.rows() }
    }

    /// Some of them, for rank `rank` or from it.
    pub fn piece(self, rank: usize, range: Range<usize>) -> Piece {
        assert!(range.end <= self.rows, "rows {range:?} of {}", self.rows);
        let address = self.address + range.start * self.row_bytes;
        Piece { rank, address, bytes: range.len() * self.row_bytes }
    }
}

/// Device memory that grows and is kept, by type.
#[derive(Default)]
pub(super) struct Room(HashMap<DType, Tensor>);

impl Room {
    /// Room for so many rows, which hold anything.
    pub fn take(
        &mut self,
        backend: &dyn Backend,
        dtype: DType,
        rows: usize,
        cols: usize,
    ) -> Result<ViewMut<'_>> {
        let elements = rows * cols;
        if self.0.get(&dtype).map_or(0, Tensor::cols) < elements.max(1) {
            self.0.remove(&dtype);
            self.0.insert(dtype, backend.alloc(dtype, 1, elements.next_power_of_two())?);
        }
        Ok(self.0.get_mut(&dtype).expect("inserted above").reshaped_mut(rows, cols))
    }

    /// What was last taken.
    pub fn view(&self, dtype: DType, rows: usize, cols: usize) -> View<'_> {
        self.0[&dtype].reshaped(rows, cols)
    }

    /// `rows` themselves, or a copy without gaps.
    pub fn pack<'a>(&'a mut self, backend: &dyn Backend, rows: View<'a>) -> Result<View<'a>> {
        if rows.is_contiguous() {
            return Ok(rows);
        }
        backend.copy_rows(rows, self.take(backend, rows.dtype(), rows.rows(), rows.cols())?)?;
        Ok(self.view(rows.dtype(), rows.rows(), rows.cols()))
    }
}
