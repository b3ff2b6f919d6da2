//! Experts move while requests run: no bit of any answer changes, whatever moves, and a migration that fails leaves
//! everything as it was.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use moeyard::Error;
use moeyard::backend::Backend;
use moeyard::backend::DType;
use moeyard::backend::reference::ReferenceBackend;
use moeyard::config::RawOptions;
use moeyard::config::flags::{DtypeChoice, SplitChoice};
use moeyard::engine::rebalance::Mode;
use moeyard::engine::request::{Event, FinishReason, Request, Sampling};
use moeyard::engine::scripted::{self, EXPERTS, Fault, LAYERS, Script, experts, setups_with};
use moeyard::engine::{
    Engine, EngineHandle, EngineOptions, Experts, Hooks, MigrationProgress, MigrationReport, RequestStream,
};
use moeyard::model::transformer::Transformer;
use moeyard::model::{Batch, Model, StepOutput};
use moeyard::moe::migrate::{Checksums, Slice, Switch};
use router_sim::placement::Placement;
use router_sim::split::Split;
use std::time::Duration;
use support::launch::{Answer, Launch, TokenBits, greedy, options};
use support::numbers::Numbers;
use support::placements::scattered;
use support::{Setup, World, model_dir};

/// Waits for the end of a migration that must succeed.
fn arrive(engine: &EngineHandle, target: Placement) -> MigrationReport {
    let report = engine.move_to(target).unwrap().blocking_recv().unwrap();
    assert_eq!(report.outcome, Ok(()));
    report
}

/// Another valid placement for the same engine.
fn elsewhere(numbers: &mut Numbers, current: &Placement) -> Placement {
    let spare = current.slots() - current.experts();
    scattered(numbers, current.ranks(), current.experts(), spare, current.layer_ids())
}

fn assert_same_map(a: &Placement, b: &Placement) {
    (0..a.layers()).for_each(|layer| assert_eq!(a.layer(layer).slots(), b.layer(layer).slots()));
}

// ---- real models

/// Prompts of several lengths with a common beginning, greedy and sampled, some longer than a chunk.
fn requests(seed: u64, vocab: usize) -> Vec<Request> {
    let mut numbers = Numbers(seed);
    let common = numbers.tokens(20, vocab);
    let request = |i: usize| {
        let own = 3 + numbers.below(40);
        let beginning = if i.is_multiple_of(2) { &common[..] } else { &[] };
        let prompt = [beginning, &numbers.tokens(own, vocab)].concat();
        let max_tokens = 6 + numbers.below(12);
        let sampling = Sampling { temperature: 0.9, seed: i as u64, ..Sampling::GREEDY };
        match i % 3 {
            0 => Request { sampling, ..greedy(&prompt, max_tokens) },
            _ => greedy(&prompt, max_tokens),
        }
    };
    (0..6).map(request).collect()
}

fn bits(answers: &[Answer]) -> Vec<Vec<TokenBits>> {
    answers.iter().map(Answer::bits).collect()
}

/// Answers of an engine in which nothing moves.
fn still(model: &str, raw: &RawOptions, requests: &[Request]) -> Vec<Vec<TokenBits>> {
    let engine = Launch::of(model, raw.clone());
    let answers = bits(&engine.run(requests.to_vec()));
    engine.finish();
    answers
}

/// Runs the requests again and again while experts move all the time, until at least `switches` placements have come
/// into force under load. All answers must be `expected`.
/// Returns the steps that it took.
fn check_moving(
    model: &str,
    raw: &RawOptions,
    requests: &[Request],
    expected: &[Vec<TokenBits>],
    switches: u64,
) -> u64 {
    let engine = Launch::of(model, raw.clone());
    let what = format!("{model} {raw:?}");
    let mut numbers = Numbers(switches ^ 77);
    let enough = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let traffic = scope.spawn(|| {
            while !enough.load(Ordering::Relaxed) {
                let answers = engine.run(requests.to_vec());
                for (i, (answer, expected)) in bits(&answers).iter().zip(expected).enumerate() {
                    assert_eq!(answer, expected, "request {i}: {what}");
                }
            }
        });
        let mut target = Arc::unwrap_or_clone(engine.engine().placement().unwrap());
        while engine.engine().placement().unwrap().version() < switches && !traffic.is_finished() {
            target = elsewhere(&mut numbers, &target);
            let report = arrive(engine.engine(), target.clone());
            let now = engine.engine().placement().unwrap();
            assert_same_map(&now, &target);
            assert_eq!(report.version, now.version());
            let MigrationProgress { arrived, arrivals, bytes, total_bytes, .. } = report.progress;
            assert_eq!((arrived, bytes), (arrivals, total_bytes));
        }
        enough.store(true, Ordering::Relaxed);
        traffic.join().unwrap();
    });
    let stats = engine.stats();
    assert_eq!(stats.outcomes.error, 0);
    engine.finish();
    stats.steps
}

