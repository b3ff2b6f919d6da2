//! The only forward pass: a decoder-only transformer whose families differ in data.
//!
//! Between sublayers each rank holds the residual of the rows it *owns* (f32). Tensor-parallel sublayers (attention,
//! dense MLP) gather the rows of the group, compute partial sums of all rows, and reduce-scatter them back to owners;
//! the MoE layer works on owned rows throughout.

use std::ops::Range;
use std::sync::Arc;

use router_sim::placement::Placement;

use crate::backend::{Backend, KvCache, SeqSpan, StepCounts};
use crate::error::Result;
use crate::layers::attention::{Attention, AttentionScratch, AttentionStep};
use crate::layers::embedding::{Embedding, Head};
use crate::layers::mlp::GatedMlp;
use crate::layers::norm::Norm;
use crate::layers::rope::RopeTable;
use crate::layers::{Rank, RowBuffer, owned_range};
use crate::metrics::{StepKind, Work};
use crate::model::{Batch, Model, Routing, StepOutput};
use crate::moe::layer::{MoeLayer, MoeRows, MoeScratch};
use crate::moe::load::{LoadCounters, Phase};
use crate::moe::migrate::{Checksums, Slice, Staging, Switch};

/// A model on one rank: its share of the weights, its KV cache and its working space.
pub struct Transformer {
    pub(super) rank: Rank,
    pub(super) embedding: Embedding,
    pub(super) layers: Vec<DecoderLayer>,
    pub(super) final_norm: Norm,
    pub(super) head: Head,
    pub(super) rope: RopeTable,
    pub(super) residual_scale: f32,
    pub(super) top_k: usize,
    /// Switched between steps by whoever moves experts.
    pub(super) placement: Arc<Placement>,
    pub(super) staging: Staging,
    pub(super) load: Arc<LoadCounters>,
    pub(super) scratch: Scratch,
}

/// One layer's weights and cache.
pub(super) struct DecoderLayer {
    pub(super) input_norm: Norm,
    pub(super) attention: Attention,
    pub(super) cache: KvCache,
    pub(super) post_attention_norm: Norm,
    pub(super) ffn: FeedForward,
}

/// The second half of a layer.
pub(super) enum FeedForward {
    /// Tensor-parallel over the intermediate width.
    Dense(GatedMlp),
    /// Expert-parallel.
    Moe(Box<MoeLayer>),
}

/// Working space of a step; nothing in it outlives the step.
pub(super) struct Scratch {
    pub(super) residual: RowBuffer,
    /// Normed owned rows, exact and in the activation type.
    pub(super) normed: RowBuffer,
    pub(super) rounded: RowBuffer,
    /// Rows of the whole group, as sublayer input and as partial sums.
    pub(super) gathered: RowBuffer,
    pub(super) partial: RowBuffer,
    /// Sublayer output of owned rows.
    pub(super) output: RowBuffer,
    /// Which buffer holds what is still to be added to the residual.
    pub(super) addend: Option<Addend>,
    /// Rows whose logits are wanted.
    pub(super) chosen: RowBuffer,
    pub(super) attention: AttentionScratch,
    pub(super) moe: MoeScratch,
    pub(super) host: HostScratch,
}

/// A sublayer's output that is not yet in the residual.
#[derive(Clone, Copy)]
pub(super) enum Addend {
    /// In `partial`.
    Partial,
    /// In `output`.
    Output,
}

impl Scratch {
    /// Brings the residual of `n` owned rows up to date and norms it into `rounded`, and exactly into `normed` where `exact`.
    fn norm(&mut self, backend: &dyn Backend, norm: &Norm, n: usize, scale: f32, exact: bool) -> Result<()> {
        let Scratch { residual, normed, rounded, partial, output, addend, .. } = self;
        let addend = addend.take().map(|addend| match addend {
            Addend::Partial => (partial.head(n), scale),
            Addend::Output => (output.head(n), scale),
        });
        let exact = exact.then(|| normed.head_mut(n));
        norm.forward_sum(backend, residual.head_mut(n), addend, exact, rounded.head_mut(n))
    }

