//! A device that computes. [`Backend`] is a set of coarse operations with preallocated outputs; the doc of
//! each method is its formula, and the CPU implementation is the semantics every other backend must match.
//!
//! Numerics every backend keeps (ARCHITECTURE.md, numerics contract): sums accumulate in f32; the order of
//! every reduction is fixed per output element and does not depend on the number of rows in the call, on how
//! rows are grouped into calls, or on threads. So a row's result has the same bits alone and in any batch.

mod args;
pub mod check;
pub mod cpu;
pub mod cuda;
pub mod draw;
mod event;
pub mod int8;
mod padded;
mod planned;
mod precision;
pub mod quantized;
pub mod reference;
mod step;
mod tensor;

use std::borrow::Cow;

use crate::error::Result;
use crate::spec::{Activation, Router};
pub use args::{
    AddNormArgs, AttentionBatch, CombineArgs, ExpertsArgs, GqaArgs, MlaArgs, NormArgs, RopeArgs, SeqSpan,
    SharedArgs,
};
use draw::Draw;
pub use event::{Event, RawStream};
pub use padded::{MOST_CHOICES, PaddedShape, Replicas, ReturnedArgs, WorldArgs, WorldPlan};
pub use planned::{DevicePlan, PlannedArgs};
pub use precision::Precision;
use quantized::Quantized;
pub use step::StepCounts;
pub use tensor::{DType, DeviceId, Storage, Tensor, View, ViewMut};

/// A weight matrix `[n, k]` (n outputs, k inputs) in host memory, before a backend packs it.
#[derive(Debug, Clone)]
pub struct HostMatrix<'a> {
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// Row-major elements, `n * k` of them.
    pub data: HostData<'a>,
}

/// Elements of a [`HostMatrix`].
#[derive(Debug, Clone)]
pub enum HostData<'a> {
    /// Single precision.
    F32(Vec<f32>),
    /// bfloat16, where they lie in a file as they are wanted without a copy.
    Bf16(Cow<'a, [half::bf16]>),
    /// Codes and scales; in matrices of experts alone.
    Quantized(Quantized),
}

impl HostMatrix<'_> {
    /// The matrix in 8 or 4 bits: as it is, or quantised now.
    ///
    /// # Panics
    /// When it is quantised to another type already, or `dtype` is none of [`quantized`].
    pub fn quantized(&self, dtype: DType) -> Cow<'_, Quantized> {
        let of = |values: &[f32]| Cow::Owned(Quantized::of(values, self.n, self.k, dtype));
        match &self.data {
            HostData::F32(values) => of(values),
            HostData::Bf16(values) => of(&values.iter().map(|x| x.to_f32()).collect::<Vec<_>>()),
            HostData::Quantized(quantized) => {
                assert!(quantized.dtype() == dtype, "{:?} weights packed as {dtype:?}", quantized.dtype());
                Cow::Borrowed(quantized)
            }
        }
    }
}

/// A weight matrix `[n, k]` in the backend's own layout.
pub struct Matrix {
    /// Packed elements (padding included); the layout is the backend's affair.
    pub data: Tensor,
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
}

/// The matrices of one gated MLP: `act(gate x, up x)` then `down`. One expert, a shared expert or a dense MLP.
pub struct HostMlp<'a> {
    /// `[intermediate, hidden]`
    pub gate: HostMatrix<'a>,
    /// `[intermediate, hidden]`
    pub up: HostMatrix<'a>,
    /// `[hidden, intermediate]`
    pub down: HostMatrix<'a>,
    /// Biases of gate, up (`intermediate` each) and down (`hidden`), where the model has them.
    pub bias: Option<HostMlpBias>,
}

/// See [`HostMlp::bias`].
pub struct HostMlpBias {
    /// `[intermediate]`
    pub gate: Vec<f32>,
    /// `[intermediate]`
    pub up: Vec<f32>,
    /// `[hidden]`
    pub down: Vec<f32>,
}

/// One gated MLP in the backend's own layout. All its memory is in `parts`, so that a copy of an expert moves
/// to another rank of the same backend by copying the parts one by one.
pub struct Mlp {
    /// Packed tensors in an order known to the backend.
    pub parts: Vec<Tensor>,
    /// Width of input and output.
    pub hidden: usize,
    /// Width between the two matrices.
    pub intermediate: usize,
}

