//! Reports as comma-separated values: a row per run, or per run and layer. Numbers are as exact as they were computed.

use super::data::{LayerFigures, Report, Totals};

/// A row per run, with a header.
pub fn runs(report: &Report) -> String {
    let mut text = String::from(
        "run,policy,split,slots,steps,tokens,plan,actual,actual_p5,best_split,bound,step_us,other_us,dispatch_us,expert_us,combine_us,stall_us,tokens_per_s,usd_per_million_tokens,moved_bytes,transfers,expert_bytes_per_rank,group_bound\n",
    );
    for run in &report.runs {
        let Totals { steps, tokens, plan, actual, actual_p5, best_split, bound, .. } = run.totals;
        let Totals { step_us, other_us, dispatch_us, expert_us, combine_us, stall_us, tokens_per_s, .. } =
            run.totals;
        let Totals { moved_bytes, transfers, expert_bytes_per_rank, usd_per_million_tokens, .. } = run.totals;
        let group_bound = optional(run.totals.group_bound);
        let usd = optional(usd_per_million_tokens);
        text += &format!(
            "{},{},{},{},{steps},{tokens},{plan},{actual},{actual_p5},{best_split},{bound},{step_us},{other_us},{dispatch_us},{expert_us},{combine_us},{stall_us},{tokens_per_s},{usd},{moved_bytes},{transfers},{expert_bytes_per_rank},{group_bound}\n",
            quoted(&run.name),
            quoted(&run.policy),
            quoted(&run.split),
            run.slots
        );
    }
    text
}

/// A row per run and MoE layer, with a header.
pub fn layers(report: &Report) -> String {
    let mut text = String::from(
        "run,layer,plan,actual,actual_p5,best_split,bound,max_tokens,activated,max_activated,dispatch_us,expert_us,combine_us,group_bound\n",
    );
    for run in &report.runs {
        for layer in &run.layers {
            let LayerFigures { layer_id, plan, actual, actual_p5, best_split, bound, max_tokens, .. } =
                *layer;
            let LayerFigures { activated, max_activated, dispatch_us, expert_us, combine_us, .. } = *layer;
            let group_bound = optional(layer.group_bound);
            text += &format!(
                "{},{layer_id},{plan},{actual},{actual_p5},{best_split},{bound},{max_tokens},{activated},{max_activated},{dispatch_us},{expert_us},{combine_us},{group_bound}\n",
                quoted(&run.name)
            );
        }
    }
    text
}

/// Nothing where there is no figure.
fn optional(figure: Option<f64>) -> String {
    figure.map_or(String::new(), |figure| figure.to_string())
}

fn quoted(text: &str) -> String {
    match text.contains([',', '"', '\n', '\r']) {
        true => format!("\"{}\"", text.replace('"', "\"\"")),
        false => text.to_owned(),
    }
}
