//! Balance over time, with marks where weights moved.

use super::super::data::{Report, Run};
use super::super::figures::{balance, bytes};
use super::plot::{Plot, ticks};
use super::{colour, escape, line_key, section as card};

/// Lines that can still be told apart.
const MAX_LINES: usize = 6;

/// The section; needs more than one point in time.
pub fn section(report: &Report) -> String {
    let runs = chosen(report);
    let Some(steps) = runs.iter().flat_map(|run| &run.timeline).map(|point| point.step + point.steps).max()
    else {
        return String::new();
    };
    let values =
        || runs.iter().flat_map(|run| &run.timeline).flat_map(|point| [point.actual, point.best_split]);
    let lowest = values().fold(1.0, f64::min);
    let from = ((lowest - 0.02) * 10.0).floor().max(0.0) / 10.0;
    let mut plot = Plot::new(240, (0.0, steps as f64), (from, 1.0));
    plot.rows(&ticks(from, 1.0, 5), |value| format!("{value:.2}"));
    plot.columns(&ticks(0.0, steps as f64, 6), |value| format!("{value:.0}"));
    let mut moves = 0;
    for run in &runs {
        for rebalance in &run.rebalances {
            moves += 1;
            let title = format!(
                "{}: {}, {} transfers, {}; {} → {}",
                escape(&run.name),
                escape(&rebalance.trigger),
                rebalance.transfers,
                bytes(rebalance.bytes),
                balance(rebalance.before),
                balance(rebalance.after)
            );
            plot.moment(rebalance.step as f64, &title);
        }
    }
    for (index, run) in runs.iter().enumerate() {
        let middle = |step: u64, steps: u64| step as f64 + steps as f64 / 2.0;
        let best = run.timeline.iter().map(|point| (middle(point.step, point.steps), point.best_split));
        plot.line(best, colour(index), "faint");
        let actual = run.timeline.iter().map(|point| (middle(point.step, point.steps), point.actual));
        plot.line(actual, colour(index), "");
    }
    let mut legend: String = runs.iter().enumerate().map(|(index, run)| line_key(index, &run.name)).collect();
    legend += "<span><i class=\"line dots\" style=\"border-color:var(--soft)\"></i>best split of the same placement</span>";
    let lead = match moves {
        0 => "Mean over layers, 1 is perfect.".to_owned(),
        _ => format!("Mean over layers, 1 is perfect. Upright lines are rebalances ({moves})."),
    };
    let plot = plot.finish("balancedness over steps", "step");
    card("Balance over time", &lead, &format!("<div class=\"legend\">{legend}</div>{plot}"))
}

/// Runs that have a course of time; where there are too many, the compared ones, then those that rebalance.
fn chosen(report: &Report) -> Vec<&Run> {
    let choice = report.choice().map(|run| run.name.as_str());
    let timed = report.runs.iter().enumerate().filter(|(_, run)| run.timeline.len() > 1);
    let mut runs: Vec<(usize, &Run)> = timed.collect();
    runs.sort_by_key(|(index, run)| match run {
        run if *index == 0 || Some(run.name.as_str()) == choice => 0,
        run if !run.rebalances.is_empty() => 1,
        _ => 2,
    });
    runs.truncate(MAX_LINES);
    runs.sort_by_key(|(index, _)| *index);
    runs.into_iter().map(|(_, run)| run).collect()
}
