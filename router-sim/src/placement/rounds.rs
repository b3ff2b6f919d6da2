//! A change of placement in rounds: each copies a few experts' weights beside the serving ones and ends in a valid
//! placement, so that memory for few weights suffices and serving never waits for all of them.
//!
//! In a round, weights *arrive* in staging places of their ranks. When all have, the round's placement comes into force
//! at once: the weights in staging take their slots, what they replace becomes the next round's staging. Experts that a rank
//! holds already change slots by exchanging pointers. So per rank and layer, a round's placement holds nothing but what
//! was there before and what arrived.
//!
//! An expert whose only copy gives way must arrive elsewhere in the same round. Where only copies wait for each other's
//! slots in a circle, the whole circle arrives together. Some circle passes each rank once: one that passes a rank twice is
//! two, because on a rank any arrival may take any place that becomes free. One staging place per rank is therefore enough for
//! any change, and no weights ever travel twice.

use super::{EMPTY, LayerPlacement, Placement};

/// An expert's weights are copied into a staging place of the rank of `slot`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arrival {
    /// MoE layer, counted from 0.
    pub layer: usize,
    /// The slot that they have in the round's placement.
    pub slot: usize,
    /// Whose weights.
    pub expert: usize,
    /// A slot that holds them until the round ends.
    pub source_slot: usize,
}

/// Arrivals, and the placement that is in force once all of them are there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Round {
    /// By layer and slot. Empty where experts only change slots on their ranks.
    pub arrivals: Vec<Arrival>,
    /// Its version is one more than that of the round before.
    pub placement: Placement,
}

/// What a round may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RoundLimits {
    /// Arrivals per rank and round, over all layers; at least 1.
    pub staging_per_rank: usize,
    /// Consecutive ranks that make a node: a source on the own node comes before others. At least 1.
    pub ranks_per_node: usize,
}

/// The rounds of a change, made one at a time; see [`rounds`].
#[derive(Debug, Clone)]
pub struct Rounds {
    current: Placement,
    target: Placement,
    limits: RoundLimits,
    /// Layers that differ, those that win most per arrival first.
    order: Vec<usize>,
    arrivals_left: usize,
}

/// How many experts each rank must receive for a layer's change: those that its target holds there once more than it does.
/// Unlike [`transfers`](super::transfers), a second copy on one rank counts. `[ranks]`
pub fn arrivals(current: LayerPlacement<'_>, target: LayerPlacement<'_>) -> Vec<usize> {
    Differences::of(current, target).needs.iter().map(Vec::len).collect()
}

/// The rounds that lead from one placement to another of the same layers, experts, ranks and slots. `gains` is what each
/// layer wins by the change, in any unit, `[layers]`: layers with most gain per arrival go first. The last round's
/// placement has the target's map; what arrives in all is, on every rank, what the target holds there and the current
/// placement does not.
///
/// # Panics
/// When the shapes differ, or a limit is 0.
pub fn rounds(current: &Placement, target: &Placement, gains: &[f64], limits: RoundLimits) -> Rounds {
    assert_eq!(current.layer_ids(), target.layer_ids(), "layers of two placements");
    assert_eq!(
        (current.ranks(), current.slots(), current.experts()),
        (target.ranks(), target.slots(), target.experts()),
        "ranks, slots and experts of two placements"
    );
    assert_eq!(gains.len(), current.layers(), "one gain per layer");
    assert!(
        limits.staging_per_rank > 0 && limits.ranks_per_node > 0,
        "{limits:?}: rounds need at least one staging place per rank and one rank per node"
    );
    let received = |layer| arrivals(current.layer(layer), target.layer(layer)).iter().sum();
    let arrivals: Vec<usize> = (0..current.layers()).map(received).collect();
    let differs = |layer: &usize| current.layer(*layer).slots() != target.layer(*layer).slots();
    let mut order: Vec<usize> = (0..current.layers()).filter(differs).collect();
    // What needs no arrival costs nothing and goes at once.
    let worth = |layer: usize| match arrivals[layer] {
        0 => f64::INFINITY,
        n => gains[layer] / n as f64,
    };
    order.sort_by(|a, b| worth(*b).total_cmp(&worth(*a)).then(a.cmp(b)));
    Rounds {
        current: current.clone(),
        target: target.clone(),
        limits,
        order,
        arrivals_left: arrivals.iter().sum(),
    }
}

