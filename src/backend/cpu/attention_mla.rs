//! Multi-head latent attention, in the form that belongs to each row.
//!
//! Expanded rows, sequence by sequence: first the context's latents and rotary keys are turned into columns, block by block,
//! for all heads; then a task is one head, which expands the context into its own scratch and attends like GQA. Absorbed rows:
//! [`absorbed`].

mod absorbed;

use std::marker::PhantomData;
use std::ops::Range;

use half::bf16;

use super::CpuBackend;
use super::attention::{self, Attend, Context};
use super::attention_latent::Latent;
use super::elementwise::{FloatRows, FloatRowsMut, convert_row};
use super::kv::{block_table, padded, padded_latent, scatter_words};
use super::memory::{Rows, with_local_scratch};
use super::mla_weights::{COLUMNS, KEY_PANELS, KEY_ROWS, VALUE_PANELS};
use super::product::{Operand, Strided, product};
use super::simd::{Float, Kernel, Simd};
use crate::backend::{AttentionBatch, DType, KvShape, MlaArgs, SeqSpan, ViewMut, check};
use crate::error::Result;

/// See [`crate::backend::Backend::attention_mla`].
pub(super) fn attention_mla(backend: &CpuBackend, args: MlaArgs<'_>, out: ViewMut<'_>) -> Result<()> {
    check::attention_mla(&args, &out);
    match (args.cache.dtype, args.weights.parts[0].dtype()) {
        (DType::F32, DType::F32) => attend_all::<f32, f32>(backend, args, out),
        (DType::F32, DType::Bf16) => attend_all::<f32, bf16>(backend, args, out),
        (DType::Bf16, DType::Bf16) => attend_all::<bf16, bf16>(backend, args, out),
        (cache, weights) => panic!("a cache of {cache:?} and weights of {weights:?}"),
    }
    Ok(())
}

fn attend_all<T, W>(backend: &CpuBackend, args: MlaArgs<'_>, out: ViewMut<'_>)
where
    T: Latent + Operand<W>,
    W: Float,
{
    let KvShape::Mla { latent, rope_dim } = args.cache.shape else { unreachable!("checked by the caller") };
    let weights = |part: usize| Rows::new(args.weights.parts[part].view());
    let call = Call::<T, W> {
        backend,
        q: FloatRows::new(args.q),
        cache: Rows::new(args.cache.parts[0].view()),
        key_rows: weights(KEY_ROWS),
        key_panels: weights(KEY_PANELS),
        value_panels: weights(VALUE_PANELS),
        out: FloatRowsMut::new(out),
        batch: args.batch,
        block_size: args.cache.block_size,
        scale: args.scale,
        heads: args.weights.heads,
        latent: padded_latent(latent),
        nope: args.weights.nope_dim,
        rope: rope_dim,
        v: args.weights.v_dim,
    };
    call.expanded();
    call.absorbed();
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
    /// See [`KEY_ROWS`].
    key_rows: Rows<'a, W>,
    /// See [`KEY_PANELS`].
    key_panels: Rows<'a, W>,
    /// See [`VALUE_PANELS`].
    value_panels: Rows<'a, W>,
    /// `[rows, heads * v]`
    out: FloatRowsMut<'a>,
    batch: AttentionBatch<'a>,
    block_size: usize,
    scale: f32,
    heads: usize,
    /// Padded.
    latent: usize,
    nope: usize,
    rope: usize,
    v: usize,
}

