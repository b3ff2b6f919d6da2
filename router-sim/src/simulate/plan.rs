//! Placement policies by name, as flags and sweeps give them.

use crate::load::LoadWindow;
use crate::placement::{ClusterShape, Eplb, Linear, Placement, PlacementPolicy};
use crate::{Error, Result};

/// A placement policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PolicyName {
    /// Experts in order, without a look at the load.
    Linear,
    /// DeepSeek's balancer, over all ranks at once.
    Eplb,
    /// DeepSeek's balancer, which keeps groups of experts on a node.
    EplbHierarchical {
        /// Groups of consecutive experts.
        groups: usize,
        /// Nodes.
        nodes: usize,
    },
}

impl PolicyName {
    /// The one that plans best without a look at what moves: what others are measured against.
    pub const BEST: PolicyName = PolicyName::Eplb;

    /// The names that [`PolicyName::parse`] knows.
    pub const NAMES: [&str; 3] = ["linear", "eplb", "eplb-hierarchical"];

    /// As flags and reports call it.
    pub fn name(self) -> &'static str {
        match self {
            PolicyName::Linear => "linear",
            PolicyName::Eplb => "eplb",
            PolicyName::EplbHierarchical { .. } => "eplb-hierarchical",
        }
    }

    /// The policy of that name.
    ///
    /// # Errors
    /// [`Error::Impossible`] with the names there are.
    pub fn parse(name: &str, groups: usize, nodes: usize) -> Result<Self> {
        match name {
            "linear" => Ok(PolicyName::Linear),
            "eplb" => Ok(PolicyName::Eplb),
            "eplb-hierarchical" => Ok(PolicyName::EplbHierarchical { groups, nodes }),
            _ => Err(Error::Impossible(format!(
                "policy {name:?} is not one of {}",
                PolicyName::NAMES.join(", ")
            ))),
        }
    }
}

/// A placement for the load of the windows. `current` and `max_transfers` are for policies that mind what moves.
///
/// # Errors
/// [`Error::Impossible`] without windows, when the slots cannot hold all experts, or when a limit on transfers is asked of
/// a policy that replans from scratch.
pub fn plan(
    policy: PolicyName,
    windows: &[LoadWindow],
    shape: &ClusterShape,
    current: Option<&Placement>,
    max_transfers: Option<usize>,
) -> Result<Placement> {
    let Some((first, others)) = windows.split_first() else {
        return Err(Error::Impossible("a placement needs at least one window of load".into()));
    };
    if let Some(limit) = max_transfers {
        return Err(Error::Impossible(format!(
            "policy {} replans from scratch: it cannot keep to {limit} transfers per layer",
            policy.name()
        )));
    }
    let _ = current;
    let mut sum = first.clone();
    for window in others {
        sum.merge(window)?;
    }
    match policy {
        PolicyName::Linear => Linear.place(&sum, shape),
        PolicyName::Eplb => Eplb::GLOBAL.place(&sum, shape),
        PolicyName::EplbHierarchical { groups, nodes } => {
            Eplb::hierarchical(groups, nodes).place(&sum, shape)
        }
    }
}
