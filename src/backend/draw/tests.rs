//! Weights, selections and draws against what they are said to be.

use super::order::order;
use super::weights::exp_nonpositive;
use super::*;
use proptest::prelude::*;

#[test]
fn exp_is_accurate() {
    assert_eq!(exp_nonpositive(0.0), 1.0);
    assert_eq!(exp_nonpositive(-0.0), 1.0);
    for x in [-87.0, -1000.0, f32::MIN, f32::NEG_INFINITY] {
        assert_eq!(exp_nonpositive(x), 0.0);
    }
    for i in 1..200_000 {
        let x = -86.9 * i as f32 / 200_000.0;
        let exact = f64::from(x).exp();
        let error = (f64::from(exp_nonpositive(x)) - exact).abs() / exact;
        assert!(error < 2.5e-7, "exp({x}): relative error {error:e}");
    }
}

/// What top_p may leave out is bounded by weight instead of by logit, which takes this. All 2^30 numbers take seconds; here are those
/// around the borders between powers of 2, where two polynomials meet, and some others.
#[test]
fn exp_never_falls() {
    let borders = (0..126).map(|n| -(n as f32 + 0.5) * std::f32::consts::LN_2);
    for start in borders.chain([-1e-6, -0.01, -1.0, -27.7, -86.9]) {
        let mut last = exp_nonpositive(f32::from_bits(start.to_bits() - 500));
        for bits in start.to_bits() - 499..start.to_bits() + 500 {
            let next = exp_nonpositive(f32::from_bits(bits));
            assert!(next <= last, "exp({}) is {next}, after {last}", f32::from_bits(bits));
            last = next;
        }
    }
}

#[test]
fn weights_are_rounded_to_units() {
    assert_eq!((units(1.0), units(0.0), units(0.5)), (ONE, 0, ONE / 2));
    let unit = 1.0 / ONE as f32;
    assert_eq!([0.5, 0.51, 1.0, 1.5, 2.5, 3.49].map(|n| units(n * unit)), [0, 1, 1, 2, 2, 3]);
    assert_eq!(units(0.3), (f64::from(0.3f32) * ONE as f64).round() as u64);
    let weights: Vec<f32> = (0..1000).map(|i| i as f32 / 1000.0).collect();
    let mut all = Weights::default();
    all.weigh(&[0.0; 1500], 0.0, 1.0, 0.0);
    assert_eq!(all.mass(), 1500 * ONE);
    let logits: Vec<f32> = weights.iter().map(|w| w.ln().max(-80.0)).collect();
    all.weigh(&logits, 0.0, 1.0, 0.0);
    assert_eq!(all.mass(), (0..1000).map(|id| all.of(id)).sum::<u64>());
    // As many tokens as there may be, all the best.
    assert!(ONE.checked_mul(MOST_TOKENS as u64).is_some());
}

#[test]
fn parts_of_a_sum_lie_within_it() {
    for mass in [1, 3, ONE, ONE * 12_345, u64::MAX / 2] {
        assert_eq!((part(0, mass), part(u64::MAX, mass)), (0, mass - 1));
        assert!(part(1 << 63, mass).abs_diff(mass / 2) <= 1);
        for top_p in [f32::MIN_POSITIVE, 0.3, 0.95, 1.0 - f32::EPSILON / 2.0] {
            let reached = reached_by(top_p, mass);
            assert!(0 < reached && reached <= mass, "{top_p} of {mass}: {reached}");
        }
    }
}

fn logit_rows() -> impl Strategy<Value = Vec<f32>> {
    // Few distinct values, so that ties are common; long enough to leave the first sorted run and the first block.
    prop_oneof![
        proptest::collection::vec((-20i32..20).prop_map(|x| x as f32 / 4.0), 1..300),
        proptest::collection::vec(-30f32..30.0, 1..2000),
    ]
}

/// (token, probability) of all tokens that may be drawn, by a softmax in f64.
fn softmax(logits: &[f32], draw: &Draw) -> Vec<(u32, f64)> {
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    ids.sort_by(|&a, &b| order(logits, a, b));
    let scaled =
        |id: u32| f64::from(logits[id as usize] - logits[ids[0] as usize]) / f64::from(draw.temperature);
    let weight = |id: u32| scaled(id).exp();
    let mut kept: Vec<_> = ids.iter().map(|&id| (id, weight(id))).collect();
    kept.retain(|&(_, weight)| weight >= f64::from(draw.min_p));
    if draw.top_k > 0 {
        kept.truncate(draw.top_k as usize);
    }
    let mass: f64 = kept.iter().map(|&(_, weight)| weight).sum();
    let mut sum = 0.0;
    kept.retain(|&(_, weight)| {
        let wanted = sum < f64::from(draw.top_p) * mass;
        sum += weight;
        wanted
    });
    kept.sort_by_key(|&(id, _)| id);
    let mass: f64 = kept.iter().map(|&(_, weight)| weight).sum();
    kept.iter().map(|&(id, weight)| (id, weight / mass)).collect()
}

proptest! {
    /// What is drawn is where the random number falls among probabilities side by side, by id.
    #[test]
    fn a_draw_is_one_from_a_softmax(
        logits in logit_rows(), random: u64, t in 0.1f32..10.0, k in 0u32..200, p in 0.01f32..=1.0, m in 0.0f32..0.5,
    ) {
        let draw = Draw { random, temperature: t, top_p: p, min_p: if random % 2 == 0 { m } else { 0.0 }, top_k: k };
        let kept = softmax(&logits, &draw);
        let token = Drawer::default().draw(&logits, argmax(&logits), &draw);
        let at = random as f64 / 2f64.powi(64);
        let mut end = 0.0;
        let expected = kept.iter().position(|&(_, share)| { end += share; end > at }).unwrap_or(kept.len() - 1);
        let found = kept.iter().position(|&(id, _)| id == token);
        // One token more or less may be kept, and a number fall to the other side of a border, by the last bits of f32.
        let near = found.is_some_and(|found| found.abs_diff(expected) <= 1) || {
            let border = softmax(&logits, &Draw { top_p: (p * 1.000_01).min(1.0), min_p: draw.min_p * 0.999_99, ..draw });
            border.iter().any(|&(id, _)| id == token)
        };
        prop_assert!(near, "{} is place {:?}, expected {}", token, found, expected);
    }

    /// Insertion and quickselect are one order.
    #[test]
    fn the_best_are_those_of_a_full_sort(logits in logit_rows(), n in 0usize..600) {
        let mut found = Vec::new();
        select_best(&mut found, &logits, n);
        let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
        ids.sort_by(|&a, &b| order(&logits, a, b));
        for (place, &id) in ids.iter().enumerate().step_by(17) {
            prop_assert_eq!(rank(&logits, id), place as u32 + 1);
        }
        prop_assert_eq!(argmax(&logits), ids[0]);
        ids.truncate(n);
        prop_assert_eq!(&found, &ids);
    }
}
