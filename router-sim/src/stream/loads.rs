//! Load windows one after another, and ways to bring them into memory.

use super::tokens::{TokenBatch, TokenStream};
use crate::load::{LoadWindow, Phase};
use crate::{Error, Result};

/// Load windows in the order of time, all of one shape.
pub trait LoadStream {
    /// A window of the stream's shape without tokens.
    fn empty_window(&self) -> LoadWindow;

    /// Replaces what `window`, made by [`LoadStream::empty_window`], holds with the next window; false at the end.
    ///
    /// # Errors
    /// The record that is unusable. Reading may go on behind it, as with [`TokenStream::next_batch`].
    fn next_window(&mut self, window: &mut LoadWindow) -> Result<bool>;

    /// Records that a lenient stream has left out so far.
    fn skipped(&self) -> u64;
}

impl<T: LoadStream + ?Sized> LoadStream for Box<T> {
    fn empty_window(&self) -> LoadWindow {
        (**self).empty_window()
    }

    fn next_window(&mut self, window: &mut LoadWindow) -> Result<bool> {
        (**self).next_window(window)
    }

    fn skipped(&self) -> u64 {
        (**self).skipped()
    }
}

/// Counts the tokens of a stream: a window for every so many batches.
#[derive(Debug)]
pub struct TokenLoads<S> {
    tokens: S,
    batches_per_window: usize,
    batch: TokenBatch,
}

impl<S: TokenStream> TokenLoads<S> {
    /// Windows of `batches_per_window` batches each, at least 1; the last may have fewer.
    pub fn new(tokens: S, batches_per_window: usize) -> Self {
        TokenLoads { tokens, batches_per_window: batches_per_window.max(1), batch: TokenBatch::default() }
    }
}

impl<S: TokenStream> LoadStream for TokenLoads<S> {
    fn empty_window(&self) -> LoadWindow {
        self.tokens.shape().empty_window()
    }

    fn next_window(&mut self, window: &mut LoadWindow) -> Result<bool> {
        window.clear();
        for taken in 0..self.batches_per_window {
            if !self.tokens.next_batch(&mut self.batch)? {
                return Ok(taken > 0);
            }
            self.batch.add_to(window);
        }
        Ok(true)
    }

    fn skipped(&self) -> u64 {
        self.tokens.skipped()
    }
}

/// Sums every so many windows of a stream to one; the last may cover fewer.
#[derive(Debug)]
pub struct Summed<S> {
    loads: S,
    windows: u64,
    next: LoadWindow,
}

impl<S: LoadStream> Summed<S> {
    /// Sums of `windows` windows each, at least 1.
    pub fn new(loads: S, windows: u64) -> Self {
        let next = loads.empty_window();
        Summed { loads, windows: windows.max(1), next }
    }
}

impl<S: LoadStream> LoadStream for Summed<S> {
    fn empty_window(&self) -> LoadWindow {
        self.loads.empty_window()
    }

    fn next_window(&mut self, window: &mut LoadWindow) -> Result<bool> {
        if !self.loads.next_window(window)? {
            return Ok(false);
        }
        for _ in 1..self.windows {
            if !self.loads.next_window(&mut self.next)? {
                break;
            }
            add(window, &self.next)?;
        }
        Ok(true)
    }

    fn skipped(&self) -> u64 {
        self.loads.skipped()
    }
}

/// All windows of a stream, at most `most` (at least 1). A longer stream has its neighbours summed, 2, 4, 8 ... to
/// one, so that each result covers equally many windows (the last perhaps fewer) and memory stays bounded.
///
/// # Errors
/// Those of the stream; [`Error::Impossible`] when a sum exceeds 64 bits.
pub fn collect(stream: &mut dyn LoadStream, most: usize) -> Result<Vec<LoadWindow>> {
    let most = most.max(1);
    let mut windows: Vec<LoadWindow> = Vec::new();
    let (mut read, mut per_window) = (0, 1);
    let mut next = stream.empty_window();
    while stream.next_window(&mut next)? {
        if read / per_window == most {
            windows = sum_neighbours(windows)?;
            per_window *= 2;
        }
        match windows.get_mut(read / per_window) {
            Some(window) => add(window, &next)?,
            None => windows.push(next.clone()),
        }
        read += 1;
    }
    Ok(windows)
}

