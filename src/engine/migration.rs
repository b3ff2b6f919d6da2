//! One change of placement under way: which weights travel next, and when they may come into force. Pure: no clock, no
//! thread, no tensor.
//!
//! A migration is a sequence of rounds (`router_sim::placement::rounds`), each with a valid placement. The arrivals of a
//! round are cut into *waves*, in which every rank sends and receives at most one expert, and waves into slices. When
//! all slices of a round have arrived unharmed everywhere, its placement is switched to.

use std::sync::Arc;

use router_sim::placement::{Placement, Round, RoundLimits, Rounds, rounds};

use crate::error::{Error, Result};
use crate::moe::in_force::InForce;
use crate::moe::migrate::{Checksums, Landed, Leg, Slice, Switch, WHOLE};

/// What an engine knows about experts that may move.
#[derive(Clone)]
pub struct Experts {
    /// Where they live; the engine switches it.
    pub in_force: Arc<InForce>,
    /// Experts whose weights may be on their way to one rank at once; 0 keeps all where they are.
    pub staging_slots: usize,
    /// Ranks that share each expert: expert-parallel rank e is the ranks `e * expert_tp..(e + 1) * expert_tp`.
    pub expert_tp: usize,
    /// Consecutive expert-parallel ranks on one node: weights come from there if they can.
    pub ranks_per_node: usize,
    /// Bytes of one rank's share of one expert.
    pub expert_bytes: u64,
    /// Bytes per second that a rank may send, and as many receive; `None` takes a share of the steps' time.
    pub bandwidth: Option<u64>,
}

/// How far a migration is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MigrationProgress {
    /// Experts that have arrived; with a tensor split inside experts, whole ones.
    pub arrived: u64,
    /// Experts that arrive in all.
    pub arrivals: u64,
    /// Bytes that have arrived, over all ranks.
    pub bytes: u64,
    /// Bytes that arrive in all.
    pub total_bytes: u64,
}

/// What a migration would take.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MoveCost {
    /// Experts that would arrive somewhere.
    pub arrivals: u64,
    /// Bytes that would arrive, over all ranks.
    pub bytes: u64,
    /// Placements on the way, the last one included: versions that it would count up.
    pub rounds: u64,
}

impl Experts {
    /// What the way from what is in force to `target` would take.
    pub(super) fn cost(&self, target: &Placement, gains: &[f64]) -> MoveCost {
        let rounds = rounds(&self.in_force.placement(), target, gains, self.limits());
        let arrivals = rounds.arrivals_left() as u64;
        MoveCost { arrivals, bytes: self.bytes_of(arrivals), rounds: rounds.count() as u64 }
    }

    fn limits(&self) -> RoundLimits {
        RoundLimits { staging_per_rank: self.staging_slots, ranks_per_node: self.ranks_per_node }
    }

    /// Bytes of so many experts, all shares.
    fn bytes_of(&self, arrivals: u64) -> u64 {
        arrivals * self.expert_bytes * self.expert_tp as u64
    }
}

/// A migration under way.
pub(super) struct Migration {
    rounds: Rounds,
    experts: Experts,
    current: RoundPlan,
    /// Made while the ranks compute.
    next: Option<RoundPlan>,
    /// Slices handed out whose checks are not in.
    unchecked: usize,
    /// Rounds whose placement is in force.
    switched: u64,
    progress: MigrationProgress,
}

/// One round as ranks are told about it.
struct RoundPlan {
    waves: Vec<Arc<[Leg]>>,
    /// The wave under way, and how much of it was handed out, in parts of [`WHOLE`].
    wave: usize,
    position: u32,
    switch: Arc<Switch>,
}

