//! Multi-head latent attention, in the form that belongs to each row.
//!
//! `kv_b` is kept transposed, one matrix `[latent, nope + v]` per head (both parts padded to whole registers), and
//! serves every use in place: a latent times it gives key and value (expanded); its rows times a query give the
//! query against latents, and a mean latent times it gives the output (absorbed).
//!
//! Expanded rows: a task is one head of one sequence; it expands the context once into its own scratch, then attends
//! like GQA. Absorbed rows, of all sequences together, go through three rounds of tasks: queries to latents (by head,
//! so that a weight is read once for many rows), attention over the cached latents (by sequence, some heads at a
//! time), latents to outputs.

use std::marker::PhantomData;
use std::ops::Range;

use half::bf16;

use super::CpuBackend;
use super::attention::{Attend, Block, Context, MAX_TILE_ROWS, Shape, TileScratch, tile_rows};
use super::elementwise::{FloatRows, FloatRowsMut, convert_row};
use super::kv::{block_table, find_span, padded};
use super::memory::{self, Rows, RowsMut, with_local_scratch};
use super::rows::with_float;
use super::simd::{Float, Kernel, Simd};
use super::tiles::{Keys, Strided, accumulate, dots};
use crate::backend::{
    AttentionBatch, DType, HostData, HostMatrix, KvShape, MlaArgs, MlaWeights, SeqSpan, ViewMut, check,
};
use crate::error::Result;

/// Rows that go through a head's matrix together.
const ROWS: usize = 32;

/// Rows of a head's matrix that stay in the first-level cache while [`ROWS`] rows use them.
const SLAB: usize = 32;

/// See [`crate::backend::Backend::pack_mla`].
pub(super) fn pack_mla(
    _: &CpuBackend,
    kv_b: &HostMatrix,
    heads: usize,
    nope_dim: usize,
    v_dim: usize,
    dtype: DType,
) -> Result<MlaWeights> {
    check::pack_mla(kv_b, heads, nope_dim, v_dim);
    let latent = kv_b.k;
    let mut packed = memory::tensor(dtype, heads.saturating_mul(latent), padded(nope_dim) + padded(v_dim))?;
    with_float!(dtype, T => {
        let mut packed = RowsMut::<T>::new(packed.view_mut());
        for head in 0..heads {
            let first = head * (nope_dim + v_dim);
            for l in 0..latent {
                let element = |j: usize| match &kv_b.data {
                    HostData::F32(data) => T::from_f32(data[(first + j) * latent + l]),
                    HostData::Bf16(data) => T::from_f32(bf16::to_f32(data[(first + j) * latent + l])),
                };
                let (k, v) = packed.row_mut(head * latent + l).split_at_mut(padded(nope_dim));
                k[..nope_dim].iter_mut().enumerate().for_each(|(j, x)| *x = element(j));
                v[..v_dim].iter_mut().enumerate().for_each(|(j, x)| *x = element(nope_dim + j));
            }
        }
    });
    Ok(MlaWeights { parts: vec![packed], heads, latent, nope_dim, v_dim })
}

/// See [`crate::backend::Backend::mla_bytes`].
pub(super) fn mla_bytes(
    _: &CpuBackend,
    heads: usize,
    nope_dim: usize,
    v_dim: usize,
    latent: usize,
    dtype: DType,
) -> usize {
    heads * latent * (padded(nope_dim) + padded(v_dim)) * dtype.bytes()
}

/// See [`crate::backend::Backend::attention_mla`].
pub(super) fn attention_mla(backend: &CpuBackend, args: MlaArgs<'_>, out: ViewMut<'_>) -> Result<()> {
    check::attention_mla(&args, &out);
    let KvShape::Mla { latent, rope_dim } = args.cache.shape else { unreachable!("checked above") };
    with_float!(args.cache.dtype, T => with_float!(args.weights.parts[0].dtype(), W => {
        let call = Call::<T, W> {
            backend,
            q: FloatRows::new(args.q),
            cache: Rows::new(args.cache.parts[0].view()),
            kv_b: Rows::new(args.weights.parts[0].view()),
            out: FloatRowsMut::new(out),
            batch: args.batch,
            block_size: args.cache.block_size,
            scale: args.scale,
            heads: args.weights.heads,
            latent,
            nope: args.weights.nope_dim,
            rope: rope_dim,
            v: args.weights.v_dim,
        };
        call.expanded();
        call.absorbed();
    }));
    Ok(())
}

