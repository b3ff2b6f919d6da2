//! A step in which every rank gives its rows to every other one, and each works out by itself who computes what: the shape of
//! what travels depends on numbers that all hosts know, so none has to see what the routers chose.
//!
//! Every rank offers equally many rows, padded where it has fewer, and all ranks gather them with the experts they chose. Each runs
//! its own experts on all of them and returns equally many rows to every rank. Which of these are worth reading, the owner of a token
//! works out from the same choices.

use super::{Mlp, View, ViewMut};
use crate::error::Result;
use crate::spec::Activation;

/// Choices of the rows of all ranks, padding included, beyond which rows are counted by hosts and travel without padding. 2048 results
/// of 7168 numbers in bf16 are 29 MB, some 70 microseconds between GPUs at 400 GB/s: about what a GPU waits for its host in a layer.
/// And one block of a kernel counts so many choices as fast as it could be told.
pub const MOST_CHOICES: usize = 2048;

/// Who exchanges how many rows. All of it is known before a step: ranks with equal shapes but for `rank` fit together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PaddedShape {
    /// Ranks in the world.
    pub world: usize,
    /// This rank in the world.
    pub rank: usize,
    /// Ranks that share each expert: expert-parallel rank e is the world ranks `e * expert_tp..(e + 1) * expert_tp`.
    pub expert_tp: usize,
    /// Rows that each rank offers, padding included.
    pub rows: usize,
    /// Choices per row.
    pub top_k: usize,
    /// Slots of a layer on each rank.
    pub slots_per_rank: usize,
}

impl PaddedShape {
    /// Rows that [`PaddedShape::rows_for`] adds, at most.
    pub const PADDING: usize = 7;

    /// Rows to which the ranks of a world pad theirs, when the busiest has `most`; `None` where it does not pay. Few different numbers
    /// come out, since what a device knows again depends on them.
    pub fn rows_for(most: usize, world: usize, top_k: usize) -> Option<usize> {
        let rows = if most <= 8 { most.next_power_of_two() } else { most.next_multiple_of(8) };
        (most > 0 && world * rows * top_k <= MOST_CHOICES).then_some(rows)
    }

    /// Its expert-parallel rank.
    pub fn expert_rank(&self) -> usize {
        self.rank / self.expert_tp
    }

    /// Choices of the rows of all ranks, padding included.
    pub fn choices(&self) -> usize {
        self.world * self.rows * self.top_k
    }

    /// Choices of a token that one rank can have to compute: they are of different experts, and each of these has a slot of its own.
    pub fn per_token(&self) -> usize {
        self.top_k.min(self.slots_per_rank)
    }

    /// Rows that each rank returns to each.
    pub fn returned(&self) -> usize {
        self.rows * self.per_token()
    }

    /// Rows that a rank can have to compute, and that come back to it.
    pub fn capacity(&self) -> usize {
        self.world * self.returned()
    }

    /// Where, among the rows that one rank returns to another, choice `j` of that one's row `row` is, computed in this slot of the rank.
    pub fn returned_row(&self, row: usize, j: usize, slot: usize) -> usize {
        row * self.per_token() + if self.top_k <= self.slots_per_rank { j } else { slot }
    }

    /// Expert-parallel rank that computes the choice whose [`WorldArgs::index`] is this.
    pub fn computed_by(&self, index: usize) -> usize {
        index / self.returned() / self.expert_tp
    }
}

/// The slots of every expert of a layer, over all ranks: expert e lives in `slots[starts[e]..starts[e + 1]]`, ascending. Slot s is on
/// expert-parallel rank `s / slots_per_rank`.
#[derive(Debug, Clone, Copy)]
pub struct Replicas<'a> {
    /// `[experts + 1]`
    pub starts: &'a [u32],
    /// Grouped by expert.
    pub slots: &'a [u32],
}

