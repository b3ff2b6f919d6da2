//! One layer's placement while it is being searched: who is where, and what every rank carries.

use super::scenes::Scenes;

/// Marks an empty slot.
pub const NONE: u32 = u32::MAX;

/// Slots, copies and rank loads, kept in step. Every copy of an expert carries the same share.
#[derive(Debug, Clone, Default)]
pub struct Layout {
    pub ranks: usize,
    pub slots_per_rank: usize,
    pub scenes: usize,
    /// `[ranks][slots_per_rank]`: an expert or [`NONE`].
    pub slots: Vec<u32>,
    /// `[experts]`
    pub copies: Vec<u32>,
    /// `[experts][scenes]`: load of one copy.
    pub shares: Vec<f64>,
    /// `[ranks][scenes]`
    pub loads: Vec<f64>,
    /// `[experts][words]`: a bit per rank that holds the expert.
    hosts: Vec<u64>,
    words: usize,
}

impl Layout {
    /// Empty slots, copies as given.
    pub fn new(scenes: &Scenes, copies: Vec<u32>, ranks: usize, slots_per_rank: usize) -> Self {
        let words = ranks.div_ceil(64);
        let shares = scenes.weights.chunks(scenes.count).zip(&copies);
        let shares = shares.flat_map(|(w, c)| w.iter().map(|w| w / f64::from(*c))).collect();
        Layout {
            ranks,
            slots_per_rank,
            scenes: scenes.count,
            slots: vec![NONE; ranks * slots_per_rank],
            hosts: vec![0; copies.len() * words],
            copies,
            shares,
            loads: vec![0.0; ranks * scenes.count],
            words,
        }
    }

    /// The same map under other scenes.
    pub fn with_scenes(&self, scenes: &Scenes) -> Self {
        let mut layout = Layout::new(scenes, self.copies.clone(), self.ranks, self.slots_per_rank);
        (0..self.slots.len()).filter(|s| self.slots[*s] != NONE).for_each(|s| layout.put(s, self.slots[s]));
        layout
    }

    /// Whether a rank holds an expert.
    pub fn holds(&self, rank: usize, expert: u32) -> bool {
        self.hosts[expert as usize * self.words + rank / 64] >> (rank % 64) & 1 == 1
    }

    /// Load of one copy in each scene.
    pub fn share(&self, expert: u32) -> &[f64] {
        &self.shares[expert as usize * self.scenes..(expert as usize + 1) * self.scenes]
    }

    /// A rank's load in each scene.
    pub fn load(&self, rank: usize) -> &[f64] {
        &self.loads[rank * self.scenes..(rank + 1) * self.scenes]
    }

    /// Puts an expert into an empty slot.
    pub fn put(&mut self, slot: usize, expert: u32) {
        let rank = slot / self.slots_per_rank;
        self.slots[slot] = expert;
        self.hosts[expert as usize * self.words + rank / 64] |= 1 << (rank % 64);
        for t in 0..self.scenes {
            self.loads[rank * self.scenes + t] += self.shares[expert as usize * self.scenes + t];
        }
    }

    /// Empties a slot; returns what it held.
    pub fn take(&mut self, slot: usize) -> u32 {
        let rank = slot / self.slots_per_rank;
        let expert = std::mem::replace(&mut self.slots[slot], NONE);
        self.hosts[expert as usize * self.words + rank / 64] &= !(1 << (rank % 64));
        for t in 0..self.scenes {
            self.loads[rank * self.scenes + t] -= self.shares[expert as usize * self.scenes + t];
        }
        expert
    }

    /// Exchanges what two slots of different ranks hold.
    pub fn swap(&mut self, a: usize, b: usize) {
        let (left, right) = (self.slots[a], self.slots[b]);
        if left != NONE {
            self.take(a);
        }
        if right != NONE {
            self.take(b);
            self.put(a, right);
        }
        if left != NONE {
            self.put(b, left);
        }
    }

    /// The ranks that hold an expert, ascending.
    pub fn hosts(&self, expert: u32) -> impl Iterator<Item = usize> + '_ {
        bits(&self.hosts[expert as usize * self.words..(expert as usize + 1) * self.words])
    }

    /// Gives a slot to another expert or to none; the copies of both experts share their loads anew. The last copy of an
    /// expert stays.
    pub fn replace(&mut self, slot: usize, expert: u32) {
        let old = self.slots[slot];
        if old != NONE {
            self.take(slot);
            self.set_copies(old, self.copies[old as usize] - 1);
        }
        if expert != NONE {
            self.set_copies(expert, self.copies[expert as usize] + 1);
            self.put(slot, expert);
        }
    }

    /// Changes an expert's number of copies, and with it the load of the ranks that hold one now.
    fn set_copies(&mut self, expert: u32, copies: u32) {
        assert!(copies > 0, "expert {expert} would lose its last copy");
        let ratio = f64::from(self.copies[expert as usize]) / f64::from(copies);
        self.copies[expert as usize] = copies;
        let words = expert as usize * self.words..(expert as usize + 1) * self.words;
        for t in 0..self.scenes {
            let share = &mut self.shares[expert as usize * self.scenes + t];
            let more = *share * ratio - *share;
            *share += more;
            bits(&self.hosts[words.clone()]).for_each(|rank| self.loads[rank * self.scenes + t] += more);
        }
    }

    /// Sum over scenes of the largest rank load.
    pub fn cost(&self) -> f64 {
        (0..self.scenes)
            .map(|t| self.loads.iter().skip(t).step_by(self.scenes).copied().fold(0.0, f64::max))
            .sum()
    }

    /// Adds loads up afresh: many moves leave rounding errors behind.
    pub fn refresh(&mut self) {
        self.loads.fill(0.0);
        for slot in 0..self.slots.len() {
            let expert = self.slots[slot];
            if expert != NONE {
                let rank = slot / self.slots_per_rank;
                for t in 0..self.scenes {
                    self.loads[rank * self.scenes + t] += self.shares[expert as usize * self.scenes + t];
                }
            }
        }
    }
}

/// The set bits, ascending.
pub fn bits(words: &[u64]) -> impl Iterator<Item = usize> + '_ {
    words.iter().enumerate().flat_map(|(i, &word)| {
        let mut left = word;
        std::iter::from_fn(move || {
            let bit = left.trailing_zeros() as usize;
            (left != 0).then(|| {
                left &= left - 1;
                i * 64 + bit
            })
        })
    })
}
