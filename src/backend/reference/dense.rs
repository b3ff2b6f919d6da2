//! Embedding, norms, linear layers and rotary embedding.

use super::host::Host;
use crate::backend::{NormArgs, RopeArgs, View, ViewMut};
use crate::spec::NormKind;

/// `sum_i a[i] * b[i]`.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len(), "lengths of a dot product");
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

/// `1 / (1 + e^-x)`.
pub(super) fn sigmoid(x: f32) -> f32 {
    (1.0 / (1.0 + (-f64::from(x)).exp())) as f32
}

/// See [`crate::backend::Backend::embed`].
pub(super) fn embed(table: View<'_>, ids: &[u32], scale: f32, out: ViewMut<'_>) {
    let mut rows = Host::new(ids.len(), table.cols());
    for (i, &id) in ids.iter().enumerate() {
        let id = id as usize;
        let row = Host::read(table.rows_range(id..id + 1)).map(|_, _, x| x * scale);
        rows.row_mut(i).copy_from_slice(row.row(0));
    }
    rows.write(out);
}

/// See [`crate::backend::Backend::norm`].
pub(super) fn norm(x: Host, args: NormArgs<'_>) -> Host {
    let weight = Host::read(args.weight);
    let bias = args.bias.map(Host::read);
    let (eps, n) = (f64::from(args.eps), args.width as f64);
    let mut out = x;
    for group in out.data.chunks_exact_mut(args.width) {
        let mean = match args.kind {
            NormKind::Rms => 0.0,
            NormKind::Layer => group.iter().map(|&x| f64::from(x)).sum::<f64>() / n,
        };
        let variance = group.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n;
        for (d, x) in group.iter_mut().enumerate() {
            let bias = bias.as_ref().map_or(0.0, |b| f64::from(b.data[d]));
            *x = ((f64::from(*x) - mean) / (variance + eps).sqrt() * f64::from(weight.data[d]) + bias) as f32;
        }
    }
    out
}

/// See [`crate::backend::Backend::square_sum`].
pub(super) fn square_sum(x: &Host) -> Host {
    Host { rows: x.rows, cols: 1, data: (0..x.rows).map(|i| dot(x.row(i), x.row(i)) as f32).collect() }
}

/// See [`crate::backend::Backend::scale_by_square_sum`].
pub(super) fn scale_by_square_sum(sums: &Host, width: usize, eps: f32, weight: &Host, x: Host) -> Host {
    x.map(|i, d, x| {
        let mean = f64::from(sums.row(i)[0]) / width as f64;
        (f64::from(x) / (mean + f64::from(eps)).sqrt() * f64::from(weight.data[d])) as f32
    })
}

/// See [`crate::backend::Backend::linear`]; `w` is `[n, k]`.
pub(super) fn linear(x: &Host, w: &Host, bias: Option<&Host>) -> Host {
    Host::new(x.rows, w.rows).map(|i, j, _| {
        let bias = bias.map_or(0.0, |b| f64::from(b.data[j]));
        (dot(x.row(i), w.row(j)) + bias) as f32
    })
}

/// See [`crate::backend::Backend::rope`].
pub(super) fn rope(x: Host, args: RopeArgs<'_>) -> Host {
    let table = Host::read(args.table);
    let half = args.dim / 2;
    let mut out = x;
    for (i, &angles) in args.rows.iter().enumerate() {
        let (cos, sin) = table.row(angles as usize).split_at(half);
        for head in 0..args.heads {
            let rotating = &mut out.row_mut(i)[head * args.head_stride + args.offset..][..args.dim];
            for p in 0..half {
                let (ia, ib) = if args.interleaved { (2 * p, 2 * p + 1) } else { (p, p + half) };
                let (a, b) = (rotating[ia], rotating[ib]);
                rotating[ia] = a * cos[p] - b * sin[p];
                rotating[ib] = b * cos[p] + a * sin[p];
            }
        }
    }
    out
}
