//! The slow reference: the formulas of [`Backend`] as plain loops, which every fast path is tested against.
//!
//! Each method reads its operands into `Host` matrices of f32, computes, and stores the result once. Sums run in
//! f64, so that the reference is closer to the true value than any fast path; it is compared with tolerances and
//! makes no promise about bits. Packed layouts are the plain ones: row-major matrices, tokens in cache order.

mod attention;
mod dense;
mod host;
mod moe;
mod quantized;
mod route;
mod sample;
#[cfg(test)]
mod tests;
mod world;

use super::cpu::memory;
use super::draw::Draw;
use super::{
    AttentionBatch, Backend, CombineArgs, DType, DeviceId, DevicePlan, ExpertsArgs, GqaArgs, HostMatrix,
    HostMlp, KvCache, KvShape, Matrix, MlaArgs, MlaWeights, Mlp, NormArgs, PlannedArgs, RopeArgs, Tensor,
    View, ViewMut, WorldPlan, check,
};
use crate::error::Result;
use crate::spec::{Activation, Router};
use host::Host;

/// See the module doc. Has no state: all its tensors are host memory, shared with the CPU backend.
#[derive(Debug, Default, Clone, Copy)]
pub struct ReferenceBackend;

impl ReferenceBackend {
    /// A tensor with the elements of a host matrix, rounded to `dtype`.
    fn store(&self, host: &Host, dtype: DType) -> Result<Tensor> {
        let mut tensor = self.alloc(dtype, host.rows, host.cols)?;
        host.write(tensor.view_mut());
        Ok(tensor)
    }
}

impl Backend for ReferenceBackend {
    fn device(&self) -> DeviceId {
        DeviceId::Cpu
    }

    fn describe(&self) -> String {
        "reference (plain loops, 1 thread)".into()
    }

    fn alloc(&self, dtype: DType, rows: usize, cols: usize) -> Result<Tensor> {
        memory::tensor(dtype, rows, cols)
    }

    fn upload(&self, src: &[u8], dst: ViewMut<'_>) -> Result<()> {
        check::transfer(src.len(), &dst.as_view());
        host::upload(src, dst);
        Ok(())
    }

    fn download(&self, src: View<'_>, dst: &mut [u8]) -> Result<()> {
        check::transfer(dst.len(), &src);
        host::download(src, dst);
        Ok(())
    }

    fn copy_rows(&self, src: View<'_>, dst: ViewMut<'_>) -> Result<()> {
        check::copy_rows(&src, &dst);
        match src.dtype() {
            DType::I32 => host::copy_ints::<i32>(src, dst),
            DType::I8 => host::copy_ints::<i8>(src, dst),
            DType::F8 => host::copy_ints::<memory::F8>(src, dst),
            DType::I4x2 => host::copy_ints::<memory::I4x2>(src, dst),
            DType::F32 | DType::Bf16 => Host::read(src).write(dst),
        }
        Ok(())
    }

    fn gather_rows(&self, src: View<'_>, index: &[u32], dst: ViewMut<'_>) -> Result<()> {
        check::gather_rows(&src, index, &dst);
        let mut dst = dst;
        for (i, &from) in index.iter().enumerate() {
            let from = from as usize;
            self.copy_rows(src.rows_range(from..from + 1), dst.reborrow().rows_range(i..i + 1))?;
        }
        Ok(())
    }

    fn pack_matrix(&self, host: &HostMatrix<'_>, dtype: DType) -> Result<Matrix> {
        check::host_matrix("matrix", host);
        Ok(Matrix { data: self.store(&Host::of_weights(host), dtype)?, n: host.n, k: host.k })
    }

    fn pack_mlp(&self, host: &HostMlp<'_>, dtype: DType) -> Result<Mlp> {
        check::pack_mlp(host);
        let mut parts = Vec::new();
        let mut scales = Vec::new();
        for matrix in [&host.gate, &host.up, &host.down] {
            match dtype {
                DType::I8 => {
                    let matrix = Host::of_weights(matrix);
                    let (values, factors) = moe::quantized(&matrix);
                    let mut part = self.alloc(dtype, matrix.rows, matrix.cols)?;
                    host::write_ints(&values, part.view_mut());
                    parts.push(part);
                    scales.push(self.store(&Host::of_vector(&factors), DType::F32)?);
                }
                DType::F8 | DType::I4x2 => {
                    let [codes, factors] = quantized::store(&matrix.quantized(dtype))?;
                    parts.push(codes);
                    scales.push(factors);
                }
                _ => parts.push(self.store(&Host::of_weights(matrix), dtype)?),
            }
        }
        parts.append(&mut scales);
        if let Some(bias) = &host.bias {
            for vector in [&bias.gate, &bias.up, &bias.down] {
                parts.push(self.store(&Host::of_vector(vector), DType::F32)?);
            }
        }
        Ok(Mlp { parts, hidden: host.gate.k, intermediate: host.gate.n })
    }

