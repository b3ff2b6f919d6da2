//! SGLang's expert distribution recorder, `expert_distribution_recorder_*.pt` as saved by PyTorch: a zip archive with a
//! pickle ([`super::pickle`]) and the tensors' bytes.
//!
//! - modes `stat`, `stat_approx`: `logical_count` `[steps, layers, experts]`, a window per buffered step;
//! - a tensor alone, as load balancers of other engines save it, is taken for the same;
//! - mode `per_pass`: a window per forward pass from `global_physical_count` `[layers, slots]`;
//! - mode `per_token`: a batch per forward pass from `topk_ids_of_layer` `[layers, tokens, 8]`, -1 where there is nothing.
//!
//! Slots become experts by `last_physical_to_logical_map` `[layers, slots]`. The layers are those of the whole model;
//! dense ones, which never see an expert, are left out and the others keep their indices. Requests have no names in the
//! record: each sequence of a prefill pass and each token of a decode pass counts as one.

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::array::ArrayReader;
use super::matrix::{MatrixReader, check_shape, in_cell};
use super::number::Number;
use super::pickle::{Pickle, Tensor, Value};
use super::zip::Archive;
use super::{Input, Options, in_file, windows};
use crate::load::{LoadWindow, Phase};
use crate::stream::windows::WindowReader;
use crate::stream::{TokenBatch, TokenRow, TokenShape, TokenStream};
use crate::trace::RowInfo;
use crate::{Error, Result};

/// Largest pickle that is read; tensors do not count.
const MAX_PICKLE_BYTES: u64 = 64 << 20;
/// `ForwardMode.DECODE` of SGLang.
const FORWARD_MODE_DECODE: i64 = 2;

/// Opens a record of any mode.
///
/// # Errors
/// [`Error::Io`], [`Error::File`].
pub fn open(path: &Path, options: &Options) -> Result<Input> {
    let refuse = |why: String| in_file(path, why);
    let saved = Saved::open(path)?;
    let root = saved.pickle.root;
    let alone = saved.pickle.tensor(root).map(|_| root);
    if let Some(counts) = alone.or_else(|| saved.pickle.get(root, "logical_count")) {
        options.label_ids(&[]).map_err(refuse)?;
        let tensor =
            saved.pickle.tensor(counts).ok_or_else(|| refuse("logical_count is no tensor".into()))?;
        let layers = layers_in_use(saved.array(tensor).map_err(refuse)?);
        let array = saved.array(tensor).map_err(refuse)?;
        return windows(MatrixReader::of_layers(path, array, layers, options).map_err(refuse)?, options);
    }
    let Some(records) = saved.pickle.get(root, "records").and_then(|records| saved.pickle.list(records))
    else {
        return Err(refuse("neither a tensor nor logical_count or records: not of SGLang's recorder".into()));
    };
    let records = records.to_vec();
    if records.is_empty() {
        return Err(refuse("no records".into()));
    }
    options.label_ids(&[]).map_err(refuse)?;
    let map = saved.slot_map().map_err(refuse)?;
    let experts = map.iter().flatten().max().map_or(0, |largest| *largest as usize + 1);
    options.check_experts(experts).map_err(refuse)?;
    let passes = Passes { saved, records, map, next: 0 };
    if passes.tensor(0, "topk_ids_of_layer").is_ok() {
        return Ok(Input::Tokens(Box::new(TokenPasses::new(passes, experts, options).map_err(refuse)?)));
    }
    windows(CountPasses::new(passes, experts, options).map_err(refuse)?, options)
}

/// Indices of the layers that have any count, or all when none has.
fn layers_in_use(mut array: ArrayReader) -> Vec<usize> {
    let (layers, experts) = match array.shape[..] {
        [layers, experts] | [_, layers, experts] => (layers, experts),
        _ => return Vec::new(),
    };
    if check_shape(layers, experts).is_err() {
        return Vec::new();
    }
    let two_axes = array.shape.len() == 2;
    // What is wrong with the counts has its say when they are read.
    let mut used = vec![false; layers];
    let mut first = 0;
    while let Ok(Some(numbers)) = array.next_record() {
        for (cell, number) in numbers.enumerate() {
            used[first + cell / experts.max(1)] |= !matches!(number, Number::Int(0));
        }
        // A record is a step, or a layer where there are no steps.
        first += usize::from(two_axes);
    }
    match used.contains(&true) {
        true => (0..layers).filter(|layer| used[*layer]).collect(),
        false => (0..layers).collect(),
    }
}

