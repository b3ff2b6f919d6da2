//! Every format is recognised, read to the same numbers, and survives being mangled.

mod samples;

use std::fs;
use std::path::Path;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use router_sim::formats::{self, Format, Input, Options};
use router_sim::load::{LoadWindow, Phase};
use router_sim::stream::{TokenBatch, TokenStream};
use samples::{EXPERTS, LAYERS, TOKENS, TOP_K, Tokens, expert, write_all};

/// Reads a whole file: rows or windows, and records left out.
fn drain(path: &Path, options: &Options) -> router_sim::Result<(usize, u64)> {
    match formats::open(path, options)? {
        Input::Tokens(mut tokens) => {
            let (mut batch, mut rows) = (TokenBatch::default(), 0);
            let shape = tokens.shape().clone();
            while tokens.next_batch(&mut batch)? {
                assert_eq!(batch.ids.len(), batch.rows.len() * shape.ids_per_row());
                assert!(batch.ids.iter().all(|id| usize::from(*id) < shape.experts));
                let weights = if shape.weights { batch.ids.len() } else { 0 };
                assert_eq!(batch.weights.len(), weights);
                rows += batch.rows.len();
            }
            Ok((rows, tokens.skipped()))
        }
        Input::Loads(mut loads) => {
            let (mut window, mut windows) = (loads.empty_window(), 0);
            while loads.next_window(&mut window)? {
                windows += 1;
            }
            Ok((windows, loads.skipped()))
        }
    }
}

/// Tokens of each expert over all samples' tokens.
fn expected_load(layer_ids: &[usize]) -> LoadWindow {
    let mut load = LoadWindow::new(layer_ids, EXPERTS);
    for layer in 0..LAYERS {
        for token in 0..TOKENS {
            (0..TOP_K).for_each(|k| load.counts_mut(Phase::Prefill, layer)[expert(token, layer, k)] += 1);
        }
    }
    load
}

fn totals(load: &LoadWindow) -> Vec<Vec<u64>> {
    (0..load.layers()).map(|layer| load.totals(layer).collect()).collect()
}

#[test]
fn every_format_is_recognised_and_counts_alike() {
    let folder = tempfile::tempdir().unwrap();
    for (format, path) in write_all(folder.path()) {
        // Named and recognised.
        let by_name = drain(&path, &Options { format: Some(format), ..Options::default() }).unwrap();
        assert_eq!(drain(&path, &Options::default()).unwrap(), by_name, "{}", path.display());
        assert_eq!(by_name.1, 0, "{}", path.display());
        if matches!(format, Format::SglangPt | Format::Trtllm) {
            continue;
        }
        let (load, _) = formats::read_total(&path, &Options { experts: Some(EXPERTS), ..Options::default() })
            .unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(totals(&load), totals(&expected_load(load.layer_ids())), "{}", path.display());
        let named = matches!(
            format,
            Format::Trace | Format::TokensJsonl | Format::Moetrace | Format::LoadCsv | Format::LoadJson
        );
        let first = usize::from(named);
        assert_eq!(load.layer_ids(), (first..first + LAYERS).collect::<Vec<_>>(), "{}", path.display());
        // Experts are counted where nobody says how many there are.
        let (load, _) = formats::read_total(&path, &Options::default()).unwrap();
        assert_eq!(load.experts(), EXPERTS, "{}", path.display());
    }
}

/// Everything of a token stream, put together.
fn all(mut tokens: impl TokenStream) -> TokenBatch {
    let (mut batch, mut whole) = (TokenBatch::default(), TokenBatch::default());
    let mut per_layer: Vec<Vec<u16>> = vec![Vec::new(); tokens.shape().layers()];
    while tokens.next_batch(&mut batch).unwrap() {
        whole.rows.append(&mut batch.rows.clone());
        whole.weights.extend(&batch.weights);
        for (layer, ids) in per_layer.iter_mut().enumerate() {
            ids.extend(batch.layer(layer, tokens.shape().layers()));
        }
    }
    whole.ids = per_layer.concat();
    whole
}

#[test]
fn token_formats_keep_what_they_can_hold() {
    let folder = tempfile::tempdir().unwrap();
    write_all(folder.path());
    let original = all(Tokens::new());
    let open = |name: &str| formats::open_tokens(&folder.path().join(name), &Options::default()).unwrap();
    assert_eq!(open("tokens.jsonl").shape(), Tokens::new().shape());
    assert_eq!(all(open("tokens.jsonl")).rows, original.rows);
    let trace = all(open("sample.moeroute"));
    assert_eq!(trace.weights, original.weights);
    for (read, written) in trace.rows.iter().zip(&original.rows) {
        assert_eq!((read.info, read.rank), (written.info, written.rank));
    }
    for name in [
        "tokens.jsonl",
        "sample.moeroute",
        "routed.npy",
        "routed.npz",
        "route.jsonl",
        "batches.jsonl",
        "sample.moetrace",
    ] {
        assert_eq!(all(open(name)).ids, original.ids, "{name}");
    }
    assert_eq!(all(open("route.jsonl")).weights.len(), original.weights.len());
}

