//! The load of the latest steps, in parts.

use std::collections::VecDeque;

use crate::Result;
use crate::load::LoadWindow;

/// Load over consecutive steps.
#[derive(Debug, Clone)]
pub struct Part {
    /// The first of its steps.
    pub first_step: u64,
    /// How many.
    pub steps: u64,
    /// Their load.
    pub load: LoadWindow,
}

/// One part after another, out of counts that only grow.
#[derive(Debug, Clone)]
pub struct Window {
    /// Oldest first, at most `limit`.
    parts: VecDeque<Part>,
    limit: usize,
    part_steps: u64,
    /// Steps since the last part ended.
    open_steps: u64,
    /// The counts when it ended.
    seen: LoadWindow,
}

impl Window {
    /// `seen` are the counts so far.
    pub fn new(limit: usize, part_steps: u64, seen: LoadWindow) -> Self {
        Window { parts: VecDeque::new(), limit, part_steps, open_steps: 0, seen }
    }

    /// MoE layers.
    pub fn layers(&self) -> usize {
        self.seen.layers()
    }

    /// A step has run; true when its part is full.
    pub fn count_step(&mut self) -> bool {
        self.open_steps += 1;
        self.is_full()
    }

    /// The part under way has all its steps.
    pub fn is_full(&self) -> bool {
        self.open_steps >= self.part_steps
    }

    /// The part under way ends before `step`, at these counts.
    pub fn end_part(&mut self, step: u64, counts: &LoadWindow) {
        let part = self.open_part(step, counts);
        self.seen.clone_from(counts);
        self.open_steps = 0;
        if self.parts.len() >= self.limit {
            self.parts.pop_front();
        }
        self.parts.push_back(part);
    }

    /// The newest parts, as many as the window has, the one under way included when it has begun; oldest first.
    pub fn parts(&self, step: u64, counts: &LoadWindow) -> Vec<Part> {
        let open = (self.open_steps > 0).then(|| self.open_part(step, counts));
        let ended = self.limit - usize::from(open.is_some());
        let skipped = self.parts.len().saturating_sub(ended);
        self.parts.iter().skip(skipped).cloned().chain(open).collect()
    }

    fn open_part(&self, step: u64, counts: &LoadWindow) -> Part {
        Part { first_step: step - self.open_steps, steps: self.open_steps, load: counts.since(&self.seen) }
    }
}

/// Consecutive parts as one.
pub fn joined(parts: &[Part]) -> Result<Option<Part>> {
    let Some((first, rest)) = parts.split_first() else { return Ok(None) };
    let mut all = first.clone();
    for part in rest {
        all.steps += part.steps;
        all.load.merge(&part.load)?;
    }
    Ok(Some(all))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::Phase;

    #[test]
    fn parts_are_what_was_added_between_their_ends() {
        let mut counts = LoadWindow::new(&[3], 2);
        let mut window = Window::new(2, 3, counts.clone());
        let sums = |parts: Vec<Part>| -> Vec<(u64, u64, u64)> {
            parts.iter().map(|p| (p.first_step, p.steps, p.load.totals(0).sum())).collect()
        };
        assert!(window.parts(0, &counts).is_empty());
        for step in 1..=10 {
            counts.add(Phase::Decode, 0, &[step as u32, 0]);
            if window.count_step() {
                window.end_part(step, &counts);
            }
            match step {
                2 => assert_eq!(sums(window.parts(step, &counts)), [(0, 2, 1 + 2)]),
                3 => assert_eq!(sums(window.parts(step, &counts)), [(0, 3, 6)]),
                5 => assert_eq!(sums(window.parts(step, &counts)), [(0, 3, 6), (3, 2, 4 + 5)]),
                6 => assert_eq!(sums(window.parts(step, &counts)), [(0, 3, 6), (3, 3, 15)]),
                10 => assert_eq!(sums(window.parts(step, &counts)), [(6, 3, 7 + 8 + 9), (9, 1, 10)]),
                _ => {}
            }
        }
        let all = joined(&window.parts(10, &counts)).unwrap().unwrap();
        assert_eq!((all.first_step, all.steps, all.load.totals(0).sum::<u64>()), (6, 4, 34));
        assert!(joined(&[]).unwrap().is_none());
    }
}
