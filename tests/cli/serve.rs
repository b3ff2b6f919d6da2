//! `moeyard serve`: the embedded model in an empty folder, on one rank and on four.

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::frozen::Frozen;
use crate::patience::eventually;
use crate::process::Served;
use crate::support::{Golden, ids, model_dir};

/// Requests of the golden file; the rest are left to tests/demo.rs.
const PROMPTS: usize = 3;

/// Values of all series of a family on the metrics page, with their labels.
fn series(page: &str, family: &str) -> Vec<(String, f64)> {
    let lines = page.lines().filter_map(|line| line.strip_prefix(family));
    let series = lines.filter(|rest| rest.starts_with(['{', ' ']));
    series
        .map(|rest| rest.rsplit_once(' ').unwrap())
        .map(|(l, v)| (l.to_owned(), v.parse().unwrap()))
        .collect()
}

fn total(page: &str, family: &str, label: &str) -> f64 {
    series(page, family).iter().filter(|(labels, _)| labels.contains(label)).map(|(_, value)| value).sum()
}

/// The choices of an answer without what differs between servers.
fn choice(answer: &Value) -> Value {
    answer["choices"][0].clone()
}

/// Starts a server of the embedded model, compares it with the golden file, and returns the choices it gave.
fn check(flags: &[&str], ranks: usize) -> Vec<Value> {
    let empty = TempDir::new().unwrap();
    let always = ["--dtype", "f32", "--threads", "1", "--kv-cache-memory", "16MiB"];
    let server = Served::start(empty.path(), always.iter().chain(flags));
    assert_eq!(server.client().get("/health").status, 200);
    let models = server.client().get("/v1/models").json();
    assert_eq!(
        (&models["data"][0]["id"], &models["data"][0]["max_model_len"]),
        (&json!("demo-mixtral"), &json!(1024))
    );

    let golden = Golden::open(&model_dir("demo-mixtral")).json;
    let mut choices = Vec::new();
    // Positions computed: all but the last token of each answer.
    let mut computed = 0;
    for prompt in &golden["prompts"].as_array().unwrap()[..PROMPTS] {
        let mut ask = json!({"prompt": prompt["prompt"], "max_tokens": 48, "temperature": 0, "ignore_eos": true, "logprobs": 3});
        let answer = server.client().post("/v1/completions", &ask).json();
        assert_eq!(answer["choices"][0]["text"], prompt["f32_text"], "{answer}");
        let prompt_tokens = ids(&prompt["prompt_ids"]).len();
        assert_eq!(answer["usage"]["prompt_tokens"], prompt_tokens);
        assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 0, "too short for a block");
        computed += prompt_tokens + 47;
        choices.push(choice(&answer));

        // The same as token ids and in pieces.
        ask["prompt"] = prompt["prompt_ids"].clone();
        ask["stream"] = json!(true);
        let streamed = server.client().post("/v1/completions", &ask);
        assert_eq!(streamed.header("content-type"), Some("text/event-stream"));
        let pieces = streamed.chunks();
        assert!(pieces.len() > 10, "{} pieces of 48 tokens", pieces.len());
        let text: String =
            pieces.iter().map(|piece| choice(piece)["text"].as_str().unwrap().to_owned()).collect();
        assert_eq!(text, prompt["f32_text"], "streamed");
        computed += prompt_tokens + 47;
    }

    let page = server.client().get("/metrics").body;
    let (layers, top_k) = (6.0, 2.0);
    let choices_made = computed as f64 * top_k;
    for layer in 0..6 {
        let of_layer = format!("layer=\"{layer}\"");
        assert_eq!(total(&page, "moeyard_layer_expert_tokens_total", &of_layer), choices_made, "{page}");
        assert_eq!(total(&page, "moeyard_expert_tokens_total", &of_layer), choices_made, "{page}");
    }
    let by_rank = series(&page, "moeyard_rank_expert_tokens_total");
    assert_eq!(by_rank.len(), 2 * ranks, "a series per rank and phase: {by_rank:?}");
    assert_eq!(by_rank.iter().map(|(_, n)| n).sum::<f64>(), choices_made * layers);
    for rank in 0..ranks {
        let rank = format!("rank=\"{rank}\"");
        assert!(total(&page, "moeyard_rank_expert_tokens_total", &rank) > 0.0, "{rank} computed nothing");
    }

    let (code, log) = server.terminate();
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains(&format!("on {ranks} rank")), "{log}");
    assert!(!log.contains('\u{1b}'), "colours in a log file: {log:?}");
    assert_eq!(std::fs::read_dir(empty.path()).unwrap().count(), 0, "nothing is written");
    choices
}

#[test]
fn the_embedded_model_answers_alike_on_one_rank_and_on_four() {
    let one = check(&[], 1);
    let four = check(&["--expert-parallel-size", "4"], 4);
    assert_eq!(one, four, "texts, tokens and log-probabilities");
}

