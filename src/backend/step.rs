//! What became of the steps given to a backend.

/// Pieces of steps by how they ran; see [`super::Backend::step`].
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct StepCounts {
    /// Operation by operation.
    pub run: u64,
    /// Known again, as one unit of work.
    pub replayed: u64,
    /// Made such a unit; each was replayed at once.
    pub captured: u64,
}
