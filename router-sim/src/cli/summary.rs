//! What a run comes to, in a few lines of text.

use std::fmt::Write;

use router_sim::report::data::{Advice, Run, Verdict};
use router_sim::report::figures::{bytes, micros, whole};

/// A run by itself.
pub fn of_run(run: &Run) -> String {
    let t = &run.totals;
    let mut out = String::new();
    let mut line = |text: String| {
        out.push_str(&text);
        out.push('\n');
    };
    line(format!("{}: {} slots per layer, {} steps, {} tokens", run.name, run.slots, t.steps, t.tokens));
    line(format!(
        "  balancedness     plan {:.4}   actual {:.4} (p5 {:.3})   best split {:.4}   bound {:.4}",
        t.plan, t.actual, t.actual_p5, t.best_split, t.bound
    ));
    line(format!(
        "  step             {} = other {} + dispatch {} + experts {} + combine {} + stall {}",
        micros(t.step_us),
        micros(t.other_us),
        micros(t.dispatch_us),
        micros(t.expert_us),
        micros(t.combine_us),
        micros(t.stall_us)
    ));
    let price =
        t.usd_per_million_tokens.map_or(String::new(), |usd| format!("   ${usd:.3} per million tokens"));
    line(format!("  throughput       {} tokens/s{price}", whole(t.tokens_per_s)));
    let traffic = &run.traffic;
    let rows = traffic.rows.max(1) as f64;
    line(format!(
        "  traffic          {:.1} % of rows stay home; a token visits {:.2} ranks, {:.2} nodes ({:.2} remote)",
        100.0 * traffic.local_rows as f64 / rows,
        per_token(traffic.rank_pairs, t.tokens, run.layers.len()),
        per_token(traffic.node_pairs, t.tokens, run.layers.len()),
        per_token(traffic.remote_node_pairs, t.tokens, run.layers.len()),
    ));
    line(format!("  expert weights   {} per rank", bytes(t.expert_bytes_per_rank)));
    if let Some(worst) = run.layers.iter().min_by(|a, b| a.actual.total_cmp(&b.actual)) {
        line(format!(
            "  worst layer      {}: actual {:.4} (p5 {:.3}), best split {:.4}, bound {:.4}",
            worst.layer_id, worst.actual, worst.actual_p5, worst.best_split, worst.bound
        ));
    }
    if let Some(bound) = t.group_bound {
        let worst = run.layers.iter().filter_map(|layer| layer.group_bound).fold(1.0, f64::min);
        line(format!("  groups on nodes  allow {bound:.4} at best (worst layer {worst:.4})"));
    }
    if !run.rebalances.is_empty() {
        let mean = t.transfers as f64 / run.rebalances.len() as f64 / run.layers.len() as f64;
        line(format!(
            "  rebalanced       {} times, {mean:.1} transfers per layer, {} in all",
            run.rebalances.len(),
            bytes(t.moved_bytes)
        ));
    }
    line("  lost to imbalance, of the step time:".into());
    for loss in &run.losses {
        let mut price = String::new();
        if let Some(moved) = loss.moved_bytes {
            write!(price, " [{} to move]", bytes(moved)).expect("a String takes everything");
        }
        if let Some(memory) = loss.memory_bytes {
            write!(price, " [{} more per rank]", bytes(memory)).expect("a String takes everything");
        }
        line(format!("    {:<15} {:>5.1} %  {}{price}", loss.cause, 100.0 * loss.share, loss.remedy));
    }
    out
}

/// What was recommended, and why.
pub fn of_advice(advice: &Advice) -> String {
    let mut text = format!("advice: {}\n", advice.choice);
    advice.reasons.iter().for_each(|reason| text += &format!("  - {reason}\n"));
    let Verdict { reason, .. } = &advice.verdict;
    text + &format!("rebalancing while serving: {}: {reason}\n", advice.verdict.in_words())
}

/// Alternatives side by side; gains are against the first.
pub fn table(runs: &[Run]) -> String {
    let header = [
        "alternative",
        "plan",
        "actual",
        "p5",
        "best",
        "bound",
        "experts",
        "step",
        "tokens/s",
        "gain",
        "moved",
        "weights",
    ];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    let first = runs.first().map_or(0.0, |run| run.totals.tokens_per_s);
    let priced = runs.iter().any(|run| run.totals.usd_per_million_tokens.is_some());
    if priced {
        rows[0].push("$/M tokens".to_owned());
    }
    for run in runs {
        let t = &run.totals;
        let gain = if first > 0.0 { 100.0 * (t.tokens_per_s / first - 1.0) } else { 0.0 };
        let mut row = vec![
            run.name.clone(),
            format!("{:.4}", t.plan),
            format!("{:.4}", t.actual),
            format!("{:.3}", t.actual_p5),
            format!("{:.4}", t.best_split),
            format!("{:.4}", t.bound),
            micros(t.expert_us),
            micros(t.step_us),
            whole(t.tokens_per_s),
            format!("{gain:+.1} %"),
            if t.transfers > 0 { bytes(t.moved_bytes) } else { "-".to_owned() },
            bytes(t.expert_bytes_per_rank),
        ];
        if priced {
            row.push(t.usd_per_million_tokens.map_or("-".to_owned(), |usd| format!("{usd:.3}")));
        }
        rows.push(row);
    }
    aligned(&rows)
}

/// The first column to the left, all others to the right.
fn aligned(rows: &[Vec<String>]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..rows[0].len()).map(width).collect();
    let mut out = String::new();
    for row in rows {
        for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
            match column {
                0 => write!(out, "{cell:<width$}"),
                _ => write!(out, "  {cell:>width$}"),
            }
            .expect("a String takes everything");
        }
        out.push('\n');
    }
    out
}

fn per_token(pairs: u64, tokens: u64, layers: usize) -> f64 {
    pairs as f64 / (tokens.max(1) * layers.max(1) as u64) as f64
}
