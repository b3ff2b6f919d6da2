//! A MoE layer in a step whose rows every rank gives to every other one, so that no host has to see what the routers chose: all ranks
//! gather the padded rows of a step and the experts they chose, each device finds its part by itself ([`WorldPlan`]), and equally many
//! results go back to every rank. The shared expert is computed while the rows travel.

use router_sim::placement::{LayerPlacement, Placement};
use router_sim::split::Split;

use super::dispatch::Dispatch;
use super::layer::{MoeLayer, MoeRows, MoeScratch};
use crate::backend::{
    Backend, DType, PaddedShape, Replicas, ReturnedArgs, View, ViewMut, WorldArgs, WorldPlan,
};
use crate::error::Result;
use crate::layers::{Rank, RowBuffer};
use crate::metrics::{CommOp, Work};

/// What the ranks agreed on for a step, and what their devices find out in it.
pub(super) struct Padded {
    layers: usize,
    top_k: usize,
    split: Split,
    /// Rows that each rank offers, if the step is padded.
    rows: Option<usize>,
    /// Rows of each rank, or [`Padded::UNLIKE`].
    counts: Vec<u32>,
    /// As many rows to each rank as to the others.
    equal: Vec<usize>,
    /// Experts that the rows of all ranks chose.
    ids: RowBuffer,
    /// What the device finds, of each layer [`Padded::width`] numbers: the index of its results, and the offsets of its slots.
    found: RowBuffer,
    host_found: Vec<i32>,
    /// Numbers of a layer in `found`.
    width: usize,
}

impl Padded {
    /// In place of a number of rows: some of them are no single next ones of their sequences.
    const UNLIKE: u32 = u32::MAX;

    pub fn new(backend: &dyn Backend, layers: usize, top_k: usize, split: Split) -> Result<Padded> {
        Ok(Padded {
            layers,
            top_k,
            split,
            rows: None,
            counts: Vec::new(),
            equal: Vec::new(),
            ids: RowBuffer::new(backend, DType::I32, 1, top_k)?,
            found: RowBuffer::new(backend, DType::I32, 1, 1)?,
            host_found: Vec::new(),
            width: 0,
        })
    }

    /// Rows that each rank offers in every layer, if the step is padded.
    pub fn rows(&self) -> Option<usize> {
        self.rows
    }

    /// Agrees with all ranks on whether a step is padded, and to what: where all of them decode few rows, and each device finds its part
    /// by itself. Collective over worlds of such devices.
    pub fn agree(&mut self, rank: &mut Rank, rows: usize, decodes: bool) -> Result<()> {
        self.rows = None;
        let world = rank.world.size();
        if world == 1 || self.layers == 0 || rank.backend.world_plan().is_none() {
            return Ok(());
        }
        let own = if decodes { rows as u32 } else { Padded::UNLIKE };
        self.counts.resize(world, 0);
        rank.world.all_gather_counts(&[own], &mut self.counts)?;
        let most = self.counts.iter().copied().max().filter(|&most| most != Padded::UNLIKE);
        self.rows = most.and_then(|most| PaddedShape::rows_for(most as usize, world, self.top_k));
        Ok(())
    }

    /// Whether a layer of this step is padded. Where its experts have replicas, the devices share rows out evenly; any other split
    /// takes a host with the counts of all ranks.
    pub fn serves(&self, layer: LayerPlacement<'_>) -> bool {
        self.rows.is_some() && (self.split == Split::Even || !layer.is_replicated())
    }

    /// Makes room for a layer of this shape; what was found for other layers of the step stays.
    fn reserve(&mut self, backend: &dyn Backend, shape: PaddedShape) -> Result<()> {
        self.ids.reserve(backend, shape.world * shape.rows)?;
        self.equal.clear();
        self.equal.resize(shape.world, shape.returned());
        let own = self.counts[shape.rank] as usize;
        self.width = own * shape.top_k * shape.expert_tp + shape.slots_per_rank + 1;
        // Room for any number of own rows, so that none is taken when there are more.
        let most = shape.rows * shape.top_k * shape.expert_tp + shape.slots_per_rank + 1;
        self.found.reserve(backend, self.layers * most)
    }

    /// Copies what the device found for all layers to the host.
    pub fn fetch(&mut self, backend: &dyn Backend) -> Result<()> {
        if self.rows.is_none() {
            return Ok(());
        }
        let numbers = self.layers * self.width;
        self.host_found.clear();
        self.host_found.resize(numbers, 0);
        backend.download(self.found.head(numbers), bytemuck::cast_slice_mut(&mut self.host_found))
    }

