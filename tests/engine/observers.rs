//! What observers are told.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use moeyard::engine::plan::StepPlan;
use moeyard::engine::scripted::options;
use moeyard::engine::stats::{RequestTiming, StepTiming};
use moeyard::engine::{EngineOptions, Hooks, StepObserver, TimingObserver};
use moeyard::model::StepOutput;

use crate::{collect, prompt, request, start};

/// Counts what it is told.
#[derive(Default)]
struct Tally {
    rows: Mutex<usize>,
    planned_rows: Mutex<usize>,
    step_rows: Mutex<usize>,
    first_tokens: Mutex<usize>,
    next_tokens: Mutex<usize>,
    finished: Mutex<Vec<RequestTiming>>,
}

impl StepObserver for Tally {
    fn on_step(&self, plan: &StepPlan, rank: usize, dp_rank: usize, output: &StepOutput, _: Duration) {
        *self.rows.lock().unwrap() += output.routing.rows;
        if rank.is_multiple_of(2) {
            *self.planned_rows.lock().unwrap() += plan.sub_plans[dp_rank].rows();
        }
    }
}

impl TimingObserver for Tally {
    fn on_step(&self, timing: &StepTiming) {
        *self.step_rows.lock().unwrap() += timing.prefill_rows + timing.decode_rows;
    }
    fn on_first_token(&self, _: Duration) {
        *self.first_tokens.lock().unwrap() += 1;
    }
    fn on_next_token(&self, _: Duration) {
        *self.next_tokens.lock().unwrap() += 1;
    }
    fn on_finish(&self, timing: &RequestTiming) {
        self.finished.lock().unwrap().push(timing.clone());
    }
}

#[test]
fn observers_see_every_row_and_every_request() {
    let tally = Arc::new(Tally::default());
    let hooks = Hooks { steps: Some(tally.clone()), timing: Some(tally.clone()), ..Hooks::default() };
    let options = EngineOptions { prefix_caching: false, ..options() };
    let engine = start(&options, (2, 2), hooks);
    let streams: Vec<_> = (0..6).map(|i| engine.submit(request(prompt(i, 10), 5)).unwrap()).collect();
    streams.into_iter().for_each(|stream| drop(collect(stream)));
    engine.shutdown(Duration::ZERO);
    // 10 prompt tokens and 4 of the 5 generated ones are computed.
    let computed = 6 * 14;
    assert_eq!(*tally.rows.lock().unwrap(), computed, "each row has one owner");
    assert_eq!(*tally.planned_rows.lock().unwrap(), computed);
    assert_eq!(*tally.step_rows.lock().unwrap(), computed);
    assert_eq!((*tally.first_tokens.lock().unwrap(), *tally.next_tokens.lock().unwrap()), (6, 24));
    let finished = tally.finished.lock().unwrap();
    assert_eq!(finished.len(), 6);
    for timing in finished.iter() {
        assert_eq!((timing.prompt_tokens, timing.generated_tokens), (10, 5));
        assert!(timing.queue.unwrap() + timing.prefill.unwrap() + timing.decode.unwrap() <= timing.total);
    }
}