impl Rounds {
    /// Arrivals of the rounds that are still to come.
    pub fn arrivals_left(&self) -> usize {
        self.arrivals_left
    }

    /// Layers whose maps are not yet the target's.
    pub fn layers_left(&self) -> usize {
        self.order.len()
    }

    /// Where all rounds lead.
    pub fn target(&self) -> &Placement {
        &self.target
    }
}

impl Iterator for Rounds {
    type Item = Round;

    fn next(&mut self) -> Option<Round> {
        let first = *self.order.first()?;
        let mut room = vec![self.limits.staging_per_rank; self.current.ranks()];
        let mut arrivals = Vec::new();
        let mut changed = Vec::new();
        let mut unfinished = Vec::new();
        for &layer in &self.order {
            let (current, target) = (self.current.layer(layer), self.target.layer(layer));
            let mut differences = Differences::of(current, target);
            if differences.needs() == 0 || room.iter().any(|&places| places > 0) {
                differences.fill(&mut room);
            }
            let finished = differences.needs() == 0;
            assert!(
                layer != first || finished || !differences.taken.is_empty(),
                "layer {layer} is stuck with {} arrivals to go",
                differences.needs()
            );
            let mut slots = if finished { target.slots().to_vec() } else { current.slots().to_vec() };
            for &Taken { need, freed } in &differences.taken {
                let slot = if finished { need.slot } else { freed };
                slots[slot] = need.expert as i32;
                arrivals.push(Arrival { layer, slot, expert: need.expert, source_slot: usize::MAX });
            }
            if finished || !differences.taken.is_empty() {
                changed.push((layer, slots));
            }
            if !finished {
                unfinished.push(layer);
            }
        }
        arrivals.sort_by_key(|arrival| (arrival.layer, arrival.slot));
        choose_sources(&mut arrivals, &self.current, self.limits.ranks_per_node);
        let placement = self.current.with_layers(changed).expect("every expert keeps a slot");
        self.current = placement.with_version(self.current.version() + 1);
        self.order = unfinished;
        self.arrivals_left -= arrivals.len();
        Some(Round { arrivals, placement: self.current.clone() })
    }
}

/// Gives every arrival a slot to copy from: on the same rank, else on its node, else anywhere; among equally near ones,
/// on the rank that has sent least in this round.
fn choose_sources(arrivals: &mut [Arrival], before: &Placement, ranks_per_node: usize) {
    let mut sent = vec![0usize; before.ranks()];
    for arrival in arrivals {
        let layer = before.layer(arrival.layer);
        let rank = layer.rank_of(arrival.slot);
        let cost = |slot: &usize| {
            let source = layer.rank_of(*slot);
            (source != rank, source / ranks_per_node != rank / ranks_per_node, sent[source], *slot)
        };
        let held = layer.replicas(arrival.expert).iter().map(|&slot| slot as usize);
        arrival.source_slot = held.min_by_key(cost).expect("every expert has a slot");
        let source = layer.rank_of(arrival.source_slot);
        sent[source] += usize::from(source != rank);
    }
}

/// An expert that a rank is to hold once more than it does, and the target's slot for it.
#[derive(Debug, Clone, Copy)]
struct Need {
    expert: usize,
    slot: usize,
}

/// A need that is met in this round, and the slot whose content gives way.
#[derive(Debug, Clone, Copy)]
struct Taken {
    need: Need,
    freed: usize,
}

