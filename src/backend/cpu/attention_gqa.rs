//! Grouped-query attention: a task is some query rows and heads of one sequence that share a KV head.

use super::CpuBackend;
use super::attention::{Attend, Block, Context, Shape, TileScratch, tile_rows};
use super::elementwise::{FloatRows, FloatRowsMut};
use super::kv::{block_table, find_span, padded};
use super::memory::{Rows, with_local_scratch};
use super::product::Operand;
use super::rows::{for_tasks, with_float};
use crate::backend::{GqaArgs, SeqSpan, ViewMut, check};
use crate::error::Result;

/// One KV head of one sequence in the cache.
struct HeadContext<'a, T> {
    keys: Rows<'a, T>,
    values: Rows<'a, T>,
    table: &'a [u32],
    kv_heads: usize,
    head: usize,
}

// SAFETY: `check` saw that the table's blocks are in the pool; each holds a row of both parts per head.
unsafe impl<T: Operand<T>> Context for HeadContext<'_, T> {
    type Element = T;
    #[inline(always)]
    fn block(&self, index: usize) -> Block<T> {
        let row = self.table[index] as usize * self.kv_heads + self.head;
        let keys = self.keys.row(row).as_ptr();
        Block { keys: [keys, keys], values: self.values.row(row).as_ptr() }
    }
}

/// See [`crate::backend::Backend::attention_gqa`].
pub(super) fn attention_gqa(backend: &CpuBackend, args: GqaArgs<'_>, out: ViewMut<'_>) -> Result<()> {
    let (kv_heads, head_dim) = check::attention_gqa(&args, &out);
    let out = FloatRowsMut::new(out);
    with_float!(args.cache.dtype, T => attend_all::<T>(backend, &args, (kv_heads, head_dim), &out));
    Ok(())
}

fn attend_all<T: Operand<T>>(
    backend: &CpuBackend,
    args: &GqaArgs<'_>,
    (kv_heads, head_dim): (usize, usize),
    out: &FloatRowsMut<'_>,
) {
    let group = args.heads / kv_heads;
    let longest = args.batch.spans.iter().map(|span| (span.position + span.rows) as usize).max().unwrap_or(0);
    let tile = tile_rows(backend.pool().threads(), args.batch.rows() * args.heads, longest);
    let tiles = |span: &SeqSpan| (span.rows as usize * group).div_ceil(tile);
    let tasks: usize = args.batch.spans.iter().map(|span| kv_heads * tiles(span)).sum();
    let q = FloatRows::new(args.q);
    let sinks = args.sinks.map(|sinks| Rows::<f32>::new(sinks).row(0));
    let [keys, values] = &args.cache.parts[..] else { panic!("a GQA cache has two parts") };
    let (keys, values) = (Rows::<T>::new(keys.view()), Rows::<T>::new(values.view()));

    let attend = |task: usize| {
        let (span, task) = find_span(args.batch.spans, task, |span| kv_heads * tiles(span));
        let span = &args.batch.spans[span];
        // Tiles of one KV head follow each other, so that threads share its keys in the cache.
        let (head, first) = (task / tiles(span), task % tiles(span) * tile);
        let shape = Shape {
            group,
            rows: span.rows as usize,
            position: span.position as usize,
            window: args.window.unwrap_or(usize::MAX),
            scale: args.scale,
            sinks: sinks.map(|s| &s[head * group..][..group]),
            block_size: args.cache.block_size,
            key_widths: [padded(head_dim), 0],
            value_width: padded(head_dim),
        };
        let table = block_table(&args.batch, span);
        let context = HeadContext { keys, values, table, kv_heads, head };
        let queries = first..shape.queries().min(first + tile);
        // Row of the batch, and columns, of a query.
        let place = |i: usize| {
            let start = (head * group + i % group) * head_dim;
            (span.row as usize + i / group, start..start + head_dim)
        };
        with_local_scratch::<f32, _>(shape.scratch(&queries), |scratch| {
            let scratch = TileScratch::<T>::new(&shape, &queries, scratch);
            for (i, to) in queries.clone().zip(scratch.q.chunks_exact_mut(shape.key_width())) {
                let (row, columns) = place(i);
                q.read(backend, row, columns, to);
            }
            let result =
                backend.dispatch(Attend { shape, queries: queries.clone(), context: &context, scratch });
            for (i, from) in queries.clone().zip(result.chunks_exact(shape.value_width)) {
                let (row, columns) = place(i);
                // SAFETY: each query is in one tile.
                unsafe { out.write(backend, row, columns, from) };
            }
        });
    };
    if args.batch.rows() == args.batch.spans.len() {
        for_tasks(backend, tasks, &attend);
    } else {
        // Backwards: later rows see more, and what is long should not start last.
        backend.pool().run(tasks, &|task| attend(tasks - 1 - task));
    }
}
