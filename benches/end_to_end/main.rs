//! A whole model against the limits of the machine, and against llama.cpp where there is one, all in one run:
//! `cargo bench --bench end_to_end -- --checkpoint FOLDER [--llama-bench PROGRAM --gguf FILE]`.
//!
//! Machines are shared and their speed changes by the second. So every sample (one prompt, or one run of [`STEPS`] decode steps)
//! stands between two measurements of its limit, all by the same threads, and gives one ratio to their mean. Printed are medians
//! over all rounds, of the samples and of the ratios. llama.cpp runs in turn with ours, round by round; its ratio compares medians.

mod demand;
mod peer;
mod samples;
mod workload;

use std::error::Error;
use std::path::PathBuf;

use clap::Parser;
use moeyard::backend::Backend;
use moeyard::backend::cpu::CpuBackend;
use moeyard::backend::cpu::limits;

use peer::Peer;
use samples::{Samples, median};
use workload::{Step, Workload};

/// Decode steps of one run.
const STEPS: usize = 16;
/// Memory that the bandwidth measurement reads: far beyond the caches.
const READ_BYTES: usize = 1 << 28;

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
    /// Prompt lengths
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', default_value = "512,2048")]
    prompts: Vec<usize>,
    /// Sequences per decode step
    #[arg(long, value_name = "SEQUENCES", value_delimiter = ',', default_value = "1,8,16,32")]
    batches: Vec<usize>,
    /// Tokens of each sequence before the first decode step
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', default_value = "0")]
    contexts: Vec<usize>,
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
    let arguments = Arguments::parse();
    let Some(checkpoint) = &arguments.checkpoint else {
        println!("no --checkpoint FOLDER: nothing to measure (the example make_checkpoint writes one)");
        return Ok(());
    };
    let (threads, rounds) = (arguments.threads, arguments.rounds);
    let peer = arguments.llama_bench.clone().zip(arguments.gguf.clone());
    let peer = peer.map(|(program, gguf)| Peer { program, gguf, threads });
    let most = |numbers: &[usize]| numbers.iter().copied().max().unwrap_or(0);
    let sequences = most(&arguments.batches).max(1);
    let tokens = most(&arguments.contexts) + STEPS;
    let prompt = most(&arguments.prompts);
    let mut workload = Workload::load(checkpoint, threads, sequences, tokens, prompt)?;
    println!("{}: {}", checkpoint.display(), workload.backend.describe());

    let mut tests = tests(&arguments);
    for test in &mut tests {
        test.prepare(&mut workload)?;
    }
    for round in 0..rounds {
        eprintln!("round {} of {rounds}", round + 1);
        for test in &mut tests {
            test.sample(&mut workload, peer.as_ref())?;
        }
    }
    println!("                              tokens/s   limit  of limit   (quartiles)   llama.cpp   ratio");
    tests.iter().for_each(Test::print);
    Ok(())
}

/// What is measured, in the order of the table.
fn tests(arguments: &Arguments) -> Vec<Test> {
    let prompts = arguments.prompts.iter().map(|&tokens| What::Prefill { tokens });
    let decode = arguments.contexts.iter().flat_map(|&context| {
        arguments.batches.iter().map(move |&sequences| What::Decode { sequences, context })
    });
    prompts.chain(decode).map(Test::new).collect()
}

/// One line of the table.
#[derive(Clone, Copy)]
enum What {
    Prefill { tokens: usize },
    Decode { sequences: usize, context: usize },
}

/// What was measured for it.
struct Test {
    what: What,
    /// Bytes or operations of a sample, in units of 10^9.
    demand: f64,
    own: Samples,
    peer: Vec<f64>,
}

impl Test {
    fn new(what: What) -> Test {
        Test { what, demand: 0.0, own: Samples::default(), peer: Vec::new() }
    }

    /// Tokens of a sample.
    fn tokens(&self) -> usize {
        match self.what {
            What::Prefill { tokens } => tokens,
            What::Decode { sequences, .. } => sequences * STEPS,
        }
    }

    /// Finds out what a sample demands, and touches its memory.
    fn prepare(&mut self, workload: &mut Workload) -> moeyard::Result<()> {
        self.demand = match self.what {
            What::Prefill { tokens } => {
                workload.seconds(Step { sequences: 1, before: 0, rows: tokens })?;
                demand::flops_of_prompt(&workload.spec, tokens)
            }
            What::Decode { sequences, context } => {
                let mut bytes = 0.0;
                for before in context..context + STEPS {
                    let distinct = workload.distinct_experts(Step { sequences, before, rows: 1 })?;
                    bytes += demand::bytes_of_step(&workload.spec, distinct, sequences * (before + 1));
                }
                bytes
            }
        } / 1e9;
        Ok(())
    }

    /// One sample between two of its limit, and the peer's.
    fn sample(&mut self, workload: &mut Workload, peer: Option<&Peer>) -> Result<(), Box<dyn Error>> {
        let before = self.limit(&workload.backend)?;
        let seconds = self.seconds(workload)?;
        let limit = (before + self.limit(&workload.backend)?) / 2.0;
        let tokens = self.tokens() as f64;
        self.own.push(tokens / seconds, tokens / (self.demand / limit));
        let Some(peer) = peer else { return Ok(()) };
        match self.what {
            What::Prefill { tokens } => self.peer.extend(peer.prefill(tokens)?),
            What::Decode { sequences: 1, context: 0 } => self.peer.extend(peer.decode(STEPS)?),
            What::Decode { .. } => {}
        }
        Ok(())
    }

    /// The speed that bounds this test, in 10^9 operations or bytes a second.
    fn limit(&self, backend: &CpuBackend) -> moeyard::Result<f64> {
        Ok(median(&match self.what {
            What::Prefill { .. } => limits::bf16_gflops(backend),
            What::Decode { .. } => limits::read_gbytes(backend, READ_BYTES)?,
        }))
    }

    fn seconds(&self, workload: &mut Workload) -> moeyard::Result<f64> {
        match self.what {
            What::Prefill { tokens } => workload.seconds(Step { sequences: 1, before: 0, rows: tokens }),
            What::Decode { sequences, context } => (context..context + STEPS)
                .map(|before| workload.seconds(Step { sequences, before, rows: 1 }))
                .sum(),
        }
    }

    fn print(&self) {
        let name = match self.what {
            What::Prefill { tokens } => format!("prefill {tokens}"),
            What::Decode { sequences, context: 0 } => format!("decode, batch {sequences}"),
            What::Decode { sequences, context } => format!("decode, batch {sequences} at {context}"),
        };
        let [low, middle, high] = self.own.ratio_quartiles().map(|ratio| 100.0 * ratio);
        let (own, limit) = (self.own.speed(), self.own.limit());
        print!("{name:28} {own:9.1} {limit:7.1} {middle:7.1} % ({low:5.1} {high:5.1})");
        if !self.peer.is_empty() {
            let peer = median(&self.peer);
            print!(" {peer:13.1} {:7.2}", own / peer);
        }
        println!();
    }
}
