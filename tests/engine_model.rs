//! What the engine does with its cache leaves the bits: a prompt served from cached blocks, and a sequence computed again
//! after a preemption, report the same tokens and log-probabilities as one that ran alone.

mod support;

use moeyard::config::RawOptions;
use moeyard::config::flags::DtypeChoice;
use moeyard::config::size::ByteSize;
use support::launch::{Launch, greedy, options};

const MODELS: &[&str] = &["mixtral", "deepseek_v3", "demo-mixtral", "demo-deepseek"];
const DTYPES: [DtypeChoice; 2] = [DtypeChoice::F32, DtypeChoice::Bf16];

fn prompt(salt: u32, len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| (i * 37 + salt * 101 + i * i * salt) % 500).collect()
}

/// `raw` without reuse of prefixes: the slow reference.
fn uncached(raw: RawOptions) -> RawOptions {
    RawOptions { no_prefix_caching: Some(true), ..raw }
}

#[test]
fn a_cached_prefix_leaves_the_bits() {
    for (model, dtype) in MODELS.iter().flat_map(|model| DTYPES.map(|dtype| (model, dtype))) {
        let what = format!("{model} {dtype:?}");
        let tokens = prompt(1, 75);
        let plain = Launch::of(model, uncached(options(dtype)));
        let cached = Launch::of(model, options(dtype));

        let expected = plain.run(vec![greedy(&tokens, 16)]).remove(0);
        let first = cached.run(vec![greedy(&tokens, 16)]).remove(0);
        let second = cached.run(vec![greedy(&tokens, 16)]).remove(0);
        assert_eq!(expected.finished.cached_tokens, 0, "{what}");
        assert_eq!(first.finished.cached_tokens, 0, "{what}");
        assert_eq!(second.finished.cached_tokens, 64, "{what}: four blocks of 16");
        assert_eq!(first.bits(), expected.bits(), "{what}: the first");
        assert_eq!(second.bits(), expected.bits(), "{what}: the second, from the cache");

        // The next turn of a conversation: what was generated is part of the prompt now.
        let mut next = tokens.clone();
        next.extend(first.ids());
        next.extend(prompt(2, 9));
        let expected = plain.run(vec![greedy(&next, 8)]).remove(0);
        let found = cached.run(vec![greedy(&next, 8)]).remove(0);
        assert!(found.finished.cached_tokens >= 64, "{what}: {}", found.finished.cached_tokens);
        assert_eq!(found.bits(), expected.bits(), "{what}: the next turn");
        plain.finish();
        cached.finish();
    }
}

#[test]
fn a_preemption_leaves_tokens_and_bits() {
    for (model, dtype) in MODELS.iter().flat_map(|model| DTYPES.map(|dtype| (model, dtype))) {
        let requests: Vec<_> = (0..5).map(|i| greedy(&prompt(i, 20 + 5 * i as usize), 32)).collect();
        let roomy = Launch::of(model, uncached(options(dtype)));
        // A sequence fits by itself, but not the five of them.
        let blocks = ByteSize(9 * roomy.prepared.footprint.kv_block);
        let small = RawOptions { kv_cache_memory: Some(blocks), max_model_len: Some(96), ..options(dtype) };
        for raw in [small.clone(), uncached(small)] {
            let what = format!("{model} {dtype:?} caching off: {:?}", raw.no_prefix_caching);
            let tight = Launch::of(model, raw);
            for (expected, found) in roomy.run(requests.clone()).iter().zip(tight.run(requests.clone())) {
                assert_eq!(found.bits(), expected.bits(), "{what}");
            }
            assert_eq!(roomy.stats().preemptions, 0, "{what}");
            assert!(tight.stats().preemptions > 0, "{what}: nothing was preempted");
            assert!(tight.stats().recomputed_tokens > 0, "{what}");
            tight.finish();
        }
        roomy.finish();
    }
}
