//! Router and combine.

use libtest_mimic::Trial;
use moeyard::backend::{CombineArgs, DType, ExpertsArgs, Mlp, PlannedArgs};
use moeyard::spec::{Activation, ExpertGroups, GroupScore, Renormalize, Router, Score};

use crate::moe_rank::ROUTER;
use crate::pair::{CLOSE, Device, EXACT, ROUNDED, gpu, host_matrix, poisoned, same, same_on, tensor, values};
use crate::products::host_mlp;
use crate::support::numbers::Numbers;
use crate::support::threads::on_threads;
use crate::trial;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("moe::every_router", every_router),
        trial("moe::ties_go_to_the_lowest_id", ties_go_to_the_lowest_id),
        trial("moe::logits_that_are_no_numbers_choose_experts_that_exist", logits_that_are_no_numbers),
        trial(
            "moe::ranks_launch_one_kernel_with_different_memory",
            ranks_launch_one_kernel_with_different_memory,
        ),
        trial("moe::router_logits", router_logits),
        trial("moe::combine", combine),
        trial("moe::planned_experts", planned_experts),
        trial("moe::the_device_plans_as_the_host_does", the_device_plans_as_the_host_does),
    ]
}

fn router(score: Score) -> Router {
    Router { score, renormalize: Renormalize::Off, ..ROUTER }
}

fn grouped(score: Score, count: usize, keep: usize, group_score: GroupScore, choice_bias: bool) -> Router {
    Router {
        groups: Some(ExpertGroups { count, keep, score: group_score }),
        choice_bias,
        renormalize: Renormalize::Sum { eps: 1e-20 },
        scale: 2.5,
        ..router(score)
    }
}

fn check(
    what: &str,
    router: &Router,
    rows: usize,
    experts: usize,
    top_k: usize,
    logits: &[f32],
    bias: &[f32],
) {
    let run = |ids_only: bool| {
        move |device: crate::pair::Device<'_>| {
            let logits = tensor(device, DType::F32, rows, experts, logits);
            let bias = tensor(device, DType::F32, 1, experts, bias);
            let mut ids = poisoned(device, DType::I32, rows, top_k);
            let mut weights = poisoned(device, DType::F32, rows, top_k);
            let bias = router.choice_bias.then(|| bias.view());
            device.route(logits.view(), bias, router, ids.view_mut(), weights.view_mut()).unwrap();
            values(device, if ids_only { ids.view() } else { weights.view() })
        }
    };
    same(&format!("{what}: ids"), EXACT, run(true));
    same(&format!("{what}: weights"), CLOSE, run(false));
}

fn every_router() {
    let mut numbers = Numbers::new(31);
    let all = [
        ("softmax", router(Score::Softmax)),
        ("renormalised", Router { renormalize: Renormalize::Sum { eps: 0.0 }, ..router(Score::Softmax) }),
        ("sigmoid", Router { choice_bias: true, scale: 1.5, ..router(Score::Sigmoid) }),
        ("chosen", router(Score::SoftmaxOverChosen)),
        ("sparse mixer", router(Score::SparseMixer { epsilon: 0.01 })),
        ("best of groups", grouped(Score::Softmax, 4, 2, GroupScore::Max, false)),
        ("pairs of groups", grouped(Score::Sigmoid, 4, 2, GroupScore::Top2Sum, true)),
    ];
    for (name, router) in &all {
        for (rows, experts, top_k) in
            [(1, 8, 2), (60, 16, 2), (40, 64, 6), (9, 128, 8), (5, 256, 8), (7, 512, 10), (3, 1024, 4)]
        {
            let logits: Vec<f32> = numbers.vec(rows * experts).iter().map(|x| x * 3.0).collect();
            let bias: Vec<f32> = numbers.vec(experts).iter().map(|x| x * 0.2).collect();
            check(
                &format!("{name} {rows} x {experts}, top {top_k}"),
                router,
                rows,
                experts,
                top_k,
                &logits,
                &bias,
            );
        }
    }
    for (experts, top_k) in [(1, 1), (3, 3), (33, 5)] {
        let logits = numbers.vec(6 * experts);
        check("odd numbers", &router(Score::Softmax), 6, experts, top_k, &logits, &vec![0.0; experts]);
    }
}

