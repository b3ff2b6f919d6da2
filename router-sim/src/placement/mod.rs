//! Placement: which logical expert each slot of each rank holds, for all MoE layers, with a version number.
//!
//! [`Placement`] checks itself when it is made, so whoever holds one may index it without further checks: every
//! expert of every layer has at least one slot. Slots are numbered rank-major: slot `s` is on rank
//! `s / slots_per_rank`. Policies decide where experts live ([`Linear`]); [`file`] reads and writes the JSON form.

mod file;
mod linear;
mod eplb;
mod moves;
mod rounds;
mod moeyard;
mod policy;

pub use eplb::Eplb;
pub use file::{Expected, PlacementFile};
pub use linear::Linear;
pub use moeyard::Moeyard;
pub use moves::{Transfer, duplicates, transfers};
pub use policy::{PlanOptions, PolicyName, plan};
pub use rounds::{Arrival, Round, RoundLimits, Rounds, arrivals, rounds};

use crate::load::LoadWindow;
use crate::{Error, Result};

/// Marks a slot that holds no expert.
pub const EMPTY: i32 = -1;

/// Slots of one layer over all ranks that a placement may have: far above any cluster, far below what overflows.
pub const MAX_SLOTS: usize = 1 << 24;

/// The cluster a placement is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClusterShape {
    /// Expert-parallel ranks, at least 1.
    pub ranks: usize,
    /// Slots per layer over all ranks beyond one per expert.
    pub redundant: usize,
}

impl ClusterShape {
    /// Slots on each rank: experts + redundant, rounded up to a multiple of the ranks.
    ///
    /// # Errors
    /// [`Error::Impossible`] without ranks or experts, or above [`MAX_SLOTS`].
    pub fn slots_per_rank(&self, experts: usize) -> Result<usize> {
        let ClusterShape { ranks, redundant } = *self;
        if ranks == 0 || experts == 0 {
            return Err(Error::Impossible(format!(
                "a placement needs at least 1 rank and 1 expert, given {ranks} ranks and {experts} experts"
            )));
        }
        let slots_per_rank = experts.saturating_add(redundant).div_ceil(ranks);
        if slots_per_rank.saturating_mul(ranks) > MAX_SLOTS {
            return Err(Error::Impossible(format!(
                "{experts} experts + {redundant} redundant on {ranks} ranks exceed the limit of {MAX_SLOTS} slots"
            )));
        }
        Ok(slots_per_rank)
    }
}

/// Decides where experts live. Pure and deterministic: the same window and shape give the same placement anywhere.
pub trait PlacementPolicy {
    /// A valid placement for the cluster. Every expert gets at least one slot.
    ///
    /// # Errors
    /// [`Error::Impossible`] when the slots cannot hold all experts.
    fn place(&self, load: &LoadWindow, cluster: &ClusterShape) -> Result<Placement>;

    /// A placement from several windows, oldest first, knowing what is served now. Policies that look at neither plan
    /// afresh for the sum of the windows.
    ///
    /// # Errors
    /// [`Error::Impossible`] without windows, when their shapes or that of the current placement differ, and as
    /// [`PlacementPolicy::place`].
    fn replan(
        &self,
        windows: &[LoadWindow],
        _current: Option<&Placement>,
        cluster: &ClusterShape,
    ) -> Result<Placement> {
        let Some((first, others)) = windows.split_first() else {
            return Err(Error::Impossible("a placement needs at least one load window".into()));
        };
        let mut sum = first.clone();
        others.iter().try_for_each(|window| sum.merge(window))?;
        self.place(&sum, cluster)
    }
}

/// Slot -> expert map of all MoE layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    version: u64,
    ranks: usize,
    slots_per_rank: usize,
    experts: usize,
    layer_ids: Vec<usize>,
    /// `[layers][ranks * slots_per_rank]`, rank-major, [`EMPTY`] where nothing lives.
    slots: Vec<Vec<i32>>,
    /// The inverse of each layer's map.
    replicas: Vec<Replicas>,
}

