//! moeyard's own policy: copies and places chosen together, on several windows, by search to a stated gap, with as few
//! transfers as asked for.
//!
//! Per layer. A first layout deals the copies of replicated experts out so that they link all ranks with each other
//! ([`build`]), which costs an even split nothing and lets an exact one move tokens anywhere. Exchanges with the most
//! loaded rank then level the rest ([`exchange`]). Where that is not enough, with several scenes, or from a current
//! placement with a limit on transfers, [`refine`] also changes which experts have how many copies.

mod align;
mod build;
mod exchange;
mod layout;
mod plan;
mod refine;
mod scenes;
#[cfg(test)]
mod tests;

use layout::NONE;
use plan::Task;
use scenes::Scenes;

use super::{ClusterShape, EMPTY, Eplb, Placement, PlacementPolicy};
use crate::load::LoadWindow;
use crate::{Error, Result};

/// The policy and what it is to respect. [`Moeyard::default`] knows no nodes, no failed ranks and no limit.
#[derive(Debug, Clone, PartialEq)]
pub struct Moeyard {
    /// The search for a layer ends when its largest load is within this part of the bound: 1e-4 is 0.01 %. It may end
    /// earlier where no change helps; the bound is [`crate::bounds::replica_bound`]'s.
    pub gap: f64,
    /// Most transfers per layer from the current placement; `None` plans afresh. [`Moeyard::transfers_within`] turns
    /// bytes into transfers.
    pub max_transfers: Option<usize>,
    /// Prefill's and decode's part of the step time, in any unit. `None`: as their tokens are.
    pub phase_shares: Option<[f64; 2]>,
    /// Load that is expected to drift: each expert's by a factor exp(drift x N(0,1)). Planning then also covers
    /// scenes drawn like that. 0 plans for the windows as they are.
    pub drift: f64,
    /// Groups of consecutive experts. With several groups and nodes, each group stays whole on one node.
    pub groups: usize,
    /// Nodes of equally many consecutive ranks.
    pub nodes: usize,
    /// Ranks that must stay empty.
    pub failed_ranks: Vec<usize>,
}

impl Default for Moeyard {
    fn default() -> Self {
        Moeyard {
            gap: 1e-4,
            max_transfers: None,
            phase_shares: None,
            drift: 0.0,
            groups: 1,
            nodes: 1,
            failed_ranks: Vec::new(),
        }
    }
}

impl PlacementPolicy for Moeyard {
    fn place(&self, load: &LoadWindow, cluster: &ClusterShape) -> Result<Placement> {
        self.replan(std::slice::from_ref(load), None, cluster)
    }

    /// Each window, and in it each phase, is a scene; the sum over scenes of the largest rank load is kept small. With one
    /// scene and no transfer limit the largest load is never above EPLB's.
    ///
    /// With a current placement, ranks are renamed and slots ordered so that what stays keeps its slot. With a limit, the
    /// current placement is changed, else planned afresh.
    fn replan(
        &self,
        windows: &[LoadWindow],
        current: Option<&Placement>,
        cluster: &ClusterShape,
    ) -> Result<Placement> {
        let Some(first) = windows.first() else {
            return Err(Error::Impossible("a placement needs at least one load window".into()));
        };
        let (experts, layer_ids) = (first.experts(), first.layer_ids());
        if let Some(other) = windows.iter().find(|w| w.experts() != experts || w.layer_ids() != layer_ids) {
            return Err(Error::Impossible(format!(
                "load windows differ in shape: {experts} experts in layers {layer_ids:?} and {} in {:?}",
                other.experts(),
                other.layer_ids()
            )));
        }
        let slots_per_rank = cluster.slots_per_rank(experts)?;
        self.check(experts, cluster.ranks, slots_per_rank)?;
        if let Some(current) = current {
            check_current(current, first, cluster.ranks, slots_per_rank)?;
        }
        let task = Task { policy: self, ranks: cluster.ranks, slots_per_rank };
        let mut layers = Vec::with_capacity(first.layers());
        for (layer, layer_id) in layer_ids.iter().enumerate() {
            let scenes = Scenes::of(windows, layer, self.phase_shares, self.drift);
            let current = current.map(|current| current.layer(layer));
            let slots = match (self.max_transfers, current) {
                (Some(limit), Some(current)) => task
                    .change(&scenes, current, limit)
                    .map_err(|why| Error::Impossible(format!("layer {layer_id}: {why}")))?,
                (_, Some(current)) => align::align(&task.plan(&scenes), current, self.nodes),
                (_, None) => task.plan(&scenes),
            };
            layers.push(slots.into_iter().map(|e| if e == NONE { EMPTY } else { e as i32 }).collect());
        }
        Placement::new(cluster.ranks, slots_per_rank, experts, layer_ids.to_vec(), layers)
    }
}

