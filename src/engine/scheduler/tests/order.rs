//! Who computes when: arrivals, priorities, those put back, and the ranks that requests go to.

use std::collections::BTreeMap;

use super::world::{World, options, prompt, request};
use crate::engine::RequestId;
use crate::engine::options::{EngineOptions, SchedulingPolicy};
use crate::engine::plan::Phase;
use crate::engine::request::Request;
use crate::model::FormRules;

#[test]
fn decode_goes_on_while_a_long_prompt_is_computed() {
    let mut world = World::new(&options(), 1);
    world.add(0, request(prompt(0, 4), 30));
    world.add(1, request(prompt(1, 4), 30));
    world.step();
    world.add(2, request(prompt(2, 100), 1));
    while world.outputs.get(&2).is_none_or(|output| output.tokens.is_empty()) {
        world.step();
        let sub = &world.plan.sub_plans[0];
        assert_eq!((sub.infos[0].request, sub.infos[1].request), (0, 1), "decode rows come first");
        assert_eq!(sub.rows_in(Phase::Decode), 2);
        assert!(sub.rows_in(Phase::Prefill) <= 16);
    }
    world.run();
}

#[test]
fn requests_start_in_order_of_arrival() {
    let options = EngineOptions { max_num_seqs: 2, max_logit_rows: 2, ..options() };
    let mut world = World::new(&options, 1);
    for id in 0..5 {
        world.add(id, request(prompt(id as u32, 10), 3));
    }
    let mut started = Vec::new();
    while !world.scheduler.is_idle() {
        world.step();
        for info in &world.plan.sub_plans[0].infos {
            if !started.contains(&info.request) {
                started.push(info.request);
            }
        }
    }
    assert_eq!(started, [0, 1, 2, 3, 4]);
}

#[test]
fn lower_priorities_go_first_and_are_put_back_last() {
    let policy = SchedulingPolicy::Priority;
    let options =
        EngineOptions { max_num_seqs: 2, max_logit_rows: 2, scheduling_policy: policy, ..options() };
    let mut world = World::new(&options, 1);
    for (id, priority) in [(0, 5), (1, 0), (2, -7), (3, 0)] {
        world.add(id, Request { priority, ..request(prompt(id as u32, 6), 4) });
    }
    let mut started = Vec::new();
    while !world.scheduler.is_idle() {
        world.step();
        let infos = &world.plan.sub_plans[0].infos;
        started.extend(
            infos.iter().map(|info| info.request).filter(|id| !started.contains(id)).collect::<Vec<_>>(),
        );
    }
    assert_eq!(started, [2, 1, 3, 0]);

    // The newest has the best priority: the others make room for it.
    let options = EngineOptions { kv_blocks: 12, max_num_seqs: 8, max_logit_rows: 8, ..options };
    let mut world = World::new(&options, 1);
    for id in 0..4 {
        world.add(id, Request { priority: -(id as i32), ..request(prompt(id as u32, 8), 30) });
    }
    let mut ended = Vec::new();
    while !world.scheduler.is_idle() {
        world.step();
        let finished = world.outputs.iter().filter(|(_, output)| output.finished.is_some());
        ended.extend(finished.map(|(&id, _)| id).filter(|id| !ended.contains(id)).collect::<Vec<_>>());
    }
    assert!(world.scheduler.stats().preemptions > 0);
    assert_eq!(ended[0], 3);
    for id in 0..4 {
        assert_eq!(world.outputs[&id].tokens, world.script.greedy(&prompt(id as u32, 8), 30));
    }
}

#[test]
fn pressure_puts_back_the_newest_and_changes_no_token() {
    for rules in [FormRules::default(), FormRules { generated: true, long_above: Some(20) }] {
        for caching in [true, false] {
            let options =
                EngineOptions { kv_blocks: 12, form_rules: rules, prefix_caching: caching, ..options() };
            let mut world = World::new(&options, 1);
            for id in 0..4 {
                world.add(id, request(prompt(id as u32, 8), 30));
            }
            let mut first_to_end = None;
            while !world.scheduler.is_idle() {
                world.step();
                let ended = world.outputs.iter().find(|(_, output)| output.finished.is_some());
                first_to_end = first_to_end.or(ended.map(|(&id, _)| id));
            }
            let stats = world.scheduler.stats();
            assert!(stats.preemptions > 0 && stats.recomputed_tokens > 0, "{stats:?}");
            assert_eq!(first_to_end, Some(0), "the oldest is never put back");
            for id in 0..4 {
                let expected = world.script.greedy(&prompt(id as u32, 8), 30);
                assert_eq!(world.outputs[&id].tokens, expected, "request {id}");
            }
        }
    }
}

/// The plan says which rows are computed once more, for the trace.
#[test]
fn recomputed_rows_are_marked() {
    let options = EngineOptions { kv_blocks: 12, prefix_caching: false, ..options() };
    let mut world = World::new(&options, 1);
    for id in 0..3 {
        world.add(id, request(prompt(id as u32, 8), 30));
    }
    let mut computed: BTreeMap<RequestId, u32> = BTreeMap::new();
    let mut marked = 0;
    while !world.scheduler.is_idle() {
        world.step();
        let sub = &world.plan.sub_plans[0];
        for (span, info) in sub.spans.iter().zip(&sub.infos) {
            let reached = computed.entry(info.request).or_default();
            assert_eq!(info.recomputed, reached.saturating_sub(span.position).min(span.rows));
            *reached = (*reached).max(span.position + span.rows);
            marked += u64::from(info.recomputed);
        }
    }
    assert!(marked > 0);
    assert_eq!(world.scheduler.stats().recomputed_tokens, marked);
}

#[test]
fn a_request_goes_to_the_longest_prefix_then_to_the_least_load() {
    let mut world = World::new(&options(), 3);
    let rank_of = |world: &World, id| {
        world.plan.sub_plans.iter().position(|sub| sub.infos.iter().any(|info| info.request == id))
    };
    world.add(0, request(prompt(0, 20), 40));
    world.add(1, request(prompt(1, 4), 40));
    world.add(2, request(prompt(2, 12), 40));
    world.step();
    assert_eq!([0, 1, 2].map(|id| rank_of(&world, id)), [Some(0), Some(1), Some(2)]);
    world.step();
    world.add(3, request(prompt(3, 4), 40));
    world.add(4, request(prompt(0, 12), 40));
    world.step();
    assert_eq!(rank_of(&world, 3), Some(1), "the least load");
    assert_eq!(rank_of(&world, 4), Some(0), "the longest prefix, although it has the most load");
    world.run();
}
