//! Layers whose ranks find out by themselves who computes what, against hosts that agree on it: over threads and over NCCL.

use std::sync::Arc;

use half::bf16;
use router_sim::placement::{EMPTY, Placement};
use router_sim::split::{Split, SplitPlan};

use super::*;
use crate::backend::reference::ReferenceBackend;
use crate::backend::{HostData, HostMatrix, HostMlp, Mlp, Precision, Tensor};
use crate::comm::Communicator;
use crate::comm::solo::Solo;
use crate::comm::tests::worlds;
use crate::error::Error;
use crate::metrics::LoadSource;
use crate::moe::dispatch::DispatchShape;
use crate::moe::in_force::InForce;
use crate::moe::load::{LoadCounters, WorldLoad};
use crate::spec::Activation;
use crate::support::collectives::World;
use crate::support::moe_rank::{MoeModel, MoeRank, MoeWeights, rank};
use crate::support::numbers::Numbers;
use crate::support::placements::{choices, scattered};
use crate::support::threads::on_threads;

const HIDDEN: usize = 20;
const WIDTH: usize = 6;
const EXPERTS: usize = 8;
const LAYERS: usize = 2;
const MAX_ROWS: usize = 9;

/// A world, its rows in some steps, and where its experts live.
struct Case {
    world: usize,
    expert_tp: usize,
    top_k: usize,
    split: Split,
    placement: Placement,
    /// `[step][rank]`
    rows: Vec<Vec<usize>>,
    /// The rank whose rows rank 0 has.
    first: usize,
}

/// What one rank leaves behind.
#[derive(Debug, PartialEq)]
struct Seen {
    /// Bits of its rows, `[step][layer]`.
    outputs: Vec<Vec<u32>>,
    /// Rows that its slots computed, `[layer]`.
    slot_rows: Vec<Vec<u64>>,
    sent_rows: Vec<Vec<u64>>,
}

/// What all ranks counted.
#[derive(Debug, PartialEq)]
struct Counted {
    by_expert: Vec<u64>,
    by_rank: Vec<u64>,
    sent: Vec<u64>,
    imbalance: f64,
}

fn matrix(numbers: &mut Numbers, n: usize, k: usize) -> HostMatrix<'static> {
    let data = (0..n * k).map(|_| numbers.below(2001) as f32 / 1000.0 - 1.0).collect();
    HostMatrix { n, k, data: HostData::F32(data) }
}

/// Part `x` of `parts` of an expert's width.
fn expert(number: usize, x: usize, parts: usize) -> Mlp {
    let numbers = &mut Numbers(100 + number as u64);
    let HostData::F32(down) = matrix(numbers, HIDDEN, WIDTH).data else { unreachable!() };
    let mut inner = || {
        let HostData::F32(whole) = matrix(numbers, WIDTH, HIDDEN).data else { unreachable!() };
        let part = WIDTH / parts * HIDDEN;
        HostMatrix { n: WIDTH / parts, k: HIDDEN, data: HostData::F32(whole[x * part..][..part].to_vec()) }
    };
    let (gate, up) = (inner(), inner());
    let columns = x * (WIDTH / parts)..(x + 1) * (WIDTH / parts);
    let data = down.chunks(WIDTH).flat_map(|row| row[columns.clone()].to_vec()).collect();
    let down = HostMatrix { n: HIDDEN, k: WIDTH / parts, data: HostData::F32(data) };
    ReferenceBackend.pack_mlp(&HostMlp { gate, up, down, bias: None }, DType::Bf16).unwrap()
}

impl Case {
    /// EP ranks of `expert_tp` each with `redundant` replicas anywhere.
    fn new(numbers: &mut Numbers, ep: usize, expert_tp: usize, top_k: usize, redundant: usize) -> Case {
        let world = ep * expert_tp;
        let layers: Vec<usize> = (0..LAYERS).collect();
        let mut rows: Vec<Vec<usize>> =
            (0..3).map(|_| (0..world).map(|_| numbers.below(MAX_ROWS + 1)).collect()).collect();
        // One row in the whole world; and some beside ranks that have none.
        rows.push((0..world).map(|rank| usize::from(rank == world / 2)).collect());
        rows.push((0..world).map(|rank| rank % 2 * 3).collect());
        rows[1][0] = MAX_ROWS;
        let placement = scattered(numbers, ep, EXPERTS, redundant, &layers);
        Case { world, expert_tp, top_k, split: Split::Even, placement, rows, first: 0 }
    }

