//! Experts in 8 bits: what they cost in accuracy on text that the demo models have not seen, and that a row keeps its bits wherever its
//! experts are.

mod support;

use std::sync::Arc;

use moeyard::backend::DType;
use moeyard::backend::cpu::CpuBackend;
use moeyard::backend::cpu::simd::Isa;
use moeyard::config::RawOptions;
use moeyard::config::flags::{DtypeChoice, QuantizeChoice};
use support::launch::{Answer, Launch, greedy, options};
use support::numbers::Numbers;
use support::placements::scattered;
use support::reading::read;
use support::{Setup, World, model_dir};

const DEMOS: [&str; 2] = ["demo-mixtral", "demo-deepseek"];

#[test]
fn the_demo_models_read_unseen_text_almost_as_well() {
    for model in DEMOS {
        let plain = read(&model_dir(model), &Setup::solo(DType::Bf16));
        let int8 = read(&model_dir(model), &Setup { experts: Some(DType::I8), ..Setup::solo(DType::Bf16) });
        let tokens = plain.best.len();
        let alike = plain.best.iter().zip(&int8.best).filter(|(a, b)| a == b).count();
        println!(
            "{model}, {tokens} tokens: perplexity {:.3} in bf16, {:.3} with int8 experts ({:+.4} nats per token); \
             the same best token at {:.1} %",
            (-plain.mean).exp(),
            (-int8.mean).exp(),
            plain.mean - int8.mean,
            100.0 * alike as f64 / tokens as f64,
        );
        assert!(tokens > 600, "{tokens} tokens");
        // Far above what a model without its experts would say: quantised ones are at work, and say nearly the same.
        assert!((plain.mean - int8.mean).abs() < 0.01, "{model}: {} and {}", plain.mean, int8.mean);
        assert!(alike * 100 >= tokens * 97, "{model}: {alike} of {tokens}");
        assert!(plain.mean.to_bits() != int8.mean.to_bits(), "{model}: nothing was quantised");
    }
}

#[test]
fn a_row_has_the_same_bits_on_every_rank_and_in_every_chunk() {
    let int8 = |setup| Setup { experts: Some(DType::I8), ..setup };
    for (model, dtype) in [("demo-mixtral", DType::F32), ("demo-deepseek", DType::Bf16)] {
        let prompt = Numbers(5).tokens(70, 4096);
        let (expected, _) = World::load(&model_dir(model), &int8(Setup::solo(dtype))).generate(&prompt, 6);
        for (ep, redundant) in [(2, 0), (4, 4)] {
            let setup = int8(Setup { redundant, ..Setup::expert_parallel(dtype, ep) });
            let (found, _) = World::load(&model_dir(model), &setup).generate(&prompt, 6);
            assert!(found == expected, "{model} EP {ep}, {redundant} redundant");
        }
        let mut world = World::load(&model_dir(model), &int8(Setup::solo(dtype)));
        let mut sequence = world.sequence(&prompt);
        let mut found = Vec::new();
        for rows in [1, 30, 39] {
            found.extend(world.step(0, &mut [(&mut sequence, rows)]).logits);
        }
        assert!(found == expected[..70], "{model} in chunks");
    }
}

/// Attention and the head differ between instruction sets by rounding; what experts make of a row would not add to that.
#[test]
fn every_instruction_set_serves_them() {
    let prompt = Numbers(6).tokens(40, 4096);
    let all: Vec<Vec<Vec<f32>>> = Isa::available()
        .into_iter()
        .map(|isa| {
            let backend = Arc::new(move || Arc::new(CpuBackend::new(1, isa).unwrap()) as _);
            let setup = Setup { experts: Some(DType::I8), backend, ..Setup::solo(DType::F32) };
            World::load(&model_dir("demo-mixtral"), &setup).generate(&prompt, 0).0
        })
        .collect();
    for logits in &all[1..] {
        for (row, expected) in logits.iter().zip(&all[0]) {
            let greatest = expected.iter().fold(0.0f32, |greatest, x| greatest.max(x.abs()));
            // An integer of an activation may fall to the other side of a border.
            let error = row.iter().zip(expected).fold(0.0f32, |error, (a, b)| error.max((a - b).abs()));
            assert!(error < 0.02 * greatest, "{error} of {greatest}");
        }
    }
}

#[test]
fn moving_experts_changes_no_bit() {
    let raw = RawOptions { quantize: Some(QuantizeChoice::Int8), ..options(DtypeChoice::Bf16) };
    let mut numbers = Numbers(7);
    let requests: Vec<_> = (0..4).map(|i| greedy(&numbers.tokens(5 + 9 * i, 4096), 12)).collect();
    for model in DEMOS {
        let bits =
            |engine: &Launch| engine.run(requests.clone()).iter().map(Answer::bits).collect::<Vec<_>>();
        let still = Launch::of(model, raw.clone());
        let expected = bits(&still);
        still.finish();
        let spread = RawOptions { expert_parallel_size: Some(3), redundant_experts: Some(4), ..raw.clone() };
        let engine = Launch::of(model, spread);
        for _ in 0..3 {
            assert!(bits(&engine) == expected, "{model}");
            let now = engine.engine().placement().unwrap();
            let spare = now.slots() - now.experts();
            let target = scattered(&mut numbers, now.ranks(), now.experts(), spare, now.layer_ids());
            let report = engine.engine().move_to(target).unwrap().blocking_recv().unwrap();
            assert_eq!(report.outcome, Ok(()));
            assert!(report.progress.bytes > 0, "nothing moved");
        }
        assert!(bits(&engine) == expected, "{model} after moving");
        engine.finish();
    }
}
