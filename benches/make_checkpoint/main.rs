//! Writes a checkpoint with random weights in published Hugging Face layout, to measure with:
//! `cargo run --release --example make_checkpoint -- --shape mixtral --out FOLDER`. The same seed gives the same files.

mod noise;
mod shapes;
mod shards;
mod tokenizer;

use std::error::Error;
use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use clap::Parser;
use serde_json::{Value, json};

use shapes::Shape;

/// Writes a checkpoint of about 2.4 GB with random weights.
#[derive(Parser)]
struct Arguments {
    /// Architecture and size
    #[arg(long, value_enum)]
    shape: Shape,
    /// Folder to write, made where it is missing
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
    /// Seed of the weights
    #[arg(long, default_value_t = 1234)]
    seed: u64,
    /// Layers, instead of the shape's own number
    #[arg(long)]
    layers: Option<usize>,
    /// Bytes of weights per file
    #[arg(long, default_value_t = 1_000_000_000)]
    shard_bytes: u64,
}

fn main() -> Result<(), Box<dyn Error>> {
    let Arguments { shape, out, seed, layers, shard_bytes } = Arguments::parse();
    let start = Instant::now();
    fs::create_dir_all(&out)?;
    let mut config = shape.config();
    if let Some(layers) = layers {
        config["num_hidden_layers"] = json!(layers);
    }
    let save = |name: &str, value: &Value| fs::write(out.join(name), serde_json::to_vec_pretty(value)?);
    save("config.json", &config)?;
    save("generation_config.json", &json!({"bos_token_id": 1, "eos_token_id": 2, "do_sample": false}))?;
    save("tokenizer.json", &tokenizer::tokenizer())?;
    save("tokenizer_config.json", &tokenizer::config())?;
    let tensors = shape.tensors(&config);
    let files = shards::write(&out, &tensors, seed, shard_bytes)?;
    let bytes: u64 = tensors.iter().map(|tensor| tensor.bytes()).sum();
    println!(
        "{}: {} tensors, {:.3} GB in {files} files, {:.1} s",
        out.display(),
        tensors.len(),
        bytes as f64 / 1e9,
        start.elapsed().as_secs_f64()
    );
    Ok(())
}
