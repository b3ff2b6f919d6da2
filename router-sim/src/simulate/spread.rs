//! The distribution of a ratio in [0, 1], in bounded memory.

/// Resolution of percentiles.
const BINS: usize = 2000;

/// Mean and percentiles of balancedness over steps.
#[derive(Debug, Clone)]
pub struct Spread {
    bins: Vec<u64>,
    sum: f64,
    count: u64,
}

impl Default for Spread {
    fn default() -> Self {
        Spread { bins: vec![0; BINS + 1], sum: 0.0, count: 0 }
    }
}

impl Spread {
    /// Adds one ratio.
    pub fn add(&mut self, ratio: f64) {
        self.bins[(ratio * BINS as f64).round() as usize] += 1;
        self.sum += ratio;
        self.count += 1;
    }

    /// Adds another distribution.
    pub fn merge(&mut self, other: &Spread) {
        for (sum, n) in self.bins.iter_mut().zip(&other.bins) {
            *sum += n;
        }
        self.sum += other.sum;
        self.count += other.count;
    }

    /// Mean; 1 without ratios.
    pub fn mean(&self) -> f64 {
        if self.count == 0 { 1.0 } else { self.sum / self.count as f64 }
    }

    /// The ratio that a share of all ratios is at most (nearest rank), to half a bin; 1 without ratios.
    pub fn percentile(&self, share: f64) -> f64 {
        let rank = (share * self.count as f64).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (bin, n) in self.bins.iter().enumerate() {
            seen += n;
            if seen >= rank {
                return bin as f64 / BINS as f64;
            }
        }
        1.0
    }
}
