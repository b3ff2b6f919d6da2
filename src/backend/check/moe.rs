//! Checks of what a mixture of experts is made of.

use super::{below, dtype, float, multiplied, shape, vector};
use crate::backend::{
    CombineArgs, DType, ExpertsArgs, MOST_CHOICES, Mlp, PaddedShape, PlannedArgs, Replicas, ReturnedArgs,
    SharedArgs, View, ViewMut, WorldArgs,
};
use crate::spec::{GroupScore, Router, Score};

/// [`crate::backend::Backend::route`].
pub fn route(
    logits: &View<'_>,
    bias: Option<&View<'_>>,
    router: &Router,
    ids: &ViewMut<'_>,
    weights: &ViewMut<'_>,
) {
    let (rows, experts, top_k) = (logits.rows(), logits.cols(), ids.cols());
    dtype("router logits", logits, DType::F32);
    dtype("router ids", &ids.as_view(), DType::I32);
    dtype("router weights", &weights.as_view(), DType::F32);
    shape("router ids", &ids.as_view(), rows, top_k);
    shape("router weights", &weights.as_view(), rows, top_k);
    assert!(0 < top_k && top_k <= experts, "top {top_k} of {experts} experts");
    assert!(i32::try_from(experts).is_ok(), "{experts} experts");
    assert!(bias.is_some() == router.choice_bias, "choice bias given: {}", bias.is_some());
    if let Some(bias) = bias {
        vector("choice bias", bias, experts);
    }
    if let Some(groups) = router.groups {
        assert!(
            groups.count > 0 && experts.is_multiple_of(groups.count),
            "{experts} experts in {} groups",
            groups.count
        );
        assert!(
            0 < groups.keep && groups.keep <= groups.count,
            "keep {} of {} groups",
            groups.keep,
            groups.count
        );
        let kept = groups.keep * (experts / groups.count);
        assert!(
            groups.score == GroupScore::Max || kept >= top_k,
            "top {top_k} of the {kept} experts in the kept groups"
        );
    }
    if matches!(router.score, Score::SoftmaxOverChosen | Score::SparseMixer { .. }) {
        assert!(
            router.groups.is_none() && !router.choice_bias,
            "{:?} has neither groups nor a choice bias",
            router.score
        );
    }
}

/// The matrices of an MLP fit the rows: `[_, hidden]` in and out, types that go together. (In every backend part 0 is a
/// matrix; other parts may be biases.)
fn mlp_rows(rows: &View<'_>, w: &Mlp, out: &ViewMut<'_>) {
    assert!(
        rows.cols() == w.hidden && out.cols() == w.hidden,
        "an MLP of width {} between {} and {} columns",
        w.hidden,
        rows.cols(),
        out.cols()
    );
    match w.parts[0].dtype() {
        DType::I8 => float("mlp rows", rows),
        DType::F8 | DType::I4x2 => dtype("mlp rows", rows, DType::Bf16),
        weights => multiplied("mlp rows", rows.dtype(), weights),
    }
}

/// [`crate::backend::Backend::experts`].
pub fn experts(args: &ExpertsArgs<'_>, out: &ViewMut<'_>) {
    float("experts rows", &args.rows);
    float("experts out", &out.as_view());
    shape("experts out", &out.as_view(), args.rows.rows(), args.rows.cols());
    let (offsets, slots) = (args.offsets, args.slots.len());
    assert!(offsets.len() == slots + 1, "{} offsets for {slots} slots", offsets.len());
    assert!(offsets[0] == 0, "experts: offsets start at {}", offsets[0]);
    assert!(
        offsets[slots] == args.rows.rows(),
        "experts: offsets end at {} of {} rows",
        offsets[slots],
        args.rows.rows()
    );
    let first = args.slots.iter().flatten().next();
    for (s, slot) in args.slots.iter().enumerate() {
        let (from, to) = (offsets[s], offsets[s + 1]);
        assert!(from <= to, "slot {s}: rows {from}..{to}");
        match slot {
            Some(w) => {
                mlp_rows(&args.rows, w, out);
                let (own, others) = (w.parts[0].dtype(), first.unwrap_or(w).parts[0].dtype());
                assert!(own == others, "slot {s}: {own:?} weights among those of {others:?}");
            }
            None => assert!(from == to, "slot {s} is empty and has rows {from}..{to}"),
        }
    }
}

/// [`crate::backend::Backend::mlp`].
pub fn mlp(x: &View<'_>, w: &Mlp, out: &ViewMut<'_>) {
    float("mlp x", x);
    float("mlp out", &out.as_view());
    shape("mlp out", &out.as_view(), x.rows(), x.cols());
    mlp_rows(x, w, out);
}

/// [`crate::backend::Backend::experts_and_shared`].
pub fn experts_and_shared(
    (routed, out): (&ExpertsArgs<'_>, &ViewMut<'_>),
    (shared, shared_out): (&SharedArgs<'_>, &ViewMut<'_>),
) {
    experts(routed, out);
    mlp(&shared.rows, shared.mlp, shared_out);
    dtype("shared rows", &shared.rows, routed.rows.dtype());
    assert!(shared.rows.cols() == routed.rows.cols(), "shared rows of {} columns", shared.rows.cols());
    let own = shared.mlp.parts[0].dtype();
    if let Some(other) = routed.slots.iter().flatten().next().map(|w| w.parts[0].dtype()) {
        assert!(own == other, "a shared expert of {own:?} beside others of {other:?}");
    }
}

