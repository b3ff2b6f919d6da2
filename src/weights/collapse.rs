//! Long lists of tensor names, readably: names that differ in their numbers only become one line with ranges.

use std::collections::BTreeMap;

/// Joins names that differ in one number, then those joined that differ in an earlier one:
/// `model.layers.{0-3}.mlp.experts.{0-7,9}.up_proj.weight`. Every name given is covered and no other.
pub fn collapse(names: &[&str]) -> Vec<String> {
    let mut lines: Vec<Vec<String>> =
        names.iter().map(|name| name.split('.').map(str::to_owned).collect()).collect();
    let most = lines.iter().map(Vec::len).max().unwrap_or(0);
    for position in (0..most).rev() {
        lines = join_at(lines, position);
    }
    lines.into_iter().map(|parts| parts.join(".")).collect()
}

/// Joins names that are equal but for the number at `position`; the order of first appearance stays.
fn join_at(lines: Vec<Vec<String>>, position: usize) -> Vec<Vec<String>> {
    let mut out: Vec<(Vec<String>, Vec<u64>)> = Vec::new();
    let mut places: BTreeMap<Vec<String>, usize> = BTreeMap::new();
    for mut parts in lines {
        let Some(number) = parts.get(position).and_then(|part| number(part)) else {
            out.push((parts, Vec::new()));
            continue;
        };
        parts[position].clear();
        let place = *places.entry(parts).or_insert_with_key(|parts| {
            out.push((parts.clone(), Vec::new()));
            out.len() - 1
        });
        out[place].1.push(number);
    }
    out.into_iter()
        .map(|(mut parts, numbers)| {
            if !numbers.is_empty() {
                parts[position] = ranges(numbers);
            }
            parts
        })
        .collect()
}

/// The part as a number, when it is written the way [`ranges`] would write it.
fn number(part: &str) -> Option<u64> {
    part.parse().ok().filter(|number: &u64| number.to_string() == part)
}

/// `7` or `{0-3,5}`.
fn ranges(mut numbers: Vec<u64>) -> String {
    numbers.sort_unstable();
    numbers.dedup();
    if let [only] = numbers[..] {
        return only.to_string();
    }
    let runs = numbers.chunk_by(|a, b| a + 1 == *b).map(|run| match run {
        [one] => one.to_string(),
        [first, .., last] => format!("{first}-{last}"),
        [] => unreachable!("chunk_by yields no empty run"),
    });
    format!("{{{}}}", runs.collect::<Vec<_>>().join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_become_ranges() {
        let mut names = Vec::new();
        for layer in 0..3 {
            for expert in [0, 1, 2, 5] {
                names.push(format!("m.layers.{layer}.experts.{expert}.up.weight"));
            }
        }
        names.push("m.norm.weight".to_owned());
        names.push("m.layers.7.experts.1.up.weight".to_owned());
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        assert_eq!(
            collapse(&names),
            ["m.layers.{0-2}.experts.{0-2,5}.up.weight", "m.norm.weight", "m.layers.7.experts.1.up.weight"]
        );
    }

    #[test]
    fn what_cannot_be_joined_stays() {
        assert_eq!(collapse(&["a.1.b", "a.2.c", "a.01.b"]), ["a.1.b", "a.2.c", "a.01.b"]);
        assert!(collapse(&[]).is_empty());
        assert_eq!(collapse(&["a.18446744073709551615", "a.18446744073709551614"]).len(), 1);
    }
}
