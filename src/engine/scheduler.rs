//! Decides what each step computes: continuous batching with chunked prefill, preemption by recompute and prefix reuse.
//! Pure: no clock, no thread, no tensor; the same calls give the same plans.
//!
//! Per DP rank and step:
//! 1. every running sequence that only lacks its newest token gets one row (decode), oldest first. When blocks run out,
//!    the newest running sequence is put back to the queue: its blocks go, its tokens stay and are computed once more later;
//! 2. the other running sequences get a chunk of their prompt each, oldest first, while rows are left;
//! 3. waiting sequences are admitted in order, each to the DP rank that has room for all its tokens, with the longest
//!    cached prefix, then the least load. One whose prefix is just being computed by another is held back until it can
//!    take those blocks from the cache: the choices of one prompt compute it once.
//!
//! The order is that of arrival, or by priority and then arrival; "oldest" and "newest" mean first and last in it. The
//! first of the running sequences is never put back and every admitted request fits the pool alone, so there is always
//! progress.

use super::RequestId;
use super::kv_blocks::KvPool;
use super::options::EngineOptions;
use super::plan::{Phase, PlanLimits, RowJob, RowResult, RowTask, SpanInfo, StepPlan, SubPlan, SubResults};
use super::request::{Event, FinishReason, Request};
use super::sampler::RowError;
use super::sequence::Sequence;
use super::stats::{EngineStats, KvStats};
use std::cmp::Reverse;
use std::collections::VecDeque;
use std::sync::Arc;

/// What happened to a request.
#[derive(Debug, Clone)]
pub enum Update {
    /// It left the queue for the first time.
    Admitted,
    /// Something to report to its caller.
    Event(Event),
}

/// One DP rank: its KV pool and the sequences that live there.
struct Group {
    pool: KvPool,
    /// In order.
    running: Vec<Sequence>,
    /// What the plan under construction still takes.
    room: Room,
}

/// What is left of a step's limits for one DP rank.
#[derive(Clone, Copy, Default)]
struct Room {
    rows: usize,
    logit_rows: usize,
}

/// The scheduler of one engine.
pub struct Scheduler {
    options: EngineOptions,
    groups: Vec<Group>,
    /// In order; those put back keep their place, so they come before others of their priority.
    waiting: VecDeque<Sequence>,
    updates: Vec<(RequestId, Update)>,
    /// Gauges are filled in by [`Scheduler::stats`].
    counters: EngineStats,
}

impl Scheduler {
    /// A scheduler for `dp_ranks` pools.
    pub fn new(options: EngineOptions, dp_ranks: usize) -> Self {
        let pool = || KvPool::new(options.kv_blocks, options.block_size, options.prefix_caching);
        let group = || Group { pool: pool(), running: Vec::new(), room: Room::default() };
        let groups = (0..dp_ranks).map(|_| group()).collect();
        Scheduler {
            options,
            groups,
            waiting: VecDeque::new(),
            updates: Vec::new(),
            counters: EngineStats::default(),
        }
    }

    /// Queues a request that [`super::EngineHandle::submit`] found valid. Ids are unique; of the same
    /// priority, a lower one goes first, even where threads that submit at once deliver them out of order.
    pub fn add(&mut self, id: RequestId, request: Arc<Request>) {
        let stored = request.prompt.len() + request.max_tokens.saturating_sub(1);
        let room = self.options.kv_tokens();
        assert!(stored <= room, "request {id} stores {stored} tokens in a pool of {room}");
        self.enqueue(Sequence::new(id, request, self.options.form_rules));
    }

    /// Ends a request at once and frees its blocks. Unknown ids (it has just ended by itself) are ignored.
    pub fn abort(&mut self, id: RequestId) {
        if let Some(sequence) = self.remove(id) {
            self.finish(sequence, FinishReason::Aborted);
        }
    }

    /// Ends every request.
    pub fn end_all(&mut self, reason: &FinishReason) {
        let running = self.groups.iter_mut().flat_map(|group| group.running.drain(..));
        let all: Vec<Sequence> = running.chain(self.waiting.drain(..)).collect();
        for sequence in all {
            self.finish(sequence, reason.clone());
        }
    }