fn ties_go_to_the_lowest_id() {
    for score in
        [Score::Softmax, Score::Sigmoid, Score::SoftmaxOverChosen, Score::SparseMixer { epsilon: 0.01 }]
    {
        check("all equal", &router(score), 1, 40, 5, &[0.25; 40], &[0.0; 40]);
    }
    let mut numbers = Numbers::new(32);
    let few: Vec<f32> = (0..200 * 64).map(|_| numbers.below(3) as f32).collect();
    check("three levels", &router(Score::Softmax), 200, 64, 8, &few, &[0.0; 64]);
    for score in [GroupScore::Max, GroupScore::Top2Sum] {
        check("groups", &grouped(Score::Sigmoid, 8, 3, score, false), 200, 64, 8, &few, &[0.0; 64]);
    }
}

/// Garbage in must not become an index out of bounds.
fn logits_that_are_no_numbers() {
    let owner = gpu();
    let gpu = owner.as_ref();
    let device: crate::pair::Device<'_> = gpu;
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for router in [
            router(Score::Softmax),
            router(Score::Sigmoid),
            router(Score::SoftmaxOverChosen),
            router(Score::SparseMixer { epsilon: 0.01 }),
            grouped(Score::Sigmoid, 4, 2, GroupScore::Top2Sum, false),
            grouped(Score::Softmax, 4, 2, GroupScore::Max, false),
        ] {
            let logits = tensor(device, DType::F32, 2, 48, &[[value; 48], [1.0; 48]].concat());
            let mut ids = poisoned(device, DType::I32, 2, 6);
            let mut weights = poisoned(device, DType::F32, 2, 6);
            device.route(logits.view(), None, &router, ids.view_mut(), weights.view_mut()).unwrap();
            let mut chosen = values(device, ids.head(1));
            assert!(chosen.iter().all(|&e| (0.0..48.0).contains(&e)), "{value}: {chosen:?}");
            chosen.dedup();
            assert_eq!(chosen.len(), 6, "{value}");
        }
    }
}

/// Whoever needs less shared memory takes none from the other.
fn ranks_launch_one_kernel_with_different_memory() {
    let wide = 6000;
    on_threads([3000, wide, 2200, wide], |experts| {
        let device = gpu();
        let logits: Vec<f32> = (0..experts).map(|e| (e * 7 % experts) as f32).collect();
        let logits = tensor(device.as_ref(), DType::F32, 1, experts, &logits);
        for _ in 0..200 {
            let mut ids = poisoned(device.as_ref(), DType::I32, 1, 1);
            let mut weights = poisoned(device.as_ref(), DType::F32, 1, 1);
            let router = router(Score::Softmax);
            device.route(logits.view(), None, &router, ids.view_mut(), weights.view_mut()).unwrap();
            let best = values(device.as_ref(), ids.view())[0] as usize;
            assert_eq!(best * 7 % experts, experts - 1, "of {experts}");
        }
    });
}

/// Products with few outputs: a row has the same bits in any batch.
fn router_logits() {
    let owner = gpu();
    let mut numbers = Numbers::new(36);
    for (rows, n, k) in [
        (1, 8, 4096),
        (600, 8, 4096),
        (5, 1, 2049),
        (70, 64, 260),
        (300, 256, 7168),
        (1100, 256, 132),
        (33, 512, 7),
    ] {
        let w = host_matrix(&mut numbers, n, k, DType::F32);
        let (x, bias) = (numbers.vec(rows * k), numbers.vec(n));
        let run = |device: Device<'_>, part: std::ops::Range<usize>| {
            let w = device.pack_matrix(&w, DType::F32).unwrap();
            let x = tensor(device, DType::F32, rows, k, &x);
            let bias = tensor(device, DType::F32, 1, n, &bias);
            let mut out = poisoned(device, DType::F32, part.len(), n);
            let x = x.view().rows_range(part);
            device.linear(x, &w, Some(bias.view()), out.view_mut()).unwrap();
            values(device, out.view())
        };
        same_on(owner.as_ref(), &format!("{rows} x {n} x {k}"), CLOSE, |device| run(device, 0..rows));
        let whole = run(owner.as_ref(), 0..rows);
        for part in [0..1, rows - 1..rows, rows / 3..rows] {
            let found = run(owner.as_ref(), part.clone());
            assert!(found == whole[part.start * n..part.end * n], "{rows} x {n} x {k}: rows {part:?}");
        }
    }
}

