//! What a build without the feature `cuda` knows of GPUs.

use std::convert::Infallible;

use super::{GpuInfo, Link, ProductKernels};
use crate::backend::Backend;
use crate::error::{Error, Result};

const WHY: &str = "this build has no CUDA: build it with `--features cuda`";

/// The GPUs that can be used, or why there are none.
///
/// # Errors
/// Always.
pub fn devices() -> Result<Vec<GpuInfo>, String> {
    Err(WHY.to_owned())
}

/// What lies between every two of `gpus` GPUs: there are none.
pub fn links(_gpus: u32) -> Vec<(u32, u32, Link)> {
    Vec::new()
}

/// Never exists.
#[derive(Debug)]
pub struct CudaBackend(Infallible);

impl CudaBackend {
    /// A rank's share of a GPU.
    ///
    /// # Errors
    /// Always [`Error::Config`].
    pub fn open(_ordinal: u32) -> Result<CudaBackend> {
        Err(Error::config("device", WHY))
    }

    /// With other kernels for products.
    pub fn with_products(self, _products: ProductKernels) -> CudaBackend {
        match self.0 {}
    }

    /// Bytes free on the GPU.
    ///
    /// # Errors
    /// Never comes to it.
    pub fn free_memory(&self) -> Result<u64> {
        match self.0 {}
    }

    /// As what the engine computes with.
    pub fn into_dyn(self) -> std::sync::Arc<dyn Backend> {
        match self.0 {}
    }
}
