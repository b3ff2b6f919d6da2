//! The paged cache, grouped-query attention and both forms of MLA.

use std::ops::Range;

use libtest_mimic::Trial;
use moeyard::backend::cuda::{CudaBackend, ProductKernels};
use moeyard::backend::{
    AttentionBatch, DType, GqaArgs, KvCache, KvShape, MlaArgs, Precision, SeqSpan, Tensor,
};

use crate::pair::{Device, gpu, host_matrix, poisoned, same, tensor, tolerance, values};
use crate::support::numbers::Numbers;
use crate::trial;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("attention::gqa", gqa),
        trial("attention::gqa_with_windows_and_sinks", gqa_with_windows_and_sinks),
        trial("attention::gqa_over_long_contexts", gqa_over_long_contexts),
        trial("attention::mla", mla),
        trial("attention::mla_in_steps", mla_in_steps),
        trial("attention::mla_over_long_contexts", mla_over_long_contexts),
        trial(
            "attention::a_row_has_the_same_bits_alone_and_in_any_chunk",
            a_row_has_the_same_bits_alone_and_in_any_chunk,
        ),
        trial(
            "attention::a_row_of_mla_has_the_same_bits_alone_and_in_any_chunk",
            a_row_of_mla_has_the_same_bits_alone_and_in_any_chunk,
        ),
        trial(
            "attention::a_row_has_the_same_bits_past_the_first_chunk",
            a_row_has_the_same_bits_past_the_first_chunk,
        ),
        trial(
            "attention::a_row_of_mla_has_the_same_bits_past_the_first_chunk",
            a_row_of_mla_has_the_same_bits_past_the_first_chunk,
        ),
    ]
}

const BLOCK: usize = 16;

/// Queries and the weights of positions are rounded to bf16 for the tensor cores.
const MMA: f32 = 2e-2;

/// Sequences of which some positions are cached and some are rows of the batch; blocks are dealt out of order.
struct Batch {
    spans: Vec<SeqSpan>,
    table: Vec<u32>,
    blocks: usize,
}

impl Batch {
    /// (positions cached, rows, prompt length) of each sequence.
    fn new(numbers: &mut Numbers, sequences: &[(usize, usize, usize)]) -> Batch {
        let mut spans = Vec::new();
        let (mut row, mut blocks) = (0, 0);
        for &(cached, rows, prompt_len) in sequences {
            spans.push(SeqSpan {
                row,
                rows: rows as u32,
                position: cached as u32,
                prompt_len: prompt_len as u32,
                first_block: blocks as u32,
            });
            row += rows as u32;
            blocks += (cached + rows).div_ceil(BLOCK);
        }
        let mut table: Vec<u32> = (0..blocks as u32).collect();
        for i in (1..blocks).rev() {
            table.swap(i, numbers.below(i + 1));
        }
        Batch { spans, table, blocks }
    }

    fn batch<'a>(&'a self, spans: &'a [SeqSpan]) -> AttentionBatch<'a> {
        AttentionBatch { spans, block_table: &self.table }
    }

    fn rows(&self) -> usize {
        self.batch(&self.spans).rows()
    }

    /// The same sequences from their first position to the end of the batch: what is written into the cache.
    fn all(&self) -> Vec<SeqSpan> {
        let mut row = 0;
        let whole = |s: &SeqSpan| {
            let rows = s.position + s.rows;
            let span = SeqSpan { row, rows, position: 0, ..*s };
            row += rows;
            span
        };
        self.spans.iter().map(whole).collect()
    }

    /// A cache with keys and values of all positions.
    fn cache(&self, device: Device<'_>, shape: KvShape, dtype: DType, k: &[f32], v: &[f32]) -> KvCache {
        let mut cache = device.alloc_kv(shape, dtype, BLOCK, self.blocks).unwrap();
        let all = self.all();
        let rows = self.batch(&all).rows();
        let k = tensor(device, DType::F32, rows, k.len() / rows, k);
        let v = tensor(device, DType::F32, rows, v.len() / rows, v);
        device.kv_write(k.view(), v.view(), self.batch(&all), &mut cache).unwrap();
        cache
    }

