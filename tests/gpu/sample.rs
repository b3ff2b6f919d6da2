//! Tokens that are chosen on the GPU: each of them, for there is one right answer.

use libtest_mimic::Trial;
use moeyard::backend::DType;
use moeyard::backend::draw::Draw;
use moeyard::backend::reference::ReferenceBackend;

use crate::pair::{Device, gpu, poisoned, tensor, values};
use crate::support::draws::draws;
use crate::support::numbers::Numbers;
use crate::trial;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("sample::tokens_are_those_of_the_definition", tokens_are_those_of_the_definition),
        trial("sample::greedy_tokens_are_the_best", greedy_tokens_are_the_best),
        trial("sample::elements_that_are_not_finite_are_counted", elements_that_are_not_finite_are_counted),
        trial("sample::draws_change_from_step_to_step", draws_change_from_step_to_step),
    ]
}

/// The token of each row, and its elements that are not finite, where rows lie apart.
fn sample(device: Device<'_>, rows: &[Vec<f32>], draws: &[Draw]) -> Vec<(f32, f32)> {
    let vocab = rows[0].len();
    let wide: Vec<f32> = rows.iter().flat_map(|row| row.iter().copied().chain([f32::NAN; 3])).collect();
    let x = tensor(device, DType::F32, rows.len(), vocab + 3, &wide);
    let mut out = poisoned(device, DType::I32, rows.len(), 2);
    device.sample(x.view().cols_range(0..vocab), draws, out.view_mut()).unwrap();
    values(device, out.view()).as_chunks().0.iter().map(|&[token, infinite]| (token, infinite)).collect()
}

fn tokens_are_those_of_the_definition() {
    let gpu = gpu();
    for (vocab, all) in [
        (1, true),
        (2, true),
        (31, true),
        (1024, true),
        (1025, true),
        (8193, false),
        (32_000, false),
        (129_280, false),
    ] {
        let cases = draws(vocab, all);
        let found = sample(gpu.as_ref(), &cases.rows, &cases.draws);
        let expected = sample(&ReferenceBackend, &cases.rows, &cases.draws);
        for (i, draw) in cases.draws.iter().enumerate() {
            assert_eq!(found[i], expected[i], "row {i}, {draw:?} of {vocab} tokens");
            // A row's token has nothing to do with those beside it.
            if i % 29 == 0 {
                let alone = sample(gpu.as_ref(), &cases.rows[i..=i], &cases.draws[i..=i]);
                assert_eq!(alone, [found[i]], "row {i} alone, {draw:?} of {vocab} tokens");
            }
        }
    }
}

fn greedy_tokens_are_the_best() {
    let mut numbers = Numbers::new(10);
    for (rows, cols) in [(1, 1), (3, 1000), (64, 32000), (2, 129280), (5, 8193)] {
        // Few different values: the first of several greatest counts.
        let mut row = || (0..cols).map(|_| numbers.below(2000) as f32 - 1000.0).collect::<Vec<_>>();
        let rows: Vec<_> = (0..rows).map(|_| row()).collect();
        let draws = vec![Draw::GREEDY; rows.len()];
        let found = sample(gpu().as_ref(), &rows, &draws);
        assert_eq!(found, sample(&ReferenceBackend, &rows, &draws), "[{}, {cols}]", rows.len());
    }
}

fn elements_that_are_not_finite_are_counted() {
    let (vocab, mut numbers) = (5000, Numbers::new(3));
    let mut rows: Vec<_> = (0..8).map(|_| numbers.vec(vocab)).collect();
    rows[1].fill(f32::NAN);
    rows[3].fill(f32::NEG_INFINITY);
    rows[4][4999] = f32::INFINITY;
    rows[6][0] = f32::NAN;
    let drawn = Draw { random: 1 << 63, temperature: 0.8, top_p: 0.9, min_p: 0.01, top_k: 40 };
    for draws in [[Draw::GREEDY; 8], [drawn; 8]] {
        let found = sample(gpu().as_ref(), &rows, &draws);
        let expected = sample(&ReferenceBackend, &rows, &draws);
        for (&(token, infinite), &(expected, count)) in found.iter().zip(&expected) {
            assert_eq!(infinite, count);
            assert!((0.0..vocab as f32).contains(&token) && (infinite > 0.0 || token == expected), "{token}");
        }
    }
}

/// A step that is known again draws by the numbers of today.
fn draws_change_from_step_to_step() {
    let (vocab, mut numbers) = (1000, Numbers::new(4));
    let gpu = gpu();
    let logits = [numbers.vec(vocab), numbers.vec(vocab)];
    let x = tensor(gpu.as_ref(), DType::F32, 2, vocab, &logits.concat());
    let mut out = poisoned(gpu.as_ref(), DType::I32, 2, 2);
    let mut copy = poisoned(gpu.as_ref(), DType::F32, 2, vocab);
    for step in 0..6u64 {
        let random = step.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let draws = [Draw { random, temperature: 1.0, ..Draw::GREEDY }, Draw::GREEDY];
        let mut body = || {
            // Enough launches that the last ones are put off.
            (0..80).try_for_each(|_| gpu.copy_rows(x.view(), copy.view_mut()))?;
            gpu.sample(copy.view(), &draws, out.view_mut())
        };
        gpu.step(&mut body).unwrap();
        let found: Vec<_> = values(gpu.as_ref(), out.view());
        let expected: Vec<_> =
            sample(&ReferenceBackend, &logits, &draws).into_iter().flat_map(|(a, b)| [a, b]).collect();
        assert_eq!(found, expected, "step {step}");
    }
    assert!(gpu.step_counts().replayed > 0, "{:?}", gpu.step_counts());
}
