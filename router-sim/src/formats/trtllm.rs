//! TensorRT-LLM's folder of expert statistics: `meta_info.json` and `rank*.safetensors` with a tensor
//! `<iteration>_<layer>` `[experts]` for each iteration and layer.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::matrix::{check_shape, in_cell};
use super::safetensors::{self, Tensor, Tensors};
use super::source::{self, Source};
use super::{Options, in_file};
use crate::load::{LoadWindow, Phase};
use crate::stream::windows::WindowReader;
use crate::{Error, Result};

/// What `meta_info.json` says that matters here.
#[derive(Deserialize)]
struct MetaInfo {
    num_experts: usize,
}

/// What one rank counted.
struct RankFile {
    source: Source,
    /// By iteration and layer.
    tensors: BTreeMap<(u64, usize), Tensor>,
}

/// The folder as load windows: one per iteration, summed over the ranks' files.
pub struct Statistics {
    folder: PathBuf,
    ranks: Vec<RankFile>,
    iterations: Vec<u64>,
    layer_ids: Vec<usize>,
    experts: usize,
    phase: Phase,
    scale: Option<f64>,
    next: usize,
}

/// Whether a path is such a folder.
pub fn is_statistics(path: &Path) -> bool {
    path.join("meta_info.json").is_file()
}

impl Statistics {
    /// Reads the headers of all files.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::File`].
    pub fn open(folder: &Path, options: &Options) -> Result<Self> {
        let meta_path = folder.join("meta_info.json");
        let meta: MetaInfo = serde_json::from_slice(&source::read_whole(&meta_path, None)?)
            .map_err(|e| in_file(&meta_path, e.to_string()))?;
        let refuse = |why: String| in_file(folder, why);
        options.check_experts(meta.num_experts).map_err(refuse)?;
        let mut ranks = Vec::new();
        for path in rank_files(folder)? {
            ranks.push(rank_tensors(&path, meta.num_experts)?);
        }
        if ranks.is_empty() {
            return Err(refuse("no rank*.safetensors".into()));
        }
        let keys = || ranks.iter().flat_map(|rank| rank.tensors.keys().copied());
        let iterations: BTreeSet<u64> = keys().map(|(iteration, _)| iteration).collect();
        let layer_ids: BTreeSet<usize> = keys().map(|(_, layer)| layer).collect();
        check_shape(layer_ids.len(), meta.num_experts).map_err(refuse)?;
        Ok(Statistics {
            folder: folder.into(),
            ranks,
            iterations: iterations.into_iter().collect(),
            layer_ids: layer_ids.into_iter().collect(),
            experts: meta.num_experts,
            phase: options.phase(),
            scale: options.scale,
            next: 0,
        })
    }
}

fn rank_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let io = |source| Error::Io { path: folder.into(), source };
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).map_err(io)? {
        let path = entry.map_err(io)?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or("");
        if name.starts_with("rank") && name.ends_with(".safetensors") {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

fn rank_tensors(path: &Path, experts: usize) -> Result<RankFile> {
    let Tensors { source, tensors } = safetensors::open(path, None)?;
    let mut by_key = BTreeMap::new();
    for (name, tensor) in tensors {
        let key = name.split_once('_').and_then(|(i, layer)| Some((i.parse().ok()?, layer.parse().ok()?)));
        let Some(key) = key else {
            return Err(in_file(path, format!("tensor {name:?} is not named <iteration>_<layer>")));
        };
        if tensor.shape != [experts] {
            let why = format!(
                "tensor {name:?} has shape {:?}, meta_info.json says {experts} experts",
                tensor.shape
            );
            return Err(in_file(path, why));
        }
        by_key.insert(key, tensor);
    }
    Ok(RankFile { source, tensors: by_key })
}

impl WindowReader for Statistics {
    fn empty_window(&self) -> LoadWindow {
        LoadWindow::new(&self.layer_ids, self.experts)
    }

    fn next_window(&mut self, window: &mut LoadWindow) -> Result<bool, String> {
        let Some(&iteration) = self.iterations.get(self.next) else { return Ok(false) };
        self.next += 1;
        let mut bytes = Vec::new();
        for (layer, &layer_id) in self.layer_ids.iter().enumerate() {
            let mut found = false;
            for RankFile { source, tensors } in &mut self.ranks {
                let Some(tensor) = tensors.get(&(iteration, layer_id)) else { continue };
                found = true;
                bytes.clear();
                source.seek(SeekFrom::Start(tensor.start)).map_err(|e| e.to_string())?;
                let read =
                    source.by_ref().take(tensor.bytes).read_to_end(&mut bytes).map_err(|e| e.to_string())?;
                if (read as u64) < tensor.bytes {
                    return Err(format!("iteration {iteration}, layer {layer_id}: cut after {read} bytes"));
                }
                let counts = window.counts_mut(self.phase, layer).iter_mut();
                for (expert, (sum, number)) in counts.zip(tensor.layout.numbers(&bytes)).enumerate() {
                    let tokens = number.tokens(self.scale).map_err(|why| in_cell(layer, expert, &why))?;
                    *sum = sum
                        .checked_add(tokens)
                        .ok_or_else(|| in_cell(layer, expert, "the ranks' tokens exceed 64 bits"))?;
                }
            }
            if !found {
                return Err(format!("iteration {iteration} has no layer {layer_id}"));
            }
        }
        Ok(true)
    }

    fn record(&self) -> u64 {
        self.next.saturating_sub(1) as u64
    }

    fn path(&self) -> &Path {
        &self.folder
    }
}
