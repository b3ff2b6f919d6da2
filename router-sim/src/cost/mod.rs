//! Cost: what a step takes on a cluster, from how its tokens were shared out.
//!
//! The model is deliberately small; every constant is in [`Constants`] and can be replaced by a measured one.
//!
//! # A MoE layer
//! ```text
//! layer    = other + (1 - hidden-share) x (dispatch + combine) + experts
//! experts  = max over ranks of [ max(compute, memory) + expert-overhead ]
//!   compute = tokens x 6 h i / (peak x compute-efficiency)
//!   memory  = (activated x 3 h i bytes-per-weight + tokens x (2 h + 6 i) x 2) / (bandwidth x memory-efficiency)
//! dispatch = latency + exchange-overhead + max over endpoints of bytes / (bandwidth x efficiency); combine alike
//! other    = roofline of attention, router and shared expert over the owned rows of the rank that has most, + layer-overhead
//! ```
//! `h` is the hidden size and `i` the width of an expert; `activated` are the slots of the rank that got a token. The
//! experts are a roofline (Williams, Waterman, Patterson: Roofline, CACM 52(4), 2009): with few tokens per expert the
//! weights are what is read, with many the products are what takes time. An all-to-all is as slow as its most loaded
//! endpoint, plus a latency (Hockney: The communication challenge for MPP, Parallel Computing 20(3), 1994): each device's
//! port within the node and each rail of a node are endpoints, both directions counted apart, and all run side by side.
//! [`WireUnit`] says what crosses the wire.
//!
//! # A step
//! A step is the sum over its layers, plus dense layers, the head and `step-overhead-us`. Because every MoE layer ends
//! in a collective, the maximum over ranks is taken in every layer before layers are summed.
//!
//! Attention is data-parallel here: each rank reads all attention weights and works on the rows it owns.

mod constants;
mod exchange;
mod model;

pub use constants::{Constants, WireUnit};
pub use exchange::Endpoints;
pub use model::{ModelShape, presets};

use crate::split::Split;
use crate::topology::{Cluster, Precision};
use crate::{Error, Result};

/// The costs of one model on one cluster, ready to be asked for every rank of every layer of every step.
#[derive(Debug, Clone, PartialEq)]
pub struct CostModel {
    unit: WireUnit,
    hidden_share: f64,
    expert_us_per_token: f64,
    expert_us_per_activated: f64,
    memory_us_per_token: f64,
    expert_overhead_us: f64,
    dispatch_bytes: f64,
    combine_bytes: f64,
    within: Wire,
    between: Wire,
    exchange_overhead_us: f64,
    moe_block: Block,
    dense_block: Block,
    dense_layers: f64,
    head: Block,
    step_overhead_us: f64,
    expert_bytes: f64,
    usd_per_us: Option<f64>,
    migration_us_per_byte: f64,
    switch_us: f64,
}

/// Microseconds per byte and per message.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Wire {
    us_per_byte: f64,
    latency_us: f64,
}

impl Wire {
    const NONE: Wire = Wire { us_per_byte: 0.0, latency_us: 0.0 };
}

/// A part of the model that every rank holds whole and runs over its own rows.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Block {
    compute_us_per_token: f64,
    weights_us: f64,
    /// Reading the cache of one generated token's context.
    context_us_per_decode_token: f64,
    overhead_us: f64,
}

impl Block {
    fn us(&self, tokens: f64, decode_tokens: f64) -> f64 {
        if tokens == 0.0 {
            return self.overhead_us;
        }
        let memory = self.weights_us + decode_tokens * self.context_us_per_decode_token;
        (tokens * self.compute_us_per_token).max(memory) + self.overhead_us
    }
}

impl CostModel {
    /// The model's costs on `ranks` devices of the cluster.
    ///
    /// # Errors
    /// [`Error::Description`] when the cluster has fewer devices than ranks or its devices no rate for a precision.
    pub fn new(
        cluster: &Cluster,
        ranks: usize,
        model: &ModelShape,
        constants: &Constants,
    ) -> Result<CostModel> {
        if ranks == 0 || ranks > cluster.devices() {
            return Err(Error::Description(format!(
                "{ranks} ranks do not fit cluster {}: {} nodes x {} devices = {}",
                cluster.name,
                cluster.nodes,
                cluster.devices_per_node,
                cluster.devices()
            )));
        }
        let c = constants;
        let flop_per_us = |precision: Precision| match cluster.device.tflops.get(&precision) {
            Some(rate) => Ok(rate * 1e6 * c.compute_efficiency),
            None => Err(Error::Description(format!(
                "{} has no rate for {}; its tflops list {}",
                cluster.device.name,
                precision.label(),
                cluster.device.tflops.keys().map(|p| p.label()).collect::<Vec<_>>().join(", ")
            ))),
        };
        let expert_rate = flop_per_us(c.math.unwrap_or(c.expert_weights))?;
        let rest_rate = flop_per_us(c.other_weights)?;
        let bytes_per_us = cluster.device.memory_gb_per_s * 1e3 * c.memory_efficiency;
        let (h, i) = (model.hidden as f64, model.expert_intermediate as f64);
        let expert_bytes = model.expert_bytes(c.expert_weights);
        let block = |parameters: f64, context: bool, overhead_us: f64| {
            let flop = 2.0 * parameters + if context { model.attention_flop(c.context_tokens) } else { 0.0 };
            let cache = if context { model.kv_bytes_per_token() * c.context_tokens } else { 0.0 };
            Block {
                compute_us_per_token: flop / rest_rate,
                weights_us: parameters * c.other_weights.bytes() / bytes_per_us,
                context_us_per_decode_token: cache / bytes_per_us,
                overhead_us,
            }
        };
        let attention = model.attention_parameters();
        let shared = 3.0 * h * model.shared_intermediate as f64;
        let dense = 3.0 * h * model.dense_intermediate as f64;
        let within = cluster.within_node.as_ref().map_or(Wire::NONE, |link| Wire {
            us_per_byte: 1.0 / (link.gb_per_s * 1e3 * c.within_node_efficiency),
            latency_us: link.latency_us,
        });
        let between = cluster.between_nodes.as_ref().map_or(Wire::NONE, |network| Wire {
            us_per_byte: 1.0 / (network.gb_per_s * 1e3 * c.between_nodes_efficiency),
            latency_us: network.latency_us,
        });
        Ok(CostModel {
            unit: c.wire,
            hidden_share: c.hidden_share,
            expert_us_per_token: c.expert_us_per_token.unwrap_or(6.0 * h * i / expert_rate),
            expert_us_per_activated: c.expert_us_per_activated.unwrap_or(expert_bytes / bytes_per_us),
            memory_us_per_token: (2.0 * h + 6.0 * i) * 2.0 / bytes_per_us,
            expert_overhead_us: c.expert_overhead_us,
            dispatch_bytes: h * c.dispatch.bytes(),
            combine_bytes: h * c.combine.bytes(),
            within,
            between,
            exchange_overhead_us: c.exchange_overhead_us,
            moe_block: block(attention + h * model.experts as f64 + shared, true, c.layer_overhead_us),
            dense_block: block(attention + dense, true, c.layer_overhead_us),
            dense_layers: model.dense_layers as f64,
            head: block(h * model.vocabulary as f64, false, 0.0),
            step_overhead_us: c.step_overhead_us,
            expert_bytes,
            usd_per_us: cluster.device.usd_per_hour.map(|usd| usd * ranks as f64 / 3.6e9),
            migration_us_per_byte: 1.0 / (c.migration_gb_per_s * 1e3),
            switch_us: c.switch_us,
        })
    }

