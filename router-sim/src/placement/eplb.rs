//! EPLB, the load balancer DeepSeek published (github.com/deepseek-ai/EPLB, eplb.py): replicate the experts with the most
//! load per copy, then pack copies into ranks, heaviest first.
//!
//! Bit-exact with the published code: weights, copies' loads and pack sums are float32, and the first of equally good
//! choices wins. Two things that code leaves to its tensor library. Equal weights are sorted stably here. A group's
//! weights are added up in an order that there depends on the machine's vector width; here the sum is rounded once, which
//! is the same wherever sums are exact, below 2^24 tokens.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::{ClusterShape, Placement, PlacementPolicy};
use crate::load::LoadWindow;
use crate::{Error, Result};

/// EPLB's two policies. It assumes that every copy of an expert gets an equal share, and may put two copies of an expert
/// on one rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Eplb {
    /// Groups of consecutive experts that stay together on a node.
    pub groups: usize,
    /// Nodes of equally many consecutive ranks.
    pub nodes: usize,
}

impl Eplb {
    /// The policy that knows no nodes: what the published code falls back to when the groups do not divide.
    pub const GLOBAL: Eplb = Eplb { groups: 1, nodes: 1 };

    /// The policy that first packs groups onto nodes, as many on each, then replicates within each node.
    pub fn hierarchical(groups: usize, nodes: usize) -> Self {
        Eplb { groups, nodes }
    }

    pub(super) fn check(&self, experts: usize, ranks: usize) -> Result<()> {
        let Eplb { groups, nodes } = *self;
        let rules = [
            (nodes > 0 && groups > 0, format!("{groups} groups on {nodes} nodes: at least 1 of each")),
            (
                groups > 0 && experts.is_multiple_of(groups),
                format!("{experts} experts do not divide into {groups} groups"),
            ),
            (
                nodes > 0 && groups.is_multiple_of(nodes),
                format!("{groups} groups do not divide among {nodes} nodes"),
            ),
            (
                nodes > 0 && ranks.is_multiple_of(nodes),
                format!("{ranks} ranks do not divide among {nodes} nodes"),
            ),
        ];
        match rules.into_iter().find(|(holds, _)| !holds) {
            Some((_, why)) => Err(Error::Impossible(format!("hierarchical EPLB: {why}"))),
            None => Ok(()),
        }
    }
}

impl PlacementPolicy for Eplb {
    /// Balances the sum of both phases. Every slot is filled, also those that only round up to whole ranks.
    fn place(&self, load: &LoadWindow, cluster: &ClusterShape) -> Result<Placement> {
        let (experts, ranks) = (load.experts(), cluster.ranks);
        let slots_per_rank = cluster.slots_per_rank(experts)?;
        self.check(experts, ranks)?;
        let mut packer = Packer::default();
        let mut weights = Vec::with_capacity(experts);
        let mut layers = Vec::with_capacity(load.layers());
        for layer in 0..load.layers() {
            weights.clear();
            weights.extend(load.totals(layer).map(|tokens| tokens as f32));
            let mut map = vec![0; ranks * slots_per_rank];
            packer.place_layer(&weights, *self, ranks, &mut map);
            layers.push(map);
        }
        Placement::new(ranks, slots_per_rank, experts, load.layer_ids().to_vec(), layers)
    }
}

/// An expert in a queue of copies: load per copy as ordered bits, then the lowest position first.
type Candidate = (u32, Reverse<u32>);

/// Reused buffers of the two steps.
#[derive(Default)]
pub(super) struct Packer {
    /// `[experts]`: the experts in node-major order.
    members: Vec<u32>,
    /// `[experts of a node]`
    copies: Vec<u32>,
    /// `[slots of a node]`: which of the node's experts each copy is of.
    owners: Vec<u32>,
    /// `[slots of a node]`: each copy's load.
    loads: Vec<f32>,
    candidates: BinaryHeap<Candidate>,
    packs: BinaryHeap<Reverse<(u32, u32)>>,
    order: Vec<(Reverse<u32>, u32)>,
    /// `[items]`: pack and place within it.
    packed: Vec<(u32, u32)>,
}

impl Packer {
    /// Fills one layer's map `[ranks * slots_per_rank]` from the experts' weights.
    pub(super) fn place_layer(&mut self, weights: &[f32], shape: Eplb, ranks: usize, map: &mut [i32]) {
        let nodes = shape.nodes;
        let (per_node, width, ranks_per_node) = (weights.len() / nodes, map.len() / nodes, ranks / nodes);
        let slots_per_rank = map.len() / ranks;
        self.assign_groups(weights, shape);
        for node in 0..nodes {
            let members = node * per_node..(node + 1) * per_node;
            self.replicate(weights, members.clone(), width);
            self.pack(ranks_per_node);
            let map = &mut map[node * width..(node + 1) * width];
            for (&owner, &(rank, place)) in self.owners.iter().zip(&self.packed) {
                map[rank as usize * slots_per_rank + place as usize] =
                    self.members[members.start + owner as usize] as i32;
            }
        }
    }

