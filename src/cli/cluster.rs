//! What a model and a configuration come to on a described cluster, before a weight is anywhere: what every rank would
//! hold, what is left for the KV cache, and what stands in the way.

use std::fmt;

use router_sim::topology::{Cluster, DeviceKind};

use crate::backend::reference::ReferenceBackend;
use crate::config::flags::DeviceChoice;
use crate::config::parallel::MAX_RANKS;
use crate::config::size::ByteSize;
use crate::config::{Options, RawOptions};
use crate::error::Result;
use crate::model::footprint::{Footprint, Share};
use crate::model::load::Sizes;
use crate::model::world::Degrees;
use crate::spec::ModelSpec;

/// Share of what weights and working space leave that the KV cache takes by default; the rest is for the driver, the
/// communication library, and rows in flight when load is uneven.
const KV_SHARE: f64 = 0.9;

/// One rank of a run on a described device.
#[derive(Debug, Clone, PartialEq)]
pub struct ClusterPlan {
    /// As its description calls it.
    pub cluster: String,
    /// Nodes that the ranks touch.
    pub nodes: usize,
    /// Ranks, one to a device.
    pub ranks: usize,
    /// Devices there are.
    pub devices: usize,
    /// What a rank runs on.
    pub device: String,
    /// Memory of one device.
    pub device_bytes: u64,
    /// What the largest rank holds; bytes without the padding of a device's own layout.
    pub footprint: Footprint,
    /// KV cache of a rank.
    pub kv_bytes: u64,
    /// Tokens that it holds, over all sequences of a rank.
    pub kv_tokens: u64,
    /// Sequences of the full length that this is, over all data-parallel ranks; 0 when not even one fits.
    pub full_sequences: u64,
    /// Longest sequence.
    pub max_model_len: usize,
    /// Why it cannot run there whatever the software.
    pub impossible: Vec<String>,
    /// Why this version does not run it yet.
    pub unsupported: Vec<String>,
    /// What has not been run on such devices.
    pub untried: Option<String>,
}

impl ClusterPlan {
    /// Plans a run of `raw` on `cluster`.
    ///
    /// # Errors
    /// [`crate::Error::Config`] for options that fit no machine, such as degrees that do not divide the model.
    pub fn new(spec: &ModelSpec, raw: &RawOptions, cluster: &Cluster) -> Result<ClusterPlan> {
        let options = Options::resolve(raw.clone(), spec, 1)?;
        let parallel = options.parallel;
        let max_model_len = options.scheduler.max_model_len.unwrap_or(spec.max_position_embeddings);
        let sizes = Sizes {
            max_model_len,
            block_size: options.cache.block_size,
            kv_blocks: 0,
            max_rows: options.scheduler.max_num_batched_tokens,
            max_logit_rows: options.scheduler.max_num_seqs,
            staging_slots: options.experts.staging_slots,
        };
        let footprint = Footprint::of(
            spec,
            Share {
                backend: &ReferenceBackend,
                degrees: Degrees {
                    tensor_parallel: parallel.tp,
                    data_parallel: parallel.dp,
                    expert_tp: parallel.expert_tp,
                },
                slots: options.experts.slots_per_rank,
                precision: options.model.precision(&spec.moe.router),
                sizes,
            },
        );
        let device_bytes = cluster.memory_bytes();
        let left = device_bytes.saturating_sub(footprint.weights.saturating_add(footprint.working));
        let kv_bytes = options.cache.memory.map_or((left as f64 * KV_SHARE) as u64, |ByteSize(bytes)| bytes);
        let kv_tokens = kv_bytes / footprint.kv_block.max(1) * sizes.block_size as u64;
        let mut plan = ClusterPlan {
            cluster: cluster.name.clone(),
            nodes: cluster.nodes_of(parallel.world),
            ranks: parallel.world,
            devices: cluster.devices(),
            device: cluster.device.name.clone(),
            device_bytes,
            footprint,
            kv_bytes,
            kv_tokens,
            full_sequences: kv_tokens / max_model_len.max(1) as u64 * parallel.dp as u64,
            max_model_len,
            impossible: Vec::new(),
            unsupported: Vec::new(),
            untried: None,
        };
        plan.impossible = plan.obstacles(raw, cluster, left);
        plan.unsupported = plan.missing();
        plan.untried = plan.unseen(raw, cluster);
        Ok(plan)
    }

