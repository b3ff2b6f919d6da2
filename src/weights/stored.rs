//! A matrix or a vector in whichever form a checkpoint stores it: any block of it can be read.

use std::ops::Range;

use half::bf16;

use super::checkpoint::TensorRef;
use super::dummy::Dummy;
use super::quant::{Awq, BadGroup, Float, Fp8, Gptq, Mxfp4, Plain};
use crate::backend::DType;
use crate::backend::quantized::Quantized;
use crate::error::Problem;

/// A matrix `[n, k]` as it is stored.
#[derive(Debug)]
pub struct StoredMatrix<'a> {
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    pub(super) form: Form<'a>,
    /// Bytes it takes in the file, companions included.
    pub(super) bytes: usize,
    pub(super) file: &'a str,
    pub(super) name: String,
}

/// How its numbers are stored.
#[derive(Debug)]
pub(super) enum Form<'a> {
    Plain(Plain<'a>),
    Fp8(Fp8<'a>),
    Awq(Awq<'a>),
    Gptq(Gptq<'a>),
    Mxfp4(Mxfp4<'a>),
    Dummy(Dummy),
}

/// Where made-up values are.
pub(super) const NO_FILE: &str = "no file";

/// Rows dequantised at a time when the run wants bfloat16: bounds the f32 copy in between.
const ROWS_AT_ONCE: usize = 64;

impl<'a> StoredMatrix<'a> {
    /// A block that the file holds as bfloat16, row-major and without gaps: where it is.
    pub fn bf16_in_place(&self, rows: Range<usize>, cols: Range<usize>) -> Option<&'a [bf16]> {
        self.check(&rows, &cols, rows.len() * cols.len());
        match &self.form {
            Form::Plain(form) => form.bf16_in_place(rows, cols),
            _ => None,
        }
    }

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

/// A vector of floating-point numbers as it is stored: element `i` is number `first + i * step` of the tensor.
#[derive(Debug)]
pub struct StoredVector<'a> {
    pub(super) values: Values<'a>,
    /// Elements.
    pub len: usize,
}

/// Where its numbers are.
#[derive(Debug)]
pub(super) enum Values<'a> {
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
