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
        trial("steps::steps_of_every_shape_have_the_same_bits", steps_of_every_shape_have_the_same_bits),
        trial("steps::weights_may_be_written_before_a_step", weights_may_be_written_before_a_step),
        trial("steps::a_result_may_be_asked_for_within", a_result_may_be_asked_for_within),
        trial("steps::a_step_that_fails_is_forgotten", a_step_that_fails_is_forgotten),
        trial("steps::ranks_capture_beside_each_other", ranks_capture_beside_each_other),
    ]
}

const HIDDEN: usize = 64;
const VOCAB: usize = 50;
const EXPERTS: usize = 5;
const TOP_K: usize = 2;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
/// Blocks of a sequence.
const BLOCKS: usize = 6;

#[derive(Clone, Copy)]
struct Shape {
    layers: usize,
    head_dim: usize,
    block_size: usize,
    max_rows: usize,
}

impl Shape {
    /// Layers that make more than one graph.
    const DEEP: Shape = Shape { layers: 12, head_dim: 16, block_size: 16, max_rows: 8 };
    /// Heads for the tensor cores, and contexts of more than one chunk of attention.
    const LONG: Shape = Shape { layers: 2, head_dim: 64, block_size: 128, max_rows: 3 };
    /// Large tiles, and plans of more than one block.
    const BROAD: Shape = Shape { layers: 2, head_dim: 64, block_size: 16, max_rows: 48 };

    fn qkv(self) -> usize {
        (HEADS + 2 * KV_HEADS) * self.head_dim
    }

    fn positions(self) -> usize {
        BLOCKS * self.block_size
    }
}

/// A small model, as a rank runs it.
struct Toy {
    shape: Shape,
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
    fn new(device: Device<'_>, shape: Shape) -> Space {
        let rows = shape.max_rows;
        let exact = |cols| poisoned(device, DType::F32, rows, cols);
        let rounded = |rows, cols| poisoned(device, DType::Bf16, rows, cols);
        Space {
            residual: exact(HIDDEN),
            normed: exact(HIDDEN),
            rounded: rounded(rows, HIDDEN),
            qkv: exact(shape.qkv()),
            attended: rounded(rows, HEADS * shape.head_dim),
            partial: exact(HIDDEN),
            logits: exact(EXPERTS),
            ids: poisoned(device, DType::I32, rows, TOP_K),
            weights: exact(TOP_K),
            grouped: rounded(rows * TOP_K, HIDDEN),
            computed: rounded(rows * TOP_K, HIDDEN),
            last: exact(HIDDEN),
        }
    }
}

impl Toy {
    fn new(device: Device<'_>, shape: Shape) -> Toy {
        let dim = shape.head_dim;
        let mut numbers = Numbers::new(51);
        let experts: Vec<HostMlp> =
            (0..EXPERTS).map(|_| host_mlp(&mut numbers, HIDDEN, 32, false, DType::Bf16)).collect();
        let table = numbers.vec(VOCAB * HIDDEN);
        let angles = numbers.vec(shape.positions() * dim);
        let mut matrix = |n: usize, k: usize, dtype| {
            device.pack_matrix(&host_matrix(&mut numbers, n, k, dtype), dtype).unwrap()
        };
        let kv = KvShape::Gqa { kv_heads: KV_HEADS, head_dim: dim };
        let layers = (0..shape.layers).map(|_| Layer {
            qkv: matrix(shape.qkv(), HIDDEN, DType::Bf16),
            out: matrix(HIDDEN, HEADS * dim, DType::Bf16),
            router: matrix(EXPERTS, HIDDEN, DType::F32),
            slots: experts
                .iter()
                .map(|e| Some(device.pack_mlp(e, DType::Bf16).unwrap()))
                .chain([None])
                .collect(),
            cache: device.alloc_kv(kv, DType::Bf16, shape.block_size, BLOCKS * shape.max_rows).unwrap(),
        });
        Toy {
            layers: layers.collect(),
            table: tensor(device, DType::Bf16, VOCAB, HIDDEN, &table),
            angles: tensor(device, DType::F32, shape.positions(), dim, &angles),
            norm: tensor(device, DType::F32, 1, HIDDEN, &[1.0; HIDDEN]),
            slot_of: (0..EXPERTS as u32).collect(),
            shape,
        }
    }

