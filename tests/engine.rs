//! The engine from outside, threads included, over the scripted model: streams, refusals, faults and the end.

use moeyard::Error;
use moeyard::backend::Backend;
use moeyard::backend::reference::ReferenceBackend;
use moeyard::engine::plan::StepPlan;
use moeyard::engine::request::{Capture, Event, FinishReason, Finished, Request, Sampling, TokenEvent};
use moeyard::engine::scripted::{Fault, LAYERS, Script, TOP_K, options, setups};
use moeyard::engine::stats::{RequestTiming, StepTiming};
use moeyard::engine::{
    Engine, EngineHandle, EngineOptions, Hooks, RequestStream, StepObserver, TimingObserver,
};
use moeyard::model::StepOutput;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

#[path = "support/patience.rs"]
mod patience;

use patience::{PATIENCE, eventually};

fn request(prompt: Vec<u32>, max_tokens: usize) -> Request {
    Request::greedy(prompt, max_tokens)
}

fn prompt(salt: u32, len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| (i * 7 + salt * 13) % 60).collect()
}

fn backend() -> Arc<dyn Backend> {
    Arc::new(ReferenceBackend)
}

/// An engine of `tp * dp` scripted ranks.
fn start(options: &EngineOptions, (tp, dp): (usize, usize), hooks: Hooks) -> EngineHandle {
    let ranks = setups(&Script::of(options), tp, dp, options.max_logit_rows, &backend()).unwrap();
    Engine::start(ranks, options.clone(), hooks).unwrap()
}

/// Reads a stream to its end.
fn collect(mut stream: RequestStream) -> (Vec<TokenEvent>, Finished) {
    let mut tokens = Vec::new();
    while let Some(event) = stream.blocking_next() {
        match event {
            Event::Prompt(_) => {}
            Event::Token(token) => tokens.push(token),
            Event::Finished(finished) => {
                assert!(stream.blocking_next().is_none(), "an event after the end");
                return (tokens, finished);
            }
        }
    }
    panic!("a stream without an end");
}

fn ids(tokens: &[TokenEvent]) -> Vec<u32> {
    tokens.iter().map(|event| event.token).collect()
}

/// Holds every step back until the gate opens, so that a test decides what happens during a step.
#[derive(Default)]
struct Gate {
    open: Mutex<bool>,
    changed: Condvar,
    /// Steps that have reached the gate.
    reached: Mutex<u64>,
}

impl Gate {
    fn hooks(self: &Arc<Self>) -> Hooks {
        Hooks { steps: Some(Arc::clone(self) as Arc<dyn StepObserver>), ..Hooks::default() }
    }

    fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.changed.notify_all();
    }

    /// Waits until a step is held back.
    fn wait_reached(&self) {
        let reached = self.reached.lock().unwrap();
        drop(self.changed.wait_while(reached, |reached| *reached == 0).unwrap());
    }
}

impl StepObserver for Gate {
    fn wants_routing(&self) -> bool {
        false
    }

    fn on_step(&self, _: &StepPlan, _: usize, _: usize, _: &StepOutput, _: Duration) {
        *self.reached.lock().unwrap() += 1;
        self.changed.notify_all();
        let open = self.open.lock().unwrap();
        drop(self.changed.wait_while(open, |open| !*open).unwrap());
    }
}

#[test]
fn many_requests_over_any_ranks_follow_the_script() {
    for ranks in [(1, 1), (3, 1), (1, 2), (2, 3)] {
        let options = options();
        let engine = start(&options, ranks, Hooks::default());
        let script = Script::of(&options);
        let sent: Vec<_> = (0..30)
            .map(|i| request(prompt(i % 5, 1 + i as usize * 3 % 40), 1 + i as usize % 17))
            .map(|request| (request.clone(), engine.submit(request).unwrap()))
            .collect();
        for (request, stream) in sent {
            let (tokens, finished) = collect(stream);
            assert_eq!(ids(&tokens), script.greedy(&request.prompt, request.max_tokens), "{ranks:?}");
            assert_eq!(finished.reason, FinishReason::Length);
        }
        let stats = engine.stats();
        assert_eq!((stats.running, stats.waiting, stats.kv.used), (0, 0, 0));
        assert_eq!(stats.outcomes.length, 30);
        assert_eq!(stats.kv.free + stats.kv.cached, options.kv_blocks * ranks.1);
        engine.shutdown(Duration::ZERO);
        assert!(!engine.is_alive());
    }
}