impl<T, W> Call<'_, T, W>
where
    T: Latent + Operand<W>,
    W: Float,
{
    /// The part of a query without rotary, padded.
    fn read_nope<X: Float>(&self, row: usize, head: usize, to: &mut [X]) {
        let start = head * (self.nope + self.rope);
        self.q.read(self.backend, row, start..start + self.nope, to);
    }

    /// The rotary part of a query, padded.
    fn read_rope<X: Float>(&self, row: usize, head: usize, to: &mut [X]) {
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

    /// All rows in expanded form.
    fn expanded(&self) {
        for span in self.batch.spans.iter().filter(|span| expanded_rows(span) > 0) {
            let context = span.position as usize + expanded_rows(span);
            let (blocks, pool) = (context.div_ceil(self.block_size), self.backend.pool());
            let columns = self.block_size * self.cache.cols();
            with_local_scratch::<T, _>(blocks * columns, |memory| {
                let columns = Pieces::new(memory, columns);
                // SAFETY: a block is one task, and the next round only reads.
                pool.run(blocks, &|b| self.to_columns(span, b, context, unsafe { columns.get(b) }));
                let expanded = self.block_size * (padded(self.nope) + padded(self.v));
                pool.run(self.heads, &|head| {
                    with_local_scratch::<T, _>(blocks * expanded, |expanded| {
                        self.expand(span, (head, context), &columns, expanded);
                        self.attend_expanded(span, head, &columns, expanded);
                    });
                });
            });
        }
    }

    /// The cache's rows of block `b` of a sequence.
    fn block_rows(&self, span: &SeqSpan, b: usize) -> Strided<T> {
        let first = block_table(&self.batch, span)[b] as usize * self.block_size;
        Strided { start: self.cache.row(first).as_ptr(), stride: self.cache.stride() }
    }

    /// The rows of block `b` that lie within the context, as columns: `[latent + rope][tokens]`.
    fn to_columns(&self, span: &SeqSpan, b: usize, context: usize, to: &mut [T]) {
        let (rows, words) = (self.block_rows(span, b), size_of_val(to) / self.block_size / size_of::<u32>());
        for token in 0..self.block_size.min(context - b * self.block_size) {
            // SAFETY: a row of this block, padded to whole words, and its column in `to`.
            unsafe {
                let row = rows.at(token, 0).cast();
                scatter_words(row, words, to.as_mut_ptr().cast(), (token, self.block_size));
            }
        }
    }

    /// Keys (but for their rotary part) and values of one head, block by block: panels `[padded nope][tokens]` and
    /// `[tokens][padded v]`.
    fn expand(
        &self,
        span: &SeqSpan,
        (head, context): (usize, usize),
        columns: &Pieces<'_, T>,
        expanded: &mut [T],
    ) {
        let (nope, v) = (padded(self.nope), padded(self.v));
        let matrix = (0..nope).map(|d| self.key_rows.row(head * nope + d));
        let converted = if T::DTYPE == W::DTYPE { 0 } else { nope * self.latent };
        with_local_scratch::<T, _>(converted, |scratch| {
            let mut key_rows =
                Strided { start: self.key_rows.row(head * nope).as_ptr().cast(), stride: self.latent };
            if converted > 0 {
                let rows = scratch.chunks_exact_mut(self.latent);
                rows.zip(matrix).for_each(|(to, row)| convert_row(self.backend, row, to));
                key_rows.start = scratch.as_ptr();
            }
            let sums = self.block_size * nope.max(v.next_multiple_of(COLUMNS));
            with_local_scratch::<f32, _>(sums, |sums| {
                for (b, to) in expanded.chunks_exact_mut(self.block_size * (nope + v)).enumerate() {
                    let (keys, values) = to.split_at_mut(self.block_size * nope);
                    self.backend.dispatch(Expand::<T, W> {
                        key_rows: (key_rows, nope),
                        // SAFETY: nobody writes them any more.
                        columns: unsafe { &columns.get(b)[..self.latent * self.block_size] },
                        latents: (
                            self.block_rows(span, b),
                            self.block_size.min(context - b * self.block_size),
                        ),
                        value_panels: self.value_panels.row(head),
                        depth: self.latent,
                        block_size: self.block_size,
                        sums,
                        keys,
                        values,
                    });
                }
            });
        });
    }

    /// Attention of the expanded rows of one span over one head's keys and values.
    fn attend_expanded(&self, span: &SeqSpan, head: usize, columns: &Pieces<'_, T>, expanded: &[T]) {
        let (nope, rope) = (padded(self.nope), padded(self.rope));
        let shape = attention::Shape {
            group: 1,
            rows: expanded_rows(span),
            position: span.position as usize,
            window: usize::MAX,
            scale: self.scale,
            sinks: None,
            block_size: self.block_size,
            key_widths: [nope, rope],
            value_width: padded(self.v),
        };
        let context = ExpandedContext { shape, expanded, columns, ropes: self.block_size * self.latent };
        let tile = attention::tile_rows(0, shape.queries(), shape.position + shape.rows);
        for first in (0..shape.queries()).step_by(tile) {
            let queries = first..shape.queries().min(first + tile);
            with_local_scratch::<f32, _>(shape.scratch(&queries), |scratch| {
                let scratch = attention::TileScratch::<T>::new(&shape, &queries, scratch);
                for (r, to) in queries.clone().zip(scratch.q.chunks_exact_mut(shape.key_width())) {
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

    /// `sums = x . matrix`, `[rows, depth]` times panels of `[depth, width]` that are met once.
    ///
    /// # Safety
    /// `x` has so many rows, which nobody writes meanwhile.
    unsafe fn multiply(
        &self,
        (x, rows): (Strided<T>, usize),
        (panels, depth): (&[W], usize),
        (sums, width): (&mut [f32], usize),
    ) {
        assert!(panels.len() == depth * width && sums.len() == rows * width, "{depth} x {width} panels");
        self.backend.dispatch(ByPanels { x, rows, panels, depth, sums, width });
    }
}

/// `sums[r] = x[r] . matrix`: `x` is `[rows, depth]`, the matrix panels of `[depth, width]`.
struct ByPanels<'a, T, W> {
    x: Strided<T>,
    rows: usize,
    panels: &'a [W],
    depth: usize,
    sums: &'a mut [f32],
    width: usize,
}

impl<T: Operand<W>, W: Float> Kernel for ByPanels<'_, T, W> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let ByPanels { x, rows, panels, depth, sums, width } = self;
        // SAFETY: the caller has compared the lengths, and was promised the rows.
        unsafe { by_panels::<S, T, W, true>(simd, (x, rows), (panels, depth), (sums, width)) }
    }
}

/// See [`ByPanels`]. `ONCE`: the matrix is not used again for long.
///
/// # Safety
/// `x` has `rows` rows of `depth`, `sums` room for as many of `width`.
#[inline(always)]
unsafe fn by_panels<S: Simd, T: Operand<W>, W: Float, const ONCE: bool>(
    simd: S,
    x: (Strided<T>, usize),
    (panels, depth): (&[W], usize),
    (sums, width): (&mut [f32], usize),
) {
    for (panel, column) in panels.chunks_exact(depth * COLUMNS).zip((0..width).step_by(COLUMNS)) {
        // SAFETY: a panel of this depth; the rest is the caller's promise.
        unsafe {
            let sums = (sums.as_mut_ptr().add(column), width);
            product::<S, T::Product<S>, ONCE>(simd, x, (panel, COLUMNS), sums);
        }
    }
}

/// Keys and values of one head and one block of tokens; see [`Call::expand`].
struct Expand<'a, T, W> {
    /// `W_k`, with so many rows.
    key_rows: (Strided<T>, usize),
    /// The block's latents as columns.
    columns: &'a [T],
    /// The block's latents as rows, those that there are.
    latents: (Strided<T>, usize),
    /// `W_v`.
    value_panels: &'a [W],
    /// Padded width of the latent.
    depth: usize,
    block_size: usize,
    sums: &'a mut [f32],
    keys: &'a mut [T],
    values: &'a mut [T],
}

impl<T, W> Kernel for Expand<'_, T, W>
where
    T: Operand<T> + Operand<W>,
    W: Float,
{
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let tokens = self.block_size;
        let sums = (self.sums.as_mut_ptr(), tokens);
        // SAFETY: matrices of the sizes that their makers state.
        unsafe {
            let columns = (self.columns, tokens);
            product::<S, <T as Operand<T>>::Product<S>, false>(simd, self.key_rows, columns, sums);
            to_panel(simd, (self.sums, tokens), self.keys, tokens);
            let v = self.values.len() / tokens;
            let width = v.next_multiple_of(COLUMNS);
            let value_panels = (self.value_panels, self.depth);
            by_panels::<S, T, W, false>(simd, self.latents, value_panels, (self.sums, width));
            self.sums[self.latents.1 * width..tokens * width].fill(0.0);
            to_panel(simd, (self.sums, width), self.values, v);
        }
    }
}

/// `to` = the rows of `from` (`stride` apart) as a panel `[rows][width]`, rounded.
///
/// # Safety
/// `to` holds whole pairs of rows; `from` as many rows.
#[inline(always)]
unsafe fn to_panel<S: Simd, T: Float>(simd: S, (from, stride): (&[f32], usize), to: &mut [T], width: usize) {
    for (pair, to) in to.chunks_exact_mut(2 * width).enumerate() {
        for d in (0..width).step_by(S::LANES) {
            // SAFETY: the caller's promise; widths are whole registers.
            unsafe {
                let from = from.as_ptr().add(2 * pair * stride + d);
                let (even, odd) = (simd.load(from), simd.load(from.add(stride)));
                if T::DTYPE == DType::Bf16 {
                    simd.store_pairs(to.as_mut_ptr().add(2 * d).cast(), even, odd);
                } else {
                    T::store(simd, to.as_mut_ptr().add(d), even);
                    T::store(simd, to.as_mut_ptr().add(width + d), odd);
                }
            }
        }
    }
}

/// Memory in equal pieces, which tasks share.
struct Pieces<'a, T> {
    start: *mut T,
    count: usize,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: as good as a `&mut [T]`; shared use hands out pieces through an unsafe function only.
unsafe impl<T: Send> Sync for Pieces<'_, T> {}

impl<'a, T> Pieces<'a, T> {
    fn new(data: &'a mut [T], len: usize) -> Self {
        Pieces { start: data.as_mut_ptr(), count: data.len() / len, len, borrow: PhantomData }
    }

    /// Piece `i`.
    ///
    /// # Safety
    /// See [`Pieces::range`].
    #[expect(clippy::mut_from_ref, reason = "threads use disjoint pieces; the caller promises it")]
    unsafe fn get(&self, i: usize) -> &mut [T] {
        // SAFETY: the caller's promise is the same.
        unsafe { self.range(i..i + 1) }
    }

    /// Some pieces.
    ///
    /// # Safety
    /// Nobody else writes these pieces while the slice lives, nor uses them if the slice is written.
    #[expect(clippy::mut_from_ref, reason = "threads use disjoint pieces; the caller promises it")]
    unsafe fn range(&self, pieces: Range<usize>) -> &mut [T] {
        assert!(pieces.end <= self.count, "pieces {pieces:?} of {}", self.count);
        // SAFETY: inside the borrowed memory; exclusive by the caller's promise.
        unsafe {
            std::slice::from_raw_parts_mut(self.start.add(pieces.start * self.len), pieces.len() * self.len)
        }
    }

    /// Where piece `i` starts, for whoever uses pieces that do not lie one after another.
    fn address(&self, i: usize) -> *mut T {
        assert!(i < self.count, "piece {i} of {}", self.count);
        self.start.wrapping_add(i * self.len)
    }
}

/// One head's expanded keys and values, with the rotary keys of all heads.
struct ExpandedContext<'a, T> {
    shape: attention::Shape<'a>,
    /// See [`Call::expand`].
    expanded: &'a [T],
    /// See [`Call::to_columns`].
    columns: &'a Pieces<'a, T>,
    /// Where in a block's columns the rotary keys start.
    ropes: usize,
}

// SAFETY: both cover all positions that an expanded row sees, in whole blocks; values past the context are zeros.
unsafe impl<T: Operand<T>> Context for ExpandedContext<'_, T> {
    type Element = T;
    #[inline(always)]
    fn block(&self, index: usize) -> attention::Block<T> {
        let (tokens, [nope, _]) = (self.shape.block_size, self.shape.key_widths);
        let len = tokens * (nope + self.shape.value_width);
        let (keys, values) = self.expanded[index * len..][..len].split_at(tokens * nope);
        // SAFETY: nobody writes columns while a context lives.
        let ropes = unsafe { &self.columns.get(index)[self.ropes..] };
        attention::Block { keys: [keys.as_ptr(), ropes.as_ptr()], values: values.as_ptr() }
    }
}
