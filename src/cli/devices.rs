//! The devices of the ranks: what `--device` comes to on this machine.

use std::sync::Arc;

use crate::backend::Backend;
use crate::backend::cpu::CpuBackend;
use crate::backend::cuda::{self, CudaBackend};
use crate::config::flags::DeviceChoice;
use crate::config::host_memory;
use crate::config::size::ByteSize;
use crate::error::{Error, Result};

/// Kernels, streams and what the driver keeps for itself.
const GPU_RESERVE_BYTES: u64 = 1 << 30;

/// One backend per rank, and the memory they share.
pub struct Devices {
    /// In rank order.
    pub backends: Vec<Arc<dyn Backend>>,
    /// Bytes that weights, KV cache and working space of all ranks may take.
    pub memory: u64,
}

/// Opens a device for each of `ranks`; `threads` is for ranks on the CPU. `auto` is the first GPU where there is one, and says
/// why there is none otherwise.
///
/// # Errors
/// [`Error::Config`] when `cuda` is asked for and cannot be had, with the reason; [`Error::Memory`] when the system refuses
/// threads or memory.
pub fn open(choice: DeviceChoice, ranks: usize, threads: usize) -> Result<Devices> {
    match (choice, cuda::devices()) {
        (DeviceChoice::Cpu, _) => on_cpu(ranks, threads),
        (DeviceChoice::Auto | DeviceChoice::Cuda, Ok(_)) => on_gpu(ranks),
        (DeviceChoice::Cuda, Err(why)) => Err(Error::config("device", format!("cuda: {why}"))),
        (DeviceChoice::Auto, Err(why)) => {
            tracing::info!("computing on the CPU: {why}");
            on_cpu(ranks, threads)
        }
    }
}

/// The GPUs of this machine, one line each, or why none can be used.
pub fn report() -> String {
    match cuda::devices() {
        Err(why) => format!("{:<20}none: {why}\n", "GPUs:"),
        Ok(gpus) => gpus
            .iter()
            .map(|gpu| {
                let (major, minor) = gpu.capability;
                let memory = ByteSize(gpu.memory);
                format!("{:<20}{}, sm_{major}{minor}, {memory}\n", format!("GPU {}:", gpu.ordinal), gpu.name)
            })
            .collect(),
    }
}

fn on_cpu(ranks: usize, threads: usize) -> Result<Devices> {
    let backends = (0..ranks)
        .map(|_| Ok(Arc::new(CpuBackend::detect(threads)?) as Arc<dyn Backend>))
        .collect::<Result<Vec<_>>>()?;
    Ok(Devices { backends, memory: host_memory::available().unwrap_or(u64::MAX) })
}

/// All ranks share GPU 0: exchanges between GPUs need NCCL. `CUDA_VISIBLE_DEVICES` says which one is 0.
fn on_gpu(ranks: usize) -> Result<Devices> {
    if ranks > 1 {
        tracing::warn!("{ranks} ranks share GPU 0: this build has no exchange between GPUs");
    }
    let opened = (0..ranks).map(|_| CudaBackend::open(0)).collect::<Result<Vec<_>>>()?;
    let free = opened.first().map_or(Ok(0), CudaBackend::free_memory)?;
    let backends = opened.into_iter().map(CudaBackend::into_dyn).collect();
    Ok(Devices { backends, memory: free.saturating_sub(GPU_RESERVE_BYTES) })
}
