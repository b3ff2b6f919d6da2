//! [`CudaBackend`]: each method of [`Backend`] puts kernels of cuda/ into the rank's stream and returns. Only `download`
//! waits, and what needs host memory to come free.

mod attention;
mod event;
mod ffi;
mod gpu;
mod graphs;
mod launches;
mod memory;
mod mla;
mod moe;
mod products;
mod side;
mod tiles;
mod world;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::ProductKernels;
use crate::backend::draw::Draw;
use crate::backend::{
    AddNormArgs, AttentionBatch, Backend, CombineArgs, DType, DeviceId, DevicePlan, Event, ExpertsArgs,
    GqaArgs, HostMatrix, HostMlp, KvCache, KvShape, Matrix, MlaArgs, MlaWeights, Mlp, NormArgs, PlannedArgs,
    RawStream, RopeArgs, StepCounts, Tensor, View, ViewMut, WorldPlan, check,
};
use crate::error::Result;
use crate::spec::{Activation, NormKind, Router};
use gpu::Gpu;
pub use gpu::{devices, links};
use memory::{Buffer, Resident, Staging, Upload};
use side::Side;

/// One rank's stream on a GPU, and what it keeps there between calls. Locks are taken in the order of the fields.
pub struct CudaBackend {
    gpu: Arc<Gpu>,
    products: ProductKernels,
    /// What stands beside the stream.
    side: Mutex<Side>,
    /// Where the rows of the layer at work go.
    plan: Mutex<Buffer>,
    scratch: Mutex<Scratch>,
    /// What a product of several groups works with: their tensor maps, a counter of tiles.
    grouped: Mutex<Buffer>,
    /// Part addresses of the experts of each layer, by the address of its slot table.
    slot_tables: Mutex<HashMap<usize, Resident>>,
    staging: Mutex<Staging>,
    residents: Mutex<Residents>,
}

/// Working memory, by what it holds.
#[derive(Default)]
struct Scratch {
    /// Gate and up in f32, where the kernel does not fuse what follows.
    gate_up: Buffer,
    /// What experts hold between their two matrices.
    product: Buffer,
    /// Latents in order of position, and the keys and values made of them.
    latents: Buffer,
    expanded: Buffer,
    /// Rows of generated tokens: queries, queries in the latent's space, weighted means of latents.
    queries: Buffer,
    latent_queries: Buffer,
    means: Buffer,
    /// Attention of chunks of positions, before they are merged.
    partials: Buffer,
}

/// Host arrays that are the same in every layer of a step. They stay at their addresses from step to step.
#[derive(Default)]
struct Residents {
    /// Token of each batch row.
    tokens: Resident,
    /// Cache row of each batch row.
    slots: Resident,
    /// Rows whose logits are wanted, and how their tokens are drawn.
    chosen: Resident,
    draws: Resident,
    /// Rows of a kind that attention brings together.
    gathered: Resident,
    blocks: Resident,
    spans: Resident,
    single: Resident,
    expanded: Resident,
    absorbed: Resident,
    rope_rows: Resident,
    /// Rows of each rank.
    world_rows: Resident,
}

/// Locks a mutex whose value is whole whatever its last holder did.
trait Lock<T> {
    fn lock_now(&self) -> MutexGuard<'_, T>;
}

