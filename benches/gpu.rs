//! How fast the CUDA backend's operations are against the limits of the card, through the same trait that the engine uses. Prints a
//! table; does nothing where there is no GPU.
//!
//! With the argument `products`, only products, by every kernel there is for them; with `exchanges`, exchanges between ranks; with `worlds`,
//! layers of several ranks.
//!
//! Times are of a loop of calls with one wait at the end, so launch overhead counts where it is not hidden. Weights are random and
//! together larger than the second-level cache.

#[path = "gpu/exchanges.rs"]
mod exchanges;
#[path = "../tests/support/moe_rank.rs"]
mod moe_rank;
#[path = "../tests/support/numbers.rs"]
mod numbers;
#[path = "../tests/support/threads.rs"]
mod threads;
#[path = "gpu/worlds.rs"]
mod worlds;

use std::sync::Arc;
use std::time::Instant;

use half::bf16;
use moeyard::backend::cuda::{self, CudaBackend, ProductKernels};
use moeyard::backend::{
    AttentionBatch, Backend, CombineArgs, DType, ExpertsArgs, GqaArgs, HostData, HostMatrix, HostMlp,
    KvShape, Matrix, MlaArgs, Mlp, PlannedArgs, SeqSpan, Tensor,
};
use moeyard::spec::Activation;

use numbers::Numbers;

fn main() {
    // `cargo test --benches` only asks whether it starts.
    if std::env::args().any(|a| a == "--test") {
        return;
    }
    match cuda::devices() {
        Ok(_) if std::env::args().any(|a| a == "exchanges") => exchanges::run(),
        Ok(_) if std::env::args().any(|a| a == "worlds") => worlds::run(),
        Ok(_) => {
            let open = |kernel| CudaBackend::open(0).unwrap().with_products(kernel).into_dyn();
            let gpu = CudaBackend::open(0).unwrap().into_dyn();
            let mut bench = Bench { gpu, others: Vec::new(), numbers: Numbers(7) };
            if std::env::args().any(|a| a == "products") {
                let kernels = [ProductKernels::Clusters { rows: 0 }, ProductKernels::Portable];
                bench.others = kernels.map(|kernels| (format!("{kernels:?}"), open(kernels))).into();
                bench.products();
            } else {
                bench.run();
            }
        }
        Err(why) => println!("no benchmark: {why}"),
    }
}

#[derive(Clone, Copy)]
struct ExpertShape {
    name: &'static str,
    hidden: usize,
    width: usize,
    experts: usize,
    top_k: usize,
}

const SHAPES: [ExpertShape; 2] = [
    ExpertShape { name: "Mixtral-8x7B", hidden: 4096, width: 14336, experts: 8, top_k: 2 },
    // A quarter of the experts and of the choices: one of four ranks.
    ExpertShape { name: "DeepSeek-V3, EP 4", hidden: 7168, width: 2048, experts: 64, top_k: 2 },
];

struct Bench {
    gpu: Arc<dyn Backend>,
    /// The same GPU with other kernels for products.
    others: Vec<(String, Arc<dyn Backend>)>,
    numbers: Numbers,
}

/// Limits of this card.
#[derive(Clone, Copy)]
struct Limits {
    /// Bytes read and written by a large copy, per second.
    bandwidth: f64,
}

