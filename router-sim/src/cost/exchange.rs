//! The endpoints of an all-to-all: how many units each port and each rail sends and receives.

use super::WireUnit;
use crate::topology::Cluster;

/// Units through every endpoint in one dispatch. Reused from layer to layer.
#[derive(Debug, Clone)]
pub struct Endpoints {
    ranks: usize,
    nodes: usize,
    devices_per_node: usize,
    rails: usize,
    /// `[ranks]`: through a device's port within its node.
    within_out: Vec<u64>,
    within_in: Vec<u64>,
    /// `[nodes][rails]`: through a network adapter.
    rail_out: Vec<u64>,
    rail_in: Vec<u64>,
}

impl Endpoints {
    /// The endpoints of `ranks` devices of a cluster.
    pub fn new(cluster: &Cluster, ranks: usize) -> Endpoints {
        let nodes = cluster.nodes_of(ranks);
        let rails = cluster.between_nodes.as_ref().map_or(1, |network| network.rails);
        Endpoints {
            ranks,
            nodes,
            devices_per_node: cluster.devices_per_node,
            rails,
            within_out: vec![0; ranks],
            within_in: vec![0; ranks],
            rail_out: vec![0; nodes * rails],
            rail_in: vec![0; nodes * rails],
        }
    }

    /// Nodes of the world.
    pub fn nodes(&self) -> usize {
        self.nodes
    }

    /// The node of a rank.
    pub fn node_of(&self, rank: usize) -> usize {
        rank / self.devices_per_node
    }

    /// Counts one dispatch. `to_ranks` `[ranks][ranks]` are the rows ([`WireUnit::Row`]) or distinct (token, rank) pairs
    /// (otherwise) from each source to each destination, `to_nodes` `[ranks][nodes]` the distinct (token, node) pairs,
    /// which only [`WireUnit::Node`] looks at.
    pub fn count(&mut self, unit: WireUnit, to_ranks: &[u32], to_nodes: &[u32]) {
        for counts in [&mut self.within_out, &mut self.within_in, &mut self.rail_out, &mut self.rail_in] {
            counts.fill(0);
        }
        for (source, row) in to_ranks.chunks_exact(self.ranks).enumerate() {
            for (destination, &units) in row.iter().enumerate() {
                if units > 0 && source != destination {
                    self.count_pair(unit, source, destination, u64::from(units));
                }
            }
        }
        if unit == WireUnit::Node {
            self.count_nodes(to_nodes);
        }
    }

    fn count_pair(&mut self, unit: WireUnit, source: usize, destination: usize, units: u64) {
        let (from, to) = (self.node_of(source), self.node_of(destination));
        let sender = match unit {
            WireUnit::Node if from != to => self.forwarder(source, to),
            _ if from != to => {
                let (out, arriving) = (self.rail(source), self.rail(destination));
                self.rail_out[out] += units;
                self.rail_in[arriving] += units;
                return;
            }
            _ => source,
        };
        if sender != destination {
            self.within_out[sender] += units;
            self.within_in[destination] += units;
        }
    }

    /// What crosses the network when each token goes to a node once.
    fn count_nodes(&mut self, to_nodes: &[u32]) {
        for (source, row) in to_nodes.chunks_exact(self.nodes).enumerate() {
            for (node, &units) in row.iter().enumerate() {
                if units > 0 && node != self.node_of(source) {
                    let (out, arriving) = (self.rail(source), self.rail(self.forwarder(source, node)));
                    self.rail_out[out] += u64::from(units);
                    self.rail_in[arriving] += u64::from(units);
                }
            }
        }
    }

    /// The rank of a node that takes a source's tokens and passes them on: the one at the source's place, or the last one
    /// of a node that is not full.
    fn forwarder(&self, source: usize, node: usize) -> usize {
        (node * self.devices_per_node + source % self.devices_per_node).min(self.ranks - 1)
    }

    fn rail(&self, rank: usize) -> usize {
        self.node_of(rank) * self.rails + rank % self.devices_per_node * self.rails / self.devices_per_node
    }

    /// Units through the most loaded port within a node, and through the most loaded rail.
    pub fn most_loaded(&self) -> (u64, u64) {
        let most = |out: &[u64], arriving: &[u64]| out.iter().chain(arriving).copied().max().unwrap_or(0);
        (most(&self.within_out, &self.within_in), most(&self.rail_out, &self.rail_in))
    }
}