#[test]
fn names_ports_and_keys_of_the_file_are_taken() {
    let folder = TempDir::new().unwrap();
    let settings =
        "served-model-name = \"yard\"\nthreads = 1\nmax-model-len = 64\ngeneration-config = \"none\"\n";
    std::fs::write(folder.path().join("yard.toml"), settings).unwrap();
    let mixtral = model_dir("mixtral");
    let flags = [mixtral.to_str().unwrap(), "--config", "yard.toml", "--max-model-len", "48"];
    let server = Served::start(folder.path(), flags);
    let models = server.client().get("/v1/models").json();
    assert_eq!((&models["data"][0]["id"], &models["data"][0]["max_model_len"]), (&json!("yard"), &json!(48)));
    let long = json!({"model": "yard", "prompt": vec![5; 40], "max_tokens": 9});
    let refused = server.client().post("/v1/completions", &long);
    assert_eq!(refused.status, 400);
    let message = refused.error()["message"].as_str().unwrap().to_owned();
    assert!(message.contains("maximum context length is 48 tokens"), "{message}");
    assert_eq!(
        server.client().post("/v1/completions", &json!({"model": "mixtral", "prompt": "x"})).status,
        404
    );
    assert_eq!(server.terminate().0, Some(0));
}

/// A connection that was made just before the drain is closed as idle: whoever made it asks again.
fn drains(server: &Served) {
    eventually("it drains", || server.client().try_get("/readyz").is_some_and(|answer| answer.status == 503));
}

#[test]
fn a_signal_lets_a_running_answer_finish() {
    let folder = TempDir::new().unwrap();
    let server = Served::start(folder.path(), ["--threads", "1", "--kv-cache-memory", "16MiB"]);
    let frozen = Frozen::thread(server.pid(), "rank-0");
    let ask =
        json!({"prompt": "Once", "max_tokens": 60, "temperature": 0, "ignore_eos": true, "stream": true});
    let mut client = server.client();
    client.send_json("/v1/completions", &ask);
    assert_eq!(client.head().status, 200);
    server.signal();
    if let Some(frozen) = frozen {
        drains(&server);
        drop(frozen);
    }
    let body: Vec<u8> = std::iter::from_fn(|| client.chunk()).flatten().collect();
    let body = String::from_utf8(body).unwrap();
    assert!(body.contains("\"finish_reason\":\"length\"") && body.contains("[DONE]"), "{body}");
    assert_eq!(server.ended().0, Some(0));
}

#[test]
fn a_second_signal_ends_running_answers_and_the_server_at_once() {
    let folder = TempDir::new().unwrap();
    // Whatever ends it, is not the drain time.
    let flags = "--threads 1 --kv-cache-memory 64MiB --expert-parallel-size 2 --drain-timeout 86400";
    let server = Served::start(folder.path(), flags.split(' '));
    let Some(frozen) = Frozen::thread(server.pid(), "rank-0") else { return };
    let ask =
        json!({"prompt": "Once", "max_tokens": 1000, "temperature": 0, "ignore_eos": true, "stream": true});
    let mut clients: Vec<_> = (0..32).map(|_| server.client()).collect();
    for client in &mut clients {
        client.send_json("/v1/completions", &ask);
        assert_eq!(client.head().status, 200);
    }
    server.signal();
    // Two signals at once could arrive as one.
    drains(&server);
    server.signal();
    for client in &mut clients {
        let body: Vec<u8> = std::iter::from_fn(|| client.chunk()).flatten().collect();
        let body = String::from_utf8(body).unwrap();
        assert!(body.contains("\"code\":503"), "{body}");
    }
    // It does not wait for the step, either.
    frozen.killed();
    let (code, log) = server.ended();
    assert_eq!(code, Some(0), "{log}");
}

#[test]
fn a_trace_that_finds_the_disk_full_stops_and_serving_goes_on() {
    let folder = TempDir::new().unwrap();
    let flags = ["--threads", "1", "--kv-cache-memory", "16MiB", "--record-routing", "/dev/full"];
    let server = Served::start(folder.path(), flags);
    let ask = json!({"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0, "ignore_eos": true});
    let errors = || series(&server.client().get("/metrics").body, "moeyard_trace_errors_total")[0].1;
    eventually("the disk is noticed", || {
        let answer = server.client().post("/v1/completions", &ask);
        assert_eq!(answer.json()["usage"]["completion_tokens"], 8);
        errors() > 0.0
    });
    assert_eq!(server.client().post("/v1/completions", &ask).status, 200, "after the failure too");
    assert_eq!(errors(), 1.0, "the trace stops at its first failure");
    let (code, log) = server.terminate();
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains("WARN") && log.contains("/dev/full: No space left"), "{log}");
}