impl Mlp {
    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.parts.iter().map(Tensor::bytes).sum()
    }
}

/// `kv_b_proj` of one MLA layer in the backend's own layout, for the expanded and the absorbed form.
pub struct MlaWeights {
    /// Packed tensors in an order known to the backend.
    pub parts: Vec<Tensor>,
    /// Heads on this rank.
    pub heads: usize,
    /// Width of the latent.
    pub latent: usize,
    /// Width of a key head without rotary.
    pub nope_dim: usize,
    /// Width of a value head.
    pub v_dim: usize,
}

/// Shape of one layer's KV cache on one rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvShape {
    /// Keys and values per head.
    Gqa {
        /// KV heads on this rank.
        kv_heads: usize,
        /// Width of one head.
        head_dim: usize,
    },
    /// One latent and one rotary key per token.
    Mla {
        /// Width of the latent.
        latent: usize,
        /// Width of the rotary key.
        rope_dim: usize,
    },
}

/// One layer's paged KV cache in the backend's own layout.
pub struct KvCache {
    /// Packed tensors in an order known to the backend.
    pub parts: Vec<Tensor>,
    /// What one token stores.
    pub shape: KvShape,
    /// Element type: the activation type of the run.
    pub dtype: DType,
    /// Tokens per block; a multiple of 16.
    pub block_size: usize,
    /// Blocks in the pool.
    pub blocks: usize,
}

/// A device that computes. Object-safe; one value per rank. See the module doc for what all methods keep.
///
/// Shapes are asserted (a wrong one is a bug above); `Err` means the device itself failed or is full.
/// "activation type" is F32 or Bf16; every method that reads activations takes either, and writes `out` in the
/// type of `out`, rounding to nearest even once, from f32. Weights have the activation type, or are Bf16 where it is
/// F32 ([`Precision::ALL`]): they are widened exactly, and what the docs round to the activation type stays f32.
pub trait Backend: Send + Sync {
    /// The memory space of all tensors made here.
    fn device(&self) -> DeviceId;

    /// One line for logs: device, instruction set, threads.
    fn describe(&self) -> String;

    // ---- order of work between ranks of one process

    /// Moves `event` to the end of the work given to this backend so far. Methods of a backend may return before their work
    /// is done (only [`Backend::download`] waits); the work of one backend runs in the order given.
    fn record(&self, event: &mut Event) -> Result<()> {
        // Work is done when a method returns.
        let _ = event;
        Ok(())
    }

    /// What is given to this backend from now on runs after what `event` marks, which another backend of the same kind recorded.
    fn wait(&self, event: &Event) -> Result<()> {
        let _ = event;
        Ok(())
    }

    /// A second stream of this backend, for a library that moves rows: what is put there from now on runs after all work given to this
    /// backend so far, and beside what it is given next, up to [`Backend::join`]. The device is the calling thread's from now on.
    fn fork(&self) -> Result<RawStream> {
        Ok(RawStream(0))
    }

    /// What is given to this backend from now on runs after what was put into the stream of [`Backend::fork`].
    fn join(&self) -> Result<()> {
        Ok(())
    }

    /// Whether everything that `event` marks is done; asks and returns.
    fn passed(&self, event: &Event) -> Result<bool> {
        let _ = event;
        Ok(true)
    }

    /// The stream of this backend, for a library that puts work of its own in line; its device is the calling thread's from now on.
    fn stream(&self) -> Result<RawStream> {
        Ok(RawStream(0))
    }

    /// Nothing computed here counts any more, `why` says for what reason: where results can still be under way, every
    /// [`Backend::download`] that ends from now on is an [`crate::Error::Device`], or an [`crate::Error::Peer`] of the rank
    /// `bystander`, when that is the backend of a rank that only saw another one fail.
    fn poison(&self, why: &str, bystander: Option<usize>) {
        let _ = (why, bystander);
    }

    /// Runs `body`, which gives this backend one step of work. A backend may put the work off until `body` has returned or asks for
    /// a result, and knows pieces of it again that are the same as earlier ones, whatever the tensors hold.
    fn step(&self, body: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        body()
    }

