//! What one step computes: written by the scheduler, read by every rank. Plain data that checks itself; its buffers
//! are reused from step to step.

use super::RequestId;
use super::request::{Request, TokenEvent};
use super::sampler::RowError;
use crate::backend::{AttentionBatch, SeqSpan};
use crate::model::{Batch, Routing};
use std::sync::Arc;

/// One step of the whole engine.
#[derive(Debug, Default)]
pub struct StepPlan {
    /// Counts steps from 0.
    pub step: u64,
    /// Version of the placement that the step runs with; 0 where nobody says.
    pub placement_version: u64,
    /// An observer wants to see the expert choices of all rows.
    pub observe_routing: bool,
    /// One per DP rank; one without rows keeps an idle rank in the collectives.
    pub sub_plans: Vec<SubPlan>,
}

/// One DP rank's share of a step.
#[derive(Debug, Default)]
pub struct SubPlan {
    /// Token of each row.
    pub tokens: Vec<u32>,
    /// Sequences in row order, covering all rows.
    pub spans: Vec<SeqSpan>,
    /// Whose each span is and why it is computed; one per span.
    pub infos: Vec<SpanInfo>,
    /// KV blocks of all spans; see [`SeqSpan::first_block`].
    pub block_table: Vec<u32>,
    /// Rows whose logits are wanted, ascending.
    pub logit_rows: Vec<u32>,
    /// What to do with them; one per logit row.
    pub jobs: Vec<RowJob>,
    /// Generated tokens of the sequences whose next token depends on them.
    pub history: Vec<u32>,
    /// A request captures its expert choices.
    pub capture_routing: bool,
}

/// Why a row is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Part of a prompt, or of what is recomputed after a preemption.
    Prefill,
    /// The newest generated token of a sequence whose other tokens are all in the cache.
    Decode,
}

/// About one span.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpanInfo {
    /// The request it belongs to.
    pub request: RequestId,
    /// Why its rows are computed.
    pub phase: Phase,
    /// Leading rows that were computed before, until a preemption.
    pub recomputed: u32,
}

/// What to do with one logit row.
#[derive(Debug, Clone)]
pub struct RowJob {
    /// The request it belongs to.
    pub request_id: RequestId,
    /// How to sample.
    pub request: Arc<Request>,
    /// Position of the token that follows the row's own.
    pub position: u32,
    /// What is to be known about that token.
    pub task: RowTask,
    /// The text so far, as a part of [`SubPlan::history`]: first token and number; empty unless
    /// [`Request::needs_history`].
    pub history: (u32, u32),
    /// Hand back the whole row.
    pub capture: bool,
}

/// What is to be known about the token after a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowTask {
    /// Which one it is.
    Sample,
    /// The log-probability of this one, which the prompt has there.
    Score(u32),
    /// Nothing.
    Nothing,
}

/// The limits a sub-plan must keep.
#[derive(Debug, Clone, Copy)]
pub struct PlanLimits {
    /// Rows.
    pub rows: usize,
    /// Sequences.
    pub seqs: usize,
    /// Logit rows.
    pub logit_rows: usize,
    /// Tokens per block.
    pub block_size: usize,
    /// Blocks in the pool.
    pub blocks: usize,
}

impl StepPlan {
    /// Rows of all DP ranks.
    pub fn rows(&self) -> usize {
        self.sub_plans.iter().map(SubPlan::rows).sum()
    }

    /// Rows of one phase, all DP ranks.
    pub fn rows_in(&self, phase: Phase) -> usize {
        self.sub_plans.iter().map(|sub| sub.rows_in(phase)).sum()
    }

    /// Empties every sub-plan, keeping its memory, and makes their number `dp_ranks`.
    pub fn clear(&mut self, step: u64, dp_ranks: usize) {
        self.step = step;
        self.placement_version = 0;
        self.observe_routing = false;
        self.sub_plans.resize_with(dp_ranks, SubPlan::default);
        self.sub_plans.iter_mut().for_each(SubPlan::clear);
    }

    /// Asserts [`SubPlan::check`] for every sub-plan.
    pub fn check(&self, limits: PlanLimits) {
        self.sub_plans.iter().for_each(|sub| sub.check(limits));
    }
}

