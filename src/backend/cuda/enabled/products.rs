//! Products: linear layers, experts, and what packs their weights.
//!
//! Matrices are row-major `[n, k]` with rows padded by zeros to a multiple of eight elements. Gate and up of an MLP are one
//! matrix whose rows alternate, eight gates, eight ups, so that the kernel holds both halves of a gated activation in one lane. Experts in
//! 8 or 4 bits are dealt alike, in the tiles of [`packing`].

use super::ffi;
use super::memory::{Upload, tensor, upload};
use super::tiles::{Groups, Meets, Tile};
use super::{CudaBackend, Lock as _};
use crate::backend::cuda::{ProductKernels, packing};
use crate::backend::{
    DType, ExpertsArgs, HostData, HostMatrix, HostMlp, Matrix, Mlp, Tensor, View, ViewMut, check,
};
use crate::error::Result;
use crate::spec::Activation;

/// Rows of gates before the ups of the same columns: what the bf16 kernel's lanes hold together.
const DEAL: usize = 8;

/// Most outputs of a product in f32 that has a kernel of its own: as many as a router has experts.
const NARROW: usize = 512;

/// Elements of a row in device memory.
pub fn padded(k: usize) -> usize {
    k.next_multiple_of(8)
}

/// The type and bytes of a host matrix of floating point numbers.
fn host_bytes<'a>(host: &'a HostMatrix<'_>) -> (DType, &'a [u8]) {
    match &host.data {
        HostData::F32(values) => (DType::F32, bytemuck::cast_slice(values)),
        HostData::Bf16(values) => (DType::Bf16, bytemuck::cast_slice(values)),
        HostData::Quantized(codes) => panic!("{:?} weights of no expert", codes.dtype()),
    }
}

fn none() -> ffi::Gate {
    ffi::Gate { activation: 0, limit: 0.0, alpha: 0.0 }
}

fn gate(activation: Activation) -> ffi::Gate {
    match activation {
        Activation::SiluMul => ffi::Gate { activation: 1, limit: 0.0, alpha: 0.0 },
        Activation::ClampedSwiglu { limit, alpha } => ffi::Gate { activation: 2, limit, alpha },
    }
}

/// Weights that rows are multiplied with: device addresses.
#[derive(Clone, Copy)]
enum Weights {
    /// One matrix for all rows, and its bias or 0.
    One { matrix: usize, bias: usize },
    /// A matrix for each slot: arrays of addresses, the array of biases or 0, and the offsets of the slots' rows, which the kernel before
    /// this product waited for where they are `known`.
    Slots { matrices: usize, biases: usize, offsets: usize, known: bool },
}

/// The shape of a product, the same for every slot.
#[derive(Clone, Copy)]
struct Shape {
    n: usize,
    k: usize,
    dtype: DType,
}

impl Shape {
    /// Whether the weights are codes.
    fn quantized(self) -> bool {
        is_quantized(self.dtype)
    }

    /// What the kernels step by from one row of weights to the next: elements, or bytes of tiles.
    fn ldw(self) -> usize {
        if self.quantized() { packing::row_bytes(self.k, self.dtype) } else { padded(self.k) }
    }
}

/// Whether weights of this type are codes with scales, in tiles.
fn is_quantized(dtype: DType) -> bool {
    matches!(dtype, DType::F8 | DType::I4x2)
}

/// `batches` equal products side by side: elements from one to the next.
#[derive(Clone, Copy)]
struct Batches {
    count: usize,
    x: usize,
    w: usize,
    out: usize,
}

impl Batches {
    const ONE: Batches = Batches { count: 1, x: 0, w: 0, out: 0 };
}

/// Rows that the tensor cores can read where they lie: 16-byte steps.
fn in_steps(x: &View<'_>) -> bool {
    x.dtype() == DType::Bf16 && x.stride().is_multiple_of(8) && x.address().is_multiple_of(16)
}