#[test]
fn answers_keep_their_bits_whatever_the_parallel_degrees() {
    for model in ["mixtral", "deepseek_v3"] {
        let raw = RawOptions { prefill_chunk_size: Some(16), ..options(DtypeChoice::F32) };
        let requests = requests(1, 500);
        let plain = still(model, &raw, &requests);
        for ep in [2, 3, 4, 8] {
            let raw = RawOptions {
                expert_parallel_size: Some(ep),
                redundant_experts: Some(ep + 1),
                staging_slots: Some(1 + ep % 3),
                ..raw.clone()
            };
            check_moving(model, &raw, &requests, &plain, 40);
        }
        // Other degrees of tensor parallelism have other bits: each is compared with itself.
        for (tp, dp, ep) in [(2, 1, 2), (2, 2, 4), (2, 2, 2), (1, 4, 2)] {
            let raw = RawOptions {
                tensor_parallel_size: Some(tp),
                data_parallel_size: Some(dp),
                expert_parallel_size: Some(ep),
                redundant_experts: Some(3),
                ..raw.clone()
            };
            let plain = still(model, &raw, &requests);
            check_moving(model, &raw, &requests, &plain, 30);
        }
    }
}

#[test]
fn answers_keep_their_bits_in_every_weight_format() {
    for model in
        ["mixtral_awq", "mixtral_gptq", "deepseek_v3_fp8", "gpt_oss", "demo-mixtral", "demo-deepseek"]
    {
        let raw = RawOptions { max_model_len: Some(96), ..options(DtypeChoice::Bf16) };
        let requests = requests(2, 500);
        let plain = still(model, &raw, &requests);
        let raw = RawOptions { expert_parallel_size: Some(2), redundant_experts: Some(3), ..raw };
        check_moving(model, &raw, &requests, &plain, 12);
    }
}

/// Models, degrees, spare slots, splits, staging places, prefix caching, traffic and placements drawn at random; something
/// moves at every step.
#[test]
fn thousands_of_steps_keep_their_bits_whatever_moves() {
    let splits = [
        SplitChoice::Exact,
        SplitChoice::Even,
        SplitChoice::Waterfill,
        SplitChoice::Nearest,
        SplitChoice::Activated,
    ];
    let (mut steps, mut numbers) = (0, Numbers(2026));
    for seed in 0.. {
        if steps > 3000 {
            break;
        }
        let model = ["mixtral", "deepseek_v3", "qwen2_moe"][seed % 3];
        let mut pick = |n| numbers.below(n);
        let plain = RawOptions {
            prefill_chunk_size: Some(8 + pick(30)),
            no_prefix_caching: Some(pick(4) == 0),
            ..options(DtypeChoice::F32)
        };
        let ep = 2 + pick(3);
        let raw = RawOptions {
            expert_parallel_size: Some(ep),
            redundant_experts: Some(pick(2 * ep + 1)),
            split: Some(splits[seed % splits.len()]),
            staging_slots: Some(1 + pick(3)),
            max_num_seqs: Some(1 + pick(4)),
            ..plain.clone()
        };
        let requests = requests(pick(1 << 20) as u64, 500);
        let expected = still(model, &plain, &requests);
        steps += check_moving(model, &raw, &requests, &expected, 60);
    }
}

