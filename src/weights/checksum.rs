//! Compares a checkpoint with a manifest of SHA-256 sums, as `sha256sum` writes it, so that a flipped bit is found.

use super::checkpoint::Checkpoint;
use crate::Result;
use crate::error::Problems;
use sha2::{Digest, Sha256};
use std::path::Path;

/// The manifest's usual name, in the checkpoint's folder.
pub const MANIFEST: &str = "SHA256SUMS";

/// Hashes every file that the manifest in the checkpoint's folder names. `false`: there is no manifest.
///
/// # Errors
/// [`crate::Error::Checkpoint`] with every line that cannot be read, file that is absent and sum that differs.
pub fn check_manifest(checkpoint: &Checkpoint) -> Result<bool> {
    let Some(manifest) = checkpoint.text(MANIFEST)? else { return Ok(false) };
    let mut problems = Problems::new(checkpoint.name());
    for (number, line) in String::from_utf8_lossy(&manifest).lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        match parse(line) {
            Some((sum, file)) => check(checkpoint, sum, file, &mut problems),
            None => {
                let expected = "64 hexadecimal digits, two spaces and a plain file name";
                problems.add(MANIFEST, format!("line {}", number + 1), expected, format!("{line:?}"));
            }
        }
    }
    problems.into_result().map(|()| true)
}

/// Sum and file of "sum  file" or "sum *file".
fn parse(line: &str) -> Option<(&str, &str)> {
    let (sum, rest) = line.split_at_checked(64)?;
    let file = rest.strip_prefix("  ").or_else(|| rest.strip_prefix(" *"))?;
    let file = file.strip_prefix("./").unwrap_or(file);
    let plain = Path::new(file).file_name() == Some(file.as_ref());
    (plain && sum.bytes().all(|byte| byte.is_ascii_hexdigit())).then_some((sum, file))
}

fn check(checkpoint: &Checkpoint, sum: &str, file: &str, problems: &mut Problems) {
    let found = match checkpoint.source().map(file) {
        Ok(bytes) => Sha256::digest(&*bytes).iter().map(|byte| format!("{byte:02x}")).collect::<String>(),
        Err(error) => error.to_string(),
    };
    if !found.eq_ignore_ascii_case(sum) {
        problems.add(file, None, format!("SHA-256 {sum}, according to {MANIFEST}"), found);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_sha256sum_are_read() {
        let sum = "0".repeat(64);
        assert_eq!(parse(&format!("{sum}  a.json")), Some((sum.as_str(), "a.json")));
        assert_eq!(parse(&format!("{sum} *./a.json")), Some((sum.as_str(), "a.json")));
        assert_eq!(parse(&format!("{sum}  ../a.json")), None);
        assert_eq!(parse(&sum), None);
        assert_eq!(parse("zz  a"), None);
        assert_eq!(parse(&format!("{}x  a", &sum[1..])), None);
    }
}