/// A file that PyTorch saved.
struct Saved {
    path: PathBuf,
    archive: Archive,
    pickle: Pickle,
    /// Folder of all entries.
    folder: String,
    big_endian: bool,
}

impl Saved {
    fn open(path: &Path) -> Result<Self> {
        let refuse = |why: String| in_file(path, why);
        let archive = Archive::open(path)?;
        let Some(entry) = archive.find(|name| name == "data.pkl" || name.ends_with("/data.pkl")) else {
            return Err(refuse("no data.pkl: not saved by PyTorch".into()));
        };
        if entry.bytes > MAX_PICKLE_BYTES {
            return Err(refuse(format!(
                "a pickle of {} bytes exceeds the limit of {MAX_PICKLE_BYTES}",
                entry.bytes
            )));
        }
        let read = |entry| -> Result<Vec<u8>> {
            let mut bytes = Vec::new();
            let data = archive.read(entry)?.take(MAX_PICKLE_BYTES).read_to_end(&mut bytes);
            data.map_err(|e| refuse(e.to_string()))?;
            Ok(bytes)
        };
        let pickle = Pickle::read(&read(entry)?).map_err(refuse)?;
        let folder = entry.name.strip_suffix("data.pkl").expect("found by it").to_owned();
        let order = match archive.find(|name| *name == format!("{folder}byteorder")) {
            Some(entry) => read(entry)?,
            None => b"little".to_vec(),
        };
        let big_endian = match &order[..] {
            b"little" => false,
            b"big" => true,
            other => return Err(refuse(format!("byte order {:?}", String::from_utf8_lossy(other)))),
        };
        Ok(Saved { path: path.into(), archive, pickle, folder, big_endian })
    }

    /// The elements of a tensor.
    fn array(&self, tensor: &Tensor) -> Result<ArrayReader, String> {
        let name = format!("{}data/{}", self.folder, tensor.key);
        let entry =
            self.archive.find(|entry| entry == name).ok_or_else(|| format!("no {name} in the archive"))?;
        let mut data = self.archive.read(entry).map_err(|e| e.to_string())?;
        let size = tensor.layout.element.bytes() as u64;
        let elements = tensor.shape.iter().try_fold(1u64, |n, len| n.checked_mul(*len as u64));
        let (Some(skip), Some(bytes)) =
            (tensor.offset.checked_mul(size), elements.and_then(|n| n.checked_mul(size)))
        else {
            return Err(format!("a tensor of shape {:?} does not fit any file", tensor.shape));
        };
        io::copy(&mut data.by_ref().take(skip), &mut io::sink()).map_err(|e| e.to_string())?;
        let mut layout = tensor.layout;
        layout.big_endian = self.big_endian;
        ArrayReader::new(layout, tensor.shape.clone(), false, Box::new(data.take(bytes)))
    }

    /// Expert of each slot, per layer of the model.
    fn slot_map(&self) -> Result<Vec<Vec<u32>>, String> {
        let map = self.pickle.get(self.pickle.root, "last_physical_to_logical_map");
        let tensor = map.and_then(|map| self.pickle.tensor(map)).ok_or("no last_physical_to_logical_map")?;
        let [layers, slots] = tensor.shape[..] else {
            return Err(format!("last_physical_to_logical_map of shape {:?}", tensor.shape));
        };
        check_shape(layers, slots)?;
        let mut array = self.array(tensor)?;
        let mut map = Vec::with_capacity(layers);
        while let Some(numbers) = array.next_record()? {
            let expert = |number: Number| match number.id() {
                Ok(id) if (0..1 << 16).contains(&id) => Ok(id as u32),
                _ => Err(format!("last_physical_to_logical_map has {number:?}")),
            };
            map.push(numbers.map(expert).collect::<Result<_, _>>()?);
        }
        Ok(map)
    }
}

/// The forward passes of a record.
struct Passes {
    saved: Saved,
    records: Vec<Value>,
    map: Vec<Vec<u32>>,
    /// The pass that is read next.
    next: usize,
}

impl Passes {
    fn tensor(&self, pass: usize, key: &str) -> Result<&Tensor, String> {
        let value = self.saved.pickle.get(self.records[pass], key);
        value.and_then(|value| self.saved.pickle.tensor(value)).ok_or_else(|| format!("no tensor {key}"))
    }

    fn int(&self, pass: usize, key: &str) -> Option<i64> {
        match self.saved.pickle.get(self.records[pass], key)? {
            Value::Int(n) => Some(n),
            _ => None,
        }
    }

