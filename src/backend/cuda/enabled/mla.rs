//! Both forms of multi-head latent attention, and what packs their weights.

use super::attention::{
    UNITS, WARPGROUP_UNITS, aligned, cache_row, cached, chunks_of, linear, partial_floats, pieces, whole,
};
use super::ffi;
use super::memory::tensor;
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
        let q_width = args.q.cols() / w.heads;
        let tensor_cores = self.gpu.has_warpgroups()
            && dtype == DType::Bf16
            && (w.nope_dim, q_width - w.nope_dim, w.v_dim) == (NOPE, ROPE, VALUE)
            && args.scale > 0.0
            && aligned(&args.q)
            && aligned(&out.as_view());
        let items = pieces(based.into_iter(), if tensor_cores { WARPGROUP_UNITS } else { UNITS });
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
            let q = args.q.cols_range(first * q_width..(first + heads) * q_width);
            let columns = first * w.v_dim..(first + heads) * w.v_dim;
            let attention = ffi::Attention {
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
            };
            if tensor_cores {
                self.gpu.launch("attention", ffi::moeyard_attention_sm90, &attention)?;
            } else {
                self.attend(attention)?;
            }
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
        // In a step without prompts they are already.
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
        let attention = ffi::Attention {
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
        };
        let tensor_cores = self.gpu.has_warpgroups()
            && dtype == DType::Bf16
            && (w.latent, rope_dim) == (LATENT, ROPE)
            && args.scale > 0.0
            && aligned(&q.cols_range(w.nope_dim..q.cols()));
        if tensor_cores {
            let blocks = w.heads.div_ceil(HEADS);
            // Many rows walk all their chunks and keep sums of whole blocks; the bits are the same.
            let (chunks, floats) = if rows * blocks < FEW_BLOCKS {
                let chunks = chunks_of(&items, 0);
                (chunks, partial_floats(w.heads, chunks, w.latent))
            } else {
                (0, blocks * HEADS * LATENT)
            };
            let attention = ffi::Attention { chunks: ffi::int(chunks), ..attention };
            let partials = &mut scratch.partials;
            self.attend_singly(ffi::moeyard_attention_mla, rows, attention, floats, partials)?;
        } else {
            self.attend(attention)?;
        }
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
