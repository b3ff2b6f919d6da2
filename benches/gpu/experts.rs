//! Experts of any load, and what stands around them in a layer: router, permutation, combine.

use half::bf16;
use moeyard::backend::{CombineArgs, DType, ExpertsArgs, HostData, HostMatrix, HostMlp, Mlp, PlannedArgs};
use moeyard::spec::Activation;

use crate::bench::{Bench, Limits};
use crate::moe_rank::ROUTER;

#[derive(Clone, Copy)]
pub struct ExpertShape {
    pub name: &'static str,
    pub hidden: usize,
    pub width: usize,
    pub experts: usize,
    pub top_k: usize,
}

pub const SHAPES: [ExpertShape; 2] = [
    ExpertShape { name: "Mixtral-8x7B", hidden: 4096, width: 14336, experts: 8, top_k: 2 },
    // A quarter of the experts and of the choices: one of four ranks.
    ExpertShape { name: "DeepSeek-V3, EP 4", hidden: 7168, width: 2048, experts: 64, top_k: 2 },
];

impl Bench {
    pub fn slots(&mut self, shape: ExpertShape, dtype: DType) -> Vec<Option<Mlp>> {
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

    pub fn experts(
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
    pub fn planned_experts(
        &mut self,
        limits: Limits,
        shape: ExpertShape,
        slots: &[Option<Mlp>],
        tokens: usize,
    ) {
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

    /// Router, permutation and combine of a Mixtral layer.
    pub fn around_experts(&mut self, limits: Limits, tokens: usize) {
        let (experts, top_k, hidden) = (8, 2, 4096);
        let logits: Vec<u8> = (0..tokens * experts).flat_map(|_| self.numbers.unit().to_le_bytes()).collect();
        let mut scores = self.gpu.alloc(DType::F32, tokens, experts).unwrap();
        self.gpu.upload(&logits, scores.view_mut()).unwrap();
        let mut ids = self.gpu.alloc(DType::I32, tokens, top_k).unwrap();
        let mut weights = self.gpu.alloc(DType::F32, tokens, top_k).unwrap();
        let seconds = self.time(|gpu| {
            gpu.route(scores.view(), None, &ROUTER, ids.view_mut(), weights.view_mut()).unwrap();
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
}

/// How the experts are held, where that is not bf16.
fn in_form(slots: &[Option<Mlp>]) -> &'static str {
    match slots.iter().flatten().next().map(|expert| expert.parts[0].dtype()) {
        Some(DType::F8) => " in fp8",
        Some(DType::I4x2) => " in int4",
        _ => "",
    }
}