impl Bench {
    fn run(mut self) {
        println!("{}", self.gpu.describe());
        println!("{:<46} {:>10} {:>10} {:>10} {:>9}", "operation", "us", "TFLOP/s", "GB/s", "of copy");
        let limits = self.copy();
        for (rows, n, k) in [(8192, 8192, 8192), (4096, 28672, 4096), (4096, 4096, 14336), (512, 4096, 4096)]
        {
            self.linear(limits, rows, n, k);
        }
        for (rows, n, k) in
            [(1, 6144, 4096), (1, 4096, 4096), (1, 32000, 4096), (16, 6144, 4096), (64, 6144, 4096)]
        {
            self.linear(limits, rows, n, k);
        }
        for shape in SHAPES {
            let slots = self.slots(shape, DType::Bf16);
            for (tokens, spread) in
                [(4096, 0.0), (4096, 1.0), (16384, 0.0), (16384, 1.0), (1, 0.0), (8, 0.0), (64, 0.0)]
            {
                self.experts(limits, shape, &slots, tokens, spread);
            }
            for tokens in [1, 64, 4096] {
                self.planned_experts(limits, shape, &slots, tokens);
            }
            drop(slots);
            for dtype in [DType::F8, DType::I4x2] {
                let slots = self.slots(shape, dtype);
                for tokens in [1, 8, 64, 4096] {
                    self.experts(limits, shape, &slots, tokens, 0.0);
                }
            }
        }
        for (rows, experts, hidden) in
            [(1, 8, 4096), (64, 8, 4096), (4096, 8, 4096), (1, 256, 7168), (4096, 256, 7168)]
        {
            self.router_product(limits, rows, experts, hidden);
        }
        self.around_experts(limits, 4096);
        for (sequences, context) in [(1, 1024), (1, 8192), (64, 1024), (64, 4096)] {
            self.decode_attention(limits, sequences, context);
        }
        for rows in [2048, 8192] {
            self.prefill_attention(rows);
        }
        for (sequences, context) in [(1, 8192), (64, 4096)] {
            self.decode_mla(limits, sequences, context);
        }
        self.prefill_mla(2048);
    }

    /// Products by every kernel there is for them.
    fn products(mut self) {
        let limits = self.copy();
        for (rows, n, k) in [
            (8192, 8192, 8192),
            (4096, 28672, 4096),
            (512, 4096, 4096),
            (1, 6144, 4096),
            (1, 4096, 14336),
            (1, 32000, 4096),
            (16, 6144, 4096),
            (64, 6144, 4096),
        ] {
            self.linear(limits, rows, n, k);
        }
        for shape in SHAPES {
            let slots = self.slots(shape, DType::Bf16);
            for (tokens, spread) in [
                (64, 0.0),
                (256, 0.0),
                (1024, 1.0),
                (4096, -1.0),
                (4096, 0.0),
                (4096, 1.0),
                (16384, -1.0),
                (16384, 1.0),
            ] {
                self.experts(limits, shape, &slots, tokens, spread);
            }
        }
    }

    /// Seconds per call.
    fn time(&self, call: impl FnMut(&dyn Backend)) -> f64 {
        self.time_on(self.gpu.as_ref(), call)
    }

    fn time_on(&self, gpu: &dyn Backend, mut call: impl FnMut(&dyn Backend)) -> f64 {
        let probe = gpu.alloc(DType::F32, 1, 1).unwrap();
        let wait = || gpu.download(probe.view(), &mut [0; 4]).unwrap();
        call(gpu);
        wait();
        let start = Instant::now();
        call(gpu);
        wait();
        let once = start.elapsed().as_secs_f64();
        let calls = ((0.15 / once) as usize).clamp(3, 2000);
        let mut best = f64::INFINITY;
        for _ in 0..3 {
            let start = Instant::now();
            for _ in 0..calls {
                call(gpu);
            }
            wait();
            best = best.min(start.elapsed().as_secs_f64() / calls as f64);
        }
        best
    }

    /// Seconds per call when `calls` in a row are one step.
    fn time_in_steps(&self, gpu: &dyn Backend, calls: usize, mut call: impl FnMut(&dyn Backend)) -> f64 {
        let step = |gpu: &dyn Backend| {
            let mut body = || {
                (0..calls).for_each(|_| call(gpu));
                Ok(())
            };
            gpu.step(&mut body).unwrap();
        };
        self.time_on(gpu, step) / calls as f64
    }

    /// Seconds per call outside of steps, and in steps of `calls`.
    fn alone_and_in_steps(&self, calls: usize, mut call: impl FnMut(&dyn Backend)) -> [f64; 2] {
        [self.time(&mut call), self.time_in_steps(self.gpu.as_ref(), calls, call)]
    }