    fn pack_mla(
        &self,
        kv_b: &HostMatrix<'_>,
        heads: usize,
        nope_dim: usize,
        v_dim: usize,
        dtype: DType,
    ) -> Result<MlaWeights> {
        check::pack_mla(kv_b, heads, nope_dim, v_dim);
        let parts = vec![self.store(&Host::of_weights(kv_b), dtype)?];
        Ok(MlaWeights { parts, heads, latent: kv_b.k, nope_dim, v_dim })
    }

    fn has_experts_in(&self, dtype: DType) -> bool {
        dtype != DType::I32
    }

    fn matrix_bytes(&self, n: usize, k: usize, dtype: DType) -> usize {
        n * k * dtype.bytes()
    }

    fn mlp_bytes(&self, hidden: usize, intermediate: usize, bias: bool, dtype: DType) -> usize {
        let outputs = 2 * intermediate + hidden;
        let vectors = usize::from(bias) + usize::from(dtype == DType::I8);
        let matrix = |n, k| match dtype {
            DType::F8 | DType::I4x2 => quantized::bytes(n, k, dtype),
            _ => self.matrix_bytes(n, k, dtype),
        };
        let matrices = 2 * matrix(intermediate, hidden) + matrix(hidden, intermediate);
        matrices + vectors * outputs * DType::F32.bytes()
    }

    fn mla_bytes(&self, heads: usize, nope_dim: usize, v_dim: usize, latent: usize, dtype: DType) -> usize {
        self.matrix_bytes(heads * (nope_dim + v_dim), latent, dtype)
    }

    fn embed(&self, table: View<'_>, ids: &[u32], scale: f32, out: ViewMut<'_>) -> Result<()> {
        check::embed(&table, ids, &out);
        dense::embed(table, ids, scale, out);
        Ok(())
    }

    fn norm(&self, x: View<'_>, args: NormArgs<'_>, out: ViewMut<'_>) -> Result<()> {
        check::norm(&x, &args, &out.as_view());
        dense::norm(Host::read(x), args).write(out);
        Ok(())
    }

    fn norm_inplace(&self, x: ViewMut<'_>, args: NormArgs<'_>) -> Result<()> {
        check::norm(&x.as_view(), &args, &x.as_view());
        dense::norm(Host::read(x.as_view()), args).write(x);
        Ok(())
    }

    fn square_sum(&self, x: View<'_>, out: ViewMut<'_>) -> Result<()> {
        check::square_sum(&x, &out);
        dense::square_sum(&Host::read(x)).write(out);
        Ok(())
    }

    fn scale_by_square_sum(
        &self,
        sums: View<'_>,
        width: usize,
        eps: f32,
        weight: View<'_>,
        x: ViewMut<'_>,
    ) -> Result<()> {
        check::scale_by_square_sum(&sums, width, &weight, &x);
        let (sums, weight) = (Host::read(sums), Host::read(weight));
        dense::scale_by_square_sum(&sums, width, eps, &weight, Host::read(x.as_view())).write(x);
        Ok(())
    }

    fn linear(&self, x: View<'_>, w: &Matrix, bias: Option<View<'_>>, out: ViewMut<'_>) -> Result<()> {
        check::linear(&x, w, bias.as_ref(), &out);
        let bias = bias.map(Host::read);
        dense::linear(&Host::read(x), &Host::read(w.data.view()), bias.as_ref()).write(out);
        Ok(())
    }

    fn rope(&self, x: ViewMut<'_>, args: RopeArgs<'_>) -> Result<()> {
        check::rope(&x, &args);
        dense::rope(Host::read(x.as_view()), args).write(x);
        Ok(())
    }

    fn add_scaled(&self, x: View<'_>, scale: f32, y: ViewMut<'_>) -> Result<()> {
        check::add_scaled(&x, &y);
        let x = Host::read(x);
        Host::read(y.as_view()).map(|i, d, y| y + x.row(i)[d] * scale).write(y);
        Ok(())
    }

    fn scale(&self, scale: f32, x: ViewMut<'_>) -> Result<()> {
        check::scale(&x);
        Host::read(x.as_view()).map(|_, _, x| x * scale).write(x);
        Ok(())
    }

    fn clamp(&self, limit: f32, x: ViewMut<'_>) -> Result<()> {
        check::clamp(limit, &x);
        Host::read(x.as_view()).map(|_, _, x| x.clamp(-limit, limit)).write(x);
        Ok(())
    }

    fn sigmoid_gate(&self, gate: View<'_>, x: ViewMut<'_>) -> Result<()> {
        check::sigmoid_gate(&gate, &x);
        let gate = Host::read(gate);
        Host::read(x.as_view()).map(|i, _, x| x * dense::sigmoid(gate.row(i)[0])).write(x);
        Ok(())
    }