impl Moeyard {
    /// How many transfers of `expert_bytes` each fit into `bytes`.
    pub fn transfers_within(bytes: u64, expert_bytes: u64) -> usize {
        bytes.checked_div(expert_bytes).map_or(usize::MAX, |n| usize::try_from(n).unwrap_or(usize::MAX))
    }

    /// Whether groups are kept whole on nodes.
    fn keeps_groups(&self) -> bool {
        self.groups > 1 && self.nodes > 1
    }

    fn check(&self, experts: usize, ranks: usize, slots_per_rank: usize) -> Result<()> {
        let refuse = |why: String| Err(Error::Impossible(format!("moeyard policy: {why}")));
        if !(self.gap >= 0.0 && self.gap.is_finite()) {
            return refuse(format!("gap {} is not 0 or more", self.gap));
        }
        if !(0.0..=2.0).contains(&self.drift) {
            return refuse(format!("drift {} is not between 0 and 2", self.drift));
        }
        if let Some(shares) = self.phase_shares
            && !(shares.iter().all(|s| s.is_finite() && *s >= 0.0) && shares.iter().sum::<f64>() > 0.0)
        {
            return refuse(format!("phase shares {shares:?} are not both 0 or more with a positive sum"));
        }
        if let Some(rank) = self.failed_ranks.iter().find(|rank| **rank >= ranks) {
            return refuse(format!("failed rank {rank} is not below {ranks}"));
        }
        let active = (0..ranks).filter(|rank| !self.failed_ranks.contains(rank)).count();
        if active * slots_per_rank < experts {
            return refuse(format!(
                "{active} active ranks x {slots_per_rank} slots cannot hold {experts} experts"
            ));
        }
        if self.nodes == 0 || self.groups == 0 || !ranks.is_multiple_of(self.nodes) {
            return refuse(format!(
                "{ranks} ranks on {} nodes, {} groups: at least 1 of each, and whole numbers of ranks",
                self.nodes, self.groups
            ));
        }
        if self.keeps_groups() {
            if !self.failed_ranks.is_empty() || self.max_transfers.is_some() {
                return refuse("groups kept on nodes allow neither failed ranks nor a transfer limit".into());
            }
            Eplb::hierarchical(self.groups, self.nodes).check(experts, ranks)?;
        }
        Ok(())
    }
}

fn check_current(current: &Placement, load: &LoadWindow, ranks: usize, slots_per_rank: usize) -> Result<()> {
    let shape = |p: &Placement| (p.ranks(), p.slots_per_rank(), p.experts());
    if shape(current) != (ranks, slots_per_rank, load.experts()) || current.layer_ids() != load.layer_ids() {
        return Err(Error::Impossible(format!(
            "the current placement is for {} ranks x {} slots and {} experts in layers {:?}, not for {ranks} x {slots_per_rank} and {} in {:?}",
            current.ranks(),
            current.slots_per_rank(),
            current.experts(),
            current.layer_ids(),
            load.experts(),
            load.layer_ids()
        )));
    }
    Ok(())
}
