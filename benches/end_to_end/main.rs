//! A whole model against the limits of the machine, and against llama.cpp where there is one, all in one run:
//! `cargo bench --bench end_to_end -- --checkpoint FOLDER [--llama-bench PROGRAM --gguf FILE]`.
//!
//! Machines are shared and their speed changes by the minute. So everything is measured in turns, round after round, and printed
//! as the median and the best of all samples. The ratio to the limit compares best with best; a sample is one prompt or one decode
//! step of ours, and one prompt or one run of [`STEPS`] decode steps of llama.cpp, whose ratio compares medians with medians of the
//! same lengths.

mod demand;
mod peer;
mod workload;

use std::error::Error;
use std::path::PathBuf;

use clap::Parser;
use moeyard::backend::Backend;
use moeyard::backend::cpu::limits;

use peer::{Peer, Speeds};
use workload::{Step, Workload};

/// Tokens of the prompt.
const PROMPT: usize = 512;
/// Decode steps of one run, from an empty context on, as llama-bench does it.
const STEPS: usize = 16;
/// Sequences per decode step.
const BATCHES: [usize; 3] = [1, 8, 16];
/// Memory that the bandwidth measurement reads.
const READ_BYTES: usize = 1 << 29;
/// Repetitions of each test by llama-bench in one round, and ours.
const REPETITIONS: usize = 2;

/// Prefill and decode speed of a checkpoint beside the limits of the machine.
#[derive(Parser)]
struct Arguments {
    /// Checkpoint folder; without one there is nothing to do
    #[arg(long, value_name = "FOLDER")]
    checkpoint: Option<PathBuf>,
    /// Compute threads
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Times that everything is measured in turn
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// llama.cpp's benchmark program
    #[arg(long, value_name = "PROGRAM", requires = "gguf")]
    llama_bench: Option<PathBuf>,
    /// The same model for llama.cpp
    #[arg(long, value_name = "FILE")]
    gguf: Option<PathBuf>,
    /// What `cargo bench` passes to every benchmark
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<(), Box<dyn Error>> {
    let Arguments { checkpoint, threads, rounds, llama_bench, gguf, .. } = Arguments::parse();
    let Some(checkpoint) = checkpoint else {
        println!("no --checkpoint FOLDER: nothing to measure (the example make_checkpoint writes one)");
        return Ok(());
    };
    let peer = llama_bench.zip(gguf).map(|(program, gguf)| Peer { program, gguf, threads });
    let longest = BATCHES.into_iter().max().unwrap_or(1);
    let mut workload = Workload::load(&checkpoint, threads, longest, PROMPT)?;
    println!("{}: {}", checkpoint.display(), workload.backend.describe());

    let mut samples = Samples::default();
    for round in 0..rounds {
        eprintln!("round {} of {rounds}", round + 1);
        samples.measure(&mut workload, peer.as_ref())?;
    }
    samples.print(&mut workload)
}

/// Tokens per second of everything measured, and the limits.
#[derive(Default)]
struct Samples {
    read_gbytes: Vec<f64>,
    gflops: Vec<f64>,
    prefill: Vec<f64>,
    decode: [Decode; BATCHES.len()],
    peer_prefill: Vec<f64>,
    peer_decode: Vec<f64>,
}

/// Decode at one batch size.
#[derive(Default)]
struct Decode {
    steps: Vec<f64>,
    runs: Vec<f64>,
}

impl Samples {
    /// One round.
    fn measure(&mut self, workload: &mut Workload, peer: Option<&Peer>) -> Result<(), Box<dyn Error>> {
        self.gflops.push(limits::bf16_gflops(&workload.backend));
        let prompt = Step { sequences: 1, before: 0, rows: PROMPT };
        for _ in 0..REPETITIONS {
            self.prefill.push(PROMPT as f64 / workload.seconds(prompt)?);
        }
        if let Some(peer) = peer {
            let Speeds { prefill, decode } = peer.measure(PROMPT, STEPS, REPETITIONS)?;
            self.peer_prefill.extend(prefill);
            self.peer_decode.extend(decode);
        }
        for (decode, sequences) in self.decode.iter_mut().zip(BATCHES) {
            self.read_gbytes.push(limits::read_gbytes(&workload.backend, READ_BYTES)?);
            for _ in 0..REPETITIONS {
                decode.measure(workload, sequences)?;
            }
        }
        Ok(())
    }

    fn print(&self, workload: &mut Workload) -> Result<(), Box<dyn Error>> {
        let (read, gflops) = (best(&self.read_gbytes), best(&self.gflops));
        println!("read bandwidth {read:.1} GB/s, arithmetic {gflops:.0} GFLOP/s (best)");
        println!("                 tokens/s    best   limit  of limit   llama.cpp    best   ratio");
        let limit = gflops * 1e9 / demand::flops_per_prompt_token(&workload.spec);
        print_line("prefill 512", &self.prefill, limit, &self.prefill, &self.peer_prefill);
        for (decode, sequences) in self.decode.iter().zip(BATCHES) {
            let distinct = mean_distinct(workload, sequences)?;
            let limit = sequences as f64 * read * 1e9 / demand::bytes_of_step(&workload.spec, distinct);
            let peer = if sequences == 1 { self.peer_decode.as_slice() } else { &[] };
            print_line(&format!("decode batch {sequences}"), &decode.steps, limit, &decode.runs, peer);
        }
        Ok(())
    }
}

impl Decode {
    /// One run.
    fn measure(&mut self, workload: &mut Workload, sequences: usize) -> moeyard::Result<()> {
        let mut total = 0.0;
        for before in 0..STEPS {
            let seconds = workload.seconds(Step { sequences, before, rows: 1 })?;
            self.steps.push(sequences as f64 / seconds);
            total += seconds;
        }
        self.runs.push((sequences * STEPS) as f64 / total);
        Ok(())
    }
}

/// Different experts met by a decode step, summed over the layers; the mean of one run.
fn mean_distinct(workload: &mut Workload, sequences: usize) -> moeyard::Result<usize> {
    let mut total = 0;
    for before in 0..STEPS {
        total += workload.distinct_experts(Step { sequences, before, rows: 1 })?;
    }
    Ok(total / STEPS)
}

/// `runs` are samples as long as those of `peer`.
fn print_line(what: &str, samples: &[f64], limit: f64, runs: &[f64], peer: &[f64]) {
    let (middle, top) = (median(samples), best(samples));
    print!("{what:15} {middle:9.1} {top:7.1} {limit:7.1} {:7.0} %", 100.0 * top / limit);
    if !peer.is_empty() {
        let ratio = median(runs) / median(peer);
        print!(" {:11.1} {:7.1} {ratio:7.2}", median(peer), best(peer));
    }
    println!();
}

fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

fn best(samples: &[f64]) -> f64 {
    samples.iter().copied().fold(f64::NAN, f64::max)
}