#[test]
fn answers_keep_their_bits_while_the_rebalancer_moves() {
    for model in ["mixtral", "deepseek_v3", "demo-deepseek"] {
        let raw = RawOptions { prefill_chunk_size: Some(16), ..options(DtypeChoice::F32) };
        let requests = requests(4, 500);
        let expected = still(model, &raw, &requests);
        let raw = RawOptions {
            expert_parallel_size: Some(4),
            redundant_experts: Some(4),
            rebalance: Some(Mode::Every(3)),
            rebalance_window: Some(6),
            ..raw
        };
        let engine = Launch::of(model, raw);
        let first = engine.engine().placement().unwrap();
        let applied = || engine.engine().rebalance_status().applied;
        let (mut rounds, mut ordered) = (0, 0);
        while applied() < ordered + 3 {
            rounds += 1;
            assert!(rounds < 3000, "{model}: {:?}", engine.engine().rebalance_status());
            // It has settled, or is just moving: back to where nobody looked at any load.
            if rounds % 4 == 0
                && let Ok(report) = engine.engine().move_to(Placement::clone(&first))
            {
                assert_eq!(report.blocking_recv().unwrap().outcome, Ok(()));
                ordered += 1;
            }
            // Other companies, so that the load changes.
            let chosen: Vec<usize> =
                (0..requests.len()).filter(|i| !(i + rounds).is_multiple_of(4)).collect();
            let answers = bits(&engine.run(chosen.iter().map(|&i| requests[i].clone()).collect()));
            for (answer, &i) in answers.iter().zip(&chosen) {
                assert_eq!(answer, &expected[i], "{model}: request {i}");
            }
        }
        engine.finish();
    }
}

/// A model that damages or loses a slice of every other migration. All ranks lose the same ones; nothing in the engine is told.
struct Faulty {
    model: Transformer,
    /// Migrations begun, counted by who orders them: how many slices one takes is a matter of time.
    ordered: Arc<AtomicU64>,
    migration: u64,
    /// Slices of this migration.
    slices: u64,
}

impl Model for Faulty {
    fn forward(&mut self, batch: &Batch<'_>, out: &mut StepOutput) -> moeyard::Result<()> {
        self.model.forward(batch, out)
    }

    fn transfer(&mut self, slice: &Slice) -> moeyard::Result<Checksums> {
        let migration = self.ordered.load(Ordering::Acquire);
        self.slices = if migration == self.migration { self.slices + 1 } else { 1 };
        self.migration = migration;
        let sums = self.model.transfer(slice)?;
        let at_fault = self.slices == 1 + migration / 4 % 3;
        match migration % 4 {
            1 if at_fault => Ok(Checksums { received: sums.received.map(|sum| sum ^ 1), ..sums }),
            3 if at_fault => Err(Error::Device { device: "cpu".into(), why: "a copy was lost".into() }),
            _ => Ok(sums),
        }
    }

    fn switch(&mut self, switch: &Switch) {
        self.model.switch(switch);
    }
}

/// An engine over a world of "mixtral", with something around its models.
fn engine_over(setup: &Setup, around: impl Fn(Transformer) -> Box<dyn Model>) -> EngineHandle {
    let world = World::load(&model_dir("mixtral"), setup);
    let options = EngineOptions {
        vocab_size: world.family.spec.vocab_size,
        max_model_len: setup.max_model_len,
        block_size: support::BLOCK,
        ..scripted::options()
    };
    let ranks = setup.degrees.expert_parallel();
    let experts =
        Experts { in_force: world.in_force(), ..experts(ranks, setup.redundant, setup.staging_slots) };
    let hooks = Hooks { experts: Some(experts), ..Hooks::default() };
    Engine::start(world.into_setups(around), options, hooks).unwrap()
}

