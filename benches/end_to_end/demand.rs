//! What a step cannot do without: the bytes it must read and the arithmetic it must do.

use moeyard::backend::Precision;
use moeyard::spec::{Attention, ModelSpec};

/// Floating-point operations (a multiplication and an addition are two) of a whole prompt: all matrices but the head for every
/// token, the head for the last one, and attention over what each token sees, in the form used (MLA: expanded keys and
/// values; expanding them is among the matrices).
pub fn flops_of_prompt(spec: &ModelSpec, tokens: usize) -> f64 {
    let all = spec.parameters();
    let head = if spec.tied_embeddings { all.embedding } else { all.head };
    let matrices = (spec.active_parameters() - all.embedding - all.head) as f64;
    let per_position = match spec.attention {
        Attention::Gqa { heads, head_dim, .. } => heads * 2 * head_dim,
        Attention::Mla { heads, nope_dim, rope_dim, v_dim, .. } => heads * (nope_dim + rope_dim + v_dim),
    };
    let seen = |window: Option<usize>| {
        let window = window.unwrap_or(usize::MAX);
        (1..=tokens).map(|n| n.min(window)).sum::<usize>()
    };
    let pairs: usize = spec.layers.iter().map(|layer| seen(layer.window)).sum();
    2.0 * (tokens as f64 * matrices + head as f64 + (pairs * per_position) as f64)
}

/// Bytes that a decode step reads which meets `distinct` different experts, summed over the layers, and whose sequences see
/// `context` tokens together: the weights of everything but the embedding, of which it reads some rows only, and the cache. Scales of
/// quantised weights are left out.
pub fn bytes_of_step(spec: &ModelSpec, precision: Precision, distinct: usize, context: usize) -> f64 {
    let all = spec.parameters();
    let expert = all.experts / (spec.moe_layers().len() * spec.moe.experts) as u64;
    let head = if spec.tied_embeddings { all.embedding } else { 0 };
    let always = all.total() - all.embedding - all.experts - all.shared + head;
    let experts = all.shared + distinct as u64 * expert;
    let cache = context as u64 * spec.kv_numbers_per_token(1);
    let Precision { weights, activations, experts: quantized } = precision;
    let parts = [(always, weights), (experts, quantized), (cache, activations)];
    parts.map(|(numbers, dtype)| numbers as f64 * dtype.bytes() as f64).iter().sum()
}