impl SubPlan {
    /// Rows of all spans.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Rows of the spans in one phase.
    pub fn rows_in(&self, phase: Phase) -> usize {
        let spans = self.spans.iter().zip(&self.infos);
        spans.filter(|(_, info)| info.phase == phase).map(|(span, _)| span.rows as usize).sum()
    }

    /// As the model wants it.
    pub fn batch(&self, want_routing: bool) -> Batch<'_> {
        Batch {
            tokens: &self.tokens,
            attention: AttentionBatch { spans: &self.spans, block_table: &self.block_table },
            logit_rows: &self.logit_rows,
            want_routing,
        }
    }

    /// The generated tokens that a job may look at.
    pub fn history_of(&self, job: &RowJob) -> &[u32] {
        let (first, count) = job.history;
        &self.history[first as usize..(first + count) as usize]
    }

    /// Appends `tokens` of one sequence, which start at `position`, as one span.
    pub fn push_span(
        &mut self,
        info: SpanInfo,
        tokens: &[u32],
        position: usize,
        prompt_len: usize,
        blocks: &[u32],
    ) {
        self.spans.push(SeqSpan {
            row: self.tokens.len() as u32,
            rows: tokens.len() as u32,
            position: position as u32,
            prompt_len: prompt_len as u32,
            first_block: self.block_table.len() as u32,
        });
        self.infos.push(info);
        self.tokens.extend_from_slice(tokens);
        self.block_table.extend_from_slice(blocks);
    }

    fn clear(&mut self) {
        let SubPlan { tokens, spans, infos, block_table, logit_rows, jobs, history, capture_routing } = self;
        tokens.clear();
        spans.clear();
        infos.clear();
        block_table.clear();
        logit_rows.clear();
        jobs.clear();
        history.clear();
        *capture_routing = false;
    }

    /// Asserts that spans tile the rows, blocks cover the positions, logit rows ascend, and limits hold.
    ///
    /// # Panics
    /// When one of these is broken: a bug of the scheduler.
    pub fn check(&self, limits: PlanLimits) {
        let rows = self.rows();
        assert!(rows <= limits.rows, "{rows} rows in a step of at most {}", limits.rows);
        let seqs = self.spans.len();
        assert!(seqs <= limits.seqs, "{seqs} sequences in a step of at most {}", limits.seqs);
        assert_eq!(seqs, self.infos.len(), "spans and their infos");

        let mut next_row = 0;
        for span in &self.spans {
            assert!(span.rows > 0, "a span without rows at row {}", span.row);
            assert_eq!(span.row as usize, next_row, "spans leave a gap or overlap");
            next_row += span.rows as usize;
            let first = span.first_block as usize;
            let needed = (span.position as usize + span.rows as usize).div_ceil(limits.block_size);
            let listed = self.block_table.len();
            assert!(first + needed <= listed, "blocks {first}..{} of {listed}", first + needed);
        }
        assert_eq!(next_row, rows, "rows covered by spans");
        if let Some(block) = self.block_table.iter().find(|&&block| block as usize >= limits.blocks) {
            panic!("block {block} of a pool of {}", limits.blocks);
        }

        let wanted = self.logit_rows.len();
        assert!(
            wanted <= limits.logit_rows,
            "{wanted} logit rows in a step of at most {}",
            limits.logit_rows
        );
        assert_eq!(wanted, self.jobs.len(), "logit rows and their jobs");
        let history = self.history.len() as u64;
        for RowJob { request_id, history: (first, count), .. } in &self.jobs {
            let end = u64::from(*first) + u64::from(*count);
            assert!(end <= history, "history up to {end} of {history} for request {request_id}");
        }
        assert!(self.logit_rows.is_sorted_by(|a, b| a < b), "logit rows {:?} do not ascend", self.logit_rows);
        if let Some(&last) = self.logit_rows.last() {
            assert!((last as usize) < rows, "logit row {last} of {rows} rows");
        }
    }
}

