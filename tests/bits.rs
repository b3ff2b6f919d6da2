//! The numerics contract: a token's logits have the same bits whatever the expert-parallel degree, the placement, its
//! replicas, the batch around it, the chunks of its prompt and the number of threads, in f32 and in bf16.

mod support;

use moeyard::backend::DType;
use moeyard::model::world::Degrees;
use router_sim::load::Phase;
use support::numbers::Numbers;
use support::placements::scattered;
use support::{Sequence, Setup, World, argmax, cpu, model_dir};

const MODELS: &[&str] = &["mixtral", "deepseek_v3", "phimoe", "demo-mixtral", "demo-deepseek"];
const PROMPT: usize = 41;
const STEPS: usize = 6;

/// How the sequence under test is driven.
#[derive(Clone, Copy)]
struct Drive {
    /// Prompt tokens per step.
    chunk: usize,
    /// Sequences that run beside it.
    company: usize,
    /// Data-parallel rank it runs on.
    group: usize,
}

const ALONE: Drive = Drive { chunk: PROMPT, company: 0, group: 0 };

/// Bits of the logits of every position of the sequence under test.
fn bits(world: &mut World, drive: Drive) -> Vec<Vec<u32>> {
    let vocab = world.family.spec.vocab_size;
    let mut numbers = Numbers(7);
    let prompt = numbers.tokens(PROMPT, vocab);
    let mut sequence = world.sequence(&prompt);
    let mut others: Vec<Sequence> = (0..drive.company)
        .map(|i| {
            let tokens = numbers.tokens(12 + i % 5, vocab);
            world.sequence(&tokens)
        })
        .collect();
    let mut seen = Vec::new();
    let mut next = None;
    while seen.len() < PROMPT + STEPS {
        if let Some(token) = next.take() {
            sequence.tokens.push(token);
        }
        let rows = drive.chunk.min(sequence.tokens.len() - sequence.cached);
        let mut work: Vec<(&mut Sequence, usize)> = Vec::new();
        let mut before = 0;
        let half = others.len() / 2;
        let (front, back) = others.split_at_mut(half);
        // Company before and after it, prompts of some beside single tokens of others.
        for other in front {
            let rows = (other.tokens.len() - other.cached).min(3);
            before += rows;
            work.push((other, rows));
        }
        work.push((&mut sequence, rows));
        for other in back {
            let rows = (other.tokens.len() - other.cached).min(2);
            work.push((other, rows));
        }
        work.retain(|(_, rows)| *rows > 0);
        let stepped = world.step(drive.group, &mut work);
        let own = &stepped.logits[before..before + rows];
        seen.extend(own.iter().map(|row| row.iter().map(|x| x.to_bits()).collect::<Vec<_>>()));
        if sequence.cached == sequence.tokens.len() {
            next = Some(argmax(own.last().unwrap()));
        }
        for other in &mut others {
            if other.cached == other.tokens.len() {
                other.tokens.push(numbers.below(vocab) as u32);
            }
        }
    }
    seen
}

/// Runs `body` for every model and type with the bits of the plain run.
fn for_each_model(body: impl Fn(&str, DType, &Vec<Vec<u32>>)) {
    for model in MODELS {
        for dtype in [DType::F32, DType::Bf16] {
            let plain = bits(&mut World::load(&model_dir(model), &Setup::solo(dtype)), ALONE);
            body(model, dtype, &plain);
        }
    }
}

fn assert_same(plain: &[Vec<u32>], other: &[Vec<u32>], what: &str) {
    for (position, (a, b)) in plain.iter().zip(other).enumerate() {
        let differing = a.iter().zip(b).filter(|(x, y)| x != y).count();
        assert_eq!(differing, 0, "{what}: {differing} of {} logits differ at position {position}", a.len());
    }
    assert_eq!(plain.len(), other.len());
}