/// The sum of all windows of a stream.
///
/// # Errors
/// Those of the stream; [`Error::Impossible`] when a sum exceeds 64 bits.
pub fn total(stream: &mut dyn LoadStream) -> Result<LoadWindow> {
    let mut total = stream.empty_window();
    let mut next = stream.empty_window();
    while stream.next_window(&mut next)? {
        add(&mut total, &next)?;
    }
    Ok(total)
}

/// Windows 0 + 1, 2 + 3, ...; an odd last one stays alone.
fn sum_neighbours(windows: Vec<LoadWindow>) -> Result<Vec<LoadWindow>> {
    let mut sums = Vec::with_capacity(windows.len().div_ceil(2));
    let mut windows = windows.into_iter();
    while let Some(mut sum) = windows.next() {
        if let Some(second) = windows.next() {
            add(&mut sum, &second)?;
        }
        sums.push(sum);
    }
    Ok(sums)
}

/// Adds `more`; unlike the engine's counters, which saturate, a report must not be silently wrong.
fn add(sum: &mut LoadWindow, more: &LoadWindow) -> Result<()> {
    for phase in Phase::ALL {
        for layer in 0..sum.layers() {
            for (expert, n) in more.counts(phase, layer).iter().enumerate() {
                let cell = &mut sum.counts_mut(phase, layer)[expert];
                *cell = cell.checked_add(*n).ok_or_else(|| {
                    Error::Impossible(format!(
                        "load: MoE layer {layer}, expert {expert}: {cell} + {n} tokens exceed 64 bits"
                    ))
                })?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Windows of one layer and two experts, the first with its number.
    struct Numbers(std::ops::Range<u64>);

    impl LoadStream for Numbers {
        fn empty_window(&self) -> LoadWindow {
            LoadWindow::new(&[0], 2)
        }

        fn next_window(&mut self, window: &mut LoadWindow) -> Result<bool> {
            let Some(n) = self.0.next() else { return Ok(false) };
            window.counts_mut(Phase::Prefill, 0).copy_from_slice(&[n, u64::MAX / 8]);
            Ok(true)
        }

        fn skipped(&self) -> u64 {
            0
        }
    }

    #[test]
    fn a_long_stream_is_summed_to_the_limit() {
        for (windows, most, expected) in [
            (0, 3, &[][..]),
            (3, 3, &[0, 1, 2]),
            (4, 3, &[1, 5]),
            (5, 3, &[1, 5, 4]),
            (7, 4, &[1, 5, 9, 6]),
            (6, 1, &[15]),
            (6, 0, &[15]),
        ] {
            let collected = collect(&mut Numbers(0..windows), most).unwrap();
            let first: Vec<u64> = collected.iter().map(|w| w.counts(Phase::Prefill, 0)[0]).collect();
            assert_eq!(first, expected, "{windows} windows, at most {most}");
        }
        let mut pairs = Summed::new(Numbers(0..5), 2);
        let (mut window, mut sums) = (pairs.empty_window(), Vec::new());
        while pairs.next_window(&mut window).unwrap() {
            sums.push(window.counts(Phase::Prefill, 0)[0]);
        }
        assert_eq!(sums, [1, 5, 4]);
        assert_eq!(total(&mut Numbers(0..7)).unwrap().counts(Phase::Prefill, 0)[0], 21);
    }

    #[test]
    fn sums_beyond_64_bits_are_refused() {
        for error in [total(&mut Numbers(0..9)).unwrap_err(), collect(&mut Numbers(0..9), 1).unwrap_err()] {
            assert!(error.to_string().contains("MoE layer 0, expert 1"), "{error}");
        }
    }
}