    fn positions(&self) -> usize {
        self.spans.iter().map(|s| (s.position + s.rows) as usize).sum()
    }
}

#[derive(Clone, Copy)]
struct Heads {
    heads: usize,
    kv_heads: usize,
    dim: usize,
}

fn check_gqa(
    batch: &Batch,
    h: Heads,
    dtype: DType,
    window: Option<usize>,
    sinks: bool,
    numbers: &mut Numbers,
) {
    let width = h.kv_heads * h.dim;
    let (k, v) = (numbers.vec(batch.positions() * width), numbers.vec(batch.positions() * width));
    let q: Vec<f32> = numbers.vec(batch.rows() * h.heads * h.dim).iter().map(|x| x * 4.0).collect();
    let sink_values = numbers.vec(h.heads);
    let what = format!(
        "{} / {} heads of {}, {dtype:?}, window {window:?}, sinks {sinks}",
        h.heads, h.kv_heads, h.dim
    );
    let allowed = if dtype == DType::Bf16 { MMA } else { tolerance(dtype) };
    same(&what, allowed, |device| {
        let cache =
            batch.cache(device, KvShape::Gqa { kv_heads: h.kv_heads, head_dim: h.dim }, dtype, &k, &v);
        let q = tensor(device, DType::F32, batch.rows(), h.heads * h.dim, &q);
        let sinks = sinks.then(|| tensor(device, DType::F32, 1, h.heads, &sink_values));
        let mut out = poisoned(device, dtype, batch.rows(), h.heads * h.dim);
        let args = GqaArgs {
            q: q.view(),
            cache: &cache,
            batch: batch.batch(&batch.spans),
            heads: h.heads,
            scale: (h.dim as f32).powf(-0.5),
            window,
            sinks: sinks.as_ref().map(Tensor::view),
        };
        device.attention_gqa(args, out.view_mut()).unwrap();
        values(device, out.view())
    });
}

fn gqa() {
    let mut numbers = Numbers::new(21);
    let batches: [&[(usize, usize, usize)]; 4] = [
        &[(0, 1, 1)],
        &[(0, 37, 37)],
        &[(40, 1, 3), (0, 5, 5), (100, 1, 9)],
        &[(31, 70, 101), (5, 1, 4), (63, 2, 65)],
    ];
    for (heads, kv_heads, dim) in [
        (1, 1, 1),
        (2, 1, 16),
        (4, 2, 20),
        (8, 8, 64),
        (12, 1, 32),
        (8, 2, 128),
        (6, 3, 96),
        (2, 2, 256),
        (20, 1, 64),
        (64, 1, 128),
    ] {
        for sequences in batches {
            let batch = Batch::new(&mut numbers, sequences);
            for dtype in [DType::F32, DType::Bf16] {
                check_gqa(&batch, Heads { heads, kv_heads, dim }, dtype, None, false, &mut numbers);
            }
        }
    }
}

fn gqa_with_windows_and_sinks() {
    let mut numbers = Numbers::new(22);
    let batches: [&[(usize, usize, usize)]; 2] = [&[(0, 90, 90)], &[(200, 1, 3), (33, 40, 80), (5, 1, 2)]];
    for sequences in batches {
        let batch = Batch::new(&mut numbers, sequences);
        for (window, sinks) in [
            (Some(1), false),
            (Some(7), true),
            (Some(32), false),
            (Some(64), true),
            (Some(10_000), false),
            (None, true),
        ] {
            for (heads, kv_heads, dim) in [(4, 2, 32), (8, 1, 64)] {
                for dtype in [DType::F32, DType::Bf16] {
                    check_gqa(&batch, Heads { heads, kv_heads, dim }, dtype, window, sinks, &mut numbers);
                }
            }
        }
    }
}

