//! Functions of vectors whose result for a value depends on nothing but the value and the instruction set.

use super::Simd;

/// e^x to about 1 ulp (2 without FMA) over the whole range of f32: denormal results, 0 and infinity included; NaN stays NaN.
///
/// x = n ln 2 + r with |r| <= ln 2 / 2, so e^x = 2^n e^r. The split of ln 2 in two and the polynomial for e^r are those of
/// Cephes' `expf` (S. Moshier).
#[inline(always)]
pub fn exp<S: Simd>(simd: S, x: S::V) -> S::V {
    exp_as::<S, true>(simd, x)
}

/// [`exp`], with or without FMA.
#[inline(always)]
fn exp_as<S: Simd, const FUSED: bool>(simd: S, x: S::V) -> S::V {
    let k = |c: f32| simd.splat(c);
    // Beyond these the result is 0 or infinity anyway. The constants stand first, so that a NaN passes.
    let x = simd.min(k(89.0), simd.max(k(-104.0), x));
    let n = simd.round(simd.mul(x, k(std::f32::consts::LOG2_E)));
    // The upper part, 355 / 512, has few bits: n times it is exact.
    let r = multiply_add::<S, FUSED>(simd, n, k(-355.0 / 512.0), x);
    let r = multiply_add::<S, FUSED>(simd, n, k(2.121_944_4e-4), r);
    let mut p = k(1.987_569_1e-4);
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = multiply_add::<S, FUSED>(simd, p, r, k(c));
    }
    let p = simd.add(multiply_add::<S, FUSED>(simd, p, simd.mul(r, r), r), k(1.0));
    simd.scale_exp2(p, n)
}

/// 1 / (1 + e^-x)
#[inline(always)]
pub fn sigmoid<S: Simd>(simd: S, x: S::V) -> S::V {
    sigmoid_as::<S, true>(simd, x)
}

/// [`sigmoid`] with the same bits on every instruction set: no product is fused with a sum, as not all of them can.
#[inline(always)]
pub fn sigmoid_alike<S: Simd>(simd: S, x: S::V) -> S::V {
    sigmoid_as::<S, false>(simd, x)
}

#[inline(always)]
fn sigmoid_as<S: Simd, const FUSED: bool>(simd: S, x: S::V) -> S::V {
    let one = simd.splat(1.0);
    simd.div(one, simd.add(one, exp_as::<S, FUSED>(simd, simd.sub(simd.zero(), x))))
}

/// `a * b + c`
#[inline(always)]
fn multiply_add<S: Simd, const FUSED: bool>(simd: S, a: S::V, b: S::V, c: S::V) -> S::V {
    if FUSED { simd.fma(a, b, c) } else { simd.add(simd.mul(a, b), c) }
}
