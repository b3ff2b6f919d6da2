//! Layers of several ranks on one GPU: each device works out its part by itself, as the reference does and as the hosts would agree
//! on; and the pieces of such steps are replayed.

use std::sync::Arc;

use libtest_mimic::Trial;
use moeyard::backend::{
    Backend, DType, HostMlp, Mlp, PaddedShape, Precision, Replicas, ReturnedArgs, Tensor, WorldArgs,
};
use moeyard::comm::local::Local;
use moeyard::comm::solo::Solo;
use moeyard::layers::Rank;
use moeyard::layers::linear::Linear;
use moeyard::layers::mlp::GatedMlp;
use moeyard::metrics::WorkClock;
use moeyard::moe::layer::{MoeLayer, MoeRows, MoeScratch, Shared};
use moeyard::moe::load::{LoadCounters, Phase};
use moeyard::moe::router::Router;
use moeyard::spec::{self, Activation, Moe, Renormalize, Score};
use router_sim::placement::{EMPTY, Placement};
use router_sim::split::Split;

use crate::pair::{Device, Numbers, ROUNDED, gpu, host_matrix, poisoned, same_on, tensor, values};
use crate::products::host_mlp;
use crate::trial;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("world::the_device_works_out_what_the_reference_does", the_device_works_out),
        trial("world::devices_group_as_hosts_do", devices_group_as_hosts_do),
    ]
}

const HIDDEN: usize = 64;
const WIDTH: usize = 32;

/// A placement with every expert somewhere, and replicas and empty slots anywhere.
fn scattered(numbers: &mut Numbers, ep: usize, experts: usize, redundant: usize, layers: usize) -> Placement {
    let per_rank = (experts + redundant).div_ceil(ep);
    let maps = (0..layers).map(|_| {
        let slots = 0..per_rank * ep;
        let mut map: Vec<i32> = slots
            .map(|slot| if slot < experts { slot as i32 } else { numbers.below(experts + 1) as i32 - 1 })
            .collect();
        (1..map.len()).rev().for_each(|i| map.swap(i, numbers.below(i + 1)));
        map
    });
    Placement::new(ep, per_rank, experts, (0..layers).collect(), maps.collect()).unwrap()
}

/// Choices of all ranks; what pads is no expert at all.
fn choose(numbers: &mut Numbers, counts: &[u32], rows: usize, experts: usize, top_k: usize) -> Vec<f32> {
    let mut ids = vec![-1e9; counts.len() * rows * top_k];
    for (at, row) in ids.chunks_mut(top_k).enumerate() {
        if at % rows < counts[at / rows] as usize {
            let mut left: Vec<usize> = (0..experts).collect();
            for id in row {
                let below = 1 + numbers.below(left.len());
                *id = left.remove(numbers.below(below)) as f32;
            }
        }
    }
    ids
}

