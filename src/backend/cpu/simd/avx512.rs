//! AVX-512 with BF16 and VNNI: sixteen lanes, and dot products of bf16 pairs and of quads of bytes in one instruction each.

use std::arch::x86_64::*;

use half::bf16;

use super::{Kernel, Simd};

/// Proof of AVX-512 F, BW, DQ, VL, BF16 and VNNI.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Avx512(());

impl Avx512 {
    /// Asks the processor. Without BF16, AVX2 serves: widening is what costs, and it is no cheaper here. Every processor with BF16 has
    /// VNNI too.
    pub fn detect() -> Option<Avx512> {
        let all = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512bf16")
            && is_x86_feature_detected!("avx512vnni");
        all.then_some(Avx512(()))
    }
}

/// Compiles `kernel` with the instruction set.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni")]
pub(super) fn enter<K: Kernel>(simd: Avx512, kernel: K) -> K::Output {
    kernel.run(simd)
}

/// One intrinsic or a few, available because `self` is the proof.
macro_rules! op {
    ($(fn $name:ident($($arg:ident: $type:ty),*) -> $out:ty = $body:expr;)*) => { $(
        #[inline(always)]
        fn $name(self, $($arg: $type),*) -> $out {
            // SAFETY: the proof; these intrinsics touch no memory.
            unsafe { $body }
        }
    )* };
}

impl Simd for Avx512 {
    type V = __m512;
    type Pairs = __m512i;
    type Quads = __m512i;
    type Ints = __m512i;
    const LANES: usize = 16;
    const REGISTERS: usize = 32;
    const NATIVE_DOT: bool = true;
    const QUAD_OFFSET: i32 = 128;

    op! {
        fn splat(x: f32) -> __m512 = _mm512_set1_ps(x);
        fn add(a: __m512, b: __m512) -> __m512 = _mm512_add_ps(a, b);
        fn sub(a: __m512, b: __m512) -> __m512 = _mm512_sub_ps(a, b);
        fn mul(a: __m512, b: __m512) -> __m512 = _mm512_mul_ps(a, b);
        fn div(a: __m512, b: __m512) -> __m512 = _mm512_div_ps(a, b);
        fn fma(a: __m512, b: __m512, c: __m512) -> __m512 = _mm512_fmadd_ps(a, b, c);
        fn max(a: __m512, b: __m512) -> __m512 = _mm512_max_ps(a, b);
        fn min(a: __m512, b: __m512) -> __m512 = _mm512_min_ps(a, b);
        fn at_least(a: __m512, b: __m512, x: __m512, y: __m512) -> __m512 =
            _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_GE_OQ>(a, b), y, x);
        fn equal(a: __m512, b: __m512) -> u32 = _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(a, b).into();
        fn round(a: __m512) -> __m512 =
            _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a);
        fn exp2(n: __m512) -> __m512 = _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_add_epi32(
            _mm512_cvtps_epi32(n),
            _mm512_set1_epi32(127),
        )));
        fn scale_exp2(a: __m512, n: __m512) -> __m512 = _mm512_scalef_ps(a, n);
        fn splat_pair(pair: u32) -> __m512i = _mm512_set1_epi32(pair as i32);
        fn even(pairs: __m512i) -> __m512 = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs));
        fn odd(pairs: __m512i) -> __m512 =
            _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32 as i32)));
        fn splat_int(n: i32) -> __m512i = _mm512_set1_epi32(n);
        fn splat_quad(quad: u32) -> __m512i = _mm512_set1_epi32(quad as i32);
        fn dot_quads(acc: __m512i, a: __m512i, w: __m512i) -> __m512i = _mm512_dpbusd_epi32(acc, w, a);
        // Both types are 512 plain bits.
        fn dot(acc: __m512, a: __m512i, b: __m512i) -> __m512 = _mm512_dpbf16_ps(
            acc,
            std::mem::transmute::<__m512i, __m512bh>(a),
            std::mem::transmute::<__m512i, __m512bh>(b),
        );
    }

    #[inline(always)]
    fn interleave(self, a: __m512i, b: __m512i) -> [__m512i; 2] {
        // SAFETY: the proof.
        unsafe { interleaved(a, b) }
    }
    #[inline(always)]
    fn max_lane(self, v: __m512) -> f32 {
        let numbers = self.max(v, self.splat(f32::NEG_INFINITY));
        // SAFETY: the proof.
        unsafe { _mm512_reduce_max_ps(numbers) }
    }
    #[inline(always)]
    fn sums(self, v: [__m512; 8]) -> [f32; 8] {
        // SAFETY: the proof.
        unsafe { eight_sums(v) }
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> __m512 {
        // SAFETY: the proof, and the caller vouches for the memory.
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32, v: __m512) {
        // SAFETY: the proof, and the caller vouches for the memory.
        unsafe { _mm512_storeu_ps(to, v) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const bf16) -> __m512 {
        // SAFETY: the proof, and the caller vouches for the memory.
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
        }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut bf16, v: __m512) {
        // SAFETY: the proof, and the caller vouches for the memory.
        unsafe {
            let upper = _mm512_srli_epi32::<16>(rounded(v));
            _mm256_storeu_si256(to.cast(), _mm512_cvtepi32_epi16(upper));
        }
    }
    #[inline(always)]
    unsafe fn store_bf16_fast(self, to: *mut bf16, v: __m512) {
        // SAFETY: the proof, and the caller vouches for the memory; both types are 256 plain bits.
        unsafe {
            let narrow = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(v));
            _mm256_storeu_si256(to.cast(), narrow);
        }
    }
    #[inline(always)]
    unsafe fn store_pairs(self, to: *mut bf16, even: __m512, odd: __m512) {
        // SAFETY: the proof, and the caller vouches for the memory.
        unsafe {
            let even = _mm512_srli_epi32::<16>(rounded(even));
            let odd = _mm512_and_si512(rounded(odd), _mm512_set1_epi32(0xffff_0000_u32 as i32));
            _mm512_storeu_si512(to.cast(), _mm512_or_si512(even, odd));
        }
    }
    #[inline(always)]
    unsafe fn load_pairs(self, from: *const bf16) -> __m512i {
        // SAFETY: the proof, and the caller vouches for the memory.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }
    #[inline(always)]
    unsafe fn load_ints(self, from: *const i32) -> __m512i {
        // SAFETY: the proof, and the caller vouches for the memory.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }
    #[inline(always)]
    unsafe fn store_ints(self, to: *mut i32, v: __m512i) {
        // SAFETY: the proof, and the caller vouches for the memory.
        unsafe { _mm512_storeu_si512(to.cast(), v) }
    }
    #[inline(always)]
    unsafe fn load_ints_as_f32(self, from: *const i32) -> __m512 {
        // SAFETY: the proof, and the caller vouches for the memory.
        unsafe { _mm512_cvtepi32_ps(_mm512_loadu_si512(from.cast())) }
    }
    #[inline(always)]
    unsafe fn store_i8(self, to: *mut i8, v: __m512) {
        // SAFETY: the proof, and the caller vouches for the memory.
        unsafe { _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v))) }
    }
    #[inline(always)]
    unsafe fn load_quads(self, from: *const i8) -> __m512i {
        // SAFETY: the proof, and the caller vouches for the memory. Turning the sign bit adds 128 to a byte read without sign.
        unsafe { _mm512_xor_si512(_mm512_loadu_si512(from.cast()), _mm512_set1_epi8(-128)) }
    }
    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        // SAFETY: SSE is there, and a hint reads no memory that the program can see.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
    }
    #[inline(always)]
    fn prefetch_once(self, address: *const u8) {
        // SAFETY: as above.
        unsafe { _mm_prefetch::<_MM_HINT_NTA>(address.cast()) }
    }
}

