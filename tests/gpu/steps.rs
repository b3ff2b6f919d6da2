//! Steps that are put off and replayed as graphs: the same bits as operations given one by one.

use libtest_mimic::Trial;
use moeyard::backend::{
    AddNormArgs, AttentionBatch, DType, GqaArgs, HostMlp, KvCache, KvShape, Matrix, Mlp, NormArgs,
    PlannedArgs, RopeArgs, SeqSpan, Tensor,
};
use moeyard::spec::{Activation, NormKind};

use crate::moe_rank::ROUTER;
use crate::pair::{Device, gpu, host_matrix, poisoned, tensor, values};
use crate::products::host_mlp;
use crate::support::numbers::Numbers;
use crate::trial;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("steps::replayed_steps_have_the_same_bits", replayed_steps_have_the_same_bits),
        trial("steps::a_result_may_be_asked_for_within", a_result_may_be_asked_for_within),
        trial("steps::a_step_that_fails_is_forgotten", a_step_that_fails_is_forgotten),
        trial("steps::ranks_capture_beside_each_other", ranks_capture_beside_each_other),
    ]
}

const HIDDEN: usize = 64;
const VOCAB: usize = 50;
const EXPERTS: usize = 5;
const TOP_K: usize = 2;
/// As many as make more than one graph.
const LAYERS: usize = 12;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const DIM: usize = 16;
const BLOCK: usize = 16;
const MAX_ROWS: usize = 8;

/// A small model, as a rank runs it.
struct Toy {
    table: Tensor,
    angles: Tensor,
    norm: Tensor,
    layers: Vec<Layer>,
    /// The slot of each expert, in every layer.
    slot_of: Vec<u32>,
}

struct Layer {
    qkv: Matrix,
    out: Matrix,
    router: Matrix,
    slots: Vec<Option<Mlp>>,
    cache: KvCache,
}

/// Working space: at the same addresses in every step.
struct Space {
    residual: Tensor,
    normed: Tensor,
    rounded: Tensor,
    qkv: Tensor,
    attended: Tensor,
    partial: Tensor,
    logits: Tensor,
    ids: Tensor,
    weights: Tensor,
    grouped: Tensor,
    computed: Tensor,
    last: Tensor,
}

impl Space {
    fn new(device: Device<'_>) -> Space {
        let exact = |cols| poisoned(device, DType::F32, MAX_ROWS, cols);
        let rounded = |rows, cols| poisoned(device, DType::Bf16, rows, cols);
        Space {
            residual: exact(HIDDEN),
            normed: exact(HIDDEN),
            rounded: rounded(MAX_ROWS, HIDDEN),
            qkv: exact((HEADS + 2 * KV_HEADS) * DIM),
            attended: rounded(MAX_ROWS, HEADS * DIM),
            partial: exact(HIDDEN),
            logits: exact(EXPERTS),
            ids: poisoned(device, DType::I32, MAX_ROWS, TOP_K),
            weights: exact(TOP_K),
            grouped: rounded(MAX_ROWS * TOP_K, HIDDEN),
            computed: rounded(MAX_ROWS * TOP_K, HIDDEN),
            last: exact(HIDDEN),
        }
    }
}

impl Toy {
    fn new(device: Device<'_>) -> Toy {
        let mut numbers = Numbers::new(51);
        let experts: Vec<HostMlp> =
            (0..EXPERTS).map(|_| host_mlp(&mut numbers, HIDDEN, 32, false, DType::Bf16)).collect();
        let table = numbers.vec(VOCAB * HIDDEN);
        let angles = numbers.vec(100 * DIM);
        let mut matrix = |n: usize, k: usize, dtype| {
            device.pack_matrix(&host_matrix(&mut numbers, n, k, dtype), dtype).unwrap()
        };
        let shape = KvShape::Gqa { kv_heads: KV_HEADS, head_dim: DIM };
        let layers = (0..LAYERS).map(|_| Layer {
            qkv: matrix((HEADS + 2 * KV_HEADS) * DIM, HIDDEN, DType::Bf16),
            out: matrix(HIDDEN, HEADS * DIM, DType::Bf16),
            router: matrix(EXPERTS, HIDDEN, DType::F32),
            slots: experts
                .iter()
                .map(|e| Some(device.pack_mlp(e, DType::Bf16).unwrap()))
                .chain([None])
                .collect(),
            cache: device.alloc_kv(shape, DType::Bf16, BLOCK, 6 * MAX_ROWS).unwrap(),
        });
        Toy {
            layers: layers.collect(),
            table: tensor(device, DType::Bf16, VOCAB, HIDDEN, &table),
            angles: tensor(device, DType::F32, 100, DIM, &angles),
            norm: tensor(device, DType::F32, 1, HIDDEN, &[1.0; HIDDEN]),
            slot_of: (0..EXPERTS as u32).collect(),
        }
    }

