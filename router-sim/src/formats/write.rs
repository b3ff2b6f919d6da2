//! Streams to files, whole or not at all, in the formats that can hold them.

use std::collections::BTreeMap;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

use super::source::Output;
use super::{Format, csv, in_file, json, jsonl, npy, safetensors};
use crate::load::LoadWindow;
use crate::placement::{ClusterShape, Linear, PlacementPolicy};
use crate::stream::{LoadStream, TokenBatch, TokenShape, TokenStream};
use crate::trace::{Degrees, Piece, StepInfo, TraceHeader, TraceSink, WeightFormat};
use crate::{Error, Result};

/// What a file of the format cannot hold of tokens, for people; `None` when the format holds no tokens.
pub fn lost_of_tokens(format: Format, shape: &TokenShape) -> Option<Vec<&'static str>> {
    let mut lost = Vec::new();
    match format {
        Format::Trace => {
            if !shape.labels.is_empty() {
                lost.push("labels");
            }
        }
        Format::TokensJsonl => lost.push("which tokens ran in one step"),
        Format::RoutedNpy => {
            lost.extend(["requests", "positions", "phases", "which tokens ran in one step", "layer indices"]);
            for (there, what) in [
                (shape.ranks.is_some(), "ranks"),
                (shape.weights, "router weights"),
                (!shape.labels.is_empty(), "labels"),
            ] {
                if there {
                    lost.push(what);
                }
            }
        }
        _ => return None,
    }
    Some(lost)
}

/// What a file of the format cannot hold of loads; `None` when the format is not written.
pub fn lost_of_loads(format: Format) -> Option<Vec<&'static str>> {
    match format {
        Format::LoadNpy => Some(vec!["phases", "layer indices"]),
        Format::LoadSafetensors | Format::LoadCsv | Format::LoadJson => Some(vec!["phases"]),
        _ => None,
    }
}

/// Writes tokens in a format of which [`lost_of_tokens`] knows; the number of tokens.
///
/// # Errors
/// Those of the stream, [`Error::Io`], [`Error::File`] for another format.
pub fn tokens(path: &Path, format: Format, tokens: &mut dyn TokenStream) -> Result<u64> {
    match format {
        Format::Trace => trace(path, tokens),
        Format::TokensJsonl => jsonl::write(path, tokens),
        Format::RoutedNpy => routed_npy(path, tokens),
        other => Err(in_file(path, format!("tokens cannot be written as {other}"))),
    }
}

/// Writes loads in a format of which [`lost_of_loads`] knows; the number of windows.
///
/// # Errors
/// Those of the stream, [`Error::Io`], [`Error::File`] for another format.
pub fn loads(path: &Path, format: Format, loads: &mut dyn LoadStream) -> Result<u64> {
    match format {
        Format::LoadNpy => load_npy(path, loads),
        Format::LoadSafetensors => safetensors::write(path, loads),
        Format::LoadCsv => csv::write(path, loads),
        Format::LoadJson => json::write(path, loads),
        other => Err(in_file(path, format!("loads cannot be written as {other}"))),
    }
}

/// Loads as `.npy`, int64 `[windows, layers, experts]`.
///
/// # Errors
/// Those of the stream, [`Error::Io`], [`Error::File`] for a count beyond int64.
fn load_npy(path: &Path, loads: &mut dyn LoadStream) -> Result<u64> {
    let mut output = Output::create(path)?;
    let mut window = loads.empty_window();
    let (layers, experts) = (window.layers(), window.experts());
    let header = |output: &mut Output, windows: u64| {
        let shape = [windows as usize, layers, experts];
        let written = output.seek(SeekFrom::Start(0)).and_then(|_| npy::write_header(output, "<i8", &shape));
        written.map_err(|e| output.error(e))
    };
    header(&mut output, 0)?;
    let mut windows = 0;
    while loads.next_window(&mut window)? {
        for layer in 0..layers {
            for count in window.totals(layer) {
                let count = i64::try_from(count).map_err(|_| beyond_int64(path, count))?;
                output.write_all(&count.to_le_bytes()).map_err(|e| output.error(e))?;
            }
        }
        windows += 1;
    }
    header(&mut output, windows)?;
    output.finish_with(windows)
}

/// Tokens per slot as `.npy`, int64 `[layers, slots]`.
///
/// # Errors
/// [`Error::Io`], [`Error::File`] for a count beyond int64.
pub fn slot_tokens_npy(path: &Path, layers: &[Vec<u64>]) -> Result<()> {
    let mut output = Output::create(path)?;
    let shape = [layers.len(), layers.first().map_or(0, Vec::len)];
    npy::write_header(&mut output, "<i8", &shape).map_err(|e| output.error(e))?;
    for &count in layers.iter().flatten() {
        let count = i64::try_from(count).map_err(|_| beyond_int64(path, count))?;
        output.write_all(&count.to_le_bytes()).map_err(|e| output.error(e))?;
    }
    output.finish()
}