fn combine() {
    let mut numbers = Numbers::new(33);
    for dtype in [DType::F32, DType::Bf16] {
        for (tokens, top_k, parts, hidden) in [(1, 1, 1, 1), (7, 2, 1, 100), (33, 8, 2, 65), (3, 6, 1, 4096)]
        {
            let rows = tokens * top_k * parts;
            let (data, weights) = (numbers.vec(rows * hidden), numbers.vec(tokens * top_k));
            let index: Vec<u32> = (0..rows).map(|_| numbers.below(rows) as u32).collect();
            same(&format!("{dtype:?} {tokens} x {top_k} x {parts} x {hidden}"), CLOSE, |device| {
                let rows = tensor(device, dtype, rows, hidden, &data);
                let weights = tensor(device, DType::F32, tokens, top_k, &weights);
                let mut out = poisoned(device, DType::F32, tokens, hidden);
                let args = CombineArgs { rows: rows.view(), index: &index, weights: weights.view(), parts };
                device.combine(args, out.view_mut()).unwrap();
                values(device, out.view())
            });
        }
    }
}

/// Choices of a layer and where its experts live.
struct Layer {
    tokens: usize,
    top_k: usize,
    ids: Vec<f32>,
    weights: Vec<f32>,
    x: Vec<f32>,
    slot_of: Vec<u32>,
    slots: usize,
}

/// `top_k` different experts per token, those of low numbers more often; experts in any slots, one of them empty.
fn layer(numbers: &mut Numbers, tokens: usize, experts: usize, top_k: usize, hidden: usize) -> Layer {
    let mut ids = Vec::new();
    for _ in 0..tokens {
        let mut chosen: Vec<usize> = Vec::new();
        while chosen.len() < top_k {
            let below = 1 + numbers.below(experts);
            let e = numbers.below(below);
            if !chosen.contains(&e) {
                chosen.push(e);
            }
        }
        ids.extend(chosen.iter().map(|&e| e as f32));
    }
    let slots = experts + 1;
    let mut order: Vec<u32> = (0..slots as u32).collect();
    for i in (1..slots).rev() {
        order.swap(i, numbers.below(i + 1));
    }
    let weights = numbers.vec(tokens * top_k);
    let x = numbers.vec(tokens * hidden);
    Layer { tokens, top_k, ids, weights, x, slot_of: order[..experts].to_vec(), slots }
}

impl Layer {
    fn planned(&self, device: Device<'_>, dtype: DType, slots: &[Option<Mlp>], hidden: usize) -> Vec<f32> {
        let x = tensor(device, dtype, self.tokens, hidden, &self.x);
        let ids = tensor(device, DType::I32, self.tokens, self.top_k, &self.ids);
        let weights = tensor(device, DType::F32, self.tokens, self.top_k, &self.weights);
        let rows = self.tokens * self.top_k;
        let [mut grouped, mut computed] = [0, 1].map(|_| poisoned(device, dtype, rows, hidden));
        let mut out = poisoned(device, DType::F32, self.tokens, hidden);
        let args = PlannedArgs {
            x: x.view(),
            ids: ids.view(),
            weights: weights.view(),
            slot_of: &self.slot_of,
            slots,
            activation: Activation::SiluMul,
            grouped: grouped.view_mut(),
            computed: computed.view_mut(),
        };
        device.device_plan().unwrap().planned_experts(args, out.view_mut()).unwrap();
        values(device, out.view())
    }