/// Rows of a span in expanded form: its first ones.
fn expanded_rows(span: &SeqSpan) -> usize {
    span.prompt_len.saturating_sub(span.position).min(span.rows) as usize
}

/// Rows of a span in absorbed form: those after [`expanded_rows`].
fn absorbed_rows(span: &SeqSpan) -> usize {
    span.rows as usize - expanded_rows(span)
}

/// One call of [`attention_mla`]: activations (as the cache holds them) and weights typed, dimensions by name.
struct Call<'a, T, W> {
    backend: &'a CpuBackend,
    /// `[rows, heads * (nope + rope)]`
    q: FloatRows<'a>,
    /// See [`super::kv`].
    cache: Rows<'a, T>,
    /// `[heads * latent, padded nope + padded v]`
    kv_b: Rows<'a, W>,
    /// `[rows, heads * v]`
    out: FloatRowsMut<'a>,
    batch: AttentionBatch<'a>,
    block_size: usize,
    scale: f32,
    heads: usize,
    latent: usize,
    nope: usize,
    rope: usize,
    v: usize,
}

impl<T: Float, W: Float> Call<'_, T, W> {
    /// The part of a query without rotary, padded.
    fn read_nope(&self, row: usize, head: usize, to: &mut [f32]) {
        let start = head * (self.nope + self.rope);
        self.q.read(self.backend, row, start..start + self.nope, to);
    }

    /// The rotary part of a query, padded.
    fn read_rope(&self, row: usize, head: usize, to: &mut [f32]) {
        let end = (head + 1) * (self.nope + self.rope);
        self.q.read(self.backend, row, end - self.rope..end, to);
    }

    /// Stores the output of one row and head.
    ///
    /// # Safety
    /// No other thread does.
    unsafe fn write(&self, row: usize, head: usize, value: &[f32]) {
        // SAFETY: the caller's promise.
        unsafe { self.out.write(self.backend, row, head * self.v..(head + 1) * self.v, value) };
    }

    /// The matrix of a head from a column on.
    fn matrix(&self, head: usize, column: usize) -> Strided<W> {
        Strided::from(&self.kv_b, head * self.latent, column)
    }

    /// All rows in expanded form.
    fn expanded(&self) {
        let tasks = |span: &SeqSpan| if expanded_rows(span) > 0 { self.heads } else { 0 };
        self.backend.pool().run(self.batch.spans.iter().map(tasks).sum(), &|task| {
            let (span, head) = find_span(self.batch.spans, task, tasks);
            let span = &self.batch.spans[span];
            let context = span.position as usize + expanded_rows(span);
            with_local_scratch::<T, _>(context * self.kv_b.cols(), |expanded| {
                self.expand(span, head, expanded);
                self.attend_expanded(span, head, expanded);
            });
        });
    }

    /// Keys and values of one head, `[context, padded nope + padded v]`.
    fn expand(&self, span: &SeqSpan, head: usize, expanded: &mut [T]) {
        let (width, latent) = (self.kv_b.cols(), self.latent);
        let table = block_table(&self.batch, span);
        with_local_scratch::<f32, _>(ROWS * (latent + width), |scratch| {
            let (latents, products) = scratch.split_at_mut(ROWS * latent);
            for (chunk, expanded) in expanded.chunks_mut(ROWS * width).enumerate() {
                let rows = expanded.len() / width;
                for (r, to) in latents.chunks_exact_mut(latent).take(rows).enumerate() {
                    let p = chunk * ROWS + r;
                    let slot = table[p / self.block_size] as usize * self.block_size + p % self.block_size;
                    convert_row(self.backend, &self.cache.row(slot)[..latent], to);
                }
                let (latents, products) = (&latents[..rows * latent], &mut products[..rows * width]);
                self.multiply(latents, self.matrix(head, 0), products);
                convert_row(self.backend, products, expanded);
            }
        });
    }

    /// Attention of the expanded rows of one span over one head's keys and values.
    fn attend_expanded(&self, span: &SeqSpan, head: usize, expanded: &[T]) {
        let (nope, rope) = (padded(self.nope), padded(self.rope));
        let shape = Shape {
            group: 1,
            rows: expanded_rows(span),
            position: span.position as usize,
            window: usize::MAX,
            scale: self.scale,
            sinks: None,
            block_size: self.block_size,
            key_width: nope + rope,
            value_width: padded(self.v),
        };
        let context = ExpandedContext {
            expanded,
            cache: self.cache,
            table: block_table(&self.batch, span),
            block_size: self.block_size,
            widths: [nope, rope, padded(self.v)],
        };
        for first in (0..shape.queries()).step_by(MAX_TILE_ROWS) {
            let queries = first..shape.queries().min(first + MAX_TILE_ROWS);
            with_local_scratch::<f32, _>(shape.scratch(&queries), |scratch| {
                let scratch = TileScratch::new(&shape, &queries, scratch);
                for (r, to) in queries.clone().zip(scratch.q.chunks_exact_mut(shape.key_width)) {
                    self.read_nope(span.row as usize + r, head, &mut to[..nope]);
                    self.read_rope(span.row as usize + r, head, &mut to[nope..]);
                }
                let attend = Attend { shape, queries: queries.clone(), context: &context, scratch };
                let result = self.backend.dispatch(attend);
                for (r, value) in queries.clone().zip(result.chunks_exact(shape.value_width)) {
                    // SAFETY: a span's head is one task, and spans share no rows.
                    unsafe { self.write(span.row as usize + r, head, value) };
                }
            });
        }
    }

    /// All rows in absorbed form.
    fn absorbed(&self) {
        let count: usize = self.batch.spans.iter().map(absorbed_rows).sum();
        if count == 0 {
            return;
        }
        // The calling thread lends memory that the tasks of all rounds share: which rows, and their latents.
        with_local_scratch::<i32, _>(count, |rows| {
            let spans = self.batch.spans.iter();
            let all = spans.flat_map(|s| (s.row as usize + expanded_rows(s)..).take(absorbed_rows(s)));
            rows.iter_mut().zip(all).for_each(|(to, row)| *to = row as i32);
            let rows = &*rows;
            with_local_scratch::<T, _>(count * self.heads * self.latent, |latents| {
                let latents = Latents::new(latents, self.latent);
                let chunks = count.div_ceil(ROWS);
                let by_head = |task: usize| {
                    let first = task % chunks * ROWS;
                    (task / chunks, first..count.min(first + ROWS))
                };
                self.backend.pool().run(self.heads * chunks, &|task| {
                    let (head, chunk) = by_head(task);
                    self.queries_to_latents(head, chunk, rows, &latents);
                });
                self.attend_absorbed(rows, &latents);
                self.backend.pool().run(self.heads * chunks, &|task| {
                    let (head, chunk) = by_head(task);
                    self.latents_to_outputs(head, chunk, rows, &latents);
                });
            });
        });
    }

    /// `q' = W_k^T q_nope` of some absorbed rows and one head.
    fn queries_to_latents(&self, head: usize, chunk: Range<usize>, rows: &[i32], latents: &Latents<'_, T>) {
        let width = padded(self.nope);
        with_local_scratch::<f32, _>(chunk.len() * (width + self.latent), |scratch| {
            let (queries, products) = scratch.split_at_mut(chunk.len() * width);
            for (to, &row) in queries.chunks_exact_mut(width).zip(&rows[chunk.clone()]) {
                self.read_nope(row as usize, head, to);
            }
            let matrix = Keys::single(self.matrix(head, 0), width);
            self.backend.dispatch(ByRows { x: queries, width, matrix, out: products });
            for (a, product) in chunk.clone().zip(products.chunks_exact(self.latent)) {
                // SAFETY: a row and head are in one task.
                convert_row(self.backend, product, unsafe { latents.get(a * self.heads + head) });
            }
        });
    }

    /// From q' to the mean latent, in place.
    fn attend_absorbed(&self, rows: &[i32], latents: &Latents<'_, T>) {
        let threads = self.backend.pool().threads();
        let tile = tile_rows(threads, rows.len() * self.heads);
        let tasks = |span: &SeqSpan| (absorbed_rows(span) * self.heads).div_ceil(tile);
        let (latent, rope) = (padded(self.latent), padded(self.rope));
        self.backend.pool().run(self.batch.spans.iter().map(tasks).sum(), &|task| {
            let (span, task) = find_span(self.batch.spans, task, tasks);
            let before: usize = self.batch.spans[..span].iter().map(absorbed_rows).sum();
            let span = &self.batch.spans[span];
            let shape = Shape {
                group: self.heads,
                rows: absorbed_rows(span),
                position: span.position as usize + expanded_rows(span),
                window: usize::MAX,
                scale: self.scale,
                sinks: None,
                block_size: self.block_size,
                key_width: latent + rope,
                value_width: latent,
            };
            let table = block_table(&self.batch, span);
            let context = LatentContext { cache: self.cache, table, block_size: self.block_size };
            let queries = task * tile..shape.queries().min((task + 1) * tile);
            with_local_scratch::<f32, _>(shape.scratch(&queries), |scratch| {
                let scratch = TileScratch::new(&shape, &queries, scratch);
                for (i, to) in queries.clone().zip(scratch.q.chunks_exact_mut(shape.key_width)) {
                    let i = before * self.heads + i;
                    // SAFETY: a row and head are in one task.
                    convert_row(self.backend, unsafe { latents.get(i) }, &mut to[..self.latent]);
                    to[self.latent..latent].fill(0.0);
                    self.read_rope(rows[i / self.heads] as usize, i % self.heads, &mut to[latent..]);
                }
                let attend = Attend { shape, queries: queries.clone(), context: &context, scratch };
                let result = self.backend.dispatch(attend);
                for (i, mean) in queries.clone().zip(result.chunks_exact(shape.value_width)) {
                    // SAFETY: as above.
                    let to = unsafe { latents.get(before * self.heads + i) };
                    convert_row(self.backend, &mean[..self.latent], to);
                }
            });
        });
    }

    /// `out = W_v o` of some absorbed rows and one head.
    fn latents_to_outputs(&self, head: usize, chunk: Range<usize>, rows: &[i32], latents: &Latents<'_, T>) {
        let width = padded(self.v);
        with_local_scratch::<f32, _>(chunk.len() * (self.latent + width), |scratch| {
            let (means, products) = scratch.split_at_mut(chunk.len() * self.latent);
            for (a, to) in chunk.clone().zip(means.chunks_exact_mut(self.latent)) {
                // SAFETY: a row and head are in one task.
                convert_row(self.backend, unsafe { latents.get(a * self.heads + head) }, to);
            }
            self.multiply(means, self.matrix(head, padded(self.nope)), products);
            for (&row, value) in rows[chunk.clone()].iter().zip(products.chunks_exact(width)) {
                // SAFETY: as above.
                unsafe { self.write(row as usize, head, value) };
            }
        });
    }

    /// `out = x . matrix`, `[rows, latent]` times `[latent, width]`.
    fn multiply(&self, x: &[f32], matrix: Strided<W>, out: &mut [f32]) {
        self.backend.dispatch(ByColumns { x, latent: self.latent, matrix, out });
    }
}