/// Ranks that work out by themselves who computes what, as GPUs do: their answers are those of one, wherever experts are.
#[test]
fn answers_keep_their_bits_on_ranks_that_group_by_themselves() {
    let reference = || Arc::new(ReferenceBackend) as Arc<dyn Backend>;
    let solo = Setup { backend: Arc::new(reference), ..Setup::solo(DType::Bf16) };
    let degrees = Setup::expert_parallel(DType::Bf16, 4).degrees;
    let several = Setup { degrees, redundant: 4, staging_slots: 1, split: Split::Even, ..solo.clone() };
    let requests = requests(5, 500);
    let answers = |engine: &EngineHandle| {
        let streams: Vec<_> = requests.iter().map(|r| engine.submit(r.clone()).unwrap()).collect();
        bits(&streams.into_iter().map(Answer::of).collect::<Vec<_>>())
    };
    let alone = engine_over(&solo, |model| Box::new(model));
    let expected = answers(&alone);
    alone.shutdown(Duration::ZERO);

    let engine = engine_over(&several, |model| Box::new(model));
    let mut numbers = Numbers(9);
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let traffic = scope.spawn(|| {
            while !ended.load(Ordering::Relaxed) {
                assert_eq!(answers(&engine), expected);
            }
        });
        for _ in 0..4 {
            if !traffic.is_finished() {
                let target = elsewhere(&mut numbers, &engine.placement().unwrap());
                arrive(&engine, target.clone());
                assert_same_map(&engine.placement().unwrap(), &target);
            }
        }
        ended.store(true, Ordering::Relaxed);
        traffic.join().unwrap();
    });
    assert_eq!(answers(&engine), expected);
    engine.shutdown(Duration::ZERO);
}

#[test]
fn answers_keep_their_bits_when_migrations_fail() {
    let raw = options(DtypeChoice::F32);
    let requests = requests(3, 500);
    let expected = still("mixtral", &raw, &requests);

    let setup = Setup { redundant: 4, staging_slots: 1, ..Setup::expert_parallel(DType::F32, 3) };
    let ordered = Arc::new(AtomicU64::new(0));
    let engine = engine_over(&setup, |model| {
        Box::new(Faulty { model, ordered: Arc::clone(&ordered), migration: 0, slices: 0 })
    });
    let mut numbers = Numbers(8);
    let (mut whole, mut failed) = (0, 0);
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let traffic = scope.spawn(|| {
            while !ended.load(Ordering::Relaxed) {
                let streams: Vec<_> = requests.iter().map(|r| engine.submit(r.clone()).unwrap()).collect();
                let answers: Vec<Answer> = streams.into_iter().map(Answer::of).collect();
                assert_eq!(bits(&answers), expected);
            }
        });
        while (whole < 5 || failed < 5) && !traffic.is_finished() {
            let before = engine.placement().unwrap();
            let target = elsewhere(&mut numbers, &before);
            ordered.fetch_add(1, Ordering::Release);
            let report = engine.move_to(target.clone()).unwrap().blocking_recv().unwrap();
            assert_eq!(report.version, before.version() + report.switches);
            match report.outcome {
                Ok(()) => {
                    whole += 1;
                    assert_same_map(&engine.placement().unwrap(), &target);
                }
                Err(why) => {
                    failed += 1;
                    assert!(why.contains("arrived damaged") || why.contains("a copy was lost"), "{why}");
                }
            }
        }
        ended.store(true, Ordering::Relaxed);
        traffic.join().unwrap();
    });
    engine.shutdown(Duration::ZERO);
}

// ---- the scripted model: faults and refusals

const RANKS: usize = 4;

/// An engine of four scripted ranks with eight spare slots, and its script.
fn scripted(staging_slots: usize, fault: Fault) -> (EngineHandle, Script) {
    let options = scripted::options();
    let backend: Arc<dyn Backend> = Arc::new(ReferenceBackend);
    let experts = experts(RANKS, 8, staging_slots);
    let script = Script { fault, ..Script::of(&options) };
    let placement = experts.in_force.placement();
    let ranks = setups_with(&script, (2, 2), options.max_logit_rows, &backend, &placement).unwrap();
    let hooks = Hooks { experts: Some(experts), ..Hooks::default() };
    (Engine::start(ranks, options, hooks).unwrap(), script)
}

fn tokens(mut stream: RequestStream) -> Vec<u32> {
    let mut tokens = Vec::new();
    loop {
        match stream.blocking_next().expect("a stream without an end") {
            Event::Prompt(_) => {}
            Event::Token(token) => tokens.push(token.token),
            Event::Finished(finished) => {
                assert_eq!(finished.reason, FinishReason::Length);
                return tokens;
            }
        }
    }
}

