//! Both forms of multi-head latent attention, and what packs their weights.

use super::attention::{
    UNITS, WARPGROUP_UNITS, aligned, cache_row, cached, chunks_of, linear, partial_floats, pieces, whole,
};
use super::ffi;
use super::memory::{Buffer, tensor};
use super::products::{Heads, padded};
use super::{CudaBackend, Lock as _};
use crate::backend::{DType, HostMatrix, MlaArgs, MlaWeights, SeqSpan, ViewMut, check};
use crate::error::Result;

/// Most bytes of keys and values that one pass of the expanded form holds.
const EXPANDED_BYTES: usize = 256 << 20;
/// The kernels for the tensor cores: width of the latent, of keys without and with rotary, of values, heads of a block.
const LATENT: usize = 512;
const NOPE: usize = 128;
const ROPE: usize = 64;
const VALUE: usize = 128;
const HEADS: usize = 64;
/// With fewer blocks than this, each chunk of a row's positions gets one: most of a large GPU's multiprocessors.
const FEW_BLOCKS: usize = 96;

impl CudaBackend {
    /// Parts: `kv_b` as it is, and W_k of each head transposed, `[heads * latent, nope]`.
    pub(super) fn pack_kv_b(
        &self,
        kv_b: &HostMatrix<'_>,
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
        let (expanded, absorbed) = by_form(args.batch.spans);
        let block_table = {
            let mut staging = self.staging.lock_now();
            let table = bytemuck::cast_slice(args.batch.block_table);
            self.residents.lock_now().blocks.put(&self.gpu, &mut staging, table)?
        };
        let common = ffi::Attention {
            block_table,
            block_size: ffi::int(args.cache.block_size),
            kv_type: ffi::type_code(args.cache.dtype),
            scale: args.scale,
            ..ffi::Attention::NONE
        };
        let mut rest = expanded.as_slice();
        while !rest.is_empty() {
            let pass = Pass::of(rest, &args);
            self.expand(&args, &pass, common, out.reborrow())?;
            rest = &rest[pass.spans.len()..];
        }
        if absorbed.is_empty() { Ok(()) } else { self.absorb(&args, &absorbed, common, out) }
    }

    /// The expanded form of the spans of a pass.
    fn expand(
        &self,
        args: &MlaArgs<'_>,
        pass: &Pass<'_>,
        common: ffi::Attention,
        mut out: ViewMut<'_>,
    ) -> Result<()> {
        let (w, dtype) = (args.weights, args.cache.dtype);
        let (width, q_width) = (w.nope_dim + w.v_dim, args.q.cols() / w.heads);
        let rope_dim = q_width - w.nope_dim;
        let tensor_cores = self.warpgroups()
            && dtype == DType::Bf16
            && (w.nope_dim, rope_dim, w.v_dim) == (NOPE, ROPE, VALUE)
            && args.scale > 0.0
            && aligned(&args.q)
            && aligned(&out.as_view());
        let (index, based) = pass.rows_in_order(args);
        let items = pieces(based.into_iter(), if tensor_cores { WARPGROUP_UNITS } else { UNITS });
        let spans = {
            let mut staging = self.staging.lock_now();
            let items = bytemuck::cast_slice(&items);
            self.residents.lock_now().expanded.put(&self.gpu, &mut staging, items)?
        };
        let mut scratch = self.scratch.lock_now();
        let scratch = &mut *scratch;
        let mut latents = scratch.latents.take(&self.gpu, dtype, index.len(), w.latent)?;
        self.gather(args.cache.parts[0].view(), &index, latents.reborrow())?;
        for first in (0..w.heads).step_by(pass.heads_at_once) {
            let heads = pass.heads_at_once.min(w.heads - first);
            let mut kv = scratch.expanded.take(&self.gpu, dtype, index.len(), heads * width)?;
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
            let q = args.q.cols_range(first * q_width..(first + heads) * q_width);
            let columns = first * w.v_dim..(first + heads) * w.v_dim;
            let attention = ffi::Attention {
                query: [ffi::Matrix::of(&q), ffi::Matrix::of(&q.cols_range(w.nope_dim..q.cols()))],
                out: ffi::Matrix::of(&out.reborrow().cols_range(columns).as_view()),
                key: [linear(kv, width, w.nope_dim), cached(&args.cache.parts[1], 0, rope_dim)],
                value: linear(kv.cols_range(w.nope_dim..kv.cols()), width, w.v_dim),
                spans,
                query_stride: [ffi::int(q_width); 2],
                span_count: ffi::int(items.len()),
                span_rows: ffi::int(UNITS),
                heads: ffi::int(heads),
                kv_heads: ffi::int(heads),
                ..common
            };
            if tensor_cores {
                self.gpu.launch("attention", ffi::moeyard_attention_sm90, &attention)?;
            } else {
                self.attend(attention)?;
            }
        }
        Ok(())
    }

