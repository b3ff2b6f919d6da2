//! Launches that are put off until there are enough of them, and graphs of sequences of launches that come again.
//!
//! A graph is the memo of a sequence: it is replayed where every launcher and every byte of its arguments is the same, so none can be
//! stale. What changes from step to step, such as tokens and block tables, reaches kernels through device memory that stays
//! where it is ([`super::memory::Resident`]).

use std::collections::{HashMap, VecDeque};
use std::ffi::{c_int, c_void};
use std::sync::Arc;

use cudarc::driver::{CudaGraph, CudaStream, DriverError, sys};

use super::ffi;
use crate::backend::StepCounts;

/// Graphs that are kept: those of more batch sizes than a server has that is neither filling up nor running dry. A step of one rank has
/// one for some hundred launches, one of several ranks some for each layer.
const KEPT: usize = 2048;
/// Sequences after which a graph may make room that was not used since: a step with more graphs than there is room for leaves alone
/// those it has.
const STALE: u64 = 2 * KEPT as u64;
/// Sequences that are remembered to have come once.
const REMEMBERED: usize = 2048;
/// Graphs are a matter of speed alone: after as many failures none is tried again.
const FAILURES: usize = 4;

/// A launcher of any argument struct.
type AnyLauncher = unsafe extern "C" fn(*const c_void, *mut c_void) -> c_int;

/// A launch that failed, and the runtime's error.
pub struct Failed {
    pub what: &'static str,
    pub code: c_int,
}

struct Launch {
    what: &'static str,
    launcher: AnyLauncher,
    /// Where its arguments start in the words.
    args: usize,
}

/// A sequence of launches.
#[derive(Default)]
pub struct Launches {
    /// Of each launch the launcher's address and the words of its arguments.
    words: Vec<u64>,
    launches: Vec<Launch>,
}

impl Launches {
    pub fn push<A: bytemuck::NoUninit>(&mut self, what: &'static str, launcher: ffi::Launcher<A>, args: &A) {
        const { assert!(align_of::<A>() == align_of::<u64>()) };
        // SAFETY: the types differ in what a pointer points to, which no calling convention sees; it is called with
        // such a pointer again.
        let launcher = unsafe { std::mem::transmute::<ffi::Launcher<A>, AnyLauncher>(launcher) };
        self.words.push(launcher as usize as u64);
        self.launches.push(Launch { what, launcher, args: self.words.len() });
        self.words.extend_from_slice(bytemuck::cast_slice(std::slice::from_ref(args)));
    }

    pub fn len(&self) -> usize {
        self.launches.len()
    }

    pub fn is_empty(&self) -> bool {
        self.launches.is_empty()
    }

    pub fn clear(&mut self) {
        self.words.clear();
        self.launches.clear();
    }

    /// Gives all of them to a stream of the current context.
    pub fn run(&self, stream: sys::CUstream) -> Result<(), Failed> {
        for &Launch { what, launcher, args } in &self.launches {
            // SAFETY: the arguments were pushed with this launcher; what they point to is device memory of tensors and buffers,
            // which are freed only after everything that was put off has been given to the stream.
            match unsafe { launcher(self.words[args..].as_ptr().cast(), stream.cast()) } {
                0 => {}
                code => return Err(Failed { what, code }),
            }
        }
        Ok(())
    }

    /// A number that other sequences hardly share: FxHash over the words.
    fn fingerprint(&self) -> u64 {
        let mix = |hash: u64, &word: &u64| (hash.rotate_left(5) ^ word).wrapping_mul(0x517c_c1b7_2722_0a95);
        self.words.iter().fold(0, mix)
    }
}

struct Kept {
    words: Vec<u64>,
    graph: CudaGraph,
    /// When it was replayed last, in sequences.
    used: u64,
}

// SAFETY: the driver's graphs may be used from any thread, by one at a time.
unsafe impl Send for Kept {}

/// Graphs of sequences that came at least twice, by their fingerprints.
#[derive(Default)]
pub struct Graphs {
    kept: HashMap<u64, Kept>,
    /// Sequences so far.
    now: u64,
    once: VecDeque<u64>,
    failures: usize,
    counts: StepCounts,
}

impl Graphs {
    pub fn counts(&self) -> StepCounts {
        self.counts
    }

    /// Whether `launches` is better captured than run: it came before, and is not kept.
    pub fn comes_again(&mut self, launches: &Launches) -> bool {
        if self.failures >= FAILURES {
            return false;
        }
        let fingerprint = launches.fingerprint();
        if let Some(at) = self.once.iter().position(|&other| other == fingerprint) {
            self.once.remove(at);
            return true;
        }
        if self.once.len() == REMEMBERED {
            self.once.pop_front();
        }
        self.once.push_back(fingerprint);
        false
    }

    /// A sequence ran launch by launch.
    pub fn count_run(&mut self) {
        self.counts.run += 1;
    }

    /// Replays the graph of these launches, where there is one.
    pub fn replay(&mut self, launches: &Launches) -> Result<bool, DriverError> {
        self.now += 1;
        let kept = self.kept.get_mut(&launches.fingerprint());
        let Some(kept) = kept.filter(|kept| kept.words == launches.words) else {
            return Ok(false);
        };
        kept.used = self.now;
        kept.graph.launch()?;
        self.counts.replayed += 1;
        Ok(true)
    }

    /// Makes a graph of launches without running them, where there is room. All kernels were loaded when they ran before.
    pub fn capture(&mut self, launches: &Launches, stream: &Arc<CudaStream>) {
        if !self.make_room() {
            return;
        }
        match graph_of(launches, stream) {
            Ok(graph) => {
                let kept = Kept { words: launches.words.clone(), graph, used: self.now };
                self.kept.insert(launches.fingerprint(), kept);
                self.counts.captured += 1;
                let kept = self.kept.len();
                tracing::debug!(
                    launches = launches.launches.len(),
                    kept,
                    "a piece of a step became a CUDA graph"
                );
            }
            Err(why) => {
                self.failures += 1;
                tracing::warn!(%why, "a piece of a step could not be made a CUDA graph and runs without");
            }
        }
    }

    /// Whether there is room for one more graph, now that the one unused for longest may have gone. One that still runs is destroyed by
    /// the driver when it is done.
    fn make_room(&mut self) -> bool {
        if self.kept.len() < KEPT {
            return true;
        }
        let oldest = self.kept.iter().min_by_key(|(_, kept)| kept.used);
        let (&fingerprint, Kept { used, .. }) = oldest.expect("as many as are kept");
        let stale = self.now - used > STALE;
        if stale {
            self.kept.remove(&fingerprint);
        }
        stale
    }
}

fn graph_of(launches: &Launches, stream: &Arc<CudaStream>) -> Result<CudaGraph, String> {
    // Other ranks' threads may allocate meanwhile.
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    stream.begin_capture(mode).map_err(|e| format!("beginning to capture: {:?}", e.0))?;
    let ran = launches.run(stream.cu_stream());
    // The stream leaves the capture whatever happened.
    let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0));
    ran.map_err(|failed| format!("{}: error {}", failed.what, failed.code))?;
    let graph = graph.map_err(|e| format!("ending the capture: {:?}", e.0))?;
    graph.ok_or_else(|| "nothing was captured".to_owned())
}
