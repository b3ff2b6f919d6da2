//! Qwen2-MoE (`qwen2_moe`: query/key/value biases, a gated shared expert) and Qwen3-MoE (`qwen3_moe`: norms of query
//! and key heads, no shared expert). Softmax router; weights are renormalised only where `norm_topk_prob` says so.

use super::basics::{Basics, Defaults, Parts, inverse_sqrt, sliding_layers};
use super::keys::{Keys, MAX_EXPERTS, MAX_LAYERS, MAX_POSITIONS, MAX_WIDTH};
use super::quantization::{self, Formats};
use super::rope::{self, RopeShape};
use super::routers;
use crate::spec::{Activation, Attention, ModelSpec, Moe, QkNorm, SharedExpert};
use crate::weights::names::{MlpNames, TensorNames};

pub(super) const NAMES: TensorNames = TensorNames {
    shared: MlpNames {
        gate: "model.layers.{layer}.mlp.shared_expert.gate_proj",
        up: "model.layers.{layer}.mlp.shared_expert.up_proj",
        down: "model.layers.{layer}.mlp.shared_expert.down_proj",
    },
    ..TensorNames::COMMON
};

const THETA: f64 = 1e4;

const QWEN2: Defaults = Defaults {
    vocab_size: 151_936,
    hidden_size: 2048,
    intermediate_size: 5632,
    num_hidden_layers: 24,
    num_attention_heads: 16,
    num_key_value_heads: Some(16),
    max_position_embeddings: 32768,
    rms_norm_eps: 1e-6,
    eos_token_id: None,
};

const QWEN3: Defaults = Defaults {
    vocab_size: 151_936,
    hidden_size: 2048,
    intermediate_size: 6144,
    num_hidden_layers: 24,
    num_attention_heads: 32,
    num_key_value_heads: Some(4),
    max_position_embeddings: 32768,
    rms_norm_eps: 1e-6,
    eos_token_id: None,
};

/// What differs between the two once it is read.
struct Variant {
    family: &'static str,
    qkv_bias: bool,
    out_bias: bool,
    qk_norm: QkNorm,
    /// Window of each layer.
    windows: Vec<Option<usize>>,
    experts: usize,
    top_k: usize,
    moe_intermediate: usize,
    shared: Option<SharedExpert>,
}

pub(super) fn read_qwen2(keys: &Keys) -> ModelSpec {
    let basics = Basics::read(keys, &QWEN2);
    let experts = keys.size(keys.either("num_experts", "num_local_experts"), 60, MAX_EXPERTS);
    let shared = keys.count("shared_expert_intermediate_size", 5632, MAX_WIDTH);
    let variant = Variant {
        family: "qwen2_moe",
        qkv_bias: keys.flag("qkv_bias", true),
        out_bias: false,
        qk_norm: QkNorm::Off,
        windows: qwen2_windows(keys, basics.layers),
        experts,
        top_k: basics.top_k(keys, 4, experts),
        moe_intermediate: keys.size("moe_intermediate_size", 1408, MAX_WIDTH),
        shared: (shared > 0).then_some(SharedExpert { intermediate: shared, gated: true }),
    };
    finish(keys, basics, variant)
}

pub(super) fn read_qwen3(keys: &Keys) -> ModelSpec {
    let basics = Basics::read(keys, &QWEN3);
    let experts = keys.size(keys.either("num_experts", "num_local_experts"), 128, MAX_EXPERTS);
    let bias = keys.flag("attention_bias", false);
    let variant = Variant {
        family: "qwen3_moe",
        qkv_bias: bias,
        out_bias: bias,
        qk_norm: QkNorm::PerHead,
        // All layers slide or none: this class does not look at `max_window_layers`.
        windows: vec![window(keys); basics.layers],
        experts,
        top_k: basics.top_k(keys, 8, experts),
        moe_intermediate: keys.size("moe_intermediate_size", 768, MAX_WIDTH),
        shared: None,
    };
    finish(keys, basics, variant)
}

/// `sliding_window`, which is looked at only with `use_sliding_window`: without it transformers 5 may write 0 there.
fn window(keys: &Keys) -> Option<usize> {
    let slides = keys.flag("use_sliding_window", false);
    if slides { keys.optional_size("sliding_window", Some(4096), MAX_POSITIONS) } else { None }
}

/// Without `layer_types`, transformers lets the even layers below `max_window_layers` slide.
fn qwen2_windows(keys: &Keys, layers: usize) -> Vec<Option<usize>> {
    let window = window(keys);
    let below = keys.count("max_window_layers", 28, MAX_POSITIONS);
    let slides = sliding_layers(keys, layers).unwrap_or_else(|| {
        (0..layers).map(|l| window.is_some() && l.is_multiple_of(2) && l < below).collect()
    });
    keys.require(
        window.is_some() || !slides.contains(&true),
        "sliding_window",
        "a number, with use_sliding_window true, as layer_types has sliding layers",
        "no window",
    );
    slides.into_iter().map(|slides| window.filter(|_| slides)).collect()
}

fn finish(keys: &Keys, basics: Basics, variant: Variant) -> ModelSpec {
    let head_dim = basics.head_dim(keys);
    let shape = RopeShape::plain(THETA, head_dim, basics.max_position);
    let step = keys.size("decoder_sparse_step", 1, MAX_LAYERS);
    let dense_only = keys.integers("mlp_only_layers", MAX_LAYERS);
    let is_moe = |l: usize| (l + 1).is_multiple_of(step) && !dense_only.contains(&l);
    let parts = Parts {
        family: variant.family,
        attention: Attention::Gqa {
            heads: basics.heads,
            kv_heads: basics.kv_heads,
            head_dim,
            scale: inverse_sqrt(head_dim),
            qkv_bias: variant.qkv_bias,
            out_bias: variant.out_bias,
            qk_norm: variant.qk_norm,
            sinks: false,
            clip_qkv: None,
        },
        rope: rope::read(keys, &shape).rope,
        layers: basics.build_layers(|l| variant.windows[l], is_moe),
        moe: Moe {
            experts: variant.experts,
            top_k: variant.top_k,
            intermediate: variant.moe_intermediate,
            activation: Activation::SiluMul,
            expert_bias: false,
            router: routers::softmax(keys.flag("norm_topk_prob", false)),
            shared: variant.shared,
        },
        quantization: quantization::read(keys, Formats::PerMatrix),
    };
    basics.into_spec(parts)
}