    /// The same with a stable sort on the host.
    fn by_host(&self, device: Device<'_>, dtype: DType, slots: &[Option<Mlp>], hidden: usize) -> Vec<f32> {
        let x = tensor(device, dtype, self.tokens, hidden, &self.x);
        let weights = tensor(device, DType::F32, self.tokens, self.top_k, &self.weights);
        let slot = |choice: usize| self.slot_of[self.ids[choice] as usize] as usize;
        let mut order: Vec<usize> = (0..self.ids.len()).collect();
        order.sort_by_key(|&choice| slot(choice));
        let tokens: Vec<u32> = order.iter().map(|choice| (choice / self.top_k) as u32).collect();
        let mut index = vec![0; order.len()];
        order.iter().enumerate().for_each(|(row, &choice)| index[choice] = row as u32);
        let offsets: Vec<usize> =
            (0..=self.slots).map(|s| order.iter().filter(|&&choice| slot(choice) < s).count()).collect();
        let [mut grouped, mut computed] = [0, 1].map(|_| poisoned(device, dtype, order.len(), hidden));
        let mut out = poisoned(device, DType::F32, self.tokens, hidden);
        device.gather_rows(x.view(), &tokens, grouped.view_mut()).unwrap();
        let args =
            ExpertsArgs { rows: grouped.view(), offsets: &offsets, slots, activation: Activation::SiluMul };
        device.experts(args, computed.view_mut()).unwrap();
        let args = CombineArgs { rows: computed.view(), index: &index, weights: weights.view(), parts: 1 };
        device.combine(args, out.view_mut()).unwrap();
        values(device, out.view())
    }

    /// The slot table, with the same expert in several slots where there are many.
    fn slots(
        &self,
        device: Device<'_>,
        dtype: DType,
        host: &[moeyard::backend::HostMlp],
    ) -> Vec<Option<Mlp>> {
        let mut slots: Vec<Option<Mlp>> = (0..self.slots).map(|_| None).collect();
        for (e, &slot) in self.slot_of.iter().enumerate() {
            slots[slot as usize] = Some(device.pack_mlp(&host[e % host.len()], dtype).unwrap());
        }
        slots
    }
}

fn planned_experts() {
    let owner = gpu();
    let mut numbers = Numbers::new(34);
    for dtype in [DType::F32, DType::Bf16] {
        let (hidden, width) = (64, 32);
        let host: Vec<_> = (0..7).map(|_| host_mlp(&mut numbers, hidden, width, true, dtype)).collect();
        for (tokens, experts, top_k) in [(1, 8, 2), (3, 8, 1), (64, 8, 2), (5, 64, 6), (130, 64, 8)] {
            let layer = layer(&mut numbers, tokens, experts, top_k, hidden);
            same_on(
                owner.as_ref(),
                &format!("{dtype:?} {tokens} of {experts}, top {top_k}"),
                ROUNDED,
                |device| {
                    let slots = layer.slots(device, dtype, &host);
                    layer.planned(device, dtype, &slots, hidden)
                },
            );
        }
    }
}

/// One block of the plan, several, and more slots than a warp and than a block has threads.
fn the_device_plans_as_the_host_does() {
    let owner = gpu();
    let device = owner.as_ref();
    let mut numbers = Numbers::new(35);
    let (hidden, width) = (64, 32);
    let host: Vec<_> = (0..7).map(|_| host_mlp(&mut numbers, hidden, width, false, DType::Bf16)).collect();
    for (experts, top_k) in [(1, 1), (8, 2), (64, 6), (300, 8)] {
        for tokens in [1, 2, 4, 16, 31, 128, 513, 1025, 5000] {
            let layer = layer(&mut numbers, tokens, experts, top_k, hidden);
            let slots = layer.slots(device, DType::Bf16, &host);
            let bits = |xs: Vec<f32>| xs.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            let found = bits(layer.planned(device, DType::Bf16, &slots, hidden));
            let expected = bits(layer.by_host(device, DType::Bf16, &slots, hidden));
            assert!(found == expected, "{tokens} tokens, top {top_k} of {experts}");
        }
    }
}
