//! Experts in 8 bits: what the numbers are. Every backend that has them follows this file; the loops here are plain ones.
//!
//! A weight matrix keeps a scale for each of its outputs, and a row of activations has one of its own, found when it is multiplied:
//! both are rows of inputs, and [`quantize`] treats them alike. Then
//!
//! `out[i, j] = f32(sum_k x[i, k] * w[j, k]) * scale_x[i] * scale_w[j] (+ bias[j])`,
//!
//! multiplied from left to right. The sum is one of integers and exact in any order, so a row has the same bits on every instruction
//! set, whatever stands beside it. Between an expert's two matrices the product of the activation is rounded to the activation type,
//! as always, and then quantised in turn, a row of the whole width at a time; with a tensor split inside experts that is a rank's share.
//!
//! One scale for each inner product's two sides is the "vector-wise" scheme of LLM.int8() (Dettmers et al., 2022), without its outliers.

/// Greatest magnitude of a quantised number. -128 is left out, so that there is a negative of each.
pub const GREATEST: f32 = 127.0;

/// Most inputs of a matrix: as many products of two numbers of magnitude 127 fit into the 32 bits of a sum.
pub const MAX_INPUTS: usize = i32::MAX as usize / (127 * 127);

/// Rows without an element of this magnitude are rows of zeros: the inverse of their scale would not be finite.
const SMALLEST: f32 = 1e-30;

/// The scale of a row, and what its elements are multiplied with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scale {
    /// What an integer stands for. NaN where the row has an element that is not finite, so that whatever is made of it is NaN too.
    pub scale: f32,
    /// What an element is multiplied with before it is rounded to nearest, ties to even.
    pub inverse: f32,
}

impl Scale {
    /// Of a row whose greatest finite magnitude this is.
    pub fn of(greatest: f32, all_finite: bool) -> Scale {
        if !all_finite {
            return Scale { scale: f32::NAN, inverse: 0.0 };
        }
        if greatest < SMALLEST {
            return Scale { scale: 0.0, inverse: 0.0 };
        }
        Scale { scale: greatest / GREATEST, inverse: GREATEST / greatest }
    }
}

/// Quantises a row and returns its scale.
///
/// # Panics
/// When `to` has another length.
pub fn quantize(row: &[f32], to: &mut [i8]) -> f32 {
    assert_eq!(row.len(), to.len(), "elements quantised");
    let all_finite = row.iter().all(|x| x.is_finite());
    let greatest = row.iter().fold(0.0f32, |greatest, x| greatest.max(x.abs()));
    let Scale { scale, inverse } = Scale::of(greatest, all_finite);
    for (x, to) in row.iter().zip(to) {
        *to = (x * inverse).round_ties_even() as i8;
    }
    scale
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quantized(row: &[f32]) -> (Vec<i8>, f32) {
        let mut to = vec![0; row.len()];
        let scale = quantize(row, &mut to);
        (to, scale)
    }

    #[test]
    fn the_greatest_becomes_127_and_ties_go_to_even() {
        assert_eq!(quantized(&[0.5, -254.0, 1.0, 3.0, 5.0]), (vec![0, -127, 0, 2, 2], 2.0));
        assert_eq!(quantized(&[]), (vec![], 0.0));
        assert_eq!(quantized(&[0.0, -0.0, 1e-38]), (vec![0, 0, 0], 0.0));
        for greatest in [1e-30, 3.3e-7, 1.0, 77.7, f32::MAX] {
            let (row, scale) = quantized(&[greatest, -greatest]);
            assert_eq!(row, [127, -127], "{greatest}");
            assert!(scale.is_finite() && scale > 0.0, "{greatest}: {scale}");
        }
    }

    #[test]
    fn what_is_not_finite_shows_in_the_scale() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(quantized(&[1.0, bad, 2.0]).1.is_nan(), "{bad}");
        }
    }

    #[test]
    fn no_sum_overflows() {
        let most = i64::try_from(MAX_INPUTS).unwrap() * 127 * 127;
        assert!(i32::try_from(most).is_ok() && i32::try_from(most + 127 * 127).is_err());
    }
}
