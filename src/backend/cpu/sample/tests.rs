//! The tokens that every thread count chooses are those of the definition.

use crate::backend::cpu::CpuBackend;
use crate::backend::draw::Draw;
use crate::backend::reference::ReferenceBackend;
use crate::backend::{Backend, DType};
use crate::support::draws::draws;
use crate::support::numbers::Numbers;

/// The token of each row, and its elements that are not finite.
fn sample(backend: &dyn Backend, rows: &[Vec<f32>], draws: &[Draw]) -> Vec<[i32; 2]> {
    let mut x = backend.alloc(DType::F32, rows.len(), rows[0].len()).unwrap();
    backend.upload(bytemuck::cast_slice(&rows.concat()), x.view_mut()).unwrap();
    let mut out = backend.alloc(DType::I32, rows.len(), 2).unwrap();
    backend.sample(x.view(), draws, out.view_mut()).unwrap();
    let mut found = vec![[0; 2]; rows.len()];
    backend.download(out.view(), bytemuck::cast_slice_mut(&mut found)).unwrap();
    found
}

#[test]
fn tokens_are_those_of_the_definition() {
    let backends = [1, 3].map(|threads| CpuBackend::detect(threads).unwrap());
    for (vocab, all) in
        [(1, true), (2, true), (31, true), (1024, true), (1025, true), (32_000, false), (129_280, false)]
    {
        let cases = draws(vocab, all);
        let expected = sample(&ReferenceBackend, &cases.rows, &cases.draws);
        for backend in &backends {
            let found = sample(backend, &cases.rows, &cases.draws);
            for ((found, expected), draw) in found.iter().zip(&expected).zip(&cases.draws) {
                assert_eq!(found, expected, "{draw:?} of {vocab} tokens, {}", backend.describe());
            }
        }
    }
}

/// A row that is not finite spoils no other, and is told.
#[test]
fn elements_that_are_not_finite_are_counted() {
    let (vocab, mut numbers) = (1000, Numbers::new(3));
    let mut rows: Vec<_> = (0..8).map(|_| numbers.vec(vocab)).collect();
    rows[1].fill(f32::NAN);
    rows[3].fill(f32::NEG_INFINITY);
    rows[4][999] = f32::INFINITY;
    rows[6][0] = f32::NAN;
    let drawn = Draw { random: 1 << 63, temperature: 0.8, top_p: 0.9, min_p: 0.01, top_k: 40 };
    for draws in [[Draw::GREEDY; 8], [drawn; 8]] {
        let expected = sample(&ReferenceBackend, &rows, &draws);
        let counts = expected.iter().map(|&[_, infinite]| infinite);
        assert!(counts.eq([0, 1000, 0, 1000, 1, 0, 1, 0]), "{expected:?}");
        for threads in [1, 3] {
            let found = sample(&CpuBackend::detect(threads).unwrap(), &rows, &draws);
            for (found, expected) in found.iter().zip(&expected) {
                assert_eq!(found[1], expected[1]);
                assert!(found[1] > 0 || found[0] == expected[0], "{found:?}, expected {expected:?}");
                assert!((0..vocab as i32).contains(&found[0]));
            }
        }
    }
}
