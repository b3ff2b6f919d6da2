//! What a placement is planned for, in one layer.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

use crate::load::{LoadWindow, Phase};

/// Scenes drawn from each recorded one where load is expected to drift.
const DRAWS: usize = 8;

/// Experts' loads in several scenes: windows, phases, expected drift. A placement is as good as the sum over scenes of
/// the largest rank load. Loads of all scenes add up to 1.
#[derive(Debug, Clone, PartialEq)]
pub struct Scenes {
    /// Number of scenes, at least 1.
    pub count: usize,
    /// `[experts][scenes]`
    pub weights: Vec<f64>,
    /// What a load of 1 was before it was divided: tokens, where they were not scaled.
    pub unit: f64,
}

impl Scenes {
    /// A scene for every window and phase with tokens, and [`DRAWS`] more of each where `drift` is not 0. Without any
    /// tokens all experts weigh the same.
    pub fn of(windows: &[LoadWindow], layer: usize, phase_shares: Option<[f64; 2]>, drift: f64) -> Self {
        let mut rows: Vec<Vec<f64>> = Vec::new();
        for (phase, index) in Phase::ALL.into_iter().zip(0..) {
            let counts = |window: &LoadWindow| -> Vec<f64> {
                window.counts(phase, layer).iter().map(|n| *n as f64).collect()
            };
            let phase_rows = windows.iter().map(counts).filter(|row| row.iter().any(|n| *n > 0.0));
            let phase_rows: Vec<Vec<f64>> = phase_rows.collect();
            let tokens: f64 = phase_rows.iter().flatten().sum();
            let scale = phase_shares.map_or(1.0, |shares| shares[index] / tokens);
            // A phase that takes no time is no scene.
            let scaled = phase_rows.into_iter().filter(|_| scale > 0.0);
            rows.extend(scaled.map(|row| row.into_iter().map(|n| n * scale).collect::<Vec<f64>>()));
        }
        if drift > 0.0 {
            rows = rows.iter().flat_map(|row| drifted(row, drift)).collect();
        }
        if rows.is_empty() {
            rows.push(vec![1.0; windows[0].experts()]);
        }
        Scenes::from_rows(&rows)
    }

    /// From `[scenes][experts]`.
    fn from_rows(rows: &[Vec<f64>]) -> Self {
        let total: f64 = rows.iter().flatten().sum();
        let experts = rows[0].len();
        let weights = (0..experts).flat_map(|e| rows.iter().map(move |row| row[e] / total)).collect();
        Scenes { count: rows.len(), weights, unit: total }
    }

    /// Number of experts.
    pub fn experts(&self) -> usize {
        self.weights.len() / self.count
    }

    /// Load of each expert over all scenes; `[experts]`.
    pub fn totals(&self) -> Vec<f64> {
        self.weights.chunks(self.count).map(|w| w.iter().sum()).collect()
    }

    /// Load of each expert in one scene; `[experts]`.
    pub fn scene(&self, scene: usize) -> Vec<f64> {
        self.weights.iter().skip(scene).step_by(self.count).copied().collect()
    }

    /// All scenes as one.
    pub fn sum(&self) -> Scenes {
        Scenes { count: 1, weights: self.totals(), unit: self.unit }
    }

    /// The same scenes of some of the experts; loads no longer add up to 1.
    pub fn of_experts(&self, experts: &[u32]) -> Scenes {
        let of = |e: &u32| &self.weights[*e as usize * self.count..(*e as usize + 1) * self.count];
        Scenes { weights: experts.iter().flat_map(of).copied().collect(), ..*self }
    }
}

/// A scene and what may become of it, all at equal weight.
fn drifted(row: &[f64], drift: f64) -> Vec<Vec<f64>> {
    let mut generator = ChaCha8Rng::seed_from_u64(0);
    let mut draw = |n: &f64| {
        let normal: f64 = StandardNormal.sample(&mut generator);
        n * (drift * normal).exp()
    };
    let mut rows = vec![row.to_vec()];
    rows.extend((0..DRAWS).map(|_| row.iter().map(&mut draw).collect::<Vec<f64>>()));
    rows
}
