//! The paged cache and attention over it. Parts of a cache are `[blocks * block_size, width]`, tokens in cache order.

use super::ffi;
use super::memory::tensor;
use super::products::{Heads, padded};
use super::{CudaBackend, Lock as _};
use crate::backend::{
    AttentionBatch, DType, GqaArgs, HostMatrix, KvCache, KvShape, MlaArgs, MlaWeights, SeqSpan, Tensor, View,
    ViewMut, check,
};
use crate::error::Result;

/// (row, head) pairs that a block of the kernel works on.
const UNITS: usize = 8;
/// Widest value head of the kernel.
const MAX_VALUE: usize = 512;
/// Shared memory of a block on every GPU of sm_80 and later that this backend is built for.
const MAX_SHARED_BYTES: usize = 160 << 10;
/// The kernel for the tensor cores: (row, head) pairs of a block, positions whose softmax it keeps apart, head widths.
const MMA_UNITS: usize = 64;
const MMA_CHUNK: usize = 512;
const MMA_WIDTHS: [usize; 2] = [64, 128];
/// With fewer blocks than this, single rows get one for each chunk: two for each of a large GPU's multiprocessors.
const MMA_FEW_BLOCKS: usize = 264;
/// Most bytes of partial results of chunks.
const MMA_PARTIAL_BYTES: usize = 256 << 20;
/// Most bytes of keys and values that one pass of expanded MLA holds.
const EXPANDED_BYTES: usize = 256 << 20;

/// Columns of the cache's two parts: keys and values, or latents and rotary keys.
fn widths(shape: KvShape) -> [usize; 2] {
    match shape {
        KvShape::Gqa { kv_heads, head_dim } => [kv_heads * head_dim; 2],
        KvShape::Mla { latent, rope_dim } => [latent, rope_dim],
    }
}

fn cache_row(batch: &AttentionBatch<'_>, span: &SeqSpan, position: usize, block_size: usize) -> u32 {
    let block = batch.block_table[span.first_block as usize + position / block_size];
    block * block_size as u32 + (position % block_size) as u32
}

/// Rows of spans in pieces of at most `rows`.
fn pieces(spans: impl Iterator<Item = ffi::Span>, rows: usize) -> Vec<ffi::Span> {
    let mut out = Vec::new();
    for span in spans {
        for first in (0..span.rows).step_by(rows) {
            let rows = (span.rows - first).min(rows as u32);
            out.push(ffi::Span { row: span.row + first, rows, position: span.position + first, ..span });
        }
    }
    out
}

/// Chunks that a row at `position` meets, with a window of 0 for none.
fn chunks_of(position: usize, window: usize) -> usize {
    let oldest = if window == 0 { 0 } else { (position + 1).saturating_sub(window) };
    position / MMA_CHUNK - oldest / MMA_CHUNK + 1
}

fn whole(span: &SeqSpan) -> ffi::Span {
    ffi::Span {
        row: span.row,
        rows: span.rows,
        position: span.position,
        first_block: span.first_block,
        base: 0,
    }
}