impl<T> Lock<T> for Mutex<T> {
    fn lock_now(&self) -> MutexGuard<'_, T> {
        self.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl CudaBackend {
    /// A rank's share of GPU `ordinal`: a stream of its own.
    ///
    /// # Errors
    /// [`crate::Error::Config`] when there is no such GPU, with the reason; [`crate::Error::Device`] when it cannot be used.
    pub fn open(ordinal: u32) -> Result<CudaBackend> {
        let gpu = Arc::new(Gpu::open(ordinal)?);
        let staging = Mutex::new(Staging::new(&gpu)?);
        Ok(CudaBackend {
            gpu,
            products: ProductKernels::Best,
            side: Mutex::default(),
            plan: Mutex::default(),
            scratch: Mutex::default(),
            grouped: Mutex::default(),
            slot_tables: Mutex::default(),
            staging,
            residents: Mutex::default(),
        })
    }

    /// With other kernels: for tests and benchmarks.
    pub fn with_products(mut self, products: ProductKernels) -> CudaBackend {
        self.products = products;
        self
    }

    /// Whether kernels with Hopper's own instructions are used.
    fn warpgroups(&self) -> bool {
        self.gpu.has_warpgroups() && self.products != ProductKernels::Portable
    }

    /// Bytes free on the GPU.
    ///
    /// # Errors
    /// [`crate::Error::Device`].
    pub fn free_memory(&self) -> Result<u64> {
        self.gpu.free_memory()
    }

    /// As what the engine computes with.
    pub fn into_dyn(self) -> Arc<dyn Backend> {
        Arc::new(self)
    }

    fn upload_bytes(&self, bytes: &[u8], dst: ViewMut<'_>) -> Result<()> {
        let upload = Upload { bytes, dtype: dst.dtype(), half: None };
        memory::upload(&self.gpu, &mut self.staging.lock_now(), upload, ffi::Matrix::of(&dst.as_view()))
    }

    fn copy(&self, src: View<'_>, index: usize, dst: ViewMut<'_>) -> Result<()> {
        let rows = ffi::int(dst.rows());
        let (src, dst) = (ffi::Matrix::of(&src), ffi::Matrix::of(&dst.as_view()));
        self.gpu.launch("copy", ffi::moeyard_copy, &ffi::Copy { src, dst, index, rows, half: -1 })
    }

    /// Device address of a host array: in a step one that lasts.
    fn array(&self, bytes: &[u8], resident: fn(&mut Residents) -> &mut Resident) -> Result<usize> {
        let mut staging = self.staging.lock_now();
        if self.gpu.open_sequence().is_none() {
            return staging.push(bytes);
        }
        resident(&mut self.residents.lock_now()).put(&self.gpu, &mut staging, bytes)
    }

    fn rope_rows(&self, rows: &[u32]) -> Result<usize> {
        let mut staging = self.staging.lock_now();
        self.residents.lock_now().rope_rows.put(&self.gpu, &mut staging, bytemuck::cast_slice(rows))
    }

    /// `dst[i] = src[index[i]]`, converted.
    fn gather(&self, src: View<'_>, index: &[u32], dst: ViewMut<'_>) -> Result<()> {
        let index = self.array(bytemuck::cast_slice(index), |residents| &mut residents.gathered)?;
        self.copy(src, index, dst)
    }

    fn map(&self, kind: ffi::MapKind, x: Option<View<'_>>, factor: f32, y: ViewMut<'_>) -> Result<()> {
        let x = x.map_or(ffi::Matrix::NONE, |x| ffi::Matrix::of(&x));
        let y = ffi::Matrix::of(&y.as_view());
        self.gpu.launch("elementwise", ffi::moeyard_map, &ffi::Map { x, y, factor, kind })
    }

    fn normalise(&self, x: View<'_>, args: NormArgs<'_>, out: View<'_>) -> Result<()> {
        self.add_normalise(x, None, args, None, out)
    }

    fn add_normalise(
        &self,
        x: View<'_>,
        addend: Option<(View<'_>, f32)>,
        args: NormArgs<'_>,
        exact: Option<View<'_>>,
        out: View<'_>,
    ) -> Result<()> {
        let matrix = |view: Option<View<'_>>| view.map_or(ffi::Matrix::NONE, |view| ffi::Matrix::of(&view));
        let args = ffi::Norm {
            x: ffi::Matrix::of(&x),
            out: ffi::Matrix::of(&out),
            addend: matrix(addend.map(|(view, _)| view)),
            exact: matrix(exact),
            weight: args.weight.address(),
            bias: args.bias.map_or(0, |b| b.address()),
            width: ffi::int(args.width),
            centred: i32::from(args.kind == NormKind::Layer),
            eps: args.eps,
            factor: addend.map_or(0.0, |(_, factor)| factor),
        };
        self.gpu.launch("norm", ffi::moeyard_norm, &args)
    }
}

/// Launches are put off while this lives. Without an end they are forgotten.
struct OpenStep<'a>(&'a Gpu);

impl<'a> OpenStep<'a> {
    fn begin(gpu: &'a Gpu) -> Result<Self> {
        gpu.begin_step()?;
        Ok(OpenStep(gpu))
    }

