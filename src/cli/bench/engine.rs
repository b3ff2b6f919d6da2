//! The engine by itself: how fast prompts are read and how fast batches of sequences continue.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};

use super::report::{Samples, round, table};
use super::workload::Random;
use crate::cli::launch::{Needs, Prepared};
use crate::cli::model::OpenModel;
use crate::cli::serve::dtype_name;
use crate::cli::{Settings, progress, show, write_json};
use crate::engine::request::{Event, FinishReason, Request};
use crate::engine::stats::{RequestTiming, StepTiming};
use crate::engine::{EngineHandle, TimingObserver};
use crate::error::{Error, Result};
use crate::metrics::{self, RankMeter};

/// `moeyard bench`.
#[derive(Args)]
pub(super) struct Arguments {
    /// Checkpoint folder in Hugging Face layout [default: the embedded demo model]
    #[arg(value_name = "MODEL_DIR")]
    model: Option<PathBuf>,
    /// Write the figures as JSON to this file, or to standard output with -
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    #[command(flatten)]
    work: Work,
    #[command(flatten)]
    settings: Settings,
}

/// What is measured.
#[derive(Args)]
struct Work {
    /// Prompt lengths to read
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', default_value = "128,512")]
    prompt_len: Vec<usize>,
    /// Batch sizes to decode with
    #[arg(long, value_name = "SEQUENCES", value_delimiter = ',', default_value = "1,8,32")]
    batch: Vec<usize>,
    /// Prompt before decoding
    #[arg(long, value_name = "TOKENS", default_value_t = 64)]
    context_len: usize,
    /// Decode steps measured per batch size
    #[arg(long, value_name = "STEPS", default_value_t = 64)]
    steps: usize,
    /// Times each prompt length is measured
    #[arg(long, value_name = "N", default_value_t = 3)]
    repeat: usize,
    /// Seed of the random prompts
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// Seconds of each kind of work, of an average rank.
type Phases = [f64; metrics::Work::ALL.len()];

/// One step.
#[derive(Clone, Copy)]
struct Step {
    timing: StepTiming,
    phases: Phases,
}

/// Steps of the engine under test.
struct Steps {
    meters: Vec<Arc<RankMeter>>,
    /// The steps, and what the meters showed after the latest.
    taken: Mutex<(Vec<Step>, Phases)>,
}

impl Steps {
    fn new(meters: Vec<Arc<RankMeter>>) -> Steps {
        Steps { meters, taken: Mutex::default() }
    }

    fn take(&self) -> Vec<Step> {
        std::mem::take(&mut self.taken.lock().unwrap_or_else(PoisonError::into_inner).0)
    }

