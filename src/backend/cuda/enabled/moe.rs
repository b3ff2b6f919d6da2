//! Router and combine.

use super::ffi;
use super::{CudaBackend, Lock as _};
use crate::backend::{CombineArgs, View, ViewMut, check};
use crate::error::Result;
use crate::spec::{GroupScore, Renormalize, Router, Score};

impl CudaBackend {
    pub(super) fn choose(
        &self,
        logits: View<'_>,
        bias: Option<View<'_>>,
        router: &Router,
        ids: ViewMut<'_>,
        weights: ViewMut<'_>,
    ) -> Result<()> {
        check::route(&logits, bias.as_ref(), router, &ids, &weights);
        let (score, epsilon) = match router.score {
            Score::Softmax => (0, 0.0),
            Score::Sigmoid => (1, 0.0),
            Score::SoftmaxOverChosen => (2, 0.0),
            Score::SparseMixer { epsilon } => (3, epsilon),
        };
        let (group_score, groups, keep) = match router.groups {
            None => (0, 0, 0),
            Some(g) => {
                let score = if g.score == GroupScore::Max { 1 } else { 2 };
                (score, ffi::int(g.count), ffi::int(g.keep))
            }
        };
        let (renormalize, renormalize_eps) = match router.renormalize {
            Renormalize::Off => (0, 0.0),
            Renormalize::Sum { eps } => (1, eps),
        };
        let args = ffi::Route {
            logits: ffi::Matrix::of(&logits),
            ids: ffi::Matrix::of(&ids.as_view()),
            weights: ffi::Matrix::of(&weights.as_view()),
            bias: bias.map_or(0, |b| b.address()),
            score,
            group_score,
            groups,
            keep,
            renormalize,
            renormalize_eps,
            scale: router.scale,
            epsilon,
        };
        self.gpu.launch("router", ffi::moeyard_route, &args)
    }

    pub(super) fn combine_rows(&self, args: CombineArgs<'_>, out: ViewMut<'_>) -> Result<()> {
        check::combine(&args, &out);
        let index = self.staging.lock_now().push(bytemuck::cast_slice(args.index))?;
        let args = ffi::Combine {
            rows: ffi::Matrix::of(&args.rows),
            weights: ffi::Matrix::of(&args.weights),
            out: ffi::Matrix::of(&out.as_view()),
            index,
            parts: ffi::int(args.parts),
        };
        self.gpu.launch("combine", ffi::moeyard_combine, &args)
    }
}
