//! What a simulation found, as plain data: `simulate` and `advise` fill it in, the renderers show it, `--json` writes it.
//!
//! Times are in microseconds (`_us`), traffic in bytes, loads in tokens. Balancedness is mean over maximum, 1 is perfect.
//! A figure that is the mean over layers or steps says so; step times are never such means: they are sums over layers of
//! the slowest rank's time.

use serde::{Deserialize, Serialize};

/// A report: one input seen through one or more alternatives.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Of this structure: 1.
    pub version: u32,
    /// What was simulated.
    pub subject: Subject,
    /// Tokens of each expert over the whole input, `[layers][experts]`.
    pub expert_tokens: Vec<Vec<u64>>,
    /// The alternatives; the first one is what the others are compared with.
    pub runs: Vec<Run>,
    /// What moving more weights would bring, cheapest first.
    pub pareto: Vec<ParetoPoint>,
    /// Of `advise`.
    pub advice: Option<Advice>,
}

/// What was simulated.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Subject {
    /// Where the tokens came from.
    pub input: String,
    /// Where the load came from that placements were fitted on, when that is another input.
    pub fitted_on: Option<String>,
    /// Name of the model.
    pub model: String,
    /// Name of the cluster.
    pub cluster: String,
    /// Expert-parallel ranks.
    pub ranks: usize,
    /// Nodes they are on.
    pub nodes: usize,
    /// Logical experts per layer.
    pub experts: usize,
    /// Experts chosen per token.
    pub top_k: usize,
    /// Absolute indices of the MoE layers.
    pub layer_ids: Vec<usize>,
    /// Tokens that went through the model.
    pub tokens: u64,
    /// Of everything that is drawn.
    pub seed: u64,
}

/// One alternative.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// Short name, unique in the report.
    pub name: String,
    /// Placement policy.
    pub policy: String,
    /// Split between replicas.
    pub split: String,
    /// Slots per layer over all ranks.
    pub slots: usize,
    /// All layers together.
    pub totals: Totals,
    /// One per MoE layer.
    pub layers: Vec<LayerFigures>,
    /// Tokens that each rank computed in each layer, `[layers][ranks]`.
    pub rank_tokens: Vec<Vec<u64>>,
    /// Who sent how much to whom, over all layers and steps.
    pub traffic: Traffic,
    /// How it went over time; at most a few hundred points, each over one or more steps.
    pub timeline: Vec<TimePoint>,
    /// When weights moved.
    pub rebalances: Vec<Rebalance>,
    /// Where step time is lost, in the order in which losses are removed.
    pub losses: Vec<Loss>,
}

/// All layers together.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Totals {
    /// Steps simulated.
    pub steps: u64,
    /// Tokens of those steps.
    pub tokens: u64,
    /// Mean over layers of the placement's balancedness on the load it was planned for, evenly split.
    pub plan: f64,
    /// Mean over layers and steps of what the ranks got.
    pub actual: f64,
    /// Fifth percentile over layers and steps of the same.
    pub actual_p5: f64,
    /// Mean over layers and steps of the best split that the placement allows.
    pub best_split: f64,
    /// Mean over layers and steps of the best that any placement with as many slots allows.
    pub bound: f64,
    /// Mean over layers of the best that any placement allows on all tokens together if it keeps groups of experts whole on
    /// a node; `None` where the policy does not, or there are too many groups to search.
    #[serde(default)]
    pub group_bound: Option<f64>,
    /// Critical path of a mean step.
    pub step_us: f64,
    /// Part of it: attention, router, shared experts and what else does not depend on the placement.
    pub other_us: f64,
    /// Part of it: dispatch.
    pub dispatch_us: f64,
    /// Part of it: the slowest rank's experts.
    pub expert_us: f64,
    /// Part of it: combine.
    pub combine_us: f64,
    /// Part of it: waiting for moved weights, spread over all steps.
    pub stall_us: f64,
    /// Tokens per second, all ranks together.
    pub tokens_per_s: f64,
    /// What a million tokens cost; `None` without a price.
    pub usd_per_million_tokens: Option<f64>,
    /// Bytes of expert weights that moved between ranks.
    pub moved_bytes: f64,
    /// Slots that received another expert.
    pub transfers: u64,
    /// Expert weights per rank, all MoE layers.
    pub expert_bytes_per_rank: f64,
}

/// One MoE layer; means are over steps.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct LayerFigures {
    /// Absolute index.
    pub layer_id: usize,
    /// Balancedness on the load it was planned for, evenly split.
    pub plan: f64,
    /// Mean balancedness of what the ranks got.
    pub actual: f64,
    /// Its fifth percentile.
    pub actual_p5: f64,
    /// Mean for the best split that the placement allows.
    pub best_split: f64,
    /// Mean for the best placement with as many slots.
    pub bound: f64,
    /// The best on all tokens together if groups of experts stay whole on a node, where they must.
    #[serde(default)]
    pub group_bound: Option<f64>,
    /// Mean of the most loaded rank's tokens.
    pub max_tokens: f64,
    /// Mean number of experts that a rank had to read weights of.
    pub activated: f64,
    /// The same on the rank that had most.
    pub max_activated: f64,
    /// Mean of dispatch.
    pub dispatch_us: f64,
    /// Mean of the slowest rank's experts.
    pub expert_us: f64,
    /// Mean of combine.
    pub combine_us: f64,
}

