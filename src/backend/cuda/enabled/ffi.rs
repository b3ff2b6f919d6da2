//! cuda/api.h in Rust. Every struct has the layout of its namesake there; both sides assert the same sizes at compile time.

use std::ffi::{c_char, c_int, c_void};

use bytemuck::{NoUninit, Pod, Zeroable};

use crate::backend::draw::Draw;
use crate::backend::{DType, View};

/// `MoeyardMatrix`
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub struct Matrix {
    pub data: usize,
    pub stride: i64,
    pub rows: i32,
    pub cols: i32,
    pub dtype: i32,
    pub reserved: i32,
}

impl Matrix {
    /// Absent.
    pub const NONE: Matrix = Matrix { data: 0, stride: 0, rows: 0, cols: 0, dtype: 0, reserved: 0 };

    /// A view, as kernels see it.
    ///
    /// # Panics
    /// When rows or columns exceed what an i32 counts.
    pub fn of(view: &View<'_>) -> Matrix {
        Matrix {
            data: view.address(),
            stride: view.stride() as i64,
            rows: int(view.rows()),
            cols: int(view.cols()),
            dtype: type_code(view.dtype()),
            reserved: 0,
        }
    }

    /// Whether every row starts at a multiple of 16 bytes.
    pub fn is_aligned(&self) -> bool {
        let element = if self.dtype == type_code(DType::Bf16) { 2 } else { 4 };
        self.data.is_multiple_of(16) && (self.stride as usize * element).is_multiple_of(16)
    }
}

/// A count that kernels take as i32.
///
/// # Panics
/// Beyond i32.
pub fn int(n: usize) -> i32 {
    i32::try_from(n).unwrap_or_else(|_| panic!("{n} exceeds what a kernel counts"))
}

/// `MoeyardType`
pub fn type_code(dtype: DType) -> i32 {
    match dtype {
        DType::F32 => 0,
        DType::Bf16 => 1,
        DType::I32 => 2,
        DType::F8 => 3,
        DType::I4x2 => 4,
        DType::I8 => panic!("kernels take no 8-bit integers"),
    }
}

/// `MoeyardCopy`
#[repr(C)]
#[derive(Clone, Copy, NoUninit)]
pub struct Copy {
    pub src: Matrix,
    pub dst: Matrix,
    pub index: usize,
    pub rows: i32,
    pub half: i32,
}

/// `MoeyardTransposeHeads`
#[repr(C)]
#[derive(Clone, Copy, NoUninit)]
pub struct TransposeHeads {
    pub src: Matrix,
    pub dst: Matrix,
    pub heads: i32,
    pub nope: i32,
    pub v: i32,
    pub latent: i32,
}

/// `MoeyardEmbed`
#[repr(C)]
#[derive(Clone, Copy, NoUninit)]
pub struct Embed {
    pub table: Matrix,
    pub out: Matrix,
    pub ids: usize,
    pub scale: f32,
    pub reserved: i32,
}

/// `MoeyardMap`
#[repr(C)]
#[derive(Clone, Copy, NoUninit)]
pub struct Map {
    pub x: Matrix,
    pub y: Matrix,
    pub factor: f32,
    pub kind: MapKind,
}

/// `MoeyardMapKind`
#[repr(i32)]
#[derive(Debug, Clone, Copy, NoUninit)]
pub enum MapKind {
    AddScaled = 0,
    Scale = 1,
    Clamp = 2,
    SigmoidGate = 3,
}

/// `MoeyardNorm`
#[repr(C)]
#[derive(Clone, Copy, NoUninit)]
pub struct Norm {
    pub x: Matrix,
    pub out: Matrix,
    pub addend: Matrix,
    pub exact: Matrix,
    pub weight: usize,
    pub bias: usize,
    pub width: i32,
    pub centred: i32,
    pub eps: f32,
    pub factor: f32,
}

/// `MoeyardSquareSum`
#[repr(C)]
#[derive(Clone, Copy, NoUninit)]
pub struct SquareSum {
    pub x: Matrix,
    pub out: Matrix,
}

