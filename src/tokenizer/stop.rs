//! Stop strings in a stream of text pieces.

use crate::error::{Error, Result};

/// Finds the first of several stop strings in a text that arrives in pieces, wherever the borders fall.
///
/// The match that *ends* first wins, and among those the longest; so the answer does not depend on the pieces, and
/// nothing more needs to be generated once it is known. Text that may still turn out to be the beginning of a stop
/// string is held back: at most one byte less than the longest of them.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    stops: Vec<Pattern>,
    /// Text not handed out yet.
    held: String,
    found: Option<usize>,
}

/// What one piece of text led to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scan {
    /// Text that is safe to hand out: it holds no stop string and no beginning of one.
    pub text: String,
    /// Index of the stop string that was found; everything after `text` is to be dropped.
    pub stop: Option<usize>,
}

impl StopMatcher {
    /// A matcher for these stop strings; none at all is fine and lets everything through at once.
    ///
    /// # Errors
    /// [`Error::Request`] for an empty stop string, which would end every text before it begins.
    pub fn new<S: AsRef<str>>(stops: &[S]) -> Result<StopMatcher> {
        if stops.iter().any(|stop| stop.as_ref().is_empty()) {
            return Err(Error::request("stop", "stop strings must not be empty"));
        }
        let stops = stops.iter().map(|stop| Pattern::new(stop.as_ref())).collect();
        Ok(StopMatcher { stops, held: String::new(), found: None })
    }

    /// Takes the next piece. After a stop was found, further pieces yield no text and the same stop.
    pub fn push(&mut self, piece: &str) -> Scan {
        if self.found.is_some() {
            return Scan { text: String::new(), stop: self.found };
        }
        let before = self.held.len();
        self.held.push_str(piece);
        for (i, &byte) in piece.as_bytes().iter().enumerate() {
            let ended = self.stops.iter_mut().enumerate().filter_map(|(index, stop)| {
                stop.advance(byte).then_some((stop.bytes.len(), std::cmp::Reverse(index)))
            });
            // `max` drains the iterator, so every pattern sees the byte; the longest wins, then the first given.
            if let Some((len, std::cmp::Reverse(index))) = ended.max() {
                self.held.truncate(before + i + 1 - len);
                self.found = Some(index);
                return Scan { text: std::mem::take(&mut self.held), stop: self.found };
            }
        }
        let hold = self.stops.iter().map(|stop| stop.matched).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - hold);
        Scan { text: std::mem::replace(&mut self.held, rest), stop: None }
    }

    /// The text ended: what was held back is no stop string after all.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// One stop string and how much of it the text so far ends with (Knuth-Morris-Pratt over bytes: UTF-8 never matches
/// across a character border, so byte positions are character positions).
#[derive(Debug, Clone)]
struct Pattern {
    bytes: Vec<u8>,
    /// `border[n]`: length of the longest proper prefix of `bytes[..=n]` that is also its suffix.
    border: Vec<usize>,
    /// The longest proper prefix of `bytes` that the text so far ends with.
    matched: usize,
}

impl Pattern {
    fn new(stop: &str) -> Pattern {
        let bytes = stop.as_bytes().to_vec();
        let mut border = vec![0; bytes.len()];
        for i in 1..bytes.len() {
            let mut k = border[i - 1];
            while k > 0 && bytes[k] != bytes[i] {
                k = border[k - 1];
            }
            border[i] = k + usize::from(bytes[k] == bytes[i]);
        }
        Pattern { bytes, border, matched: 0 }
    }

    /// Takes one byte of text; true when the text now ends with the whole stop string. Amortised constant time.
    fn advance(&mut self, byte: u8) -> bool {
        while self.matched > 0 && self.bytes[self.matched] != byte {
            self.matched = self.border[self.matched - 1];
        }
        self.matched += usize::from(self.bytes[self.matched] == byte);
        let whole = self.matched == self.bytes.len();
        if whole {
            self.matched = self.border[self.matched - 1];
        }
        whole
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Feeds the pieces and returns all text handed out and the stop found.
    fn stream<'a>(stops: &[String], pieces: impl IntoIterator<Item = &'a str>) -> (String, Option<usize>) {
        let mut matcher = StopMatcher::new(stops).unwrap();
        let longest = stops.iter().map(String::len).max().unwrap_or(0);
        let mut text = String::new();
        let mut stop = None;
        for piece in pieces {
            let scan = matcher.push(piece);
            text.push_str(&scan.text);
            stop = scan.stop;
            assert!(matcher.held.len() <= longest.saturating_sub(1), "held {} bytes", matcher.held.len());
        }
        text.push_str(&matcher.finish());
        (text, stop)
    }

