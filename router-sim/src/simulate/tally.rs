//! One layer of one step, shared out: who sends how many rows to which slot, and how many distinct ranks and nodes every
//! token visits.

use crate::placement::LayerPlacement;
use crate::split::SplitPlan;

/// Marks a rank or node that no token has visited yet.
const NOBODY: u32 = u32::MAX;

/// Counts of one layer. Buffers are reused from layer to layer.
#[derive(Debug, Clone, Default)]
pub struct LayerTally {
    ranks: usize,
    nodes: usize,
    experts: usize,
    /// Choices per source rank and expert; `[ranks][experts]`.
    pub counts: Vec<u32>,
    /// Choices per expert; `[experts]`.
    pub expert_tokens: Vec<u64>,
    /// Rows per slot, rank-major; `[slots]`.
    pub slot_rows: Vec<u32>,
    /// Rows from each source rank to each rank; `[ranks][ranks]`.
    pub rows: Vec<u32>,
    /// Distinct (token, rank) pairs; `[ranks][ranks]`.
    pub rank_pairs: Vec<u32>,
    /// Distinct (token, node) pairs; `[ranks][nodes]`.
    pub node_pairs: Vec<u32>,
    /// `[ranks]`: the last token that visited.
    rank_visited: Vec<u32>,
    /// `[nodes]`
    node_visited: Vec<u32>,
}

/// The owned rows of a step: rank `r` owns rows `starts[r]..starts[r + 1]`.
#[derive(Debug, Clone, Copy)]
pub struct OwnedRows<'a> {
    /// `[ranks + 1]`, ascending from 0.
    pub starts: &'a [usize],
    /// Choices per row.
    pub top_k: usize,
    /// Ranks on a node.
    pub ranks_per_node: usize,
}

impl LayerTally {
    /// Counts one layer. `ids` is `[rows][top_k]`. The split is rebuilt from the counts of all ranks and every row is
    /// dealt to a slot, by the code that the engine runs.
    pub fn count(
        &mut self,
        layer: LayerPlacement<'_>,
        split: &mut SplitPlan,
        owned: OwnedRows<'_>,
        ids: &[u16],
    ) {
        let OwnedRows { starts, top_k, ranks_per_node } = owned;
        self.clear(layer, ranks_per_node);
        for rank in 0..self.ranks {
            let counts = &mut self.counts[rank * self.experts..(rank + 1) * self.experts];
            for &id in &ids[starts[rank] * top_k..starts[rank + 1] * top_k] {
                counts[usize::from(id)] += 1;
            }
        }
        for counts in self.counts.chunks_exact(self.experts) {
            for (sum, &n) in self.expert_tokens.iter_mut().zip(counts) {
                *sum += u64::from(n);
            }
        }
        split.rebuild(layer, &self.counts);
        for source in 0..self.ranks {
            if starts[source] < starts[source + 1] {
                self.deal(layer, split, owned, source, ids);
            }
        }
    }

    fn clear(&mut self, layer: LayerPlacement<'_>, ranks_per_node: usize) {
        (self.ranks, self.experts) = (layer.ranks(), layer.experts());
        self.nodes = self.ranks.div_ceil(ranks_per_node);
        zero(&mut self.counts, self.ranks * self.experts);
        zero(&mut self.expert_tokens, self.experts);
        zero(&mut self.slot_rows, layer.slots().len());
        zero(&mut self.rows, self.ranks * self.ranks);
        zero(&mut self.rank_pairs, self.ranks * self.ranks);
        zero(&mut self.node_pairs, self.ranks * self.nodes);
        self.rank_visited.clear();
        self.rank_visited.resize(self.ranks, NOBODY);
        self.node_visited.clear();
        self.node_visited.resize(self.nodes, NOBODY);
    }

    /// Deals one source rank's rows.
    fn deal(
        &mut self,
        layer: LayerPlacement<'_>,
        split: &mut SplitPlan,
        owned: OwnedRows<'_>,
        source: usize,
        ids: &[u16],
    ) {
        let OwnedRows { starts, top_k, ranks_per_node } = owned;
        let slots_per_rank = layer.slots_per_rank();
        let rows = &mut self.rows[source * self.ranks..(source + 1) * self.ranks];
        let rank_pairs = &mut self.rank_pairs[source * self.ranks..(source + 1) * self.ranks];
        let node_pairs = &mut self.node_pairs[source * self.nodes..(source + 1) * self.nodes];
        split.deal(source);
        for row in starts[source]..starts[source + 1] {
            // Distinct within a source, and only one source is dealt at a time.
            let token = row as u32;
            for &id in &ids[row * top_k..(row + 1) * top_k] {
                let slot = split.next_slot(usize::from(id));
                let rank = slot / slots_per_rank;
                self.slot_rows[slot] += 1;
                rows[rank] += 1;
                if self.rank_visited[rank] != token {
                    self.rank_visited[rank] = token;
                    rank_pairs[rank] += 1;
                    let node = rank / ranks_per_node;
                    if self.node_visited[node] != token {
                        self.node_visited[node] = token;
                        node_pairs[node] += 1;
                    }
                }
            }
        }
    }

    /// Rows and activated slots of each rank, in rank order.
    pub fn per_rank(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.slot_rows.chunks_exact(self.slot_rows.len() / self.ranks).map(|slots| {
            let rows = slots.iter().map(|&n| u64::from(n)).sum();
            (rows, slots.iter().filter(|&&n| n > 0).count() as u64)
        })
    }
}

fn zero<T: Default + Clone>(buffer: &mut Vec<T>, len: usize) {
    buffer.clear();
    buffer.resize(len, T::default());
}