    /// What became of those steps. A backend that knows none again counts none.
    fn step_counts(&self) -> StepCounts {
        StepCounts::default()
    }

    // ---- memory

    /// A zeroed tensor.
    ///
    /// # Errors
    /// [`crate::Error::Memory`] when the device is full.
    fn alloc(&self, dtype: DType, rows: usize, cols: usize) -> Result<Tensor>;

    /// How far apart rows of `cols` elements best lie that are multiplied with matrices, in elements.
    fn row_pitch(&self, dtype: DType, cols: usize) -> usize {
        let _ = dtype;
        cols
    }

    /// Copies host bytes (row-major, contiguous, little endian) into `dst`.
    fn upload(&self, src: &[u8], dst: ViewMut<'_>) -> Result<()>;

    /// Copies `src` into host bytes, row-major and contiguous.
    fn download(&self, src: View<'_>, dst: &mut [u8]) -> Result<()>;

    /// `dst = src`, converted where the types differ (f32 -> bf16 rounds to nearest even).
    fn copy_rows(&self, src: View<'_>, dst: ViewMut<'_>) -> Result<()>;

    /// `dst[i] = src[index[i]]`; same type.
    fn gather_rows(&self, src: View<'_>, index: &[u32], dst: ViewMut<'_>) -> Result<()>;

    // ---- weights

    /// Packs a matrix into this backend's layout as `dtype`.
    fn pack_matrix(&self, host: &HostMatrix<'_>, dtype: DType) -> Result<Matrix>;

    /// Packs a gated MLP into this backend's layout as `dtype`; biases stay f32. [`DType::I8`] quantises the matrices as [`int8`] says,
    /// [`DType::F8`] and [`DType::I4x2`] as [`quantized`] does, on a backend that has them ([`Backend::has_experts_in`]).
    fn pack_mlp(&self, host: &HostMlp<'_>, dtype: DType) -> Result<Mlp>;

    /// Packs `kv_b_proj` `[heads * (nope_dim + v_dim), latent]` for both MLA forms.
    fn pack_mla(
        &self,
        kv_b: &HostMatrix<'_>,
        heads: usize,
        nope_dim: usize,
        v_dim: usize,
        dtype: DType,
    ) -> Result<MlaWeights>;

    /// Whether MLPs may be packed as `dtype`: any backend takes F32 and Bf16.
    fn has_experts_in(&self, dtype: DType) -> bool {
        check::is_float(dtype)
    }

    /// Bytes that [`Backend::pack_matrix`] will allocate for `[n, k]`: padding included.
    fn matrix_bytes(&self, n: usize, k: usize, dtype: DType) -> usize;

    /// Bytes that [`Backend::pack_mlp`] will allocate.
    fn mlp_bytes(&self, hidden: usize, intermediate: usize, bias: bool, dtype: DType) -> usize;

    /// Bytes that [`Backend::pack_mla`] will allocate.
    fn mla_bytes(&self, heads: usize, nope_dim: usize, v_dim: usize, latent: usize, dtype: DType) -> usize;

    // ---- dense

    /// `out[i] = table[ids[i]] * scale`, out f32. `table` is `[vocab, hidden]` in F32 or Bf16.
    fn embed(&self, table: View<'_>, ids: &[u32], scale: f32, out: ViewMut<'_>) -> Result<()>;

    /// RMS: `out = x * (1 / sqrt(mean(x^2) + eps)) * weight`; layer: `(x - mean) / sqrt(var + eps) * weight + bias`.
    /// `x` is F32 or Bf16, computed in f32; `out` may be wider strided but has the shape of `x`.
    fn norm(&self, x: View<'_>, args: NormArgs<'_>, out: ViewMut<'_>) -> Result<()>;

    /// [`Backend::norm`] in place.
    fn norm_inplace(&self, x: ViewMut<'_>, args: NormArgs<'_>) -> Result<()>;

    /// [`Backend::add_scaled`] to `x`, then [`Backend::norm`]: from one sublayer of a residual stream to the next.
    fn add_norm(&self, x: ViewMut<'_>, args: AddNormArgs<'_>) -> Result<()> {
        let mut x = x;
        let AddNormArgs { addend, norm, exact, rounded } = args;
        if let Some((addend, factor)) = addend {
            self.add_scaled(addend, factor, x.reborrow())?;
        }
        let Some(mut exact) = exact else { return self.norm(x.as_view(), norm, rounded) };
        self.norm(x.as_view(), norm, exact.reborrow())?;
        self.copy_rows(exact.as_view(), rounded)
    }

    /// Partial sums of squares over each row of `x` into `out` `[rows, 1]` f32: the first half of an RMS norm whose
    /// width is split over ranks.
    fn square_sum(&self, x: View<'_>, out: ViewMut<'_>) -> Result<()>;

    /// The second half: `x[i] *= 1 / sqrt(sums[i] / width + eps) * weight`.
    fn scale_by_square_sum(
        &self,
        sums: View<'_>,
        width: usize,
        eps: f32,
        weight: View<'_>,
        x: ViewMut<'_>,
    ) -> Result<()>;

    /// `out[i, j] = sum_k x[i, k] * w[j, k] (+ bias[j])`. The activation type is that of `x`; `bias` is `[1, n]` f32, added
    /// after the sum.
    fn linear(&self, x: View<'_>, w: &Matrix, bias: Option<View<'_>>, out: ViewMut<'_>) -> Result<()>;

    /// Rotates pairs (a, b) of every head by the row's angles: `a' = a cos - b sin`, `b' = b cos + a sin`; an
    /// interleaved layout stays interleaved.
    fn rope(&self, x: ViewMut<'_>, args: RopeArgs<'_>) -> Result<()>;

    /// `y += x * scale`, y f32.
    fn add_scaled(&self, x: View<'_>, scale: f32, y: ViewMut<'_>) -> Result<()>;

    /// `x = x * scale`, f32.
    fn scale(&self, scale: f32, x: ViewMut<'_>) -> Result<()>;

    /// `x = min(max(x, -limit), limit)`.
    fn clamp(&self, limit: f32, x: ViewMut<'_>) -> Result<()>;

    /// `x[i] *= sigmoid(gate[i, 0])`; gate f32 `[rows, 1]`, x f32.
    fn sigmoid_gate(&self, gate: View<'_>, x: ViewMut<'_>) -> Result<()>;

    // ---- attention

    /// A zeroed cache for one layer.
    fn alloc_kv(&self, shape: KvShape, dtype: DType, block_size: usize, blocks: usize) -> Result<KvCache>;

    /// Bytes of one block of one layer.
    fn kv_block_bytes(&self, shape: KvShape, dtype: DType, block_size: usize) -> usize;

    /// Stores each row at its position. GQA: `k`, `v` are `[rows, kv_heads * head_dim]`, k rotated. MLA: `k` is the
    /// rotated rotary key `[rows, rope_dim]`, `v` the normed latent `[rows, latent]`. Rounded to the cache's type.
    fn kv_write(
        &self,
        k: View<'_>,
        v: View<'_>,
        batch: AttentionBatch<'_>,
        cache: &mut KvCache,
    ) -> Result<()>;

    /// [`Backend::rope`] of the queries and keys of `qkv` `[rows, queries + keys + values]`, `rope.heads` together, then
    /// [`Backend::kv_write`] of keys and values. Afterwards the query columns are rotated; nobody reads those of the keys.
    fn rope_kv_write(
        &self,
        qkv: ViewMut<'_>,
        rope: RopeArgs<'_>,
        batch: AttentionBatch<'_>,
        cache: &mut KvCache,
    ) -> Result<()> {
        let mut qkv = qkv;
        let (kv_heads, head_dim) = check::rope_kv_write(&qkv, &rope, cache);
        let (k_end, kv) = (rope.heads * head_dim, kv_heads * head_dim);
        self.rope(qkv.reborrow().cols_range(0..k_end), rope)?;
        let qkv = qkv.as_view();
        self.kv_write(qkv.cols_range(k_end - kv..k_end), qkv.cols_range(k_end..k_end + kv), batch, cache)
    }

    /// Per row and head: softmax over positions `max(0, p - window + 1)..=p` of `q . k * scale` (and the sink), times
    /// v. The maximum (of all, or of each group before groups join) is subtracted; sums over positions run in ascending order in
    /// groups whose borders depend on absolute positions only. q and e^(score - maximum) are rounded to the cache's type, the latter before it weighs v and before it
    /// joins the sum by which the result is divided (the sink joins as it is), so that the result is a mean of values. `out` is
    /// `[rows, heads * head_dim]`.
    fn attention_gqa(&self, args: GqaArgs<'_>, out: ViewMut<'_>) -> Result<()>;

    /// MLA. With latent c, rotary key r and `kv_b` split per head into `W_k [nope, latent]` and `W_v [v, latent]`:
    /// * expanded (positions below `prompt_len`): k = (W_k c, r), v = W_v c, each rounded to the activation type, then as GQA;
    /// * absorbed (the others): q' = W_k^T q_nope rounded to the activation type, scores `(q' . c + q_rope . r) * scale`,
    ///   o = sum p c rounded, out = W_v o.
    ///
    /// The form belongs to the row, never to the batch. The activation type is that of the cache. `out` is
    /// `[rows, heads * v_dim]`.
    fn attention_mla(&self, args: MlaArgs<'_>, out: ViewMut<'_>) -> Result<()>;

    // ---- choosing tokens

    /// Chooses a token of each row of logits, by its draw, as [`draw`] says: `out[i] = [token, elements that are not finite]`, I32,
    /// x f32. The token says nothing where some are not.
    fn sample(&self, x: View<'_>, draws: &[Draw], out: ViewMut<'_>) -> Result<()>;

    // ---- mixture of experts

    /// Chooses experts. `logits` `[rows, experts]` f32, `bias` `[1, experts]` f32 with `router.choice_bias`; writes
    /// `ids` I32 and `weights` F32, both `[rows, top_k]`, best first. Ties go to the lowest id.
    ///
    /// Softmax / Sigmoid: s = score(logits); c = s + bias; with groups, experts outside the `keep` best groups (ties: lowest
    /// group) drop to 0 (`Max`) or -inf (`Top2Sum`); ids = top-k of c; w = s at ids, renormalised, times `scale`.
    /// SoftmaxOverChosen: ids = top-k of logits; w = softmax over those k. SparseMixer: see "Routers" in ARCHITECTURE.md.
    fn route(
        &self,
        logits: View<'_>,
        bias: Option<View<'_>>,
        router: &Router,
        ids: ViewMut<'_>,
        weights: ViewMut<'_>,
    ) -> Result<()>;

    /// Every row through the MLP of its slot, as one operation: `out = down(act(gate x, up x))` with biases. The
    /// product of the activation is rounded to the activation type, that of `rows`, before `down`. All slots have weights of
    /// one type. Those of type [`DType::I8`] are multiplied as [`int8`] says; those of [`DType::F8`] and [`DType::I4x2`] are what
    /// [`quantized`] says of their codes, numbers in bf16: the result has the bits that a packing of these as Bf16 would give.
    fn experts(&self, args: ExpertsArgs<'_>, out: ViewMut<'_>) -> Result<()>;

    /// [`Backend::experts`] with a single slot and all rows: a dense MLP or a shared expert.
    fn mlp(&self, x: View<'_>, w: &Mlp, activation: Activation, out: ViewMut<'_>) -> Result<()>;

    /// [`Backend::experts`] of routed rows and [`Backend::mlp`] of a shared expert, each with its output: two calls for a backend that gains
    /// nothing from knowing both.
    fn experts_and_shared(
        &self,
        (routed, out): (ExpertsArgs<'_>, ViewMut<'_>),
        (shared, shared_out): (SharedArgs<'_>, ViewMut<'_>),
    ) -> Result<()> {
        self.experts(routed, out)?;
        self.mlp(shared.rows, shared.mlp, shared.activation, shared_out)
    }

    /// Experts of rows that this backend groups by itself, where it can.
    fn device_plan(&self) -> Option<&dyn DevicePlan> {
        None
    }

    /// The part of a rank in a layer of several ranks, worked out by this backend itself, where it can.
    fn world_plan(&self) -> Option<&dyn WorldPlan> {
        None
    }

    /// `out[t] = sum_j weights[t, j] * (sum_x rows[index(t, j, x)])`, j ascending, x ascending, out f32.
    fn combine(&self, args: CombineArgs<'_>, out: ViewMut<'_>) -> Result<()>;
}
