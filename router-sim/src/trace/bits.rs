//! Expert ids packed to the bits they need, lowest bit first.

/// Ids that are packed together: 8 of `width` bits are `width` whole bytes, at most 16.
const GROUP: usize = 8;

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
    let wrong = ids.iter().find(|id| **id as usize >= experts);
    assert!(wrong.is_none(), "expert {wrong:?} of {experts}");
    let width = width(experts);
    let start = out.len();
    out.resize(start + packed_len(ids.len(), width), 0);
    for (group, bytes) in ids.chunks(GROUP).zip(out[start..].chunks_mut(width as usize)) {
        let bits = group.iter().rev().fold(0u128, |bits, id| (bits << width) | u128::from(*id));
        bytes.copy_from_slice(&bits.to_le_bytes()[..bytes.len()]);
    }
}

/// The `n` ids in `bytes`, which are [`packed_len`] long; the offending id when one is not below `experts`.
pub fn unpack(bytes: &[u8], n: usize, experts: usize) -> Result<Vec<u16>, u16> {
    let width = width(experts);
    let mut ids = Vec::with_capacity(n);
    for bytes in bytes.chunks(width as usize) {
        let mut word = [0; 16];
        word[..bytes.len()].copy_from_slice(bytes);
        let bits = u128::from_le_bytes(word);
        let group = GROUP.min(n - ids.len()) as u32;
        ids.extend((0..group).map(|i| (bits >> (i * width)) as u16 & (u16::MAX >> (16 - width))));
    }
    match ids.iter().find(|id| usize::from(**id) >= experts) {
        Some(id) => Err(*id),
        None => Ok(ids),
    }
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
