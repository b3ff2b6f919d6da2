//! What a change of placement costs: the expert weights that some rank must receive.

use super::{EMPTY, LayerPlacement, Placement};

/// An expert's weights go into a slot of a rank that does not hold that expert yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transfer {
    /// MoE layer, counted from 0.
    pub layer: usize,
    /// The slot that receives.
    pub slot: usize,
    /// Whose weights.
    pub expert: usize,
}

/// The transfers between two placements of the same layers, experts, ranks and slots, in the order of layers and slots. A
/// rank that holds an expert in another slot already copies it by itself; that is no transfer.
///
/// # Panics
/// When the shapes differ.
pub fn transfers(from: &Placement, to: &Placement) -> Vec<Transfer> {
    assert_eq!(from.layer_ids(), to.layer_ids(), "layers of two placements");
    assert_eq!((from.ranks(), from.slots()), (to.ranks(), to.slots()), "ranks and slots of two placements");
    let of_layer = |layer: usize| {
        let received = layer_transfers(from.layer(layer), to.layer(layer));
        received.into_iter().map(move |(slot, expert)| Transfer { layer, slot, expert })
    };
    (0..to.layers()).flat_map(of_layer).collect()
}

/// Slots that receive an expert which is new to their rank.
fn layer_transfers(from: LayerPlacement<'_>, to: LayerPlacement<'_>) -> Vec<(usize, usize)> {
    let mut received = Vec::new();
    for rank in 0..to.ranks() {
        let (old, new) = (from.slots_of_rank(rank), to.slots_of_rank(rank));
        for (i, &expert) in new.iter().enumerate() {
            if expert != EMPTY && !old.contains(&expert) && !new[..i].contains(&expert) {
                received.push((rank * to.slots_per_rank() + i, expert as usize));
            }
        }
    }
    received
}

/// Slots beyond the first that hold the same expert on one rank, over all layers: they balance nothing.
pub fn duplicates(placement: &Placement) -> usize {
    let on_rank = |held: &[i32]| {
        held.iter().enumerate().filter(|(i, e)| **e != EMPTY && held[..*i].contains(e)).count()
    };
    let of_layer = |layer: LayerPlacement<'_>| {
        (0..layer.ranks()).map(|rank| on_rank(layer.slots_of_rank(rank))).sum::<usize>()
    };
    (0..placement.layers()).map(|layer| of_layer(placement.layer(layer))).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placement(slots: Vec<i32>) -> Placement {
        Placement::new(2, slots.len() / 2, 3, vec![4], vec![slots]).unwrap()
    }

    #[test]
    fn transfers_are_what_a_rank_does_not_hold() {
        let from = placement(vec![0, 1, 2, EMPTY]);
        let received = |slots| transfers(&from, &placement(slots));
        assert_eq!(received(vec![0, 1, 2, EMPTY]), []);
        assert_eq!(received(vec![1, 0, EMPTY, 2]), [], "a rank shuffles its own slots for nothing");
        assert_eq!(received(vec![0, 1, 2, 0]), [Transfer { layer: 0, slot: 3, expert: 0 }]);
        assert_eq!(
            received(vec![2, 0, 1, 1]),
            [Transfer { layer: 0, slot: 0, expert: 2 }, Transfer { layer: 0, slot: 2, expert: 1 }]
        );
    }

    #[test]
    fn duplicates_are_counted_per_rank() {
        assert_eq!(duplicates(&placement(vec![0, 1, 2, 0])), 0);
        assert_eq!(duplicates(&placement(vec![0, 0, 0, EMPTY, EMPTY, 1, 2, EMPTY])), 2);
    }
}
