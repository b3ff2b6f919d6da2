//! Phi-3.5-MoE (`phimoe`): mean-and-variance norms with biases, LongRoPE with its own factors for cosines and sines,
//! the top-2 sparsemixer, a bias on the head.

use super::basics::{Basics, Defaults, Parts, inverse_sqrt};
use super::keys::{Keys, MAX_EXPERTS, MAX_POSITIONS};
use super::mixtral;
use super::quantization::{self, Formats};
use super::rope::{self, RopeShape};
use super::routers;
use crate::spec::{Activation, Attention, ModelSpec, Moe, Norm, NormKind, QkNorm, Router, Score};
use crate::weights::names::TensorNames;

/// Mixtral's.
pub(super) const NAMES: TensorNames = mixtral::NAMES;

const THETA: f64 = 1e6;
const DEFAULTS: Defaults = Defaults {
    vocab_size: 32064,
    hidden_size: 4096,
    intermediate_size: 6400,
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
    let bias = keys.flag("attention_bias", false);
    let shape = RopeShape { own_mscale: true, ..RopeShape::plain(THETA, head_dim, basics.max_position) };
    let parts = Parts {
        family: "phimoe",
        attention: Attention::Gqa {
            heads: basics.heads,
            kv_heads: basics.kv_heads,
            head_dim,
            scale: inverse_sqrt(head_dim),
            qkv_bias: bias,
            out_bias: bias,
            qk_norm: QkNorm::Off,
            sinks: false,
            clip_qkv: None,
        },
        rope: rope::read(keys, &shape).rope,
        layers: basics.build_layers(|_| window, |_| true),
        moe: moe(keys, &basics),
        quantization: quantization::read(keys, Formats::PerMatrix),
    };
    let norm = Norm { kind: NormKind::Layer, eps: basics.norm_eps };
    ModelSpec { norm, lm_head_bias: keys.flag("lm_head_bias", false), ..basics.into_spec(parts) }
}

fn moe(keys: &Keys, basics: &Basics) -> Moe {
    let experts = keys.size(keys.either("num_local_experts", "num_experts"), 16, MAX_EXPERTS);
    let top_k = basics.top_k(keys, 2, experts);
    keys.require(top_k == 2, "num_experts_per_tok", "2, what the sparsemixer chooses", top_k);
    let epsilon = keys.number("router_jitter_noise", 0.01);
    keys.require(epsilon >= 0.0, "router_jitter_noise", "a number of at least 0", epsilon);
    Moe {
        experts,
        top_k,
        intermediate: basics.intermediate,
        activation: Activation::SiluMul,
        expert_bias: false,
        router: Router { score: Score::SparseMixer { epsilon: epsilon as f32 }, ..routers::softmax(false) },
        shared: None,
    }
}
