//! Linear layers: by every kernel there is for their products, and the router's own.

use moeyard::backend::{Backend, DType, Matrix};

use crate::bench::{Bench, Limits};

impl Bench {
    pub fn linear(&mut self, limits: Limits, rows: usize, n: usize, k: usize) {
        // Several matrices in turn, so that none stays in the cache.
        let first = self.random(n, k);
        let copies = (400_000_000 / first.bytes()).clamp(1, 16);
        let mut matrices: Vec<Matrix> =
            (1..copies).map(|_| Matrix { data: self.twin(&first), n, k }).collect();
        matrices.push(Matrix { data: first, n, k });
        let x = self.random(rows, k);
        let mut out = self.gpu.alloc(DType::Bf16, rows, n).unwrap();
        let mut turn = 0;
        let bytes = 2.0 * (n * k + rows * (n + k)) as f64;
        let name = format!("linear {rows} x {n} x {k}");
        let flops = 2.0 * (rows * n * k) as f64;
        let kernels = self.others.len();
        let mut call = |gpu: &dyn Backend| {
            turn += 1;
            gpu.linear(x.view(), &matrices[turn % copies], None, out.view_mut()).unwrap();
        };
        self.lines(limits, &name, kernels, flops, bytes, &mut call);
        if rows <= 64 {
            self.lines_of_steps(limits, 64usize.next_multiple_of(copies), flops, bytes, &mut call);
        }
    }

    /// The router's own product, in f32.
    pub fn router_product(&mut self, limits: Limits, rows: usize, experts: usize, hidden: usize) {
        let mut f32s = |rows: usize, cols: usize| {
            let bytes: Vec<u8> = (0..rows * cols).flat_map(|_| self.numbers.unit().to_le_bytes()).collect();
            let mut tensor = self.gpu.alloc(DType::F32, rows, cols).unwrap();
            self.gpu.upload(&bytes, tensor.view_mut()).unwrap();
            tensor
        };
        let x = f32s(rows, hidden);
        let w = Matrix { data: f32s(experts, hidden), n: experts, k: hidden };
        let mut out = self.gpu.alloc(DType::F32, rows, experts).unwrap();
        let seconds = self.time(|gpu| gpu.linear(x.view(), &w, None, out.view_mut()).unwrap());
        let bytes = 4.0 * (experts * hidden + rows * (hidden + experts)) as f64;
        let name = format!("router product {rows} x {experts} x {hidden}");
        self.line(&name, seconds, 2.0 * (rows * experts * hidden) as f64, bytes, Some(limits));
    }
}
