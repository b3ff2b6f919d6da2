//! The specs of the fixtures, whole where a family has most of what there is.

use moeyard::model::families::Family;
use moeyard::spec::*;
use moeyard::weights::names::ExpertNames;

use super::{config, family, spec};

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
