//! Shutdown as a type: one value, shared by the accept loop and every request, that only ever moves forward.

use std::sync::Arc;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::error::{Error, Result};

/// How far a shutdown has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Requests are taken.
    Serving,
    /// Those running may finish; new ones are refused with 503.
    Draining,
    /// Those still running end with an error at once.
    Aborting,
}

/// Handle to the server's stage. Clones share it.
#[derive(Debug, Clone)]
pub struct Shutdown {
    stage: Arc<watch::Sender<Stage>>,
}

impl Default for Shutdown {
    fn default() -> Self {
        Shutdown { stage: Arc::new(watch::Sender::new(Stage::Serving)) }
    }
}

impl Shutdown {
    /// A shutdown that SIGTERM or SIGINT begins and a second one of them hastens. SIGHUP is ignored: the log goes to
    /// stderr, so there is nothing to reopen.
    ///
    /// # Errors
    /// When the operating system refuses a handler. Must be called inside a tokio runtime.
    pub fn on_signals() -> Result<Self> {
        let handler = |kind| signal(kind).map_err(|source| Error::io("signal handler", source));
        let mut terminate = handler(SignalKind::terminate())?;
        let mut interrupt = handler(SignalKind::interrupt())?;
        let mut hangup = handler(SignalKind::hangup())?;
        let shutdown = Shutdown::default();
        let signalled = shutdown.clone();
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    _ = terminate.recv() => signalled.next_stage(),
                    _ = interrupt.recv() => signalled.next_stage(),
                    _ = hangup.recv() => {}
                }
            }
        });
        Ok(shutdown)
    }

    /// Moves on to at least `stage`; never back.
    pub fn advance(&self, stage: Stage) {
        self.stage.send_if_modified(|current| {
            let later = stage > *current;
            *current = (*current).max(stage);
            later
        });
    }

    /// The stage now.
    pub fn stage(&self) -> Stage {
        *self.stage.borrow()
    }

    /// Returns once `stage` is reached.
    pub async fn reached(&self, stage: Stage) {
        let mut watching = self.stage.subscribe();
        // It cannot fail: `self` keeps the sender.
        let _ = watching.wait_for(|current| *current >= stage).await;
    }

    fn next_stage(&self) {
        match self.stage() {
            Stage::Serving => {
                tracing::info!(
                    "shutting down once running requests have ended; signal again to end them now"
                );
                self.advance(Stage::Draining);
            }
            Stage::Draining | Stage::Aborting => self.advance(Stage::Aborting),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn stages_only_move_forward_and_wake_those_who_wait() {
        let shutdown = Shutdown::default();
        let waiter = shutdown.clone();
        let waiting = tokio::spawn(async move { waiter.reached(Stage::Draining).await });
        shutdown.advance(Stage::Aborting);
        shutdown.advance(Stage::Draining);
        assert_eq!(shutdown.stage(), Stage::Aborting);
        waiting.await.unwrap();
        shutdown.reached(Stage::Serving).await;
    }
}
