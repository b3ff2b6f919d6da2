//! From formats that hold one load matrix after another to a load stream.

use std::path::Path;

use super::loads::LoadStream;
use crate::load::LoadWindow;
use crate::{Error, Result};

/// A reader of one window after another.
pub trait WindowReader {
    /// A window of the reader's shape without tokens.
    fn empty_window(&self) -> LoadWindow;

    /// Replaces what `window`, cleared before, holds; false at the end.
    ///
    /// # Errors
    /// What is wrong with the record, without its number. The next call goes on behind it, or says that nothing more
    /// can be read.
    fn next_window(&mut self, window: &mut LoadWindow) -> Result<bool, String>;

    /// Number of the record that the last call looked at.
    fn record(&self) -> u64;

    /// Names the file for messages.
    fn path(&self) -> &Path;
}

/// Windows of a reader; skips unusable ones when lenient.
#[derive(Debug)]
pub struct Windows<R> {
    reader: R,
    lenient: bool,
    skipped: u64,
}

impl<R: WindowReader> Windows<R> {
    pub fn new(reader: R, lenient: bool) -> Self {
        Windows { reader, lenient, skipped: 0 }
    }
}

impl<R: WindowReader> LoadStream for Windows<R> {
    fn empty_window(&self) -> LoadWindow {
        self.reader.empty_window()
    }

    fn next_window(&mut self, window: &mut LoadWindow) -> Result<bool> {
        loop {
            window.clear();
            match self.reader.next_window(window) {
                Ok(more) => return Ok(more),
                Err(_) if self.lenient => self.skipped += 1,
                Err(why) => {
                    let (path, record) = (self.reader.path().into(), self.reader.record());
                    return Err(Error::Record { path, record, why });
                }
            }
        }
    }

    fn skipped(&self) -> u64 {
        self.skipped
    }
}