    fn end(self) -> Result<()> {
        self.0.end_step()
    }
}

impl Drop for OpenStep<'_> {
    fn drop(&mut self) {
        self.0.abandon_step();
    }
}

/// One line each where it fits: the files named after what they compute have the rest.
impl Backend for CudaBackend {
    fn device(&self) -> DeviceId {
        DeviceId::Cuda(self.gpu.info().ordinal)
    }
    fn describe(&self) -> String {
        let info = self.gpu.info();
        let (major, minor) = info.capability;
        format!("cuda:{}, {}, sm_{major}{minor}, {} GiB", info.ordinal, info.name, info.memory >> 30)
    }

    fn record(&self, event: &mut Event) -> Result<()> {
        event::record(&self.gpu, event)
    }
    fn wait(&self, event: &Event) -> Result<()> {
        event::wait(&self.gpu, event)
    }

    fn step(&self, body: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let step = OpenStep::begin(&self.gpu)?;
        body()?;
        step.end()
    }

    fn step_counts(&self) -> StepCounts {
        self.gpu.step_counts()
    }

    fn fork(&self) -> Result<RawStream> {
        self.side.lock_now().fork(&self.gpu)
    }
    fn join(&self) -> Result<()> {
        self.side.lock_now().join(&self.gpu)
    }

    fn passed(&self, event: &Event) -> Result<bool> {
        event::passed(&self.gpu, event)
    }
    fn stream(&self) -> Result<RawStream> {
        self.gpu.enter()?;
        Ok(RawStream(self.gpu.stream()? as usize))
    }
    fn poison(&self, why: &str, bystander: Option<usize>) {
        self.gpu.poison(why, bystander);
    }

    fn alloc(&self, dtype: DType, rows: usize, cols: usize) -> Result<Tensor> {
        memory::tensor(&self.gpu, dtype, rows, cols)
    }
    fn upload(&self, src: &[u8], dst: ViewMut<'_>) -> Result<()> {
        check::transfer(src.len(), &dst.as_view());
        self.upload_bytes(src, dst)
    }
    fn download(&self, src: View<'_>, dst: &mut [u8]) -> Result<()> {
        check::transfer(dst.len(), &src);
        memory::download(&self.gpu, &mut self.staging.lock_now(), src, dst)
    }
    fn copy_rows(&self, src: View<'_>, dst: ViewMut<'_>) -> Result<()> {
        check::copy_rows(&src, &dst);
        self.copy(src, 0, dst)
    }
    fn gather_rows(&self, src: View<'_>, index: &[u32], dst: ViewMut<'_>) -> Result<()> {
        check::gather_rows(&src, index, &dst);
        let index = self.array(bytemuck::cast_slice(index), |residents| &mut residents.chosen)?;
        self.copy(src, index, dst)
    }

