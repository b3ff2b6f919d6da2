//! DeepSeek-V2 and -V2-Lite (`deepseek_v2`), DeepSeek-V3 and -R1 (`deepseek_v3`) and Kimi-K2 (`kimi_k2`, the same
//! architecture): multi-head latent attention, dense first layers, shared experts.
//!
//! `norm_topk_prob` of V2 is not read: transformers' class, which the golden outputs follow, never renormalises.
//! `moe_layer_freq` is read although that class has dropped it, because the published code has it.

use super::basics::{Basics, Defaults, Parts};
use super::keys::{Keys, MAX_EXPERTS, MAX_HIDDEN, MAX_LAYERS, MAX_WIDTH};
use super::quantization::{self, Formats};
use super::rope::{self, RopeShape};
use super::routers;
use crate::spec::{Activation, Attention, ExpertGroups, GroupScore, ModelSpec, Moe, Router, SharedExpert};
use crate::weights::names::TensorNames;

pub(super) const NAMES: TensorNames = TensorNames::COMMON;

/// Epsilon of the norms inside latent attention: the published code never passes `rms_norm_eps` there.
const LORA_NORM_EPS: f32 = 1e-6;
const THETA: f64 = 1e4;

/// What tells V2 from V3: defaults and the router.
struct Version {
    family: &'static str,
    defaults: Defaults,
    n_routed_experts: usize,
    n_shared_experts: usize,
    moe_intermediate_size: usize,
    num_experts_per_tok: usize,
    first_k_dense_replace: usize,
    /// Reads the router for so many experts and choices.
    router: fn(&Keys, usize, usize) -> Router,
}

const V2: Version = Version {
    family: "deepseek_v2",
    defaults: Defaults {
        vocab_size: 102_400,
        hidden_size: 4096,
        intermediate_size: 11008,
        num_hidden_layers: 32,
        num_attention_heads: 32,
        num_key_value_heads: None,
        max_position_embeddings: 2048,
        rms_norm_eps: 1e-6,
        eos_token_id: Some(2),
    },
    n_routed_experts: 64,
    n_shared_experts: 2,
    moe_intermediate_size: 1407,
    num_experts_per_tok: 1,
    first_k_dense_replace: 0,
    router: router_v2,
};

const V3: Version = Version {
    family: "deepseek_v3",
    defaults: Defaults {
        vocab_size: 129_280,
        hidden_size: 7168,
        intermediate_size: 18432,
        num_hidden_layers: 61,
        num_attention_heads: 128,
        num_key_value_heads: None,
        max_position_embeddings: 4096,
        rms_norm_eps: 1e-6,
        eos_token_id: Some(1),
    },
    n_routed_experts: 256,
    n_shared_experts: 1,
    moe_intermediate_size: 2048,
    num_experts_per_tok: 8,
    first_k_dense_replace: 3,
    router: router_v3,
};

pub(super) fn read_v2(keys: &Keys) -> ModelSpec {
    let top_k = "num_experts_per_tok";
    keys.require(keys.has(top_k), top_k, "a number (there is no default)", "nothing");
    // V2's rotary pairs are always interleaved.
    keys.only_flag("rope_interleave", true);
    keys.only_flag("mlp_bias", false);
    read(keys, &V2)
}

pub(super) fn read_v3(keys: &Keys) -> ModelSpec {
    // DeepSeek-V3.2's sparse attention under V3's name would compute something else.
    keys.absent("index_topk");
    read(keys, &V3)
}

fn read(keys: &Keys, version: &Version) -> ModelSpec {
    let basics = Basics::read(keys, &version.defaults);
    let expected = format!("num_attention_heads {}, as latent attention has it", basics.heads);
    keys.require(basics.kv_heads == basics.heads, "num_key_value_heads", expected, basics.kv_heads);

    let rope_dim = keys.size("qk_rope_head_dim", 64, MAX_WIDTH);
    let rotary = rope::read(
        keys,
        &RopeShape {
            interleaved: keys.flag("rope_interleave", true),
            ..RopeShape::plain(THETA, rope_dim, basics.max_position)
        },
    );
    let first_dense = keys.count("first_k_dense_replace", version.first_k_dense_replace, MAX_LAYERS);
    let every = keys.size("moe_layer_freq", 1, MAX_LAYERS);
    let parts = Parts {
        family: version.family,
        attention: attention(keys, &basics, rope_dim, rotary.mscale),
        rope: rotary.rope,
        layers: basics.build_layers(|_| None, |l| l >= first_dense && l.is_multiple_of(every)),
        moe: moe(keys, version, &basics),
        quantization: quantization::read(keys, Formats::PerMatrix),
    };
    basics.into_spec(parts)
}

