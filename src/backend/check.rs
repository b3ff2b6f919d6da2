//! Shape and type checks shared by all backends: one function per method of [`super::Backend`] that has something
//! to check. A violation is a bug in the floor above, so these assert, with the numbers.

mod moe;

use super::{
    AddNormArgs, AttentionBatch, DType, GqaArgs, HostData, HostMatrix, HostMlp, KvCache, KvShape, Matrix,
    MlaArgs, MlaWeights, NormArgs, Precision, RopeArgs, View, ViewMut,
};
use crate::backend::draw::{Draw, MOST_TOKENS};
use crate::spec::NormKind;
pub use moe::{
    combine, combine_returned, experts, experts_and_shared, mlp, planned_experts, route, world_experts,
};

/// Asserts the shape of a view.
fn shape(name: &str, x: &View<'_>, rows: usize, cols: usize) {
    let found = (x.rows(), x.cols());
    assert!(found == (rows, cols), "{name}: expected [{rows}, {cols}], found [{}, {}]", found.0, found.1);
}

/// Asserts the exact type of a view.
fn dtype(name: &str, x: &View<'_>, expected: DType) {
    assert!(x.dtype() == expected, "{name}: expected {expected:?}, found {:?}", x.dtype());
}

/// Asserts that a view holds floating point numbers.
fn float(name: &str, x: &View<'_>) {
    assert!(is_float(x.dtype()), "{name}: expected F32 or Bf16, found {:?}", x.dtype());
}

/// Asserts a `[1, cols]` f32 view.
fn vector(name: &str, x: &View<'_>, cols: usize) {
    dtype(name, x, DType::F32);
    shape(name, x, 1, cols);
}

/// Asserts that every index is below a limit.
fn below(name: &str, index: &[u32], limit: usize) {
    // Block tables are long and checked in every layer: the usual pass has no branches.
    let greatest = index.iter().fold(0, |max, &n| n.max(max));
    if greatest as usize >= limit {
        for (i, &n) in index.iter().enumerate() {
            assert!((n as usize) < limit, "{name}[{i}]: {n} of {limit}");
        }
    }
}

/// Asserts that activations of one type may be multiplied with weights of another.
fn multiplied(name: &str, activations: DType, weights: DType) {
    let known = Precision::ALL.iter().any(|p| (p.weights, p.activations) == (weights, activations));
    assert!(known, "{name}: {activations:?} activations for {weights:?} weights");
}

/// Whether activations may have this type.
pub fn is_float(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::Bf16)
}

/// [`super::Backend::upload`] and [`super::Backend::download`].
pub fn transfer(host_bytes: usize, x: &View<'_>) {
    let bytes = x.rows() * x.cols() * x.dtype().bytes();
    assert!(
        host_bytes == bytes,
        "{host_bytes} host bytes for [{}, {}] of {:?}, {bytes} bytes",
        x.rows(),
        x.cols(),
        x.dtype()
    );
}

/// [`super::Backend::copy_rows`].
pub fn copy_rows(src: &View<'_>, dst: &ViewMut<'_>) {
    shape("copy_rows src", src, dst.rows(), dst.cols());
    assert!(
        src.dtype() == dst.dtype() || (is_float(src.dtype()) && is_float(dst.dtype())),
        "copy_rows from {:?} to {:?}",
        src.dtype(),
        dst.dtype()
    );
}

/// [`super::Backend::gather_rows`].
pub fn gather_rows(src: &View<'_>, index: &[u32], dst: &ViewMut<'_>) {
    dtype("gather_rows dst", &dst.as_view(), src.dtype());
    shape("gather_rows dst", &dst.as_view(), index.len(), src.cols());
    below("gather_rows index", index, src.rows());
}

/// A host matrix holds as many elements as its shape says.
pub fn host_matrix(name: &str, m: &HostMatrix<'_>) {
    let len = match &m.data {
        HostData::F32(data) => data.len(),
        HostData::Bf16(data) => data.len(),
        HostData::Quantized(data) => {
            assert!(data.shape() == (m.n, m.k), "{name}: {:?} codes for [{}, {}]", data.shape(), m.n, m.k);
            m.n * m.k
        }
    };
    assert!(m.n.checked_mul(m.k) == Some(len), "{name}: {len} elements for [{}, {}]", m.n, m.k);
}

