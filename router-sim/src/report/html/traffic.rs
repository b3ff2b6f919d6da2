//! Who sends how much to whom.

use super::super::data::Report;
use super::super::figures::{bytes, percent};
use super::cells::{AROUND_MEAN, column_labels, grid, row_labels};
use super::{compared, escape, section as card};

/// The matrix of the recommended run, or of the only one.
pub fn section(report: &Report) -> String {
    let compared = compared(report);
    let Some((_, run)) = compared.iter().rev().find(|(_, run)| run.traffic.bytes.len() > 1) else {
        return String::new();
    };
    let traffic = &run.traffic;
    let n = traffic.bytes.len();
    let remote = || {
        traffic
            .bytes
            .iter()
            .enumerate()
            .flat_map(|(s, row)| row.iter().enumerate().filter(move |(d, _)| *d != s))
    };
    let total: f64 = remote().map(|(_, bytes)| bytes).sum();
    let mean = total / (n * (n - 1)) as f64;
    let largest = remote().map(|(_, bytes)| *bytes).fold(0.0, f64::max);
    let over = |bytes: &f64| if mean > 0.0 { bytes / mean } else { 1.0 };
    let rows: Vec<Vec<f64>> = traffic.bytes.iter().map(|row| row.iter().map(over).collect()).collect();
    let incoming: Vec<f64> = (0..n)
        .map(|d| traffic.bytes.iter().enumerate().filter(|(s, _)| *s != d).map(|(_, row)| row[d]).sum())
        .collect();
    let busiest = (0..n).max_by(|a, b| incoming[*a].total_cmp(&incoming[*b])).unwrap_or(0);
    let unit = escape(&traffic.between);
    let mut facts = format!(
        "{} travel in dispatch, at most {} between one pair; {unit} {busiest} receives most, {}.",
        bytes(total),
        bytes(largest),
        bytes(incoming[busiest])
    );
    if traffic.rows > 0 {
        facts += &format!(
            " {} of (token, expert) pairs stay on their rank; a row serves {:.2} of its rank's experts.",
            percent(traffic.local_rows as f64 / traffic.rows as f64),
            traffic.rows as f64 / traffic.rank_pairs.max(1) as f64
        );
    }
    let content = format!(
        "{}<div class=\"heat square\">{}<div style=\"aspect-ratio:1.15\">{}</div>{}</div><p class=\"cap\">{facts}</p>",
        AROUND_MEAN.legend("times the mean pair"),
        row_labels(&(0..n).collect::<Vec<_>>(), 12),
        grid(&rows, &AROUND_MEAN, "bytes from each source to each destination", &[]),
        column_labels(n, 8, "to"),
    );
    let lead = format!("{}: rows send, columns receive; the diagonal stays at home.", escape(&run.name));
    card(&format!("Traffic between {unit}s"), &lead, &content)
}
