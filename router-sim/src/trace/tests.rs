//! The trace as a whole: what is written is read back, and nothing that is read can do harm.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::Error;
use crate::load::{LoadWindow, Phase};
use crate::placement::{ClusterShape, Linear, Placement, PlacementPolicy};

const PATIENCE: Duration = Duration::from_secs(60);

fn linear(layers: &[usize], experts: usize, ranks: usize) -> Placement {
    Linear.place(&LoadWindow::new(layers, experts), &ClusterShape { ranks, redundant: 1 }).unwrap()
}

/// Layers 1 and 2 with 5 experts, top-2, two ranks.
fn header(weights: WeightFormat) -> TraceHeader {
    TraceHeader {
        spec_digest: "0123abcd".into(),
        family: "mixtral".into(),
        top_k: 2,
        degrees: Degrees { tensor: 1, data: 2, expert: 2, pipeline: 1 },
        node_of_rank: vec![0, 1],
        policy: [("split".to_string(), "even".to_string())].into(),
        cost: [("expert_ns_per_token".to_string(), 0.1 + 0.2)].into(),
        weights,
        placement: linear(&[1, 2], 5, 2).with_version(3),
    }
}

fn row(request: u64, position: u64, phase: Phase) -> RowInfo {
    RowInfo { request, position, phase, recomputed: false }
}

fn step_of(step: u64, pieces: Vec<PieceRecord>) -> StepRecord {
    let rows = pieces.iter().map(|piece| piece.rows.len() as u64).sum();
    StepRecord {
        info: StepInfo { step, start_us: 1000 * step, duration_us: 900, placement_version: 3, rows },
        pieces,
    }
}

fn small_step(step: u64) -> StepRecord {
    let rows = vec![row(9, 4, Phase::Prefill), row(9, 5, Phase::Prefill), row(7, 30, Phase::Decode)];
    let ids = vec![0, 1, 2, 3, 4, 0, 4, 3, 2, 1, 0, 4];
    step_of(step, vec![PieceRecord { rank: 1, rows, ids, weights: Vec::new() }])
}

fn events() -> Vec<Event> {
    let mut load = LoadWindow::new(&[1, 2], 5);
    load.add(Phase::Prefill, 1, &[1, 2, 3, 4, u32::MAX]);
    load.counts_mut(Phase::Decode, 0)[3] = u64::MAX;
    let decision = Decision {
        step: 4,
        trigger: "interval".into(),
        window_steps: 1000,
        load,
        current_version: 3,
        inputs: [("row_us".to_string(), 1.0 / 3.0)].into(),
        forecast: [("gain_us_per_step".to_string(), 2.0 / 3.0)].into(),
        chosen: Some(linear(&[1, 2], 5, 2).with_version(4)),
        reason: "expert 4 of layer 2 is hot".into(),
    };
    let keep = Decision { chosen: None, ..decision.clone() };
    vec![
        Event::Decision(Box::new(keep)),
        Event::Decision(Box::new(decision)),
        Event::Moves(Moves { step: 5, version: 4, slots: 3, bytes: 1 << 40, duration_us: 77 }),
        Event::Switch(Switch { step: 6, placement: linear(&[1, 2], 5, 2).with_version(4) }),
        Event::Failure(Failure { step: 7, reason: "a checksum differs".into() }),
    ]
}

fn record_step(writer: &mut TraceWriter, step: &StepRecord) {
    let ids: Vec<Vec<u32>> =
        step.pieces.iter().map(|piece| piece.ids.iter().map(|id| u32::from(*id)).collect()).collect();
    let pieces: Vec<Piece<'_>> = step
        .pieces
        .iter()
        .zip(&ids)
        .map(|(piece, ids)| Piece { rank: piece.rank, rows: &piece.rows, ids, weights: &piece.weights })
        .collect();
    writer.step(&step.info, &pieces);
}

