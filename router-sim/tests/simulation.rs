//! The simulation commands as a user runs them: replay, compare with a file of finished runs, advise, and refusals.

use std::path::Path;
use std::process::{Command, Output};

fn router_sim(folder: &Path, line: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_router-sim"));
    command.current_dir(folder).args(line.split_whitespace()).output().unwrap()
}

fn succeeds(folder: &Path, line: &str) -> String {
    let output = router_sim(folder, line);
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// A folder with a trace of 24 layers x 32 experts, top-4: the shape of gpt-oss-20b.
fn with_trace() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let shape = "--layers 24 --experts 32 --top-k 4 --ranks 4 --tokens-per-rank 8 --steps 6";
    succeeds(folder.path(), &format!("synth run.moeroute {shape}"));
    folder
}

#[test]
fn replay_says_what_a_run_comes_to() {
    let folder = with_trace();
    let line = "replay run.moeroute --ranks 4 --redundant 4 --policy eplb --split exact --json run.json --layer-steps l.csv";
    let text = succeeds(folder.path(), line);
    assert!(text.contains("36 slots per layer, 6 steps, 192 tokens"), "{text}");
    assert!(text.contains("lost to imbalance") && text.contains("sampling noise"), "{text}");
    let json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder.path().join("run.json")).unwrap()).unwrap();
    assert_eq!(json["subject"]["model"], "gpt-oss-20b");
    let rows: u64 = json["runs"][0]["rank_tokens"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|layer| layer.as_array().unwrap())
        .map(|n| n.as_u64().unwrap())
        .sum();
    assert_eq!(rows, 192 * 24 * 4);
    let lines = std::fs::read_to_string(folder.path().join("l.csv")).unwrap();
    assert_eq!(lines.lines().count(), 1 + 6 * 24);
    assert_eq!(succeeds(folder.path(), &format!("{line} --threads 3")), text, "threads change nothing");
}

#[test]
fn a_sweep_goes_on_where_it_stopped() {
    let folder = with_trace();
    let line = "compare run.moeroute --ranks 4 --redundant 0,4 --policy linear,eplb --split even,exact --out s.jsonl";
    let table = succeeds(folder.path(), line);
    assert_eq!(table.lines().count(), 1 + 8, "{table}");
    let file = folder.path().join("s.jsonl");
    let whole = std::fs::read_to_string(&file).unwrap();
    assert_eq!(whole.lines().count(), 1 + 8);
    // A kill that cut the last of the lines: it is run again, the others are kept as they are.
    std::fs::write(&file, &whole[..whole.len() - 40]).unwrap();
    assert_eq!(succeeds(folder.path(), line), table);
    let again = std::fs::read_to_string(&file).unwrap();
    assert_eq!(again.lines().collect::<Vec<_>>()[..8], whole.lines().collect::<Vec<_>>()[..8]);
    let other = router_sim(folder.path(), &format!("{line} --steps 3"));
    assert_eq!(other.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&other.stderr).contains("holds another sweep"));
}

#[test]
fn advice_names_a_choice_and_a_verdict() {
    let folder = with_trace();
    let text = succeeds(folder.path(), "advise run.moeroute --ranks 4 --redundant 0,4 --splits even,exact");
    assert!(text.contains("advice: ") && text.contains("redundant slots: +0"), "{text}");
    assert!(text.contains("rebalancing while serving: "), "{text}");
}

#[test]
fn refusals_exit_with_2_and_name_the_thing() {
    let folder = with_trace();
    for (line, expected) in [
        ("replay run.moeroute --ranks 0", "0 ranks do not fit"),
        ("replay run.moeroute --ranks 4 --policy best", "policy \"best\" is not one of linear"),
        ("replay run.moeroute --ranks 4 --split best", "split \"best\" is not one of"),
        ("replay run.moeroute --ranks 4 --model no-such", "neither a readable config.json"),
        ("replay run.moeroute --ranks 4 --model mixtral-8x7b", "model mixtral-8x7b has 32 of 8"),
        ("replay run.moeroute --ranks 4 --cluster no-such", "neither a file nor one of"),
        (
            "replay run.moeroute --ranks 4 --set memory-efficiency=2",
            "memory-efficiency = 2 must be above 0 and at most 1",
        ),
        ("replay run.moeroute --ranks 3 --sources recorded", "owned by 4 ranks"),
        ("replay run.moeroute --ranks 4 --order shuffled", "--order is for inputs without steps"),
        ("advise run.moeroute --ranks 4 --horizon 0", "--horizon 0 must be above 0"),
    ] {
        let output = router_sim(folder.path(), line);
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{line}: {message}");
        assert!(message.contains(expected), "{line}: {message:?} should contain {expected:?}");
    }
}