    fn pack_matrix(&self, host: &HostMatrix<'_>, dtype: DType) -> Result<Matrix> {
        CudaBackend::pack_matrix(self, host, dtype)
    }
    fn pack_mlp(&self, host: &HostMlp<'_>, dtype: DType) -> Result<Mlp> {
        CudaBackend::pack_mlp(self, host, dtype)
    }
    fn pack_mla(
        &self,
        kv_b: &HostMatrix<'_>,
        heads: usize,
        nope_dim: usize,
        v_dim: usize,
        dtype: DType,
    ) -> Result<MlaWeights> {
        self.pack_kv_b(kv_b, heads, nope_dim, v_dim, dtype)
    }
    fn matrix_bytes(&self, n: usize, k: usize, dtype: DType) -> usize {
        n * products::padded(k) * dtype.bytes()
    }
    fn has_experts_in(&self, dtype: DType) -> bool {
        check::is_float(dtype) || matches!(dtype, DType::F8 | DType::I4x2)
    }
    fn mlp_bytes(&self, hidden: usize, intermediate: usize, bias: bool, dtype: DType) -> usize {
        CudaBackend::mlp_bytes_of(hidden, intermediate, bias, dtype)
    }
    fn mla_bytes(&self, heads: usize, nope_dim: usize, v_dim: usize, latent: usize, dtype: DType) -> usize {
        CudaBackend::mla_bytes_of(heads, nope_dim, v_dim, latent, dtype)
    }

    fn embed(&self, table: View<'_>, ids: &[u32], scale: f32, out: ViewMut<'_>) -> Result<()> {
        check::embed(&table, ids, &out);
        let ids = self.array(bytemuck::cast_slice(ids), |residents| &mut residents.tokens)?;
        let (table, out) = (ffi::Matrix::of(&table), ffi::Matrix::of(&out.as_view()));
        self.gpu.launch("embedding", ffi::moeyard_embed, &ffi::Embed { table, out, ids, scale, reserved: 0 })
    }
    fn norm(&self, x: View<'_>, args: NormArgs<'_>, out: ViewMut<'_>) -> Result<()> {
        check::norm(&x, &args, &out.as_view());
        self.normalise(x, args, out.as_view())
    }
    fn norm_inplace(&self, x: ViewMut<'_>, args: NormArgs<'_>) -> Result<()> {
        check::norm(&x.as_view(), &args, &x.as_view());
        self.normalise(x.as_view(), args, x.as_view())
    }
    fn add_norm(&self, x: ViewMut<'_>, args: AddNormArgs<'_>) -> Result<()> {
        check::add_norm(&x, &args);
        let AddNormArgs { addend, norm, exact, rounded } = args;
        let exact = exact.as_ref().map(ViewMut::as_view);
        self.add_normalise(x.as_view(), addend, norm, exact, rounded.as_view())
    }
    fn square_sum(&self, x: View<'_>, out: ViewMut<'_>) -> Result<()> {
        check::square_sum(&x, &out);
        let args = ffi::SquareSum { x: ffi::Matrix::of(&x), out: ffi::Matrix::of(&out.as_view()) };
        self.gpu.launch("sum of squares", ffi::moeyard_square_sum, &args)
    }
    fn scale_by_square_sum(
        &self,
        sums: View<'_>,
        width: usize,
        eps: f32,
        weight: View<'_>,
        x: ViewMut<'_>,
    ) -> Result<()> {
        check::scale_by_square_sum(&sums, width, &weight, &x);
        let args = ffi::ScaleBySquareSum {
            sums: ffi::Matrix::of(&sums),
            x: ffi::Matrix::of(&x.as_view()),
            weight: weight.address(),
            width: width as f32,
            eps,
        };
        self.gpu.launch("second half of a norm", ffi::moeyard_scale_by_square_sum, &args)
    }
    fn linear(&self, x: View<'_>, w: &Matrix, bias: Option<View<'_>>, out: ViewMut<'_>) -> Result<()> {
        self.linear_of(x, w, bias, out)
    }
    fn rope(&self, x: ViewMut<'_>, args: RopeArgs<'_>) -> Result<()> {
        check::rope(&x, &args);
        let rows = self.rope_rows(args.rows)?;
        let args = ffi::Rope {
            x: ffi::Matrix::of(&x.as_view()),
            table: ffi::Matrix::of(&args.table),
            rows,
            heads: ffi::int(args.heads),
            head_stride: ffi::int(args.head_stride),
            offset: ffi::int(args.offset),
            dim: ffi::int(args.dim),
            interleaved: i32::from(args.interleaved),
            reserved: 0,
        };
        self.gpu.launch("rotary embedding", ffi::moeyard_rope, &args)
    }
    fn add_scaled(&self, x: View<'_>, scale: f32, y: ViewMut<'_>) -> Result<()> {
        check::add_scaled(&x, &y);
        self.map(ffi::MapKind::AddScaled, Some(x), scale, y)
    }
    fn scale(&self, scale: f32, x: ViewMut<'_>) -> Result<()> {
        check::scale(&x);
        self.map(ffi::MapKind::Scale, None, scale, x)
    }
    fn clamp(&self, limit: f32, x: ViewMut<'_>) -> Result<()> {
        check::clamp(limit, &x);
        self.map(ffi::MapKind::Clamp, None, limit, x)
    }
    fn sigmoid_gate(&self, gate: View<'_>, x: ViewMut<'_>) -> Result<()> {
        check::sigmoid_gate(&gate, &x);
        self.map(ffi::MapKind::SigmoidGate, Some(gate), 0.0, x)
    }