/// `MoeyardScaleBySquareSum`
#[repr(C)]
#[derive(Clone, Copy, NoUninit)]
pub struct ScaleBySquareSum {
    pub sums: Matrix,
    pub x: Matrix,
    pub weight: usize,
    pub width: f32,
    pub eps: f32,
}

/// `MoeyardRope`
#[repr(C)]
#[derive(Clone, Copy, NoUninit)]
pub struct Rope {
    pub x: Matrix,
    pub table: Matrix,
    pub rows: usize,
    pub heads: i32,
    pub head_stride: i32,
    pub offset: i32,
    pub dim: i32,
    pub interleaved: i32,
    pub reserved: i32,
}

/// `MoeyardRopeKv`
#[repr(C)]
#[derive(Clone, Copy, NoUninit)]
pub struct RopeKv {
    pub qkv: Matrix,
    pub table: Matrix,
    pub key: Matrix,
    pub value: Matrix,
    pub rows: usize,
    pub slots: usize,
    pub heads: i32,
    pub kv_heads: i32,
    pub head_dim: i32,
    pub offset: i32,
    pub dim: i32,
    pub interleaved: i32,
}

/// `MoeyardGemm`
#[repr(C)]
#[derive(Clone, Copy, NoUninit)]
pub struct Gemm {
    pub x: Matrix,
    pub out: Matrix,
    pub weight: usize,
    pub bias: usize,
    pub weights: usize,
    pub biases: usize,
    pub offsets: usize,
    pub x_batch: i64,
    pub w_batch: i64,
    pub out_batch: i64,
    pub slots: i32,
    pub batches: i32,
    pub n: i32,
    pub k: i32,
    pub ldw: i32,
    pub w_type: i32,
    pub row_tile: i32,
    pub row_tiles: i32,
    pub gate: Gate,
    pub ahead: i32,
}

/// `MoeyardClusterForm`
#[repr(i32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, NoUninit)]
pub enum ClusterForm {
    Wide = 0,
    Thin = 1,
}

/// `MoeyardGroupedGemm`
#[repr(C)]
#[derive(Clone, Copy, NoUninit)]
pub struct GroupedGemm {
    pub product: Gemm,
    pub working: usize,
    pub form: ClusterForm,
    pub reserved: i32,
}

/// The last three fields of `MoeyardGemm` and `MoeyardGate`: what becomes of a gate and an up.
#[repr(C)]
#[derive(Debug, Clone, Copy, NoUninit)]
pub struct Gate {
    pub activation: i32,
    pub limit: f32,
    pub alpha: f32,
}

/// `MoeyardGate`
#[repr(C)]
#[derive(Clone, Copy, NoUninit)]
pub struct GateRows {
    pub input: Matrix,
    pub out: Matrix,
    pub gate: Gate,
    pub reserved: i32,
}

/// `MoeyardRoute`
#[repr(C)]
#[derive(Clone, Copy, NoUninit)]
pub struct Route {
    pub logits: Matrix,
    pub ids: Matrix,
    pub weights: Matrix,
    pub bias: usize,
    pub score: i32,
    pub group_score: i32,
    pub groups: i32,
    pub keep: i32,
    pub renormalize: i32,
    pub renormalize_eps: f32,
    pub scale: f32,
    pub epsilon: f32,
}

/// `MoeyardSample`. `MoeyardDraw` is [`crate::backend::draw::Draw`].
#[repr(C)]
#[derive(Clone, Copy, NoUninit)]
pub struct Sample {
    pub x: Matrix,
    pub out: Matrix,
    pub draws: usize,
}

/// `MoeyardCombine`
#[repr(C)]
#[derive(Clone, Copy, NoUninit)]
pub struct Combine {
    pub rows: Matrix,
    pub weights: Matrix,
    pub out: Matrix,
    pub index: usize,
    pub parts: i32,
    pub reserved: i32,
}

/// `MOEYARD_PLAN_CHUNK`
pub const PLAN_CHUNK: usize = 1024;

