//! One rank's hold on a GPU: the primary context, a stream, and errors that say what failed.

use std::ffi::{CStr, c_void};
use std::sync::{Arc, Mutex, OnceLock};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;
use cudarc::driver::{CudaContext, CudaStream};

use super::graphs::Graphs;
use super::launches::{Failed, Graph, Launches};
use super::{Lock as _, ffi};
use crate::backend::StepCounts;
use crate::backend::cuda::{GpuInfo, Link};
use crate::error::{Error, Result};

/// The GPUs that can be used, or why there are none. Never panics: cudarc panics when the driver's library is missing, so
/// its presence is asked first.
///
/// # Errors
/// A sentence for the user.
pub fn devices() -> Result<Vec<GpuInfo>, String> {
    // SAFETY: only tries to open the library.
    if !unsafe { sys::is_culib_present() } {
        return Err("no NVIDIA driver (libcuda.so.1 is not there)".to_owned());
    }
    let count =
        CudaContext::device_count().map_err(|e| format!("the NVIDIA driver cannot be used: {}", name(e)))?;
    if count == 0 {
        return Err("the NVIDIA driver finds no GPU".to_owned());
    }
    // The runtime linked into this program may be newer than the driver.
    // SAFETY: takes and keeps nothing.
    let seen = unsafe { ffi::moeyard_device_count() };
    if seen < count {
        let error = if seen < 0 { runtime_error(-seen) } else { format!("it sees {seen} of {count} GPUs") };
        return Err(format!("the CUDA runtime of this build cannot use the NVIDIA driver: {error}"));
    }
    let found = (0..count as u32)
        .map(|ordinal| info(ordinal).map_err(|e| format!("GPU {ordinal} cannot be asked: {}", name(e))))
        .collect::<Result<Vec<_>, _>>()?;
    match found.iter().find(|gpu| !runs_on(ARCHS, gpu.capability)) {
        None => Ok(found),
        Some(gpu) => Err(format!(
            "{} has compute capability {}.{}, and this build has kernels for {ARCHS} (MOEYARD_CUDA_ARCHS)",
            gpu.name, gpu.capability.0, gpu.capability.1
        )),
    }
}

/// What lies between every two of the first `gpus` GPUs.
pub fn links(gpus: u32) -> Vec<(u32, u32, Link)> {
    let pairs = (0..gpus).flat_map(|a| (a + 1..gpus).map(move |b| (a, b)));
    pairs.map(|(a, b)| (a, b, link(a, b))).collect()
}

fn link(a: u32, b: u32) -> Link {
    use sys::CUdevice_P2PAttribute_enum as Attribute;
    // What the driver does not tell, it does not have.
    let has = |which| {
        let (Ok(from), Ok(to)) = (result::device::get(a as i32), result::device::get(b as i32)) else {
            return false;
        };
        let mut value = 0;
        // SAFETY: writes one number; both devices came from the driver.
        let asked = unsafe { sys::cuDeviceGetP2PAttribute(&mut value, which, from, to) };
        asked == sys::CUresult::CUDA_SUCCESS && value != 0
    };
    match has(Attribute::CU_DEVICE_P2P_ATTRIBUTE_ACCESS_SUPPORTED) {
        true if has(Attribute::CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED) => Link::NvLink,
        true => Link::Pcie,
        false => Link::Host,
    }
}

/// What the kernels were compiled for, such as "80,90a".
const ARCHS: &str = env!("MOEYARD_CUDA_ARCHS");

/// Whether machine code for one of `archs` runs on this capability: an architecture serves its own major number from its minor
/// number on; one with a letter, only itself.
fn runs_on(archs: &str, (major, minor): (u32, u32)) -> bool {
    archs.split(',').any(|arch| {
        let digits = arch.trim_end_matches(|c: char| c.is_ascii_lowercase());
        let Ok(number) = digits.parse::<u32>() else { return false };
        let exact = digits.len() < arch.len();
        number / 10 == major && (number % 10 == minor || (!exact && number % 10 < minor))
    })
}