/// A finished trace with these records, by way of a file.
fn written(header: &TraceHeader, records: &[Record]) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.trace");
    let mut writer = TraceWriter::create(&path, header.clone()).unwrap();
    let counters = writer.counters();
    for record in records {
        match record {
            Record::Step(step) => record_step(&mut writer, step),
            Record::Event(event) => writer.event(event),
            Record::Gap(_) => unreachable!("a gap is not recorded on request"),
        }
    }
    writer.finish(PATIENCE).unwrap();
    let bytes = fs::read(path).unwrap();
    assert_eq!(counters.written_bytes(), bytes.len() as u64);
    assert_eq!(counters.written_records(), records.len() as u64);
    assert_eq!((counters.lost_records(), counters.errors()), (0, 0));
    bytes
}

/// A short trace with every kind of record that can be recorded.
fn sample() -> (TraceHeader, Vec<Record>, Vec<u8>) {
    let header = header(WeightFormat::None);
    let mut records = vec![Record::Step(small_step(0)), Record::Step(step_of(1, Vec::new()))];
    records.extend(events().into_iter().map(Record::Event));
    records.push(Record::Step(small_step(6)));
    let bytes = written(&header, &records);
    (header, records, bytes)
}

fn why(error: Error) -> (u64, String) {
    match error {
        Error::Trace { record, why } => (record, why),
        other => panic!("not a trace error: {other}"),
    }
}

#[test]
fn everything_comes_back() {
    let (header, records, bytes) = sample();
    let mut reader = TraceReader::new(&bytes[..]).unwrap();
    assert_eq!(reader.header(), &header);
    let back: Result<Vec<_>, _> = reader.by_ref().collect();
    assert_eq!(back.unwrap(), records);
    assert_eq!(reader.end(), Some(&End { steps: 3, lost_steps: 0, lost_events: 0 }));
    assert_eq!(reader.skipped(), 0);
    assert!(reader.next().is_none());
}

/// The format is a promise: these bytes may never change their meaning.
#[test]
fn bytes_of_a_step() {
    let mut payload = Vec::new();
    let step = small_step(2);
    let ids: Vec<u32> = step.pieces[0].ids.iter().map(|id| u32::from(*id)).collect();
    let piece = Piece { rank: 1, rows: &step.pieces[0].rows, ids: &ids, weights: &[] };
    step::encode(&mut payload, &header(WeightFormat::None), &step.info, &[piece]);
    let expected = [
        &[2, 0xd0, 0x0f, 0x84, 0x07, 3, 3, 1][..], // step 2 at 2000 us for 900 us, placement 3, 3 rows, 1 piece
        &[1, 3],                                   // rank 1, 3 rows
        &[0, 18, 4],                               // prefill, request 0 + 9, position 4
        &[4],                                      // prefill, the next position
        &[1, 3, 30],                               // decode, request 9 - 2, position 30
        &[0x88, 0x46, 0x70, 0x0a, 0x08],           // ids 0 1 2 3 4 0 4 3 2 1 0 4 in 3 bits each
    ]
    .concat();
    assert_eq!(payload, expected);
}

#[test]
fn load_of_a_step() {
    let mut load = LoadWindow::new(&[1, 2], 5);
    small_step(0).add_to(&mut load);
    step_of(1, Vec::new()).add_to(&mut load);
    assert_eq!(load.counts(Phase::Prefill, 0), [1, 1, 1, 1, 0]);
    assert_eq!(load.counts(Phase::Decode, 0), [1, 0, 0, 0, 1]);
    assert_eq!(load.counts(Phase::Prefill, 1), [0, 1, 1, 1, 1]);
    assert_eq!(load.counts(Phase::Decode, 1), [1, 0, 0, 0, 1]);
}

#[test]
fn headers_that_are_refused() {
    let refused = |change: fn(&mut TraceHeader)| {
        let mut header = header(WeightFormat::None);
        change(&mut header);
        let folder = tempfile::tempdir().unwrap();
        let error = TraceWriter::create(&folder.path().join("run.trace"), header).unwrap_err();
        let (record, why) = why(error);
        assert_eq!(record, 0);
        why
    };
    for (message, expected) in [
        (refused(|h| h.top_k = 6), "top_k 6 is not within 1..=5"),
        (refused(|h| h.top_k = 0), "top_k 0"),
        (refused(|h| h.degrees.tensor = 0), "degrees 0 x 2 x 1"),
        (refused(|h| h.degrees.tensor = usize::MAX), "are not within 1..=65536 ranks"),
        (refused(|h| h.degrees.expert = 4), "degree 4 for a placement on 2 ranks"),
        (refused(|h| h.node_of_rank = vec![0]), "1 entries for 2 ranks"),
        (
            refused(|h| *h.cost.get_mut("expert_ns_per_token").unwrap() = f64::NAN),
            "expert_ns_per_token is NaN",
        ),
    ] {
        assert!(message.contains(expected), "{message:?} should contain {expected:?}");
    }
}

