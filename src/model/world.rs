//! Loads a model on all ranks of this process, one thread each.

use std::sync::Arc;
use std::thread;

use router_sim::placement::Placement;
use router_sim::split::Split;

use crate::backend::{Backend, Precision};
use crate::comm::solo::Solo;
use crate::comm::{self, Communicator, Transport};
use crate::error::{Error, Result};
use crate::layers::Rank;
use crate::metrics::{RankMeter, WorkClock};
use crate::model::StepOutput;
use crate::model::load::{Experts, Sizes, load};
use crate::model::transformer::Transformer;
use crate::moe::load::LoadCounters;
use crate::spec::ModelSpec;
use crate::weights::WeightReader;

/// How the world is divided. World rank = data-parallel rank * `tensor_parallel` + tensor-parallel rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Degrees {
    /// Ranks that share a batch.
    pub tensor_parallel: usize,
    /// Groups with batches of their own.
    pub data_parallel: usize,
    /// Ranks that share each expert; divides the world.
    pub expert_tp: usize,
}

impl Degrees {
    /// One rank.
    pub const SOLO: Degrees = Degrees { tensor_parallel: 1, data_parallel: 1, expert_tp: 1 };

    /// Ranks in all.
    pub fn world(&self) -> usize {
        self.tensor_parallel * self.data_parallel
    }

    /// Ranks a placement knows: each holds whole experts, by itself or together with its part-mates.
    pub fn expert_parallel(&self) -> usize {
        self.world() / self.expert_tp
    }
}

/// A loaded rank.
pub struct LoadedRank {
    /// The model with its share of the weights.
    pub model: Transformer,
    /// Where its steps put their results.
    pub output: StepOutput,
    /// Its device.
    pub backend: Arc<dyn Backend>,
    /// The data-parallel rank it belongs to.
    pub dp_rank: usize,
    /// What its time goes into.
    pub meter: Arc<RankMeter>,
}

/// What all ranks have in common.
#[derive(Clone)]
pub struct WorldOptions {
    /// Division of the world.
    pub degrees: Degrees,
    /// How its ranks exchange rows.
    pub transport: Transport,
    /// Types of weights and activations.
    pub precision: Precision,
    /// Where experts live, on `degrees.expert_parallel()` ranks.
    pub placement: Arc<Placement>,
    /// How the rows of an expert are shared out among its replicas.
    pub split: Split,
    /// Sizes of what is not weights.
    pub sizes: Sizes,
    /// Where each rank's router counts; one per rank.
    pub counters: Vec<Arc<LoadCounters>>,
}

/// Loads every rank in parallel, one backend each, and returns them in rank order.
///
/// # Errors
/// Of connecting, or of the lowest rank that failed by itself. [`Error::Device`] too when a device runs out of memory.
///
/// # Panics
/// When the numbers of backends and ranks differ, or the placement is for another world.
pub fn load_world(
    reader: WeightReader<'_>,
    spec: &ModelSpec,
    backends: Vec<Arc<dyn Backend>>,
    options: &WorldOptions,
) -> Result<Vec<LoadedRank>> {
    let degrees = options.degrees;
    assert_eq!(backends.len(), degrees.world(), "one backend per rank");
    assert_eq!(options.counters.len(), degrees.world(), "one set of counters per rank");
    assert_eq!(options.placement.ranks(), degrees.expert_parallel(), "ranks of the placement");
    let ends = comm::connect(&options.transport, &backends)?;
    let results: Vec<Result<LoadedRank>> = thread::scope(|scope| {
        let threads: Vec<_> = ends
            .into_iter()
            .zip(backends)
            .map(|(world, backend)| scope.spawn(move || load_rank(reader, spec, world, backend, options)))
            .collect();
        threads
            .into_iter()
            .map(|t| t.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    comm::all_or_cause(results).map_err(|error| match error {
        // What was planned fits: the device has less than it told, and may have more at the next try.
        Error::Memory { device, sum } => {
            Error::Device { device, why: format!("out of memory while loading: {sum}") }
        }
        other => other,
    })
}

fn load_rank(
    reader: WeightReader<'_>,
    spec: &ModelSpec,
    mut world: Box<dyn Communicator>,
    backend: Arc<dyn Backend>,
    options: &WorldOptions,
) -> Result<LoadedRank> {
    let counters = Arc::clone(&options.counters[world.rank()]);
    let dp_rank = world.rank() / options.degrees.tensor_parallel;
    let tp = match options.degrees.tensor_parallel {
        1 => Box::new(Solo::new(Arc::clone(&backend))) as Box<dyn Communicator>,
        _ => world.split(dp_rank)?,
    };
    let rank = Rank {
        backend: Arc::clone(&backend),
        world,
        tp,
        expert_tp: options.degrees.expert_tp,
        precision: options.precision,
        clock: WorkClock::new(Arc::clone(&counters.meter)),
    };
    let meter = Arc::clone(&counters.meter);
    let experts = Experts { placement: Arc::clone(&options.placement), split: options.split, counters };
    let (model, output) = load(reader, spec, rank, experts, options.sizes)?;
    Ok(LoadedRank { model, output, backend, dp_rank, meter })
}
