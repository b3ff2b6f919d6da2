//! The paged KV cache: where each token's keys and values lie, and how they get there.
//!
//! Widths are padded with zeros to whole registers, so that kernels need no tails. A row of a part's tensor is:
//! * GQA: what one head keeps of a block, as panels for [`super::product`]: `[(block, KV head), ...]`, in part 0 the keys
//!   `[head_dim][tokens]`, in part 1 the values `[tokens][head_dim]`; of bf16, two consecutive k of a column lie side by side;
//! * MLA: what a token keeps: part 0 only, `[(block, token), latent + rope_dim]`, both padded to two registers: the latent is the
//!   value and, with the rotary key behind it, the key.

use super::CpuBackend;
use super::elementwise::convert_row;
use super::memory::{self, Rows, RowsMut, with_local_scratch};
use super::rows::{for_rows, with_float};
use super::simd::{Float, MAX_LANES};
use crate::backend::{AttentionBatch, DType, KvCache, KvShape, SeqSpan, View, check};
use crate::error::Result;

/// A vector of `dim` elements with its padding.
pub(super) fn padded(dim: usize) -> usize {
    dim.next_multiple_of(MAX_LANES)
}

/// A latent or its rotary key with its padding: a register holds twice as many bf16 as f32, and these lie side by side in rows.
pub(super) fn padded_latent(dim: usize) -> usize {
    dim.next_multiple_of(2 * MAX_LANES)
}

