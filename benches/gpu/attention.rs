//! Attention of both kinds, of prompts and of decode steps.

use half::bf16;
use moeyard::backend::{AttentionBatch, DType, GqaArgs, HostData, HostMatrix, KvShape, MlaArgs, SeqSpan};

use crate::bench::{Bench, Limits};

/// Attention of DeepSeek-V3.
const MLA_HEADS: usize = 128;
const LATENT: usize = 512;
const NOPE: usize = 128;
const ROPE: usize = 64;
const V_DIM: usize = 128;

impl Bench {
    /// 32 heads over 8 KV heads of 128, as Mixtral has them.
    fn attention(&mut self, spans: &[SeqSpan], context: usize) -> [f64; 2] {
        const BLOCK: usize = 32;
        let (heads, kv_heads, dim) = (32, 8, 128);
        let blocks = spans.len() * context.div_ceil(BLOCK);
        let shape = KvShape::Gqa { kv_heads, head_dim: dim };
        let mut cache = self.gpu.alloc_kv(shape, DType::Bf16, BLOCK, blocks).unwrap();
        for part in &mut cache.parts {
            let (rows, cols) = (part.rows(), part.cols());
            *part = self.random(rows, cols);
        }
        let rows: usize = spans.iter().map(|s| s.rows as usize).sum();
        let random = self.random(rows, heads * dim);
        let mut q = self.gpu.alloc(DType::F32, rows, heads * dim).unwrap();
        self.gpu.copy_rows(random.view(), q.view_mut()).unwrap();
        let mut out = self.gpu.alloc(DType::Bf16, rows, heads * dim).unwrap();
        let block_table: Vec<u32> = (0..blocks as u32).collect();
        self.alone_and_in_steps(if rows == spans.len() { 64 } else { 2 }, |gpu| {
            let batch = AttentionBatch { spans, block_table: &block_table };
            let args =
                GqaArgs { q: q.view(), cache: &cache, batch, heads, scale: 0.088, window: None, sinks: None };
            gpu.attention_gqa(args, out.view_mut()).unwrap();
        })
    }

    pub fn decode_attention(&mut self, limits: Limits, sequences: usize, context: usize) {
        let spans = last_rows(sequences, context);
        let [seconds, in_step] = self.attention(&spans, context);
        let bytes = (sequences * context * 2 * 8 * 128 * 2) as f64;
        let flops = (sequences * context * 32 * 128 * 4) as f64;
        let name = format!("attention, {sequences} rows over {context}");
        self.line(&name, seconds, flops, bytes, Some(limits));
        self.line("  in a step", in_step, flops, bytes, Some(limits));
    }

    pub fn prefill_attention(&mut self, rows: usize) {
        let spans = [prompt(rows)];
        let [seconds, _] = self.attention(&spans, rows);
        let flops = (rows * rows / 2 * 32 * 128 * 4) as f64;
        self.line(&format!("attention, prompt of {rows}"), seconds, flops, 0.0, None);
    }

    /// 128 heads of DeepSeek-V3: both products with `kv_b` included.
    fn mla(&mut self, spans: &[SeqSpan], context: usize) -> [f64; 2] {
        const BLOCK: usize = 32;
        let blocks = spans.len() * context.div_ceil(BLOCK);
        let shape = KvShape::Mla { latent: LATENT, rope_dim: ROPE };
        let mut cache = self.gpu.alloc_kv(shape, DType::Bf16, BLOCK, blocks).unwrap();
        for part in &mut cache.parts {
            let (rows, cols) = (part.rows(), part.cols());
            *part = self.random(rows, cols);
        }
        let n = MLA_HEADS * (NOPE + V_DIM);
        let values = (0..65_537).map(|_| bf16::from_f32(self.numbers.unit() * 0.05)).collect::<Vec<_>>();
        let data = HostData::Bf16(values.into_iter().cycle().take(n * LATENT).collect());
        let kv_b = HostMatrix { n, k: LATENT, data };
        let weights = self.gpu.pack_mla(&kv_b, MLA_HEADS, NOPE, V_DIM, DType::Bf16).unwrap();
        let rows: usize = spans.iter().map(|s| s.rows as usize).sum();
        let random = self.random(rows, MLA_HEADS * (NOPE + ROPE));
        let mut q = self.gpu.alloc(DType::F32, rows, MLA_HEADS * (NOPE + ROPE)).unwrap();
        self.gpu.copy_rows(random.view(), q.view_mut()).unwrap();
        let mut out = self.gpu.alloc(DType::Bf16, rows, MLA_HEADS * V_DIM).unwrap();
        let block_table: Vec<u32> = (0..blocks as u32).collect();
        self.alone_and_in_steps(if rows == spans.len() { 64 } else { 2 }, |gpu| {
            let batch = AttentionBatch { spans, block_table: &block_table };
            let args = MlaArgs { q: q.view(), cache: &cache, weights: &weights, batch, scale: 0.0722 };
            gpu.attention_mla(args, out.view_mut()).unwrap();
        })
    }

    pub fn decode_mla(&mut self, limits: Limits, sequences: usize, context: usize) {
        let [seconds, in_step] = self.mla(&last_rows(sequences, context), context);
        let weights = MLA_HEADS * (NOPE + V_DIM) * LATENT;
        let bytes = 2 * (sequences * context * (LATENT + ROPE) + weights);
        let flops = 2 * sequences * (context * MLA_HEADS * (2 * LATENT + ROPE) + weights);
        let name = format!("MLA, {sequences} rows over {context}");
        self.line(&name, seconds, flops as f64, bytes as f64, Some(limits));
        self.line("  in a step", in_step, flops as f64, bytes as f64, Some(limits));
    }

    pub fn prefill_mla(&mut self, rows: usize) {
        let [seconds, _] = self.mla(&[prompt(rows)], rows);
        let attention = rows * rows / 2 * MLA_HEADS * 2 * (NOPE + ROPE + V_DIM);
        let flops = attention + 2 * rows * MLA_HEADS * (NOPE + V_DIM) * LATENT;
        self.line(&format!("MLA, prompt of {rows}"), seconds, flops as f64, 0.0, None);
    }
}

/// The last position of each sequence.
fn last_rows(sequences: usize, context: usize) -> Vec<SeqSpan> {
    let blocks = context.div_ceil(32);
    let span = |s: usize| SeqSpan {
        row: s as u32,
        rows: 1,
        position: context as u32 - 1,
        prompt_len: 0,
        first_block: (s * blocks) as u32,
    };
    (0..sequences).map(span).collect()
}

/// A whole prompt.
fn prompt(rows: usize) -> SeqSpan {
    SeqSpan { row: 0, rows: rows as u32, position: 0, prompt_len: rows as u32, first_block: 0 }
}