/// [`super::Backend::pack_mlp`].
pub fn pack_mlp(m: &HostMlp<'_>) {
    let (intermediate, hidden) = (m.gate.n, m.gate.k);
    for (name, matrix, n, k) in [
        ("gate", &m.gate, intermediate, hidden),
        ("up", &m.up, intermediate, hidden),
        ("down", &m.down, hidden, intermediate),
    ] {
        host_matrix(name, matrix);
        assert!(
            (matrix.n, matrix.k) == (n, k),
            "{name}: expected [{n}, {k}], found [{}, {}]",
            matrix.n,
            matrix.k
        );
    }
    if let Some(bias) = &m.bias {
        for (name, len, expected) in [
            ("gate bias", bias.gate.len(), intermediate),
            ("up bias", bias.up.len(), intermediate),
            ("down bias", bias.down.len(), hidden),
        ] {
            assert!(len == expected, "{name}: expected {expected} elements, found {len}");
        }
    }
}

/// [`super::Backend::pack_mla`].
pub fn pack_mla(kv_b: &HostMatrix<'_>, heads: usize, nope_dim: usize, v_dim: usize) {
    host_matrix("kv_b", kv_b);
    let n = heads * (nope_dim + v_dim);
    assert!(
        kv_b.n == n,
        "kv_b: expected {n} outputs for {heads} heads of {nope_dim} + {v_dim}, found {}",
        kv_b.n
    );
}

/// [`super::Backend::embed`].
pub fn embed(table: &View<'_>, ids: &[u32], out: &ViewMut<'_>) {
    float("embed table", table);
    dtype("embed out", &out.as_view(), DType::F32);
    shape("embed out", &out.as_view(), ids.len(), table.cols());
    below("embed ids", ids, table.rows());
}

/// [`super::Backend::norm`]; for the method in place, `out` is `x`.
pub fn norm(x: &View<'_>, args: &NormArgs<'_>, out: &View<'_>) {
    float("norm x", x);
    float("norm out", out);
    shape("norm out", out, x.rows(), x.cols());
    assert!(
        args.width > 0 && x.cols().is_multiple_of(args.width),
        "norm: width {} for {} columns",
        args.width,
        x.cols()
    );
    vector("norm weight", &args.weight, args.width);
    match (args.kind, &args.bias) {
        (NormKind::Rms, bias) => assert!(bias.is_none(), "an RMS norm has no bias"),
        (NormKind::Layer, bias) => {
            if let Some(bias) = bias {
                vector("norm bias", bias, args.width);
            }
        }
    }
}

/// [`super::Backend::add_norm`].
pub fn add_norm(x: &ViewMut<'_>, args: &AddNormArgs<'_>) {
    dtype("add_norm x", &x.as_view(), DType::F32);
    if let Some((addend, _)) = &args.addend {
        add_scaled(addend, x);
    }
    if let Some(exact) = &args.exact {
        dtype("add_norm exact", &exact.as_view(), DType::F32);
        norm(&x.as_view(), &args.norm, &exact.as_view());
    }
    norm(&x.as_view(), &args.norm, &args.rounded.as_view());
}

/// [`super::Backend::square_sum`].
pub fn square_sum(x: &View<'_>, out: &ViewMut<'_>) {
    float("square_sum x", x);
    dtype("square_sum out", &out.as_view(), DType::F32);
    shape("square_sum out", &out.as_view(), x.rows(), 1);
}

/// [`super::Backend::scale_by_square_sum`].
pub fn scale_by_square_sum(sums: &View<'_>, width: usize, weight: &View<'_>, x: &ViewMut<'_>) {
    float("scale_by_square_sum x", &x.as_view());
    dtype("sums", sums, DType::F32);
    shape("sums", sums, x.rows(), 1);
    vector("weight", weight, x.cols());
    assert!(width >= x.cols(), "scale_by_square_sum: width {width} of which {} columns are here", x.cols());
}

