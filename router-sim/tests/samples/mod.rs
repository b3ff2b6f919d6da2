//! A small file of every format that is read, with numbers that tests can predict.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use router_sim::formats::{self, Format, Options, write};
use router_sim::load::Phase;
use router_sim::stream::{TokenBatch, TokenRow, TokenShape, TokenStream};
use router_sim::trace::RowInfo;
use safetensors::tensor::{Dtype, TensorView};

/// Tokens of the samples, MoE layers, experts, experts per token.
pub const TOKENS: usize = 7;
pub const LAYERS: usize = 3;
pub const EXPERTS: usize = 10;
pub const TOP_K: usize = 2;

/// Expert `k` of a token in a layer.
pub fn expert(token: usize, layer: usize, k: usize) -> usize {
    (3 * token + layer + 5 * k) % EXPERTS
}

/// Tokens with everything that a stream can say, in batches of 4.
#[derive(Default)]
pub struct Tokens {
    shape: TokenShape,
    next: usize,
}

impl Tokens {
    pub fn new() -> Self {
        let shape = TokenShape {
            model: "sample".into(),
            layer_ids: (1..=LAYERS).collect(),
            experts: EXPERTS,
            top_k: TOP_K,
            ranks: Some(2),
            labels: vec!["novel".into(), "code".into()],
            weights: true,
        };
        Tokens { shape, next: 0 }
    }
}

impl TokenStream for Tokens {
    fn shape(&self) -> &TokenShape {
        &self.shape
    }

    fn next_batch(&mut self, batch: &mut TokenBatch) -> router_sim::Result<bool> {
        batch.clear();
        let tokens = self.next..TOKENS.min(self.next + 4);
        batch.step = self.next as u64 / 4;
        self.next = tokens.end;
        for (row, token) in tokens.clone().enumerate() {
            let phase = if token < 5 { Phase::Prefill } else { Phase::Decode };
            let (request, position) = (token as u64 / 5, token as u64 % 5);
            let info = RowInfo { request, position, phase, recomputed: token == 3 };
            batch.rows.push(TokenRow { info, rank: u32::from(row >= 2), label: (token % 2) as u16 });
        }
        for layer in 0..LAYERS {
            for token in tokens.clone() {
                for k in 0..TOP_K {
                    batch.ids.push(expert(token, layer, k) as u16);
                    batch.weights.push(0.5 + k as f32 / 4.0);
                }
            }
        }
        Ok(!tokens.is_empty())
    }

    fn skipped(&self) -> u64 {
        0
    }
}

/// Writes a sample of every format into a folder: format and path.
pub fn write_all(folder: &Path) -> Vec<(Format, PathBuf)> {
    let mut samples = Vec::new();
    for (format, name) in [
        (Format::Trace, "sample.moeroute"),
        (Format::TokensJsonl, "tokens.jsonl"),
        (Format::RoutedNpy, "routed.npy"),
    ] {
        let path = folder.join(name);
        write::tokens(&path, format, &mut Tokens::new()).unwrap();
        samples.push((format, path));
    }
    let trace = folder.join("sample.moeroute");
    for (format, name) in [
        (Format::LoadNpy, "load.npy"),
        (Format::LoadSafetensors, "load.safetensors"),
        (Format::LoadCsv, "load.csv"),
        (Format::LoadJson, "load.json"),
    ] {
        let path = folder.join(name);
        let mut loads = formats::open_loads(&trace, &Options::default()).unwrap();
        write::loads(&path, format, &mut loads).unwrap();
        samples.push((format, path));
    }
    let mut put = |format, name: &str, bytes: Vec<u8>| {
        let path = folder.join(name);
        fs::write(&path, bytes).unwrap();
        samples.push((format, path));
    };
    put(Format::Moetrace, "sample.moetrace", moetrace());
    put(Format::RouteJsonl, "route.jsonl", route_lines().into_bytes());
    put(Format::RouteJsonl, "batches.jsonl", batch_lines().into_bytes());
    put(Format::SglangPt, "stat.pt", include_bytes!("../pt/stat.pt").to_vec());
    put(Format::SglangPt, "bare.pt", include_bytes!("../pt/bare.pt").to_vec());
    put(Format::SglangPt, "per_pass.pt", include_bytes!("../pt/per_pass.pt").to_vec());
    put(Format::SglangPt, "per_token.pt", include_bytes!("../pt/per_token.pt").to_vec());
    put(Format::RoutedNpz, "routed.npz", npz("routed_experts.npy", &folder.join("routed.npy")));
    put(Format::LoadNpz, "load.npz", npz("load.npy", &folder.join("load.npy")));
    let statistics = folder.join("statistics");
    trtllm(&statistics);
    samples.push((Format::Trtllm, statistics));
    samples
}

