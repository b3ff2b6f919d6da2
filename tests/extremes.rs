//! Routing as uneven as it gets: a router that sends every token to the same experts, for one row and for as many as fit
//! into a step. Logits are right, experts without tokens count nothing, and no ratio divides by zero.

mod support;

use std::sync::Arc;

use moeyard::backend::DType;
use moeyard::backend::reference::ReferenceBackend;
use moeyard::engine::EngineStats;
use moeyard::metrics::{ExpertDetail, LoadSource, Phase};
use moeyard::moe::load::WorldLoad;
use moeyard::server::{Info, Metrics, SeriesOptions, Sources};
use router_sim::load::{entropy_ratio, imbalance_ratio, max_share};
use router_sim::placement::Placement;
use support::{Golden, Sequence, Setup, World, model_dir};
use tempfile::TempDir;

/// Sequences and prompt tokens of the largest step: all the logit rows that `World` has room for.
const SEQUENCES: usize = 64;
const PROMPT: usize = 8;
/// Rows of `drive`: a prompt of one token, one more token, and the largest step.
const ROWS: usize = 1 + 1 + SEQUENCES * PROMPT;

/// A fixture whose router has one choice for all tokens.
struct OneSided {
    fixture: &'static str,
    dir: TempDir,
    /// The experts it chooses, ascending.
    hot: Vec<usize>,
}

impl OneSided {
    /// Without router weights all experts tie, and ties go to the lowest ids.
    fn by_ties() -> OneSided {
        let dir = edited("mixtral", |name, bytes| {
            let router = name.ends_with("block_sparse_moe.gate.weight");
            if router {
                bytes.fill(0);
            }
            router
        });
        OneSided { fixture: "mixtral", dir, hot: vec![0, 1] }
    }

    /// A bias of the choice that no score makes up for, on all experts of one group.
    fn by_bias() -> OneSided {
        let hot: Vec<usize> = (4..8).collect();
        let dir = edited("deepseek_v3", |name, bytes| {
            let bias = name.ends_with("e_score_correction_bias");
            if bias {
                for (expert, value) in bytes.chunks_exact_mut(4).enumerate() {
                    let added = if hot.contains(&expert) { 100f32 } else { 0.0 };
                    value.copy_from_slice(&added.to_le_bytes());
                }
            }
            bias
        });
        OneSided { fixture: "deepseek_v3", dir, hot }
    }

    /// Every rank has its share of the experts, and the hot ones besides.
    fn replicated(&self, ranks: usize, experts: usize, layers: &[usize]) -> Placement {
        let own = experts / ranks;
        let per_rank = own + self.hot.len();
        let mut slots = Vec::new();
        for rank in 0..ranks {
            let mine = rank * own..(rank + 1) * own;
            let more = self.hot.iter().copied().filter(|expert| !mine.contains(expert));
            slots.extend(mine.clone().chain(more).map(|expert| expert as i32));
            slots.resize((rank + 1) * per_rank, -1);
        }
        Placement::new(ranks, per_rank, experts, layers.to_vec(), vec![slots; layers.len()]).unwrap()
    }
}

/// A copy of a fixture after `edit` was given each tensor's name and bytes; it tells whether it changed them.
fn edited(fixture: &str, edit: impl Fn(&str, &mut [u8]) -> bool) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut changed = 0;
    for entry in std::fs::read_dir(model_dir(fixture)).unwrap() {
        let from = entry.unwrap().path();
        let mut bytes = std::fs::read(&from).unwrap();
        if from.extension().is_some_and(|extension| extension == "safetensors") {
            let (head, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
            let data = head + 8;
            for (name, info) in header.tensors() {
                let (begin, end) = info.data_offsets;
                changed += usize::from(edit(&name, &mut bytes[data + begin..data + end]));
            }
        }
        std::fs::write(dir.path().join(from.file_name().unwrap()), bytes).unwrap();
    }
    assert!(changed > 1, "{fixture}: every MoE layer has a router");
    dir
}

/// Logits of all [`ROWS`] rows, run on data-parallel rank `group`.
fn drive(world: &mut World, group: usize) -> Vec<Vec<f32>> {
    let mut lone = world.sequence(&[17]);
    let mut logits = world.step(group, &mut [(&mut lone, 1)]).logits;
    lone.tokens.push(400);
    logits.extend(world.step(group, &mut [(&mut lone, 1)]).logits);
    let mut crowd: Vec<Sequence> = (0..SEQUENCES)
        .map(|i| {
            let tokens: Vec<u32> = (0..PROMPT).map(|t| ((i * 131 + t * 37 + i * t) % 512) as u32).collect();
            world.sequence(&tokens)
        })
        .collect();
    let mut work: Vec<_> = crowd.iter_mut().map(|sequence| (sequence, PROMPT)).collect();
    logits.extend(world.step(group, &mut work).logits);
    assert_eq!(logits.len(), ROWS);
    logits
}

