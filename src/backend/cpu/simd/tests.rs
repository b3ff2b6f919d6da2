use super::*;

/// Runs a function of vectors over a slice, tails padded.
struct Map<'a, F> {
    x: &'a [f32],
    f: F,
}

trait VectorFn {
    fn call<S: Simd>(&self, simd: S, x: S::V) -> S::V;
}

impl<F: VectorFn> Kernel for Map<'_, F> {
    type Output = Vec<f32>;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Vec<f32> {
        let mut out = vec![0.0; self.x.len()];
        for (x, out) in self.x.chunks(S::LANES).zip(out.chunks_mut(S::LANES)) {
            // SAFETY: both chunks have that many elements.
            unsafe {
                let v = simd.load_head(x.as_ptr(), x.len());
                simd.store_head(out.as_mut_ptr(), out.len(), self.f.call(simd, v));
            }
        }
        out
    }
}

struct Exp;
impl VectorFn for Exp {
    #[inline(always)]
    fn call<S: Simd>(&self, simd: S, x: S::V) -> S::V {
        exp(simd, x)
    }
}

struct Sigmoid;
impl VectorFn for Sigmoid {
    #[inline(always)]
    fn call<S: Simd>(&self, simd: S, x: S::V) -> S::V {
        sigmoid(simd, x)
    }
}

/// Distance in units of the last place of the exact result.
fn ulps(got: f32, exact: f64) -> f64 {
    let nearest = exact as f32;
    let spacing = f64::from(nearest.next_up()) - f64::from(nearest);
    (f64::from(got) - exact).abs() / spacing
}

#[test]
fn exp_is_accurate_everywhere() {
    let x: Vec<f32> = (0..=200_000).map(|i| -103.0 + i as f32 * (191.7 / 200_000.0)).collect();
    for isa in Isa::available() {
        let y = isa.dispatch(Map { x: &x, f: Exp });
        let worst = x.iter().zip(&y).map(|(&x, &y)| ulps(y, f64::from(x).exp())).fold(0.0, f64::max);
        assert!(worst < 2.0, "{}: {worst} ulp", isa.name());
    }
}

#[test]
fn exp_keeps_its_promises_at_the_ends() {
    let x = [0.0, -0.0, f32::NEG_INFINITY, -1e30, -104.5, f32::INFINITY, 1e30, 88.8, f32::NAN, 88.72];
    for isa in Isa::available() {
        let y = isa.dispatch(Map { x: &x, f: Exp });
        assert_eq!(y[..5], [1.0, 1.0, 0.0, 0.0, 0.0], "{}", isa.name());
        assert_eq!(y[5..8], [f32::INFINITY; 3], "{}", isa.name());
        assert!(y[8].is_nan() && y[9].is_finite(), "{}", isa.name());
    }
}

#[test]
fn sigmoid_is_accurate() {
    let x: Vec<f32> = (-4000..=4000).map(|i| i as f32 * 0.02).collect();
    for isa in Isa::available() {
        let y = isa.dispatch(Map { x: &x, f: Sigmoid });
        for (&x, &y) in x.iter().zip(&y) {
            let exact = 1.0 / (1.0 + (-f64::from(x)).exp());
            assert!(ulps(y, exact) < 4.0, "{}: sigmoid({x}) = {y}", isa.name());
        }
    }
}

#[test]
fn lanes_and_tails_do_not_change_bits() {
    let x: Vec<f32> = (0..67).map(|i| (i as f32 * 0.77).sin() * 20.0).collect();
    for isa in Isa::available() {
        let whole = isa.dispatch(Map { x: &x, f: Sigmoid });
        for start in 0..x.len() {
            let part = isa.dispatch(Map { x: &x[start..], f: Sigmoid });
            assert!(part.iter().zip(&whole[start..]).all(|(a, b)| a.to_bits() == b.to_bits()));
        }
    }
}

