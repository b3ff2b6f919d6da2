//! What is refused, by name; and no config.json makes it panic.

use moeyard::Error;
use moeyard::model::families::resolve;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::fixtures::FIXTURES;
use super::{config, problems, refused, with, without};

#[test]
fn unknown_architectures_are_refused_with_the_known_ones() {
    let v32 = json!({"model_type": "deepseek_v32", "architectures": ["DeepseekV32ForCausalLM"]});
    let found = problems(&with("deepseek_v3", v32));
    assert_eq!(
        found,
        [
            "model_type: expected one of mixtral, deepseek_v2, deepseek_v3, kimi_k2, qwen2_moe, qwen3_moe, olmoe, \
          glm4_moe, gpt_oss, granitemoe, phimoe, found deepseek_v32"
        ]
    );
    let other_head = json!({"architectures": ["MixtralForSequenceClassification"]});
    refused(
        &with("mixtral", other_head),
        &["architectures: expected MixtralForCausalLM, found MixtralForSequenceClassification"],
    );
    refused(&json!({}), &["found nothing, and no architectures either"]);
    refused(&json!([1]), &["expected a JSON object, found [1]"]);
    let Err(Error::Checkpoint(broken)) = resolve(b"{\"model_type\": ") else { panic!() };
    assert!(broken.to_string().contains("expected a JSON object, found EOF"), "{broken}");
}

#[test]
fn settings_the_engine_does_not_compute_are_refused_by_name() {
    refused(&with("mixtral", json!({"hidden_act": "gelu"})), &["hidden_act: expected silu, found gelu"]);
    let dynamic = json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}});
    refused(
        &with("mixtral", dynamic),
        &["rope_scaling.type: expected one of default, linear, yarn, longrope, found dynamic"],
    );
    let nested = json!({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}});
    refused(&with("qwen2_moe", nested), &["rope_parameters.full_attention: expected no such key"]);
    refused(&with("mixtral", json!({"partial_rotary_factor": 0.5})), &["partial_rotary_factor: expected 1"]);
    refused(&with("deepseek_v3", json!({"topk_method": "greedy"})), &["topk_method: expected noaux_tc"]);
    refused(&with("deepseek_v3", json!({"scoring_func": "softmax"})), &["scoring_func: expected sigmoid"]);
    refused(&with("deepseek_v3", json!({"index_topk": 2048})), &["index_topk: expected no such key"]);
    refused(&with("deepseek_v2", json!({"mlp_bias": true})), &["mlp_bias: expected false"]);
    refused(&with("deepseek_v2", json!({"topk_method": "noaux_tc"})), &["topk_method: expected greedy or"]);
    refused(&with("phimoe", json!({"num_experts_per_tok": 3})), &["num_experts_per_tok: expected 2"]);
    let quantised = |fixture, key: &str, value: Value, part: &str| {
        let mut config = config(fixture);
        config["quantization_config"][key] = value;
        refused(&config, &[part]);
    };
    quantised("mixtral_gptq", "bits", json!(8), "quantization_config.bits: expected 4, found 8");
    quantised("mixtral_gptq", "checkpoint_format", json!("gptq_v2"), "checkpoint_format: expected gptq");
    quantised("mixtral_awq", "version", json!("gemv"), "version: expected gemm, found gemv");
    quantised(
        "mixtral_awq",
        "quant_method",
        json!("bitsandbytes"),
        "expected one of fp8, awq, gptq, found bits",
    );
    quantised("deepseek_v3_fp8", "fmt", json!("e5m2"), "fmt: expected e4m3, found e5m2");
    quantised("deepseek_v3_fp8", "weight_block_size", json!(null), "weight_block_size");
    let awq = config("mixtral_awq")["quantization_config"].clone();
    refused(&with("granitemoe", json!({"quantization_config": awq})), &["no quantisation in this family"]);
}

