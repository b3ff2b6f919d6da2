//! What a model *is*: plain data, filled by `model/families` from config.json and read by everything above.
//! Differences between families are values here, never an `if family ==` elsewhere.

mod params;

pub use params::{Parameters, Split};

/// A whole decoder-only model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    /// The `model_type` of config.json.
    pub family: &'static str,
    /// Rows of the embedding; may exceed the tokenizer's vocabulary.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Longest sequence the model was made for.
    pub max_position_embeddings: usize,
    /// Attention of every layer (windows differ per layer, shapes do not).
    pub attention: Attention,
    /// Rotary embedding.
    pub rope: Rope,
    /// The decoder layers in order.
    pub layers: Vec<Layer>,
    /// The MoE block, equal in all MoE layers.
    pub moe: Moe,
    /// Kind and epsilon of the norms before attention, before the feed-forward part and at the end.
    pub norm: Norm,
    /// Embeddings are multiplied by this (Granite; else 1).
    pub embedding_scale: f32,
    /// Sublayer outputs are multiplied by this before they join the residual (Granite; else 1).
    pub residual_scale: f32,
    /// Logits are multiplied by this (Granite: 1 / logits_scaling; else 1).
    pub logits_scale: f32,
    /// The head reads the embedding matrix.
    pub tied_embeddings: bool,
    /// The head has a bias.
    pub lm_head_bias: bool,
    /// Tokens that end a text, from config.json (generation_config.json may name others).
    pub eos_token_ids: Vec<u32>,
    /// How matrices are stored, when they are not plain floating point.
    pub quantization: Option<Quantization>,
}

/// One decoder layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Layer {
    /// Sliding window in tokens, the token itself included; `None` attends to everything before.
    pub window: Option<usize>,
    /// What follows attention.
    pub ffn: FeedForward,
}

/// The feed-forward half of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FeedForward {
    /// One gated MLP of this intermediate width.
    Dense {
        /// Width between gate/up and down.
        intermediate: usize,
    },
    /// The model's MoE block.
    Moe,
}

/// Attention shapes.
#[derive(Debug, Clone, PartialEq)]
pub enum Attention {
    /// Grouped-query attention; multi-head and multi-query are its extremes.
    Gqa {
        /// Query heads.
        heads: usize,
        /// Key/value heads; divides `heads`.
        kv_heads: usize,
        /// Width of one head.
        head_dim: usize,
        /// Scores are multiplied by this before the softmax.
        scale: f32,
        /// q, k and v projections have biases.
        qkv_bias: bool,
        /// The output projection has a bias.
        out_bias: bool,
        /// Norm applied to queries and keys before rotary.
        qk_norm: QkNorm,
        /// Learnt per-head logit that joins the softmax and takes weight away (gpt-oss).
        sinks: bool,
        /// q, k and v are clamped to [-x, x], q and k after their norm (OLMoE).
        clip_qkv: Option<f32>,
    },
    /// Multi-head latent attention (DeepSeek): the cache holds one latent and one rotary key per token.
    Mla {
        /// Query heads.
        heads: usize,
        /// Rank of the query down-projection; `None` projects queries directly.
        q_lora_rank: Option<usize>,
        /// Width of the cached latent.
        kv_lora_rank: usize,
        /// Part of a query/key head without rotary.
        nope_dim: usize,
        /// Part of a query/key head with rotary; the key's is shared by all heads.
        rope_dim: usize,
        /// Width of a value head.
        v_dim: usize,
        /// Scores are multiplied by this (yarn's mscale included).
        scale: f32,
        /// The down-projections (`q_a_proj`, `kv_a_proj_with_mqa`) and `o_proj` have biases.
        bias: bool,
        /// Epsilon of `q_a_layernorm` and `kv_a_layernorm` (1e-6 whatever rms_norm_eps says).
        lora_norm_eps: f32,
    },
}

/// Norm of queries and keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// None.
    Off,
    /// RMS norm over each head (Qwen3, GLM-4.5).
    PerHead,
    /// RMS norm over the whole projection (OLMoE). Under tensor parallelism the mean runs over all heads.
    FullWidth,
}

/// Rotary position embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the geometric frequencies.
    pub theta: f64,
    /// Leading dimensions of a head (GQA) or of the rotary part (MLA) that rotate; even.
    pub dim: usize,
    /// Pairs are (2i, 2i+1) rather than (i, i + dim/2).
    pub interleaved: bool,
    /// How frequencies are stretched beyond the trained length.
    pub scaling: RopeScaling,
}

/// Long-context variants of rotary frequencies.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Plain frequencies.
    None,
    /// All positions divided by a factor.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// YaRN (arXiv 2309.00071) as transformers computes it.
    Yarn {
        /// Stretch of the context.
        factor: f64,
        /// Context length before stretching.
        original_max_position: usize,
        /// Rotations above which a frequency stays as it is.
        beta_fast: f64,
        /// Rotations below which a frequency is fully interpolated.
        beta_slow: f64,
        /// Round the correction range to whole dimensions.
        truncate: bool,
        /// Cosines and sines are multiplied by this.
        attention_factor: f64,
    },
    /// LongRoPE: per-dimension factors, one set up to the original length and one beyond.
    /// Which set a token uses belongs to the token: see [`crate::model::TokenForm`].
    LongRope {
        /// Factors for sequences up to `original_max_position`; `dim / 2` of them.
        short_factor: Vec<f64>,
        /// Factors for longer sequences.
        long_factor: Vec<f64>,
        /// Border between the two.
        original_max_position: usize,
        /// Cosines and sines are multiplied by this with the short factors.
        short_mscale: f64,
        /// ... and by this with the long ones.
        long_mscale: f64,
    },
}