impl CudaBackend {
    pub(super) fn pack_rows(&self, host: &HostMatrix<'_>, dtype: DType) -> Result<Tensor> {
        let mut data = tensor(&self.gpu, dtype, host.n, padded(host.k))?;
        self.place(host, data.view_mut().cols_range(0..host.k), None)?;
        Ok(data)
    }

    fn place(&self, host: &HostMatrix<'_>, dst: ViewMut<'_>, half: Option<u8>) -> Result<()> {
        let (dtype, bytes) = host_bytes(host);
        // Interleaved rows go to twice as many.
        let dst = ffi::Matrix { rows: ffi::int(host.n), ..ffi::Matrix::of(&dst.as_view()) };
        upload(&self.gpu, &mut self.staging.lock_now(), Upload { bytes, dtype, half }, dst)
    }

    pub(super) fn pack_matrix(&self, host: &HostMatrix<'_>, dtype: DType) -> Result<Matrix> {
        check::host_matrix("matrix", host);
        Ok(Matrix { data: self.pack_rows(host, dtype)?, n: host.n, k: host.k })
    }

    /// Parts: gate and up dealt by rows, down, then their biases where there are any.
    pub(super) fn pack_mlp(&self, host: &HostMlp<'_>, dtype: DType) -> Result<Mlp> {
        check::pack_mlp(host);
        let (hidden, intermediate) = (host.gate.k, host.gate.n);
        let mut parts = if is_quantized(dtype) {
            let [gate, up, down] = [&host.gate, &host.up, &host.down].map(|matrix| matrix.quantized(dtype));
            vec![
                self.tiles(&packing::pack_dealt(&gate, &up), dtype)?,
                self.tiles(&packing::pack(&down), dtype)?,
            ]
        } else {
            let rows = 2 * intermediate.next_multiple_of(DEAL);
            let mut gate_up = tensor(&self.gpu, dtype, rows, padded(hidden))?;
            self.place(&host.gate, gate_up.view_mut().cols_range(0..hidden), Some(0))?;
            self.place(&host.up, gate_up.view_mut().cols_range(0..hidden), Some(1))?;
            vec![gate_up, self.pack_rows(&host.down, dtype)?]
        };
        if let Some(bias) = &host.bias {
            let mut dealt = vec![0f32; 2 * intermediate.next_multiple_of(DEAL)];
            for (i, (&gate, &up)) in bias.gate.iter().zip(&bias.up).enumerate() {
                let at = i / DEAL * 2 * DEAL + i % DEAL;
                dealt[at] = gate;
                dealt[at + DEAL] = up;
            }
            parts.push(self.vector(&dealt)?);
            parts.push(self.vector(&bias.down)?);
        }
        Ok(Mlp { parts, hidden, intermediate })
    }

    /// A matrix in tiles: bytes in one row.
    fn tiles(&self, bytes: &[u8], dtype: DType) -> Result<Tensor> {
        let mut data = tensor(&self.gpu, dtype, 1, bytes.len())?;
        self.upload_bytes(bytes, data.view_mut())?;
        Ok(data)
    }

    fn vector(&self, values: &[f32]) -> Result<Tensor> {
        let mut data = tensor(&self.gpu, DType::F32, 1, values.len())?;
        self.upload_bytes(bytemuck::cast_slice(values), data.view_mut())?;
        Ok(data)
    }

    pub(super) fn mlp_bytes_of(hidden: usize, intermediate: usize, bias: bool, dtype: DType) -> usize {
        let rows = 2 * intermediate.next_multiple_of(DEAL);
        let matrices = if is_quantized(dtype) {
            packing::bytes(rows, hidden, dtype) + packing::bytes(hidden, intermediate, dtype)
        } else {
            (rows * padded(hidden) + hidden * padded(intermediate)) * dtype.bytes()
        };
        matrices + if bias { (rows + hidden) * DType::F32.bytes() } else { 0 }
    }

