//! What the checkpoints of the tests are.

use moeyard::model::families;
use moeyard::spec::ModelSpec;
use moeyard::weights::{CONFIG, Checkpoint, TensorNames};
use std::path::Path;

/// Description and names of the checkpoint in a folder.
pub fn describe(folder: &Path) -> (ModelSpec, TensorNames) {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let config = checkpoint.text(CONFIG).unwrap().expect("config.json");
    let family = families::resolve(&config).unwrap();
    (family.spec, family.names)
}
