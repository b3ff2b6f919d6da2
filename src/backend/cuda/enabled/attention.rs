//! The paged cache and attention over it. Parts of a cache are `[blocks * block_size, width]`, tokens in cache order.
//!
//! There is a plain kernel for every shape, and several on the tensor cores, which share their softmax (cuda/softmax.cuh): for rows
//! of a sequence, and for single rows. Which one serves a row of a given model depends on the GPU alone or changes no bit.

use super::ffi;
use super::memory::{Buffer, tensor};
use super::{CudaBackend, Lock as _};
use crate::backend::{
    AttentionBatch, DType, GqaArgs, KvCache, KvShape, RopeArgs, SeqSpan, Tensor, View, ViewMut, check,
};
use crate::error::Result;

/// (row, head) pairs that a block of the plain kernel works on.
pub(super) const UNITS: usize = 8;
/// Widest value head of the plain kernel.
const MAX_VALUE: usize = 512;
/// Shared memory of a block on every GPU of sm_80 and later that this backend is built for.
const MAX_SHARED_BYTES: usize = 160 << 10;
/// On the tensor cores: (row, head) pairs of a block, without and with warpgroups; positions whose softmax is kept apart; head widths.
const MMA_UNITS: usize = 64;
pub(super) const WARPGROUP_UNITS: usize = 128;
const CHUNK: usize = 512;
const MMA_WIDTHS: [usize; 2] = [64, 128];
/// Most bytes of partial results of chunks.
const PARTIAL_BYTES: usize = 256 << 20;

/// Columns of the cache's two parts: keys and values, or latents and rotary keys.
fn widths(shape: KvShape) -> [usize; 2] {
    match shape {
        KvShape::Gqa { kv_heads, head_dim } => [kv_heads * head_dim; 2],
        KvShape::Mla { latent, rope_dim } => [latent, rope_dim],
    }
}

/// Row of the cache for a position of a sequence whose blocks start at `first_block` of the table.
pub(super) fn cache_row(table: &[u32], first_block: u32, position: usize, block_size: usize) -> u32 {
    let block = table[first_block as usize + position / block_size];
    block * block_size as u32 + (position % block_size) as u32
}

/// Rows of spans in pieces of at most `rows`.
pub(super) fn pieces(spans: impl Iterator<Item = ffi::Span>, rows: usize) -> Vec<ffi::Span> {
    let mut out = Vec::new();
    for span in spans {
        for first in (0..span.rows).step_by(rows) {
            let rows = (span.rows - first).min(rows as u32);
            out.push(ffi::Span { row: span.row + first, rows, position: span.position + first, ..span });
        }
    }
    out
}

/// The most chunks that a row of `single` meets, with a window of 0 for none.
pub(super) fn chunks_of(single: &[ffi::Span], window: usize) -> usize {
    let chunks = |span: &ffi::Span| {
        let position = span.position as usize;
        let oldest = if window == 0 { 0 } else { (position + 1).saturating_sub(window) };
        position / CHUNK - oldest / CHUNK + 1
    };
    single.iter().map(chunks).max().unwrap_or(0)
}

/// Floats that the chunks of one row leave to be merged: one chunk leaves nothing.
pub(super) fn partial_floats(heads: usize, chunks: usize, width: usize) -> usize {
    if chunks > 1 { heads * chunks * (width + 2) } else { 0 }
}

/// Rows that the kernels for the tensor cores can read and write 16 bytes at a time.
pub(super) fn aligned(rows: &View<'_>) -> bool {
    ffi::Matrix::of(rows).is_aligned()
}

pub(super) fn whole(span: &SeqSpan) -> ffi::Span {
    ffi::Span {
        row: span.row,
        rows: span.rows,
        position: span.position,
        first_block: span.first_block,
        base: 0,
    }
}

/// Columns of a part of the cache.
pub(super) fn cached(part: &Tensor, head_stride: usize, dim: usize) -> ffi::KvPart {
    ffi::KvPart {
        data: part.view().address(),
        stride: part.cols() as i64,
        head_stride: ffi::int(head_stride),
        dim: ffi::int(dim),
        paged: 1,
        reserved: 0,
    }
}

/// Columns of rows that lie in order of position.
pub(super) fn linear(rows: View<'_>, head_stride: usize, dim: usize) -> ffi::KvPart {
    ffi::KvPart {
        data: rows.address(),
        stride: rows.stride() as i64,
        head_stride: ffi::int(head_stride),
        dim: ffi::int(dim),
        paged: 0,
        reserved: 0,
    }
}

