//! Coloured cells of a matrix, drawn as one path per colour: a cell takes about seven bytes.

use std::fmt::Write;

/// Most rows and columns that are drawn; larger matrices have neighbours taken together.
const MAX_SIDE: usize = 512;

/// What a colour level stands for: thresholds between levels, ascending; one level more than thresholds.
#[derive(Debug, Clone, Copy)]
pub struct Scale {
    /// Name of the style sheet's colours, `h` or `r`.
    pub colours: char,
    /// Upper ends of all levels but the last.
    pub limits: [f64; 8],
    /// What the limits are called, between the colours of a legend; empty ones are left out.
    pub names: [&'static str; 8],
}

/// Times the mean, from little to much.
pub const TIMES_MEAN: Scale = Scale {
    colours: 'h',
    limits: [0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0],
    names: ["⅛", "¼", "½", "1", "2", "4", "8", "16"],
};

/// Times the mean, below and above it.
pub const AROUND_MEAN: Scale = Scale {
    colours: 'r',
    limits: [0.6, 0.8, 0.9, 0.97, 1.03, 1.1, 1.25, 1.5],
    names: ["0.6", "", "0.9", "", "", "1.1", "", "1.5"],
};

impl Scale {
    fn level(&self, value: f64) -> usize {
        self.limits.iter().position(|limit| value < *limit).unwrap_or(self.limits.len())
    }

