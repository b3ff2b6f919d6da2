//! Cost of choosing a token from logits: `cargo bench --bench sampling`. Microseconds per row of a batch, the best and the
//! median of many batches on one thread; the limit is one read of the row, measured in turns with it.

mod timing;

use std::hint::black_box;

use moeyard::engine::request::{Request, Sampling};
use moeyard::engine::sampler::Sampler;
use timing::micros;

const VOCAB: usize = 131_072;
const BATCH: usize = 32;
const HISTORY: usize = 1024;

/// Rows of logits near a bell curve of deviation 3, as a model's are; the same in each run.
fn rows() -> Vec<Vec<f32>> {
    let mut state = 1u64;
    let mut uniform = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 24) as f32
    };
    // A sum of 12 uniform numbers has deviation 1.
    let mut logit = || ((0..12).map(|_| uniform()).sum::<f32>() - 6.0) * 3.0;
    (0..BATCH).map(|_| (0..VOCAB).map(|_| logit()).collect()).collect()
}

/// Best and median of the microseconds that a batch takes, per row.
fn micros_per_row(work: impl FnMut()) -> (f64, f64) {
    let (best, median) = micros(work);
    (best / BATCH as f64, median / BATCH as f64)
}

fn main() {
    let rows = rows();
    let history: Vec<u32> = (0..HISTORY as u32).map(|i| i * 127).collect();
    let warm = Sampling { temperature: 0.8, seed: 1, ..Sampling::GREEDY };
    let limited = Sampling { top_p: 0.95, top_k: 50, ..warm.clone() };
    let penalties = |sampling: Sampling| Sampling {
        repetition_penalty: 1.1,
        presence_penalty: 0.1,
        frequency_penalty: 0.1,
        ..sampling
    };
    let cases = [
        ("greedy", Sampling::GREEDY, None),
        ("greedy, 5 log-probabilities", Sampling::GREEDY, Some(5)),
        ("temperature", warm.clone(), None),
        ("temperature, top_p 0.95", Sampling { top_p: 0.95, ..warm }, None),
        ("temperature, top_k 50, top_p 0.95", limited.clone(), None),
        ("greedy, penalties", penalties(Sampling::GREEDY), None),
        ("temperature, top_k 50, top_p 0.95, penalties", penalties(limited), None),
    ];
    println!("{BATCH} rows of {VOCAB} logits, {HISTORY} tokens of history, microseconds per row");
    println!("{:48} {:>8} {:>8} {:>14}", "", "best", "median", "reading (best)");
    for (name, sampling, logprobs) in cases {
        let request = Request { sampling, logprobs, ..Request::greedy(history.clone(), 1) };
        let mut sampler = Sampler::default();
        let (best, median) = micros_per_row(|| {
            for (position, row) in rows.iter().enumerate() {
                let chosen = sampler.sample(black_box(row), &request, position as u32, &history);
                black_box(chosen.expect("no rule excludes every token"));
            }
        });
        let (reading, _) = micros_per_row(|| {
            for row in &rows {
                black_box(row.iter().fold(0u32, |bits, x| bits ^ x.to_bits()));
            }
        });
        println!("{name:48} {best:8.1} {median:8.1} {reading:14.1}");
    }
}
