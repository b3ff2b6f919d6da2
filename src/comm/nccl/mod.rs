//! Ranks on several GPUs: rows travel by NCCL, in the ranks' streams.
//!
//! All ranks are threads of this process, so host counts and barriers take [`Local`]'s meetings. Sums are made here, in rank
//! order, from rows that NCCL only moves: the same bits as `local`'s. NCCL is a library found at run time ([`Library::load`]);
//! this module is part of every build, and its tests run over a NCCL made of host threads.

mod library;
mod link;
#[cfg(test)]
pub(super) mod mock;
mod pieces;
mod rows;
mod sums;
#[cfg(test)]
mod tests;
mod under_way;
mod watch;

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use super::local::{Local, check_counts, check_parts};
use super::{Communicator, all_or_cause};
use crate::backend::reference::ReferenceBackend;
use crate::backend::{Backend, View, ViewMut};
use crate::error::{Error, Result};
pub use library::Library;
use library::UniqueId;
use link::{Line, Link, Seat};
use pieces::Pieces;
use rows::{Room, Rows};
use watch::Watch;

/// How a world is connected.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// How long connecting all ranks may take.
    pub connect_timeout: Duration,
    /// How long an exchange may take before everything ends.
    pub timeout: Duration,
    /// Some ranks have one GPU together. Then what one rank frees waits for the others' kernels, so the ranks enter every
    /// exchange together and leave it when it is done.
    pub shared_gpu: bool,
    /// Rows that a rank has for itself travel through NCCL too, rather than being copied: what a test on one GPU wants.
    pub loopback: bool,
}

/// One rank's end of a group.
pub struct Nccl {
    link: Arc<Link>,
    /// Counts and meetings.
    host: Local,
    backend: Arc<dyn Backend>,
    watch: Arc<Watch>,
    /// Rows on their way out of memory with gaps.
    packed: Room,
    /// Rows that do not arrive where they belong.
    arrived: Room,
    /// This rank's part of a sum.
    part: Room,
    /// How a sum is divided.
    counts: Vec<usize>,
    /// Of the next exchange.
    pieces: Pieces,
}

impl Nccl {
    /// A world of `backends.len()` ranks, each connected from a thread of its own; give each value to its own thread.
    ///
    /// # Errors
    /// [`Error::Device`] with what NCCL says of the first rank that failed.
    pub fn world(
        library: Arc<Library>,
        backends: &[Arc<dyn Backend>],
        options: Options,
    ) -> Result<Vec<Nccl>> {
        let watch = Watch::start(library, options);
        let hosts = backends.iter().map(|_| Arc::new(ReferenceBackend) as Arc<dyn Backend>).collect();
        let connected: Vec<Result<Nccl>> = std::thread::scope(|scope| {
            let threads: Vec<_> = Local::world(hosts)
                .into_iter()
                .zip(backends)
                .map(|(host, backend)| {
                    let (watch, backend) = (Arc::clone(&watch), Arc::clone(backend));
                    scope.spawn(move || Nccl::connect(host, backend, watch))
                })
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .collect()
        });
        all_or_cause(connected)
    }

    /// Takes the seat that `host` has in its group.
    fn connect(mut host: Local, backend: Arc<dyn Backend>, watch: Arc<Watch>) -> Result<Nccl> {
        let id = agree(&mut host, &watch.library)?;
        let (rank, size) = (host.rank(), host.size());
        let pieces = Pieces::new(rank, watch.options.loopback);
        let link = Link::open(&watch, Seat { rank, size, id, backend: &backend, alarm: host.alarm() })?;
        Ok(Nccl {
            link,
            host,
            backend,
            watch,
            packed: Room::default(),
            arrived: Room::default(),
            part: Room::default(),
            counts: Vec::new(),
            pieces,
        })
    }

    /// Sends and receives the pieces noted, in one group, and forgets them.
    fn exchange(&mut self, what: &str) -> Result<()> {
        let outcome = self
            .enter()
            .and_then(|()| self.pieces.put(&self.link, what, Line::Own))
            .and_then(|()| self.leave());
        self.pieces.clear();
        outcome
    }