    /// Brings the residual of `n` owned rows up to date.
    fn settle(&mut self, backend: &dyn Backend, n: usize, scale: f32) -> Result<()> {
        let Scratch { residual, partial, output, addend, .. } = self;
        match addend.take() {
            None => Ok(()),
            Some(Addend::Partial) => backend.add_scaled(partial.head(n), scale, residual.head_mut(n)),
            Some(Addend::Output) => backend.add_scaled(output.head(n), scale, residual.head_mut(n)),
        }
    }
}

/// Row bookkeeping of a step.
#[derive(Default)]
pub(super) struct HostScratch {
    counts: Vec<usize>,
    rope_rows: Vec<u32>,
    phases: Vec<Phase>,
    chosen: Vec<u32>,
}

impl Model for Transformer {
    fn forward(&mut self, batch: &Batch<'_>, out: &mut StepOutput) -> Result<()> {
        assert_eq!(batch.tokens.len(), batch.attention.rows(), "tokens and spans of a batch");
        let rows = batch.tokens.len();
        self.rank.start_clock();
        self.rank.owned_counts(rows, &mut self.scratch.host.counts);
        let owned = owned_range(&self.scratch.host.counts, self.rank.tp.rank());
        self.rope.rows_of(batch.attention.spans, &mut self.scratch.host.rope_rows);
        phases_of(batch.attention.spans, owned.clone(), &mut self.scratch.host.phases);
        let decodes = rows == batch.attention.spans.len();
        self.scratch.moe.start(&mut self.rank, owned.len(), decodes)?;
        self.scratch.addend = None;

        // Decode steps are much alike, and where devices find out who computes what, no host waits for a part of one.
        let alone = self.rank.world.size() == 1 && rows > 0 && decodes;
        if alone || self.is_padded() {
            let backend = self.rank.backend.clone();
            backend.step(&mut || self.compute(batch, owned.clone(), out))?;
            let StepCounts { run, replayed, captured } = backend.step_counts();
            let kinds = [StepKind::Run, StepKind::Replayed, StepKind::Captured];
            for (kind, steps) in kinds.into_iter().zip([run, replayed, captured]) {
                self.rank.clock.meter().set_steps(kind, steps);
            }
        } else {
            self.compute(batch, owned.clone(), out)?;
        }
        self.rank.lap(Work::Dense);
        self.settle()?;
        self.record(owned, batch.want_routing, &mut out.routing)
    }

    fn transfer(&mut self, slice: &Slice) -> Result<Checksums> {
        let Transformer { rank, layers, staging, .. } = self;
        let slots_of = |index| {
            let mut layers = layers.iter().filter_map(DecoderLayer::moe);
            &layers.find(|moe| moe.index == index).expect("a MoE layer of this model").slots[..]
        };
        staging.transfer(rank, slots_of, slice)
    }

    fn switch(&mut self, switch: &Switch) {
        let rank = self.rank.world.rank() / self.rank.expert_tp;
        for layer in &mut self.layers {
            let FeedForward::Moe(moe) = &mut layer.ffn else { continue };
            let (old, new) = (self.placement.layer(moe.index), switch.placement.layer(moe.index));
            if old.slots() != new.slots() {
                let landed = switch.landed.iter().copied();
                let landed = landed.filter(|l| l.layer == moe.index && l.rank == rank);
                self.staging.switch(&mut moe.slots, (rank, old, new), landed);
            }
        }
        self.placement = Arc::clone(&switch.placement);
    }
}

impl DecoderLayer {
    fn moe(&self) -> Option<&MoeLayer> {
        match &self.ffn {
            FeedForward::Dense(_) => None,
            FeedForward::Moe(moe) => Some(moe),
        }
    }
}

