//! What cannot be served is refused with exit code 2 before anything listens, and the message says what to change.

use std::net::TcpListener;
use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::process::{Outcome, moeyard};
use crate::support::model_dir;

/// A copy of a checkpoint to be damaged.
struct Copy(TempDir);

impl Copy {
    fn of(model: &str) -> Copy {
        let folder = TempDir::new().unwrap();
        for entry in std::fs::read_dir(model_dir(model)).unwrap() {
            let path = entry.unwrap().path();
            std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
        }
        Copy(folder)
    }

    fn file(&self, name: &str) -> std::path::PathBuf {
        self.0.path().join(name)
    }

    fn edit(self, name: &str, change: impl FnOnce(&mut Vec<u8>)) -> Copy {
        let mut bytes = std::fs::read(self.file(name)).unwrap();
        change(&mut bytes);
        std::fs::write(self.file(name), bytes).unwrap();
        self
    }

    fn edit_json(self, name: &str, change: impl FnOnce(&mut Value)) -> Copy {
        self.edit(name, |bytes| {
            let mut json = serde_json::from_slice(bytes).unwrap();
            change(&mut json);
            *bytes = json.to_string().into_bytes();
        })
    }

    fn without(self, name: &str) -> Copy {
        std::fs::remove_file(self.file(name)).unwrap();
        self
    }

    fn serve(&self) -> Outcome {
        serve(self.0.path(), "")
    }
}

/// `moeyard serve` on a model that must not be served.
fn serve(model: &Path, flags: &str) -> Outcome {
    let arguments = ["serve", model.to_str().unwrap(), "--port", "0"];
    moeyard(arguments.into_iter().chain(flags.split_whitespace()))
}

const WEIGHTS: &str = "model.safetensors";

#[test]
fn cut_weights_name_file_and_sizes() {
    let whole = std::fs::read(model_dir("olmoe").join(WEIGHTS)).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    for length in [0, 7, 8, header / 2, header + 100_003, whole.len() - 1] {
        let copy = Copy::of("olmoe").edit(WEIGHTS, |bytes| bytes.truncate(length));
        let size = format!("a file of {length} bytes");
        let message = copy.serve().refused(&[WEIGHTS, "1 problem", &size]);
        // Cut within the data: the tensor it hits is named.
        assert_eq!(message.contains(": model.") || message.contains("lm_head"), length > header, "{message}");
    }
}

#[test]
fn absurd_headers_are_refused_unread() {
    let absurd = 1u64 << 63;
    let copy = Copy::of("olmoe").edit(WEIGHTS, |bytes| bytes[..8].copy_from_slice(&absurd.to_le_bytes()));
    copy.serve().refused(&[WEIGHTS, "header length", &absurd.to_string()]);
    let copy = Copy::of("olmoe").edit(WEIGHTS, |bytes| bytes[8] = 0xff);
    copy.serve().refused(&[WEIGHTS]);
}

#[test]
fn a_missing_shard_and_missing_tensors_are_all_listed() {
    let shard = "model-00002-of-00002.safetensors";
    Copy::of("mixtral").without(shard).serve().refused(&[shard, "model.safetensors.index.json"]);

    // Renamed in place: the lengths of the header stay.
    let missing = ["model.layers.0.mlp.experts.1.up_proj.weight", "model.layers.1.self_attn.q_norm.weight"];
    let mut copy = Copy::of("olmoe");
    for name in missing {
        let other = name.replace("model.", "nodel.");
        copy = copy.edit(WEIGHTS, |bytes| {
            let at = bytes.windows(name.len()).position(|window| window == name.as_bytes()).expect(name);
            bytes[at..at + name.len()].copy_from_slice(other.as_bytes());
        });
    }
    copy.serve().refused(&["2 problems", missing[0], missing[1]]);
}

