//! From measured times to a table and to JSON.

use serde_json::{Value, json};

/// A quantity measured many times, in milliseconds.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Samples(Vec<f64>);

impl Samples {
    pub(super) fn of_seconds(seconds: impl IntoIterator<Item = f64>) -> Self {
        let mut ms: Vec<f64> = seconds.into_iter().map(|s| s * 1e3).collect();
        ms.sort_unstable_by(f64::total_cmp);
        Samples(ms)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn mean(&self) -> f64 {
        self.0.iter().sum::<f64>() / self.0.len() as f64
    }

    /// The value below which `percent` % of the samples lie, interpolated between neighbours (as numpy does it).
    pub(super) fn percentile(&self, percent: f64) -> f64 {
        let place = percent / 100.0 * (self.0.len() - 1) as f64;
        let (low, part) = (place.floor() as usize, place.fract());
        let high = (low + 1).min(self.0.len() - 1);
        self.0[low] + (self.0[high] - self.0[low]) * part
    }

    /// Mean and percentiles, in milliseconds; null where nothing was measured.
    pub(super) fn json(&self, percents: &[f64]) -> Value {
        if self.is_empty() {
            return Value::Null;
        }
        let mut object = json!({"mean_ms": round(self.mean())});
        for &percent in percents {
            object[format!("p{percent}_ms")] = json!(round(self.percentile(percent)));
        }
        object
    }
}

/// Enough digits for a time or a rate.
pub(super) fn round(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

/// Rows of text, columns aligned to the right but for the first.
pub(super) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width =
        |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| match column {
            0 => format!("{cell:<width$}"),
            _ => format!("{cell:>width$}"),
        });
        text += cells.collect::<Vec<_>>().join("  ").trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_interpolate() {
        let samples = Samples::of_seconds([0.004, 0.001, 0.003, 0.002]);
        assert_eq!((samples.percentile(0.0), samples.percentile(100.0)), (1.0, 4.0));
        assert_eq!((samples.percentile(50.0), samples.mean()), (2.5, 2.5));
        assert_eq!(samples.json(&[50.0, 99.0]), json!({"mean_ms": 2.5, "p50_ms": 2.5, "p99_ms": 3.97}));
        assert_eq!(Samples::of_seconds([0.007]).percentile(99.0), 7.0);
        assert_eq!(Samples::default().json(&[50.0]), Value::Null);
    }

    #[test]
    fn tables_are_aligned() {
        let rows = [vec!["a".into(), "10".into()], vec!["long".into(), "2".into(), "x".into()]];
        assert_eq!(table(&rows), "a     10\nlong   2  x\n");
    }
}
