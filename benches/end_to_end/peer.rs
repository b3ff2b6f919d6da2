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
    samples_ts: Vec<f64>,
}

/// Repetitions of one run of the program, which loads the model each time.
const REPETITIONS: usize = 2;

impl Peer {
    /// Tokens per second of some prefills.
    pub fn prefill(&self, tokens: usize) -> Result<Vec<f64>, Box<dyn Error>> {
        self.measure(tokens, 0)
    }

    /// Tokens per second of some runs that generate from an empty context.
    pub fn decode(&self, tokens: usize) -> Result<Vec<f64>, Box<dyn Error>> {
        self.measure(0, tokens)
    }

    fn measure(&self, prompt: usize, generate: usize) -> Result<Vec<f64>, Box<dyn Error>> {
        let numbers =
            [("-p", prompt), ("-n", generate), ("-r", REPETITIONS), ("-t", self.threads), ("-ngl", 0)];
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
        Ok(reports.into_iter().flat_map(|report| report.samples_ts).collect())
    }
}
