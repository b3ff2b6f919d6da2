//! Experts whose rows a backend groups itself, in its own memory.

use super::{Mlp, View, ViewMut};
use crate::error::Result;
use crate::spec::Activation;

/// What a backend offers that need not show the router's choices to the host before their experts run. The host of a CPU has
/// them anyway; that of a GPU would have to wait for it in every layer.
///
/// It serves a rank that holds every expert once.
pub trait DevicePlan {
    /// `out[t] = sum_j weights[t, j] * mlp(ids[t, j], x[t])`, j ascending, out f32, where `mlp(e, x)` is what
    /// [`super::Backend::experts`] computes with slot `slot_of[e]`, rounded to the activation type: the same bits as a plan of the host,
    /// [`super::Backend::experts`] and [`super::Backend::combine`].
    fn planned_experts(&self, args: PlannedArgs<'_>, out: ViewMut<'_>) -> Result<()>;
}

/// Arguments of [`DevicePlan::planned_experts`].
pub struct PlannedArgs<'a> {
    /// Activations `[tokens, hidden]`.
    pub x: View<'a>,
    /// Experts of each token, `[tokens, top_k]` I32, as [`super::Backend::route`] wrote them.
    pub ids: View<'a>,
    /// `[tokens, top_k]` f32.
    pub weights: View<'a>,
    /// The slot of each expert; no two share one.
    pub slot_of: &'a [u32],
    /// The slot table.
    pub slots: &'a [Option<Mlp>],
    /// What happens between the two matrices.
    pub activation: Activation,
    /// Working space `[tokens * top_k, hidden]` in the activation type: rows sorted by (slot, token, j).
    pub grouped: ViewMut<'a>,
    /// The same, for what their experts make of them.
    pub computed: ViewMut<'a>,
}
