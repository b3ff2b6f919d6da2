//! Which rank owns which row of a batch.

use crate::stream::{TokenBatch, TokenShape};
use crate::{Error, Result};

/// Where a token's source rank comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sources {
    /// As recorded where the recording had as many ranks, else dealt.
    #[default]
    Auto,
    /// As recorded.
    Recorded,
    /// Each rank owns an equal run of the batch's rows; the first ranks own one more where they do not divide.
    Dealt,
}

impl Sources {
    /// Whether the rows of a stream keep the ranks they were recorded with.
    ///
    /// # Errors
    /// [`Error::Impossible`] when they must and cannot.
    pub fn are_recorded(self, shape: &TokenShape, ranks: usize) -> Result<bool> {
        match (self, shape.ranks) {
            (Sources::Dealt, _) => Ok(false),
            (_, Some(recorded)) if recorded == ranks => Ok(true),
            (Sources::Auto, _) => Ok(false),
            (Sources::Recorded, Some(recorded)) => Err(Error::Impossible(format!(
                "the tokens were owned by {recorded} ranks where they were recorded, not by {ranks}"
            ))),
            (Sources::Recorded, None) => {
                Err(Error::Impossible("the input does not say which rank owned which token".into()))
            }
        }
    }
}

/// Fills `starts` `[ranks + 1]`: rank `r` owns rows `starts[r]..starts[r + 1]` of the batch.
///
/// # Panics
/// When recorded ranks do not ascend or exceed `ranks`, which a [`crate::stream::TokenStream`] promises.
pub(super) fn fill_starts(batch: &TokenBatch, recorded: bool, ranks: usize, starts: &mut Vec<usize>) {
    let rows = batch.rows.len();
    starts.clear();
    if !recorded {
        starts.extend((0..=ranks).map(|rank| {
            let (run, longer) = (rows / ranks, rows % ranks);
            rank * run + rank.min(longer)
        }));
        return;
    }
    starts.push(0);
    let mut row = 0;
    for rank in 0..ranks {
        while row < rows && batch.rows[row].rank as usize == rank {
            row += 1;
        }
        starts.push(row);
    }
    assert_eq!(row, rows, "rows of a batch are in the order of {ranks} ranks");
}
