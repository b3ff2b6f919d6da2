//! A door that holds a step back until a test opens it.

use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use moeyard::engine::plan::StepPlan;
use moeyard::engine::{Hooks, StepObserver};
use moeyard::model::StepOutput;

/// Holds every step back until the gate opens, so that a test decides what happens during a step.
#[derive(Default)]
pub struct Gate {
    open: Mutex<bool>,
    changed: Condvar,
    /// Steps that have reached the gate.
    reached: Mutex<u64>,
}

impl Gate {
    pub fn hooks(self: &Arc<Self>) -> Hooks {
        Hooks { steps: Some(Arc::clone(self) as Arc<dyn StepObserver>), ..Hooks::default() }
    }

    pub fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.changed.notify_all();
    }

    /// Waits until a step is held back.
    pub fn wait_reached(&self) {
        let reached = self.reached.lock().unwrap();
        drop(self.changed.wait_while(reached, |reached| *reached == 0).unwrap());
    }
}

impl StepObserver for Gate {
    fn wants_routing(&self) -> bool {
        false
    }

    fn on_step(&self, _: &StepPlan, _: usize, _: usize, _: &StepOutput, _: Duration) {
        *self.reached.lock().unwrap() += 1;
        self.changed.notify_all();
        let open = self.open.lock().unwrap();
        drop(self.changed.wait_while(open, |open| !*open).unwrap());
    }
}