fn attention(keys: &Keys, basics: &Basics, rope_dim: usize, mscale: f64) -> Attention {
    let nope_dim = keys.size("qk_nope_head_dim", 128, MAX_WIDTH);
    let v_dim = keys.size("v_head_dim", 128, MAX_WIDTH);
    let query = (nope_dim + rope_dim).saturating_mul(basics.heads);
    keys.require(query <= MAX_WIDTH, "qk_nope_head_dim", format!("all query heads <= {MAX_WIDTH}"), query);
    let value = v_dim.saturating_mul(basics.heads);
    keys.require(value <= MAX_WIDTH, "v_head_dim", format!("all value heads <= {MAX_WIDTH}"), value);
    let scale = (((nope_dim + rope_dim) as f64).powf(-0.5) * mscale * mscale) as f32;
    let usable = scale.is_finite() && scale > 0.0;
    keys.require(usable, "rope_scaling", "an attention scale that is finite and above 0", scale);
    Attention::Mla {
        heads: basics.heads,
        q_lora_rank: keys.optional_size("q_lora_rank", Some(1536), MAX_HIDDEN),
        kv_lora_rank: keys.size("kv_lora_rank", 512, MAX_HIDDEN),
        nope_dim,
        rope_dim,
        v_dim,
        scale,
        bias: keys.flag("attention_bias", false),
        lora_norm_eps: LORA_NORM_EPS,
    }
}

fn moe(keys: &Keys, version: &Version, basics: &Basics) -> Moe {
    let experts_key = keys.either("n_routed_experts", "num_local_experts");
    let experts = keys.size(experts_key, version.n_routed_experts, MAX_EXPERTS);
    let top_k = basics.top_k(keys, version.num_experts_per_tok, experts);
    let intermediate = keys.size("moe_intermediate_size", version.moe_intermediate_size, MAX_WIDTH);
    Moe {
        experts,
        top_k,
        intermediate,
        activation: Activation::SiluMul,
        expert_bias: false,
        router: (version.router)(keys, experts, top_k),
        shared: shared_experts(keys, version.n_shared_experts, intermediate),
    }
}

/// `n_shared_experts` of the routed experts' width, run as one; null or 0 is none.
pub(super) fn shared_experts(keys: &Keys, default: usize, width: usize) -> Option<SharedExpert> {
    let key = "n_shared_experts";
    let default = if keys.is_null(key) { 0 } else { default };
    let intermediate = keys.count(key, default, MAX_EXPERTS) * width;
    keys.require(intermediate <= MAX_WIDTH, key, format!("a width of at most {MAX_WIDTH}"), intermediate);
    (intermediate > 0).then_some(SharedExpert { intermediate, gated: false })
}

fn router_v2(keys: &Keys, experts: usize, top_k: usize) -> Router {
    keys.only_text("scoring_func", "softmax");
    let groups = match keys.text("topk_method").unwrap_or("greedy") {
        "greedy" => None,
        "group_limited_greedy" => {
            let default = ExpertGroups { count: 1, keep: 1, score: GroupScore::Max };
            routers::groups(keys, default, experts, top_k)
        }
        other => {
            keys.problem("topk_method", "greedy or group_limited_greedy", other);
            None
        }
    };
    let scale = keys.positive("routed_scaling_factor", 1.0) as f32;
    Router { groups, scale, ..routers::softmax(false) }
}

fn router_v3(keys: &Keys, experts: usize, top_k: usize) -> Router {
    keys.only_text("scoring_func", "sigmoid");
    keys.only_text("topk_method", "noaux_tc");
    let default = ExpertGroups { count: 8, keep: 4, score: GroupScore::Top2Sum };
    let groups = routers::groups(keys, default, experts, top_k);
    let scale = keys.positive("routed_scaling_factor", 2.5) as f32;
    Router { scale, ..routers::noaux(keys, groups) }
}
