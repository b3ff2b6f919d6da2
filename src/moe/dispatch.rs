//! Where every routed row goes and how it comes back: the index arithmetic around the two all-to-alls. Pure; knows no
//! tensor.
//!
//! Order contract. Rows leave sorted by (destination rank, slot, token, k). They arrive sorted by (source rank, slot,
//! token, k) and are regrouped by (slot, source rank, token, k) for the experts. Results travel the same way back.

use router_sim::placement::LayerPlacement;
use router_sim::split::SplitPlan;

/// The world as dispatch sees it.
#[derive(Debug, Clone, Copy)]
pub struct DispatchShape {
    /// Ranks in the world: sources of rows.
    pub world: usize,
    /// This rank in the world.
    pub rank: usize,
    /// Ranks that share each expert: every row goes to all of them. Expert-parallel rank e is the world ranks
    /// `e * expert_tp..(e + 1) * expert_tp`.
    pub expert_tp: usize,
    /// Choices per token.
    pub top_k: usize,
}

/// One layer's dispatch of one step. Buffers are reused from step to step.
#[derive(Debug, Default)]
pub struct Dispatch {
    /// Token (owned row) of each row sent.
    pub send_tokens: Vec<u32>,
    /// Rows sent to each world rank.
    pub sent: Vec<usize>,
    /// Rows received from each world rank.
    pub received: Vec<usize>,
    /// Received row at each grouped position.
    pub group: Vec<u32>,
    /// Grouped position of each received row: the inverse of `group`.
    pub ungroup: Vec<u32>,
    /// Grouped rows of local slot s are `offsets[s]..offsets[s + 1]`.
    pub offsets: Vec<usize>,
    /// Position among the sent rows of token t, choice j, part x: index `(t * top_k + j) * expert_tp + x`.
    pub combine: Vec<u32>,
    /// Expert-parallel rank of token t, choice j: index `t * top_k + j`.
    pub destinations: Vec<u32>,
    slots: Vec<u32>,
    cursors: Vec<usize>,
}

impl Dispatch {
    /// Plans the dispatch of this rank's tokens (`ids` `[tokens * top_k]`) in one MoE layer. `split` has been rebuilt
    /// from the counts of all ranks.
    pub fn plan(
        &mut self,
        shape: DispatchShape,
        layer: LayerPlacement<'_>,
        split: &mut SplitPlan,
        ids: &[i32],
    ) {
        self.deal(shape, layer, split, ids);
        self.place_sent(shape, layer);
        self.place_received(shape, layer, split);
    }

    /// Fills `offsets` and `destinations` alone, for a rank that holds every expert once: expert e in slot `slot_of[e]` of `slots`.
    pub fn count_alone(&mut self, slot_of: &[u32], slots: usize, ids: &[i32]) {
        self.destinations.clear();
        self.destinations.resize(ids.len(), 0);
        self.offsets.clear();
        self.offsets.resize(slots + 1, 0);
        for &expert in ids {
            self.offsets[slot_of[expert as usize] as usize + 1] += 1;
        }
        for slot in 0..slots {
            self.offsets[slot + 1] += self.offsets[slot];
        }
    }

    /// Gives every (token, k) its slot, in canonical order.
    fn deal(&mut self, shape: DispatchShape, layer: LayerPlacement<'_>, split: &mut SplitPlan, ids: &[i32]) {
        split.deal(shape.rank);
        self.slots.clear();
        self.slots.extend(ids.iter().map(|&expert| split.next_slot(expert as usize) as u32));
        let per_rank = layer.slots_per_rank() as u32;
        self.destinations.clear();
        self.destinations.extend(self.slots.iter().map(|slot| slot / per_rank));
    }

    /// Sorts this rank's rows by (destination rank, slot, token, k).
    fn place_sent(&mut self, shape: DispatchShape, layer: LayerPlacement<'_>) {
        let parts = shape.expert_tp;
        let per_rank = layer.slots_per_rank();
        let slots = layer.ranks() * per_rank;
        // cursors[slot * parts + x]: where the next row for that copy goes.
        self.cursors.clear();
        self.cursors.resize(slots * parts, 0);
        for &slot in &self.slots {
            for x in 0..parts {
                self.cursors[slot as usize * parts + x] += 1;
            }
        }
        self.sent.clear();
        let mut position = 0;
        for destination in 0..shape.world {
            let (rank, x) = (destination / parts, destination % parts);
            let start = position;
            for slot in rank * per_rank..(rank + 1) * per_rank {
                let cursor = &mut self.cursors[slot * parts + x];
                position += std::mem::replace(cursor, position);
            }
            self.sent.push(position - start);
        }
        self.send_tokens.clear();
        self.send_tokens.resize(position, 0);
        self.combine.clear();
        for (row, &slot) in self.slots.iter().enumerate() {
            for x in 0..parts {
                let cursor = &mut self.cursors[slot as usize * parts + x];
                self.send_tokens[*cursor] = (row / shape.top_k) as u32;
                self.combine.push(*cursor as u32);
                *cursor += 1;
            }
        }
    }

    /// Groups the rows this rank receives by slot.
    fn place_received(&mut self, shape: DispatchShape, layer: LayerPlacement<'_>, split: &SplitPlan) {
        let rank = shape.rank / shape.expert_tp;
        self.offsets.clear();
        self.offsets.push(0);
        let mut total = 0;
        for slot in 0..layer.slots_per_rank() {
            total += (0..shape.world).map(|s| split.quotas_to(s, rank)[slot] as usize).sum::<usize>();
            self.offsets.push(total);
        }
        self.group.clear();
        self.group.resize(total, 0);
        self.ungroup.clear();
        self.received.clear();
        // cursors[s]: next grouped position of local slot s; sources come in rank order.
        self.cursors.clear();
        self.cursors.extend_from_slice(&self.offsets[..layer.slots_per_rank()]);
        for source in 0..shape.world {
            let start = self.ungroup.len();
            for (slot, &quota) in split.quotas_to(source, rank).iter().enumerate() {
                for _ in 0..quota {
                    let position = self.cursors[slot];
                    self.cursors[slot] += 1;
                    self.group[position] = self.ungroup.len() as u32;
                    self.ungroup.push(position as u32);
                }
            }
            self.received.push(self.ungroup.len() - start);
        }
    }

    /// Rows this rank computes.
    pub fn computed_rows(&self) -> usize {
        self.group.len()
    }
}
