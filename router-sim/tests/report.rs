//! Reports: one page without anything from elsewhere, tables for spreadsheets, and files that are refused.

use std::fs;
use std::process::{Command, Output};

use router_sim::report::data::{Advice, Loss, ParetoPoint, Rebalance, Report, Run, TimePoint};
use router_sim::report::html;

/// As large as they come: 61 layers of 384 experts, 64 ranks, 400 points in time.
fn large() -> Report {
    let mut report = Report { version: 1, ..Report::default() };
    report.subject.model = "<b>big</b> & \"quoted\"".into();
    report.subject.layer_ids = (3..64).collect();
    (report.subject.experts, report.subject.ranks) = (384, 64);
    let scattered =
        |n: usize, row: usize| (0..n).map(|i| ((i * 7919 + row * 104_729) % 997) as u64).collect();
    report.expert_tokens = (0..61).map(|layer| scattered(384, layer)).collect();
    for name in ["before", "<i>after"] {
        let mut run = Run { name: name.into(), ..Run::default() };
        run.totals.step_us = 1e4;
        run.totals.expert_us = 6e3;
        run.rank_tokens = (0..61).map(|layer| scattered(64, layer)).collect();
        run.traffic.between = "rank".into();
        run.traffic.bytes =
            (0..64).map(|row| scattered(64, row).into_iter().map(|n| n as f64).collect()).collect();
        run.timeline = (0..400)
            .map(|step| TimePoint { step, steps: 1, actual: 0.9, best_split: 0.95, ..TimePoint::default() })
            .collect();
        run.rebalances = vec![Rebalance { step: 200, ..Rebalance::default() }];
        run.losses = vec![Loss { cause: "split".into(), share: 0.25, us: 2500.0, ..Loss::default() }];
        report.runs.push(run);
    }
    let point = |bytes, balancedness| ParetoPoint {
        label: "p".into(),
        bytes,
        balancedness,
        best: true,
        ..ParetoPoint::default()
    };
    report.pareto = vec![point(0.0, 0.8), point(1e9, 0.99)];
    report.advice = Some(Advice { choice: "<i>after".into(), ..Advice::default() });
    report
}

#[test]
fn a_page_is_small_escaped_and_alone() {
    let page = html::page(&large());
    assert!(page.len() < 600_000, "{} bytes", page.len());
    for foreign in
        ["<script", "http:", "https:", "url(", "@import", "<link", "<img", "<b>big", "<i>after", "NaN", "inf"]
    {
        assert!(!page.contains(foreign), "the page contains {foreign}");
    }
    assert!(page.contains("&lt;b&gt;big&lt;/b&gt; &amp; &quot;quoted&quot;"));
    for heading in [
        "Advice",
        "Alternatives",
        "Where step time is lost",
        "Which experts are hot",
        "How even the ranks are",
        "Balance over time",
        "Traffic between ranks",
        "What moving weights buys",
    ] {
        assert!(page.contains(&format!("<h2>{heading}</h2>")), "no section {heading}");
    }
    assert!(page.contains("rebalancing while serving"));
    // What is opened is closed.
    for tag in ["svg", "div", "section", "table", "span", "details"] {
        let count = |what: &str| page.matches(what).count();
        let opened = count(&format!("<{tag}>")) + count(&format!("<{tag} "));
        assert_eq!(opened, count(&format!("</{tag}>")), "{tag}");
    }
}

#[test]
fn a_page_of_little_has_no_empty_sections() {
    let mut report =
        Report { version: 1, runs: vec![Run { name: "only".into(), ..Run::default() }], ..Report::default() };
    let bare = html::page(&report);
    assert!(
        bare.contains("Alternatives") && !bare.contains("Traffic") && !bare.contains("Balance over time")
    );
    // No load at all is perfect balance, not a division by zero.
    report.subject.layer_ids = vec![0];
    report.expert_tokens = vec![vec![0, 0]];
    report.runs[0].rank_tokens = vec![vec![0, 0]];
    report.runs[0].traffic.bytes = vec![vec![0.0; 2]; 2];
    let idle = html::page(&report);
    assert!(idle.contains("Which experts are hot") && !idle.contains("NaN") && !idle.contains("inf"));
}

fn report(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_router-sim")).arg("report").args(arguments).output().unwrap()
}

#[test]
fn the_command_writes_what_it_is_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let found = path("found.json");
    large().write(found.as_ref()).unwrap();
    assert_eq!(Report::read(found.as_ref()).unwrap(), large());

    let shown = report(&[&found]);
    let text = String::from_utf8(shown.stdout).unwrap();
    assert!(shown.status.success() && text.contains("before") && text.contains("advice: <i>after"), "{text}");

    let (page, runs, layers) = (path("report.html"), path("runs.csv"), path("layers.csv"));
    let written = report(&[&found, "--html", &page, "--csv", &runs, "--layers-csv", &layers]);
    assert!(written.status.success(), "{}", String::from_utf8_lossy(&written.stderr));
    assert_eq!(fs::read_to_string(page).unwrap(), html::page(&large()));
    let rows = fs::read_to_string(runs).unwrap();
    assert_eq!(rows.lines().count(), 3);
    let columns: Vec<usize> = rows.lines().map(|line| line.split(',').count()).collect();
    assert_eq!(columns, [columns[0]; 3]);
}

#[test]
fn what_is_no_report_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("found.json");
    let good = serde_json::to_value(large()).unwrap();
    let with = |pointer: &str, value: serde_json::Value| {
        let mut report = good.clone();
        *report.pointer_mut(pointer).unwrap() = value;
        report.to_string()
    };
    for (text, expected) in [
        ("{".to_owned(), "no report"),
        (with("/version", 2.into()), "report version 2 is unknown"),
        (with("/runs", serde_json::json!([])), "without runs"),
        (with("/expert_tokens", serde_json::json!([[1]])), "expert_tokens: 1 layers, expected 61"),
        (with("/expert_tokens/7", serde_json::json!([1])), "a layer of 1 among layers of 384"),
        (with("/runs/1/rank_tokens/3", serde_json::json!([])), "run \"<i>after\": rank_tokens"),
        (
            with("/runs/0/traffic/bytes/3", serde_json::json!([1.0])),
            "traffic of 64 sources to 1 destinations",
        ),
    ] {
        fs::write(&path, text).unwrap();
        let refused = report(&[path.to_str().unwrap()]);
        let message = String::from_utf8(refused.stderr).unwrap();
        assert_eq!(refused.status.code(), Some(2), "{message}");
        assert!(message.contains(expected), "{message:?} should contain {expected:?}");
    }
}