    /// [`Nccl::exchange`], while the device does what `meanwhile` gives it.
    fn exchange_beside(&mut self, what: &str, meanwhile: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let outcome = if self.watch.options.shared_gpu {
            // Nothing stands beside an exchange then, as what is put there may allocate.
            meanwhile().and_then(|()| self.exchange(what))
        } else {
            let put = self.pieces.put(&self.link, what, Line::Beside).and_then(|()| meanwhile());
            put.and_then(|()| self.backend.join()).and_then(|()| self.leave())
        };
        self.pieces.clear();
        outcome
    }

    /// Before an exchange: nothing is allocated or freed from here to [`Nccl::leave`].
    fn enter(&mut self) -> Result<()> {
        if !self.watch.options.shared_gpu {
            return Ok(());
        }
        // All earlier work is in the stream: a kernel that is loaded first may wait for those of other ranks.
        self.backend.stream()?;
        self.host.barrier()
    }

    /// After an exchange was put into the stream.
    fn leave(&mut self) -> Result<()> {
        self.link.note()?;
        if self.watch.options.shared_gpu { self.link.drain() } else { Ok(()) }
    }

    /// Copies what a rank has for itself.
    fn keep(&self, rows: View<'_>, out: ViewMut<'_>) -> Result<()> {
        if rows.rows() == 0 || self.watch.options.loopback {
            return Ok(());
        }
        self.backend.copy_rows(rows, out)
    }
}

impl Communicator for Nccl {
    fn rank(&self) -> usize {
        self.host.rank()
    }

    fn size(&self) -> usize {
        self.host.size()
    }

    fn all_reduce_sum(&mut self, x: ViewMut<'_>) -> Result<()> {
        self.sum(x)
    }

    fn reduce_scatter_rows(&mut self, input: View<'_>, counts: &[usize], out: ViewMut<'_>) -> Result<()> {
        check_counts(self.size(), counts, input.rows(), "input rows of reduce_scatter_rows");
        let (rank, size, cols) = (self.rank(), self.size(), out.cols());
        let own = counts[rank];
        assert_eq!(out.rows(), own, "output rows of reduce_scatter_rows");
        let backend = Arc::clone(&self.backend);
        let arrived = self.arrived.take(backend.as_ref(), out.dtype(), own * size, cols)?;
        let into = Rows::of(arrived.as_view());
        let from = Rows::of(self.packed.pack(backend.as_ref(), input)?);
        self.pieces.send_parts(from, counts.iter().copied());
        self.pieces.receive_parts(into, std::iter::repeat_n(own, size));
        self.exchange("a sum over ranks")?;
        let start = counts[..rank].iter().sum::<usize>();
        self.add_up((!self.watch.options.loopback).then(|| input.rows_range(start..start + own)), out)
    }

    fn all_gather_rows(&mut self, own: View<'_>, counts: &[usize], mut out: ViewMut<'_>) -> Result<()> {
        check_counts(self.size(), counts, out.rows(), "output rows of all_gather_rows");
        let rank = self.rank();
        assert_eq!(own.rows(), counts[rank], "own rows of all_gather_rows");
        let (rows, cols, dtype) = (out.rows(), out.cols(), out.dtype());
        let start = counts[..rank].iter().sum::<usize>();
        self.keep(own, out.reborrow().rows_range(start..start + own.rows()))?;

        let backend = Arc::clone(&self.backend);
        let direct = out.as_view().is_contiguous();
        let into = match direct {
            true => Rows::of(out.as_view()),
            false => Rows::of(self.arrived.take(backend.as_ref(), dtype, rows, cols)?.as_view()),
        };
        let from = Rows::of(self.packed.pack(backend.as_ref(), own)?);
        for r in 0..counts.len() {
            self.pieces.send(from.piece(r, 0..from.rows));
        }
        self.pieces.receive_parts(into, counts.iter().copied());
        self.exchange("gathering rows")?;
        if direct { Ok(()) } else { self.unpack(out, start..start + own.rows()) }
    }