    /// An expert moves to the empty slot.
    fn migrate(&mut self, expert: usize) {
        let used: Vec<u32> = self.slot_of.clone();
        let empty = (0..=EXPERTS as u32).find(|slot| !used.contains(slot)).unwrap();
        let from = std::mem::replace(&mut self.slot_of[expert], empty);
        for layer in &mut self.layers {
            layer.slots.swap(from as usize, empty as usize);
        }
    }

    /// One decode step of sequences `0..tokens.len()`, all at `position`.
    fn run(&mut self, device: Device<'_>, space: &mut Space, tokens: &[u32], position: u32) {
        let rows = tokens.len();
        let spans: Vec<SeqSpan> = (0..rows as u32)
            .map(|row| SeqSpan { row, rows: 1, position, prompt_len: 0, first_block: row * 6 })
            .collect();
        let block_table: Vec<u32> = (0..(6 * rows) as u32).collect();
        let batch = AttentionBatch { spans: &spans, block_table: &block_table };
        let norm =
            NormArgs { kind: NormKind::Rms, eps: 1e-5, weight: self.norm.view(), bias: None, width: HIDDEN };
        let positions = vec![position; rows];
        device.embed(self.table.view(), tokens, 1.0, space.residual.head_mut(rows)).unwrap();
        for Layer { qkv, out, router: gate, slots, cache } in &mut self.layers {
            device.norm(space.residual.head(rows), norm, space.rounded.head_mut(rows)).unwrap();
            device.linear(space.rounded.head(rows), qkv, None, space.qkv.head_mut(rows)).unwrap();
            let rope = RopeArgs {
                table: self.angles.view(),
                rows: &positions,
                heads: HEADS + KV_HEADS,
                head_stride: DIM,
                offset: 0,
                dim: DIM,
                interleaved: false,
            };
            device.rope_kv_write(space.qkv.head_mut(rows), rope, batch, cache).unwrap();
            let all = space.qkv.head(rows);
            let args = GqaArgs {
                q: all.cols_range(0..HEADS * DIM),
                cache,
                batch,
                heads: HEADS,
                scale: 0.25,
                window: None,
                sinks: None,
            };
            device.attention_gqa(args, space.attended.head_mut(rows)).unwrap();
            device.linear(space.attended.head(rows), out, None, space.partial.head_mut(rows)).unwrap();
            let args = AddNormArgs {
                addend: Some((space.partial.head(rows), 1.0)),
                norm,
                exact: Some(space.normed.head_mut(rows)),
                rounded: space.rounded.head_mut(rows),
            };
            device.add_norm(space.residual.head_mut(rows), args).unwrap();
            device.linear(space.normed.head(rows), gate, None, space.logits.head_mut(rows)).unwrap();
            let (ids, weights) = (space.ids.head_mut(rows), space.weights.head_mut(rows));
            device.route(space.logits.head(rows), None, &ROUTER, ids, weights).unwrap();
            let args = PlannedArgs {
                x: space.rounded.head(rows),
                ids: space.ids.head(rows),
                weights: space.weights.head(rows),
                slot_of: &self.slot_of,
                slots,
                activation: Activation::SiluMul,
                grouped: space.grouped.head_mut(rows * TOP_K),
                computed: space.computed.head_mut(rows * TOP_K),
            };
            let planner = device.device_plan().unwrap();
            planner.planned_experts(args, space.partial.head_mut(rows)).unwrap();
            device.add_scaled(space.partial.head(rows), 1.0, space.residual.head_mut(rows)).unwrap();
        }
        let reversed: Vec<u32> = (0..rows as u32).rev().collect();
        device.gather_rows(space.residual.head(rows), &reversed, space.last.head_mut(rows)).unwrap();
    }
}

