//! Choosing tokens.

use moeyard::backend::DType;
use moeyard::backend::draw::Draw;

use crate::bench::{Bench, Limits};

impl Bench {
    /// Rows of logits near a bell curve of deviation 3, as a model's are; drawn in the usual ways. Bytes are those of one read.
    pub fn sampling(&mut self, limits: Limits, rows: usize, vocab: usize) {
        let period: Vec<f32> = (0..65_537).map(|_| self.numbers.normal() * 3.0).collect();
        let bytes: Vec<u8> = period.iter().cycle().take(rows * vocab).flat_map(|x| x.to_le_bytes()).collect();
        let mut x = self.gpu.alloc(DType::F32, rows, vocab).unwrap();
        self.gpu.upload(&bytes, x.view_mut()).unwrap();
        let mut out = self.gpu.alloc(DType::I32, rows, 2).unwrap();
        let warm = Draw { random: 1 << 63, temperature: 0.8, ..Draw::GREEDY };
        for (how, draw) in [
            ("greedy", Draw::GREEDY),
            ("temperature", warm),
            ("top_p", Draw { top_p: 0.95, ..warm }),
            ("top_k 50, top_p", Draw { top_k: 50, top_p: 0.95, ..warm }),
        ] {
            let draws = vec![draw; rows];
            let seconds = self.time(|gpu| gpu.sample(x.view(), &draws, out.view_mut()).unwrap());
            self.line(&format!("{rows} of {vocab}, {how}"), seconds, 0.0, x.bytes() as f64, Some(limits));
        }
    }
}
