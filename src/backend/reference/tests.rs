//! The reference against cases small enough to compute by hand.

use super::*;
use crate::backend::{HostData, HostMlpBias, Precision, SeqSpan};
use crate::spec::{ExpertGroups, GroupScore, NormKind, Renormalize, Score};

const B: ReferenceBackend = ReferenceBackend;

fn tensor(rows: usize, cols: usize, data: &[f32]) -> Tensor {
    B.store(&Host { rows, cols, data: data.to_vec() }, DType::F32).unwrap()
}

fn zeros(rows: usize, cols: usize) -> Tensor {
    B.alloc(DType::F32, rows, cols).unwrap()
}

fn matrix(n: usize, k: usize, data: &[f32]) -> HostMatrix<'static> {
    HostMatrix { n, k, data: HostData::F32(data.to_vec()) }
}

#[track_caller]
fn assert_close(found: &Tensor, expected: &[f32]) {
    let found = Host::read(found.view()).data;
    assert_eq!(found.len(), expected.len(), "elements");
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!((f - e).abs() <= 1e-5 * e.abs().max(1.0), "element {i}: {f}, expected {e}; all: {found:?}");
    }
}

fn router(score: Score) -> Router {
    Router {
        score,
        logit_bias: false,
        choice_bias: false,
        groups: None,
        renormalize: Renormalize::Off,
        scale: 1.0,
    }
}

fn route(router: &Router, logits: &[f32], bias: Option<&[f32]>, top_k: usize) -> Vec<(usize, f32)> {
    let logits = tensor(1, logits.len(), logits);
    let bias = bias.map(|b| tensor(1, b.len(), b));
    let mut ids = B.alloc(DType::I32, 1, top_k).unwrap();
    let mut weights = zeros(1, top_k);
    B.route(logits.view(), bias.as_ref().map(|b| b.view()), router, ids.view_mut(), weights.view_mut())
        .unwrap();
    let ids = memory::Rows::<i32>::new(ids.view()).all().iter().map(|&e| e as usize);
    ids.zip(Host::read(weights.view()).data).collect()
}

#[track_caller]
fn assert_route(found: Vec<(usize, f32)>, expected: &[(usize, f32)]) {
    assert_eq!(found.len(), expected.len());
    for (f, e) in found.iter().zip(expected) {
        assert!(f.0 == e.0 && (f.1 - e.1).abs() < 1e-6, "{found:?}, expected {expected:?}");
    }
}

/// Logits whose softmax is the given distribution.
fn logs(p: &[f32]) -> Vec<f32> {
    p.iter().map(|p| p.ln()).collect()
}

#[test]
fn softmax_router_weights_by_probability() {
    let r = router(Score::Softmax);
    assert_route(route(&r, &logs(&[0.1, 0.4, 0.2, 0.3]), None, 2), &[(1, 0.4), (3, 0.3)]);
}

#[test]
fn renormalised_weights_sum_to_the_scale() {
    let r = Router { renormalize: Renormalize::Sum { eps: 0.0 }, scale: 2.5, ..router(Score::Softmax) };
    assert_route(route(&r, &logs(&[0.1, 0.6, 0.1, 0.2]), None, 2), &[(1, 2.5 * 0.75), (3, 2.5 * 0.25)]);
}

#[test]
fn ties_go_to_the_lowest_id() {
    let r = router(Score::Softmax);
    assert_route(route(&r, &[1.0; 5], None, 3), &[(0, 0.2), (1, 0.2), (2, 0.2)]);
    assert_route(route(&r, &logs(&[0.1, 0.3, 0.2, 0.3, 0.1]), None, 3), &[(1, 0.3), (3, 0.3), (2, 0.2)]);
}

#[test]
fn choice_bias_moves_the_choice_and_not_the_weights() {
    let r = Router { choice_bias: true, ..router(Score::Sigmoid) };
    let logits = [0.0, 3f32.ln(), -(3f32.ln())]; // scores 0.5, 0.75, 0.25
    assert_route(route(&r, &logits, Some(&[0.0, 0.0, 1.0]), 2), &[(2, 0.25), (1, 0.75)]);
}

