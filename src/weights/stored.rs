//! Finds a matrix or vector in a checkpoint in whichever form it is stored, checks names, types and shapes, and reads
//! any block of it. [`Finder`] is the single place that knows which tensors make up a stored matrix, for checking
//! ([`super::validate`]) and for reading ([`super::WeightReader`]).

use super::checkpoint::{Checkpoint, TensorRef};
use super::dummy::{self, Dummy};
use super::names::{ExpertNames, fill};
use super::quant::{Awq, BadGroup, Float, Fp8, Gptq, MXFP4_BLOCK, Mxfp4, NIBBLES, Plain};
use crate::backend::DType;
use crate::backend::quantized::Quantized;
use crate::error::Problem;
use crate::spec::Quantization;
use half::bf16;
use safetensors::Dtype;
use std::ops::Range;

/// Element types of everything that is not quantised.
const FLOATS: &[Dtype] = &[Dtype::F32, Dtype::F16, Dtype::BF16];

/// A matrix `[n, k]` as it is stored.
#[derive(Debug)]
pub struct StoredMatrix<'a> {
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    form: Form<'a>,
    /// Bytes it takes in the file, companions included.
    bytes: usize,
    file: &'a str,
    name: String,
}

#[derive(Debug)]
enum Form<'a> {
    Plain(Plain<'a>),
    Fp8(Fp8<'a>),
    Awq(Awq<'a>),
    Gptq(Gptq<'a>),
    Mxfp4(Mxfp4<'a>),
    Dummy(Dummy),
}

/// Where made-up values are.
const NO_FILE: &str = "no file";

/// Rows dequantised at a time when the run wants bfloat16: bounds the f32 copy in between.
const ROWS_AT_ONCE: usize = 64;

impl StoredMatrix<'_> {
    /// Writes a block as f32, row-major, exactly.
    ///
    /// # Errors
    /// When the data are inconsistent (a GPTQ group that is not there).
    pub fn block(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) -> Result<(), Problem> {
        self.check(&rows, &cols, out.len());
        if out.is_empty() {
            return Ok(());
        }
        match &self.form {
            Form::Plain(form) => form.block(rows, cols, out),
            Form::Fp8(form) => form.block(rows, cols, out),
            Form::Awq(form) => form.block(rows, cols, out),
            Form::Gptq(form) => form.block(rows, cols, out).map_err(|bad| self.bad_group(bad))?,
            Form::Mxfp4(form) => form.block(rows, cols, out),
            Form::Dummy(form) => form.block(rows, cols, out),
        }
        Ok(())
    }

    /// Writes a block as bfloat16, row-major: as stored where it is stored so, else rounded to nearest even once.
    ///
    /// # Errors
    /// As [`StoredMatrix::block`].
    pub fn block_bf16(
        &self,
        rows: Range<usize>,
        cols: Range<usize>,
        out: &mut [bf16],
    ) -> Result<(), Problem> {
        self.check(&rows, &cols, out.len());
        if out.is_empty() {
            return Ok(());
        }
        if let Form::Plain(form) = &self.form
            && form.copy_bf16(rows.clone(), cols.clone(), out)
        {
            return Ok(());
        }
        if let Form::Dummy(form) = &self.form {
            form.block_bf16(rows, cols, out);
            return Ok(());
        }
        let mut wide = vec![0.0; ROWS_AT_ONCE.min(rows.len()) * cols.len()];
        for (start, out) in rows.clone().step_by(ROWS_AT_ONCE).zip(out.chunks_mut(ROWS_AT_ONCE * cols.len()))
        {
            let some = start..(start + ROWS_AT_ONCE).min(rows.end);
            let wide = &mut wide[..out.len()];
            self.block(some, cols.clone(), wide)?;
            for (out, &value) in out.iter_mut().zip(&*wide) {
                *out = bf16::from_f32(value);
            }
        }
        Ok(())
    }

    /// A block with codes and scales: as it is stored where that is in this form, else quantised from the exact numbers.
    ///
    /// # Errors
    /// As [`StoredMatrix::block`].
    ///
    /// # Panics
    /// When `dtype` is none of [`crate::backend::quantized`].
    pub fn block_quantized(
        &self,
        rows: Range<usize>,
        cols: Range<usize>,
        dtype: DType,
    ) -> Result<Quantized, Problem> {
        let (n, k) = (rows.len(), cols.len());
        self.check(&rows, &cols, n * k);
        let stored = match &self.form {
            Form::Fp8(form) if dtype == DType::F8 => form.quantized(rows.clone(), cols.clone()),
            Form::Awq(form) if dtype == DType::I4x2 => form.quantized(rows.clone(), cols.clone()),
            Form::Gptq(form) if dtype == DType::I4x2 => form.quantized(rows.clone(), cols.clone()),
            _ => None,
        };
        if let Some(stored) = stored {
            return Ok(stored);
        }
        let mut exact = vec![0.0; n * k];
        self.block(rows, cols, &mut exact)?;
        Ok(Quantized::of(&exact, n, k, dtype))
    }

    /// Bytes of the file that a block of this shape takes, for progress; companions are shared out evenly.
    pub fn bytes_of(&self, rows: usize, cols: usize) -> u64 {
        let (part, whole) = (rows as u128 * cols as u128, self.n as u128 * self.k as u128);
        (self.bytes as u128 * part / whole.max(1)) as u64
    }

    /// Data that cannot be judged by shapes: a GPTQ matrix must name existing groups.
    ///
    /// # Errors
    /// The first fault.
    pub fn check_data(&self) -> Result<(), Problem> {
        match &self.form {
            Form::Gptq(form) => form.groups_of(0..self.k).map(drop).map_err(|bad| self.bad_group(bad)),
            Form::Plain(_) | Form::Fp8(_) | Form::Awq(_) | Form::Mxfp4(_) | Form::Dummy(_) => Ok(()),
        }
    }

    /// The module or tensor it is stored as.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that holds it.
    pub fn file(&self) -> &str {
        self.file
    }

    fn check(&self, rows: &Range<usize>, cols: &Range<usize>, out: usize) {
        assert!(
            rows.start <= rows.end && rows.end <= self.n && cols.start <= cols.end && cols.end <= self.k,
            "{}: block {rows:?} x {cols:?} of [{}, {}]",
            self.name,
            self.n,
            self.k
        );
        assert_eq!(out, rows.len() * cols.len(), "{}: room for block {rows:?} x {cols:?}", self.name);
    }

    fn bad_group(&self, bad: BadGroup) -> Problem {
        Problem {
            file: self.file.to_owned(),
            item: Some(format!("{}.g_idx", self.name)),
            expected: format!("groups 0..{}", bad.groups),
            found: format!("group {} for input {}", bad.group, bad.input),
        }
    }
}

/// Which matrix of a gated MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MlpMatrix {
    /// `[intermediate, hidden]`
    Gate,
    /// `[intermediate, hidden]`
    Up,
    /// `[hidden, intermediate]`
    Down,
}

/// Sizes of the routed experts of a layer.
#[derive(Debug, Clone, Copy)]
pub struct ExpertShape {
    /// Experts per layer.
    pub experts: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Intermediate width of one expert.
    pub intermediate: usize,
}

/// A vector of floating-point numbers as it is stored: element `i` is number `first + i * step` of the tensor.
#[derive(Debug)]
pub struct StoredVector<'a> {
    values: Values<'a>,
    /// Elements.
    pub len: usize,
}

#[derive(Debug)]
enum Values<'a> {
    Stored {
        tensor: TensorRef<'a>,
        float: Float,
        first: usize,
        step: usize,
    },
    /// All the same.
    Dummy(f32),
}