    /// What no software could change.
    fn obstacles(&self, raw: &RawOptions, cluster: &Cluster, left: u64) -> Vec<String> {
        let mut found = Vec::new();
        if self.ranks > self.devices {
            found
                .push(format!("{} ranks need as many devices, the cluster has {}", self.ranks, self.devices));
        }
        let bytes = |n| ByteSize(n).to_string();
        let Footprint { weights, working, .. } = self.footprint;
        if left == 0 {
            let (need, have) = (bytes(weights.saturating_add(working)), bytes(self.device_bytes));
            found.push(format!(
                "weights {} + working space {} = {need} per rank exceed the {have} of a device",
                bytes(weights),
                bytes(working)
            ));
        } else if self.kv_bytes > left {
            found.push(format!(
                "a KV cache of {} exceeds the {} that are left",
                bytes(self.kv_bytes),
                bytes(left)
            ));
        } else if self.full_sequences == 0 {
            found.push(format!(
                "the KV cache holds {} tokens of a rank, fewer than one sequence of {}: lower max-model-len",
                self.kv_tokens, self.max_model_len
            ));
        }
        let wanted = match cluster.device.kind {
            DeviceKind::Gpu => DeviceChoice::Cuda,
            DeviceKind::Cpu => DeviceChoice::Cpu,
        };
        if let Some(quantize) = raw.quantize.filter(|quantize| quantize.device() != wanted) {
            found.push(quantize.where_computed());
        }
        if raw.device.is_some_and(|given| given != DeviceChoice::Auto && given != wanted) {
            found.push(format!("the configuration is for another kind of device than {}", self.device));
        }
        found
    }

    /// What this version lacks.
    fn missing(&self) -> Vec<String> {
        let mut found = Vec::new();
        if self.nodes > 1 {
            found
                .push(format!("all ranks live in one process so far, but these are on {} nodes", self.nodes));
        }
        if self.ranks > MAX_RANKS {
            found.push(format!("{} ranks are more than {MAX_RANKS}", self.ranks));
        }
        found
    }

    /// What this version does, and what nobody has seen it do.
    fn unseen(&self, raw: &RawOptions, cluster: &Cluster) -> Option<String> {
        if cluster.device.kind != DeviceKind::Gpu {
            return None;
        }
        let mut found = Vec::new();
        if self.ranks > 1 {
            let ranks = self.ranks;
            found.push(format!(
                "{ranks} ranks exchange rows by NCCL, which this version has run on a single GPU only"
            ));
        }
        if let Some(quantize) = raw.quantize.filter(|quantize| quantize.device() == DeviceChoice::Cuda) {
            found.push(format!("{} experts, which this version has run on no GPU", quantize.name()));
        }
        (!found.is_empty()).then(|| found.join("; "))
    }

    /// Nothing stands in the way.
    pub fn runs_today(&self) -> bool {
        self.impossible.is_empty() && self.unsupported.is_empty()
    }
}

impl fmt::Display for ClusterPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = |label: &str, value: String| writeln!(f, "{:<20}{value}", format!("{label}:"));
        let bytes = |n| ByteSize(n).to_string();
        let plural = if self.nodes == 1 { "" } else { "s" };
        line(
            "cluster",
            format!(
                "{}: {} of {} devices on {} node{plural}",
                self.cluster, self.ranks, self.devices, self.nodes
            ),
        )?;
        line("device", format!("{}, {}", self.device, bytes(self.device_bytes)))?;
        line("weights per rank", bytes(self.footprint.weights))?;
        if self.footprint.redundant > 0 {
            line("  extra slots", bytes(self.footprint.redundant))?;
        }
        if self.footprint.staging > 0 {
            line("  staging", bytes(self.footprint.staging))?;
        }
        line("working space", bytes(self.footprint.working))?;
        line("KV cache per rank", format!("{}, {} tokens", bytes(self.kv_bytes), self.kv_tokens))?;
        line("KV capacity", format!("{} sequences of {} tokens", self.full_sequences, self.max_model_len))?;
        for why in &self.impossible {
            line("does not fit", why.clone())?;
        }
        for why in &self.unsupported {
            line("not yet", why.clone())?;
        }
        if let Some(what) = &self.untried {
            line("untried", what.clone())?;
        }
        line("runs today", if self.runs_today() { "yes" } else { "no" }.to_owned())
    }
}
