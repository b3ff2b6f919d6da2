//! config.json to spec: the fixtures, published configurations, other shapes of the same families, and refusals.

#[path = "support/fixtures.rs"]
mod fixtures;

use fixtures::{FIXTURES, model_dir};
use moeyard::Error;
use moeyard::model::families::{Family, known, resolve};
use moeyard::spec::*;
use moeyard::weights::names::ExpertNames;
use proptest::prelude::*;
use serde_json::{Value, json};

fn config(folder: &str) -> Value {
    serde_json::from_slice(&std::fs::read(model_dir(folder).join("config.json")).unwrap()).unwrap()
}

/// A fixture's config with some keys replaced.
fn with(folder: &str, changes: Value) -> Value {
    let mut config = config(folder);
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

/// ... and some removed.
fn without(folder: &str, keys: &[&str]) -> Value {
    let mut config = config(folder);
    for key in keys {
        config.as_object_mut().unwrap().shift_remove(*key).unwrap();
    }
    config
}

fn family(config: &Value) -> Family {
    resolve(config.to_string().as_bytes()).unwrap_or_else(|e| panic!("{e}"))
}

fn spec(config: &Value) -> ModelSpec {
    family(config).spec
}

/// The problems of a refused config as "item: expected ..., found ...".
fn problems(config: &Value) -> Vec<String> {
    match resolve(config.to_string().as_bytes()) {
        Err(Error::Checkpoint(problems)) => {
            assert!(problems.list.iter().all(|p| p.file == "config.json"));
            problems
                .list
                .iter()
                .map(|p| {
                    format!(
                        "{}: expected {}, found {}",
                        p.item.as_deref().unwrap_or("-"),
                        p.expected,
                        p.found
                    )
                })
                .collect()
        }
        Err(other) => panic!("not a checkpoint error: {other}"),
        Ok(family) => panic!("accepted: {:?}", family.spec),
    }
}

/// Exactly these problems, each given by a part of its text.
fn refused(config: &Value, parts: &[&str]) {
    let found = problems(config);
    assert_eq!(found.len(), parts.len(), "{found:#?}");
    for part in parts {
        assert!(found.iter().any(|p| p.contains(part)), "no problem has {part:?} in {found:#?}");
    }
}

/// Whether each layer is a MoE layer.
fn moe_layers(config: &Value) -> Vec<bool> {
    spec(config).layers.iter().map(|l| l.ffn == FeedForward::Moe).collect()
}

fn windows(config: &Value) -> Vec<Option<usize>> {
    spec(config).layers.iter().map(|l| l.window).collect()
}

// ---- whole specs

#[test]
fn mixtral_fixture() {
    let Family { spec, names } = family(&config("mixtral"));
    let expected = ModelSpec {
        family: "mixtral",
        vocab_size: 512,
        hidden_size: 64,
        max_position_embeddings: 32768,
        attention: Attention::Gqa {
            heads: 4,
            kv_heads: 2,
            head_dim: 16,
            scale: 0.25,
            qkv_bias: false,
            out_bias: false,
            qk_norm: QkNorm::Off,
            sinks: false,
            clip_qkv: None,
        },
        rope: Rope { theta: 1e6, dim: 16, interleaved: false, scaling: RopeScaling::None },
        layers: vec![Layer { window: None, ffn: FeedForward::Moe }; 2],
        moe: Moe {
            experts: 8,
            top_k: 2,
            intermediate: 80,
            activation: Activation::SiluMul,
            expert_bias: false,
            router: Router {
                score: Score::Softmax,
                logit_bias: false,
                choice_bias: false,
                groups: None,
                renormalize: Renormalize::Sum { eps: 0.0 },
                scale: 1.0,
            },
            shared: None,
        },
        norm: Norm { kind: NormKind::Rms, eps: 1e-5 },
        embedding_scale: 1.0,
        residual_scale: 1.0,
        logits_scale: 1.0,
        tied_embeddings: false,
        lm_head_bias: false,
        eos_token_ids: vec![2],
        quantization: None,
    };
    assert_eq!(spec, expected);
    assert_eq!(names.router, "model.layers.{layer}.block_sparse_moe.gate");
    let awq = expected_quantised(&expected, Quantization::Awq { group_size: Some(32) });
    assert_eq!(self::spec(&config("mixtral_awq")), awq);
    let gptq = expected_quantised(&expected, Quantization::Gptq { group_size: Some(32) });
    assert_eq!(self::spec(&config("mixtral_gptq")), gptq);
}

/// The quantised Mixtral fixtures are wider.
fn expected_quantised(plain: &ModelSpec, quantization: Quantization) -> ModelSpec {
    let mut spec = plain.clone();
    spec.hidden_size = 128;
    spec.moe.intermediate = 96;
    spec.rope.dim = 32;
    let Attention::Gqa { head_dim, scale, .. } = &mut spec.attention else { unreachable!() };
    (*head_dim, *scale) = (32, 0.125f32.sqrt() / 2.0);
    spec.quantization = Some(quantization);
    spec
}

#[test]
fn deepseek_v3_fixture() {
    let spec = spec(&config("deepseek_v3"));
    let scale = (0.1 * 40f32.ln() + 1.0).powi(2) / 32f32.sqrt();
    let dense = Layer { window: None, ffn: FeedForward::Dense { intermediate: 128 } };
    let moe = Layer { window: None, ffn: FeedForward::Moe };
    let expected = ModelSpec {
        family: "deepseek_v3",
        vocab_size: 512,
        hidden_size: 64,
        max_position_embeddings: 163_840,
        attention: Attention::Mla {
            heads: 4,
            q_lora_rank: Some(48),
            kv_lora_rank: 32,
            nope_dim: 16,
            rope_dim: 16,
            v_dim: 24,
            scale,
            bias: false,
            lora_norm_eps: 1e-6,
        },
        rope: Rope {
            theta: 1e4,
            dim: 16,
            interleaved: true,
            scaling: RopeScaling::Yarn {
                factor: 40.0,
                original_max_position: 4096,
                beta_fast: 32.0,
                beta_slow: 1.0,
                truncate: true,
                attention_factor: 1.0,
            },
        },
        layers: vec![dense, moe.clone(), moe],
        moe: Moe {
            experts: 16,
            top_k: 4,
            intermediate: 24,
            activation: Activation::SiluMul,
            expert_bias: false,
            router: Router {
                score: Score::Sigmoid,
                logit_bias: false,
                choice_bias: true,
                groups: Some(ExpertGroups { count: 4, keep: 2, score: GroupScore::Top2Sum }),
                renormalize: Renormalize::Sum { eps: 1e-20 },
                scale: 2.5,
            },
            shared: Some(SharedExpert { intermediate: 24, gated: false }),
        },
        norm: Norm { kind: NormKind::Rms, eps: 1e-6 },
        embedding_scale: 1.0,
        residual_scale: 1.0,
        logits_scale: 1.0,
        tied_embeddings: false,
        lm_head_bias: false,
        eos_token_ids: vec![1],
        quantization: None,
    };
    let Attention::Mla { scale: found, .. } = spec.attention else { unreachable!() };
    assert!((found - scale).abs() < 1e-6, "{found}");
    let mut spec = spec;
    spec.attention = expected.attention.clone();
    assert_eq!(spec, expected);
}

#[test]
fn gpt_oss_fixture() {
    let Family { spec, names } = family(&config("gpt_oss"));
    let expected = ModelSpec {
        family: "gpt_oss",
        vocab_size: 512,
        hidden_size: 64,
        max_position_embeddings: 131_072,
        attention: Attention::Gqa {
            heads: 8,
            kv_heads: 2,
            head_dim: 16,
            scale: 0.25,
            qkv_bias: true,
            out_bias: true,
            qk_norm: QkNorm::Off,
            sinks: true,
            clip_qkv: None,
        },
        rope: Rope {
            theta: 150_000.0,
            dim: 16,
            interleaved: false,
            scaling: RopeScaling::Yarn {
                factor: 32.0,
                original_max_position: 4096,
                beta_fast: 32.0,
                beta_slow: 1.0,
                truncate: false,
                attention_factor: 0.1 * 32f64.ln() + 1.0,
            },
        },
        layers: vec![
            Layer { window: Some(32), ffn: FeedForward::Moe },
            Layer { window: None, ffn: FeedForward::Moe },
        ],
        moe: Moe {
            experts: 8,
            top_k: 4,
            intermediate: 48,
            activation: Activation::ClampedSwiglu { limit: 7.0, alpha: 1.702 },
            expert_bias: true,
            router: Router {
                score: Score::SoftmaxOverChosen,
                logit_bias: true,
                choice_bias: false,
                groups: None,
                renormalize: Renormalize::Off,
                scale: 1.0,
            },
            shared: None,
        },
        norm: Norm { kind: NormKind::Rms, eps: 1e-5 },
        embedding_scale: 1.0,
        residual_scale: 1.0,
        logits_scale: 1.0,
        tied_embeddings: false,
        lm_head_bias: false,
        eos_token_ids: vec![506],
        quantization: None,
    };
    assert_eq!(spec, expected);
    assert!(matches!(names.experts, ExpertNames::FusedInterleaved { .. }));
}

#[test]
fn phimoe_fixture() {
    let spec = spec(&config("phimoe"));
    let mscale = 1.243_163_121_016_122;
    assert_eq!(spec.norm, Norm { kind: NormKind::Layer, eps: 1e-5 });
    assert!(spec.lm_head_bias);
    assert_eq!(spec.moe.router.score, Score::SparseMixer { epsilon: 0.01 });
    assert_eq!(spec.moe.router.renormalize, Renormalize::Off);
    assert_eq!(spec.layers[1].window, Some(131_072));
    assert!(matches!(spec.attention, Attention::Gqa { qkv_bias: true, out_bias: true, .. }));
    assert_eq!(
        spec.rope.scaling,
        RopeScaling::LongRope {
            short_factor: vec![1.0, 1.05, 1.1, 1.2, 1.4, 1.6, 2.0, 2.5],
            long_factor: vec![1.0, 1.2, 1.5, 2.0, 4.0, 8.0, 16.0, 32.0],
            original_max_position: 4096,
            short_mscale: mscale,
            long_mscale: mscale,
        }
    );
}

#[test]
fn what_the_other_fixtures_have() {
    let v2 = spec(&config("deepseek_v2"));
    let Attention::Mla { q_lora_rank: None, scale, .. } = v2.attention else { panic!("{v2:?}") };
    let mscale = 0.1 * 0.707 * 40f32.ln() + 1.0;
    assert!((scale - mscale * mscale / 32f32.sqrt()).abs() < 1e-6);
    assert_eq!(v2.moe.router.groups, None);
    assert_eq!(v2.moe.router.renormalize, Renormalize::Off);
    assert_eq!(v2.moe.shared, Some(SharedExpert { intermediate: 48, gated: false }));
    assert!(v2.rope.interleaved);

    let group = spec(&config("deepseek_v2_group")).moe.router;
    assert_eq!(group.groups, Some(ExpertGroups { count: 4, keep: 2, score: GroupScore::Max }));
    assert_eq!(group.scale, 16.0);

    let fp8 = spec(&config("deepseek_v3_fp8"));
    assert_eq!(fp8.quantization, Some(Quantization::Fp8Block { block: [128, 128] }));

    let glm = spec(&config("glm4_moe"));
    assert_eq!((glm.rope.dim, glm.rope.interleaved), (16, false));
    assert_eq!(glm.eos_token_ids, [505, 509, 511]);
    assert!(matches!(
        glm.attention,
        Attention::Gqa { qkv_bias: true, out_bias: false, qk_norm: QkNorm::Off, head_dim: 32, .. }
    ));
    assert_eq!((glm.moe.router.groups, glm.moe.router.choice_bias), (None, true));

    let Family { spec: granite, names } = family(&config("granitemoe"));
    assert_eq!((granite.embedding_scale, granite.residual_scale, granite.logits_scale), (0.4, 0.8, 0.5));
    assert!(granite.tied_embeddings);
    assert!(matches!(granite.attention, Attention::Gqa { scale: 0.3, .. }));
    assert_eq!(granite.moe.router.score, Score::SoftmaxOverChosen);
    assert!(matches!(names.experts, ExpertNames::FusedLinear { .. }));

    let olmoe = spec(&config("olmoe"));
    assert!(matches!(olmoe.attention, Attention::Gqa { qk_norm: QkNorm::FullWidth, clip_qkv: None, .. }));
    assert_eq!(olmoe.moe.router.renormalize, Renormalize::Off);

    let Family { spec: qwen2, names } = family(&config("qwen2_moe"));
    assert_eq!(qwen2.moe.shared, Some(SharedExpert { intermediate: 96, gated: true }));
    assert!(matches!(qwen2.attention, Attention::Gqa { qkv_bias: true, out_bias: false, .. }));
    assert!(names.shared.gate.contains("mlp.shared_expert."));

    let qwen3 = spec(&config("qwen3_moe"));
    assert!(matches!(qwen3.attention, Attention::Gqa { qk_norm: QkNorm::PerHead, head_dim: 32, .. }));
    assert_eq!(qwen3.moe.router.renormalize, Renormalize::Sum { eps: 0.0 });

    for demo in ["demo-mixtral", "demo-deepseek"] {
        assert_eq!(spec(&config(demo)).vocab_size, 4096);
    }
}

// ---- other shapes of the same families

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

// ---- refusals

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

// ---- no JSON may panic

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
