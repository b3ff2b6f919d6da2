//! A load generator for OpenAI-compatible servers.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{sleep_until, timeout};

use super::client::{Client, Timing};
use super::report::{Samples, round, table};
use super::workload::{Length, Random, arrivals};
use crate::cli::{progress, show, write_json};
use crate::config::secret::Secret;
use crate::error::{Error, Result};

/// Shown below the flags.
pub(super) const EXAMPLES: &str = "\
Examples:
  moeyard bench serve http://127.0.0.1:8000
      100 requests at once: what the server can do at most
  moeyard bench serve http://127.0.0.1:8000 --request-rate 5 --num-requests 300
      5 requests per second on average, at random times (a Poisson process)
  moeyard bench serve http://127.0.0.1:8000 --max-concurrency 16 --input-len 1000 --input-spread 0.5 --output-len 200
      16 clients that each wait for their answer; prompts of 500 to 1500 tokens
  moeyard bench serve http://127.0.0.1:8000 --goodput ttft:500,tpot:50 --json result.json
      how many requests per second met both limits (milliseconds)

Times: TTFT until the first piece of text, ITL between pieces, TPOT mean time per token after the first, E2E the
whole answer. Counts are the server's own where it tells them.";

/// `moeyard bench serve`.
#[derive(Args)]
pub(super) struct Arguments {
    /// Server, such as http://127.0.0.1:8000
    url: String,
    /// Model to ask for [default: the first that the server lists]
    #[arg(long)]
    model: Option<String>,
    /// Key of the server
    #[arg(long, value_name = "KEY", env = "MOEYARD_API_KEY", hide_env_values = true)]
    api_key: Option<Secret>,
    /// Route to send requests to
    #[arg(long, value_enum, default_value = "completions")]
    endpoint: Endpoint,

    /// Requests to send
    #[arg(long, value_name = "N", default_value_t = 100, help_heading = "Load")]
    num_requests: usize,
    /// Requests per second, at random times [default: all at once]
    #[arg(long, value_name = "RATE", help_heading = "Load")]
    request_rate: Option<f64>,
    /// Most requests at a time; later ones wait [default: no limit]
    #[arg(long, value_name = "N", help_heading = "Load")]
    max_concurrency: Option<usize>,
    /// Requests sent one after the other before the measurement
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Load")]
    warm_up: usize,

    /// Prompt length
    #[arg(long, value_name = "TOKENS", default_value_t = 128, help_heading = "Requests")]
    input_len: usize,
    /// Prompt lengths differ by up to this share of it
    #[arg(long, value_name = "RATIO", default_value_t = 0.0, help_heading = "Requests")]
    input_spread: f64,
    /// Tokens to generate
    #[arg(long, value_name = "TOKENS", default_value_t = 64, help_heading = "Requests")]
    output_len: usize,
    /// Numbers of tokens to generate differ by up to this share of it
    #[arg(long, value_name = "RATIO", default_value_t = 0.0, help_heading = "Requests")]
    output_spread: f64,
    /// Send prompts as token ids below this size, so that lengths are exact [default: as common words, about a token each]
    #[arg(long, value_name = "VOCABULARY", help_heading = "Requests")]
    token_ids: Option<usize>,
    /// Let answers end early; also for servers that do not know ignore_eos
    #[arg(long, help_heading = "Requests")]
    stop_at_eos: bool,
    /// Sampling temperature
    #[arg(long, default_value_t = 0.0, help_heading = "Requests")]
    temperature: f64,
    /// Seed of prompts, lengths and arrival times
    #[arg(long, default_value_t = 0, help_heading = "Requests")]
    seed: u64,
    /// A request that takes longer has failed
    #[arg(long, value_name = "SECONDS", default_value_t = 600, help_heading = "Requests")]
    timeout: u64,

    /// Percentiles to report
    #[arg(
        long,
        value_name = "PERCENT",
        value_delimiter = ',',
        default_value = "50,90,99",
        help_heading = "Report"
    )]
    percentiles: Vec<f64>,
    /// Limits in milliseconds that a good request meets: ttft:MS, tpot:MS, e2e:MS
    #[arg(long, value_name = "LIMITS", value_delimiter = ',', help_heading = "Report")]
    goodput: Vec<Limit>,
    /// Write the figures as JSON to this file, or to standard output with -
    #[arg(long, value_name = "FILE", help_heading = "Report")]
    json: Option<PathBuf>,
}

