//! What a step cannot do without: the bytes of weights it must read and the arithmetic it must do.

use moeyard::backend::DType;
use moeyard::spec::ModelSpec;

/// Floating-point operations (a multiplication and an addition are two) per prompt token: all matrices but the head, which
/// runs for one token of a prompt, and without attention scores, which grow with the context.
pub fn flops_per_prompt_token(spec: &ModelSpec) -> f64 {
    let all = spec.parameters();
    2.0 * (spec.active_parameters() - all.embedding - all.head) as f64
}

/// Bytes of bf16 weights that a step reads which meets `distinct` different experts, summed over the layers: everything but the
/// embedding, of which a step reads some rows only. The KV cache is not in it.
pub fn bytes_of_step(spec: &ModelSpec, distinct: usize) -> f64 {
    let all = spec.parameters();
    let expert = all.experts / (spec.moe_layers().len() * spec.moe.experts) as u64;
    let always = all.total() - all.embedding - all.experts;
    (always + distinct as u64 * expert) as f64 * DType::Bf16.bytes() as f64
}
