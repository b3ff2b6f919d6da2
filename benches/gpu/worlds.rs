//! Decode steps of MoE layers whose experts are on several ranks, all of them on this GPU: with hosts that agree in every layer on who
//! computes what, and with devices that work it out. The ranks share the GPU's time, so what shows is what a host costs.

use std::sync::Arc;
use std::time::Instant;

use moeyard::backend::cuda::CudaBackend;
use moeyard::backend::{Backend, DType, HostData, HostMatrix, PaddedShape, Precision};
use moeyard::comm::solo::Solo;
use moeyard::comm::{Communicator, Transport, connect};
use moeyard::layers::Rank;
use moeyard::layers::linear::Linear;
use moeyard::layers::mlp::GatedMlp;
use moeyard::metrics::WorkClock;
use moeyard::moe::layer::{MoeLayer, MoeRows, MoeScratch, Shared};
use moeyard::moe::load::{LoadCounters, Phase};
use moeyard::moe::migrate::ExpertShape;
use moeyard::moe::router::Router;
use moeyard::spec::{self, Activation, Moe, Renormalize, Score};
use router_sim::load::LoadWindow;
use router_sim::placement::{ClusterShape, Linear as LinearPlacement, Placement, PlacementPolicy};
use router_sim::split::Split;

const LAYERS: usize = 6;
const EXPERTS: usize = 16;
const TOP_K: usize = 4;
const SHAPE: ExpertShape = ExpertShape { hidden: 4096, intermediate: 1024, bias: false, dtype: DType::Bf16 };

/// Prints a table.
pub fn run() {
    println!("{:<56} {:>10} {:>10}", "a layer of a decode step", "hosts us", "devices us");
    for ranks in [2, 4, 8] {
        for rows in [1, 8] {
            let [hosts, devices] = [false, true].map(|decodes| measure(ranks, rows, decodes) * 1e6);
            println!(
                "{:<56} {hosts:>10.1} {devices:>10.1}",
                format!("{ranks} ranks of {rows} rows, {EXPERTS} experts")
            );
        }
    }
}

/// Seconds that rank 0 takes per layer.
fn measure(ranks: usize, rows: usize, decodes: bool) -> f64 {
    let window = LoadWindow::new(&(0..LAYERS).collect::<Vec<_>>(), EXPERTS);
    let placement = LinearPlacement.place(&window, &ClusterShape { ranks, redundant: 0 }).unwrap();
    let backends: Vec<_> = (0..ranks).map(|_| CudaBackend::open(0).unwrap().into_dyn()).collect();
    let ends = connect(&Transport::Local, &backends).unwrap();
    std::thread::scope(|scope| {
        let placement = &placement;
        let threads: Vec<_> = ends
            .into_iter()
            .zip(backends)
            .map(|(end, backend)| scope.spawn(move || of_rank(end, backend, placement, rows, decodes)))
            .collect();
        let times: Vec<f64> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        times[0]
    })
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

/// A layer whose router chooses anything, with experts of zeros: their time is that of any others.
fn layer(backend: &dyn Backend, index: usize, slots: usize) -> MoeLayer {
    let numbers = (0..EXPERTS * SHAPE.hidden).map(|i| ((i * 7919 + index * 31) % 1009) as f32 / 504.5 - 1.0);
    let host = HostMatrix { n: EXPERTS, k: SHAPE.hidden, data: HostData::F32(numbers.collect()) };
    let weight = backend.pack_matrix(&host, DType::F32).unwrap();
    MoeLayer {
        index,
        router: Router { linear: Linear { weight, bias: None }, choice_bias: None, spec: router_spec() },
        slots: (0..slots).map(|_| Some(SHAPE.alloc(backend).unwrap())).collect(),
        activation: Activation::SiluMul,
        shared: Some(Shared {
            mlp: GatedMlp { weights: SHAPE.alloc(backend).unwrap(), activation: Activation::SiluMul },
            gate: None,
        }),
    }
}

fn of_rank(
    end: Box<dyn Communicator>,
    backend: Arc<dyn Backend>,
    placement: &Placement,
    n: usize,
    decodes: bool,
) -> f64 {
    const STEPS: usize = 40;
    let (me, load) = (end.rank(), LoadCounters::new(placement));
    let mut rank = Rank {
        tp: Box::new(Solo::new(Arc::clone(&backend))),
        backend: Arc::clone(&backend),
        world: end,
        expert_tp: 1,
        precision: Precision::BF16,
        clock: WorkClock::new(Arc::clone(&load.meter)),
    };
    let device = backend.as_ref();
    let moe = Moe {
        experts: EXPERTS,
        top_k: TOP_K,
        intermediate: SHAPE.intermediate,
        activation: Activation::SiluMul,
        expert_bias: false,
        router: router_spec(),
        shared: None,
    };
    let mut scratch =
        MoeScratch::new(device, DType::Bf16, LAYERS, n, SHAPE.hidden, &moe, Split::Even).unwrap();
    let layers: Vec<MoeLayer> =
        (0..LAYERS).map(|index| layer(device, index, placement.slots_per_rank())).collect();
    let room = n + PaddedShape::PADDING;
    let mut exact = device.alloc(DType::F32, room, SHAPE.hidden).unwrap();
    let mut rounded = device.alloc(DType::Bf16, room, SHAPE.hidden).unwrap();
    let mut out = device.alloc(DType::F32, n, SHAPE.hidden).unwrap();
    let x: Vec<f32> =
        (0..room * SHAPE.hidden).map(|i| ((i * 31 + me * 977) % 613) as f32 / 306.5 - 1.0).collect();
    device.upload(bytemuck::cast_slice(&x), exact.view_mut()).unwrap();
    device.copy_rows(exact.view(), rounded.view_mut()).unwrap();
    let phases = vec![Phase::Decode; n];
    let mut best = f64::INFINITY;
    for _ in 0..STEPS {
        rank.world.barrier().unwrap();
        let start = Instant::now();
        scratch.start(&mut rank, n, decodes).unwrap();
        let mut body = || {
            layers.iter().try_for_each(|layer| {
                let padded = rounded.head(scratch.padded_rows().unwrap_or(n));
                let rows =
                    MoeRows { exact: exact.head(n), rounded: rounded.head(n), padded, phases: &phases };
                layer.forward(&mut rank, rows, placement, &load, &mut scratch, out.head_mut(n))
            })
        };
        if decodes {
            device.step(&mut body).unwrap()
        } else {
            body().unwrap()
        }
        // What a host waits for after a step: its choices, where it has not seen them, and some result.
        if decodes {
            scratch.fetch(device).unwrap();
        }
        device.download(out.view().rows_range(0..1).cols_range(0..1), &mut [0; 4]).unwrap();
        best = best.min(start.elapsed().as_secs_f64() / LAYERS as f64);
    }
    best
}
