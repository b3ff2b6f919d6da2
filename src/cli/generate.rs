//! `moeyard generate`: a prompt in, streamed text out.

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::Settings;
use super::launch::{Needs, Prepared};
use super::model::OpenModel;
use crate::engine::request::{Event, FinishReason, Request, Sampling};
use crate::error::{Error, Result};
use crate::tokenizer::Detokenizer;

/// `moeyard generate`.
#[derive(Args)]
pub(super) struct Arguments {
    /// Checkpoint folder in Hugging Face layout [default: the embedded demo model]
    #[arg(value_name = "MODEL_DIR")]
    model: Option<PathBuf>,
    /// Text to continue
    #[arg(short, long)]
    prompt: String,
    /// Most tokens to generate
    #[arg(short = 'n', long, default_value_t = 128, value_name = "TOKENS")]
    max_tokens: usize,
    /// 0 takes the most probable token each time [default: the checkpoint's, else 1]
    #[arg(long, allow_negative_numbers = true)]
    temperature: Option<f32>,
    /// Sample from the smallest set of tokens that has this probability [default: the checkpoint's, else 1]
    #[arg(long)]
    top_p: Option<f32>,
    /// Sample from this many best tokens; 0 from all [default: the checkpoint's, else 0]
    #[arg(long)]
    top_k: Option<usize>,
    /// The same seed gives the same text
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Go on after an end-of-text token
    #[arg(long)]
    ignore_eos: bool,
    #[command(flatten)]
    settings: Settings,
}

/// Continues the prompt on standard output; figures go to standard error.
pub(super) fn run(arguments: Arguments) -> Result<()> {
    let raw = arguments.settings.read()?;
    let model = OpenModel::open_as(arguments.model.as_deref(), raw.load_format)?;
    let prepared = Prepared::new(model, raw, Needs::default())?;
    let generation = prepared.model.generation(&prepared.options.server.generation_config)?;
    let prompt = prepared.model.tokenizer.encode(&arguments.prompt, true)?;
    let request = Request {
        sampling: Sampling {
            temperature: arguments.temperature.unwrap_or(generation.sampling.temperature),
            top_p: arguments.top_p.unwrap_or(generation.sampling.top_p),
            top_k: arguments.top_k.unwrap_or(generation.sampling.top_k),
            min_p: generation.sampling.min_p,
            repetition_penalty: generation.sampling.repetition_penalty,
            seed: arguments.seed,
            ..Sampling::GREEDY
        },
        stop_tokens: if arguments.ignore_eos { Vec::new() } else { generation.eos_token_ids },
        ..Request::greedy(prompt, arguments.max_tokens)
    };
    let launched = prepared.launch(Needs::default(), None)?;
    let outcome = stream(&prepared, &launched.engine, request);
    launched.finish(Duration::ZERO, Duration::MAX)?;
    outcome
}

fn stream(prepared: &Prepared, engine: &crate::engine::EngineHandle, request: Request) -> Result<()> {
    let stop_tokens = request.stop_tokens.clone();
    let mut events = engine.submit(request)?;
    let mut text = Detokenizer::new(&prepared.model.tokenizer, true);
    let mut out = std::io::stdout().lock();
    let mut print = |piece: &str| {
        let written = out.write_all(piece.as_bytes()).and_then(|()| out.flush());
        written.map_err(|e| Error::io("standard output", e))
    };
    while let Some(event) = events.blocking_next() {
        match event {
            Event::Prompt(_) => {}
            Event::Token(token) if stop_tokens.contains(&token.token) => {}
            Event::Token(token) => print(&text.push(token.token))?,
            Event::Finished(finished) => {
                print(&text.finish())?;
                print("\n")?;
                if let FinishReason::Error(why) | FinishReason::Refused(why) = finished.reason {
                    return Err(Error::Stopped(why));
                }
            }
        }
    }
    Ok(())
}
