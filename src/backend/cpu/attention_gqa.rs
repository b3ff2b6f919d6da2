//! Grouped-query attention: a task is some query rows and heads of one sequence that share a KV head.

use super::CpuBackend;
use super::attention::{Attend, Block, Context, Shape, TileScratch, tile_rows};
use super::elementwise::convert_row;
use super::kv::{block_table, find_span, padded};
use super::memory::{Rows, RowsMut, with_local_scratch};
use super::rows::with_float;
use super::simd::Float;
use super::tiles::{Keys, Strided};
use crate::backend::{GqaArgs, SeqSpan, ViewMut, check};
use crate::error::Result;

/// One KV head of one sequence in the cache.
struct HeadContext<'a, T> {
    keys: Rows<'a, T>,
    values: Rows<'a, T>,
    table: &'a [u32],
    block_size: usize,
    kv_heads: usize,
    head: usize,
}

// SAFETY: `check` saw that the table's blocks are in the pool; each holds `block_size` rows per head.
unsafe impl<T: Float> Context for HeadContext<'_, T> {
    type Element = T;
    #[inline(always)]
    fn block(&self, index: usize) -> Block<T> {
        let row = (self.table[index] as usize * self.kv_heads + self.head) * self.block_size;
        let keys = Keys::single(Strided::from(&self.keys, row, 0), self.keys.cols());
        Block { keys, values: Strided::from(&self.values, row, 0) }
    }
}

/// See [`crate::backend::Backend::attention_gqa`].
pub(super) fn attention_gqa(backend: &CpuBackend, args: GqaArgs<'_>, out: ViewMut<'_>) -> Result<()> {
    let (kv_heads, head_dim) = check::attention_gqa(&args, &out);
    with_float!(args.cache.dtype, T => with_float!(args.q.dtype(), Q => with_float!(out.dtype(), O => {
        attend_all::<T, Q, O>(backend, &args, (kv_heads, head_dim), RowsMut::new(out));
    })));
    Ok(())
}

fn attend_all<T: Float, Q: Float, O: Float>(
    backend: &CpuBackend,
    args: &GqaArgs<'_>,
    (kv_heads, head_dim): (usize, usize),
    out: RowsMut<'_, O>,
) {
    let group = args.heads / kv_heads;
    let tile = tile_rows(backend.pool().threads(), args.batch.rows() * args.heads);
    let tiles = |span: &SeqSpan| (span.rows as usize * group).div_ceil(tile);
    let tasks = args.batch.spans.iter().map(|span| kv_heads * tiles(span)).sum();
    let q = Rows::<Q>::new(args.q);
    let sinks = args.sinks.map(|sinks| Rows::<f32>::new(sinks).row(0));
    let [keys, values] = &args.cache.parts[..] else { panic!("a GQA cache has two parts") };
    let (keys, values) = (Rows::<T>::new(keys.view()), Rows::<T>::new(values.view()));

    backend.pool().run(tasks, &|task| {
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
            key_width: padded(head_dim),
            value_width: padded(head_dim),
        };
        let table = block_table(&args.batch, span);
        let context = HeadContext { keys, values, table, block_size: shape.block_size, kv_heads, head };
        let queries = first..shape.queries().min(first + tile);
        // Row of the batch, and columns, of a query.
        let place = |i: usize| {
            let start = (head * group + i % group) * head_dim;
            (span.row as usize + i / group, start..start + head_dim)
        };
        with_local_scratch::<f32, _>(shape.scratch(&queries), |scratch| {
            let scratch = TileScratch::new(&shape, &queries, scratch);
            for (i, to) in queries.clone().zip(scratch.q.chunks_exact_mut(shape.key_width)) {
                let (row, columns) = place(i);
                convert_row(backend, &q.row(row)[columns], &mut to[..head_dim]);
                to[head_dim..].fill(0.0);
            }
            let result =
                backend.dispatch(Attend { shape, queries: queries.clone(), context: &context, scratch });
            for (i, from) in queries.clone().zip(result.chunks_exact(shape.value_width)) {
                let (row, columns) = place(i);
                // SAFETY: each query is in one tile.
                convert_row(backend, &from[..head_dim], unsafe { out.part(row, columns) });
            }
        });
    });
}