fn gqa_over_long_contexts() {
    let mut numbers = Numbers::new(25);
    let batch = Batch::new(&mut numbers, &[(1100, 1, 3), (511, 1, 2), (700, 3, 703), (512, 1, 5)]);
    for (heads, kv_heads, dim) in [(4, 1, 64), (12, 2, 128), (4, 2, 96)] {
        for (window, sinks) in [(None, false), (Some(600), true), (Some(513), false)] {
            check_gqa(&batch, Heads { heads, kv_heads, dim }, DType::Bf16, window, sinks, &mut numbers);
        }
    }
}

#[derive(Clone, Copy)]
struct Mla {
    heads: usize,
    latent: usize,
    nope: usize,
    rope: usize,
    v: usize,
}

/// As DeepSeek-V3 has them, but for the number of heads.
const DEEPSEEK: Mla = Mla { heads: 16, latent: 512, nope: 128, rope: 64, v: 128 };

impl Mla {
    fn q_width(self) -> usize {
        self.heads * (self.nope + self.rope)
    }

    fn scale(self) -> f32 {
        ((self.nope + self.rope) as f32).powf(-0.5)
    }
}

fn check_mla(batch: &Batch, m: Mla, precision: Precision, numbers: &mut Numbers) {
    check_mla_in_steps(0, batch, m, precision, numbers);
}

/// The same result in each of so many steps, between kernels that write the queries; with 0, outside of any.
fn check_mla_in_steps(steps: usize, batch: &Batch, m: Mla, precision: Precision, numbers: &mut Numbers) {
    let (latents, ropes) =
        (numbers.vec(batch.positions() * m.latent), numbers.vec(batch.positions() * m.rope));
    let q: Vec<f32> = numbers.vec(batch.rows() * m.q_width()).iter().map(|x| x * 3.0).collect();
    let kv_b = host_matrix(numbers, m.heads * (m.nope + m.v), m.latent, precision.weights);
    let what = format!(
        "{} heads, {} {} {} {}, {precision:?}, {:?}",
        m.heads, m.latent, m.nope, m.rope, m.v, batch.spans
    );
    let allowed = if precision.activations == DType::Bf16 { MMA } else { 3e-5 };
    same(&what, allowed, |device| {
        let weights = device.pack_mla(&kv_b, m.heads, m.nope, m.v, precision.weights).unwrap();
        let shape = KvShape::Mla { latent: m.latent, rope_dim: m.rope };
        let cache = batch.cache(device, shape, precision.activations, &ropes, &latents);
        let mut q = tensor(device, DType::F32, batch.rows(), m.q_width(), &q);
        let mut out = poisoned(device, precision.activations, batch.rows(), m.heads * m.v);
        let attend = |q: &Tensor, out: &mut Tensor| {
            let args = MlaArgs {
                q: q.view(),
                cache: &cache,
                weights: &weights,
                batch: batch.batch(&batch.spans),
                scale: m.scale(),
            };
            device.attention_mla(args, out.view_mut())
        };
        if steps == 0 {
            attend(&q, &mut out).unwrap();
        }
        for _ in 0..steps {
            let mut body = || {
                device.scale(1.0, q.view_mut())?;
                attend(&q, &mut out)?;
                device.scale(1.0, q.view_mut())
            };
            device.step(&mut body).unwrap();
        }
        values(device, out.view())
    });
}

fn mla_in_steps() {
    let mut numbers = Numbers::new(29);
    let batch = Batch::new(&mut numbers, &[(520, 1, 3), (63, 1, 2)]);
    check_mla_in_steps(3, &batch, DEEPSEEK, Precision::BF16, &mut numbers);
}