/// The slots of every expert of one layer.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Replicas {
    /// `[experts + 1]`: where each expert's slots begin in `slots`.
    starts: Vec<u32>,
    /// Slots, grouped by expert, ascending within one.
    slots: Vec<u32>,
}

impl Placement {
    /// Checks a map and indexes it. `slots` is `[layers][ranks * slots_per_rank]`, rank-major, [`EMPTY`] where nothing
    /// lives; `layer_ids` are the absolute indices of the MoE layers. The version number is 0.
    ///
    /// # Errors
    /// [`Error::Placement`] naming layer, slot and rank when a length or an id is out of range, layer ids do not
    /// ascend, or an expert has no slot.
    pub fn new(
        ranks: usize,
        slots_per_rank: usize,
        experts: usize,
        layer_ids: Vec<usize>,
        slots: Vec<Vec<i32>>,
    ) -> Result<Placement> {
        let width = checked_width(ranks, slots_per_rank, experts)?;
        if slots.len() != layer_ids.len() {
            return refuse(format!("{} layer maps for {} layer ids", slots.len(), layer_ids.len()));
        }
        if let Some(pair) = layer_ids.windows(2).find(|pair| pair[0] >= pair[1]) {
            return refuse(format!("layer ids must ascend, but {} follows {}", pair[1], pair[0]));
        }
        let mut replicas = Vec::with_capacity(slots.len());
        for (&layer_id, map) in layer_ids.iter().zip(&slots) {
            if map.len() != width {
                return refuse(format!(
                    "layer {layer_id} lists {} slots, expected {ranks} ranks x {slots_per_rank} slots = {width}",
                    map.len()
                ));
            }
            replicas.push(Replicas::of(map, layer_id, slots_per_rank, experts)?);
        }
        Ok(Placement { version: 0, ranks, slots_per_rank, experts, layer_ids, slots, replicas })
    }

    /// The same map under another version number.
    #[must_use]
    pub fn with_version(mut self, version: u64) -> Self {
        self.version = version;
        self
    }

    /// The same with `layers` (counted from 0) as `other` has them; the version stays.
    ///
    /// # Panics
    /// When the shapes differ.
    #[must_use]
    pub fn with_layers_of(&self, other: &Placement, layers: &[usize]) -> Self {
        let shape = |p: &Placement| (p.ranks, p.slots_per_rank, p.experts, p.layers());
        assert_eq!(shape(self), shape(other), "ranks, slots, experts and layers of two placements");
        let maps = layers.iter().map(|&layer| (layer, other.slots[layer].clone())).collect();
        self.with_layers(maps).expect("the other placement's maps are valid")
    }

    /// The same with other maps for some layers, `(layer, [slots])`; the version stays.
    ///
    /// # Errors
    /// As [`Placement::new`], for the layers that are given.
    fn with_layers(&self, layers: Vec<(usize, Vec<i32>)>) -> Result<Self> {
        let mut changed = self.clone();
        for (layer, map) in layers {
            let layer_id = self.layer_ids[layer];
            changed.replicas[layer] = Replicas::of(&map, layer_id, self.slots_per_rank, self.experts)?;
            changed.slots[layer] = map;
        }
        Ok(changed)
    }

    /// Tells placements of one run apart; counts up with each switch.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Expert-parallel ranks.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// Slots on each rank, per layer.
    pub fn slots_per_rank(&self) -> usize {
        self.slots_per_rank
    }

    /// Slots of a layer over all ranks.
    pub fn slots(&self) -> usize {
        self.ranks * self.slots_per_rank
    }

    /// Logical experts per layer.
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// MoE layers.
    pub fn layers(&self) -> usize {
        self.layer_ids.len()
    }

    /// Absolute indices of the MoE layers, ascending.
    pub fn layer_ids(&self) -> &[usize] {
        &self.layer_ids
    }

    /// The map of one layer, counted from 0 among the MoE layers.
    pub fn layer(&self, layer: usize) -> LayerPlacement<'_> {
        LayerPlacement {
            slots_per_rank: self.slots_per_rank,
            slots: &self.slots[layer],
            replicas: &self.replicas[layer],
        }
    }
}

