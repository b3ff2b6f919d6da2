//! The figures that placement and split are held to, on real records. `benches/placement.rs` prints them all, with times.

mod records;

use records::mean;
use router_sim::placement::{ClusterShape, Eplb, Moeyard, Placement, PlacementPolicy, duplicates, transfers};
use router_sim::split::{Shares, Split, even_balancedness};

fn plan(load: &router_sim::load::LoadWindow, ranks: usize, slots: usize) -> Placement {
    let cluster = ClusterShape { ranks, redundant: slots - load.experts() };
    Moeyard::default().place(load, &cluster).unwrap()
}

#[test]
fn balance_of_the_planned_load() {
    let Some(folder) = records::folder() else { return };
    let load = records::deepseek(&folder);
    for (ranks, slots, least) in [(32, 288, 0.9998), (64, 320, 0.9994), (8, 264, 0.9998), (144, 288, 0.9179)]
    {
        let placement = plan(&load, ranks, slots);
        let reached = mean(&even_balancedness(&load, &placement));
        assert!(reached >= least, "{ranks} ranks, {slots} slots: {reached} is below {least}");
        assert_eq!(duplicates(&placement), 0);
        let cluster = ClusterShape { ranks, redundant: slots - 256 };
        let published = even_balancedness(&load, &Eplb::GLOBAL.place(&load, &cluster).unwrap());
        assert!(reached >= mean(&published));
    }
    // As measured with the published code.
    let cluster = ClusterShape { ranks: 32, redundant: 32 };
    let published = mean(&even_balancedness(&load, &Eplb::GLOBAL.place(&load, &cluster).unwrap()));
    assert!((published - 0.9925).abs() < 5e-5, "{published}");
}

#[test]
fn a_drifted_load_repaired_with_16_transfers() {
    let Some(folder) = records::folder() else { return };
    let load = records::deepseek(&folder);
    let stale = plan(&load, 32, 288);
    let drifted = records::drifted(&load, 0);
    let policy = Moeyard { max_transfers: Some(16), ..Moeyard::default() };
    let cluster = ClusterShape { ranks: 32, redundant: 32 };
    let repaired = policy.replan(std::slice::from_ref(&drifted), Some(&stale), &cluster).unwrap();
    let moved = transfers(&stale, &repaired);
    let most = (0..58).map(|layer| moved.iter().filter(|t| t.layer == layer).count()).max().unwrap();
    assert!(most <= 16, "{most} transfers in one layer");
    let reached = mean(&even_balancedness(&drifted, &repaired));
    assert!(reached >= 0.955, "{reached}, stale {}", mean(&even_balancedness(&drifted, &stale)));
}

#[test]
fn a_drifted_load_split_exactly() {
    let Some(folder) = records::folder() else { return };
    let load = records::deepseek(&folder);
    let stale = plan(&load, 32, 320);
    let batches =
        |seed| records::reached_by_batches(&records::drifted(&load, seed), &stale, Split::Exact, seed);
    let reached = mean(&[0, 1, 2].map(batches));
    assert!(reached >= 0.99, "{reached}");
}

#[test]
fn another_dataset_split_exactly() {
    let Some(folder) = records::folder() else { return };
    let placement = plan(&records::gpt_oss_load(&folder, "mmlu*"), 8, 40);
    let mut shares = Shares::default();
    let mut figures = Vec::new();
    for batch in records::gpt_oss_batches(&folder, "sorry_bench*", 64) {
        for (layer, tokens) in batch.chunks(32).enumerate() {
            figures.push(records::reached(&mut shares, Split::Exact, &placement, layer, tokens));
        }
    }
    assert!(figures.len() > 9_000 && mean(&figures) >= 0.82, "{} of {}", mean(&figures), figures.len());
}
