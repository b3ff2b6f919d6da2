//! The first record: what the numbers of the others mean.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::bits;
use crate::placement::{Expected, Placement, PlacementFile};

/// Most experts per layer: ids are read back as `u16`.
const MAX_EXPERTS: usize = 1 << 16;
/// Most expert ids that one row may have, over all layers.
const MAX_IDS_PER_ROW: usize = 1 << 20;
/// Most ranks of a world.
const MAX_WORLD: usize = 1 << 16;

/// Everything about a run that does not change while it lasts.
#[derive(Debug, Clone, PartialEq)]
pub struct TraceHeader {
    /// Digest of the model specification: equal digests route alike.
    pub spec_digest: String,
    /// The `model_type` of the checkpoint.
    pub family: String,
    /// Experts chosen per token.
    pub top_k: usize,
    /// Parallel degrees.
    pub degrees: Degrees,
    /// Topology: the node that each rank of the world is on.
    pub node_of_rank: Vec<u32>,
    /// Settings of rebalancing and split, as `name -> value`.
    pub policy: BTreeMap<String, String>,
    /// Constants of the cost model, with the unit last in each name (`expert_ns_per_token`); finite.
    pub cost: BTreeMap<String, f64>,
    /// Whether and how router weights are stored.
    pub weights: WeightFormat,
    /// The placement that the run starts with; it also knows experts and MoE layers.
    pub placement: Placement,
}

/// Parallel degrees of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Degrees {
    /// Tensor parallel.
    pub tensor: usize,
    /// Data parallel.
    pub data: usize,
    /// Expert parallel: the ranks of the placement.
    pub expert: usize,
    /// Pipeline stages.
    pub pipeline: usize,
}

impl Degrees {
    /// Ranks of the world; `None` when that overflows.
    pub fn world(&self) -> Option<usize> {
        self.tensor.checked_mul(self.data)?.checked_mul(self.pipeline)
    }
}

/// How router weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WeightFormat {
    /// Not at all.
    None,
    /// As computed.
    F32,
    /// Rounded to nearest even: half the bytes.
    Bf16,
}

impl WeightFormat {
    /// Bytes of one weight.
    pub(super) fn bytes(self) -> usize {
        match self {
            WeightFormat::None => 0,
            WeightFormat::F32 => 4,
            WeightFormat::Bf16 => 2,
        }
    }
}

/// The JSON form.
#[derive(Serialize, Deserialize)]
struct HeaderFields {
    spec_digest: String,
    family: String,
    layer_ids: Vec<usize>,
    experts: usize,
    top_k: usize,
    degrees: Degrees,
    node_of_rank: Vec<u32>,
    policy: BTreeMap<String, String>,
    cost: BTreeMap<String, f64>,
    weights: WeightFormat,
    placement_version: u64,
    placement: PlacementFile,
}

impl TraceHeader {
    /// Ranks of the world.
    pub fn world(&self) -> usize {
        self.node_of_rank.len()
    }

    /// Expert ids of one row: MoE layers times top-k.
    pub fn ids_per_row(&self) -> usize {
        self.placement.layers() * self.top_k
    }

    /// What a placement read from this trace must fit.
    pub(super) fn expected(&self) -> Expected<'_> {
        Expected {
            ranks: Some(self.degrees.expert),
            experts: self.placement.experts(),
            layer_ids: self.placement.layer_ids(),
        }
    }

    /// Bits that one row's ids take.
    pub(super) fn id_bits_per_row(&self) -> usize {
        self.ids_per_row() * bits::width(self.placement.experts()) as usize
    }

    /// The payload of the header record.
    ///
    /// # Errors
    /// Why a reader would refuse it.
    pub(super) fn encode(&self) -> Result<Vec<u8>, String> {
        self.check()?;
        let fields = HeaderFields {
            spec_digest: self.spec_digest.clone(),
            family: self.family.clone(),
            layer_ids: self.placement.layer_ids().to_vec(),
            experts: self.placement.experts(),
            top_k: self.top_k,
            degrees: self.degrees,
            node_of_rank: self.node_of_rank.clone(),
            policy: self.policy.clone(),
            cost: self.cost.clone(),
            weights: self.weights,
            placement_version: self.placement.version(),
            placement: self.placement.to_file(),
        };
        let payload = serde_json::to_vec(&fields).map_err(|e| e.to_string())?;
        match payload.len() {
            n if n > super::MAX_PAYLOAD_BYTES => {
                Err(format!("the header has {n} bytes, the limit is {}", super::MAX_PAYLOAD_BYTES))
            }
            _ => Ok(payload),
        }
    }

    /// Reads the payload of the header record.
    pub(super) fn decode(payload: &[u8]) -> Result<Self, String> {
        let fields: HeaderFields =
            serde_json::from_slice(payload).map_err(|e| format!("the header is not valid: {e}"))?;
        let expected = Expected {
            ranks: Some(fields.degrees.expert),
            experts: fields.experts,
            layer_ids: &fields.layer_ids,
        };
        let placement = fields.placement.check(&expected).map_err(|e| e.to_string())?;
        let header = TraceHeader {
            spec_digest: fields.spec_digest,
            family: fields.family,
            top_k: fields.top_k,
            degrees: fields.degrees,
            node_of_rank: fields.node_of_rank,
            policy: fields.policy,
            cost: fields.cost,
            weights: fields.weights,
            placement: placement.with_version(fields.placement_version),
        };
        header.check()?;
        Ok(header)
    }

    /// Every limit on a header, with the value that breaks it.
    fn check(&self) -> Result<(), String> {
        let (experts, layers) = (self.placement.experts(), self.placement.layers());
        if experts > MAX_EXPERTS {
            return Err(format!("{experts} experts exceed the limit of {MAX_EXPERTS}"));
        }
        if self.top_k == 0 || self.top_k > experts {
            return Err(format!("top_k {} is not within 1..={experts} experts", self.top_k));
        }
        if layers == 0 || layers.saturating_mul(self.top_k) > MAX_IDS_PER_ROW {
            return Err(format!(
                "{layers} MoE layers x top_k {} are not within 1..={MAX_IDS_PER_ROW}",
                self.top_k
            ));
        }
        let Degrees { tensor, data, pipeline, expert } = self.degrees;
        match self.degrees.world() {
            Some(world) if (1..=MAX_WORLD).contains(&world) => {
                if self.node_of_rank.len() != world {
                    return Err(format!(
                        "node_of_rank has {} entries for {world} ranks",
                        self.node_of_rank.len()
                    ));
                }
            }
            _ => {
                return Err(format!(
                    "degrees {tensor} x {data} x {pipeline} are not within 1..={MAX_WORLD} ranks"
                ));
            }
        }
        if expert != self.placement.ranks() {
            return Err(format!("degree {expert} for a placement on {} ranks", self.placement.ranks()));
        }
        match self.cost.iter().find(|(_, value)| !value.is_finite()) {
            Some((name, value)) => Err(format!("cost constant {name} is {value}, which is not finite")),
            None => Ok(()),
        }
    }
}