    /// Orders the experts by the node their group is packed on.
    fn assign_groups(&mut self, weights: &[f32], Eplb { groups, nodes }: Eplb) {
        let (size, per_node) = (weights.len() / groups, groups / nodes);
        self.loads.clear();
        self.loads.extend(weights.chunks(size).map(|g| g.iter().map(|&w| f64::from(w)).sum::<f64>() as f32));
        self.pack(nodes);
        self.members.clear();
        self.members.resize(weights.len(), 0);
        for (group, &(node, place)) in self.packed.iter().enumerate() {
            let start = (node as usize * per_node + place as usize) * size;
            for i in 0..size {
                self.members[start + i] = (group * size + i) as u32;
            }
        }
    }

    /// Fills `owners` and `loads`: one copy of each member, in order, then a copy of whichever member has the most load
    /// per copy, until there are `width` copies.
    fn replicate(&mut self, weights: &[f32], members: std::ops::Range<usize>, width: usize) {
        let members = &self.members[members];
        self.owners.clear();
        self.owners.extend(0..members.len() as u32);
        self.copies.clear();
        self.copies.resize(members.len(), 1);
        let mut candidates = std::mem::take(&mut self.candidates).into_vec();
        candidates.clear();
        candidates.extend(
            members.iter().zip(0..).map(|(&e, i)| (weights[e as usize].to_bits(), Reverse(i as u32))),
        );
        self.candidates = candidates.into();
        while self.owners.len() < width {
            let mut most = self.candidates.peek_mut().expect("a node has experts");
            let Reverse(member) = most.1;
            self.owners.push(member);
            let copies = &mut self.copies[member as usize];
            *copies += 1;
            most.0 = (weights[members[member as usize] as usize] / *copies as f32).to_bits();
        }
        self.loads.clear();
        self.loads.extend(
            self.owners.iter().map(|&member| {
                weights[members[member as usize] as usize] / self.copies[member as usize] as f32
            }),
        );
    }