#[test]
fn experts_move_at_rest_and_under_load() {
    for staging_slots in 1..=3 {
        let (engine, script) = scripted(staging_slots, Fault::None);
        let mut numbers = Numbers(5);
        let mut target = Arc::unwrap_or_clone(engine.placement().unwrap());
        for round in 0..30u32 {
            let prompt: Vec<u32> = (0..5 + round % 20).map(|i| (i * 7 + round * 13) % 60).collect();
            let stream = engine.submit(Request::greedy(prompt.clone(), 1 + round as usize % 9)).unwrap();
            target = elsewhere(&mut numbers, &target);
            let before = engine.placement().unwrap().version();
            let report = arrive(&engine, target.clone());
            assert_eq!(report.version, before + report.switches);
            assert_same_map(&engine.placement().unwrap(), &target);
            assert_eq!(engine.migration(), None);
            assert_eq!(tokens(stream), script.greedy(&prompt, 1 + round as usize % 9));
        }
        // Where nothing changes, nothing moves.
        let report = arrive(&engine, target);
        assert_eq!(report.progress, MigrationProgress::default());
        engine.shutdown(Duration::ZERO);
    }
}

#[test]
fn a_failed_migration_leaves_a_valid_placement_and_the_texts() {
    for (fault, cause) in [
        (Fault::DamageAt(0), "arrived damaged"),
        (Fault::DamageAt(7), "arrived damaged"),
        (Fault::LoseAt(0), "the scripted model loses slice 0"),
        (Fault::LoseAt(5), "the scripted model loses slice 5"),
    ] {
        let (engine, script) = scripted(1, fault);
        let mut numbers = Numbers(9);
        let first = engine.placement().unwrap();
        let target = elsewhere(&mut numbers, &first);
        let prompt = vec![1, 2, 3];
        let stream = engine.submit(Request::greedy(prompt.clone(), 150)).unwrap();
        let report = engine.move_to(target.clone()).unwrap().blocking_recv().unwrap();
        let why = report.outcome.unwrap_err();
        assert!(why.contains(cause), "{why}");
        let now = engine.placement().unwrap();
        assert_eq!(now.version(), report.version);
        assert!(report.progress.arrived < report.progress.arrivals);
        if matches!(fault, Fault::DamageAt(0) | Fault::LoseAt(0)) {
            assert_eq!(*now, *first, "nothing had arrived");
        }
        assert_eq!(engine.migration(), None);
        // The next try works.
        arrive(&engine, target.clone());
        assert_same_map(&engine.placement().unwrap(), &target);
        assert_eq!(tokens(stream), script.greedy(&prompt, 150));
        engine.shutdown(Duration::ZERO);
    }
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let (engine, _) = scripted(1, Fault::None);
    let now = engine.placement().unwrap();
    let layers: Vec<usize> = (0..LAYERS).collect();
    let mut numbers = Numbers(3);
    let mut placement =
        |ranks, experts, spare, layers: &[usize]| scattered(&mut numbers, ranks, experts, spare, layers);
    for (target, why) in [
        (
            placement(2, EXPERTS, 8, &layers),
            "the placement has 2 expert-parallel ranks, but the engine runs with 4",
        ),
        (
            placement(RANKS, EXPERTS, 4, &layers),
            "the placement has 3 slots per rank, but the engine runs with 4",
        ),
        (
            placement(RANKS, EXPERTS - 1, 9, &layers),
            "the placement has 7 experts, but the engine runs with 8",
        ),
        (
            placement(RANKS, EXPERTS, 8, &layers[1..]),
            "the placement has 1 MoE layers, but the engine runs with 2",
        ),
        (
            placement(RANKS, EXPERTS, 8, &[0, 5]),
            "MoE layer 1 of the placement is layer 5, but that of the model is layer 1",
        ),
    ] {
        let refused = engine.move_to(target).unwrap_err().to_string();
        assert!(refused.contains(why), "{refused}");
    }
    let other = elsewhere(&mut numbers, &now);
    engine.shutdown(Duration::ZERO);
    assert!(matches!(engine.move_to(other.clone()), Err(Error::Stopped(_))));
    assert_eq!(*engine.placement().unwrap(), *now);

    let (fixed, _) = scripted(0, Fault::None);
    let refused = fixed.move_to(other.clone()).unwrap_err().to_string();
    assert!(refused.contains("--staging-slots 0"), "{refused}");
    fixed.shutdown(Duration::ZERO);
}
