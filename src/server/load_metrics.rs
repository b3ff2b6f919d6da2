//! Expert load as metrics: counters since start, and gauges about the last window.

use metrics::{Counter, Gauge};

use super::metrics::Registry;
use crate::metrics::{
    self as family, LoadSnapshot, Phase, entropy_ratio, hottest, imbalance_ratio, max_share_ratio,
};

/// One series per expert up to this many of them over all layers; a page must stay readable.
const MAX_EXPERT_SERIES: usize = 512;

/// Handles of all load families; the labels are known from the first snapshot.
pub(super) struct LoadMetrics {
    /// `[rank][phase]`
    ranks: Vec<[Counter; 2]>,
    layers: Vec<LayerMetrics>,
    window_began: LoadSnapshot,
}

struct LayerMetrics {
    tokens: Counter,
    /// `[expert]`, or nothing where there are too many.
    experts: Vec<Counter>,
    /// `[phase]`
    imbalance: [Gauge; 2],
    max_share: Gauge,
    entropy: Gauge,
    hottest: Gauge,
}

impl LoadMetrics {
    pub(super) fn new(registry: &Registry, now: LoadSnapshot) -> Self {
        let rank = |rank: usize| {
            Phase::ALL.map(|phase| {
                registry.counter(&family::RANK_EXPERT_TOKENS_TOTAL, &[&rank.to_string(), phase.label()])
            })
        };
        let detail = now.layer_ids.len() * now.experts <= MAX_EXPERT_SERIES;
        let experts = if detail { now.experts } else { 0 };
        let mut metrics = LoadMetrics {
            ranks: (0..now.ranks.len()).map(rank).collect(),
            layers: now.layer_ids.iter().map(|&id| LayerMetrics::new(registry, id, experts)).collect(),
            window_began: now.clone(),
        };
        metrics.count(now.clone());
        metrics.close_window(now);
        metrics
    }

    /// Brings the counters up to `now`.
    pub(super) fn count(&mut self, now: LoadSnapshot) {
        for (rank, phases) in self.ranks.iter().enumerate() {
            for phase in Phase::ALL {
                phases[phase as usize].absolute(now.rank_total(rank, phase));
            }
        }
        for (index, layer) in self.layers.iter().enumerate() {
            let experts = now.layer_experts(index);
            layer.tokens.absolute(experts.iter().sum());
            for (counter, tokens) in layer.experts.iter().zip(experts) {
                counter.absolute(tokens);
            }
        }
    }

    /// Sets the gauges from what came since the last window and begins a new one. A window without tokens counts as
    /// balanced, so that an idle server raises no alarm.
    pub(super) fn close_window(&mut self, now: LoadSnapshot) {
        let window = now.since(&self.window_began);
        for (index, layer) in self.layers.iter().enumerate() {
            for phase in Phase::ALL {
                let ranks = window.layer_ranks(phase, index);
                layer.imbalance[phase as usize].set(imbalance_ratio(&ranks));
            }
            let experts = window.layer_experts(index);
            layer.max_share.set(max_share_ratio(&experts));
            layer.entropy.set(entropy_ratio(&experts));
            layer.hottest.set(hottest(&experts) as f64);
        }
        self.window_began = now;
    }
}

impl LayerMetrics {
    fn new(registry: &Registry, layer: usize, experts: usize) -> Self {
        let id = layer.to_string();
        let expert = |expert: usize| registry.counter(&family::EXPERT_TOKENS_TOTAL, &[&id, &expert.to_string()]);
        LayerMetrics {
            tokens: registry.counter(&family::LAYER_EXPERT_TOKENS_TOTAL, &[&id]),
            experts: (0..experts).map(expert).collect(),
            imbalance: Phase::ALL
                .map(|phase| registry.gauge(&family::LAYER_IMBALANCE_RATIO, &[&id, phase.label()])),
            max_share: registry.gauge(&family::LAYER_MAX_EXPERT_SHARE_RATIO, &[&id]),
            entropy: registry.gauge(&family::LAYER_ROUTING_ENTROPY_RATIO, &[&id]),
            hottest: registry.gauge(&family::LAYER_HOTTEST_EXPERT, &[&id]),
        }
    }
}
