//! The paged KV cache: where each token's keys and values lie, and how they get there.
//!
//! Widths are padded with zeros to whole registers, so that kernels need no tails. A row of a part's tensor is:
//! * GQA: what one head keeps of a block, as panels for [`super::product`]: `[(block, KV head), ...]`, in part 0 the keys
//!   `[head_dim][tokens]`, in part 1 the values `[tokens][head_dim]`; of bf16, two consecutive k of a column lie side by side;
//! * MLA: what a token keeps: part 0 only, `[(block, token), latent + rope_dim]`, both padded to two registers: the latent is the
//!   value and, with the rotary key behind it, the key.

use std::ops::Range;

use super::CpuBackend;
use super::elementwise::FloatRows;
use super::memory::{self, RowsMut, with_local_scratch};
use super::rows::{for_rows, with_float};
use super::simd::{Float, Kernel, LINE, MAX_LANES, Simd};
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

/// Storing an element of a single key, whose words are in a cache line each, takes as long as streaming so many.
const SCATTER: usize = 8;

/// Where a row of a batch goes.
struct Place {
    /// The row.
    row: usize,
    /// Block of the cache.
    block: usize,
    /// Place in the block.
    token: usize,
    /// The token that follows is none of this call.
    last: bool,
}

/// The places of some rows of a batch.
fn places<'a>(
    batch: &'a AttentionBatch<'_>,
    block_size: usize,
    rows: Range<usize>,
) -> impl Iterator<Item = Place> + 'a {
    let (first, skipped) = find_span(batch.spans, rows.start, |span| span.rows as usize);
    let place = move |span: &SeqSpan, r: usize| {
        let position = span.position as usize + r;
        Place {
            row: span.row as usize + r,
            block: block_table(batch, span)[position / block_size] as usize,
            token: position % block_size,
            last: r + 1 == span.rows as usize,
        }
    };
    let spans = batch.spans[first..].iter().enumerate();
    let all = spans.flat_map(move |(i, span)| {
        let first = if i == 0 { skipped } else { 0 };
        (first..span.rows as usize).map(move |r| place(span, r))
    });
    all.take(rows.len())
}

/// Asks for so many cache lines, `pitch` bytes apart.
struct Fetch {
    from: *const u8,
    lines: usize,
    pitch: usize,
}

impl Kernel for Fetch {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for i in 0..self.lines {
            simd.prefetch(self.from.wrapping_add(i * self.pitch));
        }
    }
}

/// Keys and values of a batch on their way to the cache of a layer.
trait Layout: Sync {
    /// Storing a row takes as long as streaming so many elements. `alone`: no row of the batch has a neighbour there.
    fn cost(&self, alone: bool) -> usize;
    /// Asks for the cache lines that [`Layout::write`] will touch.
    fn fetch(&self, backend: &CpuBackend, place: &Place);
    /// Stores one row.
    ///
    /// # Safety
    /// Nobody else touches what the cache has for this token.
    unsafe fn write(&self, backend: &CpuBackend, place: &Place);
}

/// Stores the rows of a batch.
fn write_rows(backend: &CpuBackend, batch: &AttentionBatch<'_>, block_size: usize, layout: &impl Layout) {
    // Neighbours in a prompt share cache lines, which many of them on one thread amortise.
    let alone = batch.rows() == batch.spans.len();
    for_rows(backend, batch.rows(), layout.cost(alone), &|range| {
        // Since the last step wrote there, weights went through the caches: stores would wait for one line after another.
        if alone {
            places(batch, block_size, range.clone()).for_each(|place| layout.fetch(backend, &place));
        }
        for place in places(batch, block_size, range) {
            // SAFETY: a position is written by one task, and sequences share no block that they write.
            unsafe { layout.write(backend, &place) };
        }
    });
}

/// Rows of several heads, see [`KvShape::Gqa`].
struct Heads<'a, T> {
    k: FloatRows<'a>,
    v: FloatRows<'a>,
    keys: RowsMut<'a, T>,
    values: RowsMut<'a, T>,
    kv_heads: usize,
    head_dim: usize,
    block_size: usize,
}

