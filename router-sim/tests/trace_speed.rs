//! What recording costs: bytes per token, and the time of the serving side per token. `cargo test --release -p
//! router-sim --test trace_speed -- --nocapture` prints the figures.

use std::time::{Duration, Instant};

use router_sim::load::{LoadWindow, Phase};
use router_sim::placement::{ClusterShape, Linear, PlacementPolicy};
use router_sim::trace::{
    Degrees, Piece, Record, RowInfo, StepInfo, TraceHeader, TraceReader, TraceWriter, WeightFormat,
};

const RANKS: usize = 8;

fn header(layers: usize, experts: usize, top_k: usize) -> TraceHeader {
    let layer_ids: Vec<usize> = (0..layers).collect();
    let cluster = ClusterShape { ranks: RANKS, redundant: 0 };
    TraceHeader {
        spec_digest: String::new(),
        family: String::new(),
        top_k,
        degrees: Degrees { tensor: 1, data: RANKS, expert: RANKS, pipeline: 1 },
        node_of_rank: vec![0; RANKS],
        policy: Default::default(),
        cost: Default::default(),
        weights: WeightFormat::None,
        placement: Linear.place(&LoadWindow::new(&layer_ids, experts), &cluster).unwrap(),
    }
}

/// Records `steps` decode steps of 64 rows over 8 ranks and checks what it costs and that all of it comes back.
fn measure(name: &str, layers: usize, experts: usize, top_k: usize, bytes_per_token: f64) {
    let header = header(layers, experts, top_k);
    let (steps, rows_per_rank) = (200u64, 8usize);
    // Any ids do; multiplying by an odd number scatters them.
    let ids: Vec<u32> = (0..rows_per_rank * layers * top_k)
        .map(|i| (i as u32).wrapping_mul(2_654_435_761) % experts as u32)
        .collect();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.trace");
    let mut writer = TraceWriter::create(&path, header).unwrap();
    let counters = writer.counters();
    let start = Instant::now();
    let mut serving = Vec::new();
    for step in 0..steps {
        let rows: Vec<Vec<RowInfo>> = (0..RANKS)
            .map(|rank| {
                let request = |i| (rank * rows_per_rank + i) as u64;
                let of = |i| RowInfo {
                    request: request(i),
                    position: 500 + step,
                    phase: Phase::Decode,
                    recomputed: false,
                };
                (0..rows_per_rank).map(of).collect()
            })
            .collect();
        let pieces: Vec<Piece<'_>> = rows
            .iter()
            .enumerate()
            .map(|(rank, rows)| Piece { rank, rows, ids: &ids, weights: &[] })
            .collect();
        let rows = (RANKS * rows_per_rank) as u64;
        let info =
            StepInfo { step, start_us: 30_000 * step, duration_us: 29_000, placement_version: 0, rows };
        // A serving engine computes between two steps; here the thread is given the time to write.
        while counters.written_records() < step {
            assert_eq!(counters.errors(), 0, "a step was not written");
            std::thread::yield_now();
        }
        let begin = Instant::now();
        writer.step(&info, &pieces);
        serving.push(begin.elapsed());
    }
    writer.finish(Duration::from_secs(60)).unwrap();
    let wall = start.elapsed().as_secs_f64();
    assert_eq!(counters.lost_records(), 0);
    serving.sort_unstable();
    let tokens = (steps as usize * RANKS * rows_per_rank) as f64;
    let measured = counters.written_bytes() as f64 / tokens;

    let start = Instant::now();
    let mut load = LoadWindow::new(&(0..layers).collect::<Vec<_>>(), experts);
    for record in TraceReader::open(&path).unwrap() {
        let Record::Step(step) = record.unwrap() else { panic!("only steps were recorded") };
        assert!(step.is_whole());
        step.add_to(&mut load);
    }
    let reading = start.elapsed().as_secs_f64();
    assert_eq!(load.totals(layers - 1).sum::<u64>(), tokens as u64 * top_k as u64);
    println!(
        "{name}: {measured:.1} B/token; serving side {:.3} us/token (median step); written {:.2} M tokens/s, read and counted {:.2} M tokens/s",
        serving[serving.len() / 2].as_secs_f64() * 1e6 / (RANKS * rows_per_rank) as f64,
        tokens / wall / 1e6,
        tokens / reading / 1e6,
    );
    assert!(measured < bytes_per_token, "{name}: {measured:.1} B/token, the limit is {bytes_per_token}");
}

#[test]
fn bytes_and_time_per_token() {
    measure("Mixtral, 32 layers x 2 of 8", 32, 8, 2, 30.0);
    measure("gpt-oss-20b, 24 layers x 4 of 32", 24, 32, 4, 66.0);
    measure("DeepSeek-V3, 58 layers x 8 of 256", 58, 256, 8, 480.0);
}