    /// No request is left.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.groups.iter().all(|group| group.running.is_empty())
    }

    /// Writes the next step into `plan`. It has rows unless the scheduler is idle.
    pub fn plan(&mut self, plan: &mut StepPlan) {
        plan.clear(self.counters.steps, self.groups.len());
        let room =
            Room { rows: self.options.max_num_batched_tokens, logit_rows: self.options.max_logit_rows };
        for (dp_rank, sub) in plan.sub_plans.iter_mut().enumerate() {
            self.groups[dp_rank].room = room;
            self.plan_decode(dp_rank, sub);
            self.plan_prefill(dp_rank, sub);
        }
        self.admit(plan);
        assert!(self.is_idle() || plan.rows() > 0, "{} requests wait and none can run", self.waiting.len());
        plan.check(self.limits());
    }

    /// Takes the results of a plan (in the order of its sub-plans and jobs) and decides who goes on.
    pub fn finish_step(&mut self, plan: &StepPlan, results: &mut [SubResults]) {
        self.counters.steps += 1;
        for (dp_rank, (sub, results)) in plan.sub_plans.iter().zip(results).enumerate() {
            self.take_computed(dp_rank, sub);
            if sub.capture_routing {
                self.take_routing(dp_rank, sub, results);
            }
            assert_eq!(results.rows.len(), sub.jobs.len(), "results of sub-plan {dp_rank}");
            for (job, row) in sub.jobs.iter().zip(results.rows.drain(..)) {
                self.take_row(dp_rank, job, row);
            }
            self.finish_computed_prompts(dp_rank);
        }
    }

    /// What happened since the last call, in order.
    pub fn take_updates(&mut self, out: &mut Vec<(RequestId, Update)>) {
        out.append(&mut self.updates);
    }

    /// Gauges and counters now.
    pub fn stats(&self) -> EngineStats {
        let mut kv = KvStats::default();
        for pool in self.groups.iter().map(|group| group.pool.stats()) {
            kv.used += pool.used;
            kv.cached += pool.cached;
            kv.free += pool.free;
            kv.evictions += pool.evictions;
        }
        let running = self.groups.iter().map(|group| group.running.len()).sum();
        EngineStats { running, waiting: self.waiting.len(), kv, ..self.counters }
    }

    /// The limits every sub-plan keeps.
    pub fn limits(&self) -> PlanLimits {
        PlanLimits {
            rows: self.options.max_num_batched_tokens,
            seqs: self.options.max_num_seqs,
            logit_rows: self.options.max_logit_rows,
            block_size: self.options.block_size,
            blocks: self.options.kv_blocks,
        }
    }

    /// Asserts the invariants between sequences and pools.
    ///
    /// # Panics
    /// When one is broken: see [`KvPool::check`].
    pub fn check(&self) {
        for group in &self.groups {
            let tables: Vec<_> = group.running.iter().map(|sequence| sequence.table()).collect();
            group.pool.check(&tables);
            assert!(
                group.running.is_sorted_by(|a, b| a.order() < b.order()),
                "running sequences are out of order"
            );
            assert!(group.running.len() <= self.options.max_num_seqs);
        }
        assert!(
            self.waiting.iter().is_sorted_by(|a, b| a.order() < b.order()),
            "waiting sequences are out of order"
        );
    }

    // ---- planning

    /// Step 1: one row for every sequence that lacks only its newest token.
    fn plan_decode(&mut self, dp_rank: usize, sub: &mut SubPlan) {
        let mut i = 0;
        while i < self.groups[dp_rank].running.len() {
            if self.groups[dp_rank].running[i].pending() == 1 && self.make_room(dp_rank, i) {
                let Group { running, room, .. } = &mut self.groups[dp_rank];
                self.counters.recomputed_tokens += push_chunk(sub, room, &running[i], 1);
            }
            i += 1;
        }
    }

    /// Gives sequence `i` a block for its newest token, putting back the newest sequences as needed; `false` when it is
    /// the newest itself and was put back.
    fn make_room(&mut self, dp_rank: usize, i: usize) -> bool {
        loop {
            let group = &mut self.groups[dp_rank];
            if group.running[i].grow() {
                return true;
            }
            let newest = group.running.pop().expect("sequence i runs");
            let is_itself = group.running.len() == i;
            assert!(!(is_itself && i == 0), "request {} alone does not fit the pool", newest.id);
            self.counters.preemptions += 1;
            self.enqueue(newest.preempt());
            if is_itself {
                return false;
            }
        }
    }

    /// Step 2: chunks of prompts that are under way.
    fn plan_prefill(&mut self, dp_rank: usize, sub: &mut SubPlan) {
        let Group { running, room, .. } = &mut self.groups[dp_rank];
        for sequence in running.iter().filter(|sequence| sequence.pending() > 1) {
            let rows = chunk_rows(sequence, sequence.computed_tokens(), room, &self.options);
            self.counters.recomputed_tokens += push_chunk(sub, room, sequence, rows);
        }
    }

    /// Step 3: waiting sequences, as long as the first that is not held back finds room.
    fn admit(&mut self, plan: &mut StepPlan) {
        let mut held_back = 0;
        while let Some(first) = self.waiting.get(held_back) {
            if self.is_held_back(first) {
                held_back += 1;
                continue;
            }
            let Some(dp_rank) = self.choose_group(first) else { return };
            let mut sequence = self.waiting.remove(held_back).expect("it was just looked at");
            let Group { pool, running, room, .. } = &mut self.groups[dp_rank];
            if sequence.admit(pool) {
                self.counters.prompt_tokens += sequence.prompt_len() as u64;
                self.counters.cached_tokens += sequence.cached_tokens() as u64;
                self.updates.push((sequence.id, Update::Admitted));
            }
            let rows = chunk_rows(&sequence, sequence.computed_tokens(), room, &self.options);
            self.counters.recomputed_tokens +=
                push_chunk(&mut plan.sub_plans[dp_rank], room, &sequence, rows);
            let place = running.partition_point(|other| other.order() < sequence.order());
            running.insert(place, sequence);
        }
    }

    /// Another sequence is computing what this one could share.
    fn is_held_back(&self, sequence: &Sequence) -> bool {
        let size = self.options.block_size;
        let running = self.groups.iter().flat_map(|group| &group.running);
        self.options.prefix_caching
            && running.filter(|other| other.pending() > 1).any(|leader| sequence.follows(leader, size))
    }

    /// The DP rank with the longest cached prefix among those with room, then the one with the least load, then the first.
    fn choose_group(&self, sequence: &Sequence) -> Option<usize> {
        let candidate = |(dp_rank, group): (usize, &Group)| {
            if group.room.rows == 0 || group.running.len() >= self.options.max_num_seqs {
                return None;
            }
            let cached = sequence.cached_prefix(&group.pool);
            let computed = cached.blocks * self.options.block_size;
            if chunk_rows(sequence, computed, &group.room, &self.options) == 0 {
                return None;
            }
            // All tokens known so far, and one more block for everyone who runs: who is admitted should not be put back,
            // or put others back, at once.
            let blocks = sequence.len().div_ceil(self.options.block_size) - cached.blocks + cached.unused;
            let load: usize = group.running.iter().map(Sequence::len).sum();
            (blocks + group.running.len() <= group.pool.available()).then_some((
                Reverse(cached.blocks),
                load,
                dp_rank,
            ))
        };
        let best = self.groups.iter().enumerate().filter_map(candidate).min();
        best.map(|(_, _, dp_rank)| dp_rank)
    }

    /// Puts a sequence in its place in the queue.
    fn enqueue(&mut self, sequence: Sequence) {
        let place = self.waiting.partition_point(|other| other.order() < sequence.order());
        self.waiting.insert(place, sequence);
    }

    // ---- results

    /// The rows of a sub-plan are in the KV cache now.
    fn take_computed(&mut self, dp_rank: usize, sub: &SubPlan) {
        for (span, info) in sub.spans.iter().zip(&sub.infos) {
            let sequence = self.running_mut(dp_rank, info.request).expect("nobody leaves during a step");
            sequence.advance_to(span.position as usize + span.rows as usize);
        }
    }

    fn take_routing(&mut self, dp_rank: usize, sub: &SubPlan, results: &SubResults) {
        for (span, info) in sub.spans.iter().zip(&sub.infos) {
            let sequence = self.running_mut(dp_rank, info.request).expect("nobody leaves during a step");
            for piece in &results.routing {
                sequence.take_routing(span, piece);
            }
        }
    }

    fn take_row(&mut self, dp_rank: usize, job: &RowJob, row: RowResult) {
        // A request that ended at an earlier row of this step has no more use for this one.
        let Some(sequence) = self.running_mut(dp_rank, job.request_id) else { return };
        if let Some(logits) = row.logits {
            sequence.take_logits(&logits);
        }
        let event = match row.outcome {
            Ok(Some(event)) => event,
            Ok(None) => return,
            Err(error) => {
                let reason = match &error {
                    RowError::NonFinite { .. } => {
                        self.counters.nonfinite_logits += 1;
                        FinishReason::Error(error.to_string())
                    }
                    RowError::Constraint { .. } | RowError::NothingAllowed { .. } => {
                        FinishReason::Refused(error.to_string())
                    }
                };
                return self.finish_running(dp_rank, job.request_id, reason);
            }
        };
        if let RowTask::Score(_) = job.task {
            return sequence.take_score(event);
        }
        let prompt = sequence.take_prompt_event().map(Event::Prompt);
        let reason = sequence.push(event.token);
        self.counters.generated_tokens += 1;
        let events = prompt.into_iter().chain([Event::Token(event)]);
        self.updates.extend(events.map(|event| (job.request_id, Update::Event(event))));
        if let Some(reason) = reason {
            self.finish_running(dp_rank, job.request_id, reason);
        }
    }

    /// Ends the requests that only wanted their prompt computed.
    fn finish_computed_prompts(&mut self, dp_rank: usize) {
        while let Some(i) = self.groups[dp_rank].running.iter().position(|sequence| sequence.pending() == 0) {
            let mut sequence = self.groups[dp_rank].running.remove(i);
            if let Some(prompt) = sequence.take_prompt_event() {
                self.updates.push((sequence.id, Update::Event(Event::Prompt(prompt))));
            }
            self.finish(sequence, FinishReason::Length);
        }
    }

    fn running_mut(&mut self, dp_rank: usize, id: RequestId) -> Option<&mut Sequence> {
        self.groups[dp_rank].running.iter_mut().find(|sequence| sequence.id == id)
    }

    fn remove(&mut self, id: RequestId) -> Option<Sequence> {
        for group in &mut self.groups {
            if let Some(i) = group.running.iter().position(|sequence| sequence.id == id) {
                return Some(group.running.remove(i));
            }
        }
        let i = self.waiting.iter().position(|sequence| sequence.id == id)?;
        self.waiting.remove(i)
    }

    fn finish_running(&mut self, dp_rank: usize, id: RequestId, reason: FinishReason) {
        let running = &mut self.groups[dp_rank].running;
        let i = running.iter().position(|sequence| sequence.id == id).expect("it runs");
        let sequence = running.remove(i);
        self.finish(sequence, reason);
    }

    /// Reports the end. The blocks go with the sequence.
    fn finish(&mut self, sequence: Sequence, reason: FinishReason) {
        self.counters.outcomes.count(&reason);
        let id = sequence.id;
        self.updates.push((id, Update::Event(Event::Finished(sequence.finish(reason)))));
    }
}