fn mla() {
    let mut numbers = Numbers::new(23);
    let batches: [&[(usize, usize, usize)]; 5] = [
        &[(0, 1, 1)],
        &[(0, 33, 33)],
        &[(40, 1, 3), (17, 1, 17)],
        // Prompt rows, generated rows, and sequences that have both.
        &[(10, 30, 25), (60, 1, 7), (0, 20, 20), (3, 4, 4)],
        &[(20, 3, 0), (0, 9, 9)],
    ];
    for m in [
        Mla { heads: 2, latent: 16, nope: 8, rope: 4, v: 8 },
        Mla { heads: 3, latent: 33, nope: 12, rope: 6, v: 10 },
        Mla { heads: 4, latent: 64, nope: 32, rope: 16, v: 32 },
        DEEPSEEK,
    ] {
        for sequences in batches {
            let batch = Batch::new(&mut numbers, sequences);
            for precision in Precision::ALL {
                check_mla(&batch, m, precision, &mut numbers);
            }
        }
    }
}

/// Several chunks of 512 positions; more heads than a block of the tensor-core kernel takes, and not a multiple of that.
fn mla_over_long_contexts() {
    let mut numbers = Numbers::new(26);
    let bf16 = Precision::BF16;
    let batch = Batch::new(&mut numbers, &[(1100, 1, 3), (511, 1, 2), (470, 70, 520)]);
    check_mla(&batch, Mla { heads: 4, ..DEEPSEEK }, bf16, &mut numbers);
    let batch = Batch::new(&mut numbers, &[(130, 1, 3), (63, 1, 2), (0, 20, 20)]);
    check_mla(&batch, Mla { heads: 70, ..DEEPSEEK }, bf16, &mut numbers);
}

/// Rows whose bits are those of all rows together: a sequence's positions, rows computed together, and some of them by themselves.
struct Rows {
    positions: usize,
    whole: Range<usize>,
    parts: &'static [Range<usize>],
}

/// Chunks of 512 positions, one of them begun, walked by one block or by several.
const MANY_ROWS: Rows = Rows {
    positions: 1300,
    whole: 0..1300,
    parts: &[0..1, 511..512, 512..513, 1299..1300, 31..33, 500..640, 1..100, 777..778, 900..1300],
};
const FEW_ROWS: Rows =
    Rows { positions: 530, whole: 430..530, parts: &[430..431, 511..512, 512..513, 440..520, 529..530] };

fn a_row_has_the_same_bits_alone_and_in_any_chunk() {
    rows_have_the_same_bits(&MANY_ROWS, &[DType::F32, DType::Bf16]);
}

fn a_row_has_the_same_bits_past_the_first_chunk() {
    rows_have_the_same_bits(&FEW_ROWS, &[DType::Bf16]);
}

fn rows_have_the_same_bits(rows: &Rows, dtypes: &[DType]) {
    let portable = CudaBackend::open(0).unwrap().with_products(ProductKernels::Portable).into_dyn();
    for (seed, (heads, kv_heads, dim)) in [(8, 2, 64), (6, 2, 128), (4, 2, 40)].into_iter().enumerate() {
        let h = Heads { heads, kv_heads, dim };
        let [best, portable] = [gpu(), portable.clone()]
            .map(|gpu| row_bits(gpu.as_ref(), &mut Numbers::new(240 + seed as u64), h, rows, dtypes));
        assert!(best == portable, "heads of {dim}: kernels of this GPU and those of every GPU differ");
    }
}

