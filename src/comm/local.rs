//! Ranks that are threads of this process, over any backend.
//!
//! Every rank owns two mailboxes. A collective is: copy what you offer into your mailbox, meet at the barrier, copy
//! what you need out of the others'. Collectives alternate between the two mailboxes, so one meeting each suffices:
//! a mailbox is written again only two meetings later, when every reader has passed the one in between.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use super::Communicator;
use super::meeting::Meeting;
use crate::backend::{Backend, DType, Event, Tensor, View, ViewMut};
use crate::error::{Error, Result};

/// One rank's end of a group of threads.
pub struct Local {
    group: Arc<Group>,
    backend: Arc<dyn Backend>,
    rank: usize,
    /// Collectives so far; its parity picks the mailbox.
    calls: u64,
    /// Splits so far; names the next subgroups.
    splits: u64,
    /// Time spent in meetings.
    waited: Duration,
}

/// What the ranks of one group share.
struct Group {
    meeting: Meeting,
    /// `[rank][parity]`
    mailboxes: Vec<[RwLock<Mailbox>; 2]>,
    /// Groups being made by [`Local::split`], by (which split, color).
    subgroups: Mutex<HashMap<(u64, usize), Arc<Group>>>,
}

/// What a rank offers to the others.
#[derive(Default)]
struct Mailbox {
    rows: HashMap<DType, Tensor>,
    counts: Vec<u32>,
    /// The rank's work up to its offer, reads of the collective before included.
    offered: Event,
}

impl Local {
    /// A world of `backends.len()` ranks; give each value to its own thread.
    pub fn world(backends: Vec<Arc<dyn Backend>>) -> Vec<Local> {
        let group = Arc::new(Group::new(backends.len()));
        backends
            .into_iter()
            .enumerate()
            .map(|(rank, backend)| Local::new(Arc::clone(&group), backend, rank))
            .collect()
    }

    fn new(group: Arc<Group>, backend: Arc<dyn Backend>, rank: usize) -> Local {
        Local { group, backend, rank, calls: 0, splits: 0, waited: Duration::ZERO }
    }

    /// This rank's mailbox for the current collective.
    fn own(&self) -> &RwLock<Mailbox> {
        &self.group.mailboxes[self.rank][self.parity()]
    }

    /// Rank `r`'s mailbox for the current collective.
    fn of(&self, r: usize) -> &RwLock<Mailbox> {
        &self.group.mailboxes[r][self.parity()]
    }

    fn parity(&self) -> usize {
        (self.calls % 2) as usize
    }

    /// Copies rows into this rank's mailbox, growing it when needed.
    fn offer_rows(&self, rows: View<'_>) -> Result<()> {
        let elements = rows.rows() * rows.cols();
        let mut mailbox = self.own().write().unwrap_or_else(PoisonError::into_inner);
        let room = mailbox.rows.get(&rows.dtype()).map_or(0, Tensor::cols);
        if room < elements {
            let tensor = self.backend.alloc(rows.dtype(), 1, elements.next_power_of_two())?;
            mailbox.rows.insert(rows.dtype(), tensor);
        }
        if elements == 0 {
            return Ok(());
        }
        let tensor = mailbox.rows.get_mut(&rows.dtype()).expect("grown above");
        self.backend.copy_rows(rows, tensor.reshaped_mut(rows.rows(), rows.cols()))
    }

    fn offer_counts(&self, counts: &[u32]) {
        let mut mailbox = self.own().write().unwrap_or_else(PoisonError::into_inner);
        mailbox.counts.clear();
        mailbox.counts.extend_from_slice(counts);
    }

    /// Hands the rows `range` out of what rank `r` offered, read as rows of `cols` elements, to `take`.
    fn take_rows(
        &self,
        r: usize,
        range: Range<usize>,
        (dtype, cols): (DType, usize),
        take: impl FnOnce(View<'_>) -> Result<()>,
    ) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let mailbox = self.of(r).read().unwrap_or_else(PoisonError::into_inner);
        let tensor = mailbox.rows.get(&dtype).expect("all ranks call the same collective");
        take(tensor.reshaped(range.end, cols).rows_range(range))
    }

    /// Fills `out` with the rows that rank `from` offered to this one.
    fn take_sent(&self, from: usize, out: ViewMut<'_>) -> Result<()> {
        {
            let mailbox = self.of(from).read().unwrap_or_else(PoisonError::into_inner);
            let expected = [self.rank as u32, out.rows() as u32, out.cols() as u32];
            if mailbox.counts.is_empty() {
                return Err(Error::Device {
                    device: format!("rank {from}"),
                    why: format!("its rows for rank {} could not be sent", self.rank),
                });
            }
            assert_eq!(mailbox.counts, expected, "[to, rows, cols] of what rank {from} sends");
        }
        let shape = (out.dtype(), out.cols());
        self.take_rows(from, 0..out.rows(), shape, |rows| self.backend.copy_rows(rows, out))
    }