/// `--endpoint`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Endpoint {
    /// /v1/completions
    Completions,
    /// /v1/chat/completions
    Chat,
}

impl Endpoint {
    fn route(self) -> &'static str {
        match self {
            Endpoint::Completions => "/v1/completions",
            Endpoint::Chat => "/v1/chat/completions",
        }
    }
}

/// One of `--goodput`.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Limit {
    what: Quantity,
    ms: f64,
}

/// What is measured of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Quantity {
    FirstToken,
    PerToken,
    EndToEnd,
}

impl Quantity {
    /// In seconds; `None` where an answer has none, as a single token has no time per further token.
    fn of(self, timing: &Timing) -> Option<f64> {
        match self {
            Quantity::FirstToken => Some(timing.first_s),
            Quantity::EndToEnd => Some(timing.total_s),
            Quantity::PerToken => {
                let later = timing.output_tokens.saturating_sub(1);
                (later > 0).then(|| timing.between_s.iter().sum::<f64>() / later as f64)
            }
        }
    }
}

impl std::str::FromStr for Limit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refuse = || format!("expected ttft:MS, tpot:MS or e2e:MS, found {text:?}");
        let (what, ms) = text.split_once(':').ok_or_else(refuse)?;
        let what = match what {
            "ttft" => Quantity::FirstToken,
            "tpot" => Quantity::PerToken,
            "e2e" => Quantity::EndToEnd,
            _ => return Err(refuse()),
        };
        let ms: f64 = ms.parse().map_err(|_| refuse())?;
        if ms.is_finite() && ms > 0.0 { Ok(Limit { what, ms }) } else { Err(refuse()) }
    }
}

/// One request, ready to be sent.
struct Planned {
    /// After the start of the measurement.
    at: Duration,
    body: Value,
}

/// What all requests came to.
struct Measured {
    answers: Vec<Timing>,
    errors: Vec<String>,
    seconds: f64,
}

/// Sends the load and prints what it measured.
pub(super) fn run(arguments: Arguments) -> Result<()> {
    check(&arguments)?;
    let key = arguments.api_key.as_ref().map(|key| key.reveal().to_owned());
    let client = Arc::new(Client::new(&arguments.url, key)?);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|e| Error::io("async runtime", e))?;
    let (model, measured) = runtime.block_on(async {
        let model = match &arguments.model {
            Some(model) => model.clone(),
            None => client.first_model().await?,
        };
        let planned = plan(&arguments, &model)?;
        warm_up(&client, &arguments, &model).await?;
        Ok::<_, Error>((model, load(&client, &arguments, planned).await))
    })?;
    show(&summary(&arguments, &measured), arguments.json.as_deref());
    if let Some(path) = &arguments.json {
        write_json(path, &report(&arguments, &model, &measured))?;
    }
    match measured.errors.first() {
        Some(error) if measured.answers.is_empty() => {
            Err(Error::Remote(format!("all {} requests failed: {error}", measured.errors.len())))
        }
        _ => Ok(()),
    }
}

fn check(arguments: &Arguments) -> Result<()> {
    let refuse = |flag: &str, why: String| Err(Error::config(flag, why));
    for (flag, given) in [
        ("--num-requests", arguments.num_requests),
        ("--max-concurrency", arguments.max_concurrency.unwrap_or(1)),
        ("--token-ids", arguments.token_ids.unwrap_or(1)),
        ("--timeout", arguments.timeout as usize),
    ] {
        if !(1..=10_000_000).contains(&given) {
            return refuse(flag, format!("expected 1 to 10000000, found {given}"));
        }
    }
    if let Some(rate) = arguments.request_rate.filter(|rate| !(*rate > 1e-6 && *rate < 1e9)) {
        return refuse("--request-rate", format!("expected requests per second above 0, found {rate}"));
    }
    if arguments.token_ids.is_some() && arguments.endpoint == Endpoint::Chat {
        return refuse(
            "--token-ids",
            "chat takes text only: leave it out or use --endpoint completions".into(),
        );
    }
    match arguments.percentiles.iter().find(|percent| !(0.0..=100.0).contains(*percent)) {
        Some(percent) => refuse("--percentiles", format!("expected 0 to 100, found {percent}")),
        None => Ok(()),
    }
}