#[test]
fn labels_select_tokens() {
    let folder = tempfile::tempdir().unwrap();
    write_all(folder.path());
    for name in ["tokens.jsonl", "sample.moetrace"] {
        let labelled = |labels: &[&str]| {
            let labels = labels.iter().map(|label| (*label).to_owned()).collect();
            drain(&folder.path().join(name), &Options { labels, ..Options::default() }).map(|(rows, _)| rows)
        };
        assert_eq!(labelled(&["novel"]).unwrap(), 4);
        assert_eq!(labelled(&["code"]).unwrap(), 3);
        assert_eq!(labelled(&["co*"]).unwrap(), 3);
        assert_eq!(labelled(&["code", "novel"]).unwrap(), 7);
        let message = labelled(&["cod"]).unwrap_err().to_string();
        assert!(message.contains("label \"cod\" is unknown, expected one of novel, code"), "{message}");
    }
    let options = Options { labels: vec!["novel".into()], ..Options::default() };
    for name in ["sample.moeroute", "routed.npy", "load.csv", "stat.pt"] {
        let message = drain(&folder.path().join(name), &options).unwrap_err().to_string();
        assert!(message.contains("tokens carry no labels"), "{message}");
    }
}

#[test]
fn sglang_slots_become_experts_and_dense_layers_go() {
    let folder = tempfile::tempdir().unwrap();
    write_all(folder.path());
    let load = |name: &str| formats::read_total(&folder.path().join(name), &Options::default()).unwrap().0;
    let stat = load("stat.pt");
    assert_eq!(stat.layer_ids(), [1, 2]);
    // Steps 0 and 1: 100 step + 10 layer + expert.
    assert_eq!(totals(&stat), [[120, 122, 124, 126], [140, 142, 144, 146]]);
    let bare = load("bare.pt");
    assert_eq!(
        (bare.layer_ids(), totals(&bare)),
        (&[1, 2][..], vec![vec![10, 11, 12, 13], vec![20, 21, 22, 23]])
    );
    let pass = load("per_pass.pt");
    // Passes 0 and 1: 10 pass + layer + slot; slots 4 and 5 hold experts 0 and 3.
    assert_eq!(pass.layer_ids(), [1, 2]);
    assert_eq!(totals(&pass)[0], [12 + 20, 14, 16, 18 + 22]);
    let mut tokens = formats::open_tokens(&folder.path().join("per_token.pt"), &Options::default()).unwrap();
    assert_eq!((tokens.shape().experts, tokens.shape().top_k), (4, 2));
    let mut batch = TokenBatch::default();
    assert!(tokens.next_batch(&mut batch).unwrap());
    // The last token of each pass is padding; token t of layer l is on slots t + l and t + l + 1.
    assert_eq!(batch.rows.len(), 4);
    assert_eq!(batch.layer(0, 2), [1, 2, 2, 3, 3, 0, 0, 3]);
    let who: Vec<_> =
        batch.rows.iter().map(|row| (row.info.request, row.info.position, row.info.phase)).collect();
    let prefill = Phase::Prefill;
    assert_eq!(who, [(0, 0, prefill), (0, 1, prefill), (0, 2, prefill), (1, 0, prefill)]);
    assert!(tokens.next_batch(&mut batch).unwrap());
    assert!(batch.rows.iter().all(|row| row.info.phase == Phase::Decode && row.info.position == 30));
    assert!(!tokens.next_batch(&mut batch).unwrap());
}

#[test]
fn trtllm_ranks_are_summed() {
    let folder = tempfile::tempdir().unwrap();
    write_all(folder.path());
    let (windows, _) =
        formats::read_windows(&folder.path().join("statistics"), &Options::default(), 9).unwrap();
    assert_eq!(windows.len(), 2);
    assert_eq!(windows[0].layer_ids(), [3, 4]);
    assert_eq!(windows[1].totals(1).nth(7), Some(2 * (200 + 40 + 7) + 1));
}

