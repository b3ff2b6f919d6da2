//! Requests and engines that end before they are done.

use std::sync::Arc;
use std::time::Duration;

use moeyard::Error;
use moeyard::engine::request::{Capture, Event, FinishReason, Request};
use moeyard::engine::scripted::{Script, options};
use moeyard::engine::{EngineOptions, Hooks};

use crate::gate::Gate;
use crate::patience::{PATIENCE, eventually};
use crate::{collect, ids, prompt, request, start};

#[test]
fn who_leaves_frees_blocks_and_harms_nobody() {
    let gate = Arc::new(Gate::default());
    let options = EngineOptions { max_num_seqs: 2, ..options() };
    let engine = start(&options, (1, 2), gate.hooks());
    let streams: Vec<_> = (0..8).map(|i| engine.submit(request(prompt(i, 20), 100)).unwrap()).collect();
    let mut streams = streams.into_iter();
    let stays = streams.next().unwrap();
    gate.wait_reached();
    drop(streams);
    gate.open();
    let (tokens, _) = collect(stays);
    assert_eq!(ids(&tokens), Script::of(&options).greedy(&prompt(0, 20), 100));
    eventually("it rests", || engine.stats().running == 0);
    let stats = engine.stats();
    assert_eq!((stats.kv.used, stats.waiting), (0, 0));
    assert_eq!((stats.outcomes.aborted, stats.outcomes.length), (7, 1));
}

/// What an early end has captured is told with it.
#[test]
fn a_request_can_be_ended_early() {
    let engine = start(&options(), (2, 1), Hooks::default());
    let capture = Capture { routing: true, ..Capture::default() };
    let mut stream = engine.submit(Request { capture, ..request(prompt(0, 8), 150) }).unwrap();
    while !matches!(stream.blocking_next(), Some(Event::Token(_))) {}
    stream.abort();
    let (tokens, finished) = collect(stream);
    if finished.reason == FinishReason::Aborted {
        assert!(tokens.len() < 149);
    }
    assert!(finished.captured.unwrap().routing.rows >= 8);
}

#[test]
fn shutdown_drains_or_aborts() {
    for (drain, expected) in
        [(Duration::from_secs(600), FinishReason::Length), (Duration::ZERO, FinishReason::Aborted)]
    {
        let gate = Arc::new(Gate::default());
        let options = EngineOptions { max_num_seqs: 1, ..options() };
        let engine = start(&options, (1, 1), gate.hooks());
        let streams: Vec<_> = (0..3).map(|i| engine.submit(request(prompt(i, 4), 20)).unwrap()).collect();
        gate.wait_reached();
        let other = engine.clone();
        let ending = std::thread::spawn(move || other.shutdown(drain));
        eventually("nothing more is taken", || !engine.is_open());
        assert!(matches!(engine.submit(request(vec![1], 1)), Err(Error::Stopped(_))));
        gate.open();
        ending.join().unwrap();
        for stream in streams {
            assert_eq!(collect(stream).1.reason, expected);
        }
        assert!(!engine.is_alive());
    }
}

/// A shutdown that is in a hurry leaves a step alone that will not end.
#[test]
fn a_hurried_shutdown_does_not_wait_for_a_step() {
    let gate = Arc::new(Gate::default());
    let engine = start(&options(), (1, 1), gate.hooks());
    let stream = engine.submit(request(prompt(0, 4), 100)).unwrap();
    gate.wait_reached();
    assert!(!engine.shutdown_within(Duration::ZERO, Duration::from_millis(20)));
    gate.open();
    assert_eq!(collect(stream).1.reason, FinishReason::Aborted);
    assert!(engine.shutdown_within(Duration::ZERO, PATIENCE));
}

/// When every handle and stream is gone, so are the threads.
#[test]
fn an_engine_without_handles_ends() {
    let gate = Arc::new(Gate::default());
    gate.open();
    let engine = start(&options(), (2, 1), gate.hooks());
    drop(engine.submit(request(prompt(0, 4), 100)).unwrap());
    drop(engine);
    eventually("the threads end", || Arc::strong_count(&gate) == 1);
}
