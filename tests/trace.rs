//! A routing trace of the real engine, read back by router-sim: complete, in place, equal to what was counted and captured.

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use moeyard::config::RawOptions;
use moeyard::config::flags::DtypeChoice;
use moeyard::config::size::ByteSize;
use moeyard::engine::request::{Capture, Request};
use moeyard::metrics::LoadSource;
use router_sim::load::{LoadWindow, Phase};
use router_sim::trace::{Record, RowInfo, StepJoiner, StepRecord, TraceHeader, TraceReader};
use support::launch::{Answer, Launch, greedy, options};
use support::patience::eventually;
use support::{Golden, ids, model_dir};

/// The steps of a trace, each put together from what its ranks recorded.
fn read(path: &Path) -> (TraceHeader, Vec<StepRecord>) {
    let mut reader = TraceReader::open(path).unwrap();
    let mut joiner = StepJoiner::default();
    let mut steps = Vec::new();
    for record in reader.by_ref() {
        match record.unwrap() {
            Record::Step(part) => steps.extend(joiner.push(part).unwrap()),
            other => panic!("nothing but steps happened: {other:?}"),
        }
    }
    assert_eq!(joiner.incomplete(), 0);
    assert_eq!(reader.end().map(|end| end.lost_steps), Some(0), "the trace was finished and nothing lost");
    (reader.header().clone(), steps)
}

fn requests(max_tokens: usize) -> Vec<Request> {
    (0..6u32)
        .map(|i| Request {
            capture: Capture { routing: true, ..Capture::default() },
            ..greedy(&(0..9 + 7 * i).map(|t| (t * 31 + i * 17) % 500).collect::<Vec<_>>(), max_tokens)
        })
        .collect()
}

/// Experts of every row of a trace: `(request, position) -> [layer][k]`.
fn choices(header: &TraceHeader, steps: &[StepRecord]) -> BTreeMap<(u64, u64), Vec<u32>> {
    let (layers, k) = (header.placement.layers(), header.top_k);
    let mut found = BTreeMap::new();
    for piece in steps.iter().flat_map(|step| &step.pieces) {
        let rows = piece.rows.len();
        for (i, row) in piece.rows.iter().enumerate() {
            let ids = (0..layers).flat_map(|layer| &piece.ids[(layer * rows + i) * k..][..k]);
            let ids: Vec<u32> = ids.map(|&id| id.into()).collect();
            let again = found.insert((row.request, row.position), ids.clone());
            assert!(row.recomputed == again.is_some(), "{row:?} was recorded twice");
            assert!(again.is_none_or(|before| before == ids), "{row:?} took other experts the second time");
        }
    }
    found
}

/// Runs a batch with a trace, and compares the trace with everything else that knows about the routing.
fn check(model: &str, raw: RawOptions, max_tokens: usize) -> Vec<StepRecord> {
    let folder = tempfile::TempDir::new().unwrap();
    let path = folder.path().join("run.moetrace");
    let requests = requests(max_tokens);
    let engine = Launch::of(model, RawOptions { record_routing: Some(path.clone()), ..raw });
    let answers = engine.run(requests.clone());
    let prepared = engine.finish();

    let (header, steps) = read(&path);
    let spec = &prepared.model.family.spec;
    let parallel = prepared.options.parallel;
    assert_eq!((header.family.as_str(), header.top_k), (spec.family, spec.moe.top_k));
    assert_eq!((header.degrees.tensor, header.degrees.data), (parallel.tp, parallel.dp));
    assert_eq!((header.degrees.expert, header.world()), (parallel.ep, parallel.world));
    assert_eq!(header.placement, *prepared.placement);

    let found = choices(&header, &steps);
    let mut computed = 0;
    for (request, answer) in requests.iter().zip(&answers) {
        computed += captured_equals_recorded(request, answer, &found);
    }
    assert_eq!(found.len(), computed, "a row of no request");
    rows_in_place(&requests, &answers, &steps);
    assert!(steps.windows(2).all(|pair| pair[0].info.step < pair[1].info.step), "steps in order");

    let mut recorded = LoadWindow::new(header.placement.layer_ids(), header.placement.experts());
    steps.iter().for_each(|step| step.add_to(&mut recorded));
    let counted = prepared.load().snapshot();
    for layer in 0..recorded.layers() {
        for phase in [Phase::Prefill, Phase::Decode] {
            let expected = counted.experts_of(phase, layer);
            assert_eq!(recorded.counts_mut(phase, layer), expected, "{model}: {phase:?}, MoE layer {layer}");
        }
    }
    steps
}

