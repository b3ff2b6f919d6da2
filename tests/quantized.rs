//! Experts in fp8 and in 4 bits, as far as a machine without a GPU can tell: a model with them is the model whose experts hold the
//! numbers that they stand for, and what that costs in accuracy on text that the demo models have not seen.

mod support;

use std::sync::Arc;

use moeyard::backend::DType;
use moeyard::backend::reference::ReferenceBackend;
use support::numbers::Numbers;
use support::reading::read;
use support::rounded::rounded_copy;
use support::{Setup, World, model_dir};

/// One rank, or several with experts in replicas, on the backend that has all forms.
fn reference(experts: Option<DType>, ep: usize) -> Setup {
    Setup {
        experts,
        redundant: if ep > 1 { 4 } else { 0 },
        backend: Arc::new(|| Arc::new(ReferenceBackend) as _),
        ..Setup::expert_parallel(DType::Bf16, ep)
    }
}

#[test]
fn a_model_with_quantised_experts_is_the_model_with_their_numbers() {
    let prompt = Numbers(8).tokens(9, 200);
    for model in ["mixtral", "deepseek_v3"] {
        let exact = World::load(&model_dir(model), &reference(None, 1)).generate(&prompt, 3).0;
        for dtype in [DType::F8, DType::I4x2] {
            let copy = rounded_copy(&model_dir(model), dtype);
            let expected = World::load(copy.path(), &reference(None, 1)).generate(&prompt, 3);
            assert!(expected.0 != exact, "{model} {dtype:?}: nothing was quantised");
            for ep in [1, 2] {
                let found = World::load(&model_dir(model), &reference(Some(dtype), ep)).generate(&prompt, 3);
                assert!(found == expected, "{model} {dtype:?}, EP {ep}");
            }
        }
    }
}

/// What is fp8 in blocks of 128 by 128 already keeps its codes and scales.
#[test]
fn an_fp8_checkpoint_has_the_bits_of_a_run_without_quantisation() {
    let prompt = Numbers(9).tokens(9, 200);
    let dir = model_dir("deepseek_v3_fp8");
    let expected = World::load(&dir, &reference(None, 1)).generate(&prompt, 3);
    assert!(World::load(&dir, &reference(Some(DType::F8), 1)).generate(&prompt, 3) == expected);
    assert!(World::load(&dir, &reference(Some(DType::I4x2), 1)).generate(&prompt, 3) != expected);
}

/// By the CPU backend, on the numbers in bf16.
#[test]
fn the_demo_models_read_unseen_text_almost_as_well() {
    for model in ["demo-mixtral", "demo-deepseek"] {
        let plain = read(&model_dir(model), &Setup::solo(DType::Bf16));
        let tokens = plain.best.len();
        assert!(tokens > 600, "{tokens} tokens");
        for (dtype, most, least_alike) in [(DType::F8, 0.02, 95), (DType::I4x2, 0.1, 85)] {
            let copy = rounded_copy(&model_dir(model), dtype);
            let found = read(copy.path(), &Setup::solo(DType::Bf16));
            let alike = plain.best.iter().zip(&found.best).filter(|(a, b)| a == b).count();
            println!(
                "{model}, {tokens} tokens: perplexity {:.3} in bf16, {:.3} with {dtype:?} experts ({:+.4} nats per token); the same best \
                 token at {:.1} %",
                (-plain.mean).exp(),
                (-found.mean).exp(),
                plain.mean - found.mean,
                100.0 * alike as f64 / tokens as f64,
            );
            let off = (plain.mean - found.mean).abs();
            assert!(off < most, "{model} {dtype:?}: {} and {}", plain.mean, found.mean);
            assert!(alike * 100 >= tokens * least_alike, "{model} {dtype:?}: {alike} of {tokens}");
        }
    }
}