    /// The absorbed form of `spans`, whose rows are brought together first.
    fn absorb(
        &self,
        args: &MlaArgs<'_>,
        spans: &[ffi::Span],
        common: ffi::Attention,
        mut out: ViewMut<'_>,
    ) -> Result<()> {
        let (w, dtype) = (args.weights, args.cache.dtype);
        let q_width = args.q.cols() / w.heads;
        let index: Vec<u32> = spans.iter().flat_map(|s| s.row..s.row + s.rows).collect();
        let rows = index.len();
        let mut scratch = self.scratch.lock_now();
        let scratch = &mut *scratch;
        let mut copied;
        let q = if rows == args.q.rows() && args.q.dtype() == dtype {
            args.q
        } else {
            copied = scratch.queries.take(&self.gpu, dtype, rows, args.q.cols())?;
            if rows == args.q.rows() {
                self.copy(args.q, 0, copied.reborrow())?;
            } else {
                self.gather(args.q, &index, copied.reborrow())?;
            }
            copied.as_view()
        };
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
        let mean = mean.as_view();
        let latents = cached(&args.cache.parts[0], 0, w.latent);
        let q_rope = q.cols_range(w.nope_dim..q.cols());
        let attention = ffi::Attention {
            query: [ffi::Matrix::of(&q_latent.as_view()), ffi::Matrix::of(&q_rope)],
            out: ffi::Matrix::of(&mean),
            key: [latents, cached(&args.cache.parts[1], 0, q_width - w.nope_dim)],
            value: latents,
            query_stride: [ffi::int(w.latent), ffi::int(q_width)],
            heads: ffi::int(w.heads),
            kv_heads: 1,
            ..common
        };
        self.attend_latents(spans, attention, &mut scratch.partials)?;
        let out_of_latent = Heads {
            count: w.heads,
            n: w.v_dim,
            k: w.latent,
            x_step: w.latent,
            first_row: w.nope_dim,
            row_step: w.nope_dim + w.v_dim,
        };
        // Back to where the rows came from, as many neighbours at a time as there are.
        let mut from = 0;
        for run in index.chunk_by(|a, b| a + 1 == *b) {
            let (to, rows) = (run[0] as usize, run.len());
            let target = out.reborrow().rows_range(to..to + rows);
            self.linear_heads(mean.rows_range(from..from + rows), &w.parts[0], out_of_latent, target)?;
            from += rows;
        }
        Ok(())
    }

    /// Softmax attention over latents for the rows of `spans`, which lie side by side in `attention`.
    fn attend_latents(
        &self,
        spans: &[ffi::Span],
        attention: ffi::Attention,
        partials: &mut Buffer,
    ) -> Result<()> {
        let mut single = pieces(spans.iter().copied(), 1);
        for (row, span) in single.iter_mut().enumerate() {
            span.row = row as u32;
        }
        let table = {
            let mut staging = self.staging.lock_now();
            let single = bytemuck::cast_slice(&single);
            self.residents.lock_now().absorbed.put(&self.gpu, &mut staging, single)?
        };
        let (heads, latent) = (attention.heads as usize, attention.value.dim as usize);
        let attention =
            ffi::Attention { spans: table, span_count: ffi::int(single.len()), span_rows: 1, ..attention };
        let tensor_cores = self.warpgroups()
            && attention.kv_type == ffi::type_code(DType::Bf16)
            && (latent, attention.key[1].dim as usize) == (LATENT, ROPE)
            && attention.scale > 0.0
            && attention.query.iter().all(ffi::Matrix::is_aligned);
        if !tensor_cores {
            return self.attend(attention);
        }
        let blocks = heads.div_ceil(HEADS);
        // Many rows walk all their chunks and keep the sums of whole blocks; the bits are the same.
        let (chunks, floats) = if single.len() * blocks < FEW_BLOCKS {
            let chunks = chunks_of(&single, 0);
            (chunks, partial_floats(heads, chunks, latent))
        } else {
            (0, blocks * HEADS * latent)
        };
        let attention = ffi::Attention { chunks: ffi::int(chunks), ..attention };
        self.attend_singly(ffi::moeyard_attention_mla, single.len(), attention, floats, partials)
    }
}

/// Rows of each span at positions of its prompt, and the others.
fn by_form(spans: &[SeqSpan]) -> (Vec<ffi::Span>, Vec<ffi::Span>) {
    let prompt = |s: &SeqSpan| s.prompt_len.saturating_sub(s.position).min(s.rows);
    let expanded = spans.iter().map(|s| ffi::Span { rows: prompt(s), ..whole(s) });
    let absorbed = spans.iter().map(|s| {
        let first = prompt(s);
        ffi::Span { row: s.row + first, rows: s.rows - first, position: s.position + first, ..whole(s) }
    });
    (expanded.filter(|s| s.rows > 0).collect(), absorbed.filter(|s| s.rows > 0).collect())
}

/// Spans whose keys and values are expanded at once, for some heads at a time.
struct Pass<'a> {
    spans: &'a [ffi::Span],
    heads_at_once: usize,
}

impl<'a> Pass<'a> {
    /// As many of `spans` as fit, at least one.
    fn of(spans: &'a [ffi::Span], args: &MlaArgs<'_>) -> Pass<'a> {
        let w = args.weights;
        let room = EXPANDED_BYTES / ((w.nope_dim + w.v_dim) * args.cache.dtype.bytes());
        let (mut taken, mut positions) = (0, 0);
        while taken < spans.len() && (taken == 0 || (positions + context(&spans[taken])) * w.heads <= room) {
            positions += context(&spans[taken]);
            taken += 1;
        }
        Pass { spans: &spans[..taken], heads_at_once: (room / positions).clamp(1, w.heads) }
    }

    /// Cache rows of all positions that the spans see, span by span, and the spans with where theirs start.
    fn rows_in_order(&self, args: &MlaArgs<'_>) -> (Vec<u32>, Vec<ffi::Span>) {
        let mut index = Vec::new();
        let mut based = Vec::with_capacity(self.spans.len());
        for span in self.spans {
            based.push(ffi::Span { base: index.len() as u32, ..*span });
            let row = |p| cache_row(args.batch.block_table, span.first_block, p, args.cache.block_size);
            index.extend((0..context(span)).map(row));
        }
        (index, based)
    }
}

/// Positions up to and including the last row's.
fn context(span: &ffi::Span) -> usize {
    (span.position + span.rows) as usize
}