    fn all_gather_equal(
        &mut self,
        parts: &mut [(View<'_>, ViewMut<'_>)],
        meanwhile: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        let (rank, size) = (self.rank(), self.size());
        check_parts(size, parts);
        for (own, out) in parts {
            let rows = own.rows();
            self.keep(*own, out.reborrow().rows_range(rank * rows..(rank + 1) * rows))?;
            let (from, into) = (Rows::of(*own), Rows::of(out.as_view()));
            for r in 0..size {
                self.pieces.send(from.piece(r, 0..rows));
            }
            self.pieces.receive_parts(into, std::iter::repeat_n(rows, size));
        }
        self.exchange_beside("gathering rows", meanwhile)
    }

    fn all_gather_counts(&mut self, own: &[u32], out: &mut [u32]) -> Result<()> {
        self.link.check()?;
        self.host.all_gather_counts(own, out)
    }

    fn exchange_counts(&mut self, sent: &[u32], received: &mut [u32]) -> Result<()> {
        self.link.check()?;
        self.host.exchange_counts(sent, received)
    }

    fn all_to_all_rows(
        &mut self,
        rows: View<'_>,
        sent: &[usize],
        mut out: ViewMut<'_>,
        received: &[usize],
    ) -> Result<()> {
        check_counts(self.size(), sent, rows.rows(), "rows sent by all_to_all_rows");
        check_counts(self.size(), received, out.rows(), "rows received by all_to_all_rows");
        let rank = self.rank();
        assert_eq!(sent[rank], received[rank], "rows of rank {rank} for itself");
        let place = |counts: &[usize]| {
            let start = counts[..rank].iter().sum::<usize>();
            start..start + counts[rank]
        };
        let kept = place(received);
        self.keep(rows.rows_range(place(sent)), out.reborrow().rows_range(kept.clone()))?;

        let backend = Arc::clone(&self.backend);
        let direct = out.as_view().is_contiguous();
        let into = match direct {
            true => Rows::of(out.as_view()),
            false => {
                Rows::of(self.arrived.take(backend.as_ref(), out.dtype(), out.rows(), out.cols())?.as_view())
            }
        };
        let from = Rows::of(self.packed.pack(backend.as_ref(), rows)?);
        self.pieces.send_parts(from, sent.iter().copied());
        self.pieces.receive_parts(into, received.iter().copied());
        self.exchange("all-to-all")?;
        if direct { Ok(()) } else { self.unpack(out, kept) }
    }

