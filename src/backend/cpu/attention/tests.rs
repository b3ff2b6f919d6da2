//! Attention on every instruction set: close to the reference, and with the same bits in any batch.

use crate::backend::cpu::CpuBackend;
use crate::backend::cpu::simd::Isa;
use crate::backend::reference::ReferenceBackend;
use crate::backend::{
    AttentionBatch, Backend, DType, GqaArgs, HostData, HostMatrix, KvShape, MlaArgs, Precision, SeqSpan,
    Tensor,
};

/// A layer's attention.
#[derive(Debug, Clone, Copy)]
enum Layer {
    Gqa { heads: usize, kv_heads: usize, head_dim: usize, window: Option<usize>, sinks: bool },
    Mla { heads: usize, latent: usize, nope: usize, rope: usize, v: usize },
}

impl Layer {
    fn kv_shape(self) -> KvShape {
        match self {
            Layer::Gqa { kv_heads, head_dim, .. } => KvShape::Gqa { kv_heads, head_dim },
            Layer::Mla { latent, rope, .. } => KvShape::Mla { latent, rope_dim: rope },
        }
    }

    /// Columns of q, of k and v as written, and of the output.
    fn widths(self) -> [usize; 4] {
        match self {
            Layer::Gqa { heads, kv_heads, head_dim: d, .. } => {
                [heads * d, kv_heads * d, kv_heads * d, heads * d]
            }
            Layer::Mla { heads, latent, nope, rope, v } => [heads * (nope + rope), rope, latent, heads * v],
        }
    }
}

/// Some rows of one of the test's sequences.
#[derive(Debug, Clone, Copy)]
struct Part {
    sequence: u64,
    position: usize,
    rows: usize,
    prompt_len: usize,
}

