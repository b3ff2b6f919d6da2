//! The placement in force, as everyone outside the ranks sees it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use router_sim::placement::Placement;

/// One cell for the placement of a running engine: the engine switches it at a step border, anyone reads it. Ranks hold
/// their own reference and switch at the same border.
pub struct InForce {
    /// Held for a clone of an `Arc`.
    state: Mutex<(Arc<Placement>, Instant)>,
}

impl InForce {
    /// A cell that starts with this placement.
    pub fn new(placement: Arc<Placement>) -> Self {
        InForce { state: Mutex::new((placement, Instant::now())) }
    }

    /// Where the experts live now.
    pub fn placement(&self) -> Arc<Placement> {
        Arc::clone(&self.lock().0)
    }

    /// How long they have lived there.
    pub fn age(&self) -> Duration {
        self.lock().1.elapsed()
    }

    /// From now on they live there.
    ///
    /// # Panics
    /// When the version number does not grow: two placements of one run could not be told apart.
    pub fn switch(&self, placement: Arc<Placement>) {
        let mut state = self.lock();
        let (before, after) = (state.0.version(), placement.version());
        assert!(after > before, "placement {after} follows placement {before}");
        *state = (placement, Instant::now());
    }

    /// A panic of another holder leaves a whole value.
    fn lock(&self) -> std::sync::MutexGuard<'_, (Arc<Placement>, Instant)> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
