//! Absorbed rows, of all sequences together, go through rounds of tasks: queries to latents (by head, so that a weight is read once
//! for many rows), attention over the cached latents, latents to outputs. Attention is a task per tile of a sequence's queries. A
//! sequence that is too large a share of the work for that has a task per tile and some groups of positions instead, and one more
//! round joins what they found; which of the two, no bit shows.

use std::ops::Range;

use super::super::attention_latent::{
    Attend, Latent, LatentContext, MAX_TILE, Mean, Parts, SCRATCH, SPARE_ROWS, Shape, part_width,
};
use super::super::elementwise::convert_row;
use super::super::kv::{block_table, find_span, padded, padded_latent};
use super::super::memory::with_local_scratch;
use super::super::mla_weights::COLUMNS;
use super::super::operand::{Form, row_stride};
use super::super::product::{Operand, Strided};
use super::super::rows::for_tasks;
use super::super::simd::Float;
use super::{Call, Pieces, absorbed_rows, expanded_rows};
use crate::backend::{DType, SeqSpan};

/// Rows that go through a head's matrix together.
const ROWS: usize = 32;
/// Latents of a head that are computed together, a multiple of [`COLUMNS`]: the sums of [`ROWS`] rows stay in the first-level cache.
const TOGETHER: usize = 4 * COLUMNS;
/// Tasks of a thread at least, where work can be divided so: one thread may be slower than another.
const TASKS_PER_THREAD: usize = 4;
/// Most f32 of parts of divided sequences; beyond, none is divided.
const MAX_PARTS: usize = 1 << 24;

