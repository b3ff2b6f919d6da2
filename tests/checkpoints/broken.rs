//! Copies of fixtures in a temporary folder, taken apart and put together wrongly.

use crate::fixtures::model_dir;
use crate::specs::describe;
use moeyard::Error;
use moeyard::error::Problem;
use moeyard::spec::ModelSpec;
use moeyard::weights::{Checkpoint, TensorNames, validate};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A tensor that can be changed.
#[derive(Clone)]
pub struct Loose {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub data: Vec<u8>,
}

/// A copy of a fixture, and what it should be.
pub struct Copy {
    folder: TempDir,
    pub spec: ModelSpec,
    pub names: TensorNames,
}

impl Copy {
    pub fn of(name: &str) -> Copy {
        let folder = TempDir::new().unwrap();
        for entry in std::fs::read_dir(model_dir(name)).unwrap() {
            let path = entry.unwrap().path();
            let file = path.file_name().unwrap().to_str().unwrap();
            if file == "config.json" || file.starts_with("model") {
                std::fs::copy(&path, folder.path().join(file)).unwrap();
            }
        }
        let (spec, names) = describe(folder.path());
        Copy { folder, spec, names }
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Changes the bytes of a file.
    pub fn edit(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = std::fs::read(self.file(name)).unwrap();
        change(&mut bytes);
        std::fs::write(self.file(name), bytes).unwrap();
    }

    /// Changes the tensors of a safetensors file.
    pub fn edit_tensors(&self, name: &str, change: impl FnOnce(&mut BTreeMap<String, Loose>)) {
        self.edit(name, |bytes| {
            let mut tensors = load(bytes);
            change(&mut tensors);
            let views = tensors.iter().map(|(name, tensor)| {
                (name, TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.data).unwrap())
            });
            *bytes = safetensors::serialize(views, None).unwrap();
        });
    }

    /// Changes the text of a file.
    pub fn replace(&self, name: &str, from: &str, to: &str) {
        self.edit(name, |bytes| {
            let text = String::from_utf8(std::mem::take(bytes)).unwrap();
            assert!(text.contains(from), "{name} has no {from}");
            *bytes = text.replace(from, to).into_bytes();
        });
    }

    /// Warnings of a checkpoint that is accepted.
    #[track_caller]
    pub fn accepted(&self) -> Vec<String> {
        let checkpoint = Checkpoint::open(self.path()).unwrap();
        validate(&checkpoint, &self.spec, &self.names).unwrap_or_else(|error| panic!("{error}"))
    }

    /// Problems of a checkpoint that is refused.
    #[track_caller]
    pub fn refused(&self) -> Vec<Problem> {
        let checkpoint = Checkpoint::open(self.path()).unwrap();
        let error = validate(&checkpoint, &self.spec, &self.names).expect_err("accepted");
        let Error::Checkpoint(problems) = error else { panic!("{error}") };
        assert_eq!(problems.checkpoint, self.path().display().to_string());
        assert!(!problems.list.is_empty());
        problems.list
    }

    /// The checkpoint is refused with exactly these messages.
    #[track_caller]
    pub fn refused_with(&self, expected: &[&str]) {
        let found: Vec<String> = self.refused().iter().map(ToString::to_string).collect();
        assert_eq!(found, expected);
    }
}

/// The tensors of a safetensors file, read by the reference implementation.
pub fn load(bytes: &[u8]) -> BTreeMap<String, Loose> {
    SafeTensors::deserialize(bytes)
        .unwrap()
        .iter()
        .map(|(name, view)| {
            let (dtype, shape) = (view.dtype(), view.shape().to_vec());
            (name.to_owned(), Loose { dtype, shape, data: view.data().to_vec() })
        })
        .collect()
}