    fn alloc_kv(&self, shape: KvShape, dtype: DType, block_size: usize, blocks: usize) -> Result<KvCache> {
        check::kv_shape(shape, dtype, block_size);
        let tokens = block_size * blocks;
        let (first, second) = attention::token_widths(shape);
        let parts = vec![self.alloc(dtype, tokens, first)?, self.alloc(dtype, tokens, second)?];
        Ok(KvCache { parts, shape, dtype, block_size, blocks })
    }

    fn kv_block_bytes(&self, shape: KvShape, dtype: DType, block_size: usize) -> usize {
        check::kv_shape(shape, dtype, block_size);
        let (first, second) = attention::token_widths(shape);
        block_size * (first + second) * dtype.bytes()
    }

    fn kv_write(
        &self,
        k: View<'_>,
        v: View<'_>,
        batch: AttentionBatch<'_>,
        cache: &mut KvCache,
    ) -> Result<()> {
        check::kv_write(&k, &v, &batch, cache);
        attention::kv_write(&Host::read(k), &Host::read(v), batch, cache);
        Ok(())
    }

    fn attention_gqa(&self, args: GqaArgs<'_>, out: ViewMut<'_>) -> Result<()> {
        check::attention_gqa(&args, &out);
        attention::gqa(&args).write(out);
        Ok(())
    }

    fn attention_mla(&self, args: MlaArgs<'_>, out: ViewMut<'_>) -> Result<()> {
        check::attention_mla(&args, &out);
        attention::mla(&args).write(out);
        Ok(())
    }

    fn route(
        &self,
        logits: View<'_>,
        bias: Option<View<'_>>,
        router: &Router,
        ids: ViewMut<'_>,
        weights: ViewMut<'_>,
    ) -> Result<()> {
        check::route(&logits, bias.as_ref(), router, &ids, &weights);
        let top_k = ids.cols();
        let (logits, bias) = (Host::read(logits), bias.map(Host::read));
        let (mut chosen, mut factors) = (Vec::new(), Vec::new());
        for i in 0..logits.rows {
            let bias = bias.as_ref().map(|b| b.row(0));
            for choice in route::choose(logits.row(i), bias, router, top_k) {
                chosen.push(choice.expert as i32);
                factors.push(choice.weight);
            }
        }
        host::write_ints(&chosen, ids);
        Host { rows: logits.rows, cols: top_k, data: factors }.write(weights);
        Ok(())
    }

    fn sample(&self, x: View<'_>, draws: &[Draw], out: ViewMut<'_>) -> Result<()> {
        check::sample(&x, draws, &out);
        let x = Host::read(x);
        let chosen = draws.iter().enumerate().flat_map(|(i, draw)| sample::sample(x.row(i), draw));
        host::write_ints(&chosen.collect::<Vec<_>>(), out);
        Ok(())
    }

    fn experts(&self, args: ExpertsArgs<'_>, out: ViewMut<'_>) -> Result<()> {
        check::experts(&args, &out);
        let mut out = out;
        for (slot, borders) in args.slots.iter().zip(args.offsets.windows(2)) {
            if let Some(w) = slot {
                let rows = borders[0]..borders[1];
                let y = moe::mlp(args.rows.rows_range(rows.clone()), w, args.activation);
                y.write(out.reborrow().rows_range(rows));
            }
        }
        Ok(())
    }

    fn mlp(&self, x: View<'_>, w: &Mlp, activation: Activation, out: ViewMut<'_>) -> Result<()> {
        check::mlp(&x, w, &out);
        moe::mlp(x, w, activation).write(out);
        Ok(())
    }

    fn device_plan(&self) -> Option<&dyn DevicePlan> {
        Some(self)
    }

    fn world_plan(&self) -> Option<&dyn WorldPlan> {
        Some(self)
    }

    fn combine(&self, args: CombineArgs<'_>, out: ViewMut<'_>) -> Result<()> {
        check::combine(&args, &out);
        moe::combine(&args).write(out);
        Ok(())
    }
}

impl DevicePlan for ReferenceBackend {
    fn planned_experts(&self, args: PlannedArgs<'_>, out: ViewMut<'_>) -> Result<()> {
        check::planned_experts(&args, &out);
        let PlannedArgs { x, mut computed, .. } = args;
        let ids = host::read_ints::<i32>(args.ids);
        // Row t * top_k + j is choice j of token t: its own place, as nothing here is faster in groups.
        let index: Vec<u32> = (0..ids.len() as u32).collect();
        for (row, &expert) in ids.iter().enumerate() {
            let (token, slot) = (row / args.ids.cols(), args.slot_of[expert as usize] as usize);
            let w = args.slots[slot].as_ref().expect("checked above");
            let y = moe::mlp(x.rows_range(token..token + 1), w, args.activation);
            y.write(computed.reborrow().rows_range(row..row + 1));
        }
        let rows = computed.as_view();
        self.combine(CombineArgs { rows, index: &index, weights: args.weights, parts: 1 }, out)
    }
}
