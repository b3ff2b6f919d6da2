//! Expert ids packed to the bits they need, lowest bit first.

use std::iter;

/// Bits of one id: ceil(log2 `experts`), at least 1 so that every id takes space.
pub fn width(experts: usize) -> u32 {
    experts.saturating_sub(1).checked_ilog2().map_or(1, |top| top + 1)
}

/// Bytes that `n` ids of `width` bits take.
pub fn packed_len(n: usize, width: u32) -> usize {
    (n * width as usize).div_ceil(8)
}

/// Appends `ids`, each below `experts`.
///
/// # Panics
/// On an id that is not: the router chose an expert that does not exist.
pub fn pack(out: &mut Vec<u8>, ids: &[u32], experts: usize) {
    let width = width(experts);
    let (mut pending, mut filled) = (0u64, 0);
    for &id in ids {
        assert!((id as usize) < experts, "expert {id} of {experts}");
        pending |= u64::from(id) << filled;
        filled += width;
        if filled >= 32 {
            out.extend_from_slice(&(pending as u32).to_le_bytes());
            pending >>= 32;
            filled -= 32;
        }
    }
    let rest = filled.div_ceil(8) as usize;
    out.extend_from_slice(&pending.to_le_bytes()[..rest]);
}

/// The `n` ids in `bytes`, which are [`packed_len`] long; the offending id when one is not below `experts`.
pub fn unpack(bytes: &[u8], n: usize, experts: usize) -> Result<Vec<u16>, u64> {
    let width = width(experts);
    let (mut pending, mut filled) = (0u64, 0);
    let mut bytes = bytes.iter();
    let next = || {
        while filled < width {
            pending |= u64::from(*bytes.next().expect("packed_len bytes")) << filled;
            filled += 8;
        }
        let id = pending & ((1 << width) - 1);
        pending >>= width;
        filled -= width;
        if id < experts as u64 { Ok(id as u16) } else { Err(id) }
    };
    iter::repeat_with(next).take(n).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn widths() {
        let pairs = [(1, 1), (2, 1), (3, 2), (8, 3), (9, 4), (256, 8), (257, 9), (65536, 16)];
        for (experts, bits) in pairs {
            assert_eq!(width(experts), bits, "{experts} experts");
        }
    }

    #[test]
    fn lowest_bit_first() {
        let mut out = Vec::new();
        pack(&mut out, &[1, 2, 7, 5], 8);
        assert_eq!(out, [0b1101_0001, 0b1011]);
        assert_eq!(unpack(&out, 4, 8), Ok(vec![1, 2, 7, 5]));
        assert_eq!(unpack(&out, 4, 6), Err(7));
    }

    proptest! {
        #[test]
        fn round_trip(experts in 1usize..=65536, seeds in prop::collection::vec(any::<u32>(), 0..200)) {
            let ids: Vec<u32> = seeds.iter().map(|s| s % experts as u32).collect();
            let mut out = Vec::new();
            pack(&mut out, &ids, experts);
            prop_assert_eq!(out.len(), packed_len(ids.len(), width(experts)));
            let back: Vec<u32> = unpack(&out, ids.len(), experts).unwrap().into_iter().map(u32::from).collect();
            prop_assert_eq!(back, ids);
        }
    }
}
