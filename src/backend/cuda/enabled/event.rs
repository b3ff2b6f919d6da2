//! Points in a rank's stream.

use std::sync::Arc;

use cudarc::driver::{result, sys};

use super::gpu::Gpu;
use crate::backend::Event;
use crate::error::Result;

/// A point in a stream.
struct StreamEvent {
    gpu: Arc<Gpu>,
    event: sys::CUevent,
}

// SAFETY: the driver's events may be used from any thread.
unsafe impl Send for StreamEvent {}
// SAFETY: as above; waiting changes nothing.
unsafe impl Sync for StreamEvent {}

impl StreamEvent {
    fn new(gpu: &Arc<Gpu>) -> Result<StreamEvent> {
        gpu.enter()?;
        let made = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
        Ok(StreamEvent { gpu: Arc::clone(gpu), event: gpu.driver("making an event", made)? })
    }
}

impl Drop for StreamEvent {
    fn drop(&mut self) {
        if self.gpu.enter().is_ok() {
            // SAFETY: made in `new`; the driver keeps it until what waits for it is done.
            let _ = unsafe { result::event::destroy(self.event) };
        }
    }
}

/// See [`crate::backend::Backend::record`].
pub fn record(gpu: &Arc<Gpu>, event: &mut Event) -> Result<()> {
    record_in(gpu, gpu.stream()?, event)
}

/// Moves `event` to the end of a stream of this GPU.
pub fn record_in(gpu: &Arc<Gpu>, stream: sys::CUstream, event: &mut Event) -> Result<()> {
    if event.get::<StreamEvent>().is_none() {
        event.set(StreamEvent::new(gpu)?);
    }
    let mark = event.get::<StreamEvent>().expect("set above");
    gpu.enter()?;
    // SAFETY: both live; an event that was recorded before is moved to the new point.
    let done = unsafe { result::event::record(mark.event, stream) };
    gpu.driver("recording an event", done)
}

/// See [`crate::backend::Backend::wait`].
pub fn wait(gpu: &Gpu, event: &Event) -> Result<()> {
    if event.get::<StreamEvent>().is_none() {
        return Ok(());
    }
    wait_in(gpu, gpu.stream()?, event)
}

/// What is given to a stream of this GPU from now on runs after what `event` marks.
pub fn wait_in(gpu: &Gpu, stream: sys::CUstream, event: &Event) -> Result<()> {
    let Some(mark) = event.get::<StreamEvent>() else { return Ok(()) };
    gpu.enter()?;
    let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
    // SAFETY: both live.
    let done = unsafe { result::stream::wait_event(stream, mark.event, flags) };
    gpu.driver("waiting for an event", done)
}

/// See [`crate::backend::Backend::passed`].
pub fn passed(gpu: &Gpu, event: &Event) -> Result<bool> {
    let Some(mark) = event.get::<StreamEvent>() else { return Ok(true) };
    gpu.enter()?;
    // SAFETY: it lives; asking changes nothing.
    match unsafe { result::event::query(mark.event) } {
        Err(error) if error.0 == sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
        done => gpu.driver("asking for an event", done).map(|()| true),
    }
}