/// What a backend offers that works out its rank's part of a layer from the choices of all ranks, in its own memory.
///
/// The rows of an expert are shared out evenly among its replicas. With T rows in canonical order (rank, row, j) and R replicas,
/// the first T mod R replicas take one row more than the others, and each a run of consecutive ones: as
/// `router_sim::split::Split::Even` does.
pub trait WorldPlan {
    /// Runs this rank's experts on what the rows of all ranks chose of them. Bits are those of [`super::Backend::experts`].
    fn world_experts(&self, args: WorldArgs<'_>) -> Result<()>;

    /// [`super::Backend::combine`] of rows that all ranks returned, by a [`WorldArgs::index`].
    fn combine_returned(&self, args: ReturnedArgs<'_>, out: ViewMut<'_>) -> Result<()>;
}

/// Arguments of [`WorldPlan::world_experts`].
pub struct WorldArgs<'a> {
    /// Who exchanges how many rows.
    pub shape: PaddedShape,
    /// Rows of each rank that are not padding.
    pub counts: &'a [u32],
    /// Activations of all ranks, in rank order: `[world * rows, hidden]`.
    pub x: View<'a>,
    /// Experts they chose, `[world * rows, top_k]` I32. Those of padding may be anything.
    pub ids: View<'a>,
    /// Where the experts of this layer live.
    pub replicas: Replicas<'a>,
    /// The slot table of this rank.
    pub slots: &'a [Option<Mlp>],
    /// What happens between the two matrices.
    pub activation: Activation,
    /// Working space `[capacity, hidden]` in the activation type: rows sorted by (slot, rank, row, j), as many as there are.
    pub grouped: ViewMut<'a>,
    /// The same, for what their experts make of them.
    pub computed: ViewMut<'a>,
    /// `[capacity, hidden]`: for each rank, in rank order, [`PaddedShape::returned`] rows. Choice j of its row `row` is at
    /// [`PaddedShape::returned_row`], if it was computed here; the other rows may be anything.
    pub returned: ViewMut<'a>,
    /// `[slots + 1, 1]` I32: rows `offsets[s]..offsets[s + 1]` of `grouped` are slot s's.
    pub offsets: ViewMut<'a>,
    /// `[own rows * top_k * expert_tp, 1]` I32: where, among the rows that come back from all ranks in rank order, row `row`, choice `j`,
    /// part `x` is; index `(row * top_k + j) * expert_tp + x`.
    pub index: ViewMut<'a>,
}

/// Arguments of [`WorldPlan::combine_returned`].
pub struct ReturnedArgs<'a> {
    /// Rows that came back from all ranks, in rank order.
    pub rows: View<'a>,
    /// See [`WorldArgs::index`].
    pub index: View<'a>,
    /// `[own rows, top_k]` f32.
    pub weights: View<'a>,
    /// Ranks that share each expert.
    pub parts: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_padded_to_few_numbers_and_not_beyond_what_pays() {
        let rows = |most| PaddedShape::rows_for(most, 4, 8);
        assert_eq!([1, 2, 3, 5, 8, 9, 33].map(rows), [1, 2, 4, 8, 8, 16, 40].map(Some));
        assert_eq!((rows(0), rows(64), rows(65)), (None, Some(64), None));
        assert_eq!(PaddedShape::rows_for(1, 8, 257), None);
    }

    /// Two choices of a row that are computed on one rank come back in different rows.
    #[test]
    fn returned_rows_do_not_meet() {
        let shape = PaddedShape { world: 4, rank: 1, expert_tp: 2, rows: 4, top_k: 3, slots_per_rank: 2 };
        assert_eq!((shape.per_token(), shape.returned(), shape.capacity(), shape.choices()), (2, 8, 32, 48));
        // Fewer slots than choices: by slot. Enough slots: by choice.
        assert_eq!([0, 1].map(|slot| shape.returned_row(3, 2, slot)), [6, 7]);
        let wide = PaddedShape { slots_per_rank: 5, ..shape };
        assert_eq!([0, 1, 2].map(|j| wide.returned_row(3, j, 4)), [9, 10, 11]);
        assert!(wide.returned_row(3, 2, 4) < wide.returned());
        assert_eq!([0, 8, 15, 16, 31].map(|index| shape.computed_by(index)), [0, 0, 0, 1, 1]);
    }
}