impl<T, W> Call<'_, T, W>
where
    T: Latent + Operand<W>,
    W: Float,
{
    /// All rows in absorbed form.
    pub(super) fn absorbed(&self) {
        let count: usize = self.batch.spans.iter().map(absorbed_rows).sum();
        if count == 0 {
            return;
        }
        // The calling thread lends memory that the tasks of all rounds share: which rows, their queries and their mean latents.
        with_local_scratch::<i32, _>(count, |rows| {
            let spans = self.batch.spans.iter();
            let all = spans.flat_map(|s| (s.row as usize + expanded_rows(s)..).take(absorbed_rows(s)));
            rows.iter_mut().zip(all).for_each(|(to, row)| *to = row as i32);
            let (rows, queries, width) = (&*rows, count * self.heads, self.key_width());
            with_local_scratch::<T, _>((queries + SPARE_ROWS) * width, |q| {
                let by_head = |round: &(dyn Fn(usize, Range<usize>) + Sync)| {
                    let chunks = count.div_ceil(ROWS);
                    for_tasks(self.backend, self.heads * chunks, &|task| {
                        let first = task % chunks * ROWS;
                        round(task / chunks, first..count.min(first + ROWS));
                    });
                };
                let pieces = Pieces::new(&mut *q, width);
                by_head(&|head, chunk| self.queries_to_latents(head, chunk, rows, &pieces));
                let form = if T::DTYPE == DType::Bf16 { Form::Pairs } else { Form::F32 };
                let pitch = row_stride(self.latent, form);
                with_local_scratch::<T, _>(queries * pitch, |means| {
                    let means =
                        MeanLatents { pieces: Pieces::new(means, pitch), rows: count, latent: self.latent };
                    self.attend_absorbed(q, &means);
                    by_head(&|head, chunk| self.latents_to_outputs(head, chunk, rows, &means));
                });
            });
        });
    }

    /// Width of an absorbed query: a latent and a rotary part.
    fn key_width(&self) -> usize {
        self.latent + padded_latent(self.rope)
    }

    /// `q' = W_k^T q_nope` of some absorbed rows and one head, and its rotary part.
    fn queries_to_latents(&self, head: usize, chunk: Range<usize>, rows: &[i32], q: &Pieces<'_, T>) {
        let depth = padded(self.nope);
        // SAFETY: a row and head are in one task.
        let to = |a: usize| unsafe { q.get(a * self.heads + head) };
        with_local_scratch::<T, _>(chunk.len() * depth, |queries| {
            for (a, query) in chunk.clone().zip(queries.chunks_exact_mut(depth)) {
                self.read_nope(rows[a] as usize, head, query);
                self.read_rope(rows[a] as usize, head, &mut to(a)[self.latent..]);
            }
            let queries = (Strided { start: queries.as_ptr(), stride: depth }, chunk.len());
            with_local_scratch::<f32, _>(chunk.len() * TOGETHER, |sums| {
                let panels = self.key_panels.row(head).chunks(depth * TOGETHER);
                for (panels, first) in panels.zip((0..self.latent).step_by(TOGETHER)) {
                    let width = panels.len() / depth;
                    let sums = &mut sums[..chunk.len() * width];
                    // SAFETY: rows of our own.
                    unsafe { self.multiply(queries, (panels, depth), (sums, width)) };
                    for (a, sums) in chunk.clone().zip(sums.chunks_exact(width)) {
                        let to = &mut to(a)[first..self.latent.min(first + width)];
                        convert_row(self.backend, &sums[..to.len()], to);
                    }
                }
            });
        });
    }

    /// From queries to mean latents.
    fn attend_absorbed(&self, q: &[T], means: &MeanLatents<'_, T>) {
        let spans = self.batch.spans;
        let division = Division::new(spans, self.backend.pool().threads(), |span| self.shape(span));
        let part_width = part_width(self.latent);
        with_local_scratch::<f32, _>(division.parts(spans) * part_width, |parts| {
            let parts = Pieces::new(parts, part_width);
            for_tasks(self.backend, spans.iter().map(|span| division.tasks(span)).sum(), &|task| {
                let (index, task) = find_span(spans, task, |span| division.tasks(span));
                let (span, shape) = (&spans[index], self.shape(&spans[index]));
                let (groups, runs) = (division.groups(span), division.runs(span));
                let (first, run) = (task / runs * MAX_TILE, task % runs);
                let queries = first..shape.queries().min(first + MAX_TILE);
                let before = self.queries_before(index);
                let q = &q[(before + first) * shape.key_width..];
                if groups > 1 {
                    let run = run * division.run..groups.min((run + 1) * division.run);
                    let part = division.parts(&spans[..index]) + first * groups + run.start;
                    // SAFETY: a query and group are in one task.
                    let parts = unsafe { Parts::new(parts.address(part), groups * part_width, true) };
                    self.attend(span, (queries, run), q, parts);
                    return;
                }
                with_local_scratch::<f32, _>(queries.len() * part_width, |own| {
                    // SAFETY: a scratch of our own.
                    let parts = unsafe { Parts::new(own.as_mut_ptr(), part_width, false) };
                    self.attend(span, (queries.clone(), 0..usize::MAX), q, parts);
                    for (i, parts) in queries.zip(own.chunks_exact_mut(part_width)) {
                        // SAFETY: a query is in one task.
                        let out = unsafe { means.of(before + i, self.heads) };
                        self.backend.dispatch(Mean { parts, out });
                    }
                });
            });
            let divided = |span: &SeqSpan| match division.groups(span) {
                1 => 0,
                _ => self.shape(span).queries(),
            };
            for_tasks(self.backend, spans.iter().map(divided).sum(), &|task| {
                let (index, i) = find_span(spans, task, divided);
                let first = division.parts(&spans[..index]) + i * division.groups(&spans[index]);
                let groups = self.shape(&spans[index]).groups(i);
                // SAFETY: a query is in one task, and the round that wrote its parts is over.
                unsafe {
                    let out = means.of(self.queries_before(index) + i, self.heads);
                    self.backend.dispatch(Mean { parts: parts.range(first..first + groups), out });
                }
            });
        });
    }

    /// Attention of some queries of a span, `q` from the first on, over the groups of the range that they see.
    fn attend(&self, span: &SeqSpan, (queries, groups): (Range<usize>, Range<usize>), q: &[T], parts: Parts) {
        let shape = self.shape(span);
        let groups = groups.start..groups.end.min(shape.groups(queries.end - 1)).max(groups.start);
        let table = block_table(&self.batch, span);
        let context = LatentContext { cache: self.cache, table, block_size: self.block_size };
        with_local_scratch::<f32, _>(SCRATCH, |scratch| {
            self.backend.dispatch(Attend { shape, queries, groups, context: &context, q, scratch, parts });
        });
    }

    /// The shape of a span's absorbed rows.
    fn shape(&self, span: &SeqSpan) -> Shape {
        Shape {
            heads: self.heads,
            rows: absorbed_rows(span),
            position: span.position as usize + expanded_rows(span),
            scale: self.scale,
            key_width: self.key_width(),
            value_width: self.latent,
        }
    }

    /// Absorbed queries of the spans before one.
    fn queries_before(&self, span: usize) -> usize {
        self.batch.spans[..span].iter().map(absorbed_rows).sum::<usize>() * self.heads
    }

    /// `out = W_v o` of some absorbed rows and one head.
    fn latents_to_outputs(&self, head: usize, chunk: Range<usize>, rows: &[i32], means: &MeanLatents<'_, T>) {
        let width = self.v.next_multiple_of(COLUMNS);
        with_local_scratch::<f32, _>(chunk.len() * width, |sums| {
            let means = (means.rows_of(head, chunk.start), chunk.len());
            // SAFETY: these rows have been written, by the round before.
            unsafe {
                self.multiply(means, (self.value_panels.row(head), self.latent), (&mut *sums, width));
            }
            for (&row, value) in rows[chunk].iter().zip(sums.chunks_exact(width)) {
                // SAFETY: a row and head are in one task.
                unsafe { self.write(row as usize, head, value) };
            }
        });
    }
}