    fn alloc_kv(&self, shape: KvShape, dtype: DType, block_size: usize, blocks: usize) -> Result<KvCache> {
        self.alloc_cache(shape, dtype, block_size, blocks)
    }
    fn kv_block_bytes(&self, shape: KvShape, dtype: DType, block_size: usize) -> usize {
        CudaBackend::cache_block_bytes(shape, dtype, block_size)
    }
    fn kv_write(
        &self,
        k: View<'_>,
        v: View<'_>,
        batch: AttentionBatch<'_>,
        cache: &mut KvCache,
    ) -> Result<()> {
        self.write_cache(k, v, batch, cache)
    }
    fn rope_kv_write(
        &self,
        qkv: ViewMut<'_>,
        rope: RopeArgs<'_>,
        batch: AttentionBatch<'_>,
        cache: &mut KvCache,
    ) -> Result<()> {
        self.rotate_and_write(qkv, rope, batch, cache)
    }
    fn attention_gqa(&self, args: GqaArgs<'_>, out: ViewMut<'_>) -> Result<()> {
        self.gqa(args, out)
    }
    fn attention_mla(&self, args: MlaArgs<'_>, out: ViewMut<'_>) -> Result<()> {
        self.mla(args, out)
    }

    fn route(
        &self,
        logits: View<'_>,
        bias: Option<View<'_>>,
        router: &Router,
        ids: ViewMut<'_>,
        weights: ViewMut<'_>,
    ) -> Result<()> {
        self.choose(logits, bias, router, ids, weights)
    }
    fn sample(&self, x: View<'_>, draws: &[Draw], out: ViewMut<'_>) -> Result<()> {
        check::sample(&x, draws, &out);
        // Best tokens need no more said, and nothing is sent.
        let greedy = draws.iter().all(Draw::is_greedy);
        let bytes = bytemuck::cast_slice(draws);
        let draws = if greedy { 0 } else { self.array(bytes, |residents| &mut residents.draws)? };
        let args = ffi::Sample { x: ffi::Matrix::of(&x), out: ffi::Matrix::of(&out.as_view()), draws };
        self.gpu.launch("sampling", ffi::moeyard_sample, &args)
    }
    fn experts(&self, args: ExpertsArgs<'_>, out: ViewMut<'_>) -> Result<()> {
        self.experts_of(args, out)
    }
    fn mlp(&self, x: View<'_>, w: &Mlp, activation: Activation, out: ViewMut<'_>) -> Result<()> {
        self.mlp_of(x, w, activation, out)
    }
    fn device_plan(&self) -> Option<&dyn DevicePlan> {
        Some(self)
    }
    fn world_plan(&self) -> Option<&dyn WorldPlan> {
        Some(self)
    }
    fn combine(&self, args: CombineArgs<'_>, out: ViewMut<'_>) -> Result<()> {
        self.combine_rows(args, out)
    }
}

impl DevicePlan for CudaBackend {
    fn planned_experts(&self, args: PlannedArgs<'_>, out: ViewMut<'_>) -> Result<()> {
        self.planned(args, out)
    }
}