impl StoredVector<'_> {
    /// Some elements, as f32.
    ///
    /// # Panics
    /// When the range leaves the vector.
    pub fn read(&self, range: Range<usize>) -> Vec<f32> {
        assert!(range.start <= range.end && range.end <= self.len, "elements {range:?} of {}", self.len);
        match self.values {
            Values::Stored { tensor, float, first, step } => {
                range.map(|i| float.get(tensor.bytes, first + i * step)).collect()
            }
            Values::Dummy(value) => vec![value; range.len()],
        }
    }

    /// Bytes of the file that `len` elements take.
    pub fn bytes_of(&self, len: usize) -> u64 {
        match self.values {
            Values::Stored { float, .. } => (len * float.bytes()) as u64,
            Values::Dummy(_) => (len * Float::Bf16.bytes()) as u64,
        }
    }

    /// The file that holds it.
    pub fn file(&self) -> &str {
        match self.values {
            Values::Stored { tensor, .. } => tensor.file,
            Values::Dummy(_) => NO_FILE,
        }
    }
}

/// Looks things up in one checkpoint, noting every problem and every tensor used.
#[derive(Debug)]
pub struct Finder<'a> {
    checkpoint: &'a Checkpoint,
    quantization: Option<&'a Quantization>,
    /// What was wrong so far. A tensor that is lost for a reason the checkpoint noted already is not noted again.
    pub problems: Vec<Problem>,
    /// Every tensor asked for, with its bytes when it is there.
    pub used: Vec<(String, usize)>,
}