#[test]
fn max_groups_keep_the_group_with_the_best_expert() {
    let groups = Some(ExpertGroups { count: 3, keep: 1, score: GroupScore::Max });
    let r = Router { groups, ..router(Score::Softmax) };
    let logits = logs(&[0.2, 0.2, 0.3, 0.01, 0.25, 0.04]);
    assert_route(route(&r, &logits, None, 2), &[(2, 0.3), (3, 0.01)]);
    // The third choice falls outside: all others count as 0, the lowest id wins, the weight is its own score.
    assert_route(route(&r, &logits, None, 3), &[(2, 0.3), (3, 0.01), (0, 0.2)]);
}

#[test]
fn top2_groups_keep_the_group_with_the_best_pair() {
    let groups = Some(ExpertGroups { count: 2, keep: 1, score: GroupScore::Top2Sum });
    let r = Router { groups, choice_bias: true, ..router(Score::Sigmoid) };
    let logits = [0.0, 0.0, 0.0, 3f32.ln(), -20.0, -20.0]; // 0.5 0.5 0.5 | 0.75 0 0
    assert_route(route(&r, &logits, Some(&[0.0; 6]), 2), &[(0, 0.5), (1, 0.5)]);
    // The bias joins the group score: now the other group wins, although its biased experts score about 0.
    let bias = [0.0, 0.0, 0.0, 0.0, 0.5, 0.0];
    assert_route(route(&r, &logits, Some(&bias), 2), &[(3, 0.75), (4, 0.0)]);
}

#[test]
fn top2_groups_of_one_expert_are_their_expert() {
    let groups = Some(ExpertGroups { count: 3, keep: 2, score: GroupScore::Top2Sum });
    let r = Router { groups, ..router(Score::Sigmoid) };
    assert_route(route(&r, &[0.0, 3f32.ln(), -1.0], None, 2), &[(1, 0.75), (0, 0.5)]);
}

#[test]
fn equal_groups_keep_the_lowest() {
    for score in [GroupScore::Max, GroupScore::Top2Sum] {
        let groups = Some(ExpertGroups { count: 3, keep: 2, score });
        let r = Router { groups, ..router(Score::Sigmoid) };
        assert_route(route(&r, &[0.0; 6], None, 4), &[(0, 0.5), (1, 0.5), (2, 0.5), (3, 0.5)]);
    }
}

#[test]
fn softmax_over_chosen_ignores_the_rest() {
    let r = router(Score::SoftmaxOverChosen);
    assert_route(route(&r, &logs(&[0.3, 0.5, 0.1, 0.1]), None, 2), &[(1, 0.625), (0, 0.375)]);
}

#[test]
fn sparse_mixer_weights_each_round_by_its_near_logits() {
    let r = router(Score::SparseMixer { epsilon: 0.01 });
    // Round 1: 1.98 is within 2 % of 2, 1.5 is not. Round 2: 1.5 is 24 % below 1.98, so expert 2 is alone.
    let first = 1.0 / (1.0 + (-0.02f32).exp());
    assert_route(route(&r, &[1.5, 2.0, 1.98], None, 2), &[(1, first), (2, 1.0)]);
    assert_route(route(&r, &[1.5, 2.0, 1.98], None, 1), &[(1, first)]);
    // Ties: round 1 takes the lowest id of three equals, round 2 the next of two.
    assert_route(route(&r, &[-1.0, 2.0, 2.0, 2.0], None, 2), &[(1, 1.0 / 3.0), (2, 0.5)]);
    // A negative maximum is compared relative to the logit's own size.
    let near = 1.0 / (1.0 + (-0.015f32).exp());
    assert_route(route(&r, &[-1.015, -1.0, -2.0], None, 2), &[(1, near), (0, 1.0)]);
}

