//! A GPU under measurement: how operations are timed, and what a line of the table says.

use std::sync::Arc;
use std::time::Instant;

use half::bf16;
use moeyard::backend::{Backend, DType, Tensor};

use crate::numbers::Numbers;

pub struct Bench {
    pub gpu: Arc<dyn Backend>,
    /// The same GPU with other kernels for products.
    pub others: Vec<(String, Arc<dyn Backend>)>,
    pub numbers: Numbers,
}

/// Limits of this card.
#[derive(Clone, Copy)]
pub struct Limits {
    /// Bytes read and written by a large copy, per second.
    pub bandwidth: f64,
}

impl Bench {
    /// Seconds per call.
    pub fn time(&self, call: impl FnMut(&dyn Backend)) -> f64 {
        self.time_on(self.gpu.as_ref(), call)
    }

    pub fn time_on(&self, gpu: &dyn Backend, mut call: impl FnMut(&dyn Backend)) -> f64 {
        let probe = gpu.alloc(DType::F32, 1, 1).unwrap();
        let wait = || gpu.download(probe.view(), &mut [0; 4]).unwrap();
        call(gpu);
        wait();
        let start = Instant::now();
        call(gpu);
        wait();
        let once = start.elapsed().as_secs_f64();
        let calls = ((0.15 / once) as usize).clamp(3, 2000);
        let mut best = f64::INFINITY;
        for _ in 0..3 {
            let start = Instant::now();
            for _ in 0..calls {
                call(gpu);
            }
            wait();
            best = best.min(start.elapsed().as_secs_f64() / calls as f64);
        }
        best
    }

    /// Seconds per call when `calls` in a row are one step.
    pub fn time_in_steps(&self, gpu: &dyn Backend, calls: usize, mut call: impl FnMut(&dyn Backend)) -> f64 {
        let step = |gpu: &dyn Backend| {
            let mut body = || {
                (0..calls).for_each(|_| call(gpu));
                Ok(())
            };
            gpu.step(&mut body).unwrap();
        };
        self.time_on(gpu, step) / calls as f64
    }

    /// Seconds per call outside of steps, and in steps of `calls`.
    pub fn alone_and_in_steps(&self, calls: usize, mut call: impl FnMut(&dyn Backend)) -> [f64; 2] {
        [self.time(&mut call), self.time_in_steps(self.gpu.as_ref(), calls, call)]
    }

    pub fn line(&self, name: &str, seconds: f64, flops: f64, bytes: f64, limits: Option<Limits>) {
        let share =
            limits.map_or(String::new(), |l| format!("{:.0} %", 100.0 * bytes / seconds / l.bandwidth));
        println!(
            "{name:<46} {:>10.1} {:>10.1} {:>10.0} {share:>9}",
            seconds * 1e6,
            flops / seconds / 1e12,
            bytes / seconds / 1e9
        );
    }

    /// A line of the usual kernels, and one for each of the first `others`.
    pub fn lines(
        &self,
        limits: Limits,
        name: &str,
        kernels: usize,
        flops: f64,
        bytes: f64,
        mut call: impl FnMut(&dyn Backend),
    ) {
        self.line(name, self.time(&mut call), flops, bytes, Some(limits));
        for (kernel, gpu) in self.others.iter().take(kernels) {
            let seconds = self.time_on(gpu.as_ref(), &mut call);
            self.line(&format!("  by {kernel}"), seconds, flops, bytes, Some(limits));
        }
    }

    /// A line for each kernel when `calls` in a row are one step, known again: what the host does for each call does not count.
    pub fn lines_of_steps(
        &self,
        limits: Limits,
        calls: usize,
        flops: f64,
        bytes: f64,
        mut call: impl FnMut(&dyn Backend),
    ) {
        let usual = ("usual".to_owned(), self.gpu.clone());
        for (kernel, gpu) in std::iter::once(&usual).chain(self.others.iter()) {
            let seconds = self.time_in_steps(gpu.as_ref(), calls, &mut call);
            self.line(&format!("  in a step, by {kernel}"), seconds, flops, bytes, Some(limits));
        }
    }

    pub fn random(&mut self, rows: usize, cols: usize) -> Tensor {
        // A period that is prime to everything keeps rows different; generating gigabytes would take longer than the benchmark.
        let period: Vec<bf16> = (0..65_537).map(|_| bf16::from_f32(self.numbers.unit() * 0.05)).collect();
        let bytes: Vec<u8> = period.iter().cycle().take(rows * cols).flat_map(|x| x.to_le_bytes()).collect();
        let mut tensor = self.gpu.alloc(DType::Bf16, rows, cols).unwrap();
        self.gpu.upload(&bytes, tensor.view_mut()).unwrap();
        tensor
    }

    pub fn twin(&self, of: &Tensor) -> Tensor {
        let mut tensor = self.gpu.alloc(of.dtype(), of.rows(), of.cols()).unwrap();
        self.gpu.copy_rows(of.view(), tensor.view_mut()).unwrap();
        tensor
    }

    pub fn copy(&mut self) -> Limits {
        let src = self.random(1 << 15, 1 << 14);
        let mut dst = self.gpu.alloc(DType::Bf16, 1 << 15, 1 << 14).unwrap();
        let seconds = self.time(|gpu| gpu.copy_rows(src.view(), dst.view_mut()).unwrap());
        let bytes = 2.0 * src.bytes() as f64;
        self.line("copy of 1 GiB (read and written)", seconds, 0.0, bytes, None);
        Limits { bandwidth: bytes / seconds }
    }
}
