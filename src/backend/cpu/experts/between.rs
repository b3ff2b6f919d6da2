//! What stands between the two matrices of an MLP: the activation, and the buffer that holds its results.

use crate::backend::cpu::memory::Element;
use crate::backend::cpu::panel::PANEL;
use crate::backend::cpu::simd::{Float, Kernel, Simd, sigmoid, sigmoid_alike};
use crate::spec::Activation;

/// The buffer between the two matrices, written by many tasks.
pub struct Between<T> {
    pub start: *mut T,
    pub stride: usize,
}

impl<T> Clone for Between<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Between<T> {}

// SAFETY: a plain address; tasks write disjoint blocks of rows and columns behind it.
unsafe impl<T: Element> Sync for Between<T> {}

impl<T> Between<T> {
    /// The same buffer from another element on.
    pub fn skip(self, row: usize, column: usize) -> Self {
        Between { start: self.start.wrapping_add(row * self.stride + column), ..self }
    }

    /// The first elements of a row.
    ///
    /// # Safety
    /// They are there for `'a`, written, and nobody writes them meanwhile.
    pub unsafe fn row<'a>(self, row: usize, width: usize) -> &'a [T] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts(self.start.add(row * self.stride), width) }
    }
}

/// `to[r][j] = act(gate[r][j] + bias, up[r][j] + bias)` for the first `columns` of one panel's columns.
pub struct Activate<'a, T> {
    pub gate: &'a [f32],
    pub up: &'a [f32],
    /// `PANEL` of gate, then `PANEL` of up.
    pub bias: Option<&'a [f32]>,
    pub activation: Activation,
    /// Round to bf16, for a buffer that holds widened bf16.
    pub round: bool,
    pub to: Between<T>,
    pub columns: usize,
}

impl<T: Float> Kernel for Activate<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (row, (gate, up)) in self.gate.chunks_exact(PANEL).zip(self.up.chunks_exact(PANEL)).enumerate() {
            for column in (0..self.columns).step_by(S::LANES) {
                let lanes = S::LANES.min(self.columns - column);
                // SAFETY: LANES divides PANEL, so whole vectors of sums and biases exist; `to` has `columns` in each row.
                unsafe {
                    let mut gate = simd.load(gate.as_ptr().add(column));
                    let mut up = simd.load(up.as_ptr().add(column));
                    if let Some(bias) = self.bias {
                        gate = simd.add(gate, simd.load(bias.as_ptr().add(column)));
                        up = simd.add(up, simd.load(bias.as_ptr().add(PANEL + column)));
                    }
                    let mut v = activate::<S, false>(simd, self.activation, gate, up);
                    if self.round {
                        v = simd.round_to_bf16(v);
                    }
                    let to = self.to.start.add(row * self.to.stride + column);
                    if lanes == S::LANES {
                        T::store(simd, to, v);
                    } else {
                        T::store_head(simd, to, lanes, v);
                    }
                }
            }
        }
    }
}

/// See [`Activation`]. Zero for zeros, so padding stays zero. `ALIKE`: with the same bits on every instruction set.
#[inline(always)]
pub fn activate<S: Simd, const ALIKE: bool>(simd: S, activation: Activation, gate: S::V, up: S::V) -> S::V {
    match activation {
        Activation::SiluMul => simd.mul(simd.mul(gate, sigmoid_as::<S, ALIKE>(simd, gate)), up),
        Activation::ClampedSwiglu { limit, alpha } => {
            let gate = simd.min(simd.splat(limit), gate);
            let up = simd.max(simd.splat(-limit), simd.min(simd.splat(limit), up));
            let glu = simd.mul(gate, sigmoid_as::<S, ALIKE>(simd, simd.mul(gate, simd.splat(alpha))));
            simd.mul(glu, simd.add(up, simd.splat(1.0)))
        }
    }
}

#[inline(always)]
fn sigmoid_as<S: Simd, const ALIKE: bool>(simd: S, x: S::V) -> S::V {
    if ALIKE { sigmoid_alike(simd, x) } else { sigmoid(simd, x) }
}
