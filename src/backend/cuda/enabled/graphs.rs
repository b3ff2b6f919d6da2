//! Sequences of launches that came before, and the graphs that are kept of them. Pure: what a graph is, is the caller's affair.

use std::collections::{HashMap, VecDeque};

use crate::backend::StepCounts;

/// Graphs that are kept: those of more batch sizes than a server has that is neither filling up nor running dry. A step of one rank has
/// one for some hundred launches, one of several ranks some for each layer.
const KEPT: usize = 2048;
/// Sequences that are remembered to have come once.
const REMEMBERED: usize = 2048;
/// Graphs are a matter of speed alone: after as many failures none is tried again.
const FAILURES: usize = 4;

/// Graphs of sequences that came at least twice, by their fingerprints. A sequence is given as its words; that of a graph has the same
/// ones, all of them.
pub struct Graphs<G> {
    kept: HashMap<u64, Kept<G>>,
    room: usize,
    once: VecDeque<u64>,
    /// Sequences so far.
    now: u64,
    failures: usize,
    counts: StepCounts,
}

struct Kept<G> {
    words: Vec<u64>,
    graph: G,
    /// When its sequence came last.
    used: u64,
}

impl<G> Default for Graphs<G> {
    fn default() -> Self {
        Graphs::with_room(KEPT)
    }
}

impl<G> Graphs<G> {
    fn with_room(room: usize) -> Self {
        Graphs {
            kept: HashMap::new(),
            room,
            once: VecDeque::new(),
            now: 0,
            failures: 0,
            counts: StepCounts::default(),
        }
    }

    pub fn counts(&self) -> StepCounts {
        self.counts
    }

    /// The graph of a sequence that has come, where there is one; it will be replayed.
    pub fn find(&mut self, words: &[u64]) -> Option<&G> {
        self.now += 1;
        let kept = self.kept.get_mut(&fingerprint(words)).filter(|kept| kept.words == words)?;
        kept.used = self.now;
        self.counts.replayed += 1;
        Some(&kept.graph)
    }

    /// Whether a sequence without a graph is better captured than run: it came before, and there is room, made by the graph unused for
    /// longest if need be. One that is in use stays: a step with more graphs than there is room for would drop each before it comes again.
    pub fn wants(&mut self, words: &[u64]) -> bool {
        if self.failures >= FAILURES {
            return false;
        }
        let fingerprint = fingerprint(words);
        if let Some(at) = self.once.iter().position(|&other| other == fingerprint) {
            self.once.remove(at);
            return self.make_room();
        }
        if self.once.len() == REMEMBERED {
            self.once.pop_front();
        }
        self.once.push_back(fingerprint);
        false
    }

    fn make_room(&mut self) -> bool {
        if self.kept.len() < self.room {
            return true;
        }
        let oldest = self.kept.iter().min_by_key(|(_, kept)| kept.used);
        let Some((&fingerprint, Kept { used, .. })) = oldest else { return false };
        let unused = self.now - used > 2 * self.room as u64;
        if unused {
            self.kept.remove(&fingerprint);
        }
        unused
    }

    /// Keeps the graph of a sequence and hands it back; it will be replayed.
    pub fn keep(&mut self, words: &[u64], graph: G) -> &G {
        self.counts.captured += 1;
        self.counts.replayed += 1;
        let fingerprint = fingerprint(words);
        self.kept.insert(fingerprint, Kept { words: words.to_vec(), graph, used: self.now });
        &self.kept[&fingerprint].graph
    }

    /// Graphs that are kept.
    pub fn len(&self) -> usize {
        self.kept.len()
    }

    /// A graph could not be made.
    pub fn count_failure(&mut self) {
        self.failures += 1;
    }

    /// A sequence ran launch by launch.
    pub fn count_run(&mut self) {
        self.counts.run += 1;
    }
}

/// A number that other sequences hardly share: FxHash over the words.
fn fingerprint(words: &[u64]) -> u64 {
    let mix = |hash: u64, &word: &u64| (hash.rotate_left(5) ^ word).wrapping_mul(0x517c_c1b7_2722_0a95);
    words.iter().fold(0, mix)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What becomes of a sequence that comes; graphs are its first word.
    fn come(graphs: &mut Graphs<u64>, words: &[u64]) -> &'static str {
        if let Some(&graph) = graphs.find(words) {
            assert_eq!(graph, words[0]);
            "replayed"
        } else if graphs.wants(words) {
            assert_eq!(*graphs.keep(words, words[0]), words[0]);
            "captured"
        } else {
            graphs.count_run();
            "run"
        }
    }

    #[test]
    fn what_comes_again_is_replayed() {
        let mut graphs = Graphs::default();
        let found: Vec<_> = [1, 2, 1, 1, 2, 3, 2].map(|n| come(&mut graphs, &[n, 7])).into();
        assert_eq!(found, ["run", "run", "captured", "replayed", "captured", "run", "replayed"]);
        assert_eq!(graphs.counts(), StepCounts { run: 3, replayed: 4, captured: 2 });
        // Every word counts.
        assert_eq!(come(&mut graphs, &[1, 8]), "run");
        assert_eq!(come(&mut graphs, &[1]), "run");
    }

    #[test]
    fn room_is_made_by_what_is_no_longer_used() {
        let mut graphs = Graphs::with_room(3);
        let round = |graphs: &mut Graphs<u64>, of: std::ops::Range<u64>| -> Vec<&str> {
            of.map(|n| come(graphs, &[n])).collect()
        };
        round(&mut graphs, 0..3);
        assert_eq!(round(&mut graphs, 0..3), ["captured"; 3]);
        // More than there is room for, again and again: those that have a graph keep it.
        for again in 0..6 {
            assert_eq!(
                round(&mut graphs, 0..5),
                ["replayed", "replayed", "replayed", "run", "run"],
                "{again}"
            );
        }
        // They no longer come: the others get theirs, one after the other.
        for _ in 0..8 {
            round(&mut graphs, 10..12);
        }
        assert_eq!(round(&mut graphs, 10..12), ["replayed"; 2]);
        assert_eq!(graphs.len(), 3);
    }

    #[test]
    fn failures_end_the_attempts() {
        let mut graphs = Graphs::<u64>::default();
        for n in 0..FAILURES as u64 {
            assert!(!graphs.wants(&[n]) && graphs.wants(&[n]));
            graphs.count_failure();
        }
        assert!(!graphs.wants(&[9]) && !graphs.wants(&[9]));
    }

    #[test]
    fn few_sequences_are_remembered() {
        let mut graphs = Graphs::<u64>::default();
        (0..=REMEMBERED as u64).for_each(|n| assert!(!graphs.wants(&[n])));
        assert!(!graphs.wants(&[0]), "forgotten");
        assert!(graphs.wants(&[REMEMBERED as u64]));
    }
}
