//! Reads weights out of a checkpoint: any slice of any role, dequantised, in the type the run wants. A rank asks for
//! what it owns (see [`super::shard`]), and nothing else is touched. What lies in the file as it is wanted stays there until a
//! backend packs it: it is read once, by the threads that pack.

use super::checkpoint::Checkpoint;
use super::finder::{Finder, MlpMatrix};
use super::inventory::{RoleShape, expert_shape, role_shape};
use super::mmap;
use super::names::{MlpNames, Role, TensorNames, fill};
use super::stored::{StoredMatrix, StoredVector};
use crate::backend::{DType, HostData, HostMatrix, HostMlp, HostMlpBias};
use crate::error::{Problem, Problems};
use crate::spec::{FeedForward, ModelSpec};
use crate::{Error, Result};
use half::bf16;
use std::ops::Range;

/// Told about every slice read, in bytes of the file. Ranks read in parallel, so it is shared.
pub type Progress<'a> = dyn Fn(u64) + Sync + 'a;

/// Reads the weights of one model from one checkpoint; cheap to copy, one per rank.
///
/// Methods fail with [`Error::Checkpoint`] when a tensor is missing or unfit; after [`super::validate`] that happens
/// only if the file changes meanwhile. They panic when asked for a role the model does not have, or for a slice
/// outside its shape: a bug of the caller.
#[derive(Clone, Copy)]
pub struct WeightReader<'a> {
    checkpoint: &'a Checkpoint,
    spec: &'a ModelSpec,
    names: &'a TensorNames,
    dtype: DType,
    experts: DType,
    progress: Option<&'a Progress<'a>>,
}

/// Which gated MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MlpKind {
    /// The MLP of a layer without experts.
    Dense,
    /// The shared expert.
    Shared,
    /// A routed expert.
    Expert(usize),
}

