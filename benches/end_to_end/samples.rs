//! Samples of a speed, each with the limit of the same moment.

/// One of them.
#[derive(Clone, Copy)]
pub struct Sample {
    /// Tokens per second of the whole sample.
    pub speed: f64,
    /// Tokens per second.
    pub limit: f64,
    /// Of its typical step to the limit.
    pub ratio: f64,
    /// The same to the limit that counts what is slower for each matrix, reading or multiplying; NaN without.
    pub by_matrix: f64,
}

/// Some samples.
#[derive(Default)]
pub struct Samples {
    samples: Vec<Sample>,
}

impl Samples {
    /// Adds one.
    pub fn push(&mut self, sample: Sample) {
        self.samples.push(sample);
    }

    /// Median speed.
    pub fn speed(&self) -> f64 {
        median(&self.of(|sample| sample.speed))
    }

    /// Median limit.
    pub fn limit(&self) -> f64 {
        median(&self.of(|sample| sample.limit))
    }

    /// Median ratio to the limit by matrix.
    pub fn by_matrix(&self) -> f64 {
        median(&self.of(|sample| sample.by_matrix))
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
