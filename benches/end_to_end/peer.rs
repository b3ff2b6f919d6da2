//! llama.cpp's own benchmark as a child process.

use std::error::Error;
use std::path::PathBuf;
use std::process::Command;

use serde::Deserialize;

/// A llama-bench and the model it runs.
pub struct Peer {
    pub program: PathBuf,
    pub gguf: PathBuf,
    pub threads: usize,
}

/// The fields of `llama-bench -o json` that are read here.
#[derive(Deserialize)]
struct Report {
    n_prompt: usize,
    samples_ts: Vec<f64>,
}

/// Tokens per second of each repetition.
pub struct Speeds {
    pub prefill: Vec<f64>,
    pub decode: Vec<f64>,
}

impl Peer {
    /// Prefill of `prompt` tokens `repetitions` times, then as often `generate` tokens from an empty context.
    pub fn measure(
        &self,
        prompt: usize,
        generate: usize,
        repetitions: usize,
    ) -> Result<Speeds, Box<dyn Error>> {
        let numbers =
            [("-p", prompt), ("-n", generate), ("-r", repetitions), ("-t", self.threads), ("-ngl", 0)];
        let mut command = Command::new(&self.program);
        command.arg("-m").arg(&self.gguf).args(["-o", "json"]);
        for (flag, number) in numbers {
            command.arg(flag).arg(number.to_string());
        }
        let output = command.output()?;
        if !output.status.success() {
            return Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr)).into());
        }
        let reports: Vec<Report> = serde_json::from_slice(&output.stdout)?;
        let (prefill, decode): (Vec<_>, Vec<_>) = reports.into_iter().partition(|report| report.n_prompt > 0);
        let samples = |reports: Vec<Report>| reports.into_iter().flat_map(|r| r.samples_ts).collect();
        Ok(Speeds { prefill: samples(prefill), decode: samples(decode) })
    }
}
