//! Which part of a matrix a tensor-parallel rank owns: pure functions of (rank, degree). The ranges go to
//! [`super::WeightReader`], which touches only their bytes.

use std::ops::Range;

/// Part `rank` of `parts` of `0..len`: consecutive, as equal as can be, the longer ones first.
///
/// # Panics
/// When `rank` is not below `parts`.
pub fn even(len: usize, rank: usize, parts: usize) -> Range<usize> {
    assert!(rank < parts, "part {rank} of {parts}");
    let (each, longer) = (len / parts, len % parts);
    let start = rank * each + rank.min(longer);
    start..start + each + usize::from(rank < longer)
}

/// Query heads of a rank: consecutive equal parts. `config` refuses degrees that do not divide.
///
/// # Panics
/// When `parts` does not divide `heads`, or `rank` is not below `parts`.
pub fn query_heads(heads: usize, rank: usize, parts: usize) -> Range<usize> {
    assert!(heads.is_multiple_of(parts), "{heads} query heads over {parts} ranks");
    even(heads, rank, parts)
}

/// KV heads that the query heads of a rank read. With at most `kv_heads` ranks these are consecutive equal parts; with
/// more, each head is replicated on `parts / kv_heads` ranks.
///
/// # Panics
/// When neither of `kv_heads` and `parts` divides the other, or `rank` is not below `parts`.
pub fn kv_heads(kv_heads: usize, rank: usize, parts: usize) -> Range<usize> {
    if parts <= kv_heads {
        assert!(kv_heads.is_multiple_of(parts), "{kv_heads} KV heads over {parts} ranks");
        return even(kv_heads, rank, parts);
    }
    assert!(rank < parts, "part {rank} of {parts}");
    assert!(parts.is_multiple_of(kv_heads), "{kv_heads} KV heads over {parts} ranks");
    let head = rank / (parts / kv_heads);
    head..head + 1
}

/// Rows (or columns) of a projection that belong to these heads.
pub fn of_heads(heads: Range<usize>, head_width: usize) -> Range<usize> {
    heads.start * head_width..heads.end * head_width
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The parts follow each other and cover everything.
    fn covers(len: usize, parts: usize, part: impl Fn(usize) -> Range<usize>) {
        let mut end = 0;
        for rank in 0..parts {
            assert_eq!(part(rank).start, end);
            end = part(rank).end;
        }
        assert_eq!(end, len);
    }

    #[test]
    fn even_parts_cover_and_differ_by_one_at_most() {
        for (len, parts) in [(10, 3), (2, 4), (0, 2), (64, 8), (7, 1)] {
            covers(len, parts, |rank| even(len, rank, parts));
            let sizes: Vec<usize> = (0..parts).map(|rank| even(len, rank, parts).len()).collect();
            assert!(sizes.iter().max().unwrap() - sizes.iter().min().unwrap() <= 1, "{sizes:?}");
        }
    }

    #[test]
    fn query_heads_find_their_kv_heads() {
        // With grouped queries, query head h reads KV head h / (heads / kv).
        for (heads, kv) in [(8, 8), (8, 2), (8, 1), (12, 4)] {
            for parts in [1, 2, 4] {
                covers(heads, parts, |rank| query_heads(heads, rank, parts));
                for rank in 0..parts {
                    let own = kv_heads(kv, rank, parts);
                    let read: std::collections::BTreeSet<usize> =
                        query_heads(heads, rank, parts).map(|head| head / (heads / kv)).collect();
                    assert_eq!(
                        own.collect::<Vec<_>>(),
                        read.into_iter().collect::<Vec<_>>(),
                        "{heads} {kv} {parts}"
                    );
                }
            }
        }
    }

    #[test]
    fn heads_become_rows() {
        assert_eq!(of_heads(2..4, 24), 48..96);
    }

    #[test]
    #[should_panic(expected = "3 KV heads over 2 ranks")]
    fn indivisible_heads_are_a_bug_above() {
        kv_heads(3, 0, 2);
    }
}
