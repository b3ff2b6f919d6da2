//! One rank of a model that has MoE layers alone: what tests and benchmarks of such layers build, and do in every step.

#![allow(dead_code, reason = "each test binary uses its own part")]

use std::sync::Arc;

use moeyard::backend::{Backend, DType, HostMatrix, Mlp, PaddedShape, Precision, Tensor};
use moeyard::comm::Communicator;
use moeyard::comm::solo::Solo;
use moeyard::error::Result;
use moeyard::layers::Rank;
use moeyard::layers::linear::Linear;
use moeyard::layers::mlp::GatedMlp;
use moeyard::metrics::{RankMeter, WorkClock};
use moeyard::moe::layer::{MoeLayer, MoeRows, MoeScratch, Shared};
use moeyard::moe::load::{LoadCounters, Phase};
use moeyard::moe::router::Router;
use moeyard::spec::{self, Activation, Moe, Renormalize, Score};
use router_sim::placement::Placement;
use router_sim::split::Split;

/// Probabilities of those chosen, made to sum to 1.
pub const ROUTER: spec::Router = spec::Router {
    score: Score::Softmax,
    logit_bias: false,
    choice_bias: false,
    groups: None,
    renormalize: Renormalize::Sum { eps: 0.0 },
    scale: 1.0,
};

/// A rank whose batches are its own.
pub fn rank(
    backend: Arc<dyn Backend>,
    world: Box<dyn Communicator>,
    expert_tp: usize,
    precision: Precision,
    meter: Arc<RankMeter>,
) -> Rank {
    Rank {
        tp: Box::new(Solo::new(Arc::clone(&backend))),
        backend,
        world,
        expert_tp,
        precision,
        clock: WorkClock::new(meter),
    }
}

/// The sizes of a model.
#[derive(Clone, Copy)]
pub struct MoeModel {
    pub layers: usize,
    pub hidden: usize,
    pub experts: usize,
    pub top_k: usize,
    /// Width of an expert.
    pub intermediate: usize,
    /// Rows that a rank may own in a step.
    pub max_rows: usize,
}

/// A layer's weights on one rank.
pub struct MoeWeights<'a> {
    pub router: &'a HostMatrix<'a>,
    pub slots: Vec<Option<Mlp>>,
    pub shared: Mlp,
    /// The shared expert's.
    pub gate: Option<&'a HostMatrix<'a>>,
}

impl MoeWeights<'_> {
    /// Layer `index`.
    pub fn layer(self, backend: &dyn Backend, index: usize) -> MoeLayer {
        let linear = |host| Linear { weight: backend.pack_matrix(host, DType::F32).unwrap(), bias: None };
        let activation = Activation::SiluMul;
        MoeLayer {
            index,
            router: Router { linear: linear(self.router), choice_bias: None, spec: ROUTER },
            slots: self.slots,
            activation,
            shared: Some(Shared {
                mlp: GatedMlp { weights: self.shared, activation },
                gate: self.gate.map(linear),
            }),
        }
    }
}

/// A rank with its layers, and with its rows at the same addresses in every step.
pub struct MoeRank {
    pub rank: Rank,
    pub layers: Vec<MoeLayer>,
    pub load: Arc<LoadCounters>,
    pub scratch: MoeScratch,
    /// Rows that go into a layer, and room for padding.
    pub exact: Tensor,
    /// The same in bf16.
    pub rounded: Tensor,
    /// Rows that came out of a layer.
    pub out: Tensor,
    /// Of each row in the step.
    phases: Vec<Phase>,
}

impl MoeRank {
    /// `load` is the rank's own.
    pub fn new(
        model: &MoeModel,
        split: Split,
        rank: Rank,
        layers: Vec<MoeLayer>,
        load: Arc<LoadCounters>,
    ) -> Self {
        let MoeModel { hidden, max_rows, .. } = *model;
        let moe = Moe {
            experts: model.experts,
            top_k: model.top_k,
            intermediate: model.intermediate,
            activation: Activation::SiluMul,
            expert_bias: false,
            router: ROUTER,
            shared: None,
        };
        let backend = rank.backend.as_ref();
        let alloc = |dtype, rows| backend.alloc(dtype, rows, hidden).unwrap();
        let room = max_rows + PaddedShape::PADDING;
        MoeRank {
            scratch: MoeScratch::new(backend, DType::Bf16, model.layers, max_rows, hidden, &moe, split)
                .unwrap(),
            exact: alloc(DType::F32, room),
            rounded: alloc(DType::Bf16, room),
            out: alloc(DType::F32, max_rows),
            phases: Vec::new(),
            rank,
            layers,
            load,
        }
    }

    /// Begins a decode step of `n` rows; devices may find out who computes what where `planned`. Collective over the world.
    pub fn start(&mut self, n: usize, planned: bool) {
        self.scratch.start(&mut self.rank, n, planned).unwrap();
        self.phases.clear();
        self.phases.resize(n, Phase::Decode);
    }

    /// The first rows that go into the next layer, `[rows][hidden]`.
    pub fn set_rows(&mut self, x: &[f32]) {
        let (backend, rows) = (self.rank.backend.as_ref(), x.len() / self.exact.cols());
        if rows > 0 {
            backend.upload(bytemuck::cast_slice(x), self.exact.head_mut(rows)).unwrap();
            backend.copy_rows(self.exact.head(rows), self.rounded.head_mut(rows)).unwrap();
        }
    }

    /// What layer `index` makes of the step's rows. Collective over the world.
    pub fn forward(&mut self, index: usize, placement: &Placement) -> Result<()> {
        let MoeRank { rank, layers, load, scratch, exact, rounded, out, phases } = self;
        let n = phases.len();
        let padded = rounded.head(scratch.padded_rows().unwrap_or(n));
        let rows = MoeRows { exact: exact.head(n), rounded: rounded.head(n), padded, phases };
        layers[index].forward(rank, rows, placement, load, scratch, out.head_mut(n))
    }

    /// Layers of this step in which the host has no part.
    pub fn planned_layers(&self, placement: &Placement) -> usize {
        self.layers.iter().filter(|layer| layer.is_planned(&self.rank, placement, &self.scratch)).count()
    }

    /// Counts what devices found out, once [`MoeScratch::fetch`] has brought it.
    pub fn settle(&mut self, placement: &Placement) {
        let MoeRank { rank, layers, load, scratch, phases, .. } = self;
        layers.iter().for_each(|layer| layer.settle(rank, placement, phases, load, scratch));
    }
}