/// `MoeyardPlan`
#[repr(C)]
#[derive(Clone, Copy, NoUninit)]
pub struct Plan {
    pub ids: Matrix,
    pub x: Matrix,
    pub grouped: Matrix,
    pub slot_of: usize,
    pub offsets: usize,
    pub tokens: usize,
    pub rows: usize,
    pub counts: usize,
    pub slots: i32,
    pub reserved: i32,
}

/// `MoeyardWorld`
#[repr(C)]
#[derive(Clone, Copy, NoUninit)]
pub struct World {
    pub ids: Matrix,
    pub x: Matrix,
    pub grouped: Matrix,
    pub counts: usize,
    pub starts: usize,
    pub replicas: usize,
    pub offsets: usize,
    pub homes: usize,
    pub index: usize,
    pub experts: i32,
    pub slots: i32,
    pub rows: i32,
    pub rank: i32,
    pub expert_tp: i32,
    pub reserved: i32,
}

/// `MoeyardReturn`
#[repr(C)]
#[derive(Clone, Copy, NoUninit)]
pub struct Return {
    pub computed: Matrix,
    pub returned: Matrix,
    pub offsets: usize,
    pub homes: usize,
    pub slots: i32,
    pub reserved: i32,
}

/// `MoeyardKvWrite`
#[repr(C)]
#[derive(Clone, Copy, NoUninit)]
pub struct KvWrite {
    pub source: [Matrix; 2],
    pub part: [Matrix; 2],
    pub slots: usize,
}

/// `MoeyardSpan`
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub struct Span {
    pub row: u32,
    pub rows: u32,
    pub position: u32,
    pub first_block: u32,
    pub base: u32,
}

/// `MoeyardKvPart`
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub struct KvPart {
    pub data: usize,
    pub stride: i64,
    pub head_stride: i32,
    pub dim: i32,
    pub paged: i32,
    pub reserved: i32,
}

impl KvPart {
    /// Absent.
    pub const NONE: KvPart = KvPart { data: 0, stride: 0, head_stride: 0, dim: 0, paged: 0, reserved: 0 };
}

/// `MoeyardAttention`
#[repr(C)]
#[derive(Clone, Copy, NoUninit)]
pub struct Attention {
    pub query: [Matrix; 2],
    pub out: Matrix,
    pub key: [KvPart; 2],
    pub value: KvPart,
    pub spans: usize,
    pub block_table: usize,
    pub sinks: usize,
    pub query_stride: [i32; 2],
    pub span_count: i32,
    pub span_rows: i32,
    pub block_size: i32,
    pub heads: i32,
    pub kv_heads: i32,
    pub window: i32,
    pub kv_type: i32,
    pub scale: f32,
    pub chunks: i32,
    pub reserved: i32,
    pub partials: usize,
}

impl Attention {
    /// Neither window nor sinks, nothing that is absent in most kernels.
    pub const NONE: Attention = Attention {
        query: [Matrix::NONE; 2],
        out: Matrix::NONE,
        key: [KvPart::NONE; 2],
        value: KvPart::NONE,
        spans: 0,
        block_table: 0,
        sinks: 0,
        query_stride: [0; 2],
        span_count: 0,
        span_rows: 0,
        block_size: 0,
        heads: 0,
        kv_heads: 0,
        window: 0,
        kv_type: 0,
        scale: 0.0,
        chunks: 0,
        reserved: 0,
        partials: 0,
    };
}

/// A launcher of cuda/api.h.
pub type Launcher<A> = unsafe extern "C" fn(*const A, *mut c_void) -> c_int;

/// `moeyard_gemm_grouped`, which takes its arguments untyped.
///
/// # Safety
/// As for every launcher.
pub unsafe extern "C" fn moeyard_gemm_grouped(args: *const GroupedGemm, stream: *mut c_void) -> c_int {
    // SAFETY: the struct it reads.
    unsafe { cutlass_sys::moeyard_gemm_grouped(args.cast(), stream) }
}