/// Each lane rounded to bf16, to nearest even, in its upper half; the lower half is left over. Not the instruction of that purpose:
/// it flushes denormals, and bits should not depend on which path rounds.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn rounded(v: __m512) -> __m512i {
    let bits = _mm512_castps_si512(v);
    // Half of the last kept place, less one where that place is even: ties go to even.
    let lsb = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
    let half = _mm512_add_epi32(_mm512_set1_epi32(0x7fff), lsb);
    // A NaN stays one: its upper bits with the quiet bit set.
    let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x40_0000));
    let is_nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
    _mm512_mask_blend_epi32(is_nan, _mm512_add_epi32(bits, half), quiet)
}

/// The words of two registers in turn.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn interleaved(a: __m512i, b: __m512i) -> [__m512i; 2] {
    // Word 2 i comes from word i of `a`, word 2 i + 1 from word i of `b`, which is numbered 32 + i.
    const PLACES: [[u16; 32]; 2] = {
        let mut places = [[0; 32]; 2];
        let mut i = 0;
        while i < 64 {
            places[i / 32][i % 32] = (i / 2 + i % 2 * 32) as u16;
            i += 1;
        }
        places
    };
    // SAFETY: a whole array each.
    let [low, high] = unsafe {
        [_mm512_loadu_si512(PLACES[0].as_ptr().cast()), _mm512_loadu_si512(PLACES[1].as_ptr().cast())]
    };
    [_mm512_permutex2var_epi16(a, low, b), _mm512_permutex2var_epi16(a, high, b)]
}

/// The sum of the lanes of each vector, all in the same order.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn eight_sums(v: [__m512; 8]) -> [f32; 8] {
    // Of every quarter of a register: sums of two elements, of two vectors.
    let two = |a, b| _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    // Of every quarter: its whole sum, of four vectors.
    let four = |a, b, c, d| {
        let (a, b) = (_mm512_castps_pd(two(a, b)), _mm512_castps_pd(two(c, d)));
        let (low, high) = (_mm512_unpacklo_pd(a, b), _mm512_unpackhi_pd(a, b));
        _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high))
    };
    // Quarters 0 and 1, 2 and 3, of two registers.
    let halves = |a, b| _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
    let eight = halves(four(v[0], v[1], v[2], v[3]), four(v[4], v[5], v[6], v[7]));
    let mut sums = [0.0; 8];
    // SAFETY: a whole array.
    unsafe { _mm256_storeu_ps(sums.as_mut_ptr(), _mm512_castps512_ps256(halves(eight, eight))) };
    sums
}