#[test]
fn norms_follow_their_formulas() {
    let x = tensor(1, 4, &[1.0, 3.0, 0.0, 2.0]);
    let weight = tensor(1, 2, &[1.0, 2.0]);
    let bias = tensor(1, 2, &[0.5, -0.5]);
    let mut out = zeros(1, 4);
    let rms = NormArgs { kind: NormKind::Rms, eps: 0.0, weight: weight.view(), bias: None, width: 2 };
    B.norm(x.view(), rms, out.view_mut()).unwrap();
    let (a, b) = (5f32.sqrt(), 2f32.sqrt());
    assert_close(&out, &[1.0 / a, 6.0 / a, 0.0, 4.0 / b]);
    let layer = NormArgs { kind: NormKind::Layer, bias: Some(bias.view()), ..rms };
    B.norm(x.view(), layer, out.view_mut()).unwrap();
    assert_close(&out, &[-0.5, 1.5, -0.5, 1.5]);
}

#[test]
fn split_rms_norm_equals_the_whole() {
    let mut x = tensor(1, 2, &[1.0, 3.0]);
    let mut sums = zeros(1, 1);
    B.square_sum(x.view(), sums.view_mut()).unwrap();
    assert_close(&sums, &[10.0]);
    // The other rank's two columns are zero: mean 10 / 4.
    let weight = tensor(1, 2, &[1.0, 2.0]);
    B.scale_by_square_sum(sums.view(), 4, 0.0, weight.view(), x.view_mut()).unwrap();
    assert_close(&x, &[1.0 / 2.5f32.sqrt(), 6.0 / 2.5f32.sqrt()]);
}

#[test]
fn rope_rotates_pairs_of_either_layout() {
    // Angles 90 and 0 degrees: the first pair turns a quarter, the second stays.
    let table = tensor(2, 4, &[1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0]);
    let args = RopeArgs {
        table: table.view(),
        rows: &[1],
        heads: 1,
        head_stride: 5,
        offset: 1,
        dim: 4,
        interleaved: false,
    };
    let mut x = tensor(1, 5, &[9.0, 1.0, 2.0, 3.0, 4.0]);
    B.rope(x.view_mut(), RopeArgs { ..args }).unwrap();
    assert_close(&x, &[9.0, -3.0, 2.0, 1.0, 4.0]);
    let mut x = tensor(1, 5, &[9.0, 1.0, 2.0, 3.0, 4.0]);
    B.rope(x.view_mut(), RopeArgs { interleaved: true, ..args }).unwrap();
    assert_close(&x, &[9.0, -2.0, 1.0, 3.0, 4.0]);
}

#[test]
fn linear_and_mlp_use_weights_by_output() {
    let x = tensor(1, 2, &[1.0, 2.0]);
    let w = B.pack_matrix(&matrix(3, 2, &[1.0, 0.0, 0.0, 1.0, 1.0, 1.0]), DType::F32).unwrap();
    let bias = tensor(1, 3, &[10.0, 20.0, 30.0]);
    let mut out = zeros(1, 3);
    B.linear(x.view(), &w, Some(bias.view()), out.view_mut()).unwrap();
    assert_close(&out, &[11.0, 22.0, 33.0]);
    assert_eq!(w.data.bytes(), B.matrix_bytes(3, 2, DType::F32));

    let host = HostMlp {
        gate: matrix(1, 2, &[2.0, 4.0]),
        up: matrix(1, 2, &[1.0, 1.0]),
        down: matrix(2, 1, &[1.0, -1.0]),
        bias: Some(HostMlpBias { gate: vec![-1.0], up: vec![-20.0], down: vec![0.0, 1.0] }),
    };
    let mlp = B.pack_mlp(&host, DType::F32).unwrap();
    assert_eq!(mlp.parts.iter().map(Tensor::bytes).sum::<usize>(), B.mlp_bytes(2, 1, true, DType::F32));
    // gate 10 - 1 = 9 is capped at 7; up 3 - 20 = -17 is clamped to -7, plus 1.
    let activation = Activation::ClampedSwiglu { limit: 7.0, alpha: 1.0 };
    let y = 7.0 / (1.0 + (-7f32).exp()) * -6.0;
    let mut out = zeros(1, 2);
    B.mlp(x.view(), &mlp, activation, out.view_mut()).unwrap();
    assert_close(&out, &[y, 1.0 - y]);
}

