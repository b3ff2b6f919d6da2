//! Plain Rust: what runs everywhere, and what the compiler vectorises as well as it can.

use half::bf16;

use super::Simd;

/// No instruction set beyond the target's baseline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Portable;

const LANES: usize = 8;

/// Adding and subtracting this rounds to an integer: at 1.5 * 2^23 the spacing of f32 is 1.
const ROUNDER: f32 = 12_582_912.0;

#[inline(always)]
fn zip(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl Simd for Portable {
    type V = [f32; LANES];
    type Pairs = [u32; LANES];
    type Quads = [[i8; 4]; LANES];
    type Ints = [i32; LANES];
    const LANES: usize = LANES;
    // Each vector takes two of the sixteen that 128-bit machines have at least.
    const REGISTERS: usize = 8;
    const NATIVE_DOT: bool = false;
    const QUAD_OFFSET: i32 = 0;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        [x; LANES]
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // Not `mul_add`: where the baseline lacks FMA that is a function call per lane.
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn at_least(self, a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V {
        std::array::from_fn(|i| if a[i] >= b[i] { x[i] } else { y[i] })
    }
    #[inline(always)]
    fn equal(self, a: Self::V, b: Self::V) -> u32 {
        (0..LANES).map(|i| u32::from(a[i] == b[i]) << i).sum()
    }
    #[inline(always)]
    fn round(self, a: Self::V) -> Self::V {
        a.map(|x| (x + ROUNDER) - ROUNDER)
    }
    #[inline(always)]
    fn exp2(self, n: Self::V) -> Self::V {
        n.map(|x| f32::from_bits(((x as i32 + 127) as u32) << 23))
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> Self::V {
        // SAFETY: the caller vouches for LANES elements.
        unsafe { from.cast::<Self::V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32, v: Self::V) {
        // SAFETY: the caller vouches for LANES elements.
        unsafe { to.cast::<Self::V>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const bf16) -> Self::V {
        // SAFETY: the caller vouches for LANES elements.
        unsafe { from.cast::<[bf16; LANES]>().read_unaligned() }.map(widen)
    }
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut bf16, v: Self::V) {
        // SAFETY: the caller vouches for LANES elements.
        unsafe { to.cast::<[bf16; LANES]>().write_unaligned(v.map(bf16::from_f32)) }
    }

    #[inline(always)]
    unsafe fn load_pairs(self, from: *const bf16) -> Self::Pairs {
        // SAFETY: the caller vouches for 2 * LANES elements.
        unsafe { from.cast::<[[bf16; 2]; LANES]>().read_unaligned() }
            .map(|[even, odd]| u32::from(even.to_bits()) | u32::from(odd.to_bits()) << 16)
    }
    #[inline(always)]
    fn splat_pair(self, pair: u32) -> Self::Pairs {
        [pair; LANES]
    }
    #[inline(always)]
    fn even(self, pairs: Self::Pairs) -> Self::V {
        pairs.map(|pair| f32::from_bits(pair << 16))
    }
    #[inline(always)]
    fn odd(self, pairs: Self::Pairs) -> Self::V {
        pairs.map(|pair| f32::from_bits(pair & 0xffff_0000))
    }
    #[inline(always)]
    fn dot(self, acc: Self::V, a: Self::Pairs, b: Self::Pairs) -> Self::V {
        let acc = self.fma(self.even(a), self.even(b), acc);
        self.fma(self.odd(a), self.odd(b), acc)
    }
    #[inline(always)]
    fn interleave(self, a: Self::Pairs, b: Self::Pairs) -> [Self::Pairs; 2] {
        // Element i of a row is half of word i / 2.
        let element = |row: Self::Pairs, i: usize| row[i / 2] >> (16 * (i % 2)) & 0xffff;
        [0, LANES].map(|first| std::array::from_fn(|i| element(a, first + i) | element(b, first + i) << 16))
    }
    #[inline(always)]
    fn splat_int(self, n: i32) -> Self::Ints {
        [n; LANES]
    }
    #[inline(always)]
    unsafe fn load_ints(self, from: *const i32) -> Self::Ints {
        // SAFETY: the caller vouches for LANES elements.
        unsafe { from.cast::<Self::Ints>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store_ints(self, to: *mut i32, v: Self::Ints) {
        // SAFETY: the caller vouches for LANES elements.
        unsafe { to.cast::<Self::Ints>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn load_ints_as_f32(self, from: *const i32) -> Self::V {
        // SAFETY: the caller vouches for LANES elements.
        unsafe { from.cast::<Self::Ints>().read_unaligned() }.map(|n| n as f32)
    }
    #[inline(always)]
    unsafe fn store_i8(self, to: *mut i8, v: Self::V) {
        // SAFETY: the caller vouches for LANES elements.
        unsafe { to.cast::<[i8; LANES]>().write_unaligned(v.map(|x| x as i8)) }
    }
    #[inline(always)]
    fn splat_quad(self, quad: u32) -> Self::Quads {
        [quad.to_le_bytes().map(|byte| byte as i8); LANES]
    }
    #[inline(always)]
    unsafe fn load_quads(self, from: *const i8) -> Self::Quads {
        // SAFETY: the caller vouches for 4 * LANES elements.
        unsafe { from.cast::<Self::Quads>().read_unaligned() }
    }
    #[inline(always)]
    fn dot_quads(self, acc: Self::Ints, a: Self::Quads, w: Self::Quads) -> Self::Ints {
        let dot = |i: usize| (0..4).map(|j| i32::from(a[i][j]) * i32::from(w[i][j])).sum::<i32>();
        std::array::from_fn(|i| acc[i] + dot(i))
    }
    #[inline(always)]
    fn prefetch(self, _: *const u8) {}
    #[inline(always)]
    fn prefetch_once(self, _: *const u8) {}
}

/// Exact for every value; unlike `bf16::to_f32` it leaves the bits of a NaN alone, as the vector instructions do.
#[inline(always)]
fn widen(x: bf16) -> f32 {
    f32::from_bits(u32::from(x.to_bits()) << 16)
}