    fn line(&self, name: &str, seconds: f64, flops: f64, bytes: f64, limits: Option<Limits>) {
        let share =
            limits.map_or(String::new(), |l| format!("{:.0} %", 100.0 * bytes / seconds / l.bandwidth));
        println!(
            "{name:<46} {:>10.1} {:>10.1} {:>10.0} {share:>9}",
            seconds * 1e6,
            flops / seconds / 1e12,
            bytes / seconds / 1e9
        );
    }

    /// A line of the usual kernels, and one for each of the first `others`.
    fn lines(
        &self,
        limits: Limits,
        name: &str,
        kernels: usize,
        flops: f64,
        bytes: f64,
        mut call: impl FnMut(&dyn Backend),
    ) {
        self.line(name, self.time(&mut call), flops, bytes, Some(limits));
        for (kernel, gpu) in self.others.iter().take(kernels) {
            let seconds = self.time_on(gpu.as_ref(), &mut call);
            self.line(&format!("  by {kernel}"), seconds, flops, bytes, Some(limits));
        }
    }

    /// A line for each kernel when `calls` in a row are one step, known again: what the host does for each call does not count.
    fn lines_of_steps(
        &self,
        limits: Limits,
        calls: usize,
        flops: f64,
        bytes: f64,
        mut call: impl FnMut(&dyn Backend),
    ) {
        let usual = ("usual".to_owned(), self.gpu.clone());
        for (kernel, gpu) in std::iter::once(&usual).chain(self.others.iter()) {
            let seconds = self.time_in_steps(gpu.as_ref(), calls, &mut call);
            self.line(&format!("  in a step, by {kernel}"), seconds, flops, bytes, Some(limits));
        }
    }

    fn random(&mut self, rows: usize, cols: usize) -> Tensor {
        // A period that is prime to everything keeps rows different; generating gigabytes would take longer than the benchmark.
        let period: Vec<bf16> = (0..65_537).map(|_| bf16::from_f32(self.numbers.unit() * 0.05)).collect();
        let bytes: Vec<u8> = period.iter().cycle().take(rows * cols).flat_map(|x| x.to_le_bytes()).collect();
        let mut tensor = self.gpu.alloc(DType::Bf16, rows, cols).unwrap();
        self.gpu.upload(&bytes, tensor.view_mut()).unwrap();
        tensor
    }

    fn twin(&self, of: &Tensor) -> Tensor {
        let mut tensor = self.gpu.alloc(of.dtype(), of.rows(), of.cols()).unwrap();
        self.gpu.copy_rows(of.view(), tensor.view_mut()).unwrap();
        tensor
    }

    fn copy(&mut self) -> Limits {
        let src = self.random(1 << 15, 1 << 14);
        let mut dst = self.gpu.alloc(DType::Bf16, 1 << 15, 1 << 14).unwrap();
        let seconds = self.time(|gpu| gpu.copy_rows(src.view(), dst.view_mut()).unwrap());
        let bytes = 2.0 * src.bytes() as f64;
        self.line("copy of 1 GiB (read and written)", seconds, 0.0, bytes, None);
        Limits { bandwidth: bytes / seconds }
    }

    fn linear(&mut self, limits: Limits, rows: usize, n: usize, k: usize) {
        // Several matrices in turn, so that none stays in the cache.
        let first = self.random(n, k);
        let copies = (400_000_000 / first.bytes()).clamp(1, 16);
        let mut matrices: Vec<Matrix> =
            (1..copies).map(|_| Matrix { data: self.twin(&first), n, k }).collect();
        matrices.push(Matrix { data: first, n, k });
        let x = self.random(rows, k);
        let mut out = self.gpu.alloc(DType::Bf16, rows, n).unwrap();
        let mut turn = 0;
        let bytes = 2.0 * (n * k + rows * (n + k)) as f64;
        let name = format!("linear {rows} x {n} x {k}");
        let flops = 2.0 * (rows * n * k) as f64;
        let kernels = self.others.len();
        let mut call = |gpu: &dyn Backend| {
            turn += 1;
            gpu.linear(x.view(), &matrices[turn % copies], None, out.view_mut()).unwrap();
        };
        self.lines(limits, &name, kernels, flops, bytes, &mut call);
        if rows <= 64 {
            self.lines_of_steps(limits, 64usize.next_multiple_of(copies), flops, bytes, &mut call);
        }
    }