    fn layer(&self, index: usize, rank: usize) -> MoeLayer {
        let (ep_rank, x) = (rank / self.expert_tp, rank % self.expert_tp);
        let numbers = &mut Numbers(7 + index as u64);
        let (router, gate) = (matrix(numbers, EXPERTS, HIDDEN), matrix(numbers, 1, HIDDEN));
        let held = self.placement.layer(index).slots_of_rank(ep_rank).iter();
        let weights = MoeWeights {
            router: &router,
            slots: held
                .map(|&e| (e != EMPTY).then(|| expert(index * EXPERTS + e as usize, x, self.expert_tp)))
                .collect(),
            shared: expert(999, 0, 1),
            gate: Some(&gate),
        };
        weights.layer(&ReferenceBackend, index)
    }

    /// The rank at this end of a world.
    fn rank(&self, end: Box<dyn Communicator>, load: Arc<LoadCounters>) -> MoeRank {
        let model = MoeModel {
            layers: LAYERS,
            hidden: HIDDEN,
            experts: EXPERTS,
            top_k: self.top_k,
            intermediate: WIDTH,
            max_rows: MAX_ROWS,
        };
        let layers = (0..LAYERS).map(|index| self.layer(index, end.rank())).collect();
        let backend = Arc::new(ReferenceBackend);
        let rank = rank(backend, end, self.expert_tp, Precision::BF16, Arc::clone(&load.meter));
        MoeRank::new(&model, self.split, rank, layers, load)
    }

    /// Row `row` of rank `rank` in a step.
    fn x(&self, step: usize, rank: usize, row: usize) -> Vec<f32> {
        let numbers = &mut Numbers((step * 10_000 + rank * 100 + row) as u64);
        (0..HIDDEN).map(|_| numbers.below(2001) as f32 / 500.0 - 2.0).collect()
    }

    /// All steps on one rank; hosts agree where the steps are not `planned`. So many layers of each step are expected to be `padded`.
    fn run(&self, mut rank: MoeRank, planned: bool, padded: usize) -> Seen {
        let me = rank.rank.world.rank();
        let mut outputs = Vec::new();
        for (step, rows) in self.rows.iter().enumerate() {
            let n = rows[me];
            // What is padding holds nothing that may be computed with.
            fill(&mut rank.exact, f32::NAN);
            fill(&mut rank.rounded, f32::NAN);
            rank.set_rows(&(0..n).flat_map(|row| self.x(step, self.first + me, row)).collect::<Vec<_>>());
            rank.start(n, planned);
            for layer in 0..LAYERS {
                fill(&mut rank.out, f32::NAN);
                rank.forward(layer, &self.placement).unwrap();
                outputs.push(bits(rank.out.head(n)));
            }
            let found = rank.planned_layers(&self.placement);
            let nothing = self.world > 1 && rows.iter().all(|&n| n == 0);
            assert_eq!(found, if nothing { 0 } else { padded }, "step {step}");
            if found > 0 {
                rank.scratch.fetch(&ReferenceBackend).unwrap();
            }
            rank.settle(&self.placement);
        }
        Seen {
            outputs,
            slot_rows: (0..LAYERS).map(|layer| rank.load.slot_rows(layer)).collect(),
            sent_rows: (0..LAYERS).map(|layer| rank.load.sent_rows(layer)).collect(),
        }
    }

    /// Runs all ranks of a world.
    fn run_all(&self, world: World, planned: bool, padded: usize) -> (Vec<Seen>, Counted) {
        let counters: Vec<_> = world.iter().map(|_| Arc::new(LoadCounters::new(&self.placement))).collect();
        let seen = on_threads(world.into_iter().zip(&counters), |((_, end), load)| {
            self.run(self.rank(end, Arc::clone(load)), planned, padded)
        });
        let in_force = Arc::new(InForce::new(Arc::new(self.placement.clone())));
        let all = WorldLoad { in_force, counters };
        let load = all.snapshot();
        let imbalance = all.step_imbalance();
        (seen, Counted { by_expert: load.by_expert, by_rank: load.by_rank, sent: load.sent, imbalance })
    }

    /// Devices find out what hosts agree on, over every transport.
    fn check(&self, what: &str, padded: usize) {
        for (transport, world) in worlds(self.world).into_iter().enumerate() {
            let [local, _] = worlds(self.world);
            let by_hosts = self.run_all(local, false, 0);
            let by_devices = self.run_all(world, true, padded);
            for (rank, (found, expected)) in by_devices.0.iter().zip(&by_hosts.0).enumerate() {
                assert_eq!(found, expected, "{what}, transport {transport}, rank {rank}");
            }
            assert_eq!(by_devices.1, by_hosts.1, "{what}, transport {transport}");
        }
    }
}

fn fill(tensor: &mut Tensor, value: f32) {
    let n = tensor.rows() * tensor.cols();
    let bytes = match tensor.dtype() {
        DType::F32 => value.to_le_bytes().repeat(n),
        _ => bf16::from_f32(value).to_le_bytes().repeat(n),
    };
    ReferenceBackend.upload(&bytes, tensor.view_mut()).unwrap();
}