    /// Sequences `0..rows` have come to `position`.
    fn fill(&mut self, device: Device<'_>, rows: usize, position: usize) {
        let mut numbers = Numbers::new(53);
        let block_table: Vec<u32> = (0..(BLOCKS * rows) as u32).collect();
        let positions: Vec<u32> = (0..position as u32).collect();
        for row in 0..rows as u32 {
            let qkv = numbers.vec(position * self.shape.qkv());
            let mut qkv = tensor(device, DType::F32, position, self.shape.qkv(), &qkv);
            let first_block = row * BLOCKS as u32;
            let span = SeqSpan { row: 0, rows: position as u32, position: 0, prompt_len: 0, first_block };
            let batch = AttentionBatch { spans: &[span], block_table: &block_table };
            for Layer { cache, .. } in &mut self.layers {
                let rope = rope_args(&self.angles, &positions, self.shape);
                device.rope_kv_write(qkv.view_mut(), rope, batch, cache).unwrap();
            }
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
            .map(|row| SeqSpan { row, rows: 1, position, prompt_len: 0, first_block: row * BLOCKS as u32 })
            .collect();
        let block_table: Vec<u32> = (0..(BLOCKS * rows) as u32).collect();
        let batch = AttentionBatch { spans: &spans, block_table: &block_table };
        let norm =
            NormArgs { kind: NormKind::Rms, eps: 1e-5, weight: self.norm.view(), bias: None, width: HIDDEN };
        let positions = vec![position; rows];
        device.embed(self.table.view(), tokens, 1.0, space.residual.head_mut(rows)).unwrap();
        for Layer { qkv, out, router: gate, slots, cache } in &mut self.layers {
            device.norm(space.residual.head(rows), norm, space.rounded.head_mut(rows)).unwrap();
            device.linear(space.rounded.head(rows), qkv, None, space.qkv.head_mut(rows)).unwrap();
            let rope = rope_args(&self.angles, &positions, self.shape);
            device.rope_kv_write(space.qkv.head_mut(rows), rope, batch, cache).unwrap();
            let all = space.qkv.head(rows);
            let args = GqaArgs {
                q: all.cols_range(0..HEADS * self.shape.head_dim),
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

fn rope_args<'a>(angles: &'a Tensor, rows: &'a [u32], shape: Shape) -> RopeArgs<'a> {
    RopeArgs {
        table: angles.view(),
        rows,
        heads: HEADS + KV_HEADS,
        head_stride: shape.head_dim,
        offset: 0,
        dim: shape.head_dim,
        interleaved: false,
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
    let (mut toy, mut space) = (Toy::new(device, Shape::DEEP), Space::new(device, Shape::DEEP));
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

fn steps_of_every_shape_have_the_same_bits() {
    for (shape, position) in [(Shape::LONG, 510), (Shape::BROAD, 0)] {
        let [put_off, at_once] = [true, false].map(|put_off| few_steps(shape, position, put_off));
        assert!(put_off == at_once, "from position {position}");
    }
}

fn few_steps(shape: Shape, position: usize, put_off: bool) -> Vec<Vec<u32>> {
    let owner = gpu();
    let device = owner.as_ref();
    let rows = shape.max_rows;
    let (mut toy, mut space) = (Toy::new(device, shape), Space::new(device, shape));
    if position > 0 {
        toy.fill(device, rows, position);
    }
    let steps = (0..3).map(|step| {
        let tokens: Vec<u32> = (0..rows).map(|row| ((step * 11 + row * 17) % VOCAB) as u32).collect();
        let mut body = || {
            toy.run(device, &mut space, &tokens, (position + step) as u32);
            Ok(())
        };
        if put_off {
            device.step(&mut body).unwrap()
        } else {
            body().unwrap()
        }
        let last = values(device, space.last.head(rows));
        assert!(last.iter().all(|x| x.is_finite()), "step {step}: {last:?}");
        bits(last)
    });
    steps.collect()
}

/// Products of a step read weights as early as they can: not before these are there.
fn weights_may_be_written_before_a_step() {
    let owner = gpu();
    let device = owner.as_ref();
    let mut numbers = Numbers::new(54);
    let (n, k) = (1024, 128);
    let x = numbers.vec(k);
    let mut old = Vec::new();
    for _ in 0..4 {
        let (source, x) = (numbers.vec(n * k), tensor(device, DType::Bf16, 1, k, &x));
        let source = tensor(device, DType::F32, n, k, &source);
        let host = host_matrix(&mut numbers, n, k, DType::Bf16);
        let product = |step: bool| {
            let mut matrix = device.pack_matrix(&host, DType::Bf16).unwrap();
            let mut out = poisoned(device, DType::F32, 1, n);
            values(device, out.view());
            device.copy_rows(source.view(), matrix.data.view_mut()).unwrap();
            let mut body = || device.linear(x.view(), &matrix, None, out.view_mut());
            if step {
                device.step(&mut body).unwrap()
            } else {
                body().unwrap()
            }
            bits(values(device, out.view()))
        };
        let (early, late) = (product(true), product(false));
        assert!(early == late && early != old);
        old = late;
    }
}

fn a_result_may_be_asked_for_within() {
    let owner = gpu();
    let device = owner.as_ref();
    let (mut toy, mut space) = (Toy::new(device, Shape::DEEP), Space::new(device, Shape::DEEP));
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