    fn slots(&mut self, shape: ExpertShape, dtype: DType) -> Vec<Option<Mlp>> {
        let mut matrix = |n, k| {
            let values = (0..65_537).map(|_| bf16::from_f32(self.numbers.unit() * 0.02)).collect::<Vec<_>>();
            HostMatrix { n, k, data: HostData::Bf16(values.into_iter().cycle().take(n * k).collect()) }
        };
        let host = HostMlp {
            gate: matrix(shape.width, shape.hidden),
            up: matrix(shape.width, shape.hidden),
            down: matrix(shape.hidden, shape.width),
            bias: None,
        };
        let first = self.gpu.pack_mlp(&host, dtype).unwrap();
        let copy = || Mlp { parts: first.parts.iter().map(|p| self.twin(p)).collect(), ..first };
        let mut slots: Vec<Option<Mlp>> = (1..shape.experts).map(|_| Some(copy())).collect();
        slots.push(Some(first));
        slots
    }

    /// Rows of each expert: every choice is independent, its probability the exponential of a normal number times `spread`. Below 0, all
    /// have as many.
    fn loads(&mut self, shape: ExpertShape, rows: usize, spread: f32) -> Vec<usize> {
        if spread < 0.0 {
            return vec![rows / shape.experts; shape.experts];
        }
        let odds: Vec<f32> = (0..shape.experts).map(|_| (self.numbers.normal() * spread).exp()).collect();
        let total: f32 = odds.iter().sum();
        let mut counts = vec![0; shape.experts];
        for _ in 0..rows {
            let mut at = (self.numbers.unit() * 0.5 + 0.5) * total;
            let chosen = odds.iter().position(|o| {
                at -= o;
                at < 0.0
            });
            counts[chosen.unwrap_or(shape.experts - 1)] += 1;
        }
        counts
    }

    fn experts(
        &mut self,
        limits: Limits,
        shape: ExpertShape,
        slots: &[Option<Mlp>],
        tokens: usize,
        spread: f32,
    ) {
        let rows = tokens * shape.top_k;
        let counts = self.loads(shape, rows, spread);
        let mut offsets = vec![0];
        for count in &counts {
            offsets.push(offsets[offsets.len() - 1] + count);
        }
        let x = self.random(rows, shape.hidden);
        let mut out = self.gpu.alloc(DType::Bf16, rows, shape.hidden).unwrap();
        let busy = counts.iter().filter(|&&n| n > 0).count();
        let parameters = 3 * shape.hidden * shape.width;
        let expert: usize = slots.iter().flatten().map(Mlp::bytes).next().expect("every expert has a slot");
        let bytes = (busy * expert + 4 * rows * (shape.hidden + shape.width)) as f64;
        let loads = match spread {
            ..0.0 => "even",
            0.0 => "uniform",
            _ => "log-normal",
        };
        let name = format!("experts {}{}, {tokens} tokens, {loads}", shape.name, in_form(slots));
        let kernels = match rows.div_ceil(busy) {
            0..=8 => 0,
            _ => self.others.len(),
        };
        self.lines(limits, &name, kernels, 2.0 * (rows * parameters) as f64, bytes, |gpu| {
            let args =
                ExpertsArgs { rows: x.view(), offsets: &offsets, slots, activation: Activation::SiluMul };
            gpu.experts(args, out.view_mut()).unwrap();
        });
    }

