//! Samples in pairs: a speed, and the limit of the same moment.

/// Speeds and limits in tokens per second.
#[derive(Default)]
pub struct Samples {
    pairs: Vec<(f64, f64)>,
}

impl Samples {
    /// Adds one pair.
    pub fn push(&mut self, speed: f64, limit: f64) {
        self.pairs.push((speed, limit));
    }

    /// Median speed.
    pub fn speed(&self) -> f64 {
        median(&self.of(|(speed, _)| speed))
    }

    /// Median limit.
    pub fn limit(&self) -> f64 {
        median(&self.of(|(_, limit)| limit))
    }

    /// First quartile, median and third quartile of speed / limit.
    pub fn ratio_quartiles(&self) -> [f64; 3] {
        let ratios = self.of(|(speed, limit)| speed / limit);
        [0.25, 0.5, 0.75].map(|fraction| quantile(&ratios, fraction))
    }

    fn of(&self, what: impl Fn((f64, f64)) -> f64) -> Vec<f64> {
        self.pairs.iter().copied().map(what).collect()
    }
}

/// The middle of some numbers; NaN without any.
pub fn median(numbers: &[f64]) -> f64 {
    quantile(numbers, 0.5)
}

/// Between two samples where it falls there.
fn quantile(numbers: &[f64], fraction: f64) -> f64 {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let at = fraction * last as f64;
    let (low, high) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    low + (high - low) * at.fract()
}