#[test]
fn an_inconsistent_config_names_key_limit_and_value() {
    let config = |model, change: fn(&mut Value)| Copy::of(model).edit_json("config.json", change).serve();
    config("mixtral", |c| c["num_experts_per_tok"] = json!(9)).refused(&["num_experts_per_tok", "8", "9"]);
    config("mixtral", |c| c["hidden_size"] = json!("wide")).refused(&["config.json", "hidden_size"]);
    let message = config("mixtral", |c| {
        c["architectures"] = json!(["LlamaForCausalLM"]);
        c["model_type"] = json!("llama");
    })
    .refused(&["config.json", "llama"]);
    let families =
        "mixtral deepseek_v2 deepseek_v3 qwen3_moe qwen2_moe olmoe glm4_moe gpt_oss granitemoe phimoe";
    for known in families.split(' ') {
        assert!(message.contains(known), "no {known} in {message}");
    }
    Copy::of("mixtral").without("config.json").serve().refused(&["config.json"]);
    Copy::of("mixtral").edit("config.json", |bytes| bytes.truncate(20)).serve().refused(&["config.json"]);
}

/// CVE-2026-22807: code that a config names was run. Here it is a key like others.
#[test]
fn cve_2026_22807_a_config_is_data() {
    let copy = Copy::of("mixtral").edit_json("config.json", |c| {
        c["auto_map"] = json!({"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"});
        c["trust_remote_code"] = json!(true);
    });
    let ran = copy.file("ran");
    std::fs::write(copy.file("code.py"), format!("open({ran:?}, 'w')")).unwrap();
    let said = moeyard(["inspect", copy.0.path().to_str().unwrap()]);
    assert_eq!(said.code, Some(0), "{}", said.stderr);
    assert!(!ran.exists());
    let unknown = copy.edit_json("config.json", |c| {
        c["architectures"] = json!(["Model"]);
        c["model_type"] = json!("custom");
    });
    unknown.serve().refused(&["config.json", "custom"]);
    assert!(!ran.exists());
}

#[test]
fn a_tokenizer_that_cannot_work_is_refused() {
    let message = Copy::of("mixtral").without("tokenizer.json").serve().refused(&["tokenizer.json"]);
    assert!(message.contains("AutoTokenizer") && message.contains("save_pretrained"), "{message}");
    Copy::of("mixtral").edit("tokenizer.json", |b| b.truncate(100)).serve().refused(&["tokenizer.json"]);
    // One token more than the embedding has rows.
    let one_more = |json: &mut Value| {
        let token = json!({"id": 512, "content": "<one-more>", "single_word": false, "lstrip": false,
                           "rstrip": false, "normalized": false, "special": true});
        json["added_tokens"].as_array_mut().unwrap().push(token);
    };
    Copy::of("mixtral").edit_json("tokenizer.json", one_more).serve().refused(&["tokenizer.json", "512"]);
    let broken = |json: &mut Value| json["chat_template"] = json!("{% for message in messages %}no end");
    Copy::of("mixtral").edit_json("tokenizer_config.json", broken).serve().refused(&["chat_template"]);
}

#[test]
fn flags_and_keys_that_do_not_exist_are_refused_by_name() {
    let demo = model_dir("demo-mixtral");
    for flag in ["--eplb-window", "--nonsense"] {
        serve(&demo, flag).refused(&[&format!("unexpected argument '{flag}'")]);
    }
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("yard.toml");
    let flags = format!("--config {}", file.display());
    std::fs::write(&file, "expert-parallel-size = 2\neplb-window = true\n").unwrap();
    let message = serve(&demo, &flags).refused(&["yard.toml:2", "unknown field `eplb-window`"]);
    assert!(message.contains("`expert-parallel-size`"), "{message}");
    std::fs::write(&file, "prot = 80\n").unwrap();
    serve(&demo, &flags).refused(&["yard.toml:1", "unknown field `prot`", "(did you mean `port`?)"]);
    std::fs::write(&file, "[metrics]\nexpert_detail = \"expert\"\nmax_series = 100\n").unwrap();
    serve(&demo, &flags).refused(&["[metrics] expert_detail", "series, more than max_series = 100"]);
    std::fs::write(&file, "dtype = \"fp4\"\n").unwrap();
    serve(&demo, &flags).refused(&["yard.toml:1", "fp4", "bf16"]);
    std::fs::write(&file, "rebalance = \"sometimes\"\n").unwrap();
    serve(&demo, &flags).refused(&["yard.toml:1", "\"sometimes\" is not one of off, auto, every=STEPS"]);
    serve(&demo, "--rebalance auto").refused(&["rebalance: a single expert-parallel rank"]);
    serve(&demo, "--config /no/such.toml").refused(&["/no/such.toml", "No such file"]);
    serve(&demo, "--dtype fp4").refused(&["fp4", "bf16"]);
}