/// Mean latents, row after row of the first head, then of the next one, an odd number of cache lines apart: so the rows of a head are
/// multiplied where they are.
struct MeanLatents<'a, T> {
    pieces: Pieces<'a, T>,
    /// Of each head.
    rows: usize,
    latent: usize,
}

impl<T> MeanLatents<'_, T> {
    /// That of a query, numbered head by head of a row.
    ///
    /// # Safety
    /// See [`Pieces::range`].
    #[expect(clippy::mut_from_ref, reason = "threads use disjoint pieces; the caller promises it")]
    unsafe fn of(&self, query: usize, heads: usize) -> &mut [T] {
        // SAFETY: the caller's promise.
        unsafe { &mut self.pieces.get(query % heads * self.rows + query / heads)[..self.latent] }
    }

    /// Those of a head, from a row on.
    fn rows_of(&self, head: usize, row: usize) -> Strided<T> {
        Strided { start: self.pieces.address(head * self.rows + row), stride: self.pieces.len }
    }
}

/// Which sequences are divided among tasks by groups of positions.
struct Division<F> {
    shape: F,
    /// Those of at least so many groups; none has just one.
    least_groups: usize,
    /// Groups of a task: it fetches one while it works on the one before.
    run: usize,
}

impl<F: Fn(&SeqSpan) -> Shape> Division<F> {
    fn new(spans: &[SeqSpan], threads: usize, shape: F) -> Self {
        let mut division = Division { shape, least_groups: usize::MAX, run: 1 };
        if threads > 1 {
            let work: usize = spans.iter().map(|span| division.tiles(span) * division.all_groups(span)).sum();
            division.run = (work / (TASKS_PER_THREAD * threads)).max(1);
            division.least_groups = division.run + 1;
            let part_width = spans.first().map_or(0, |span| part_width((division.shape)(span).value_width));
            if division.parts(spans) * part_width > MAX_PARTS {
                division.least_groups = usize::MAX;
            }
        }
        division
    }

    /// Tiles of a span's queries.
    fn tiles(&self, span: &SeqSpan) -> usize {
        (self.shape)(span).queries().div_ceil(MAX_TILE)
    }

    /// Groups of positions that a span's last query sees; 0 without any query.
    fn all_groups(&self, span: &SeqSpan) -> usize {
        let shape = (self.shape)(span);
        shape.queries().checked_sub(1).map_or(0, |last| shape.groups(last))
    }

    /// Groups of positions that have tasks of their own: 1 where all are one.
    fn groups(&self, span: &SeqSpan) -> usize {
        let groups = self.all_groups(span);
        if groups >= self.least_groups { groups } else { 1 }
    }

    fn tasks(&self, span: &SeqSpan) -> usize {
        self.tiles(span) * self.runs(span)
    }

    /// Tasks of each tile of a span.
    fn runs(&self, span: &SeqSpan) -> usize {
        self.groups(span).div_ceil(self.run)
    }

    /// Parts that the tasks of these spans leave to be joined: one per query and group where there are several.
    fn parts(&self, spans: &[SeqSpan]) -> usize {
        let parts = |span| match self.groups(span) {
            1 => 0,
            groups => (self.shape)(span).queries() * groups,
        };
        spans.iter().map(parts).sum()
    }
}
