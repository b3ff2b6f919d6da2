//! `--check-weights`: reads every value once and names the tensors that hold NaN or infinities.

use super::checkpoint::Checkpoint;
use super::finder::Finder;
use super::inventory::{Item, RoleShape, What, expert_shape, inventory};
use super::names::TensorNames;
use super::reader::Progress;
use super::stored::{StoredMatrix, StoredVector};
use crate::error::{Problem, Problems};
use crate::spec::ModelSpec;
use crate::{Error, Result};

/// Rows looked at together; bounds the memory used.
const ROWS_AT_ONCE: usize = 64;

/// Reads all weights of a checkpoint that [`super::validate`] accepted, telling `progress` the bytes.
///
/// # Errors
/// [`Error::Checkpoint`] with one problem per tensor that holds a non-finite value, naming layer and expert.
pub fn check_finite(
    checkpoint: &Checkpoint,
    spec: &ModelSpec,
    names: &TensorNames,
    progress: Option<&Progress<'_>>,
) -> Result<()> {
    let finder = Finder::new(checkpoint, spec.quantization.as_ref());
    let mut scan = Scan { finder, spec, names, progress, problems: Vec::new() };
    for item in inventory(spec, names) {
        scan.item(&item);
    }
    let list = [scan.finder.problems, scan.problems].concat();
    if list.is_empty() {
        return Ok(());
    }
    Err(Error::Checkpoint(Problems { checkpoint: checkpoint.name().to_owned(), list }))
}

struct Scan<'a> {
    finder: Finder<'a>,
    spec: &'a ModelSpec,
    names: &'a TensorNames,
    progress: Option<&'a Progress<'a>>,
    problems: Vec<Problem>,
}

impl<'a> Scan<'a> {
    fn item(&mut self, item: &Item) {
        let place = place(item.layer, item.expert);
        match &item.what {
            What::Role { name, shape: RoleShape::Matrix { n, k, bias } } => {
                let matrix = self.finder.module(name, *n, *k);
                self.matrix(matrix, &place);
                if *bias {
                    let name = format!("{name}.bias");
                    let bias = self.finder.vector(&name, *n);
                    self.vector(bias, &name, &place);
                }
            }
            What::Role { name, shape: RoleShape::Norm { width, bias } } => {
                for end in ["weight", "bias"].into_iter().take(1 + usize::from(*bias)) {
                    let name = format!("{name}.{end}");
                    let vector = self.finder.vector(&name, *width);
                    self.vector(vector, &name, &place);
                }
            }
            What::Role { name, shape: RoleShape::Bare { len } } => {
                let vector = self.finder.vector(name, *len);
                self.vector(vector, name, &place);
            }
            What::Fused(which) => {
                let (layer, shape) = (item.layer.unwrap_or(0), expert_shape(self.spec));
                for expert in 0..shape.experts {
                    let place = self::place(item.layer, Some(expert));
                    let matrix = self.finder.expert(&self.names.experts, layer, expert, *which, shape);
                    let name = matrix.as_ref().map(|matrix| format!("{}_bias", matrix.name()));
                    self.matrix(matrix, &place);
                    if self.spec.moe.expert_bias {
                        let bias = self.finder.expert_bias(&self.names.experts, layer, expert, *which, shape);
                        self.vector(bias, &name.unwrap_or_default(), &place);
                    }
                }
            }
        }
    }

    fn matrix(&mut self, matrix: Option<StoredMatrix<'a>>, place: &str) {
        let Some(matrix) = matrix else { return };
        let mut bad = Bad::default();
        let mut values = vec![0.0f32; ROWS_AT_ONCE.min(matrix.n) * matrix.k];
        for start in (0..matrix.n).step_by(ROWS_AT_ONCE) {
            let rows = start..(start + ROWS_AT_ONCE).min(matrix.n);
            let values = &mut values[..rows.len() * matrix.k];
            if let Err(problem) = matrix.block(rows, 0..matrix.k, values) {
                self.problems.push(problem);
                return;
            }
            bad.look(values, start * matrix.k);
        }
        if let Some(progress) = self.progress {
            progress(matrix.bytes_of(matrix.n, matrix.k));
        }
        if let Some((first, value)) = bad.first {
            let at = format!("{value} at [{}, {}]", first / matrix.k, first % matrix.k);
            self.note(matrix.file(), matrix.name(), place, at, bad.count);
        }
    }

    fn vector(&mut self, vector: Option<StoredVector<'a>>, name: &str, place: &str) {
        let Some(vector) = vector else { return };
        let mut bad = Bad::default();
        bad.look(&vector.read(0..vector.len), 0);
        if let Some(progress) = self.progress {
            progress(vector.bytes_of(vector.len));
        }
        if let Some((first, value)) = bad.first {
            self.note(vector.file(), name, place, format!("{value} at [{first}]"), bad.count);
        }
    }

    fn note(&mut self, file: &str, name: &str, place: &str, at: String, count: usize) {
        let rest = if count > 1 { format!(", {count} such values in all") } else { String::new() };
        self.problems.push(Problem {
            file: file.to_owned(),
            item: Some(name.to_owned()),
            expected: format!("finite values{place}"),
            found: at + &rest,
        });
    }
}

/// " in layer 3, expert 5"
fn place(layer: Option<usize>, expert: Option<usize>) -> String {
    match (layer, expert) {
        (Some(layer), Some(expert)) => format!(" in layer {layer}, expert {expert}"),
        (Some(layer), None) => format!(" in layer {layer}"),
        (None, _) => String::new(),
    }
}

/// Non-finite values met so far.
#[derive(Default)]
struct Bad {
    first: Option<(usize, f32)>,
    count: usize,
}

impl Bad {
    /// `start`: index of the first of these values.
    fn look(&mut self, values: &[f32], start: usize) {
        let bad = values.iter().enumerate().filter(|(_, value)| !value.is_finite());
        for (i, &value) in bad {
            self.first.get_or_insert((start + i, value));
            self.count += 1;
        }
    }
}
