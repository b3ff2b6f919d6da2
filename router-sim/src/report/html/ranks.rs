//! How even the ranks are, before and after: layers x ranks, and the slowest rank of each layer.

use super::super::data::Report;
use super::super::figures::figures;
use super::cells::{AROUND_MEAN, column_labels, grid, row_labels};
use super::experts::over_mean;
use super::plot::{Plot, ticks};
use super::{colour, compared, escape, line_key, section as card};

/// The section.
pub fn section(report: &Report) -> String {
    let runs: Vec<_> = compared(report).into_iter().filter(|(_, run)| !run.rank_tokens.is_empty()).collect();
    if runs.is_empty() {
        return String::new();
    }
    let mut content = String::new();
    if report.subject.layer_ids.len() > 1 {
        content += &slowest(report, &runs);
    }
    content += &AROUND_MEAN.legend("times the mean of the layer's ranks");
    let mut grids = String::new();
    for (_, run) in &runs {
        let rows: Vec<Vec<f64>> = run.rank_tokens.iter().map(|layer| over_mean(layer)).collect();
        let height = (rows.len() * 5).clamp(90, 360);
        grids += &format!(
            "<div><h3>{}</h3><div class=\"heat\">{}<div style=\"height:{height}px\">{}</div>{}</div></div>",
            escape(&run.name),
            row_labels(&report.subject.layer_ids, height / 22),
            grid(&rows, &AROUND_MEAN, "load of each rank in each layer", &[]),
            column_labels(rows.first().map_or(0, Vec::len), 8, "rank"),
        );
    }
    let class = if runs.len() > 1 { "pair" } else { "" };
    content += &format!("<div class=\"{class}\">{grids}</div>");
    card(
        "How even the ranks are",
        "A layer is as slow as its most loaded rank: each line is that rank's tokens over the mean, the maps show all ranks.",
        &content,
    )
}

/// Largest over mean of each layer, a line per run.
fn slowest(report: &Report, runs: &[(usize, &super::super::data::Run)]) -> String {
    let ids = &report.subject.layer_ids;
    let worst = |layer: &Vec<u64>| over_mean(layer).into_iter().fold(1.0, f64::max);
    let lines: Vec<Vec<f64>> =
        runs.iter().map(|(_, run)| run.rank_tokens.iter().map(worst).collect()).collect();
    let top = lines.iter().flatten().copied().fold(1.0, f64::max);
    let (from, to) = (ids[0] as f64, ids[ids.len() - 1] as f64);
    let mut plot = Plot::new(150, (from, to), (1.0, 1.0 + (top - 1.0).max(0.01) * 1.08));
    plot.rows(&ticks(1.0, top.max(1.01), 4), |value| format!("{}×", figures(value)));
    plot.columns(&ticks(from, to, 8), |value| format!("{value:.0}"));
    for (index, line) in lines.iter().enumerate() {
        let points = ids.iter().map(|id| *id as f64).zip(line.iter().copied());
        plot.line(points, colour(index), "");
    }
    let legend: String =
        runs.iter().enumerate().map(|(index, (_, run))| line_key(index, &run.name)).collect();
    format!(
        "<div class=\"legend\">{legend}</div>{}",
        plot.finish("most loaded rank of each layer over the mean", "layer")
    )
}
