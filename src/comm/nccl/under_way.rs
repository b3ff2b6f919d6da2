//! What a rank has put into its stream and not seen done. Pure: callers bring the time and ask the device.

use std::time::{Duration, Instant};

use crate::backend::Event;
use crate::error::Result;

/// Two points in the stream: one that is waited for, and the end of what was added since.
#[derive(Default)]
pub(super) struct UnderWay {
    first: Option<(Event, Instant)>,
    last: Option<(Event, Instant)>,
    /// An event to be used again.
    spare: Option<Event>,
    /// When it was first seen that a rank of the group has left.
    left: Option<Instant>,
}

/// Why something under way will not end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Late {
    /// It takes longer than anything may.
    Overdue,
    /// A rank has left, and the others got time enough to end without it.
    Deserted,
}

impl UnderWay {
    /// Notes the end of the stream; `record` moves an event there.
    pub fn note(&mut self, now: Instant, record: impl FnOnce(&mut Event) -> Result<()>) -> Result<()> {
        let used = self.last.take().map(|(event, _)| event);
        let mut event = used.or_else(|| self.spare.take()).unwrap_or_default();
        record(&mut event)?;
        let place = if self.first.is_none() { &mut self.first } else { &mut self.last };
        *place = Some((event, now));
        Ok(())
    }

    /// Whether everything noted is done; `passed` asks for an event.
    pub fn idle(&mut self, passed: impl Fn(&Event) -> Result<bool>) -> Result<bool> {
        while let Some((event, _)) = &self.first {
            if !passed(event)? {
                return Ok(false);
            }
            let next = self.last.take();
            let done = std::mem::replace(&mut self.first, next);
            self.spare = done.map(|(event, _)| event);
        }
        Ok(true)
    }

    /// Whether what is under way is hopeless: older than `timeout`, or not ended `grace` after it was first seen that a rank of
    /// the group has left.
    pub fn late(&mut self, now: Instant, timeout: Duration, left: bool, grace: Duration) -> Option<Late> {
        let since = self.first.as_ref()?.1;
        if left {
            let seen = *self.left.get_or_insert(now);
            if now.saturating_duration_since(seen) > grace {
                return Some(Late::Deserted);
            }
        }
        (now.saturating_duration_since(since) > timeout).then_some(Late::Overdue)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// A stream in which so much was given, and so much is done.
    #[derive(Default)]
    struct Stream {
        given: Cell<u32>,
        done: Cell<u32>,
    }

    impl Stream {
        fn note(&self, under_way: &mut UnderWay, now: Instant) {
            self.given.set(self.given.get() + 1);
            let record = |event: &mut Event| {
                event.set(self.given.get());
                Ok(())
            };
            under_way.note(now, record).unwrap();
        }

        fn idle(&self, under_way: &mut UnderWay) -> bool {
            under_way.idle(|event| Ok(*event.get::<u32>().unwrap() <= self.done.get())).unwrap()
        }
    }

    #[test]
    fn everything_noted_is_waited_for() {
        let (stream, mut under_way, now) = (Stream::default(), UnderWay::default(), Instant::now());
        assert!(stream.idle(&mut under_way));
        for _ in 0..4 {
            stream.note(&mut under_way, now);
        }
        for (done, idle) in [(0, false), (1, false), (3, false), (4, true)] {
            stream.done.set(done);
            assert_eq!(stream.idle(&mut under_way), idle, "{done} of 4 done");
        }
        stream.note(&mut under_way, now);
        assert!(!stream.idle(&mut under_way));
        stream.done.set(5);
        assert!(stream.idle(&mut under_way));
    }

    #[test]
    fn the_oldest_counts_however_much_is_added() {
        let (stream, mut under_way, start) = (Stream::default(), UnderWay::default(), Instant::now());
        let late = |under_way: &mut UnderWay, seconds| {
            under_way.late(start + seconds * SECOND, 10 * SECOND, false, SECOND)
        };
        assert_eq!(late(&mut under_way, 1000), None);
        for second in 0..9 {
            stream.note(&mut under_way, start + second * SECOND);
        }
        assert_eq!(late(&mut under_way, 10), None);
        assert_eq!(late(&mut under_way, 11), Some(Late::Overdue));
        // The first is done after all: the last, given at second 8, is the next to be late.
        stream.done.set(1);
        assert!(!stream.idle(&mut under_way));
        assert_eq!(late(&mut under_way, 18), None);
        assert_eq!(late(&mut under_way, 19), Some(Late::Overdue));
        stream.done.set(9);
        assert!(stream.idle(&mut under_way));
        assert_eq!(late(&mut under_way, 1000), None);
    }

    #[test]
    fn a_rank_that_leaves_shortens_the_wait() {
        let (stream, mut under_way, start) = (Stream::default(), UnderWay::default(), Instant::now());
        let late = |under_way: &mut UnderWay, seconds, left| {
            under_way.late(start + seconds * SECOND, 100 * SECOND, left, 2 * SECOND)
        };
        // Nobody waits for anything.
        assert_eq!(late(&mut under_way, 0, true), None);
        stream.note(&mut under_way, start);
        assert_eq!(late(&mut under_way, 50, false), None);
        assert_eq!(late(&mut under_way, 51, true), None);
        assert_eq!(late(&mut under_way, 53, true), None);
        assert_eq!(late(&mut under_way, 54, true), Some(Late::Deserted));
    }
}
