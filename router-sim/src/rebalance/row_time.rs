//! What a row takes in the experts, prefill and decode apart.

/// Time and rows of the steps since it was last asked. A step's time is shared out to its phases as their rows are:
/// experts compute the rows of both in one product.
#[derive(Debug, Clone, Copy, Default)]
pub struct RowTime {
    us: [f64; 2],
    rows: [f64; 2],
    latest: [f64; 2],
}

impl RowTime {
    /// Experts took `us` microseconds for `rows` rows, in a step with so many tokens of prefill and decode.
    pub fn add(&mut self, us: f64, rows: f64, tokens: [u64; 2]) {
        let all = (tokens[0] + tokens[1]) as f64;
        if all == 0.0 {
            return;
        }
        for (phase, tokens) in tokens.into_iter().enumerate() {
            self.us[phase] += us * tokens as f64 / all;
            self.rows[phase] += rows * tokens as f64 / all;
        }
    }

    /// Microseconds of a row since the last call; where a phase had none since, what it took before.
    pub fn take(&mut self) -> [f64; 2] {
        for phase in 0..2 {
            if self.rows[phase] > 0.0 {
                self.latest[phase] = self.us[phase] / self.rows[phase];
            }
        }
        (self.us, self.rows) = ([0.0; 2], [0.0; 2]);
        self.latest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_goes_to_the_phases_as_rows_do() {
        let mut time = RowTime::default();
        assert_eq!(time.take(), [0.0, 0.0]);
        time.add(100.0, 10.0, [0, 4]);
        time.add(400.0, 100.0, [3, 1]);
        time.add(7.0, 7.0, [0, 0]);
        assert_eq!(time.take(), [300.0 / 75.0, 200.0 / 35.0]);
        time.add(50.0, 10.0, [0, 4]);
        assert_eq!(time.take(), [4.0, 5.0], "prefill keeps what it took");
    }
}