fn info(ordinal: u32) -> Result<GpuInfo, DriverError> {
    use sys::CUdevice_attribute_enum as Attribute;
    let device = result::device::get(ordinal as i32)?;
    // SAFETY: `device` came from the driver.
    let attribute = |which| unsafe { result::device::get_attribute(device, which) };
    Ok(GpuInfo {
        ordinal,
        name: result::device::get_name(device)?,
        capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? as u32,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)? as u32,
        ),
        // SAFETY: as above.
        memory: unsafe { result::device::total_mem(device)? } as u64,
    })
}

/// The symbol of a driver error, such as CUDA_ERROR_NO_DEVICE.
fn name(error: DriverError) -> String {
    error.error_name().map_or_else(|_| format!("{:?}", error.0), |name| name.to_string_lossy().into_owned())
}

fn runtime_error(code: i32) -> String {
    // SAFETY: the runtime returns a static string for every number.
    unsafe { CStr::from_ptr(ffi::moeyard_error_name(code)) }.to_string_lossy().into_owned()
}

/// Whether the kernels for Hopper's own instructions are in this build and run on this capability.
fn has_warpgroups(archs: &str, capability: (u32, u32)) -> bool {
    capability == (9, 0) && archs.split(',').any(|arch| arch == "90a")
}

/// Launches of a step that are not put off: the GPU works on them while the host puts the others together.
const STEP_HEAD: usize = 32;
/// Launches that are put off before they are given to the GPU together, which works on them while the host goes on.
const STEP_SEGMENT: usize = 96;

/// Fewer launches are no quicker as a graph.
const FEWEST_REPLAYED: usize = 4;

/// By the ordinal of a GPU: held while one of its streams is captured, which is when the driver refuses to wait for the whole GPU.
/// Whoever waits for one GPU must not keep those of others from work that it waits for.
static CAPTURES: [Mutex<()>; 64] = [const { Mutex::new(()) }; 64];

fn capture_of(ordinal: u32) -> &'static Mutex<()> {
    &CAPTURES[ordinal as usize % CAPTURES.len()]
}

/// A context and a stream of its own. All work of a rank runs in the order in which it was given.
pub struct Gpu {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    info: GpuInfo,
    /// Why nothing that was computed here counts any more.
    poison: OnceLock<Poison>,
    step: Mutex<Step>,
}

/// See [`crate::backend::Backend::poison`].
struct Poison {
    why: String,
    /// The rank, when it only saw another one fail.
    bystander: Option<usize>,
}

/// What was put off in the step that is open.
#[derive(Default)]
struct Step {
    open: bool,
    /// Launches that still go to the stream at once.
    head: usize,
    launches: Launches,
    /// Which sequence of launches is being put together; never the same again.
    sequence: u64,
    graphs: Graphs<Graph>,
}

impl Gpu {
    /// Opens GPU `ordinal`.
    pub fn open(ordinal: u32) -> Result<Gpu> {
        let found = devices().map_err(|why| Error::config("device", why))?;
        let Some(info) = found.get(ordinal as usize).cloned() else {
            let why = format!("expected a GPU from 0 to {}, found {ordinal}", found.len() - 1);
            return Err(Error::config("device", why));
        };
        let failed =
            |e| Error::Device { device: format!("cuda:{ordinal}"), why: format!("opening it: {}", name(e)) };
        // Making a stream waits for the GPU.
        let _alone = capture_of(ordinal).lock_now();
        let context = CudaContext::new(ordinal as usize).map_err(failed)?;
        let stream = context.new_stream().map_err(failed)?;
        Ok(Gpu { context, stream, info, poison: OnceLock::new(), step: Mutex::default() })
    }

    pub fn info(&self) -> &GpuInfo {
        &self.info
    }

    /// Whether the kernels made of warpgroup instructions run here.
    pub fn has_warpgroups(&self) -> bool {
        has_warpgroups(ARCHS, self.info.capability)
    }

