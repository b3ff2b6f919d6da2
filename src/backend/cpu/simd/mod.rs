//! Vectors of f32 for kernels that are written once. A kernel is a struct that implements [`Kernel`], generic over [`Simd`];
//! [`Isa::dispatch`] compiles it once per instruction set and enters the right copy.
//!
//! Two rules keep results independent of batch and position: every lane is computed alike, and tails go through the
//! same instructions on padded vectors. Results may differ between instruction sets, never within one.

mod math;
mod portable;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

use half::bf16;

#[cfg(target_arch = "x86_64")]
pub use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub use avx512::Avx512;
pub use math::{exp, sigmoid, sigmoid_alike};
pub use portable::Portable;

/// An instruction set this machine has. The variants carry proof: only detection makes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// Plain Rust.
    Portable(Portable),
    /// AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    /// AVX-512 F, BW, DQ, VL, BF16 and VNNI.
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
}

impl Isa {
    /// The best instruction set of this machine.
    pub fn detect() -> Isa {
        *Isa::available().last().expect("the portable one is always there")
    }

    /// Everything this machine can run, slowest first: what tests go through.
    pub fn available() -> Vec<Isa> {
        #[allow(unused_mut, reason = "only x86 has more than one")]
        let mut isas = vec![Isa::Portable(Portable)];
        #[cfg(target_arch = "x86_64")]
        {
            isas.extend(Avx2::detect().map(Isa::Avx2));
            isas.extend(Avx512::detect().map(Isa::Avx512));
        }
        isas
    }

    /// Its usual name.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable(_) => "portable",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(_) => "avx512-bf16",
        }
    }

    /// Runs the copy of `kernel` compiled for this instruction set.
    #[inline]
    pub fn dispatch<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            Isa::Portable(simd) => kernel.run(simd),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the value proves that detection found the instruction set.
            Isa::Avx2(simd) => unsafe { avx2::enter(simd, kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the value proves that detection found the instruction set.
            Isa::Avx512(simd) => unsafe { avx512::enter(simd, kernel) },
        }
    }
}

/// Code compiled once per instruction set. `run` and every generic function it calls must be `#[inline(always)]`: only what is inlined
/// into the entry point may use its instructions.
pub trait Kernel {
    /// What `run` returns.
    type Output;
    /// The body.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// The largest [`Simd::LANES`].
pub const MAX_LANES: usize = 16;
/// Bytes of a cache line, what one [`Simd::prefetch`] asks for.
pub const LINE: usize = 64;

/// Vectors of f32 and of bf16 pairs on one instruction set. A value proves that the machine has it.
///
/// # Safety of the memory operations
/// Pointers need no alignment. `load*` reads, `store*` writes exactly the elements named; they must be valid for that.
#[allow(clippy::missing_safety_doc, reason = "one rule for all, above")]
pub trait Simd: Copy + Send + Sync + 'static {
    /// [`Simd::LANES`] f32.
    type V: Copy;
    /// [`Simd::LANES`] pairs of bf16; the lower half of each 32 bits is the even one.
    type Pairs: Copy;
    /// [`Simd::LANES`] quads of 8-bit integers.
    type Quads: Copy;
    /// [`Simd::LANES`] 32-bit integers.
    type Ints: Copy;
    /// f32 in a vector; divides [`MAX_LANES`].
    const LANES: usize;
    /// Vectors that registers hold.
    const REGISTERS: usize;
    /// [`Simd::dot`] is one instruction that takes pairs as they are, so bf16 activations are left as they are. Otherwise
    /// kernels widen activations once and weights on the way.
    const NATIVE_DOT: bool;
    /// What [`Simd::dot_quads`] adds to every weight, for instructions that take one side without sign.
    const QUAD_OFFSET: i32;

