//! Rows of logits and ways to draw from them, with all that can go wrong.

use moeyard::backend::draw::Draw;

use super::numbers::Numbers;

/// Rows of one length, and a draw for each.
pub struct Draws {
    pub rows: Vec<Vec<f32>>,
    pub draws: Vec<Draw>,
}

/// Every combination of temperature, top_k, top_p and min_p, where `all`, else every few of them, over rows of `vocab` tokens of
/// different kinds, with random numbers that include the least and the greatest.
pub fn draws(vocab: usize, all: bool) -> Draws {
    let mut numbers = Numbers::new(vocab as u64);
    let mut draws = Vec::new();
    for temperature in [0.0, 0.7, 1.0, 30.0, 1e-30] {
        for top_k in [0, 1, 2, 50, 300, 1024, u32::MAX] {
            for top_p in [1.0, 0.95, 0.3, f32::MIN_POSITIVE] {
                for min_p in [0.0, 0.05, 1.0] {
                    draws.push(Draw { random: 0, temperature, top_p, min_p, top_k });
                }
            }
        }
    }
    if !all {
        draws = draws.into_iter().skip(5).step_by(19).collect();
    }
    for draw in &mut draws {
        draw.random = match numbers.below(8) {
            0 => 0,
            1 => u64::MAX,
            _ => numbers.bits(),
        };
    }
    let rows = (0..draws.len()).map(|i| row(&mut numbers, i, vocab)).collect();
    Draws { rows, draws }
}

fn row(numbers: &mut Numbers, kind: usize, vocab: usize) -> Vec<f32> {
    let mut row: Vec<f32> = match kind % 5 {
        // As a model's are.
        0 | 1 => (0..vocab).map(|_| numbers.normal() * 3.0).collect(),
        // Few different ones.
        2 => (0..vocab).map(|_| numbers.below(9) as f32 / 4.0 - 1.0).collect(),
        // Nearly all alike, zeros of both signs among them.
        3 => (0..vocab).map(|_| [0.0, -0.0, 0.0, -1e-30][numbers.below(4)]).collect(),
        // Far apart.
        _ => (0..vocab).map(|_| numbers.normal() * (f32::MAX / 8.0)).collect(),
    };
    // Some have a favourite, which need not be the only one.
    if numbers.below(3) == 0 {
        let (a, b) = (numbers.below(vocab), numbers.below(vocab));
        row[a] = 30.0;
        row[b] = 30.0;
    }
    row
}