#[test]
fn a_cut_anywhere_keeps_what_came_before() {
    let (_, records, bytes) = sample();
    let mut clean_ends = 0;
    for length in 0..bytes.len() {
        let mut reader = match TraceReader::new(&bytes[..length]) {
            Ok(reader) => reader,
            Err(error) => {
                assert_eq!(why(error).0, 0);
                continue;
            }
        };
        let mut read = 0;
        let mut failed = None;
        for record in reader.by_ref() {
            match record {
                Ok(record) => {
                    assert_eq!(record, records[read]);
                    read += 1;
                }
                Err(error) => failed = Some(why(error)),
            }
        }
        assert_eq!(reader.end(), None);
        match failed {
            Some((record, why)) => {
                assert_eq!(record, read as u64 + 1);
                assert!(why.contains("cut "), "{why}");
            }
            None => clean_ends += 1,
        }
    }
    assert_eq!(clean_ends, records.len() + 1);
}

/// The sample's preamble and header, then the given frames.
fn with_frames(frames: &[(u8, &[u8])]) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    put_frame(&mut bytes, tag::HEADER, &header(WeightFormat::None).encode().unwrap());
    frames.iter().for_each(|(tag, payload)| put_frame(&mut bytes, *tag, payload));
    bytes
}

#[test]
fn frames_of_later_versions_are_skipped() {
    let moves = br#"{"step":1,"version":2,"slots":3,"bytes":4,"duration_us":5,"new_key":[6]}"#;
    let bytes = with_frames(&[(200, b"whatever"), (tag::MOVES, moves), (99, b"")]);
    let mut reader = TraceReader::new(&bytes[..]).unwrap();
    let expected = Moves { step: 1, version: 2, slots: 3, bytes: 4, duration_us: 5 };
    assert_eq!(reader.next().unwrap().unwrap(), Record::Event(Event::Moves(expected)));
    assert!(reader.next().is_none());
    assert_eq!(reader.skipped(), 2);
}

#[test]
fn bad_records_are_named() {
    let bad = |tag: u8, payload: &[u8]| {
        let bytes = with_frames(&[(99, b"skipped"), (tag, payload), (tag::STEP, &[7, 0, 0, 0, 0, 0])]);
        let mut reader = TraceReader::new(&bytes[..]).unwrap();
        let (record, why) = why(reader.next().unwrap().unwrap_err());
        assert_eq!(record, 2);
        // The frame was sound, so the next record can be read.
        let next = reader.next();
        assert!(matches!(&next, Some(Ok(Record::Step(step))) if step.info.step == 7), "{why}: {next:?}");
        why
    };
    // step 1, 1 row, 1 piece of rank 0 with 1 row: decode, request 0, position 0, then 4 ids of 3 bits.
    let good = [1, 0, 0, 0, 1, 1, 0, 1, 1, 0, 0, 0o21, 0];
    let with = |index: usize, value: u8| {
        let mut payload = good;
        payload[index] = value;
        payload
    };
    for (message, expected) in [
        (bad(tag::STEP, &with(11, 0o76)), "step 1: expert 6 of 5"),
        (bad(tag::STEP, &with(6, 2)), "step 1: rank 2 of 2"),
        (bad(tag::STEP, &with(5, 3)), "step 1: 3 pieces from 2 ranks"),
        (bad(tag::STEP, &with(7, 100)), "step 1: 100 rows in 5 bytes"),
        (bad(tag::STEP, &with(4, 0)), "step 1: 1 rows listed where 0 ran"),
        (bad(tag::STEP, &with(8, 4)), "row 0 continues where nothing precedes"),
        (bad(tag::STEP, &with(8, 8)), "row 0 has unknown flags 0x08"),
        (bad(tag::STEP, &good[..12]), "bytes are due where the payload has 1 left"),
        (bad(tag::STEP, &[&good[..], &[0]].concat()), "step 1: 1 bytes too many"),
        (bad(tag::GAP, b"{}"), "missing field"),
        (bad(tag::MOVES, b"\xff"), "expected value"),
        (bad(tag::HEADER, b"{}"), "a second header"),
        (
            bad(
                tag::SWITCH,
                br#"{"step":1,"placement_version":1,"placement":{"physical_to_logical_map":[]}}"#,
            ),
            "0 lists",
        ),
    ] {
        assert!(message.contains(expected), "{message:?} should contain {expected:?}");
    }
    let bytes = with_frames(&[(tag::STEP, &good)]);
    assert!(TraceReader::new(&bytes[..]).unwrap().next().unwrap().is_ok());
}

