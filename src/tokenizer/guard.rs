//! A fence around the `tokenizers` crate, which panics where its regular-expression engine gives up.

use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs `work` and turns its error or panic into a message. The tokenizer is only read inside, so nothing can be left
/// half changed.
pub(super) fn guarded<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(|e| e.to_string()),
        Err(panic) => Err(panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|s| s.to_string()))
            .unwrap_or_else(|| "the tokenizer library panicked".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::guarded;

    #[test]
    fn errors_and_panics_become_messages() {
        assert_eq!(guarded(|| Ok(7)), Ok(7));
        assert_eq!(guarded::<()>(|| Err("no".into())), Err("no".to_string()));
        assert_eq!(guarded::<()>(|| panic!("gave up at {}", 3)), Err("gave up at 3".to_string()));
    }
}