    pub(super) fn linear_of(
        &self,
        x: View<'_>,
        w: &Matrix,
        bias: Option<View<'_>>,
        out: ViewMut<'_>,
    ) -> Result<()> {
        check::linear(&x, w, bias.as_ref(), &out);
        let weights =
            Weights::One { matrix: w.data.view().address(), bias: bias.map_or(0, |bias| bias.address()) };
        let shape = Shape { n: w.n, k: w.k, dtype: w.data.dtype() };
        self.multiply(x, weights, shape, Groups::Known { offsets: &[0, x.rows()] }, Batches::ONE, none(), out)
    }

    /// `count` products side by side: columns `b * k..` of `x` (where `x_step` elements apart) with rows `b * w_step..` of `w`.
    pub(super) fn linear_heads(&self, x: View<'_>, w: &Tensor, heads: Heads, out: ViewMut<'_>) -> Result<()> {
        let row = w.cols();
        let matrix = w.view().address() + heads.first_row * row * w.dtype().bytes();
        let batches = Batches { count: heads.count, x: heads.x_step, w: heads.row_step * row, out: heads.n };
        let shape = Shape { n: heads.n, k: heads.k, dtype: w.dtype() };
        let groups = Groups::Known { offsets: &[0, x.rows()] };
        self.multiply(x, Weights::One { matrix, bias: 0 }, shape, groups, batches, none(), out)
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "the one funnel to all kernels; every argument is a named struct"
    )]
    fn multiply(
        &self,
        x: View<'_>,
        weights: Weights,
        shape: Shape,
        groups: Groups<'_>,
        batches: Batches,
        gate: ffi::Gate,
        out: ViewMut<'_>,
    ) -> Result<()> {
        let fast = in_steps(&x)
            && shape.dtype != DType::F32
            && shape.k.is_multiple_of(8)
            && batches.x.is_multiple_of(8);
        assert!(fast || gate.activation == 0, "only the bf16 kernels have a gated activation");
        assert!(
            fast && batches.count == 1 || !shape.quantized(),
            "{:?} weights meet {} columns of {:?}, {} apart, in {} products",
            shape.dtype,
            shape.k,
            x.dtype(),
            x.stride(),
            batches.count
        );
        let all_f32 = x.dtype() == DType::F32 && shape.dtype == DType::F32;
        let meets = match weights {
            Weights::Slots { .. } => Meets::Slots,
            Weights::One { .. } if batches.count > 1 => Meets::Heads,
            Weights::One { .. } => Meets::One { k: shape.k },
        };
        let tile = if shape.quantized() {
            Tile::of_quantized(groups)
        } else if fast {
            let kernels = if self.warpgroups() { self.products } else { ProductKernels::Portable };
            Tile::of_bf16(groups, batches.count, meets, kernels)
        } else if all_f32 && matches!(meets, Meets::One { .. }) && shape.n <= NARROW {
            // By the shape alone: it sums in another order than the general kernel.
            Tile::Narrow
        } else {
            Tile::F32
        };
        let (weight, bias, weights, biases, offsets, known) = match weights {
            Weights::One { matrix, bias } => (matrix, bias, 0, 0, 0, true),
            Weights::Slots { matrices, biases, offsets, known } => (0, 0, matrices, biases, offsets, known),
        };
        // In a step nothing writes weights, and what wrote them was done when it began.
        let ahead = known && self.gpu.open_sequence().is_some();
        let args = ffi::Gemm {
            x: ffi::Matrix::of(&x),
            out: ffi::Matrix::of(&out.as_view()),
            weight,
            bias,
            weights,
            biases,
            offsets,
            x_batch: batches.x as i64,
            w_batch: batches.w as i64,
            out_batch: batches.out as i64,
            slots: ffi::int(groups.slots()),
            batches: ffi::int(batches.count),
            n: ffi::int(shape.n),
            k: ffi::int(shape.k),
            ldw: ffi::int(shape.ldw()),
            w_type: ffi::type_code(shape.dtype),
            row_tile: ffi::int(tile.rows()),
            row_tiles: ffi::int(groups.tiles(tile.rows().max(1))),
            gate,
            ahead: i32::from(ahead),
        };
        match tile {
            Tile::F32 => self.gpu.launch("f32 product", ffi::moeyard_gemm_f32, &args),
            Tile::Narrow => self.gpu.launch("narrow product", ffi::moeyard_gemm_narrow, &args),
            Tile::Bf16(_) => self.gpu.launch("bf16 product", ffi::moeyard_gemm_bf16, &args),
            Tile::Quantized(_) => self.gpu.launch("quantised product", ffi::moeyard_gemm_quantized, &args),
            Tile::Clusters(form, _) => {
                let groups = args.slots.max(args.batches) as usize;
                let mut working = self.grouped.lock_now();
                let working =
                    working.take(&self.gpu, DType::F32, 1, cutlass_sys::working_bytes(groups) / 4)?;
                let working = working.as_view().address();
                let args = ffi::GroupedGemm { product: args, working, form, reserved: 0 };
                self.gpu.launch("grouped product", ffi::moeyard_gemm_grouped, &args)
            }
        }
    }

    pub(super) fn experts_of(&self, args: ExpertsArgs<'_>, out: ViewMut<'_>) -> Result<()> {
        check::experts(&args, &out);
        let table = self.slot_table(args.slots, &[])?;
        let Some(shape) = table.shape else { return Ok(()) };
        let offsets: Vec<i32> = args.offsets.iter().map(|&o| ffi::int(o)).collect();
        let offsets = self.staging.lock_now().push(bytemuck::cast_slice(&offsets))?;
        let groups = Groups::Known { offsets: args.offsets };
        self.gated(args.rows, table.weights(offsets, shape), shape, groups, args.activation, out)
    }

    /// The experts of `rows`, which are grouped by slot, by offsets on the device. Whether there are any experts.
    pub(super) fn experts_on_device(
        &self,
        rows: View<'_>,
        table: &SlotTable,
        groups: Groups<'_>,
        offsets: usize,
        activation: Activation,
        out: ViewMut<'_>,
    ) -> Result<bool> {
        let Some(shape) = table.shape else { return Ok(false) };
        self.gated(rows, table.weights(offsets, shape), shape, groups, activation, out)?;
        Ok(true)
    }

    pub(super) fn mlp_of(
        &self,
        x: View<'_>,
        w: &Mlp,
        activation: Activation,
        out: ViewMut<'_>,
    ) -> Result<()> {
        check::mlp(&x, w, &out);
        let address = |part: usize| w.parts.get(part).map_or(0, |t| t.view().address());
        let weights = |part: usize| Weights::One { matrix: address(part), bias: address(part + 2) };
        let groups = Groups::Known { offsets: &[0, x.rows()] };
        self.gated(x, [weights(0), weights(1)], MlpShape::of(w), groups, activation, out)
    }

    /// Both products and what lies between.
    fn gated(
        &self,
        x: View<'_>,
        [gate_up, mut down]: [Weights; 2],
        shape: MlpShape,
        groups: Groups<'_>,
        activation: Activation,
        out: ViewMut<'_>,
    ) -> Result<()> {
        let rows = x.rows();
        if rows == 0 {
            return Ok(());
        }
        let width = shape.intermediate.next_multiple_of(DEAL);
        let first = Shape { n: 2 * width, k: shape.hidden, dtype: shape.dtype };
        // Padding columns of the product are act(0, 0) = 0 and meet zeros of the padded rows of `down`.
        let second = Shape { n: shape.hidden, k: width, dtype: shape.dtype };
        let mut scratch = self.scratch.lock_now();
        let scratch = &mut *scratch;
        let mut product = scratch.product.take(&self.gpu, x.dtype(), rows, width)?;
        if in_steps(&x) && shape.dtype != DType::F32 && shape.hidden.is_multiple_of(8) {
            self.multiply(x, gate_up, first, groups, Batches::ONE, gate(activation), product.reborrow())?;
            // Its kernels let the next one start when they have seen the offsets.
            if let Weights::Slots { known, .. } = &mut down {
                *known = true;
            }
        } else {
            let mut between = scratch.gate_up.take(&self.gpu, DType::F32, rows, 2 * width)?;
            self.multiply(x, gate_up, first, groups, Batches::ONE, none(), between.reborrow())?;
            let args = ffi::GateRows {
                input: ffi::Matrix::of(&between.as_view()),
                out: ffi::Matrix::of(&product.as_view()),
                gate: gate(activation),
                reserved: 0,
            };
            self.gpu.launch("gated activation", ffi::moeyard_gate, &args)?;
        }
        self.multiply(product.as_view(), down, second, groups, Batches::ONE, none(), out)
    }

    /// What kernels need to know of a layer's slots: the addresses of their parts, an array over slots for each of four, then numbers
    /// that say where experts are. It is uploaded again only when an expert has moved.
    pub(super) fn slot_table(&self, slots: &[Option<Mlp>], numbers: &[&[u32]]) -> Result<SlotTable> {
        let shape = slots.iter().flatten().next().map(MlpShape::of);
        let addresses = SlotTable::PARTS * slots.len();
        let count: usize = numbers.iter().map(|numbers| numbers.len()).sum();
        let mut words = vec![0usize; addresses + (count * size_of::<u32>()).div_ceil(size_of::<usize>())];
        for (s, slot) in slots.iter().enumerate() {
            let Some(w) = slot else { continue };
            let own = MlpShape::of(w);
            assert!(Some(own) == shape, "slot {s}: an expert of another shape than {shape:?}: {own:?}");
            for (p, part) in w.parts.iter().enumerate() {
                words[p * slots.len() + s] = part.view().address();
            }
        }
        let mut rest: &mut [u32] = bytemuck::cast_slice_mut(&mut words[addresses..]);
        for numbers in numbers {
            let (place, others) = rest.split_at_mut(numbers.len());
            place.copy_from_slice(numbers);
            rest = others;
        }
        let mut tables = self.slot_tables.lock_now();
        let table = tables.entry(slots.as_ptr() as usize).or_default();
        let address = table.put(&self.gpu, &mut self.staging.lock_now(), bytemuck::cast_slice(&words))?;
        Ok(SlotTable { address, slots: slots.len(), shape })
    }
}