impl Transformer {
    /// All layers and the logits.
    fn compute(&mut self, batch: &Batch<'_>, owned: Range<usize>, out: &mut StepOutput) -> Result<()> {
        let (backend, rows) = (self.rank.backend.clone(), batch.tokens.len());
        if !owned.is_empty() {
            let residual = self.scratch.residual.head_mut(owned.len());
            self.embedding.forward(backend.as_ref(), &batch.tokens[owned.clone()], residual)?;
        }
        self.rank.lap(Work::Dense);
        for layer in &mut self.layers {
            let mut step = LayerStep {
                rank: &mut self.rank,
                rows,
                owned: owned.len(),
                residual_scale: self.residual_scale,
                scratch: &mut self.scratch,
            };
            step.attend(layer, batch, &self.rope)?;
            match &layer.ffn {
                FeedForward::Dense(mlp) => step.dense(&layer.post_attention_norm, mlp)?,
                FeedForward::Moe(moe) => {
                    step.moe(&layer.post_attention_norm, moe, &self.placement, &self.load)?;
                }
            }
        }
        self.logits(batch.logit_rows, owned, out)
    }

    /// Whether all ranks pad their rows in every MoE layer of this step.
    fn is_padded(&self) -> bool {
        let Transformer { rank, layers, placement, scratch, .. } = self;
        let planned = |moe: &MoeLayer| moe.is_planned(rank, placement, &scratch.moe);
        scratch.moe.padded_rows().is_some() && layers.iter().filter_map(DecoderLayer::moe).all(planned)
    }

    /// Counts the choices of layers whose rows devices grouped by themselves: fetched at once, after everything else was given to them.
    fn settle(&mut self) -> Result<()> {
        let Transformer { rank, layers, placement, load, scratch, .. } = self;
        let Scratch { moe: moe_scratch, host, .. } = scratch;
        let layers = layers.iter().filter_map(DecoderLayer::moe);
        if !layers.clone().any(|moe| moe.is_planned(rank, placement, moe_scratch)) {
            return Ok(());
        }
        moe_scratch.fetch(rank.backend.as_ref())?;
        rank.lap(Work::Device);
        layers.for_each(|moe| moe.settle(rank, placement, &host.phases, load, moe_scratch));
        rank.lap(Work::Router);
        Ok(())
    }

    /// Hands out the choices of all layers.
    fn record(&mut self, owned: Range<usize>, wanted: bool, routing: &mut Routing) -> Result<()> {
        routing.clear(owned.start, if wanted { owned.len() } else { 0 }, self.top_k);
        if wanted {
            let routed = self.scratch.moe.routed();
            routing.ids.extend(routed.all_ids().iter().map(|&id| id as u32));
            routed.fetch_weights(self.rank.backend.as_ref(), &mut routing.weights)?;
        }
        self.rank.lap(Work::Router);
        Ok(())
    }

    /// Norms the wanted owned rows and runs the head on them.
    fn logits(&mut self, wanted: &[u32], owned: Range<usize>, out: &mut StepOutput) -> Result<()> {
        let backend = self.rank.backend.as_ref();
        self.scratch.settle(backend, owned.len(), self.residual_scale)?;
        let Scratch { residual, chosen: rows, rounded, host, .. } = &mut self.scratch;
        host.chosen.clear();
        out.logit_rows.clear();
        for &row in wanted.iter().filter(|&&row| owned.contains(&(row as usize))) {
            out.logit_rows.push(row);
            host.chosen.push(row - owned.start as u32);
        }
        let n = host.chosen.len();
        if n == 0 {
            return Ok(());
        }
        assert!(n <= out.logits.rows(), "{n} logit rows, room for {}", out.logits.rows());
        backend.gather_rows(residual.head(owned.len()), &host.chosen, rows.head_mut(n))?;
        self.final_norm.forward(backend, rows.head(n), rounded.head_mut(n))?;
        self.head.forward(backend, rounded.head(n), out.logits.head_mut(n))
    }
}

/// One layer of one step.
struct LayerStep<'a> {
    rank: &'a mut Rank,
    /// Rows of the group.
    rows: usize,
    /// Rows this rank owns.
    owned: usize,
    residual_scale: f32,
    scratch: &'a mut Scratch,
}