/// [`crate::backend::DevicePlan::planned_experts`]. The ids themselves are out of reach here: [`crate::backend::Backend::route`] writes none beyond the
/// experts.
pub fn planned_experts(args: &PlannedArgs<'_>, out: &ViewMut<'_>) {
    let (tokens, top_k, slots) = (args.x.rows(), args.ids.cols(), args.slots.len());
    float("planned x", &args.x);
    dtype("planned ids", &args.ids, DType::I32);
    shape("planned ids", &args.ids, tokens, top_k);
    dtype("planned weights", &args.weights, DType::F32);
    shape("planned weights", &args.weights, tokens, top_k);
    dtype("planned out", &out.as_view(), DType::F32);
    shape("planned out", &out.as_view(), tokens, args.x.cols());
    for work in [&args.grouped, &args.computed] {
        dtype("planned working space", &work.as_view(), args.x.dtype());
        shape("planned working space", &work.as_view(), tokens * top_k, args.x.cols());
    }
    let first = args.slots.iter().flatten().next();
    for (e, &slot) in args.slot_of.iter().enumerate() {
        assert!((slot as usize) < slots, "expert {e}: slot {slot} of {slots}");
        let w = args.slots[slot as usize].as_ref();
        let w = w.unwrap_or_else(|| panic!("expert {e} lives in slot {slot}, which is empty"));
        mlp_rows(&args.x, w, out);
        let (own, others) = (w.parts[0].dtype(), first.unwrap_or(w).parts[0].dtype());
        assert!(own == others, "slot {slot}: {own:?} weights among those of {others:?}");
    }
}

/// [`crate::backend::WorldPlan::world_experts`]. The ids themselves are out of reach here.
pub fn world_experts(args: &WorldArgs<'_>) {
    let PaddedShape { world, rank, expert_tp, rows, top_k, slots_per_rank } = args.shape;
    assert!(
        rank < world && expert_tp > 0 && world.is_multiple_of(expert_tp),
        "rank {rank} of {world}, {expert_tp} to an expert"
    );
    assert!(args.shape.choices() <= MOST_CHOICES, "{:?} has more than {MOST_CHOICES} choices", args.shape);
    assert!(args.counts.len() == world, "rows of {} ranks, {world} in the world", args.counts.len());
    below("rows of a rank", args.counts, rows + 1);
    float("world x", &args.x);
    let hidden = args.x.cols();
    shape("world x", &args.x, world * rows, hidden);
    dtype("world ids", &args.ids, DType::I32);
    shape("world ids", &args.ids, world * rows, top_k);
    for work in [&args.grouped, &args.computed, &args.returned] {
        dtype("world working space", &work.as_view(), args.x.dtype());
        shape("world working space", &work.as_view(), args.shape.capacity(), hidden);
    }
    assert!(args.slots.len() == slots_per_rank, "{} slots, {slots_per_rank} on each rank", args.slots.len());
    let own = args.counts[rank] as usize;
    for (name, x, numbers) in [
        ("world offsets", &args.offsets, slots_per_rank + 1),
        ("world index", &args.index, own * top_k * expert_tp),
    ] {
        dtype(name, &x.as_view(), DType::I32);
        shape(name, &x.as_view(), numbers, 1);
        assert!(x.as_view().is_contiguous(), "{name}: numbers {} apart", x.stride());
    }
    let Replicas { starts, slots } = args.replicas;
    let (first, last) = (starts.first().copied(), starts.last().copied());
    assert!(
        first == Some(0) && last == Some(slots.len() as u32) && starts.is_sorted_by(|a, b| a < b),
        "slots of {} experts: from {first:?} to {last:?} of {}",
        starts.len().saturating_sub(1),
        slots.len()
    );
    below("slot of an expert", slots, world / expert_tp * slots_per_rank);
    let mine = slots_per_rank * args.shape.expert_rank()..slots_per_rank * (args.shape.expert_rank() + 1);
    let first = args.slots.iter().flatten().next();
    for &slot in slots.iter().filter(|&&slot| mine.contains(&(slot as usize))) {
        let local = slot as usize - mine.start;
        let w = args.slots[local].as_ref();
        let w = w.unwrap_or_else(|| panic!("an expert lives in slot {local} of rank {rank}, which is empty"));
        mlp_rows(&args.x, w, &args.computed);
        let (own, others) = (w.parts[0].dtype(), first.unwrap_or(w).parts[0].dtype());
        assert!(own == others, "slot {local}: {own:?} weights among those of {others:?}");
    }
}

/// [`crate::backend::WorldPlan::combine_returned`]. The index itself is out of reach here.
pub fn combine_returned(args: &ReturnedArgs<'_>, out: &ViewMut<'_>) {
    float("returned rows", &args.rows);
    dtype("returned weights", &args.weights, DType::F32);
    dtype("returned out", &out.as_view(), DType::F32);
    shape("returned out", &out.as_view(), args.weights.rows(), args.rows.cols());
    dtype("returned index", &args.index, DType::I32);
    shape("returned index", &args.index, args.weights.rows() * args.weights.cols() * args.parts, 1);
}

/// [`crate::backend::Backend::combine`].
pub fn combine(args: &CombineArgs<'_>, out: &ViewMut<'_>) {
    float("combine rows", &args.rows);
    dtype("combine weights", &args.weights, DType::F32);
    dtype("combine out", &out.as_view(), DType::F32);
    let (tokens, top_k) = (args.weights.rows(), args.weights.cols());
    shape("combine out", &out.as_view(), tokens, args.rows.cols());
    assert!(args.parts > 0, "combine: 0 parts");
    assert!(
        args.index.len() == tokens * top_k * args.parts,
        "combine: {} indices for {tokens} tokens x {top_k} x {} parts",
        args.index.len(),
        args.parts
    );
    below("combine index", args.index, args.rows.rows());
}