/// Who sends how much to whom in dispatch; combine is the same the other way round, at its own bytes per row.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Traffic {
    /// What rows and columns of `bytes` are: "rank", or "node" where ranks would be too many to look at.
    pub between: String,
    /// `[source][destination]`; the diagonal stays at home.
    pub bytes: Vec<Vec<f64>>,
    /// (token, expert) pairs whose expert is on the token's own rank.
    pub local_rows: u64,
    /// (token, expert) pairs in all.
    pub rows: u64,
    /// Distinct (token, rank) pairs.
    pub rank_pairs: u64,
    /// Distinct (token, node) pairs.
    pub node_pairs: u64,
    /// Distinct (token, node) pairs where the node is not the token's own.
    pub remote_node_pairs: u64,
}

/// Means over one or more consecutive steps.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TimePoint {
    /// First step.
    pub step: u64,
    /// Steps.
    pub steps: u64,
    /// Since the beginning, at the first step.
    pub seconds: f64,
    /// Mean over layers of what the ranks got.
    pub actual: f64,
    /// Mean over layers of the best split.
    pub best_split: f64,
    /// Critical path.
    pub step_us: f64,
    /// Layers whose new placement has not arrived.
    pub layers_in_flight: usize,
}

/// A rebalance, from the decision to the last layer's switch.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Rebalance {
    /// Decided before this step.
    pub step: u64,
    /// The last layer switched before this step; `None` when the input ended first.
    pub done: Option<u64>,
    /// What asked for it.
    pub trigger: String,
    /// Slots that receive another expert, over all layers.
    pub transfers: u64,
    /// Bytes that those are.
    pub bytes: f64,
    /// Balancedness of the window before, mean over layers.
    pub before: f64,
    /// The same window under the new placement.
    pub after: f64,
}

/// A part of the step time that balance could win back.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Loss {
    /// "sampling noise", "split", "placement", "slots" or "structure".
    pub cause: String,
    /// Its part of the step time, 0 to 1.
    pub share: f64,
    /// The same in microseconds per step.
    pub us: f64,
    /// What would remove it, and at what price, for people.
    pub remedy: String,
    /// Bytes that would move, where that is the price.
    pub moved_bytes: Option<f64>,
    /// How long those travel, in microseconds.
    #[serde(default)]
    pub moving_us: Option<f64>,
    /// More memory per rank, where that is the price.
    pub memory_bytes: Option<f64>,
}

/// What moving up to a number of weights brings.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ParetoPoint {
    /// Name of the alternative.
    pub label: String,
    /// Slots that receive another expert, mean per layer.
    pub transfers_per_layer: f64,
    /// Bytes of all layers.
    pub bytes: f64,
    /// Mean balancedness reached.
    pub balancedness: f64,
    /// No other point has both fewer bytes and better balance.
    pub best: bool,
}

/// The answer of `advise`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Advice {
    /// Name of the run that is recommended.
    pub choice: String,
    /// Redundant slots per layer over all ranks.
    pub redundant: usize,
    /// Speed-up of a step over the first run: 0.1 is 10 % more tokens per second.
    pub gain: f64,
    /// The part of the step time that no placement and no split can win back.
    pub beyond_repair: f64,
    /// Memory of the redundant slots per rank.
    pub memory_bytes_per_rank: f64,
    /// Whether rebalancing while serving pays.
    pub verdict: Verdict,
    /// Sentences for people, most important first.
    pub reasons: Vec<String>,
}

/// Gain over the horizon against what moving costs, both in seconds of serving.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// The gain is above the cost and large enough to be noticed.
    pub worth_it: bool,
    /// Serving time that better balance saves over the horizon.
    pub gain_s: f64,
    /// Serving time lost to moving weights.
    pub cost_s: f64,
    /// The time between two rebalances that both are for.
    pub horizon_s: f64,
    /// Bytes of one rebalance.
    pub bytes: f64,
    /// The arithmetic in words.
    pub reason: String,
}

impl Verdict {
    /// A part of the serving time below which nobody would notice a gain, and no rebalance is worth its risk.
    pub const LEAST_GAIN: f64 = 1e-3;

    /// Whether the gain is large enough to be noticed.
    pub fn is_noticeable(&self) -> bool {
        self.gain_s >= Verdict::LEAST_GAIN * self.horizon_s
    }

    /// The verdict in two or three words; every report uses these.
    pub fn in_words(&self) -> &'static str {
        match self.worth_it {
            true => "worth it",
            false if self.is_noticeable() => "not worth it",
            false => "little to gain",
        }
    }
}
