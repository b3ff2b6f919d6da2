//! Which kernel computes a product, and in what tiles.

use super::ffi;
use crate::backend::cuda::ProductKernels;

/// The slots' share of the rows.
#[derive(Clone, Copy)]
pub enum Groups<'a> {
    /// As the host planned it: rows `offsets[s]..offsets[s + 1]` are slot s's.
    Known { offsets: &'a [usize] },
    /// As only the device knows it: at most `rows`, of `experts` in `slots`, and about `mean` of each that has any.
    OnDevice { rows: usize, experts: usize, slots: usize, mean: usize },
}

impl Groups<'_> {
    pub fn slots(self) -> usize {
        match self {
            Groups::Known { offsets } => offsets.len() - 1,
            Groups::OnDevice { slots, .. } => slots,
        }
    }

    /// Rows of a slot that has any, on average; if it is not known which have, of one that could have.
    fn mean(self) -> usize {
        match self {
            Groups::Known { offsets } => {
                let busy = offsets.windows(2).filter(|w| w[0] < w[1]).count();
                offsets[offsets.len() - 1].div_ceil(busy.max(1))
            }
            Groups::OnDevice { mean, .. } => mean,
        }
    }

    /// Rows of which each chose one of `experts`, none of them known.
    pub fn on_device(rows: usize, experts: usize, slots: usize) -> Groups<'static> {
        Groups::OnDevice { rows, experts, slots, mean: rows.div_ceil(rows.min(experts).max(1)) }
    }

    /// Tiles of `size` rows; at least as many as there turn out to be.
    pub fn tiles(self, size: usize) -> usize {
        match self {
            Groups::Known { offsets } => offsets.windows(2).map(|w| (w[1] - w[0]).div_ceil(size)).sum(),
            Groups::OnDevice { rows, experts, .. } => rows / size + rows.min(experts),
        }
    }
}

/// What the rows of a product are multiplied with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Meets {
    /// One matrix, of this many columns.
    One { k: usize },
    /// Several that lie side by side.
    Heads,
    /// One for each slot.
    Slots,
}

/// Most rows of a thin tile of clusters.
const THIN_ROWS: usize = 64;

/// A kernel and its tile. All bf16 kernels and tiles give the same bits, so the choice is one of speed alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tile {
    F32,
    /// Few outputs in f32: routers and gates.
    Narrow,
    Bf16(usize),
    /// Codes that become bf16 on the way.
    Quantized(usize),
    /// With 0, the device chooses.
    Clusters(ffi::ClusterForm, usize),
}

impl Tile {
    /// For rows that are bf16 and lie well. The bounds are where one kernel overtakes another on an H200 (benches/RESULTS.md).
    pub fn of_bf16(groups: Groups<'_>, batches: usize, meets: Meets, kernels: ProductKernels) -> Tile {
        use ffi::ClusterForm::{Thin, Wide};
        let mean = groups.mean();
        let fit = batches * groups.slots() <= cutlass_sys::MOST_GROUPS;
        let thin = Tile::Clusters(Thin, THIN_ROWS);
        match (kernels, meets) {
            (ProductKernels::Portable, _) => Tile::bf16(mean),
            (ProductKernels::Best, _) if mean > THIN_ROWS && fit => Tile::Clusters(Wide, 0),
            (ProductKernels::Clusters { rows }, _) if mean > THIN_ROWS && fit => Tile::Clusters(Wide, rows),
            _ if mean > THIN_ROWS => Tile::bf16(mean),
            // What starts a cluster is paid for by long rows of weights, or by rows that two blocks share.
            (ProductKernels::Best, Meets::One { k }) if mean > 32 || k >= 8192 => thin,
            (ProductKernels::Clusters { .. }, Meets::One { .. }) => thin,
            (_, Meets::Slots) if mean > 8 && fit => thin,
            _ => Tile::bf16(mean),
        }
    }

