//! A decode step allocates nothing on the threads of its ranks: memory is taken while loading and in the first steps.

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::backtrace::Backtrace;
use std::cell::{Cell, RefCell};

use moeyard::backend::{AttentionBatch, DType, SeqSpan};
use moeyard::engine::request::{Request, Sampling};
use moeyard::engine::sampler::Sampler;
use moeyard::model::world::{Degrees, LoadedRank};
use moeyard::model::{Batch, Model};
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