impl<'a> WeightReader<'a> {
    /// `dtype`: element type of the matrices read, F32 or Bf16. Vectors and biases are always f32.
    ///
    /// # Panics
    /// When `dtype` is another one.
    pub fn new(
        checkpoint: &'a Checkpoint,
        spec: &'a ModelSpec,
        names: &'a TensorNames,
        dtype: DType,
    ) -> WeightReader<'a> {
        assert!(matches!(dtype, DType::F32 | DType::Bf16), "weights are read as F32 or Bf16");
        WeightReader { checkpoint, spec, names, dtype, experts: dtype, progress: None }
    }

    /// The same reader, reporting to `progress`.
    pub fn with_progress(self, progress: &'a Progress<'a>) -> Self {
        WeightReader { progress: Some(progress), ..self }
    }

    /// The same reader with another type for matrices, those of experts included.
    pub fn with_dtype(self, dtype: DType) -> Self {
        assert!(matches!(dtype, DType::F32 | DType::Bf16), "weights are read as F32 or Bf16");
        WeightReader { dtype, experts: dtype, ..self }
    }

    /// The same reader for a run that holds routed and shared experts as `dtype`: in F8 or I4x2 they are handed out with codes and scales,
    /// those of the file where it has them.
    pub fn with_experts(self, dtype: DType) -> Self {
        let experts = if matches!(dtype, DType::F8 | DType::I4x2) { dtype } else { self.dtype };
        WeightReader { experts, ..self }
    }

    /// Shape of a role, `None` where the model does not have it.
    pub fn shape(&self, role: Role) -> Option<RoleShape> {
        role_shape(self.spec, role)
    }

    /// Rows (outputs) and columns (inputs) of the matrix of a role. The head of a tied model is its embedding. `layer` is
    /// ignored by roles outside the layers.
    ///
    /// # Errors
    /// See [`WeightReader`].
    pub fn matrix(
        &self,
        role: Role,
        layer: usize,
        rows: Range<usize>,
        cols: Range<usize>,
    ) -> Result<HostMatrix<'a>> {
        let role = if role == Role::Head && self.spec.tied_embeddings { Role::Embed } else { role };
        let (n, k, _) = self.matrix_shape(role);
        let module = fill(self.names.template(role), layer, 0);
        let stored = self.find(|finder| finder.module(&module, n, k))?;
        self.host(&stored, rows, cols, self.dtype)
    }

    /// The whole matrix of a role.
    ///
    /// # Errors
    /// See [`WeightReader`].
    pub fn whole_matrix(&self, role: Role, layer: usize) -> Result<HostMatrix<'a>> {
        let (n, k, _) = self.matrix_shape(role);
        self.matrix(role, layer, 0..n, 0..k)
    }

    /// Part of the bias of a matrix or norm; `None` where the model has no bias there.
    ///
    /// # Errors
    /// See [`WeightReader`].
    pub fn bias(&self, role: Role, layer: usize, range: Range<usize>) -> Result<Option<Vec<f32>>> {
        let len = match self.shape(role) {
            Some(RoleShape::Matrix { n, bias: true, .. }) => n,
            Some(RoleShape::Norm { width, bias: true }) => width,
            _ => return Ok(None),
        };
        let name = format!("{}.bias", fill(self.names.template(role), layer, 0));
        let stored = self.find(|finder| finder.vector(&name, len))?;
        Ok(Some(self.elements(&stored, range)))
    }

    /// Part of the weight of a norm, of the sinks or of the choice bias.
    ///
    /// # Errors
    /// See [`WeightReader`].
    pub fn vector(&self, role: Role, layer: usize, range: Range<usize>) -> Result<Vec<f32>> {
        let template = fill(self.names.template(role), layer, 0);
        let (name, len) = match self.shape(role) {
            Some(RoleShape::Norm { width, .. }) => (format!("{template}.weight"), width),
            Some(RoleShape::Bare { len }) => (template, len),
            other => panic!("{role:?} is not a vector of this model: {other:?}"),
        };
        let stored = self.find(|finder| finder.vector(&name, len))?;
        Ok(self.elements(&stored, range))
    }

    /// The whole of [`WeightReader::vector`].
    ///
    /// # Errors
    /// See [`WeightReader`].
    pub fn whole_vector(&self, role: Role, layer: usize) -> Result<Vec<f32>> {
        let len = match self.shape(role) {
            Some(RoleShape::Norm { width, .. }) => width,
            Some(RoleShape::Bare { len }) => len,
            other => panic!("{role:?} is not a vector of this model: {other:?}"),
        };
        self.vector(role, layer, 0..len)
    }

    /// Rows of the embedding.
    ///
    /// # Errors
    /// See [`WeightReader`].
    pub fn embedding(&self, rows: Range<usize>) -> Result<HostMatrix<'a>> {
        self.matrix(Role::Embed, 0, rows, 0..self.spec.hidden_size)
    }

    /// A slice of a gated MLP along its intermediate width: rows of gate and up, columns of down. The bias of down
    /// belongs to the sum over all slices: it is read with the slice that starts at 0, and is zero in the others.
    ///
    /// # Errors
    /// See [`WeightReader`].
    pub fn mlp(&self, kind: MlpKind, layer: usize, intermediate: Range<usize>) -> Result<HostMlp<'a>> {
        let hidden = self.spec.hidden_size;
        let dtype = match kind {
            MlpKind::Dense => self.dtype,
            MlpKind::Shared | MlpKind::Expert(_) => self.experts,
        };
        let read = |which: MlpMatrix| {
            let stored = self.find(|finder| self.mlp_matrix(finder, kind, layer, which))?;
            match which {
                MlpMatrix::Gate | MlpMatrix::Up => self.host(&stored, intermediate.clone(), 0..hidden, dtype),
                MlpMatrix::Down => self.host(&stored, 0..hidden, intermediate.clone(), dtype),
            }
        };
        let (gate, up, down) = (read(MlpMatrix::Gate)?, read(MlpMatrix::Up)?, read(MlpMatrix::Down)?);
        let bias = match kind {
            MlpKind::Expert(expert) if self.spec.moe.expert_bias => {
                Some(self.expert_bias(layer, expert, intermediate)?)
            }
            _ => None,
        };
        Ok(HostMlp { gate, up, down, bias })
    }

    /// Intermediate width of an MLP.
    pub fn intermediate(&self, kind: MlpKind, layer: usize) -> usize {
        match (kind, self.spec.layers[layer].ffn, self.spec.moe.shared) {
            (MlpKind::Dense, FeedForward::Dense { intermediate }, _) => intermediate,
            (MlpKind::Shared, FeedForward::Moe, Some(shared)) => shared.intermediate,
            (MlpKind::Expert(_), FeedForward::Moe, _) => self.spec.moe.intermediate,
            (_, ffn, shared) => panic!("layer {layer} has no {kind:?}: {ffn:?}, shared expert {shared:?}"),
        }
    }

    fn mlp_matrix(
        &self,
        finder: &mut Finder<'a>,
        kind: MlpKind,
        layer: usize,
        which: MlpMatrix,
    ) -> Option<StoredMatrix<'a>> {
        let names: &MlpNames = match kind {
            MlpKind::Expert(expert) => {
                return finder.expert(&self.names.experts, layer, expert, which, expert_shape(self.spec));
            }
            MlpKind::Dense => &self.names.dense,
            MlpKind::Shared => &self.names.shared,
        };
        let (hidden, intermediate) = (self.spec.hidden_size, self.intermediate(kind, layer));
        match which {
            MlpMatrix::Gate => finder.module(&fill(names.gate, layer, 0), intermediate, hidden),
            MlpMatrix::Up => finder.module(&fill(names.up, layer, 0), intermediate, hidden),
            MlpMatrix::Down => finder.module(&fill(names.down, layer, 0), hidden, intermediate),
        }
    }

    fn expert_bias(&self, layer: usize, expert: usize, intermediate: Range<usize>) -> Result<HostMlpBias> {
        let hidden = self.spec.hidden_size;
        let read = |which, range: Range<usize>| {
            let shape = expert_shape(self.spec);
            let stored =
                self.find(|finder| finder.expert_bias(&self.names.experts, layer, expert, which, shape))?;
            Ok::<_, Error>(self.elements(&stored, range))
        };
        let first = intermediate.start == 0;
        Ok(HostMlpBias {
            gate: read(MlpMatrix::Gate, intermediate.clone())?,
            up: read(MlpMatrix::Up, intermediate)?,
            down: if first { read(MlpMatrix::Down, 0..hidden)? } else { vec![0.0; hidden] },
        })
    }

    fn matrix_shape(&self, role: Role) -> (usize, usize, bool) {
        match self.shape(role) {
            Some(RoleShape::Matrix { n, k, bias }) => (n, k, bias),
            other => panic!("{role:?} is not a matrix of this model: {other:?}"),
        }
    }

    /// Runs one look-up; what it noted becomes the error.
    fn find<T>(&self, look: impl FnOnce(&mut Finder<'a>) -> Option<T>) -> Result<T> {
        let mut finder = Finder::new(self.checkpoint, self.spec.quantization.as_ref());
        look(&mut finder).ok_or_else(|| {
            let known = self.checkpoint.problems();
            let list = if finder.problems.is_empty() { known.to_vec() } else { finder.problems };
            self.refuse(list)
        })
    }

    fn refuse(&self, list: Vec<Problem>) -> Error {
        assert!(!list.is_empty(), "{}: a tensor was refused without a reason", self.checkpoint.name());
        Error::Checkpoint(Problems { checkpoint: self.checkpoint.name().to_owned(), list })
    }

    fn host(
        &self,
        stored: &StoredMatrix<'a>,
        rows: Range<usize>,
        cols: Range<usize>,
        dtype: DType,
    ) -> Result<HostMatrix<'a>> {
        let (n, k) = (rows.len(), cols.len());
        let data = match dtype {
            DType::F8 | DType::I4x2 => stored.block_quantized(rows, cols, dtype).map(HostData::Quantized),
            DType::Bf16 => match stored.bf16_in_place(rows.clone(), cols.clone()) {
                Some(here) => {
                    mmap::will_need(bytemuck::cast_slice(here));
                    Ok(HostData::Bf16(here.into()))
                }
                None => {
                    let mut out = vec![bf16::ZERO; n * k];
                    stored.block_bf16(rows, cols, &mut out).map(|()| HostData::Bf16(out.into()))
                }
            },
            _ => {
                let mut out = vec![0.0f32; n * k];
                stored.block(rows, cols, &mut out).map(|()| HostData::F32(out))
            }
        };
        let data = data.map_err(|problem| self.refuse(vec![problem]))?;
        self.report(stored.bytes_of(n, k));
        Ok(HostMatrix { n, k, data })
    }

    fn elements(&self, stored: &StoredVector<'_>, range: Range<usize>) -> Vec<f32> {
        self.report(stored.bytes_of(range.len()));
        stored.read(range)
    }

    fn report(&self, bytes: u64) {
        self.checkpoint.count_read(bytes);
        if let Some(progress) = self.progress {
            progress(bytes);
        }
    }
}
