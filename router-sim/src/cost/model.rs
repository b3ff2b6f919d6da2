//! The sizes of a model that cost depends on, out of a Hugging Face config.json.

use std::fs;
use std::path::Path;

use serde::Deserialize;

use crate::topology::Precision;
use crate::{Error, Result};

/// Sizes of a model; all of them plain facts of its config.json.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelShape {
    /// What reports call it.
    pub name: String,
    /// Width of the residual.
    pub hidden: usize,
    /// MoE layers.
    pub moe_layers: usize,
    /// Layers with a plain MLP.
    pub dense_layers: usize,
    /// Experts per MoE layer, shared ones not counted.
    pub experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// Width of an expert.
    pub expert_intermediate: usize,
    /// Width of all shared experts together.
    pub shared_intermediate: usize,
    /// Width of the MLP of dense layers.
    pub dense_intermediate: usize,
    /// Entries of the vocabulary.
    pub vocabulary: usize,
    attention: Attention,
}

/// Sizes of attention.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Attention {
    /// Grouped queries.
    Grouped { heads: usize, kv_heads: usize, head: usize },
    /// A latent for keys and values.
    Latent { heads: usize, q_rank: Option<usize>, kv_rank: usize, nope: usize, rope: usize, v: usize },
}

/// The keys of config.json that matter, under the names that families use.
#[derive(Deserialize)]
struct Config {
    #[serde(default)]
    model_type: String,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    #[serde(alias = "num_local_experts", alias = "num_experts")]
    n_routed_experts: usize,
    num_experts_per_tok: usize,
    intermediate_size: usize,
    moe_intermediate_size: Option<usize>,
    n_shared_experts: Option<usize>,
    shared_expert_intermediate_size: Option<usize>,
    first_k_dense_replace: Option<usize>,
    #[serde(default)]
    mlp_only_layers: Vec<usize>,
    q_lora_rank: Option<usize>,
    kv_lora_rank: Option<usize>,
    qk_nope_head_dim: Option<usize>,
    qk_rope_head_dim: Option<usize>,
    v_head_dim: Option<usize>,
    vocab_size: usize,
}

/// Largest size that is believed: products of four stay far from overflow in f64, and nothing real comes near.
const MAX_SIZE: usize = 1 << 24;

/// Models whose sizes come along: name and the keys of their config.json that matter.
const PRESETS: [(&str, &str); 4] = [
    ("deepseek-v3", include_str!("models/deepseek-v3.json")),
    ("gpt-oss-20b", include_str!("models/gpt-oss-20b.json")),
    ("mixtral-8x7b", include_str!("models/mixtral-8x7b.json")),
    ("qwen3-235b-a22b", include_str!("models/qwen3-235b-a22b.json")),
];

/// Names of the models whose sizes come along.
pub fn presets() -> impl Iterator<Item = &'static str> {
    PRESETS.iter().map(|(name, _)| *name)
}

impl ModelShape {
    /// A preset by name, or else a path to a config.json.
    ///
    /// # Errors
    /// [`Error::Description`] listing the presets when it is neither, or naming the key that is missing or senseless.
    pub fn find(name_or_path: &str) -> Result<ModelShape> {
        if let Some((name, text)) = PRESETS.iter().find(|(name, _)| *name == name_or_path) {
            return ModelShape::from_config(text, name);
        }
        let path = Path::new(name_or_path);
        let text = fs::read_to_string(path).map_err(|e| {
            Error::Description(format!(
                "model {name_or_path:?} is neither a readable config.json ({e}) nor one of {}",
                presets().collect::<Vec<_>>().join(", ")
            ))
        })?;
        ModelShape::from_config(&text, "").map_err(|e| Error::Description(format!("{}: {e}", path.display())))
    }

    /// The preset of this routing shape, if there is exactly one; where top-k is not known, of any.
    pub fn of_shape(experts: usize, top_k: Option<usize>, moe_layers: usize) -> Option<ModelShape> {
        let all = PRESETS
            .iter()
            .map(|(name, text)| ModelShape::from_config(text, name).expect("presets are sound"));
        let mut fitting = all.filter(|m| {
            (m.experts, top_k.unwrap_or(m.top_k), m.moe_layers) == (experts, m.top_k, moe_layers)
        });
        fitting.next().filter(|_| fitting.next().is_none())
    }