/// The positions of a request, which are its prompt and all generated tokens but the last; returns their number.
fn captured_equals_recorded(
    request: &Request,
    answer: &Answer,
    found: &BTreeMap<(u64, u64), Vec<u32>>,
) -> usize {
    let positions = request.prompt.len() + request.max_tokens - 1;
    let captured = &answer.finished.captured.as_ref().unwrap().routing;
    let k = captured.top_k;
    assert_eq!(captured.rows, positions);
    for position in 0..positions {
        let per_layer = captured.ids.chunks_exact(positions * k);
        let expected: Vec<u32> = per_layer.flat_map(|ids| &ids[position * k..][..k]).copied().collect();
        assert_eq!(found[&(answer.id, position as u64)], expected, "request {} at {position}", answer.id);
    }
    positions
}

/// Phases by position, and every piece under a rank of the group that ran its request.
fn rows_in_place(requests: &[Request], answers: &[Answer], steps: &[StepRecord]) {
    let prompt_len: BTreeMap<u64, usize> =
        answers.iter().zip(requests).map(|(answer, request)| (answer.id, request.prompt.len())).collect();
    for row in steps.iter().flat_map(|step| &step.pieces).flat_map(|piece| &piece.rows) {
        let generated = row.position >= prompt_len[&row.request] as u64;
        assert_eq!(row.phase, if generated { Phase::Decode } else { Phase::Prefill }, "{row:?}");
    }
}

fn ranks_of(steps: &[StepRecord]) -> BTreeMap<u64, Vec<usize>> {
    let mut ranks: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
    for piece in steps.iter().flat_map(|step| &step.pieces) {
        for RowInfo { request, .. } in &piece.rows {
            let ranks = ranks.entry(*request).or_default();
            if !ranks.contains(&piece.rank) {
                ranks.push(piece.rank);
            }
        }
    }
    ranks
}

#[test]
fn a_trace_is_what_was_counted_and_captured() {
    for model in ["mixtral", "deepseek_v3"] {
        let raw = RawOptions { prefill_chunk_size: Some(10), ..options(DtypeChoice::F32) };
        let alone = check(model, raw.clone(), 12);
        assert!(alone.iter().all(|step| step.pieces.iter().all(|piece| piece.rank == 0)));

        let ranks = ranks_of(&check(model, RawOptions { expert_parallel_size: Some(2), ..raw.clone() }, 12));
        assert!(ranks.values().all(|ranks| ranks.len() == 1), "a request stays where it is: {ranks:?}");
        assert!(ranks.values().any(|r| r == &[0]) && ranks.values().any(|r| r == &[1]), "{ranks:?}");

        let ranks = ranks_of(&check(model, RawOptions { tensor_parallel_size: Some(2), ..raw }, 12));
        assert!(ranks.values().any(|ranks| ranks.len() == 2), "rows are owned by both: {ranks:?}");
    }
}

#[test]
fn recomputed_rows_are_marked() {
    let block = Launch::of("mixtral", options(DtypeChoice::F32)).finish().footprint.kv_block;
    let raw = RawOptions {
        kv_cache_memory: Some(ByteSize(6 * block)),
        max_model_len: Some(96),
        expert_parallel_size: Some(2),
        ..options(DtypeChoice::F32)
    };
    let steps = check("mixtral", raw, 40);
    let rows = steps.iter().flat_map(|step| &step.pieces).flat_map(|piece| &piece.rows);
    assert!(rows.filter(|row| row.recomputed).count() > 0, "nothing was preempted");
}

#[test]
fn a_failing_disk_stops_the_trace_and_not_the_serving() {
    let golden = Golden::open(&model_dir("mixtral")).json;
    let prompt = &golden["prompts"][0];
    let record_routing = Some(PathBuf::from("/dev/full"));
    let engine = Launch::of("mixtral", RawOptions { record_routing, ..options(DtypeChoice::F32) });
    for _ in 0..2 {
        let answer = engine.run(vec![greedy(&ids(&prompt["input_ids"]), 24)]).remove(0);
        assert_eq!(answer.ids(), ids(&prompt["greedy"]["tokens"]));
    }
    // The writing thread is apart from the serving ones: it may still be about to fail.
    let counters = engine.prepared.recorder.as_ref().expect("a trace was asked for").counters();
    eventually("the failed write is counted", || counters.errors() > 0);
    assert_eq!((counters.errors(), counters.written_records()), (1, 0));
    engine.finish();
}
