//! The devices of the ranks: what `--device` and `--comm` come to on this machine.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::backend::Backend;
use crate::backend::cpu::CpuBackend;
use crate::backend::cuda::{self, CudaBackend, GpuInfo};
use crate::comm::Transport;
use crate::comm::nccl::{self, Library};
use crate::config::flags::{CommChoice, DeviceChoice};
use crate::config::host_memory;
use crate::config::resolve::ModelOptions;
use crate::config::size::ByteSize;
use crate::error::{Error, Result};

/// Kernels, streams and what the driver keeps for itself.
const GPU_RESERVE_BYTES: u64 = 1 << 30;
/// Many GPUs take a while to find each other.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(120);
/// NCCL by file, where it is not what the system's loader finds.
const NCCL_FILE: &str = "MOEYARD_NCCL_SO";
/// NCCL's own switch for several ranks on one GPU.
const NCCL_SHARES: &str = "NCCL_MULTI_RANK_GPU_ENABLE";

/// One backend per rank, the memory they have together, and how they exchange rows.
pub struct Devices {
    /// In rank order.
    pub backends: Vec<Arc<dyn Backend>>,
    /// Bytes that weights, KV cache and working space of all ranks may take.
    pub memory: u64,
    /// What connects them.
    pub transport: Transport,
}

/// Opens a device for each of `ranks`. `auto` is GPUs where there are any, and says why there are none otherwise.
///
/// # Errors
/// [`Error::Config`] when `cuda`, `nccl` or experts in fp8 or int4 are asked for and cannot be had, with the reason; [`Error::Memory`] when the system
/// refuses threads or memory.
pub fn open(asked: &ModelOptions, ranks: usize) -> Result<Devices> {
    match (asked.device, cuda::devices()) {
        (DeviceChoice::Cpu, _) => on_cpu(asked, ranks),
        (DeviceChoice::Auto | DeviceChoice::Cuda, Ok(gpus)) => on_gpus(asked, ranks, gpus.len()),
        (DeviceChoice::Cuda, Err(why)) => Err(Error::config("device", format!("cuda: {why}"))),
        (DeviceChoice::Auto, Err(why)) => {
            if let Some(quantize) = asked.quantize.filter(|quantize| quantize.device() == DeviceChoice::Cuda)
            {
                let why = format!("{}, and there are none: {why}", quantize.where_computed());
                return Err(Error::config("quantize", why));
            }
            tracing::info!("computing on the CPU: {why}");
            on_cpu(asked, ranks)
        }
    }
}

/// The GPUs of this machine and what lies between them, one line each, and where `ranks` would sit; or why none can be used.
pub fn report(asked: &ModelOptions, ranks: usize) -> String {
    let line = |label: &str, value: String| format!("{:<20}{value}\n", format!("{label}:"));
    let gpus = match cuda::devices() {
        Err(why) => return line("GPUs", format!("none: {why}")),
        Ok(gpus) => gpus,
    };
    let mut text: String =
        gpus.iter().map(|gpu| line(&format!("GPU {}", gpu.ordinal), describe(gpu))).collect();
    for (a, b, link) in cuda::links(gpus.len() as u32) {
        text += &line(&format!("GPU {a} to {b}"), link.to_string());
    }
    if asked.device != DeviceChoice::Cpu {
        text += &match seats(asked.comm, ranks, gpus.len(), find_nccl, nccl_shares()) {
            Ok(seats) => line("ranks on GPUs", seats.describe()),
            Err(error) => line("ranks on GPUs", format!("refused: {error}")),
        };
    }
    text
}

fn describe(gpu: &GpuInfo) -> String {
    let (major, minor) = gpu.capability;
    format!("{}, sm_{major}{minor}, {}", gpu.name, ByteSize(gpu.memory))
}

fn on_cpu(asked: &ModelOptions, ranks: usize) -> Result<Devices> {
    if asked.comm == CommChoice::Nccl {
        return Err(Error::config("comm", "nccl exchanges rows between GPUs, and the ranks are on the CPU"));
    }
    let backends = (0..ranks)
        .map(|_| Ok(Arc::new(CpuBackend::detect(asked.threads)?) as Arc<dyn Backend>))
        .collect::<Result<Vec<_>>>()?;
    let memory = host_memory::available().unwrap_or(u64::MAX);
    Ok(Devices { backends, memory, transport: Transport::Local })
}

fn on_gpus(asked: &ModelOptions, ranks: usize, gpus: usize) -> Result<Devices> {
    if let Some(quantize) = asked.quantize.filter(|quantize| quantize.device() == DeviceChoice::Cpu) {
        let why = format!("{}, and this machine has GPUs: add --device cpu", quantize.where_computed());
        return Err(Error::config("quantize", why));
    }
    if let Some(quantize) = asked.quantize {
        tracing::warn!(
            "{} experts: their kernel was checked without a GPU, and has not run on one yet",
            quantize.name()
        );
    }
    let seats = seats(asked.comm, ranks, gpus, find_nccl, nccl_shares())?;
    if seats.shared && ranks > 1 && gpus > 1 {
        tracing::warn!("{ranks} ranks share GPU 0, {} more stay idle", gpus - 1);
    }
    let opened = (0..ranks)
        .map(|rank| CudaBackend::open(if seats.shared { 0 } else { rank as u32 }))
        .collect::<Result<Vec<_>>>()?;
    let free = opened.iter().map(CudaBackend::free_memory).collect::<Result<Vec<_>>>()?;
    let least = free.into_iter().min().unwrap_or(0).saturating_sub(GPU_RESERVE_BYTES);
    let memory = if seats.shared { least } else { least.saturating_mul(ranks as u64) };
    let backends = opened.into_iter().map(CudaBackend::into_dyn).collect();
    let transport = match seats.nccl {
        None => Transport::Local,
        Some(library) => {
            tracing::info!("ranks exchange rows by {}", library.describe());
            let options = nccl::Options {
                connect_timeout: asked.comm_timeout.max(CONNECT_TIMEOUT),
                timeout: asked.comm_timeout,
                shared_gpu: seats.shared,
                loopback: false,
            };
            Transport::Nccl(library, options)
        }
    };
    Ok(Devices { backends, memory, transport })
}

