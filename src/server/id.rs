//! Random identifiers and seeds without a random-number dependency.

use std::hash::{BuildHasher, RandomState};

/// 64 unpredictable bits: the standard library keys each `RandomState` from the operating system's generator (once per
/// thread, then counted on), and SipHash makes the keys' difference unrecognisable.
pub fn random_u64() -> u64 {
    RandomState::new().hash_one(0u8)
}

/// `prefix-` and 128 bits in hexadecimal.
pub fn unique(prefix: &str) -> String {
    format!("{prefix}-{:016x}{:016x}", random_u64(), random_u64())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn ids_do_not_repeat() {
        let ids: HashSet<String> = (0..1000).map(|_| unique("cmpl")).collect();
        assert_eq!(ids.len(), 1000);
        assert!(ids.iter().all(|id| id.len() == 37 && id.starts_with("cmpl-")));
    }
}
