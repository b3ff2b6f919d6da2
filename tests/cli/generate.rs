//! `moeyard generate` and `inspect`, and text of many bytes per character through a Llama-style tokenizer.

use moeyard::config::flags::DtypeChoice;
use moeyard::tokenizer::{Tokenizer, TokenizerFiles};
use serde_json::json;
use tempfile::TempDir;

use crate::process::{Served, moeyard, moeyard_in};
use crate::support::launch::{Launch, greedy, options};
use crate::support::{Golden, ids, model_dir};

fn words(line: &str) -> impl Iterator<Item = &str> {
    line.split_whitespace()
}

#[test]
fn the_embedded_model_continues_a_prompt() {
    let folder = TempDir::new().unwrap();
    let golden = Golden::open(&model_dir("demo-mixtral")).json;
    let prompt = &golden["prompts"][1];
    let run = |flags: &str| {
        let given = ["generate", "-p", prompt["prompt"].as_str().unwrap(), "-n", "48"];
        moeyard_in(folder.path(), given.into_iter().chain(words(flags)))
    };
    let expected = format!("{}\n", prompt["f32_text"].as_str().unwrap());
    assert_eq!(run("--temperature 0 --dtype f32 --ignore-eos").ok(), expected);
    assert_eq!(run("--temperature 0 --dtype f32 --ignore-eos --expert-parallel-size 3").ok(), expected);
    // A seed gives the same text on any division of the work; another one another text.
    let sampled = run("--seed 5").ok();
    assert_eq!(run("--seed 5 --expert-parallel-size 2 --threads 1").ok(), sampled);
    assert_ne!(run("--seed 6").ok(), sampled);
    // A trace that cannot be written is told of, and is no failure.
    let full = run("--temperature 0 --dtype f32 --ignore-eos --record-routing /dev/full");
    assert!(
        full.stderr.contains("WARN") && full.stderr.contains("/dev/full: No space left"),
        "{}",
        full.stderr
    );
    assert_eq!(full.ok(), expected);
    run("--temperature=-1").refused(&["temperature", "-1"]);
    run("--max-model-len 16").refused(&["maximum context length is 16 tokens"]);
}

#[test]
fn inspect_counts_parameters_and_bytes() {
    let report = moeyard(["inspect"]).ok();
    for line in
        ["mixtral", "total parameters:   8011008 (8.0 M)", "active parameters:  4472064 (4.5 M) per token"]
    {
        assert!(report.contains(line), "no {line:?} in\n{report}");
    }
    let demo = model_dir("demo-deepseek");
    let report =
        moeyard(["inspect", demo.to_str().unwrap(), "--expert-parallel-size", "4", "--dtype", "f32"]).ok();
    for line in [
        "deepseek_v3",
        "4 (TP 1, DP 4, EP 4, tensor split inside an expert 1)",
        "8 per MoE layer",
        "bytes per rank:",
    ] {
        assert!(report.contains(line), "no {line:?} in\n{report}");
    }
    moeyard(["inspect", "--tensor-parallel-size", "3"]).refused(&["nearest"]);
}

/// Mixtral's weights with a tokenizer of its published kind: Metaspace and byte fallback.
fn mixtral_llama() -> TempDir {
    let folder = TempDir::new().unwrap();
    let copy = |model: &str, wanted: fn(&str) -> bool| {
        for entry in std::fs::read_dir(model_dir(model)).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            if wanted(name) {
                std::fs::copy(&path, folder.path().join(name)).unwrap();
            }
        }
    };
    copy("mixtral", |name| name.starts_with("model") || name == "config.json");
    copy("mixtral_llama", |name| name.starts_with("tokenizer"));
    folder
}

fn llama_tokenizer() -> Tokenizer {
    let read = |name| std::fs::read(model_dir("mixtral_llama").join(name)).unwrap();
    let (json, config) = (read("tokenizer.json"), read("tokenizer_config.json"));
    let files = TokenizerFiles {
        checkpoint: "mixtral_llama",
        tokenizer_json: Some(&json),
        tokenizer_config: Some(&config),
        ..TokenizerFiles::default()
    };
    Tokenizer::from_parts(&files, 512).unwrap()
}

#[test]
fn characters_of_many_bytes_are_streamed_whole() {
    let checkpoint = mixtral_llama();
    let tokenizer = llama_tokenizer();
    let path = checkpoint.path().to_str().unwrap();
    // The weights are random: what they say in ids comes from the engine itself, with the fixture's own tokenizer.
    let engine = Launch::of("mixtral", options(DtypeChoice::F32));
    let flags = ["--dtype", "f32", "--threads", "1", "--kv-cache-memory", "16MiB"];
    let server = Served::start(checkpoint.path(), [path].iter().chain(&flags));

    let mut held_back = 0;
    for text in ["Grüße aus 東京 🙂🚀", "€", "naïve café, ¿qué?", "\u{1F469}\u{200D}\u{1F680} à la carte"]
    {
        let prompt = tokenizer.encode(text, true).unwrap();
        assert_eq!(tokenizer.decode(&prompt, true), text, "byte fallback loses nothing");
        let answer = engine.run(vec![greedy(&prompt, 96)]).remove(0).ids();
        // Byte tokens of the vocabulary: some characters of the answer take several tokens.
        held_back += answer.iter().filter(|&&id| (3..259).contains(&id)).count();
        let whole = tokenizer.decode(&answer, true);

        let ask =
            json!({"prompt": text, "max_tokens": 96, "temperature": 0, "ignore_eos": true, "stream": true});
        let streamed = server.client().post("/v1/completions", &ask);
        let pieces: Vec<String> = streamed
            .chunks()
            .iter()
            .map(|chunk| chunk["choices"][0]["text"].as_str().unwrap().to_owned())
            .collect();
        assert_eq!(pieces.concat(), whole, "{text}");

        let given = ["generate", path, "-p", text, "-n", "96", "--temperature", "0", "--ignore-eos"];
        let printed = moeyard(given.iter().chain(&flags)).ok();
        assert_eq!(printed, format!("{whole}\n"), "{text}");
    }
    assert!(held_back > 20, "only {held_back} byte tokens: this tests nothing");
    assert_eq!(server.terminate().0, Some(0));
    engine.finish();
}

#[test]
fn a_prompt_of_many_bytes_has_its_golden_ids() {
    let golden = Golden::open(&model_dir("mixtral_llama")).json;
    let tokenizer = llama_tokenizer();
    for case in golden["tokenizer"].as_array().unwrap() {
        assert_eq!(
            tokenizer.encode(case["text"].as_str().unwrap(), true).unwrap(),
            ids(&case["ids"]),
            "{case}"
        );
    }
}
