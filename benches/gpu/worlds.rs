//! Decode steps of MoE layers whose experts are on several ranks, all of them on this GPU: with hosts that agree in every layer on who
//! computes what, and with devices that work it out. The ranks share the GPU's time, so what shows is what a host costs.

use std::sync::Arc;
use std::time::Instant;

use moeyard::backend::cuda::CudaBackend;
use moeyard::backend::{Backend, DType, HostData, HostMatrix, Precision};
use moeyard::comm::{Communicator, Transport, connect};
use moeyard::moe::layer::MoeLayer;
use moeyard::moe::load::LoadCounters;
use moeyard::moe::migrate::ExpertShape;
use router_sim::load::LoadWindow;
use router_sim::placement::{ClusterShape, Linear, Placement, PlacementPolicy};
use router_sim::split::Split;

use crate::moe_rank::{MoeModel, MoeRank, MoeWeights, rank};
use crate::threads::on_threads;

const LAYERS: usize = 6;
const EXPERTS: usize = 16;
const SHAPE: ExpertShape = ExpertShape { hidden: 4096, intermediate: 1024, bias: false, dtype: DType::Bf16 };
const STEPS: usize = 40;

/// Prints a table.
pub fn run() {
    println!("{:<56} {:>10} {:>10}", "a layer of a decode step", "hosts us", "devices us");
    for ranks in [2, 4, 8] {
        for rows in [1, 8] {
            let [hosts, devices] = [false, true].map(|planned| measure(ranks, rows, planned) * 1e6);
            println!(
                "{:<56} {hosts:>10.1} {devices:>10.1}",
                format!("{ranks} ranks of {rows} rows, {EXPERTS} experts")
            );
        }
    }
}

/// Seconds that rank 0 takes per layer.
fn measure(ranks: usize, rows: usize, planned: bool) -> f64 {
    let window = LoadWindow::new(&(0..LAYERS).collect::<Vec<_>>(), EXPERTS);
    let placement = Linear.place(&window, &ClusterShape { ranks, redundant: 0 }).unwrap();
    let backends: Vec<_> = (0..ranks).map(|_| CudaBackend::open(0).unwrap().into_dyn()).collect();
    let ends = connect(&Transport::Local, &backends).unwrap();
    let times = on_threads(ends.into_iter().zip(backends), |(end, backend)| {
        of_rank(end, backend, &placement, rows, planned)
    });
    times[0]
}

/// A layer whose router chooses anything, with experts of zeros: their time is that of any others.
fn layer(backend: &dyn Backend, index: usize, slots: usize) -> MoeLayer {
    let numbers = (0..EXPERTS * SHAPE.hidden).map(|i| ((i * 7919 + index * 31) % 1009) as f32 / 504.5 - 1.0);
    let expert = || SHAPE.alloc(backend).unwrap();
    let weights = MoeWeights {
        router: &HostMatrix { n: EXPERTS, k: SHAPE.hidden, data: HostData::F32(numbers.collect()) },
        slots: (0..slots).map(|_| Some(expert())).collect(),
        shared: expert(),
        gate: None,
    };
    weights.layer(backend, index)
}

fn of_rank(
    end: Box<dyn Communicator>,
    backend: Arc<dyn Backend>,
    placement: &Placement,
    n: usize,
    planned: bool,
) -> f64 {
    let model = MoeModel {
        layers: LAYERS,
        hidden: SHAPE.hidden,
        experts: EXPERTS,
        top_k: 4,
        intermediate: SHAPE.intermediate,
        max_rows: n,
    };
    let device = backend.as_ref();
    let layers = (0..LAYERS).map(|index| layer(device, index, placement.slots_per_rank())).collect();
    let (me, load) = (end.rank(), Arc::new(LoadCounters::new(placement)));
    let rank = rank(Arc::clone(&backend), end, 1, Precision::BF16, Arc::clone(&load.meter));
    let mut rank = MoeRank::new(&model, Split::Even, rank, layers, load);
    let elements = rank.exact.rows() * SHAPE.hidden;
    rank.set_rows(
        &(0..elements).map(|i| ((i * 31 + me * 977) % 613) as f32 / 306.5 - 1.0).collect::<Vec<_>>(),
    );
    let mut best = f64::INFINITY;
    for _ in 0..STEPS {
        rank.rank.world.barrier().unwrap();
        let start = Instant::now();
        rank.start(n, planned);
        let mut body = || (0..LAYERS).try_for_each(|index| rank.forward(index, placement));
        if planned {
            device.step(&mut body).unwrap();
            // What a host waits for after a step: its choices, where it has not seen them, and some result.
            rank.scratch.fetch(device).unwrap();
        } else {
            body().unwrap();
        }
        let first = rank.out.view().rows_range(0..1).cols_range(0..1);
        device.download(first, &mut [0; 4]).unwrap();
        best = best.min(start.elapsed().as_secs_f64() / LAYERS as f64);
    }
    best
}