    /// The stream, for anything that is not a launch: what was put off goes there first, as a piece of the step that may come again.
    pub fn stream(&self) -> Result<sys::CUstream> {
        let mut step = self.step.lock_now();
        if !step.launches.is_empty() {
            self.close_segment(&mut step)?;
        }
        Ok(self.stream.cu_stream())
    }

    /// One more stream.
    pub fn new_stream(&self) -> Result<Arc<CudaStream>> {
        // Making a stream waits for the GPU.
        let _alone = capture_of(self.info.ordinal).lock_now();
        self.driver("making a stream", self.context.new_stream())
    }

    /// The stream, for copies into memory that nothing put off reads.
    pub fn stream_beside_step(&self) -> sys::CUstream {
        self.stream.cu_stream()
    }

    /// Makes this GPU the calling thread's: what every driver or runtime call needs before it.
    pub fn enter(&self) -> Result<()> {
        self.sound()?;
        self.driver("entering its context", self.context.bind_to_thread())
    }

    /// From now on every call fails, and so does one that waits for the stream; the first reason given is the one told.
    pub fn poison(&self, why: &str, bystander: Option<usize>) {
        let _ = self.poison.set(Poison { why: why.to_owned(), bystander });
    }

    fn sound(&self) -> Result<()> {
        match self.poison.get() {
            None => Ok(()),
            Some(Poison { why, bystander: None }) => Err(self.failure(why.clone())),
            Some(&Poison { ref why, bystander: Some(rank) }) => Err(Error::Peer { rank, why: why.clone() }),
        }
    }

    /// An error of the driver as one of ours.
    pub fn driver<T>(&self, what: &str, outcome: Result<T, DriverError>) -> Result<T> {
        outcome.map_err(|e| self.failure(format!("{what}: {}", name(e))))
    }

    pub fn failure(&self, why: String) -> Error {
        Error::Device { device: format!("cuda:{}", self.info.ordinal), why }
    }

    /// Puts a kernel into the stream, or into the step that is open.
    pub fn launch<A: bytemuck::NoUninit>(
        &self,
        what: &'static str,
        launcher: ffi::Launcher<A>,
        args: &A,
    ) -> Result<()> {
        {
            let mut step = self.step.lock_now();
            if step.open && step.head == 0 {
                step.launches.push(what, launcher, args);
                return if step.launches.len() < STEP_SEGMENT {
                    Ok(())
                } else {
                    self.close_segment(&mut step)
                };
            }
            step.head = step.head.saturating_sub(1);
        }
        self.enter()?;
        // SAFETY: the launcher reads its own argument struct, which lives until it returns; what the struct points to is
        // device memory of tensors that outlive the call, and memory is freed only after the context has come to rest.
        match unsafe { launcher(args, self.stream.cu_stream().cast::<c_void>()) } {
            0 => Ok(()),
            code => Err(self.launch_failure(Failed { what, code })),
        }
    }

    fn launch_failure(&self, Failed { what, code }: Failed) -> Error {
        self.failure(format!("{what}: {}", runtime_error(code)))
    }

    /// From here on launches are put off, all but the first few. None starts before all that was launched earlier is done: kernels of a
    /// step may read weights before it is their turn.
    ///
    /// # Panics
    /// When a step is open.
    pub fn begin_step(&self) -> Result<()> {
        let mut step = self.step.lock_now();
        assert!(!step.open, "a step within a step");
        self.enter()?;
        // SAFETY: the stream lives as long as `self`.
        let code = unsafe { ffi::moeyard_settle(self.stream.cu_stream().cast::<c_void>()) };
        if code != 0 {
            return Err(self.launch_failure(Failed { what: "the beginning of a step", code }));
        }
        step.open = true;
        step.head = STEP_HEAD;
        Ok(())
    }

    /// Runs what was put off.
    pub fn end_step(&self) -> Result<()> {
        let mut step = self.step.lock_now();
        step.open = false;
        self.close_segment(&mut step)
    }