#[test]
fn weights_and_activations_round_apart() {
    // 1 + 2^-9 is 1 in bf16.
    let fine = 1.0 + 1.0 / 512.0;
    let ones = || matrix(1, 1, &[1.0]);
    let host = HostMlp { gate: ones(), up: ones(), down: matrix(1, 1, &[fine]), bias: None };
    for (precision, row, weight) in
        [(Precision::F32, fine, fine), (Precision::BF16, 1.0, 1.0), (Precision::MIXED, fine, 1.0)]
    {
        let mut x = B.alloc(precision.activations, 1, 1).unwrap();
        B.copy_rows(tensor(1, 1, &[fine]).view(), x.view_mut()).unwrap();
        let w = B.pack_matrix(&matrix(1, 1, &[fine]), precision.weights).unwrap();
        let mut out = zeros(1, 1);
        B.linear(x.view(), &w, None, out.view_mut()).unwrap();
        assert_eq!(Host::read(out.view()).data, [row * weight], "{precision:?}");

        let mlp = B.pack_mlp(&host, precision.weights).unwrap();
        B.mlp(x.view(), &mlp, Activation::SiluMul, out.view_mut()).unwrap();
        let between = host::rounded(row * dense::sigmoid(row) * row, precision.activations);
        assert_eq!(Host::read(out.view()).data, [between * weight], "{precision:?}");
    }
}

#[test]
#[should_panic(expected = "linear x: Bf16 activations for F32 weights")]
fn bf16_activations_need_bf16_weights() {
    let w = B.pack_matrix(&matrix(1, 1, &[1.0]), DType::F32).unwrap();
    let x = B.alloc(DType::Bf16, 1, 1).unwrap();
    let _ = B.linear(x.view(), &w, None, zeros(1, 1).view_mut());
}

#[test]
fn combine_sums_parts_then_choices() {
    let rows = tensor(4, 1, &[1.0, 2.0, 4.0, 8.0]);
    let weights = tensor(1, 2, &[0.5, 0.25]);
    let args = CombineArgs { rows: rows.view(), index: &[3, 1, 0, 2], weights: weights.view(), parts: 2 };
    let mut out = zeros(1, 1);
    B.combine(args, out.view_mut()).unwrap();
    assert_close(&out, &[0.5 * 10.0 + 0.25 * 5.0]);
}

/// One sequence of three rows at positions 15.. in blocks 1 and 0 of a pool of two; scores are 0 or `ln 3`.
fn batch(spans: &[SeqSpan]) -> AttentionBatch<'_> {
    AttentionBatch { spans, block_table: &[1, 0] }
}

fn span(position: u32, rows: u32, prompt_len: u32) -> SeqSpan {
    SeqSpan { row: 0, rows, position, prompt_len, first_block: 0 }
}

#[test]
fn attention_is_a_causal_softmax_over_the_window() {
    let mut cache = B.alloc_kv(KvShape::Gqa { kv_heads: 1, head_dim: 1 }, DType::F32, 16, 2).unwrap();
    let (k, v): (Vec<f32>, Vec<f32>) = (0..17).map(|p| (if p == 15 { 1.0 } else { 0.0 }, p as f32)).unzip();
    let (k, v) = (tensor(17, 1, &k), tensor(17, 1, &v));
    let all = [span(0, 17, 17)];
    B.kv_write(k.view(), v.view(), batch(&all), &mut cache).unwrap();
    let total: usize = cache.parts.iter().map(Tensor::bytes).sum();
    assert_eq!(total, 2 * B.kv_block_bytes(cache.shape, DType::F32, 16));

    let q = tensor(2, 2, &[1.0, 0.0, 1.0, 0.0]);
    let last = [span(15, 2, 17)];
    let sinks = tensor(1, 2, &[0.0, 2f32.ln()]);
    let mut args = GqaArgs {
        q: q.view(),
        cache: &cache,
        batch: batch(&last),
        heads: 2,
        scale: 3f32.ln(),
        window: Some(2),
        sinks: None,
    };
    let mut out = zeros(2, 2);
    B.attention_gqa(GqaArgs { ..args }, out.view_mut()).unwrap();
    assert_close(&out, &[(14.0 + 3.0 * 15.0) / 4.0, 14.5, (3.0 * 15.0 + 16.0) / 4.0, 15.5]);
    args.sinks = Some(sinks.view());
    B.attention_gqa(GqaArgs { ..args }, out.view_mut()).unwrap();
    assert_close(&out, &[(14.0 + 3.0 * 15.0) / 5.0, 29.0 / 4.0, (3.0 * 15.0 + 16.0) / 5.0, 31.0 / 4.0]);
    args.sinks = None;
    args.window = None;
    B.attention_gqa(args, out.view_mut()).unwrap();
    let before: f32 = (0..15).sum::<i32>() as f32;
    let first = (before + 45.0) / 18.0;
    assert_close(&out, &[first, 7.5, (before + 45.0 + 16.0) / 19.0, 8.0]);
}

