//! OLMoE (`olmoe`): softmax router without renormalisation, norms over all query and all key heads together,
//! optionally clamped queries, keys and values.

use super::basics::{Basics, Defaults, Parts, inverse_sqrt};
use super::keys::{Keys, MAX_EXPERTS};
use super::quantization::{self, Formats};
use super::rope::{self, RopeShape};
use super::routers;
use crate::spec::{Activation, Attention, ModelSpec, Moe, QkNorm};

const THETA: f64 = 1e4;
const DEFAULTS: Defaults = Defaults {
    vocab_size: 50304,
    hidden_size: 2048,
    intermediate_size: 2048,
    num_hidden_layers: 16,
    num_attention_heads: 16,
    num_key_value_heads: None,
    max_position_embeddings: 4096,
    rms_norm_eps: 1e-5,
    eos_token_id: Some(50279),
};

pub(super) fn read(keys: &Keys) -> ModelSpec {
    let basics = Basics::read(keys, &DEFAULTS);
    let head_dim = basics.head_dim(keys);
    let width = basics.heads.saturating_mul(head_dim);
    // The published class gives the query norm the hidden width.
    let expected = format!("hidden_size {} / num_attention_heads {}", basics.hidden, basics.heads);
    keys.require(width == basics.hidden, "head_dim", expected, head_dim);
    let bias = keys.flag("attention_bias", false);
    let experts = keys.size(keys.either("num_experts", "num_local_experts"), 64, MAX_EXPERTS);
    let shape = RopeShape::plain(THETA, head_dim, basics.max_position);
    let parts = Parts {
        family: "olmoe",
        attention: Attention::Gqa {
            heads: basics.heads,
            kv_heads: basics.kv_heads,
            head_dim,
            scale: inverse_sqrt(head_dim),
            qkv_bias: bias,
            out_bias: bias,
            qk_norm: QkNorm::FullWidth,
            sinks: false,
            clip_qkv: keys.optional_positive("clip_qkv").map(|x| x as f32),
        },
        rope: rope::read(keys, &shape).rope,
        layers: basics.build_layers(|_| None, |_| true),
        moe: Moe {
            experts,
            top_k: basics.top_k(keys, 8, experts),
            intermediate: basics.intermediate,
            activation: Activation::SiluMul,
            expert_bias: false,
            router: routers::softmax(keys.flag("norm_topk_prob", false)),
            shared: None,
        },
        quantization: quantization::read(keys, Formats::PerMatrix),
    };
    basics.into_spec(parts)
}
