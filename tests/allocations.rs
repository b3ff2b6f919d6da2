//! A decode step allocates nothing on the threads of its ranks: memory is taken while loading and in the first steps.

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::backtrace::Backtrace;
use std::cell::{Cell, RefCell};

use moeyard::backend::cpu::CpuBackend;
use moeyard::backend::draw::Draw;
use moeyard::backend::{AttentionBatch, Backend, DType, SeqSpan};
use moeyard::engine::request::{Request, Sampling};
use moeyard::engine::sampler::Sampler;
use moeyard::model::world::{Degrees, LoadedRank};
use moeyard::model::{Batch, Model};
use moeyard::moe::migrate::{Landed, Leg, Slice, Switch, WHOLE};
use router_sim::placement::Placement;
use support::{BLOCK, Setup, World, model_dir};

thread_local! {
    /// Allocations of this thread since counting began; `None` while it does not count.
    static COUNT: Cell<Option<usize>> = const { Cell::new(None) };
    /// Where the first of them was.
    static FIRST: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// The system's allocator, which counts.
struct Counting;

impl Counting {
    fn count() {
        if let Some(n) = COUNT.get() {
            if n == 0 {
                // A backtrace allocates itself.
                COUNT.set(None);
                FIRST.set(Some(Backtrace::force_capture().to_string()));
            }
            COUNT.set(Some(n + 1));
        }
    }
}

// SAFETY: every call is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Counting::count();
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        Counting::count();
        // SAFETY: the caller keeps the contract of `realloc`.
        unsafe { System.realloc(memory, layout, size) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations of `work` on this thread, and where the first was.
fn allocations(work: impl FnOnce()) -> (usize, String) {
    COUNT.set(Some(0));
    work();
    let count = COUNT.replace(None).expect("still counting");
    (count, FIRST.take().unwrap_or_default())
}

/// Sequences of each data-parallel rank.
const SEQUENCES: usize = 4;
const PROMPT: usize = 24;
const WARM_UP: usize = 4;
/// Crosses the border of a KV block.
const MEASURED: usize = 24;
const BLOCKS_PER_SEQUENCE: usize = (PROMPT + WARM_UP + MEASURED).div_ceil(BLOCK);

/// One step of every sequence: the whole prompt, or one more token.
fn step(rank: &mut LoadedRank, table: &[u32], position: usize, rows: usize) -> impl FnOnce() {
    let tokens: Vec<u32> =
        (0..SEQUENCES * rows).map(|i| ((position * 97 + i * 31 + rank.dp_rank * 7) % 500) as u32).collect();
    let spans: Vec<SeqSpan> = (0..SEQUENCES)
        .map(|sequence| SeqSpan {
            row: (sequence * rows) as u32,
            rows: rows as u32,
            position: position as u32,
            prompt_len: PROMPT as u32,
            first_block: (sequence * BLOCKS_PER_SEQUENCE) as u32,
        })
        .collect();
    let wanted: Vec<u32> = (0..SEQUENCES).map(|sequence| ((sequence + 1) * rows - 1) as u32).collect();
    move || {
        let batch = Batch {
            tokens: &tokens,
            attention: AttentionBatch { spans: &spans, block_table: table },
            logit_rows: &wanted,
            want_routing: true,
        };
        rank.model.forward(&batch, &mut rank.output).unwrap();
    }
}

fn check(model: &str, dtype: DType, degrees: Degrees) {
    let mut world =
        World::load(&model_dir(model), &Setup { degrees, max_model_len: 64, ..Setup::solo(dtype) });
    let table: Vec<u32> = (0..(SEQUENCES * BLOCKS_PER_SEQUENCE) as u32).collect();
    let counts = world.on_ranks(|_, rank| {
        step(rank, &table, 0, PROMPT)();
        for position in PROMPT..PROMPT + WARM_UP {
            step(rank, &table, position, 1)();
        }
        let measured = PROMPT + WARM_UP..PROMPT + WARM_UP + MEASURED;
        measured.map(|position| allocations(step(rank, &table, position, 1))).collect::<Vec<_>>()
    });
    for (rank, steps) in counts.iter().enumerate() {
        for (i, (count, first)) in steps.iter().enumerate() {
            assert_eq!(*count, 0, "{model} {dtype:?} {degrees:?}: rank {rank}, step {i}, first at\n{first}");
        }
    }
}

/// The experts in the first slots of two ranks change places in every MoE layer, one layer after the other: `here` is where
/// they live before.
fn exchange(here: &Placement) -> Vec<(Vec<Slice>, Switch)> {
    let mut maps: Vec<Vec<i32>> =
        (0..here.layers()).map(|layer| here.layer(layer).slots().to_vec()).collect();
    let (per_rank, experts) = (here.slots_per_rank(), here.experts());
    let of_layer = |layer: usize| {
        let leg = |from: usize, to: usize| Leg {
            layer,
            expert: maps[layer][from * per_rank] as usize,
            from,
            slot: 0,
            to,
            place: 0,
        };
        let legs: std::sync::Arc<[Leg]> = [leg(0, 1), leg(1, 0)].into();
        let spans = [0..WHOLE / 3, WHOLE / 3..WHOLE - 5, WHOLE - 5..WHOLE];
        let slices = spans.map(|span| Slice { legs: legs.clone(), span }).to_vec();
        maps[layer].swap(0, per_rank);
        let placement =
            Placement::new(2, per_rank, experts, here.layer_ids().to_vec(), maps.clone()).unwrap();
        let landed = |rank| Landed { layer, rank, place: 0, slot: 0 };
        (slices, Switch { placement: placement.into(), landed: vec![landed(0), landed(1)] })
    };
    (0..here.layers()).map(of_layer).collect()
}

fn check_migration(model: &str, dtype: DType, degrees: Degrees) {
    let setup = Setup { degrees, max_model_len: 64, staging_slots: 1, redundant: 3, ..Setup::solo(dtype) };
    let mut world = World::load(&model_dir(model), &setup);
    let moves = exchange(&world.placement());
    let table: Vec<u32> = (0..(SEQUENCES * BLOCKS_PER_SEQUENCE) as u32).collect();
    let counts = world.on_ranks(|_, rank| {
        step(rank, &table, 0, PROMPT)();
        let mut measured = Vec::new();
        for (i, (slices, switch)) in moves.iter().enumerate() {
            let position = PROMPT + i;
            for slice in slices {
                step(rank, &table, position, 1)();
                measured.push(allocations(|| _ = rank.model.transfer(slice).unwrap()));
            }
            measured.push(allocations(|| rank.model.switch(switch)));
            step(rank, &table, position, 1)();
            measured.push(allocations(step(rank, &table, position, 1)));
        }
        measured
    });
    for (rank, measured) in counts.iter().enumerate() {
        for (i, (count, first)) in measured.iter().enumerate() {
            let what = ["slice", "slice", "slice", "switch", "step"][i % 5];
            // The first steps may grow buffers.
            assert!(
                *count == 0 || (i == 4 && what == "step"),
                "{model} {dtype:?}: rank {rank}, {what} {i}, first at\n{first}"
            );
        }
    }
}

#[test]
fn moving_experts_allocates_nothing() {
    let expert_parallel = Degrees { data_parallel: 2, ..Degrees::SOLO };
    let split_inside = Degrees { data_parallel: 4, expert_tp: 2, ..Degrees::SOLO };
    for (model, dtype) in
        [("demo-mixtral", DType::Bf16), ("demo-deepseek", DType::F32), ("gpt_oss", DType::F32)]
    {
        for degrees in [expert_parallel, split_inside] {
            check_migration(model, dtype, degrees);
        }
    }
}

#[test]
fn choosing_a_token_allocates_nothing() {
    const VOCAB: usize = 5000;
    let row = |step: usize| -> Vec<f32> {
        (0..VOCAB).map(|id| ((id * 7919 + step * 104_729) % 1013) as f32 / 100.0).collect()
    };
    let sampled = Sampling { temperature: 0.8, top_p: 0.95, seed: 5, ..Sampling::GREEDY };
    let everything = Sampling {
        top_k: 700,
        min_p: 0.01,
        repetition_penalty: 1.2,
        presence_penalty: 0.1,
        frequency_penalty: 0.1,
        logit_bias: vec![(7, 3.0)],
        allowed_tokens: Some((0..4000).collect()),
        bad_words: vec![vec![9], vec![1, 2]],
        min_tokens: 50,
        ..sampled.clone()
    };
    for sampling in [Sampling::GREEDY, Sampling { top_p: 1.0, ..sampled.clone() }, sampled, everything] {
        let request = Request { sampling, stop_tokens: vec![3], ..Request::greedy((0..99).collect(), 100) };
        let mut sampler = Sampler::default();
        for step in 0..20 {
            let (row, generated) = (row(step), (0..step as u32 * 3).collect::<Vec<_>>());
            let position = 99 + generated.len() as u32;
            let (count, first) = allocations(|| {
                sampler.sample(&row, &request, position, &generated).unwrap();
            });
            assert!(step < 2 || count == 0, "{:?}: step {step}, first at\n{first}", request.sampling);
        }
    }
}

/// The threads of a CPU that help out take their memory before they have a row.
#[test]
fn choosing_tokens_on_the_device_allocates_nothing() {
    const VOCAB: usize = 5000;
    let backend = CpuBackend::detect(2).unwrap();
    let mut logits = backend.alloc(DType::F32, 9, VOCAB).unwrap();
    let row: Vec<f32> = (0..9 * VOCAB).map(|id| (id * 7919 % 1013) as f32 / 100.0).collect();
    backend.upload(bytemuck::cast_slice(&row), logits.view_mut()).unwrap();
    let mut tokens = backend.alloc(DType::I32, 9, 2).unwrap();
    let warm = Draw { temperature: 0.8, ..Draw::GREEDY };
    for (step, (top_k, top_p)) in
        [(0, 1.0), (0, 0.95), (40, 0.95), (700, 1.0), (0, 0.99)].into_iter().enumerate()
    {
        let draws = [Draw { random: step as u64, top_k, top_p, ..warm }; 9];
        let (count, first) =
            allocations(|| backend.sample(logits.view(), &draws, tokens.view_mut()).unwrap());
        assert!(step == 0 || count == 0, "{:?}: first at\n{first}", draws[0]);
    }
}

#[test]
fn decode_steps_allocate_nothing() {
    // The allocator does count.
    assert_eq!(allocations(|| drop(std::hint::black_box(vec![1u8; 100]))).0, 1);
    let expert_parallel = Degrees { data_parallel: 2, ..Degrees::SOLO };
    let tensor_parallel = Degrees { tensor_parallel: 2, ..Degrees::SOLO };
    for model in ["demo-mixtral", "demo-deepseek"] {
        for dtype in [DType::F32, DType::Bf16] {
            for degrees in [Degrees::SOLO, expert_parallel, tensor_parallel] {
                check(model, dtype, degrees);
            }
        }
    }
}
