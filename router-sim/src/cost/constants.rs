//! The constants of the cost model: defaults that are typical, a file for those that were measured, flags for the rest.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::topology::Precision;
use crate::{Error, Result};

/// What crosses the wire, once per direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WireUnit {
    /// A row for every (token, expert) pair: what moeyard does, so that the owner can sum in top-k order.
    #[default]
    Row,
    /// A row for every distinct (token, rank) pair.
    Rank,
    /// A row for every distinct (token, node) pair between nodes, to the rank at the sender's place on that node, which
    /// passes it on within the node: what DeepSeek-V3 was trained and is served with (arXiv 2412.19437, 3.2.2).
    Node,
}

/// See the formulas in [`crate::cost`]. Shares are of the peaks in the cluster's description.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Constants {
    /// Share of the peak rate that matrix products reach.
    pub compute_efficiency: f64,
    /// Share of the peak memory bandwidth that reading weights reaches.
    pub memory_efficiency: f64,
    /// Share of a device's bandwidth within the node that an all-to-all reaches.
    pub within_node_efficiency: f64,
    /// Share of a rail's bandwidth that an all-to-all reaches.
    pub between_nodes_efficiency: f64,
    /// Starting a layer's experts on a rank.
    pub expert_overhead_us: f64,
    /// Starting one all-to-all, besides the latency of its links.
    pub exchange_overhead_us: f64,
    /// Starting the rest of a layer.
    pub layer_overhead_us: f64,
    /// Scheduling, sampling and everything else that comes once per step.
    pub step_overhead_us: f64,
    /// Share of dispatch and combine that runs behind computation, as with two batches in flight; 0 to 1.
    pub hidden_share: f64,
    /// How experts are stored; also what they multiply in, unless `math` says otherwise.
    pub expert_weights: Precision,
    /// What experts multiply in, where that is not what they are stored in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub math: Option<Precision>,
    /// How attention, shared experts, dense layers and the head are stored and multiplied.
    pub other_weights: Precision,
    /// How rows travel to the experts.
    pub dispatch: Precision,
    /// How results travel home.
    pub combine: Precision,
    /// What crosses the wire.
    pub wire: WireUnit,
    /// Tokens before each token, for the cost of attention.
    pub context_tokens: f64,
    /// Bandwidth that moving experts may take from a rank, 10^9 bytes per second.
    pub migration_gb_per_s: f64,
    /// What a layer waits when its placement switches.
    pub switch_us: f64,
    /// Measured: computing one token in one expert, instead of what is derived from `compute-efficiency`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expert_us_per_token: Option<f64>,
    /// Measured: reading one expert's weights, instead of what is derived from `memory-efficiency`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expert_us_per_activated: Option<f64>,
}

impl Default for Constants {
    fn default() -> Self {
        Constants {
            compute_efficiency: 0.6,
            memory_efficiency: 0.8,
            within_node_efficiency: 0.7,
            between_nodes_efficiency: 0.85,
            expert_overhead_us: 15.0,
            exchange_overhead_us: 10.0,
            layer_overhead_us: 30.0,
            step_overhead_us: 1000.0,
            hidden_share: 0.0,
            expert_weights: Precision::Bf16,
            math: None,
            other_weights: Precision::Bf16,
            dispatch: Precision::Bf16,
            combine: Precision::Bf16,
            wire: WireUnit::Row,
            context_tokens: 1024.0,
            migration_gb_per_s: 5.0,
            switch_us: 50.0,
            expert_us_per_token: None,
            expert_us_per_activated: None,
        }
    }
}

impl Constants {
    /// Reads a TOML file; keys that it does not name keep their defaults.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be read; [`Error::Description`] with the path for an unknown key or a number that
    /// makes no sense.
    pub fn read(path: &Path) -> Result<Constants> {
        let text = fs::read_to_string(path).map_err(|source| Error::Io { path: path.into(), source })?;
        let named = |why: String| Error::Description(format!("{}: {why}", path.display()));
        let constants: Constants = toml::from_str(&text).map_err(|e| named(e.to_string()))?;
        constants.check().map_err(|e| named(e.to_string()))?;
        Ok(constants)
    }

    /// Sets constants as a flag gives them: `key=value`, the keys and values of the file.
    ///
    /// # Errors
    /// [`Error::Description`] for an unknown key or a value that makes no sense.
    pub fn set(&mut self, assignments: &[String]) -> Result<()> {
        let mut table = toml::Table::try_from(&*self).expect("constants are a table");
        for assignment in assignments {
            let Some((key, value)) = assignment.split_once('=') else {
                return Err(Error::Description(format!("cost constant {assignment:?} is not key=value")));
            };
            let (key, value) = (key.trim(), value.trim());
            let value = match value.parse::<f64>() {
                Ok(number) => toml::Value::Float(number),
                Err(_) => toml::Value::String(value.to_owned()),
            };
            table.insert(key.to_owned(), value);
        }
        let set: Constants = table
            .try_into()
            .map_err(|e: toml::de::Error| Error::Description(format!("cost: {}", e.message())))?;
        set.check()?;
        *self = set;
        Ok(())
    }

    /// Every limit, with the value that breaks it.
    fn check(&self) -> Result<()> {
        let shares = [
            ("compute-efficiency", self.compute_efficiency),
            ("memory-efficiency", self.memory_efficiency),
            ("within-node-efficiency", self.within_node_efficiency),
            ("between-nodes-efficiency", self.between_nodes_efficiency),
        ];
        for (key, value) in shares {
            if !(value > 0.0 && value <= 1.0) {
                return refuse(key, value, "above 0 and at most 1");
            }
        }
        if !(0.0..=1.0).contains(&self.hidden_share) {
            return refuse("hidden-share", self.hidden_share, "within 0..=1");
        }
        if !(self.migration_gb_per_s.is_finite() && self.migration_gb_per_s > 0.0) {
            return refuse("migration-gb-per-s", self.migration_gb_per_s, "above 0 and finite");
        }
        let amounts = [
            ("expert-overhead-us", Some(self.expert_overhead_us)),
            ("exchange-overhead-us", Some(self.exchange_overhead_us)),
            ("layer-overhead-us", Some(self.layer_overhead_us)),
            ("step-overhead-us", Some(self.step_overhead_us)),
            ("context-tokens", Some(self.context_tokens)),
            ("switch-us", Some(self.switch_us)),
            ("expert-us-per-token", self.expert_us_per_token),
            ("expert-us-per-activated", self.expert_us_per_activated),
        ];
        for (key, value) in amounts {
            if let Some(value) = value.filter(|value| !(value.is_finite() && *value >= 0.0)) {
                return refuse(key, value, "at least 0 and finite");
            }
        }
        Ok(())
    }
}

fn refuse<T>(key: &str, value: f64, limit: &str) -> Result<T> {
    Err(Error::Description(format!("cost constant {key} = {value} must be {limit}")))
}
