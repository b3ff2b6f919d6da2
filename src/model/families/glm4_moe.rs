//! GLM-4.5 (`glm4_moe`): DeepSeek-V3's router over GQA with partial rotary and optional norms of query and key heads.

use super::basics::{Basics, Defaults, Parts, inverse_sqrt};
use super::deepseek::shared_experts;
use super::keys::{Keys, MAX_EXPERTS, MAX_LAYERS, MAX_WIDTH};
use super::quantization::{self, Formats};
use super::rope::{self, RopeShape};
use super::routers;
use crate::spec::{Activation, Attention, ExpertGroups, GroupScore, ModelSpec, Moe, QkNorm, Router};

const THETA: f64 = 1e4;
const DEFAULTS: Defaults = Defaults {
    vocab_size: 151_552,
    hidden_size: 4096,
    intermediate_size: 10944,
    num_hidden_layers: 46,
    num_attention_heads: 96,
    num_key_value_heads: Some(8),
    max_position_embeddings: 131_072,
    rms_norm_eps: 1e-5,
    eos_token_id: None,
};

pub(super) fn read(keys: &Keys) -> ModelSpec {
    let basics = Basics::read(keys, &DEFAULTS);
    let head_dim = basics.head_dim(keys);
    let shape = RopeShape { partial: Some(0.5), ..RopeShape::plain(THETA, head_dim, basics.max_position) };
    let first_dense = keys.count("first_k_dense_replace", 1, MAX_LAYERS);
    let parts = Parts {
        family: "glm4_moe",
        attention: Attention::Gqa {
            heads: basics.heads,
            kv_heads: basics.kv_heads,
            head_dim,
            scale: inverse_sqrt(head_dim),
            qkv_bias: keys.flag("attention_bias", false),
            out_bias: false,
            qk_norm: if keys.flag("use_qk_norm", false) { QkNorm::PerHead } else { QkNorm::Off },
            sinks: false,
            clip_qkv: None,
        },
        rope: rope::read(keys, &shape).rope,
        layers: basics.build_layers(|_| None, |l| l >= first_dense),
        moe: moe(keys, &basics),
        quantization: quantization::read(keys, Formats::PerMatrix),
    };
    basics.into_spec(parts)
}

fn moe(keys: &Keys, basics: &Basics) -> Moe {
    let experts = keys.size(keys.either("n_routed_experts", "num_local_experts"), 128, MAX_EXPERTS);
    let top_k = basics.top_k(keys, 8, experts);
    let intermediate = keys.size("moe_intermediate_size", 1408, MAX_WIDTH);
    let default = ExpertGroups { count: 1, keep: 1, score: GroupScore::Top2Sum };
    let groups = routers::groups(keys, default, experts, top_k);
    let scale = keys.positive("routed_scaling_factor", 1.0) as f32;
    Moe {
        experts,
        top_k,
        intermediate,
        activation: Activation::SiluMul,
        expert_bias: false,
        router: Router { scale, ..routers::noaux(keys, groups) },
        shared: shared_experts(keys, 1, intermediate),
    }
}