/// Uniform in -1..1; a function of its arguments alone.
fn random(stream: u64, index: u64) -> f32 {
    let mut x = stream.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ index.wrapping_mul(0xd134_2543_de82_ef95);
    for _ in 0..2 {
        x = (x ^ (x >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    }
    (x >> 40) as f32 / (1u64 << 23) as f32 - 1.0
}

/// Rows `first..first + rows` of an endless random matrix, as part of a tensor.
fn fill(data: &mut Vec<f32>, stream: u64, first: usize, rows: usize, cols: usize) {
    data.extend((first * cols..(first + rows) * cols).map(|i| random(stream, i as u64)));
}

fn tensor(backend: &dyn Backend, data: &[f32], cols: usize, dtype: DType) -> Tensor {
    let mut f32s = backend.alloc(DType::F32, data.len() / cols, cols).unwrap();
    backend.upload(bytemuck::cast_slice(data), f32s.view_mut()).unwrap();
    let mut out = backend.alloc(dtype, data.len() / cols, cols).unwrap();
    backend.copy_rows(f32s.view(), out.view_mut()).unwrap();
    out
}

/// Writes the context of every part, then attends: the output rows of all parts, one after another.
fn run(
    backend: &dyn Backend,
    layer: Layer,
    precision: Precision,
    block_size: usize,
    parts: &[Part],
) -> Vec<f32> {
    let dtype = precision.activations;
    let [q_cols, k_cols, v_cols, out_cols] = layer.widths();
    let mut block_table = Vec::new();
    let (mut contexts, mut spans) = (Vec::new(), Vec::new());
    let (mut q, mut k, mut v) = (Vec::new(), Vec::new(), Vec::new());
    let blocks: usize = parts.iter().map(|p| (p.position + p.rows).div_ceil(block_size)).sum();
    let (mut row, mut context_row) = (0, 0);
    for part in parts {
        let len = part.position + part.rows;
        let first_block = block_table.len() as u32;
        // Blocks lie backwards in the pool.
        block_table
            .extend((0..len.div_ceil(block_size)).map(|b| (blocks - 1 - first_block as usize - b) as u32));
        let span = SeqSpan {
            row,
            rows: part.rows as u32,
            position: part.position as u32,
            prompt_len: part.prompt_len as u32,
            first_block,
        };
        spans.push(span);
        contexts.push(SeqSpan { row: context_row, rows: len as u32, position: 0, ..span });
        row += part.rows as u32;
        context_row += len as u32;
        fill(&mut q, 3 * part.sequence, part.position, part.rows, q_cols);
        fill(&mut k, 3 * part.sequence + 1, 0, len, k_cols);
        fill(&mut v, 3 * part.sequence + 2, 0, len, v_cols);
    }
    let mut cache = backend.alloc_kv(layer.kv_shape(), dtype, block_size, blocks).unwrap();
    let bytes: usize = cache.parts.iter().map(Tensor::bytes).sum();
    assert_eq!(bytes, blocks * backend.kv_block_bytes(layer.kv_shape(), dtype, block_size));
    // What sequences before these may have left in the blocks.
    let stale =
        [SeqSpan { row: 0, rows: (blocks * block_size) as u32, position: 0, prompt_len: 0, first_block: 0 }];
    let nan = |cols| tensor(backend, &vec![f32::NAN; blocks * block_size * cols], cols, dtype);
    let all = AttentionBatch { spans: &stale, block_table: &block_table };
    backend.kv_write(nan(k_cols).view(), nan(v_cols).view(), all, &mut cache).unwrap();
    let (k, v) = (tensor(backend, &k, k_cols, dtype), tensor(backend, &v, v_cols, dtype));
    let context = AttentionBatch { spans: &contexts, block_table: &block_table };
    backend.kv_write(k.view(), v.view(), context, &mut cache).unwrap();

    let q = tensor(backend, &q, q_cols, dtype);
    let batch = AttentionBatch { spans: &spans, block_table: &block_table };
    let mut out = backend.alloc(DType::F32, row as usize, out_cols).unwrap();
    match layer {
        Layer::Gqa { heads, head_dim, window, sinks, .. } => {
            let logits: Vec<f32> = (0..heads).map(|h| 2.0 * random(77, h as u64)).collect();
            let logits = tensor(backend, &logits, heads, DType::F32);
            let scale = 2.0 / (head_dim as f32).sqrt();
            let sinks = sinks.then(|| logits.view());
            let args = GqaArgs { q: q.view(), cache: &cache, batch, heads, scale, window, sinks };
            backend.attention_gqa(args, out.view_mut()).unwrap();
        }
        Layer::Mla { heads, latent, nope, rope, v } => {
            let n = heads * (nope + v);
            let data: Vec<f32> =
                (0..n * latent).map(|i| 2.0 * random(99, i as u64) / (latent as f32).sqrt()).collect();
            let kv_b = HostMatrix { n, k: latent, data: HostData::F32(data) };
            let weights = backend.pack_mla(&kv_b, heads, nope, v, precision.weights).unwrap();
            let bytes: usize = weights.parts.iter().map(Tensor::bytes).sum();
            assert_eq!(bytes, backend.mla_bytes(heads, nope, v, latent, precision.weights));
            let scale = 2.0 / ((nope + rope) as f32).sqrt();
            let args = MlaArgs { q: q.view(), cache: &cache, weights: &weights, batch, scale };
            backend.attention_mla(args, out.view_mut()).unwrap();
        }
    }
    let mut host = vec![0.0f32; row as usize * out_cols];
    backend.download(out.view(), bytemuck::cast_slice_mut(&mut host)).unwrap();
    host
}

/// All instruction sets, with one thread and with more than the machine may have.
fn backends() -> Vec<CpuBackend> {
    let isas = Isa::available();
    isas.iter().flat_map(|&isa| [1, 3].map(|threads| CpuBackend::new(threads, isa).unwrap())).collect()
}

#[track_caller]
fn check_close(layer: Layer, precision: Precision, block_size: usize, parts: &[Part]) {
    let expected = run(&ReferenceBackend, layer, precision, block_size, parts);
    // Rounding of what the reference rounds too may fall to the other side, where sums lie close to the border: of a weight in
    // GQA, of a latent in MLA.
    let tolerance = match (layer, precision.activations) {
        (Layer::Gqa { .. }, DType::Bf16) => 2e-3,
        (Layer::Mla { .. }, DType::Bf16) => 1e-2,
        _ => 4e-6,
    };
    for backend in backends() {
        let found = run(&backend, layer, precision, block_size, parts);
        for (i, (f, e)) in found.iter().zip(&expected).enumerate() {
            assert!(
                (f - e).abs() <= tolerance * e.abs().max(1.0),
                "{}, {layer:?}, {precision:?}, blocks of {block_size}, {parts:?}: element {i} is {f}, expected {e}",
                backend.describe()
            );
        }
    }
}

/// Rows of one sequence alone, chunked, among others, in other blocks and on other threads: the same bits.
#[track_caller]
fn check_bits(layer: Layer, precision: Precision, len: usize, prompt_len: usize) {
    let part = |sequence, position, rows| Part { sequence, position, rows, prompt_len };
    for isa in Isa::available() {
        let backend = CpuBackend::new(1, isa).unwrap();
        let cols = layer.widths()[3];
        let expected = run(&backend, layer, precision, 16, &[part(1, 0, len)]);
        let check = |found: &[f32], first: usize, what: &str| {
            for (i, f) in found.iter().enumerate() {
                let e = expected[first * cols + i];
                let row = first + i / cols;
                assert!(
                    f.to_bits() == e.to_bits(),
                    "{} {layer:?} {precision:?} {what}: row {row}",
                    isa.name()
                );
            }
        };
        for threads in [1, 2] {
            let backend = CpuBackend::new(threads, isa).unwrap();
            for block_size in [16, 32, 48, 64] {
                check(&run(&backend, layer, precision, block_size, &[part(1, 0, len)]), 0, "whole");
            }
            for chunk in [1, 3, 17, 32] {
                for first in (0..len).step_by(chunk) {
                    let rows = chunk.min(len - first);
                    check(&run(&backend, layer, precision, 32, &[part(1, first, rows)]), first, "chunk");
                }
            }
            let batch =
                [part(2, 5, 3), part(1, len - 1, 1), part(3, 0, 40), part(1, 2, len - 2), part(4, 90, 1)];
            let found = run(&backend, layer, precision, 32, &batch);
            check(&found[3 * cols..4 * cols], len - 1, "one row in a batch");
            check(&found[44 * cols..(44 + len - 2) * cols], 2, "many rows in a batch");
        }
    }
}

const MIXED: [Part; 5] = [
    Part { sequence: 1, position: 0, rows: 37, prompt_len: 37 },
    Part { sequence: 2, position: 66, rows: 1, prompt_len: 20 },
    Part { sequence: 3, position: 15, rows: 2, prompt_len: 16 },
    Part { sequence: 4, position: 0, rows: 1, prompt_len: 1 },
    Part { sequence: 5, position: 129, rows: 6, prompt_len: 132 },
];

#[test]
fn gqa_is_close_to_the_reference() {
    for head_dim in [16, 24, 32, 64, 80, 128, 192] {
        for (heads, kv_heads) in [(4, 4), (6, 2), (5, 1), (8, 2)] {
            let (window, sinks) = ((heads == 6).then_some(13), heads == 8);
            let layer = Layer::Gqa { heads, kv_heads, head_dim, window, sinks };
            let block_size = [16, 32, 64][(head_dim / 8 + heads) % 3];
            for precision in [Precision::F32, Precision::BF16] {
                check_close(layer, precision, block_size, &MIXED);
            }
        }
    }
}

#[test]
fn windows_of_any_width_are_close_to_the_reference() {
    for window in [1, 2, 3, 5, 16, 31, 64, 1000] {
        for sinks in [false, true] {
            let layer = Layer::Gqa { heads: 3, kv_heads: 3, head_dim: 20, window: Some(window), sinks };
            check_close(layer, Precision::F32, 16, &MIXED);
        }
    }
}

#[test]
fn mla_is_close_to_the_reference() {
    for (heads, latent, nope, rope, v) in
        [(4, 64, 32, 16, 32), (3, 40, 24, 8, 20), (2, 128, 128, 64, 128), (20, 32, 16, 10, 16)]
    {
        let layer = Layer::Mla { heads, latent, nope, rope, v };
        for precision in Precision::ALL {
            check_close(layer, precision, 32, &MIXED);
        }
    }
}

/// Absorbed rows behind more positions than are read together.
const LONG: [Part; 4] = [
    Part { sequence: 1, position: 529, rows: 3, prompt_len: 300 },
    Part { sequence: 2, position: 700, rows: 1, prompt_len: 700 },
    Part { sequence: 3, position: 254, rows: 4, prompt_len: 0 },
    Part { sequence: 4, position: 3, rows: 1, prompt_len: 2 },
];

#[test]
fn mla_behind_a_long_context_is_close_to_the_reference() {
    let layer = Layer::Mla { heads: 5, latent: 40, nope: 24, rope: 8, v: 20 };
    for precision in Precision::ALL {
        check_close(layer, precision, 48, &LONG);
        check_close(layer, precision, 32, &LONG[1..2]);
    }
}

#[test]
fn mla_bits_behind_a_long_context_do_not_depend_on_who_reads_it() {
    let layer = Layer::Mla { heads: 9, latent: 40, nope: 24, rope: 8, v: 20 };
    let cols = layer.widths()[3];
    for (precision, isa) in
        Precision::ALL.into_iter().flat_map(|p| Isa::available().into_iter().map(move |i| (p, i)))
    {
        let alone = |threads, block_size, part| {
            run(&CpuBackend::new(threads, isa).unwrap(), layer, precision, block_size, &[part])
        };
        // One thread gives each tile to one task; several share a sequence that is alone, and not one among many.
        let expected = LONG.map(|part| alone(1, 32, part));
        for (part, expected) in LONG.iter().zip(&expected) {
            let row = |r| Part { position: part.position + r, rows: 1, ..*part };
            let rows = (0..part.rows).map(|r| alone(4, 48, row(r)));
            assert!(alone(3, 16, *part) == *expected, "{} {precision:?} {part:?}", isa.name());
            assert!(rows.collect::<Vec<_>>().concat() == *expected, "{} {precision:?} {part:?}", isa.name());
        }
        let crowd: Vec<Part> = LONG.iter().copied().cycle().take(24).collect();
        let found = run(&CpuBackend::new(2, isa).unwrap(), layer, precision, 32, &crowd);
        assert!(found == expected.concat().repeat(6), "{} {precision:?} in a batch", isa.name());
        assert_eq!(found.len() % cols, 0);
    }
}

#[test]
fn gqa_bits_do_not_depend_on_the_batch() {
    for precision in [Precision::F32, Precision::BF16] {
        check_bits(
            Layer::Gqa { heads: 6, kv_heads: 2, head_dim: 40, window: None, sinks: true },
            precision,
            70,
            70,
        );
        let window = Some(21);
        check_bits(
            Layer::Gqa { heads: 2, kv_heads: 2, head_dim: 24, window, sinks: false },
            precision,
            50,
            50,
        );
        check_bits(
            Layer::Gqa { heads: 9, kv_heads: 1, head_dim: 64, window, sinks: true },
            precision,
            50,
            50,
        );
    }
}

#[test]
fn mla_bits_do_not_depend_on_the_batch() {
    for precision in Precision::ALL {
        for prompt_len in [60, 31, 0] {
            check_bits(
                Layer::Mla { heads: 3, latent: 40, nope: 24, rope: 8, v: 20 },
                precision,
                60,
                prompt_len,
            );
        }
    }
}