/// Number of parts; rows per block and their width, of each part.
fn parts(shape: KvShape, block_size: usize) -> (usize, usize, usize) {
    match shape {
        KvShape::Gqa { kv_heads, head_dim } => (2, kv_heads, block_size.saturating_mul(padded(head_dim))),
        KvShape::Mla { latent, rope_dim } => (1, block_size, padded_latent(latent) + padded_latent(rope_dim)),
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
    let (count, rows_per_block, width) = parts(shape, block_size);
    // Saturates to what no machine has; `tensor` refuses it.
    let rows = blocks.saturating_mul(rows_per_block);
    let parts = (0..count).map(|_| memory::tensor(dtype, rows, width)).collect::<Result<_>>()?;
    Ok(KvCache { parts, shape, dtype, block_size, blocks })
}

/// See [`crate::backend::Backend::kv_block_bytes`].
pub(super) fn kv_block_bytes(_: &CpuBackend, shape: KvShape, dtype: DType, block_size: usize) -> usize {
    check::kv_shape(shape, dtype, block_size);
    let (count, rows_per_block, width) = parts(shape, block_size);
    count * rows_per_block * width * dtype.bytes()
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

/// Storing an element of a single key, each in a cache line of its own, takes as long as streaming so many.
const SCATTER: usize = 8;

/// The part of a cache that [`kv_write`] fills from one operand.
enum Place {
    /// Keys of so many KV heads of such a width.
    Keys(usize, usize),
    /// Values likewise.
    Values(usize, usize),
    /// Columns of a token's row, from one on.
    Columns(usize),
}

/// Stores the rows of a batch in a part of the cache.
fn write_part<X: Float, T: Float>(
    backend: &CpuBackend,
    source: Rows<'_, X>,
    (batch, block_size): (&AttentionBatch<'_>, usize),
    part: &RowsMut<'_, T>,
    place: &Place,
) {
    // Neighbours in a prompt share cache lines, which many of them on one thread amortise.
    let alone = batch.rows() == batch.spans.len();
    let cost = source.cols() * if alone { SCATTER } else { 1 };
    for_rows(backend, batch.rows(), cost, &|range| {
        let (mut at, mut r) = find_span(batch.spans, range.start, |span| span.rows as usize);
        for _ in range {
            if r == batch.spans[at].rows as usize {
                at += 1 + batch.spans[at + 1..].iter().take_while(|span| span.rows == 0).count();
                r = 0;
            }
            let span = &batch.spans[at];
            let p = span.position as usize + r;
            let (block, token) = (block_table(batch, span)[p / block_size] as usize, p % block_size);
            let row = source.row(span.row as usize + r);
            r += 1;
            // A token that follows in this call would come too late for zeros in its place: another task may write it first.
            let last = r == span.rows as usize;
            let head = |heads: usize, head: usize| part.row_ptr(block * heads + head);
            // SAFETY: a position is written by one task, and sequences share no block that they write.
            unsafe {
                match *place {
                    Place::Keys(heads, width) => {
                        for (h, row) in row.chunks_exact(width).enumerate() {
                            write_key(backend, row, head(heads, h), token, block_size);
                        }
                    }
                    Place::Values(heads, width) => {
                        for (h, row) in row.chunks_exact(width).enumerate() {
                            write_value(backend, row, head(heads, h), token, last);
                        }
                    }
                    Place::Columns(first) => {
                        let row_of_part = block * block_size + token;
                        convert_row(backend, row, part.part(row_of_part, first..first + row.len()));
                    }
                }
            }
        }
    });
}

/// Elements of type `T` that lie side by side in a panel.
const fn group<T>() -> usize {
    size_of::<u32>() / size_of::<T>()
}

/// One key to its column of a panel `[width][block_size]`.
///
/// # Safety
/// `panel` is such a panel, of a padded width; nobody else touches this token's column.
unsafe fn write_key<X: Float, T: Float>(
    backend: &CpuBackend,
    key: &[X],
    panel: *mut T,
    token: usize,
    block_size: usize,
) {
    with_local_scratch::<T, _>(padded(key.len()), |converted| {
        let (head, padding) = converted.split_at_mut(key.len());
        convert_row(backend, key, head);
        padding.fill(T::default());
        // SAFETY: the caller's promise; scratch is aligned, and a padded width is a whole number of words.
        unsafe {
            scatter_words(
                converted.as_ptr().cast(),
                padded(key.len()) / group::<T>(),
                panel.cast(),
                (token, block_size),
            )
        };
    });
}

/// `to[i][column] = from[i]` for `n` words; rows of `to` have `pitch`. A word is what lies side by side in a panel.
///
/// # Safety
/// There are so many, and nobody else touches the column.
pub(super) unsafe fn scatter_words(
    from: *const u32,
    n: usize,
    to: *mut u32,
    (column, pitch): (usize, usize),
) {
    for i in 0..n {
        // SAFETY: the caller's promise.
        unsafe { *to.add(i * pitch + column) = *from.add(i) };
    }
}

/// One value to its row of a panel `[tokens][padded width]`. Where rows lie side by side, the `last` one puts zeros in the place of
/// its neighbour to come: kernels multiply them by a weight of 0, which what an earlier sequence left there may not survive.
///
/// # Safety
/// `panel` is such a panel; nobody else touches this token's row, or that of the next one if it is the `last`.
unsafe fn write_value<X: Float, T: Float>(
    backend: &CpuBackend,
    value: &[X],
    panel: *mut T,
    token: usize,
    last: bool,
) {
    let (width, group) = (padded(value.len()), group::<T>());
    with_local_scratch::<T, _>(value.len(), |converted| {
        convert_row(backend, value, converted);
        // SAFETY: the caller's promise.
        unsafe {
            let row = panel.add(token / group * group * width + token % group);
            for (d, &x) in converted.iter().enumerate() {
                *row.add(d * group) = x;
            }
            if last {
                for neighbour in token % group + 1..group {
                    for d in 0..value.len() {
                        *row.add(d * group + neighbour - token % group) = T::default();
                    }
                }
            }
        }
    });
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
    let mut write = |source: View<'_>, part: usize, place: Place| {
        with_float!(dtype, T => with_float!(source.dtype(), X => {
            let part = RowsMut::<T>::new(cache.parts[part].view_mut());
            write_part(backend, Rows::<X>::new(source), (&batch, block_size), &part, &place);
        }));
    };
    match shape {
        KvShape::Gqa { kv_heads, head_dim } => {
            write(k, 0, Place::Keys(kv_heads, head_dim));
            write(v, 1, Place::Values(kv_heads, head_dim));
        }
        KvShape::Mla { latent, .. } => {
            write(v, 0, Place::Columns(0));
            write(k, 0, Place::Columns(padded_latent(latent)));
        }
    }
    Ok(())
}