/// Exercises every operation once, so that each instruction set can be compared with plain arithmetic.
struct Everything<'a> {
    a: &'a [f32],
    b: &'a [f32],
}

impl Kernel for Everything<'_> {
    type Output = Vec<(&'static str, Vec<f32>, Vec<f32>)>;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Self::Output {
        let n = S::LANES;
        let (a, b) = (&self.a[..n], &self.b[..n]);
        // SAFETY: slices of LANES elements.
        let (va, vb) = unsafe { (simd.load(a.as_ptr()), simd.load(b.as_ptr())) };
        let plain = |f: &dyn Fn(f32, f32) -> f32| a.iter().zip(b).map(|(&a, &b)| f(a, b)).collect::<Vec<_>>();
        let got = |v| simd.to_array(v)[..n].to_vec();
        let pairs: Vec<bf16> =
            a.iter().zip(b).flat_map(|(&a, &b)| [bf16::from_f32(a), bf16::from_f32(b)]).collect();
        // SAFETY: LANES pairs, LANES elements.
        let (vp, widened) = unsafe { (simd.load_pairs(pairs.as_ptr()), simd.load_bf16(pairs.as_ptr())) };
        let round = |x: f32| bf16::from_f32(x).to_f32();
        let two = u32::from(bf16::from_f32(2.0).to_bits());
        let three = u32::from(bf16::from_f32(3.0).to_bits());
        let rounded = simd.round(va);
        // Rows a[0], b[0], a[1], ... and 0, 1, 2, ...
        let counted: Vec<bf16> = (0..2 * n).map(|i| bf16::from_f32(i as f32)).collect();
        // SAFETY: 2 * LANES elements.
        let [low, high] = simd.interleave(vp, unsafe { simd.load_pairs(counted.as_ptr()) });
        let [first, second] = [&pairs[..n], &pairs[n..]].map(|row| row.iter().map(|x| x.to_f32()).collect());
        let multiples: [f32; 8] = std::array::from_fn(|i| i as f32);
        vec![
            ("splat", got(simd.splat(2.5)), vec![2.5; n]),
            ("add", got(simd.add(va, vb)), plain(&|a, b| a + b)),
            ("sub", got(simd.sub(va, vb)), plain(&|a, b| a - b)),
            ("mul", got(simd.mul(va, vb)), plain(&|a, b| a * b)),
            ("div", got(simd.div(va, vb)), plain(&|a, b| a / b)),
            (
                "at_least",
                got(simd.at_least(va, vb, simd.splat(9.0), va)),
                plain(&|a, b| if a >= b { 9.0 } else { a }),
            ),
            ("fma", got(simd.fma(simd.splat(2.0), vb, va)), plain(&|a, b| 2.0 * b + a)),
            ("max", got(simd.max(va, vb)), plain(&f32::max)),
            ("min", got(simd.min(va, vb)), plain(&f32::min)),
            ("round", got(rounded), plain(&|a, _| a.round_ties_even())),
            ("exp2", got(simd.exp2(rounded)), plain(&|a, _| a.round_ties_even().exp2())),
            ("even", got(simd.even(vp)), plain(&|a, _| round(a))),
            ("odd", got(simd.odd(vp)), plain(&|_, b| round(b))),
            (
                "dot",
                got(simd.dot(simd.splat(1.0), simd.splat_pair(three << 16 | two), vp)),
                plain(&|a, b| 1.0 + 2.0 * round(a) + 3.0 * round(b)),
            ),
            ("interleave, first half", got(simd.even(low)), first),
            ("interleave, second half", got(simd.even(high)), second),
            (
                "interleave, odd",
                [got(simd.odd(low)), got(simd.odd(high))].concat(),
                (0..2 * n).map(|i| i as f32).collect(),
            ),
            (
                "sums",
                simd.sums(multiples.map(|k| simd.mul(va, simd.splat(k)))).to_vec(),
                multiples.map(|k| k * a.iter().sum::<f32>()).to_vec(),
            ),
            ("load_bf16", got(widened), pairs[..n].iter().map(|x| x.to_f32()).collect()),
            ("sum", vec![simd.sum(va)], vec![a.iter().sum()]),
            ("max_lane", vec![simd.max_lane(va)], vec![a.iter().copied().fold(f32::MIN, f32::max)]),
        ]
    }
}

