//! All figures of all layers, folded away.

use std::fmt::Write;

use super::super::data::{LayerFigures, Report};
use super::super::figures::{balance, count, figures, micros};
use super::{compared, escape};

/// A table per compared run.
pub fn section(report: &Report) -> String {
    let mut tables = String::new();
    for (_, run) in compared(report) {
        if run.layers.is_empty() {
            continue;
        }
        let rows: String = run.layers.iter().map(row).collect();
        write!(
            tables,
            "<h3>{}</h3><div class=\"scroll\"><table><thead><tr><th>layer</th><th>planned</th><th>actual</th><th>5th percentile</th><th>best split</th><th>bound</th><th>most tokens</th><th>experts read</th><th>most</th><th>dispatch</th><th>experts</th><th>combine</th></tr></thead><tbody>{rows}</tbody></table></div>",
            escape(&run.name)
        )
        .expect("a text takes everything");
    }
    match tables.is_empty() {
        true => String::new(),
        false => format!("<section><details><summary>Every layer</summary>{tables}</details></section>\n"),
    }
}

fn row(layer: &LayerFigures) -> String {
    let cells = [
        layer.layer_id.to_string(),
        balance(layer.plan),
        balance(layer.actual),
        balance(layer.actual_p5),
        balance(layer.best_split),
        balance(layer.bound),
        count(layer.max_tokens),
        figures(layer.activated),
        figures(layer.max_activated),
        micros(layer.dispatch_us),
        micros(layer.expert_us),
        micros(layer.combine_us),
    ];
    let cells: String = cells.iter().map(|cell| format!("<td>{cell}</td>")).collect();
    format!("<tr>{cells}</tr>")
}