impl LayerStep<'_> {
    /// residual += attention(norm(residual)).
    fn attend(&mut self, layer: &mut DecoderLayer, batch: &Batch<'_>, rope: &RopeTable) -> Result<()> {
        self.norm(&layer.input_norm, false)?;
        self.gather()?;
        let Scratch { rounded, gathered, partial, attention, host, .. } = self.scratch;
        if self.rows > 0 {
            let x = if self.rank.tp.size() == 1 { rounded } else { gathered };
            let step = AttentionStep { batch: batch.attention, rope, rope_rows: &host.rope_rows };
            let out = partial.head_mut(self.rows);
            layer.attention.forward(self.rank, step, x.head(self.rows), &mut layer.cache, attention, out)?;
        }
        self.scatter(Work::Attention)
    }

    /// residual += mlp(norm(residual)), tensor-parallel.
    fn dense(&mut self, norm: &Norm, mlp: &GatedMlp) -> Result<()> {
        self.norm(norm, false)?;
        self.gather()?;
        let Scratch { rounded, gathered, partial, .. } = self.scratch;
        if self.rows > 0 {
            let x = if self.rank.tp.size() == 1 { rounded } else { gathered };
            mlp.forward(self.rank.backend.as_ref(), x.head(self.rows), partial.head_mut(self.rows))?;
        }
        self.scatter(Work::Dense)
    }

    /// residual += moe(norm(residual)), on owned rows. Called without rows too: other ranks may need this one.
    fn moe(&mut self, norm: &Norm, moe: &MoeLayer, placement: &Placement, load: &LoadCounters) -> Result<()> {
        self.norm(norm, true)?;
        let n = self.owned;
        let Scratch { normed, rounded, output, moe: scratch, host, .. } = &mut *self.scratch;
        let padded = rounded.head(scratch.padded_rows().unwrap_or(n));
        let rows = MoeRows { exact: normed.head(n), rounded: rounded.head(n), padded, phases: &host.phases };
        moe.forward(self.rank, rows, placement, load, scratch, output.head_mut(n))?;
        self.scratch.addend = (n > 0).then_some(Addend::Output);
        self.rank.lap(Work::Combine);
        Ok(())
    }

    /// Brings the owned rows up to date and norms them into `rounded`, and exactly into `normed` when that is wanted too.
    fn norm(&mut self, norm: &Norm, exact: bool) -> Result<()> {
        let n = self.owned;
        if n == 0 {
            return Ok(());
        }
        self.scratch.norm(self.rank.backend.as_ref(), norm, n, self.residual_scale, exact)
    }

    /// Brings the rows of the group together in `gathered`. A group of one reads `rounded` directly.
    fn gather(&mut self) -> Result<()> {
        if self.rank.tp.size() == 1 {
            return Ok(());
        }
        let Scratch { rounded, gathered, host, .. } = &mut *self.scratch;
        let own = rounded.head(self.owned);
        let row_bytes = own.cols() * own.dtype().bytes();
        self.rank.tp.all_gather_rows(own, &host.counts, gathered.head_mut(self.rows))?;
        self.rank.count_gathering(self.owned * row_bytes, self.rows * row_bytes);
        self.rank.lap(Work::AllReduce);
        Ok(())
    }

    /// Sums the group's partial rows, which came from `work`. The owned ones are to be added to the residual.
    fn scatter(&mut self, work: Work) -> Result<()> {
        let n = self.owned;
        let Scratch { partial, output, host, addend, .. } = &mut *self.scratch;
        let summed = if self.rank.tp.size() == 1 {
            Addend::Partial
        } else {
            self.rank.lap(work);
            let partial = partial.head(self.rows);
            let row_bytes = partial.cols() * partial.dtype().bytes();
            self.rank.tp.reduce_scatter_rows(partial, &host.counts, output.head_mut(n))?;
            self.rank.count_scattering(n * row_bytes, self.rows * row_bytes);
            Addend::Output
        };
        *addend = (n > 0).then_some(summed);
        self.rank.lap(if self.rank.tp.size() == 1 { work } else { Work::AllReduce });
        Ok(())
    }
}

/// Phases of the rows in `owned`.
fn phases_of(spans: &[SeqSpan], owned: Range<usize>, phases: &mut Vec<Phase>) {
    phases.clear();
    for span in spans {
        for i in 0..span.rows {
            if owned.contains(&((span.row + i) as usize)) {
                let generated = span.position + i >= span.prompt_len;
                phases.push(if generated { Phase::Decode } else { Phase::Prefill });
            }
        }
    }
}
