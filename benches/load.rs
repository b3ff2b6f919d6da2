//! What it costs to know the load: reading all counters, as the rebalancer does where a part of its window ends, and
//! looking at them.

mod timing;

use std::sync::Arc;

use moeyard::metrics::LoadSource;
use moeyard::moe::in_force::InForce;
use moeyard::moe::load::{LoadCounters, WorldLoad};
use router_sim::load::{LoadWindow, Phase};
use router_sim::placement::{ClusterShape, Linear, PlacementPolicy, PolicyName};
use router_sim::rebalance::{Inputs, Mode, Rebalancer, Rebalancing};
use router_sim::split::Split;
use timing::micros;

fn main() {
    println!("layers x experts on ranks: read all counters; decide one look (best, median)");
    for (layers, experts, ranks, redundant) in [(6, 8, 4, 4), (4, 32, 4, 8), (58, 256, 32, 32)] {
        let ids: Vec<usize> = (0..layers).collect();
        let cluster = ClusterShape { ranks, redundant };
        let mut load = LoadWindow::new(&ids, experts);
        for layer in 0..layers {
            for (expert, n) in load.counts_mut(Phase::Decode, layer).iter_mut().enumerate() {
                *n = 100_000 / (1 + (expert * 7 + layer) as u64 % experts as u64);
            }
        }
        let placement = Arc::new(Linear.place(&load, &cluster).expect("the slots hold all experts"));
        let world = WorldLoad {
            in_force: Arc::new(InForce::new(Arc::clone(&placement))),
            counters: (0..ranks).map(|_| Arc::new(LoadCounters::new(&placement))).collect(),
        };
        let read = micros(|| drop(std::hint::black_box(world.snapshot())));
        let settings = Rebalancing::of_mode(Mode::Auto, 256, PolicyName::BEST).expect("auto has settings");
        let inputs =
            Inputs { row_us: [1.0, 5.0], expert_bytes: 44e6, migration_bytes_per_us: 5e3, switch_us: 50.0 };
        let none = LoadWindow::new(&ids, experts);
        let decide = micros(|| {
            let mut rebalancer =
                Rebalancer::new(settings, PolicyName::BEST, cluster, Split::Exact, none.clone());
            for _ in 0..64 {
                std::hint::black_box(rebalancer.after_step());
            }
            let verdict = rebalancer.look(64, &load, inputs, &placement).decide().expect("a verdict");
            assert!(verdict.target.is_some(), "{}", verdict.reason);
        });
        println!("{layers} x {experts} on {ranks}: {read:.1?} us; {decide:.1?} us");
    }
}
