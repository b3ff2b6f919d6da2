//! The shapes: config.json and the tensors that go with it, under their published names.

use clap::ValueEnum;
use serde_json::{Value, json};

/// What to write. All are about 2.4 GB and have a vocabulary of 32,000.
#[derive(Clone, Copy, ValueEnum)]
pub enum Shape {
    /// Mixtral: 16 layers, 8 experts, top 2
    Mixtral,
    /// DeepSeek-V3: MLA, 12 layers of which one is dense, 64 experts, top 6, one shared
    DeepseekV3,
    /// Qwen3-MoE: 10 layers, 64 experts, top 8
    Qwen3Moe,
}

/// Stored type.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    Bf16,
    F32,
}

/// One tensor: its values are `mean` plus normal noise of deviation `spread`.
pub struct Tensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub stored: Stored,
    pub mean: f32,
    pub spread: f32,
}

impl Tensor {
    /// Numbers in it.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes in the file.
    pub fn bytes(&self) -> u64 {
        let width = match self.stored {
            Stored::Bf16 => 2,
            Stored::F32 => 4,
        };
        self.len() as u64 * width
    }
}

impl Shape {
    /// config.json.
    pub fn config(self) -> Value {
        let mut config = match self {
            Shape::Mixtral => json!({
                "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_hidden_layers": 16,
                "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "num_local_experts": 8,
                "num_experts_per_tok": 2, "intermediate_size": 2816, "sliding_window": null, "rope_theta": 1e6,
                "rms_norm_eps": 1e-5, "router_aux_loss_coef": 0.02
            }),
            Shape::DeepseekV3 => json!({
                "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "num_hidden_layers": 12,
                "num_attention_heads": 8, "num_key_value_heads": 8, "q_lora_rank": 384, "kv_lora_rank": 512,
                "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64,
                "n_shared_experts": 1, "num_experts_per_tok": 6, "moe_intermediate_size": 512,
                "intermediate_size": 4096, "first_k_dense_replace": 1, "moe_layer_freq": 1, "n_group": 8,
                "topk_group": 4, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": true,
                "routed_scaling_factor": 2.5, "rope_theta": 1e4, "rms_norm_eps": 1e-6, "attention_bias": false,
                "num_nextn_predict_layers": 0
            }),
            Shape::Qwen3Moe => json!({
                "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_hidden_layers": 10,
                "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128, "num_experts": 64,
                "num_experts_per_tok": 8, "moe_intermediate_size": 512, "intermediate_size": 3072,
                "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": true, "rope_theta": 1e6,
                "rms_norm_eps": 1e-6, "attention_bias": false, "router_aux_loss_coef": 0.001,
                "use_sliding_window": false
            }),
        };
        for (key, value) in [
            ("hidden_size", json!(1024)),
            ("vocab_size", json!(32_000)),
            ("hidden_act", json!("silu")),
            ("tie_word_embeddings", json!(false)),
            ("torch_dtype", json!("bfloat16")),
            ("max_position_embeddings", json!(8192)),
            ("bos_token_id", json!(1)),
            ("eos_token_id", json!(2)),
        ] {
            config[key] = value;
        }
        config
    }

    /// The tensors that such a config.json asks for, in file order.
    pub fn tensors(self, config: &Value) -> Vec<Tensor> {
        let list = List { config, tensors: Vec::new() };
        list.model(self)
    }
}

/// A list of tensors in the making.
struct List<'a> {
    config: &'a Value,
    tensors: Vec<Tensor>,
}

