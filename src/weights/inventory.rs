//! What a model's checkpoint must hold: the roles a [`ModelSpec`] has, their shapes, and the list of all of them.

use super::finder::{ExpertShape, MlpMatrix};
use super::names::{ExpertNames, MlpNames, Role, TensorNames, fill};
use crate::spec::{Attention, FeedForward, ModelSpec, NormKind, QkNorm};

/// Shape and storage of one role.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RoleShape {
    /// A linear module `[n, k]`.
    Matrix {
        /// Outputs.
        n: usize,
        /// Inputs.
        k: usize,
        /// It has a bias `[n]`.
        bias: bool,
    },
    /// A norm module.
    Norm {
        /// Width of weight and bias.
        width: usize,
        /// It has a bias.
        bias: bool,
    },
    /// A tensor of its own, not a module.
    Bare {
        /// Elements.
        len: usize,
    },
}

/// What a role looks like in this model; `None` when the model has no such role. Products of a hostile config
/// saturate; no tensor has such a shape, so that validation refuses them.
pub fn role_shape(spec: &ModelSpec, role: Role) -> Option<RoleShape> {
    let hidden = spec.hidden_size;
    let matrix = |n, k, bias| Some(RoleShape::Matrix { n, k, bias });
    let norm = |width| Some(RoleShape::Norm { width, bias: spec.norm.kind == NormKind::Layer });
    match role {
        Role::Embed => matrix(spec.vocab_size, hidden, false),
        Role::Head => matrix(spec.vocab_size, hidden, spec.lm_head_bias),
        Role::FinalNorm | Role::InputNorm | Role::PostAttentionNorm => norm(hidden),
        Role::Router => matrix(spec.moe.experts, hidden, spec.moe.router.logit_bias),
        Role::ChoiceBias if spec.moe.router.choice_bias => Some(RoleShape::Bare { len: spec.moe.experts }),
        Role::SharedGate if spec.moe.shared.is_some_and(|shared| shared.gated) => matrix(1, hidden, false),
        Role::ChoiceBias | Role::SharedGate => None,
        _ => attention_shape(&spec.attention, hidden, role),
    }
}

fn attention_shape(attention: &Attention, hidden: usize, role: Role) -> Option<RoleShape> {
    let matrix = |n, k, bias| Some(RoleShape::Matrix { n, k, bias });
    let rms = |width| Some(RoleShape::Norm { width, bias: false });
    match *attention {
        Attention::Gqa { heads, kv_heads, head_dim, qkv_bias, out_bias, qk_norm, sinks, .. } => {
            let q_width = heads.saturating_mul(head_dim);
            let kv_width = kv_heads.saturating_mul(head_dim);
            let norm = |full| match qk_norm {
                QkNorm::Off => None,
                QkNorm::PerHead => rms(head_dim),
                QkNorm::FullWidth => rms(full),
            };
            match role {
                Role::Q => matrix(q_width, hidden, qkv_bias),
                Role::K | Role::V => matrix(kv_width, hidden, qkv_bias),
                Role::O => matrix(hidden, q_width, out_bias),
                Role::QNorm => norm(q_width),
                Role::KNorm => norm(kv_width),
                Role::Sinks if sinks => Some(RoleShape::Bare { len: heads }),
                _ => None,
            }
        }
        Attention::Mla { heads, q_lora_rank, kv_lora_rank, nope_dim, rope_dim, v_dim, bias, .. } => {
            let q_width = heads.saturating_mul(nope_dim.saturating_add(rope_dim));
            match (role, q_lora_rank) {
                (Role::Q, None) => matrix(q_width, hidden, false),
                (Role::QA, Some(rank)) => matrix(rank, hidden, bias),
                (Role::QANorm, Some(rank)) => rms(rank),
                (Role::QB, Some(rank)) => matrix(q_width, rank, false),
                (Role::KvA, _) => matrix(kv_lora_rank.saturating_add(rope_dim), hidden, bias),
                (Role::KvANorm, _) => rms(kv_lora_rank),
                (Role::KvB, _) => {
                    matrix(heads.saturating_mul(nope_dim.saturating_add(v_dim)), kv_lora_rank, false)
                }
                (Role::O, _) => matrix(hidden, heads.saturating_mul(v_dim), bias),
                _ => None,
            }
        }
    }
}

/// Roles of every layer.
const LAYER_ROLES: [Role; 15] = [
    Role::InputNorm,
    Role::Q,
    Role::K,
    Role::V,
    Role::QNorm,
    Role::KNorm,
    Role::Sinks,
    Role::QA,
    Role::QANorm,
    Role::QB,
    Role::KvA,
    Role::KvANorm,
    Role::KvB,
    Role::O,
    Role::PostAttentionNorm,
];

/// Roles of MoE layers besides the experts.
const MOE_ROLES: [Role; 3] = [Role::Router, Role::ChoiceBias, Role::SharedGate];

/// Parts of a model, for sums of bytes and parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// The embedding.
    Embedding,
    /// The output head, where it is not the embedding.
    Head,
    /// All norms.
    Norms,
    /// Attention projections and sinks.
    Attention,
    /// Routers with their biases, and shared-expert gates.
    Routers,
    /// Routed experts.
    Experts,
    /// Shared experts.
    SharedExperts,
    /// MLPs of layers without experts.
    DenseMlps,
}

/// One thing a checkpoint must hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// What it belongs to.
    pub part: Part,
    /// Layer, but for embedding, head and final norm.
    pub layer: Option<usize>,
    /// Expert, where the item belongs to a single one.
    pub expert: Option<usize>,
    /// How it is stored.
    pub what: What,
}

