//! Ranks that fail or hang, and logits that are no numbers.

use std::time::Duration;

use moeyard::Error;
use moeyard::engine::request::FinishReason;
use moeyard::engine::scripted::{Fault, Script, options, setups};
use moeyard::engine::{Engine, EngineOptions, Hooks};

use crate::patience::PATIENCE;
use crate::{backend, collect, prompt, request};

#[test]
fn a_failing_rank_ends_every_request_and_is_reported() {
    for fault in [Fault::ErrorAt(2), Fault::PanicAt(2)] {
        let options = options();
        let script = Script::of(&options);
        let mut ranks = setups(&script, 2, 2, options.max_logit_rows, &backend()).unwrap();
        // Only the last of the four ranks fails.
        let faulty = Script { fault, ..script };
        let last =
            setups(&Script { owner: (1, 2), ..faulty }, 2, 1, options.max_logit_rows, &backend()).unwrap();
        ranks[3].model = last.into_iter().nth(1).unwrap().model;
        let engine = Engine::start(ranks, options, Hooks::default()).unwrap();
        // As one: the engine may be dead by the time that a second call would come.
        let streams = engine.submit_all((0..4).map(|i| request(prompt(i, 8), 50)).collect()).unwrap();
        for stream in streams {
            let (_, finished) = collect(stream);
            let FinishReason::Error(why) = finished.reason else { panic!("{:?}", finished.reason) };
            assert!(why.contains("rank 3 failed"), "{why}");
        }
        assert!(!engine.is_alive() && !engine.is_open());
        assert!(
            matches!(engine.submit(request(vec![1], 1)), Err(Error::Stopped(why)) if why.contains("rank 3"))
        );
        assert_eq!(engine.stats().outcomes.error, 4);
        engine.shutdown(PATIENCE);
    }
}

#[test]
fn a_device_that_fails_or_is_full_is_told_from_other_failures() {
    for (fault, expected) in [
        (Fault::ErrorAt(1), None),
        (Fault::DeviceAt(1), Some("cuda:1: rank 1 failed: cuda:1: a kernel: CUDA_ERROR_ILLEGAL_ADDRESS")),
        (
            Fault::MemoryAt(1),
            Some("cuda:1: rank 1 failed: not enough memory on cuda:1: 4096 bytes more > 512 available"),
        ),
    ] {
        let options = options();
        let script = Script::of(&options);
        let mut ranks = setups(&script, 2, 1, options.max_logit_rows, &backend()).unwrap();
        ranks[1] =
            setups(&Script { fault, ..script }, 2, 1, options.max_logit_rows, &backend()).unwrap().remove(1);
        let engine = Engine::start(ranks, options, Hooks::default()).unwrap();
        let streams = engine.submit_all((0..2).map(|i| request(prompt(i, 8), 50)).collect()).unwrap();
        for stream in streams {
            assert!(matches!(collect(stream).1.reason, FinishReason::Error(_)));
        }
        let lost = engine.lost_device();
        assert!(matches!(lost, None | Some(Error::Device { .. })));
        assert_eq!(lost.map(|error| error.to_string()).as_deref(), expected);
        // Nothing more is given to a device in such a state.
        assert!(matches!(engine.submit(request(vec![1], 1)), Err(Error::Stopped(_))));
    }
}

#[test]
fn a_hung_rank_is_noticed_and_named() {
    // A rank that answers is not named, unless its thread gets no core for all of the time that a step may take: look again then.
    let names = std::iter::repeat_with(names_of_a_hung_rank).take(10).find(|names| names != "0, 1");
    assert_eq!(names.as_deref(), Some("1"));
}

/// Rank 1 of two hangs in the second step: who is said to. The first step may take as long as it likes.
fn names_of_a_hung_rank() -> String {
    let options = EngineOptions { step_timeout: Duration::from_secs(1), ..options() };
    let script = Script::of(&options);
    let mut ranks = setups(&script, 2, 1, options.max_logit_rows, &backend()).unwrap();
    let hanging = Script { fault: Fault::HangAt(1), ..script };
    ranks[1] = setups(&hanging, 2, 1, options.max_logit_rows, &backend()).unwrap().remove(1);
    let engine = Engine::start(ranks, options, Hooks::default()).unwrap();
    let streams = engine.submit_all((0..3).map(|i| request(prompt(i, 8), 50)).collect()).unwrap();
    let reasons = streams.into_iter().map(|stream| {
        let FinishReason::Error(why) = collect(stream).1.reason else { panic!("no error") };
        why
    });
    let mut reasons: Vec<_> = reasons.collect();
    reasons.dedup();
    let [why] = &reasons[..] else { panic!("{reasons:?}") };
    assert!(!engine.is_alive());
    assert!(engine.shutdown_within(Duration::ZERO, PATIENCE), "the engine thread does end");
    let (_, rest) = why.split_once("ranks [").unwrap_or_else(|| panic!("{why}"));
    let (names, _) = rest.split_once("] have not answered").unwrap_or_else(|| panic!("{why}"));
    names.to_owned()
}

#[test]
fn a_nan_ends_one_request_only() {
    let options = options();
    let script = Script { fault: Fault::NanAfter(59), ..Script::of(&options) };
    let ranks = setups(&script, 2, 1, options.max_logit_rows, &backend()).unwrap();
    let engine = Engine::start(ranks, options, Hooks::default()).unwrap();
    let bad = engine.submit(request(vec![3, 59], 5)).unwrap();
    let good = engine.submit(request(vec![3, 4], 1)).unwrap();
    assert!(matches!(collect(bad).1.reason, FinishReason::Error(why) if why.contains("position 2")));
    assert_eq!(collect(good).1.reason, FinishReason::Length);
    assert!(engine.is_alive());
}