fn bits(view: View<'_>) -> Vec<u32> {
    let mut bits = vec![0; view.rows() * view.cols()];
    ReferenceBackend.download(view, bytemuck::cast_slice_mut(&mut bits)).unwrap();
    bits
}

#[test]
fn devices_find_out_what_hosts_agree_on() {
    let numbers = &mut Numbers(1);
    for (ep, expert_tp, top_k, redundant) in [
        (2, 1, 2, 0),
        (4, 1, 3, 0),
        (8, 1, 2, 0),
        (2, 2, 2, 0),
        (2, 1, 3, 5),
        (4, 1, 2, 8),
        (8, 1, 4, 9),
        (2, 2, 3, 4),
    ] {
        let case = Case::new(numbers, ep, expert_tp, top_k, redundant);
        case.check(&format!("EP {ep}, {expert_tp} to an expert, top {top_k}, {redundant} redundant"), LAYERS);
    }
}

/// The bits of a row are those it has on a single rank.
#[test]
fn the_world_leaves_the_bits_of_one_rank() {
    let numbers = &mut Numbers(2);
    for (ep, redundant) in [(2, 0), (4, 3), (8, 8)] {
        let case = Case::new(numbers, ep, 1, 3, redundant);
        let [local, _] = worlds(ep);
        let (seen, _) = case.run_all(local, true, LAYERS);
        for (me, found) in seen.into_iter().enumerate() {
            let alone = Case {
                world: 1,
                split: case.split,
                placement: scattered(&mut Numbers(3), 1, EXPERTS, 0, &[0, 1]),
                rows: case.rows.iter().map(|rows| vec![rows[me]]).collect(),
                first: me,
                ..case
            };
            let solo = Box::new(Solo::new(Arc::new(ReferenceBackend)));
            let rank = alone.rank(solo, Arc::new(LoadCounters::new(&alone.placement)));
            let expected = alone.run(rank, true, LAYERS);
            assert_eq!(found.outputs, expected.outputs, "EP {ep}, {redundant} redundant, rank {me}");
        }
    }
}

/// Layers with replicas that are not shared out evenly are left to the hosts, beside layers that are not.
#[test]
fn other_splits_are_the_hosts_affair() {
    let numbers = &mut Numbers(5);
    let mut case = Case::new(numbers, 4, 1, 2, 4);
    case.split = Split::Exact;
    // One of the layers has no replicas.
    let mut maps: Vec<Vec<i32>> =
        (0..LAYERS).map(|layer| case.placement.layer(layer).slots().to_vec()).collect();
    let mut seen = [false; EXPERTS];
    for expert in maps[1].iter_mut().filter(|expert| **expert != EMPTY) {
        if std::mem::replace(&mut seen[*expert as usize], true) {
            *expert = EMPTY;
        }
    }
    case.placement = Placement::new(4, case.placement.slots_per_rank(), EXPERTS, vec![0, 1], maps).unwrap();
    assert!(case.placement.layer(0).is_replicated() && !case.placement.layer(1).is_replicated());
    case.check("replicas in one layer", 1);
}

/// The same rows of each slot in the same order, and the same destinations, as the split and the dispatch of the hosts have.
#[test]
fn rows_are_grouped_as_dispatch_groups_them() {
    let numbers = &mut Numbers(6);
    for round in 0..60 {
        let (ep, expert_tp) = [(1, 1), (2, 1), (3, 1), (4, 1), (2, 2), (1, 3)][round % 6];
        let (world, top_k, redundant) = (ep * expert_tp, 1 + numbers.below(4), numbers.below(12));
        let experts = top_k + numbers.below(12);
        let placement = scattered(numbers, ep, experts, redundant, &[0]);
        let layer = placement.layer(0);
        let counts: Vec<u32> = (0..world).map(|_| numbers.below(9) as u32).collect();
        let rows = *counts.iter().max().unwrap() as usize + 1;
        let ids = choices(numbers, &counts, rows, experts, top_k);
        let mut world_counts = vec![0; world * experts];
        for (at, &id) in ids.iter().enumerate().filter(|(_, id)| **id >= 0) {
            world_counts[at / top_k / rows * experts + id as usize] += 1;
        }
        let mut split = SplitPlan::new(Split::Even);
        split.rebuild(layer, &world_counts);
        for rank in 0..world {
            let shape =
                PaddedShape { world, rank, expert_tp, rows, top_k, slots_per_rank: layer.slots_per_rank() };
            let own = &ids[rank * rows * top_k..][..counts[rank] as usize * top_k];
            let mut dispatch = Dispatch::default();
            dispatch.plan(DispatchShape { world, rank, expert_tp, top_k }, layer, &mut split, own);
            let found = group(shape, &counts, layer, &ids);
            let what = format!("round {round}, rank {rank}: {shape:?}");
            assert_eq!(found.offsets, dispatch.offsets, "{what}");
            assert_eq!(found.destinations, dispatch.destinations, "{what}");
            // Grouped row p came as received row group[p], and these are in order of (source, slot, row, j).
            let mut received = found.sources.clone();
            received.sort_by_key(|&(source, slot, ..)| (source, slot));
            for (grouped, &arrived) in dispatch.group.iter().enumerate() {
                assert_eq!(found.sources[grouped], received[arrived as usize], "{what}");
            }
        }
    }
}

