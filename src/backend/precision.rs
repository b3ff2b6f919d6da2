//! In which types a run computes.

use super::DType;
use crate::spec::{Router, Score};

/// Types of weights and of what is multiplied with them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Precision {
    /// Type of weight matrices, the experts' apart.
    pub weights: DType,
    /// Type of activations, of the KV cache and of rows that travel.
    pub activations: DType,
    /// Type of the matrices of routed and shared experts: that of the others, or I8, F8 or I4x2.
    pub experts: DType,
}

impl Precision {
    /// Everything in f32.
    pub const F32: Precision = Precision::plain(DType::F32, DType::F32);
    /// Everything in bf16, sums apart.
    pub const BF16: Precision = Precision::plain(DType::Bf16, DType::Bf16);
    /// Weights in bf16, activations in f32.
    pub const MIXED: Precision = Precision::plain(DType::Bf16, DType::F32);
    /// What every backend multiplies; some can have quantised experts besides.
    pub const ALL: [Precision; 3] = [Precision::F32, Precision::BF16, Precision::MIXED];

    /// All weights of one type.
    const fn plain(weights: DType, activations: DType) -> Precision {
        Precision { weights, activations, experts: weights }
    }

    /// The same with the weights of experts in another type.
    pub const fn with_experts(self, experts: DType) -> Precision {
        Precision { experts, ..self }
    }

    /// What `--dtype dtype` means for a model with this router.
    ///
    /// Bf16 keeps the activations of a sparse mixer in f32. That router weighs an expert by a softmax over the logits within a
    /// given share of the best one (2 % in Phi-3.5): where a logit crosses this border, a weight jumps between 1 and 1/2.
    /// Activations rounded to bf16 shift logits far enough to cross it now and then, and an expert's output is then off by a factor
    /// of two; the weights of other routers move smoothly. Weight matrices stay bf16, as they are published.
    ///
    /// # Panics
    /// When `dtype` is no floating point type.
    pub fn of(dtype: DType, router: &Router) -> Precision {
        match (dtype, router.score) {
            (DType::F32, _) => Precision::F32,
            (DType::Bf16, Score::SparseMixer { .. }) => Precision::MIXED,
            (DType::Bf16, Score::Softmax | Score::Sigmoid | Score::SoftmaxOverChosen) => Precision::BF16,
            (DType::I32 | DType::I8 | DType::F8 | DType::I4x2, _) => panic!("models compute in F32 or Bf16"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::Renormalize;

    #[test]
    fn only_a_sparse_mixer_needs_f32_activations() {
        let router = |score| Router {
            score,
            logit_bias: false,
            choice_bias: false,
            groups: None,
            renormalize: Renormalize::Off,
            scale: 1.0,
        };
        let jumps = router(Score::SparseMixer { epsilon: 0.01 });
        assert_eq!(Precision::of(DType::Bf16, &jumps), Precision::MIXED);
        assert_eq!(Precision::of(DType::F32, &jumps), Precision::F32);
        for score in [Score::Softmax, Score::Sigmoid, Score::SoftmaxOverChosen] {
            assert_eq!(Precision::of(DType::Bf16, &router(score)), Precision::BF16);
            assert_eq!(Precision::of(DType::F32, &router(score)), Precision::F32);
        }
    }
}