    /// Writes what was fetched of a layer into `offsets` and `destinations`.
    pub fn tell(&self, shape: PaddedShape, layer: usize, dispatch: &mut Dispatch) {
        let found = &self.host_found[layer * self.width..][..self.width];
        let (index, offsets) = found.split_at(self.width - shape.slots_per_rank - 1);
        dispatch.offsets.clear();
        dispatch.offsets.extend(offsets.iter().map(|&offset| offset as usize));
        dispatch.destinations.clear();
        let firsts = index.iter().step_by(shape.expert_tp);
        dispatch.destinations.extend(firsts.map(|&row| shape.computed_by(row as usize) as u32));
    }
}

impl MoeLayer {
    /// The shape of this layer's exchange.
    pub(super) fn padded_shape(&self, rank: &Rank, padded: &Padded) -> PaddedShape {
        PaddedShape {
            world: rank.world.size(),
            rank: rank.world.rank(),
            expert_tp: rank.expert_tp,
            rows: padded.rows.expect("a padded step"),
            top_k: padded.top_k,
            slots_per_rank: self.slots.len(),
        }
    }

    /// The layer's output for the owned rows. Collective over the world.
    pub(super) fn forward_padded(
        &self,
        planner: &dyn WorldPlan,
        rank: &mut Rank,
        rows: MoeRows<'_>,
        placement: &Placement,
        scratch: &mut MoeScratch,
        mut out: ViewMut<'_>,
    ) -> Result<()> {
        let backend = rank.backend.clone();
        let backend = backend.as_ref();
        let shape = self.padded_shape(rank, &scratch.padded);
        self.make_room(backend, shape, scratch)?;
        rank.lap(Work::Router);

        let MoeScratch { routed, send, arrived, grouped, computed, returned, shared, padded, .. } = scratch;
        let (gathered, capacity) = (shape.world * shape.rows, shape.capacity());
        rank.world.all_gather_equal(
            &mut [
                (rows.padded, arrived.head_mut(gathered)),
                (routed.padded_ids(self.index, shape.rows), padded.ids.head_mut(gathered)),
            ],
            &mut || self.compute_shared(backend, rows, shared),
        )?;
        rank.lap(Work::Dispatch);

        let (starts, slots) = placement.layer(self.index).by_expert();
        let Padded { counts, equal, ids, found, width, .. } = padded;
        let end = (self.index + 1) * *width;
        let index = end - *width..end - shape.slots_per_rank - 1;
        let (index_found, offsets) = found.head_mut(end).rows_range(index.start..end).split_rows(index.len());
        planner.world_experts(WorldArgs {
            shape,
            counts,
            x: arrived.head(gathered),
            ids: ids.head(gathered),
            replicas: Replicas { starts, slots },
            slots: &self.slots,
            activation: self.activation,
            grouped: grouped.head_mut(capacity),
            computed: computed.head_mut(capacity),
            returned: send.head_mut(capacity),
            offsets,
            index: index_found,
        })?;
        rank.lap(Work::Expert);
        rank.world.all_to_all_rows(send.head(capacity), equal, returned.head_mut(capacity), equal)?;
        count_traffic(rank, shape, rows.padded);
        if out.rows() > 0 {
            let args = ReturnedArgs {
                rows: returned.head(capacity),
                index: found.head(index.end).rows_range(index),
                weights: routed.weights(self.index),
                parts: shape.expert_tp,
            };
            planner.combine_returned(args, out.reborrow())?;
        }
        self.add_shared(backend, shared, out)?;
        rank.lap(Work::Combine);
        Ok(())
    }

    /// What a layer of this shape needs.
    fn make_room(&self, backend: &dyn Backend, shape: PaddedShape, scratch: &mut MoeScratch) -> Result<()> {
        let MoeScratch { send, arrived, grouped, computed, returned, padded, .. } = scratch;
        for buffer in [send, grouped, computed, returned] {
            buffer.reserve(backend, shape.capacity())?;
        }
        arrived.reserve(backend, shape.world * shape.rows)?;
        padded.reserve(backend, shape)
    }
}

/// Counts what a rank gave to and got from the others, padding included.
fn count_traffic(rank: &mut Rank, shape: PaddedShape, x: View<'_>) {
    let row = x.cols() * x.dtype().bytes();
    let others = shape.world - 1;
    let gathered = others * shape.rows * (row + shape.top_k * DType::I32.bytes());
    rank.clock.meter().exchange(CommOp::Dispatch, gathered, gathered);
    let returned = others * shape.returned() * row;
    rank.clock.meter().exchange(CommOp::Combine, returned, returned);
}

#[cfg(test)]
mod tests;
