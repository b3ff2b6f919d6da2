//! The CPU backend: the semantics of [`Backend`](crate::backend::Backend), fast.
//!
//! Threads come from [`pool`], memory from [`memory`], vectors from [`simd`]; the other files are one kernel family each. Every kernel
//! splits its work so that an output element is computed by one thread in one fixed order.

pub mod memory;
pub mod pool;
pub mod simd;

mod experts;
mod gemm;
mod operand;
mod panel;
mod tile;
mod work;

use crate::error::Result;
use memory::Scratch;
use pool::Pool;
use simd::{Isa, Kernel};
use work::WorkList;

/// One rank's share of the machine: some threads and an instruction set.
pub struct CpuBackend {
    pool: Pool,
    isa: Isa,
    scratch: Buffers,
}

/// Working memory kept between calls. Locked in the order of the fields.
#[derive(Default)]
struct Buffers {
    /// Activations converted for a product.
    activations: Scratch,
    /// What experts hold between their two matrices.
    intermediate: Scratch,
    /// The tasks of a product.
    work: WorkList,
}

impl CpuBackend {
    /// A backend of `threads` threads (the caller of each operation counts as one) with a given instruction set.
    ///
    /// # Errors
    /// [`crate::Error::Memory`] when the system refuses a thread.
    pub fn new(threads: usize, isa: Isa) -> Result<CpuBackend> {
        Ok(CpuBackend { pool: Pool::new(threads)?, isa, scratch: Buffers::default() })
    }

    /// [`CpuBackend::new`] with the best instruction set of this machine.
    ///
    /// # Errors
    /// See [`CpuBackend::new`].
    pub fn detect(threads: usize) -> Result<CpuBackend> {
        CpuBackend::new(threads, Isa::detect())
    }

    /// The threads of this rank.
    pub(crate) fn pool(&self) -> &Pool {
        &self.pool
    }

    /// The instruction set of this rank.
    pub(crate) fn isa(&self) -> Isa {
        self.isa
    }

    /// Runs a kernel on the calling thread.
    #[inline]
    pub(crate) fn dispatch<K: Kernel>(&self, kernel: K) -> K::Output {
        self.isa.dispatch(kernel)
    }
}

#[cfg(test)]
mod tests;
