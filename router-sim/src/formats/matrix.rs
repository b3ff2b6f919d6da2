//! Arrays as load matrices `[steps?, layers, experts]` and as routed experts `[tokens, layers, top_k]`.

use std::path::{Path, PathBuf};

use super::Options;
use super::array::ArrayReader;
use crate::load::{LoadWindow, Phase};
use crate::stream::rows::{Row, RowReader};
use crate::stream::windows::WindowReader;
use crate::stream::{TokenRow, TokenShape};
use crate::trace::RowInfo;

/// Most layers and experts of a load matrix, and most ids of one token: what a trace may have.
const MAX_EXPERTS: usize = 1 << 16;
const MAX_LAYERS: usize = 1 << 14;

/// Checks the layers and experts that a file claims.
///
/// # Errors
/// None at all, or more than the limits.
pub fn check_shape(layers: usize, experts: usize) -> Result<(), String> {
    if !(1..=MAX_LAYERS).contains(&layers) || !(1..=MAX_EXPERTS).contains(&experts) {
        return Err(format!(
            "{layers} layers x {experts} experts are not within 1..={MAX_LAYERS} x 1..={MAX_EXPERTS}"
        ));
    }
    Ok(())
}

/// An array of two or three axes as load windows.
#[derive(Debug)]
pub struct MatrixReader {
    path: PathBuf,
    array: ArrayReader,
    window: LoadWindow,
    /// Indices along the axis of layers, ascending: the others are left out.
    kept: Vec<usize>,
    phase: Phase,
    scale: Option<f64>,
}

impl MatrixReader {
    /// Every layer of the array.
    ///
    /// # Errors
    /// Another number of axes or experts than expected.
    pub fn new(path: &Path, array: ArrayReader, options: &Options) -> Result<Self, String> {
        let layers = array.shape.iter().rev().nth(1).copied().unwrap_or(0);
        check_shape(layers, 1)?;
        MatrixReader::of_layers(path, array, (0..layers).collect(), options)
    }

    /// The given layers of an array of all layers of a model.
    ///
    /// # Errors
    /// As [`MatrixReader::new`].
    pub fn of_layers(
        path: &Path,
        mut array: ArrayReader,
        kept: Vec<usize>,
        options: &Options,
    ) -> Result<Self, String> {
        if array.shape.len() == 2 {
            array.shape.insert(0, 1);
        }
        let [_, layers, experts] = array.shape[..] else {
            return Err(format!(
                "an array of shape {:?} is no load matrix [steps?, layers, experts]",
                array.shape
            ));
        };
        check_shape(layers, experts)?;
        options.check_experts(experts)?;
        let ids = options.layer_ids(layers);
        let ids: Vec<usize> = kept.iter().map(|layer| ids[*layer]).collect();
        let window = LoadWindow::new(&ids, experts);
        let (phase, scale) = (options.phase(), options.scale);
        Ok(MatrixReader { path: path.into(), array, window, kept, phase, scale })
    }
}

impl WindowReader for MatrixReader {
    fn empty_window(&self) -> LoadWindow {
        self.window.clone()
    }

    fn next_window(&mut self, window: &mut LoadWindow) -> Result<bool, String> {
        let experts = self.window.experts();
        let layers = self.array.shape[1];
        let Some(mut numbers) = self.array.next_record()? else { return Ok(false) };
        let mut kept = self.kept.iter().enumerate().peekable();
        for layer in 0..layers {
            let mut row = numbers.by_ref().take(experts);
            match kept.next_if(|(_, kept)| **kept == layer) {
                Some((index, _)) => {
                    for (expert, number) in row.enumerate() {
                        window.counts_mut(self.phase, index)[expert] =
                            number.tokens(self.scale).map_err(|why| in_cell(index, expert, &why))?;
                    }
                }
                None => drop(row.by_ref().last()),
            }
        }
        Ok(true)
    }

    fn record(&self) -> u64 {
        self.array.record()
    }

    fn path(&self) -> &Path {
        &self.path
    }
}

/// Says which layer (counted among the MoE layers) and expert a number belongs to.
pub fn in_cell(layer: usize, expert: usize, why: &str) -> String {
    format!("MoE layer {layer}, expert {expert}: {why}")
}

/// Marks of rows that a file keeps apart from the expert ids: which request each token belongs to, and its label.
#[derive(Debug, Default)]
pub struct Requests {
    /// Request of each token; empty when all belong to one.
    pub of_token: Vec<u32>,
    /// Label of each request; empty without labels.
    pub label_of_request: Vec<u16>,
    /// The labels.
    pub labels: Vec<String>,
}

/// An array `[tokens, layers, top_k]` as rows: vLLM's `routed_experts` and its like. One with two axes is a single
/// layer.
#[derive(Debug)]
pub struct RoutedReader {
    path: PathBuf,
    array: ArrayReader,
    shape: TokenShape,
    phase: Phase,
    requests: Requests,
    /// Request of the token before and the position due next.
    last: (u64, u64),
}

impl RoutedReader {
    /// Checks the shape. `experts` is what the caller knows or has counted.
    ///
    /// # Errors
    /// Another number of axes, a float type, or counts that do not fit.
    pub fn new(
        path: &Path,
        mut array: ArrayReader,
        requests: Requests,
        experts: usize,
        options: &Options,
    ) -> Result<Self, String> {
        if array.shape.len() == 2 {
            array.shape.insert(1, 1);
        }
        let [tokens, layers, top_k] = array.shape[..] else {
            return Err(format!(
                "an array of shape {:?} holds no experts [tokens, layers, top_k]",
                array.shape
            ));
        };
        check_shape(layers, experts)?;
        if top_k == 0 || top_k > experts {
            return Err(format!("top_k {top_k} is not within 1..={experts} experts"));
        }
        if !requests.of_token.is_empty() && requests.of_token.len() != tokens {
            return Err(format!("requests of {} tokens for {tokens} tokens", requests.of_token.len()));
        }
        let shape = TokenShape {
            layer_ids: options.layer_ids(layers),
            experts,
            top_k,
            labels: requests.labels.clone(),
            ..TokenShape::default()
        };
        let last = (u64::MAX, 0);
        Ok(RoutedReader { path: path.into(), array, shape, phase: options.phase(), requests, last })
    }
}

impl RowReader for RoutedReader {
    fn shape(&self) -> &TokenShape {
        &self.shape
    }

    fn next_row(&mut self, row: &mut Row) -> Result<bool, String> {
        let index = self.array.next_index();
        let Some(numbers) = self.array.next_record()? else { return Ok(false) };
        row.ids.clear();
        let request = self.requests.of_token.get(index).map_or(0, |&request| u64::from(request));
        let position = if request == self.last.0 { self.last.1 } else { 0 };
        self.last = (request, position + 1);
        let label = self.requests.label_of_request.get(request as usize).copied().unwrap_or(0);
        let info = RowInfo { request, position, phase: self.phase, recomputed: false };
        row.token = Some(TokenRow { info, rank: 0, label });
        for number in numbers {
            row.ids.push(number.id()?);
        }
        Ok(true)
    }

    fn record(&self) -> u64 {
        self.array.record()
    }

    fn path(&self) -> &Path {
        &self.path
    }
}