impl CudaBackend {
    pub(super) fn alloc_cache(
        &self,
        shape: KvShape,
        dtype: DType,
        block_size: usize,
        blocks: usize,
    ) -> Result<KvCache> {
        check::kv_shape(shape, dtype, block_size);
        let part = |width| tensor(&self.gpu, dtype, blocks * block_size, width);
        let [a, b] = widths(shape);
        Ok(KvCache { parts: vec![part(a)?, part(b)?], shape, dtype, block_size, blocks })
    }

    pub(super) fn cache_block_bytes(shape: KvShape, dtype: DType, block_size: usize) -> usize {
        check::kv_shape(shape, dtype, block_size);
        widths(shape).iter().sum::<usize>() * block_size * dtype.bytes()
    }

    pub(super) fn write_cache(
        &self,
        k: View<'_>,
        v: View<'_>,
        batch: AttentionBatch<'_>,
        cache: &mut KvCache,
    ) -> Result<()> {
        check::kv_write(&k, &v, &batch, cache);
        let slots = self.cache_slots(&batch, cache.block_size)?;
        let source = match cache.shape {
            KvShape::Gqa { .. } => [k, v],
            KvShape::Mla { .. } => [v, k],
        };
        let args = ffi::KvWrite {
            source: source.map(|s| ffi::Matrix::of(&s)),
            part: [ffi::Matrix::of(&cache.parts[0].view()), ffi::Matrix::of(&cache.parts[1].view())],
            slots,
        };
        self.gpu.launch("KV write", ffi::moeyard_kv_write, &args)
    }

    /// Device address of the cache row of each batch row.
    fn cache_slots(&self, batch: &AttentionBatch<'_>, block_size: usize) -> Result<usize> {
        let rows = |span: &SeqSpan| span.position as usize..(span.position + span.rows) as usize;
        let slots: Vec<u32> = batch
            .spans
            .iter()
            .flat_map(|span| {
                rows(span).map(|p| cache_row(batch.block_table, span.first_block, p, block_size))
            })
            .collect();
        let mut staging = self.staging.lock_now();
        self.residents.lock_now().slots.put(&self.gpu, &mut staging, bytemuck::cast_slice(&slots))
    }

    pub(super) fn rotate_and_write(
        &self,
        qkv: ViewMut<'_>,
        rope: RopeArgs<'_>,
        batch: AttentionBatch<'_>,
        cache: &mut KvCache,
    ) -> Result<()> {
        let (kv_heads, head_dim) = check::rope_kv_write(&qkv, &rope, cache);
        check::rope(&qkv, &rope);
        let (all, v) = (qkv.as_view(), rope.heads * head_dim);
        let k = all.cols_range(v - kv_heads * head_dim..v);
        check::kv_write(&k, &all.cols_range(v..all.cols()), &batch, cache);
        let slots = self.cache_slots(&batch, cache.block_size)?;
        let rows = self.rope_rows(rope.rows)?;
        let [key, value] = [&cache.parts[0], &cache.parts[1]].map(|part| ffi::Matrix::of(&part.view()));
        let args = ffi::RopeKv {
            qkv: ffi::Matrix::of(&qkv.as_view()),
            table: ffi::Matrix::of(&rope.table),
            key,
            value,
            rows,
            slots,
            heads: ffi::int(rope.heads),
            kv_heads: ffi::int(kv_heads),
            head_dim: ffi::int(head_dim),
            offset: ffi::int(rope.offset),
            dim: ffi::int(rope.dim),
            interleaved: i32::from(rope.interleaved),
        };
        self.gpu.launch("rotary embedding and KV write", ffi::moeyard_rope_kv, &args)
    }

