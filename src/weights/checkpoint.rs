//! A checkpoint: its small files, and its tensors by name, from one safetensors file or from shards with an index.

use super::mmap::FileBytes;
use super::safetensors::{self, UniqueMap};
use super::source::{EmbeddedFile, Source};
use crate::error::{Problem, Problems};
use crate::{Error, Result};
use ::safetensors::Dtype;
use serde::Deserialize;
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::io::ErrorKind;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// The configuration of the model.
pub const CONFIG: &str = "config.json";
/// Sampling defaults and end-of-text ids.
pub const GENERATION_CONFIG: &str = "generation_config.json";
/// The tokenizer.
pub const TOKENIZER: &str = "tokenizer.json";
/// Special tokens and, in most checkpoints, the chat template.
pub const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
/// The chat template, where it has a file of its own.
pub const CHAT_TEMPLATE: &str = "chat_template.jinja";
/// All tensors, where one file holds them.
const SINGLE: &str = "model.safetensors";
/// Which shard holds which tensor, where there are several.
const INDEX: &str = "model.safetensors.index.json";

/// After so many bytes read, their memory is given back: weights that are copied would count twice otherwise.
const FORGET_EVERY: u64 = 64 << 20;

/// An opened checkpoint. Opening reads headers only. What is wrong with the files is kept in
/// [`Checkpoint::problems`], so that it can be reported together with what [`super::validate`] finds.
///
/// Files stay mapped while it lives, without taking memory for what has been read.
#[derive(Debug)]
pub struct Checkpoint {
    source: Source,
    /// Bytes read so far.
    read: AtomicU64,
    shards: Vec<Shard>,
    tensors: HashMap<String, Place>,
    /// Tensors that should be there but are in a broken shard, or are broken themselves: reported already.
    lost: HashSet<String>,
    /// Nothing is known about the tensors of some broken file.
    incomplete: bool,
    dummy: bool,
    /// Tensors that a shard holds and the index does not list.
    unlisted: Vec<String>,
    problems: Problems,
}

#[derive(Debug)]
struct Shard {
    file: String,
    bytes: FileBytes,
}

#[derive(Debug)]
struct Place {
    shard: usize,
    entry: safetensors::Entry,
}

/// A tensor of a checkpoint, borrowed from the map.
#[derive(Debug, Clone, Copy)]
pub struct TensorRef<'a> {
    /// The file that holds it.
    pub file: &'a str,
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions.
    pub shape: &'a [usize],
    /// Row-major little-endian elements; as many bytes as shape and type ask for.
    pub bytes: &'a [u8],
}

/// `model.safetensors.index.json`.
#[derive(Deserialize)]
struct Index {
    weight_map: UniqueMap<String>,
}

impl Checkpoint {
    /// Opens the checkpoint in a folder.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] when `folder` is not a folder that can be listed. Everything else that is wrong is noted in
    /// [`Checkpoint::problems`].
    pub fn open(folder: &Path) -> Result<Checkpoint> {
        let (mut checkpoint, files) = Self::listed(Source::Folder(folder.to_owned()))?;
        checkpoint.open_weights(&files);
        Ok(checkpoint)
    }

