//! A model as the engine sees it: one trait, one batch in, one output back. [`transformer`] is the only forward
//! pass; [`families`] turn a config.json into a [`crate::spec::ModelSpec`]; [`load`] fills a rank's weights.

pub mod families;
pub mod footprint;
pub mod load;
pub mod transformer;
pub mod world;

use crate::backend::{AttentionBatch, Tensor};
use crate::error::Result;
use crate::moe::migrate::{Checksums, Slice, Switch};
use crate::spec::{Attention, ModelSpec, RopeScaling};

/// One data-parallel rank's share of a step. Every rank of that tensor-parallel group gets the same batch; an idle
/// group gets one without rows and still takes part in every collective.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    /// Token of each row.
    pub tokens: &'a [u32],
    /// Sequences, positions and blocks; [`AttentionBatch::rows`] equals `tokens.len()`.
    pub attention: AttentionBatch<'a>,
    /// Rows whose logits are wanted, ascending.
    pub logit_rows: &'a [u32],
    /// Fill [`StepOutput::routing`].
    pub want_routing: bool,
}

/// What one rank hands back from a step: everything about the rows it owns. Reused from step to step.
pub struct StepOutput {
    /// Batch rows, out of [`Batch::logit_rows`], that this rank owns; ascending.
    pub logit_rows: Vec<u32>,
    /// `[at least logit_rows.len(), vocab]` f32: row i belongs to `logit_rows[i]`.
    pub logits: Tensor,
    /// Expert choices of the owned rows, when asked for.
    pub routing: Routing,
}

/// Expert choices of a run of rows.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Routing {
    /// First batch row described.
    pub first_row: usize,
    /// Rows described.
    pub rows: usize,
    /// Choices per row.
    pub top_k: usize,
    /// `[moe layers][rows][top_k]` expert ids, best first.
    pub ids: Vec<u32>,
    /// Same shape: the factors the expert outputs were multiplied with.
    pub weights: Vec<f32>,
}

impl Routing {
    /// Empties the record for `rows` rows from `first_row` on.
    pub fn clear(&mut self, first_row: usize, rows: usize, top_k: usize) {
        (self.first_row, self.rows, self.top_k) = (first_row, rows, top_k);
        self.ids.clear();
        self.weights.clear();
    }
}

/// What a token's bits depend on besides the tokens before it. It belongs to the token, never to the batch, so it is
/// part of the prefix-cache key and survives recomputation after a preemption.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct TokenForm {
    /// Generated rather than prompt, where the model tells them apart (MLA: absorbed instead of expanded).
    pub generated: bool,
    /// LongRoPE's long factors: the sequence, as long as it was when this token was first due, exceeds the original length.
    pub long: bool,
}

/// Which token forms a model distinguishes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FormRules {
    /// Prompt and generated tokens differ in bits (MLA).
    pub generated: bool,
    /// LongRoPE's border, in tokens.
    pub long_above: Option<usize>,
}

impl FormRules {
    /// What a model distinguishes.
    pub fn of_spec(spec: &ModelSpec) -> FormRules {
        FormRules {
            generated: matches!(spec.attention, Attention::Mla { .. }),
            long_above: match spec.rope.scaling {
                RopeScaling::LongRope { original_max_position, .. } => Some(original_max_position),
                _ => None,
            },
        }
    }

    /// The form of the token at `position` of a request whose prompt has `prompt_len` tokens.
    pub fn of(&self, position: usize, prompt_len: usize) -> TokenForm {
        let due_len = prompt_len.max(position + 1);
        TokenForm {
            generated: self.generated && position >= prompt_len,
            long: self.long_above.is_some_and(|border| due_len > border),
        }
    }
}

/// A model on one rank.
pub trait Model: Send {
    /// Runs one step. Collective: all ranks of the world call it with their group's batch. Writes the KV cache of every
    /// row and fills `out` for the rows this rank owns.
    ///
    /// Guarantees the numerics contract: on a CPU a row's logits depend on its tokens and forms only.
    ///
    /// # Errors
    /// When a peer or the device failed; the step is lost and the rank cannot go on.
    fn forward(&mut self, batch: &Batch<'_>, out: &mut StepOutput) -> Result<()>;

    /// Moves a piece of expert weights between ranks, into staging places: nothing that a step reads changes. Collective, as
    /// [`Model::forward`], and called between two steps.
    ///
    /// # Errors
    /// [`crate::Error::Peer`] when another rank is gone, which ends this one too. After any other error the migration is to be
    /// given up and the model goes on as before.
    fn transfer(&mut self, slice: &Slice) -> Result<Checksums>;

    /// From the next step on experts live where `switch` says. All its weights have arrived and been checked, on all ranks.
    fn switch(&mut self, switch: &Switch);
}