    /// Packs the items of `loads` into `packs` of equally many, into `packed`: the heaviest item first, each into the
    /// lightest pack that is not full, the first of equals.
    fn pack(&mut self, packs: usize) {
        let items = self.loads.len();
        let capacity = (items / packs) as u32;
        self.packed.clear();
        if capacity == 1 {
            self.packed.extend((0..items as u32).map(|item| (item, 0)));
            return;
        }
        self.packed.resize(items, (0, 0));
        self.order.clear();
        self.order.extend(self.loads.iter().zip(0..).map(|(load, i)| (Reverse(load.to_bits()), i as u32)));
        self.order.sort_unstable();
        self.copies.clear();
        self.copies.resize(packs, 0);
        self.packs.clear();
        self.packs.extend((0..packs as u32).map(|pack| Reverse((0, pack))));
        for &(_, item) in &self.order {
            let mut lightest = self.packs.peek_mut().expect("as many places as items");
            let Reverse((load, pack)) = *lightest;
            let held = &mut self.copies[pack as usize];
            self.packed[item as usize] = (pack, *held);
            *held += 1;
            if *held == capacity {
                std::collections::binary_heap::PeekMut::pop(lightest);
            } else {
                lightest.0.0 = (f32::from_bits(load) + self.loads[item as usize]).to_bits();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::Phase;
    use proptest::prelude::*;

    fn window(experts: usize, layers: &[&[u64]]) -> LoadWindow {
        let mut load = LoadWindow::new(&(0..layers.len()).collect::<Vec<_>>(), experts);
        for (layer, counts) in layers.iter().enumerate() {
            load.counts_mut(Phase::Prefill, layer).copy_from_slice(counts);
        }
        load
    }

    fn place(policy: Eplb, load: &LoadWindow, ranks: usize, slots: usize) -> Vec<Vec<i32>> {
        let cluster = ClusterShape { ranks, redundant: slots - load.experts() };
        let placement = policy.place(load, &cluster).unwrap();
        (0..placement.layers()).map(|l| placement.layer(l).slots().to_vec()).collect()
    }

    /// The example of EPLB's README.
    const PUBLISHED: [&[u64]; 2] = [
        &[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        &[20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ];

    #[test]
    fn the_published_example() {
        let map = place(Eplb::hierarchical(4, 2), &window(12, &PUBLISHED), 8, 16);
        assert_eq!(map[0], [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1]);
        assert_eq!(map[1], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]);
    }

    #[test]
    fn impossible_shapes_are_named() {
        let load = window(12, &PUBLISHED);
        for (groups, nodes, ranks, redundant, expected) in [
            (5, 1, 4, 0, "12 experts do not divide into 5 groups"),
            (4, 3, 6, 0, "4 groups do not divide among 3 nodes"),
            (4, 2, 3, 0, "3 ranks do not divide among 2 nodes"),
            (0, 2, 4, 0, "0 groups on 2 nodes"),
            (2, 0, 4, 0, "2 groups on 0 nodes"),
            (4, 2, 0, 0, "given 0 ranks"),
        ] {
            let error = Eplb { groups, nodes }
                .place(&load, &ClusterShape { ranks, redundant })
                .unwrap_err()
                .to_string();
            assert!(error.contains(expected), "{error:?} should contain {expected:?}");
        }
    }

    /// The published steps word for word, with scans instead of heaps.
    mod published {
        fn balanced_packing(weight: &[f32], packs: usize) -> Vec<(usize, usize)> {
            let capacity = weight.len() / packs;
            if capacity == 1 {
                return (0..weight.len()).map(|i| (i, 0)).collect();
            }
            let mut order: Vec<usize> = (0..weight.len()).collect();
            order.sort_by(|a, b| weight[*b].total_cmp(&weight[*a]));
            let (mut sums, mut held) = (vec![0f32; packs], vec![0; packs]);
            let mut packed = vec![(0, 0); weight.len()];
            for item in order {
                let open = (0..packs).filter(|p| held[*p] < capacity);
                let pack = open.min_by(|a, b| sums[*a].total_cmp(&sums[*b])).unwrap();
                packed[item] = (pack, held[pack]);
                sums[pack] += weight[item];
                held[pack] += 1;
            }
            packed
        }

        fn replicate_experts(weight: &[f32], slots: usize) -> (Vec<usize>, Vec<usize>) {
            let mut phy2log: Vec<usize> = (0..weight.len()).collect();
            let mut count = vec![1; weight.len()];
            for _ in weight.len()..slots {
                let share = |e: usize| weight[e] / count[e] as f32;
                let first_most =
                    (0..weight.len()).fold(0, |best, e| if share(e) > share(best) { e } else { best });
                phy2log.push(first_most);
                count[first_most] += 1;
            }
            (phy2log, count)
        }

        pub fn rebalance(
            weight: &[f32],
            slots: usize,
            groups: usize,
            nodes: usize,
            ranks: usize,
        ) -> Vec<i32> {
            let (size, per_node) = (weight.len() / groups, groups / nodes);
            let sums: Vec<f32> = weight.chunks(size).map(|g| g.iter().sum()).collect();
            let mut members = vec![0; weight.len()];
            for (group, (node, place)) in balanced_packing(&sums, nodes).into_iter().enumerate() {
                for i in 0..size {
                    members[(node * per_node + place) * size + i] = group * size + i;
                }
            }
            let mut map = vec![0; slots];
            for (node, members) in members.chunks(weight.len() / nodes).enumerate() {
                let own: Vec<f32> = members.iter().map(|e| weight[*e]).collect();
                let (owners, count) = replicate_experts(&own, slots / nodes);
                let loads: Vec<f32> = owners.iter().map(|o| own[*o] / count[*o] as f32).collect();
                for (copy, (rank, place)) in balanced_packing(&loads, ranks / nodes).into_iter().enumerate() {
                    let slot = node * (slots / nodes) + rank * (slots / ranks) + place;
                    map[slot] = members[owners[copy]] as i32;
                }
            }
            map
        }
    }

    proptest! {
        /// Small counts make many ties; counts above 2^24 are rounded when they become float32. Groups are summed
        /// exactly in the smaller range only, so one group per node is used in the larger.
        #[test]
        fn as_published(
            (nodes, ranks_per_node, groups_per_node, size) in (1usize..4, 1usize..5, 1usize..4, 1usize..5),
            extra in 0usize..5,
            large in any::<bool>(),
            seeds in prop::collection::vec(any::<u64>(), 36),
        ) {
            let ranks = nodes * ranks_per_node;
            let (groups_per_node, size) = if large { (1, 1) } else { (groups_per_node, size) };
            let groups = nodes * groups_per_node;
            let experts = groups * size;
            let slots = experts.next_multiple_of(ranks) + extra * ranks;
            let counts: Vec<u64> =
                seeds[..experts].iter().map(|s| if large { s >> (s % 40) } else { (s % 1000) >> (s % 8) }).collect();
            let weights: Vec<f32> = counts.iter().map(|n| *n as f32).collect();
            let load = window(experts, &[&counts]);
            for (groups, nodes) in [(groups, nodes), (1, 1)] {
                prop_assert_eq!(
                    &place(Eplb { groups, nodes }, &load, ranks, slots)[0],
                    &published::rebalance(&weights, slots, groups, nodes, ranks)
                );
            }
        }
    }
}
