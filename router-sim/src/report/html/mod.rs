//! One HTML file that shows a report: inline SVG, one style sheet inside, no script, nothing from elsewhere. It follows
//! the reader's light or dark setting and the width of the screen; texts are HTML, so they keep their size while
//! the drawings stretch.

mod cells;
mod plot;
mod overview;
mod losses;
mod experts;
mod ranks;
mod timeline;
mod traffic;
mod pareto;
mod layers;

use super::data::Report;

const STYLE: &str = include_str!("style.css");

/// The page. Sections that the report has no data for are left out.
///
/// # Panics
/// When the report's parts disagree in shape; [`Report::read`] refuses such a file.
pub fn page(report: &Report) -> String {
    let title = match report.subject.model.as_str() {
        "" => "Expert balance".to_owned(),
        model => format!("Expert balance of {}", escape(model)),
    };
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\
         <title>{title}</title><style>{STYLE}</style></head>\n<body><main>\n"
    );
    page += &overview::header(report, &title);
    page += &overview::tiles(report);
    for section in [
        overview::advice(report),
        overview::runs(report),
        losses::section(report),
        experts::section(report),
        ranks::section(report),
        timeline::section(report),
    ] {
        page += &section;
    }
    let pair = [traffic::section(report), pareto::section(report)];
    match pair.iter().all(|section| !section.is_empty()) {
        true => page += &format!("<div class=\"two\">\n{}</div>\n", pair.concat()),
        false => page += &pair.concat(),
    }
    page += &layers::section(report);
    page += &overview::footer(report);
    page + "</main></body></html>\n"
}

/// A card with a heading and a sentence that says how to read it.
fn section(heading: &str, lead: &str, content: &str) -> String {
    format!("<section><h2>{heading}</h2><p class=\"lead\">{lead}</p>\n{content}</section>\n")
}

/// A text as HTML.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped += "&amp;",
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            '"' => escaped += "&quot;",
            '\'' => escaped += "&#39;",
            c => escaped.push(c),
        }
    }
    escaped
}

/// Colours of lines, by their place in a chart: what is compared with comes first.
fn colour(index: usize) -> &'static str {
    ["var(--a)", "var(--b)", "var(--c)", "var(--d)", "var(--e)", "var(--f)"][index % 6]
}

/// A line's name beside its colour.
fn line_key(index: usize, name: &str) -> String {
    format!("<span><i class=\"line\" style=\"border-color:{}\"></i>{}</span>", colour(index), escape(name))
}

/// The run that everything is compared with, and the one that is recommended: indices and runs.
fn compared(report: &Report) -> Vec<(usize, &super::data::Run)> {
    let choice = report.choice().map(|run| run.name.as_str());
    let named = report.runs.iter().enumerate();
    named.filter(|(index, run)| *index == 0 || Some(run.name.as_str()) == choice).collect()
}
