//! The answer: what was simulated, the figures that matter, the advice, and all alternatives side by side.

use std::fmt::Write;

use super::super::data::{Report, Run, Totals};
use super::super::figures::{balance, bytes, change, count, micros, percent, seconds};
use super::{compared, escape, section};

/// Title and subject.
pub fn header(report: &Report, title: &str) -> String {
    let subject = &report.subject;
    let mut line = format!(
        "{} MoE layers × {} experts, top-{} · {} ranks on {} {}",
        subject.layer_ids.len(),
        subject.experts,
        subject.top_k,
        subject.ranks,
        subject.nodes,
        if subject.nodes == 1 { "node" } else { "nodes" }
    );
    if !subject.cluster.is_empty() {
        line += &format!(" ({})", escape(&subject.cluster));
    }
    let mut input = format!("{} tokens of {}", count(subject.tokens as f64), escape(&subject.input));
    if let Some(fitted) = &subject.fitted_on {
        input += &format!(", placements fitted on {}", escape(fitted));
    }
    format!("<header><h1>{title}</h1><p>{line}</p><p>{input}</p></header>\n")
}

/// The figures that matter most, before and after.
pub fn tiles(report: &Report) -> String {
    let compared = compared(report);
    let first = &compared[0].1.totals;
    let last = &compared[compared.len() - 1].1.totals;
    let changes = compared.len() > 1;
    let before = |text: String| if changes { format!("<i>{text} → </i>") } else { String::new() };
    let mut tiles = vec![
        (
            format!("{}{}", before(balance(first.actual)), balance(last.actual)),
            "balancedness, mean over layers and steps".to_owned(),
        ),
        (
            format!("{}{}", before(micros(first.step_us)), micros(last.step_us)),
            "a mean step, critical path".to_owned(),
        ),
    ];
    if changes && first.tokens_per_s > 0.0 {
        let gain = last.tokens_per_s / first.tokens_per_s - 1.0;
        let class = if gain >= 0.0 { "good" } else { "bad" };
        tiles.push((
            format!("<span class=\"{class}\">{}</span>", change(gain)),
            format!("tokens/s, to {}", count(last.tokens_per_s)),
        ));
    } else {
        tiles.push((count(last.tokens_per_s), "tokens/s, all ranks".to_owned()));
    }
    if let Some(usd) = last.usd_per_million_tokens {
        let was = first.usd_per_million_tokens.map_or(String::new(), |usd| before(format!("${usd:.3}")));
        tiles.push((format!("{was}${usd:.3}"), "per million tokens".to_owned()));
    }
    if let Some(advice) = &report.advice {
        tiles.push((percent(advice.beyond_repair), "of the step no placement or split wins back".to_owned()));
        let verdict = &advice.verdict;
        let class = match (verdict.worth_it, verdict.is_noticeable()) {
            (true, _) => "good",
            (false, true) => "bad",
            (false, false) => "",
        };
        let (first, rest) = verdict.in_words().split_at(1);
        let tile = format!("<span class=\"{class}\">{}{rest}</span>", first.to_uppercase());
        tiles.push((tile, "rebalancing while serving".to_owned()));
    } else {
        tiles.push((balance(last.bound), "bound: the best any placement with these slots allows".to_owned()));
        if let Some(bound) = last.group_bound {
            tiles.push((balance(bound), "bound where groups of experts stay on a node".to_owned()));
        }
    }
    let tiles: String = tiles
        .iter()
        .map(|(figure, what)| format!("<div class=\"tile\"><b>{figure}</b><span>{what}</span></div>"))
        .collect();
    format!("<div class=\"tiles\">{tiles}</div>\n")
}

/// What is recommended, and why.
pub fn advice(report: &Report) -> String {
    let Some(advice) = &report.advice else { return String::new() };
    let mut content = String::from("<ul>");
    for reason in &advice.reasons {
        write!(content, "<li>{}</li>", escape(reason)).expect("a text takes everything");
    }
    let verdict = &advice.verdict;
    write!(
        content,
        "<li>Rebalancing while serving saves {} of serving time per {} and costs {} and {}: {}</li></ul>",
        seconds(verdict.gain_s),
        seconds(verdict.horizon_s),
        seconds(verdict.cost_s),
        bytes(verdict.bytes),
        escape(&verdict.reason)
    )
    .expect("a text takes everything");
    let lead = format!(
        "{}: {} redundant slots per layer, {} more memory per rank, {} tokens/s.",
        escape(&advice.choice),
        advice.redundant,
        bytes(advice.memory_bytes_per_rank),
        change(advice.gain)
    );
    section("Advice", &lead, &content)
}

