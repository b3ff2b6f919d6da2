//! `moeyard bench` and `moeyard bench serve`, and what their reports hold.

use serde_json::Value;
use tempfile::TempDir;

use crate::process::{Served, moeyard, moeyard_in};
use crate::support::fixtures::model_dir;

const SMALL: [&str; 4] = ["--threads", "1", "--kv-cache-memory", "16MiB"];

#[test]
fn the_engine_is_measured_by_prompt_length_and_batch() {
    let folder = TempDir::new().unwrap();
    let flags =
        "bench --prompt-len 16,40 --batch 1,3 --steps 4 --repeat 2 --context-len 8 --json figures.json";
    let table = moeyard_in(folder.path(), flags.split(' ').chain(SMALL)).ok();
    for part in ["prefill", "16 tokens", "40 tokens", "decode, per step", "batch 1", "batch 3", "tokens/s"] {
        assert!(table.contains(part), "no {part:?} in\n{table}");
    }
    let figures: Value =
        serde_json::from_slice(&std::fs::read(folder.path().join("figures.json")).unwrap()).unwrap();
    assert_eq!((&figures["model"], &figures["dtype"]), (&"demo-mixtral".into(), &"bf16".into()));
    for (part, key, sizes) in [("prefill", "prompt_tokens", [16, 40]), ("decode", "batch", [1, 3])] {
        let rows = figures[part].as_array().unwrap();
        assert_eq!(rows.iter().map(|row| row[key].as_u64().unwrap()).collect::<Vec<_>>(), sizes);
        for row in rows {
            let rate = row["tokens_per_second"].as_f64().unwrap();
            let median = row["p50_ms"].as_f64().unwrap();
            let tokens = row[key].as_f64().unwrap();
            assert!(rate > 0.0 && (rate * median / 1e3 / tokens - 1.0).abs() < 0.05, "{row}");
        }
    }
    moeyard("bench --batch 0".split(' ')).refused(&["--batch: expected 1 or more, found 0"]);
    moeyard("bench --prompt-len 2000".split(' ').chain(SMALL)).refused(&["maximum context length"]);
}

/// Attention of both kinds, shared experts, fused expert tensors, biases.
#[test]
fn a_model_is_measured_without_its_weights() {
    for name in ["mixtral", "deepseek_v3_fp8", "qwen2_moe", "gpt_oss"] {
        let folder = TempDir::new().unwrap();
        let mut config: Value =
            serde_json::from_slice(&std::fs::read(model_dir(name).join("config.json")).unwrap()).unwrap();
        config["vocab_size"] = 4096.into(); // that of the embedded tokenizer
        std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        let given = ["bench", folder.path().to_str().unwrap(), "--load-format", "dummy"];
        let work = "--prompt-len 9 --batch 2 --steps 2 --repeat 1 --context-len 4 --expert-parallel-size 2";
        let outcome = moeyard(given.into_iter().chain(work.split(' ')).chain(SMALL));
        assert!(outcome.stderr.contains("the weights are made up"), "{}", outcome.stderr);
        assert!(outcome.ok().contains("batch 2"), "{name}");
    }
    moeyard(["bench", "--load-format", "dummy"]).refused(&["--load-format: dummy needs a folder"]);
}

#[test]
fn a_server_is_measured_under_load() {
    let folder = TempDir::new().unwrap();
    let server = Served::start(folder.path(), SMALL.into_iter().chain(["--api-key", "sesame"]));
    let url = format!("http://{}", server.address);
    let run = |more: &str| {
        let always = ["bench", "serve", url.as_str(), "--api-key", "sesame", "--num-requests", "6"];
        let lengths = "--input-len 12 --output-len 5".split(' ');
        let more = more.split_whitespace();
        moeyard_in(folder.path(), always.into_iter().chain(lengths).chain(more).collect::<Vec<_>>())
    };
    let result = || -> Value {
        serde_json::from_slice(&std::fs::read(folder.path().join("result.json")).unwrap()).unwrap()
    };

    let text =
        run("--json result.json --input-spread 0.5 --max-concurrency 2 --goodput ttft:60000,e2e:60000 --percentiles 50,99").ok();
    for part in ["6 answered, 0 failed", "requests per second", "TTFT", "TPOT", "ITL", "E2E", "p50", "p99"] {
        assert!(text.contains(part), "no {part:?} in\n{text}");
    }
    let figures = result();
    assert_eq!((&figures["answered"], &figures["failed"]), (&6.into(), &0.into()));
    assert_eq!(figures["model"], "demo-mixtral");
    assert_eq!(figures["output_tokens"], 30, "the server's own count");
    assert_eq!(figures["good_requests_per_second"], figures["requests_per_second"]);
    let (ttft, e2e) = (&figures["ttft"]["p50_ms"], &figures["e2e"]["p50_ms"]);
    assert!(ttft.as_f64().unwrap() > 0.0 && ttft.as_f64() <= e2e.as_f64(), "{figures}");

    // Token ids have exact lengths; arrivals at a rate take their time.
    run("--json result.json --token-ids 4000 --request-rate 1000 --goodput e2e:0.001").ok();
    let figures = result();
    assert_eq!((&figures["prompt_tokens"], &figures["output_tokens"]), (&72.into(), &30.into()));
    assert_eq!(figures["good_requests_per_second"], 0.0);

    // For a program that reads standard output.
    let figures: Value = serde_json::from_str(&run("--json -").ok()).expect("nothing but JSON");
    assert_eq!(figures["answered"], 6);

    let wrong = moeyard(["bench", "serve", &url, "--model", "demo-mixtral", "--api-key", "wrong"]);
    assert_eq!(wrong.code, Some(1), "{}", wrong.stderr);
    assert!(wrong.stderr.starts_with("error: 401 Unauthorized: "), "{}", wrong.stderr);
}

#[test]
fn what_cannot_be_measured_is_refused_by_name() {
    let refused = |arguments: &str, parts: &[&str]| {
        moeyard(["bench", "serve"].into_iter().chain(arguments.split(' '))).refused(parts);
    };
    refused("https://host", &["URL: https is not supported"]);
    refused("http://127.0.0.1:1 --num-requests 0", &["--num-requests: expected 1 to"]);
    refused("http://127.0.0.1:1 --request-rate=-1", &["--request-rate", "-1"]);
    refused("http://127.0.0.1:1 --percentiles 101", &["--percentiles: expected 0 to 100, found 101"]);
    refused("http://127.0.0.1:1 --endpoint chat --token-ids 5", &["--token-ids", "chat takes text only"]);
    refused("http://127.0.0.1:1", &["127.0.0.1:1", "refused"]);
    refused("http://127.0.0.1:1 --goodput itl:3", &["expected ttft:MS, tpot:MS or e2e:MS"]);
}
