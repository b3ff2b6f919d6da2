//! Any requests beside each other, under any limits.

use proptest::prelude::*;

use super::world::{World, alone, options, prompt, request};
use crate::engine::RequestId;
use crate::engine::options::{EngineOptions, SchedulingPolicy};
use crate::engine::request::{Capture, FinishReason, Request, Sampling};
use crate::model::FormRules;

/// One request of a random scene.
#[derive(Debug, Clone)]
struct Arrival {
    at_step: usize,
    request: Request,
    abort_after: Option<usize>,
}

fn arrival(max_stored: usize) -> impl Strategy<Value = Arrival> {
    // Few prompts, many lengths: shared prefixes are common.
    let text = (0u32..3, 1usize..40, 0usize..25);
    let sampling = (prop_oneof![Just(0.0f32), 0.2f32..2.0], 0usize..5, any::<u64>());
    let capture = proptest::option::weighted(0.2, any::<(bool, bool)>());
    let more = (
        proptest::option::weighted(0.3, (0.7f32..1.5, -1f32..1.0, 0usize..4)),
        -1i32..2,
        proptest::option::weighted(0.2, 0usize..4),
        proptest::option::weighted(0.2, Just("salt")),
    );
    (0usize..40, text, sampling, proptest::option::weighted(0.2, 0usize..20), capture, more).prop_map(
        move |(at_step, (salt, len, max_tokens), (temperature, top_k, seed), abort_after, capture, more)| {
            let (history, priority, prompt_logprobs, cache_salt) = more;
            let (repetition_penalty, frequency_penalty, min_tokens) = history.unwrap_or((1.0, 0.0, 0));
            let len = len.min(max_stored);
            let max_tokens = max_tokens.min(max_stored - len + 1);
            let (prompt_logits, last_logits) = capture.unwrap_or_default();
            let request = Request {
                sampling: Sampling {
                    temperature,
                    top_p: 0.95,
                    top_k,
                    seed,
                    repetition_penalty,
                    frequency_penalty,
                    min_tokens,
                    bad_words: history.map_or(vec![], |_| vec![vec![9], vec![3, 4]]),
                    ..Sampling::GREEDY
                },
                priority,
                prompt_logprobs,
                cache_salt: cache_salt.map(Into::into),
                capture: Capture { prompt_logits, last_logits, routing: false },
                stop_tokens: vec![salt],
                ..request(prompt(salt, len), max_tokens)
            };
            Arrival { at_step, request, abort_after }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// The whole scheduler: any arrivals under any limits give every request the tokens it gets alone.
    #[test]
    fn any_company_gives_the_same_tokens(
        arrivals in proptest::collection::vec(arrival(40), 1..25),
        dp_ranks in 1usize..4,
        (kv_blocks, chunk, seqs) in (10usize..40, 1usize..20, 1usize..8),
        (extra_rows, extra_logit_rows) in (0usize..30, 0usize..10),
        (caching, generated, long) in any::<(bool, bool, bool)>(),
    ) {
        let rules = FormRules { generated, long_above: long.then_some(20) };
        let options = EngineOptions {
            kv_blocks,
            prefill_chunk_size: chunk,
            max_num_seqs: seqs,
            max_num_batched_tokens: seqs + extra_rows,
            max_logit_rows: seqs + extra_logit_rows,
            prefix_caching: caching,
            form_rules: rules,
            scheduling_policy: SchedulingPolicy::Priority,
            ..options()
        };
        options.check().unwrap();
        let mut arrivals = arrivals;
        arrivals.sort_by_key(|arrival| arrival.at_step);
        let mut world = World::new(&options, dp_ranks);
        let mut aborts: Vec<(usize, RequestId)> = Vec::new();
        let mut next = 0;
        for step in 0.. {
            while arrivals.get(next).is_some_and(|arrival| arrival.at_step <= step) {
                world.add(next as RequestId, arrivals[next].request.clone());
                aborts.extend(arrivals[next].abort_after.map(|after| (step + after, next as RequestId)));
                next += 1;
            }
            for &(_, id) in aborts.iter().filter(|&&(at, _)| at == step) {
                world.scheduler.abort(id);
            }
            world.note_updates();
            if world.scheduler.is_idle() && next == arrivals.len() {
                break;
            }
            world.step();
            prop_assert!(step < 20_000, "no progress");
        }
        world.run();
        for (id, arrival) in arrivals.iter().enumerate() {
            let expected = alone(&arrival.request, rules);
            let output = &world.outputs[&(id as RequestId)];
            let finished = output.finished.as_ref().expect("every request ends");
            if finished.reason == FinishReason::Aborted {
                prop_assert!(expected.tokens.starts_with(&output.tokens));
            } else {
                prop_assert_eq!(&output.tokens, &expected.tokens);
                prop_assert_eq!(&output.scores, &expected.scores);
            }
        }
    }
}