fn the_device_works_out() {
    let owner = gpu();
    let mut numbers = Numbers::new(81);
    for dtype in [DType::F32, DType::Bf16] {
        let host: Vec<_> = (0..5).map(|_| host_mlp(&mut numbers, HIDDEN, WIDTH, true, dtype)).collect();
        for (ep, expert_tp, experts, top_k, redundant, most) in [
            (1, 1, 4, 2, 0, 3),
            (2, 1, 8, 2, 0, 1),
            (4, 1, 8, 2, 5, 40),
            (8, 1, 64, 8, 9, 16),
            (2, 2, 16, 3, 3, 9),
            (3, 1, 300, 6, 70, 12),
            (16, 1, 8, 2, 8, 33),
        ] {
            let (world, slots_per_rank) = (ep * expert_tp, usize::div_ceil(experts + redundant, ep));
            let placement = scattered(&mut numbers, ep, experts, redundant, 1);
            let layer = placement.layer(0);
            let rows = PaddedShape::rows_for(most, world, top_k).unwrap();
            let counts: Vec<u32> = (0..world).map(|_| numbers.below(most + 1) as u32).collect();
            let ids = choose(&mut numbers, &counts, rows, experts, top_k);
            let x = numbers.vec(world * rows * HIDDEN);
            let rank = numbers.below(world);
            let own = counts[rank] as usize;
            let weights = numbers.vec(own * top_k);
            let shape = PaddedShape { world, rank, expert_tp, rows, top_k, slots_per_rank };
            let what = format!("{dtype:?} {shape:?}, {experts} experts");
            // What the results of rows that come home are made of is the same everywhere: they come from this rank alone.
            let run = |device: Device<'_>| {
                let slots: Vec<Option<Mlp>> = layer
                    .slots_of_rank(shape.expert_rank())
                    .iter()
                    .map(|&e| (e != EMPTY).then(|| device.pack_mlp(&host[e as usize % 5], dtype).unwrap()))
                    .collect();
                let x = tensor(device, dtype, world * rows, HIDDEN, &x);
                let ids = tensor(device, DType::I32, world * rows, top_k, &ids);
                let [mut grouped, mut computed, mut returned] =
                    [(); 3].map(|()| poisoned(device, dtype, shape.capacity(), HIDDEN));
                let mut offsets = poisoned(device, DType::I32, slots_per_rank + 1, 1);
                let mut index = poisoned(device, DType::I32, (own * top_k * expert_tp).max(1), 1);
                let (starts, by_expert) = layer.by_expert();
                let planner = device.world_plan().unwrap();
                let args = WorldArgs {
                    shape,
                    counts: &counts,
                    x: x.view(),
                    ids: ids.view(),
                    replicas: Replicas { starts, slots: by_expert },
                    slots: &slots,
                    activation: Activation::SiluMul,
                    grouped: grouped.view_mut(),
                    computed: computed.view_mut(),
                    returned: returned.view_mut(),
                    offsets: offsets.view_mut(),
                    index: index.head_mut(own * top_k * expert_tp),
                };
                planner.world_experts(args).unwrap();
                // As if every rank had returned what this one did.
                let mut out = poisoned(device, DType::F32, own.max(1), HIDDEN);
                if own > 0 {
                    let weights = tensor(device, DType::F32, own, top_k, &weights);
                    let mut all = poisoned(device, dtype, shape.capacity(), HIDDEN);
                    fill_homes(device, &returned, &mut all, shape);
                    let args = ReturnedArgs {
                        rows: all.view(),
                        index: index.head(own * top_k * expert_tp),
                        weights: weights.view(),
                        parts: expert_tp,
                    };
                    planner.combine_returned(args, out.view_mut()).unwrap();
                }
                let offsets = values(device, offsets.view());
                let here = *offsets.last().unwrap() as usize;
                let exact = [
                    offsets,
                    values(device, index.view()),
                    values(device, grouped.view().rows_range(0..here)),
                ];
                let close = [values(device, returned.view()), values(device, out.view())];
                (exact.concat(), close.concat())
            };
            let (found, expected) =
                (run(owner.as_ref()).0, run(&moeyard::backend::reference::ReferenceBackend).0);
            assert!(found == expected, "{what}");
            same_on(owner.as_ref(), &what, ROUNDED, |device| run(device).1);
        }
    }
}

/// Puts what a rank returned to itself where it reads what all ranks returned, and ones elsewhere.
fn fill_homes(device: Device<'_>, returned: &Tensor, all: &mut Tensor, shape: PaddedShape) {
    let ones =
        tensor(device, returned.dtype(), shape.capacity(), HIDDEN, &vec![1.0; shape.capacity() * HIDDEN]);
    device.copy_rows(ones.view(), all.view_mut()).unwrap();
    let own = shape.rank * shape.returned()..(shape.rank + 1) * shape.returned();
    device.copy_rows(returned.view().rows_range(own.clone()), all.view_mut().rows_range(own)).unwrap();
}

const EXPERTS: usize = 12;
const TOP_K: usize = 3;
/// As many as make pieces beyond those that are given to a stream at once.
const LAYERS: usize = 8;
const MAX_ROWS: usize = 16;

/// A model of MoE layers alone.
struct Weights {
    router: moeyard::backend::HostMatrix,
    gate: moeyard::backend::HostMatrix,
    experts: Vec<HostMlp>,
    shared: HostMlp,
}