fn plan(arguments: &Arguments, model: &str) -> Result<Vec<Planned>> {
    let input = Length::new("--input-len", arguments.input_len, arguments.input_spread)?;
    let output = Length::new("--output-len", arguments.output_len, arguments.output_spread)?;
    let mut random = Random::new(arguments.seed);
    let times = arrivals(arguments.num_requests, arguments.request_rate, &mut random);
    let mut planned = |at| {
        let (input, output) = (input.draw(&mut random), output.draw(&mut random));
        Planned { at, body: body(arguments, model, input, output, &mut random) }
    };
    Ok(times.into_iter().map(&mut planned).collect())
}

fn body(arguments: &Arguments, model: &str, input: usize, output: usize, random: &mut Random) -> Value {
    let mut body = json!({
        "model": model,
        "max_tokens": output,
        "temperature": arguments.temperature,
        "stream": true,
        "stream_options": {"include_usage": true},
    });
    if !arguments.stop_at_eos {
        body["ignore_eos"] = json!(true);
    }
    match (arguments.endpoint, arguments.token_ids) {
        (Endpoint::Completions, Some(size)) => body["prompt"] = json!(random.tokens(input, size)),
        (Endpoint::Completions, None) => body["prompt"] = json!(random.text(input)),
        (Endpoint::Chat, _) => {
            body["messages"] = json!([{"role": "user", "content": random.text(input)}]);
        }
    }
    body
}

/// Requests that do not count. When even these fail, the load would tell nothing.
async fn warm_up(client: &Client, arguments: &Arguments, model: &str) -> Result<()> {
    // Not the prompts of the measurement, which a prefix cache would remember.
    let mut random = Random::new(!arguments.seed);
    for _ in 0..arguments.warm_up {
        let body = body(arguments, model, arguments.input_len, arguments.output_len.min(16), &mut random);
        client.stream(arguments.endpoint.route(), &body).await?;
    }
    Ok(())
}

async fn load(client: &Arc<Client>, arguments: &Arguments, planned: Vec<Planned>) -> Measured {
    let (route, patience) = (arguments.endpoint.route(), Duration::from_secs(arguments.timeout));
    let places = arguments.max_concurrency.map(|n| Arc::new(Semaphore::new(n)));
    let bar = progress::count("requests", planned.len() as u64);
    let began = Instant::now();
    let mut running = JoinSet::new();
    for Planned { at, body } in planned {
        let (client, places) = (Arc::clone(client), places.clone());
        running.spawn(async move {
            sleep_until((began + at).into()).await;
            let _place = match places {
                Some(places) => places.acquire_owned().await.ok(),
                None => None,
            };
            let answer = timeout(patience, client.stream(route, &body)).await;
            answer.unwrap_or_else(|_| Err(Error::Remote(format!("no whole answer within {patience:?}"))))
        });
    }
    let (mut answers, mut errors) = (Vec::new(), Vec::new());
    while let Some(answer) = running.join_next().await {
        bar.inc(1);
        match answer {
            Ok(Ok(timing)) => answers.push(timing),
            Ok(Err(error)) => errors.push(error.to_string()),
            Err(panic) => errors.push(panic.to_string()),
        }
    }
    let seconds = began.elapsed().as_secs_f64();
    bar.finish_and_clear();
    Measured { answers, errors, seconds }
}