/// `out[r] = sum_l x[r][l] * matrix[l]`: `x` is `[rows, latent]`, `out` `[rows, padded width]`.
struct ByColumns<'a, W> {
    x: &'a [f32],
    latent: usize,
    matrix: Strided<W>,
    out: &'a mut [f32],
}

impl<W: Float> Kernel for ByColumns<'_, W> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let rows = self.x.len() / self.latent;
        let width = self.out.len() / rows;
        self.out.fill(0.0);
        for l in (0..self.latent).step_by(SLAB) {
            let n = SLAB.min(self.latent - l);
            // SAFETY: a head's matrix has `latent` rows, and its columns from the given one on `width` at least.
            unsafe {
                let x = Strided { start: self.x.as_ptr().add(l), stride: self.latent };
                accumulate(simd, (x, rows), (self.matrix.skip(l), n), (self.out.as_mut_ptr(), width));
            }
        }
    }
}

/// `out[r][l] = x[r] . matrix[l]`: `x` is `[rows, width]`, `out` `[rows, latent]`.
struct ByRows<'a, W> {
    x: &'a [f32],
    width: usize,
    matrix: Keys<W>,
    out: &'a mut [f32],
}

impl<W: Float> Kernel for ByRows<'_, W> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let rows = self.x.len() / self.width;
        let latent = self.out.len() / rows;
        for l in (0..latent).step_by(SLAB) {
            let n = SLAB.min(latent - l);
            // SAFETY: a head's matrix has `latent` rows of `width` columns at least.
            unsafe {
                let x = Strided { start: self.x.as_ptr(), stride: self.width };
                let out = self.out.as_mut_ptr().add(l);
                dots(simd, (x, rows), (self.matrix.skip(l), n), 1.0, (out, latent));
            }
        }
    }
}