fn find_nccl() -> Result<Arc<Library>, String> {
    let given = std::env::var_os(NCCL_FILE);
    Library::load(given.as_deref().map(Path::new)).map(Arc::new)
}

fn nccl_shares() -> bool {
    std::env::var_os(NCCL_SHARES).is_some_and(|value| value == "1")
}

/// Where ranks sit: all on GPU 0, or rank r on GPU r.
struct Seats {
    ranks: usize,
    /// All on GPU 0.
    shared: bool,
    nccl: Option<Arc<Library>>,
}

impl Seats {
    fn describe(&self) -> String {
        let Seats { ranks, shared, nccl } = self;
        let by = nccl.as_ref().map_or("local copies".to_owned(), |library| library.describe());
        match (ranks, shared) {
            (1, _) => "rank 0 on GPU 0".to_owned(),
            (_, true) => format!("{ranks} share GPU 0, exchange by {by}"),
            (_, false) => format!("rank r on GPU r, 0 to {}, exchange by {by}", ranks - 1),
        }
    }
}

/// `find` looks for NCCL; `may_share` tells whether NCCL may put several ranks on one GPU.
fn seats(
    comm: CommChoice,
    ranks: usize,
    gpus: usize,
    find: impl FnOnce() -> Result<Arc<Library>, String>,
    may_share: bool,
) -> Result<Seats> {
    let refused = |why: String| Error::config("comm", why);
    let apart = ranks > 1 && ranks <= gpus;
    match comm {
        CommChoice::Local => Ok(Seats { ranks, shared: true, nccl: None }),
        CommChoice::Auto if !apart => Ok(Seats { ranks, shared: true, nccl: None }),
        CommChoice::Auto => {
            let nccl = find().map_err(|why| {
                refused(format!(
                    "{ranks} ranks on as many GPUs exchange rows by NCCL: {why}; name its file in {NCCL_FILE}, or let all \
                     ranks share GPU 0 with --comm local"
                ))
            })?;
            Ok(Seats { ranks, shared: false, nccl: Some(nccl) })
        }
        CommChoice::Nccl => {
            let nccl = find().map_err(|why| refused(format!("{why}; name its file in {NCCL_FILE}")))?;
            if ranks > gpus {
                check_sharing(ranks, gpus, &nccl, may_share).map_err(refused)?;
            }
            Ok(Seats { ranks, shared: ranks > gpus, nccl: Some(nccl) })
        }
    }
}

/// Whether NCCL can connect more ranks than there are GPUs.
fn check_sharing(ranks: usize, gpus: usize, nccl: &Library, may_share: bool) -> Result<(), String> {
    if gpus > 1 {
        return Err(format!(
            "expected at most {gpus} ranks for {gpus} GPUs, found {ranks}: nccl takes one rank per GPU, or all on a single one"
        ));
    }
    if !nccl.shares_gpus() {
        return Err(format!("{ranks} ranks on one GPU need NCCL 2.30 or newer, found {}", nccl.describe()));
    }
    if !may_share {
        return Err(format!("{ranks} ranks on one GPU: NCCL allows it only with {NCCL_SHARES}=1"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn none() -> Result<Arc<Library>, String> {
        Err("NCCL cannot be loaded (libnccl.so.2: not there)".to_owned())
    }

    #[test]
    fn ranks_share_a_gpu_unless_each_has_its_own() {
        for (comm, ranks, gpus) in [
            (CommChoice::Auto, 1, 8),
            (CommChoice::Auto, 4, 1),
            (CommChoice::Auto, 4, 2),
            (CommChoice::Local, 4, 8),
        ] {
            let seats = seats(comm, ranks, gpus, none, false).unwrap();
            assert!(seats.shared && seats.nccl.is_none(), "{ranks} ranks, {gpus} GPUs");
        }
    }

    #[test]
    fn a_missing_nccl_is_named_with_the_way_out() {
        let refusal = |comm, ranks, gpus| seats(comm, ranks, gpus, none, false).err().unwrap().to_string();
        assert_eq!(
            refusal(CommChoice::Auto, 2, 4),
            "comm: 2 ranks on as many GPUs exchange rows by NCCL: NCCL cannot be loaded (libnccl.so.2: not there); name its \
             file in MOEYARD_NCCL_SO, or let all ranks share GPU 0 with --comm local"
        );
        assert_eq!(
            refusal(CommChoice::Nccl, 1, 1),
            "comm: NCCL cannot be loaded (libnccl.so.2: not there); name its file in MOEYARD_NCCL_SO"
        );
    }
}
