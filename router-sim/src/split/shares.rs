//! Tokens per slot, when it does not matter which source rank they come from.

use super::Split;
use super::activated::Activated;
use super::leveler::Leveler;
use crate::load::{LoadWindow, balancedness};
use crate::placement::{LayerPlacement, Placement};
use crate::{Error, Result};

/// Tokens of one layer that can be shared out: what 64-bit signed integers hold, as other tools read them.
pub const MAX_TOKENS: u64 = i64::MAX as u64;

/// Shares out layers' tokens among slots. Made once and reused: it allocates only until its buffers are large enough.
#[derive(Debug, Clone, Default)]
pub struct Shares {
    even: Vec<u64>,
    leveler: Leveler,
    activated: Activated,
}

impl Shares {
    /// Shares out one layer's tokens `[experts]`. Tokens of each slot, rank-major; `[slots]`.
    ///
    /// # Errors
    /// [`Error::Impossible`] for a split that depends on sources ([`Split::Random`], [`Split::Nearest`]), and above
    /// [`MAX_TOKENS`] in all.
    ///
    /// # Panics
    /// When `tokens` is not `[experts]`.
    pub fn share(&mut self, split: Split, layer: LayerPlacement<'_>, tokens: &[u64]) -> Result<&[u64]> {
        check_tokens(layer, tokens)?;
        if matches!(split, Split::Random { .. } | Split::Nearest { .. }) {
            return Err(Error::Impossible(format!("split {split} needs the tokens of each source rank")));
        }
        Ok(self.fill(split, layer, tokens, &[]))
    }

    /// The smallest largest rank load that any split reaches, with the ranks that bound it: tokens of experts that live
    /// nowhere else, over the number of these ranks. Tokens are divisible here. Exact up to 2^42 tokens on 1,448 ranks;
    /// beyond, a bottleneck less than a token heavier than the one returned may go unseen.
    ///
    /// # Errors
    /// [`Error::Impossible`] above [`MAX_TOKENS`] in all.
    ///
    /// # Panics
    /// When `tokens` is not `[experts]`.
    pub fn optimum(&mut self, layer: LayerPlacement<'_>, tokens: &[u64]) -> Result<Optimum> {
        check_tokens(layer, tokens)?;
        // Whole tokens are exact only to one; so cut each into as many parts as fit.
        let parts = (MAX_TOKENS / tokens.iter().sum::<u64>().max(1)).min(1 << 21);
        let cut: Vec<u64> = tokens.iter().map(|n| n * parts).collect();
        self.leveler.water_fill(layer, &cut, &[]);
        self.leveler.level(layer);
        let ranks = self.leveler.bottleneck();
        let bound = |slot: &u32| ranks.binary_search(&layer.rank_of(*slot as usize)).is_ok();
        let held = (0..tokens.len()).filter(|e| layer.replicas(*e).iter().all(bound)).map(|e| tokens[e]);
        let tokens = held.sum();
        Ok(Optimum { max_load: tokens as f64 / ranks.len() as f64, tokens, ranks })
    }

    /// What each rank computes of a layer's counts `[experts]`; `[ranks]`. Splits that share out by source ranks do so
    /// evenly over all of them, near enough.
    ///
    /// # Errors
    /// As [`Shares::share`].
    pub fn rank_loads(
        &mut self,
        split: Split,
        layer: LayerPlacement<'_>,
        counts: &[u64],
    ) -> Result<Vec<u64>> {
        let split = match split {
            Split::Random { .. } | Split::Nearest { .. } => Split::Even,
            other => other,
        };
        let slots = self.share(split, layer, counts)?;
        Ok(slots.chunks_exact(layer.slots_per_rank()).map(|slots| slots.iter().sum()).collect())
    }

    /// [`Shares::share`] without its checks. `home` is what slots had best keep, `[slots]` or empty.
    pub(super) fn fill(
        &mut self,
        split: Split,
        layer: LayerPlacement<'_>,
        tokens: &[u64],
        home: &[u64],
    ) -> &[u64] {
        match split {
            Split::WaterFill => {
                self.leveler.water_fill(layer, tokens, home);
                self.leveler.tokens()
            }
            Split::Exact => {
                self.leveler.water_fill(layer, tokens, home);
                self.leveler.level(layer);
                self.leveler.tokens()
            }
            Split::Activated { expert_cost, token_cost } => {
                self.activated.fill(&mut self.leveler, layer, tokens, expert_cost, token_cost)
            }
            Split::Even | Split::Random { .. } | Split::Nearest { .. } => {
                self.even.clear();
                self.even.resize(layer.slots().len(), 0);
                for (expert, &total) in tokens.iter().enumerate() {
                    let replicas = layer.replicas(expert);
                    for (i, &slot) in replicas.iter().enumerate() {
                        self.even[slot as usize] = even_share(total, replicas.len(), i);
                    }
                }
                &self.even
            }
        }
    }
}

/// The best largest rank load of a placement under any split, with its proof.
#[derive(Debug, Clone, PartialEq)]
pub struct Optimum {
    /// Tokens; `tokens` over the number of `ranks`.
    pub max_load: f64,
    /// Tokens of the experts that live on `ranks` only.
    pub tokens: u64,
    /// The bottleneck, ascending.
    pub ranks: Vec<usize>,
}

fn check_tokens(layer: LayerPlacement<'_>, tokens: &[u64]) -> Result<()> {
    assert_eq!(tokens.len(), layer.experts(), "one count per expert");
    match tokens.iter().try_fold(0u64, |sum, n| sum.checked_add(*n)) {
        Some(sum) if sum <= MAX_TOKENS => Ok(()),
        _ => Err(Error::Impossible(format!(
            "{} tokens of one layer exceed the limit of {MAX_TOKENS}",
            tokens.iter().map(|n| u128::from(*n)).sum::<u128>()
        ))),
    }
}

/// Tokens of the given one of `replicas` when `total` are shared out evenly.
fn even_share(total: u64, replicas: usize, replica: usize) -> u64 {
    let replicas = replicas as u64;
    total / replicas + u64::from((replica as u64) < total % replicas)
}

/// Tokens that each rank receives when a layer's counts `[experts]` are shared out evenly; `[ranks]`.
pub fn even_rank_loads(layer: LayerPlacement<'_>, counts: &[u64]) -> Vec<u64> {
    assert_eq!(counts.len(), layer.experts(), "one count per expert");
    let mut loads = vec![0u64; layer.ranks()];
    for (expert, &count) in counts.iter().enumerate() {
        let replicas = layer.replicas(expert);
        for (i, &slot) in replicas.iter().enumerate() {
            let load = &mut loads[layer.rank_of(slot as usize)];
            *load = load.saturating_add(even_share(count, replicas.len(), i));
        }
    }
    loads
}

/// Balancedness of each layer when a window's tokens, both phases together, are shared out evenly; `[layers]`.
///
/// # Panics
/// When the placement is for other layers or experts.
pub fn even_balancedness(load: &LoadWindow, placement: &Placement) -> Vec<f64> {
    assert_eq!(load.layer_ids(), placement.layer_ids(), "one window layer per placement layer");
    let of_layer = |l| {
        let counts: Vec<u64> = load.totals(l).collect();
        balancedness(&even_rank_loads(placement.layer(l), &counts))
    };
    (0..placement.layers()).map(of_layer).collect()
}