impl List<'_> {
    /// A whole number of config.json.
    fn number(&self, key: &str) -> usize {
        self.config[key].as_u64().unwrap_or_else(|| panic!("config.json has no number {key}")) as usize
    }

    fn model(mut self, shape: Shape) -> Vec<Tensor> {
        let (hidden, vocab) = (self.number("hidden_size"), self.number("vocab_size"));
        self.matrix("model.embed_tokens.weight", vocab, hidden, 1.0);
        for layer in 0..self.number("num_hidden_layers") {
            let name = format!("model.layers.{layer}");
            self.norm(format!("{name}.input_layernorm"), hidden);
            self.norm(format!("{name}.post_attention_layernorm"), hidden);
            let attention = format!("{name}.self_attn");
            match shape {
                Shape::Mixtral | Shape::Qwen3Moe => self.gqa(&attention),
                Shape::DeepseekV3 => self.mla(&attention),
            }
            match shape {
                Shape::Mixtral => {
                    let (experts, width) =
                        (self.number("num_local_experts"), self.number("intermediate_size"));
                    let moe = format!("{name}.block_sparse_moe");
                    self.projection(format!("{moe}.gate"), experts, hidden);
                    self.experts(&moe, experts, width, ["w1", "w2", "w3"]);
                }
                Shape::Qwen3Moe => {
                    let (experts, width) = (self.number("num_experts"), self.number("moe_intermediate_size"));
                    let head_dim = self.number("head_dim");
                    self.norm(format!("{attention}.q_norm"), head_dim);
                    self.norm(format!("{attention}.k_norm"), head_dim);
                    self.projection(format!("{name}.mlp.gate"), experts, hidden);
                    self.experts(&format!("{name}.mlp"), experts, width, PROJECTIONS);
                }
                Shape::DeepseekV3 if layer < self.number("first_k_dense_replace") => {
                    let width = self.number("intermediate_size");
                    self.mlp(&format!("{name}.mlp"), width, PROJECTIONS);
                }
                Shape::DeepseekV3 => self.deepseek_moe(&format!("{name}.mlp")),
            }
        }
        self.norm("model.norm".into(), hidden);
        self.matrix("lm_head.weight", vocab, hidden, 2.0 / (hidden as f32).sqrt());
        self.tensors
    }

    fn gqa(&mut self, name: &str) {
        let hidden = self.number("hidden_size");
        let head_dim = self.number("head_dim");
        let q = self.number("num_attention_heads") * head_dim;
        let kv = self.number("num_key_value_heads") * head_dim;
        self.projection(format!("{name}.q_proj"), q, hidden);
        self.projection(format!("{name}.k_proj"), kv, hidden);
        self.projection(format!("{name}.v_proj"), kv, hidden);
        self.residual(format!("{name}.o_proj"), hidden, q);
    }

    fn mla(&mut self, name: &str) {
        let [hidden, heads, q_rank, kv_rank, nope, rope, v] = [
            "hidden_size",
            "num_attention_heads",
            "q_lora_rank",
            "kv_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
        ]
        .map(|key| self.number(key));
        self.projection(format!("{name}.q_a_proj"), q_rank, hidden);
        self.norm(format!("{name}.q_a_layernorm"), q_rank);
        self.projection(format!("{name}.q_b_proj"), heads * (nope + rope), q_rank);
        self.projection(format!("{name}.kv_a_proj_with_mqa"), kv_rank + rope, hidden);
        self.norm(format!("{name}.kv_a_layernorm"), kv_rank);
        self.projection(format!("{name}.kv_b_proj"), heads * (nope + v), kv_rank);
        self.residual(format!("{name}.o_proj"), hidden, heads * v);
    }

    fn deepseek_moe(&mut self, name: &str) {
        let (hidden, experts) = (self.number("hidden_size"), self.number("n_routed_experts"));
        let width = self.number("moe_intermediate_size");
        self.projection(format!("{name}.gate"), experts, hidden);
        self.tensors.push(Tensor {
            name: format!("{name}.gate.e_score_correction_bias"),
            shape: vec![experts],
            stored: Stored::F32,
            mean: 0.0,
            spread: 0.02,
        });
        self.experts(name, experts, width, PROJECTIONS);
        let shared = width * self.number("n_shared_experts");
        self.mlp(&format!("{name}.shared_experts"), shared, PROJECTIONS);
    }

    fn experts(&mut self, name: &str, experts: usize, width: usize, names: [&str; 3]) {
        for expert in 0..experts {
            self.mlp(&format!("{name}.experts.{expert}"), width, names);
        }
    }

    /// Gate, down and up, which is the order of Mixtral's numbers.
    fn mlp(&mut self, name: &str, width: usize, [gate, down, up]: [&str; 3]) {
        let hidden = self.number("hidden_size");
        self.projection(format!("{name}.{gate}"), width, hidden);
        self.residual(format!("{name}.{down}"), hidden, width);
        self.projection(format!("{name}.{up}"), width, hidden);
    }

    fn norm(&mut self, name: String, width: usize) {
        let name = format!("{name}.weight");
        self.tensors.push(Tensor { name, shape: vec![width], stored: Stored::Bf16, mean: 1.0, spread: 0.05 });
    }

    /// A matrix that keeps the variance of its input.
    fn projection(&mut self, name: String, outputs: usize, inputs: usize) {
        self.matrix(&format!("{name}.weight"), outputs, inputs, 1.0 / (inputs as f32).sqrt());
    }

    /// One whose output joins the residual: two of them in every layer add up to variance 1.
    fn residual(&mut self, name: String, outputs: usize, inputs: usize) {
        let sums = (2 * self.number("num_hidden_layers") * inputs) as f32;
        self.matrix(&format!("{name}.weight"), outputs, inputs, 1.0 / sums.sqrt());
    }

    fn matrix(&mut self, name: &str, outputs: usize, inputs: usize, spread: f32) {
        let (name, shape) = (name.to_owned(), vec![outputs, inputs]);
        self.tensors.push(Tensor { name, shape, stored: Stored::Bf16, mean: 0.0, spread });
    }
}

const PROJECTIONS: [&str; 3] = ["gate_proj", "down_proj", "up_proj"];
