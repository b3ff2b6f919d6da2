//! Rotary angles of every position, computed once on the host in f64.

use std::f64::consts::PI;

use crate::backend::{Backend, DType, SeqSpan, Tensor, View};
use crate::error::Result;
use crate::spec::{Rope, RopeScaling};

/// Cosines and sines per position. With LongRoPE a second half holds the long factors' angles.
pub struct RopeTable {
    table: Tensor,
    positions: usize,
    /// LongRoPE's border: tokens of sequences longer than this use the second half.
    long_above: Option<usize>,
}

impl RopeTable {
    /// Angles of positions `0..positions`.
    pub fn new(backend: &dyn Backend, rope: &Rope, positions: usize) -> Result<Self> {
        let mut host = Vec::new();
        push_angles(&mut host, &frequencies(rope, false), positions);
        let long_above = match &rope.scaling {
            RopeScaling::LongRope { original_max_position, .. } => {
                push_angles(&mut host, &frequencies(rope, true), positions);
                Some(*original_max_position)
            }
            _ => None,
        };
        let mut table = backend.alloc(DType::F32, host.len() / rope.dim.max(1), rope.dim)?;
        backend.upload(bytemuck::cast_slice(&host), table.view_mut())?;
        Ok(RopeTable { table, positions, long_above })
    }

    /// Bytes of a table for `positions` positions.
    pub fn bytes(rope: &Rope, positions: usize) -> usize {
        let sets = 1 + usize::from(matches!(rope.scaling, RopeScaling::LongRope { .. }));
        sets * positions * rope.dim * DType::F32.bytes()
    }

    /// The table, `[positions (x 2), dim]`.
    pub fn view(&self) -> View<'_> {
        self.table.view()
    }

    /// The table row of every batch row.
    pub fn rows_of(&self, spans: &[SeqSpan], rows: &mut Vec<u32>) {
        rows.clear();
        for span in spans {
            for position in span.position..span.position + span.rows {
                let due_len = span.prompt_len.max(position + 1) as usize;
                let long = self.long_above.is_some_and(|border| due_len > border);
                rows.push(position + if long { self.positions as u32 } else { 0 });
            }
        }
    }
}

/// Inverse frequencies of the `dim / 2` pairs and the factor on cosines and sines.
struct Frequencies {
    inverse: Vec<f64>,
    magnitude: f64,
}

fn frequencies(rope: &Rope, long: bool) -> Frequencies {
    let plain = |i: usize| rope.theta.powf(-2.0 * i as f64 / rope.dim as f64);
    let pairs = 0..rope.dim / 2;
    match &rope.scaling {
        RopeScaling::None => Frequencies { inverse: pairs.map(plain).collect(), magnitude: 1.0 },
        RopeScaling::Linear { factor } => {
            Frequencies { inverse: pairs.map(|i| plain(i) / factor).collect(), magnitude: 1.0 }
        }
        RopeScaling::Yarn {
            factor,
            original_max_position,
            beta_fast,
            beta_slow,
            truncate,
            attention_factor,
        } => {
            let (low, high) =
                yarn_range(rope, *original_max_position as f64, *beta_fast, *beta_slow, *truncate);
            let inverse = pairs
                .map(|i| {
                    let interpolated = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    plain(i) * (1.0 - interpolated) + plain(i) / factor * interpolated
                })
                .collect();
            Frequencies { inverse, magnitude: *attention_factor }
        }
        RopeScaling::LongRope { short_factor, long_factor, short_mscale, long_mscale, .. } => {
            let (factors, magnitude) =
                if long { (long_factor, *long_mscale) } else { (short_factor, *short_mscale) };
            Frequencies { inverse: pairs.map(|i| plain(i) / factors[i]).collect(), magnitude }
        }
    }
}

/// Pairs between which YaRN blends from plain to interpolated frequencies (arXiv 2309.00071, section 3.2).
fn yarn_range(rope: &Rope, original: f64, beta_fast: f64, beta_slow: f64, truncate: bool) -> (f64, f64) {
    let pair_of =
        |rotations: f64| rope.dim as f64 * (original / (rotations * 2.0 * PI)).ln() / (2.0 * rope.theta.ln());
    let (mut low, mut high) = (pair_of(beta_fast), pair_of(beta_slow));
    if truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, high) = (low.max(0.0), high.min(rope.dim as f64 - 1.0));
    // transformers widens an empty range by 0.001 to avoid dividing by zero.
    (low, if high == low { high + 0.001 } else { high })
}

fn push_angles(host: &mut Vec<f32>, frequencies: &Frequencies, positions: usize) {
    // transformers rounds the inverse frequencies and the angles to f32; so do we, or far positions drift apart.
    let inverse: Vec<f32> = frequencies.inverse.iter().map(|&f| f as f32).collect();
    for position in 0..positions {
        let angles = inverse.iter().map(|f| f64::from(position as f32 * f));
        host.extend(angles.clone().map(|a| (a.cos() * frequencies.magnitude) as f32));
        host.extend(angles.map(|a| (a.sin() * frequencies.magnitude) as f32));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(scaling: RopeScaling) -> Rope {
        Rope { theta: 10_000.0, dim: 16, interleaved: false, scaling }
    }

    #[test]
    fn yarn_keeps_fast_frequencies_and_divides_slow_ones() {
        let scaled = frequencies(
            &rope(RopeScaling::Yarn {
                factor: 40.0,
                original_max_position: 4096,
                beta_fast: 32.0,
                beta_slow: 1.0,
                truncate: true,
                attention_factor: 1.0,
            }),
            false,
        );
        let plain = frequencies(&rope(RopeScaling::None), false);
        assert_eq!(scaled.inverse[0], plain.inverse[0]);
        assert_eq!(scaled.inverse[7], plain.inverse[7] / 40.0);
    }

    #[test]
    fn long_rope_picks_the_set_by_the_length_when_due() {
        let scaling = RopeScaling::LongRope {
            short_factor: vec![1.0; 8],
            long_factor: vec![2.0; 8],
            original_max_position: 8,
            short_mscale: 1.0,
            long_mscale: 1.0,
        };
        let backend = crate::backend::reference::ReferenceBackend;
        let table = RopeTable::new(&backend, &rope(scaling), 32).unwrap();
        let span =
            |position, rows, prompt_len| SeqSpan { row: 0, rows, position, prompt_len, first_block: 0 };
        let mut rows = Vec::new();
        table.rows_of(&[span(6, 4, 4)], &mut rows);
        assert_eq!(rows, [6, 7, 8 + 32, 9 + 32], "generated tokens cross the border one by one");
        table.rows_of(&[span(0, 2, 9)], &mut rows);
        assert_eq!(rows, [32, 33], "a long prompt is long from its first token");
    }
}