/// One vector for every absorbed row and head, in memory that tasks share.
struct Latents<'a, T> {
    start: *mut T,
    count: usize,
    latent: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: as good as a `&mut [T]`; shared use hands out vectors through an unsafe function only.
unsafe impl<T: Send> Sync for Latents<'_, T> {}

impl<'a, T> Latents<'a, T> {
    fn new(data: &'a mut [T], latent: usize) -> Self {
        Latents { start: data.as_mut_ptr(), count: data.len() / latent, latent, borrow: PhantomData }
    }

    /// Vector `i`.
    ///
    /// # Safety
    /// Nobody else uses this vector while the slice lives.
    #[expect(clippy::mut_from_ref, reason = "threads use disjoint vectors; the caller promises it")]
    unsafe fn get(&self, i: usize) -> &mut [T] {
        assert!(i < self.count, "vector {i} of {}", self.count);
        // SAFETY: inside the borrowed memory; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(i * self.latent), self.latent) }
    }
}

/// One head's expanded keys and values, with the rotary keys in the cache.
struct ExpandedContext<'a, T> {
    /// `[context, padded nope + padded v]`
    expanded: &'a [T],
    cache: Rows<'a, T>,
    table: &'a [u32],
    block_size: usize,
    /// Padded widths of nope, rope and v.
    widths: [usize; 3],
}