/// [`super::Backend::linear`].
pub fn linear(x: &View<'_>, w: &Matrix, bias: Option<&View<'_>>, out: &ViewMut<'_>) {
    float("linear x", x);
    multiplied("linear x", x.dtype(), w.data.dtype());
    float("linear out", &out.as_view());
    shape("linear x", x, out.rows(), w.k);
    shape("linear out", &out.as_view(), x.rows(), w.n);
    if let Some(bias) = bias {
        vector("linear bias", bias, w.n);
    }
}

/// [`super::Backend::rope`].
pub fn rope(x: &ViewMut<'_>, args: &RopeArgs<'_>) {
    float("rope x", &x.as_view());
    assert!(args.dim.is_multiple_of(2), "rope: odd width {}", args.dim);
    dtype("rope table", &args.table, DType::F32);
    shape("rope table", &args.table, args.table.rows(), args.dim);
    assert!(args.rows.len() == x.rows(), "rope: {} positions for {} rows", args.rows.len(), x.rows());
    below("rope rows", args.rows, args.table.rows());
    assert!(
        args.offset + args.dim <= args.head_stride && args.heads * args.head_stride <= x.cols(),
        "rope: {} heads of {} with {} + {} rotating, in {} columns",
        args.heads,
        args.head_stride,
        args.offset,
        args.dim,
        x.cols()
    );
}

/// [`super::Backend::add_scaled`].
pub fn add_scaled(x: &View<'_>, y: &ViewMut<'_>) {
    float("add_scaled x", x);
    dtype("add_scaled y", &y.as_view(), DType::F32);
    shape("add_scaled x", x, y.rows(), y.cols());
}

/// [`super::Backend::scale`].
pub fn scale(x: &ViewMut<'_>) {
    dtype("scale x", &x.as_view(), DType::F32);
}

/// [`super::Backend::clamp`].
pub fn clamp(limit: f32, x: &ViewMut<'_>) {
    float("clamp x", &x.as_view());
    assert!(limit >= 0.0, "clamp to +-{limit}");
}

/// [`super::Backend::sigmoid_gate`].
pub fn sigmoid_gate(gate: &View<'_>, x: &ViewMut<'_>) {
    dtype("gate", gate, DType::F32);
    dtype("sigmoid_gate x", &x.as_view(), DType::F32);
    shape("gate", gate, x.rows(), 1);
}

/// [`super::Backend::alloc_kv`] and [`super::Backend::kv_block_bytes`].
pub fn kv_shape(shape: KvShape, dtype: DType, block_size: usize) {
    assert!(is_float(dtype), "KV cache of {dtype:?}");
    assert!(block_size > 0 && block_size.is_multiple_of(16), "KV block of {block_size} tokens");
    let (a, b) = match shape {
        KvShape::Gqa { kv_heads, head_dim } => (kv_heads, head_dim),
        KvShape::Mla { latent, rope_dim } => (latent, rope_dim),
    };
    assert!(a > 0 && b > 0, "empty KV shape {shape:?}");
}

/// Spans cover `rows` rows in order, and every block they need is in the table and in the pool.
pub fn batch(batch: &AttentionBatch<'_>, rows: usize, cache: &KvCache) {
    let mut next = 0;
    for (i, s) in batch.spans.iter().enumerate() {
        assert!(s.rows > 0 && s.row as usize == next, "span {i}: {s:?} after {next} rows");
        next += s.rows as usize;
        let blocks = (s.position as usize + s.rows as usize).div_ceil(cache.block_size);
        let table = s.first_block as usize..s.first_block as usize + blocks;
        assert!(
            table.end <= batch.block_table.len(),
            "span {i}: blocks {table:?} of a table of {}",
            batch.block_table.len()
        );
        below("block table", &batch.block_table[table], cache.blocks);
    }
    assert!(next == rows, "{rows} rows, of which the spans cover {next}");
}

