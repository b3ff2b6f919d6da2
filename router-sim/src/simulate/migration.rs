//! A migration under way, layer by layer.

use crate::Result;
use crate::cost::CostModel;
use crate::placement::{Placement, transfers};

/// A layer whose new experts are on their way.
#[derive(Debug, Clone, Copy)]
struct Pending {
    layer: usize,
    us: f64,
}

/// A migration under way: layers travel one after another, those that gain most per byte first, and each switches as
/// soon as it is there. Until then it serves with the old placement.
#[derive(Debug, Clone)]
pub(super) struct Migration {
    target: Placement,
    /// In reverse order of travel.
    pending: Vec<Pending>,
    /// How long the layer that travels has been under way.
    travelled_us: f64,
    pub transfers: u64,
}

impl Migration {
    /// Plans the order. `gain` is what each layer wins; any unit, `[layers]`.
    pub fn new(current: &Placement, target: Placement, gain: &[f64], cost: &CostModel) -> Migration {
        let slots_per_rank = target.slots_per_rank();
        // Weights that each rank receives, `[layers][ranks]`.
        let mut received = vec![vec![0; target.ranks()]; target.layers()];
        let moved = transfers(current, &target);
        for transfer in &moved {
            received[transfer.layer][transfer.slot / slots_per_rank] += 1;
        }
        let changed = |layer: &usize| current.layer(*layer).slots() != target.layer(*layer).slots();
        let mut pending: Vec<Pending> = (0..target.layers())
            .filter(changed)
            .map(|layer| Pending {
                layer,
                us: cost.migration_us(received[layer].iter().copied().max().unwrap_or(0)),
            })
            .collect();
        let worth = |p: &Pending| gain[p.layer] / received[p.layer].iter().sum::<usize>().max(1) as f64;
        pending.sort_by(|a, b| worth(a).total_cmp(&worth(b)).then(b.layer.cmp(&a.layer)));
        Migration { target, pending, travelled_us: 0.0, transfers: moved.len() as u64 }
    }

    /// Layers that have not switched.
    pub fn layers_in_flight(&self) -> usize {
        self.pending.len()
    }

    /// Time that the whole migration takes, in microseconds.
    pub fn us(&self) -> f64 {
        self.pending.iter().map(|p| p.us).sum()
    }

    /// Lets time pass; layers that have arrived switch. Returns how many did.
    pub fn advance(&mut self, us: f64, current: &mut Placement) -> Result<usize> {
        self.travelled_us += us;
        let mut arrived = Vec::new();
        while let Some(next) = self.pending.last().copied().filter(|next| next.us <= self.travelled_us) {
            self.travelled_us -= next.us;
            arrived.push(next.layer);
            self.pending.pop();
        }
        if arrived.is_empty() {
            return Ok(0);
        }
        let of_layer = |layer: usize| {
            let source = if arrived.contains(&layer) { &self.target } else { &*current };
            source.layer(layer).slots().to_vec()
        };
        let slots = (0..current.layers()).map(of_layer).collect();
        let (ranks, per_rank, experts) = (current.ranks(), current.slots_per_rank(), current.experts());
        let next = Placement::new(ranks, per_rank, experts, current.layer_ids().to_vec(), slots)?;
        *current = next.with_version(current.version() + 1);
        Ok(arrived.len())
    }
}
