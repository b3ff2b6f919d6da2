//! Which experts are hot: layers x experts.

use super::super::data::Report;
use super::super::figures::{figures, percent};
use super::cells::{TIMES_MEAN, column_labels, grid, row_labels};
use super::section as card;

/// The heat map, with each layer's hottest expert as a bar beside it.
pub fn section(report: &Report) -> String {
    let tokens = &report.expert_tokens;
    let experts = tokens.first().map_or(0, Vec::len);
    if experts == 0 {
        return String::new();
    }
    let times_mean: Vec<Vec<f64>> = tokens.iter().map(|layer| over_mean(layer)).collect();
    let hottest: Vec<f64> =
        times_mean.iter().map(|layer| layer.iter().copied().fold(0.0, f64::max)).collect();
    let titles: Vec<String> = tokens
        .iter()
        .zip(&times_mean)
        .zip(&report.subject.layer_ids)
        .map(|((tokens, times), id)| title(*id, tokens, times))
        .collect();
    let height = (tokens.len() * 7).clamp(120, 640);
    let content = format!(
        "{}<div class=\"heat side\">{}<div style=\"height:{height}px\">{}</div>{}{}<span></span></div>",
        TIMES_MEAN.legend("times the layer's mean load"),
        row_labels(&report.subject.layer_ids, height / 22),
        grid(&times_mean, &TIMES_MEAN, "load of each expert in each layer", &titles),
        bars(&hottest),
        column_labels(experts, 8, "expert"),
    );
    let worst = hottest.iter().copied().fold(0.0, f64::max);
    let layer =
        hottest.iter().position(|times| *times == worst).map_or(0, |layer| report.subject.layer_ids[layer]);
    let mean = hottest.iter().sum::<f64>() / hottest.len() as f64;
    let lead = format!(
        "Tokens per expert in each layer. The hottest expert of a layer takes {} times the mean on average, {} times in layer {layer} (bars on the right).",
        figures(mean),
        figures(worst)
    );
    card("Which experts are hot", &lead, &content)
}

/// Loads over their mean; without any load, all alike.
pub fn over_mean(loads: &[u64]) -> Vec<f64> {
    let mean = loads.iter().map(|n| *n as f64).sum::<f64>() / loads.len().max(1) as f64;
    loads.iter().map(|n| if mean > 0.0 { *n as f64 / mean } else { 1.0 }).collect()
}

fn title(id: usize, tokens: &[u64], times: &[f64]) -> String {
    let hottest = (0..times.len()).max_by(|a, b| times[*a].total_cmp(&times[*b])).unwrap_or(0);
    let mut sorted = tokens.to_vec();
    sorted.sort_unstable_by(|a, b| b.cmp(a));
    let tenth = sorted.len().div_ceil(10);
    let sum = |part: &[u64]| part.iter().map(|n| *n as f64).sum::<f64>();
    let share = sum(&sorted[..tenth]) / sum(&sorted).max(1.0);
    format!(
        "layer {id}: hottest expert {hottest} at {} times the mean; the top {tenth} of {} take {}",
        figures(times[hottest]),
        tokens.len(),
        percent(share)
    )
}

fn bars(values: &[f64]) -> String {
    let largest = values.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
    let rects: String = values
        .iter()
        .enumerate()
        .map(|(row, value)| {
            format!(
                "<rect y=\"{row}.12\" width=\"{:.1}\" height=\".76\" fill=\"var(--b)\"/>",
                value / largest * 100.0
            )
        })
        .collect();
    format!(
        "<div><svg viewBox=\"0 0 100 {}\" preserveAspectRatio=\"none\" role=\"img\" aria-label=\"hottest expert of each layer\">{rects}</svg></div>",
        values.len()
    )
}
