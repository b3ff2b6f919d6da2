//! What moving more weights brings.

use super::super::data::Report;
use super::super::figures::{balance, bytes, figures};
use super::plot::{Plot, ticks};
use super::{escape, section as card};

/// The section; needs more than one point.
pub fn section(report: &Report) -> String {
    if report.pareto.len() < 2 {
        return String::new();
    }
    let lowest = report.pareto.iter().map(|point| point.balancedness).fold(1.0, f64::min);
    let from = ((lowest - 0.1 * (1.0 - lowest) - 0.001) * 100.0).floor().max(0.0) / 100.0;
    let most = report.pareto.iter().map(|point| point.bytes).fold(0.0, f64::max);
    // Roots spread the cheap points, which are the interesting ones.
    let root = |bytes: f64| bytes.max(0.0).sqrt();
    let mut plot = Plot::new(380, (0.0, root(most) * 1.04), (from, 1.0));
    plot.rows(&ticks(from, 1.0, 5), |value| format!("{value:.3}"));
    let marks = [0.0, most / 16.0, most / 4.0, most];
    plot.columns(&marks.map(root), |root| bytes(root * root));
    let mut best: Vec<_> = report.pareto.iter().filter(|point| point.best).collect();
    best.sort_by(|a, b| a.bytes.total_cmp(&b.bytes));
    plot.line(best.iter().map(|point| (root(point.bytes), point.balancedness)), "var(--a)", "");
    for point in &report.pareto {
        let title = format!(
            "{}: {} transfers per layer, {}, balancedness {}",
            escape(&point.label),
            figures(point.transfers_per_layer),
            bytes(point.bytes),
            balance(point.balancedness)
        );
        let (colour, class) = if point.best { ("var(--a)", "") } else { ("var(--f)", "small") };
        plot.dot(root(point.bytes), point.balancedness, colour, class, &title);
    }
    // Two neighbours' names would lie on each other: the best that are far enough apart get theirs.
    let mut named: Vec<(f64, f64)> = Vec::new();
    for point in best.iter().rev() {
        let place =
            (root(point.bytes) / root(most).max(1e-9), (point.balancedness - from) / (1.0 - from).max(1e-9));
        if named.iter().all(|(x, y)| (x - place.0).abs() > 0.3 || (y - place.1).abs() > 0.08) {
            named.push(place);
            plot.tag(root(point.bytes), point.balancedness, &escape(&point.label));
        }
    }
    let plot = plot.finish("balancedness against bytes moved", "bytes of weights moved (root scale)");
    card(
        "What moving weights buys",
        "Balancedness reached against bytes moved from the placement in force; no other point beats those on the line.",
        &plot,
    )
}