/// How one layer's target differs from what is there, per rank, and what this round does about it.
#[derive(Debug)]
struct Differences<'a> {
    current: LayerPlacement<'a>,
    /// `[ranks]`: by slot.
    needs: Vec<Vec<Need>>,
    /// `[ranks]`: slots whose content the target does not want on the rank, empty ones among them, ascending. Never
    /// fewer than the needs.
    surplus: Vec<Vec<usize>>,
    /// `[experts]`: copies after this round.
    copies: Vec<usize>,
    taken: Vec<Taken>,
}

impl<'a> Differences<'a> {
    fn of(current: LayerPlacement<'a>, target: LayerPlacement<'a>) -> Self {
        let per_rank = current.slots_per_rank();
        let (mut needs, mut surplus) = (Vec::new(), Vec::new());
        for rank in 0..current.ranks() {
            let (old, new) = (current.slots_of_rank(rank), target.slots_of_rank(rank));
            let moved: Vec<usize> = (0..per_rank).filter(|i| old[*i] != new[*i]).collect();
            let mut left = moved.clone();
            let mut missing = Vec::new();
            for i in moved {
                match left.iter().position(|&j| old[j] == new[i]) {
                    Some(at) => drop(left.remove(at)),
                    None if new[i] == EMPTY => {}
                    None => missing.push(Need { expert: new[i] as usize, slot: rank * per_rank + i }),
                }
            }
            needs.push(missing);
            surplus.push(left.into_iter().map(|i| rank * per_rank + i).collect());
        }
        let copies = (0..current.experts()).map(|expert| current.replicas(expert).len()).collect();
        Differences { current, needs, surplus, copies, taken: Vec::new() }
    }

    fn needs(&self) -> usize {
        self.needs.iter().map(Vec::len).sum()
    }

    /// Meets as many needs as there is room for on each rank.
    fn fill(&mut self, room: &mut [usize]) {
        loop {
            let before = self.taken.len();
            for (rank, places) in room.iter_mut().enumerate() {
                while *places > 0 && self.take_one(rank) {
                    *places -= 1;
                }
            }
            if self.taken.len() == before {
                match self.circle(room) {
                    None => return,
                    Some(circle) => self.take_circle(&circle, room),
                }
            }
        }
    }

    /// Meets a need of a rank where something can give way; false where nothing can.
    fn take_one(&mut self, rank: usize) -> bool {
        let spare = |slot: usize| self.current.expert_of(slot).is_none_or(|expert| self.copies[expert] > 1);
        let surplus = &self.surplus[rank];
        let Some(need) = self.needs[rank].first() else { return false };
        // Copies last as long as something else can give way; what gives way in the right slot needs no exchange later.
        let empty = surplus.iter().position(|&slot| self.current.expert_of(slot).is_none());
        let in_place = || surplus.iter().position(|&slot| slot == need.slot && spare(slot));
        let any = || surplus.iter().position(|&slot| spare(slot));
        match empty.or_else(in_place).or_else(any) {
            None => false,
            Some(freed) => {
                self.take(rank, 0, freed);
                true
            }
        }
    }

    /// Meets a need of a rank by what a surplus slot gives up; both by their positions in the rank's lists.
    fn take(&mut self, rank: usize, need: usize, surplus: usize) {
        let need = self.needs[rank].remove(need);
        let freed = self.surplus[rank].remove(surplus);
        self.copies[need.expert] += 1;
        if let Some(expert) = self.current.expert_of(freed) {
            self.copies[expert] -= 1;
        }
        self.taken.push(Taken { need, freed });
    }

    /// Ranks with room, each of which holds an only copy that the next one needs, the last one's for the first.
    fn circle(&self, room: &[usize]) -> Option<Vec<usize>> {
        let open = |rank: usize| room[rank] > 0 && !self.needs[rank].is_empty();
        let mut visited = vec![false; room.len()];
        for start in (0..room.len()).filter(|rank| open(*rank)) {
            let mut path = Vec::new();
            if let Some(circle) = self.walk(start, &open, &mut visited, &mut path) {
                return Some(circle);
            }
        }
        None
    }