impl Migration {
    /// The way from what is in force to `target`; `None` when there is nothing to do. `gains` orders the layers, as
    /// `router_sim::placement::rounds` says.
    pub fn new(experts: &Experts, target: &Placement, gains: &[f64]) -> Option<Migration> {
        let mut rounds = rounds(&experts.in_force.placement(), target, gains, experts.limits());
        let arrivals = rounds.arrivals_left() as u64;
        let current = RoundPlan::new(rounds.next()?);
        let total_bytes = experts.bytes_of(arrivals);
        let progress = MigrationProgress { arrivals, total_bytes, ..MigrationProgress::default() };
        Some(Migration {
            rounds,
            experts: experts.clone(),
            current,
            next: None,
            unchecked: 0,
            switched: 0,
            progress,
        })
    }

    /// How far it is.
    pub fn progress(&self) -> MigrationProgress {
        self.progress
    }

    /// Placements on the way that have come into force.
    pub fn switched(&self) -> u64 {
        self.switched
    }

    /// Bytes that every rank moves with the next slice if nothing bounds it; 0 when all of the round was handed out.
    pub fn left_of_wave(&self) -> u64 {
        let RoundPlan { waves, wave, position, .. } = &self.current;
        match *wave < waves.len() {
            true => share(self.experts.expert_bytes, WHOLE - position).max(1),
            false => 0,
        }
    }

    /// The next slice, of about `bytes` per rank.
    pub fn slice(&mut self, bytes: u64) -> Option<Arc<Slice>> {
        let RoundPlan { waves, wave, position, .. } = &mut self.current;
        let legs = Arc::clone(waves.get(*wave)?);
        let parts = u128::from(bytes) * u128::from(WHOLE) / u128::from(self.experts.expert_bytes.max(1));
        let parts = u32::try_from(parts).unwrap_or(WHOLE).clamp(1, WHOLE - *position);
        let span = *position..*position + parts;
        *position = span.end;
        if span.end == WHOLE {
            (*wave, *position) = (*wave + 1, 0);
        }
        self.unchecked += 1;
        Some(Arc::new(Slice { legs, span }))
    }

    /// What all ranks report of a slice, in rank order. `Err` says which weights arrived damaged or not at all.
    pub fn check(&mut self, slice: &Slice, answers: &[Result<Checksums, String>]) -> Result<(), String> {
        assert!(self.unchecked > 0, "a slice that was not handed out");
        self.unchecked -= 1;
        for (rank, answer) in answers.iter().enumerate() {
            if let Err(why) = answer {
                return Err(format!("rank {rank} could not move expert weights: {why}"));
            }
        }
        let x = self.experts.expert_tp;
        for leg in slice.legs.iter() {
            for part in 0..x {
                let of = |rank: usize| answers[rank * x + part].as_ref().expect("checked above");
                let (sent, received) = (of(leg.from).sent, of(leg.to).received);
                if sent.is_none() || sent != received {
                    return Err(format!(
                        "expert {} of MoE layer {} arrived damaged: checksum {received:x?} on rank {}, {sent:x?} on rank {}",
                        leg.expert,
                        leg.layer,
                        leg.to * x + part,
                        leg.from * x + part
                    ));
                }
            }
        }
        let legs = slice.legs.len() as u64;
        let of_one = share(self.experts.expert_bytes, slice.span.end)
            - share(self.experts.expert_bytes, slice.span.start);
        self.progress.bytes += legs * of_one * x as u64;
        self.progress.arrived += if slice.span.end == WHOLE { legs } else { 0 };
        Ok(())
    }

    /// Thinks ahead: plans the next round, if that has not happened.
    pub fn prepare(&mut self) {
        if self.next.is_none() {
            self.next = self.rounds.next().map(RoundPlan::new);
        }
    }

    /// The switch that ends the round, once all its weights have arrived; the next round begins with it.
    pub fn switch(&mut self) -> Option<Arc<Switch>> {
        let arrived = self.current.wave == self.current.waves.len() && self.unchecked == 0;
        if !arrived || self.is_done() {
            return None;
        }
        self.prepare();
        let switch = Arc::clone(&self.current.switch);
        self.switched += 1;
        match self.next.take() {
            Some(next) => self.current = next,
            None => self.current.position = WHOLE,
        }
        Some(switch)
    }