/// What came of one logit row.
#[derive(Debug, Clone)]
pub struct RowResult {
    /// Index into [`SubPlan::jobs`].
    pub job: u32,
    /// The next token where the job asked for one.
    pub outcome: Result<Option<TokenEvent>, RowError>,
    /// The row, where the job asked for it; `[vocab]`.
    pub logits: Option<Vec<f32>>,
}

/// What came of one sub-plan.
#[derive(Debug, Default)]
pub struct SubResults {
    /// In the order of [`SubPlan::jobs`], one each.
    pub rows: Vec<RowResult>,
    /// Expert choices of all rows, in pieces of consecutive rows; empty unless [`SubPlan::capture_routing`].
    pub routing: Vec<Routing>,
}

impl SubResults {
    /// Forgets the results of the last step, keeping the memory.
    pub fn clear(&mut self) {
        self.rows.clear();
        self.routing.clear();
    }

    /// Puts the rows in the order of the jobs. `Err` says what is missing or surplus: ranks own each row exactly once.
    pub fn settle(&mut self, sub: &SubPlan) -> Result<(), String> {
        self.rows.sort_unstable_by_key(|row| row.job);
        let complete = self.rows.len() == sub.jobs.len()
            && self.rows.iter().enumerate().all(|(i, row)| row.job as usize == i);
        if complete {
            return Ok(());
        }
        Err(format!("the ranks returned {} logit rows, {} were asked for", self.rows.len(), sub.jobs.len()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::AssertUnwindSafe;

    const LIMITS: PlanLimits = PlanLimits { rows: 8, seqs: 2, logit_rows: 2, block_size: 4, blocks: 4 };

    fn sub_plan() -> SubPlan {
        let mut sub = SubPlan::default();
        let info = SpanInfo { request: 7, phase: Phase::Prefill, recomputed: 0 };
        sub.push_span(info, &[1, 2, 3], 2, 9, &[3, 1]);
        sub.push_span(SpanInfo { phase: Phase::Decode, ..info }, &[4], 4, 1, &[0, 2]);
        sub
    }

    #[test]
    fn spans_follow_one_another() {
        let sub = sub_plan();
        sub.check(LIMITS);
        assert_eq!(sub.spans[1], SeqSpan { row: 3, rows: 1, position: 4, prompt_len: 1, first_block: 2 });
        assert_eq!((sub.rows_in(Phase::Prefill), sub.rows_in(Phase::Decode)), (3, 1));
        assert_eq!(sub.batch(false).attention.rows(), 4);
    }

    /// Every broken invariant is found.
    #[test]
    fn check_finds_what_is_broken() {
        type Break = fn(&mut SubPlan);
        let breaks: [(&str, Break); 6] = [
            ("gap", |s| s.spans[1].row = 4),
            ("empty span", |s| s.spans[1].rows = 0),
            ("block outside the pool", |s| s.block_table[0] = 4),
            ("too few blocks", |s| s.spans[1].position = 8),
            ("logit row without a job", |s| s.logit_rows.push(0)),
            ("too many rows", |s| s.tokens.extend([0; 8])),
        ];
        for (name, spoil) in breaks {
            let mut sub = sub_plan();
            spoil(&mut sub);
            let outcome = std::panic::catch_unwind(AssertUnwindSafe(|| sub.check(LIMITS)));
            assert!(outcome.is_err(), "{name}");
        }
    }

    #[test]
    fn results_must_be_complete() {
        let mut results = SubResults::default();
        let row = |job| RowResult { job, outcome: Ok(None), logits: None };
        let request = Arc::new(Request::greedy(vec![1], 1));
        let task = RowTask::Sample;
        let job = RowJob { request_id: 0, request, position: 1, task, history: (0, 0), capture: false };
        let mut sub = sub_plan();
        sub.jobs = vec![job.clone(), job];
        results.rows = vec![row(1), row(0)];
        assert!(results.settle(&sub).is_ok());
        assert_eq!(results.rows[0].job, 0);
        results.rows = vec![row(1), row(1)];
        assert!(results.settle(&sub).is_err());
        results.rows = vec![row(0)];
        assert!(results.settle(&sub).is_err());
    }
}