fn beyond_int64(path: &Path, count: u64) -> Error {
    in_file(path, format!("{count} tokens do not fit int64, the element type of this format"))
}

/// Tokens as `.npy` of expert ids, uint8 or uint16 `[tokens, layers, top_k]`.
///
/// # Errors
/// Those of the stream, [`Error::Io`].
fn routed_npy(path: &Path, tokens: &mut dyn TokenStream) -> Result<u64> {
    let mut output = Output::create(path)?;
    let (layers, top_k) = (tokens.shape().layers(), tokens.shape().top_k);
    let narrow = tokens.shape().experts <= 256;
    let header = |output: &mut Output, rows: u64| {
        let (descr, shape) = (if narrow { "|u1" } else { "<u2" }, [rows as usize, layers, top_k]);
        let written = output.seek(SeekFrom::Start(0)).and_then(|_| npy::write_header(output, descr, &shape));
        written.map_err(|e| output.error(e))
    };
    header(&mut output, 0)?;
    let (mut batch, mut rows, mut bytes) = (TokenBatch::default(), 0, Vec::new());
    while tokens.next_batch(&mut batch)? {
        for row in 0..batch.rows.len() {
            bytes.clear();
            for layer in 0..layers {
                let ids = &batch.layer(layer, layers)[row * top_k..(row + 1) * top_k];
                match narrow {
                    true => bytes.extend(ids.iter().map(|id| *id as u8)),
                    false => bytes.extend(ids.iter().flat_map(|id| id.to_le_bytes())),
                }
            }
            output.write_all(&bytes).map_err(|e| output.error(e))?;
        }
        rows += batch.rows.len() as u64;
    }
    header(&mut output, rows)?;
    output.finish_with(rows)
}

/// Tokens as a routing trace: a step per batch.
///
/// # Errors
/// Those of the stream, [`Error::Io`], [`Error::Trace`] when a trace cannot hold the shape.
fn trace(path: &Path, tokens: &mut dyn TokenStream) -> Result<u64> {
    let output = Output::create(path)?;
    let shape = tokens.shape().clone();
    let mut sink = TraceSink::new(output, trace_header(&shape)?)?;
    let max_rows = sink.max_rows();
    let (mut batch, mut rows, mut ids) = (TokenBatch::default(), 0, Vec::new());
    while tokens.next_batch(&mut batch)? {
        let info = StepInfo {
            step: batch.step,
            start_us: batch.start_us,
            duration_us: batch.duration_us,
            placement_version: 0,
            rows: batch.rows.len() as u64,
        };
        let mut start = 0;
        while start < batch.rows.len() {
            let rank = batch.rows[start].rank;
            let run = batch.rows[start..].iter().take(max_rows).take_while(|row| row.rank == rank).count();
            let infos: Vec<_> = batch.rows[start..start + run].iter().map(|row| row.info).collect();
            let weights = cut(&batch.weights, &shape, batch.rows.len(), start, run);
            ids.clear();
            ids.extend(cut(&batch.ids, &shape, batch.rows.len(), start, run).into_iter().map(u32::from));
            let piece = Piece { rank: rank as usize, rows: &infos, ids: &ids, weights: &weights };
            sink.step(&info, &[piece])?;
            start += run;
        }
        rows += batch.rows.len() as u64;
    }
    sink.finish()?.finish_with(rows)
}

/// Rows `start..start + run` of each layer of `[layers][rows][top_k]`.
fn cut<T: Copy>(values: &[T], shape: &TokenShape, rows: usize, start: usize, run: usize) -> Vec<T> {
    let k = shape.top_k;
    values
        .chunks_exact(rows * k)
        .flat_map(|layer| layer[start * k..(start + run) * k].iter().copied())
        .collect()
}

fn trace_header(shape: &TokenShape) -> Result<TraceHeader> {
    let ranks = shape.ranks.unwrap_or(1);
    let window = LoadWindow::new(&shape.layer_ids, shape.experts);
    let placement = Linear.place(&window, &ClusterShape { ranks, redundant: 0 })?;
    Ok(TraceHeader {
        spec_digest: String::new(),
        family: shape.model.clone(),
        top_k: shape.top_k,
        degrees: Degrees { tensor: 1, data: ranks, expert: ranks, pipeline: 1 },
        node_of_rank: vec![0; ranks],
        policy: BTreeMap::new(),
        cost: BTreeMap::new(),
        weights: if shape.weights { WeightFormat::F32 } else { WeightFormat::None },
        placement,
    })
}
