//! How a family names its tensors: templates as data, one per role. A family under `model/families` is a value of
//! [`TensorNames`]; nothing else in the engine knows a tensor's name.
//!
//! Templates name *modules*: a linear layer or norm `m` keeps its matrix in `m.weight`, its bias in `m.bias` and its
//! quantised companions in `m.qweight`, `m.weight_scale_inv` and so on. Which roles a model has, biases included,
//! follows from [`crate::spec::ModelSpec`]; templates of roles it does not have are never looked at.
//! `{layer}` stands for the absolute layer index, `{expert}` for the expert id.

/// Tensor name templates of one family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorNames {
    /// Token embedding `[vocab, hidden]`.
    pub embed: &'static str,
    /// Output head `[vocab, hidden]`; absent from files of tied models.
    pub head: &'static str,
    /// Norm before the head `[hidden]`.
    pub final_norm: &'static str,
    /// Norm before attention `[hidden]`.
    pub input_norm: &'static str,
    /// Norm before the feed-forward half `[hidden]`.
    pub post_attention_norm: &'static str,
    /// Queries `[heads * head_dim, hidden]`; also MLA's without a query rank.
    pub q: &'static str,
    /// Keys `[kv_heads * head_dim, hidden]`.
    pub k: &'static str,
    /// Values `[kv_heads * head_dim, hidden]`.
    pub v: &'static str,
    /// Attention output `[hidden, heads * value width]`.
    pub o: &'static str,
    /// Norm of queries, `[head_dim]` or `[heads * head_dim]`.
    pub q_norm: &'static str,
    /// Norm of keys, `[head_dim]` or `[kv_heads * head_dim]`.
    pub k_norm: &'static str,
    /// Full tensor name of the attention sinks `[heads]`.
    pub sinks: &'static str,
    /// MLA's query down-projection `[q_lora_rank, hidden]`.
    pub q_a: &'static str,
    /// Norm of its output `[q_lora_rank]`.
    pub q_a_norm: &'static str,
    /// MLA's query up-projection `[heads * (nope_dim + rope_dim), q_lora_rank]`.
    pub q_b: &'static str,
    /// MLA's latent and rotary key `[kv_lora_rank + rope_dim, hidden]`.
    pub kv_a: &'static str,
    /// Norm of the latent `[kv_lora_rank]`.
    pub kv_a_norm: &'static str,
    /// MLA's keys and values out of the latent `[heads * (nope_dim + v_dim), kv_lora_rank]`.
    pub kv_b: &'static str,
    /// Router `[experts, hidden]`.
    pub router: &'static str,
    /// Full tensor name of the bias that joins the scores for the choice only `[experts]`.
    pub choice_bias: &'static str,
    /// The routed experts.
    pub experts: ExpertNames,
    /// The MLP of layers without experts.
    pub dense: MlpNames,
    /// The shared expert.
    pub shared: MlpNames,
    /// The gate of the shared expert's output `[1, hidden]`.
    pub shared_gate: &'static str,
}

/// Modules of a gated MLP: gate and up `[intermediate, hidden]`, down `[hidden, intermediate]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MlpNames {
    /// Goes through the activation.
    pub gate: &'static str,
    /// Is multiplied with it.
    pub up: &'static str,
    /// Leads back to the hidden width.
    pub down: &'static str,
}

/// How a file lays out the routed experts of one layer (E experts, hidden width H, intermediate width I).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExpertNames {
    /// Three modules per expert; templates use `{expert}`. Mixtral's w1, w3, w2 are gate, up, down.
    PerExpert(MlpNames),
    /// Two tensors for all experts, out x in (Granite). Biases would be `{gate_up}_bias` `[E, 2I]` and `{down}_bias`.
    FusedLinear {
        /// Full tensor name, `[E, 2I, H]`: gate rows first, then up.
        gate_up: &'static str,
        /// Full tensor name, `[E, H, I]`.
        down: &'static str,
    },
    /// Two tensors for all experts, in x out, with interleaved gate and up columns (gpt-oss). Published MXFP4 files
    /// have `{gate_up}_blocks` `[E, 2I, H/32, 16]` and `{gate_up}_scales` `[E, 2I, H/32]` in its place (out x in),
    /// and likewise for down.
    FusedInterleaved {
        /// Full tensor name, `[E, H, 2I]`: column 2i is gate i, column 2i + 1 is up i. `{gate_up}_bias` is `[E, 2I]`.
        gate_up: &'static str,
        /// Full tensor name, `[E, I, H]`. `{down}_bias` is `[E, H]`.
        down: &'static str,
    },
}