    /// `x` in all lanes.
    fn splat(self, x: f32) -> Self::V;
    /// `a + b`
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a - b`
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b`
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a / b`
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, fused where the instruction set has it.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `a > b ? a : b`: b where either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a < b ? a : b`: b where either is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a >= b ? x : y`: y where a or b is NaN.
    fn at_least(self, a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V;
    /// Bit i is set where lanes i are equal; NaN equals nothing.
    fn equal(self, a: Self::V, b: Self::V) -> u32;
    /// Nearest integer, ties to even, for |a| < 2^22.
    fn round(self, a: Self::V) -> Self::V;
    /// 2^n for integral n in -126..=127.
    fn exp2(self, n: Self::V) -> Self::V;
    /// `a * 2^n` for integral n in -252..=254, however small the result.
    #[inline(always)]
    fn scale_exp2(self, a: Self::V, n: Self::V) -> Self::V {
        // In two factors: n may be below -126 or above 127.
        let half = self.round(self.mul(n, self.splat(0.5)));
        self.mul(self.mul(a, self.exp2(half)), self.exp2(self.sub(n, half)))
    }

    /// `LANES` f32.
    unsafe fn load(self, from: *const f32) -> Self::V;
    /// `LANES` f32.
    unsafe fn store(self, to: *mut f32, v: Self::V);
    /// `LANES` bf16, widened.
    unsafe fn load_bf16(self, from: *const bf16) -> Self::V;
    /// `LANES` bf16, rounded to nearest even as `half` does, denormals and NaN included.
    unsafe fn store_bf16(self, to: *mut bf16, v: Self::V);

    /// [`Simd::store_bf16`], but denormals may become 0.
    #[inline(always)]
    unsafe fn store_bf16_fast(self, to: *mut bf16, v: Self::V) {
        // SAFETY: the caller's promise is the same.
        unsafe { self.store_bf16(to, v) }
    }
    /// `LANES` pairs, each element rounded as [`Simd::store_bf16`] does.
    #[inline(always)]
    unsafe fn store_pairs(self, to: *mut bf16, even: Self::V, odd: Self::V) {
        let mut halves = [[bf16::ZERO; MAX_LANES]; 2];
        // SAFETY: an array holds a whole vector; the caller vouches for 2 * LANES elements.
        unsafe {
            self.store_bf16(halves[0].as_mut_ptr(), even);
            self.store_bf16(halves[1].as_mut_ptr(), odd);
            for (lane, (&even, &odd)) in halves[0].iter().zip(&halves[1]).take(Self::LANES).enumerate() {
                *to.add(2 * lane) = even;
                *to.add(2 * lane + 1) = odd;
            }
        }
    }

    /// `LANES` pairs.
    unsafe fn load_pairs(self, from: *const bf16) -> Self::Pairs;
    /// The pair (even in the lower 16 bits, odd in the upper) in all lanes.
    fn splat_pair(self, pair: u32) -> Self::Pairs;
    /// The even elements, widened.
    fn even(self, pairs: Self::Pairs) -> Self::V;
    /// The odd elements, widened.
    fn odd(self, pairs: Self::Pairs) -> Self::V;
    /// `acc + even(a) * even(b) + odd(a) * odd(b)`, in an order of the instruction set's own.
    fn dot(self, acc: Self::V, a: Self::Pairs, b: Self::Pairs) -> Self::V;

    /// Two rows of `2 * LANES` bf16 as pairs (a[0], b[0]), (a[1], b[1]), ...
    fn interleave(self, a: Self::Pairs, b: Self::Pairs) -> [Self::Pairs; 2];
    /// `n` in all lanes.
    fn splat_int(self, n: i32) -> Self::Ints;
    /// `LANES` integers.
    unsafe fn load_ints(self, from: *const i32) -> Self::Ints;
    /// `LANES` integers.
    unsafe fn store_ints(self, to: *mut i32, v: Self::Ints);
    /// `LANES` integers, each the nearest f32, ties to even.
    unsafe fn load_ints_as_f32(self, from: *const i32) -> Self::V;
    /// `LANES` integers in -127..=127, given as f32.
    unsafe fn store_i8(self, to: *mut i8, v: Self::V);
    /// `LANES` quads of activations, the same in all lanes: the four bytes of a little-endian word.
    fn splat_quad(self, quad: u32) -> Self::Quads;
    /// `LANES` quads of weights, as [`Simd::dot_quads`] wants them.
    unsafe fn load_quads(self, from: *const i8) -> Self::Quads;
    /// `acc + sum over each quad of a * (w + QUAD_OFFSET)` for activations and weights in -127..=127: exact modulo 2^32, so the end
    /// is exact where the sum without the offset fits, however the sums on the way wrap.
    fn dot_quads(self, acc: Self::Ints, a: Self::Quads, w: Self::Quads) -> Self::Ints;

    /// Asks for the cache line of an address, which need not be valid.
    fn prefetch(self, address: *const u8);
    /// [`Simd::prefetch`] of what is used soon and then not again for long: the other caches are left to others.
    fn prefetch_once(self, address: *const u8);

    /// Zero in all lanes.
    #[inline(always)]
    fn zero(self) -> Self::V {
        self.splat(0.0)
    }

    /// The first `n <= LANES` lanes from memory, zero in the others.
    #[inline(always)]
    unsafe fn load_head(self, from: *const f32, n: usize) -> Self::V {
        let mut padded = [0.0; MAX_LANES];
        // SAFETY: the caller vouches for `n` elements; the padded array holds a whole vector.
        unsafe {
            std::ptr::copy_nonoverlapping(from, padded.as_mut_ptr(), n);
            self.load(padded.as_ptr())
        }
    }
    /// The first `n <= LANES` lanes to memory.
    #[inline(always)]
    unsafe fn store_head(self, to: *mut f32, n: usize, v: Self::V) {
        let lanes = self.to_array(v);
        // SAFETY: the caller vouches for `n` elements.
        unsafe { std::ptr::copy_nonoverlapping(lanes.as_ptr(), to, n) }
    }
    /// The first `n <= LANES` lanes from memory, widened, zero in the others.
    #[inline(always)]
    unsafe fn load_bf16_head(self, from: *const bf16, n: usize) -> Self::V {
        let mut padded = [bf16::ZERO; MAX_LANES];
        // SAFETY: the caller vouches for `n` elements; the padded array holds a whole vector.
        unsafe {
            std::ptr::copy_nonoverlapping(from, padded.as_mut_ptr(), n);
            self.load_bf16(padded.as_ptr())
        }
    }
    /// The first `n <= LANES` lanes to memory, rounded.
    #[inline(always)]
    unsafe fn store_bf16_head(self, to: *mut bf16, n: usize, v: Self::V) {
        let mut lanes = [bf16::ZERO; MAX_LANES];
        // SAFETY: the array holds a whole vector; the caller vouches for `n` elements.
        unsafe {
            self.store_bf16(lanes.as_mut_ptr(), v);
            std::ptr::copy_nonoverlapping(lanes.as_ptr(), to, n);
        }
    }

    /// The lanes in order, then zeros.
    #[inline(always)]
    fn to_array(self, v: Self::V) -> [f32; MAX_LANES] {
        let mut lanes = [0.0; MAX_LANES];
        // SAFETY: the array holds a whole vector.
        unsafe { self.store(lanes.as_mut_ptr(), v) };
        lanes
    }
    /// Each lane rounded to bf16 and widened again.
    #[inline(always)]
    fn round_to_bf16(self, v: Self::V) -> Self::V {
        let mut lanes = [bf16::ZERO; MAX_LANES];
        // SAFETY: the array holds a whole vector.
        unsafe {
            self.store_bf16(lanes.as_mut_ptr(), v);
            self.load_bf16(lanes.as_ptr())
        }
    }
    /// The sum of the lanes of each vector, in one fixed order, which need not be that of [`Simd::sum`].
    #[inline(always)]
    fn sums(self, v: [Self::V; 8]) -> [f32; 8] {
        v.map(|v| self.sum(v))
    }
    /// Sum of the lanes, in a fixed order.
    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        let mut lanes = self.to_array(v);
        let mut width = Self::LANES;
        while width > 1 {
            width /= 2;
            for i in 0..width {
                lanes[i] += lanes[i + width];
            }
        }
        lanes[0]
    }
    /// The greatest lane; NaN counts for nothing, and of no numbers -inf is the greatest.
    #[inline(always)]
    fn max_lane(self, v: Self::V) -> f32 {
        self.to_array(v)[..Self::LANES].iter().fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m })
    }
}

/// Element types that kernels read and write as vectors of f32.
pub trait Float: super::memory::Element {
    /// `LANES` elements as f32.
    ///
    /// # Safety
    /// As [`Simd::load`].
    unsafe fn load<S: Simd>(simd: S, from: *const Self) -> S::V;
    /// The first `n <= LANES` elements as f32, then zeros.
    ///
    /// # Safety
    /// As [`Simd::load_head`].
    unsafe fn load_head<S: Simd>(simd: S, from: *const Self, n: usize) -> S::V;
    /// `LANES` elements, rounded.
    ///
    /// # Safety
    /// As [`Simd::store`].
    unsafe fn store<S: Simd>(simd: S, to: *mut Self, v: S::V);
    /// The first `n <= LANES` elements, rounded.
    ///
    /// # Safety
    /// As [`Simd::store_head`].
    unsafe fn store_head<S: Simd>(simd: S, to: *mut Self, n: usize, v: S::V);
    /// One element as f32.
    fn to_f32(self) -> f32;
    /// Rounded to nearest even.
    fn from_f32(x: f32) -> Self;
}

/// Implements [`Float`] by naming the [`Simd`] methods of one element type.
macro_rules! float {
    ($type:ty, $load:ident, $load_head:ident, $store:ident, $store_head:ident, $to:expr, $from:expr) => {
        impl Float for $type {
            #[inline(always)]
            unsafe fn load<S: Simd>(simd: S, from: *const Self) -> S::V {
                // SAFETY: the caller's promise is the same.
                unsafe { simd.$load(from) }
            }
            #[inline(always)]
            unsafe fn load_head<S: Simd>(simd: S, from: *const Self, n: usize) -> S::V {
                // SAFETY: the caller's promise is the same.
                unsafe { simd.$load_head(from, n) }
            }
            #[inline(always)]
            unsafe fn store<S: Simd>(simd: S, to: *mut Self, v: S::V) {
                // SAFETY: the caller's promise is the same.
                unsafe { simd.$store(to, v) }
            }
            #[inline(always)]
            unsafe fn store_head<S: Simd>(simd: S, to: *mut Self, n: usize, v: S::V) {
                // SAFETY: the caller's promise is the same.
                unsafe { simd.$store_head(to, n, v) }
            }
            #[inline(always)]
            fn to_f32(self) -> f32 {
                $to(self)
            }
            #[inline(always)]
            fn from_f32(x: f32) -> Self {
                $from(x)
            }
        }
    };
}
float!(f32, load, load_head, store, store_head, std::convert::identity, std::convert::identity);
float!(bf16, load_bf16, load_bf16_head, store_bf16, store_bf16_head, bf16::to_f32, bf16::from_f32);

#[cfg(test)]
mod tests;
