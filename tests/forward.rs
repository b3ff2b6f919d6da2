//! The forward pass against the golden fixtures, in f32, on every backend: what fails on the reference backend is wrong in
//! the model, what fails only on the CPU backend is wrong in a kernel.

mod support;

use std::sync::Arc;

use moeyard::backend::cpu::CpuBackend;
use moeyard::backend::cpu::simd::Isa;
use moeyard::backend::reference::ReferenceBackend;
use moeyard::backend::{Backend, DType};
use moeyard::model::world::Degrees;
use support::fixtures::FIXTURES;
use support::{Golden, Setup, Stepped, World, argmax, ids, model_dir};

fn check(setup: Setup) {
    for fixture in FIXTURES {
        let dir = model_dir(fixture);
        let golden = Golden::open(&dir);
        let mut world = World::load(&dir, &setup);
        for prompt in golden.json["prompts"].as_array().unwrap() {
            check_prompt(fixture, &golden, prompt, &mut world);
        }
    }
}

fn on(backend: impl Fn() -> Arc<dyn Backend> + 'static) -> Setup {
    Setup { backend: Arc::new(backend), max_model_len: 128, ..Setup::solo(DType::F32) }
}

#[test]
fn the_reference_backend_reproduces_every_golden() {
    check(on(|| Arc::new(ReferenceBackend)));
}

#[test]
fn the_cpu_backend_reproduces_every_golden_with_every_instruction_set() {
    for isa in Isa::available() {
        check(on(move || Arc::new(CpuBackend::new(2, isa).unwrap())));
    }
}

#[test]
fn tensor_and_expert_parallel_worlds_reproduce_every_golden() {
    for (tp, dp, expert_tp) in [(2, 1, 1), (2, 2, 1), (2, 1, 2), (4, 1, 2), (1, 2, 2)] {
        let degrees = Degrees { tensor_parallel: tp, data_parallel: dp, expert_tp };
        check(Setup { degrees, ..on(|| Arc::new(CpuBackend::detect(1).unwrap())) });
    }
}

/// Goldens of a fixture's weights under another config.json.
#[test]
fn settings_no_fixture_has_reproduce_their_goldens() {
    check_variant("olmoe_clip_qkv");
}

fn check_variant(name: &str) {
    let path = model_dir("variants").join(name).with_extension("json");
    let golden: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let fixture = model_dir(golden["fixture"].as_str().unwrap());
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(&fixture).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    let mut config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(fixture.join("config.json")).unwrap()).unwrap();
    for (key, value) in golden["config"].as_object().unwrap() {
        config[key] = value.clone();
    }
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();

    let tokens = ids(&golden["input_ids"]);
    let expected: Vec<f64> =
        golden["last_logits"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
    for tensor_parallel in [1, 2] {
        let degrees = Degrees { tensor_parallel, data_parallel: 1, expert_tp: 1 };
        let setup = Setup { degrees, ..on(|| Arc::new(CpuBackend::detect(1).unwrap())) };
        let mut world = World::load(dir.path(), &setup);
        let mut sequence = world.sequence(&tokens);
        let stepped = world.step(0, &mut [(&mut sequence, tokens.len())]);
        let error = worst(stepped.logits.last().unwrap(), &expected);
        assert!(error <= 1e-4, "{name} with {degrees:?}: last logits off by {error:e}");
    }
}

fn check_prompt(fixture: &str, golden: &Golden, prompt: &serde_json::Value, world: &mut World) {
    let what = format!("{fixture} {} {:?}", prompt["id"], world.degrees());
    let tolerance = |key: &str| golden.json["tolerance"][key].as_f64().unwrap();
    let tokens = ids(&prompt["input_ids"]);
    let mut sequence = world.sequence(&tokens);
    let stepped = world.step(0, &mut [(&mut sequence, tokens.len())]);
    check_router(&what, golden, prompt, &stepped, tolerance("f32_router_weight_abs"));

    let limit = tolerance("f32_logits_abs");
    let vocab = stepped.logits[0].len();
    let last = worst(stepped.logits.last().unwrap(), &golden.tensor(&prompt["last_logits"]));
    assert!(last <= limit, "{what}: last logits off by {last:e}, tolerance {limit:e}");
    if prompt.get("all_logits").is_some() {
        for (t, row) in golden.tensor(&prompt["all_logits"]).chunks_exact(vocab).enumerate() {
            let error = worst(&stepped.logits[t], row);
            assert!(error <= limit, "{what}: logits {t} off by {error:e}, tolerance {limit:e}");
        }
    }

    let expected = ids(&prompt["greedy"]["tokens"]);
    let mut logits = stepped.logits.last().unwrap().clone();
    let mut generated = Vec::new();
    for _ in 0..expected.len() {
        generated.push(argmax(&logits));
        sequence.tokens.push(argmax(&logits));
        logits = world.step(0, &mut [(&mut sequence, 1)]).logits.remove(0);
    }
    assert_eq!(generated, expected, "{what}: greedy tokens");
}

/// Expert sets must be equal; a weight belongs to the id in its place.
fn check_router(what: &str, golden: &Golden, prompt: &serde_json::Value, stepped: &Stepped, tolerance: f64) {
    let (rows, k) = (stepped.routing.rows, stepped.routing.top_k);
    for (layer, expected) in prompt["router"].as_array().unwrap().iter().enumerate() {
        let expected_ids = golden.tensor(&expected["expert_ids"]);
        let expected_weights = golden.tensor(&expected["expert_weights"]);
        for row in 0..rows {
            let at = (layer * rows + row) * k;
            let mut found: Vec<(u32, f64)> = (at..at + k)
                .map(|i| (stepped.routing.ids[i], f64::from(stepped.routing.weights[i])))
                .collect();
            let mut wanted: Vec<(u32, f64)> =
                (row * k..(row + 1) * k).map(|i| (expected_ids[i] as u32, expected_weights[i])).collect();
            found.sort_by_key(|pair| pair.0);
            wanted.sort_by_key(|pair| pair.0);
            for (f, w) in found.iter().zip(&wanted) {
                assert_eq!(f.0, w.0, "{what}: experts of MoE layer {layer}, token {row}");
                let error = (f.1 - w.1).abs();
                assert!(error <= tolerance, "{what}: weight of expert {} off by {error:e}", f.0);
            }
        }
    }
}

fn worst(a: &[f32], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(&x, y)| (f64::from(x) - y).abs()).fold(0.0, f64::max)
}
