//! Where step time is lost, as a waterfall from the step as it is to a step in perfect balance.

use std::fmt::Write;

use super::super::data::{Report, Run};
use super::super::figures::{bytes, micros, percent};
use super::{compared, escape, section as card};

/// The waterfall of one run.
fn waterfall(run: &Run) -> String {
    let mut rows = String::new();
    let mut row = |name: &str, from: f64, to: f64, colour: &str, value: String, note: String| {
        write!(
            rows,
            "<div class=\"row\"><span class=\"name\">{name}</span><div class=\"bar\"><svg role=\"img\" aria-label=\"{name} {value}\"><rect x=\"{:.2}%\" width=\"{:.2}%\" height=\"20\" rx=\"2\" fill=\"{colour}\"/></svg></div><span class=\"value\">{value}</span>",
            from * 100.0,
            (to - from) * 100.0
        )
        .expect("a text takes everything");
        if !note.is_empty() {
            write!(rows, "<span class=\"note\">{note}</span>").expect("a text takes everything");
        }
        rows += "</div>";
    };
    row("step as it is", 0.0, 1.0, "var(--expert)", micros(run.totals.step_us), String::new());
    let mut left = 1.0;
    for loss in &run.losses {
        let share = loss.share.clamp(0.0, left);
        let mut note = escape(&loss.remedy);
        for (price, what) in [(loss.moved_bytes, "moves"), (loss.memory_bytes, "memory per rank:")] {
            if let Some(price) = price {
                write!(note, " · {what} {}", bytes(price)).expect("a text takes everything");
            }
        }
        let value = match share {
            0.0 => "0".to_owned(),
            _ => format!("{} · {}", percent(share), micros(loss.us)),
        };
        row(&escape(&loss.cause), left - share, left, "var(--b)", value, note);
        left -= share;
    }
    row("perfect balance", 0.0, left, "var(--c)", percent(left), String::new());
    format!("<div class=\"bars\">{rows}</div>")
}

/// The section.
pub fn section(report: &Report) -> String {
    let with_losses: Vec<&Run> =
        compared(report).into_iter().map(|(_, run)| run).filter(|run| !run.losses.is_empty()).collect();
    let heading = "Where step time is lost";
    let lead = "Each bar is what removing one cause wins back, causes taken in this order.";
    match with_losses[..] {
        [] => String::new(),
        [only] => card(heading, lead, &waterfall(only)),
        _ => {
            let pair: String = with_losses
                .iter()
                .map(|run| format!("<div><h3>{}</h3>{}</div>", escape(&run.name), waterfall(run)))
                .collect();
            card(heading, lead, &format!("<div class=\"pair\">{pair}</div>"))
        }
    }
}
