//! The scheduler against the scripted model, without threads or tensors: whatever the arrivals and limits, every request
//! gets the tokens it gets alone.

use super::*;
use crate::engine::options::SchedulingPolicy;
use crate::engine::request::{Capture, Finished, Sampling, TokenEvent};
use crate::engine::sampler::Sampler;
use crate::engine::scripted::{Fault, Script, ScriptedCache};
use crate::model::FormRules;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::time::Duration;

const VOCAB: usize = 50;

fn options() -> EngineOptions {
    EngineOptions {
        vocab_size: VOCAB,
        experts: crate::engine::scripted::EXPERTS,
        max_model_len: 10_000,
        block_size: 4,
        kv_blocks: 64,
        max_num_seqs: 8,
        max_num_batched_tokens: 32,
        prefill_chunk_size: 16,
        max_logit_rows: 8,
        prefix_caching: true,
        form_rules: FormRules::default(),
        max_waiting: 1000,
        max_waiting_tokens: 1 << 20,
        scheduling_policy: SchedulingPolicy::Arrival,
        step_timeout: Duration::from_secs(60),
    }
}

fn request(prompt: Vec<u32>, max_tokens: usize) -> Request {
    Request::greedy(prompt, max_tokens)
}

/// `len` tokens that differ from those of another `salt`.
fn prompt(salt: u32, len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| (i * 7 + salt * 13 + i / 5) % VOCAB as u32).collect()
}

/// What a request reported.
#[derive(Default)]
struct Output {
    tokens: Vec<u32>,
    scores: Vec<TokenEvent>,
    finished: Option<Finished>,
}

/// A scheduler with its ranks played by scripted caches.
struct World {
    script: Script,
    scheduler: Scheduler,
    caches: Vec<ScriptedCache>,
    sampler: Sampler,
    plan: StepPlan,
    outputs: BTreeMap<RequestId, Output>,
}

impl World {
    fn new(options: &EngineOptions, dp_ranks: usize) -> Self {
        let script = Script::of(options);
        World {
            scheduler: Scheduler::new(options.clone(), dp_ranks),
            caches: (0..dp_ranks).map(|_| ScriptedCache::new(script.clone())).collect(),
            script,
            sampler: Sampler::default(),
            plan: StepPlan::default(),
            outputs: BTreeMap::new(),
        }
    }

    fn add(&mut self, id: RequestId, request: Request) {
        self.scheduler.add(id, Arc::new(request));
    }

    fn step(&mut self) {
        self.scheduler.plan(&mut self.plan);
        self.scheduler.check();
        let mut results = Vec::new();
        for (sub, cache) in self.plan.sub_plans.iter().zip(&mut self.caches) {
            let mut histories = Vec::new();
            cache.forward(&sub.batch(false), &mut histories);
            let mut logits = vec![0.0; VOCAB];
            let jobs = sub.logit_rows.iter().zip(&sub.jobs).enumerate();
            let rows = jobs.map(|(i, (&row, job))| {
                self.script.fill_logits(histories[row as usize], sub.tokens[row as usize], &mut logits);
                self.sampler.run(i as u32, job, sub.history_of(job), &logits)
            });
            results.push(SubResults { rows: rows.collect(), routing: vec![] });
        }
        self.scheduler.finish_step(&self.plan, &mut results);
        self.scheduler.check();
        self.note_updates();
    }

    fn note_updates(&mut self) {
        let mut updates = Vec::new();
        self.scheduler.take_updates(&mut updates);
        for (id, update) in updates {
            let output = self.outputs.entry(id).or_default();
            assert!(output.finished.is_none(), "request {id} reports after its end");
            match update {
                Update::Admitted => {}
                Update::Event(Event::Prompt(prompt)) => output.scores = prompt.scores,
                Update::Event(Event::Token(event)) => output.tokens.push(event.token),
                Update::Event(Event::Finished(finished)) => output.finished = Some(finished),
            }
        }
    }