    /// A list of non-negative integers; `None` for what is none.
    fn ints(&self, pass: usize, key: &str) -> Option<Vec<u64>> {
        let values = self.saved.pickle.list(self.saved.pickle.get(self.records[pass], key)?)?;
        let int = |value: &Value| match value {
            Value::Int(n) => u64::try_from(*n).ok(),
            _ => None,
        };
        values.iter().map(int).collect()
    }

    /// The expert of a slot.
    fn expert(&self, layer: usize, slot: i64) -> Result<u16, String> {
        let slots = &self.map[layer];
        match usize::try_from(slot).ok().and_then(|slot| slots.get(slot)) {
            Some(expert) => Ok(*expert as u16),
            None => Err(format!("layer {layer}: slot {slot} is not within 0..{}", slots.len())),
        }
    }
}

/// Mode `per_pass`.
struct CountPasses {
    passes: Passes,
    layers: Vec<usize>,
    experts: usize,
    phase: Phase,
}

impl CountPasses {
    fn new(passes: Passes, experts: usize, options: &Options) -> Result<Self, String> {
        let mut used = vec![false; passes.map.len()];
        for pass in 0..passes.records.len() {
            let Ok(tensor) = passes.tensor(pass, "global_physical_count") else { continue };
            let Ok(mut array) = passes.saved.array(tensor) else { continue };
            let mut layer = 0;
            while let Ok(Some(mut numbers)) = array.next_record() {
                if let Some(used) = used.get_mut(layer) {
                    *used |= numbers.any(|number| !matches!(number, Number::Int(0)));
                }
                layer += 1;
            }
        }
        let all = !used.contains(&true);
        let layers: Vec<usize> = (0..used.len()).filter(|layer| all || used[*layer]).collect();
        check_shape(layers.len(), experts)?;
        Ok(CountPasses { passes, layers, experts, phase: options.phase() })
    }
}

impl WindowReader for CountPasses {
    fn empty_window(&self) -> LoadWindow {
        LoadWindow::new(&self.layers, self.experts)
    }

    fn next_window(&mut self, window: &mut LoadWindow) -> Result<bool, String> {
        if self.passes.next == self.passes.records.len() {
            return Ok(false);
        }
        let pass = self.passes.next;
        self.passes.next += 1;
        let tensor = self.passes.tensor(pass, "global_physical_count")?;
        let expected = [self.passes.map.len(), self.passes.map[0].len()];
        if tensor.shape != expected {
            return Err(format!(
                "global_physical_count of shape {:?}, the map has {expected:?}",
                tensor.shape
            ));
        }
        let mut array = self.passes.saved.array(tensor)?;
        for layer in 0..expected[0] {
            let numbers = array.next_record()?.expect("a record per layer");
            let Ok(index) = self.layers.binary_search(&layer) else { continue };
            for (slot, number) in numbers.enumerate() {
                let expert = usize::from(self.passes.expert(layer, slot as i64)?);
                let tokens = number.tokens(None).map_err(|why| in_cell(index, expert, &why))?;
                let count = &mut window.counts_mut(self.phase, index)[expert];
                *count = count
                    .checked_add(tokens)
                    .ok_or_else(|| in_cell(index, expert, "tokens exceed 64 bits"))?;
            }
        }
        Ok(true)
    }

    fn record(&self) -> u64 {
        self.passes.next.saturating_sub(1) as u64
    }

    fn path(&self) -> &Path {
        &self.passes.saved.path
    }
}

/// Mode `per_token`.
struct TokenPasses {
    passes: Passes,
    shape: TokenShape,
    /// Phase of passes that do not say.
    phase: Option<Phase>,
    lenient: bool,
    skipped: u64,
    /// Requests so far.
    requests: u64,
}

impl TokenPasses {
    fn new(passes: Passes, experts: usize, options: &Options) -> Result<Self, String> {
        let (layer_ids, top_k) = layers_and_top_k(&passes)?;
        check_shape(layer_ids.len(), experts)?;
        let shape = TokenShape { layer_ids, experts, top_k, ..TokenShape::default() };
        Ok(TokenPasses {
            passes,
            shape,
            phase: options.phase,
            lenient: options.lenient,
            skipped: 0,
            requests: 0,
        })
    }

