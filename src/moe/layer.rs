//! One MoE layer: composes router, dispatch, experts and combine.

use router_sim::placement::Placement;
use router_sim::split::{Split, SplitPlan};

use crate::backend::{
    Backend, CombineArgs, DType, DevicePlan, ExpertsArgs, Mlp, PlannedArgs, SharedArgs, View, ViewMut,
    WorldPlan,
};
use crate::error::Result;
use crate::layers::linear::Linear;
use crate::layers::mlp::GatedMlp;
use crate::layers::{Rank, RowBuffer};
use crate::metrics::{CommOp, Work};
use crate::moe::dispatch::{Dispatch, DispatchShape};
use crate::moe::load::{LoadCounters, Phase};
use crate::moe::padded::Padded;
use crate::moe::router::{Routed, Router};
use crate::spec::{Activation, Moe};

/// Weights of one layer on one rank.
pub struct MoeLayer {
    /// Which MoE layer this is, counted from 0: its row in placements and counters.
    pub index: usize,
    /// Chooses experts.
    pub router: Router,
    /// The slot table of this rank.
    pub slots: Vec<Option<Mlp>>,
    /// What experts do between their matrices.
    pub activation: Activation,
    /// The expert that every token visits.
    pub shared: Option<Shared>,
}

/// The shared expert, whole on every rank.
pub struct Shared {
    /// Its MLP.
    pub mlp: GatedMlp,
    /// `[1, hidden]` in f32: the output is multiplied by the sigmoid of its product with the row.
    pub gate: Option<Linear>,
}

impl Shared {
    /// Multiplies its output by its gate, where it has one.
    fn apply_gate(
        &self,
        backend: &dyn Backend,
        rows: MoeRows<'_>,
        buffers: &mut SharedBuffers,
    ) -> Result<()> {
        let Some(linear) = &self.gate else { return Ok(()) };
        let SharedBuffers { output, gate } = buffers;
        let n = rows.rounded.rows();
        linear.forward(backend, rows.exact, gate.head_mut(n))?;
        backend.sigmoid_gate(gate.head(n), output.head_mut(n))
    }
}

/// Buffers of one step, shared by all layers.
pub struct MoeScratch {
    pub(super) routed: Routed,
    counts: Vec<u32>,
    world_counts: Vec<u32>,
    split: SplitPlan,
    pub(super) dispatch: Dispatch,
    pub(super) send: RowBuffer,
    pub(super) arrived: RowBuffer,
    pub(super) grouped: RowBuffer,
    pub(super) computed: RowBuffer,
    pub(super) returned: RowBuffer,
    pub(super) shared: SharedBuffers,
    pub(super) padded: Padded,
}

/// Where the shared expert works.
pub(super) struct SharedBuffers {
    output: RowBuffer,
    gate: RowBuffer,
}

impl MoeScratch {
    /// Buffers for up to `rows` owned rows in each of `layers` layers; those of received rows grow with the load they meet.
    pub fn new(
        backend: &dyn Backend,
        dtype: DType,
        layers: usize,
        rows: usize,
        hidden: usize,
        moe: &Moe,
        split: Split,
    ) -> Result<Self> {
        let wire = |rows| RowBuffer::new(backend, dtype, rows, hidden);
        Ok(MoeScratch {
            routed: Routed::new(backend, layers, rows, moe.experts, moe.top_k)?,
            counts: Vec::new(),
            world_counts: Vec::new(),
            split: SplitPlan::new(split),
            dispatch: Dispatch::default(),
            send: wire(rows * moe.top_k)?,
            arrived: wire(rows * moe.top_k)?,
            grouped: RowBuffer::operand(backend, dtype, rows * moe.top_k, hidden)?,
            computed: wire(rows * moe.top_k)?,
            returned: wire(rows * moe.top_k)?,
            shared: SharedBuffers {
                output: RowBuffer::new(backend, DType::F32, rows, hidden)?,
                gate: RowBuffer::new(backend, DType::F32, rows, 1)?,
            },
            padded: Padded::new(backend, layers, moe.top_k, split)?,
        })
    }

    /// Choices of the step.
    pub fn routed(&self) -> &Routed {
        &self.routed
    }

