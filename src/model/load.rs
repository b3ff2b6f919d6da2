//! Fills one rank's weights: decides which slice of which tensor it owns, reads it, and packs it for the backend. A rank
//! reads nothing else, and holds few unpacked matrices at a time.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread;

use router_sim::placement::{EMPTY, Placement};
use router_sim::split::Split;

use crate::backend::{
    Backend, DType, HostData, HostMatrix, KvCache, KvShape, Matrix, Mlp, PaddedShape, Tensor,
};
use crate::error::Result;
use crate::layers::attention::{Attention, AttentionScratch};
use crate::layers::attention_gqa::{FullWidthNorm, GqaAttention, GqaScratch, QkNorm};
use crate::layers::attention_mla::{MlaAttention, MlaScratch, MlaShape};
use crate::layers::embedding::{Embedding, Head};
use crate::layers::linear::Linear;
use crate::layers::mlp::GatedMlp;
use crate::layers::norm::Norm;
use crate::layers::rope::RopeTable;
use crate::layers::{Rank, RowBuffer, upload_row};
use crate::model::transformer::{DecoderLayer, FeedForward, HostScratch, Scratch, Transformer};
use crate::model::{Routing, StepOutput};
use crate::moe::layer::{MoeLayer, MoeScratch, Shared};
use crate::moe::load::LoadCounters;
use crate::moe::migrate::{ExpertShape, Staging};
use crate::moe::router::Router;
use crate::spec::{self, Activation, ModelSpec};
use crate::weights::names::Role;
use crate::weights::{MlpKind, RoleShape, WeightReader, shard};

/// How large the things a rank holds besides weights are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Longest sequence.
    pub max_model_len: usize,
    /// Tokens per KV block.
    pub block_size: usize,
    /// KV blocks of this rank.
    pub kv_blocks: usize,
    /// Most rows in one step of a data-parallel rank.
    pub max_rows: usize,
    /// Most logit rows in one step of a data-parallel rank.
    pub max_logit_rows: usize,
    /// Experts whose weights may be on their way to a rank at once; 0 where experts stay where they are.
    pub staging_slots: usize,
}

/// Where the experts live and how their rows are shared out.
#[derive(Clone)]
pub struct Experts {
    /// At the start.
    pub placement: Arc<Placement>,
    /// Among the replicas of an expert; the same on all ranks.
    pub split: Split,
    /// Where this rank's router counts.
    pub counters: Arc<LoadCounters>,
}

/// Loads the share of `rank` and makes its cache and working space.
///
/// # Errors
/// [`crate::Error::Checkpoint`] when a tensor cannot be read, [`crate::Error::Memory`] when the device is full.
pub fn load(
    reader: WeightReader<'_>,
    spec: &ModelSpec,
    rank: Rank,
    experts: Experts,
    sizes: Sizes,
) -> Result<(Transformer, StepOutput)> {
    let experts_in = rank.precision.experts;
    assert!(
        rank.backend.has_experts_in(experts_in),
        "{} has no {experts_in:?} experts",
        rank.backend.describe()
    );
    let reader = reader.with_experts(experts_in);
    let loader = Loader { reader, spec, rank: &rank, backend: rank.backend.as_ref() };
    let mut layers = Vec::with_capacity(spec.layers.len());
    let mut moe_index = 0;
    for index in 0..spec.layers.len() {
        layers.push(loader.layer(index, moe_index, &experts.placement, sizes)?);
        moe_index += usize::from(spec.layers[index].ffn == spec::FeedForward::Moe);
    }
    let slots = experts.placement.slots_per_rank();
    let staging = Staging::new(loader.backend, sizes.staging_slots, loader.expert_shape(), slots)?;
    let mut transformer = Transformer {
        embedding: loader.embedding()?,
        layers,
        final_norm: loader.norm(Role::FinalNorm, 0)?,
        head: loader.head()?,
        rope: RopeTable::new(loader.backend, &spec.rope, sizes.max_model_len)?,
        residual_scale: spec.residual_scale,
        top_k: spec.moe.top_k,
        scratch: loader.scratch(sizes, experts.split)?,
        placement: experts.placement,
        staging,
        load: experts.counters,
        rank,
    };
    transformer.staging.reserve_wire(&mut transformer.rank)?;
    let backend = transformer.rank.backend.as_ref();
    let logits = backend.alloc(DType::F32, sizes.max_logit_rows, spec.vocab_size)?;
    Ok((transformer, StepOutput { logit_rows: Vec::new(), logits, routing: Routing::default() }))
}

