//! Rows grouped by devices and rows grouped by hosts: the same logits, choices and counts. The reference backend does the former: on one
//! rank where no expert has a replica, on several where all of them decode and replicas share rows evenly.

mod support;

use std::sync::Arc;

use moeyard::backend::reference::ReferenceBackend;
use moeyard::backend::{AttentionBatch, DType, PaddedShape, SeqSpan};
use moeyard::metrics::{CommOp, LoadSource};
use moeyard::model::world::{Degrees, LoadedRank};
use moeyard::model::{Batch, Model};
use moeyard::moe::load::WorldLoad;
use router_sim::placement::Placement;
use router_sim::split::Split;
use support::numbers::Numbers;
use support::placements::scattered;
use support::{BLOCK, Setup, World, model_dir};

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

/// Tokens of a prompt, and those that follow it one by one.
const PROMPT: usize = 6;
const TOKENS: usize = 4;

/// What each sequence leaves behind: bits of its last logits, and its choices, step by step. Sequence i runs on data-parallel rank
/// `group_of[i]`.
struct Served {
    logits: Vec<Vec<Vec<u32>>>,
    choices: Vec<Vec<Vec<Choice>>>,
    by_expert: Vec<u64>,
    by_rank: Vec<u64>,
    slot_rows: Vec<Vec<u64>>,
    sent: Vec<u64>,
    /// Bytes that each rank returned in each step.
    returned: Vec<Vec<u64>>,
}

/// Layer, row of the step, and the experts it chose.
type Choice = (usize, usize, Vec<u32>);

/// Serves all sequences at once, each token in a step of its own.
fn serve(model: &str, setup: &Setup, group_of: &[usize]) -> Served {
    let mut world = World::load(&model_dir(model), setup);
    let vocab = world.family.spec.vocab_size;
    let steps = world.on_ranks(|_, rank| {
        let own: Vec<usize> = (0..group_of.len()).filter(|&i| group_of[i] == rank.dp_rank).collect();
        let mut position = 0;
        let lengths = [PROMPT].into_iter().chain([1; TOKENS]);
        let steps: Vec<_> = lengths
            .map(|rows| {
                let step = step(rank, &own, position, rows, vocab);
                position += rows;
                step
            })
            .collect();
        (own, steps)
    });
    let mut served = Served {
        logits: vec![vec![Vec::new(); 1 + TOKENS]; group_of.len()],
        choices: vec![vec![Vec::new(); 1 + TOKENS]; group_of.len()],
        by_expert: Vec::new(),
        by_rank: Vec::new(),
        slot_rows: Vec::new(),
        sent: Vec::new(),
        returned: Vec::new(),
    };
    for (own, steps) in steps {
        served.returned.push(steps.iter().map(|step| step.returned).collect());
        for (at, step) in steps.into_iter().enumerate() {
            step.logits.into_iter().for_each(|(row, logits)| served.logits[own[row]][at] = logits);
            step.choices.into_iter().for_each(|(row, chosen)| served.choices[own[row]][at].push(chosen));
        }
    }
    // Several ranks may have rows of one sequence.
    served.choices.iter_mut().flatten().for_each(|choices| choices.sort());
    let load = world.load_snapshot();
    let source = WorldLoad { in_force: world.in_force(), counters: world.counters.clone() };
    (served.by_expert, served.by_rank, served.sent) = (load.by_expert, source.by_rank(), load.sent);
    let layers = 0..world.placement().layers();
    served.slot_rows =
        world.counters.iter().flat_map(|c| layers.clone().map(|layer| c.slot_rows(layer))).collect();
    served
}

struct Step {
    /// By sequence, counted from the first of the rank's own.
    logits: Vec<(usize, Vec<u32>)>,
    choices: Vec<(usize, Choice)>,
    returned: u64,
}