    /// Copies the choices of all layers to the host, and who computed them. Waits for the device.
    pub fn fetch(&mut self, backend: &dyn Backend) -> Result<()> {
        self.routed.fetch_all(backend)?;
        self.padded.fetch(backend)
    }

    /// Begins a step of `rows` owned rows, each the next one of its sequence where `decodes`. Collective over the world.
    ///
    /// # Errors
    /// [`crate::Error::Peer`] when another rank is gone.
    pub fn start(&mut self, rank: &mut Rank, rows: usize, decodes: bool) -> Result<()> {
        self.routed.start(rows);
        self.padded.agree(rank, rows, decodes)
    }

    /// Rows to which the ranks agreed to pad those of the step, if so.
    pub fn padded_rows(&self) -> Option<usize> {
        self.padded.rows()
    }
}

/// The owned rows of a step.
#[derive(Clone, Copy)]
pub struct MoeRows<'a> {
    /// Normed rows in f32, for the router.
    pub exact: View<'a>,
    /// The same rows in the activation type, for the experts.
    pub rounded: View<'a>,
    /// The same with what follows them, as many rows as the ranks agreed to pad them to.
    pub padded: View<'a>,
    /// Phase of each row, for the counters.
    pub phases: &'a [Phase],
}

impl MoeLayer {
    /// Writes the layer's output for the owned rows into `out` (f32). Collective over the world.
    pub fn forward(
        &self,
        rank: &mut Rank,
        rows: MoeRows<'_>,
        placement: &Placement,
        load: &LoadCounters,
        scratch: &mut MoeScratch,
        mut out: ViewMut<'_>,
    ) -> Result<()> {
        let backend = rank.backend.clone();
        let backend = backend.as_ref();
        self.router.forward(backend, rows.exact, self.index, &mut scratch.routed)?;
        match self.grouping(backend, rank.world.size(), placement, &scratch.padded) {
            Grouping::Alone(planner, slot_of) => {
                rank.lap(Work::Router);
                self.compute_planned(planner, slot_of, rows.rounded, scratch, out.reborrow())?;
                self.compute_shared(backend, rows, &mut scratch.shared)?;
                self.add_shared(backend, &scratch.shared, out)?;
                rank.lap(Work::Expert);
                return Ok(());
            }
            Grouping::Padded(planner) => {
                return self.forward_padded(planner, rank, rows, placement, scratch, out);
            }
            Grouping::Hosts => {}
        }
        scratch.routed.fetch(backend, self.index..self.index + 1)?;
        rank.lap(Work::Router);
        // What works behind its host has something to do while the hosts agree.
        let behind = backend.world_plan().is_some();
        if behind {
            self.compute_shared(backend, rows, &mut scratch.shared)?;
            rank.lap(Work::Expert);
        }
        self.plan(rank, placement, scratch)?;
        self.count(rows.phases, load, scratch);
        load.set_computed(self.index, &scratch.dispatch.offsets);
        self.exchange(rank, rows, !behind, scratch)?;
        if rows.rounded.rows() == 0 {
            rank.lap(Work::Combine);
            return Ok(());
        }
        backend.combine(
            CombineArgs {
                rows: scratch.returned.head(scratch.dispatch.send_tokens.len()),
                index: &scratch.dispatch.combine,
                weights: scratch.routed.weights(self.index),
                parts: rank.expert_tp,
            },
            out.reborrow(),
        )?;
        rank.lap(Work::Combine);
        self.add_shared(backend, &scratch.shared, out)?;
        rank.lap(Work::Expert);
        Ok(())
    }

    /// Whether [`MoeLayer::forward`] leaves it to devices to group rows: the host sees the choices after the step only.
    pub fn is_planned(&self, rank: &Rank, placement: &Placement, scratch: &MoeScratch) -> bool {
        let backend = rank.backend.as_ref();
        !matches!(self.grouping(backend, rank.world.size(), placement, &scratch.padded), Grouping::Hosts)
    }