    fn send_receive_rows(
        &mut self,
        sent: Option<(usize, View<'_>)>,
        mut received: Option<(usize, ViewMut<'_>)>,
    ) -> Result<()> {
        let backend = Arc::clone(&self.backend);
        let prepared = self.prepare_pair(&backend, sent, received.as_mut());
        // [to, rows, columns] of what this rank sends, and whether it can do its part.
        let mut label = [u32::MAX, 0, 0, u32::from(prepared.is_ok())];
        if let Some((to, rows)) = &sent {
            label[..3].copy_from_slice(&[*to as u32, rows.rows() as u32, rows.cols() as u32]);
        }
        let mut labels = vec![0; 4 * self.size()];
        self.all_gather_counts(&label, &mut labels)?;
        let ready = |r: usize| labels[4 * r + 3] == 1;
        if let Some((from, out)) = &received {
            let expected = [self.rank() as u32, out.rows() as u32, out.cols() as u32];
            assert_eq!(labels[4 * from..][..3], expected, "[to, rows, cols] of what rank {from} sends");
        }
        // Only pairs that are both ready meet.
        let mine = prepared.is_ok();
        self.pieces.retain(|rank| mine && ready(rank));
        self.exchange("passing rows on")?;
        prepared?;
        match received {
            Some((from, _)) if !ready(from) => Err(Error::Device {
                device: format!("rank {from}"),
                why: format!("its rows for rank {} could not be sent", self.rank()),
            }),
            Some((from, out)) if !out.as_view().is_contiguous() => {
                let own = if from == self.rank() { 0..out.rows() } else { 0..0 };
                self.unpack(out, own)
            }
            _ => Ok(()),
        }
    }

    fn barrier(&mut self) -> Result<()> {
        self.link.check()?;
        self.host.barrier()
    }

    fn waited(&self) -> Duration {
        self.host.waited()
    }

    fn split(&mut self, color: usize) -> Result<Box<dyn Communicator>> {
        let host = self.host.divide(color)?;
        Ok(Box::new(Nccl::connect(host, Arc::clone(&self.backend), Arc::clone(&self.watch))?))
    }
}

impl Nccl {
    /// Notes the pieces of [`Communicator::send_receive_rows`], or copies what stays here.
    fn prepare_pair(
        &mut self,
        backend: &Arc<dyn Backend>,
        sent: Option<(usize, View<'_>)>,
        received: Option<&mut (usize, ViewMut<'_>)>,
    ) -> Result<()> {
        self.pieces.clear();
        let own = self.rank();
        match (sent, received) {
            (Some((to, rows)), Some((from, out))) if to == own && *from == own => {
                self.keep(rows, out.reborrow())?;
                if self.watch.options.loopback {
                    self.note_pair(backend, Some((to, rows)), Some((*from, out)))?;
                }
                Ok(())
            }
            (sent, received) => self.note_pair(backend, sent, received.map(|(from, out)| (*from, out))),
        }
    }

    fn note_pair(
        &mut self,
        backend: &Arc<dyn Backend>,
        sent: Option<(usize, View<'_>)>,
        received: Option<(usize, &mut ViewMut<'_>)>,
    ) -> Result<()> {
        if let Some((to, rows)) = sent {
            let rows = Rows::of(self.packed.pack(backend.as_ref(), rows)?);
            self.pieces.send(rows.piece(to, 0..rows.rows));
        }
        if let Some((from, out)) = received {
            let view = out.as_view();
            let into = match view.is_contiguous() {
                true => Rows::of(view),
                false => {
                    let (rows, cols) = (view.rows(), view.cols());
                    Rows::of(self.arrived.take(backend.as_ref(), view.dtype(), rows, cols)?.as_view())
                }
            };
            self.pieces.receive(into.piece(from, 0..into.rows));
        }
        Ok(())
    }

    /// Copies rows from `arrived` to where they belong, but those in `kept`, which are there.
    fn unpack(&self, mut out: ViewMut<'_>, kept: Range<usize>) -> Result<()> {
        let arrived = self.arrived.view(out.dtype(), out.rows(), out.cols());
        let kept = if self.watch.options.loopback { 0..0 } else { kept };
        for range in [0..kept.start, kept.end..out.rows()] {
            if !range.is_empty() {
                self.backend
                    .copy_rows(arrived.rows_range(range.clone()), out.reborrow().rows_range(range))?;
            }
        }
        Ok(())
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        // Whoever waits for this rank on the host goes on at once; who waits on a device is freed by the watch.
        self.host.alarm().raise(&format!("rank {} of this group failed or left", self.host.rank()));
        self.link.close();
    }
}

/// Rank 0 names the group, the others hear of it.
fn agree(host: &mut Local, library: &Library) -> Result<UniqueId> {
    let mut own = [0u32; 32];
    if host.rank() == 0 {
        let named = library.unique_id();
        let id = named.map_err(|why| Error::Device {
            device: library.describe(),
            why: format!("naming a group: {why}"),
        })?;
        own = bytemuck::cast(id.bytes);
    }
    let mut all = vec![0u32; 32 * host.size()];
    host.all_gather_counts(&own, &mut all)?;
    let mut id = UniqueId { bytes: [0; 128] };
    id.bytes.copy_from_slice(bytemuck::cast_slice(&all[..32]));
    Ok(id)
}
