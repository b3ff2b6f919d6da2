//! The token router of one layer: logits in f32 whatever the activation type, then the choice.

use std::ops::Range;

use crate::backend::{Backend, DType, PaddedShape, Tensor, View};
use crate::error::Result;
use crate::layers::RowBuffer;
use crate::layers::linear::Linear;
use crate::spec;

/// Weights of one layer's router.
pub struct Router {
    /// `[experts, hidden]` in f32: a rounded logit could change the choice.
    pub linear: Linear,
    /// `[1, experts]` f32, joins the scores for the choice only.
    pub choice_bias: Option<Tensor>,
    /// How experts are chosen.
    pub spec: spec::Router,
}

/// Choices of the rows of one step in all layers: on the device, and on the host as far as they were fetched.
pub struct Routed {
    logits: RowBuffer,
    /// `[layers * rows, top_k]`, where `rows` is that of the step.
    ids: RowBuffer,
    weights: RowBuffer,
    layers: usize,
    rows: usize,
    top_k: usize,
    host_ids: Vec<i32>,
}

impl Routed {
    /// Buffers for `rows` rows in each of `layers` layers, with room for the padding of the last.
    pub fn new(
        backend: &dyn Backend,
        layers: usize,
        rows: usize,
        experts: usize,
        top_k: usize,
    ) -> Result<Self> {
        Ok(Routed {
            logits: RowBuffer::new(backend, DType::F32, rows, experts)?,
            ids: RowBuffer::new(backend, DType::I32, layers * rows + PaddedShape::PADDING, top_k)?,
            weights: RowBuffer::new(backend, DType::F32, layers * rows, top_k)?,
            layers,
            rows: 0,
            top_k,
            host_ids: Vec::with_capacity(layers * rows * top_k),
        })
    }

    /// Begins a step of `rows` rows.
    pub fn start(&mut self, rows: usize) {
        self.rows = rows;
        self.host_ids.clear();
        self.host_ids.resize(self.layers * rows * self.top_k, 0);
    }

    /// Copies the ids that `layers` chose to the host. Waits for the device.
    pub fn fetch(&mut self, backend: &dyn Backend, layers: Range<usize>) -> Result<()> {
        let (range, ids) = (self.range(&layers), self.range_of_ids(&layers));
        if range.is_empty() {
            return Ok(());
        }
        backend.download(
            self.ids.head(range.end).rows_range(range),
            bytemuck::cast_slice_mut(&mut self.host_ids[ids]),
        )
    }

    /// [`Routed::fetch`] of all layers.
    pub fn fetch_all(&mut self, backend: &dyn Backend) -> Result<()> {
        self.fetch(backend, 0..self.layers)
    }

    /// Copies the factors of all layers to the host: `[layers][rows][top_k]`. Waits for the device.
    pub fn fetch_weights(&self, backend: &dyn Backend, weights: &mut Vec<f32>) -> Result<()> {
        let rows = self.layers * self.rows;
        weights.clear();
        weights.resize(rows * self.top_k, 0.0);
        if rows == 0 {
            return Ok(());
        }
        backend.download(self.weights.head(rows), bytemuck::cast_slice_mut(weights))
    }

    /// Fetched ids of all layers, `[layers][rows][top_k]`.
    pub fn all_ids(&self) -> &[i32] {
        &self.host_ids
    }

    /// Fetched ids of one layer, `[rows * top_k]`, best first in each row.
    pub fn ids(&self, layer: usize) -> &[i32] {
        &self.host_ids[self.range_of_ids(&(layer..layer + 1))]
    }

    /// The same on the device, `[rows, top_k]` I32.
    pub fn device_ids(&self, layer: usize) -> View<'_> {
        let range = self.range(&(layer..layer + 1));
        self.ids.head(range.end).rows_range(range)
    }

    /// [`Routed::device_ids`] and what follows them, `[rows, top_k]` with more rows than the step has.
    pub fn padded_ids(&self, layer: usize, rows: usize) -> View<'_> {
        let start = layer * self.rows;
        self.ids.head(start + rows).rows_range(start..start + rows)
    }

    /// Factors of the expert outputs, `[rows, top_k]` f32.
    pub fn weights(&self, layer: usize) -> View<'_> {
        let range = self.range(&(layer..layer + 1));
        self.weights.head(range.end).rows_range(range)
    }

    /// Choices per row.
    pub fn top_k(&self) -> usize {
        self.top_k
    }

    /// Rows of the buffers that are some layers'.
    fn range(&self, layers: &Range<usize>) -> Range<usize> {
        layers.start * self.rows..layers.end * self.rows
    }

    fn range_of_ids(&self, layers: &Range<usize>) -> Range<usize> {
        let Range { start, end } = self.range(layers);
        start * self.top_k..end * self.top_k
    }
}

impl Router {
    /// Chooses experts for every row of `x` (f32, normed), on the device; `layer` counts MoE layers.
    pub fn forward(
        &self,
        backend: &dyn Backend,
        x: View<'_>,
        layer: usize,
        routed: &mut Routed,
    ) -> Result<()> {
        let rows = x.rows();
        assert_eq!(rows, routed.rows, "rows of a step");
        if rows == 0 {
            return Ok(());
        }
        self.linear.forward(backend, x, routed.logits.head_mut(rows))?;
        let range = routed.range(&(layer..layer + 1));
        backend.route(
            routed.logits.head(rows),
            self.choice_bias.as_ref().map(Tensor::view),
            &self.spec,
            routed.ids.head_mut(range.end).rows_range(range.clone()),
            routed.weights.head_mut(range.end).rows_range(range),
        )
    }
}
