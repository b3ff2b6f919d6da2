//! The two register tiles of attention over latents, which are keys and values at once: rows times transposed rows
//! ([`dots`]) and rows times rows ([`accumulate`]).
//! Every output element is computed in an order of its own, whatever tile it falls into: a dot product runs over
//! the vector, lane by lane, then over the lanes; an accumulated element takes one product after the other.

use super::memory::Rows;
pub(super) use super::product::Strided;
use super::simd::{Float, Simd};

impl<T: Float> Strided<T> {
    /// The rows of a matrix from `(row, column)` on.
    ///
    /// # Panics
    /// When there is no such element.
    #[inline(always)]
    pub(super) fn from(matrix: &Rows<'_, T>, row: usize, column: usize) -> Self {
        let (rows, cols) = (matrix.rows(), matrix.cols());
        assert!(row < rows && column < cols, "element ({row}, {column}) of [{rows}, {cols}]");
        // SAFETY: inside the matrix.
        let start = unsafe { matrix.as_ptr().add(row * matrix.stride() + column) };
        Strided { start, stride: matrix.stride() }
    }
}

impl<T> Strided<T> {
    /// The rows from `row` on.
    ///
    /// # Safety
    /// There is such a row, or it is one past the last.
    #[inline(always)]
    pub(super) unsafe fn skip(self, row: usize) -> Self {
        // SAFETY: the caller's promise.
        Strided { start: unsafe { self.start.add(row * self.stride) }, ..self }
    }
}

/// `out[r * out_stride + t] = q[r] . keys[t] * scale` for `rows` rows and `tokens` tokens.
///
/// # Safety
/// `q` has `rows` rows, `keys` has `tokens` of `width` (whole registers), and `out` room for all.
#[inline(always)]
pub(super) unsafe fn dots<S: Simd, T: Float>(
    simd: S,
    (q, rows): (Strided<f32>, usize),
    (keys, tokens, width): (Strided<T>, usize, usize),
    scale: f32,
    (out, out_stride): (*mut f32, usize),
) {
    for r in (0..rows).step_by(4) {
        // SAFETY: up to four of the caller's rows from `r` on.
        unsafe {
            let (q, out) = (q.skip(r), out.add(r * out_stride));
            match rows - r {
                1 => dot_rows::<S, T, 1, 8>(simd, q, (keys, tokens, width), scale, (out, out_stride)),
                2 => dot_rows::<S, T, 2, 4>(simd, q, (keys, tokens, width), scale, (out, out_stride)),
                3 => dot_rows::<S, T, 3, 2>(simd, q, (keys, tokens, width), scale, (out, out_stride)),
                _ => dot_rows::<S, T, 4, 2>(simd, q, (keys, tokens, width), scale, (out, out_stride)),
            }
        }
    }
}

/// [`dots`] of `R` rows, `C` tokens at a time.
///
/// # Safety
/// As [`dots`].
#[inline(always)]
unsafe fn dot_rows<S: Simd, T: Float, const R: usize, const C: usize>(
    simd: S,
    q: Strided<f32>,
    (keys, tokens, width): (Strided<T>, usize, usize),
    scale: f32,
    (out, out_stride): (*mut f32, usize),
) {
    let mut t = 0;
    // SAFETY: tokens below `tokens` only.
    unsafe {
        while t + C <= tokens {
            let tile = dot_tile::<S, T, R, C>(simd, q, keys.skip(t), width);
            for (r, row) in tile.into_iter().enumerate() {
                for (c, sum) in row.into_iter().enumerate() {
                    *out.add(r * out_stride + t + c) = sum * scale;
                }
            }
            t += C;
        }
        while t < tokens {
            let tile = dot_tile::<S, T, R, 1>(simd, q, keys.skip(t), width);
            for (r, [sum]) in tile.into_iter().enumerate() {
                *out.add(r * out_stride + t) = sum * scale;
            }
            t += 1;
        }
    }
}

