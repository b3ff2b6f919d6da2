//! The CPU backend: the semantics of [`Backend`], fast.
//!
//! Threads come from [`pool`], memory from [`memory`], vectors from [`simd`]; the other files are one kernel family each. Every kernel
//! splits its work so that an output element is computed by one thread in one fixed order.

pub mod limits;
pub mod memory;
pub mod pool;
pub mod simd;

mod attention;
mod attention_gqa;
mod attention_latent;
mod attention_mla;
mod combine;
mod elementwise;
mod experts;
mod gemm;
mod int8;
mod kv;
mod mla_weights;
mod norm;
mod operand;
mod panel;
mod product;
mod progress;
mod rope;
mod route;
mod rows;
mod sample;
mod share;
mod tile;
mod work;

use std::sync::Mutex;

use crate::backend::draw::Draw;
use crate::backend::{
    AddNormArgs, AttentionBatch, Backend, CombineArgs, DType, DeviceId, ExpertsArgs, GqaArgs, HostMatrix,
    HostMlp, KvCache, KvShape, Matrix, MlaArgs, MlaWeights, Mlp, NormArgs, RopeArgs, SharedArgs, Tensor,
    View, ViewMut,
};
use crate::error::Result;
use crate::spec::{Activation, Router};
use memory::Scratch;
use pool::Pool;
use sample::Drawers;
use share::Shares;
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
    /// Those of a shared expert beside them.
    shared: Scratch,
    /// What experts hold between their two matrices.
    intermediate: Scratch,
    /// The items of a product.
    work: WorkList,
    /// For rows of logits.
    drawers: Mutex<Drawers>,
    /// The tasks of an operation on rows.
    rows: Mutex<Shares>,
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

    /// Runs a kernel on the calling thread.
    #[inline]
    pub(crate) fn dispatch<K: Kernel>(&self, kernel: K) -> K::Output {
        self.isa.dispatch(kernel)
    }
}

/// One line each: the files named after what they compute have the code.
impl Backend for CpuBackend {
    fn device(&self) -> DeviceId {
        DeviceId::Cpu
    }
    fn describe(&self) -> String {
        format!("cpu, {}, {} threads", self.isa.name(), self.pool.threads())
    }

    fn alloc(&self, dtype: DType, rows: usize, cols: usize) -> Result<Tensor> {
        memory::tensor(dtype, rows, cols)
    }
    fn row_pitch(&self, dtype: DType, cols: usize) -> usize {
        operand::row_pitch(self, dtype, cols)
    }
    fn upload(&self, src: &[u8], dst: ViewMut<'_>) -> Result<()> {
        elementwise::upload(self, src, dst)
    }
    fn download(&self, src: View<'_>, dst: &mut [u8]) -> Result<()> {
        elementwise::download(self, src, dst)
    }
    fn copy_rows(&self, src: View<'_>, dst: ViewMut<'_>) -> Result<()> {
        elementwise::copy_rows(self, src, dst)
    }
    fn gather_rows(&self, src: View<'_>, index: &[u32], dst: ViewMut<'_>) -> Result<()> {
        elementwise::gather_rows(self, src, index, dst)
    }

    fn pack_matrix(&self, host: &HostMatrix<'_>, dtype: DType) -> Result<Matrix> {
        gemm::pack_matrix(self, host, dtype)
    }
    fn pack_mlp(&self, host: &HostMlp<'_>, dtype: DType) -> Result<Mlp> {
        experts::pack_mlp(self, host, dtype)
    }
    fn pack_mla(
        &self,
        kv_b: &HostMatrix<'_>,
        heads: usize,
        nope_dim: usize,
        v_dim: usize,
        dtype: DType,
    ) -> Result<MlaWeights> {
        mla_weights::pack_mla(self, kv_b, heads, nope_dim, v_dim, dtype)
    }
    fn has_experts_in(&self, dtype: DType) -> bool {
        matches!(dtype, DType::F32 | DType::Bf16 | DType::I8)
    }
    fn matrix_bytes(&self, n: usize, k: usize, dtype: DType) -> usize {
        gemm::matrix_bytes(self, n, k, dtype)
    }
    fn mlp_bytes(&self, hidden: usize, intermediate: usize, bias: bool, dtype: DType) -> usize {
        experts::mlp_bytes(self, hidden, intermediate, bias, dtype)
    }
    fn mla_bytes(&self, heads: usize, nope_dim: usize, v_dim: usize, latent: usize, dtype: DType) -> usize {
        mla_weights::mla_bytes(self, heads, nope_dim, v_dim, latent, dtype)
    }

