//! `moeyard verify`: every fixture within its tolerances, and the same bytes however the work is divided.

use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::dump;
use crate::process::{Outcome, moeyard};
use crate::support::fixtures::FIXTURES;
use crate::support::{Golden, model_dir};

/// Runs the golden file of a fixture in f32; the dump.
fn verify(folder: &Path, fixture: &str, flags: &str) -> Golden {
    let prompts = model_dir(fixture).join("golden.json");
    let out = folder.join("dump.json");
    run(fixture, &prompts, &out, &format!("--dtype f32 {flags}")).ok();
    Golden::read(&out)
}

fn run(fixture: &str, prompts: &Path, out: &Path, flags: &str) -> Outcome {
    let paths = [&model_dir(fixture), prompts, out].map(|path| path.to_str().unwrap().to_owned());
    let [model, prompts, out] = paths.each_ref().map(String::as_str);
    let arguments = ["verify", model, "--prompts", prompts, "--out", out];
    moeyard(arguments.into_iter().chain(flags.split_whitespace()))
}

#[test]
fn every_fixture_is_within_its_tolerances() {
    let folder = TempDir::new().unwrap();
    for fixture in FIXTURES {
        let dump = verify(folder.path(), fixture, "");
        dump::check(fixture, &Golden::open(&model_dir(fixture)), &dump);
        assert!(dump.json["engine"].as_str().unwrap().contains("f32"), "{}", dump.json["engine"]);
    }
}

#[test]
fn parallel_runs_are_within_tolerances_and_of_equal_bits_where_promised() {
    let folder = TempDir::new().unwrap();
    for fixture in ["mixtral", "deepseek_v3", "qwen2_moe"] {
        let golden = Golden::open(&model_dir(fixture));
        let run = |flags: &str| {
            let dump = verify(folder.path(), fixture, flags);
            dump::check(&format!("{fixture} {flags}"), &golden, &dump);
            dump
        };
        let same = |one: &Golden, other: &Golden, flags: &str| {
            assert!(one.tensor_bytes() == other.tensor_bytes(), "{fixture} {flags}: other bits");
            assert_eq!(one.json["prompts"], other.json["prompts"], "{fixture} {flags}");
        };
        let solo = run("");
        for flags in [
            "--expert-parallel-size 3",
            "--expert-parallel-size 4 --redundant-experts 4",
            "--prefill-chunk-size 5 --block-size 16 --no-prefix-caching --threads 2",
            "--max-num-seqs 1",
        ] {
            same(&solo, &run(flags), flags);
        }
        // Sums over TP ranks are other sums; at equal TP the bits are equal again.
        let tensor = run("--tensor-parallel-size 2");
        let both = "--tensor-parallel-size 2 --data-parallel-size 2";
        same(&tensor, &run(both), both);
    }
}

#[test]
fn keys_present_are_the_request() {
    let folder = TempDir::new().unwrap();
    let (prompts, out) = (folder.path().join("ask.json"), folder.path().join("dump.json"));
    let ask = json!({
        "schema": "moe-fixture-dump/1",
        "fixture": "anything",
        "prompts": [
            {"id": "plain", "input_ids": [1, 2, 3]},
            {"id": "all", "input_ids": [1, 2, 3, 4], "all_logits": null},
            {"id": "short", "text": "Hello", "greedy": {"tokens": [0, 0, 0]}},
            {"id": 7, "input_ids": [5], "greedy": {}, "last_logits": true, "router": 1},
        ],
    });
    std::fs::write(&prompts, ask.to_string()).unwrap();
    run("mixtral", &prompts, &out, "").ok();
    let dump = Golden::read(&out);
    assert_eq!(
        (&dump.json["fixture"], &dump.json["tensors_file"]),
        (&json!("anything"), &json!("dump.safetensors"))
    );
    let found = dump.json["prompts"].as_array().unwrap();
    let keys = |i: usize| -> Vec<&str> { found[i].as_object().unwrap().keys().map(String::as_str).collect() };
    assert_eq!(keys(0), ["id", "input_ids"]);
    assert_eq!(keys(1), ["id", "input_ids", "all_logits"]);
    assert_eq!(dump.tensor(&found[1]["all_logits"]).len(), 4 * 512);
    assert_eq!(keys(2), ["id", "input_ids", "greedy"]);
    assert_eq!(found[2]["greedy"]["tokens"].as_array().map(Vec::len), Some(3));
    assert_eq!(keys(3), ["id", "input_ids", "last_logits", "router", "greedy"]);
    assert_eq!(found[3]["greedy"]["tokens"].as_array().map(Vec::len), Some(24));
    assert!(!folder.path().join("dump.json.partial").exists());
}

#[test]
fn a_bad_request_file_is_refused_by_name() {
    let folder = TempDir::new().unwrap();
    let prompts = folder.path().join("ask.json");
    let out = folder.path().join("dump.json");
    let refused = |ask: &str, parts: &[&str]| {
        std::fs::write(&prompts, ask).unwrap();
        run("mixtral", &prompts, &out, "").refused(&[&["ask.json"], parts].concat());
        assert!(!out.exists());
    };
    refused("{", &["EOF"]);
    refused(r#"{"schema": "other/1"}"#, &["expected moe-fixture-dump/1, found other/1"]);
    let with = |prompt: Value| json!({"schema": "moe-fixture-dump/1", "prompts": [prompt]}).to_string();
    refused(&with(json!(3)), &["prompts[0]: expected an object"]);
    refused(&with(json!({"id": "x"})), &["prompt \"x\": expected input_ids or text"]);
    refused(&with(json!({"id": "x", "input_ids": [-1]})), &["prompt \"x\": input_ids"]);
    run("mixtral", &folder.path().join("absent.json"), &out, "").refused(&["absent.json", "No such file"]);
    // Ids that the model does not have are refused by the engine, after loading.
    std::fs::write(&prompts, with(json!({"id": "x", "input_ids": [512]}))).unwrap();
    run("mixtral", &prompts, &out, "").refused(&["token 0 of the prompt is 512, but ids are below 512"]);
    assert!(!out.exists());
}