    pub(super) fn gqa(&self, args: GqaArgs<'_>, out: ViewMut<'_>) -> Result<()> {
        let (kv_heads, head_dim) = check::attention_gqa(&args, &out);
        let block_table = {
            let mut staging = self.staging.lock_now();
            let table = bytemuck::cast_slice(args.batch.block_table);
            self.residents.lock_now().blocks.put(&self.gpu, &mut staging, table)?
        };
        let common = ffi::Attention {
            query: [ffi::Matrix::of(&args.q), ffi::Matrix::NONE],
            out: ffi::Matrix::of(&out.as_view()),
            key: [cached(&args.cache.parts[0], head_dim, head_dim), ffi::KvPart::NONE],
            value: cached(&args.cache.parts[1], head_dim, head_dim),
            block_table,
            sinks: args.sinks.map_or(0, |s| s.address()),
            query_stride: [ffi::int(head_dim), 0],
            block_size: ffi::int(args.cache.block_size),
            heads: ffi::int(args.heads),
            kv_heads: ffi::int(kv_heads),
            // A window beyond every position is none.
            window: args.window.and_then(|w| i32::try_from(w).ok()).unwrap_or(0),
            kv_type: ffi::type_code(args.cache.dtype),
            scale: args.scale,
            ..ffi::Attention::NONE
        };
        let group = args.heads / kv_heads;
        let tensor_cores = args.cache.dtype == DType::Bf16
            && MMA_WIDTHS.contains(&head_dim)
            && group <= MMA_UNITS
            && args.scale > 0.0
            && aligned(&args.q)
            && aligned(&out.as_view());
        if tensor_cores {
            return self.gqa_on_tensor_cores(args.batch.spans, common, group);
        }
        let spans = pieces(args.batch.spans.iter().map(whole), (UNITS / group).max(1));
        let table = {
            let mut staging = self.staging.lock_now();
            let spans = bytemuck::cast_slice(&spans);
            self.residents.lock_now().spans.put(&self.gpu, &mut staging, spans)?
        };
        let span_rows = spans.iter().map(|s| s.rows as i32).max().unwrap_or(0);
        self.attend(ffi::Attention { spans: table, span_count: ffi::int(spans.len()), span_rows, ..common })
    }

    /// Sequences with a single row apart from those with more: the former are spread over a block for each chunk of positions.
    fn gqa_on_tensor_cores(&self, spans: &[SeqSpan], common: ffi::Attention, group: usize) -> Result<()> {
        let (single, several): (Vec<_>, Vec<_>) = spans.iter().map(whole).partition(|s| s.rows == 1);
        let (units, launcher): (_, ffi::Launcher<ffi::Attention>) = if self.warpgroups() {
            (WARPGROUP_UNITS, ffi::moeyard_attention_sm90)
        } else {
            (MMA_UNITS, ffi::moeyard_attention_bf16)
        };
        let several = pieces(several.into_iter(), units / group);
        let [single_table, several_table] = {
            let mut staging = self.staging.lock_now();
            let mut residents = self.residents.lock_now();
            let residents = &mut *residents;
            [
                residents.single.put(&self.gpu, &mut staging, bytemuck::cast_slice(&single))?,
                residents.spans.put(&self.gpu, &mut staging, bytemuck::cast_slice(&several))?,
            ]
        };
        if !several.is_empty() {
            let args = ffi::Attention { spans: several_table, span_count: ffi::int(several.len()), ..common };
            self.gpu.launch("attention", launcher, &args)?;
        }
        let chunks = chunks_of(&single, common.window as usize);
        let floats = partial_floats(common.heads as usize, chunks, common.value.dim as usize);
        let args = ffi::Attention { spans: single_table, chunks: ffi::int(chunks), ..common };
        let partials = &mut self.scratch.lock_now().partials;
        self.attend_singly(ffi::moeyard_attention_decode, single.len(), args, floats, partials)
    }

    /// A kernel for the `rows` single rows of `args.spans`: as many at a time as the `floats` that each one needs of `partials` allow.
    pub(super) fn attend_singly(
        &self,
        launcher: ffi::Launcher<ffi::Attention>,
        rows: usize,
        args: ffi::Attention,
        floats: usize,
        partials: &mut Buffer,
    ) -> Result<()> {
        if rows == 0 {
            return Ok(());
        }
        let at_once = (PARTIAL_BYTES / DType::F32.bytes() / floats.max(1)).clamp(1, rows);
        let memory = match floats {
            0 => 0,
            _ => partials.take(&self.gpu, DType::F32, 1, at_once * floats)?.as_view().address(),
        };
        for first in (0..rows).step_by(at_once) {
            let args = ffi::Attention {
                spans: args.spans + first * size_of::<ffi::Span>(),
                span_count: ffi::int(at_once.min(rows - first)),
                partials: memory,
                ..args
            };
            self.gpu.launch("attention of single rows", launcher, &args)?;
        }
        Ok(())
    }

    /// The plain kernel.
    pub(super) fn attend(&self, args: ffi::Attention) -> Result<()> {
        // SAFETY: reads the struct alone.
        let shared = unsafe { ffi::moeyard_attention_shared_bytes(&args) };
        let value = args.value.dim as usize;
        if shared > MAX_SHARED_BYTES || value > MAX_VALUE {
            let key = args.key[0].dim + args.key[1].dim;
            return Err(self.gpu.failure(format!(
                "attention: heads of {key} (keys) and {value} (values), which need {shared} bytes of shared memory; at most \
                 {MAX_SHARED_BYTES}, and values of {MAX_VALUE}"
            )));
        }
        self.gpu.launch("attention", ffi::moeyard_attention, &args)
    }
}
