//! NVIDIA GPUs: [`Backend`](super::Backend) by the kernels in `cuda/`, one stream per rank.
//!
//! Products of bf16 run on the tensor cores, everything else in plain f32 (never tf32). Each output element is summed in one
//! order, that of ascending k, positions or choices, whatever the tile or the rows beside it. The kernels are compiled with the
//! feature `cuda`; without it [`devices`] says so. Either way the program starts without a driver.

pub mod packing;

#[cfg(feature = "cuda")]
mod enabled;
#[cfg(feature = "cuda")]
pub use enabled::{CudaBackend, devices, links};

#[cfg(not(feature = "cuda"))]
mod disabled;
#[cfg(not(feature = "cuda"))]
pub use disabled::{CudaBackend, devices, links};

use std::fmt;

/// What lies between two GPUs of this machine, as far as the driver tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// Each reads and writes the other's memory, atomically too: what NVLink does and PCIe does not.
    NvLink,
    /// Each reads and writes the other's memory.
    Pcie,
    /// Rows pass through the host.
    Host,
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Link::NvLink => "NVLink (peer access, atomics)",
            Link::Pcie => "PCIe (peer access)",
            Link::Host => "through the host (no peer access)",
        })
    }
}

/// What computes products of bf16, and attention over them. The bits are the same, MLA's aside, so the choice is one of speed alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ProductKernels {
    /// The fastest here.
    #[default]
    Best,
    /// Those that run on every GPU, for attention too.
    Portable,
    /// On Hopper, persistent pairs of blocks and the copy engine (`cutlass-sys`) wherever they can be used. Tiles of many rows have `rows`
    /// of them, 64, 128, 192 or 256, or, with 0, what suits the groups.
    Clusters {
        /// Rows of a tile.
        rows: usize,
    },
}

/// A GPU of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuInfo {
    /// Its number, for [`CudaBackend::open`].
    pub ordinal: u32,
    /// As the driver calls it.
    pub name: String,
    /// Compute capability, major and minor.
    pub capability: (u32, u32),
    /// Bytes of its memory.
    pub memory: u64,
}