#[test]
fn threads_may_submit_at_once() {
    let options = EngineOptions { max_waiting: 1000, kv_blocks: 40, ..options() };
    let engine = start(&options, (1, 2), Hooks::default());
    let script = Script::of(&options);
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let (engine, script) = (&engine, &script);
            scope.spawn(move || {
                for i in 0..20 {
                    let prompt = prompt(thread, 1 + i * 2);
                    let stream = engine.submit(request(prompt.clone(), 12)).unwrap();
                    assert_eq!(ids(&collect(stream).0), script.greedy(&prompt, 12));
                }
            });
        }
    });
    let stats = engine.stats();
    assert_eq!((stats.outcomes.length, stats.kv.used, stats.waiting), (160, 0, 0));
}

#[test]
fn a_seed_gives_the_same_text_in_any_company() {
    let engine = start(&options(), (1, 1), Hooks::default());
    let sampling = Sampling { temperature: 1.0, top_p: 0.9, top_k: 20, seed: 77, ..Sampling::GREEDY };
    let sampled = Request { sampling, logprobs: Some(3), ..request(prompt(0, 9), 20) };
    let (alone, _) = collect(engine.submit(sampled.clone()).unwrap());
    let streams: Vec<_> = (0..6)
        .map(|i| engine.submit(if i == 3 { sampled.clone() } else { request(prompt(i, 30), 25) }).unwrap())
        .collect();
    let outputs: Vec<_> = streams.into_iter().map(collect).collect();
    assert_eq!(outputs[3].0, alone);
    for event in &alone {
        assert_eq!(event.top.len(), 3);
        assert!(event.logprob.unwrap() <= event.top[0].1);
    }
}

#[tokio::test]
async fn streams_are_async_too() {
    use tokio_stream::StreamExt;
    let engine = start(&options(), (1, 1), Hooks::default());
    let events: Vec<Event> = engine.submit(request(prompt(0, 5), 4)).unwrap().collect().await;
    assert_eq!(events.len(), 6);
    assert!(matches!(events[0], Event::Prompt(_)) && matches!(events[5], Event::Finished(_)));
    let mut stream = engine.submit(request(prompt(0, 5), 0)).unwrap();
    assert!(matches!(stream.next().await, Some(Event::Prompt(_))));
    assert!(matches!(stream.next().await, Some(Event::Finished(_))));
    assert!(stream.next().await.is_none());
}

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
    let options = EngineOptions { step_timeout: Duration::from_secs(1), ..options() };
    let script = Script::of(&options);
    let mut ranks = setups(&script, 2, 1, options.max_logit_rows, &backend()).unwrap();
    let hanging = Script { fault: Fault::HangAt(5), ..script };
    ranks[1] = setups(&hanging, 2, 1, options.max_logit_rows, &backend()).unwrap().remove(1);
    let engine = Engine::start(ranks, options, Hooks::default()).unwrap();
    let streams = engine.submit_all((0..3).map(|i| request(prompt(i, 8), 50)).collect()).unwrap();
    for stream in streams {
        let FinishReason::Error(why) = collect(stream).1.reason else { panic!("no error") };
        assert!(why.contains("ranks [1] have not answered"), "{why}");
    }
    assert!(!engine.is_alive());
    assert!(engine.shutdown_within(Duration::ZERO, PATIENCE), "the engine thread does end");
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

