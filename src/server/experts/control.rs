//! Moving experts by hand: `PUT /v1/experts/placement` to where a file says, `POST /v1/experts/rebalance` to where the
//! recent load would have them. Both can be asked first what they would do.

use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::extract::{RawQuery, Request, State};
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use router_sim::placement::{
    self, ClusterShape, Expected, MAX_SLOTS, Placement, PlacementFile, PlanOptions, PolicyName,
};
use serde::Serialize;

use super::super::body;
use super::super::error::{ApiError, clip};
use super::super::fields::Fields;
use super::super::state::AppState;
use super::forecast::Forecast;
use super::query::{one_of, pairs};
use super::{DEFAULT_WINDOW_S, experts, locked};
use crate::engine::MoveCost;
use crate::error::Error;

/// Balance that is not worth a byte.
const NOTHING: f64 = 1e-4;

/// What happens, or would happen.
#[derive(Serialize)]
struct Change {
    object: &'static str,
    dry_run: bool,
    /// Experts have begun to move.
    started: bool,
    /// In force now.
    placement_version: u64,
    /// In force when all have arrived; `None` when nothing moves.
    target_version: Option<u64>,
    /// On the load of the last minute; `None` without tokens.
    balancedness: Option<Forecast>,
    /// Part of the busiest ranks' rows that is saved.
    gain_ratio: Option<f64>,
    moves: u64,
    bytes: u64,
    reason: String,
}

/// `PUT /v1/experts/placement?dry_run=true|false`: a placement file, moeyard's or SGLang's.
pub(in crate::server) async fn put_placement(
    State(state): State<Arc<AppState>>,
    RawQuery(query): RawQuery,
    request: Request,
) -> Result<Response, ApiError> {
    let dry_run = dry_run(query.as_deref().unwrap_or_default())?;
    let current = movable(&state)?;
    let body = body::read_json(request, &state.options).await?;
    let file = read(&body)?;
    plan(state, dry_run, "placement_change", move |_| Ok(Ok(fitting(file, &current)?))).await
}

/// `POST /v1/experts/rebalance` with `{"dry_run": bool, "policy": name, "max_transfers": n}`, all optional.
pub(in crate::server) async fn rebalance(
    State(state): State<Arc<AppState>>,
    request: Request,
) -> Result<Response, ApiError> {
    let body = body::read_json(request, &state.options).await?;
    let mut fields = Fields::parse(if body.is_empty() { b"{}" } else { &body })?;
    let dry_run = fields.boolean("dry_run")?.unwrap_or(false);
    let max_transfers = fields.integer("max_transfers", 1, MAX_SLOTS as i64)?.map(|n| n as usize);
    let asked = fields.take::<String>("policy", "the name of a policy")?;
    fields.finish(&[])?;
    let policy = policy(asked.as_deref(), state.engine.rebalance_status().policy)?;
    if let (PolicyName::Eplb, Some(limit)) = (policy, max_transfers) {
        let why = format!(
            "max_transfers is {limit}, but the policy eplb plans from scratch and keeps to no limit."
        );
        return Err(ApiError::bad_param("max_transfers", why));
    }
    let current = movable(&state)?;
    plan(state, dry_run, "rebalance", move |state| {
        let load = experts(state)?.recent(DEFAULT_WINDOW_S, Instant::now()).to_window();
        if (0..load.layers()).all(|layer| load.totals(layer).sum::<u64>() == 0) {
            return Ok(Err(format!(
                "no token was routed in the last {DEFAULT_WINDOW_S} s, so there is no load to plan on"
            )));
        }
        let shape = ClusterShape { ranks: current.ranks(), redundant: current.slots() - current.experts() };
        let options = PlanOptions { max_transfers, ..PlanOptions::default() };
        let target = placement::plan(policy, &[load], &shape, Some(&current), options);
        target.map(Ok).map_err(|why| ApiError::from(Error::Routing(why)))
    })
    .await
}

/// The policy that was asked for, else the one that the rebalancer plans with (empty when it is off), else moeyard's own.
fn policy(asked: Option<&str>, live: &str) -> Result<PolicyName, ApiError> {
    let known = [("moeyard", PolicyName::BEST), ("eplb", PolicyName::Eplb)];
    match asked {
        Some(name) => one_of("policy", name, &known),
        None => {
            Ok(known.iter().find(|(name, _)| *name == live).map_or(PolicyName::BEST, |(_, policy)| *policy))
        }
    }
}

