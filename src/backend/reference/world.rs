//! What a rank works out from the choices of all ranks, choice by choice.

use super::{ReferenceBackend, host, moe};
use crate::backend::{
    Backend, CombineArgs, PaddedShape, Replicas, ReturnedArgs, ViewMut, WorldArgs, WorldPlan, check,
};
use crate::error::Result;

/// Where the rows of a world go that this rank has to do with.
struct Grouping {
    /// Of each local slot: the gathered row, and the row among those returned, of each choice computed there, in canonical order.
    slots: Vec<Vec<(usize, usize)>>,
    /// See [`WorldArgs::index`].
    index: Vec<i32>,
}

impl Grouping {
    fn of(shape: PaddedShape, counts: &[u32], replicas: Replicas<'_>, ids: &[i32]) -> Grouping {
        let PaddedShape { rank, expert_tp, rows, top_k, slots_per_rank, .. } = shape;
        // (source rank, row, j, expert) in canonical order.
        let choices = || {
            let chosen = ids.iter().enumerate().map(|(at, &expert)| {
                let (row, j) = (at / top_k, at % top_k);
                (row / rows, row % rows, j, expert as usize)
            });
            chosen.filter(|&(source, row, ..)| row < counts[source] as usize)
        };
        let mut totals = vec![0; replicas.starts.len() - 1];
        choices().for_each(|(.., expert)| totals[expert] += 1);

        let mut slots = vec![Vec::new(); slots_per_rank];
        let mut index = Vec::new();
        let mut dealt = vec![0; totals.len()];
        for (source, row, j, expert) in choices() {
            let copies =
                &replicas.slots[replicas.starts[expert] as usize..replicas.starts[expert + 1] as usize];
            let slot = copies[replica(totals[expert], copies.len(), dealt[expert])] as usize;
            dealt[expert] += 1;
            let (computes, local) = (slot / slots_per_rank, slot % slots_per_rank);
            let back = shape.returned_row(row, j, local);
            if computes == rank / expert_tp {
                slots[local].push((source * rows + row, source * shape.returned() + back));
            }
            if source == rank {
                let from = |x| (computes * expert_tp + x) * shape.returned() + back;
                index.extend((0..expert_tp).map(|x| from(x) as i32));
            }
        }
        Grouping { slots, index }
    }
}

/// Which of `replicas` gets row number `i` of `total`.
fn replica(total: usize, replicas: usize, i: usize) -> usize {
    let (few, more) = (total / replicas, total % replicas);
    let longer = more * (few + 1);
    if i < longer { i / (few + 1) } else { more + (i - longer) / few }
}

impl WorldPlan for ReferenceBackend {
    fn world_experts(&self, args: WorldArgs<'_>) -> Result<()> {
        check::world_experts(&args);
        let WorldArgs { shape, x, mut grouped, mut computed, mut returned, offsets, index, .. } = args;
        let ids = host::read_ints::<i32>(args.ids);
        let grouping = Grouping::of(shape, args.counts, args.replicas, &ids);
        let (mut row, mut ends) = (0, vec![0]);
        for (choices, slot) in grouping.slots.iter().zip(args.slots) {
            for &(from, home) in choices {
                let w = slot.as_ref().expect("an expert that was chosen lives here");
                self.copy_rows(x.rows_range(from..from + 1), grouped.reborrow().rows_range(row..row + 1))?;
                let y = moe::mlp(grouped.as_view().rows_range(row..row + 1), w, args.activation);
                y.write(computed.reborrow().rows_range(row..row + 1));
                let result = computed.as_view().rows_range(row..row + 1);
                self.copy_rows(result, returned.reborrow().rows_range(home..home + 1))?;
                row += 1;
            }
            ends.push(row as i32);
        }
        host::write_ints(&ends, offsets);
        host::write_ints(&grouping.index, index);
        Ok(())
    }

    fn combine_returned(&self, args: ReturnedArgs<'_>, out: ViewMut<'_>) -> Result<()> {
        check::combine_returned(&args, &out);
        let ReturnedArgs { rows, weights, parts, .. } = args;
        let index: Vec<u32> = host::read_ints::<i32>(args.index).into_iter().map(|row| row as u32).collect();
        self.combine(CombineArgs { rows, index: &index, weights, parts }, out)
    }
}
