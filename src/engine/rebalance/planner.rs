//! A thread that decides looks, so that the engine does not wait for plans.

use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};

use router_sim::rebalance::{Look, Verdict};

/// What a look came to, after the step that it was taken before.
pub type Decided = (u64, router_sim::Result<Verdict>);

/// The engine's end of the thread, which ends with it.
pub struct Planner {
    looks: Sender<Look>,
    decided: Receiver<Decided>,
}

impl Planner {
    pub fn start() -> Planner {
        let (looks, received) = channel::<Look>();
        let (sender, decided) = channel();
        let run = move || {
            for look in received {
                if sender.send((look.step(), look.decide())).is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("rebalance".into());
        thread.spawn(run).expect("the system refuses one more thread");
        Planner { looks, decided }
    }

    /// Begins to decide a look.
    pub fn look(&self, look: Look) {
        // A thread that is gone is told by `decided`.
        let _ = self.looks.send(look);
    }

    /// The next decision that is there; `Err` when no more will come.
    pub fn decided(&self) -> Result<Option<Decided>, ()> {
        match self.decided.try_recv() {
            Ok(decided) => Ok(Some(decided)),
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Disconnected) => Err(()),
        }
    }
}