    fn spent(&self) -> Phases {
        metrics::Work::ALL.map(|work| {
            let seconds: f64 = self.meters.iter().map(|meter| meter.spent(work).as_secs_f64()).sum();
            seconds / self.meters.len() as f64
        })
    }
}

impl TimingObserver for Steps {
    fn on_step(&self, timing: &StepTiming) {
        let now = self.spent();
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let (steps, before) = &mut *taken;
        let phases = std::array::from_fn(|i| now[i] - before[i]);
        *before = now;
        steps.push(Step { timing: *timing, phases });
    }
    fn on_first_token(&self, _: Duration) {}
    fn on_next_token(&self, _: Duration) {}
    fn on_finish(&self, _: &RequestTiming) {}
}

/// Time of one prompt length.
struct Prefill {
    tokens: usize,
    /// Of the whole prompt, once per repetition.
    times: Samples,
}

/// Steps of one batch size.
struct Decode {
    sequences: usize,
    steps: Samples,
    /// Milliseconds of a step in each kind of work, on average.
    phases: Phases,
}

/// Measures and prints.
pub(super) fn run(arguments: Arguments) -> Result<()> {
    let work = arguments.work;
    work.check()?;
    let mut raw = arguments.settings.read()?;
    let largest = work.batch.iter().copied().max().unwrap_or(1);
    raw.max_num_seqs.get_or_insert(largest.max(64));
    // A batch is queued as one.
    raw.max_queued_requests.get_or_insert(largest.max(1024));
    raw.max_queued_tokens.get_or_insert(largest.saturating_mul(work.context_len).max(1 << 20));
    let prepared = Prepared::new(
        OpenModel::open_as(arguments.model.as_deref(), raw.load_format)?,
        raw,
        Needs::default(),
    )?;
    let meters = prepared.counters.iter().map(|counters| Arc::clone(&counters.meter)).collect();
    let steps = Arc::new(Steps::new(meters));
    let launched = prepared.launch(Needs::default(), Some(Arc::clone(&steps) as _))?;
    let mut bench = Bench {
        engine: &launched.engine,
        steps: &steps,
        vocab_size: prepared.model.family.spec.vocab_size,
        random: Random::new(work.seed),
    };
    let outcome = bench.measure(&work);
    launched.finish(Duration::ZERO, Duration::MAX)?;
    let (prefill, decode) = outcome?;
    let tables = [table(&rows(&prefill, &decode)), table(&phase_rows(&decode))].join("\n");
    show(&tables, arguments.json.as_deref());
    match &arguments.json {
        Some(path) => write_json(path, &report(&prepared, &prefill, &decode)),
        None => Ok(()),
    }
}

impl Work {
    /// Refuses what would measure nothing.
    fn check(&self) -> Result<()> {
        for (flag, zero) in [
            ("--prompt-len", self.prompt_len.contains(&0)),
            ("--batch", self.batch.contains(&0)),
            ("--context-len", self.context_len == 0),
            ("--steps", self.steps == 0),
            ("--repeat", self.repeat == 0),
        ] {
            if zero {
                return Err(Error::config(flag, "expected 1 or more, found 0"));
            }
        }
        Ok(())
    }
}

struct Bench<'a> {
    engine: &'a EngineHandle,
    steps: &'a Steps,
    vocab_size: usize,
    random: Random,
}

impl Bench<'_> {
    fn measure(&mut self, work: &Work) -> Result<(Vec<Prefill>, Vec<Decode>)> {
        let runs = work.prompt_len.len() * work.repeat + work.batch.len();
        let bar = progress::count("measuring", runs as u64);
        // The first steps touch memory for the first time.
        self.run(1, work.context_len, 2)?;
        let mut prefill = Vec::new();
        for &tokens in &work.prompt_len {
            let mut seconds = Vec::new();
            for _ in 0..work.repeat {
                let steps = self.run(1, tokens, 1)?;
                seconds.push(steps.iter().map(|step| step.timing.duration.as_secs_f64()).sum());
                bar.inc(1);
            }
            prefill.push(Prefill { tokens, times: Samples::of_seconds(seconds) });
        }
        let mut decode = Vec::new();
        for &sequences in &work.batch {
            let steps = self.run(sequences, work.context_len, work.steps + 1)?;
            // Only steps in which all sequences decode and none is still reading its prompt.
            let full = |step: &&Step| step.timing.prefill_rows == 0 && step.timing.decode_rows == sequences;
            let full: Vec<_> = steps.iter().filter(full).collect();
            let steps = Samples::of_seconds(full.iter().map(|step| step.timing.duration.as_secs_f64()));
            if steps.is_empty() {
                let why = format!(
                    "{sequences} sequences never ran together: --max-num-seqs, --kv-cache-memory or --steps is too small"
                );
                return Err(Error::config("--batch", why));
            }
            let mean =
                |i: usize| full.iter().map(|step| step.phases[i] * 1e3).sum::<f64>() / full.len() as f64;
            decode.push(Decode { sequences, steps, phases: std::array::from_fn(mean) });
            bar.inc(1);
        }
        bar.finish_and_clear();
        Ok((prefill, decode))
    }

    /// Runs random prompts side by side to their ends; the steps that took.
    fn run(&mut self, sequences: usize, prompt: usize, tokens: usize) -> Result<Vec<Step>> {
        self.steps.take();
        // As one: on a busy machine, the first would be done before the last comes.
        let requests = (0..sequences)
            .map(|_| Request::greedy(self.random.tokens(prompt, self.vocab_size), tokens))
            .collect();
        for mut stream in self.engine.submit_all(requests)? {
            while let Some(event) = stream.blocking_next() {
                if let Event::Finished(finished) = event
                    && let FinishReason::Error(why) = finished.reason
                {
                    return Err(Error::Stopped(why));
                }
            }
        }
        Ok(self.steps.take())
    }
}