/// See [`Item`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// A module, or a tensor of its own.
    Role {
        /// Module or tensor name.
        name: String,
        /// Its shape.
        shape: RoleShape,
    },
    /// One matrix of all experts of a layer in one tensor, and its bias where experts have one.
    Fused(MlpMatrix),
}

impl Item {
    /// Elements, biases included.
    pub fn parameters(&self, spec: &ModelSpec) -> u64 {
        let wide = |n: usize| n as u64;
        match &self.what {
            What::Role { shape: RoleShape::Matrix { n, k, bias }, .. } => {
                wide(*n).saturating_mul(wide(*k) + u64::from(*bias))
            }
            What::Role { shape: RoleShape::Norm { width, bias }, .. } => {
                wide(*width).saturating_mul(1 + u64::from(*bias))
            }
            What::Role { shape: RoleShape::Bare { len }, .. } => wide(*len),
            What::Fused(which) => {
                let ExpertShape { experts, hidden, intermediate } = expert_shape(spec);
                let out = if *which == MlpMatrix::Down { hidden } else { intermediate };
                let matrix = wide(hidden).saturating_mul(wide(intermediate));
                let bias = if spec.moe.expert_bias { wide(out) } else { 0 };
                wide(experts).saturating_mul(matrix.saturating_add(bias))
            }
        }
    }
}

/// Sizes of the routed experts.
pub fn expert_shape(spec: &ModelSpec) -> ExpertShape {
    ExpertShape { experts: spec.moe.experts, hidden: spec.hidden_size, intermediate: spec.moe.intermediate }
}

/// Everything the checkpoint of this model must hold, in the order of the forward pass.
pub fn inventory(spec: &ModelSpec, names: &TensorNames) -> Vec<Item> {
    let mut list = List { spec, names, items: Vec::new() };
    list.role(Part::Embedding, None, Role::Embed);
    for (layer, description) in spec.layers.iter().enumerate() {
        for role in LAYER_ROLES {
            list.role(part_of(role), Some(layer), role);
        }
        match description.ffn {
            FeedForward::Dense { intermediate } => {
                list.mlp(Part::DenseMlps, layer, None, &names.dense, intermediate, false);
            }
            FeedForward::Moe => list.moe(layer),
        }
    }
    list.role(Part::Norms, None, Role::FinalNorm);
    if !spec.tied_embeddings {
        list.role(Part::Head, None, Role::Head);
    }
    list.items
}

/// Parameters per part, from the description alone. Tied embeddings count once.
pub fn parameters(spec: &ModelSpec, names: &TensorNames) -> Vec<(Part, u64)> {
    sum_by_part(inventory(spec, names).iter().map(|item| (item.part, item.parameters(spec))))
}

/// Sums values of the same part, parts in order.
pub(super) fn sum_by_part(values: impl Iterator<Item = (Part, u64)>) -> Vec<(Part, u64)> {
    let mut sums = std::collections::BTreeMap::<Part, u64>::new();
    for (part, value) in values {
        let sum = sums.entry(part).or_default();
        *sum = sum.saturating_add(value);
    }
    sums.into_iter().collect()
}

fn part_of(role: Role) -> Part {
    match role {
        Role::InputNorm | Role::PostAttentionNorm | Role::FinalNorm => Part::Norms,
        Role::QNorm | Role::KNorm | Role::QANorm | Role::KvANorm => Part::Norms,
        Role::Router | Role::ChoiceBias | Role::SharedGate => Part::Routers,
        Role::Embed => Part::Embedding,
        Role::Head => Part::Head,
        Role::Q | Role::K | Role::V | Role::O | Role::Sinks => Part::Attention,
        Role::QA | Role::QB | Role::KvA | Role::KvB => Part::Attention,
    }
}

struct List<'a> {
    spec: &'a ModelSpec,
    names: &'a TensorNames,
    items: Vec<Item>,
}

impl List<'_> {
    fn role(&mut self, part: Part, layer: Option<usize>, role: Role) {
        if let Some(shape) = role_shape(self.spec, role) {
            let name = fill(self.names.template(role), layer.unwrap_or(0), 0);
            self.items.push(Item { part, layer, expert: None, what: What::Role { name, shape } });
        }
    }

    fn mlp(
        &mut self,
        part: Part,
        layer: usize,
        expert: Option<usize>,
        names: &MlpNames,
        intermediate: usize,
        bias: bool,
    ) {
        let hidden = self.spec.hidden_size;
        let matrices = [
            (names.gate, intermediate, hidden),
            (names.up, intermediate, hidden),
            (names.down, hidden, intermediate),
        ];
        for (template, n, k) in matrices {
            let name = fill(template, layer, expert.unwrap_or(0));
            let what = What::Role { name, shape: RoleShape::Matrix { n, k, bias } };
            self.items.push(Item { part, layer: Some(layer), expert, what });
        }
    }

    fn moe(&mut self, layer: usize) {
        for role in MOE_ROLES {
            self.role(Part::Routers, Some(layer), role);
        }
        let moe = &self.spec.moe;
        match &self.names.experts {
            ExpertNames::PerExpert(names) => {
                for expert in 0..moe.experts {
                    self.mlp(Part::Experts, layer, Some(expert), names, moe.intermediate, moe.expert_bias);
                }
            }
            ExpertNames::FusedLinear { .. } | ExpertNames::FusedInterleaved { .. } => {
                for which in [MlpMatrix::Gate, MlpMatrix::Up, MlpMatrix::Down] {
                    let what = What::Fused(which);
                    self.items.push(Item { part: Part::Experts, layer: Some(layer), expert: None, what });
                }
            }
        }
        if let Some(shared) = moe.shared {
            self.mlp(Part::SharedExperts, layer, None, &self.names.shared, shared.intermediate, false);
        }
    }
}
