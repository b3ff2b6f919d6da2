//! A second stream beside that of a rank, for rows that travel while it computes.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::event;
use super::gpu::Gpu;
use crate::backend::{Event, RawStream};
use crate::error::Result;

/// The second stream, once there is one, and where the two met last.
#[derive(Default)]
pub struct Side {
    stream: Option<Arc<CudaStream>>,
    forked: Event,
    joined: Event,
}

impl Side {
    /// See [`crate::backend::Backend::fork`].
    pub fn fork(&mut self, gpu: &Arc<Gpu>) -> Result<RawStream> {
        gpu.enter()?;
        let stream = match &self.stream {
            Some(stream) => stream,
            None => self.stream.insert(gpu.new_stream()?),
        };
        event::record(gpu, &mut self.forked)?;
        event::wait_in(gpu, stream.cu_stream(), &self.forked)?;
        Ok(RawStream(stream.cu_stream() as usize))
    }

    /// See [`crate::backend::Backend::join`].
    pub fn join(&mut self, gpu: &Arc<Gpu>) -> Result<()> {
        let Some(stream) = &self.stream else { return Ok(()) };
        event::record_in(gpu, stream.cu_stream(), &mut self.joined)?;
        event::wait(gpu, &self.joined)
    }
}