#[test]
fn both_mla_forms_agree_in_f32_and_round_apart_in_bf16() {
    let kv_b = matrix(2, 2, &[1.0, 2.0, 3.0, -1.0]); // W_k = (1, 2), W_v = (3, -1)
    for precision @ Precision { weights, activations, .. } in Precision::ALL {
        let w = B.pack_mla(&kv_b, 1, 1, 1, weights).unwrap();
        let mut cache = B.alloc_kv(KvShape::Mla { latent: 2, rope_dim: 2 }, activations, 16, 2).unwrap();
        let latents = tensor(2, 2, &[1.0, 0.0, 1.0, 1.0 / 256.0]);
        let ropes = tensor(2, 2, &[0.0, 0.0, 0.0, 0.0]);
        let spans = [span(0, 2, 2)];
        B.kv_write(ropes.view(), latents.view(), batch(&spans), &mut cache).unwrap();
        let q = tensor(2, 3, &[1.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
        let run = |prompt_len| {
            let spans = [span(0, 2, prompt_len)];
            let args = MlaArgs { q: q.view(), cache: &cache, weights: &w, batch: batch(&spans), scale: 1.0 };
            let mut out = zeros(2, 1);
            B.attention_mla(args, out.view_mut()).unwrap();
            Host::read(out.view()).data
        };
        // Position 1 weighs both positions alike: values 3 and 3 - 1/256, the second of which is 3 in bf16 when
        // expanded; absorbed, the mean latent (1, 1/512) is exact and 3 - 1/512 is not rounded at all.
        let (value, exact) = (3.0 - 1.0 / 512.0, activations == DType::F32);
        assert_eq!(run(2), [3.0, if exact { value } else { 3.0 }], "expanded, {precision:?}");
        assert_eq!(run(0), [3.0, value], "absorbed, {precision:?}");
        assert_eq!(run(1), [3.0, value], "position 1 generated, {precision:?}");
    }
}

#[test]
fn rows_move_between_types_strides_and_bytes() {
    let mut wide = zeros(2, 4);
    let bytes: Vec<u8> = [1f32, 2.0, 3.0, 1.0 + 1.0 / 512.0].iter().flat_map(|x| x.to_le_bytes()).collect();
    B.upload(&bytes, wide.view_mut().cols_range(1..3)).unwrap();
    assert_close(&wide, &[0.0, 1.0, 2.0, 0.0, 0.0, 3.0, 1.0 + 1.0 / 512.0, 0.0]);
    let mut narrow = B.alloc(DType::Bf16, 2, 2).unwrap();
    B.copy_rows(wide.view().cols_range(1..3), narrow.view_mut()).unwrap();
    assert_close(&narrow, &[1.0, 2.0, 3.0, 1.0]);
    let mut gathered = B.alloc(DType::Bf16, 3, 2).unwrap();
    B.gather_rows(narrow.view(), &[1, 0, 1], gathered.view_mut()).unwrap();
    let mut back = [0u8; 12];
    B.download(gathered.view(), &mut back).unwrap();
    let back: Vec<f32> = back.as_chunks().0.iter().map(|&b| half::bf16::from_le_bytes(b).to_f32()).collect();
    assert_eq!(back, [3.0, 1.0, 1.0, 2.0, 3.0, 1.0]);
}

#[test]
#[should_panic(expected = "embed ids[1]: 7 of 2")]
fn a_bad_index_names_itself() {
    let _ = B.embed(zeros(2, 1).view(), &[0, 7], 1.0, zeros(2, 1).view_mut());
}