impl Measured {
    fn quantities(&self) -> [(&'static str, Samples); 4] {
        let of =
            |what: Quantity| Samples::of_seconds(self.answers.iter().filter_map(|timing| what.of(timing)));
        let between = self.answers.iter().flat_map(|timing| timing.between_s.iter().copied());
        [
            ("ttft", of(Quantity::FirstToken)),
            ("tpot", of(Quantity::PerToken)),
            ("itl", Samples::of_seconds(between)),
            ("e2e", of(Quantity::EndToEnd)),
        ]
    }

    fn per_second(&self, count: usize) -> f64 {
        count as f64 / self.seconds
    }

    fn output_tokens(&self) -> usize {
        self.answers.iter().map(|timing| timing.output_tokens).sum()
    }

    /// `None` when the server did not count them.
    fn prompt_tokens(&self) -> Option<usize> {
        self.answers.iter().map(|timing| timing.prompt_tokens).sum()
    }

    /// Answers that met all limits. A quantity that an answer does not have exceeds no limit.
    fn good(&self, limits: &[Limit]) -> usize {
        let meets =
            |timing: &Timing| limits.iter().all(|l| l.what.of(timing).is_none_or(|s| s * 1e3 <= l.ms));
        self.answers.iter().filter(|timing| meets(timing)).count()
    }
}

fn summary(arguments: &Arguments, measured: &Measured) -> String {
    let mut text = format!(
        "{} answered, {} failed in {:.2} s\n",
        measured.answers.len(),
        measured.errors.len(),
        measured.seconds
    );
    if let Some(error) = measured.errors.first() {
        text += &format!("first failure: {error}\n");
    }
    let mut line = |label: &str, value: f64| text += &format!("{label:<28}{value:.2}\n");
    line("requests per second", measured.per_second(measured.answers.len()));
    line("output tokens per second", measured.per_second(measured.output_tokens()));
    if let Some(prompt) = measured.prompt_tokens() {
        line("prompt tokens per second", measured.per_second(prompt));
    }
    if !arguments.goodput.is_empty() {
        line("good requests per second", measured.per_second(measured.good(&arguments.goodput)));
    }
    let mut rows = vec![vec!["milliseconds".to_owned(), "mean".to_owned()]];
    rows[0].extend(arguments.percentiles.iter().map(|percent| format!("p{percent}")));
    for (name, samples) in measured.quantities().into_iter().filter(|(_, samples)| !samples.is_empty()) {
        let mut row = vec![name.to_uppercase(), format!("{:.2}", samples.mean())];
        row.extend(
            arguments.percentiles.iter().map(|&percent| format!("{:.2}", samples.percentile(percent))),
        );
        rows.push(row);
    }
    text + &table(&rows)
}

fn report(arguments: &Arguments, model: &str, measured: &Measured) -> Value {
    let mut report = json!({
        "moeyard": env!("CARGO_PKG_VERSION"),
        "url": arguments.url,
        "model": model,
        "endpoint": arguments.endpoint.route(),
        "num_requests": arguments.num_requests,
        "request_rate": arguments.request_rate,
        "max_concurrency": arguments.max_concurrency,
        "input_len": arguments.input_len,
        "input_spread": arguments.input_spread,
        "output_len": arguments.output_len,
        "output_spread": arguments.output_spread,
        "seed": arguments.seed,
        "answered": measured.answers.len(),
        "failed": measured.errors.len(),
        "errors": measured.errors.iter().take(10).collect::<Vec<_>>(),
        "seconds": round(measured.seconds),
        "prompt_tokens": measured.prompt_tokens(),
        "output_tokens": measured.output_tokens(),
        "requests_per_second": round(measured.per_second(measured.answers.len())),
        "output_tokens_per_second": round(measured.per_second(measured.output_tokens())),
    });
    if !arguments.goodput.is_empty() {
        let good = measured.good(&arguments.goodput);
        report["good_requests_per_second"] = json!(round(measured.per_second(good)));
    }
    for (name, samples) in measured.quantities() {
        report[name] = samples.json(&arguments.percentiles);
    }
    report
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(first_s: f64, between_s: &[f64], output_tokens: usize) -> Timing {
        let total_s = first_s + between_s.iter().sum::<f64>();
        Timing { first_s, between_s: between_s.to_vec(), total_s, output_tokens, prompt_tokens: Some(10) }
    }

    #[test]
    fn limits_are_read() {
        assert_eq!("ttft:500".parse(), Ok(Limit { what: Quantity::FirstToken, ms: 500.0 }));
        for text in ["ttft", "ttft:", "itl:5", "e2e:-1", "tpot:inf"] {
            assert!(text.parse::<Limit>().unwrap_err().contains("expected ttft:MS"), "{text}");
        }
    }

    #[test]
    fn a_good_request_meets_every_limit() {
        let answers = vec![answer(0.1, &[0.02, 0.02], 3), answer(0.6, &[0.02], 2), answer(0.1, &[], 1)];
        let measured = Measured { answers, errors: vec!["x".into()], seconds: 2.0 };
        let good = |limits: &[&str]| {
            measured.good(&limits.iter().map(|limit| limit.parse().unwrap()).collect::<Vec<_>>())
        };
        assert_eq!(good(&["ttft:500"]), 2);
        assert_eq!(good(&["ttft:500", "tpot:19"]), 1, "a single token has no time per further token");
        assert_eq!(good(&["e2e:1000"]), 3);
        assert_eq!((measured.output_tokens(), measured.prompt_tokens()), (6, Some(30)));
        assert_eq!(measured.per_second(3), 1.5);
    }

    #[test]
    fn several_tokens_in_a_piece_share_its_time() {
        // Two pieces after the first, four tokens: TPOT is by token, ITL by piece.
        let timing = answer(0.1, &[0.04, 0.04], 5);
        assert_eq!(Quantity::PerToken.of(&timing), Some(0.02));
    }
}