/// What a tensor outside the gated MLPs is for; see the fields of [`TensorNames`] for shapes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(
    missing_docs,
    reason = "each variant is the field of TensorNames with the same name, documented there"
)]
pub enum Role {
    Embed,
    Head,
    FinalNorm,
    InputNorm,
    PostAttentionNorm,
    Q,
    K,
    V,
    O,
    QNorm,
    KNorm,
    Sinks,
    QA,
    QANorm,
    QB,
    KvA,
    KvANorm,
    KvB,
    Router,
    ChoiceBias,
    SharedGate,
}

impl TensorNames {
    /// The names most families share. A family overrides what differs:
    /// `TensorNames { router: "...", experts: ExpertNames::PerExpert(...), ..TensorNames::COMMON }`.
    pub const COMMON: TensorNames = TensorNames {
        embed: "model.embed_tokens",
        head: "lm_head",
        final_norm: "model.norm",
        input_norm: "model.layers.{layer}.input_layernorm",
        post_attention_norm: "model.layers.{layer}.post_attention_layernorm",
        q: "model.layers.{layer}.self_attn.q_proj",
        k: "model.layers.{layer}.self_attn.k_proj",
        v: "model.layers.{layer}.self_attn.v_proj",
        o: "model.layers.{layer}.self_attn.o_proj",
        q_norm: "model.layers.{layer}.self_attn.q_norm",
        k_norm: "model.layers.{layer}.self_attn.k_norm",
        sinks: "model.layers.{layer}.self_attn.sinks",
        q_a: "model.layers.{layer}.self_attn.q_a_proj",
        q_a_norm: "model.layers.{layer}.self_attn.q_a_layernorm",
        q_b: "model.layers.{layer}.self_attn.q_b_proj",
        kv_a: "model.layers.{layer}.self_attn.kv_a_proj_with_mqa",
        kv_a_norm: "model.layers.{layer}.self_attn.kv_a_layernorm",
        kv_b: "model.layers.{layer}.self_attn.kv_b_proj",
        router: "model.layers.{layer}.mlp.gate",
        choice_bias: "model.layers.{layer}.mlp.gate.e_score_correction_bias",
        experts: ExpertNames::PerExpert(MlpNames {
            gate: "model.layers.{layer}.mlp.experts.{expert}.gate_proj",
            up: "model.layers.{layer}.mlp.experts.{expert}.up_proj",
            down: "model.layers.{layer}.mlp.experts.{expert}.down_proj",
        }),
        dense: MlpNames {
            gate: "model.layers.{layer}.mlp.gate_proj",
            up: "model.layers.{layer}.mlp.up_proj",
            down: "model.layers.{layer}.mlp.down_proj",
        },
        shared: MlpNames {
            gate: "model.layers.{layer}.mlp.shared_experts.gate_proj",
            up: "model.layers.{layer}.mlp.shared_experts.up_proj",
            down: "model.layers.{layer}.mlp.shared_experts.down_proj",
        },
        shared_gate: "model.layers.{layer}.mlp.shared_expert_gate",
    };

    /// The template of a role.
    pub fn template(&self, role: Role) -> &'static str {
        match role {
            Role::Embed => self.embed,
            Role::Head => self.head,
            Role::FinalNorm => self.final_norm,
            Role::InputNorm => self.input_norm,
            Role::PostAttentionNorm => self.post_attention_norm,
            Role::Q => self.q,
            Role::K => self.k,
            Role::V => self.v,
            Role::O => self.o,
            Role::QNorm => self.q_norm,
            Role::KNorm => self.k_norm,
            Role::Sinks => self.sinks,
            Role::QA => self.q_a,
            Role::QANorm => self.q_a_norm,
            Role::QB => self.q_b,
            Role::KvA => self.kv_a,
            Role::KvANorm => self.kv_a_norm,
            Role::KvB => self.kv_b,
            Role::Router => self.router,
            Role::ChoiceBias => self.choice_bias,
            Role::SharedGate => self.shared_gate,
        }
    }
}

/// Fills a template. `expert` is ignored by templates without `{expert}`.
pub fn fill(template: &str, layer: usize, expert: usize) -> String {
    template.replace("{layer}", &layer.to_string()).replace("{expert}", &expert.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_are_filled() {
        let ExpertNames::PerExpert(mlp) = TensorNames::COMMON.experts else { unreachable!() };
        assert_eq!(fill(mlp.up, 12, 160), "model.layers.12.mlp.experts.160.up_proj");
        assert_eq!(fill(TensorNames::COMMON.embed, 3, 4), "model.embed_tokens");
    }
}