/// One layer of a [`Placement`]. Copying it copies three references.
#[derive(Debug, Clone, Copy)]
pub struct LayerPlacement<'a> {
    slots_per_rank: usize,
    slots: &'a [i32],
    replicas: &'a Replicas,
}

impl<'a> LayerPlacement<'a> {
    /// Logical experts.
    pub fn experts(&self) -> usize {
        self.replicas.starts.len() - 1
    }

    /// Ranks.
    pub fn ranks(&self) -> usize {
        self.slots.len() / self.slots_per_rank
    }

    /// Slots on each rank.
    pub fn slots_per_rank(&self) -> usize {
        self.slots_per_rank
    }

    /// The expert of each slot, rank-major, [`EMPTY`] where nothing lives; `[ranks * slots_per_rank]`.
    pub fn slots(&self) -> &'a [i32] {
        self.slots
    }

    /// The expert of each slot of one rank; `[slots_per_rank]`.
    pub fn slots_of_rank(&self, rank: usize) -> &'a [i32] {
        &self.slots[rank * self.slots_per_rank..(rank + 1) * self.slots_per_rank]
    }

    /// The expert that lives in a slot.
    pub fn expert_of(&self, slot: usize) -> Option<usize> {
        usize::try_from(self.slots[slot]).ok()
    }

    /// The rank a slot is on.
    pub fn rank_of(&self, slot: usize) -> usize {
        slot / self.slots_per_rank
    }

    /// Some expert has more than one slot.
    pub fn is_replicated(&self) -> bool {
        self.replicas.slots.len() > self.experts()
    }

    /// The slot of each expert, where no expert has more than one.
    pub fn only_slots(&self) -> Option<&'a [u32]> {
        (!self.is_replicated()).then_some(&self.replicas.slots)
    }

    /// The slots of all experts, those of one ascending: expert e has `slots[starts[e]..starts[e + 1]]` of `(starts, slots)`.
    pub fn by_expert(&self) -> (&'a [u32], &'a [u32]) {
        (&self.replicas.starts, &self.replicas.slots)
    }

    /// The slots of an expert, ascending; never empty.
    pub fn replicas(&self, expert: usize) -> &'a [u32] {
        &self.replicas.slots[self.replicas.starts[expert] as usize..self.replicas.starts[expert + 1] as usize]
    }
}

impl Replicas {
    /// Inverts one layer's map: a counting sort of slots by expert.
    fn of(map: &[i32], layer_id: usize, slots_per_rank: usize, experts: usize) -> Result<Self> {
        let mut starts = vec![0u32; experts + 1];
        for (slot, &expert) in map.iter().enumerate().filter(|(_, expert)| **expert != EMPTY) {
            match usize::try_from(expert) {
                Ok(expert) if expert < experts => starts[expert + 1] += 1,
                _ => {
                    return refuse(format!(
                        "layer {layer_id}, slot {slot} (rank {}): expert {expert} is neither below {experts} nor {EMPTY} for an empty slot",
                        slot / slots_per_rank
                    ));
                }
            }
        }
        if let Some(expert) = starts[1..].iter().position(|&copies| copies == 0) {
            return refuse(format!("layer {layer_id}: expert {expert} has no slot"));
        }
        for expert in 0..experts {
            starts[expert + 1] += starts[expert];
        }
        let mut next = starts.clone();
        let mut slots = vec![0; starts[experts] as usize];
        for (slot, &expert) in map.iter().enumerate().filter(|(_, expert)| **expert != EMPTY) {
            let place = &mut next[expert as usize];
            slots[*place as usize] = slot as u32;
            *place += 1;
        }
        Ok(Replicas { starts, slots })
    }
}

/// Slots of a layer over all ranks.
fn checked_width(ranks: usize, slots_per_rank: usize, experts: usize) -> Result<usize> {
    if ranks == 0 || slots_per_rank == 0 || experts == 0 {
        return refuse(format!(
            "ranks, slots_per_rank and experts must be at least 1, given {ranks}, {slots_per_rank} and {experts}"
        ));
    }
    match ranks.checked_mul(slots_per_rank) {
        Some(width) if width <= MAX_SLOTS && experts <= width => Ok(width),
        Some(width) if width < experts => refuse(format!(
            "{ranks} ranks x {slots_per_rank} slots = {width} slots cannot hold {experts} experts"
        )),
        _ => refuse(format!("{ranks} ranks x {slots_per_rank} slots exceed the limit of {MAX_SLOTS} slots")),
    }
}