fn router_spec() -> spec::Router {
    spec::Router {
        score: Score::Softmax,
        logit_bias: false,
        choice_bias: false,
        groups: None,
        renormalize: Renormalize::Sum { eps: 0.0 },
        scale: 1.0,
    }
}

impl Weights {
    fn new() -> Weights {
        let mut numbers = Numbers::new(82);
        Weights {
            router: host_matrix(&mut numbers, EXPERTS, HIDDEN, DType::F32),
            gate: host_matrix(&mut numbers, 1, HIDDEN, DType::F32),
            experts: (0..EXPERTS)
                .map(|_| host_mlp(&mut numbers, HIDDEN, WIDTH, false, DType::Bf16))
                .collect(),
            shared: host_mlp(&mut numbers, HIDDEN, WIDTH, false, DType::Bf16),
        }
    }

    fn layer(&self, device: Device<'_>, index: usize, placement: &Placement, ep_rank: usize) -> MoeLayer {
        let linear = |host| Linear { weight: device.pack_matrix(host, DType::F32).unwrap(), bias: None };
        let expert =
            |e: i32| device.pack_mlp(&self.experts[(e as usize + index) % EXPERTS], DType::Bf16).unwrap();
        let slots = placement.layer(index).slots_of_rank(ep_rank).iter();
        MoeLayer {
            index,
            router: Router { linear: linear(&self.router), choice_bias: None, spec: router_spec() },
            // Empty slots have memory, as where experts may move.
            slots: slots.map(|&e| Some(expert(e.max(0)))).collect(),
            activation: Activation::SiluMul,
            shared: Some(Shared {
                mlp: GatedMlp {
                    weights: device.pack_mlp(&self.shared, DType::Bf16).unwrap(),
                    activation: Activation::SiluMul,
                },
                gate: Some(linear(&self.gate)),
            }),
        }
    }
}

/// Rows of each rank in each step, and the placement that is in force.
struct Schedule {
    placements: Vec<Placement>,
    /// `[step]`: rows of each rank, and which placement.
    steps: Vec<(Vec<usize>, usize)>,
}

impl Schedule {
    /// Few different batches, so that pieces come again, ranks without rows among them; experts move in between.
    fn new(ep: usize, redundant: usize) -> Schedule {
        let mut numbers = Numbers::new(83);
        let placements: Vec<Placement> =
            (0..2).map(|_| scattered(&mut numbers, ep, EXPERTS, redundant, LAYERS)).collect();
        let batches: Vec<Vec<usize>> = vec![
            (0..ep).map(|rank| rank % 3).collect(),
            (0..ep).map(|_| MAX_ROWS).collect(),
            (0..ep).map(|rank| usize::from(rank == 0)).collect(),
        ];
        let steps = (0..24).map(|step| (batches[step / 4 % 3].clone(), step / 6 % 2)).collect();
        Schedule { placements, steps }
    }
}

/// What a rank leaves behind: bits of its rows in every step, and rows of its slots and to other ranks.
type Seen = (Vec<Vec<u32>>, Vec<Vec<u64>>);