    /// Grouping, permutation, experts and combine of a layer whose choices the host does not see.
    fn planned_experts(&mut self, limits: Limits, shape: ExpertShape, slots: &[Option<Mlp>], tokens: usize) {
        let ExpertShape { hidden, width, experts, top_k, .. } = shape;
        let rows = tokens * top_k;
        let x = self.random(tokens, hidden);
        // Different experts for each token.
        let chosen: Vec<i32> = (0..tokens)
            .flat_map(|_| {
                let first = self.numbers.below(experts);
                (0..top_k).map(move |j| ((first + j) % experts) as i32)
            })
            .collect();
        let busy = chosen.iter().collect::<std::collections::BTreeSet<_>>().len();
        let mut ids = self.gpu.alloc(DType::I32, tokens, top_k).unwrap();
        let bytes: Vec<u8> = chosen.iter().flat_map(|id| id.to_le_bytes()).collect();
        self.gpu.upload(&bytes, ids.view_mut()).unwrap();
        let weights = self.gpu.alloc(DType::F32, tokens, top_k).unwrap();
        let [mut grouped, mut computed] = [0, 1].map(|_| self.gpu.alloc(DType::Bf16, rows, hidden).unwrap());
        let mut out = self.gpu.alloc(DType::F32, tokens, hidden).unwrap();
        let slot_of: Vec<u32> = (0..experts as u32).collect();
        let seconds = self.time(|gpu| {
            let args = PlannedArgs {
                x: x.view(),
                ids: ids.view(),
                weights: weights.view(),
                slot_of: &slot_of,
                slots,
                activation: Activation::SiluMul,
                grouped: grouped.view_mut(),
                computed: computed.view_mut(),
            };
            gpu.device_plan().unwrap().planned_experts(args, out.view_mut()).unwrap();
        });
        let parameters = 3 * hidden * width;
        let expert: usize = slots.iter().flatten().map(Mlp::bytes).next().expect("every expert has a slot");
        let bytes = (busy * expert + 2 * rows * (5 * hidden + 2 * width)) as f64;
        let name = format!("planned {}{}, {tokens} tokens", shape.name, in_form(slots));
        self.line(&name, seconds, 2.0 * (rows * parameters) as f64, bytes, Some(limits));
    }

    /// The router's own product, in f32.
    fn router_product(&mut self, limits: Limits, rows: usize, experts: usize, hidden: usize) {
        let mut f32s = |rows: usize, cols: usize| {
            let bytes: Vec<u8> = (0..rows * cols).flat_map(|_| self.numbers.unit().to_le_bytes()).collect();
            let mut tensor = self.gpu.alloc(DType::F32, rows, cols).unwrap();
            self.gpu.upload(&bytes, tensor.view_mut()).unwrap();
            tensor
        };
        let x = f32s(rows, hidden);
        let w = Matrix { data: f32s(experts, hidden), n: experts, k: hidden };
        let mut out = self.gpu.alloc(DType::F32, rows, experts).unwrap();
        let seconds = self.time(|gpu| gpu.linear(x.view(), &w, None, out.view_mut()).unwrap());
        let bytes = 4.0 * (experts * hidden + rows * (hidden + experts)) as f64;
        let name = format!("router product {rows} x {experts} x {hidden}");
        self.line(&name, seconds, 2.0 * (rows * experts * hidden) as f64, bytes, Some(limits));
    }

