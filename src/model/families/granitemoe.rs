//! Granite-MoE (`granitemoe`): scaled embeddings, attention, residuals and logits; a router whose softmax runs over
//! the chosen experts only; the experts of a layer in two tensors.

use super::basics::{Basics, Defaults, Parts};
use super::keys::{Keys, MAX_EXPERTS};
use super::quantization::{self, Formats};
use super::rope::{self, RopeShape};
use super::routers;
use crate::spec::{Activation, Attention, ModelSpec, Moe, QkNorm};
use crate::weights::names::{ExpertNames, TensorNames};

pub(super) const NAMES: TensorNames = TensorNames {
    router: "model.layers.{layer}.block_sparse_moe.router.layer",
    experts: ExpertNames::FusedLinear {
        gate_up: "model.layers.{layer}.block_sparse_moe.input_linear.weight",
        down: "model.layers.{layer}.block_sparse_moe.output_linear.weight",
    },
    ..TensorNames::COMMON
};

const THETA: f64 = 1e4;
const DEFAULTS: Defaults = Defaults {
    vocab_size: 32000,
    hidden_size: 4096,
    intermediate_size: 11008,
    num_hidden_layers: 32,
    num_attention_heads: 32,
    num_key_value_heads: None,
    max_position_embeddings: 2048,
    rms_norm_eps: 1e-6,
    eos_token_id: Some(2),
};

pub(super) fn read(keys: &Keys) -> ModelSpec {
    let basics = Basics::read(keys, &DEFAULTS);
    let head_dim = basics.head_dim(keys);
    let bias = keys.flag("attention_bias", false);
    let experts = keys.size(keys.either("num_local_experts", "num_experts"), 8, MAX_EXPERTS);
    let shape = RopeShape::plain(THETA, head_dim, basics.max_position);
    let parts = Parts {
        family: "granitemoe",
        attention: Attention::Gqa {
            heads: basics.heads,
            kv_heads: basics.kv_heads,
            head_dim,
            scale: keys.positive("attention_multiplier", 1.0) as f32,
            qkv_bias: bias,
            out_bias: bias,
            qk_norm: QkNorm::Off,
            sinks: false,
            clip_qkv: None,
        },
        rope: rope::read(keys, &shape).rope,
        layers: basics.build_layers(|_| None, |_| true),
        moe: Moe {
            experts,
            top_k: basics.top_k(keys, 2, experts),
            intermediate: basics.intermediate,
            activation: Activation::SiluMul,
            expert_bias: false,
            router: routers::softmax_over_chosen(false),
            shared: None,
        },
        quantization: quantization::read(keys, Formats::Plain),
    };
    ModelSpec {
        embedding_scale: keys.positive("embedding_multiplier", 1.0) as f32,
        residual_scale: keys.positive("residual_multiplier", 1.0) as f32,
        logits_scale: logits_scale(keys),
        ..basics.into_spec(parts)
    }
}

/// The file holds a divisor.
fn logits_scale(keys: &Keys) -> f32 {
    let scaling = keys.positive("logits_scaling", 1.0);
    let scale = (1.0 / scaling) as f32;
    let usable = scale.is_finite() && scale > 0.0;
    keys.require(usable, "logits_scaling", "a divisor whose inverse is a finite f32 above 0", scaling);
    scale
}