    /// Steps until nothing is left; every block must be back.
    fn run(&mut self) {
        let mut steps = 0;
        while !self.scheduler.is_idle() {
            self.step();
            steps += 1;
            assert!(steps < 100_000, "no progress");
        }
        let stats = self.scheduler.stats();
        assert_eq!((stats.running, stats.waiting, stats.kv.used), (0, 0, 0));
    }

    fn finished(&self, id: RequestId) -> &Finished {
        self.outputs[&id].finished.as_ref().expect("the request has ended")
    }
}

/// What one request reports alone, with room for all.
fn alone(request: &Request, rules: FormRules) -> Output {
    let options = EngineOptions {
        kv_blocks: 1000,
        max_num_batched_tokens: 4000,
        prefill_chunk_size: 4000,
        prefix_caching: false,
        form_rules: rules,
        ..options()
    };
    let mut world = World::new(&options, 1);
    world.add(0, request.clone());
    world.run();
    world.outputs.remove(&0).expect("it ran")
}

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
fn prompt_logits_come_in_order_whatever_the_limits() {
    for max_logit_rows in [2, 5, 64] {
        let options = EngineOptions { max_num_seqs: 2, max_logit_rows, ..options() };
        let mut world = World::new(&options, 1);
        let tokens = prompt(0, 37);
        // A cached prefix would hide positions: it must not be read.
        world.add(0, request(tokens.clone(), 1));
        world.run();
        world.add(1, request(prompt(1, 4), 40));
        let capture = Capture { prompt_logits: true, ..Capture::default() };
        world.add(2, Request { capture, ..request(tokens.clone(), 3) });
        world.add(3, Request { capture: Capture { last_logits: true, ..capture }, ..request(vec![5], 0) });
        let last = Capture { last_logits: true, ..Capture::default() };
        world.add(4, Request { capture: last, ..request(tokens.clone(), 0) });
        world.run();

        let rows: Vec<Vec<f32>> = (1..=tokens.len()).map(|n| row_of(&world.script, &tokens[..n])).collect();
        let captured = |id| &world.finished(id).captured.as_ref().expect("logits").logits;
        assert_eq!(captured(2), &rows.concat());
        assert_eq!(captured(3), &row_of(&world.script, &[5]));
        assert_eq!(captured(4), rows.last().unwrap());
        assert_eq!((world.finished(2).cached_tokens, world.finished(4).cached_tokens), (0, 36));
        assert_eq!(world.outputs[&2].tokens, world.script.greedy(&tokens, 3));
    }
}

/// The logits after some prompt tokens.
fn row_of(script: &Script, tokens: &[u32]) -> Vec<f32> {
    let mut logits = vec![0.0; VOCAB];
    script.fill_logits(script.history(tokens, tokens.len()), tokens[tokens.len() - 1], &mut logits);
    logits
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

/// The scores of a prompt are those of its tokens in the rows before them, whatever the chunks; the prefix cache, which
/// has no logits, is not read.
#[test]
fn prompt_scores_are_complete() {
    for (max_logit_rows, len) in [(2, 37), (5, 37), (64, 37), (2, 1)] {
        let options = EngineOptions { max_num_seqs: 2, max_logit_rows, ..options() };
        let mut world = World::new(&options, 1);
        let tokens = prompt(0, len);
        world.add(0, request(tokens.clone(), 1));
        world.run();
        world.add(1, request(prompt(1, 4), 40));
        world.add(2, Request { prompt_logprobs: Some(3), logprobs: Some(1), ..request(tokens.clone(), 2) });
        world.add(3, Request { prompt_logprobs: Some(0), ..request(tokens.clone(), 0) });
        world.run();
        assert_eq!(world.finished(2).cached_tokens, 0);
        for (id, top) in [(2, 3), (3, 0)] {
            let scores = &world.outputs[&id].scores;
            assert_eq!(scores.iter().map(|score| score.token).collect::<Vec<_>>(), tokens[1..]);
            for (i, score) in scores.iter().enumerate() {
                let row = row_of(&world.script, &tokens[..=i]);
                let sum: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
                let expected = f64::from(row[score.token as usize]) - sum.ln();
                assert!((f64::from(score.logprob.unwrap()) - expected).abs() < 1e-5);
                assert_eq!(score.top.len(), top);
            }
        }
    }
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