/// A part of a step: the style sheet's colour, a name for people, and the time.
type Part = (&'static str, &'static str, fn(&Totals) -> f64);

/// Parts of a step in the order of the bars.
const PARTS: [Part; 5] = [
    ("other", "everything else", |totals| totals.other_us),
    ("dispatch", "dispatch", |totals| totals.dispatch_us),
    ("expert", "slowest rank's experts", |totals| totals.expert_us),
    ("combine", "combine", |totals| totals.combine_us),
    ("stall", "waiting for weights", |totals| totals.stall_us),
];

/// All alternatives: where their time goes, and their figures.
pub fn runs(report: &Report) -> String {
    let content = format!("{}{}", bars(&report.runs), table(report));
    section(
        "Alternatives",
        "Where a mean step spends its time, and how even the ranks are: mean load over largest load, 1 is perfect.",
        &content,
    )
}

fn bars(runs: &[Run]) -> String {
    let longest =
        runs.iter().map(|run| PARTS.iter().map(|(_, _, part)| part(&run.totals)).sum()).fold(0.0, f64::max);
    let shown =
        PARTS.iter().filter(|(_, _, part)| runs.iter().any(|run| part(&run.totals) > longest * 0.001));
    let legend: String = shown
        .map(|(name, what, _)| format!("<span><i style=\"background:var(--{name})\"></i>{what}</span>"))
        .collect();
    let mut bars = format!("<div class=\"legend\">{legend}</div><div class=\"bars\">");
    for run in runs {
        let mut at = 0.0;
        let mut rects = String::new();
        for (name, what, part) in PARTS {
            let width = 100.0 * part(&run.totals) / longest.max(f64::MIN_POSITIVE);
            if width > 0.0 {
                write!(
                    rects,
                    "<rect x=\"{at:.2}%\" width=\"{width:.2}%\" height=\"20\" fill=\"var(--{name})\"><title>{what}: {}</title></rect>",
                    micros(part(&run.totals))
                )
                .expect("a text takes everything");
            }
            at += width;
        }
        write!(
            bars,
            "<div class=\"row\"><span class=\"name\">{}</span><div class=\"bar\"><svg role=\"img\" aria-label=\"step time of {}\">{rects}</svg></div><span class=\"value\">{}</span></div>",
            escape(&run.name),
            escape(&run.name),
            micros(run.totals.step_us)
        )
        .expect("a text takes everything");
    }
    bars + "</div>"
}

fn table(report: &Report) -> String {
    let priced = report.runs.iter().any(|run| run.totals.usd_per_million_tokens.is_some());
    let mut head: Vec<&str> = vec![
        "",
        "slots",
        "planned",
        "actual",
        "5th percentile",
        "best split",
        "bound",
        "tokens/s",
        "gain",
        "moved",
        "weights/rank",
    ];
    if priced {
        head.push("$/M tokens");
    }
    let head: String = head.iter().map(|name| format!("<th>{name}</th>")).collect();
    let base = report.runs[0].totals.tokens_per_s;
    let choice = report.choice().map(|run| run.name.as_str());
    let mut rows = String::new();
    for (index, run) in report.runs.iter().enumerate() {
        let totals = &run.totals;
        let gain =
            if index == 0 || base <= 0.0 { String::new() } else { change(totals.tokens_per_s / base - 1.0) };
        let mut cells = vec![escape(&run.name), run.slots.to_string()];
        cells.extend(
            [totals.plan, totals.actual, totals.actual_p5, totals.best_split, totals.bound].map(balance),
        );
        cells.extend([
            count(totals.tokens_per_s),
            gain,
            bytes(totals.moved_bytes),
            bytes(totals.expert_bytes_per_rank),
        ]);
        if priced {
            cells.push(totals.usd_per_million_tokens.map_or("–".to_owned(), |usd| format!("{usd:.3}")));
        }
        let class = if Some(run.name.as_str()) == choice { " class=\"choice\"" } else { "" };
        let cells: String = cells.iter().map(|cell| format!("<td>{cell}</td>")).collect();
        write!(rows, "<tr{class}>{cells}</tr>").expect("a text takes everything");
    }
    format!(
        "<div class=\"scroll\" style=\"margin-top:16px\"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )
}

/// How to get the same again.
pub fn footer(report: &Report) -> String {
    format!(
        "<footer>router-sim, seed {}. Loads are tokens routed to an expert, a slot or a rank; step times are sums over layers of the slowest rank's time.</footer>\n",
        report.subject.seed
    )
}