/// A layer's slots in device memory; see [`CudaBackend::slot_table`].
pub struct SlotTable {
    address: usize,
    slots: usize,
    /// `None` where all slots are empty.
    shape: Option<MlpShape>,
}

impl SlotTable {
    const PARTS: usize = 4;

    /// Address of the numbers.
    pub fn numbers(&self) -> usize {
        self.address + SlotTable::PARTS * self.slots * size_of::<usize>()
    }

    /// Both matrices, of rows at `offsets` on the device.
    fn weights(&self, offsets: usize, shape: MlpShape) -> [Weights; 2] {
        let array = |part: usize| self.address + part * self.slots * size_of::<usize>();
        [0, 1].map(|part| Weights::Slots {
            matrices: array(part),
            biases: if shape.bias { array(part + 2) } else { 0 },
            offsets,
            known: false,
        })
    }
}

/// What all experts of a layer have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct MlpShape {
    hidden: usize,
    intermediate: usize,
    dtype: DType,
    bias: bool,
}

impl MlpShape {
    fn of(w: &Mlp) -> MlpShape {
        MlpShape {
            hidden: w.hidden,
            intermediate: w.intermediate,
            dtype: w.parts[0].dtype(),
            bias: w.parts.len() > 2,
        }
    }
}

/// Products of [`CudaBackend::linear_heads`]: head h multiplies `k` columns of x from `h * x_step` with `n` rows of w from
/// `first_row + h * row_step`, into `n` columns of the output from `h * n`.
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    pub count: usize,
    pub n: usize,
    pub k: usize,
    pub x_step: usize,
    pub first_row: usize,
    pub row_step: usize,
}