fn bits(values: Vec<f32>) -> Vec<u32> {
    values.into_iter().map(f32::to_bits).collect()
}

/// Sequences join and leave, the context crosses blocks, an expert moves: the tokens of each step and its position.
fn schedule() -> Vec<(Vec<u32>, bool)> {
    let mut numbers = Numbers::new(52);
    (0..60)
        .map(|step| {
            let rows = match step {
                0..20 => 3,
                20..30 => 8,
                30..34 => 1,
                _ => 3,
            };
            let tokens = (0..rows).map(|_| numbers.below(VOCAB) as u32).collect();
            (tokens, step % 13 == 12)
        })
        .collect()
}

/// What each step leaves; put off or not.
fn results(device: Device<'_>, put_off: bool) -> Vec<Vec<u32>> {
    let (mut toy, mut space) = (Toy::new(device), Space::new(device));
    let steps = schedule().into_iter().enumerate().map(|(position, (tokens, migrates))| {
        if migrates {
            toy.migrate(position % EXPERTS);
        }
        let mut body = || {
            toy.run(device, &mut space, &tokens, position as u32);
            Ok(())
        };
        if put_off {
            device.step(&mut body).unwrap()
        } else {
            body().unwrap()
        }
        bits(values(device, space.last.head(tokens.len())))
    });
    steps.collect()
}

fn replayed_steps_have_the_same_bits() {
    let expected = results(gpu().as_ref(), false);
    let replaying = gpu();
    let found = results(replaying.as_ref(), true);
    for (step, (found, expected)) in found.iter().zip(&expected).enumerate() {
        assert!(found == expected, "step {step}: {:?}", replaying.step_counts());
    }
    // The two pieces of batches of 3, 8 and 1 rows each run once and are captured once; the rest are replays, moved experts and longer
    // contexts included. What a step writes for the first time may grow a buffer, whose sequence then is another.
    let counts = replaying.step_counts();
    assert!((6..=14).contains(&counts.captured), "{counts:?}");
    assert!(counts.replayed >= 80, "{counts:?}");
}

fn a_result_may_be_asked_for_within() {
    let owner = gpu();
    let device = owner.as_ref();
    let (mut toy, mut space) = (Toy::new(device), Space::new(device));
    for position in 0..4 {
        let (mut within, mut after) = (Vec::new(), Vec::new());
        device
            .step(&mut || {
                toy.run(device, &mut space, &[1, 2], position);
                within = bits(values(device, space.last.head(2)));
                device.scale(2.0, space.last.head_mut(2)).unwrap();
                device.scale(0.5, space.last.head_mut(2)).unwrap();
                Ok(())
            })
            .unwrap();
        after.extend(bits(values(device, space.last.head(2))));
        assert_eq!(within, after, "position {position}");
        assert!(within.iter().all(|&x| f32::from_bits(x).is_finite()), "position {position}");
    }
}

fn a_step_that_fails_is_forgotten() {
    let owner = gpu();
    let device = owner.as_ref();
    let mut x = tensor(device, DType::F32, 1, 8, &[1.0; 8]);
    let failed = device.step(&mut || {
        for _ in 0..40 {
            device.scale(2.0, x.view_mut()).unwrap();
        }
        Err(moeyard::Error::config("test", "on purpose"))
    });
    assert!(failed.is_err());
    // Some went to the stream at once, the others never.
    let after = values(device, x.view())[0].log2();
    assert!((0.0..40.0).contains(&after), "{after} of 40 doublings");
    device
        .step(&mut || {
            (0..40).for_each(|_| device.scale(0.5, x.view_mut()).unwrap());
            Ok(())
        })
        .unwrap();
    assert_eq!(values(device, x.view())[0].log2(), after - 40.0);
}

/// While one thread captures, others allocate, free and wait for the whole GPU.
fn ranks_capture_beside_each_other() {
    let expected = results(gpu().as_ref(), false);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let owner = gpu();
                let device = owner.as_ref();
                assert!(results(device, true) == expected);
                assert!(device.step_counts().captured >= 3, "{:?}", device.step_counts());
            });
        }
    });
}
