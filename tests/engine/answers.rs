//! What comes out: the tokens of the script, whatever the ranks, the company and the threads.

use std::time::Duration;

use moeyard::engine::request::{Capture, Event, FinishReason, Request, Sampling};
use moeyard::engine::scripted::{LAYERS, Script, TOP_K, options};
use moeyard::engine::{EngineOptions, Hooks};

use crate::{collect, ids, prompt, request, start};

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

/// A device draws what the host draws, which a request that asks for log-probabilities makes it do.
#[test]
fn a_text_does_not_depend_on_who_samples() {
    let engine = start(&options(), (1, 2), Hooks::default());
    let warm = Sampling { temperature: 1.3, ..Sampling::GREEDY };
    for (i, sampling) in [
        Sampling::GREEDY,
        warm.clone(),
        Sampling { top_k: 7, ..warm.clone() },
        Sampling { top_p: 0.8, ..warm.clone() },
        Sampling { min_p: 0.1, ..warm.clone() },
        Sampling { top_k: 300, top_p: 0.95, min_p: 0.01, ..warm },
    ]
    .into_iter()
    .enumerate()
    {
        let streams: Vec<_> = (0..6u32)
            .map(|n| {
                let sampling = Sampling { seed: n.into(), ..sampling.clone() };
                let request = Request { sampling, ..request(prompt(n, 9 + i), 20) };
                let on_host = Request { logprobs: Some(0), ..request.clone() };
                [request, on_host].map(|request| engine.submit(request).unwrap())
            })
            .collect();
        for (n, [on_device, on_host]) in streams.into_iter().enumerate() {
            let (on_device, on_host) = (collect(on_device).0, collect(on_host).0);
            assert_eq!(ids(&on_device), ids(&on_host), "{sampling:?}, seed {n}");
            assert!(on_device.iter().all(|event| event.logprob.is_none()));
            assert!(on_host.iter().all(|event| event.logprob.is_some()));
        }
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