    /// The last switch was handed out.
    pub fn is_done(&self) -> bool {
        self.current.position == WHOLE
    }
}

impl RoundPlan {
    fn new(round: Round) -> RoundPlan {
        let Round { arrivals, placement } = round;
        let per_rank = placement.slots_per_rank();
        let mut places = vec![0; placement.ranks()];
        let mut landed = Vec::with_capacity(arrivals.len());
        let mut waves: Vec<Vec<Leg>> = Vec::new();
        for arrival in arrivals {
            let (from, to) = (arrival.source_slot / per_rank, arrival.slot / per_rank);
            let (layer, expert, place) = (arrival.layer, arrival.expert, places[to]);
            places[to] += 1;
            let leg = Leg { layer, expert, from, slot: arrival.source_slot % per_rank, to, place };
            landed.push(Landed { layer, rank: to, place, slot: arrival.slot % per_rank });
            let free = |wave: &Vec<Leg>| wave.iter().all(|other| other.from != from && other.to != to);
            match waves.iter_mut().find(|wave| free(wave)) {
                Some(wave) => wave.push(leg),
                None => waves.push(vec![leg]),
            }
        }
        RoundPlan {
            waves: waves.into_iter().map(Arc::from).collect(),
            wave: 0,
            position: 0,
            switch: Arc::new(Switch { placement: Arc::new(placement), landed }),
        }
    }
}

/// Refuses a placement for another engine.
pub(super) fn check_shape(current: &Placement, target: &Placement) -> Result<()> {
    let numbers = [
        ("expert-parallel ranks", current.ranks(), target.ranks()),
        ("slots per rank", current.slots_per_rank(), target.slots_per_rank()),
        ("experts", current.experts(), target.experts()),
        ("MoE layers", current.layers(), target.layers()),
    ];
    let refuse = |why: String| Err(Error::Routing(router_sim::Error::Placement(why)));
    if let Some((what, have, given)) = numbers.into_iter().find(|(_, have, given)| have != given) {
        return refuse(format!("the placement has {given} {what}, but the engine runs with {have}"));
    }
    let layers = current.layer_ids().iter().zip(target.layer_ids());
    match layers.enumerate().find(|(_, (have, given))| have != given) {
        Some((at, (have, given))) => refuse(format!(
            "MoE layer {at} of the placement is layer {given}, but that of the model is layer {have}"
        )),
        None => Ok(()),
    }
}