/// What this rank holds of a cache.
pub fn kv_shape(attention: &spec::Attention, tp_rank: usize, tp: usize) -> KvShape {
    match *attention {
        spec::Attention::Gqa { kv_heads, head_dim, .. } => {
            KvShape::Gqa { kv_heads: shard::kv_heads(kv_heads, tp_rank, tp).len(), head_dim }
        }
        spec::Attention::Mla { kv_lora_rank, rope_dim, .. } => {
            KvShape::Mla { latent: kv_lora_rank, rope_dim }
        }
    }
}

struct Loader<'a> {
    reader: WeightReader<'a>,
    spec: &'a ModelSpec,
    rank: &'a Rank,
    backend: &'a dyn Backend,
}

impl Loader<'_> {
    fn tp(&self) -> (usize, usize) {
        (self.rank.tp.rank(), self.rank.tp.size())
    }

    fn layer(
        &self,
        index: usize,
        moe_index: usize,
        placement: &Placement,
        sizes: Sizes,
    ) -> Result<DecoderLayer> {
        let attention = match &self.spec.attention {
            spec::Attention::Gqa { .. } => Attention::Gqa(self.gqa(index)?),
            spec::Attention::Mla { .. } => Attention::Mla(self.mla(index)?),
        };
        let ffn = match self.spec.layers[index].ffn {
            spec::FeedForward::Dense { intermediate } => {
                let (rank, tp) = self.tp();
                let slice = shard::even(intermediate, rank, tp);
                FeedForward::Dense(self.mlp(MlpKind::Dense, index, slice, Activation::SiluMul)?)
            }
            spec::FeedForward::Moe => {
                FeedForward::Moe(Box::new(self.moe(index, moe_index, placement, sizes)?))
            }
        };
        Ok(DecoderLayer {
            input_norm: self.norm(Role::InputNorm, index)?,
            attention,
            cache: self.cache(sizes)?,
            post_attention_norm: self.norm(Role::PostAttentionNorm, index)?,
            ffn,
        })
    }

    fn cache(&self, sizes: Sizes) -> Result<KvCache> {
        let (rank, tp) = self.tp();
        let shape = kv_shape(&self.spec.attention, rank, tp);
        self.backend.alloc_kv(shape, self.rank.precision.activations, sizes.block_size, sizes.kv_blocks)
    }

    fn gqa(&self, layer: usize) -> Result<GqaAttention> {
        let spec::Attention::Gqa { heads, kv_heads, head_dim, scale, qk_norm, sinks, clip_qkv, .. } =
            self.spec.attention
        else {
            unreachable!("called for GQA only")
        };
        let (rank, tp) = self.tp();
        let own = shard::query_heads(heads, rank, tp);
        let own_kv = shard::kv_heads(kv_heads, rank, tp);
        let q_rows = shard::of_heads(own.clone(), head_dim);
        let kv_rows = shard::of_heads(own_kv.clone(), head_dim);
        let parts = [(Role::Q, q_rows.clone()), (Role::K, kv_rows.clone()), (Role::V, kv_rows.clone())];
        let qk_norm = match qk_norm {
            spec::QkNorm::Off => None,
            spec::QkNorm::PerHead => Some(QkNorm::PerHead {
                q: Norm::rms(self.vector(Role::QNorm, layer)?, self.spec.norm.eps),
                k: Norm::rms(self.vector(Role::KNorm, layer)?, self.spec.norm.eps),
            }),
            spec::QkNorm::FullWidth => Some(QkNorm::FullWidth(FullWidthNorm {
                q: self.upload(&self.reader.vector(Role::QNorm, layer, q_rows.clone())?)?,
                k: self.upload(&self.reader.vector(Role::KNorm, layer, kv_rows)?)?,
                q_width: heads * head_dim,
                k_width: kv_heads * head_dim,
                counts_keys: rank == 0 || shard::kv_heads(kv_heads, rank - 1, tp) != own_kv,
                eps: self.spec.norm.eps,
            })),
        };
        let sinks = match sinks {
            true => Some(self.upload(&self.reader.vector(Role::Sinks, layer, own.clone())?)?),
            false => None,
        };
        Ok(GqaAttention {
            qkv: self.stacked(layer, &parts)?,
            out: self.row_parallel(Role::O, layer, q_rows)?,
            heads: own.len(),
            kv_heads: own_kv.len(),
            head_dim,
            scale,
            window: self.spec.layers[layer].window,
            sinks,
            qk_norm,
            clip_qkv,
            rope_dim: self.spec.rope.dim,
            rope_interleaved: self.spec.rope.interleaved,
        })
    }

    fn mla(&self, layer: usize) -> Result<MlaAttention> {
        let spec::Attention::Mla { heads, scale, lora_norm_eps, .. } = self.spec.attention else {
            unreachable!("called for MLA only")
        };
        let (rank, tp) = self.tp();
        let own = shard::query_heads(heads, rank, tp);
        let shape = self.mla_shape(own.len());
        let q_rows = shard::of_heads(own.clone(), shape.nope_dim + shape.rope_dim);
        let kv_rows = shard::of_heads(own.clone(), shape.nope_dim + shape.v_dim);
        let down = shape.latent + shape.rope_dim;
        let lora_norm = |role| Ok::<_, crate::Error>(Norm::rms(self.vector(role, layer)?, lora_norm_eps));
        let (first, q_up) = match shape.q_lora {
            Some(rank) => {
                let up = self.stacked(layer, &[(Role::QB, q_rows)])?;
                ((Role::QA, 0..rank), Some((lora_norm(Role::QANorm)?, up)))
            }
            None => ((Role::Q, q_rows), None),
        };
        let kv_b = self.reader.matrix(Role::KvB, layer, kv_rows, 0..shape.latent)?;
        Ok(MlaAttention {
            down: self.stacked(layer, &[first, (Role::KvA, 0..down)])?,
            q_up,
            latent_norm: lora_norm(Role::KvANorm)?,
            kv_b: self.backend.pack_mla(
                &kv_b,
                shape.heads,
                shape.nope_dim,
                shape.v_dim,
                self.rank.precision.weights,
            )?,
            out: self.row_parallel(Role::O, layer, shard::of_heads(own, shape.v_dim))?,
            shape,
            scale,
            rope_interleaved: self.spec.rope.interleaved,
        })
    }

    /// Widths with `heads` heads on this rank.
    fn mla_shape(&self, heads: usize) -> MlaShape {
        let spec::Attention::Mla { q_lora_rank, kv_lora_rank, nope_dim, rope_dim, v_dim, .. } =
            self.spec.attention
        else {
            unreachable!("called for MLA only")
        };
        MlaShape { heads, q_lora: q_lora_rank, latent: kv_lora_rank, nope_dim, rope_dim, v_dim }
    }

    fn moe(&self, layer: usize, index: usize, placement: &Placement, sizes: Sizes) -> Result<MoeLayer> {
        let moe = &self.spec.moe;
        let expert_rank = self.rank.world.rank() / self.rank.expert_tp;
        let choice_bias = match moe.router.choice_bias {
            true => Some(self.vector(Role::ChoiceBias, layer)?),
            false => None,
        };
        Ok(MoeLayer {
            index,
            router: Router {
                linear: self.exact(Role::Router, layer)?,
                choice_bias,
                spec: moe.router.clone(),
            },
            slots: self.slots(layer, placement.layer(index).slots_of_rank(expert_rank), sizes)?,
            activation: moe.activation,
            shared: moe.shared.map(|shared| self.shared(layer, shared)).transpose()?,
        })
    }

    /// The experts of one layer's slots. They are read by threads of their own while those read before are packed.
    fn slots(&self, layer: usize, wanted: &[i32], sizes: Sizes) -> Result<Vec<Option<Mlp>>> {
        let mut slots = Vec::with_capacity(wanted.len());
        for &expert in wanted {
            // Weights may move to an empty slot: it has the memory for them.
            let empty = expert == EMPTY && sizes.staging_slots > 0;
            slots.push(empty.then(|| self.expert_shape().alloc(self.backend)).transpose()?);
        }
        let (reader, slice) = (self.reader, self.expert_slice());
        let next = AtomicUsize::new(0);
        let read = |sender: SyncSender<_>| {
            while let Some((slot, &expert)) = wanted.iter().enumerate().nth(next.fetch_add(1, Relaxed)) {
                let Ok(expert) = usize::try_from(expert) else { continue };
                let host = reader.mlp(MlpKind::Expert(expert), layer, slice.clone());
                if sender.send((slot, host)).is_err() {
                    return; // The other end has met an error.
                }
            }
        };
        thread::scope(|scope| {
            let (sender, arrivals) = sync_channel(0);
            for _ in 0..readers(self.rank.world.size()) {
                let sender = sender.clone();
                scope.spawn(|| read(sender));
            }
            drop(sender);
            for (slot, host) in arrivals {
                slots[slot] = Some(self.backend.pack_mlp(&host?, self.rank.precision.experts)?);
            }
            Ok(slots)
        })
    }

    /// The part of an expert's width that this rank holds.
    fn expert_slice(&self) -> std::ops::Range<usize> {
        let part = self.rank.world.rank() % self.rank.expert_tp;
        shard::even(self.spec.moe.intermediate, part, self.rank.expert_tp)
    }

    fn expert_shape(&self) -> ExpertShape {
        ExpertShape {
            hidden: self.spec.hidden_size,
            intermediate: self.expert_slice().len(),
            bias: self.spec.moe.expert_bias,
            dtype: self.rank.precision.experts,
        }
    }

    fn shared(&self, layer: usize, shared: spec::SharedExpert) -> Result<Shared> {
        Ok(Shared {
            mlp: self.mlp(MlpKind::Shared, layer, 0..shared.intermediate, Activation::SiluMul)?,
            gate: match shared.gated {
                true => Some(self.exact(Role::SharedGate, layer)?),
                false => None,
            },
        })
    }

    fn mlp(
        &self,
        kind: MlpKind,
        layer: usize,
        slice: std::ops::Range<usize>,
        activation: Activation,
    ) -> Result<GatedMlp> {
        let host = self.reader.mlp(kind, layer, slice)?;
        let dtype = match kind {
            MlpKind::Dense => self.rank.precision.weights,
            MlpKind::Shared | MlpKind::Expert(_) => self.rank.precision.experts,
        };
        Ok(GatedMlp { weights: self.backend.pack_mlp(&host, dtype)?, activation })
    }

    fn embedding(&self) -> Result<Embedding> {
        let host = self.reader.embedding(0..self.spec.vocab_size)?;
        let mut table = self.backend.alloc(self.rank.precision.weights, host.n, host.k)?;
        let bytes: &[u8] = match &host.data {
            HostData::F32(values) => bytemuck::cast_slice(values),
            HostData::Bf16(values) => bytemuck::cast_slice(values),
            HostData::Quantized(_) => unreachable!("only experts are quantised"),
        };
        self.backend.upload(bytes, table.view_mut())?;
        Ok(Embedding { table, scale: self.spec.embedding_scale })
    }

    fn head(&self) -> Result<Head> {
        let weight = self.pack(&self.reader.whole_matrix(Role::Head, 0)?)?;
        let bias = match self.spec.lm_head_bias {
            true => self.reader.bias(Role::Head, 0, 0..self.spec.vocab_size)?,
            false => None,
        };
        let bias = bias.map(|b| self.upload(&b)).transpose()?;
        Ok(Head { linear: Linear { weight, bias }, scale: self.spec.logits_scale })
    }

    fn norm(&self, role: Role, layer: usize) -> Result<Norm> {
        let weight = self.vector(role, layer)?;
        let bias = self.reader.bias(role, layer, 0..self.spec.hidden_size)?;
        let bias = bias.map(|b| self.upload(&b)).transpose()?;
        Ok(Norm { spec: self.spec.norm, weight, bias })
    }

    /// Rows of several matrices with the same inputs as one matrix, biases included.
    fn stacked(&self, layer: usize, parts: &[(Role, std::ops::Range<usize>)]) -> Result<Linear> {
        let mut rows: Option<HostMatrix> = None;
        let mut bias = Vec::new();
        let mut any_bias = false;
        for (role, range) in parts {
            let Some(RoleShape::Matrix { k, .. }) = self.reader.shape(*role) else {
                unreachable!("{role:?} is a matrix of this model")
            };
            let part = self.reader.matrix(*role, layer, range.clone(), 0..k)?;
            rows = Some(match rows {
                None => part,
                Some(above) => stack(above, part),
            });
            match self.reader.bias(*role, layer, range.clone())? {
                Some(values) => {
                    any_bias = true;
                    bias.extend(values);
                }
                None => bias.resize(bias.len() + range.len(), 0.0),
            }
        }
        let weight = self.pack(&rows.expect("at least one part"))?;
        let bias = if any_bias { Some(self.upload(&bias)?) } else { None };
        Ok(Linear { weight, bias })
    }

    /// A matrix of which this rank holds some inputs; its bias joins the sum once.
    fn row_parallel(&self, role: Role, layer: usize, inputs: std::ops::Range<usize>) -> Result<Linear> {
        let outputs = self.spec.hidden_size;
        let weight = self.pack(&self.reader.matrix(role, layer, 0..outputs, inputs)?)?;
        let bias = match self.rank.tp.rank() {
            0 => self.reader.bias(role, layer, 0..outputs)?,
            _ => None,
        };
        Ok(Linear { weight, bias: bias.map(|b| self.upload(&b)).transpose()? })
    }

    /// A whole matrix that computes in f32 whatever the activation type.
    fn exact(&self, role: Role, layer: usize) -> Result<Linear> {
        let host = self.reader.with_dtype(DType::F32).whole_matrix(role, layer)?;
        let bias = self.reader.bias(role, layer, 0..host.n)?;
        let weight = self.backend.pack_matrix(&host, DType::F32)?;
        Ok(Linear { weight, bias: bias.map(|b| self.upload(&b)).transpose()? })
    }

    fn pack(&self, host: &HostMatrix<'_>) -> Result<Matrix> {
        self.backend.pack_matrix(host, self.rank.precision.weights)
    }

    fn vector(&self, role: Role, layer: usize) -> Result<Tensor> {
        self.upload(&self.reader.whole_vector(role, layer)?)
    }

    fn upload(&self, values: &[f32]) -> Result<Tensor> {
        upload_row(self.backend, values)
    }

    fn scratch(&self, sizes: Sizes, split: Split) -> Result<Scratch> {
        let (hidden, dtype, rows) = (self.spec.hidden_size, self.rank.precision.activations, sizes.max_rows);
        let owned = rows.div_ceil(self.rank.tp.size());
        let (rank, tp) = self.tp();
        let heads = shard::query_heads(self.spec.attention.heads(), rank, tp).len();
        let attention = match kv_shape(&self.spec.attention, rank, tp) {
            KvShape::Gqa { kv_heads, head_dim } => {
                let shape = (heads, kv_heads, head_dim);
                AttentionScratch::Gqa(GqaScratch::new(self.backend, dtype, rows, shape)?)
            }
            KvShape::Mla { .. } => {
                let shape = self.mla_shape(heads);
                AttentionScratch::Mla(MlaScratch::new(self.backend, dtype, rows, shape)?)
            }
        };
        let exact = |rows| RowBuffer::new(self.backend, DType::F32, rows, hidden);
        let rounded = |rows| RowBuffer::operand(self.backend, dtype, rows, hidden);
        // A group of one reads and writes owned rows directly.
        let gathered = if tp == 1 { 1 } else { rows };
        Ok(Scratch {
            residual: exact(owned)?,
            normed: exact(owned)?,
            rounded: rounded(owned + PaddedShape::PADDING)?,
            gathered: rounded(gathered)?,
            partial: exact(rows)?,
            output: exact(owned)?,
            addend: None,
            chosen: exact(owned.min(sizes.max_logit_rows))?,
            attention,
            moe: MoeScratch::new(
                self.backend,
                dtype,
                self.spec.moe_layers().len(),
                owned,
                hidden,
                &self.spec.moe,
                split,
            )?,
            host: HostScratch::default(),
        })
    }
}

/// Threads that read the experts of one rank: each holds an unpacked one, where it does not lie in the file as it is wanted, so that
/// machines with few cores get one.
fn readers(ranks: usize) -> usize {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    (cores / ranks.max(1) / 4).clamp(1, 4)
}

/// Rows of `above`, then rows of `below`.
fn stack<'a>(above: HostMatrix<'a>, below: HostMatrix<'a>) -> HostMatrix<'a> {
    assert_eq!(above.k, below.k, "inputs of stacked matrices");
    let (n, k) = (above.n + below.n, above.k);
    let data = match (above.data, below.data) {
        (HostData::F32(mut a), HostData::F32(b)) => {
            a.extend(b);
            HostData::F32(a)
        }
        (HostData::Bf16(mut a), HostData::Bf16(b)) => {
            a.to_mut().extend_from_slice(&b);
            HostData::Bf16(a)
        }
        _ => unreachable!("one reader gives one type"),
    };
    HostMatrix { n, k, data }
}