impl<T: Float> Layout for Heads<'_, T> {
    fn cost(&self, alone: bool) -> usize {
        self.kv_heads * self.head_dim * if alone { SCATTER + 1 } else { 2 }
    }

    fn fetch(&self, backend: &CpuBackend, &Place { block, token, .. }: &Place) {
        let words = padded(self.head_dim) / group::<T>();
        for panel in block * self.kv_heads..(block + 1) * self.kv_heads {
            let keys = self.keys.row_ptr(panel).cast::<u32>().wrapping_add(token).cast();
            backend.dispatch(Fetch { from: keys, lines: words, pitch: self.block_size * size_of::<u32>() });
            let bytes = padded(self.head_dim) * size_of::<u32>();
            let values = self.values.row_ptr(panel).cast::<u8>().wrapping_add(token / group::<T>() * bytes);
            backend.dispatch(Fetch { from: values, lines: bytes.div_ceil(LINE), pitch: LINE });
        }
    }

    unsafe fn write(&self, backend: &CpuBackend, &Place { row, block, token, last }: &Place) {
        let width = self.head_dim;
        with_local_scratch::<T, _>(padded(width), |converted| {
            for head in 0..self.kv_heads {
                let (panel, cols) = (block * self.kv_heads + head, head * width..(head + 1) * width);
                self.k.read(backend, row, cols.clone(), converted);
                // SAFETY: the caller's promise; scratch is aligned, and a padded width is a whole number of words.
                unsafe {
                    let words = padded(width) / group::<T>();
                    let panel = self.keys.row_ptr(panel).cast();
                    scatter_words(converted.as_ptr().cast(), words, panel, (token, self.block_size));
                }
                self.v.read(backend, row, cols, &mut converted[..width]);
                // SAFETY: the caller's promise.
                unsafe { write_value(&converted[..width], self.values.row_ptr(panel), token, last) };
            }
        });
    }
}

/// Latents with their rotary keys, see [`KvShape::Mla`].
struct Latents<'a, T> {
    k: FloatRows<'a>,
    v: FloatRows<'a>,
    cache: RowsMut<'a, T>,
    rope_dim: usize,
    latent: usize,
    block_size: usize,
}

impl<T: Float> Layout for Latents<'_, T> {
    fn cost(&self, _: bool) -> usize {
        // The row is fetched before it is written.
        self.cache.cols() * 2
    }

    fn fetch(&self, backend: &CpuBackend, &Place { block, token, .. }: &Place) {
        let from = self.cache.row_ptr(block * self.block_size + token).cast::<u8>();
        let lines = (self.cache.cols() * size_of::<T>()).div_ceil(LINE);
        backend.dispatch(Fetch { from, lines, pitch: LINE });
    }

    unsafe fn write(&self, backend: &CpuBackend, &Place { row, block, token, .. }: &Place) {
        let at = block * self.block_size + token;
        let rope = padded_latent(self.latent);
        // SAFETY: the caller's promise.
        unsafe {
            self.v.read(backend, row, 0..self.latent, self.cache.part(at, 0..self.latent));
            self.k.read(backend, row, 0..self.rope_dim, self.cache.part(at, rope..rope + self.rope_dim));
        }
    }
}

/// Elements of type `T` that lie side by side in a panel.
const fn group<T>() -> usize {
    size_of::<u32>() / size_of::<T>()
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
/// (A neighbour in this call would come too late for that: another task may write it first.)
///
/// # Safety
/// `panel` is such a panel; nobody else touches this token's row, or that of the next one if it is the `last`.
unsafe fn write_value<T: Float>(value: &[T], panel: *mut T, token: usize, last: bool) {
    let (width, group) = (padded(value.len()), group::<T>());
    // SAFETY: the caller's promise.
    unsafe {
        let row = panel.add(token / group * group * width + token % group);
        for (d, &x) in value.iter().enumerate() {
            *row.add(d * group) = x;
        }
        if last {
            for neighbour in 1..group - token % group {
                for d in 0..value.len() {
                    *row.add(d * group + neighbour) = T::default();
                }
            }
        }
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
    let block_size = cache.block_size;
    let (k, v) = (FloatRows::new(k), FloatRows::new(v));
    with_float!(cache.dtype, T => match (cache.shape, &mut cache.parts[..]) {
        (KvShape::Gqa { kv_heads, head_dim }, [keys, values]) => {
            let (keys, values) = (RowsMut::<T>::new(keys.view_mut()), RowsMut::new(values.view_mut()));
            write_rows(backend, &batch, block_size, &Heads { k, v, keys, values, kv_heads, head_dim, block_size });
        }
        (KvShape::Mla { latent, rope_dim }, [rows]) => {
            let cache = RowsMut::<T>::new(rows.view_mut());
            write_rows(backend, &batch, block_size, &Latents { k, v, cache, rope_dim, latent, block_size });
        }
        (shape, parts) => panic!("{} parts of a cache of {shape:?}", parts.len()),
    });
    Ok(())
}