fn refuse<T>(why: String) -> Result<T> {
    Err(Error::Placement(why))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accessors_agree_with_the_map() {
        let map = vec![vec![2, 0, EMPTY, 1, 0, 2]];
        let placement = Placement::new(3, 2, 3, vec![5], map).unwrap().with_version(7);
        assert_eq!((placement.version(), placement.slots(), placement.layers()), (7, 6, 1));
        let layer = placement.layer(0);
        assert_eq!((layer.experts(), layer.ranks(), layer.slots_per_rank()), (3, 3, 2));
        assert_eq!(layer.replicas(0), [1, 4]);
        assert_eq!(layer.by_expert(), (&[0, 2, 3, 5][..], &[1, 4, 3, 0, 5][..]));
        assert_eq!(layer.replicas(1), [3]);
        assert_eq!(layer.replicas(2), [0, 5]);
        assert_eq!(layer.slots_of_rank(1), [EMPTY, 1]);
        assert_eq!((layer.expert_of(2), layer.expert_of(3)), (None, Some(1)));
        assert_eq!((layer.rank_of(1), layer.rank_of(4)), (0, 2));
        assert_eq!(layer.only_slots(), None, "expert 0 has two slots");
        let single = Placement::new(1, 4, 3, vec![5], vec![vec![2, EMPTY, 0, 1]]).unwrap();
        assert_eq!(single.layer(0).only_slots(), Some(&[2, 3, 0][..]));
    }

    #[test]
    fn refusals_name_thing_limit_and_value() {
        let refused = |ranks, per_rank, experts, ids: &[usize], map: &[&[i32]]| {
            let map = map.iter().map(|layer| layer.to_vec()).collect();
            Placement::new(ranks, per_rank, experts, ids.to_vec(), map).unwrap_err().to_string()
        };
        for (message, expected) in [
            (refused(0, 1, 1, &[0], &[&[0]]), "at least 1, given 0, 1 and 1"),
            (refused(2, 1, 3, &[0], &[&[0, 1]]), "2 ranks x 1 slots = 2 slots cannot hold 3 experts"),
            (refused(usize::MAX, 2, 1, &[0], &[&[0]]), "exceed the limit of 16777216 slots"),
            (refused(2, 1, 2, &[0, 1], &[&[0, 1]]), "1 layer maps for 2 layer ids"),
            (refused(2, 1, 2, &[3, 3], &[&[0, 1], &[0, 1]]), "3 follows 3"),
            (refused(2, 1, 2, &[4], &[&[0, 1, 0]]), "layer 4 lists 3 slots"),
            (refused(2, 1, 2, &[4], &[&[0, 2]]), "layer 4, slot 1 (rank 1): expert 2 is neither below 2"),
            (refused(2, 1, 2, &[4], &[&[0, -2]]), "expert -2"),
            (refused(2, 2, 2, &[4], &[&[0, 0, EMPTY, 0]]), "layer 4: expert 1 has no slot"),
        ] {
            assert!(message.contains(expected), "{message:?} should contain {expected:?}");
        }
    }

    #[test]
    fn cluster_limits() {
        let slots = |ranks, redundant| ClusterShape { ranks, redundant }.slots_per_rank(8);
        assert_eq!(slots(4, 0).unwrap(), 2);
        assert_eq!(slots(3, 0).unwrap(), 3);
        assert_eq!(slots(4, 2).unwrap(), 3);
        assert!(slots(0, 0).unwrap_err().to_string().contains("given 0 ranks and 8 experts"));
        for (ranks, redundant) in [(1, MAX_SLOTS - 7), (MAX_SLOTS + 1, 0), (usize::MAX, usize::MAX)] {
            assert!(slots(ranks, redundant).unwrap_err().to_string().contains("limit of 16777216 slots"));
        }
    }
}