    /// Runs what was put off so far: as a graph where the same sequence of launches came before.
    fn close_segment(&self, step: &mut Step) -> Result<()> {
        self.enter()?;
        step.sequence += 1;
        let Step { launches, graphs, .. } = step;
        let done = self.run(launches, graphs);
        launches.clear();
        done
    }

    fn run(&self, launches: &Launches, graphs: &mut Graphs<Graph>) -> Result<()> {
        let run = || launches.run(self.stream.cu_stream()).map_err(|failed| self.launch_failure(failed));
        if launches.len() < FEWEST_REPLAYED {
            return run();
        }
        let replay = |graph: &Graph| self.driver("replaying a step", graph.launch());
        if let Some(graph) = graphs.find(launches.words()) {
            return replay(graph);
        }
        if graphs.wants(launches.words()) {
            let _alone = capture_of(self.info.ordinal).lock_now();
            match launches.capture(&self.stream) {
                Ok(graph) => {
                    let kept = graphs.len() + 1;
                    tracing::debug!(launches = launches.len(), kept, "a piece of a step became a CUDA graph");
                    return replay(graphs.keep(launches.words(), graph));
                }
                Err(why) => {
                    graphs.count_failure();
                    tracing::warn!(%why, "a piece of a step could not be made a CUDA graph and runs without");
                }
            }
        }
        graphs.count_run();
        run()
    }

    /// Forgets what was put off, where a step is still open.
    pub fn abandon_step(&self) {
        let mut step = self.step.lock_now();
        step.open = false;
        step.launches.clear();
    }

    /// Gives what was put off to the stream; the step goes on.
    pub fn flush(&self) -> Result<()> {
        let mut step = self.step.lock_now();
        if step.launches.is_empty() {
            return Ok(());
        }
        self.enter()?;
        step.sequence += 1;
        let done = step.launches.run(self.stream.cu_stream());
        step.launches.clear();
        done.map_err(|failed| self.launch_failure(failed))
    }

    /// Whether launches are put off now, and in which sequence.
    pub fn open_sequence(&self) -> Option<u64> {
        let step = self.step.lock_now();
        step.open.then_some(step.sequence)
    }

    /// What became of the steps so far.
    pub fn step_counts(&self) -> StepCounts {
        self.step.lock_now().graphs.counts()
    }

    /// Waits until everything given to this rank's stream is done.
    pub fn synchronize(&self) -> Result<()> {
        self.enter()?;
        let stream = self.stream()?;
        // SAFETY: the stream lives as long as `self`.
        self.driver("waiting for it", unsafe { result::stream::synchronize(stream) })?;
        // What was waited for may have been cut short.
        self.sound()
    }

    /// Waits until the whole GPU is idle, other ranks' streams included.
    pub fn come_to_rest(&self) -> Result<()> {
        self.enter()?;
        self.flush()?;
        let _alone = capture_of(self.info.ordinal).lock_now();
        self.driver("waiting for it", result::ctx::synchronize())
    }

    /// Bytes free.
    pub fn free_memory(&self) -> Result<u64> {
        self.enter()?;
        self.driver("asking for its memory", result::mem_get_info()).map(|(free, _)| free as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::{has_warpgroups, runs_on};

    #[test]
    fn machine_code_serves_its_major_number() {
        for (archs, capability, expected) in [
            ("80,90a", (8, 0), true),
            ("80,90a", (8, 9), true),
            ("80,90a", (9, 0), true),
            ("80,90a", (10, 0), false),
            ("80,90a", (7, 5), false),
            ("86", (8, 0), false),
            ("100a", (10, 0), true),
            ("100a", (10, 3), false),
            ("120", (12, 1), true),
        ] {
            assert_eq!(runs_on(archs, capability), expected, "{archs} on {capability:?}");
        }
    }

    #[test]
    fn only_the_lettered_code_has_hoppers_own_instructions() {
        assert!(has_warpgroups("80,90a", (9, 0)));
        assert!(!has_warpgroups("80,90", (9, 0)));
        assert!(!has_warpgroups("80,90a,100a", (10, 0)));
    }
}
