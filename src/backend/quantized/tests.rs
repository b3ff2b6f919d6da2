use half::f16;

use super::*;
use crate::support::numbers::Numbers;

#[test]
fn every_fp8_number_keeps_its_code_and_others_go_to_the_nearest() {
    for code in 0..=255u8 {
        let value = E4M3[code as usize];
        if !value.is_nan() {
            assert_eq!(e4m3::encode(value), code, "{value}");
        }
    }
    let mut magnitudes: Vec<f32> = (0..0x7fu8).map(|code| E4M3[code as usize]).collect();
    magnitudes.push(f32::INFINITY);
    for pair in magnitudes.windows(2) {
        let [below, above] = [pair[0], pair[1].min(464.0)];
        let middle = (below + above) / 2.0;
        let code = |x: f32| e4m3::encode(x);
        let lower = code(below);
        assert_eq!(code(middle.next_down()), lower, "below {middle}");
        if pair[1].is_finite() {
            assert_eq!(code(middle.next_up()), lower + 1, "above {middle}");
            assert_eq!(code(middle), lower + (lower & 1), "a tie at {middle}");
        }
        assert_eq!(code(-below), lower | 0x80);
    }
    assert_eq!((e4m3::encode(1e30), e4m3::encode(-449.0)), (0x7e, 0xfe));
}

/// As many steps of the code as lie between a number and what it became.
#[test]
fn what_quantising_loses_is_half_a_step() {
    for (n, k) in [(1, 1), (130, 200), (16, 128), (129, 127), (0, 5)] {
        let values = Numbers(3).vec(n * k);
        let f8 = Quantized::of(&values, n, k, DType::F8);
        let Scales::F8(scales) = f8.scales() else { panic!("{:?}", f8.dtype()) };
        for (i, (x, w)) in values.iter().zip(f8.weights()).enumerate() {
            let scale = scales[i / k / BLOCK * k.div_ceil(BLOCK) + i % k / BLOCK];
            // Three bits of mantissa, then eight.
            let most = (x.abs() / 16.0).max(scale / 1024.0) + x.abs() / 256.0;
            assert!((x - w.to_f32()).abs() <= most, "[{n}, {k}] {i}: {x} became {w}");
        }
        let i4 = Quantized::of(&values, n, k, DType::I4x2);
        let Scales::I4(groups) = i4.scales() else { panic!("{:?}", i4.dtype()) };
        assert!(i4.codes().iter().all(|&code| code < 16));
        for (i, (x, w)) in values.iter().zip(i4.weights()).enumerate() {
            let group = groups[i / k * k.div_ceil(BLOCK) + i % k / BLOCK];
            // The zero is a whole code, and a scale of 11 bits may fall short.
            let most = group.scale() * 1.02 + x.abs() / 256.0;
            assert!((x - w.to_f32()).abs() <= most, "[{n}, {k}] {i}: {x} became {w}");
        }
        let square = |q: &Quantized| {
            values.iter().zip(q.weights()).map(|(x, w)| (x - w.to_f32()).powi(2)).sum::<f32>()
        };
        let all = values.iter().map(|x| x * x).sum::<f32>();
        if n * k > 1000 {
            assert!(square(&f8) < all * 0.03f32.powi(2), "[{n}, {k}]");
            assert!(square(&i4) < all * 0.08f32.powi(2), "[{n}, {k}]");
        }
    }
}

/// What fp8 stands for, before it is rounded to bf16, is fp8 again with the same codes.
#[test]
fn fp8_quantised_again_keeps_its_codes() {
    let (n, k) = (256, 256);
    let once = Quantized::of(&Numbers(5).vec(n * k), n, k, DType::F8);
    let Scales::F8(scales) = once.scales() else { panic!("{:?}", once.dtype()) };
    let scale = |i: usize| scales[i / k / BLOCK * 2 + i % k / BLOCK];
    let exact: Vec<f32> =
        once.codes().iter().enumerate().map(|(i, &c)| E4M3[c as usize] * scale(i)).collect();
    assert!(Quantized::of(&exact, n, k, DType::F8).codes() == once.codes());
}

#[test]
fn scales_of_f16_and_bf16_fit_and_weights_are_rounded_once() {
    let mut seen = 0;
    for bits in 0..=u16::MAX {
        for scale in [f16::from_bits(bits).to_f32(), bf16::from_bits(bits).to_f32()] {
            let Some(group) = Group::new(scale, u32::from(bits) % 17) else {
                assert!(!scale.is_finite(), "{scale:e}");
                continue;
            };
            assert_eq!((group.scale().to_bits(), group.zero()), (scale.to_bits(), u32::from(bits) % 17));
            let code = (bits >> 8) as u8 & 15;
            let exact = (f64::from(code) - f64::from(group.zero())) * f64::from(scale);
            assert_eq!(group.weight(code).to_bits(), bf16::from_f64(exact).to_bits(), "{code} of {group:?}");
            seen += 1;
        }
    }
    assert!(seen > 120_000, "{seen}");
    for (scale, zero) in [(0.1, 0), (f32::NAN, 0), (f32::INFINITY, 1), (1.0, 17), (1e-38, 8)] {
        assert_eq!(Group::new(scale, zero), None, "{scale} {zero}");
    }
}

#[test]
fn what_is_not_finite_shows_in_its_block_alone() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut values = Numbers(9).vec(3 * 300);
        values[2 * 300 + 140] = bad;
        for dtype in [DType::F8, DType::I4x2] {
            let weights = Quantized::of(&values, 3, 300, dtype).weights();
            for (i, weight) in weights.iter().enumerate() {
                let (row, block) = (i / 300, i % 300 / BLOCK);
                let broken = block == 1 && (dtype == DType::F8 || row == 2);
                assert_eq!(weight.is_nan(), broken, "{dtype:?} {bad} at {row}, {}", i % 300);
            }
        }
    }
    let mut codes = vec![0x38; 2 * 130];
    codes[129] = 0xff;
    let weights = Quantized::new(2, 130, codes, Scales::F8(vec![2.0, 3.0])).weights();
    assert!(weights[..128].iter().all(|w| w.to_f32() == 2.0));
    assert!(weights[128..130].iter().all(|w| w.is_nan()) && weights[258].is_nan());
}

#[test]
fn tiny_numbers_are_zeros() {
    for dtype in [DType::F8, DType::I4x2] {
        let weights = Quantized::of(&[1e-31, -1e-38, 0.0], 1, 3, dtype).weights();
        assert!(weights.iter().all(|w| w.to_f32() == 0.0), "{dtype:?} {weights:?}");
    }
    let huge = Quantized::of(&[f32::MAX, f32::MIN, 1.0], 1, 3, DType::I4x2).weights();
    assert!(huge[0].to_f32() > 3e38 && huge[1].to_f32() < -3e38 && huge[2].to_f32() == 0.0, "{huge:?}");
}

#[test]
fn footprints_count_scales() {
    assert_eq!(bytes_of(1 << 20, DType::F8), (1 << 20) + 256);
    assert_eq!(bytes_of(1 << 20, DType::I4x2), (1 << 19) + (1 << 15));
    assert_eq!(bytes_of(1 << 20, DType::Bf16), 1 << 21);
}

#[test]
#[should_panic(expected = "a 4-bit code above 15")]
fn a_code_of_more_than_four_bits_is_a_bug_above() {
    let _ = Quantized::new(1, 1, vec![16], Scales::I4(vec![Group::from_bits(0)]));
}