    /// Router, permutation and combine of a Mixtral layer.
    fn around_experts(&mut self, limits: Limits, tokens: usize) {
        let (experts, top_k, hidden) = (8, 2, 4096);
        let logits: Vec<u8> = (0..tokens * experts).flat_map(|_| self.numbers.unit().to_le_bytes()).collect();
        let mut scores = self.gpu.alloc(DType::F32, tokens, experts).unwrap();
        self.gpu.upload(&logits, scores.view_mut()).unwrap();
        let mut ids = self.gpu.alloc(DType::I32, tokens, top_k).unwrap();
        let mut weights = self.gpu.alloc(DType::F32, tokens, top_k).unwrap();
        let seconds = self.time(|gpu| {
            gpu.route(scores.view(), None, &moe_rank::ROUTER, ids.view_mut(), weights.view_mut()).unwrap();
        });
        self.line(
            &format!("router, {tokens} tokens"),
            seconds,
            0.0,
            (tokens * 4 * (experts + 2 * top_k)) as f64,
            None,
        );
        let x = self.random(tokens, hidden);
        let rows = tokens * top_k;
        let index: Vec<u32> = (0..rows).map(|i| (i * 7919 % tokens) as u32).collect();
        let mut permuted = self.gpu.alloc(DType::Bf16, rows, hidden).unwrap();
        let seconds = self.time(|gpu| gpu.gather_rows(x.view(), &index, permuted.view_mut()).unwrap());
        let bytes = (2 * rows * hidden * 2) as f64;
        self.line(&format!("permute, {tokens} tokens"), seconds, 0.0, bytes, Some(limits));
        let index: Vec<u32> = (0..rows).map(|i| (i * 7919 % rows) as u32).collect();
        let mut out = self.gpu.alloc(DType::F32, tokens, hidden).unwrap();
        let seconds = self.time(|gpu| {
            let args =
                CombineArgs { rows: permuted.view(), index: &index, weights: weights.view(), parts: 1 };
            gpu.combine(args, out.view_mut()).unwrap();
        });
        let bytes = (rows * hidden * 2 + tokens * hidden * 4) as f64;
        self.line(&format!("combine, {tokens} tokens"), seconds, 0.0, bytes, Some(limits));
    }

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

    fn decode_attention(&mut self, limits: Limits, sequences: usize, context: usize) {
        let spans = last_rows(sequences, context);
        let [seconds, in_step] = self.attention(&spans, context);
        let bytes = (sequences * context * 2 * 8 * 128 * 2) as f64;
        let flops = (sequences * context * 32 * 128 * 4) as f64;
        let name = format!("attention, {sequences} rows over {context}");
        self.line(&name, seconds, flops, bytes, Some(limits));
        self.line("  in a step", in_step, flops, bytes, Some(limits));
    }

    fn prefill_attention(&mut self, rows: usize) {
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

    fn decode_mla(&mut self, limits: Limits, sequences: usize, context: usize) {
        let [seconds, in_step] = self.mla(&last_rows(sequences, context), context);
        let weights = MLA_HEADS * (NOPE + V_DIM) * LATENT;
        let bytes = 2 * (sequences * context * (LATENT + ROPE) + weights);
        let flops = 2 * sequences * (context * MLA_HEADS * (2 * LATENT + ROPE) + weights);
        let name = format!("MLA, {sequences} rows over {context}");
        self.line(&name, seconds, flops as f64, bytes as f64, Some(limits));
        self.line("  in a step", in_step, flops as f64, bytes as f64, Some(limits));
    }

    fn prefill_mla(&mut self, rows: usize) {
        let [seconds, _] = self.mla(&[prompt(rows)], rows);
        let attention = rows * rows / 2 * MLA_HEADS * 2 * (NOPE + ROPE + V_DIM);
        let flops = attention + 2 * rows * MLA_HEADS * (NOPE + V_DIM) * LATENT;
        self.line(&format!("MLA, prompt of {rows}"), seconds, flops as f64, 0.0, None);
    }
}

/// How the experts are held, where that is not bf16.
fn in_form(slots: &[Option<Mlp>]) -> &'static str {
    match slots.iter().flatten().next().map(|expert| expert.parts[0].dtype()) {
        Some(DType::F8) => " in fp8",
        Some(DType::I4x2) => " in int4",
        _ => "",
    }
}

/// Attention of DeepSeek-V3.
const MLA_HEADS: usize = 128;
const LATENT: usize = 512;
const NOPE: usize = 128;
const ROPE: usize = 64;
const V_DIM: usize = 128;

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