fn run_rank(
    end: Local,
    backend: Arc<dyn Backend>,
    weights: &Weights,
    schedule: &Schedule,
    decodes: bool,
) -> Seen {
    use moeyard::comm::Communicator as _;
    let me = end.rank();
    let load = LoadCounters::new(&schedule.placements[0]);
    let mut rank = Rank {
        tp: Box::new(Solo::new(Arc::clone(&backend))),
        backend: Arc::clone(&backend),
        world: Box::new(end),
        expert_tp: 1,
        precision: Precision::BF16,
        clock: WorkClock::new(Arc::clone(&load.meter)),
    };
    let device = backend.as_ref();
    let moe = Moe {
        experts: EXPERTS,
        top_k: TOP_K,
        intermediate: WIDTH,
        activation: Activation::SiluMul,
        expert_bias: false,
        router: router_spec(),
        shared: None,
    };
    let mut scratch =
        MoeScratch::new(device, DType::Bf16, LAYERS, MAX_ROWS, HIDDEN, &moe, Split::Even).unwrap();
    let mut layers: Vec<MoeLayer> = Vec::new();
    let room = MAX_ROWS + PaddedShape::PADDING;
    let mut exact = device.alloc(DType::F32, room, HIDDEN).unwrap();
    let mut rounded = device.alloc(DType::Bf16, room, HIDDEN).unwrap();
    let mut out = device.alloc(DType::F32, MAX_ROWS, HIDDEN).unwrap();
    let (mut seen, mut in_force) = (Vec::new(), usize::MAX);
    for (step, (rows, placement)) in schedule.steps.iter().enumerate() {
        if in_force != *placement {
            // The same slot tables with other experts: what a migration leaves.
            let made =
                (0..LAYERS).map(|index| weights.layer(device, index, &schedule.placements[*placement], me));
            match layers.is_empty() {
                true => layers = made.collect(),
                false => layers.iter_mut().zip(made).for_each(|(layer, mut new)| {
                    layer
                        .slots
                        .iter_mut()
                        .zip(&mut new.slots)
                        .for_each(|(old, new)| std::mem::swap(old, new));
                }),
            }
            in_force = *placement;
        }
        let (n, placement) = (rows[me], &schedule.placements[*placement]);
        if n > 0 {
            let x = Numbers::new((1000 * step + me) as u64).vec(n * HIDDEN);
            device.upload(bytemuck::cast_slice(&x), exact.head_mut(n)).unwrap();
            device.copy_rows(exact.head(n), rounded.head_mut(n)).unwrap();
        }
        scratch.start(&mut rank, n, decodes).unwrap();
        assert_eq!(scratch.padded_rows().is_some(), decodes, "step {step}: {rows:?}");
        let phases = vec![Phase::Decode; n];
        let mut body = || {
            for layer in &layers {
                let padded = rounded.head(scratch.padded_rows().unwrap_or(n));
                let given =
                    MoeRows { exact: exact.head(n), rounded: rounded.head(n), padded, phases: &phases };
                layer.forward(&mut rank, given, placement, &load, &mut scratch, out.head_mut(n))?;
                if n > 0 {
                    device.add_scaled(out.head(n), 1.0, exact.head_mut(n))?;
                    device.copy_rows(exact.head(n), rounded.head_mut(n))?;
                }
            }
            Ok(())
        };
        match decodes {
            true => device.step(&mut body).unwrap(),
            false => body().unwrap(),
        }
        if decodes {
            scratch.fetch(device).unwrap();
            layers.iter().for_each(|layer| layer.settle(&rank, placement, &phases, &load, &mut scratch));
        }
        seen.push(values(device, exact.head(n)).into_iter().map(f32::to_bits).collect());
    }
    let counted = (0..LAYERS).flat_map(|layer| [load.slot_rows(layer), load.sent_rows(layer)]).collect();
    (seen, counted)
}

fn run(
    ep: usize,
    weights: &Weights,
    schedule: &Schedule,
    decodes: bool,
) -> (Vec<Seen>, Vec<Arc<dyn Backend>>) {
    let backends: Vec<Arc<dyn Backend>> = (0..ep).map(|_| gpu()).collect();
    let seen = std::thread::scope(|scope| {
        let ends = Local::world(backends.clone());
        let threads: Vec<_> = ends
            .into_iter()
            .zip(backends.clone())
            .map(|(end, backend)| scope.spawn(move || run_rank(end, backend, weights, schedule, decodes)))
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    (seen, backends)
}

fn devices_group_as_hosts_do() {
    let weights = Weights::new();
    for (ep, redundant) in [(2, 0), (4, 5), (8, 4)] {
        let schedule = Schedule::new(ep, redundant);
        let (expected, _) = run(ep, &weights, &schedule, false);
        let (found, backends) = run(ep, &weights, &schedule, true);
        for (rank, (found, expected)) in found.iter().zip(&expected).enumerate() {
            for (step, (found, expected)) in found.0.iter().zip(&expected.0).enumerate() {
                assert!(found == expected, "EP {ep}, {redundant} redundant: rank {rank}, step {step}");
            }
            assert_eq!(found.1, expected.1, "EP {ep}, {redundant} redundant: rank {rank}");
            let counts = backends[rank].step_counts();
            assert!(
                counts.captured > 0 && counts.replayed > counts.captured,
                "rank {rank} of {ep}: {counts:?}"
            );
        }
    }
}
