//! A short run of the fuzz targets on stable Rust: the bodies of fuzz/fuzz_targets over their corpus and over seeded
//! mutations of it. The real thing is `cargo +nightly fuzz run TARGET`.

#[path = "../fuzz/bodies.rs"]
mod bodies;

use std::fs;
use std::path::Path;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// The files of a target's corpus.
fn corpus(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut files: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 3, "{} files in {}", files.len(), folder.display());
    files.iter().map(|file| fs::read(file).unwrap()).collect()
}

/// Values at which sizes and offsets go wrong.
const NUMBERS: &[u64] =
    &[0, 1, 7, 8, 127, 128, 255, 65_535, 1 << 31, (1 << 32) - 1, 1 << 62, 1 << 63, u64::MAX];
/// Pieces of text at which parsers go wrong.
const PIECES: &[&str] = &[
    "\"",
    "\\",
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "null",
    "-1",
    "1e999",
    "NaN",
    "18446744073709551616",
    "\\ud800",
    "\u{0}",
    "{{",
    "}}",
    "{%",
    "%}",
    "{% for a in messages %}",
    "{{ messages[-1] }}",
    "\u{feff}",
    "\u{10ffff}",
    "[[[[[[[[",
];

struct Mutator(ChaCha8Rng);

impl Mutator {
    fn below(&mut self, n: usize) -> usize {
        (self.0.next_u64() % n.max(1) as u64) as usize
    }

    /// One to four changes of one of the corpus' files, with parts of the others.
    fn mutate(&mut self, corpus: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = corpus[self.below(corpus.len())].clone();
        for _ in 0..1 + self.below(4) {
            let at = self.below(bytes.len() + 1);
            let end = (at + self.below(32)).min(bytes.len());
            match self.below(8) {
                0 if at < bytes.len() => bytes[at] ^= 1 << self.below(8),
                1 if at < bytes.len() => bytes[at] = self.0.next_u64() as u8,
                2 => bytes.truncate(at),
                3 => drop(bytes.drain(at..end)),
                4 => {
                    let part = bytes[at..end].to_vec();
                    bytes.splice(at..at, part);
                }
                5 => {
                    let other = &corpus[self.below(corpus.len())];
                    let from = self.below(other.len() + 1);
                    let part = other[from..(from + self.below(64)).min(other.len())].to_vec();
                    bytes.splice(at..end, part);
                }
                6 => {
                    let number = NUMBERS[self.below(NUMBERS.len())].to_le_bytes();
                    let width = [1, 2, 4, 8][self.below(4)];
                    bytes.splice(at..(at + width).min(bytes.len()), number[..width].to_vec());
                }
                _ => drop(bytes.splice(at..at, PIECES[self.below(PIECES.len())].bytes())),
            }
        }
        bytes
    }
}

/// Runs a body over everything, and names the input of a panic.
fn run(target: &str, body: fn(&[u8]), mutations: usize) {
    let corpus = corpus(target);
    let mut mutator = Mutator(ChaCha8Rng::seed_from_u64(20_261_126));
    let mutated = (0..mutations).map(|_| mutator.mutate(&corpus)).collect::<Vec<_>>();
    for input in corpus.iter().chain(&mutated) {
        let outcome = std::panic::catch_unwind(|| body(input));
        assert!(outcome.is_ok(), "{target} panics on {}", input.escape_ascii());
    }
}

#[test]
fn completion_requests() {
    run("request", bodies::request, 20_000);
}

#[test]
fn safetensors_headers() {
    run("safetensors", bodies::safetensors, 20_000);
}

#[test]
fn routing_traces() {
    run("trace", bodies::trace, 20_000);
}

#[test]
fn conversations_and_chat_templates() {
    run("chat", bodies::chat, 1000);
}
