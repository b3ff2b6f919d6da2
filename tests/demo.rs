//! The trained demo models continue their golden prompts exactly, token by token, on one rank and on four.

mod support;

use moeyard::config::RawOptions;
use moeyard::config::flags::DtypeChoice;
use support::launch::{Launch, greedy, options};
use support::{Golden, ids, model_dir};

fn check(model: &str, expert_parallel: usize) {
    let golden = Golden::open(&model_dir(model)).json;
    let prompts = golden["prompts"].as_array().unwrap();
    assert_eq!(prompts.len(), 10);
    let raw = RawOptions { expert_parallel_size: Some(expert_parallel), ..options(DtypeChoice::F32) };
    let engine = Launch::of(model, raw);
    let tokenizer = &engine.prepared.model.tokenizer;

    let mut requests = Vec::new();
    for prompt in prompts {
        let tokens = ids(&prompt["prompt_ids"]);
        // The text begins with the BOS that the post-processor would add.
        assert_eq!(tokenizer.encode(prompt["text"].as_str().unwrap(), false).unwrap(), tokens);
        requests.push(greedy(&tokens, 48));
    }
    for (prompt, answer) in prompts.iter().zip(engine.run(requests)) {
        let what = format!("{model} EP {expert_parallel} {}", prompt["prompt"]);
        assert_eq!(answer.ids(), ids(&prompt["f32_ids"]), "{what}");
        assert_eq!(tokenizer.decode(&answer.ids(), true), prompt["f32_text"], "{what}");
    }
    engine.finish();
}

#[test]
fn demo_mixtral_continues_as_its_reference() {
    check("demo-mixtral", 1);
    check("demo-mixtral", 4);
}

#[test]
fn demo_deepseek_continues_as_its_reference() {
    check("demo-deepseek", 1);
    check("demo-deepseek", 4);
}
