//! Routers that several families share.

use super::keys::Keys;
use crate::spec::{ExpertGroups, GroupScore, Renormalize, Router, Score};

/// Softmax over all experts, then top-k; the weights are divided by their sum where `renormalize` says so.
pub(super) fn softmax(renormalize: bool) -> Router {
    Router {
        score: Score::Softmax,
        logit_bias: false,
        choice_bias: false,
        groups: None,
        renormalize: if renormalize { Renormalize::Sum { eps: 0.0 } } else { Renormalize::Off },
        scale: 1.0,
    }
}

/// Top-k of the logits, then softmax over the chosen ones (gpt-oss, Granite).
pub(super) fn softmax_over_chosen(logit_bias: bool) -> Router {
    Router { score: Score::SoftmaxOverChosen, logit_bias, ..softmax(false) }
}

/// DeepSeek-V3's "noaux_tc": sigmoid scores, a bias for the choice only, groups scored by their two best.
pub(super) fn noaux(keys: &Keys, groups: Option<ExpertGroups>) -> Router {
    let renormalize = keys.flag("norm_topk_prob", true);
    Router {
        score: Score::Sigmoid,
        choice_bias: true,
        groups,
        renormalize: if renormalize { Renormalize::Sum { eps: 1e-20 } } else { Renormalize::Off },
        ..softmax(false)
    }
}

/// `n_group` and `topk_group`; `None` where there is one group, which limits nothing.
pub(super) fn groups(
    keys: &Keys,
    default: ExpertGroups,
    experts: usize,
    top_k: usize,
) -> Option<ExpertGroups> {
    let count = keys.size("n_group", default.count, experts);
    let keep = keys.size("topk_group", default.keep.min(count), experts);
    if count == 1 && keep == 1 {
        return None;
    }
    let divides = experts.is_multiple_of(count);
    keys.require(divides, "n_group", format!("a divisor of the {experts} experts"), count);
    keys.require(keep <= count, "topk_group", format!("at most n_group {count}"), keep);
    let per_group = experts / count;
    let scorable = default.score == GroupScore::Max || per_group >= 2;
    keys.require(scorable, "n_group", "groups of at least 2 experts (their two best are summed)", count);
    let reachable = keep.saturating_mul(per_group);
    keys.require(
        !divides || keep > count || top_k <= reachable,
        "num_experts_per_tok",
        format!("at most {reachable}, the experts of {keep} groups"),
        top_k,
    );
    Some(ExpertGroups { count, keep, score: default.score })
}
