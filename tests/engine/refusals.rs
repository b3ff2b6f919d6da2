//! What is not taken: what can never run, what finds no room, ranks that do not fit together.

use std::sync::Arc;

use moeyard::Error;
use moeyard::engine::request::{FinishReason, Request, Sampling};
use moeyard::engine::scripted::{Script, options, setups};
use moeyard::engine::{Engine, EngineOptions, Hooks};

use crate::gate::Gate;
use crate::{backend, collect, prompt, request, start};

#[test]
fn what_can_never_run_is_refused_with_its_numbers() {
    let small = EngineOptions { kv_blocks: 10, ..options() };
    let engine = start(&small, (1, 1), Hooks::default());
    let sampling = |temperature, top_p| Sampling { temperature, top_p, ..Sampling::GREEDY };
    let cases = [
        ("prompt", "empty", request(vec![], 1)),
        ("prompt", "token 1 of the prompt is 60, but ids are below 60", request(vec![1, 60], 1)),
        (
            "max_tokens",
            "This model's maximum context length is 200 tokens. However, you requested 201 tokens",
            request(prompt(0, 101), 100),
        ),
        ("prompt", "maximum context length is 200 tokens", request(prompt(0, 201), 0)),
        ("max_tokens", "maximum context length", request(prompt(0, 1), usize::MAX)),
        ("max_tokens", "need room for 41, but the KV cache holds 40", request(prompt(0, 22), 20)),
        ("temperature", "-1", Request { sampling: sampling(-1.0, 1.0), ..request(vec![1], 1) }),
        ("temperature", "NaN", Request { sampling: sampling(f32::NAN, 1.0), ..request(vec![1], 1) }),
        ("top_p", "0", Request { sampling: sampling(1.0, 0.0), ..request(vec![1], 1) }),
        ("top_p", "1.5", Request { sampling: sampling(1.0, 1.5), ..request(vec![1], 1) }),
        (
            "min_tokens",
            "3",
            Request { sampling: Sampling { min_tokens: 3, ..Sampling::GREEDY }, ..request(vec![1], 2) },
        ),
        (
            "min_p",
            "2",
            Request { sampling: Sampling { min_p: 2.0, ..Sampling::GREEDY }, ..request(vec![1], 1) },
        ),
        (
            "repetition_penalty",
            "NaN",
            Request {
                sampling: Sampling { repetition_penalty: f32::NAN, ..Sampling::GREEDY },
                ..request(vec![1], 1)
            },
        ),
        (
            "logit_bias",
            "60",
            Request {
                sampling: Sampling { logit_bias: vec![(60, 1.0)], ..Sampling::GREEDY },
                ..request(vec![1], 1)
            },
        ),
        (
            "bad_words",
            "empty",
            Request {
                sampling: Sampling { bad_words: vec![vec![]], ..Sampling::GREEDY },
                ..request(vec![1], 1)
            },
        ),
        ("priority", "arrival", Request { priority: 1, ..request(vec![1], 1) }),
        ("prompt_logprobs", "61", Request { prompt_logprobs: Some(61), ..request(vec![1], 1) }),
        ("logprobs", "61", Request { logprobs: Some(61), ..request(vec![1], 1) }),
    ];
    for (expected_param, expected_text, request) in cases.clone() {
        match engine.submit(request) {
            Err(Error::Request { param, message }) => {
                assert_eq!(param.as_deref(), Some(expected_param), "{message}");
                assert!(message.contains(expected_text), "{message:?} lacks {expected_text:?}");
            }
            Err(other) => panic!("{expected_text}: {other}"),
            Ok(_) => panic!("{expected_text}: accepted"),
        }
    }
    assert_eq!(engine.stats().outcomes.rejected, cases.len() as u64);
    // The largest that fits runs.
    let (tokens, _) = collect(engine.submit(request(prompt(0, 21), 20)).unwrap());
    assert_eq!(tokens.len(), 20);
}

#[test]
fn a_full_queue_is_busy_and_empties_again() {
    let gate = Arc::new(Gate::default());
    let options = EngineOptions { max_num_seqs: 1, max_waiting: 2, ..options() };
    let engine = start(&options, (1, 1), gate.hooks());
    let running = engine.submit(request(prompt(0, 4), 3)).unwrap();
    gate.wait_reached();
    let waiting = [1, 2].map(|salt| engine.submit(request(prompt(salt, 4), 3)).unwrap());
    assert_eq!((engine.stats().running, engine.stats().waiting), (1, 2));
    match engine.submit(request(prompt(2, 4), 3)).map(|_| ()) {
        Err(Error::Busy { message, .. }) => assert!(message.contains('2'), "{message}"),
        other => panic!("{other:?}"),
    }
    gate.open();
    for stream in waiting.into_iter().chain([running]) {
        assert_eq!(collect(stream).0.len(), 3);
    }
    assert_eq!(collect(engine.submit(request(prompt(2, 4), 3)).unwrap()).0.len(), 3);
    assert_eq!(engine.stats().outcomes.rejected, 1);
}

#[test]
fn several_requests_are_queued_as_one_or_not_at_all() {
    let gate = Arc::new(Gate::default());
    let options = EngineOptions { max_num_seqs: 1, max_waiting: 4, max_waiting_tokens: 40, ..options() };
    let engine = start(&options, (1, 1), gate.hooks());
    let running = engine.submit(request(prompt(0, 4), 3)).unwrap();
    gate.wait_reached();
    let many = |count: usize, len: usize| engine.submit_all(vec![request(prompt(1, len), 2); count]);
    let streams = many(3, 10).unwrap();
    assert_eq!(engine.stats().waiting, 3);
    assert!(matches!(many(2, 1), Err(Error::Busy { message, .. }) if message.contains("exceed 4")));
    assert!(matches!(many(1, 11), Err(Error::Busy { message, .. }) if message.contains("exceed 40")));
    assert!(matches!(many(5, 1), Err(Error::Request { param: Some(p), .. }) if p == "n"));
    assert_eq!(engine.stats().waiting, 3);
    let last = many(1, 10).unwrap();
    gate.open();
    for stream in streams.into_iter().chain(last).chain([running]) {
        assert_eq!(collect(stream).1.reason, FinishReason::Length);
    }
    assert_eq!(many(1, 50).map(|streams| streams.len()).unwrap(), 1, "an empty queue takes any prompt");
}

#[test]
fn ranks_that_do_not_fit_are_refused() {
    let options = options();
    let start = |tp, dp, rows, drop_first: bool| {
        let mut ranks = setups(&Script::of(&options), tp, dp, rows, &backend()).unwrap();
        if drop_first {
            ranks.remove(0);
        }
        Engine::start(ranks, options.clone(), Hooks::default()).map(|_| ()).unwrap_err().to_string()
    };
    assert!(start(1, 1, 3, false).contains("[3, 60]"));
    assert!(start(1, 2, 8, true).contains("--data-parallel-size"));
    assert!(start(1, 1, 8, true).contains("--data-parallel-size"));
}
