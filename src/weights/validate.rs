//! Compares a checkpoint with what its model needs, and reports everything that is wrong at once.

use super::checkpoint::Checkpoint;
use super::collapse::collapse;
use super::finder::{Finder, MlpMatrix};
use super::inventory::{Item, Part, RoleShape, What, expert_shape, inventory, sum_by_part};
use super::names::TensorNames;
use crate::error::{Problem, Problems};
use crate::spec::ModelSpec;
use crate::{Error, Result};
use std::collections::HashSet;

/// From this many tensors on that are wrong in the same way, their names are joined into ranges.
const COLLAPSE_FROM: usize = 16;

/// Checks that everything is there with the right type and shape. Reads headers, GPTQ group indices and biases that
/// should not be there; no weights.
///
/// Returns warnings: tensors that nothing needs, joined into ranges. Next-token-prediction layers beyond the last
/// layer and rotary frequencies are left out silently.
///
/// # Errors
/// [`Error::Checkpoint`] with all problems, those found while opening included.
pub fn validate(checkpoint: &Checkpoint, spec: &ModelSpec, names: &TensorNames) -> Result<Vec<String>> {
    let mut finder = Finder::new(checkpoint, spec.quantization.as_ref());
    for item in inventory(spec, names) {
        check_item(&mut finder, checkpoint, spec, names, &item);
    }
    let mut problems = Problems::new(checkpoint.name());
    problems.list.extend_from_slice(checkpoint.problems());
    problems.list.extend(join(finder.problems));
    if !problems.list.is_empty() {
        return Err(Error::Checkpoint(problems));
    }
    let used: HashSet<&str> = finder.used.iter().map(|(name, _)| name.as_str()).collect();
    Ok(warnings(checkpoint, spec, names, &used))
}

/// Bytes that each part takes in the file, for memory estimates and progress. Parts that are missing count 0.
pub fn stored_bytes(checkpoint: &Checkpoint, spec: &ModelSpec, names: &TensorNames) -> Vec<(Part, u64)> {
    let mut finder = Finder::new(checkpoint, spec.quantization.as_ref());
    let mut counted = HashSet::new();
    sum_by_part(inventory(spec, names).into_iter().map(|item| {
        check_item(&mut finder, checkpoint, spec, names, &item);
        let fresh = finder.used.drain(..).filter(|(name, _)| counted.insert(name.clone()));
        (item.part, fresh.map(|(_, bytes)| bytes as u64).sum())
    }))
}

fn check_item<'a>(
    finder: &mut Finder<'a>,
    checkpoint: &'a Checkpoint,
    spec: &ModelSpec,
    names: &TensorNames,
    item: &Item,
) {
    match &item.what {
        What::Role { name, shape: RoleShape::Matrix { n, k, bias } } => {
            if let Some(Err(problem)) = finder.module(name, *n, *k).map(|matrix| matrix.check_data()) {
                finder.problems.push(problem);
            }
            check_bias(finder, checkpoint, name, *n, *bias);
        }
        What::Role { name, shape: RoleShape::Norm { width, bias } } => {
            finder.vector(&format!("{name}.weight"), *width);
            check_bias(finder, checkpoint, name, *width, *bias);
        }
        What::Role { name, shape: RoleShape::Bare { len } } => {
            finder.vector(name, *len);
        }
        // One tensor holds gate and up of all experts: the first expert's gate stands for it.
        What::Fused(MlpMatrix::Up) => {}
        What::Fused(which) => {
            let shape = expert_shape(spec);
            let layer = item.layer.unwrap_or(0);
            if shape.experts > 0 {
                finder.expert(&names.experts, layer, 0, *which, shape);
                if spec.moe.expert_bias {
                    finder.expert_bias(&names.experts, layer, 0, *which, shape);
                }
            }
        }
    }
}

/// A bias that the model has must be there; one that it does not have may be there if it adds nothing, as AutoGPTQ
/// writes one beside every matrix.
fn check_bias<'a>(
    finder: &mut Finder<'a>,
    checkpoint: &'a Checkpoint,
    module: &str,
    len: usize,
    wanted: bool,
) {
    let name = format!("{module}.bias");
    if wanted {
        finder.vector(&name, len);
    } else if let Some(tensor) = checkpoint.tensor(&name) {
        finder.used.push((name.clone(), tensor.bytes.len()));
        // Both zeros of all floating-point types have no bit set but the sign, in the last byte of an element.
        let size = (tensor.dtype.bitsize() / 8).max(1);
        let zero = tensor.bytes.chunks(size).all(|element| match element {
            [rest @ .., last] => last & 0x7f == 0 && rest.iter().all(|&byte| byte == 0),
            [] => true,
        });
        if !zero {
            finder.problems.push(Problem {
                file: tensor.file.to_owned(),
                item: Some(name),
                expected: "no bias (the configuration has none here), or zeros".to_owned(),
                found: format!("{} {:?} with values other than zero", tensor.dtype, tensor.shape),
            });
        }
    }
}

/// Joins the names of long runs of tensors that are wrong in the same way; the order of first appearance stays.
fn join(problems: Vec<Problem>) -> Vec<Problem> {
    let mut groups: Vec<(Problem, Vec<Option<String>>)> = Vec::new();
    let mut places = std::collections::HashMap::new();
    for problem in problems {
        let key = (problem.file.clone(), problem.expected.clone(), problem.found.clone());
        let place = *places.entry(key).or_insert(groups.len());
        let item = problem.item.clone();
        match groups.get_mut(place) {
            Some((_, items)) => items.push(item),
            None => groups.push((problem, vec![item])),
        }
    }
    let mut out = Vec::new();
    for (problem, items) in groups {
        let items = if items.len() < COLLAPSE_FROM {
            items
        } else {
            let names: Vec<&str> = items.iter().flatten().map(String::as_str).collect();
            collapse(&names).into_iter().map(Some).collect()
        };
        out.extend(items.into_iter().map(|item| Problem { item, ..problem.clone() }));
    }
    out
}

fn warnings(
    checkpoint: &Checkpoint,
    spec: &ModelSpec,
    names: &TensorNames,
    used: &HashSet<&str>,
) -> Vec<String> {
    let layer_prefix = names.input_norm.split("{layer}").next().unwrap_or_default();
    let beyond_layers = |name: &str| {
        let layer =
            name.strip_prefix(layer_prefix).and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
        layer.is_some_and(|layer| layer >= spec.layers.len())
    };
    let mut extra: Vec<&str> = checkpoint
        .tensor_names()
        .filter(|name| !used.contains(name) && !name.ends_with("rotary_emb.inv_freq") && !beyond_layers(name))
        .collect();
    extra.sort_unstable();
    let mut out: Vec<String> =
        collapse(&extra).into_iter().map(|name| format!("{name}: not used by this model, ignored")).collect();
    let mut unlisted: Vec<&str> = checkpoint.unlisted().iter().map(String::as_str).collect();
    unlisted.sort_unstable();
    out.extend(collapse(&unlisted).into_iter().map(|name| format!("{name}: not listed in the index")));
    out
}
