//! Models that read a text which they have not seen.

use std::path::Path;

use moeyard::cli::model::OpenModel;

use super::{Setup, World};

/// Passages from the ends of books, which training left out (all in the public domain): King James Bible, Alice's Adventures in
/// Wonderland, Pride and Prejudice, Great Expectations, Moby Dick, Treasure Island.
const HELD_OUT: &str = include_str!("../held_out.txt");

/// Of a model that reads the passages: the mean log-probability of the next token, in nats, and the most likely token at each place.
pub struct Reading {
    pub mean: f64,
    pub best: Vec<usize>,
}

/// Reads them with the model in a folder.
pub fn read(model: &Path, setup: &Setup) -> Reading {
    let tokenizer = OpenModel::open(Some(model)).unwrap().tokenizer;
    let mut world = World::load(model, setup);
    let (mut sum, mut best) = (0.0, Vec::new());
    for passage in HELD_OUT.split("\n\n") {
        let tokens = tokenizer.encode(passage.trim(), true).unwrap();
        let mut sequence = world.sequence(&tokens);
        let logits = world.step(0, &mut [(&mut sequence, tokens.len())]).logits;
        for (logits, &next) in logits.iter().zip(&tokens[1..]) {
            let greatest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let total: f64 = logits.iter().map(|&x| f64::from(x - greatest).exp()).sum();
            sum += f64::from(logits[next as usize] - greatest) - total.ln();
            best.push(logits.iter().position(|&x| x == greatest).unwrap());
        }
    }
    Reading { mean: sum / best.len() as f64, best }
}
