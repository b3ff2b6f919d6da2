//! Layers of a transformer: weights plus the backend calls that apply them. A layer that is tensor-parallel returns
//! this rank's *partial sums*; the caller reduces them.

pub mod attention;
pub mod attention_gqa;
pub mod attention_mla;
pub mod embedding;
pub mod linear;
pub mod mlp;
pub mod norm;
pub mod rope;

use std::ops::Range;
use std::sync::Arc;

use crate::backend::{Backend, DType, Precision, Tensor, View, ViewMut};
use crate::comm::Communicator;
use crate::error::Result;
use crate::metrics::{CommOp, Work, WorkClock};

/// A rank as a layer sees it: its device and the groups it belongs to.
pub struct Rank {
    /// Computes and owns all memory of this rank.
    pub backend: Arc<dyn Backend>,
    /// All ranks, numbered `data-parallel rank * tensor-parallel size + tensor-parallel rank`.
    pub world: Box<dyn Communicator>,
    /// The tensor-parallel group: ranks that share a batch.
    pub tp: Box<dyn Communicator>,
    /// Ranks that share each expert (tensor split inside an expert); divides the world.
    pub expert_tp: usize,
    /// Types of weights and activations.
    pub precision: Precision,
    /// Where this rank's time goes.
    pub clock: WorkClock,
}

impl Rank {
    /// Begins a step: time counts from here on.
    pub fn start_clock(&mut self) {
        self.clock.start(self.world.waited() + self.tp.waited());
    }

    /// The time since the last lap went into `work`, or into waiting for other ranks.
    pub fn lap(&mut self, work: Work) {
        self.clock.lap(work, self.world.waited() + self.tp.waited());
    }

    /// Counts a gathering over the tensor-parallel group: this rank's `own` bytes of `all` went to every other rank.
    pub fn count_gathering(&self, own: usize, all: usize) {
        let others = self.tp.size() - 1;
        self.clock.meter().exchange(CommOp::AllReduce, own * others, all - own);
    }

    /// Counts a sum that left this rank `own` bytes of `all`: the rest of its parts went out, and every other rank's
    /// part of its own came in.
    pub fn count_scattering(&self, own: usize, all: usize) {
        let others = self.tp.size() - 1;
        self.clock.meter().exchange(CommOp::AllReduce, all - own, own * others);
    }

    /// Shares `rows` out over the tensor-parallel group as evenly as possible, earlier ranks first: the owned rows of each.
    pub fn owned_counts(&self, rows: usize, counts: &mut Vec<usize>) {
        let size = self.tp.size();
        counts.clear();
        counts.extend((0..size).map(|r| rows / size + usize::from(r < rows % size)));
    }
}

/// The range of rows that rank `rank` owns under `counts`.
pub fn owned_range(counts: &[usize], rank: usize) -> Range<usize> {
    let start: usize = counts[..rank].iter().sum();
    start..start + counts[rank]
}

/// A buffer for rows of one width that is made for an expected number of rows and grows when a step brings more.
pub struct RowBuffer {
    /// Rows may be further apart than their width.
    tensor: Tensor,
    cols: usize,
}

impl RowBuffer {
    /// Room for `rows` rows of `cols` elements.
    pub fn new(backend: &dyn Backend, dtype: DType, rows: usize, cols: usize) -> Result<Self> {
        Ok(RowBuffer { tensor: backend.alloc(dtype, rows.max(1), cols)?, cols })
    }

    /// [`RowBuffer::new`] for rows that are multiplied with matrices: as far apart as the backend wants them for that.
    pub fn operand(backend: &dyn Backend, dtype: DType, rows: usize, cols: usize) -> Result<Self> {
        let pitch = backend.row_pitch(dtype, cols);
        Ok(RowBuffer { tensor: backend.alloc(dtype, rows.max(1), pitch)?, cols })
    }

    /// Makes room for `rows` rows; what was in the buffer is lost if it has to grow.
    pub fn reserve(&mut self, backend: &dyn Backend, rows: usize) -> Result<()> {
        if rows > self.tensor.rows() {
            self.tensor = backend.alloc(self.tensor.dtype(), rows.next_power_of_two(), self.tensor.cols())?;
        }
        Ok(())
    }

    /// The first `rows` rows, to read.
    pub fn head(&self, rows: usize) -> View<'_> {
        self.tensor.head(rows).cols_range(0..self.cols)
    }

    /// The first `rows` rows, to write.
    pub fn head_mut(&mut self, rows: usize) -> ViewMut<'_> {
        self.tensor.head_mut(rows).cols_range(0..self.cols)
    }
}

/// A device copy of host numbers as one row `[1, n]` f32: norm weights, biases, sinks.
pub fn upload_row(backend: &dyn Backend, values: &[f32]) -> Result<Tensor> {
    let mut tensor = backend.alloc(DType::F32, 1, values.len())?;
    backend.upload(bytemuck::cast_slice(values), tensor.view_mut())?;
    Ok(tensor)
}
