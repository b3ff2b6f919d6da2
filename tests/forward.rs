//! The forward pass against the golden fixtures, on the slow reference backend: what is wrong here is wrong in the
//! model, not in a kernel.

mod support;

use std::sync::Arc;

use moeyard::backend::DType;
use moeyard::backend::reference::ReferenceBackend;
use moeyard::model::world::Degrees;
use support::{FIXTURES, Golden, Setup, World, ids, model_dir};

#[test]
fn the_reference_backend_reproduces_every_golden() {
    let setup = Setup {
        dtype: DType::F32,
        degrees: Degrees::SOLO,
        redundant: 0,
        placement: None,
        backend: Arc::new(|| Arc::new(ReferenceBackend)),
        max_model_len: 128,
    };
    for fixture in FIXTURES {
        let dir = model_dir(fixture);
        let golden = Golden::open(&dir);
        let mut world = World::load(&dir, &setup);
        for prompt in golden.json["prompts"].as_array().unwrap() {
            check_prompt(fixture, &golden, prompt, &mut world);
        }
    }
}

fn check_prompt(fixture: &str, golden: &Golden, prompt: &serde_json::Value, world: &mut World) {
    let what = format!("{fixture} {}", prompt["id"]);
    let tokens = ids(&prompt["input_ids"]);
    let expected_tokens = ids(&prompt["greedy"]["tokens"]);
    let (logits, generated) = world.generate(&tokens, 6);
    assert_eq!(generated, expected_tokens[..6], "{what}: greedy tokens");
    let tolerance = golden.json["tolerance"]["f32_logits_abs"].as_f64().unwrap();
    let last = golden.tensor(&prompt["last_logits"]);
    let error = worst(&logits[tokens.len() - 1], &last);
    assert!(error <= tolerance, "{what}: last logits off by {error:e}, tolerance {tolerance:e}");
}

fn worst(a: &[f32], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(&x, y)| (f64::from(x) - y).abs()).fold(0.0, f64::max)
}
