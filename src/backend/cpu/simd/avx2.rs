//! AVX2 and FMA: eight lanes, bf16 widened by shift and mask.

use std::arch::x86_64::*;

use half::bf16;

use super::{Kernel, Simd};

/// Proof of AVX2 and FMA.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Avx2(());

impl Avx2 {
    /// Asks the processor.
    pub fn detect() -> Option<Avx2> {
        (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")).then_some(Avx2(()))
    }
}

/// Compiles `kernel` with the instruction set.
#[target_feature(enable = "avx2,fma")]
pub(super) fn enter<K: Kernel>(simd: Avx2, kernel: K) -> K::Output {
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

impl Simd for Avx2 {
    type V = __m256;
    type Pairs = __m256i;
    type Quads = __m256i;
    type Ints = __m256i;
    const LANES: usize = 8;
    const REGISTERS: usize = 16;
    const NATIVE_DOT: bool = false;
    const QUAD_OFFSET: i32 = 0;

    op! {
        fn splat(x: f32) -> __m256 = _mm256_set1_ps(x);
        fn add(a: __m256, b: __m256) -> __m256 = _mm256_add_ps(a, b);
        fn sub(a: __m256, b: __m256) -> __m256 = _mm256_sub_ps(a, b);
        fn mul(a: __m256, b: __m256) -> __m256 = _mm256_mul_ps(a, b);
        fn div(a: __m256, b: __m256) -> __m256 = _mm256_div_ps(a, b);
        fn fma(a: __m256, b: __m256, c: __m256) -> __m256 = _mm256_fmadd_ps(a, b, c);
        fn max(a: __m256, b: __m256) -> __m256 = _mm256_max_ps(a, b);
        fn min(a: __m256, b: __m256) -> __m256 = _mm256_min_ps(a, b);
        fn at_least(a: __m256, b: __m256, x: __m256, y: __m256) -> __m256 =
            _mm256_blendv_ps(y, x, _mm256_cmp_ps::<_CMP_GE_OQ>(a, b));
        fn equal(a: __m256, b: __m256) -> u32 = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_EQ_OQ>(a, b)) as u32;
        fn round(a: __m256) -> __m256 = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a);
        fn exp2(n: __m256) -> __m256 = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(
            _mm256_cvtps_epi32(n),
            _mm256_set1_epi32(127),
        )));
        fn splat_int(n: i32) -> __m256i = _mm256_set1_epi32(n);
        fn splat_quad(quad: u32) -> __m256i = _mm256_set1_epi32(quad as i32);
        // |a| without sign times w with that of a: two products of at most 127 * 127 fit into the 16 bits of their sum.
        fn dot_quads(acc: __m256i, a: __m256i, w: __m256i) -> __m256i = _mm256_add_epi32(acc, _mm256_madd_epi16(
            _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(w, a)),
            _mm256_set1_epi16(1),
        ));
        fn splat_pair(pair: u32) -> __m256i = _mm256_set1_epi32(pair as i32);
        fn even(pairs: __m256i) -> __m256 = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs));
        fn odd(pairs: __m256i) -> __m256 =
            _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(0xffff_0000_u32 as i32)));
    }

    #[inline(always)]
    fn dot(self, acc: __m256, a: __m256i, b: __m256i) -> __m256 {
        let acc = self.fma(self.even(a), self.even(b), acc);
        self.fma(self.odd(a), self.odd(b), acc)
    }

    #[inline(always)]
    fn interleave(self, a: __m256i, b: __m256i) -> [__m256i; 2] {
        // SAFETY: the proof.
        unsafe {
            // Unpacking works per 128-bit half.
            let (low, high) = (_mm256_unpacklo_epi16(a, b), _mm256_unpackhi_epi16(a, b));
            [_mm256_permute2x128_si256::<0x20>(low, high), _mm256_permute2x128_si256::<0x31>(low, high)]
        }
    }
    #[inline(always)]
    fn max_lane(self, v: __m256) -> f32 {
        let numbers = self.max(v, self.splat(f32::NEG_INFINITY));
        // SAFETY: the proof.
        unsafe {
            let four = _mm_max_ps(_mm256_castps256_ps128(numbers), _mm256_extractf128_ps::<1>(numbers));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        }
    }
    #[inline(always)]
    fn sums(self, v: [__m256; 8]) -> [f32; 8] {
        // SAFETY: the proof; the store fills an array.
        unsafe {
            // In each half of a register: the sums of that half of four vectors.
            let first = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
            let last = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
            let low = _mm256_permute2f128_ps::<0x20>(first, last);
            let high = _mm256_permute2f128_ps::<0x31>(first, last);
            let mut sums = [0.0; 8];
            _mm256_storeu_ps(sums.as_mut_ptr(), _mm256_add_ps(low, high));
            sums
        }
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> __m256 {
        // SAFETY: the proof, and the caller vouches for the memory.
        unsafe { _mm256_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32, v: __m256) {
        // SAFETY: the proof, and the caller vouches for the memory.
        unsafe { _mm256_storeu_ps(to, v) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const bf16) -> __m256 {
        // SAFETY: the proof, and the caller vouches for the memory.
        unsafe {
            let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
        }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut bf16, v: __m256) {
        // SAFETY: the proof, and the caller vouches for the memory.
        unsafe {
            let bits = _mm256_castps_si256(v);
            // Half of the last kept place, less one where that place is even: ties go to even.
            let lsb = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let half = _mm256_add_epi32(_mm256_set1_epi32(0x7fff), lsb);
            let rounded = _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, half));
            // A NaN stays one: its upper bits with the quiet bit set.
            let quiet = _mm256_or_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(0x40));
            let is_nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
            let words = _mm256_blendv_epi8(rounded, quiet, is_nan);
            // Packing works per 128-bit half; the permutation brings the two results together.
            let packed = _mm256_permute4x64_epi64::<0b1000>(_mm256_packus_epi32(words, words));
            _mm_storeu_si128(to.cast(), _mm256_castsi256_si128(packed));
        }
    }
    #[inline(always)]
    unsafe fn load_pairs(self, from: *const bf16) -> __m256i {
        // SAFETY: the proof, and the caller vouches for the memory.
        unsafe { _mm256_loadu_si256(from.cast()) }
    }
    #[inline(always)]
    unsafe fn load_ints(self, from: *const i32) -> __m256i {
        // SAFETY: the proof, and the caller vouches for the memory.
        unsafe { _mm256_loadu_si256(from.cast()) }
    }
    #[inline(always)]
    unsafe fn store_ints(self, to: *mut i32, v: __m256i) {
        // SAFETY: the proof, and the caller vouches for the memory.
        unsafe { _mm256_storeu_si256(to.cast(), v) }
    }
    #[inline(always)]
    unsafe fn load_ints_as_f32(self, from: *const i32) -> __m256 {
        // SAFETY: the proof, and the caller vouches for the memory.
        unsafe { _mm256_cvtepi32_ps(_mm256_loadu_si256(from.cast())) }
    }
    #[inline(always)]
    unsafe fn store_i8(self, to: *mut i8, v: __m256) {
        // SAFETY: the proof, and the caller vouches for the memory.
        unsafe {
            let ints = _mm256_cvtps_epi32(v);
            let words = _mm_packs_epi32(_mm256_castsi256_si128(ints), _mm256_extracti128_si256::<1>(ints));
            _mm_storel_epi64(to.cast(), _mm_packs_epi16(words, words));
        }
    }
    #[inline(always)]
    unsafe fn load_quads(self, from: *const i8) -> __m256i {
        // SAFETY: the proof, and the caller vouches for the memory.
        unsafe { _mm256_loadu_si256(from.cast()) }
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