    /// Who groups the rows of this layer in the step that was agreed on.
    fn grouping<'a>(
        &self,
        backend: &'a dyn Backend,
        world: usize,
        placement: &'a Placement,
        padded: &Padded,
    ) -> Grouping<'a> {
        let layer = placement.layer(self.index);
        match (layer.only_slots(), backend.device_plan(), backend.world_plan()) {
            (Some(slot_of), Some(planner), _) if world == 1 => Grouping::Alone(planner, slot_of),
            (_, _, Some(planner)) if padded.serves(layer) => Grouping::Padded(planner),
            _ => Grouping::Hosts,
        }
    }

    /// The experts' sums for the owned rows, without the host having seen the choices.
    fn compute_planned(
        &self,
        planner: &dyn DevicePlan,
        slot_of: &[u32],
        x: View<'_>,
        scratch: &mut MoeScratch,
        out: ViewMut<'_>,
    ) -> Result<()> {
        let MoeScratch { routed, grouped, returned, .. } = scratch;
        let rows = x.rows() * routed.top_k();
        let args = PlannedArgs {
            x,
            ids: routed.device_ids(self.index),
            weights: routed.weights(self.index),
            slot_of,
            slots: &self.slots,
            activation: self.activation,
            grouped: grouped.head_mut(rows),
            computed: returned.head_mut(rows),
        };
        planner.planned_experts(args, out)
    }

    /// Counts what [`MoeLayer::forward`] could not of a layer that devices grouped, now that the host has the choices of the step.
    pub fn settle(
        &self,
        rank: &Rank,
        placement: &Placement,
        phases: &[Phase],
        load: &LoadCounters,
        scratch: &mut MoeScratch,
    ) {
        let backend = rank.backend.as_ref();
        let MoeScratch { routed, dispatch, padded, .. } = scratch;
        match self.grouping(backend, rank.world.size(), placement, padded) {
            Grouping::Hosts => return,
            Grouping::Alone(_, slot_of) => {
                dispatch.count_alone(slot_of, self.slots.len(), routed.ids(self.index))
            }
            Grouping::Padded(_) => padded.tell(self.padded_shape(rank, padded), self.index, dispatch),
        }
        self.count(phases, load, scratch);
        load.set_computed(self.index, &scratch.dispatch.offsets);
    }

    /// Agrees with all ranks on who computes what.
    fn plan(&self, rank: &mut Rank, placement: &Placement, scratch: &mut MoeScratch) -> Result<()> {
        let world = rank.world.size();
        let experts = placement.experts();
        let top_k = scratch.routed.top_k();
        scratch.counts.clear();
        scratch.counts.resize(experts, 0);
        for &id in scratch.routed.ids(self.index) {
            scratch.counts[id as usize] += 1;
        }
        scratch.world_counts.resize(experts * world, 0);
        rank.world.all_gather_counts(&scratch.counts, &mut scratch.world_counts)?;
        let layer = placement.layer(self.index);
        scratch.split.rebuild(layer, &scratch.world_counts);
        let shape = DispatchShape { world, rank: rank.world.rank(), expert_tp: rank.expert_tp, top_k };
        scratch.dispatch.plan(shape, layer, &mut scratch.split, scratch.routed.ids(self.index));
        Ok(())
    }

    /// Counts every choice once, at the row's owner.
    fn count(&self, phases: &[Phase], load: &LoadCounters, scratch: &MoeScratch) {
        let (top_k, ids) = (scratch.routed.top_k(), scratch.routed.ids(self.index));
        for (i, (&id, &rank)) in ids.iter().zip(&scratch.dispatch.destinations).enumerate() {
            load.count(phases[i / top_k], self.index, id as usize, rank as usize);
        }
    }

    /// Ships rows to their experts, computes there, and ships results home into `scratch.returned`, in the order sent. The shared
    /// expert is computed beside them where `with_shared`.
    fn exchange(
        &self,
        rank: &mut Rank,
        rows: MoeRows<'_>,
        with_shared: bool,
        scratch: &mut MoeScratch,
    ) -> Result<()> {
        let x = rows.rounded;
        let MoeScratch { dispatch, send, arrived, grouped, computed, returned, shared, .. } = scratch;
        let shared = with_shared.then_some((rows, shared));
        let backend = rank.backend.clone();
        let backend = backend.as_ref();
        let (out, here) = (dispatch.send_tokens.len(), dispatch.computed_rows());
        grouped.reserve(backend, here)?;
        returned.reserve(backend, out)?;
        if rank.world.size() == 1 {
            // Nobody to ship to, and what would leave is already grouped by slot.
            backend.gather_rows(x, &dispatch.send_tokens, grouped.head_mut(here))?;
            rank.lap(Work::Dispatch);
            self.compute(backend, dispatch, (grouped.head(here), returned.head_mut(here)), shared)?;
            rank.lap(Work::Expert);
            return Ok(());
        }
        send.reserve(backend, out)?;
        arrived.reserve(backend, here)?;
        computed.reserve(backend, here)?;
        backend.gather_rows(x, &dispatch.send_tokens, send.head_mut(out))?;
        let Dispatch { sent, received, .. } = &*dispatch;
        rank.world.all_to_all_rows(send.head(out), sent, arrived.head_mut(here), received)?;
        backend.gather_rows(arrived.head(here), &dispatch.group, grouped.head_mut(here))?;
        rank.lap(Work::Dispatch);
        self.compute(backend, dispatch, (grouped.head(here), computed.head_mut(here)), shared)?;
        rank.lap(Work::Expert);
        backend.gather_rows(computed.head(here), &dispatch.ungroup, arrived.head_mut(here))?;
        rank.world.all_to_all_rows(arrived.head(here), received, returned.head_mut(out), sent)?;

        // Rows that a rank sends to itself stay home.
        let row_bytes = x.cols() * x.dtype().bytes();
        let own = sent[rank.world.rank()];
        let (outward, inward) = ((out - own) * row_bytes, (here - own) * row_bytes);
        rank.clock.meter().exchange(CommOp::Dispatch, outward, inward);
        rank.clock.meter().exchange(CommOp::Combine, inward, outward);
        Ok(())
    }

    /// Runs this rank's experts over the grouped rows, and the shared one over those that are given with its buffers.
    fn compute(
        &self,
        backend: &dyn Backend,
        dispatch: &Dispatch,
        (rows, out): (View<'_>, ViewMut<'_>),
        shared: Option<(MoeRows<'_>, &mut SharedBuffers)>,
    ) -> Result<()> {
        let (offsets, slots) = (dispatch.offsets.as_slice(), self.slots.as_slice());
        let routed = ExpertsArgs { rows, offsets, slots, activation: self.activation };
        match (&self.shared, shared) {
            (Some(expert), Some((rows, buffers))) if rows.rounded.rows() > 0 => {
                let GatedMlp { weights, activation } = &expert.mlp;
                let args = SharedArgs { rows: rows.rounded, mlp: weights, activation: *activation };
                let shared_out = buffers.output.head_mut(args.rows.rows());
                backend.experts_and_shared((routed, out), (args, shared_out))?;
                expert.apply_gate(backend, rows, buffers)
            }
            _ => backend.experts(routed, out),
        }
    }

    /// Runs the shared expert.
    pub(super) fn compute_shared(
        &self,
        backend: &dyn Backend,
        rows: MoeRows<'_>,
        buffers: &mut SharedBuffers,
    ) -> Result<()> {
        let Some(shared) = &self.shared else { return Ok(()) };
        let n = rows.rounded.rows();
        if n == 0 {
            return Ok(());
        }
        shared.mlp.forward(backend, rows.rounded, buffers.output.head_mut(n))?;
        shared.apply_gate(backend, rows, buffers)
    }

    /// Adds what the shared expert made to `out`.
    pub(super) fn add_shared(
        &self,
        backend: &dyn Backend,
        buffers: &SharedBuffers,
        out: ViewMut<'_>,
    ) -> Result<()> {
        if self.shared.is_none() || out.rows() == 0 {
            return Ok(());
        }
        backend.add_scaled(buffers.output.head(out.rows()), 1.0, out)
    }
}

/// Who finds out where the rows of a layer go.
enum Grouping<'a> {
    /// The hosts of all ranks, from counts they exchange.
    Hosts,
    /// The device: this rank holds every expert, once, in these slots.
    Alone(&'a dyn DevicePlan, &'a [u32]),
    /// The devices of all ranks, each for itself.
    Padded(&'a dyn WorldPlan),
}
