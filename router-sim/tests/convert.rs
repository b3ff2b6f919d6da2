//! `convert` and `synth` as a user meets them.

mod samples;

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use router_sim::formats::{self, Options};

fn router_sim(folder: &Path, arguments: &[&str]) -> Output {
    let binary = env!("CARGO_BIN_EXE_router-sim");
    Command::new(binary).current_dir(folder).args(arguments).output().unwrap()
}

/// Standard output of a command that must succeed.
fn told(folder: &Path, arguments: &[&str]) -> String {
    let output = router_sim(folder, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Standard error of a command that must fail with this code.
fn refused(folder: &Path, code: i32, arguments: &[&str]) -> String {
    let output = router_sim(folder, arguments);
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {message}");
    message
}

fn files(folder: &Path) -> Vec<String> {
    let names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

#[test]
fn loads_go_round_through_every_format() {
    let folder = tempfile::tempdir().unwrap();
    samples::write_all(folder.path());
    let total = |name: &str| {
        let (load, _) = formats::read_total(&folder.path().join(name), &Options::default()).unwrap();
        (0..load.layers()).map(|layer| load.totals(layer).collect()).collect::<Vec<Vec<u64>>>()
    };
    let mut last = "sample.moetrace".to_owned();
    for next in ["t.moeroute", "a.npy", "b.json", "c.csv", "d.safetensors", "e.npy"] {
        told(folder.path(), &["convert", &last, next]);
        assert_eq!(total(next), total("sample.moetrace"), "{last} to {next}");
        last = next.to_owned();
    }
    assert_eq!(
        fs::read(folder.path().join("a.npy")).unwrap(),
        fs::read(folder.path().join("e.npy")).unwrap()
    );
}

#[test]
fn tokens_go_round_and_losses_are_said() {
    let folder = tempfile::tempdir().unwrap();
    samples::write_all(folder.path());
    let line = told(folder.path(), &["convert", "sample.moetrace", "a.jsonl"]);
    assert_eq!(line, "a.jsonl: 7 tokens; not in this format: which tokens ran in one step\n");
    let line = told(folder.path(), &["convert", "a.jsonl", "b.moeroute"]);
    assert_eq!(line, "b.moeroute: 7 tokens; not in this format: labels\n");
    told(folder.path(), &["convert", "b.moeroute", "c.npy", "--output-format", "routed-npy"]);
    assert_eq!(
        fs::read(folder.path().join("c.npy")).unwrap(),
        fs::read(folder.path().join("routed.npy")).unwrap()
    );
    let line = told(
        folder.path(),
        &["convert", "tokens.jsonl#code", "d.csv", "--window", "2", "--batch-tokens", "1"],
    );
    assert!(line.starts_with("d.csv: 2 windows; not in this format: the experts of each token"), "{line}");
}

#[test]
fn placements_are_translated() {
    let folder = tempfile::tempdir().unwrap();
    let original = "{\"version\": 1, \"ranks\": 2, \"slots_per_rank\": 2, \"layer_ids\": [1, 2],\n \"physical_to_logical_map\": [\n  [0, 1, 2, 0],\n  [2, 1, 0, 2]]}\n";
    fs::write(folder.path().join("p.json"), original).unwrap();
    told(folder.path(), &["convert", "p.json", "p.yaml"]);
    let yaml = fs::read_to_string(folder.path().join("p.yaml")).unwrap();
    assert_eq!(
        yaml,
        "num_slots: 4\ninitial_global_assignments:\n  1: [0, 1, 2, 0]\n  2: [2, 1, 0, 2]\nlayer_updates_per_iter: 0\n"
    );
    told(folder.path(), &["convert", "p.yaml", "q.json", "--ranks", "2"]);
    assert_eq!(fs::read_to_string(folder.path().join("q.json")).unwrap(), original);
    told(folder.path(), &["convert", "p.json", "p.npy"]);
    told(folder.path(), &["convert", "p.npy", "r.json", "--ranks", "2", "--first-layer", "1"]);
    assert_eq!(fs::read_to_string(folder.path().join("r.json")).unwrap(), original);
    let message = refused(folder.path(), 2, &["convert", "p.yaml", "s.json"]);
    assert!(message.contains("give --ranks"), "{message}");
}

#[test]
fn failures_say_why_and_leave_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    samples::write_all(folder.path());
    let before = files(folder.path());
    let cut = fs::read(folder.path().join("sample.moeroute")).unwrap();
    fs::write(folder.path().join("sample.moeroute"), &cut[..cut.len() - 30]).unwrap();
    for (code, arguments, expected) in [
        (2, &["convert", "sample.moeroute", "out.csv"][..], "sample.moeroute: record "),
        (
            2,
            &["convert", "load.csv", "out.moeroute"],
            "the input holds loads only, which cannot be written as trace",
        ),
        (2, &["convert", "load.csv", "out.txt"], "extension \"txt\" says no format"),
        (2, &["convert", "load.csv", "out.npy", "--experts", "9"], "10 experts, expected 9"),
        (
            2,
            &["convert", "route.jsonl", "out.npy", "--input-format", "load-csv"],
            "route.jsonl: the header has no column",
        ),
        (2, &["convert", "load.csv", "out.npy", "--input-format", "nonsense"], "invalid value 'nonsense'"),
        (
            2,
            &["convert", "load.npy", "out.csv", "--first-layer", "18446744073709551615"],
            "first layer 18446744073709551615 exceeds",
        ),
        (2, &["convert", "load.npy", "out.csv", "--scale", "0"], "scale 0 is not above 0"),
        (2, &["synth", "out.npy", "--experts", "4"], "top-k 8 is not within 1..=4 experts"),
        (
            2,
            &["synth", "out.npy", "--popularity", "flat"],
            "expected uniform, lognormal:SIGMA or zipf:EXPONENT",
        ),
        (1, &["convert", "absent.npy", "out.npy"], "absent.npy: No such file"),
        (1, &["convert", "load.csv", "no/such/folder/out.npy"], "no/such/folder/out.npy.tmp: No such file"),
    ] {
        let message = refused(folder.path(), code, arguments);
        assert!(message.contains(expected), "{message:?} should contain {expected:?}");
    }
    assert_eq!(files(folder.path()), before);
    // What was finished before the cut is there.
    let output = router_sim(folder.path(), &["convert", "sample.moeroute", "out.csv", "--lenient"]);
    assert!(output.status.success());
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(message.contains("sample.moeroute: 1 unusable records left out"), "{message}");
}

#[test]
fn synthetic_traffic_is_the_same_for_a_seed() {
    let folder = tempfile::tempdir().unwrap();
    let synth = |name: &str, seed: &str| {
        let shape = [
            "--layers",
            "4",
            "--experts",
            "16",
            "--top-k",
            "2",
            "--steps",
            "3",
            "--topics",
            "2",
            "--drift",
            "0.5",
        ];
        told(folder.path(), &[&["synth", name, "--seed", seed][..], &shape].concat())
    };
    assert_eq!(synth("a.moeroute", "1"), "a.moeroute: 1536 tokens; not in this format: labels\n");
    synth("b.moeroute", "1");
    synth("c.moeroute", "2");
    let bytes = |name: &str| fs::read(folder.path().join(name)).unwrap();
    assert_eq!(bytes("a.moeroute"), bytes("b.moeroute"));
    assert_ne!(bytes("a.moeroute"), bytes("c.moeroute"));
}