/// The next `rows` tokens of each of a rank's sequences.
fn step(rank: &mut LoadedRank, own: &[usize], position: usize, rows: usize, vocab: usize) -> Step {
    const BLOCKS: usize = (PROMPT + TOKENS).div_ceil(BLOCK);
    let token = |sequence: usize, at: usize| ((sequence * 131 + at * 37 + 11) % vocab) as u32;
    let tokens: Vec<u32> =
        own.iter().flat_map(|&i| (position..position + rows).map(move |at| token(i, at))).collect();
    let spans: Vec<SeqSpan> = (0..own.len())
        .map(|i| SeqSpan {
            row: (i * rows) as u32,
            rows: rows as u32,
            position: position as u32,
            prompt_len: PROMPT as u32,
            first_block: (i * BLOCKS) as u32,
        })
        .collect();
    let table: Vec<u32> =
        own.iter().flat_map(|&i| (i * BLOCKS..(i + 1) * BLOCKS).map(|b| b as u32)).collect();
    let wanted: Vec<u32> = (1..=own.len()).map(|i| (i * rows - 1) as u32).collect();
    let batch = Batch {
        tokens: &tokens,
        attention: AttentionBatch { spans: &spans, block_table: &table },
        logit_rows: &wanted,
        want_routing: true,
    };
    let before = rank.meter.sent_bytes(CommOp::Combine);
    rank.model.forward(&batch, &mut rank.output).unwrap();
    let returned = rank.meter.sent_bytes(CommOp::Combine) - before;
    let output = &rank.output;
    let logits = output.logit_rows.iter().enumerate().map(|(i, &row)| {
        let mut bits = vec![0u32; vocab];
        let view = output.logits.view().rows_range(i..i + 1);
        rank.backend.download(view, bytemuck::cast_slice_mut(&mut bits)).unwrap();
        (row as usize / rows, bits)
    });
    let routing = &output.routing;
    let chosen = routing.ids.chunks(routing.top_k).enumerate().map(|(at, ids)| {
        let (layer, row) = (at / routing.rows, routing.first_row + at % routing.rows);
        (row / rows, (layer, row % rows, ids.to_vec()))
    });
    Step { logits: logits.collect(), choices: chosen.collect(), returned }
}

/// A setup over the reference backend.
fn setup(degrees: Degrees, placement: Option<Placement>, split: Split) -> Setup {
    let backend = || Arc::new(ReferenceBackend) as Arc<_>;
    Setup { degrees, placement, split, backend: Arc::new(backend), ..Setup::solo(DType::Bf16) }
}

/// Worlds with idle ranks, ranks of one row and busy ones, replicas, and experts that two ranks share.
#[test]
fn the_devices_of_a_world_group_as_one_rank_does() {
    let mut numbers = Numbers(11);
    for model in ["mixtral", "deepseek_v3"] {
        let spec = World::load(&model_dir(model), &Setup::solo(DType::F32)).family.spec;
        let (experts, layers) = (spec.moe.experts, spec.moe_layers());
        let group_of = [0, 0, 0, 1, 3, 3];
        for (tensor_parallel, data_parallel, expert_tp, redundant) in
            [(1, 4, 1, 0), (1, 4, 1, 5), (1, 8, 1, 0), (2, 4, 1, 3), (1, 4, 2, 2)]
        {
            let degrees = Degrees { tensor_parallel, data_parallel, expert_tp };
            let what = format!("{model} {degrees:?}, {redundant} redundant");
            let ep = degrees.expert_parallel();
            let placement = scattered(&mut numbers, ep, experts, redundant, &layers);
            let served = |split| serve(model, &setup(degrees, Some(placement.clone()), split), &group_of);
            let found = served(Split::Even);

            // All ranks returned equally much in the steps after the prompt: padded rows, of the size of the busiest rank's.
            let busiest = 3usize.div_ceil(tensor_parallel);
            let shape = PaddedShape {
                world: degrees.world(),
                rank: 0,
                expert_tp,
                rows: PaddedShape::rows_for(busiest, degrees.world(), spec.moe.top_k).unwrap(),
                top_k: spec.moe.top_k,
                slots_per_rank: placement.slots_per_rank(),
            };
            let rows = layers.len() * (shape.world - 1) * shape.returned();
            let bytes = (rows * spec.hidden_size * DType::Bf16.bytes()) as u64;
            for rank in &found.returned {
                assert_eq!(rank[1..], [bytes; TOKENS], "{what}");
            }

            if expert_tp == 1 {
                let few = Degrees { tensor_parallel, data_parallel: 1, expert_tp };
                let few = serve(model, &setup(few, None, Split::Even), &[0; 6]);
                assert_eq!(found.logits, few.logits, "{what}");
                assert_eq!(found.choices, few.choices, "{what}");
                assert_eq!(found.by_expert, few.by_expert, "{what}");
            }
            // Without replicas another split makes no difference to who computes what; with them hosts agree on it.
            let hosts = served(Split::Exact);
            assert_eq!(found.logits, hosts.logits, "{what}");
            assert_eq!(found.choices, hosts.choices, "{what}");
            assert_eq!(found.by_expert, hosts.by_expert, "{what}");
            if redundant == 0 {
                assert_eq!(found.by_rank, hosts.by_rank, "{what}");
                assert_eq!(found.slot_rows, hosts.slot_rows, "{what}");
                assert_eq!(found.sent, hosts.sent, "{what}");
            }
        }
    }
}
