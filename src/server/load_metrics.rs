//! Expert load as metrics: counters since start, and gauges about the last window.

use metrics::{Counter, Gauge};

use super::registry::Registry;
use crate::metrics::{
    self as family, ExpertDetail, LoadSnapshot, Phase, entropy_ratio, hottest, imbalance_ratio, max_share,
};

/// Handles of all load families; the labels are known from the first snapshot.
pub(super) struct LoadMetrics {
    /// `[rank][phase]`
    ranks: Vec<[Counter; 2]>,
    /// Empty where detail ends above layers.
    layers: Vec<LayerMetrics>,
    window_began: LoadSnapshot,
}

struct LayerMetrics {
    tokens: Counter,
    /// `[rank]`, or nothing where detail ends above.
    ranks: Vec<Counter>,
    /// `[expert]`, or nothing where detail ends above.
    experts: Vec<Counter>,
    /// `[phase]`
    imbalance: [Gauge; 2],
    max_share: Gauge,
    entropy: Gauge,
    hottest: Gauge,
}

impl LoadMetrics {
    pub(super) fn new(registry: &Registry, now: LoadSnapshot, detail: ExpertDetail) -> Self {
        let rank = |rank: usize| {
            Phase::ALL.map(|phase| {
                registry.counter(&family::RANK_EXPERT_TOKENS_TOTAL, &[&rank.to_string(), phase.label()])
            })
        };
        let wanted = |level, n| if detail >= level { n } else { 0 };
        let ranks = wanted(ExpertDetail::LayerRank, now.ranks);
        let experts = wanted(ExpertDetail::Expert, now.experts);
        let layers = &now.layer_ids[..wanted(ExpertDetail::Layer, now.layer_ids.len())];
        let mut metrics = LoadMetrics {
            ranks: (0..wanted(ExpertDetail::Rank, now.ranks)).map(rank).collect(),
            layers: layers.iter().map(|&id| LayerMetrics::new(registry, id, ranks, experts)).collect(),
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
            for (counter, tokens) in layer.ranks.iter().zip(now.layer_ranks(index)) {
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
                layer.imbalance[phase as usize].set(imbalance_ratio(window.ranks_of(phase, index)));
            }
            let experts = window.layer_experts(index);
            layer.max_share.set(max_share(&experts));
            layer.entropy.set(entropy_ratio(&experts));
            layer.hottest.set(hottest(&experts) as f64);
        }
        self.window_began = now;
    }
}

impl LayerMetrics {
    fn new(registry: &Registry, layer: usize, ranks: usize, experts: usize) -> Self {
        let id = layer.to_string();
        let expert =
            |expert: usize| registry.counter(&family::EXPERT_TOKENS_TOTAL, &[&id, &expert.to_string()]);
        let rank = |rank: usize| {
            registry.counter(&family::LAYER_RANK_EXPERT_TOKENS_TOTAL, &[&id, &rank.to_string()])
        };
        LayerMetrics {
            ranks: (0..ranks).map(rank).collect(),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::registry::count_series;

    /// The value of a series on the page.
    fn value(registry: &Registry, series: &str) -> Option<f64> {
        let page = registry.render();
        let line = page.lines().find(|line| line.rsplit_once(' ').is_some_and(|(name, _)| name == series))?;
        line.rsplit_once(' ')?.1.parse().ok()
    }

    #[test]
    fn gauges_speak_of_the_last_window_and_counters_of_all_time() {
        let registry = Registry::new().unwrap();
        let mut load = LoadSnapshot::zeros(vec![3], 2, 2);
        load.by_expert = vec![100, 0, 0, 0];
        load.by_rank = vec![100, 0, 0, 0];
        let mut metrics = LoadMetrics::new(&registry, load.clone(), ExpertDetail::Expert);
        let imbalance = r#"moeyard_layer_imbalance_ratio{layer="3",phase="prefill"}"#;
        assert_eq!(value(&registry, imbalance), Some(0.0), "what came before the start is no window");

        load.by_expert[0] += 30;
        load.by_expert[1] += 10;
        load.by_rank[0] += 30;
        load.by_rank[1] += 10;
        metrics.count(load.clone());
        assert_eq!(value(&registry, imbalance), Some(0.0), "the window is still open");
        metrics.close_window(load.clone());
        for (series, expected) in [
            (imbalance, 0.5),
            (r#"moeyard_layer_imbalance_ratio{layer="3",phase="decode"}"#, 0.0),
            (r#"moeyard_layer_max_expert_share_ratio{layer="3"}"#, 0.75),
            (r#"moeyard_layer_hottest_expert{layer="3"}"#, 0.0),
            (r#"moeyard_layer_expert_tokens_total{layer="3"}"#, 140.0),
            (r#"moeyard_rank_expert_tokens_total{rank="0",phase="prefill"}"#, 130.0),
            (r#"moeyard_expert_tokens_total{layer="3",expert="1"}"#, 10.0),
            (r#"moeyard_layer_rank_expert_tokens_total{layer="3",rank="0"}"#, 130.0),
        ] {
            assert_eq!(value(&registry, series), Some(expected), "{series}");
        }

        metrics.close_window(load);
        assert_eq!(value(&registry, imbalance), Some(0.0), "an idle window raises no alarm");
    }

    #[test]
    fn each_level_of_detail_has_what_the_one_before_has() {
        let (layers, experts, ranks) = (58, 256, 8);
        let default = ExpertDetail::of_model(layers, experts);
        assert_eq!((default, ExpertDetail::of_model(32, 8)), (ExpertDetail::Layer, ExpertDetail::Expert));
        let by_layer = ranks * 2 + layers * (1 + 2 + 3);
        for (detail, expected) in [
            (ExpertDetail::Off, 0),
            (ExpertDetail::Rank, ranks * 2),
            (ExpertDetail::Layer, by_layer),
            (ExpertDetail::LayerRank, by_layer + layers * ranks),
            (ExpertDetail::Expert, by_layer + layers * (ranks + experts)),
        ] {
            let registry = Registry::new().unwrap();
            LoadMetrics::new(&registry, LoadSnapshot::zeros((3..61).collect(), experts, ranks), detail);
            assert_eq!(count_series(&registry.render()), expected, "{detail:?}");
        }
    }
}