fn moetrace() -> Vec<u8> {
    let header = format!(
        r#"{{"format": "moetrace1", "model": "sample", "layers": {LAYERS}, "first_moe_layer": 1, "tokens": {TOKENS}, "n_experts": {EXPERTS}, "top_k": {TOP_K}, "seq_len": 4, "domains": ["novel", "code"], "dtype": "u8"}}"#
    );
    let mut bytes = b"MOETRC01".to_vec();
    bytes.extend((header.len() as u32).to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend((0..TOKENS).map(|token| (token % 2) as u8));
    for layer in 0..LAYERS {
        for token in 0..TOKENS {
            bytes.extend((0..TOP_K).map(|k| expert(token, layer, k) as u8));
        }
    }
    bytes
}

/// Layer after layer, as a hook in a batch writes them.
fn route_lines() -> String {
    let mut text = String::from("{\"type\": \"meta\", \"model\": \"sample\"}\n");
    for layer in 0..LAYERS {
        for token in 0..TOKENS {
            let ids: Vec<usize> = (0..TOP_K).map(|k| expert(token, layer, k)).collect();
            text += &format!(
                "{{\"type\": \"route\", \"req_id\": \"a\", \"token_idx\": {token}, \"layer\": {layer}, \"topk_ids\": {ids:?}, \"topk_weights\": [0.5, 0.75]}}\n"
            );
        }
    }
    text
}

fn batch_lines() -> String {
    let mut text = String::new();
    for layer in 0..LAYERS {
        let ids: Vec<Vec<usize>> =
            (0..TOKENS).map(|token| (0..TOP_K).map(|k| expert(token, layer, k)).collect()).collect();
        text += &format!(
            "{{\"layer\": {layer}, \"batch_id\": 0, \"origin_rows\": {TOKENS}, \"topk_experts\": {ids:?}}}\n"
        );
    }
    text
}

fn npz(name: &str, npy: &Path) -> Vec<u8> {
    use std::io::Write;
    let mut archive = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    archive.start_file(name, zip::write::SimpleFileOptions::default()).unwrap();
    archive.write_all(&fs::read(npy).unwrap()).unwrap();
    archive.finish().unwrap().into_inner()
}

/// Two ranks, two iterations, layers 3 and 4: expert `e` of rank `r` has `100 iteration + 10 layer + e + r` tokens.
fn trtllm(folder: &Path) {
    fs::create_dir(folder).unwrap();
    let meta = format!("{{\"num_experts\": {EXPERTS}, \"num_experts_per_token\": {TOP_K}}}");
    fs::write(folder.join("meta_info.json"), meta).unwrap();
    for rank in 0..2 {
        let mut data = BTreeMap::new();
        for (iteration, layer) in [(1, 3), (1, 4), (2, 3), (2, 4)] {
            let count = |e| (100 * iteration + 10 * layer + e + rank) as i32;
            let bytes: Vec<u8> = (0..EXPERTS).flat_map(|e| count(e).to_le_bytes()).collect();
            data.insert(format!("{iteration}_{layer}"), bytes);
        }
        let views = data
            .iter()
            .map(|(name, bytes)| (name, TensorView::new(Dtype::I32, vec![EXPERTS], bytes).unwrap()));
        let file = safetensors::serialize(views, None).unwrap();
        fs::write(folder.join(format!("rank{rank}.safetensors")), file).unwrap();
    }
}
