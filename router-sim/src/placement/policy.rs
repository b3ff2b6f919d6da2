//! Placement policies by name, as flags and sweeps give them.

use super::{ClusterShape, Eplb, Linear, Moeyard, Placement, PlacementPolicy};
use crate::load::LoadWindow;
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
    /// moeyard's own: several windows, few transfers; keeps groups on a node where both are several.
    Moeyard {
        /// Groups of consecutive experts.
        groups: usize,
        /// Nodes.
        nodes: usize,
    },
}

impl PolicyName {
    /// The one that plans best without a look at what moves: what others are measured against.
    pub const BEST: PolicyName = PolicyName::Moeyard { groups: 1, nodes: 1 };

    /// The names that [`PolicyName::parse`] knows.
    pub const NAMES: [&str; 4] = ["linear", "eplb", "eplb-hierarchical", "moeyard"];

    /// As flags and reports call it.
    pub fn name(self) -> &'static str {
        match self {
            PolicyName::Linear => "linear",
            PolicyName::Eplb => "eplb",
            PolicyName::EplbHierarchical { .. } => "eplb-hierarchical",
            PolicyName::Moeyard { .. } => "moeyard",
        }
    }

    /// Groups of experts and nodes, where each group must stay whole on a node.
    pub fn kept_groups(self) -> Option<(usize, usize)> {
        match self {
            PolicyName::EplbHierarchical { groups, nodes } | PolicyName::Moeyard { groups, nodes } => {
                Some((groups, nodes)).filter(|_| groups > 1 && nodes > 1)
            }
            PolicyName::Linear | PolicyName::Eplb => None,
        }
    }

    /// The policy of that name; groups and nodes are for those that keep groups of experts on a node.
    ///
    /// # Errors
    /// [`Error::Impossible`] with the names there are.
    pub fn parse(name: &str, groups: usize, nodes: usize) -> Result<Self> {
        match name {
            "linear" => Ok(PolicyName::Linear),
            "eplb" => Ok(PolicyName::Eplb),
            "eplb-hierarchical" => Ok(PolicyName::EplbHierarchical { groups, nodes }),
            "moeyard" => Ok(PolicyName::Moeyard { groups, nodes }),
            _ => Err(Error::Impossible(format!(
                "policy {name:?} is not one of {}",
                PolicyName::NAMES.join(", ")
            ))),
        }
    }
}

/// What a plan is to respect, for policies that can.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PlanOptions {
    /// Transfers per layer from the current placement; `None` without limit.
    pub max_transfers: Option<usize>,
    /// Prefill's and decode's part of the step time, in any unit; `None`: as their tokens are. Policies that do not tell
    /// phases apart plan on the sum of tokens.
    pub phase_shares: Option<[f64; 2]>,
}

/// A placement for the load of the windows, oldest first. `current` is for policies that mind what moves.
///
/// # Errors
/// [`Error::Impossible`] without windows, when the slots cannot hold all experts, or when a limit on transfers is asked of
/// a policy that replans from scratch.
pub fn plan(
    policy: PolicyName,
    windows: &[LoadWindow],
    shape: &ClusterShape,
    current: Option<&Placement>,
    options: PlanOptions,
) -> Result<Placement> {
    let PlanOptions { max_transfers, phase_shares } = options;
    match (policy, max_transfers) {
        (PolicyName::Moeyard { groups, nodes }, _) => {
            let policy = Moeyard { groups, nodes, max_transfers, phase_shares, ..Moeyard::default() };
            policy.replan(windows, current, shape)
        }
        (_, Some(limit)) => Err(Error::Impossible(format!(
            "policy {} replans from scratch: it cannot keep to {limit} transfers per layer",
            policy.name()
        ))),
        (PolicyName::Linear, None) => Linear.replan(windows, current, shape),
        (PolicyName::Eplb, None) => Eplb::GLOBAL.replan(windows, current, shape),
        (PolicyName::EplbHierarchical { groups, nodes }, None) => {
            Eplb::hierarchical(groups, nodes).replan(windows, current, shape)
        }
    }
}
