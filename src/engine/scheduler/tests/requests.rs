//! What one request gets, and how it ends.

use super::world::{World, options, prompt, request};
use crate::engine::options::EngineOptions;
use crate::engine::request::{FinishReason, Request, Sampling};
use crate::engine::scripted::Fault;

#[test]
fn one_request_follows_the_script() {
    for chunk in [1, 3, 4, 16] {
        for len in [1, 3, 4, 5, 16, 17, 33] {
            let options = EngineOptions { prefill_chunk_size: chunk, ..options() };
            let mut world = World::new(&options, 1);
            world.add(0, request(prompt(0, len), 9));
            world.run();
            assert_eq!(world.outputs[&0].tokens, world.script.greedy(&prompt(0, len), 9), "{chunk} {len}");
            assert_eq!(world.finished(0).reason, FinishReason::Length);
        }
    }
}

#[test]
fn a_stop_token_is_reported_and_ends_the_request() {
    let mut world = World::new(&options(), 1);
    let expected = world.script.greedy(&prompt(0, 5), 20);
    let stop = expected[6];
    let first = expected.iter().position(|&token| token == stop).unwrap();
    world.add(0, Request { stop_tokens: vec![stop], ..request(prompt(0, 5), 20) });
    world.run();
    assert_eq!(world.outputs[&0].tokens, expected[..=first]);
    assert_eq!(world.finished(0).reason, FinishReason::Stop);
}

#[test]
fn no_tokens_only_computes_the_prompt() {
    let mut world = World::new(&options(), 1);
    world.add(0, request(prompt(0, 21), 0));
    world.run();
    assert!(world.outputs[&0].tokens.is_empty());
    assert_eq!(world.finished(0).reason, FinishReason::Length);
    assert_eq!(world.scheduler.stats().steps, 2);
    // Its blocks serve the next one.
    world.add(1, request(prompt(0, 21), 1));
    world.run();
    assert_eq!(world.finished(1).cached_tokens, 20);
}

#[test]
fn abort_frees_blocks_at_once() {
    let options = EngineOptions { max_num_seqs: 2, ..options() };
    let mut world = World::new(&options, 1);
    for id in 0..3 {
        world.add(id, request(prompt(id as u32, 10), 50));
    }
    world.step();
    let used = world.scheduler.stats().kv.used;
    world.scheduler.abort(1);
    world.scheduler.abort(2);
    world.scheduler.abort(7);
    world.note_updates();
    assert_eq!(world.scheduler.stats().kv.used, used - 3);
    for id in [1, 2] {
        assert_eq!(world.finished(id).reason, FinishReason::Aborted);
    }
    world.run();
    assert_eq!(world.outputs[&0].tokens, world.script.greedy(&prompt(0, 10), 50));
    assert_eq!(world.scheduler.stats().outcomes.aborted, 2);
}

#[test]
fn a_nan_ends_its_own_request_only() {
    let mut world = World::new(&options(), 1);
    world.script.fault = Fault::NanAfter(49);
    let healthy: Vec<u32> = prompt(0, 10).iter().map(|&token| token % 49).collect();
    let expected = world.script.greedy(&healthy, 5);
    assert!(!expected.contains(&49), "the healthy request stays clear of the faulty token");
    world.add(0, request(vec![1, 2, 49], 5));
    world.add(1, request(healthy, 5));
    world.run();
    assert!(matches!(&world.finished(0).reason, FinishReason::Error(why) if why.contains("non-finite")));
    assert_eq!(world.outputs[&1].tokens, expected);
    assert_eq!(world.scheduler.stats().nonfinite_logits, 1);
}

#[test]
fn rules_that_leave_no_token_end_their_request_only() {
    let mut world = World::new(&options(), 1);
    let only_stop = Sampling { allowed_tokens: Some([7].into()), min_tokens: 1, ..Sampling::GREEDY };
    world.add(0, Request { sampling: only_stop, stop_tokens: vec![7], ..request(prompt(0, 5), 4) });
    world.add(1, request(prompt(1, 5), 4));
    world.run();
    assert!(matches!(&world.finished(0).reason, FinishReason::Refused(why) if why.contains("position 5")));
    assert_eq!(world.outputs[&1].tokens, world.script.greedy(&prompt(1, 5), 4));
    assert_eq!(world.scheduler.stats().nonfinite_logits, 0);
}
