//! The rare records: placements that change, decisions, moves, losses. JSON, so that fields can be added.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::header::TraceHeader;
use super::tag;
use crate::load::{LoadWindow, Phase};
use crate::placement::{Placement, PlacementFile};

/// Something that happened between two steps.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// Another placement came into force.
    Switch(Switch),
    /// The rebalancer decided.
    Decision(Box<Decision>),
    /// Weights arrived in their new slots.
    Moves(Moves),
    /// A migration came to nothing.
    Failure(Failure),
}

/// From `step` on, dispatch uses `placement`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Switch {
    /// First step under it.
    pub step: u64,
    /// The new map with its version number.
    pub placement: Placement,
}

/// A decision with everything it was made from, so that a replay decides alike.
#[derive(Debug, Clone, PartialEq)]
pub struct Decision {
    /// Made before this step ran.
    pub step: u64,
    /// What asked for it: an interval, a threshold, an operator.
    pub trigger: String,
    /// Steps that the load was summed over.
    pub window_steps: u64,
    /// The load that it looked at.
    pub load: LoadWindow,
    /// Version of the placement that was in force.
    pub current_version: u64,
    /// Other numbers that entered, with the unit last in each name; finite.
    pub inputs: BTreeMap<String, f64>,
    /// The figures that it came to, likewise.
    pub forecast: BTreeMap<String, f64>,
    /// The placement to move to; `None` leaves things as they are.
    pub chosen: Option<Placement>,
    /// Why, in words for people.
    pub reason: String,
}

/// The copies of one migration have arrived.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moves {
    /// Complete before this step ran.
    pub step: u64,
    /// Version of the placement that they make possible.
    pub version: u64,
    /// Slots whose weights were replaced, over all layers.
    pub slots: u64,
    /// Bytes that travelled.
    pub bytes: u64,
    /// From the first byte to the last, in microseconds.
    pub duration_us: u64,
}

/// A migration was given up; the placement in force stays.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Given up before this step ran.
    pub step: u64,
    /// Why, in words for people.
    pub reason: String,
}

/// Records that are missing here because the writer could not keep up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    /// First step that lost a record.
    pub first_step: u64,
    /// Last one.
    pub last_step: u64,
    /// Step records lost.
    pub steps: u64,
    /// Events lost.
    pub events: u64,
}

/// The last record of a finished trace.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// Step records handed to the writer, lost ones included.
    pub steps: u64,
    /// Step records lost.
    pub lost_steps: u64,
    /// Events lost.
    pub lost_events: u64,
}

#[derive(Serialize, Deserialize)]
struct SwitchFields {
    step: u64,
    placement_version: u64,
    placement: PlacementFile,
}

#[derive(Serialize, Deserialize)]
struct DecisionFields {
    step: u64,
    trigger: String,
    window_steps: u64,
    /// `[layers][experts]`
    prefill: Vec<Vec<u64>>,
    /// `[layers][experts]`
    decode: Vec<Vec<u64>>,
    current_version: u64,
    inputs: BTreeMap<String, f64>,
    #[serde(default)]
    forecast: BTreeMap<String, f64>,
    chosen: Option<ChosenFields>,
    reason: String,
}

#[derive(Serialize, Deserialize)]
struct ChosenFields {
    placement_version: u64,
    placement: PlacementFile,
}

impl Event {
    /// The step it belongs before.
    pub fn step(&self) -> u64 {
        match self {
            Event::Switch(switch) => switch.step,
            Event::Decision(decision) => decision.step,
            Event::Moves(moves) => moves.step,
            Event::Failure(failure) => failure.step,
        }
    }

    pub(super) fn tag(&self) -> u8 {
        match self {
            Event::Switch(_) => tag::SWITCH,
            Event::Decision(_) => tag::DECISION,
            Event::Moves(_) => tag::MOVES,
            Event::Failure(_) => tag::FAILURE,
        }
    }

    /// Appends the payload of its record.
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Event::Switch(Switch { step, placement }) => {
                let (placement_version, placement) = (placement.version(), placement.to_file());
                put_json(out, &SwitchFields { step: *step, placement_version, placement });
            }
            Event::Decision(decision) => put_json(out, &DecisionFields::of(decision)),
            Event::Moves(moves) => put_json(out, moves),
            Event::Failure(failure) => put_json(out, failure),
        }
    }

    /// Reads an event; `None` for a tag that is none.
    pub(super) fn decode(tag: u8, payload: &[u8], header: &TraceHeader) -> Option<Result<Event, String>> {
        Some(match tag {
            tag::SWITCH => take_json(payload).and_then(|fields: SwitchFields| {
                let placement = take_placement(fields.placement, fields.placement_version, header)?;
                Ok(Event::Switch(Switch { step: fields.step, placement }))
            }),
            tag::DECISION => take_json(payload)
                .and_then(|fields: DecisionFields| fields.check(header))
                .map(|decision| Event::Decision(Box::new(decision))),
            tag::MOVES => take_json(payload).map(Event::Moves),
            tag::FAILURE => take_json(payload).map(Event::Failure),
            _ => return None,
        })
    }
}

impl DecisionFields {
    fn of(decision: &Decision) -> Self {
        let load = &decision.load;
        let rows = |phase| (0..load.layers()).map(|layer| load.counts(phase, layer).to_vec()).collect();
        let chosen = decision.chosen.as_ref().map(|placement| ChosenFields {
            placement_version: placement.version(),
            placement: placement.to_file(),
        });
        DecisionFields {
            step: decision.step,
            trigger: decision.trigger.clone(),
            window_steps: decision.window_steps,
            prefill: rows(Phase::Prefill),
            decode: rows(Phase::Decode),
            current_version: decision.current_version,
            inputs: decision.inputs.clone(),
            forecast: decision.forecast.clone(),
            chosen,
            reason: decision.reason.clone(),
        }
    }

    fn check(self, header: &TraceHeader) -> Result<Decision, String> {
        let (layers, experts) = (header.placement.layers(), header.placement.experts());
        let mut load = LoadWindow::new(header.placement.layer_ids(), experts);
        for (phase, rows) in [(Phase::Prefill, &self.prefill), (Phase::Decode, &self.decode)] {
            if rows.len() != layers || rows.iter().any(|row| row.len() != experts) {
                return Err(format!("the load of a decision is not [{layers} layers][{experts} experts]"));
            }
            for (layer, row) in rows.iter().enumerate() {
                load.counts_mut(phase, layer).copy_from_slice(row);
            }
        }
        let take = |chosen: ChosenFields| take_placement(chosen.placement, chosen.placement_version, header);
        Ok(Decision {
            step: self.step,
            trigger: self.trigger,
            window_steps: self.window_steps,
            load,
            current_version: self.current_version,
            inputs: self.inputs,
            forecast: self.forecast,
            chosen: self.chosen.map(take).transpose()?,
            reason: self.reason,
        })
    }
}

fn take_placement(file: PlacementFile, version: u64, header: &TraceHeader) -> Result<Placement, String> {
    let placement = file.check(&header.expected()).map_err(|e| e.to_string())?;
    Ok(placement.with_version(version))
}

/// Appends JSON. A number that JSON cannot hold (NaN, infinity) is written as null and refused by the reader.
pub(super) fn put_json<T: Serialize>(out: &mut Vec<u8>, value: &T) {
    serde_json::to_writer(out, value).expect("plain fields in a Vec");
}

pub(super) fn take_json<'a, T: Deserialize<'a>>(payload: &'a [u8]) -> Result<T, String> {
    serde_json::from_slice(payload).map_err(|e| e.to_string())
}