#[test]
fn degrees_that_do_not_divide_name_the_nearest() {
    let demo = model_dir("demo-mixtral");
    serve(&demo, "--tensor-parallel-size 3").refused(&[
        "heads (8) does not divide by TP 3",
        "--tensor-parallel-size 2",
        "--tensor-parallel-size 4",
    ]);
    serve(&demo, "--tensor-parallel-size 2 --expert-parallel-size 3").refused(&["EP 3", "nearest"]);
    serve(&demo, "--expert-parallel-size 0").refused(&["expert-parallel-size: expected 1 to 512"]);
    serve(&demo, "--pipeline-parallel-size 2").refused(&["pipeline-parallel-size", "expected 1, found 2"]);
    serve(&demo, "--device cuda").refused(&["device", "cuda: "]);
    serve(&demo, "--device cpu --comm nccl")
        .refused(&["comm: nccl exchanges rows between GPUs", "on the CPU"]);
    serve(&demo, "--comm mpi").refused(&["mpi", "auto", "local", "nccl"]);
    serve(&demo, "--comm-timeout 0").refused(&["comm-timeout: expected 1 to 86400, found 0"]);
    serve(&demo, "--block-size 24").refused(&["block-size", "multiple of 16", "24"]);
    serve(&demo, "--max-model-len 2000").refused(&["max-model-len: expected 1 to 1024, found 2000"]);
}

#[test]
fn what_does_not_fit_is_refused_with_the_sum() {
    let demo = model_dir("demo-mixtral");
    serve(&demo, "--kv-cache-memory 900TiB").refused(&[
        "not enough memory",
        "weights ",
        " + KV 900.0 TiB + working space ",
        " = 900.0 TiB > ",
        "available",
    ]);
    serve(&demo, "--kv-cache-memory 64KiB --max-model-len 1024").refused(&["kv-cache-memory", "1024 tokens"]);
}

#[test]
fn a_placement_of_another_shape_is_refused() {
    let demo = model_dir("demo-mixtral");
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("placement.json");
    let flags = |ep: usize| format!("--expert-parallel-size {ep} --placement {}", file.display());
    let write = |ranks: usize, layers: usize, experts: usize| {
        let map = vec![(0..experts).collect::<Vec<_>>(); layers];
        let json = json!({"version": 1, "ranks": ranks, "slots_per_rank": experts / ranks,
                          "layer_ids": (0..layers).collect::<Vec<_>>(), "physical_to_logical_map": map});
        std::fs::write(&file, json.to_string()).unwrap();
    };
    write(2, 6, 8);
    serve(&demo, &flags(4)).refused(&["placement.json", "ranks", "2", "4"]);
    write(2, 5, 8);
    serve(&demo, &flags(2)).refused(&["placement.json", "layer"]);
    write(2, 6, 10);
    serve(&demo, &flags(2)).refused(&["placement.json", "expert"]);
    serve(&demo, "--placement /no/such.json").refused(&["/no/such.json", "No such file"]);
}

#[test]
fn a_taken_port_and_a_missing_folder_are_named() {
    let taken = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    moeyard(["serve", "--port", &port]).refused(&[&format!("127.0.0.1:{port}"), "in use"]);
    serve(Path::new("/no/such/model"), "").refused(&["/no/such/model", "No such file"]);
    let file = model_dir("mixtral").join("config.json");
    serve(&file, "").refused(&["config.json"]);
    let demo = model_dir("demo-mixtral");
    serve(&demo, "--record-routing /no/such/run.moetrace")
        .refused(&["/no/such/run.moetrace", "No such file"]);
    serve(&demo, "--generation-config /no/such.json").refused(&["/no/such.json", "No such file"]);
}

#[test]
fn weights_that_are_not_finite_are_named_when_looked_for() {
    let copy = Copy::of("olmoe").edit(WEIGHTS, |bytes| {
        let end = bytes.len();
        bytes[end - 2..].copy_from_slice(&[0xc0, 0x7f]);
    });
    serve(copy.0.path(), "--check-weights").refused(&[WEIGHTS, "NaN"]);
}
