//! Checkpoints as a whole: the fixtures are accepted and read correctly, and every broken one is refused with a
//! message that names file, tensor, expected and found.

mod broken;
mod faults;
#[path = "../support/fixtures.rs"]
mod fixtures;
mod specs;
mod values;
