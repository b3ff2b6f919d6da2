//! Layers of several ranks on one GPU: each device works out its part by itself, as the reference does and as the hosts would agree
//! on; and the pieces of such steps are replayed.

use std::sync::Arc;

use libtest_mimic::Trial;
use moeyard::backend::reference::ReferenceBackend;
use moeyard::backend::{
    Backend, DType, HostMatrix, HostMlp, Mlp, PaddedShape, Precision, Replicas, ReturnedArgs, Tensor,
    WorldArgs,
};
use moeyard::comm::Communicator;
use moeyard::comm::local::Local;
use moeyard::moe::layer::MoeLayer;
use moeyard::moe::load::LoadCounters;
use moeyard::spec::Activation;
use router_sim::placement::{EMPTY, Placement};
use router_sim::split::Split;

use crate::moe_rank::{MoeModel, MoeRank, MoeWeights, rank};
use crate::pair::{Device, ROUNDED, gpu, host_matrix, poisoned, same_on, tensor, values};
use crate::products::host_mlp;
use crate::support::numbers::Numbers;
use crate::support::placements::{choices, scattered};
use crate::support::threads::on_threads;
use crate::trial;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("world::the_device_works_out_what_the_reference_does", the_device_works_out),
        trial("world::devices_group_as_hosts_do", devices_group_as_hosts_do),
    ]
}

const HIDDEN: usize = 64;
const WIDTH: usize = 32;

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
            let placement = scattered(&mut numbers, ep, experts, redundant, &[0]);
            let layer = placement.layer(0);
            let rows = PaddedShape::rows_for(most, world, top_k).unwrap();
            let counts: Vec<u32> = (0..world).map(|_| numbers.below(most + 1) as u32).collect();
            let ids = choices(&mut numbers, &counts, rows, experts, top_k);
            let ids: Vec<f32> = ids.into_iter().map(|id| id as f32).collect();
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
            let (found, expected) = (run(owner.as_ref()).0, run(&ReferenceBackend).0);
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
/// As many as make pieces beyond those that are given to a stream at once.
const LAYERS: usize = 8;
const MAX_ROWS: usize = 16;
const MODEL: MoeModel = MoeModel {
    layers: LAYERS,
    hidden: HIDDEN,
    experts: EXPERTS,
    top_k: 3,
    intermediate: WIDTH,
    max_rows: MAX_ROWS,
};

/// A model of MoE layers alone.
struct Weights {
    router: HostMatrix<'static>,
    gate: HostMatrix<'static>,
    experts: Vec<HostMlp<'static>>,
    shared: HostMlp<'static>,
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
        let expert =
            |e: i32| device.pack_mlp(&self.experts[(e as usize + index) % EXPERTS], DType::Bf16).unwrap();
        let slots = placement.layer(index).slots_of_rank(ep_rank).iter();
        let weights = MoeWeights {
            router: &self.router,
            // Empty slots have memory, as where experts may move.
            slots: slots.map(|&e| Some(expert(e.max(0)))).collect(),
            shared: device.pack_mlp(&self.shared, DType::Bf16).unwrap(),
            gate: Some(&self.gate),
        };
        weights.layer(device, index)
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
        let layers: Vec<usize> = (0..LAYERS).collect();
        let placements: Vec<Placement> =
            (0..2).map(|_| scattered(&mut numbers, ep, EXPERTS, redundant, &layers)).collect();
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
    planned: bool,
) -> Seen {
    let me = end.rank();
    let device = backend.as_ref();
    let layers_of = |placement| (0..LAYERS).map(move |index| weights.layer(device, index, placement, me));
    let mut in_force = &schedule.placements[0];
    let load = Arc::new(LoadCounters::new(in_force));
    let rank = rank(Arc::clone(&backend), Box::new(end), 1, Precision::BF16, Arc::clone(&load.meter));
    let mut rank = MoeRank::new(&MODEL, Split::Even, rank, layers_of(in_force).collect(), load);
    let mut seen = Vec::new();
    for (step, (rows, placement)) in schedule.steps.iter().enumerate() {
        let (n, placement) = (rows[me], &schedule.placements[*placement]);
        if !std::ptr::eq(in_force, placement) {
            // The same slot tables with other experts: what a migration leaves.
            for (layer, new) in rank.layers.iter_mut().zip(layers_of(placement)) {
                layer.slots.iter_mut().zip(new.slots).for_each(|(slot, expert)| *slot = expert);
            }
            in_force = placement;
        }
        rank.set_rows(&Numbers::new((1000 * step + me) as u64).vec(n * HIDDEN));
        rank.start(n, planned);
        assert_eq!(rank.scratch.padded_rows().is_some(), planned, "step {step}: {rows:?}");
        let mut body = || {
            for index in 0..LAYERS {
                rank.forward(index, placement)?;
                if n > 0 {
                    device.add_scaled(rank.out.head(n), 1.0, rank.exact.head_mut(n))?;
                    device.copy_rows(rank.exact.head(n), rank.rounded.head_mut(n))?;
                }
            }
            Ok(())
        };
        if planned {
            device.step(&mut body).unwrap();
            rank.scratch.fetch(device).unwrap();
            rank.settle(placement);
        } else {
            body().unwrap();
        }
        seen.push(values(device, rank.exact.head(n)).into_iter().map(f32::to_bits).collect());
    }
    let counted = |layer| [rank.load.slot_rows(layer), rank.load.sent_rows(layer)];
    (seen, (0..LAYERS).flat_map(counted).collect())
}

fn run(
    ep: usize,
    weights: &Weights,
    schedule: &Schedule,
    planned: bool,
) -> (Vec<Seen>, Vec<Arc<dyn Backend>>) {
    let backends: Vec<Arc<dyn Backend>> = (0..ep).map(|_| gpu()).collect();
    let ranks = Local::world(backends.clone()).into_iter().zip(backends.clone());
    let seen = on_threads(ranks, |(end, backend)| run_rank(end, backend, weights, schedule, planned));
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