    /// What crosses the wire.
    pub fn unit(&self) -> WireUnit {
        self.unit
    }

    /// Bytes of one expert's weights.
    pub fn expert_bytes(&self) -> f64 {
        self.expert_bytes
    }

    /// Bytes of one unit on its way to the experts.
    pub fn dispatch_bytes(&self) -> f64 {
        self.dispatch_bytes
    }

    /// One rank's experts of one layer, in microseconds.
    pub fn experts_us(&self, tokens: u64, activated: u64) -> f64 {
        if tokens == 0 {
            return 0.0;
        }
        let (tokens, activated) = (tokens as f64, activated as f64);
        let memory = activated * self.expert_us_per_activated + tokens * self.memory_us_per_token;
        (tokens * self.expert_us_per_token).max(memory) + self.expert_overhead_us
    }

    /// The decode split with this model's costs on this cluster: reading an expert against computing a token.
    pub fn activated_split(&self) -> Split {
        let token = self.expert_us_per_token.max(self.memory_us_per_token);
        let (token_cost, scale) = if token > 0.0 { (1000, 1000.0 / token) } else { (0, 1000.0) };
        Split::Activated { expert_cost: (self.expert_us_per_activated * scale) as u32, token_cost }
    }

    /// Tokens per activated expert at which products begin to take longer than reading the weights.
    pub fn ridge_tokens_per_expert(&self) -> f64 {
        let per_token = self.expert_us_per_token - self.memory_us_per_token;
        if per_token > 0.0 { self.expert_us_per_activated / per_token } else { f64::INFINITY }
    }

    /// One layer's dispatch and combine, in microseconds; what computation hides is left out.
    pub fn exchanges_us(&self, endpoints: &Endpoints) -> (f64, f64) {
        let (within, between) = endpoints.most_loaded();
        if within == 0 && between == 0 {
            return (0.0, 0.0);
        }
        let mut latency = 0.0f64;
        for (units, wire) in [(within, self.within), (between, self.between)] {
            if units > 0 {
                latency = latency.max(wire.latency_us);
            }
        }
        let us = |bytes: f64| {
            let within = within as f64 * bytes * self.within.us_per_byte;
            let between = between as f64 * bytes * self.between.us_per_byte;
            (1.0 - self.hidden_share) * (latency + self.exchange_overhead_us + within.max(between))
        };
        (us(self.dispatch_bytes), us(self.combine_bytes))
    }

    /// What a MoE layer costs besides experts and exchanges, on a rank that owns so many rows, in microseconds.
    pub fn other_us(&self, tokens: u64, decode_tokens: u64) -> f64 {
        self.moe_block.us(tokens as f64, decode_tokens as f64)
    }

    /// What a step costs outside its MoE layers, on a rank that owns so many rows, in microseconds. Only generated
    /// tokens need the head.
    pub fn outside_us(&self, tokens: u64, decode_tokens: u64) -> f64 {
        let (tokens, decode) = (tokens as f64, decode_tokens as f64);
        let head = if decode > 0.0 { self.head.us(decode, decode) } else { 0.0 };
        self.dense_layers * self.dense_block.us(tokens, decode) + head + self.step_overhead_us
    }

    /// How long a layer's new experts travel when the rank that receives most gets so many, in microseconds.
    pub fn migration_us(&self, transfers_to_one_rank: usize) -> f64 {
        transfers_to_one_rank as f64 * self.expert_bytes * self.migration_us_per_byte
    }

    /// How long a layer waits when its placement switches, in microseconds.
    pub fn switch_us(&self) -> f64 {
        self.switch_us
    }

    /// Price of the ranks for so long; `None` when the cluster has no price.
    pub fn usd(&self, us: f64) -> Option<f64> {
        self.usd_per_us.map(|price| price * us)
    }
}

#[cfg(test)]
mod tests;
