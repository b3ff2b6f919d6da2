//! moeyard's own routing trace as token batches: one batch per step.

use std::io::BufRead;
use std::path::{Path, PathBuf};

use crate::stream::{TokenBatch, TokenRow, TokenShape, TokenStream};
use crate::trace::{Record, StepJoiner, StepRecord, TraceReader, WeightFormat};
use crate::{Error, Result};

/// Steps of a trace. Events and gaps are passed over: what a simulation does about placement is its own.
#[derive(Debug)]
pub struct TraceSteps<R> {
    path: PathBuf,
    reader: TraceReader<R>,
    joiner: StepJoiner,
    shape: TokenShape,
    lenient: bool,
    skipped: u64,
}

impl<R: BufRead> TraceSteps<R> {
    /// Reads the header.
    ///
    /// # Errors
    /// [`Error::Record`] for record 0.
    pub fn new(path: &Path, input: R, lenient: bool) -> Result<Self> {
        let reader = TraceReader::new(input).map_err(|e| in_file(path, e))?;
        let header = reader.header();
        let shape = TokenShape {
            model: header.family.clone(),
            layer_ids: header.placement.layer_ids().to_vec(),
            experts: header.placement.experts(),
            top_k: header.top_k,
            ranks: Some(header.world()),
            labels: Vec::new(),
            weights: header.weights != WeightFormat::None,
        };
        Ok(TraceSteps {
            path: path.into(),
            reader,
            joiner: StepJoiner::default(),
            shape,
            lenient,
            skipped: 0,
        })
    }

    /// The next step that is whole. Steps that never become whole were lost by their recorder, as gaps are.
    fn next_step(&mut self) -> Result<Option<StepRecord>> {
        while let Some(next) = self.reader.next() {
            let Record::Step(part) = next.map_err(|e| in_file(&self.path, e))? else { continue };
            let record = self.reader.record();
            let joined = self.joiner.push(part);
            let joined = joined.map_err(|why| Error::Record { path: self.path.clone(), record, why })?;
            if let Some(step) = joined.filter(|step| step.rows() > 0) {
                return Ok(Some(step));
            }
        }
        Ok(None)
    }
}

impl<R: BufRead> TokenStream for TraceSteps<R> {
    fn shape(&self) -> &TokenShape {
        &self.shape
    }

    fn next_batch(&mut self, batch: &mut TokenBatch) -> Result<bool> {
        batch.clear();
        let step = loop {
            match self.next_step() {
                Ok(Some(step)) => break step,
                Ok(None) => return Ok(false),
                Err(_) if self.lenient => self.skipped += 1,
                Err(error) => return Err(error),
            }
        };
        (batch.step, batch.start_us, batch.duration_us) =
            (step.info.step, step.info.start_us, step.info.duration_us);
        for piece in &step.pieces {
            let rank = piece.rank as u32;
            batch.rows.extend(piece.rows.iter().map(|info| TokenRow { info: *info, rank, label: 0 }));
        }
        let layers = self.shape.layers();
        for layer in 0..layers {
            for piece in &step.pieces {
                let ids = piece.ids.len() / layers;
                batch.ids.extend_from_slice(&piece.ids[layer * ids..(layer + 1) * ids]);
                let weights = piece.weights.len() / layers;
                batch.weights.extend_from_slice(&piece.weights[layer * weights..(layer + 1) * weights]);
            }
        }
        Ok(true)
    }

    fn skipped(&self) -> u64 {
        self.skipped
    }
}

/// Adds the file's name to an error of the trace reader.
fn in_file(path: &Path, error: Error) -> Error {
    match error {
        Error::Trace { record, why } => Error::Record { path: path.into(), record, why },
        other => other,
    }
}