/// So many parts of [`WHOLE`] of a number of bytes.
fn share(bytes: u64, parts: u32) -> u64 {
    (u128::from(bytes) * u128::from(parts) / u128::from(WHOLE)) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use router_sim::load::LoadWindow;
    use router_sim::placement::{ClusterShape, EMPTY, Linear, PlacementPolicy};

    const RANKS: usize = 3;

    fn experts(staging_slots: usize) -> Experts {
        let shape = ClusterShape { ranks: RANKS, redundant: 3 };
        let placement = Linear.place(&LoadWindow::new(&[1, 4], 6), &shape).unwrap();
        Experts {
            in_force: Arc::new(InForce::new(Arc::new(placement))),
            staging_slots,
            expert_tp: 2,
            ranks_per_node: RANKS,
            expert_bytes: 1000,
            bandwidth: None,
        }
    }

    /// All experts one rank further, and no replicas.
    fn target() -> Placement {
        let map = vec![4, 5, EMPTY, 0, 1, EMPTY, 2, 3, EMPTY];
        Placement::new(RANKS, 3, 6, vec![1, 4], vec![map.clone(), map]).unwrap()
    }

    fn intact(slice: &Slice) -> Vec<Result<Checksums, String>> {
        let mut answers = vec![Checksums::default(); RANKS * 2];
        for leg in slice.legs.iter() {
            for part in 0..2 {
                answers[leg.from * 2 + part].sent = Some(leg.expert as u32);
                answers[leg.to * 2 + part].received = Some(leg.expert as u32);
            }
        }
        answers.into_iter().map(Ok).collect()
    }

    #[test]
    fn rounds_end_in_switches_when_everything_has_arrived() {
        for staging_slots in 1..=3 {
            let experts = experts(staging_slots);
            let cost = experts.cost(&target(), &[1.0, 2.0]);
            let mut migration = Migration::new(&experts, &target(), &[1.0, 2.0]).unwrap();
            let (mut version, mut slices) = (0, 0);
            while !migration.is_done() {
                assert!(migration.switch().is_none() || migration.progress().arrivals == 0);
                let mut under_way = Vec::new();
                while let Some(slice) = migration.slice(300) {
                    let ranks = |of: fn(&Leg) -> usize| {
                        let mut ranks: Vec<_> = slice.legs.iter().map(of).collect();
                        ranks.sort_unstable();
                        ranks.dedup();
                        ranks.len()
                    };
                    assert_eq!((ranks(|l| l.from), ranks(|l| l.to)), (slice.legs.len(), slice.legs.len()));
                    assert!(slice.legs.iter().all(|leg| leg.place < staging_slots));
                    assert!(migration.switch().is_none(), "weights are still on their way");
                    under_way.push(slice);
                }
                slices += under_way.len();
                for slice in under_way {
                    migration.check(&slice, &intact(&slice)).unwrap();
                }
                let switch = migration.switch().expect("all is there");
                version += 1;
                assert_eq!(switch.placement.version(), version);
                if migration.is_done() {
                    assert!((0..2).all(|l| switch.placement.layer(l).slots() == target().layer(l).slots()));
                }
            }
            let progress = migration.progress();
            assert_eq!((migration.switched(), progress.arrived), (version, progress.arrivals));
            let MoveCost { arrivals, bytes, rounds } = cost;
            assert_eq!((arrivals, bytes, rounds), (progress.arrivals, progress.total_bytes, version));
            assert_eq!(
                (progress.bytes, progress.total_bytes),
                (progress.total_bytes, progress.arrivals * 2000)
            );
            assert!(slices >= 4, "slices of 300 of 1000 bytes");
            assert!(migration.slice(300).is_none() && migration.switch().is_none());
        }
    }

    #[test]
    fn damage_is_named() {
        let mut migration = Migration::new(&experts(1), &target(), &[1.0, 2.0]).unwrap();
        let slice = migration.slice(u64::MAX).unwrap();
        assert_eq!(slice.span, 0..WHOLE);
        let leg = slice.legs[0];
        let mut answers = intact(&slice);
        answers[leg.to * 2 + 1].as_mut().unwrap().received = Some(77);
        let why = migration.check(&slice, &answers).unwrap_err();
        let damaged = format!("expert {} of MoE layer {} arrived damaged", leg.expert, leg.layer);
        assert!(why.starts_with(&damaged) && why.contains(&format!("on rank {}", leg.to * 2 + 1)), "{why}");

        let mut migration = Migration::new(&experts(1), &target(), &[1.0, 2.0]).unwrap();
        let slice = migration.slice(u64::MAX).unwrap();
        answers[3] = Err("the device is gone".into());
        let why = migration.check(&slice, &answers).unwrap_err();
        assert_eq!(why, "rank 3 could not move expert weights: the device is gone");
    }

    #[test]
    fn nothing_to_do_is_no_migration() {
        let experts = experts(1);
        assert!(Migration::new(&experts, &experts.in_force.placement(), &[0.0, 0.0]).is_none());
        assert_eq!(experts.cost(&experts.in_force.placement(), &[0.0, 0.0]), MoveCost::default());
    }
}