fn metrics_of(load: Arc<WorldLoad>) -> Metrics {
    let ranks = load.counters.iter().map(|counters| Arc::clone(&counters.meter)).collect();
    let sources = Sources { load: Some(load), ranks, ..Sources::default() };
    let series = SeriesOptions { expert_detail: Some(ExpertDetail::Expert), ..SeriesOptions::default() };
    Metrics::new(&Info::default(), sources, series).unwrap()
}

/// The page, every value of which must be a finite number.
fn finite_page(metrics: &Metrics, what: &str) -> String {
    let page = metrics.render(&EngineStats::default());
    for line in page.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
        let value: f64 = line.rsplit_once(' ').unwrap().1.parse().unwrap();
        assert!(value.is_finite(), "{what}: {line}");
    }
    page
}

/// Drives a world on its last rank and checks all that is counted; `even` where every rank has the hot experts.
fn check_world(model: &OneSided, setup: &Setup, even: bool) -> Vec<Vec<f32>> {
    let mut world = World::load(model.dir.path(), setup);
    let moe = &world.family.spec.moe;
    let (experts, top_k) = (moe.experts, moe.top_k);
    let ranks = setup.degrees.expert_parallel();
    let what = format!("{} EP {ranks} replicated: {even}", model.fixture);
    assert_eq!(model.hot.len(), top_k);

    let load = Arc::new(WorldLoad { in_force: world.in_force(), counters: world.counters.clone() });
    let metrics = metrics_of(Arc::clone(&load));
    assert_eq!(load.step_imbalance(), 0.0, "{what}: before the first step");
    metrics.close_load_window();
    finite_page(&metrics, &what);

    let logits = drive(&mut world, ranks - 1);
    assert!(logits.iter().flatten().all(|x| x.is_finite()), "{what}");

    metrics.close_load_window();
    let page = finite_page(&metrics, &what);
    let snapshot = load.snapshot();
    let step_imbalance = load.step_imbalance();
    if even {
        assert!(
            (0.0..ranks as f64 - 1.0).contains(&step_imbalance) || ranks == 1,
            "{what}: {step_imbalance}"
        );
    } else {
        assert_eq!(step_imbalance, ranks as f64 - 1.0, "{what}: one rank did it all");
    }
    for (layer, id) in snapshot.layer_ids.iter().enumerate() {
        let counts = snapshot.layer_experts(layer);
        for (expert, &count) in counts.iter().enumerate() {
            let expected = if model.hot.contains(&expert) { ROWS as u64 } else { 0 };
            assert_eq!(count, expected, "{what}: expert {expert} of layer {id}");
            let series =
                format!("moeyard_expert_tokens_total{{layer=\"{id}\",expert=\"{expert}\"}} {expected}\n");
            assert!(page.contains(&series), "{what}: no {series:?}");
        }
        let by_rank = snapshot.layer_ranks(layer);
        assert_eq!(by_rank.iter().sum::<u64>(), (ROWS * top_k) as u64, "{what}");
        if !even {
            assert_eq!(imbalance_ratio(&by_rank), ranks as f64 - 1.0, "{what}: {by_rank:?}");
        }
        assert_eq!(max_share(&counts), 1.0 / top_k as f64, "{what}");
        let entropy = (top_k as f64).ln() / (experts as f64).ln();
        assert!((entropy_ratio(&counts) - entropy).abs() < 1e-12, "{what}");
        // The lone decoded token: a phase with a single row.
        let decoded = snapshot.experts_of(Phase::Decode, layer);
        assert_eq!(decoded.iter().sum::<u64>(), top_k as u64, "{what}");
    }
    logits
}

fn assert_close(model: &OneSided, found: &[Vec<f32>]) {
    let golden = Golden::open(&model_dir(model.fixture));
    let limit = golden.json["tolerance"]["f32_logits_abs"].as_f64().unwrap() as f32;
    let reference = Setup { backend: Arc::new(|| Arc::new(ReferenceBackend)), ..Setup::solo(DType::F32) };
    let expected = drive(&mut World::load(model.dir.path(), &reference), 0);
    for (row, (found, expected)) in found.iter().zip(&expected).enumerate() {
        let worst = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst <= limit, "{}: logits of row {row} off by {worst:e}", model.fixture);
    }
}

fn check(model: &OneSided) {
    let bits = |logits: &[Vec<f32>]| -> Vec<u32> { logits.iter().flatten().map(|x| x.to_bits()).collect() };
    let plain = check_world(model, &Setup::solo(DType::F32), false);
    assert_close(model, &plain);
    for ep in [2, 4] {
        let linear = Setup::expert_parallel(DType::F32, ep);
        let spec = World::load(model.dir.path(), &linear).family.spec;
        let placement = model.replicated(ep, spec.moe.experts, &spec.moe_layers());
        let replicated = Setup { placement: Some(placement), ..linear.clone() };
        for (setup, even) in [(linear, false), (replicated, true)] {
            let found = check_world(model, &setup, even);
            assert!(bits(&found) == bits(&plain), "{} EP {ep} replicated: {even}: bits", model.fixture);
        }
    }
}

#[test]
fn all_tokens_on_the_experts_that_win_every_tie() {
    check(&OneSided::by_ties());
}

#[test]
fn all_tokens_on_the_experts_of_one_group() {
    check(&OneSided::by_bias());
}