impl<'a> Finder<'a> {
    /// `quantization`: what config.json says about quantised matrices.
    pub fn new(checkpoint: &'a Checkpoint, quantization: Option<&'a Quantization>) -> Self {
        Finder { checkpoint, quantization, problems: Vec::new(), used: Vec::new() }
    }

    /// The matrix `[n, k]` of a linear module, plain or quantised, judged by the tensors that are there: a quantised
    /// model keeps some modules plain (`modules_to_not_convert`).
    pub fn module(&mut self, module: &str, n: usize, k: usize) -> Option<StoredMatrix<'a>> {
        if self.checkpoint.is_dummy() {
            return Some(self.dummy(module.to_owned(), n, k));
        }
        let weight = format!("{module}.weight");
        let plain = self.checkpoint.tensor(&weight);
        let packed = self.has_packed(module);
        let before = self.used.len();
        let (form, file) = match (self.quantization, plain) {
            (Some(Quantization::Fp8Block { block }), Some(tensor)) if tensor.dtype == Dtype::F8_E4M3 => {
                self.fp8(module, [n, k], *block)?
            }
            (Some(Quantization::Awq { group_size }), None) if packed => {
                self.awq(module, [n, k], group_size.unwrap_or(k))?
            }
            (Some(Quantization::Gptq { group_size }), None) if packed => {
                self.gptq(module, [n, k], group_size.unwrap_or(k))?
            }
            (_, None) if packed => {
                let found = "4-bit tensors beside it, but config.json announces no AWQ or GPTQ";
                self.missing(&weight, &expected_text(FLOATS, &[n, k]), found);
                return None;
            }
            _ => {
                let tensor = self.tensor(&weight, FLOATS, &[n, k])?;
                (Form::Plain(Plain::rows_of(tensor.bytes, Float::of(tensor.dtype)?, 0, k)), tensor.file)
            }
        };
        let bytes = self.used[before..].iter().map(|(_, bytes)| bytes).sum();
        Some(StoredMatrix { n, k, form, bytes, file, name: module.to_owned() })
    }

    /// One matrix of one expert, in any layout.
    pub fn expert(
        &mut self,
        names: &ExpertNames,
        layer: usize,
        expert: usize,
        which: MlpMatrix,
        shape: ExpertShape,
    ) -> Option<StoredMatrix<'a>> {
        let ExpertShape { experts, hidden, intermediate } = shape;
        assert!(expert < experts, "expert {expert} of {experts}");
        let down = which == MlpMatrix::Down;
        let [n, k] = if down { [hidden, intermediate] } else { [intermediate, hidden] };
        if self.checkpoint.is_dummy() {
            return Some(self.dummy(format!("layer {layer}, expert {expert}, {which:?}"), n, k));
        }
        // Rows of gate_up, of which gate and up are halves or alternate.
        let stored_n = if down { n } else { n.saturating_mul(2) };
        let up = usize::from(which == MlpMatrix::Up);
        let before = self.used.len();
        let (form, tensor, name) = match names {
            ExpertNames::PerExpert(names) => {
                let template = match which {
                    MlpMatrix::Gate => names.gate,
                    MlpMatrix::Up => names.up,
                    MlpMatrix::Down => names.down,
                };
                return self.module(&fill(template, layer, expert), n, k);
            }
            ExpertNames::FusedLinear { gate_up, down: down_name } => {
                let name = fill(if down { down_name } else { gate_up }, layer, expert);
                let tensor = self.tensor(&name, FLOATS, &[experts, stored_n, k])?;
                let first = (expert * stored_n + up * n) * k;
                (Form::Plain(Plain::rows_of(tensor.bytes, Float::of(tensor.dtype)?, first, k)), tensor, name)
            }
            ExpertNames::FusedInterleaved { gate_up, down: down_name } => {
                let name = fill(if down { down_name } else { gate_up }, layer, expert);
                let step = if down { 1 } else { 2 };
                if self.is_mxfp4(&name) {
                    let (blocks, scales) = self.mxfp4(&name, experts, stored_n, k)?;
                    let first = expert * stored_n + up;
                    (Form::Mxfp4(Mxfp4::new(blocks.bytes, scales.bytes, k, first, step)), blocks, name)
                } else {
                    let tensor = self.tensor(&name, FLOATS, &[experts, k, stored_n])?;
                    let plain = Plain {
                        bytes: tensor.bytes,
                        float: Float::of(tensor.dtype)?,
                        first: expert * k * stored_n + up,
                        row_stride: step,
                        col_stride: stored_n,
                    };
                    (Form::Plain(plain), tensor, name)
                }
            }
        };
        let bytes =
            self.used[before..].iter().map(|(_, bytes)| bytes).sum::<usize>() / experts * n / stored_n.max(1);
        Some(StoredMatrix { n, k, form, bytes, file: tensor.file, name })
    }

    /// The bias of one matrix of one expert.
    pub fn expert_bias(
        &mut self,
        names: &ExpertNames,
        layer: usize,
        expert: usize,
        which: MlpMatrix,
        shape: ExpertShape,
    ) -> Option<StoredVector<'a>> {
        let ExpertShape { experts, hidden, intermediate } = shape;
        let down = which == MlpMatrix::Down;
        let len = if down { hidden } else { intermediate };
        let up = usize::from(which == MlpMatrix::Up);
        let (template, first, step) = match names {
            ExpertNames::PerExpert(names) => {
                let template = match which {
                    MlpMatrix::Gate => names.gate,
                    MlpMatrix::Up => names.up,
                    MlpMatrix::Down => names.down,
                };
                return self.vector(&format!("{}.bias", fill(template, layer, expert)), len);
            }
            ExpertNames::FusedLinear { down: name, .. }
            | ExpertNames::FusedInterleaved { down: name, .. }
                if down =>
            {
                (name, expert * len, 1)
            }
            ExpertNames::FusedLinear { gate_up, .. } => (gate_up, (2 * expert + up) * len, 1),
            ExpertNames::FusedInterleaved { gate_up, .. } => (gate_up, 2 * expert * len + up, 2),
        };
        let stored_len = if down { len } else { len.saturating_mul(2) };
        let name = format!("{}_bias", fill(template, layer, expert));
        if self.checkpoint.is_dummy() {
            return Some(StoredVector { values: Values::Dummy(dummy::vector_value(&name)), len });
        }
        let tensor = self.tensor(&name, FLOATS, &[experts, stored_len])?;
        let values = Values::Stored { tensor, float: Float::of(tensor.dtype)?, first, step };
        Some(StoredVector { values, len })
    }

    /// A vector of `len` floating-point numbers.
    pub fn vector(&mut self, name: &str, len: usize) -> Option<StoredVector<'a>> {
        if self.checkpoint.is_dummy() {
            return Some(StoredVector { values: Values::Dummy(dummy::vector_value(name)), len });
        }
        let tensor = self.tensor(name, FLOATS, &[len])?;
        let values = Values::Stored { tensor, float: Float::of(tensor.dtype)?, first: 0, step: 1 };
        Some(StoredVector { values, len })
    }

    /// Made-up values, counted as the bf16 that such a checkpoint would hold.
    fn dummy(&mut self, name: String, n: usize, k: usize) -> StoredMatrix<'a> {
        let bytes = n.saturating_mul(k).saturating_mul(Float::Bf16.bytes());
        self.used.push((name.clone(), bytes));
        StoredMatrix { n, k, form: Form::Dummy(Dummy::new(&name, k)), bytes, file: NO_FILE, name }
    }

    fn fp8(&mut self, module: &str, [n, k]: [usize; 2], block: [usize; 2]) -> Option<(Form<'a>, &'a str)> {
        let codes = self.tensor(&format!("{module}.weight"), &[Dtype::F8_E4M3], &[n, k]);
        let blocks = [n.div_ceil(block[0].max(1)), k.div_ceil(block[1].max(1))];
        let scales = self.tensor(&format!("{module}.weight_scale_inv"), FLOATS, &blocks);
        let (codes, scales) = (codes?, scales?);
        let form =
            Fp8::new(codes.bytes, scales.bytes, Float::of(scales.dtype)?, [n, k], block.map(|b| b.max(1)));
        Some((Form::Fp8(form), codes.file))
    }

    fn awq(&mut self, module: &str, [n, k]: [usize; 2], group: usize) -> Option<(Form<'a>, &'a str)> {
        let group = group.max(1);
        let groups = k.div_ceil(group);
        let words = n.div_ceil(NIBBLES);
        let qweight = self.tensor(&format!("{module}.qweight"), &[Dtype::I32], &[k, words]);
        let qzeros = self.tensor(&format!("{module}.qzeros"), &[Dtype::I32], &[groups, words]);
        let scales = self.tensor(&format!("{module}.scales"), FLOATS, &[groups, n]);
        let (qweight, qzeros, scales) = (qweight?, qzeros?, scales?);
        if !n.is_multiple_of(NIBBLES) {
            self.note(qweight.file, module, "a multiple of 8 outputs for AWQ", &n.to_string());
            return None;
        }
        let scale_type = Float::of(scales.dtype)?;
        let form = Awq::new(qweight.bytes, qzeros.bytes, scales.bytes, scale_type, [n, k], group);
        Some((Form::Awq(form), qweight.file))
    }

    fn gptq(&mut self, module: &str, [n, k]: [usize; 2], group: usize) -> Option<(Form<'a>, &'a str)> {
        let group = group.max(1);
        let groups = k.div_ceil(group);
        let qweight = self.tensor(&format!("{module}.qweight"), &[Dtype::I32], &[k.div_ceil(NIBBLES), n]);
        let qzeros = self.tensor(&format!("{module}.qzeros"), &[Dtype::I32], &[groups, n.div_ceil(NIBBLES)]);
        let scales = self.tensor(&format!("{module}.scales"), FLOATS, &[groups, n]);
        // Files written without desc_act may leave g_idx out.
        let g_idx_name = format!("{module}.g_idx");
        let has_g_idx = self.checkpoint.tensor(&g_idx_name).is_some() || self.checkpoint.is_lost(&g_idx_name);
        let g_idx = if has_g_idx { Some(self.tensor(&g_idx_name, &[Dtype::I32], &[k])?) } else { None };
        let (qweight, qzeros, scales) = (qweight?, qzeros?, scales?);
        let form = Gptq::new(
            [qweight.bytes, qzeros.bytes, scales.bytes],
            g_idx.map(|tensor| tensor.bytes),
            Float::of(scales.dtype)?,
            [n, k],
            group,
        );
        Some((Form::Gptq(form), qweight.file))
    }

    fn mxfp4(
        &mut self,
        name: &str,
        experts: usize,
        n: usize,
        k: usize,
    ) -> Option<(TensorRef<'a>, TensorRef<'a>)> {
        let per_row = k.div_ceil(MXFP4_BLOCK);
        let shape = [experts, n, per_row, MXFP4_BLOCK / 2];
        let blocks = self.tensor(&format!("{name}_blocks"), &[Dtype::U8], &shape);
        let scales = self.tensor(&format!("{name}_scales"), &[Dtype::U8], &shape[..3]);
        blocks.zip(scales)
    }

    /// Any of the 4-bit tensors of a module is there, or is lost.
    fn has_packed(&self, module: &str) -> bool {
        let there = |end: &str| self.checkpoint.tensor(&format!("{module}{end}")).is_some();
        there(".qweight") || there(".qzeros") || there(".scales")
    }

    /// The experts are stored as MXFP4 rather than plain.
    fn is_mxfp4(&self, name: &str) -> bool {
        let there = |end: &str| self.checkpoint.tensor(&format!("{name}{end}")).is_some();
        self.quantization == Some(&Quantization::Mxfp4)
            && !there("")
            && (there("_blocks") || there("_scales"))
    }

    /// A tensor of one of these types and this shape.
    fn tensor(&mut self, name: &str, dtypes: &[Dtype], shape: &[usize]) -> Option<TensorRef<'a>> {
        let tensor = self.checkpoint.tensor(name);
        self.used.push((name.to_owned(), tensor.map_or(0, |tensor| tensor.bytes.len())));
        let Some(tensor) = tensor else {
            if !self.checkpoint.is_lost(name) {
                self.missing(name, &expected_text(dtypes, shape), "no such tensor");
            }
            return None;
        };
        if dtypes.contains(&tensor.dtype) && tensor.shape == shape {
            return Some(tensor);
        }
        let found = format!("{} {:?}", tensor.dtype, tensor.shape);
        self.note(tensor.file, name, &expected_text(dtypes, shape), &found);
        None
    }

    fn missing(&mut self, name: &str, expected: &str, found: &str) {
        self.note(self.checkpoint.table_of_contents(), name, expected, found);
    }

    fn note(&mut self, file: &str, item: &str, expected: &str, found: &str) {
        self.problems.push(Problem {
            file: file.to_owned(),
            item: Some(item.to_owned()),
            expected: expected.to_owned(),
            found: found.to_owned(),
        });
    }
}

/// "F32, F16 or BF16 [80, 64]".
fn expected_text(dtypes: &[Dtype], shape: &[usize]) -> String {
    let names: Vec<String> = dtypes.iter().map(Dtype::to_string).collect();
    let types = match names.as_slice() {
        [rest @ .., last] if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        _ => names.concat(),
    };
    format!("{types} {shape:?}")
}