    /// Sums rows `start..start + out.rows()` of what all ranks offered, in rank order.
    fn sum_rows(&self, start: usize, mut out: ViewMut<'_>) -> Result<()> {
        let (rows, shape) = (start..start + out.rows(), (out.dtype(), out.cols()));
        for r in 0..self.size() {
            let target = out.reborrow();
            self.take_rows(r, rows.clone(), shape, |offered| match r {
                0 => self.backend.copy_rows(offered, target),
                _ => self.backend.add_scaled(offered, 1.0, target),
            })?;
        }
        Ok(())
    }

    /// Meets the other ranks; after it, everything offered in this collective may be read. On devices that work
    /// asynchronously the meeting is one of streams too: work given from now on runs after what all ranks gave before.
    fn meet(&mut self) -> Result<()> {
        self.announce()?;
        self.meet_others()
    }

    /// The first half of [`Local::meet`]: what was offered is what this rank has been given to do up to here.
    fn announce(&self) -> Result<()> {
        let mut mailbox = self.own().write().unwrap_or_else(PoisonError::into_inner);
        self.backend.record(&mut mailbox.offered)
    }

    /// The second half.
    fn meet_others(&mut self) -> Result<()> {
        let arrived = Instant::now();
        let met = self.group.meeting.wait(self.rank);
        self.waited += arrived.elapsed();
        met?;
        for r in (0..self.size()).filter(|&r| r != self.rank) {
            self.backend.wait(&self.of(r).read().unwrap_or_else(PoisonError::into_inner).offered)?;
        }
        Ok(())
    }

    fn done(&mut self) -> Result<()> {
        self.calls += 1;
        Ok(())
    }

    /// [`Communicator::split`], as what it makes.
    pub(super) fn divide(&mut self, color: usize) -> Result<Local> {
        let mut colors = vec![0; self.size()];
        self.all_gather_counts(&[color as u32], &mut colors)?;
        let members: Vec<usize> = (0..colors.len()).filter(|&r| colors[r] as usize == color).collect();
        let rank = members.iter().position(|&r| r == self.rank).expect("a rank has its own color");
        let key = (self.splits, color);
        if rank == 0 {
            lock(&self.group.subgroups).insert(key, Arc::new(Group::new(members.len())));
        }
        self.barrier()?;
        let group = Arc::clone(&lock(&self.group.subgroups)[&key]);
        self.splits += 1;
        Ok(Local::new(group, Arc::clone(&self.backend), rank))
    }

    /// What frees everybody who waits in this group, from any thread.
    pub(super) fn alarm(&self) -> Alarm {
        Alarm { group: Arc::clone(&self.group) }
    }
}

/// Ends the meetings of a group.
pub(super) struct Alarm {
    group: Arc<Group>,
}

impl Alarm {
    /// All waiting ranks, and all that come, get [`Error::Peer`] with this reason.
    pub fn raise(&self, why: &str) {
        self.group.meeting.end(why.to_owned());
    }

    /// Whether somebody did, or left.
    pub fn raised(&self) -> bool {
        self.group.meeting.has_ended()
    }
}

