//! The paged KV cache: where each token's keys and values lie, and how they get there.
//!
//! A token's vector is one row of a tensor, padded with zeros to whole registers, so that kernels need no tails:
//! * GQA: part 0 keys, part 1 values, each `[(block, KV head, token), head_dim]`: what one head reads of a block is contiguous;
//! * MLA: part 0 only, `[(block, token), latent + rope_dim]`, both padded: the latent is the value and, with the
//!   rotary key behind it, the key.

use super::CpuBackend;
use super::elementwise::convert_row;
use super::memory::{self, Rows, RowsMut};
use super::rows::{for_rows, with_float};
use super::simd::{Float, MAX_LANES};
use crate::backend::{AttentionBatch, DType, KvCache, KvShape, SeqSpan, View, check};
use crate::error::Result;

/// A vector of `dim` elements with its padding.
pub(super) fn padded(dim: usize) -> usize {
    dim.next_multiple_of(MAX_LANES)
}

/// Rows per token and their width, of each part.
fn parts(shape: KvShape) -> (usize, usize, usize) {
    match shape {
        KvShape::Gqa { kv_heads, head_dim } => (2, kv_heads, padded(head_dim)),
        KvShape::Mla { latent, rope_dim } => (1, 1, padded(latent) + padded(rope_dim)),
    }
}

/// See [`crate::backend::Backend::alloc_kv`].
pub(super) fn alloc_kv(
    _: &CpuBackend,
    shape: KvShape,
    dtype: DType,
    block_size: usize,
    blocks: usize,
) -> Result<KvCache> {
    check::kv_shape(shape, dtype, block_size);
    let (count, rows_per_token, width) = parts(shape);
    // Saturates to what no machine has; `tensor` refuses it.
    let rows = blocks.saturating_mul(block_size).saturating_mul(rows_per_token);
    let parts = (0..count).map(|_| memory::tensor(dtype, rows, width)).collect::<Result<_>>()?;
    Ok(KvCache { parts, shape, dtype, block_size, blocks })
}

/// See [`crate::backend::Backend::kv_block_bytes`].
pub(super) fn kv_block_bytes(_: &CpuBackend, shape: KvShape, dtype: DType, block_size: usize) -> usize {
    check::kv_shape(shape, dtype, block_size);
    let (count, rows_per_token, width) = parts(shape);
    count * block_size * rows_per_token * width * dtype.bytes()
}

/// The block table of one sequence.
pub(super) fn block_table<'a>(batch: &AttentionBatch<'a>, span: &SeqSpan) -> &'a [u32] {
    &batch.block_table[span.first_block as usize..]
}

/// Which span a task belongs to, and the task's number in it, where spans have `tasks(span)` each.
pub(super) fn find_span(spans: &[SeqSpan], task: usize, tasks: impl Fn(&SeqSpan) -> usize) -> (usize, usize) {
    let mut left = task;
    for (i, span) in spans.iter().enumerate() {
        let n = tasks(span);
        if left < n {
            return (i, left);
        }
        left -= n;
    }
    panic!("task {task} is {left} after the last")
}

/// How one operand of [`kv_write`] lies in a part of the cache.
struct Layout {
    /// KV heads: vectors per token.
    heads: usize,
    /// Elements of one vector.
    width: usize,
    /// First column.
    column: usize,
}

/// Stores the rows of a batch, `layout.heads` vectors each.
fn write_part<X: Float, T: Float>(
    backend: &CpuBackend,
    source: Rows<'_, X>,
    (batch, block_size): (&AttentionBatch<'_>, usize),
    part: &RowsMut<'_, T>,
    layout: Layout,
) {
    let Layout { heads, width, column } = layout;
    for span in batch.spans {
        let table = block_table(batch, span);
        for_rows(backend, span.rows as usize, source.cols(), &|range| {
            for r in range {
                let p = span.position as usize + r;
                let (block, token) = (table[p / block_size] as usize, p % block_size);
                let row = source.row(span.row as usize + r);
                for head in 0..heads {
                    let to = (block * heads + head) * block_size + token;
                    // SAFETY: a position is written by one task, and sequences share no block that they write.
                    let to = unsafe { part.part(to, column..column + width) };
                    convert_row(backend, &row[head * width..][..width], to);
                }
            }
        });
    }
}

/// See [`crate::backend::Backend::kv_write`].
pub(super) fn kv_write(
    backend: &CpuBackend,
    k: View<'_>,
    v: View<'_>,
    batch: AttentionBatch<'_>,
    cache: &mut KvCache,
) -> Result<()> {
    check::kv_write(&k, &v, &batch, cache);
    let (shape, dtype, block_size) = (cache.shape, cache.dtype, cache.block_size);
    let mut write = |source: View<'_>, part: usize, layout: Layout| {
        with_float!(dtype, T => with_float!(source.dtype(), X => {
            let part = RowsMut::<T>::new(cache.parts[part].view_mut());
            write_part(backend, Rows::<X>::new(source), (&batch, block_size), &part, layout);
        }));
    };
    match shape {
        KvShape::Gqa { kv_heads: heads, head_dim: width } => {
            write(k, 0, Layout { heads, width, column: 0 });
            write(v, 1, Layout { heads, width, column: 0 });
        }
        KvShape::Mla { latent, rope_dim } => {
            write(v, 0, Layout { heads: 1, width: latent, column: 0 });
            write(k, 0, Layout { heads: 1, width: rope_dim, column: padded(latent) });
        }
    }
    Ok(())
}