#[test]
fn every_operation_is_what_it_says() {
    // Small multiples of 1/4: all results but quotients are exact in any order.
    let a: Vec<f32> = (0..16).map(|i| (i * 7 % 16) as f32 * 0.25 - 2.0).collect();
    let b: Vec<f32> = (0..16).map(|i| (i * 5 % 16) as f32 * 0.5 + 0.25).collect();
    for isa in Isa::available() {
        for (name, got, want) in isa.dispatch(Everything { a: &a, b: &b }) {
            assert_eq!(got, want, "{} on {}", name, isa.name());
        }
    }
}

/// What comparisons make of numbers and NaN.
struct Compare<'a>(&'a [f32]);

impl Kernel for Compare<'_> {
    /// [`Simd::at_least`] 1.0, [`Simd::equal`] to 1.0, and [`Simd::max_lane`].
    type Output = (Vec<f32>, u32, f32);
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Self::Output {
        let x = &self.0[..S::LANES];
        // SAFETY: LANES elements.
        let v = unsafe { simd.load(x.as_ptr()) };
        let one = simd.splat(1.0);
        let at_least = simd.at_least(v, one, simd.splat(3.0), simd.splat(2.0));
        (simd.to_array(at_least)[..S::LANES].to_vec(), simd.equal(v, one), simd.max_lane(v))
    }
}

#[test]
fn nan_compares_with_nothing() {
    for isa in Isa::available() {
        for lane in 0..8 {
            for (x, at_least) in [(0.5, 2.0), (1.0, 3.0), (f32::INFINITY, 3.0), (f32::NAN, 2.0)] {
                let mut row = [f32::NAN; MAX_LANES];
                row[lane] = x;
                let (got, equal, max) = isa.dispatch(Compare(&row));
                let want = |i: usize| if i == lane { at_least } else { 2.0 };
                assert!(got.iter().enumerate().all(|(i, &y)| y == want(i)), "{x} on {}: {got:?}", isa.name());
                assert_eq!(equal, u32::from(x == 1.0) << lane, "{x} on {}", isa.name());
                assert_eq!(max, if x.is_nan() { f32::NEG_INFINITY } else { x }, "{x} on {}", isa.name());
            }
        }
    }
}

/// Rounds f32 to bf16 through [`Simd::store_bf16_head`].
struct Narrow<'a>(&'a [f32]);

impl Kernel for Narrow<'_> {
    type Output = Vec<bf16>;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Vec<bf16> {
        let mut out = vec![bf16::ZERO; self.0.len()];
        for (x, out) in self.0.chunks(S::LANES).zip(out.chunks_mut(S::LANES)) {
            // SAFETY: both chunks have that many elements.
            unsafe {
                simd.store_bf16_head(out.as_mut_ptr(), x.len(), simd.load_head(x.as_ptr(), x.len()));
            }
        }
        out
    }
}

#[test]
fn rounding_to_bf16_is_that_of_half() {
    let patterns = (0..=u16::MAX).step_by(7).flat_map(|high| {
        [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff].map(|low| f32::from_bits(u32::from(high) << 16 | low))
    });
    let x: Vec<f32> = patterns.chain([f32::NAN, f32::INFINITY, -f32::INFINITY, f32::MAX]).collect();
    for isa in Isa::available() {
        let got = isa.dispatch(Narrow(&x));
        for (&x, &y) in x.iter().zip(&got) {
            assert_eq!(y.to_bits(), bf16::from_f32(x).to_bits(), "{} on {}", x, isa.name());
        }
    }
}
