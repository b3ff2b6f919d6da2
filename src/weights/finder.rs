//! Finds matrices and vectors in a checkpoint, and checks names, types and shapes. [`Finder`] is the single place that knows
//! which tensors make up a stored matrix, for checking ([`super::validate`]) and for reading ([`super::WeightReader`]).

use safetensors::Dtype;

use super::checkpoint::{Checkpoint, TensorRef};
use super::dummy::{self, Dummy};
use super::names::{ExpertNames, fill};
use super::quant::{Awq, Float, Fp8, Gptq, MXFP4_BLOCK, Mxfp4, NIBBLES, Plain};
use super::stored::{Form, NO_FILE, StoredMatrix, StoredVector, Values};
use crate::error::Problem;
use crate::spec::Quantization;

/// Element types of everything that is not quantised.
const FLOATS: &[Dtype] = &[Dtype::F32, Dtype::F16, Dtype::BF16];

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
