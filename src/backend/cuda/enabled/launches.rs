//! Launches that are put off until there are enough of them, and graphs of those that come again.
//!
//! A graph is the memo of a sequence: it is replayed where every launcher and every byte of its arguments is the same, so none can be
//! stale. What changes from step to step, such as tokens and block tables, reaches kernels through device memory that stays
//! where it is ([`super::memory::Resident`]).

use std::ffi::{c_int, c_void};
use std::sync::Arc;

use cudarc::driver::{CudaGraph, CudaStream, DriverError, sys};

use super::ffi;

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

    /// What tells this sequence from others: see [`super::graphs::Graphs`].
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Makes a graph of them without running them. All kernels were loaded when they ran before.
    pub fn capture(&self, stream: &Arc<CudaStream>) -> Result<Graph, String> {
        // Other ranks' threads may allocate meanwhile.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        stream.begin_capture(mode).map_err(|e| format!("beginning to capture: {:?}", e.0))?;
        let ran = self.run(stream.cu_stream());
        // The stream leaves the capture whatever happened.
        let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0));
        ran.map_err(|failed| format!("{}: error {}", failed.what, failed.code))?;
        let graph = graph.map_err(|e| format!("ending the capture: {:?}", e.0))?;
        graph.map(Graph).ok_or_else(|| "nothing was captured".to_owned())
    }
}

/// A sequence of launches as one unit of work. One that still runs when it is dropped is destroyed by the driver when it is done.
pub struct Graph(CudaGraph);

// SAFETY: the driver's graphs may be used from any thread, by one at a time.
unsafe impl Send for Graph {}

impl Graph {
    /// Gives it to the stream that it was captured from.
    pub fn launch(&self) -> Result<(), DriverError> {
        self.0.launch()
    }
}
