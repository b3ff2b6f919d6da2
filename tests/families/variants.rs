//! Other shapes of the same families: keys that are absent, that are there, or that mean something else than in the fixtures.

use moeyard::model::families::known;
use moeyard::spec::*;
use serde_json::{Value, json};

use super::fixtures::FIXTURES;
use super::{config, refused, spec, with, without};

/// Whether each layer is a MoE layer.
fn moe_layers(config: &Value) -> Vec<bool> {
    spec(config).layers.iter().map(|l| l.ffn == FeedForward::Moe).collect()
}

fn windows(config: &Value) -> Vec<Option<usize>> {
    spec(config).layers.iter().map(|l| l.window).collect()
}

#[test]
fn windows_follow_transformers() {
    assert_eq!(windows(&with("mixtral", json!({"sliding_window": 7}))), [Some(7); 2]);
    assert_eq!(windows(&with("qwen3_moe", json!({"sliding_window": 9}))), [None; 3]);
    let on = json!({"sliding_window": 9, "use_sliding_window": true, "max_window_layers": 1});
    assert_eq!(windows(&with("qwen3_moe", on)), [Some(9); 3]);
    let on = json!({"num_hidden_layers": 5, "sliding_window": 9, "use_sliding_window": true, "max_window_layers": 3});
    assert_eq!(windows(&with("qwen2_moe", on)), [Some(9), None, Some(9), None, None]);
    // What transformers 5 writes for a model without windows.
    let off = json!({"sliding_window": 0, "use_sliding_window": false, "layer_types": ["full_attention", "full_attention"]});
    assert_eq!(windows(&with("qwen2_moe", off)), [None; 2]);
    refused(
        &with("qwen2_moe", json!({"sliding_window": 0, "use_sliding_window": true})),
        &["sliding_window: expected an integer from 1"],
    );
    let types = json!({"sliding_window": 9, "use_sliding_window": true,
        "layer_types": ["full_attention", "sliding_attention"]});
    assert_eq!(windows(&with("qwen2_moe", types)), [None, Some(9)]);
    assert_eq!(windows(&without("gpt_oss", &["layer_types", "sliding_window"])), [Some(128), None]);
}

#[test]
fn which_layers_have_experts() {
    for first in 0..3 {
        let layers = moe_layers(&with("deepseek_v3", json!({"first_k_dense_replace": first})));
        assert_eq!(layers, [first <= 0, first <= 1, true]);
    }
    let every_other = json!({"first_k_dense_replace": 1, "moe_layer_freq": 2, "num_hidden_layers": 5});
    assert_eq!(moe_layers(&with("deepseek_v3", every_other)), [false, false, true, false, true]);
    let sparse = json!({"decoder_sparse_step": 2, "num_hidden_layers": 4, "mlp_only_layers": [3]});
    assert_eq!(moe_layers(&with("qwen2_moe", sparse)), [false, true, false, false]);
    let dense = json!({"mlp_only_layers": [0, 2]});
    assert_eq!(moe_layers(&with("qwen3_moe", dense)), [false, true, false]);
}

#[test]
fn routers_of_other_shapes() {
    let top1 = spec(&with("mixtral", json!({"num_local_experts": 7, "num_experts_per_tok": 1}))).moe;
    assert_eq!((top1.experts, top1.top_k), (7, 1));
    let plain = spec(&with("deepseek_v3", json!({"norm_topk_prob": false, "n_group": 1, "topk_group": 1})));
    assert_eq!((plain.moe.router.renormalize, plain.moe.router.groups), (Renormalize::Off, None));
    let renormalised = spec(&with("qwen2_moe", json!({"norm_topk_prob": true}))).moe.router.renormalize;
    assert_eq!(renormalised, Renormalize::Sum { eps: 0.0 });
    assert_eq!(spec(&without("qwen3_moe", &["norm_topk_prob"])).moe.router.renormalize, Renormalize::Off);
    for none in [json!(null), json!(0)] {
        assert_eq!(spec(&with("deepseek_v3", json!({"n_shared_experts": none}))).moe.shared, None);
    }
    assert_eq!(
        spec(&without("deepseek_v3", &["n_shared_experts"])).moe.shared,
        Some(SharedExpert { intermediate: 24, gated: false })
    );
}

