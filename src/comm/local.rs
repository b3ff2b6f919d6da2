//! Ranks that are threads of this process, over any backend.
//!
//! Every rank owns two mailboxes. A collective is: copy what you offer into your mailbox, meet at the barrier, copy
//! what you need out of the others'. Collectives alternate between the two mailboxes, so one meeting each suffices:
//! a mailbox is written again only two meetings later, when every reader has passed the one in between.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use super::Communicator;
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
        {
            let mut mailbox = self.own().write().unwrap_or_else(PoisonError::into_inner);
            self.backend.record(&mut mailbox.offered)?;
        }
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

    fn barrier(&mut self) -> Result<()> {
        self.meet()?;
        self.done()
    }

    fn split(&mut self, color: usize) -> Result<Box<dyn Communicator>> {
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
        Ok(Box::new(Local::new(group, Arc::clone(&self.backend), rank)))
    }

    fn waited(&self) -> Duration {
        self.waited
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        self.group.meeting.leave(self.rank);
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

fn check_counts(size: usize, counts: &[usize], rows: usize, what: &str) {
    assert_eq!(counts.len(), size, "counts for {what}");
    assert_eq!(counts.iter().sum::<usize>(), rows, "{what}");
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A reusable barrier that a leaving rank breaks, so that nobody waits for the dead.
struct Meeting {
    size: usize,
    arrived: AtomicUsize,
    /// Completed meetings.
    generation: AtomicU64,
    broken: AtomicBool,
    /// Which rank left first, once one has.
    left: Mutex<Option<usize>>,
    changed: Condvar,
    /// Polls before a waiting thread sleeps: none when there are more ranks than cores.
    spins: u32,
}

impl Meeting {
    fn new(size: usize) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Meeting {
            size,
            arrived: AtomicUsize::new(0),
            generation: AtomicU64::new(0),
            broken: AtomicBool::new(false),
            left: Mutex::new(None),
            changed: Condvar::new(),
            spins: if size <= cores { 4_000 } else { 0 },
        }
    }

    fn wait(&self, rank: usize) -> Result<()> {
        let generation = self.generation.load(Ordering::Acquire);
        if self.arrived.fetch_add(1, Ordering::AcqRel) + 1 == self.size {
            self.arrived.store(0, Ordering::Relaxed);
            // The lock orders this store against a waiter that has checked and is about to sleep.
            let guard = lock(&self.left);
            self.generation.store(generation + 1, Ordering::Release);
            drop(guard);
            self.changed.notify_all();
            return Ok(());
        }
        for _ in 0..self.spins {
            if self.generation.load(Ordering::Acquire) != generation {
                return Ok(());
            }
            if self.broken.load(Ordering::Acquire) {
                break;
            }
            std::hint::spin_loop();
        }
        let mut left = lock(&self.left);
        loop {
            // A completed meeting counts even when somebody left right after it.
            if self.generation.load(Ordering::Acquire) != generation {
                return Ok(());
            }
            if let Some(gone) = *left {
                return Err(Error::Peer { rank, why: format!("rank {gone} of this group failed or left") });
            }
            left = self.changed.wait(left).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn leave(&self, rank: usize) {
        lock(&self.left).get_or_insert(rank);
        self.broken.store(true, Ordering::Release);
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::reference::ReferenceBackend;

    /// Runs `body` on every rank of a world of `size`, each in its own thread, and returns the results in rank order.
    fn on_ranks<T: Send>(size: usize, body: impl Fn(&dyn Backend, &mut Local) -> T + Sync) -> Vec<T> {
        let backends: Vec<Arc<dyn Backend>> =
            (0..size).map(|_| Arc::new(ReferenceBackend) as Arc<dyn Backend>).collect();
        let world = Local::world(backends.clone());
        std::thread::scope(|scope| {
            let body = &body;
            let threads: Vec<_> = world
                .into_iter()
                .zip(&backends)
                .map(|(mut rank, backend)| scope.spawn(move || body(backend.as_ref(), &mut rank)))
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        })
    }

    fn upload(backend: &dyn Backend, rows: usize, cols: usize, values: &[f32]) -> Tensor {
        let mut tensor = backend.alloc(DType::F32, rows.max(1), cols).unwrap();
        if rows > 0 {
            backend.upload(bytemuck::cast_slice(values), tensor.head_mut(rows)).unwrap();
        }
        tensor
    }

    fn download(backend: &dyn Backend, view: View<'_>) -> Vec<f32> {
        let mut host = vec![0f32; view.rows() * view.cols()];
        if !host.is_empty() {
            backend.download(view, bytemuck::cast_slice_mut(&mut host)).unwrap();
        }
        host
    }

    #[test]
    fn sums_run_in_rank_order_and_agree_on_all_ranks() {
        // In this order the sum is 1; in any order that meets -1e8 before 1e8 + 1 has rounded, it is not.
        let terms = [1e8f32, 1.0, -1e8, 1.0];
        let expected = ((terms[0] + terms[1]) + terms[2]) + terms[3];
        for sums in on_ranks(4, |backend, rank| {
            let mut x = upload(backend, 1, 1, &[terms[rank.rank()]]);
            rank.all_reduce_sum(x.view_mut()).unwrap();
            download(backend, x.view())
        }) {
            assert_eq!(sums, [expected]);
        }
    }

    #[test]
    fn reduce_scatter_then_all_gather_is_all_reduce() {
        for size in 1..=5 {
            let counts: Vec<usize> = (0..size).map(|r| [2, 0, 3, 1, 1][r]).collect();
            let rows: usize = counts.iter().sum();
            let results = on_ranks(size, |backend, rank| {
                let values: Vec<f32> = (0..rows * 3).map(|i| (i * (rank.rank() + 1)) as f32).collect();
                let mut all = upload(backend, rows, 3, &values);
                let mut own = backend.alloc(DType::F32, 4, 3).unwrap();
                let mine = counts[rank.rank()];
                rank.reduce_scatter_rows(all.head(rows), &counts, own.head_mut(mine)).unwrap();
                rank.all_gather_rows(own.head(mine), &counts, all.head_mut(rows)).unwrap();
                download(backend, all.head(rows))
            });
            let factor = (1..=size).sum::<usize>();
            let expected: Vec<f32> = (0..rows * 3).map(|i| (i * factor) as f32).collect();
            assert!(results.iter().all(|r| *r == expected), "world of {size}");
        }
    }

    #[test]
    fn all_to_all_delivers_in_source_order_over_many_rounds() {
        for size in 1..=4 {
            on_ranks(size, |backend, rank| {
                let me = rank.rank();
                for round in 0..40 {
                    // From s to d travel (s + 2 d + round) % 3 rows that hold (s, d, i).
                    let amount = |s: usize, d: usize| (s + 2 * d + round) % 3;
                    let row = |s: usize, d: usize, i: usize| [s as f32, d as f32, i as f32];
                    let sent: Vec<usize> = (0..size).map(|d| amount(me, d)).collect();
                    let received: Vec<usize> = (0..size).map(|s| amount(s, me)).collect();
                    let values: Vec<f32> =
                        (0..size).flat_map(|d| (0..sent[d]).flat_map(move |i| row(me, d, i))).collect();
                    let expected: Vec<f32> =
                        (0..size).flat_map(|s| (0..received[s]).flat_map(move |i| row(s, me, i))).collect();
                    let (out, back) = (values.len() / 3, expected.len() / 3);
                    let rows = upload(backend, out, 3, &values);
                    let mut arrived = backend.alloc(DType::F32, back.max(1), 3).unwrap();
                    rank.all_to_all_rows(rows.head(out), &sent, arrived.head_mut(back), &received).unwrap();
                    assert_eq!(download(backend, arrived.head(back)), expected, "round {round}");

                    let counts: Vec<u32> = sent.iter().map(|&n| n as u32).collect();
                    let mut swapped = vec![9; size];
                    rank.exchange_counts(&counts, &mut swapped).unwrap();
                    assert!(swapped.iter().zip(&received).all(|(&a, &b)| a as usize == b));
                }
            });
        }
    }

    #[test]
    fn split_makes_groups_that_work_by_themselves() {
        let sums = on_ranks(5, |backend, rank| {
            let me = rank.rank();
            let mut group = rank.split(me % 2).unwrap();
            assert_eq!((group.rank(), group.size()), (me / 2, if me % 2 == 0 { 3 } else { 2 }));
            let mut x = upload(backend, 1, 1, &[me as f32]);
            group.all_reduce_sum(x.view_mut()).unwrap();
            download(backend, x.view())[0]
        });
        assert_eq!(sums, [6.0, 4.0, 6.0, 4.0, 6.0]);
    }

    #[test]
    fn a_leaving_rank_releases_the_others() {
        let backends: Vec<Arc<dyn Backend>> =
            (0..3).map(|_| Arc::new(ReferenceBackend) as Arc<dyn Backend>).collect();
        let mut world = Local::world(backends);
        let gone = world.pop().unwrap();
        std::thread::scope(|scope| {
            let waiting: Vec<_> =
                world.iter_mut().map(|rank| scope.spawn(move || rank.barrier().unwrap_err())).collect();
            drop(gone);
            for error in waiting {
                assert!(error.join().unwrap().to_string().contains("rank 2"));
            }
        });
    }
}
