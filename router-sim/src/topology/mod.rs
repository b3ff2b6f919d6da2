//! Topology: the cluster that ranks run on, as a person describes it in TOML (configs/clusters has ready-made ones).
//!
//! A *node* is what shares a fast fabric (a server with NVLink, a rack-scale NVLink domain, a machine with CPU
//! sockets); a *device* is what one rank is bound to (a GPU, or the cores of a socket). Rank `r` is device
//! `r % devices-per-node` of node `r / devices-per-node`. All bandwidths are per direction, all peaks without sparsity.
//!
//! ```toml
//! name = "h100-4x8"
//! nodes = 4
//! devices-per-node = 8
//!
//! [device]
//! name = "H100 SXM5 80GB"
//! kind = "gpu"
//! memory-gib = 79.6
//! memory-gb-per-s = 3350
//! tflops = { f32 = 67, bf16 = 989, fp8 = 1979 }
//!
//! [within-node]            # per device
//! kind = "nvlink"
//! gb-per-s = 450
//! latency-us = 2
//!
//! [between-nodes]          # per rail; needed above one node
//! kind = "infiniband"
//! rails = 8
//! gb-per-s = 50
//! latency-us = 5
//! ```

mod describe;
mod shipped;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Most ranks of a cluster.
pub const MAX_RANKS: usize = 1 << 16;

/// A cluster; checked when it is read, so that every number in it is positive and finite.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Cluster {
    /// What reports call it.
    pub name: String,
    /// For people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// Nodes, at least 1.
    pub nodes: usize,
    /// Devices on each node, at least 1.
    pub devices_per_node: usize,
    /// What every rank runs on.
    pub device: Device,
    /// The fabric of a node. A single device needs none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub within_node: Option<Link>,
    /// The network. A single node needs none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub between_nodes: Option<Network>,
    /// Between the memory of a node and each of its devices; what loads weights that no device holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<Link>,
}

/// A GPU, or the cores and memory of a CPU socket.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Device {
    /// As its maker calls it.
    pub name: String,
    /// Which backend drives it.
    pub kind: DeviceKind,
    /// Memory that a process can allocate, in units of 2^30 bytes.
    pub memory_gib: f64,
    /// Peak bandwidth of that memory, 10^9 bytes per second.
    pub memory_gb_per_s: f64,
    /// Peak dense rate by operand type, 10^12 floating-point operations per second (a multiply-add is two).
    pub tflops: BTreeMap<Precision, f64>,
    /// Price of one device; gives cost per token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usd_per_hour: Option<f64>,
}

/// What a rank runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// An accelerator with memory of its own.
    Gpu,
    /// The cores of one socket or NUMA domain.
    Cpu,
}

/// Operand types of matrix products.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Single precision, on the units that keep all its bits.
    F32,
    /// bfloat16.
    Bf16,
    /// 8 bits, either layout.
    Fp8,
    /// 4 bits, with a scale of one byte for every 32 values.
    Fp4,
}

impl Precision {
    /// As descriptions and flags call it.
    pub fn label(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
            Precision::Fp8 => "fp8",
            Precision::Fp4 => "fp4",
        }
    }

    /// Bytes of one value.
    pub fn bytes(self) -> f64 {
        match self {
            Precision::F32 => 4.0,
            Precision::Bf16 => 2.0,
            Precision::Fp8 => 1.0,
            Precision::Fp4 => 17.0 / 32.0,
        }
    }
}

/// A point-to-point path.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Link {
    /// What it is made of.
    pub kind: LinkKind,
    /// Bandwidth per device and direction, 10^9 bytes per second.
    pub gb_per_s: f64,
    /// Time of an empty message.
    pub latency_us: f64,
}

/// What connects nodes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Network {
    /// What it is made of.
    pub kind: LinkKind,
    /// Network adapters of a node. The devices of a node share them in order: device `d` uses rail
    /// `d * rails / devices-per-node`.
    pub rails: usize,
    /// Bandwidth per rail and direction, 10^9 bytes per second.
    pub gb_per_s: f64,
    /// Time of an empty message.
    pub latency_us: f64,
}

/// Kinds of links. Only speed and latency enter figures; the kind is for people and for choosing a transport.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LinkKind {
    /// NVLink, through switches.
    NvLink,
    /// PCI Express.
    Pcie,
    /// The links between CPU sockets.
    Socket,
    /// Shared memory of one machine.
    Memory,
    /// InfiniBand.
    Infiniband,
    /// RDMA over Converged Ethernet.
    Roce,
    /// Ethernet through the kernel.
    Ethernet,
}

impl Cluster {
    /// Devices, which is the largest world.
    pub fn devices(&self) -> usize {
        self.nodes * self.devices_per_node
    }

    /// The node that a rank is on.
    pub fn node_of(&self, rank: usize) -> usize {
        rank / self.devices_per_node
    }

    /// Nodes that a world of this many ranks touches.
    pub fn nodes_of(&self, ranks: usize) -> usize {
        ranks.div_ceil(self.devices_per_node)
    }

    /// Memory of one device.
    pub fn memory_bytes(&self) -> u64 {
        (self.device.memory_gib * (1u64 << 30) as f64) as u64
    }
}
