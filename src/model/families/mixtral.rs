//! Mixtral (`mixtral`): softmax over all experts, top-k, renormalised; plain GQA.

use super::basics::{Basics, Defaults, Parts, inverse_sqrt};
use super::keys::{Keys, MAX_EXPERTS, MAX_POSITIONS};
use super::quantization::{self, Formats};
use super::rope::{self, RopeShape};
use super::routers;
use crate::spec::{Activation, Attention, ModelSpec, Moe, QkNorm};
use crate::weights::names::{ExpertNames, MlpNames, TensorNames};

/// w1 is the gate, w3 the up and w2 the down matrix.
pub(super) const NAMES: TensorNames = TensorNames {
    router: "model.layers.{layer}.block_sparse_moe.gate",
    experts: ExpertNames::PerExpert(MlpNames {
        gate: "model.layers.{layer}.block_sparse_moe.experts.{expert}.w1",
        up: "model.layers.{layer}.block_sparse_moe.experts.{expert}.w3",
        down: "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2",
    }),
    ..TensorNames::COMMON
};

const THETA: f64 = 1e6;
const DEFAULTS: Defaults = Defaults {
    vocab_size: 32000,
    hidden_size: 4096,
    intermediate_size: 14336,
    num_hidden_layers: 32,
    num_attention_heads: 32,
    num_key_value_heads: Some(8),
    max_position_embeddings: 131_072,
    rms_norm_eps: 1e-5,
    eos_token_id: Some(2),
};

pub(super) fn read(keys: &Keys) -> ModelSpec {
    let basics = Basics::read(keys, &DEFAULTS);
    let head_dim = basics.head_dim(keys);
    let window = keys.optional_size("sliding_window", None, MAX_POSITIONS);
    let experts = keys.size(keys.either("num_local_experts", "num_experts"), 8, MAX_EXPERTS);
    let shape = RopeShape::plain(THETA, head_dim, basics.max_position);
    let parts = Parts {
        family: "mixtral",
        attention: Attention::Gqa {
            heads: basics.heads,
            kv_heads: basics.kv_heads,
            head_dim,
            scale: inverse_sqrt(head_dim),
            qkv_bias: false,
            out_bias: false,
            qk_norm: QkNorm::Off,
            sinks: false,
            clip_qkv: None,
        },
        rope: rope::read(keys, &shape).rope,
        layers: basics.build_layers(|_| window, |_| true),
        moe: Moe {
            experts,
            top_k: basics.top_k(keys, 2, experts),
            intermediate: basics.intermediate,
            activation: Activation::SiluMul,
            expert_bias: false,
            router: routers::softmax(true),
            shared: None,
        },
        quantization: quantization::read(keys, Formats::PerMatrix),
    };
    basics.into_spec(parts)
}