    /// Opens a folder whose weights, if it has any, are not looked at: every tensor that the model asks for has made-up values, the
    /// same for the same name.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn dummy(folder: &Path) -> Result<Checkpoint> {
        let source = Source::Folder(folder.to_owned());
        Ok(Checkpoint { dummy: true, ..Self::listed(source)?.0 })
    }

    /// Opens a checkpoint that is part of the program.
    pub fn embedded(files: &'static [EmbeddedFile]) -> Checkpoint {
        let source = Source::Embedded(files);
        let names = source.list().expect("embedded files have names");
        let mut checkpoint = Self::new(source, &names);
        checkpoint.open_weights(&names);
        checkpoint
    }

    /// Without its weights, and the names of its files.
    fn listed(source: Source) -> Result<(Checkpoint, Vec<String>)> {
        match source.list() {
            Ok(files) => Ok((Self::new(source, &files), files)),
            Err(error) => {
                let mut problems = Problems::new(source.name());
                problems.add(".", None, "a folder with config.json and *.safetensors", error.to_string());
                Err(Error::Checkpoint(problems))
            }
        }
    }

    fn new(source: Source, files: &[String]) -> Checkpoint {
        let mut checkpoint = Checkpoint {
            problems: Problems::new(source.name()),
            source,
            read: AtomicU64::new(0),
            shards: Vec::new(),
            tensors: HashMap::new(),
            lost: HashSet::new(),
            incomplete: false,
            dummy: false,
            unlisted: Vec::new(),
        };
        if !files.iter().any(|file| file == CONFIG) {
            checkpoint.problems.add(CONFIG, None, "the model's configuration", "no such file");
        }
        checkpoint
    }

    fn open_weights(&mut self, files: &[String]) {
        let has = |name: &str| files.iter().any(|file| file == name);
        // Where both are there, the single file wins, as in transformers.
        if has(SINGLE) {
            self.open_shard(SINGLE, None);
        } else if has(INDEX) {
            self.open_index();
        } else {
            let weights = |file: &&String| {
                [".safetensors", ".bin", ".pt", ".pth", ".gguf"].iter().any(|end| file.ends_with(end))
            };
            let found: Vec<&str> = files.iter().filter(weights).map(String::as_str).collect();
            let found = if found.is_empty() { "no weights".to_owned() } else { found.join(", ") };
            self.problems.add(".", None, format!("{SINGLE}, or shards with {INDEX}"), found);
            self.incomplete = true;
        }
    }

    /// Opens all shards that the index names, and compares.
    fn open_index(&mut self) {
        let parsed = self
            .source
            .read(INDEX)
            .map_err(|error| error.to_string())
            .and_then(|json| serde_json::from_slice::<Index>(&json).map_err(|error| error.to_string()));
        let index = match parsed {
            Ok(index) => index.weight_map,
            Err(found) => {
                self.problems.add(INDEX, None, "JSON with a weight_map of tensor names to files", found);
                self.incomplete = true;
                return;
            }
        };
        for name in index.duplicates {
            self.problems.add(INDEX, name, "one entry of this name in weight_map", "two or more");
        }
        let mut shards: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for (tensor, file) in index.entries {
            shards.entry(file).or_default().insert(tensor);
        }
        if shards.is_empty() {
            self.problems.add(INDEX, None, "a weight_map that names tensors", "an empty one");
        }
        for (file, tensors) in &shards {
            self.open_shard(file, Some(tensors));
        }
    }

    /// Opens one file. `listed`: the tensors that the index says it holds.
    fn open_shard(&mut self, file: &str, listed: Option<&BTreeSet<String>>) {
        let before = self.problems.list.len();
        let header = self.read_shard(file, listed);
        let Some((bytes, header)) = header else {
            assert!(self.problems.list.len() > before, "{file} was refused without a reason");
            match listed {
                Some(listed) => self.lost.extend(listed.iter().cloned()),
                None => self.incomplete = true,
            }
            return;
        };
        let shard = self.shards.len();
        if let Some(listed) = listed {
            let held: HashSet<&str> = header
                .entries
                .iter()
                .map(|entry| &entry.name)
                .chain(&header.refused)
                .map(String::as_str)
                .collect();
            for name in listed.iter().filter(|name| !held.contains(name.as_str())) {
                let expected = format!("the tensor that {INDEX} says is here");
                self.problems.add(file, name.clone(), expected, "no such tensor in this shard");
                self.lost.insert(name.clone());
            }
            let unlisted = header.entries.iter().filter(|entry| !listed.contains(&entry.name));
            self.unlisted.extend(unlisted.map(|entry| entry.name.clone()));
        }
        self.lost.extend(header.refused);
        for entry in header.entries {
            let name = entry.name.clone();
            if let Some(other) = self.tensors.insert(name.clone(), Place { shard, entry }) {
                let found = format!("it is also in {}", self.shards[other.shard].file);
                self.problems.add(file, name, "a tensor name that no other shard has", found);
            }
        }
        self.shards.push(Shard { file: file.to_owned(), bytes });
    }

    fn read_shard(
        &mut self,
        file: &str,
        listed: Option<&BTreeSet<String>>,
    ) -> Option<(FileBytes, safetensors::Header)> {
        // An index is data from the net: it must not lead out of the folder.
        if Path::new(file).file_name() != Some(file.as_ref()) {
            self.problems.add(INDEX, None, "plain file names in weight_map", format!("{file:?}"));
            return None;
        }
        let bytes = match self.source.map(file) {
            Ok(bytes) => bytes,
            Err(error) => {
                let expected = match listed {
                    Some(listed) => {
                        format!("the shard that holds {} tensors according to {INDEX}", listed.len())
                    }
                    None => "a file that can be mapped".to_owned(),
                };
                let absent = error.kind() == ErrorKind::NotFound;
                let found = if absent { "no such file".to_owned() } else { error.to_string() };
                self.problems.add(file, None, expected, found);
                return None;
            }
        };
        let header = safetensors::read_header(file, &bytes, &mut self.problems)?;
        Some((bytes, header))
    }

    /// How messages call this checkpoint: the folder as given.
    pub fn name(&self) -> &str {
        &self.problems.checkpoint
    }

    /// Where its files come from.
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// A small file such as [`CONFIG`] or [`TOKENIZER`]; `None` when the checkpoint has none of this name.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] when it is there but cannot be read, or exceeds 256 MiB.
    pub fn text(&self, file: &str) -> Result<Option<Cow<'static, [u8]>>> {
        match self.source.read(file) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => {
                let mut problems = Problems::new(self.name());
                problems.add(file, None, "a readable file", error.to_string());
                Err(Error::Checkpoint(problems))
            }
        }
    }

    /// What is wrong with the files themselves; empty for a sound checkpoint.
    pub fn problems(&self) -> &[Problem] {
        &self.problems.list
    }

    /// A sound tensor.
    pub fn tensor(&self, name: &str) -> Option<TensorRef<'_>> {
        let Place { shard, entry } = self.tensors.get(name)?;
        let Shard { file, bytes } = &self.shards[*shard];
        Some(TensorRef { file, dtype: entry.dtype, shape: &entry.shape, bytes: &bytes[entry.bytes.clone()] })
    }

    /// Whether all values are made up: see [`Checkpoint::dummy`].
    pub fn is_dummy(&self) -> bool {
        self.dummy
    }

    /// Whether the absence of a tensor is explained by a problem noted already.
    pub fn is_lost(&self, name: &str) -> bool {
        self.incomplete || self.lost.contains(name)
    }

    /// Names of all sound tensors, in no order.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Tensors that are in a shard although the index does not list them; they are usable.
    pub fn unlisted(&self) -> &[String] {
        &self.unlisted
    }

    /// The file to blame for a missing tensor: the index, or the only file.
    pub fn table_of_contents(&self) -> &'static str {
        if self.shards.iter().any(|shard| shard.file == SINGLE) { SINGLE } else { INDEX }
    }

    /// So many bytes more have been read, or will be at once, by any thread.
    pub fn count_read(&self, bytes: u64) {
        let before = self.read.fetch_add(bytes, Ordering::Relaxed);
        if before / FORGET_EVERY != (before + bytes) / FORGET_EVERY {
            self.forget();
        }
    }

    /// Gives back the memory of everything that was read.
    pub fn forget(&self) {
        self.shards.iter().for_each(|shard| shard.bytes.forget());
    }

    /// Bytes of all sound tensors.
    pub fn tensor_bytes(&self) -> u64 {
        self.tensors.values().map(|place| place.entry.bytes.len() as u64).sum()
    }
}
