//! Parameter counts against the files of fixtures and demo models and against published totals, and the report.

use std::fs;
use std::path::{Path, PathBuf};

use moeyard::backend::Precision;
use moeyard::cli::inspect::{RunShape, report};
use moeyard::config::Parallel;
use moeyard::model::families::resolve;
use moeyard::spec::{ModelSpec, Split};
use safetensors::{Dtype, SafeTensors};
use serde_json::json;

fn folders() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut folders: Vec<PathBuf> = ["tests/fixtures", "models"]
        .iter()
        .flat_map(|parent| fs::read_dir(root.join(parent)).unwrap())
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("config.json").exists())
        .collect();
    folders.sort();
    folders
}

fn spec(folder: &Path) -> ModelSpec {
    resolve(&fs::read(folder.join("config.json")).unwrap()).unwrap().spec
}

/// Numbers stored in a checkpoint, as its matrices are after dequantisation.
fn stored_numbers(folder: &Path, spec: &ModelSpec) -> u64 {
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let files = files.filter(|path| {
        let name = path.file_name().unwrap().to_str().unwrap();
        name.starts_with("model") && name.ends_with(".safetensors")
    });
    let mut sum = 0;
    for file in files {
        let bytes = fs::read(file).unwrap();
        for (name, tensor) in SafeTensors::deserialize(&bytes).unwrap().iter() {
            let numbers = tensor.shape().iter().product::<usize>() as u64;
            sum += match name.rsplit('.').next().unwrap() {
                _ if is_next_token_prediction(name, spec) => 0,
                "weight_scale_inv" | "scales" | "qzeros" | "g_idx" => 0,
                // The GPTQ fixture has an all-zero bias for every matrix, as published files do.
                "bias" if tensor.dtype() == Dtype::F16 => 0,
                "qweight" => numbers * 8,
                _ => numbers,
            };
        }
    }
    sum
}

/// Layers past the last are for speculation and not loaded.
fn is_next_token_prediction(name: &str, spec: &ModelSpec) -> bool {
    let layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next());
    layer.is_some_and(|layer| layer.parse::<usize>().unwrap() >= spec.layers.len())
}

#[test]
fn counts_equal_the_numbers_in_the_files() {
    let folders = folders();
    assert_eq!(folders.len(), 16);
    for folder in folders {
        let spec = spec(&folder);
        assert_eq!(spec.parameters().total(), stored_numbers(&folder, &spec), "{}", folder.display());
    }
}

/// Shapes of published models, with the totals their files have.
#[test]
fn counts_equal_published_totals() {
    let mixtral_8x7b = json!({"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "num_experts_per_tok": 2, "vocab_size": 32000});
    let qwen3_30b = json!({"model_type": "qwen3_moe", "hidden_size": 2048, "moe_intermediate_size": 768,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936});
    let deepseek_v3 = json!({"model_type": "deepseek_v3"});
    let gpt_oss_20b = json!({"model_type": "gpt_oss", "num_hidden_layers": 24, "num_local_experts": 32});
    let count = |config: serde_json::Value| {
        let spec = resolve(config.to_string().as_bytes()).unwrap().spec;
        (spec.parameters().total(), spec.active_parameters())
    };
    assert_eq!(count(mixtral_8x7b), (46_702_792_704, 12_879_925_248));
    assert_eq!(count(qwen3_30b).0, 30_532_122_624);
    assert_eq!(count(deepseek_v3).0, 671_026_419_200);
    assert_eq!(count(gpt_oss_20b).0, 20_914_757_184);
}

#[test]
fn a_rank_holds_its_share() {
    let mixtral = spec(&folders().into_iter().find(|f| f.ends_with("mixtral")).unwrap());
    let whole = mixtral.parameters();
    let half = mixtral.rank_parameters(Split { tensor: 2, expert_tensor: 1, slots: 4 });
    assert_eq!((half.attention * 2, half.experts * 2), (whole.attention, whole.experts));
    assert_eq!((half.embedding, half.head, half.router), (whole.embedding, whole.head, whole.router));
    // Four ranks, two KV heads: each is held twice.
    let quarter = mixtral.rank_parameters(Split { tensor: 4, expert_tensor: 2, slots: 4 });
    let (hidden, head_dim, layers) = (64, 16, 2);
    assert_eq!(quarter.attention, layers * 4 * hidden * head_dim);
    assert_eq!(quarter.experts * 4, whole.experts);
    let per_token: Vec<u64> = [1, 2, 4].map(|tp| mixtral.kv_numbers_per_token(tp)).to_vec();
    assert_eq!(per_token, [128, 64, 64]);
}

#[test]
fn the_report_names_what_a_rank_holds() {
    let demo = spec(&folders().into_iter().find(|f| f.ends_with("demo-deepseek")).unwrap());
    let parallel = Parallel { dp: 4, ep: 4, world: 4, ..Parallel::SINGLE };
    let run = RunShape {
        parallel,
        slots_per_rank: 9,
        staging_slots: 1,
        precision: Precision::BF16,
        block_size: 32,
    };
    let text = report(&demo, &run);
    for line in [
        "family:             deepseek_v3",
        "layers:             5 (4 MoE, 1 dense of width 512)",
        "attention:          8 latent heads, latent width 64 + rotary 16",
        "experts:            32 of width 64, 4 chosen per token, a shared one of width 64",
        "ranks:              4 (TP 1, DP 4, EP 4, tensor split inside an expert 1)",
        "slots per rank:     9 per MoE layer",
        "staging per rank:   96.0 KiB (room for 1 on their way)",
        "KV per token:       800 B",
        "KV per block:       25.0 KiB (32 tokens)",
    ] {
        assert!(text.lines().any(|l| l == line), "no line {line:?} in\n{text}");
    }
    let experts = 4 * 9 * 3 * 256 * 64 * 2;
    let experts = format!("  experts:          {:.1} MiB", f64::from(experts) / 1048576.0);
    assert!(text.contains(&experts), "{text}");
    // f32 activations double the cache and nothing else.
    let text = report(&demo, &RunShape { precision: Precision::MIXED, ..run });
    assert!(text.contains(&experts) && text.contains("KV per token:       1.6 KiB"), "{text}");
}