/// Kind of layer norm.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Norm {
    /// Root-mean-square norm, or mean-and-variance norm with bias.
    pub kind: NormKind,
    /// Added to the variance.
    pub eps: f32,
}

/// See [`Norm`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// x / rms(x) * weight.
    Rms,
    /// (x - mean) / std * weight + bias (Phi-3.5-MoE).
    Layer,
}

/// The MoE block.
#[derive(Debug, Clone, PartialEq)]
pub struct Moe {
    /// Logical experts per layer.
    pub experts: usize,
    /// Experts chosen per token.
    pub top_k: usize,
    /// Intermediate width of one expert.
    pub intermediate: usize,
    /// What an expert does between its two matrices.
    pub activation: Activation,
    /// Experts have biases on both matrices (gpt-oss).
    pub expert_bias: bool,
    /// How experts are chosen and weighted.
    pub router: Router,
    /// Expert that every token visits.
    pub shared: Option<SharedExpert>,
}

/// Gated activation between the up and the down matrix.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Activation {
    /// silu(gate) * up.
    SiluMul,
    /// gpt-oss: gate is capped at `limit`, up clamped to ±`limit`; gate * sigmoid(alpha * gate) * (up + 1).
    ClampedSwiglu {
        /// 7 in gpt-oss.
        limit: f32,
        /// 1.702 in gpt-oss.
        alpha: f32,
    },
}

/// A shared expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedExpert {
    /// Intermediate width (all shared experts together).
    pub intermediate: usize,
    /// Output is multiplied by sigmoid(shared_expert_gate . x) (Qwen2-MoE).
    pub gated: bool,
}

/// Token-to-expert router. One struct covers all families; see [`crate::backend::Backend::route`] for the formula.
#[derive(Debug, Clone, PartialEq)]
pub struct Router {
    /// Turns logits into scores.
    pub score: Score,
    /// The router's linear layer has a bias (gpt-oss).
    pub logit_bias: bool,
    /// A learnt bias joins the scores for the choice only, never the weights (DeepSeek-V3).
    pub choice_bias: bool,
    /// Group-limited choice.
    pub groups: Option<ExpertGroups>,
    /// Chosen weights are divided by their sum.
    pub renormalize: Renormalize,
    /// Chosen weights are multiplied by this at the end.
    pub scale: f32,
}

/// Score function of a router.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Score {
    /// Softmax over all experts.
    Softmax,
    /// Sigmoid of each logit.
    Sigmoid,
    /// Choose by logit; weights are the softmax over the chosen k only (gpt-oss, Granite).
    SoftmaxOverChosen,
    /// Phi-3.5's sparsemixer for top-2: each weight is a softmax over the logits within 2 * epsilon of that
    /// round's maximum; no renormalisation.
    SparseMixer {
        /// `router_jitter_noise`.
        epsilon: f32,
    },
}

/// Division of chosen weights by their sum.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Renormalize {
    /// Weights stay as they are.
    Off,
    /// w / (sum + eps).
    Sum {
        /// 0, or 1e-20 for DeepSeek-V3.
        eps: f32,
    },
}

/// Experts are chosen only inside the best groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertGroups {
    /// Equal groups of consecutive experts.
    pub count: usize,
    /// Groups kept per token.
    pub keep: usize,
    /// How a group is scored.
    pub score: GroupScore,
}

/// Score of a group of experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupScore {
    /// Its best expert (DeepSeek-V2); experts outside the kept groups count as score 0.
    Max,
    /// Sum of its two best (DeepSeek-V3); experts outside the kept groups count as -inf.
    Top2Sum,
}

/// Storage format of quantised matrices; all are dequantised while loading.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Quantization {
    /// float8_e4m3 with one f32 scale per block (`weight_scale_inv`).
    Fp8Block {
        /// Rows and columns of one block.
        block: [usize; 2],
    },
    /// AutoAWQ "gemm" layout, 4 bits.
    Awq {
        /// Input rows that share a scale; `None` is one group for the whole column (`group_size` -1).
        group_size: Option<usize>,
    },
    /// AutoGPTQ v1 layout, 4 bits, `g_idx` honoured.
    Gptq {
        /// Input rows that share a scale; `None` is one group for the whole column (`group_size` -1).
        group_size: Option<usize>,
    },
    /// gpt-oss's MXFP4 expert matrices (`_blocks`, `_scales`).
    Mxfp4,
}

impl ModelSpec {
    /// Absolute indices of the MoE layers, ascending.
    pub fn moe_layers(&self) -> Vec<usize> {
        (0..self.layers.len()).filter(|&l| self.layers[l].ffn == FeedForward::Moe).collect()
    }
}

impl Attention {
    /// Query heads.
    pub fn heads(&self) -> usize {
        match *self {
            Attention::Gqa { heads, .. } | Attention::Mla { heads, .. } => heads,
        }
    }
}
