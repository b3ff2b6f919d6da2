//! Prompts that begin alike compute it once.

use super::world::{World, alone, options, prompt, request};
use crate::engine::options::EngineOptions;
use crate::engine::plan::Phase;
use crate::engine::request::{Request, Sampling};
use crate::model::FormRules;

#[test]
fn a_cached_prefix_is_not_computed_again() {
    let mut world = World::new(&options(), 1);
    world.add(0, request(prompt(0, 20), 5));
    world.run();
    let first = world.outputs[&0].tokens.clone();
    // The very same prompt: the last block is computed again for its logits.
    world.add(1, request(prompt(0, 20), 5));
    world.step();
    assert_eq!(world.plan.rows(), 4);
    world.run();
    assert_eq!(world.outputs[&1].tokens, first);
    assert_eq!((world.finished(0).cached_tokens, world.finished(1).cached_tokens), (0, 16));
    assert_eq!(world.scheduler.stats().cached_tokens, 16);
    // A conversation that goes on: what was generated is cached too.
    let mut next = prompt(0, 20);
    next.extend(&first);
    next.extend([1, 2, 3]);
    world.add(2, request(next, 1));
    world.run();
    assert_eq!(world.finished(2).cached_tokens, 24);
}

/// Where prompt and generated tokens differ in bits, what was generated serves no prompt.
#[test]
fn generated_blocks_serve_no_prompt_in_another_form() {
    let options = EngineOptions { form_rules: FormRules { generated: true, long_above: None }, ..options() };
    let mut world = World::new(&options, 1);
    world.add(0, request(prompt(0, 8), 9));
    world.run();
    let mut next = prompt(0, 8);
    next.extend(&world.outputs[&0].tokens);
    world.add(1, request(next, 1));
    world.run();
    assert_eq!(world.finished(1).cached_tokens, 8);
}

/// Longer prompts than LongRoPE's border compute all their tokens in the long form.
#[test]
fn short_prefixes_serve_no_long_prompt() {
    let options =
        EngineOptions { form_rules: FormRules { generated: false, long_above: Some(16) }, ..options() };
    let mut world = World::new(&options, 1);
    for (id, len, cached) in [(0, 12, 0), (1, 16, 12), (2, 17, 0), (3, 20, 16)] {
        world.add(id, request(prompt(0, len), 1));
        world.run();
        assert_eq!(world.finished(id).cached_tokens, cached, "{len} tokens");
    }
}

/// The choices of one prompt share its blocks: the first computes them, the others wait that long.
#[test]
fn choices_of_a_prompt_compute_it_once() {
    let options = EngineOptions { max_num_batched_tokens: 64, ..options() };
    let mut world = World::new(&options, 1);
    let choice = |seed| {
        let sampling = Sampling { temperature: 1.0, seed, ..Sampling::GREEDY };
        Request { sampling, ..request(prompt(0, 37), 6) }
    };
    (0..5).for_each(|k| world.add(k, choice(k)));
    // Others are not held up by those held back.
    world.add(5, request(prompt(1, 9), 3));
    let mut prefilled = 0;
    while !world.scheduler.is_idle() {
        world.step();
        assert!(world.scheduler.stats().steps > 1 || world.scheduler.stats().running == 2);
        prefilled += world.plan.rows_in(Phase::Prefill);
    }
    assert_eq!(prefilled, 37 + 4 + 9);
    assert_eq!(world.scheduler.stats().cached_tokens, 4 * 36);
    for k in 0..5 {
        assert_eq!(world.outputs[&k].tokens, alone(&choice(k), FormRules::default()).tokens);
    }
    assert_ne!(world.outputs[&0].tokens, world.outputs[&1].tokens);
}

#[test]
fn prefixes_are_shared_within_a_salt_only() {
    let mut world = World::new(&options(), 1);
    let salted =
        |salt: Option<&str>| Request { cache_salt: salt.map(Into::into), ..request(prompt(0, 21), 2) };
    for (id, salt, cached) in
        [(0, None, 0), (1, Some("a"), 0), (2, Some("b"), 0), (3, Some("a"), 20), (4, None, 20)]
    {
        world.add(id, salted(salt));
        world.run();
        assert_eq!(world.finished(id).cached_tokens, cached, "request {id}");
    }
    // Nor is one with another salt waited for.
    world.add(5, Request { prompt: prompt(2, 21), ..salted(Some("a")) });
    world.add(6, Request { prompt: prompt(2, 21), ..salted(Some("b")) });
    world.step();
    assert_eq!(world.scheduler.stats().running, 2);
    world.run();
}