/// Columns of a part of the cache.
fn cached(part: &Tensor, head_stride: usize, dim: usize) -> ffi::KvPart {
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
fn linear(rows: View<'_>, head_stride: usize, dim: usize) -> ffi::KvPart {
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
        let rows = |span: &SeqSpan| span.position as usize..(span.position + span.rows) as usize;
        let slots: Vec<u32> = batch
            .spans
            .iter()
            .flat_map(|span| rows(span).map(|p| cache_row(&batch, span, p, cache.block_size)))
            .collect();
        let slots = {
            let mut staging = self.staging.lock_now();
            self.residents.lock_now().slots.put(&self.gpu, &mut staging, bytemuck::cast_slice(&slots))?
        };
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
            spans: 0,
            block_table,
            sinks: args.sinks.map_or(0, |s| s.address()),
            query_stride: [ffi::int(head_dim), 0],
            span_count: 0,
            span_rows: 0,
            block_size: ffi::int(args.cache.block_size),
            heads: ffi::int(args.heads),
            kv_heads: ffi::int(kv_heads),
            // A window beyond every position is none.
            window: args.window.and_then(|w| i32::try_from(w).ok()).unwrap_or(0),
            kv_type: ffi::type_code(args.cache.dtype),
            scale: args.scale,
            chunks: 0,
            reserved: 0,
            partials: 0,
        };
        let group = args.heads / kv_heads;
        let tensor_cores =
            args.cache.dtype == DType::Bf16 && MMA_WIDTHS.contains(&head_dim) && group <= MMA_UNITS;
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

    /// Sequences with a single row apart from those with more: few of the former are spread over more blocks. Either way of walking
    /// the chunks gives the same bits.
    fn gqa_on_tensor_cores(&self, spans: &[SeqSpan], common: ffi::Attention, group: usize) -> Result<()> {
        let (single, several): (Vec<_>, Vec<_>) = spans.iter().map(whole).partition(|s| s.rows == 1);
        let several = pieces(several.into_iter(), MMA_UNITS / group);
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
            self.gpu.launch("attention", ffi::moeyard_attention_bf16, &args)?;
        }
        if single.is_empty() {
            return Ok(());
        }
        let chunks = single.iter().map(|s| chunks_of(s.position as usize, common.window as usize)).max();
        let chunks = chunks.unwrap_or(0);
        let (heads, width) = (common.heads as usize, common.value.dim as usize);
        let partials = single.len() * heads * chunks * (width + 2);
        let mut args = ffi::Attention { spans: single_table, span_count: ffi::int(single.len()), ..common };
        let mut scratch = self.scratch.lock_now();
        let few = single.len() * (common.kv_heads as usize) < MMA_FEW_BLOCKS;
        if few && chunks > 1 && partials * DType::F32.bytes() <= MMA_PARTIAL_BYTES {
            args.chunks = ffi::int(chunks);
            let partials = scratch.partials.take(&self.gpu, DType::F32, 1, partials)?;
            args.partials = partials.as_view().address();
        }
        self.gpu.launch("attention", ffi::moeyard_attention_bf16, &args)
    }

    fn attend(&self, args: ffi::Attention) -> Result<()> {
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

    /// Parts: `kv_b` as it is, and W_k of each head transposed, `[heads * latent, nope]`.
    pub(super) fn pack_kv_b(
        &self,
        kv_b: &HostMatrix,
        heads: usize,
        nope_dim: usize,
        v_dim: usize,
        dtype: DType,
    ) -> Result<MlaWeights> {
        check::pack_mla(kv_b, heads, nope_dim, v_dim);
        let plain = self.pack_rows(kv_b, dtype)?;
        let transposed = tensor(&self.gpu, dtype, heads * kv_b.k, padded(nope_dim))?;
        let args = ffi::TransposeHeads {
            src: ffi::Matrix::of(&plain.view()),
            dst: ffi::Matrix::of(&transposed.view()),
            heads: ffi::int(heads),
            nope: ffi::int(nope_dim),
            v: ffi::int(v_dim),
            latent: ffi::int(kv_b.k),
        };
        self.gpu.launch("transposing kv_b", ffi::moeyard_transpose_heads, &args)?;
        Ok(MlaWeights { parts: vec![plain, transposed], heads, latent: kv_b.k, nope_dim, v_dim })
    }

    pub(super) fn mla_bytes_of(
        heads: usize,
        nope_dim: usize,
        v_dim: usize,
        latent: usize,
        dtype: DType,
    ) -> usize {
        heads * ((nope_dim + v_dim) * padded(latent) + latent * padded(nope_dim)) * dtype.bytes()
    }

    pub(super) fn mla(&self, args: MlaArgs<'_>, mut out: ViewMut<'_>) -> Result<()> {
        check::attention_mla(&args, &out);
        let prompt = |s: &SeqSpan| s.prompt_len.saturating_sub(s.position).min(s.rows);
        let expanded: Vec<ffi::Span> = args
            .batch
            .spans
            .iter()
            .map(|s| ffi::Span { rows: prompt(s), ..whole(s) })
            .filter(|s| s.rows > 0)
            .collect();
        let absorbed: Vec<ffi::Span> = args
            .batch
            .spans
            .iter()
            .map(|s| {
                let first = prompt(s);
                ffi::Span {
                    row: s.row + first,
                    rows: s.rows - first,
                    position: s.position + first,
                    ..whole(s)
                }
            })
            .filter(|s| s.rows > 0)
            .collect();
        let block_table = {
            let mut staging = self.staging.lock_now();
            let table = bytemuck::cast_slice(args.batch.block_table);
            self.residents.lock_now().blocks.put(&self.gpu, &mut staging, table)?
        };
        let mut rest = expanded.as_slice();
        while !rest.is_empty() {
            let taken = self.expand(&args, rest, block_table, out.reborrow())?;
            rest = &rest[taken..];
        }
        if absorbed.is_empty() { Ok(()) } else { self.absorb(&args, &absorbed, block_table, out) }
    }

    /// The expanded form of the first of `spans`, as many as fit one pass; returns how many that were.
    fn expand(
        &self,
        args: &MlaArgs<'_>,
        spans: &[ffi::Span],
        block_table: usize,
        mut out: ViewMut<'_>,
    ) -> Result<usize> {
        let (w, dtype) = (args.weights, args.cache.dtype);
        let width = w.nope_dim + w.v_dim;
        let context = |s: &ffi::Span| (s.position + s.rows) as usize;
        let room = EXPANDED_BYTES / (width * dtype.bytes());
        let (mut taken, mut positions) = (0, 0);
        while taken < spans.len() && (taken == 0 || (positions + context(&spans[taken])) * w.heads <= room) {
            positions += context(&spans[taken]);
            taken += 1;
        }
        let heads_at_once = (room / positions).clamp(1, w.heads);

        let mut index = Vec::with_capacity(positions);
        let mut based = Vec::with_capacity(taken);
        for span in &spans[..taken] {
            based.push(ffi::Span { base: index.len() as u32, ..*span });
            let at = SeqSpan {
                row: span.row,
                rows: span.rows,
                position: span.position,
                prompt_len: 0,
                first_block: span.first_block,
            };
            let block_size = args.cache.block_size;
            index.extend((0..context(span)).map(|p| cache_row(&args.batch, &at, p, block_size)));
        }
        let items = pieces(based.into_iter(), UNITS);
        let spans_table = {
            let mut staging = self.staging.lock_now();
            let items = bytemuck::cast_slice(&items);
            self.residents.lock_now().expanded.put(&self.gpu, &mut staging, items)?
        };
        let mut scratch = self.scratch.lock_now();
        let scratch = &mut *scratch;
        let mut latents = scratch.latents.take(&self.gpu, dtype, positions, w.latent)?;
        self.gather(args.cache.parts[0].view(), &index, latents.reborrow())?;
        for first in (0..w.heads).step_by(heads_at_once) {
            let heads = heads_at_once.min(w.heads - first);
            let mut kv = scratch.expanded.take(&self.gpu, dtype, positions, heads * width)?;
            let product = Heads {
                count: 1,
                n: heads * width,
                k: w.latent,
                x_step: 0,
                first_row: first * width,
                row_step: 0,
            };
            self.linear_heads(latents.as_view(), &w.parts[0], product, kv.reborrow())?;
            let kv = kv.as_view();
            let q_width = args.q.cols() / w.heads;
            let q = args.q.cols_range(first * q_width..(first + heads) * q_width);
            let columns = first * w.v_dim..(first + heads) * w.v_dim;
            self.attend(ffi::Attention {
                query: [ffi::Matrix::of(&q), ffi::Matrix::of(&q.cols_range(w.nope_dim..q.cols()))],
                out: ffi::Matrix::of(&out.reborrow().cols_range(columns).as_view()),
                key: [linear(kv, width, w.nope_dim), cached(&args.cache.parts[1], 0, q_width - w.nope_dim)],
                value: linear(kv.cols_range(w.nope_dim..kv.cols()), width, w.v_dim),
                spans: spans_table,
                block_table,
                sinks: 0,
                query_stride: [ffi::int(q_width); 2],
                span_count: ffi::int(items.len()),
                span_rows: ffi::int(UNITS),
                block_size: ffi::int(args.cache.block_size),
                heads: ffi::int(heads),
                kv_heads: ffi::int(heads),
                window: 0,
                kv_type: ffi::type_code(dtype),
                scale: args.scale,
                chunks: 0,
                reserved: 0,
                partials: 0,
            })?;
        }
        Ok(taken)
    }

    /// The absorbed form of `spans`.
    fn absorb(
        &self,
        args: &MlaArgs<'_>,
        spans: &[ffi::Span],
        block_table: usize,
        mut out: ViewMut<'_>,
    ) -> Result<()> {
        let (w, dtype) = (args.weights, args.cache.dtype);
        let q_width = args.q.cols() / w.heads;
        let rope_dim = q_width - w.nope_dim;
        // Rows of generated tokens side by side.
        let index: Vec<u32> = spans.iter().flat_map(|s| s.row..s.row + s.rows).collect();
        let rows = index.len();
        let mut next = 0;
        let packed: Vec<ffi::Span> = spans
            .iter()
            .map(|s| {
                let row = next;
                next += s.rows;
                ffi::Span { row, ..*s }
            })
            .collect();
        let items = pieces(packed.iter().copied(), 1);
        let spans_table = {
            let mut staging = self.staging.lock_now();
            let items = bytemuck::cast_slice(&items);
            self.residents.lock_now().absorbed.put(&self.gpu, &mut staging, items)?
        };
        let mut scratch = self.scratch.lock_now();
        let scratch = &mut *scratch;
        let mut q = scratch.queries.take(&self.gpu, args.q.dtype(), rows, args.q.cols())?;
        self.gather(args.q, &index, q.reborrow())?;
        let q = q.as_view();
        let mut q_latent = scratch.latent_queries.take(&self.gpu, dtype, rows, w.heads * w.latent)?;
        let into_latent = Heads {
            count: w.heads,
            n: w.latent,
            k: w.nope_dim,
            x_step: q_width,
            first_row: 0,
            row_step: w.latent,
        };
        self.linear_heads(q, &w.parts[1], into_latent, q_latent.reborrow())?;
        let mean = scratch.means.take(&self.gpu, dtype, rows, w.heads * w.latent)?;
        self.attend(ffi::Attention {
            query: [
                ffi::Matrix::of(&q_latent.as_view()),
                ffi::Matrix::of(&q.cols_range(w.nope_dim..q.cols())),
            ],
            out: ffi::Matrix::of(&mean.as_view()),
            key: [cached(&args.cache.parts[0], 0, w.latent), cached(&args.cache.parts[1], 0, rope_dim)],
            value: cached(&args.cache.parts[0], 0, w.latent),
            spans: spans_table,
            block_table,
            sinks: 0,
            query_stride: [ffi::int(w.latent), ffi::int(q_width)],
            span_count: ffi::int(items.len()),
            span_rows: 1,
            block_size: ffi::int(args.cache.block_size),
            heads: ffi::int(w.heads),
            kv_heads: 1,
            window: 0,
            kv_type: ffi::type_code(dtype),
            scale: args.scale,
            chunks: 0,
            reserved: 0,
            partials: 0,
        })?;
        let out_of_latent = Heads {
            count: w.heads,
            n: w.v_dim,
            k: w.latent,
            x_step: w.latent,
            first_row: w.nope_dim,
            row_step: w.nope_dim + w.v_dim,
        };
        if rows == out.rows() {
            return self.linear_heads(mean.as_view(), &w.parts[0], out_of_latent, out);
        }
        for (span, packed) in spans.iter().zip(&packed) {
            let (from, to) = (packed.row as usize, span.row as usize);
            let rows = span.rows as usize;
            let target = out.reborrow().rows_range(to..to + rows);
            let means = mean.as_view().rows_range(from..from + rows);
            self.linear_heads(means, &w.parts[0], out_of_latent, target)?;
        }
        Ok(())
    }
}
