//! gpt-oss (`gpt_oss`): attention sinks, alternating sliding windows, biases everywhere, a clamped SwiGLU, and a
//! router whose softmax runs over the chosen experts only.

use super::basics::{Basics, Defaults, Parts, inverse_sqrt, sliding_layers};
use super::keys::{Keys, MAX_EXPERTS, MAX_POSITIONS};
use super::quantization::{self, Formats};
use super::rope::{self, RopeShape, mscale};
use super::routers;
use crate::spec::{Activation, Attention, ModelSpec, Moe, QkNorm, RopeScaling};
use crate::weights::names::{ExpertNames, TensorNames};

pub(super) const NAMES: TensorNames = TensorNames {
    router: "model.layers.{layer}.mlp.router",
    experts: ExpertNames::FusedInterleaved {
        gate_up: "model.layers.{layer}.mlp.experts.gate_up_proj",
        down: "model.layers.{layer}.mlp.experts.down_proj",
    },
    ..TensorNames::COMMON
};

/// Slope of the sigmoid in the activation; config.json does not carry it.
const ALPHA: f32 = 1.702;
const THETA: f64 = 150_000.0;
const DEFAULTS: Defaults = Defaults {
    vocab_size: 201_088,
    hidden_size: 2880,
    intermediate_size: 2880,
    num_hidden_layers: 36,
    num_attention_heads: 64,
    num_key_value_heads: Some(8),
    max_position_embeddings: 131_072,
    rms_norm_eps: 1e-5,
    eos_token_id: None,
};

pub(super) fn read(keys: &Keys) -> ModelSpec {
    let basics = Basics::read(keys, &DEFAULTS);
    let head_dim = if keys.mentions("head_dim") { basics.head_dim(keys) } else { 64 };
    let windows = windows(keys, basics.layers);
    let bias = keys.flag("attention_bias", true);
    let experts = keys.size(keys.either("num_local_experts", "num_experts"), 128, MAX_EXPERTS);
    let shape =
        RopeShape { absent: default_scaling(), ..RopeShape::plain(THETA, head_dim, basics.max_position) };
    let parts = Parts {
        family: "gpt_oss",
        attention: Attention::Gqa {
            heads: basics.heads,
            kv_heads: basics.kv_heads,
            head_dim,
            scale: inverse_sqrt(head_dim),
            qkv_bias: bias,
            out_bias: bias,
            qk_norm: QkNorm::Off,
            sinks: true,
            clip_qkv: None,
        },
        rope: rope::read(keys, &shape).rope,
        layers: basics.build_layers(|l| windows[l], |_| true),
        moe: Moe {
            experts,
            top_k: basics.top_k(keys, 4, experts),
            intermediate: basics.intermediate,
            activation: Activation::ClampedSwiglu {
                limit: keys.positive("swiglu_limit", 7.0) as f32,
                alpha: ALPHA,
            },
            expert_bias: true,
            router: routers::softmax_over_chosen(true),
            shared: None,
        },
        quantization: quantization::read(keys, Formats::Packed),
    };
    basics.into_spec(parts)
}

/// `layer_types`, or every even layer sliding.
fn windows(keys: &Keys, layers: usize) -> Vec<Option<usize>> {
    let window = keys.optional_size("sliding_window", Some(128), MAX_POSITIONS);
    let slides =
        sliding_layers(keys, layers).unwrap_or_else(|| (0..layers).map(|l| l.is_multiple_of(2)).collect());
    let needed = slides.contains(&true);
    keys.require(window.is_some() || !needed, "sliding_window", "a number, as layers slide", "null");
    slides.into_iter().map(|slides| window.filter(|_| slides)).collect()
}

fn default_scaling() -> RopeScaling {
    const FACTOR: f64 = 32.0;
    RopeScaling::Yarn {
        factor: FACTOR,
        original_max_position: 4096,
        beta_fast: 32.0,
        beta_slow: 1.0,
        truncate: false,
        attention_factor: mscale(FACTOR, 1.0),
    }
}
