//! How it went over time, in a few hundred points however long the run is.

use crate::report::data::TimePoint;

/// Points that are kept; neighbours are merged two by two when there are more.
const MOST_POINTS: usize = 256;

/// Points over equally many steps each.
#[derive(Debug, Clone, Default)]
pub struct Timeline {
    points: Vec<TimePoint>,
    steps_per_point: u64,
}

impl Timeline {
    /// Adds a step.
    pub fn push(&mut self, step: TimePoint) {
        self.steps_per_point = self.steps_per_point.max(1);
        if let Some(last) = self.points.last_mut().filter(|last| last.steps < self.steps_per_point) {
            *last = merged(last, &step);
            return;
        }
        if self.points.len() == MOST_POINTS {
            self.points = self.points.chunks(2).map(|pair| merged(&pair[0], &pair[1])).collect();
            self.steps_per_point *= 2;
        }
        self.points.push(step);
    }

    /// All points, the last one perhaps over fewer steps.
    pub fn into_points(self) -> Vec<TimePoint> {
        self.points
    }
}

fn merged(first: &TimePoint, second: &TimePoint) -> TimePoint {
    let (n, m) = (first.steps as f64, second.steps as f64);
    let mean = |a: f64, b: f64| (a * n + b * m) / (n + m);
    TimePoint {
        step: first.step,
        steps: first.steps + second.steps,
        seconds: first.seconds,
        actual: mean(first.actual, second.actual),
        best_split: mean(first.best_split, second.best_split),
        step_us: mean(first.step_us, second.step_us),
        layers_in_flight: first.layers_in_flight.max(second.layers_in_flight),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_runs_keep_few_points_and_the_mean() {
        let mut timeline = Timeline::default();
        let steps = 3 * MOST_POINTS as u64;
        for step in 0..steps {
            timeline.push(TimePoint { step, steps: 1, step_us: step as f64, ..TimePoint::default() });
        }
        let points = timeline.into_points();
        assert!((MOST_POINTS / 2..=MOST_POINTS).contains(&points.len()), "{}", points.len());
        assert_eq!(points.iter().map(|p| p.steps).sum::<u64>(), steps);
        assert!(points.windows(2).all(|pair| pair[0].step + pair[0].steps == pair[1].step));
        let mean = points.iter().map(|p| p.step_us * p.steps as f64).sum::<f64>() / steps as f64;
        assert!((mean - (steps - 1) as f64 / 2.0).abs() < 1e-6);
    }
}