    /// Reads a config.json. `name` replaces the `model_type`, unless it is empty.
    ///
    /// # Errors
    /// [`Error::Description`] naming the key that is missing or senseless.
    pub fn from_config(text: &str, name: &str) -> Result<ModelShape> {
        let config: Config = serde_json::from_str(text).map_err(|e| Error::Description(e.to_string()))?;
        config.check()?;
        let dense_layers = match config.first_k_dense_replace {
            Some(first) => first,
            None => config.mlp_only_layers.iter().filter(|l| **l < config.num_hidden_layers).count(),
        };
        let expert_intermediate = config.moe_intermediate_size.unwrap_or(config.intermediate_size);
        let heads = config.num_attention_heads;
        let attention = match config.kv_lora_rank {
            Some(kv_rank) => Attention::Latent {
                heads,
                q_rank: config.q_lora_rank,
                kv_rank,
                nope: given("qk_nope_head_dim", config.qk_nope_head_dim)?,
                rope: given("qk_rope_head_dim", config.qk_rope_head_dim)?,
                v: given("v_head_dim", config.v_head_dim)?,
            },
            None => Attention::Grouped {
                heads,
                kv_heads: config.num_key_value_heads.unwrap_or(heads),
                head: config.head_dim.unwrap_or(config.hidden_size / heads),
            },
        };
        let shared = config
            .shared_expert_intermediate_size
            .unwrap_or(config.n_shared_experts.unwrap_or(0) * expert_intermediate);
        Ok(ModelShape {
            name: if name.is_empty() { config.model_type.clone() } else { name.to_owned() },
            hidden: config.hidden_size,
            moe_layers: config.num_hidden_layers - dense_layers,
            dense_layers,
            experts: config.n_routed_experts,
            top_k: config.num_experts_per_tok,
            expert_intermediate,
            shared_intermediate: shared,
            dense_intermediate: config.intermediate_size,
            vocabulary: config.vocab_size,
            attention,
        })
    }

    /// Bytes of one expert: gate, up and down.
    pub fn expert_bytes(&self, weights: Precision) -> f64 {
        3.0 * self.hidden as f64 * self.expert_intermediate as f64 * weights.bytes()
    }

    /// Weights of one layer's attention.
    pub(super) fn attention_parameters(&self) -> f64 {
        let h = self.hidden;
        let parameters = match self.attention {
            Attention::Grouped { heads, kv_heads, head } => 2 * h * heads * head + 2 * h * kv_heads * head,
            Attention::Latent { heads, q_rank, kv_rank, nope, rope, v } => {
                let q = match q_rank {
                    Some(rank) => h * rank + rank * heads * (nope + rope),
                    None => h * heads * (nope + rope),
                };
                q + h * (kv_rank + rope) + kv_rank * heads * (nope + v) + heads * v * h
            }
        };
        parameters as f64
    }

    /// Operations of one token's attention over so many tokens: two products of multiply-adds.
    pub(super) fn attention_flop(&self, context: f64) -> f64 {
        let per_token = match self.attention {
            Attention::Grouped { heads, head, .. } => 4 * heads * head,
            Attention::Latent { heads, nope, rope, v, .. } => 2 * heads * (nope + rope + v),
        };
        per_token as f64 * context
    }

    /// Bytes of one token in one layer's cache, stored in bf16.
    pub(super) fn kv_bytes_per_token(&self) -> f64 {
        let values = match self.attention {
            Attention::Grouped { kv_heads, head, .. } => 2 * kv_heads * head,
            Attention::Latent { kv_rank, rope, .. } => kv_rank + rope,
        };
        2.0 * values as f64
    }
}

impl Config {
    fn check(&self) -> Result<()> {
        let sizes = [
            ("hidden_size", Some(self.hidden_size)),
            ("num_hidden_layers", Some(self.num_hidden_layers)),
            ("num_attention_heads", Some(self.num_attention_heads)),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("n_routed_experts", Some(self.n_routed_experts)),
            ("num_experts_per_tok", Some(self.num_experts_per_tok)),
            ("intermediate_size", Some(self.intermediate_size)),
            ("moe_intermediate_size", self.moe_intermediate_size),
            ("q_lora_rank", self.q_lora_rank),
            ("kv_lora_rank", self.kv_lora_rank),
            ("vocab_size", Some(self.vocab_size)),
        ];
        for (key, size) in sizes {
            if let Some(size) = size.filter(|size| !(1..=MAX_SIZE).contains(size)) {
                return Err(Error::Description(format!("{key} {size} is not within 1..={MAX_SIZE}")));
            }
        }
        let most = [
            ("num_experts_per_tok", self.num_experts_per_tok, self.n_routed_experts),
            ("first_k_dense_replace", self.first_k_dense_replace.unwrap_or(0), self.num_hidden_layers),
            ("n_shared_experts", self.n_shared_experts.unwrap_or(0), 1 << 10),
            ("shared_expert_intermediate_size", self.shared_expert_intermediate_size.unwrap_or(0), MAX_SIZE),
        ];
        for (key, size, limit) in most {
            if size > limit {
                return Err(Error::Description(format!("{key} {size} exceeds {limit}")));
            }
        }
        Ok(())
    }
}

fn given(key: &str, size: Option<usize>) -> Result<usize> {
    match size.filter(|size| (1..=MAX_SIZE).contains(size)) {
        Some(size) => Ok(size),
        None => {
            Err(Error::Description(format!("kv_lora_rank needs {key} within 1..={MAX_SIZE}, found {size:?}")))
        }
    }
}
