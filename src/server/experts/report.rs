//! A window of expert load, written out.

use std::borrow::Cow;
use std::fmt::Write;
use std::sync::Arc;

use router_sim::placement::Placement;
use serde::Serialize;

use super::answer::Answer;
use super::query::{Asked, Format, Phases};
use crate::metrics::{LoadSnapshot, Phase};

/// A window of load with where it was computed.
pub(super) struct Report {
    /// Length of the window.
    pub seconds: f64,
    pub load: LoadSnapshot,
    /// Of one token on its way to an expert; 0 where it is not known.
    pub row_bytes: usize,
    /// In force at the end of the window.
    pub placement: Arc<Placement>,
}

/// The JSON answer after its length of time.
#[derive(Serialize)]
struct Body<'a> {
    placement_version: u64,
    ranks: usize,
    experts: usize,
    layer_ids: &'a [usize],
    /// `[layer][expert]`
    expert_tokens: ByPhase<'a>,
    /// `[layer][rank]`
    rank_tokens: ByPhase<'a>,
    /// `[source][rank]`
    sent_tokens: ByPhase<'a>,
    /// Of one sent token, each way.
    row_bytes: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    owner_ranks: Option<Vec<Vec<Vec<usize>>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    replicas: Option<Vec<Vec<usize>>>,
}

type Rows<'a> = Vec<Cow<'a, [u64]>>;

#[derive(Default, Serialize)]
struct ByPhase<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    both: Option<Rows<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prefill: Option<Rows<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    decode: Option<Rows<'a>>,
}

impl<'a> ByPhase<'a> {
    fn of(phases: Phases, count: usize, row: impl Fn(Phase, usize) -> &'a [u64]) -> Self {
        let rows = |phase| Some((0..count).map(|i| Cow::Borrowed(row(phase, i))).collect());
        let sum = |i| row(Phase::Prefill, i).iter().zip(row(Phase::Decode, i)).map(|(a, b)| a + b).collect();
        let none = ByPhase::default();
        match phases {
            Phases::Apart => ByPhase { prefill: rows(Phase::Prefill), decode: rows(Phase::Decode), ..none },
            Phases::Both => ByPhase { both: Some((0..count).map(|i| Cow::Owned(sum(i))).collect()), ..none },
            Phases::Only(Phase::Prefill) => ByPhase { prefill: rows(Phase::Prefill), ..none },
            Phases::Only(Phase::Decode) => ByPhase { decode: rows(Phase::Decode), ..none },
        }
    }
}

impl Report {
    /// As asked for.
    pub fn answer(&self, asked: Asked) -> Answer {
        match asked.format {
            Format::Json => self.json(asked),
            Format::Csv => Answer::new(Format::Csv, self.csv()),
        }
    }

    /// Ranks that hold an expert of a layer, ascending, each once.
    fn owners(&self, layer: usize, expert: usize) -> Vec<usize> {
        let per_rank = self.placement.slots_per_rank();
        let slots = self.placement.layer(layer).replicas(expert);
        let mut ranks: Vec<usize> = slots.iter().map(|&slot| slot as usize / per_rank).collect();
        ranks.dedup();
        ranks
    }

    fn replicas(&self, layer: usize, expert: usize) -> usize {
        self.placement.layer(layer).replicas(expert).len()
    }

    /// The counts alone make the tag: a window that has the same tokens a second later says the same.
    fn json(&self, asked: Asked) -> Answer {
        let load = &self.load;
        let layers = 0..load.layer_ids.len();
        let experts = 0..load.experts;
        let body = Body {
            placement_version: self.placement.version(),
            ranks: load.ranks,
            experts: load.experts,
            layer_ids: &load.layer_ids,
            expert_tokens: ByPhase::of(asked.phases, layers.len(), |phase, l| load.experts_of(phase, l)),
            rank_tokens: ByPhase::of(asked.phases, layers.len(), |phase, l| load.ranks_of(phase, l)),
            sent_tokens: ByPhase::of(asked.phases, load.sources, |phase, source| load.sent_by(phase, source)),
            row_bytes: self.row_bytes,
            owner_ranks: asked.owners.then(|| {
                layers.clone().map(|l| experts.clone().map(|e| self.owners(l, e)).collect()).collect()
            }),
            replicas: asked.owners.then(|| {
                layers.clone().map(|l| experts.clone().map(|e| self.replicas(l, e)).collect()).collect()
            }),
        };
        let seconds = (self.seconds * 1e3).round() / 1e3;
        let mut text = format!("{{\"object\":\"expert_load\",\"window_seconds\":{seconds},");
        let time_ends = text.len();
        // The rest goes on inside the same braces.
        text += &serde_json::to_string(&body).expect("counts are JSON")[1..];
        Answer::since(Format::Json, text, time_ends)
    }

    /// One line per layer and expert; owner ranks are separated by semicolons.
    fn csv(&self) -> String {
        let mut csv = String::from("layer,expert,prefill_tokens,decode_tokens,replicas,owner_ranks\n");
        for (layer, id) in self.load.layer_ids.iter().enumerate() {
            let prefill = self.load.experts_of(Phase::Prefill, layer);
            let decode = self.load.experts_of(Phase::Decode, layer);
            for expert in 0..self.load.experts {
                let owners =
                    self.owners(layer, expert).iter().map(usize::to_string).collect::<Vec<_>>().join(";");
                let (prefill, decode, replicas) =
                    (prefill[expert], decode[expert], self.replicas(layer, expert));
                writeln!(csv, "{id},{expert},{prefill},{decode},{replicas},{owners}")
                    .expect("a String takes all");
            }
        }
        csv
    }
}