struct Grouped {
    offsets: Vec<usize>,
    destinations: Vec<u32>,
    /// Of each grouped row: source rank, local slot, row, whose number in the world its elements tell.
    sources: Vec<(usize, usize, usize)>,
}

/// What the reference makes of rows that hold their numbers.
fn group(shape: PaddedShape, counts: &[u32], layer: LayerPlacement<'_>, ids: &[i32]) -> Grouped {
    let backend = ReferenceBackend;
    let PaddedShape { world, rank, rows, top_k, slots_per_rank, .. } = shape;
    let mut x = backend.alloc(DType::F32, world * rows, HIDDEN).unwrap();
    let numbers: Vec<f32> = (0..world * rows).flat_map(|row| [row as f32; HIDDEN]).collect();
    backend.upload(bytemuck::cast_slice(&numbers), x.view_mut()).unwrap();
    let mut chosen = backend.alloc(DType::I32, world * rows, top_k).unwrap();
    backend.upload(bytemuck::cast_slice(ids), chosen.view_mut()).unwrap();
    let mlp = || backend.pack_mlp(&zero_mlp(), DType::F32).unwrap();
    let slots: Vec<Option<Mlp>> =
        layer.slots_of_rank(shape.expert_rank()).iter().map(|&expert| (expert != EMPTY).then(mlp)).collect();
    let [mut grouped, mut computed, mut returned] =
        [(); 3].map(|()| backend.alloc(DType::F32, shape.capacity(), HIDDEN).unwrap());
    let mut offsets = backend.alloc(DType::I32, slots_per_rank + 1, 1).unwrap();
    let own = counts[rank] as usize * top_k * shape.expert_tp;
    let mut index = backend.alloc(DType::I32, own.max(1), 1).unwrap();
    let (starts, by_expert) = layer.by_expert();
    let args = WorldArgs {
        shape,
        counts,
        x: x.view(),
        ids: chosen.view(),
        replicas: Replicas { starts, slots: by_expert },
        slots: &slots,
        activation: Activation::SiluMul,
        grouped: grouped.view_mut(),
        computed: computed.view_mut(),
        returned: returned.view_mut(),
        offsets: offsets.view_mut(),
        index: index.head_mut(own),
    };
    backend.world_experts(args).unwrap();
    let offsets: Vec<usize> = bits(offsets.view()).into_iter().map(|n| n as usize).collect();
    let rows_of = |slot: usize| offsets[slot]..offsets[slot + 1];
    let sources = (0..slots_per_rank).flat_map(|slot| rows_of(slot).map(move |row| (slot, row)));
    let sources = sources.map(|(slot, row)| {
        let number = f32::from_bits(bits(grouped.view().rows_range(row..row + 1))[0]) as usize;
        (number / rows, slot, number % rows)
    });
    let sources = sources.collect();
    let index = bits(index.head(own));
    let firsts = index.iter().step_by(shape.expert_tp);
    let destinations = firsts.map(|&row| shape.computed_by(row as usize) as u32).collect();
    Grouped { offsets, destinations, sources }
}

fn zero_mlp() -> HostMlp<'static> {
    let zeros = |n: usize, k: usize| HostMatrix { n, k, data: HostData::F32(vec![0.0; n * k]) };
    HostMlp { gate: zeros(1, HIDDEN), up: zeros(1, HIDDEN), down: zeros(HIDDEN, 1), bias: None }
}

/// A rank that leaves in the middle of a layer releases the others.
#[test]
fn a_rank_that_leaves_ends_the_step() {
    let case = Case::new(&mut Numbers(8), 4, 1, 2, 0);
    let [local, _] = worlds(4);
    on_threads(local, |(_, end)| {
        let mut rank = case.rank(end, Arc::new(LoadCounters::new(&case.placement)));
        rank.start(1, true);
        let me = rank.rank.world.rank();
        if me != 2 {
            let left = rank.forward(0, &case.placement);
            assert!(matches!(left, Err(Error::Peer { .. })), "rank {me}: {left:?}");
        }
    });
}