#[test]
fn attention_of_other_shapes() {
    let wide = spec(&with("mixtral", json!({"head_dim": 24})));
    assert!(matches!(wide.attention, Attention::Gqa { head_dim: 24, .. }));
    assert_eq!(wide.rope.dim, 24);
    assert_eq!(spec(&with("mixtral", json!({"head_dim": null}))), spec(&config("mixtral")));
    let bias = spec(&with("qwen3_moe", json!({"attention_bias": true}))).attention;
    assert!(matches!(bias, Attention::Gqa { qkv_bias: true, out_bias: true, .. }));
    let off = spec(&with("qwen2_moe", json!({"qkv_bias": false}))).attention;
    assert!(matches!(off, Attention::Gqa { qkv_bias: false, .. }));
    let mla = spec(&with("deepseek_v3", json!({"attention_bias": true, "rope_interleave": false})));
    assert!(matches!(mla.attention, Attention::Mla { bias: true, .. }));
    assert!(!mla.rope.interleaved);
    let absent = spec(&without("deepseek_v3", &["q_lora_rank"])).attention;
    assert!(matches!(absent, Attention::Mla { q_lora_rank: Some(1536), .. }));
    let clip = spec(&with("olmoe", json!({"clip_qkv": 8.0}))).attention;
    assert!(matches!(clip, Attention::Gqa { clip_qkv: Some(8.0), .. }));
}

#[test]
fn both_forms_of_rope_agree() {
    for name in FIXTURES {
        let old = config(name);
        let mut new = old.clone();
        let keys = new.as_object_mut().unwrap();
        let mut parameters = match keys.shift_remove("rope_scaling") {
            Some(Value::Object(scaling)) => scaling,
            _ => serde_json::Map::from_iter([("rope_type".to_owned(), json!("default"))]),
        };
        if let Some(kind) = parameters.shift_remove("type") {
            parameters.insert("rope_type".to_owned(), kind);
        }
        parameters.insert("rope_theta".to_owned(), keys.shift_remove("rope_theta").unwrap());
        if let Some(partial) = keys.shift_remove("partial_rotary_factor") {
            parameters.insert("partial_rotary_factor".to_owned(), partial);
        }
        keys.insert("rope_parameters".to_owned(), Value::Object(parameters));
        assert_eq!(spec(&new), spec(&old), "{name}");
    }
}

#[test]
fn rope_defaults() {
    assert_eq!(spec(&without("mixtral", &["rope_theta"])).rope.theta, 1e6);
    assert_eq!(spec(&without("olmoe", &["rope_theta"])).rope.theta, 1e4);
    assert_eq!(
        spec(&without("gpt_oss", &["rope_theta", "rope_scaling"])).rope,
        spec(&config("gpt_oss")).rope
    );
    let linear = json!({"rope_scaling": {"type": "linear", "factor": 4.0}});
    assert_eq!(spec(&with("qwen3_moe", linear)).rope.scaling, RopeScaling::Linear { factor: 4.0 });
    let yarn = json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5}});
    let RopeScaling::Yarn { original_max_position, attention_factor, .. } =
        spec(&with("qwen3_moe", yarn)).rope.scaling
    else {
        panic!()
    };
    assert_eq!((original_max_position, attention_factor), (40960, 1.5));
}

#[test]
fn end_tokens() {
    assert_eq!(spec(&with("mixtral", json!({"eos_token_id": [3, 4]}))).eos_token_ids, [3, 4]);
    assert!(spec(&with("mixtral", json!({"eos_token_id": null}))).eos_token_ids.is_empty());
    assert_eq!(spec(&without("mixtral", &["eos_token_id"])).eos_token_ids, [2]);
}

#[test]
fn quantisation_settings() {
    let of = |fixture, key: &str, value: Value| {
        let mut config = config(fixture);
        config["quantization_config"][key] = value;
        spec(&config).quantization.unwrap()
    };
    assert_eq!(of("mixtral_gptq", "group_size", json!(-1)), Quantization::Gptq { group_size: None });
    assert_eq!(of("mixtral_gptq", "group_size", json!(64)), Quantization::Gptq { group_size: Some(64) });
    assert_eq!(of("mixtral_awq", "group_size", json!(-1)), Quantization::Awq { group_size: None });
    assert_eq!(of("mixtral_awq", "version", json!("GEMM")), Quantization::Awq { group_size: Some(32) });
    let block = of("deepseek_v3_fp8", "weight_block_size", json!([64, 32]));
    assert_eq!(block, Quantization::Fp8Block { block: [64, 32] });
    let mxfp4 =
        json!({"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}});
    assert_eq!(spec(&with("gpt_oss", mxfp4)).quantization, Some(Quantization::Mxfp4));
}

#[test]
fn families_are_found_by_type_or_architecture() {
    let kimi = json!({"model_type": "kimi_k2", "n_group": 1, "topk_group": 1});
    assert_eq!(spec(&with("deepseek_v3", kimi)).family, "deepseek_v3");
    assert_eq!(spec(&without("phimoe", &["model_type"])).family, "phimoe");
    assert_eq!(spec(&without("phimoe", &["architectures"])).family, "phimoe");
    assert_eq!(known().len(), 11);
}