    fn embed(&self, table: View<'_>, ids: &[u32], scale: f32, out: ViewMut<'_>) -> Result<()> {
        elementwise::embed(self, table, ids, scale, out)
    }
    fn norm(&self, x: View<'_>, args: NormArgs<'_>, out: ViewMut<'_>) -> Result<()> {
        norm::norm(self, x, args, out)
    }
    fn norm_inplace(&self, x: ViewMut<'_>, args: NormArgs<'_>) -> Result<()> {
        norm::norm_inplace(self, x, args)
    }
    fn add_norm(&self, x: ViewMut<'_>, args: AddNormArgs<'_>) -> Result<()> {
        norm::add_norm(self, x, args)
    }
    fn square_sum(&self, x: View<'_>, out: ViewMut<'_>) -> Result<()> {
        norm::square_sum(self, x, out)
    }
    fn scale_by_square_sum(
        &self,
        sums: View<'_>,
        width: usize,
        eps: f32,
        weight: View<'_>,
        x: ViewMut<'_>,
    ) -> Result<()> {
        norm::scale_by_square_sum(self, sums, width, eps, weight, x)
    }
    fn linear(&self, x: View<'_>, w: &Matrix, bias: Option<View<'_>>, out: ViewMut<'_>) -> Result<()> {
        gemm::linear(self, x, w, bias, out)
    }
    fn rope(&self, x: ViewMut<'_>, args: RopeArgs<'_>) -> Result<()> {
        rope::rope(self, x, args)
    }
    fn add_scaled(&self, x: View<'_>, scale: f32, y: ViewMut<'_>) -> Result<()> {
        elementwise::add_scaled(self, x, scale, y)
    }
    fn scale(&self, scale: f32, x: ViewMut<'_>) -> Result<()> {
        elementwise::scale(self, scale, x)
    }
    fn clamp(&self, limit: f32, x: ViewMut<'_>) -> Result<()> {
        elementwise::clamp(self, limit, x)
    }
    fn sigmoid_gate(&self, gate: View<'_>, x: ViewMut<'_>) -> Result<()> {
        elementwise::sigmoid_gate(self, gate, x)
    }

    fn alloc_kv(&self, shape: KvShape, dtype: DType, block_size: usize, blocks: usize) -> Result<KvCache> {
        kv::alloc_kv(self, shape, dtype, block_size, blocks)
    }
    fn kv_block_bytes(&self, shape: KvShape, dtype: DType, block_size: usize) -> usize {
        kv::kv_block_bytes(self, shape, dtype, block_size)
    }
    fn kv_write(
        &self,
        k: View<'_>,
        v: View<'_>,
        batch: AttentionBatch<'_>,
        cache: &mut KvCache,
    ) -> Result<()> {
        kv::kv_write(self, k, v, batch, cache)
    }
    fn attention_gqa(&self, args: GqaArgs<'_>, out: ViewMut<'_>) -> Result<()> {
        attention_gqa::attention_gqa(self, args, out)
    }
    fn attention_mla(&self, args: MlaArgs<'_>, out: ViewMut<'_>) -> Result<()> {
        attention_mla::attention_mla(self, args, out)
    }

    fn route(
        &self,
        logits: View<'_>,
        bias: Option<View<'_>>,
        router: &Router,
        ids: ViewMut<'_>,
        weights: ViewMut<'_>,
    ) -> Result<()> {
        route::route(self, logits, bias, router, ids, weights)
    }
    fn sample(&self, x: View<'_>, draws: &[Draw], out: ViewMut<'_>) -> Result<()> {
        sample::sample(self, x, draws, out)
    }
    fn experts(&self, args: ExpertsArgs<'_>, out: ViewMut<'_>) -> Result<()> {
        experts::experts(self, args, out)
    }
    fn mlp(&self, x: View<'_>, w: &Mlp, activation: Activation, out: ViewMut<'_>) -> Result<()> {
        experts::mlp(self, x, w, activation, out)
    }
    fn experts_and_shared(
        &self,
        routed: (ExpertsArgs<'_>, ViewMut<'_>),
        shared: (SharedArgs<'_>, ViewMut<'_>),
    ) -> Result<()> {
        experts::experts_and_shared(self, routed, shared)
    }
    fn combine(&self, args: CombineArgs<'_>, out: ViewMut<'_>) -> Result<()> {
        combine::combine(self, args, out)
    }
}

#[cfg(test)]
mod tests;