fn rows(prefill: &[Prefill], decode: &[Decode]) -> Vec<Vec<String>> {
    let head = |what: &str| [what, "tokens/s", "median ms", "p99 ms", "mean ms"].map(str::to_owned).to_vec();
    let row = |what: String, tokens: usize, times: &Samples| {
        let median = times.percentile(50.0);
        let times = [median, times.percentile(99.0), times.mean()].map(|ms| format!("{ms:.3}"));
        [vec![what, format!("{:.1}", tokens as f64 / median * 1e3)], times.to_vec()].concat()
    };
    let mut rows = vec![head("prefill")];
    rows.extend(prefill.iter().map(|p| row(format!("{} tokens", p.tokens), p.tokens, &p.times)));
    rows.push(head("decode, per step"));
    rows.extend(decode.iter().map(|d| row(format!("batch {}", d.sequences), d.sequences, &d.steps)));
    rows
}

/// Where the time of a decode step goes on a rank, by kinds of work that take any.
fn phase_rows(decode: &[Decode]) -> Vec<Vec<String>> {
    let busy: Vec<usize> =
        (0..metrics::Work::ALL.len()).filter(|&i| decode.iter().any(|d| d.phases[i] >= 0.0005)).collect();
    let name = |i: &usize| metrics::Work::ALL[*i].label().to_owned();
    let mut rows = vec![[vec!["ms of a decode step".to_owned()], busy.iter().map(name).collect()].concat()];
    rows.extend(decode.iter().map(|d| {
        let ms = busy.iter().map(|&i| format!("{:.3}", d.phases[i])).collect();
        [vec![format!("batch {}", d.sequences)], ms].concat()
    }));
    rows
}

fn report(prepared: &Prepared, prefill: &[Prefill], decode: &[Decode]) -> Value {
    let parallel = prepared.options.parallel;
    let figures = |tokens: usize, times: &Samples| {
        let mut figures = times.json(&[50.0, 99.0]);
        figures["tokens_per_second"] = json!(round(tokens as f64 / times.percentile(50.0) * 1e3));
        figures
    };
    let with = |key: &str, value: usize, mut figures: Value| {
        figures[key] = json!(value);
        figures
    };
    let prefill: Vec<_> =
        prefill.iter().map(|p| with("prompt_tokens", p.tokens, figures(p.tokens, &p.times))).collect();
    let phases = |d: &Decode| {
        let ms =
            metrics::Work::ALL.iter().zip(d.phases).map(|(work, ms)| (work.label().into(), json!(round(ms))));
        Value::Object(ms.collect())
    };
    let decode: Vec<_> = decode
        .iter()
        .map(|d| {
            let mut figures = with("batch", d.sequences, figures(d.sequences, &d.steps));
            figures["phases_mean_ms"] = phases(d);
            figures
        })
        .collect();
    json!({
        "moeyard": env!("CARGO_PKG_VERSION"),
        "model": prepared.model.name,
        "device": prepared.backends[0].describe(),
        "dtype": dtype_name(prepared.options.model.dtype),
        "expert_dtype": dtype_name(prepared.precision().experts),
        "threads_per_rank": prepared.options.model.threads,
        "tensor_parallel_size": parallel.tp,
        "data_parallel_size": parallel.dp,
        "expert_parallel_size": parallel.ep,
        "prefill": prefill,
        "decode": decode,
    })
}