#[test]
fn chunks_company_and_threads_leave_the_bits() {
    for_each_model(|model, dtype, plain| {
        let mut solo = World::load(&model_dir(model), &Setup::solo(dtype));
        for chunk in [1, 7, 16, 33] {
            let found = bits(&mut solo, Drive { chunk, ..ALONE });
            assert_same(plain, &found, &format!("{model} {dtype:?} chunk {chunk}"));
        }
        let mut two = World::load(&model_dir(model), &Setup { backend: cpu(2), ..Setup::solo(dtype) });
        for (world, what) in [(&mut solo, "1 thread"), (&mut two, "2 threads")] {
            let found = bits(world, Drive { chunk: 9, company: 63, ..ALONE });
            assert_same(plain, &found, &format!("{model} {dtype:?} batch of 64, {what}"));
        }
        assert_same(plain, &bits(&mut two, ALONE), &format!("{model} {dtype:?} 2 threads"));
    });
}

#[test]
fn expert_parallel_degrees_leave_the_bits() {
    for_each_model(|model, dtype, plain| {
        for ep in [2, 3, 4, 8] {
            let mut world = World::load(&model_dir(model), &Setup::expert_parallel(dtype, ep));
            let drive = Drive { chunk: 13, company: 5, group: ep - 1 };
            assert_same(plain, &bits(&mut world, drive), &format!("{model} {dtype:?} EP {ep}"));
        }
    });
}

#[test]
fn placements_and_replicas_leave_the_bits() {
    for_each_model(|model, dtype, plain| {
        let mut numbers = Numbers(99);
        for (ep, redundant) in [(2, 3), (3, 7), (4, 4)] {
            let setup = Setup { redundant, ..Setup::expert_parallel(dtype, ep) };
            let spec = World::load(&model_dir(model), &setup).family.spec;
            let placement = scattered(&mut numbers, ep, spec.moe.experts, redundant, &spec.moe_layers());
            let mut world =
                World::load(&model_dir(model), &Setup { placement: Some(placement), ..setup.clone() });
            let drive = Drive { chunk: 20, company: 9, group: 0 };
            assert_same(plain, &bits(&mut world, drive), &format!("{model} {dtype:?} scattered EP {ep}"));
            let mut linear = World::load(&model_dir(model), &setup);
            assert_same(plain, &bits(&mut linear, drive), &format!("{model} {dtype:?} replicas EP {ep}"));
        }
    });
}

#[test]
fn at_equal_tensor_parallelism_expert_parallelism_leaves_the_bits() {
    for model in MODELS {
        for dtype in [DType::F32, DType::Bf16] {
            let world = |data_parallel| {
                let degrees = Degrees { tensor_parallel: 2, data_parallel, expert_tp: 1 };
                World::load(&model_dir(model), &Setup { degrees, ..Setup::solo(dtype) })
            };
            // Rows are owned differently when the batch differs: what a row's owner computes must not.
            let plain = bits(&mut world(1), ALONE);
            for (dp, drive) in [
                (1, Drive { chunk: 5, company: 3, group: 0 }),
                (2, Drive { chunk: 11, company: 2, group: 1 }),
            ] {
                let what = format!("{model} {dtype:?} TP 2 DP {dp}");
                assert_same(&plain, &bits(&mut world(dp), drive), &what);
            }
        }
    }
}

#[test]
fn every_choice_is_counted_once() {
    let mut world =
        World::load(&model_dir("mixtral"), &Setup { redundant: 4, ..Setup::expert_parallel(DType::F32, 4) });
    bits(&mut world, Drive { chunk: 10, company: 0, group: 2 });
    let top_k = world.family.spec.moe.top_k;
    let load = world.load_snapshot();
    for layer in 0..load.layer_ids.len() {
        for (phase, tokens) in [(Phase::Prefill, PROMPT), (Phase::Decode, STEPS)] {
            let expected = (tokens * top_k) as u64;
            assert_eq!(load.experts_of(phase, layer).iter().sum::<u64>(), expected);
            assert_eq!(load.ranks_of(phase, layer).iter().sum::<u64>(), expected);
        }
    }
}