#[test]
fn contradictions_are_refused_all_at_once() {
    let many = json!({
        "num_experts_per_tok": 9,
        "num_key_value_heads": 3,
        "sliding_window": 0,
        "rms_norm_eps": "small",
        "vocab_size": 1u64 << 40,
    });
    refused(
        &with("mixtral", many),
        &[
            "num_experts_per_tok: expected at most 8, the number of experts, found 9",
            "num_key_value_heads: expected a divisor of num_attention_heads 4, found 3",
            "sliding_window: expected an integer from 1 to 2147483648, found 0",
            "rms_norm_eps: expected a finite number above 0, found \"small\"",
            "vocab_size: expected an integer from 1 to 16777216, found 1099511627776",
        ],
    );
    refused(&with("deepseek_v3", json!({"n_group": 3})), &["n_group: expected a divisor of the 16 experts"]);
    refused(&with("deepseek_v3", json!({"topk_group": 5})), &["topk_group: expected at most n_group 4"]);
    refused(&with("deepseek_v3", json!({"n_group": 16, "topk_group": 4})), &["groups of at least 2 experts"]);
    refused(
        &with("deepseek_v3", json!({"num_experts_per_tok": 9})),
        &["num_experts_per_tok: expected at most 8, the experts of 2 groups, found 9"],
    );
    refused(&with("deepseek_v3", json!({"num_key_value_heads": 2})), &["num_key_value_heads"]);
    refused(&with("mixtral", json!({"head_dim": 15})), &["head_dim: expected an even number of rotating"]);
    refused(&with("mixtral", json!({"hidden_size": 66})), &["there is no head_dim"]);
    refused(&with("olmoe", json!({"head_dim": 32})), &["head_dim: expected hidden_size 64"]);
    refused(&with("deepseek_v3", json!({"first_k_dense_replace": 3})), &["at least one layer with experts"]);
    refused(&with("gpt_oss", json!({"layer_types": ["full_attention"]})), &["2 entries, one per layer"]);
    refused(&with("gpt_oss", json!({"sliding_window": null})), &["sliding_window"]);
    refused(&with("qwen2_moe", json!({"decoder_sparse_step": 0})), &["decoder_sparse_step"]);
    refused(&without("deepseek_v2", &["num_experts_per_tok"]), &["num_experts_per_tok"]);
    let mut phi = config("phimoe");
    phi["rope_scaling"]["short_factor"] = json!([1.0]);
    phi["rope_scaling"]["long_mscale"] = json!(null);
    phi["rope_scaling"]["original_max_position_embeddings"] = json!(2048);
    refused(
        &phi,
        &[
            "rope_scaling.short_factor: expected 8 numbers, found 1",
            "rope_scaling.long_mscale: expected a number above 0, found nothing",
            "original_max_position_embeddings: expected 4096, as at the top of the file, found 2048",
        ],
    );
}

/// Values that a broken or hostile config.json could hold.
fn odd_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (0u64..70).prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (0u32..64).prop_map(|bits| Value::from(1u64 << bits)),
        any::<f64>().prop_map(Value::from),
        Just(json!("yarn")),
        Just(json!("longrope")),
        Just(json!("")),
        Just(json!([])),
        Just(json!({})),
        Just(json!([1, "a", null])),
        Just(json!({"rope_type": "longrope", "short_factor": [0.0], "long_factor": [1e300]})),
        Just(json!({"type": "yarn", "factor": 1e-300, "mscale": -3, "mscale_all_dim": 1e30})),
        Just(json!({"quant_method": "fp8", "weight_block_size": [0, 1]})),
    ]
}

proptest! {
    #[test]
    fn no_config_panics(
        fixture in prop::sample::select(FIXTURES.to_vec()),
        changes in prop::collection::vec((any::<prop::sample::Index>(), odd_value()), 1..4),
        removed in any::<prop::sample::Index>(),
    ) {
        let mut config = config(fixture);
        let mut keys: Vec<String> = config.as_object().unwrap().keys().cloned().collect();
        keys.extend(["layer_types", "head_dim", "rope_parameters", "quantization_config", "clip_qkv"].map(String::from));
        for (at, value) in changes {
            // Half of the mutations go one level down, into rope_scaling or quantization_config.
            let key = &keys[at.index(keys.len())];
            match config.get_mut(key) {
                Some(Value::Object(inner)) if value.is_number() => {
                    let names: Vec<String> = inner.keys().cloned().collect();
                    if let Some(name) = names.get(at.index(names.len().max(1))) {
                        inner.insert(name.clone(), value);
                    }
                }
                _ => config[key.as_str()] = value,
            }
        }
        config.as_object_mut().unwrap().shift_remove(&keys[removed.index(keys.len())]);
        if let Ok(family) = resolve(config.to_string().as_bytes()) {
            let spec = family.spec;
            prop_assert!(spec.moe.top_k <= spec.moe.experts);
            prop_assert!(spec.rope.dim.is_multiple_of(2) && spec.rope.dim > 0);
            prop_assert!(!spec.moe_layers().is_empty());
        }
    }

    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(resolve(&bytes).is_err());
    }
}
