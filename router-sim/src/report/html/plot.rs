//! Axes and marks of charts. A drawing stretches with the page; its labels are HTML and do not.

use std::fmt::Write;

/// Width of the drawings' own coordinates.
const WIDTH: f64 = 1000.0;

/// A chart under construction.
pub struct Plot {
    height: u32,
    x: (f64, f64),
    y: (f64, f64),
    marks: String,
    labels: String,
}

impl Plot {
    /// `height` pixels high; `x` and `y` are what the edges stand for.
    pub fn new(height: u32, x: (f64, f64), y: (f64, f64)) -> Self {
        // An axis of one value would divide by zero.
        let widen = |(from, to): (f64, f64)| if to > from { (from, to) } else { (from, from + 1.0) };
        Plot { height, x: widen(x), y: widen(y), marks: String::new(), labels: String::new() }
    }

    fn left(&self, x: f64) -> f64 {
        (x - self.x.0) / (self.x.1 - self.x.0)
    }

    fn top(&self, y: f64) -> f64 {
        1.0 - (y - self.y.0) / (self.y.1 - self.y.0)
    }

    fn at(&self, x: f64, y: f64) -> (f64, f64) {
        (self.left(x) * WIDTH, self.top(y) * f64::from(self.height))
    }

    fn mark(&mut self, mark: std::fmt::Arguments<'_>) {
        self.marks.write_fmt(mark).expect("a text takes everything");
    }

    fn label(&mut self, label: std::fmt::Arguments<'_>) {
        self.labels.write_fmt(label).expect("a text takes everything");
    }

    /// Lines and labels across, at the given values.
    pub fn rows(&mut self, values: &[f64], name: impl Fn(f64) -> String) {
        for value in values {
            let top = self.top(*value);
            self.mark(format_args!(
                "<path class=\"thin grid\" d=\"M0 {:.1}H{WIDTH}\"/>",
                top * f64::from(self.height)
            ));
            self.label(format_args!(
                "<span class=\"y\" style=\"top:{:.2}%\">{}</span>",
                top * 100.0,
                name(*value)
            ));
        }
    }

    /// Labels below, at the given values, ascending.
    pub fn columns(&mut self, values: &[f64], name: impl Fn(f64) -> String) {
        for value in values {
            let left = self.left(*value);
            let edge = match left {
                left if left < 0.02 => " first",
                left if left > 0.98 => " last",
                _ => "",
            };
            self.label(format_args!(
                "<span class=\"x{edge}\" style=\"left:{:.2}%\">{}</span>",
                left * 100.0,
                name(*value)
            ));
        }
    }

    /// A line through points.
    pub fn line(&mut self, points: impl Iterator<Item = (f64, f64)>, colour: &str, class: &str) {
        let mut path = String::new();
        for (index, (x, y)) in points.filter(|(x, y)| x.is_finite() && y.is_finite()).enumerate() {
            let (x, y) = self.at(x, y);
            let command = if index == 0 { 'M' } else { 'L' };
            write!(path, "{command}{x:.1} {y:.1}").expect("a text takes everything");
        }
        self.mark(format_args!("<path class=\"stroke {class}\" style=\"stroke:{colour}\" d=\"{path}\"/>"));
    }

    /// A dot with a text when pointed at.
    pub fn dot(&mut self, x: f64, y: f64, colour: &str, class: &str, title: &str) {
        let (x, y) = self.at(x, y);
        self.mark(format_args!(
            "<path class=\"dot {class}\" style=\"stroke:{colour}\" d=\"M{x:.1} {y:.1}h0\"><title>{title}</title></path>"
        ));
    }

    /// A text beside a point.
    pub fn tag(&mut self, x: f64, y: f64, text: &str) {
        let (left, top) = (self.left(x), self.top(y));
        let side = if left > 0.6 { " left" } else { "" };
        self.label(format_args!(
            "<span class=\"tag{side}\" style=\"left:{:.2}%;top:{:.2}%\">{text}</span>",
            left * 100.0,
            top * 100.0
        ));
    }

    /// A line from top to bottom, with a text when pointed at.
    pub fn moment(&mut self, x: f64, title: &str) {
        let left = self.left(x) * WIDTH;
        let height = self.height;
        self.mark(format_args!(
            "<path class=\"thin mark\" d=\"M{left:.1} 0V{height}\"/><rect class=\"hit\" x=\"{:.1}\" width=\"10\" height=\"{height}\"><title>{title}</title></rect>",
            left - 5.0
        ));
    }

    /// The HTML.
    pub fn finish(self, label: &str, axis: &str) -> String {
        let Plot { height, marks, labels, .. } = self;
        format!(
            "<div class=\"plot\" style=\"height:{height}px\"><svg viewBox=\"0 0 {WIDTH} {height}\" preserveAspectRatio=\"none\" role=\"img\" aria-label=\"{label}\">{marks}</svg>{labels}</div><p class=\"axis\">{axis}</p>\n"
        )
    }
}

/// About `most` round values within a range, its ends included where they are round.
pub fn ticks(from: f64, to: f64, most: usize) -> Vec<f64> {
    if !(from.is_finite() && to > from) {
        return vec![from];
    }
    let least = (to - from) / most.max(1) as f64;
    let power = 10f64.powf(least.log10().floor());
    let step =
        [1.0, 2.0, 5.0, 10.0].into_iter().map(|factor| factor * power).find(|step| *step >= least * 0.999);
    let step = step.unwrap_or(10.0 * power);
    let first = (from / step - 1e-9).ceil() as i64;
    let last = (to / step + 1e-9).floor() as i64;
    (first..=last).map(|n| n as f64 * step).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round() {
        assert_eq!(ticks(0.0, 100.0, 5), [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]);
        assert_eq!(ticks(0.0, 7.0, 4), [0.0, 2.0, 4.0, 6.0]);
        assert_eq!(ticks(3.0, 3.0, 4), [3.0]);
        assert_eq!(ticks(0.0, f64::NAN, 4), [0.0]);
        assert_eq!(ticks(0.5, 1.0, 5).len(), 6);
    }
}