impl Communicator for Local {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.group.mailboxes.len()
    }

    fn all_reduce_sum(&mut self, x: ViewMut<'_>) -> Result<()> {
        self.offer_rows(x.as_view())?;
        self.meet()?;
        self.sum_rows(0, x)?;
        self.done()
    }

    fn reduce_scatter_rows(&mut self, input: View<'_>, counts: &[usize], out: ViewMut<'_>) -> Result<()> {
        check_counts(self.size(), counts, input.rows(), "input rows of reduce_scatter_rows");
        assert_eq!(out.rows(), counts[self.rank], "output rows of reduce_scatter_rows");
        self.offer_rows(input)?;
        self.meet()?;
        self.sum_rows(counts[..self.rank].iter().sum(), out)?;
        self.done()
    }

    fn all_gather_rows(&mut self, own: View<'_>, counts: &[usize], mut out: ViewMut<'_>) -> Result<()> {
        check_counts(self.size(), counts, out.rows(), "output rows of all_gather_rows");
        assert_eq!(own.rows(), counts[self.rank], "own rows of all_gather_rows");
        self.offer_rows(own)?;
        self.meet()?;
        let mut start = 0;
        for (r, &count) in counts.iter().enumerate() {
            let target = out.reborrow().rows_range(start..start + count);
            self.take_rows(r, 0..count, (own.dtype(), own.cols()), |rows| {
                self.backend.copy_rows(rows, target)
            })?;
            start += count;
        }
        self.done()
    }

    fn all_gather_equal(
        &mut self,
        parts: &mut [(View<'_>, ViewMut<'_>)],
        meanwhile: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        check_parts(self.size(), parts);
        for (own, _) in &*parts {
            self.offer_rows(*own)?;
        }
        self.announce()?;
        meanwhile()?;
        self.meet_others()?;
        for (own, out) in parts {
            let rows = own.rows();
            for r in 0..self.size() {
                let target = out.reborrow().rows_range(r * rows..(r + 1) * rows);
                self.take_rows(r, 0..rows, (own.dtype(), own.cols()), |offered| {
                    self.backend.copy_rows(offered, target)
                })?;
            }
        }
        self.done()
    }

    fn all_gather_counts(&mut self, own: &[u32], out: &mut [u32]) -> Result<()> {
        assert_eq!(out.len(), own.len() * self.size(), "output of all_gather_counts");
        self.offer_counts(own);
        self.meet()?;
        if !own.is_empty() {
            for (r, part) in out.chunks_exact_mut(own.len()).enumerate() {
                let mailbox = self.of(r).read().unwrap_or_else(PoisonError::into_inner);
                part.copy_from_slice(&mailbox.counts);
            }
        }
        self.done()
    }

    fn exchange_counts(&mut self, sent: &[u32], received: &mut [u32]) -> Result<()> {
        assert_eq!((sent.len(), received.len()), (self.size(), self.size()), "exchange_counts");
        self.offer_counts(sent);
        self.meet()?;
        for (r, slot) in received.iter_mut().enumerate() {
            *slot = self.of(r).read().unwrap_or_else(PoisonError::into_inner).counts[self.rank];
        }
        self.done()
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
        self.offer_rows(rows)?;
        {
            let mut mailbox = self.own().write().unwrap_or_else(PoisonError::into_inner);
            mailbox.counts.clear();
            mailbox.counts.extend(sent.iter().map(|&n| n as u32));
        }
        self.meet()?;
        let mut start = 0;
        for (r, &count) in received.iter().enumerate() {
            let offset: usize = {
                let mailbox = self.of(r).read().unwrap_or_else(PoisonError::into_inner);
                let offered = mailbox.counts[self.rank] as usize;
                assert_eq!(offered, count, "rank {r} sends {offered} rows to rank {}", self.rank);
                mailbox.counts[..self.rank].iter().map(|&n| n as usize).sum()
            };
            let target = out.reborrow().rows_range(start..start + count);
            self.take_rows(r, offset..offset + count, (rows.dtype(), rows.cols()), |part| {
                self.backend.copy_rows(part, target)
            })?;
            start += count;
        }
        self.done()
    }

    fn send_receive_rows(
        &mut self,
        sent: Option<(usize, View<'_>)>,
        received: Option<(usize, ViewMut<'_>)>,
    ) -> Result<()> {
        let (mut offered, mut label) = (Ok(()), None);
        if let Some((to, rows)) = sent {
            offered = self.offer_rows(rows);
            // A rank that cannot send still meets the others, and says so.
            label = offered.is_ok().then_some([to as u32, rows.rows() as u32, rows.cols() as u32]);
        }
        self.offer_counts(label.as_ref().map_or(&[], |label| label.as_slice()));
        self.meet()?;
        let taken = match received {
            Some((from, out)) => self.take_sent(from, out),
            None => Ok(()),
        };
        self.done()?;
        offered.and(taken)
    }

    fn barrier(&mut self) -> Result<()> {
        self.meet()?;
        self.done()
    }

    fn split(&mut self, color: usize) -> Result<Box<dyn Communicator>> {
        Ok(Box::new(self.divide(color)?))
    }

    fn waited(&self) -> Duration {
        self.waited
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        self.group.meeting.end(format!("rank {} of this group failed or left", self.rank));
    }
}

impl Group {
    fn new(size: usize) -> Self {
        Group {
            meeting: Meeting::new(size),
            mailboxes: (0..size).map(|_| Default::default()).collect(),
            subgroups: Mutex::default(),
        }
    }
}

pub(super) fn check_counts(size: usize, counts: &[usize], rows: usize, what: &str) {
    assert_eq!(counts.len(), size, "counts for {what}");
    assert_eq!(counts.iter().sum::<usize>(), rows, "{what}");
}

/// What [`Communicator::all_gather_equal`] takes.
pub(super) fn check_parts(size: usize, parts: &[(View<'_>, ViewMut<'_>)]) {
    for (i, (own, out)) in parts.iter().enumerate() {
        let (rows, cols) = (own.rows(), own.cols());
        let (found, expected) = ((out.rows(), out.cols()), (rows * size, cols));
        assert_eq!(found, expected, "part {i}: rows of {size} ranks, each [{rows}, {cols}]");
        let gaps = !(own.is_contiguous() && out.as_view().is_contiguous());
        assert!(!gaps, "part {i} has gaps");
        let twin = parts[..i].iter().position(|(other, _)| other.dtype() == own.dtype());
        assert_eq!(twin, None, "part {i} has the type of another one, {:?}", own.dtype());
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
