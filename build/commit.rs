//! The commit that is built, read from git's files: no program is run, and a folder without them is no error.

use std::fs;
use std::path::{Path, PathBuf};

/// Digits told.
const DIGITS: usize = 12;

/// The commit checked out in `root`, or the one that a packaged crate was made of; and the files that decide it.
pub fn find(root: &Path) -> Option<(String, Vec<PathBuf>)> {
    packaged(root).or_else(|| checked_out(root)).map(|(commit, files)| (commit[..DIGITS].to_owned(), files))
}

/// `cargo package` leaves a note.
fn packaged(root: &Path) -> Option<(String, Vec<PathBuf>)> {
    let note = root.join(".cargo_vcs_info.json");
    let text = fs::read_to_string(&note).ok()?;
    let commit = text.split_once("\"sha1\"")?.1.split('"').nth(1)?;
    Some((hexadecimal(commit)?, vec![note]))
}

fn checked_out(root: &Path) -> Option<(String, Vec<PathBuf>)> {
    let git = root.join(".git");
    // A further work tree has a file that names its folder, and that folder one that names the repository's.
    let named = |file: &Path, prefix: &str| {
        let text = fs::read_to_string(file).ok()?;
        Some(file.parent()?.join(text.trim().strip_prefix(prefix)?))
    };
    let own = if git.is_file() { named(&git, "gitdir: ")? } else { git };
    let shared = named(&own.join("commondir"), "").unwrap_or_else(|| own.clone());
    let head = own.join("HEAD");
    let text = fs::read_to_string(&head).ok()?;
    let Some(branch) = text.trim().strip_prefix("ref: ") else {
        return Some((hexadecimal(text.trim())?, vec![head]));
    };
    let (loose, packed) = (shared.join(branch), shared.join("packed-refs"));
    let commit = match fs::read_to_string(&loose) {
        Ok(commit) => hexadecimal(commit.trim())?,
        Err(_) => {
            let refs = fs::read_to_string(&packed).ok()?;
            let line =
                refs.lines().find(|line| line.split_once(' ').is_some_and(|(_, name)| name == branch))?;
            hexadecimal(line.split(' ').next()?)?
        }
    };
    let files = [head, loose, packed];
    Some((commit, files.into_iter().filter(|file| file.exists()).collect()))
}

/// Only what looks like a commit is one.
fn hexadecimal(text: &str) -> Option<String> {
    let plain = text.len() >= DIGITS && text.bytes().all(|b| b.is_ascii_hexdigit());
    plain.then(|| text.to_owned())
}