/// Makes a target (or says why there is none), says what it would bring and take, and unless it is a dry run goes there.
async fn plan(
    state: Arc<AppState>,
    dry_run: bool,
    object: &'static str,
    target: impl FnOnce(&AppState) -> Result<Result<Placement, String>, ApiError> + Send + 'static,
) -> Result<Response, ApiError> {
    match state.engine.can_move() {
        Err(Error::Conflict(_)) if dry_run => {}
        outcome => outcome.map_err(refused)?,
    }
    let planned = tokio::task::spawn_blocking(move || {
        let change = Change {
            object,
            dry_run,
            started: false,
            placement_version: movable(&state)?.version(),
            target_version: None,
            balancedness: None,
            gain_ratio: None,
            moves: 0,
            bytes: 0,
            reason: String::new(),
        };
        match target(&state)? {
            Ok(target) => change.towards(&state, target),
            Err(reason) => Ok(Change { reason, ..change }),
        }
    });
    let change = planned.await.unwrap_or_else(|panic| Err(ApiError::internal(&panic)))?;
    let status = if change.started { StatusCode::ACCEPTED } else { StatusCode::OK };
    Ok((status, Json(change)).into_response())
}

impl Change {
    fn towards(mut self, state: &AppState, target: Placement) -> Result<Change, ApiError> {
        let current = movable(state)?;
        let MoveCost { arrivals, bytes, rounds } = state.engine.move_cost(&target).map_err(refused)?;
        let load = experts(state)?.recent(DEFAULT_WINDOW_S, Instant::now()).to_window();
        let split = state.engine.rebalance_status().split;
        self.balancedness = Forecast::of(&load, split, &current, &target).map_err(Error::Routing)?;
        self.gain_ratio = self.balancedness.map(|forecast| (forecast.gain * 1e4).round() / 1e4);
        (self.moves, self.bytes, self.placement_version) = (arrivals, bytes, current.version());
        if rounds == 0 {
            self.reason = "that placement is in force already".into();
            return Ok(self);
        }
        if self.object == "rebalance"
            && let Some(Forecast { before, after, bound, .. }) =
                self.balancedness.filter(|f| f.gain < NOTHING)
        {
            (self.moves, self.bytes) = (0, 0);
            self.reason = format!(
                "no better placement was found: balancedness {before} would become {after}, at best {bound} with as many slots"
            );
            return Ok(self);
        }
        self.target_version = Some(current.version() + rounds);
        self.reason = match self.balancedness {
            Some(Forecast { before, after, .. }) => format!(
                "{arrivals} experts move; balancedness {before} becomes {after} on the load of the last {DEFAULT_WINDOW_S} s"
            ),
            None => format!("{arrivals} experts move; no token was routed in the last {DEFAULT_WINDOW_S} s"),
        };
        if !self.dry_run {
            state.check_serving()?;
            // How it ends is in the log, in /v1/experts/rebalance and in the metrics.
            drop(state.engine.move_to(target).map_err(refused)?);
            let (version, foretold) = (current.version() + rounds, self.balancedness.map(|f| f.after));
            locked(&experts(state)?.balance).foretell(version, foretold);
            self.started = true;
            tracing::info!(
                version = self.target_version,
                bytes,
                "an operator moves experts: {}",
                self.reason
            );
        }
        Ok(self)
    }
}

/// The placement in force, where experts can move at all.
fn movable(state: &AppState) -> Result<Arc<Placement>, ApiError> {
    experts(state)?;
    let placement = state.engine.placement();
    let placement =
        placement.ok_or_else(|| ApiError::unavailable("The engine does not tell where its experts live."))?;
    if placement.ranks() == 1 {
        let why = "Experts cannot move: there is 1 expert-parallel rank (--expert-parallel-size).";
        return Err(ApiError::conflict(why));
    }
    Ok(placement)
}

/// The placement file that a body is.
fn read(body: &[u8]) -> Result<PlacementFile, ApiError> {
    let refuse = |why: String| ApiError::bad_request(format!("The placement: {}", clip(&why)));
    let text = std::str::from_utf8(body).map_err(|error| refuse(error.to_string()))?;
    PlacementFile::parse(text).map_err(|error| refuse(error.to_string()))
}

/// The placement that a file says, for the world of the one in force.
fn fitting(file: PlacementFile, current: &Placement) -> Result<Placement, ApiError> {
    let expected =
        Expected { ranks: Some(current.ranks()), experts: current.experts(), layer_ids: current.layer_ids() };
    file.check(&expected).map_err(|why| refused(Error::Routing(why)))
}

/// A target that the engine cannot have is the client's doing here: well-formed, and in conflict with what runs.
fn refused(error: Error) -> ApiError {
    match error {
        error @ (Error::Config { .. } | Error::Routing(_)) => ApiError::conflict(error.to_string()),
        other => ApiError::from(other),
    }
}

fn dry_run(query: &str) -> Result<bool, ApiError> {
    let mut dry_run = None;
    for (key, value) in pairs(query) {
        if key != "dry_run" || dry_run.is_some() {
            let why = format!("The only parameter is dry_run, once; got \"{}\".", clip(key));
            return Err(ApiError::bad_param(clip(key), why));
        }
        dry_run = Some(one_of(key, value, &[("true", true), ("false", false)])?);
    }
    Ok(dry_run.unwrap_or(false))
}
