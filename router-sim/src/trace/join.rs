//! Puts steps together whose ranks recorded apart.

use std::collections::VecDeque;

use super::step::StepRecord;

/// Steps that may be incomplete at a time; the oldest is given up when another begins.
const MAX_OPEN_STEPS: usize = 64;

/// Collects the parts of steps until all rows of one are there.
#[derive(Debug, Default)]
pub struct StepJoiner {
    open: VecDeque<StepRecord>,
    incomplete: u64,
}

impl StepJoiner {
    /// Takes a part; gives back its step, pieces in rank order, when that is whole now.
    ///
    /// # Errors
    /// When parts of one step disagree on what they share, or have more rows than ran. The step is dropped.
    pub fn push(&mut self, part: StepRecord) -> Result<Option<StepRecord>, String> {
        let step = part.info.step;
        let joined = match self.open.iter().position(|open| open.info.step == step) {
            None => part,
            Some(index) => {
                let mut joined = self.open.remove(index).expect("position is in range");
                if joined.info != part.info {
                    self.incomplete += 1;
                    return Err(format!("step {step}: parts say {:?} and {:?}", joined.info, part.info));
                }
                joined.pieces.extend(part.pieces);
                joined
            }
        };
        if joined.rows() > joined.info.rows {
            self.incomplete += 1;
            return Err(format!(
                "step {step}: parts have {} rows where {} ran",
                joined.rows(),
                joined.info.rows
            ));
        }
        if joined.is_whole() {
            let mut whole = joined;
            whole.pieces.sort_by_key(|piece| piece.rank);
            return Ok(Some(whole));
        }
        if self.open.len() == MAX_OPEN_STEPS {
            self.open.pop_front();
            self.incomplete += 1;
        }
        self.open.push_back(joined);
        Ok(None)
    }

    /// Steps that did not become whole: those given up and those still open.
    pub fn incomplete(&self) -> u64 {
        self.incomplete + self.open.len() as u64
    }
}
