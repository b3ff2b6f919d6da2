//! The KV cache and attention over it.

use super::dense::{dot, linear};
use super::host::{Host, rounded};
use crate::backend::{AttentionBatch, DType, GqaArgs, KvCache, KvShape, MlaArgs, SeqSpan, View};

/// Columns of the cache's two parts, `[blocks * block_size, width]` each: keys and values, or latents and rotary keys.
pub(super) fn token_widths(shape: KvShape) -> (usize, usize) {
    match shape {
        KvShape::Gqa { kv_heads, head_dim } => (kv_heads * head_dim, kv_heads * head_dim),
        KvShape::Mla { latent, rope_dim } => (latent, rope_dim),
    }
}

/// Where in the cache's parts a position of a sequence lies.
fn cache_row(span: &SeqSpan, position: usize, table: &[u32], block_size: usize) -> usize {
    let block = table[span.first_block as usize + position / block_size] as usize;
    block * block_size + position % block_size
}

/// See [`crate::backend::Backend::kv_write`].
pub(super) fn kv_write(k: &Host, v: &Host, batch: AttentionBatch<'_>, cache: &mut KvCache) {
    let sources = match cache.shape {
        KvShape::Gqa { .. } => [k, v],
        KvShape::Mla { .. } => [v, k],
    };
    for (source, part) in sources.into_iter().zip(&mut cache.parts) {
        for span in batch.spans {
            for r in 0..span.rows as usize {
                let to = cache_row(span, span.position as usize + r, batch.block_table, cache.block_size);
                let row = Host::of_vector(source.row(span.row as usize + r));
                row.write(part.view_mut().rows_range(to..to + 1));
            }
        }
    }
}

/// What the cache holds for the first `len` positions of a sequence: its two parts.
fn context(span: &SeqSpan, len: usize, batch: &AttentionBatch<'_>, cache: &KvCache) -> (Host, Host) {
    let part = |part: usize| {
        let part = cache.parts[part].view();
        let mut seen = Host::new(len, part.cols());
        for p in 0..len {
            let from = cache_row(span, p, batch.block_table, cache.block_size);
            seen.row_mut(p).copy_from_slice(&Host::read(part.rows_range(from..from + 1)).data);
        }
        seen
    };
    (part(0), part(1))
}

/// `softmax(scores, sink) . values`: scores and values go by position; the sink has no value. Weights are rounded to `dtype` and
/// divided by the sum of what they were rounded to, so that the result is a mean of values.
fn softmax_sum(scores: &[f64], sink: Option<f32>, values: &[&[f32]], dtype: DType) -> Vec<f32> {
    let sink = sink.map(f64::from);
    let max = scores.iter().copied().chain(sink).fold(f64::NEG_INFINITY, f64::max);
    let weight: Vec<f64> = scores.iter().map(|s| f64::from(rounded((s - max).exp() as f32, dtype))).collect();
    let sum = weight.iter().sum::<f64>() + sink.map_or(0.0, |s| (s - max).exp());
    (0..values[0].len())
        .map(|d| (weight.iter().zip(values).map(|(w, v)| w * f64::from(v[d])).sum::<f64>() / sum) as f32)
        .collect()
}

/// See [`crate::backend::Backend::attention_gqa`].
pub(super) fn gqa(args: &GqaArgs<'_>) -> Host {
    let KvShape::Gqa { kv_heads, head_dim } = args.cache.shape else { unreachable!("checked by the caller") };
    let dtype = args.cache.dtype;
    let q = Host::read(args.q).map(|_, _, x| rounded(x, dtype));
    let sinks = args.sinks.map(Host::read);
    let mut out = Host::new(q.rows, q.cols);
    for span in args.batch.spans {
        let end = span.position as usize + span.rows as usize;
        let (keys, values) = context(span, end, &args.batch, args.cache);
        for r in 0..span.rows as usize {
            let p = span.position as usize + r;
            let seen = (p + 1).saturating_sub(args.window.unwrap_or(usize::MAX))..=p;
            let i = span.row as usize + r;
            for head in 0..args.heads {
                let columns = head * head_dim..(head + 1) * head_dim;
                let kv_head = head / (args.heads / kv_heads);
                let kv_columns = kv_head * head_dim..(kv_head + 1) * head_dim;
                let query = &q.row(i)[columns.clone()];
                let scores: Vec<f64> = seen
                    .clone()
                    .map(|t| dot(query, &keys.row(t)[kv_columns.clone()]) * f64::from(args.scale))
                    .collect();
                let v: Vec<&[f32]> = seen.clone().map(|t| &values.row(t)[kv_columns.clone()]).collect();
                let sink = sinks.as_ref().map(|s| s.data[head]);
                out.row_mut(i)[columns].copy_from_slice(&softmax_sum(&scores, sink, &v, dtype));
            }
        }
    }
    out
}

