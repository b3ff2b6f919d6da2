//! Samples of a speed, each with the limit of the same moment.

#[derive(Clone, Copy)]
struct Sample {
    /// Tokens per second of the whole sample.
    speed: f64,
    /// Tokens per second.
    limit: f64,
    /// Of its typical step to the limit.
    ratio: f64,
}

/// Some samples.
#[derive(Default)]
pub struct Samples {
    samples: Vec<Sample>,
}

impl Samples {
    /// Adds one.
    pub fn push(&mut self, speed: f64, limit: f64, ratio: f64) {
        self.samples.push(Sample { speed, limit, ratio });
    }

    /// Median speed.
    pub fn speed(&self) -> f64 {
        median(&self.of(|sample| sample.speed))
    }

    /// Median limit.
    pub fn limit(&self) -> f64 {
        median(&self.of(|sample| sample.limit))
    }

    /// First quartile, median and third quartile of the ratios.
    pub fn ratio_quartiles(&self) -> [f64; 3] {
        let ratios = self.of(|sample| sample.ratio);
        [0.25, 0.5, 0.75].map(|fraction| quantile(&ratios, fraction))
    }

    fn of(&self, what: impl Fn(Sample) -> f64) -> Vec<f64> {
        self.samples.iter().copied().map(what).collect()
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
