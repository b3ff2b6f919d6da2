//! Placement: which logical expert each slot of each rank holds, for all MoE layers, with a version number.

use crate::Result;
use crate::load::LoadWindow;

/// Marks a slot that holds no expert.
pub const EMPTY: i32 = -1;

/// The cluster a placement is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClusterShape {
    /// Expert-parallel ranks.
    pub ranks: usize,
    /// Slots per layer over all ranks beyond one per expert.
    pub redundant: usize,
}

impl ClusterShape {
    /// Slots on each rank: experts + redundant, rounded up to a multiple of the ranks.
    pub fn slots_per_rank(&self, experts: usize) -> usize {
        (experts + self.redundant).div_ceil(self.ranks)
    }
}

/// Decides where experts live. Pure and deterministic: the same window and shape give the same placement anywhere.
pub trait PlacementPolicy {
    /// A valid placement for the cluster. Every expert gets at least one slot.
    ///
    /// # Errors
    /// [`Error::Impossible`] when the slots cannot hold all experts.
    fn place(&self, load: &LoadWindow, cluster: &ClusterShape) -> Result<Placement>;
}

/// Slot -> expert map of all MoE layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    ranks: usize,
    slots_per_rank: usize,
    experts: usize,
    layer_ids: Vec<usize>,
    /// `[layers][ranks * slots_per_rank]`, rank-major, [`EMPTY`] where nothing lives.
    slots: Vec<Vec<i32>>,
}
