//! Model descriptions of the fixtures, made from their config.json by the shortest way: only what decides names and
//! shapes is right; the rest (rotary, scales) is arbitrary.

use moeyard::spec::*;
use moeyard::weights::{CONFIG, Checkpoint, ExpertNames, MlpNames, TensorNames};
use serde_json::Value;
use std::path::{Path, PathBuf};

pub const FIXTURES: [&str; 14] = [
    "deepseek_v2",
    "deepseek_v2_group",
    "deepseek_v3",
    "deepseek_v3_fp8",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
    "mixtral",
    "mixtral_awq",
    "mixtral_gptq",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
];

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// Description and names of the checkpoint in a folder.
pub fn describe(folder: &Path) -> (ModelSpec, TensorNames) {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let config = checkpoint.text(CONFIG).unwrap().expect("config.json");
    let config = Config(serde_json::from_slice(&config).unwrap());
    (config.spec(), config.names())
}

struct Config(Value);

impl Config {
    fn get(&self, key: &str) -> Option<usize> {
        self.0[key].as_u64().map(|n| n as usize)
    }

    fn first(&self, keys: &[&str]) -> usize {
        keys.iter().find_map(|key| self.get(key)).unwrap_or_else(|| panic!("none of {keys:?} in config.json"))
    }

    fn flag(&self, key: &str) -> bool {
        self.0[key].as_bool().unwrap_or(false)
    }

    fn family(&self) -> &str {
        self.0["model_type"].as_str().unwrap()
    }

    fn names(&self) -> TensorNames {
        let mixtral = ExpertNames::PerExpert(MlpNames {
            gate: "model.layers.{layer}.block_sparse_moe.experts.{expert}.w1",
            up: "model.layers.{layer}.block_sparse_moe.experts.{expert}.w3",
            down: "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2",
        });
        let common = TensorNames::COMMON;
        match self.family() {
            "mixtral" | "phimoe" => TensorNames {
                router: "model.layers.{layer}.block_sparse_moe.gate",
                experts: mixtral,
                ..common
            },
            "granitemoe" => TensorNames {
                router: "model.layers.{layer}.block_sparse_moe.router.layer",
                experts: ExpertNames::FusedLinear {
                    gate_up: "model.layers.{layer}.block_sparse_moe.input_linear.weight",
                    down: "model.layers.{layer}.block_sparse_moe.output_linear.weight",
                },
                ..common
            },
            "gpt_oss" => TensorNames {
                router: "model.layers.{layer}.mlp.router",
                experts: ExpertNames::FusedInterleaved {
                    gate_up: "model.layers.{layer}.mlp.experts.gate_up_proj",
                    down: "model.layers.{layer}.mlp.experts.down_proj",
                },
                ..common
            },
            "qwen2_moe" => TensorNames {
                shared: MlpNames {
                    gate: "model.layers.{layer}.mlp.shared_expert.gate_proj",
                    up: "model.layers.{layer}.mlp.shared_expert.up_proj",
                    down: "model.layers.{layer}.mlp.shared_expert.down_proj",
                },
                ..common
            },
            _ => common,
        }
    }

    fn attention(&self) -> Attention {
        let heads = self.first(&["num_attention_heads"]);
        if let Some(kv_lora_rank) = self.get("kv_lora_rank") {
            return Attention::Mla {
                heads,
                q_lora_rank: self.get("q_lora_rank"),
                kv_lora_rank,
                nope_dim: self.first(&["qk_nope_head_dim"]),
                rope_dim: self.first(&["qk_rope_head_dim"]),
                v_dim: self.first(&["v_head_dim"]),
                scale: 1.0,
                bias: self.flag("attention_bias"),
                lora_norm_eps: 1e-6,
            };
        }
        let bias = self.flag("attention_bias");
        Attention::Gqa {
            heads,
            kv_heads: self.first(&["num_key_value_heads"]),
            head_dim: self.get("head_dim").unwrap_or(self.first(&["hidden_size"]) / heads),
            scale: 1.0,
            qkv_bias: bias || self.family() == "qwen2_moe",
            out_bias: bias && self.family() != "glm4_moe",
            qk_norm: match self.family() {
                "qwen3_moe" => QkNorm::PerHead,
                "olmoe" => QkNorm::FullWidth,
                _ => QkNorm::Off,
            },
            sinks: self.family() == "gpt_oss",
            clip_qkv: None,
        }
    }

    fn quantization(&self) -> Option<Quantization> {
        let quantization = &self.0["quantization_config"];
        let size = |value: &Value| value.as_u64().map(|n| n as usize);
        match quantization["quant_method"].as_str()? {
            "fp8" => {
                let block = &quantization["weight_block_size"];
                Some(Quantization::Fp8Block { block: [0, 1].map(|i| size(&block[i]).unwrap()) })
            }
            "awq" => Some(Quantization::Awq { group_size: size(&quantization["group_size"]) }),
            "gptq" => Some(Quantization::Gptq { group_size: size(&quantization["group_size"]) }),
            other => panic!("{other}"),
        }
    }

    fn spec(&self) -> ModelSpec {
        let intermediate = self.first(&["moe_intermediate_size", "intermediate_size"]);
        let dense_layers = self.get("first_k_dense_replace").unwrap_or(0);
        let ffn = |layer| match layer < dense_layers {
            true => FeedForward::Dense { intermediate: self.first(&["intermediate_size"]) },
            false => FeedForward::Moe,
        };
        let layers = (0..self.first(&["num_hidden_layers"]))
            .map(|layer| Layer { window: None, ffn: ffn(layer) })
            .collect();
        let shared = self.get("n_shared_experts").map(|n| n * intermediate);
        let shared = shared.or(self.get("shared_expert_intermediate_size"));
        let family = self.family();
        ModelSpec {
            family: "fixture",
            vocab_size: self.first(&["vocab_size"]),
            hidden_size: self.first(&["hidden_size"]),
            max_position_embeddings: 1024,
            attention: self.attention(),
            rope: Rope { theta: 10000.0, dim: 16, interleaved: false, scaling: RopeScaling::None },
            layers,
            moe: Moe {
                experts: self.first(&["n_routed_experts", "num_local_experts", "num_experts"]),
                top_k: 2,
                intermediate,
                activation: Activation::SiluMul,
                expert_bias: family == "gpt_oss",
                router: Router {
                    score: Score::Softmax,
                    logit_bias: family == "gpt_oss",
                    choice_bias: ["deepseek_v3", "glm4_moe"].contains(&family),
                    groups: None,
                    renormalize: Renormalize::Off,
                    scale: 1.0,
                },
                shared: shared
                    .map(|intermediate| SharedExpert { intermediate, gated: family == "qwen2_moe" }),
            },
            norm: Norm { kind: if family == "phimoe" { NormKind::Layer } else { NormKind::Rms }, eps: 1e-5 },
            embedding_scale: 1.0,
            residual_scale: 1.0,
            logits_scale: 1.0,
            tied_embeddings: self.flag("tie_word_embeddings"),
            lm_head_bias: self.flag("lm_head_bias"),
            eos_token_ids: Vec::new(),
            quantization: self.quantization(),
        }
    }
}