/// `R` rows times `C` tokens.
///
/// # Safety
/// `q` has `R` rows of `width`, `keys` has `C`.
#[inline(always)]
unsafe fn dot_tile<S: Simd, T: Float, const R: usize, const C: usize>(
    simd: S,
    q: Strided<f32>,
    keys: Strided<T>,
    width: usize,
) -> [[f32; C]; R] {
    let mut sums = [[simd.zero(); C]; R];
    for d in (0..width).step_by(S::LANES) {
        let mut k = [simd.zero(); C];
        for (c, k) in k.iter_mut().enumerate() {
            // SAFETY: `d` is a whole register before the end of row `c`.
            *k = unsafe { T::load(simd, keys.at(c, d)) };
        }
        for (r, sums) in sums.iter_mut().enumerate() {
            // SAFETY: likewise.
            let q = unsafe { simd.load(q.at(r, d)) };
            for (sum, &k) in sums.iter_mut().zip(&k) {
                *sum = simd.fma(q, k, *sum);
            }
        }
    }
    let mut out = [[0.0; C]; R];
    for (out, sums) in out.iter_mut().zip(&sums) {
        for (out, &sum) in out.iter_mut().zip(sums) {
            *out = simd.sum(sum);
        }
    }
    out
}

/// `out[r] += sum_t p[r][t] * values[t]`, t ascending, for `rows` rows and `tokens` tokens; rows of `out` lie
/// `width` apart, which is also the width of a value: a multiple of the largest register.
///
/// # Safety
/// `p` has `rows` rows of `tokens` elements, `values` `tokens` rows, and `out` room for all.
#[inline(always)]
pub(super) unsafe fn accumulate<S: Simd, T: Float>(
    simd: S,
    (p, rows): (Strided<f32>, usize),
    (values, tokens): (Strided<T>, usize),
    (out, width): (*mut f32, usize),
) {
    for r in (0..rows).step_by(4) {
        // SAFETY: up to four of the caller's rows from `r` on.
        unsafe {
            let (p, out) = (p.skip(r), out.add(r * width));
            match rows - r {
                1 => accumulate_rows::<S, T, 1, 8>(simd, p, (values, tokens), (out, width)),
                2 => accumulate_rows::<S, T, 2, 4>(simd, p, (values, tokens), (out, width)),
                3 => accumulate_rows::<S, T, 3, 2>(simd, p, (values, tokens), (out, width)),
                _ => accumulate_rows::<S, T, 4, 2>(simd, p, (values, tokens), (out, width)),
            }
        }
    }
}

/// [`accumulate`] of `R` rows, `N` registers at a time.
///
/// # Safety
/// As [`accumulate`].
#[inline(always)]
unsafe fn accumulate_rows<S: Simd, T: Float, const R: usize, const N: usize>(
    simd: S,
    p: Strided<f32>,
    (values, tokens): (Strided<T>, usize),
    (out, width): (*mut f32, usize),
) {
    let mut d = 0;
    // SAFETY: whole registers before `width` only.
    unsafe {
        while d + N * S::LANES <= width {
            let values = Strided { start: values.start.add(d), ..values };
            accumulate_tile::<S, T, R, N>(simd, p, (values, tokens), (out.add(d), width));
            d += N * S::LANES;
        }
        while d < width {
            let values = Strided { start: values.start.add(d), ..values };
            accumulate_tile::<S, T, R, 1>(simd, p, (values, tokens), (out.add(d), width));
            d += S::LANES;
        }
    }
}

/// `R` rows times `N` registers of every value.
///
/// # Safety
/// `p` has `R` rows of `tokens` elements, `values` `tokens` rows of `N` registers, `out` `R` of them.
#[inline(always)]
unsafe fn accumulate_tile<S: Simd, T: Float, const R: usize, const N: usize>(
    simd: S,
    p: Strided<f32>,
    (values, tokens): (Strided<T>, usize),
    (out, out_stride): (*mut f32, usize),
) {
    let mut sums = [[simd.zero(); N]; R];
    // SAFETY: the caller's promise.
    unsafe {
        for (r, sums) in sums.iter_mut().enumerate() {
            for (n, sum) in sums.iter_mut().enumerate() {
                *sum = simd.load(out.add(r * out_stride + n * S::LANES));
            }
        }
        for t in 0..tokens {
            let mut v = [simd.zero(); N];
            for (n, v) in v.iter_mut().enumerate() {
                *v = T::load(simd, values.start.add(t * values.stride + n * S::LANES));
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                let weight = simd.splat(*p.start.add(r * p.stride + t));
                for (sum, &v) in sums.iter_mut().zip(&v) {
                    *sum = simd.fma(weight, v, *sum);
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (n, &sum) in sums.iter().enumerate() {
                simd.store(out.add(r * out_stride + n * S::LANES), sum);
            }
        }
    }
}