/// One head of `kv_b`.
struct MlaHead {
    /// `[nope_dim, latent]`
    w_k: Host,
    /// `[v_dim, latent]`
    w_v: Host,
    /// What k, v, q' and o are rounded to.
    activation: DType,
    scale: f64,
}

impl MlaHead {
    /// `kv_b` is `[heads * (nope_dim + v_dim), latent]`.
    fn new(kv_b: View<'_>, head: usize, args: &MlaArgs<'_>) -> Self {
        let w = args.weights;
        let first = head * (w.nope_dim + w.v_dim);
        MlaHead {
            w_k: Host::read(kv_b.rows_range(first..first + w.nope_dim)),
            w_v: Host::read(kv_b.rows_range(first + w.nope_dim..first + w.nope_dim + w.v_dim)),
            activation: args.cache.dtype,
            scale: f64::from(args.scale),
        }
    }

    /// `x . w^T`, rounded.
    fn project(&self, x: &Host, w: &Host) -> Host {
        linear(x, w, None).map(|_, _, y| rounded(y, self.activation))
    }

    /// Keys and values of all positions: `k = (W_k c, r)`, `v = W_v c`.
    fn expand(&self, latents: &Host, ropes: &Host) -> (Host, Host) {
        let nope = self.project(latents, &self.w_k);
        let rows = (0..nope.rows).flat_map(|t| [nope.row(t), ropes.row(t)].concat()).collect();
        let keys = Host { rows: nope.rows, cols: nope.cols + ropes.cols, data: rows };
        (keys, self.project(latents, &self.w_v))
    }

    /// Expanded form of one row over the first `len` positions.
    fn expanded(&self, query: &[f32], keys: &Host, values: &Host, len: usize) -> Vec<f32> {
        let scores: Vec<f64> = (0..len).map(|t| dot(query, keys.row(t)) * self.scale).collect();
        softmax_sum(&scores, None, &(0..len).map(|t| values.row(t)).collect::<Vec<_>>(), self.activation)
    }

    /// Absorbed form of one row over the first `len` positions.
    fn absorbed(&self, query: &[f32], latents: &Host, ropes: &Host, len: usize) -> Vec<f32> {
        let (q_nope, q_rope) = query.split_at(self.w_k.rows);
        let q_latent: Vec<f32> = (0..latents.cols)
            .map(|l| {
                let sum: f64 = q_nope
                    .iter()
                    .enumerate()
                    .map(|(d, &q)| f64::from(q) * f64::from(self.w_k.row(d)[l]))
                    .sum();
                rounded(sum as f32, self.activation)
            })
            .collect();
        let scores: Vec<f64> = (0..len)
            .map(|t| (dot(&q_latent, latents.row(t)) + dot(q_rope, ropes.row(t))) * self.scale)
            .collect();
        let mean = softmax_sum(
            &scores,
            None,
            &(0..len).map(|t| latents.row(t)).collect::<Vec<_>>(),
            self.activation,
        );
        let mean = Host::of_vector(&mean).map(|_, _, o| rounded(o, self.activation));
        linear(&mean, &self.w_v, None).data
    }
}

/// See [`crate::backend::Backend::attention_mla`].
pub(super) fn mla(args: &MlaArgs<'_>) -> Host {
    let w = args.weights;
    let q = Host::read(args.q).map(|_, _, x| rounded(x, args.cache.dtype));
    let mut out = Host::new(q.rows, w.heads * w.v_dim);
    for span in args.batch.spans {
        let end = span.position as usize + span.rows as usize;
        let (latents, ropes) = context(span, end, &args.batch, args.cache);
        for head in 0..w.heads {
            let mla_head = MlaHead::new(w.parts[0].view(), head, args);
            let (keys, values) = mla_head.expand(&latents, &ropes);
            for r in 0..span.rows as usize {
                let p = span.position as usize + r;
                let i = span.row as usize + r;
                let query = &q.row(i)[head * keys.cols..][..keys.cols];
                let o = if p < span.prompt_len as usize {
                    mla_head.expanded(query, &keys, &values, p + 1)
                } else {
                    mla_head.absorbed(query, &latents, &ropes, p + 1)
                };
                out.row_mut(i)[head * w.v_dim..][..w.v_dim].copy_from_slice(&o);
            }
        }
    }
    out
}
