//! config.json to spec: the fixtures, other shapes of the same families, and refusals.

#[path = "../support/fixtures.rs"]
mod fixtures;
mod refusals;
mod specs;
mod variants;

use fixtures::model_dir;
use moeyard::Error;
use moeyard::model::families::{Family, resolve};
use moeyard::spec::ModelSpec;
use serde_json::Value;

fn config(folder: &str) -> Value {
    serde_json::from_slice(&std::fs::read(model_dir(folder).join("config.json")).unwrap()).unwrap()
}

/// A fixture's config with some keys replaced.
fn with(folder: &str, changes: Value) -> Value {
    let mut config = config(folder);
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

/// ... and some removed.
fn without(folder: &str, keys: &[&str]) -> Value {
    let mut config = config(folder);
    for key in keys {
        config.as_object_mut().unwrap().shift_remove(*key).unwrap();
    }
    config
}

fn family(config: &Value) -> Family {
    resolve(config.to_string().as_bytes()).unwrap_or_else(|e| panic!("{e}"))
}

fn spec(config: &Value) -> ModelSpec {
    family(config).spec
}

/// The problems of a refused config as "item: expected ..., found ...".
fn problems(config: &Value) -> Vec<String> {
    match resolve(config.to_string().as_bytes()) {
        Err(Error::Checkpoint(problems)) => {
            assert!(problems.list.iter().all(|p| p.file == "config.json"));
            problems
                .list
                .iter()
                .map(|p| {
                    format!(
                        "{}: expected {}, found {}",
                        p.item.as_deref().unwrap_or("-"),
                        p.expected,
                        p.found
                    )
                })
                .collect()
        }
        Err(other) => panic!("not a checkpoint error: {other}"),
        Ok(family) => panic!("accepted: {:?}", family.spec),
    }
}

/// Exactly these problems, each given by a part of its text.
fn refused(config: &Value, parts: &[&str]) {
    let found = problems(config);
    assert_eq!(found.len(), parts.len(), "{found:#?}");
    for part in parts {
        assert!(found.iter().any(|p| p.contains(part)), "no problem has {part:?} in {found:#?}");
    }
}
