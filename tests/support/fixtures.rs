//! Where the fixtures and demo models are.

#![allow(dead_code, reason = "each test binary uses its own part")]

use std::path::{Path, PathBuf};

/// The folder of a fixture or demo model.
pub fn model_dir(name: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = if name.starts_with("demo-") { "models" } else { "tests/fixtures" };
    root.join(folder).join(name)
}

/// All fixtures with golden outputs.
pub const FIXTURES: [&str; 14] = [
    "deepseek_v2",
    "deepseek_v2_group",
    "deepseek_v3",
    "deepseek_v3_fp8",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
    "mixtral",
    "mixtral_awq",
    "mixtral_gptq",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
];