/// The bits of all rows, case by case.
fn row_bits(
    gpu: Device<'_>,
    numbers: &mut Numbers,
    h: Heads,
    rows: &Rows,
    dtypes: &[DType],
) -> Vec<Vec<u32>> {
    let mut all = Vec::new();
    let (positions, width) = (rows.positions, h.kv_heads * h.dim);
    let batch = Batch::new(numbers, &[(0, positions, positions)]);
    let (k, v) = (numbers.vec(positions * width), numbers.vec(positions * width));
    let q = numbers.vec(positions * h.heads * h.dim);
    for &dtype in dtypes {
        let sinks = tensor(gpu, DType::F32, 1, h.heads, &vec![0.5; h.heads]);
        let shape = KvShape::Gqa { kv_heads: h.kv_heads, head_dim: h.dim };
        let cache = batch.cache(gpu, shape, dtype, &k, &v);
        let q = tensor(gpu, DType::F32, positions, h.heads * h.dim, &q);
        let run = |rows: Range<usize>, window| {
            let spans = [span_of(&rows, 0)];
            let mut out = poisoned(gpu, dtype, rows.len(), h.heads * h.dim);
            let args = GqaArgs {
                batch: batch.batch(&spans),
                q: q.view().rows_range(rows),
                cache: &cache,
                heads: h.heads,
                scale: 0.125,
                window,
                sinks: Some(sinks.view()),
            };
            gpu.attention_gqa(args, out.view_mut()).unwrap();
            values(gpu, out.view()).iter().map(|x| x.to_bits()).collect::<Vec<_>>()
        };
        for window in [None, Some(50), Some(700)] {
            let whole = run(rows.whole.clone(), window);
            for part in rows.parts {
                let expected = part_of(&whole, rows, part, h.heads * h.dim);
                assert_eq!(run(part.clone(), window), expected, "{dtype:?} rows {part:?}, window {window:?}");
            }
            all.push(whole);
        }
    }
    all
}

fn span_of(rows: &Range<usize>, prompt_len: usize) -> SeqSpan {
    SeqSpan {
        row: 0,
        rows: rows.len() as u32,
        position: rows.start as u32,
        prompt_len: prompt_len as u32,
        first_block: 0,
    }
}

fn part_of<'a>(whole: &'a [u32], rows: &Rows, part: &Range<usize>, width: usize) -> &'a [u32] {
    &whole[(part.start - rows.whole.start) * width..(part.end - rows.whole.start) * width]
}

fn a_row_of_mla_has_the_same_bits_alone_and_in_any_chunk() {
    rows_of_mla_have_the_same_bits(&MANY_ROWS);
}

fn a_row_of_mla_has_the_same_bits_past_the_first_chunk() {
    rows_of_mla_have_the_same_bits(&FEW_ROWS);
}

/// Rows of both forms; generated rows alone, a few (a block per chunk of positions), and many (a block for all chunks).
fn rows_of_mla_have_the_same_bits(rows: &Rows) {
    let owner = gpu();
    let gpu = owner.as_ref();
    let mut numbers = Numbers::new(27);
    let (positions, m) = (rows.positions, DEEPSEEK);
    let batch = Batch::new(&mut numbers, &[(0, positions, positions)]);
    let (latents, ropes) = (numbers.vec(positions * m.latent), numbers.vec(positions * m.rope));
    let q = numbers.vec(positions * m.q_width());
    let kv_b = host_matrix(&mut numbers, m.heads * (m.nope + m.v), m.latent, DType::Bf16);
    let weights = gpu.pack_mla(&kv_b, m.heads, m.nope, m.v, DType::Bf16).unwrap();
    let shape = KvShape::Mla { latent: m.latent, rope_dim: m.rope };
    let cache = batch.cache(gpu, shape, DType::Bf16, &ropes, &latents);
    let q = tensor(gpu, DType::F32, positions, m.q_width(), &q);
    let run = |rows: Range<usize>, prompt_len: usize| {
        let spans = [span_of(&rows, prompt_len)];
        let mut out = poisoned(gpu, DType::Bf16, rows.len(), m.heads * m.v);
        let args = MlaArgs {
            batch: batch.batch(&spans),
            q: q.view().rows_range(rows),
            cache: &cache,
            weights: &weights,
            scale: m.scale(),
        };
        gpu.attention_mla(args, out.view_mut()).unwrap();
        values(gpu, out.view()).iter().map(|x| x.to_bits()).collect::<Vec<_>>()
    };
    for prompt_len in [0, positions] {
        let whole = run(rows.whole.clone(), prompt_len);
        for part in rows.parts {
            let expected = part_of(&whole, rows, part, m.heads * m.v);
            assert_eq!(run(part.clone(), prompt_len), expected, "rows {part:?}, prompt of {prompt_len}");
        }
    }
}