    /// The colours with their limits between them, and what they measure.
    pub fn legend(&self, what: &str) -> String {
        let mut colours = String::new();
        for level in 0..=self.limits.len() {
            let name = level.checked_sub(1).map_or("", |limit| self.names[limit]);
            write!(
                colours,
                "<span style=\"gap:0;display:block\"><i style=\"background:var(--{}{level});width:26px\"></i><u style=\"margin-left:-26px\">{name}</u></span>",
                self.colours
            )
            .expect("a text takes everything");
        }
        format!(
            "<div class=\"legend\"><span class=\"ramp\" style=\"gap:0\">{colours}</span><span>{what}</span></div>"
        )
    }
}

/// An SVG of `rows` x `columns` cells that fills its box. `titles` are shown when a row is pointed at; empty for none.
pub fn grid(rows: &[Vec<f64>], scale: &Scale, label: &str, titles: &[String]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let (row_step, column_step) = (rows.len().div_ceil(MAX_SIDE).max(1), columns.div_ceil(MAX_SIDE).max(1));
    let (height, width) = (rows.len().div_ceil(row_step), columns.div_ceil(column_step));
    let mut paths = vec![String::new(); scale.limits.len() + 1];
    for (y, rows) in rows.chunks(row_step).enumerate() {
        // Where the pen of each level is in this row; a level's first cell lifts it there.
        let mut ends = vec![None; paths.len()];
        for x in 0..width {
            let cells = rows.iter().flat_map(|row| &row[x * column_step..columns.min((x + 1) * column_step)]);
            // Cells taken together show their largest value: what is hot stays visible.
            let level = scale.level(cells.copied().fold(f64::NEG_INFINITY, f64::max));
            let path = &mut paths[level];
            let pen = match ends[level] {
                None => write!(path, "M{x} {y}.5h1"),
                Some(end) if end == x => write!(path, "h1"),
                Some(end) => write!(path, "m{} 0h1", x - end),
            };
            pen.expect("a text takes everything");
            ends[level] = Some(x + 1);
        }
    }
    let mut drawn = String::new();
    for (level, path) in paths.iter().enumerate().filter(|(_, path)| !path.is_empty()) {
        write!(drawn, "<path stroke=\"var(--{}{level})\" d=\"{}\"/>", scale.colours, joined(path))
            .expect("a text takes everything");
    }
    let mut hits = String::new();
    if titles.len() == rows.len() && row_step == 1 {
        for (y, title) in titles.iter().enumerate() {
            write!(
                hits,
                "<rect class=\"hit\" y=\"{y}\" width=\"{width}\" height=\"1\"><title>{title}</title></rect>"
            )
            .expect("a text takes everything");
        }
    }
    format!(
        "<svg class=\"cells\" viewBox=\"0 0 {width} {height}\" preserveAspectRatio=\"none\" role=\"img\" aria-label=\"{label}\">{drawn}{hits}</svg>"
    )
}

/// Neighbouring cells of one level become one stroke.
fn joined(path: &str) -> String {
    let mut short = String::with_capacity(path.len());
    let mut run = 0;
    let flush = |short: &mut String, run: usize| {
        if run > 0 {
            write!(short, "h{run}").expect("a text takes everything");
        }
    };
    let mut rest = path;
    while let Some(next) = rest.chars().next() {
        if let Some(after) = rest.strip_prefix("h1") {
            run += 1;
            rest = after;
        } else {
            flush(&mut short, run);
            run = 0;
            let until = rest[1..].find('h').map_or(rest.len(), |at| at + 1);
            short.push(next);
            short.push_str(&rest[1..until]);
            rest = &rest[until..];
        }
    }
    flush(&mut short, run);
    short
}

/// Labels of rows beside a grid: at most about `most` of them, at their places.
pub fn row_labels(ids: &[usize], most: usize) -> String {
    let step = nice_step(ids.len(), most);
    let mut labels = String::from("<div class=\"ids\">");
    for (row, id) in ids.iter().enumerate().step_by(step) {
        let top = (row as f64 + 0.5) / ids.len() as f64 * 100.0;
        write!(labels, "<span style=\"top:{top:.2}%\">{id}</span>").expect("a text takes everything");
    }
    labels + "</div>"
}

/// Labels under a grid of `columns` columns.
pub fn column_labels(columns: usize, most: usize, name: &str) -> String {
    let step = nice_step(columns, most);
    let mut labels = String::from("<span></span><div class=\"under\">");
    for column in (0..columns).step_by(step) {
        let left = (column as f64 + 0.5) / columns as f64 * 100.0;
        let prefix = if column == 0 { format!("{name} ") } else { String::new() };
        let edge = match left {
            _ if column == 0 => " class=\"first\"",
            left if left > 97.0 => " class=\"last\"",
            _ => "",
        };
        write!(labels, "<span{edge} style=\"left:{left:.2}%\">{prefix}{column}</span>")
            .expect("a text takes everything");
    }
    labels + "</div>"
}

/// 1, 2, 5, 10, 20 ... or a power of two where that divides better.
fn nice_step(n: usize, most: usize) -> usize {
    let least = n.div_ceil(most.max(1)).max(1);
    if n.is_power_of_two() || n.is_multiple_of(64) {
        return least.next_power_of_two();
    }
    let mut step = 1;
    loop {
        for factor in [1, 2, 5] {
            if step * factor >= least {
                return step * factor;
            }
        }
        step *= 10;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_of_a_level_share_a_path() {
        let svg = grid(&[vec![0.1, 0.1, 3.0, 0.1], vec![3.0, 3.0, 3.0, 0.1]], &TIMES_MEAN, "x", &[]);
        assert!(svg.contains("stroke=\"var(--h0)\" d=\"M0 0.5h2m1 0h1M3 1.5h1\""), "{svg}");
        assert!(svg.contains("stroke=\"var(--h5)\" d=\"M2 0.5h1M0 1.5h3\""), "{svg}");
    }

    #[test]
    fn large_matrices_stay_small() {
        let rows: Vec<Vec<f64>> = (0..61)
            .map(|row| {
                (0..384).map(|column| f64::from((row * 7919 + column * 104_729) % 97) / 30.0).collect()
            })
            .collect();
        let bytes = grid(&rows, &TIMES_MEAN, "x", &[]).len();
        assert!(bytes < 250_000, "{bytes} bytes");
        let huge = vec![vec![1.0; 5000]; 2000];
        assert!(grid(&huge, &TIMES_MEAN, "x", &[]).len() < 20_000);
    }

    #[test]
    fn steps_between_labels() {
        for (n, most, step) in
            [(58, 12, 5), (256, 8, 32), (8, 12, 1), (384, 8, 64), (61, 12, 10), (1, 1, 1), (24, 12, 2)]
        {
            assert_eq!(nice_step(n, most), step, "{n} in {most}");
        }
    }
}
