//! Split: how the tokens of one expert are shared out among its replicas.
//!
//! A split is integer quotas per (source rank, slot), computed from every rank's counts: a pure function, so all
//! ranks that see the same counts decide alike without a word. A source rank then deals its rows of an expert to the
//! expert's slots in canonical order, rows ascending and k ascending within a row: the lowest slot first, until its
//! quota is used up, then the next. [`SplitPlan`] does both; [`Shares`] knows slots only, for those who have no sources:
//! simulations, bounds, reports.

mod plan;
mod shares;
mod leveler;
mod activated;
mod by_source;

pub use plan::SplitPlan;
pub use shares::{MAX_TOKENS, Optimum, Shares, even_balancedness, even_rank_loads};

use std::fmt;
use std::str::FromStr;

use crate::{Error, Result};

/// How quotas are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Split {
    /// Every replica of an expert gets the same number of tokens; lower slots get the remainder, one token each. The
    /// expert's tokens in canonical order (source rank, row, k) are cut into contiguous runs, so that few (source rank,
    /// slot) pairs exchange rows.
    #[default]
    Even,
    /// Every token goes to any replica, all equally likely, drawn from a generator that the seed and the counts start.
    Random {
        /// Another seed, other draws.
        seed: u64,
    },
    /// Every source rank sends all tokens of an expert to one replica: on the rank itself, else on its node, else anywhere.
    /// Among equally near ones, source ranks take turns.
    Nearest {
        /// Consecutive ranks that make a node; 0 when ranks have no nodes.
        ranks_per_node: usize,
    },
    /// Experts with one replica first, then the others, most tokens per replica first, each poured into the ranks that
    /// hold it so that the lowest rise together. Cheap, and good where much is replicated.
    WaterFill,
    /// No other split has a smaller largest rank load, nor, at equal largest, a smaller second, and so on. A
    /// source's own rank comes first for its tokens.
    Exact,
    /// For small batches, where reading an expert's weights takes longer than computing its tokens: keeps the largest
    /// max(activated experts x `expert_cost`, tokens x `token_cost`) of a rank small (METRO, arXiv 2512.09277, bounded by
    /// a roofline). Costs are in any common unit.
    Activated {
        /// Reading one expert's weights.
        expert_cost: u32,
        /// Computing one token.
        token_cost: u32,
    },
}

impl Split {
    /// [`Split::Activated`] where an expert takes as long to read as 300 tokens take to compute: the operations per byte
    /// of an H100 in bf16 (989 TFLOP/s, 3.35 TB/s), one multiply-add per parameter and token.
    pub const ACTIVATED: Split = Split::Activated { expert_cost: 300, token_cost: 1 };

    /// The names that [`Split::from_str`] knows.
    pub const NAMES: [&str; 6] = ["even", "random", "nearest", "waterfill", "exact", "activated"];

    /// As flags and reports call it.
    pub fn name(self) -> &'static str {
        match self {
            Split::Even => "even",
            Split::Random { .. } => "random",
            Split::Nearest { .. } => "nearest",
            Split::WaterFill => "waterfill",
            Split::Exact => "exact",
            Split::Activated { .. } => "activated",
        }
    }
}

impl fmt::Display for Split {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Split {
    type Err = Error;

    /// The split of that name: seed 0, no nodes, [`Split::ACTIVATED`]'s costs.
    fn from_str(name: &str) -> Result<Self> {
        match name {
            "even" => Ok(Split::Even),
            "random" => Ok(Split::Random { seed: 0 }),
            "nearest" => Ok(Split::Nearest { ranks_per_node: 0 }),
            "waterfill" => Ok(Split::WaterFill),
            "exact" => Ok(Split::Exact),
            "activated" => Ok(Split::ACTIVATED),
            _ => Err(Error::Impossible(format!("split {name:?} is not one of {}", Split::NAMES.join(", ")))),
        }
    }
}

#[cfg(test)]
mod tests;
