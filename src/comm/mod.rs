//! Ranks exchanging rows. [`Communicator`] speaks rows of activations and small host counts; `solo` is the
//! world of one, `local` connects ranks that are threads of this process, over any backend, `nccl` those that have a GPU each.

pub mod local;
mod meeting;
pub mod nccl;
pub mod solo;
#[cfg(test)]
pub(crate) mod tests;

use std::sync::Arc;
use std::time::Duration;

use crate::backend::{Backend, View, ViewMut};
use crate::error::{Error, Result};

/// One rank's end of a group. All ranks of a group call the same methods in the same order; a rank that has no rows
/// calls with zero rows. When a rank fails or leaves, the calls of the others return [`crate::Error::Peer`] instead
/// of waiting for ever.
pub trait Communicator: Send {
    /// This rank's number in the group, `0..size`.
    fn rank(&self) -> usize;

    /// Ranks in the group.
    fn size(&self) -> usize;

    /// Replaces `x` (f32) by the sum over ranks, added in rank order: the same bits on every rank.
    fn all_reduce_sum(&mut self, x: ViewMut<'_>) -> Result<()>;

    /// Sums `input` `[sum(counts), cols]` (f32) over ranks in rank order and leaves rank r the rows
    /// `counts[..r].sum()..counts[..=r].sum()` in `out`. `counts` has `size` entries and is equal on all ranks.
    fn reduce_scatter_rows(&mut self, input: View<'_>, counts: &[usize], out: ViewMut<'_>) -> Result<()>;

    /// Concatenates every rank's rows in rank order into `out` `[sum(counts), cols]`; bits are copied.
    fn all_gather_rows(&mut self, own: View<'_>, counts: &[usize], out: ViewMut<'_>) -> Result<()>;

    /// [`Communicator::all_gather_rows`] of several parts at once, each of its own type and without gaps, of which every rank has equally
    /// many rows. What `meanwhile` gives the device may run while the rows travel; it has nothing to do with them.
    fn all_gather_equal(
        &mut self,
        parts: &mut [(View<'_>, ViewMut<'_>)],
        meanwhile: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()>;

    /// Concatenates every rank's numbers in rank order; `out.len() == own.len() * size`.
    fn all_gather_counts(&mut self, own: &[u32], out: &mut [u32]) -> Result<()>;

    /// `received[r]` becomes what rank r has in its `sent[this rank]`.
    fn exchange_counts(&mut self, sent: &[u32], received: &mut [u32]) -> Result<()>;

    /// Sends `sent[r]` consecutive rows of `rows` to each rank r, in rank order, and fills `out` with
    /// `received[r]` rows of each rank r, in rank order. Bits are copied. Rows a rank sends to itself take the same way.
    fn all_to_all_rows(
        &mut self,
        rows: View<'_>,
        sent: &[usize],
        out: ViewMut<'_>,
        received: &[usize],
    ) -> Result<()>;

    /// Sends rows to one rank and receives rows of the same shape and type from one, either of them optional and either of them
    /// this rank itself. Every rank of the group calls, those without rows too; who sends and who receives fit together. Bits
    /// are copied.
    ///
    /// # Errors
    /// [`crate::Error::Peer`] as everywhere. After any other error the group is still in step: the rows are lost, nothing else.
    fn send_receive_rows(
        &mut self,
        sent: Option<(usize, View<'_>)>,
        received: Option<(usize, ViewMut<'_>)>,
    ) -> Result<()>;

    /// Waits until every rank of the group is here.
    fn barrier(&mut self) -> Result<()>;

    /// All the time that this end has waited for other ranks. Never falls. Zero where the device waits by itself.
    fn waited(&self) -> Duration {
        Duration::ZERO
    }

    /// Divides the group: ranks with equal `color` form a new one, ordered by their rank here. Collective.
    fn split(&mut self, color: usize) -> Result<Box<dyn Communicator>>;
}

/// How the ranks of a world exchange rows.
#[derive(Clone)]
pub enum Transport {
    /// By copies between the ranks' memory; the world of one copies to itself.
    Local,
    /// By NCCL.
    Nccl(Arc<nccl::Library>, nccl::Options),
}

/// Connects one rank per backend; in rank order.
///
/// # Errors
/// [`crate::Error::Device`] when NCCL fails.
pub fn connect(transport: &Transport, backends: &[Arc<dyn Backend>]) -> Result<Vec<Box<dyn Communicator>>> {
    Ok(match (transport, backends) {
        (Transport::Local, [only]) => vec![Box::new(solo::Solo::new(Arc::clone(only)))],
        (Transport::Local, _) => boxed(local::Local::world(backends.to_vec())),
        (Transport::Nccl(library, options), _) => {
            boxed(nccl::Nccl::world(Arc::clone(library), backends, *options)?)
        }
    })
}

/// What all ranks made, in rank order, or the error of the first that failed by itself: the others only saw it fail.
///
/// # Errors
/// As told.
pub fn all_or_cause<T>(outcomes: impl IntoIterator<Item = Result<T>>) -> Result<Vec<T>> {
    let (mut made, mut failure) = (Vec::new(), None);
    for outcome in outcomes {
        match outcome {
            Ok(one) => made.push(one),
            Err(error) if matches!(failure, None | Some(Error::Peer { .. })) => failure = Some(error),
            Err(_) => {}
        }
    }
    failure.map_or(Ok(made), Err)
}

fn boxed<C: Communicator + 'static>(ranks: Vec<C>) -> Vec<Box<dyn Communicator>> {
    ranks.into_iter().map(|rank| Box::new(rank) as _).collect()
}