    /// Depth-first from `rank`, which is not on `path`.
    fn walk(
        &self,
        rank: usize,
        open: &impl Fn(usize) -> bool,
        visited: &mut [bool],
        path: &mut Vec<usize>,
    ) -> Option<Vec<usize>> {
        if std::mem::replace(&mut visited[rank], true) {
            return None;
        }
        path.push(rank);
        for next in (0..visited.len()).filter(|next| open(*next) && self.gives(rank, *next).is_some()) {
            if let Some(at) = path.iter().position(|&on_path| on_path == next) {
                return Some(path[at..].to_vec());
            }
            if let Some(circle) = self.walk(next, open, visited, path) {
                return Some(circle);
            }
        }
        path.pop();
        None
    }

    /// What a rank has too much of and another needs: positions in the surplus of the one and the needs of the other.
    fn gives(&self, from: usize, to: usize) -> Option<(usize, usize)> {
        let surplus = self.surplus[from].iter().enumerate();
        surplus.filter_map(|(at, &slot)| Some((at, self.current.expert_of(slot)?))).find_map(
            |(at, expert)| Some((at, self.needs[to].iter().position(|need| need.expert == expert)?)),
        )
    }

    /// Every rank of a circle gives its successor an only copy and gets its predecessor's in that place.
    fn take_circle(&mut self, circle: &[usize], room: &mut [usize]) {
        let next = |i: usize| circle[(i + 1) % circle.len()];
        let given: Vec<(usize, usize)> = (0..circle.len())
            .map(|i| self.gives(circle[i], next(i)).expect("an edge of the circle"))
            .collect();
        for i in 0..circle.len() {
            let (_, need) = given[i];
            let (freed, _) = given[(i + 1) % circle.len()];
            self.take(next(i), need, freed);
            room[next(i)] -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{duplicates, transfers};
    use super::*;
    use proptest::prelude::*;

    fn limits(staging_per_rank: usize) -> RoundLimits {
        RoundLimits { staging_per_rank, ranks_per_node: 2 }
    }

    /// Layers of 3 ranks x 2 slots.
    fn placement(experts: usize, layers: &[[i32; 6]]) -> Placement {
        let slots = layers.iter().map(|layer| layer.to_vec()).collect();
        Placement::new(3, 2, experts, (0..layers.len()).collect(), slots).unwrap()
    }

    fn arrival(layer: usize, slot: usize, expert: usize, source_slot: usize) -> Arrival {
        Arrival { layer, slot, expert, source_slot }
    }

    /// Of each rank and expert, by how much one layer exceeds another.
    fn beyond(more: LayerPlacement<'_>, less: LayerPlacement<'_>) -> Vec<(usize, i32, usize)> {
        let mut found = Vec::new();
        for rank in 0..more.ranks() {
            let count =
                |held: &[i32], expert: i32| held.iter().filter(|e| **e == expert && expert != EMPTY).count();
            for expert in 0..more.experts() as i32 {
                let (a, b) =
                    (count(more.slots_of_rank(rank), expert), count(less.slots_of_rank(rank), expert));
                if a > b {
                    found.push((rank, expert, a - b));
                }
            }
        }
        found
    }

    /// Follows all rounds and checks every promise; returns how many weights arrived.
    fn check(current: &Placement, target: &Placement, gains: &[f64], limits: RoundLimits) -> usize {
        let mut before = current.clone();
        let mut all = rounds(current, target, gains, limits);
        let expected = all.arrivals_left();
        let mut arrived = 0;
        while let Some(Round { arrivals, placement }) = all.next() {
            assert_eq!(placement.version(), before.version() + 1);
            arrived += arrivals.len();
            assert_eq!(all.arrivals_left(), expected - arrived);
            for rank in 0..placement.ranks() {
                let here = arrivals.iter().filter(|a| a.slot / placement.slots_per_rank() == rank).count();
                assert!(here <= limits.staging_per_rank, "{here} arrivals on rank {rank}");
            }
            for layer in 0..placement.layers() {
                let own: Vec<&Arrival> = arrivals.iter().filter(|a| a.layer == layer).collect();
                for a in &own {
                    assert_eq!(placement.layer(layer).expert_of(a.slot), Some(a.expert));
                    assert_eq!(before.layer(layer).expert_of(a.source_slot), Some(a.expert));
                }
                // What is new on a rank has arrived there, and nothing else.
                let new = beyond(placement.layer(layer), before.layer(layer));
                assert_eq!(own.len(), new.iter().map(|(_, _, n)| n).sum::<usize>());
                for (rank, expert, n) in new {
                    let to_rank = |a: &&&Arrival| {
                        a.expert == expert as usize && before.layer(layer).rank_of(a.slot) == rank
                    };
                    assert_eq!(own.iter().filter(to_rank).count(), n);
                }
            }
            before = placement;
        }
        for layer in 0..target.layers() {
            assert_eq!(before.layer(layer).slots(), target.layer(layer).slots());
        }
        assert_eq!((arrived, all.arrivals_left()), (expected, 0));
        arrived
    }

    #[test]
    fn equal_placements_need_no_round() {
        let here = placement(3, &[[0, 1, 2, EMPTY, EMPTY, EMPTY]]);
        assert_eq!(rounds(&here, &here, &[0.0], limits(1)).next(), None);
    }

    #[test]
    fn what_a_rank_holds_changes_slots_without_an_arrival() {
        let from = placement(4, &[[0, 1, 2, 3, 0, 1]]).with_version(7);
        let to = placement(4, &[[1, 0, 2, 3, EMPTY, 1]]);
        let all: Vec<Round> = rounds(&from, &to, &[0.0], limits(1)).collect();
        assert_eq!(all, [Round { arrivals: vec![], placement: to.with_version(8) }]);
    }

    #[test]
    fn only_copies_that_wait_for_each_other_arrive_together() {
        // All six move one rank on: two circles, one per round.
        let from = placement(6, &[[0, 1, 2, 3, 4, 5]]);
        let to = placement(6, &[[4, 5, 0, 1, 2, 3]]);
        let all: Vec<Round> = rounds(&from, &to, &[1.0], limits(1)).collect();
        assert_eq!(all.len(), 2);
        assert_eq!(all[0].arrivals, [arrival(0, 0, 4, 4), arrival(0, 2, 0, 0), arrival(0, 4, 2, 2)]);
        assert_eq!(all[1].arrivals, [arrival(0, 1, 5, 5), arrival(0, 3, 1, 1), arrival(0, 5, 3, 3)]);
        assert_eq!(rounds(&from, &to, &[1.0], limits(2)).count(), 1);
        check(&from, &to, &[1.0], limits(1));
    }

    #[test]
    fn a_chain_that_ends_in_an_empty_slot_is_one_round() {
        let from = placement(5, &[[0, 1, 2, 3, 4, EMPTY]]);
        let to = placement(5, &[[EMPTY, 1, 0, 3, 4, 2]]);
        let all: Vec<Round> = rounds(&from, &to, &[1.0], limits(1)).collect();
        assert_eq!(all.len(), 1);
        assert_eq!(all[0].arrivals, [arrival(0, 2, 0, 0), arrival(0, 5, 2, 2)]);
    }

    #[test]
    fn layers_with_most_gain_per_arrival_go_first() {
        let from = placement(3, &[[0, 1, 2, EMPTY, EMPTY, EMPTY]; 3]);
        let more = [0, 1, 2, 0, EMPTY, EMPTY];
        let to = placement(3, &[more, [0, 1, 2, 0, 0, 1], more]);
        let layers = |gains: &[f64]| -> Vec<Vec<usize>> {
            let all = rounds(&from, &to, gains, limits(1));
            all.map(|round| round.arrivals.iter().map(|a| a.layer).collect()).collect()
        };
        // Layer 1 needs one arrival on rank 1 and two on rank 2: two rounds at least.
        assert_eq!(layers(&[1.0, 9.0, 2.0]), [vec![1, 1], vec![1, 2], vec![0]]);
        assert_eq!(layers(&[4.0, 9.0, 5.0]), [vec![1, 2], vec![0, 1], vec![1]]);
    }

    #[test]
    fn weights_come_from_near_and_senders_take_turns() {
        let from =
            Placement::new(4, 2, 2, vec![0], vec![vec![0, 1, 0, EMPTY, 0, EMPTY, EMPTY, EMPTY]]).unwrap();
        let to = |slots: [i32; 8]| Placement::new(4, 2, 2, vec![0], vec![slots.to_vec()]).unwrap();
        let sources = |slots, ranks_per_node| -> Vec<usize> {
            let limits = RoundLimits { staging_per_rank: 2, ranks_per_node };
            let all = rounds(&from, &to(slots), &[1.0], limits);
            all.flat_map(|round| round.arrivals).map(|a| a.source_slot).collect()
        };
        // A second copy on rank 1 comes from rank 1; rank 3 takes it from its node, or the first rank.
        assert_eq!(sources([0, 1, 0, 0, 0, EMPTY, 0, EMPTY], 2), [2, 4]);
        assert_eq!(sources([0, 1, 0, 0, 0, EMPTY, 0, EMPTY], 4), [2, 0]);
        // Expert 1 has one sender; expert 0 then comes from another.
        assert_eq!(sources([0, 1, 0, EMPTY, 0, 1, 0, EMPTY], 4), [1, 2]);
    }

    /// Maps of several layers where every expert has a slot: a permutation of the slots holds each expert once, then whatever.
    fn maps(
        ranks: usize,
        per_rank: usize,
        experts: usize,
        layers: usize,
    ) -> impl Strategy<Value = Placement> {
        let width = ranks * per_rank;
        let layer = (
            Just((0..width).collect::<Vec<_>>()).prop_shuffle(),
            prop::collection::vec(-1..experts as i32, width),
        );
        prop::collection::vec(layer, layers).prop_map(move |layers| {
            let map = |(order, mut slots): (Vec<usize>, Vec<i32>)| {
                (0..experts).for_each(|expert| slots[order[expert]] = expert as i32);
                slots
            };
            let ids = (0..layers.len()).collect();
            Placement::new(ranks, per_rank, experts, ids, layers.into_iter().map(map).collect()).unwrap()
        })
    }

    /// Two placements of one shape.
    fn pairs() -> impl Strategy<Value = (Placement, Placement)> {
        let shapes = (1usize..6, 1usize..5, 1usize..4).prop_flat_map(|(ranks, per_rank, layers)| {
            (Just(ranks), Just(per_rank), 1..=ranks * per_rank, Just(layers))
        });
        shapes.prop_flat_map(|(ranks, per_rank, experts, layers)| {
            (maps(ranks, per_rank, experts, layers), maps(ranks, per_rank, experts, layers))
        })
    }

    proptest! {
        #[test]
        fn every_round_is_valid_and_no_weights_travel_twice(
            (from, to) in pairs(),
            staging in 1usize..4,
            gains in prop::collection::vec(-1.0..1.0, 3),
        ) {
            let arrived = check(&from, &to, &gains[..from.layers()], limits(staging));
            if duplicates(&from) == 0 && duplicates(&to) == 0 {
                prop_assert_eq!(arrived, transfers(&from, &to).len());
            }
        }

        #[test]
        fn only_copies_through_full_ranks(
            (from, to) in (2usize..6, 1usize..4).prop_flat_map(|(ranks, per_rank)| {
                let experts = ranks * per_rank;
                (maps(ranks, per_rank, experts, 1), maps(ranks, per_rank, experts, 1))
            }),
            staging in 1usize..4,
        ) {
            let arrived = check(&from, &to, &[1.0], limits(staging));
            prop_assert_eq!(arrived, transfers(&from, &to).len());
        }
    }
}