/// [`super::Backend::kv_write`].
pub fn kv_write(k: &View<'_>, v: &View<'_>, spans: &AttentionBatch<'_>, cache: &KvCache) {
    float("kv_write k", k);
    float("kv_write v", v);
    let (k_cols, v_cols) = match cache.shape {
        KvShape::Gqa { kv_heads, head_dim } => (kv_heads * head_dim, kv_heads * head_dim),
        KvShape::Mla { latent, rope_dim } => (rope_dim, latent),
    };
    let rows = spans.rows();
    shape("kv_write k", k, rows, k_cols);
    shape("kv_write v", v, rows, v_cols);
    batch(spans, rows, cache);
    for s in spans.spans {
        // Rows are stored by several threads: a block that came twice would be written by two.
        let first = s.position as usize / cache.block_size;
        let end = (s.position as usize + s.rows as usize).div_ceil(cache.block_size);
        let written = &spans.block_table[s.first_block as usize..][first..end];
        for (i, block) in written.iter().enumerate() {
            assert!(!written[..i].contains(block), "kv_write: block {block} twice in {s:?}");
        }
    }
}

/// What [`super::Backend::rope_kv_write`] asks beside [`rope`] and [`kv_write`]. Returns (KV heads, head dimension).
pub fn rope_kv_write(qkv: &ViewMut<'_>, args: &RopeArgs<'_>, cache: &KvCache) -> (usize, usize) {
    let KvShape::Gqa { kv_heads, head_dim } = cache.shape else {
        panic!("queries, keys and values for a cache of {:?}", cache.shape)
    };
    assert!(
        args.head_stride == head_dim && args.heads > kv_heads,
        "{} heads of {} for a cache of {kv_heads} of {head_dim}",
        args.heads,
        args.head_stride
    );
    shape("qkv", &qkv.as_view(), qkv.rows(), (args.heads + kv_heads) * head_dim);
    (kv_heads, head_dim)
}

/// [`super::Backend::attention_gqa`]. Returns (KV heads, head dimension).
pub fn attention_gqa(args: &GqaArgs<'_>, out: &ViewMut<'_>) -> (usize, usize) {
    let KvShape::Gqa { kv_heads, head_dim } = args.cache.shape else {
        panic!("grouped-query attention over a cache of {:?}", args.cache.shape)
    };
    assert!(
        args.heads > 0 && args.heads.is_multiple_of(kv_heads),
        "{} query heads over {kv_heads} KV heads",
        args.heads
    );
    let rows = args.batch.rows();
    float("attention q", &args.q);
    float("attention out", &out.as_view());
    shape("attention q", &args.q, rows, args.heads * head_dim);
    shape("attention out", &out.as_view(), rows, args.heads * head_dim);
    assert!(args.window != Some(0), "attention window of 0 positions");
    if let Some(sinks) = &args.sinks {
        vector("sinks", sinks, args.heads);
    }
    batch(&args.batch, rows, args.cache);
    (kv_heads, head_dim)
}

/// [`super::Backend::attention_mla`]. Returns (latent width, rotary width).
pub fn attention_mla(args: &MlaArgs<'_>, out: &ViewMut<'_>) -> (usize, usize) {
    let KvShape::Mla { latent, rope_dim } = args.cache.shape else {
        panic!("latent attention over a cache of {:?}", args.cache.shape)
    };
    let w: &MlaWeights = args.weights;
    assert!(w.latent == latent, "kv_b for a latent of {} over a cache of {latent}", w.latent);
    let rows = args.batch.rows();
    float("attention q", &args.q);
    float("attention out", &out.as_view());
    shape("attention q", &args.q, rows, w.heads * (w.nope_dim + rope_dim));
    shape("attention out", &out.as_view(), rows, w.heads * w.v_dim);
    multiplied("kv_b", args.cache.dtype, w.parts[0].dtype());
    batch(&args.batch, rows, args.cache);
    (latent, rope_dim)
}

/// [`super::Backend::sample`].
pub fn sample(x: &View<'_>, draws: &[Draw], out: &ViewMut<'_>) {
    dtype("sample x", x, DType::F32);
    dtype("sample out", &out.as_view(), DType::I32);
    shape("sample out", &out.as_view(), x.rows(), 2);
    assert!((1..=MOST_TOKENS).contains(&x.cols()), "a token of {}, expected 1 to {MOST_TOKENS}", x.cols());
    assert!(draws.len() == x.rows(), "{} draws for {} rows", draws.len(), x.rows());
    for draw in draws {
        let Draw { temperature, top_p, min_p, .. } = *draw;
        assert!(temperature >= 0.0 && top_p > 0.0 && (0.0..=1.0).contains(&min_p), "{draw:?}");
    }
}