/// Rows of the next chunk of a sequence of which `computed` tokens are in the cache; 0 when the step has no room.
fn chunk_rows(sequence: &Sequence, computed: usize, room: &Room, options: &EngineOptions) -> usize {
    let pending = sequence.len() - computed;
    let rows = pending.min(options.prefill_chunk_size).min(room.rows);
    // Captured prompt rows each take a logit row, and so does the last row when a token follows from it.
    let mut logit_rows = 0;
    let fits = |&p: &usize| {
        logit_rows += usize::from(wants_logits(sequence, p));
        logit_rows <= room.logit_rows
    };
    (computed..computed + rows).take_while(fits).count()
}

/// The row at `position` takes a logit row.
fn wants_logits(sequence: &Sequence, position: usize) -> bool {
    sequence.task_at(position) != RowTask::Nothing || sequence.captures_logits_at(position)
}

/// Plans the next `rows` tokens of a sequence; returns how many of them were computed before.
fn push_chunk(sub: &mut SubPlan, room: &mut Room, sequence: &Sequence, rows: usize) -> u64 {
    if rows == 0 {
        return 0;
    }
    let position = sequence.computed_tokens();
    let decode = rows == 1 && position + 1 == sequence.len() && position >= sequence.prompt_len();
    let recomputed = sequence.recomputed(position, rows);
    let info = SpanInfo {
        request: sequence.id,
        phase: if decode { Phase::Decode } else { Phase::Prefill },
        recomputed: recomputed as u32,
    };
    let first_row = sub.rows();
    let tokens = &sequence.tokens()[position..position + rows];
    sub.push_span(info, tokens, position, sequence.prompt_len(), sequence.table().blocks());
    sub.capture_routing |= sequence.request().capture.routing;

    let jobs = sub.jobs.len();
    for p in (position..position + rows).filter(|&p| wants_logits(sequence, p)) {
        let task = sequence.task_at(p);
        let mut history = (sub.history.len() as u32, 0);
        if task == RowTask::Sample && sequence.request().needs_history() {
            sub.history.extend_from_slice(sequence.generated());
            history.1 = sequence.generated().len() as u32;
        }
        sub.logit_rows.push((first_row + p - position) as u32);
        sub.jobs.push(RowJob {
            request_id: sequence.id,
            request: Arc::clone(sequence.request()),
            position: p as u32 + 1,
            task,
            history,
            capture: sequence.captures_logits_at(p),
        });
    }
    room.rows -= rows;
    room.logit_rows -= sub.jobs.len() - jobs;
    recomputed as u64
}

#[cfg(test)]
mod tests;
