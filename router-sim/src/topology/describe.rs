//! Reading a description, and everything that it must satisfy.

use std::fs;
use std::path::Path;

use super::{Cluster, MAX_RANKS};
use crate::{Error, Result};

impl Cluster {
    /// Reads a description in TOML.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be read, otherwise as [`Cluster::from_toml`] with the path before the message.
    pub fn read(path: &Path) -> Result<Cluster> {
        let text = fs::read_to_string(path).map_err(|source| Error::Io { path: path.into(), source })?;
        Cluster::from_toml(&text).map_err(|e| match e {
            Error::Description(why) => Error::Description(format!("{}: {why}", path.display())),
            other => other,
        })
    }

    /// Parses a description in TOML.
    ///
    /// # Errors
    /// [`Error::Description`] with line and column for bad TOML or an unknown key, and with key, limit and value for a
    /// number that makes no sense.
    pub fn from_toml(text: &str) -> Result<Cluster> {
        let cluster: Cluster = toml::from_str(text).map_err(|e| Error::Description(e.to_string()))?;
        cluster.check()?;
        Ok(cluster)
    }

    /// The same cluster with another number of nodes.
    ///
    /// # Errors
    /// [`Error::Description`] as for a description that says so.
    pub fn with_nodes(mut self, nodes: usize) -> Result<Cluster> {
        self.nodes = nodes;
        self.check()?;
        Ok(self)
    }

    /// The same cluster with another price of a device, in dollars per hour.
    ///
    /// # Errors
    /// [`Error::Description`] as for a description that says so.
    pub fn with_price(mut self, usd_per_hour: f64) -> Result<Cluster> {
        self.device.usd_per_hour = Some(usd_per_hour);
        self.check()?;
        Ok(self)
    }

    fn check(&self) -> Result<()> {
        let ranks = self.nodes.saturating_mul(self.devices_per_node);
        if ranks == 0 || ranks > MAX_RANKS {
            return refuse(format!(
                "nodes = {} x devices-per-node = {} is not within 1..={MAX_RANKS} devices",
                self.nodes, self.devices_per_node
            ));
        }
        positive("device.memory-gib", self.device.memory_gib)?;
        positive("device.memory-gb-per-s", self.device.memory_gb_per_s)?;
        if self.device.tflops.is_empty() {
            return refuse("device.tflops names no precision; at least one of f32, bf16, fp8, fp4".into());
        }
        for (precision, &rate) in &self.device.tflops {
            positive(&format!("device.tflops.{}", precision.label()), rate)?;
        }
        if let Some(price) = self.device.usd_per_hour {
            not_negative("device.usd-per-hour", price)?;
        }
        for (key, link) in [("within-node", &self.within_node), ("host", &self.host)] {
            if let Some(link) = link {
                positive(&format!("{key}.gb-per-s"), link.gb_per_s)?;
                not_negative(&format!("{key}.latency-us"), link.latency_us)?;
            }
        }
        if self.devices_per_node > 1 && self.within_node.is_none() {
            return refuse(format!("{} devices on a node need [within-node]", self.devices_per_node));
        }
        match &self.between_nodes {
            None if self.nodes > 1 => refuse(format!("{} nodes need [between-nodes]", self.nodes)),
            None => Ok(()),
            Some(network) => {
                if !(1..=self.devices_per_node).contains(&network.rails) {
                    return refuse(format!(
                        "between-nodes.rails = {} is not within 1..={} devices of a node; bundle what is more",
                        network.rails, self.devices_per_node
                    ));
                }
                positive("between-nodes.gb-per-s", network.gb_per_s)?;
                not_negative("between-nodes.latency-us", network.latency_us)
            }
        }
    }
}

/// Bandwidths, rates and memories: what is divided by.
fn positive(key: &str, value: f64) -> Result<()> {
    match value.is_finite() && value > 0.0 {
        true => Ok(()),
        false => refuse(format!("{key} = {value} must be above 0 and finite")),
    }
}

fn not_negative(key: &str, value: f64) -> Result<()> {
    match value.is_finite() && value >= 0.0 {
        true => Ok(()),
        false => refuse(format!("{key} = {value} must be at least 0 and finite")),
    }
}

fn refuse<T>(why: String) -> Result<T> {
    Err(Error::Description(why))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::{DeviceKind, LinkKind, Precision};

    const NODE: &str = r#"
name = "test"
nodes = 2
devices-per-node = 4
[device]
name = "a GPU"
kind = "gpu"
memory-gib = 80
memory-gb-per-s = 3000
tflops = { bf16 = 900, fp8 = 1800 }
[within-node]
kind = "nvlink"
gb-per-s = 450
latency-us = 2
[between-nodes]
kind = "infiniband"
rails = 2
gb-per-s = 50
latency-us = 5
"#;

    #[test]
    fn a_description_is_read() {
        let cluster = Cluster::from_toml(NODE).unwrap();
        assert_eq!((cluster.devices(), cluster.node_of(3), cluster.node_of(4)), (8, 0, 1));
        assert_eq!((cluster.nodes_of(4), cluster.nodes_of(5)), (1, 2));
        assert_eq!((cluster.device.kind, cluster.device.tflops[&Precision::Fp8]), (DeviceKind::Gpu, 1800.0));
        assert_eq!(cluster.between_nodes.as_ref().unwrap().kind, LinkKind::Infiniband);
        assert_eq!(cluster.memory_bytes(), 80 << 30);
        let again = toml::to_string(&cluster).unwrap();
        assert_eq!(Cluster::from_toml(&again).unwrap(), cluster);
        assert_eq!(cluster.with_nodes(3).unwrap().devices(), 12);
    }

    #[test]
    fn refusals_name_key_limit_and_value() {
        let refused = |from: &str, to: &str| {
            assert!(NODE.contains(from), "{from}");
            Cluster::from_toml(&NODE.replacen(from, to, 1)).unwrap_err().to_string()
        };
        for (message, expected) in [
            (refused("nodes = 2", "nodes = 0"), "nodes = 0 x devices-per-node = 4 is not within 1..=65536"),
            (refused("nodes = 2", "nodes = 9223372036854775807"), "is not within 1..=65536"),
            (refused("nodes = 2", "nodes = -1"), "-1"),
            (refused("memory-gib = 80", "memory-gib = nan"), "device.memory-gib = NaN must be above 0"),
            (refused("bf16 = 900", "bf16 = 0"), "device.tflops.bf16 = 0 must be above 0"),
            (refused("{ bf16 = 900, fp8 = 1800 }", "{}"), "device.tflops names no precision"),
            (refused("{ bf16 = 900,", "{ int9 = 900,"), "int9"),
            (refused("rails = 2", "rails = 5"), "between-nodes.rails = 5 is not within 1..=4"),
            (
                refused("latency-us = 5", "latency-us = -5"),
                "between-nodes.latency-us = -5 must be at least 0",
            ),
            (refused("gb-per-s = 50\n", "gb-per-s = inf\n"), "between-nodes.gb-per-s = inf must be above 0"),
            (refused("latency-us = 2", "latencyus = 2"), "latencyus"),
        ] {
            assert!(message.contains(expected), "{message:?} should contain {expected:?}");
        }
        let (alone, _) = NODE.split_once("[between-nodes]").unwrap();
        assert!(Cluster::from_toml(alone).unwrap_err().to_string().contains("2 nodes need [between-nodes]"));
        let (alone, _) = NODE.split_once("[within-node]").unwrap();
        assert!(
            Cluster::from_toml(alone)
                .unwrap_err()
                .to_string()
                .contains("4 devices on a node need [within-node]")
        );
    }
}