unsafe extern "C" {
    pub fn moeyard_device_count() -> c_int;
    pub fn moeyard_error_name(error: c_int) -> *const c_char;
    pub fn moeyard_settle(stream: *mut c_void) -> c_int;
    pub fn moeyard_copy(args: *const Copy, stream: *mut c_void) -> c_int;
    pub fn moeyard_transpose_heads(args: *const TransposeHeads, stream: *mut c_void) -> c_int;
    pub fn moeyard_embed(args: *const Embed, stream: *mut c_void) -> c_int;
    pub fn moeyard_map(args: *const Map, stream: *mut c_void) -> c_int;
    pub fn moeyard_norm(args: *const Norm, stream: *mut c_void) -> c_int;
    pub fn moeyard_square_sum(args: *const SquareSum, stream: *mut c_void) -> c_int;
    pub fn moeyard_scale_by_square_sum(args: *const ScaleBySquareSum, stream: *mut c_void) -> c_int;
    pub fn moeyard_rope(args: *const Rope, stream: *mut c_void) -> c_int;
    pub fn moeyard_rope_kv(args: *const RopeKv, stream: *mut c_void) -> c_int;
    pub fn moeyard_gemm_f32(args: *const Gemm, stream: *mut c_void) -> c_int;
    pub fn moeyard_gemm_narrow(args: *const Gemm, stream: *mut c_void) -> c_int;
    pub fn moeyard_gemm_bf16(args: *const Gemm, stream: *mut c_void) -> c_int;
    pub fn moeyard_gemm_quantized(args: *const Gemm, stream: *mut c_void) -> c_int;
    pub fn moeyard_gate(args: *const GateRows, stream: *mut c_void) -> c_int;
    pub fn moeyard_route(args: *const Route, stream: *mut c_void) -> c_int;
    pub fn moeyard_sample(args: *const Sample, stream: *mut c_void) -> c_int;
    pub fn moeyard_combine(args: *const Combine, stream: *mut c_void) -> c_int;
    pub fn moeyard_plan(args: *const Plan, stream: *mut c_void) -> c_int;
    pub fn moeyard_world(args: *const World, stream: *mut c_void) -> c_int;
    pub fn moeyard_return(args: *const Return, stream: *mut c_void) -> c_int;
    pub fn moeyard_kv_write(args: *const KvWrite, stream: *mut c_void) -> c_int;
    pub fn moeyard_attention(args: *const Attention, stream: *mut c_void) -> c_int;
    pub fn moeyard_attention_bf16(args: *const Attention, stream: *mut c_void) -> c_int;
    pub fn moeyard_attention_sm90(args: *const Attention, stream: *mut c_void) -> c_int;
    pub fn moeyard_attention_decode(args: *const Attention, stream: *mut c_void) -> c_int;
    pub fn moeyard_attention_mla(args: *const Attention, stream: *mut c_void) -> c_int;
    pub fn moeyard_attention_shared_bytes(args: *const Attention) -> usize;
}

// The same numbers stand in cuda/device.cu.
const _: () = {
    assert!(size_of::<Matrix>() == 32);
    assert!(size_of::<Copy>() == 80);
    assert!(size_of::<TransposeHeads>() == 80);
    assert!(size_of::<Embed>() == 80);
    assert!(size_of::<Map>() == 72);
    assert!(size_of::<Norm>() == 160);
    assert!(size_of::<SquareSum>() == 64);
    assert!(size_of::<ScaleBySquareSum>() == 80);
    assert!(size_of::<Rope>() == 96);
    assert!(size_of::<Gemm>() == 176);
    assert!(size_of::<GroupedGemm>() == 192);
    assert!(size_of::<GateRows>() == 80);
    assert!(size_of::<Route>() == 136);
    assert!(size_of::<Draw>() == 24);
    assert!(size_of::<Sample>() == 72);
    assert!(size_of::<Combine>() == 112);
    assert!(size_of::<Plan>() == 144);
    assert!(size_of::<World>() == 168);
    assert!(size_of::<Return>() == 88);
    assert!(size_of::<RopeKv>() == 168);
    assert!(size_of::<KvWrite>() == 136);
    assert!(size_of::<Span>() == 20);
    assert!(size_of::<KvPart>() == 32);
    assert!(size_of::<Attention>() == 272);
};