#[test]
fn bad_streams_are_refused() {
    let refused = |bytes: &[u8]| match TraceReader::new(bytes) {
        Ok(reader) => why(reader.last().unwrap().unwrap_err()).1,
        Err(error) => why(error).1,
    };
    let good = with_frames(&[(tag::END, br#"{"steps":0,"lost_steps":0,"lost_events":0}"#)]);
    let flipped = |index: usize| {
        let mut bytes = good.clone();
        bytes[index] ^= 1;
        bytes
    };
    let absurd = [&good[..10], &[1, 0xff, 0xff, 0xff, 0xff, 0x7f]].concat();
    for (message, expected) in [
        (refused(b""), "the trace is empty"),
        (refused(b"MOE"), "not a routing trace"),
        (
            refused(b"\x93NUMPY\x01\x00 some other file"),
            "not a routing trace: it does not begin with \"MOEROUTE\"",
        ),
        (refused(&good[..9]), "cut within its version"),
        (refused(&flipped(8)), "version 0 is unknown, this reader knows 1"),
        (refused(&good[..10]), "ends before its header"),
        (refused(&flipped(10)), "tag 0 where the header (tag 1) is due"),
        (refused(&flipped(30)), "checksum"),
        (refused(&absurd), "a payload of 34359738367 bytes exceeds the limit of 67108864"),
        (refused(&[&good[..], b"\x02\x00\x00\x00\x00\x00"].concat()), "checksum"),
        (
            refused(&with_frames(&[(tag::END, br#"{"steps":0,"lost_steps":0,"lost_events":0}"#), (99, b"")])),
            "after the end",
        ),
    ] {
        assert!(message.contains(expected), "{message:?} should contain {expected:?}");
    }
}

/// A sink that waits for permission before every write.
struct Gate {
    permits: mpsc::Receiver<()>,
    out: mpsc::Sender<Vec<u8>>,
}

impl Write for Gate {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.permits.recv().map_err(|_| io::Error::from(io::ErrorKind::StorageFull))?;
        self.out.send(bytes.to_vec()).unwrap();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_blocked_sink_loses_records_and_says_where() {
    let (permit, permits) = mpsc::channel();
    let (out, written) = mpsc::channel();
    let start = move || Ok(Gate { permits, out });
    let mut writer = TraceWriter::start(Path::new("gate"), header(WeightFormat::None), start).unwrap();
    let counters = writer.counters();
    // The thread has the header in hand and waits; all buffers fill, and the rest is lost.
    let steps = writer::QUEUE_RECORDS as u64 + 10;
    (0..steps).for_each(|step| record_step(&mut writer, &small_step(step)));
    writer.event(&events()[0]);
    assert_eq!(counters.lost_records(), 11);
    // Let everything out, wait until the last buffered step is written, then record again.
    let mut bytes = Vec::new();
    for _ in 0..=writer::QUEUE_RECORDS {
        permit.send(()).unwrap();
        bytes.extend(written.recv_timeout(PATIENCE).unwrap());
    }
    (0..2).for_each(|_| permit.send(()).unwrap());
    record_step(&mut writer, &small_step(steps));
    writer.finish(PATIENCE).unwrap();
    bytes.extend(written.iter().flatten());

    let mut reader = TraceReader::new(&bytes[..]).unwrap();
    let records: Vec<Record> = reader.by_ref().map(Result::unwrap).collect();
    let kept = writer::QUEUE_RECORDS;
    assert_eq!(records.len(), kept + 2);
    assert_eq!(records[kept - 1], Record::Step(small_step(kept as u64 - 1)));
    // The event belongs to step 4, after a loss of later ones: a gap spans what was lost.
    let gap = Gap { first_step: 4, last_step: steps - 1, steps: 10, events: 1 };
    assert_eq!(records[kept], Record::Gap(gap));
    assert_eq!(records[kept + 1], Record::Step(small_step(steps)));
    assert_eq!(reader.end(), Some(&End { steps: steps + 1, lost_steps: 10, lost_events: 1 }));
}

#[test]
fn a_failing_sink_stops_the_trace_only() {
    let (permit, permits) = mpsc::channel();
    let (out, written) = mpsc::channel();
    let start = move || Ok(Gate { permits, out });
    let mut writer = TraceWriter::start(Path::new("gate"), header(WeightFormat::None), start).unwrap();
    let counters = writer.counters();
    (0..2).for_each(|_| permit.send(()).unwrap());
    drop(permit);
    (0..1000).for_each(|step| record_step(&mut writer, &small_step(step)));
    let error = writer.finish(PATIENCE).unwrap_err().to_string();
    assert!(error.starts_with("gate: "), "{error}");
    assert_eq!(counters.errors(), 1);
    // The header and step 0 were written; step 1 failed.
    assert_eq!((counters.written_records(), counters.lost_records()), (1, 999));
    let bytes: Vec<u8> = written.iter().flatten().collect();
    let records: Vec<Record> = TraceReader::new(&bytes[..]).unwrap().map(Result::unwrap).collect();
    assert_eq!(records, [Record::Step(small_step(0))]);
}

/// About 1 KB: the queue holds more of these than a pipe does.
fn large_step(step: u64) -> StepRecord {
    let rows: Vec<RowInfo> = (0..400).map(|position| row(1, position, Phase::Prefill)).collect();
    step_of(step, vec![PieceRecord { rank: 0, rows, ids: vec![3; 1600], weights: Vec::new() }])
}

#[test]
fn a_pipe_that_nobody_reads_holds_nobody_up() {
    let (mut reader, sink) = io::pipe().unwrap();
    let mut writer = TraceWriter::start(Path::new("pipe"), header(WeightFormat::None), || Ok(sink)).unwrap();
    let counters = writer.counters();
    (0..2000).for_each(|step| record_step(&mut writer, &large_step(step)));
    assert!(counters.lost_records() > 0);
    // The pipe is full, so the end cannot be written.
    let error = writer.finish(Duration::from_millis(1)).unwrap_err().to_string();
    assert!(error.contains("not written within"), "{error}");
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes).unwrap();
    let mut reader = TraceReader::new(&bytes[..]).unwrap();
    assert!(reader.by_ref().all(|record| record.is_ok()));
    assert_eq!(reader.end().unwrap().lost_steps, counters.lost_records());
}

#[test]
fn a_named_pipe_may_find_its_reader_later() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.trace");
    assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
    let mut writer = TraceWriter::create(&path, header(WeightFormat::None)).unwrap();
    record_step(&mut writer, &small_step(0));
    let mut input = File::open(&path).unwrap();
    writer.finish(PATIENCE).unwrap();
    let mut bytes = Vec::new();
    input.read_to_end(&mut bytes).unwrap();
    let records: Vec<Record> = TraceReader::new(&bytes[..]).unwrap().map(Result::unwrap).collect();
    assert_eq!(records, [Record::Step(small_step(0))]);
}

#[test]
fn paths_that_cannot_be_written_are_refused_at_once() {
    let folder = tempfile::tempdir().unwrap();
    for path in [folder.path().to_owned(), folder.path().join("absent/run.trace")] {
        let error = TraceWriter::create(&path, header(WeightFormat::None)).unwrap_err();
        assert!(matches!(error, Error::Io { path: at, .. } if at == path));
    }
}

#[test]
fn parts_of_a_step_join_in_rank_order() {
    let piece = |rank| PieceRecord {
        rank,
        rows: vec![row(1, 2, Phase::Decode)],
        ids: vec![0; 4],
        weights: Vec::new(),
    };
    let part = |step: u64, rank: usize| {
        let mut part = step_of(step, vec![piece(rank)]);
        part.info.rows = 2;
        part
    };
    let mut joiner = StepJoiner::default();
    assert_eq!(joiner.push(part(1, 1)), Ok(None));
    assert_eq!(joiner.push(part(2, 0)), Ok(None));
    assert_eq!(joiner.push(small_step(5)), Ok(Some(small_step(5))));
    assert_eq!(joiner.push(part(1, 0)), Ok(Some(step_of(1, vec![piece(0), piece(1)]))));
    assert_eq!(joiner.incomplete(), 1);
    let mut odd = part(2, 1);
    odd.info.start_us += 1;
    assert!(joiner.push(odd).unwrap_err().contains("step 2: parts say"));
    // Open steps are bounded.
    (100..300).for_each(|step| assert_eq!(joiner.push(part(step, 0)), Ok(None)));
    assert_eq!(joiner.incomplete(), 201);
    assert!(joiner.push(part(299, 1)).unwrap().is_some());
}

fn steps(weights: WeightFormat) -> impl Strategy<Value = Vec<StepRecord>> {
    let row = (any::<u64>(), any::<u64>(), any::<bool>(), any::<bool>(), any::<bool>());
    let piece = (0usize..2, prop::collection::vec(row, 0..6)).prop_flat_map(move |(rank, rows)| {
        let mut infos: Vec<RowInfo> = Vec::new();
        for (request, position, decode, recomputed, continues) in rows {
            let phase = if decode { Phase::Decode } else { Phase::Prefill };
            let (request, position) = match infos.last() {
                Some(last) if continues => (last.request, last.position.wrapping_add(1)),
                _ => (request, position),
            };
            infos.push(RowInfo { request, position, phase, recomputed });
        }
        let ids = infos.len() * 4;
        let stored = if weights == WeightFormat::None { 0 } else { ids };
        // Multiples of 1/64 are exact in bf16.
        let weight = (0u8..=64).prop_map(|w| f32::from(w) / 64.0);
        (prop::collection::vec(0u16..5, ids), prop::collection::vec(weight, stored))
            .prop_map(move |(ids, weights)| PieceRecord { rank, rows: infos.clone(), ids, weights })
    });
    let step = (any::<[u64; 4]>(), prop::collection::vec(piece, 0..=2), 0u64..3).prop_map(
        |([step, start_us, duration_us, placement_version], pieces, elsewhere)| {
            let rows = pieces.iter().map(|piece| piece.rows.len() as u64).sum::<u64>() + elsewhere;
            StepRecord { info: StepInfo { step, start_us, duration_us, placement_version, rows }, pieces }
        },
    );
    prop::collection::vec(step, 0..4)
}

fn traces() -> impl Strategy<Value = (WeightFormat, Vec<StepRecord>)> {
    prop_oneof![Just(WeightFormat::None), Just(WeightFormat::F32), Just(WeightFormat::Bf16)]
        .prop_flat_map(|weights| steps(weights).prop_map(move |steps| (weights, steps)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_steps_round_trip((weights, steps) in traces()) {
        let records: Vec<Record> = steps.into_iter().map(Record::Step).collect();
        let bytes = written(&header(weights), &records);
        let back: Result<Vec<_>, _> = TraceReader::new(&bytes[..]).unwrap().collect();
        prop_assert_eq!(back.unwrap(), records);
    }

    #[test]
    fn damage_never_panics(edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
        let (_, _, mut bytes) = sample();
        for (index, value) in edits {
            let index = index.index(bytes.len());
            bytes[index] = value;
        }
        if let Ok(reader) = TraceReader::new(&bytes[..]) {
            reader.for_each(drop);
        }
    }
}

proptest! {
    #[test]
    fn arbitrary_payloads_never_panic(tag in 0u8..9, payload in prop::collection::vec(any::<u8>(), 0..80)) {
        let bytes = with_frames(&[(tag, &payload)]);
        TraceReader::new(&bytes[..]).unwrap().for_each(drop);
        let mut stream = MAGIC.to_vec();
        stream.extend_from_slice(&VERSION.to_le_bytes());
        stream.extend_from_slice(&payload);
        prop_assert!(TraceReader::new(&stream[..]).is_err());
        prop_assert!(TraceReader::new(&payload[..]).is_err());
    }
}
