//! Rows grouped by the device and rows grouped by the host: the same logits, choices and counts. The reference backend does the
//! former on one rank; a replica of any expert makes its layer do the latter.

mod support;

use std::sync::Arc;

use moeyard::backend::DType;
use moeyard::backend::reference::ReferenceBackend;
use moeyard::metrics::LoadSource;
use moeyard::moe::load::WorldLoad;
use router_sim::placement::Placement;
use support::placements::{Numbers, scattered};
use support::{Setup, World, model_dir};

/// Everything that one prompt and some tokens after it leave behind.
struct Seen {
    logits: Vec<Vec<u32>>,
    ids: Vec<u32>,
    weights: Vec<u32>,
    by_expert: Vec<u64>,
    by_rank: Vec<u64>,
    /// `[layer][expert]`, over all its slots.
    computed: Vec<u64>,
    sent: Vec<u64>,
}

fn run(model: &str, placement: Placement) -> Seen {
    let backend = || Arc::new(ReferenceBackend) as Arc<_>;
    let setup = Setup { placement: Some(placement), backend: Arc::new(backend), ..Setup::solo(DType::Bf16) };
    let mut world = World::load(&model_dir(model), &setup);
    let prompt: Vec<u32> = (0..17).map(|i| 20 + i * 11).collect();
    let mut sequence = world.sequence(&prompt);
    let bits = |xs: &[f32]| xs.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    let (mut logits, mut ids, mut weights) = (Vec::new(), Vec::new(), Vec::new());
    for token in [4, 5, 6] {
        let rows = sequence.tokens.len() - sequence.cached;
        let step = world.step(0, &mut [(&mut sequence, rows)]);
        logits.extend(step.logits.iter().map(|row| bits(row)));
        ids.extend(step.routing.ids);
        weights.extend(bits(&step.routing.weights));
        sequence.tokens.push(token);
    }
    let placement = world.placement();
    let mut computed = vec![0; placement.layers() * placement.experts()];
    for layer in 0..placement.layers() {
        for (slot, rows) in world.counters[0].slot_rows(layer).into_iter().enumerate() {
            match placement.layer(layer).expert_of(slot) {
                Some(expert) => computed[layer * placement.experts() + expert] += rows,
                None => assert_eq!(rows, 0, "slot {slot} is empty"),
            }
        }
    }
    let load = world.load_snapshot();
    let source = WorldLoad { in_force: world.in_force(), counters: world.counters.clone() };
    Seen {
        logits,
        ids,
        weights,
        by_expert: load.by_expert,
        by_rank: source.by_rank(),
        computed,
        sent: load.sent,
    }
}

#[test]
fn the_device_and_the_host_group_alike() {
    let mut numbers = Numbers(5);
    for model in ["demo-mixtral", "demo-deepseek"] {
        let spec = World::load(&model_dir(model), &Setup::solo(DType::F32)).family.spec;
        let (experts, layers) = (spec.moe.experts, spec.moe_layers());
        let by_device = run(model, scattered(&mut numbers, 1, experts, 0, &layers));
        let by_host = run(model, scattered(&mut numbers, 1, experts, 5, &layers));
        assert_eq!(by_device.logits, by_host.logits, "{model}");
        assert_eq!(by_device.ids, by_host.ids, "{model}");
        assert_eq!(by_device.weights, by_host.weights, "{model}");
        assert_eq!(by_device.by_expert, by_host.by_expert, "{model}");
        assert_eq!(by_device.by_rank, by_host.by_rank, "{model}");
        assert_eq!(by_device.computed, by_host.computed, "{model}");
        assert_eq!(by_device.sent, by_host.sent, "{model}");
        let choices: u64 = by_device.by_expert.iter().sum();
        assert_eq!(choices, (19 * spec.moe.top_k * layers.len()) as u64, "{model}");
    }
}