// SAFETY: `expanded` covers all positions that an expanded row sees; the table's blocks were checked.
unsafe impl<T: Float> Context for ExpandedContext<'_, T> {
    type Element = T;
    #[inline(always)]
    fn block(&self, index: usize) -> Block<T> {
        let [nope, rope, v] = self.widths;
        let own = &self.expanded[index * self.block_size * (nope + v)..];
        let token = self.table[index] as usize * self.block_size;
        let keys = Strided { start: own.as_ptr(), stride: nope + v };
        let ropes = Strided::from(&self.cache, token, self.cache.cols() - rope);
        let values = Strided { start: own[nope..].as_ptr(), stride: nope + v };
        Block { keys: Keys { parts: [keys, ropes], widths: [nope, rope] }, values }
    }
}

/// The cached latents as keys (rotary part included) and values of all heads.
struct LatentContext<'a, T> {
    cache: Rows<'a, T>,
    table: &'a [u32],
    block_size: usize,
}

// SAFETY: the table's blocks were checked.
unsafe impl<T: Float> Context for LatentContext<'_, T> {
    type Element = T;
    #[inline(always)]
    fn block(&self, index: usize) -> Block<T> {
        let rows = Strided::from(&self.cache, self.table[index] as usize * self.block_size, 0);
        Block { keys: Keys::single(rows, self.cache.cols()), values: rows }
    }
}
