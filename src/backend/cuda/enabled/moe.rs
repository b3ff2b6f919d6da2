//! Router and combine.

use super::ffi;
use super::tiles::Groups;
use super::{CudaBackend, Lock as _};
use crate::backend::{CombineArgs, DType, PlannedArgs, View, ViewMut, check};
use crate::error::Result;
use crate::spec::{GroupScore, Renormalize, Router, Score};

/// Most slots, or experts, that a plan counts in shared memory.
pub(super) const MAX_PLANNED_SLOTS: usize = 2048;

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
        self.combine_by(args.rows, index, args.weights, args.parts, out)
    }

    /// Sums rows by an index on the device.
    pub(super) fn combine_by(
        &self,
        rows: View<'_>,
        index: usize,
        weights: View<'_>,
        parts: usize,
        out: ViewMut<'_>,
    ) -> Result<()> {
        let args = ffi::Combine {
            rows: ffi::Matrix::of(&rows),
            weights: ffi::Matrix::of(&weights),
            out: ffi::Matrix::of(&out.as_view()),
            index,
            parts: ffi::int(parts),
            reserved: 0,
        };
        self.gpu.launch("combine", ffi::moeyard_combine, &args)
    }

    pub(super) fn planned(&self, args: PlannedArgs<'_>, out: ViewMut<'_>) -> Result<()> {
        check::planned_experts(&args, &out);
        let (choices, slots) = (args.ids.rows() * args.ids.cols(), args.slots.len());
        if slots > MAX_PLANNED_SLOTS {
            let why = format!("{slots} slots of a layer on one GPU, at most {MAX_PLANNED_SLOTS}");
            return Err(self.gpu.failure(why));
        }
        if choices == 0 {
            return Ok(());
        }
        let table = self.slot_table(args.slots, &[args.slot_of])?;
        // Offsets, tokens, rows, and the counts of blocks where there are several.
        let blocks = choices.div_ceil(ffi::PLAN_CHUNK);
        let parts = [slots + 1, choices, choices, if blocks > 1 { blocks * slots } else { 0 }];
        let mut plan = self.plan.lock_now();
        let plan = plan.take(&self.gpu, DType::I32, 1, parts.iter().sum())?;
        let mut end = plan.as_view().address();
        let [offsets, tokens, rows, counts] = parts.map(|n| {
            end += n * DType::I32.bytes();
            end - n * DType::I32.bytes()
        });
        let plan = ffi::Plan {
            ids: ffi::Matrix::of(&args.ids),
            x: ffi::Matrix::of(&args.x),
            grouped: ffi::Matrix::of(&args.grouped.as_view()),
            slot_of: table.numbers(),
            offsets,
            tokens,
            rows,
            counts,
            slots: ffi::int(slots),
            reserved: 0,
        };
        self.gpu.launch("plan", ffi::moeyard_plan, &plan)?;
        let PlannedArgs { grouped, mut computed, .. } = args;
        let groups = Groups::on_device(choices, args.slot_of.len(), slots);
        let output = computed.reborrow();
        self.experts_on_device(grouped.as_view(), &table, groups, offsets, args.activation, output)?;
        self.combine_by(computed.as_view(), rows, args.weights, 1, out)
    }
}