    /// Fills the batch with one pass.
    fn take(&mut self, pass: usize, batch: &mut TokenBatch) -> Result<(), String> {
        let tensor = self.passes.tensor(pass, "topk_ids_of_layer")?;
        let [layers, tokens, width] = tensor.shape[..] else {
            return Err(format!("topk_ids_of_layer of shape {:?}", tensor.shape));
        };
        let top_k = self.shape.top_k;
        if layers != self.passes.map.len() || width < top_k {
            return Err(format!(
                "topk_ids_of_layer of shape {:?} for {} layers",
                tensor.shape,
                self.passes.map.len()
            ));
        }
        let mut array = self.passes.saved.array(tensor)?;
        let mut real: Option<Vec<bool>> = None;
        for layer in 0..layers {
            let numbers = array.next_record()?.expect("a record per layer");
            if self.shape.layer_ids.binary_search(&layer).is_err() {
                continue;
            }
            let slots: Vec<i64> = numbers.map(Number::id).collect::<Result<_, _>>()?;
            // Tokens that only pad the batch have no expert in any layer.
            let real =
                real.get_or_insert_with(|| slots.chunks_exact(width).map(|ids| ids[0] != -1).collect());
            for (ids, _) in slots.chunks_exact(width).zip(real.iter()).filter(|(_, real)| **real) {
                for slot in &ids[..top_k] {
                    batch.ids.push(self.passes.expert(layer, *slot)?);
                }
            }
        }
        self.take_rows(pass, tokens, &real.unwrap_or_default(), batch);
        Ok(())
    }

    fn take_rows(&mut self, pass: usize, tokens: usize, real: &[bool], batch: &mut TokenBatch) {
        let decode = self.passes.int(pass, "forward_mode").map(|mode| mode == FORWARD_MODE_DECODE);
        let phase = match decode {
            Some(true) => Phase::Decode,
            Some(false) => Phase::Prefill,
            None => self.phase.unwrap_or(Phase::Prefill),
        };
        let positions = self.passes.ints(pass, "positions").unwrap_or_default();
        let lengths = self.passes.ints(pass, "extend_seq_lens").filter(|_| phase == Phase::Prefill);
        let lengths = lengths.unwrap_or_default();
        let mut ends = lengths.iter().scan(0u64, |end, n| {
            *end = end.saturating_add(*n);
            Some(*end)
        });
        let mut end = ends.next().unwrap_or(1);
        for token in 0..tokens {
            while token as u64 >= end {
                self.requests += 1;
                end = ends.next().unwrap_or(token as u64 + 1);
            }
            if real.get(token).copied().unwrap_or(false) {
                let position = positions.get(token).copied().unwrap_or(0);
                let info = RowInfo { request: self.requests, position, phase, recomputed: false };
                batch.rows.push(TokenRow { info, rank: 0, label: 0 });
            }
        }
        self.requests += 1;
    }
}

/// Layers that have experts, and experts per token, from the first pass with tokens.
fn layers_and_top_k(passes: &Passes) -> Result<(Vec<usize>, usize), String> {
    for pass in 0..passes.records.len() {
        let tensor = passes.tensor(pass, "topk_ids_of_layer")?;
        let [layers, _, width] = tensor.shape[..] else { continue };
        if layers != passes.map.len() || width == 0 {
            return Err(format!(
                "topk_ids_of_layer of shape {:?} for {} layers",
                tensor.shape,
                passes.map.len()
            ));
        }
        let mut array = passes.saved.array(tensor)?;
        let (mut used, mut top_k, mut layer) = (Vec::new(), 0, 0);
        while let Some(numbers) = array.next_record()? {
            let slots: Vec<bool> = numbers.map(|number| number != Number::Int(-1)).collect();
            let most = slots.chunks_exact(width).map(|ids| ids.iter().filter(|real| **real).count()).max();
            if let Some(most) = most.filter(|most| *most > 0) {
                used.push(layer);
                top_k = top_k.max(most);
            }
            layer += 1;
        }
        if top_k > 0 {
            return Ok((used, top_k));
        }
    }
    Err("no pass has tokens with experts".into())
}

impl TokenStream for TokenPasses {
    fn shape(&self) -> &TokenShape {
        &self.shape
    }

    fn next_batch(&mut self, batch: &mut TokenBatch) -> Result<bool> {
        while self.passes.next < self.passes.records.len() {
            let pass = self.passes.next;
            self.passes.next += 1;
            batch.clear();
            batch.step = pass as u64;
            match self.take(pass, batch) {
                Ok(()) if batch.rows.is_empty() => {}
                Ok(()) => return Ok(true),
                Err(_) if self.lenient => self.skipped += 1,
                Err(why) => {
                    let path = self.passes.saved.path.clone();
                    return Err(Error::Record { path, record: pass as u64, why });
                }
            }
        }
        batch.clear();
        Ok(false)
    }

    fn skipped(&self) -> u64 {
        self.skipped
    }
}