    /// The slow reference: over the whole text, the first end; then the longest; then the first given.
    fn whole_text(stops: &[String], text: &str) -> (String, Option<usize>) {
        let first = stops.iter().enumerate().filter_map(|(index, stop)| {
            let start = text.find(stop.as_str())?;
            Some((start + stop.len(), start, index))
        });
        match first.min() {
            Some((_, start, index)) => (text[..start].to_string(), Some(index)),
            None => (text.to_string(), None),
        }
    }

    fn strings(list: &[&str]) -> Vec<String> {
        list.iter().map(|s| s.to_string()).collect()
    }

    #[test]
    fn a_stop_across_borders_is_cut_out() {
        let stops = strings(&["\n\n", "END"]);
        assert_eq!(stream(&stops, ["one E", "N", "D two"]), ("one ".into(), Some(1)));
        assert_eq!(
            stream(&stops, ["one E", "N", "d two\n", "x\n", "\nmore"]),
            ("one ENd two\nx".into(), Some(0))
        );
        assert_eq!(stream(&stops, ["one EN"]), ("one EN".into(), None));
    }

    #[test]
    fn overlapping_stops_and_self_overlap() {
        assert_eq!(stream(&strings(&["aab"]), ["aa", "aab"]), ("aa".into(), Some(0)));
        assert_eq!(stream(&strings(&["bcd", "c"]), ["ab", "cd"]), ("ab".into(), Some(1)));
        assert_eq!(stream(&strings(&["c", "bc"]), ["ab", "c"]), ("a".into(), Some(1)));
        assert_eq!(stream(&strings(&["x", "x"]), ["ax"]), ("a".into(), Some(0)));
    }

    #[test]
    fn text_is_held_only_while_it_may_be_a_stop() {
        let mut matcher = StopMatcher::new(&["</s>"]).unwrap();
        assert_eq!(matcher.push("a <"), Scan { text: "a ".into(), stop: None });
        assert_eq!(matcher.push("/"), Scan::default());
        assert_eq!(matcher.push("b>"), Scan { text: "</b>".into(), stop: None });
        assert_eq!(matcher.push("</s>tail"), Scan { text: String::new(), stop: Some(0) });
        assert_eq!(matcher.push("more"), Scan { text: String::new(), stop: Some(0) });
        assert_eq!(matcher.finish(), "");
    }

    #[test]
    fn no_stops_let_everything_through_and_empty_ones_are_refused() {
        let mut matcher = StopMatcher::new::<&str>(&[]).unwrap();
        assert_eq!(matcher.push("é🙂"), Scan { text: "é🙂".into(), stop: None });
        assert!(
            matches!(StopMatcher::new(&["a", ""]), Err(Error::Request { param: Some(p), .. }) if p == "stop")
        );
    }

    #[test]
    fn a_long_self_similar_stop_is_linear() {
        let stop = format!("{}b", "a".repeat(100_000));
        let mut matcher = StopMatcher::new(&[stop]).unwrap();
        let scan = matcher.push(&"a".repeat(2_000_000));
        assert_eq!(scan.text.len(), 1_900_000);
    }

    proptest! {
        #[test]
        fn any_split_equals_the_whole_text_search(
            text in "[abé🙂]{0,40}",
            stops in prop::collection::vec("[abé🙂]{1,4}", 0..4),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
        ) {
            let chars: Vec<usize> = text.char_indices().map(|(i, _)| i).chain([text.len()]).collect();
            let mut at: Vec<usize> = cuts.iter().map(|cut| chars[cut.index(chars.len())]).collect();
            at.extend([0, text.len()]);
            at.sort_unstable();
            let pieces = at.windows(2).map(|w| &text[w[0]..w[1]]);
            prop_assert_eq!(stream(&stops, pieces), whole_text(&stops, &text));
        }
    }
}