/// Flips, overwrites, cuts, drops or repeats some bytes.
fn mangle(bytes: &[u8], random: &mut ChaCha8Rng) -> Vec<u8> {
    let mut mangled = bytes.to_vec();
    for _ in 0..random.random_range(1..4) {
        if mangled.is_empty() {
            break;
        }
        let at = random.random_range(0..mangled.len());
        match random.random_range(0..6) {
            0 => mangled[at] ^= 1 << random.random_range(0..8),
            1 => mangled[at] = [0, 1, 0x7f, 0x80, 0xff, b'9', b'-'][random.random_range(0..7)],
            2 => mangled.truncate(at),
            3 => drop(mangled.drain(at..mangled.len().min(at + random.random_range(1..9)))),
            4 => {
                let run = mangled[at..mangled.len().min(at + random.random_range(1..9))].to_vec();
                mangled.splice(at..at, run);
            }
            _ => {
                let end = mangled.len().min(at + 8);
                mangled[at..end].fill(0xff);
            }
        }
    }
    mangled
}

#[test]
fn mangled_files_are_refused_or_read_but_never_panic() {
    const ROUNDS: u64 = 60;
    let folder = tempfile::tempdir().unwrap();
    let mangled_folder = tempfile::tempdir().unwrap();
    for (format, path) in write_all(folder.path()) {
        let (target, file) = match format {
            Format::Trtllm => {
                let copy = mangled_folder.path().join("statistics");
                fs::create_dir_all(&copy).unwrap();
                fs::copy(path.join("meta_info.json"), copy.join("meta_info.json")).unwrap();
                (copy.clone(), copy.join("rank0.safetensors"))
            }
            _ => {
                let copy = mangled_folder.path().join(path.file_name().unwrap());
                (copy.clone(), copy)
            }
        };
        let original = match format {
            Format::Trtllm => fs::read(path.join("rank0.safetensors")).unwrap(),
            _ => fs::read(&path).unwrap(),
        };
        let mut refused = 0;
        for seed in 0..ROUNDS {
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            fs::write(&file, mangle(&original, &mut random)).unwrap();
            let strict = drain(&target, &Options { format: Some(format), ..Options::default() });
            let lenient = Options { format: Some(format), lenient: true, ..Options::default() };
            if let (Ok(_), Err(error)) = (&strict, drain(&target, &lenient)) {
                panic!("{format}, seed {seed}: read strictly, but leniently: {error}");
            }
            refused += u64::from(strict.is_err());
            // What it looks like now may be something else.
            let _ = drain(&target, &Options::default());
        }
        assert!(refused > ROUNDS / 8, "{format}: only {refused} of {ROUNDS} mangled files were refused");
    }
    assert_memory_stays_small();
}

/// No length that a file claims is believed before its bytes are there.
fn assert_memory_stays_small() {
    let Ok(status) = fs::read_to_string("/proc/self/status") else { return };
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib: u64 = peak.unwrap().trim().trim_end_matches(" kB").parse().unwrap();
    assert!(kib < 400 << 10, "a peak of {kib} KiB");
}

#[test]
fn lenient_readers_count_what_they_leave_out() {
    let folder = tempfile::tempdir().unwrap();
    write_all(folder.path());
    let with = |name: &str, from: &str, to: &str| {
        let text = fs::read_to_string(folder.path().join(name)).unwrap();
        assert!(text.contains(from), "{name} has no {from}");
        let path = folder.path().join(format!("bad-{name}"));
        fs::write(&path, text.replacen(from, to, 1)).unwrap();
        path
    };
    for (path, kept, record) in [
        // Record 0 is the first line.
        (with("tokens.jsonl", "\"experts\":[[0,5]", "\"experts\":[[0,10]"), 6, 1),
        (with("route.jsonl", "\"topk_ids\": [0, 5]", "\"topk_ids\": [-1, 5]"), 6, 1),
        (with("load.csv", "0,2,", "0,2,-"), 1, 2),
        (with("load.json", "[[", "[[-1"), 1, 0),
    ] {
        let options = Options { experts: Some(EXPERTS), ..Options::default() };
        let message = drain(&path, &options).unwrap_err().to_string();
        assert!(message.contains(&format!("record {record}: ")), "{message}");
        let lenient = drain(&path, &Options { lenient: true, ..options }).unwrap();
        assert_eq!(lenient.0, kept, "{}", path.display());
        assert!(lenient.1 >= 1, "{}", path.display());
    }
}

#[test]
fn an_array_that_claims_more_than_there_is_is_cut() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cut.npy");
    write_all(folder.path());
    let bytes = fs::read(folder.path().join("routed.npy")).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 3]).unwrap();
    let options = |lenient| Options {
        experts: Some(EXPERTS),
        format: Some(Format::RoutedNpy),
        lenient,
        ..Options::default()
    };
    let message = drain(&path, &options(false)).unwrap_err().to_string();
    assert!(message.ends_with("record 6: cut after 3 of 6 bytes"), "{message}");
    assert_eq!(drain(&path, &options(true)).unwrap(), (6, 1));
}
