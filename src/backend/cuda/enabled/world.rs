//! A rank's part in a layer of several ranks, worked out on its GPU.

use super::ffi;
use super::moe::MAX_PLANNED_SLOTS;
use super::tiles::Groups;
use super::{CudaBackend, Lock as _};
use crate::backend::{DType, ReturnedArgs, ViewMut, WorldArgs, WorldPlan, check};
use crate::error::Result;

impl WorldPlan for CudaBackend {
    fn world_experts(&self, args: WorldArgs<'_>) -> Result<()> {
        check::world_experts(&args);
        let WorldArgs { shape, counts, x, ids, replicas, slots, .. } = args;
        let WorldArgs { activation, grouped, mut computed, returned, offsets, index, .. } = args;
        let experts = replicas.starts.len() - 1;
        for (counted, what) in [(experts, "experts of a layer"), (slots.len(), "slots of a layer on one GPU")]
        {
            if counted > MAX_PLANNED_SLOTS {
                return Err(self.gpu.failure(format!("{counted} {what}, at most {MAX_PLANNED_SLOTS}")));
            }
        }
        let table = self.slot_table(slots, &[replicas.starts, replicas.slots])?;
        let counts = self.array(bytemuck::cast_slice(counts), |residents| &mut residents.world_rows)?;
        let mut plan = self.plan.lock_now();
        let homes = plan.take(&self.gpu, DType::I32, 1, shape.capacity())?.as_view().address();
        let offsets = offsets.as_view().address();
        let args = ffi::World {
            ids: ffi::Matrix::of(&ids),
            x: ffi::Matrix::of(&x),
            grouped: ffi::Matrix::of(&grouped.as_view()),
            counts,
            starts: table.numbers(),
            replicas: table.numbers() + size_of_val(replicas.starts),
            offsets,
            homes,
            index: index.as_view().address(),
            experts: ffi::int(experts),
            slots: ffi::int(slots.len()),
            rows: ffi::int(shape.rows),
            rank: ffi::int(shape.rank),
            expert_tp: ffi::int(shape.expert_tp),
            reserved: 0,
        };
        self.gpu.launch("plan of a world", ffi::moeyard_world, &args)?;

        // Of ranks and experts that are evenly loaded, whatever the placement.
        let ranks = shape.world / shape.expert_tp;
        let (expected, busy) = (shape.choices().div_ceil(ranks), experts.div_ceil(ranks));
        let groups = Groups::OnDevice {
            rows: shape.capacity(),
            experts: slots.len(),
            slots: slots.len(),
            mean: expected.div_ceil(expected.min(busy)),
        };
        if !self.experts_on_device(
            grouped.as_view(),
            &table,
            groups,
            offsets,
            activation,
            computed.reborrow(),
        )? {
            return Ok(());
        }
        let args = ffi::Return {
            computed: ffi::Matrix::of(&computed.as_view()),
            returned: ffi::Matrix::of(&returned.as_view()),
            offsets,
            homes,
            slots: ffi::int(slots.len()),
            reserved: 0,
        };
        self.gpu.launch("rows that go home", ffi::moeyard_return, &args)
    }

    fn combine_returned(&self, args: ReturnedArgs<'_>, out: ViewMut<'_>) -> Result<()> {
        check::combine_returned(&args, &out);
        self.combine_by(args.rows, args.index.address(), args.weights, args.parts, out)
    }
}