    /// For weights in 8 or 4 bits.
    pub fn of_quantized(groups: Groups<'_>) -> Tile {
        Tile::Quantized(Tile::portable_rows(groups.mean()))
    }

    fn bf16(mean: usize) -> Tile {
        Tile::Bf16(Tile::portable_rows(mean))
    }

    /// Rows of a tile of the kernels that run on every GPU.
    fn portable_rows(mean: usize) -> usize {
        mean.next_power_of_two().clamp(8, 128)
    }

    pub fn rows(self) -> usize {
        match self {
            Tile::F32 | Tile::Narrow => 64,
            Tile::Bf16(rows) | Tile::Quantized(rows) => rows,
            Tile::Clusters(_, rows) => rows,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_follow_the_mean_load() {
        use ProductKernels::{Best, Portable};
        use ffi::ClusterForm::{Thin, Wide};
        let clusters = ProductKernels::Clusters { rows: 192 };
        let (thin, wide) = (Tile::Clusters(Thin, 64), Tile::Clusters(Wide, 0));
        let (one, long) = (Meets::One { k: 4096 }, Meets::One { k: 8192 });
        for (offsets, batches, meets, kernels, expected) in [
            (&[0usize, 0] as &[usize], 1, Meets::Slots, Best, Tile::Bf16(8)),
            (&[0, 1, 1, 2], 1, Meets::Slots, clusters, Tile::Bf16(8)),
            (&[0, 8, 16], 1, Meets::Slots, Best, Tile::Bf16(8)),
            (&[0, 8, 17], 1, Meets::Slots, Best, thin),
            (&[0, 64, 64], 1, Meets::Slots, clusters, thin),
            (&[0, 64, 64], 1, Meets::Slots, Portable, Tile::Bf16(64)),
            (&[0, 32], 1, one, Best, Tile::Bf16(32)),
            (&[0, 33], 1, one, Best, thin),
            (&[0, 1], 1, long, Best, thin),
            (&[0, 1], 1, one, clusters, thin),
            (&[0, 64], 2, Meets::Heads, clusters, Tile::Bf16(64)),
            (&[0, 65], 1, one, Best, wide),
            (&[0, 65], 1, one, clusters, Tile::Clusters(Wide, 192)),
            (&[0, 65], 1024, Meets::Heads, Best, wide),
            (&[0, 65], 1025, Meets::Heads, Best, Tile::Bf16(128)),
            (&[0, 65], 1, one, Portable, Tile::Bf16(128)),
            (&[0, 8192, 8192], 1, Meets::Slots, Best, wide),
        ] {
            let found = Tile::of_bf16(Groups::Known { offsets }, batches, meets, kernels);
            assert_eq!(found, expected, "{offsets:?} {batches} {meets:?} {kernels:?}");
        }
    }

    #[test]
    fn tiles_of_codes_follow_the_mean_load_too() {
        for (offsets, rows) in
            [(&[0usize, 0] as &[usize], 8), (&[0, 9, 9, 18], 16), (&[0, 65], 128), (&[0, 5000], 128)]
        {
            assert_eq!(Tile::of_quantized(Groups::Known { offsets }), Tile::Quantized(rows), "{offsets:?}");
        }
    }

    /// Whatever the router chooses: the tile does not depend on it, and the grid has room for it.
    #[test]
    fn rows_that_only_the_device_knows_have_room() {
        let mean = |rows, experts, slots| Groups::on_device(rows, experts, slots).mean();
        assert_eq!((mean(2, 8, 8), mean(128, 8, 10), mean(9, 8, 8)), (1, 16, 2));
        for offsets in [[0, 1, 2, 3], [0, 0, 0, 3], [0, 64, 65, 129], [0, 1, 200, 201], [0, 65, 130, 195]] {
            let known = Groups::Known { offsets: &offsets };
            let hidden = Groups::on_device(offsets[3], 3, 3);
            for size in [8, 64, 128] {
                assert!(known.tiles(size) <= hidden.tiles(size), "{offsets:?} in tiles of {size}");
            }
        }
    }
}