#[test]
fn routing_is_captured_for_every_position() {
    let options = EngineOptions { kv_blocks: 12, ..options() };
    let script = Script::of(&options);
    for ranks in [(1, 1), (3, 1), (2, 2)] {
        let engine = start(&options, ranks, Hooks::default());
        let tokens = prompt(0, 15);
        // Leaves a prefix in the cache that must not be read, and then competes for blocks.
        collect(engine.submit(request(tokens.clone(), 1)).unwrap());
        let company: Vec<_> = (1..5).map(|i| engine.submit(request(prompt(i, 9), 20)).unwrap()).collect();
        let capture = Capture { routing: true, ..Capture::default() };
        let (generated, finished) =
            collect(engine.submit(Request { capture, ..request(tokens.clone(), 15) }).unwrap());
        company.into_iter().for_each(|stream| drop(collect(stream)));

        assert_eq!(finished.cached_tokens, 0);
        let mut sequence = tokens.clone();
        sequence.extend(ids(&generated));
        let positions = sequence.len() - 1;
        let routing = finished.captured.expect("captured").routing;
        assert_eq!((routing.rows, routing.top_k, routing.first_row), (positions, TOP_K, 0));
        let mut expected = Vec::new();
        for layer in 0..LAYERS {
            for n in 1..=positions {
                expected.extend(Script::experts(script.history(&sequence[..n], tokens.len()), layer));
            }
        }
        assert_eq!(routing.ids, expected, "{ranks:?}");
        assert_eq!(routing.weights.len(), expected.len());
    }
}

/// Counts what it is told.
#[derive(Default)]
struct Tally {
    rows: Mutex<usize>,
    planned_rows: Mutex<usize>,
    step_rows: Mutex<usize>,
    first_tokens: Mutex<usize>,
    next_tokens: Mutex<usize>,
    finished: Mutex<Vec<RequestTiming>>,
}

impl StepObserver for Tally {
    fn on_step(&self, plan: &StepPlan, rank: usize, dp_rank: usize, output: &StepOutput, _: Duration) {
        *self.rows.lock().unwrap() += output.routing.rows;
        if rank.is_multiple_of(2) {
            *self.planned_rows.lock().unwrap() += plan.sub_plans[dp_rank].rows();
        }
    }
}

impl TimingObserver for Tally {
    fn on_step(&self, timing: &StepTiming) {
        *self.step_rows.lock().unwrap() += timing.prefill_rows + timing.decode_rows;
    }
    fn on_first_token(&self, _: Duration) {
        *self.first_tokens.lock().unwrap() += 1;
    }
    fn on_next_token(&self, _: Duration) {
        *self.next_tokens.lock().unwrap() += 1;
    }
    fn on_finish(&self, timing: &RequestTiming) {
        self.finished.lock().unwrap().push(timing.clone());
    }
}

#[test]
fn observers_see_every_row_and_every_request() {
    let tally = Arc::new(Tally::default());
    let hooks = Hooks { steps: Some(tally.clone()), timing: Some(tally.clone()), ..Hooks::default() };
    let options = EngineOptions { prefix_caching: false, ..options() };
    let engine = start(&options, (2, 2), hooks);
    let streams: Vec<_> = (0..6).map(|i| engine.submit(request(prompt(i, 10), 5)).unwrap()).collect();
    streams.into_iter().for_each(|stream| drop(collect(stream)));
    engine.shutdown(Duration::ZERO);
    // 10 prompt tokens and 4 of the 5 generated ones are computed.
    let computed = 6 * 14;
    assert_eq!(*tally.rows.lock().unwrap(), computed, "each row has one owner");
    assert_eq!(*tally.planned_rows.lock().unwrap(), computed);
    assert_eq!(*tally.step_rows.lock().unwrap(), computed);
    assert_eq!((*tally.first_tokens.lock().unwrap(), *tally.next_tokens.lock().unwrap()), (6, 24));
    let finished = tally.finished.lock().unwrap();
    assert_eq!(finished.len(), 6);
    for timing in finished.iter() {
        assert_eq!((timing.prompt_tokens, timing.generated_tokens), (10, 5));
        assert!(timing.queue.unwrap() + timing.prefill.unwrap() + timing.decode.unwrap() <= timing.total);
    }
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
