//! Where a checkpoint's files come from: a folder, or bytes that are part of the program (the demo model).

use super::mmap::{self, FileBytes};
use std::borrow::Cow;
use std::io;
use std::path::{Path, PathBuf};

/// A file that is part of the program: its name in the checkpoint and its bytes.
pub type EmbeddedFile = (&'static str, &'static [u8]);

/// Largest JSON or template file that is read; published tokenizers reach some 30 MB.
const MAX_TEXT_BYTES: u64 = 256 << 20;

/// The files of one checkpoint, by name.
#[derive(Debug)]
pub enum Source {
    /// A folder in Hugging Face layout.
    Folder(PathBuf),
    /// Files embedded in the program.
    Embedded(&'static [EmbeddedFile]),
}

impl Source {
    /// How messages call the checkpoint.
    pub fn name(&self) -> String {
        match self {
            Source::Folder(path) => path.display().to_string(),
            Source::Embedded(_) => "embedded model".to_owned(),
        }
    }

    /// The folder, for a checkpoint that has one.
    pub fn folder(&self) -> Option<&Path> {
        match self {
            Source::Folder(path) => Some(path),
            Source::Embedded(_) => None,
        }
    }

    /// The file for random access.
    ///
    /// # Errors
    /// `NotFound` when there is no such file, and whatever else mapping it met.
    pub fn map(&self, name: &str) -> io::Result<FileBytes> {
        match self {
            Source::Folder(path) => mmap::map(&path.join(name)),
            Source::Embedded(files) => find(files, name).map(FileBytes::Static),
        }
    }

    /// The whole of a small file, copied.
    ///
    /// # Errors
    /// `NotFound` when there is no such file; `FileTooLarge` above 256 MiB.
    pub fn read(&self, name: &str) -> io::Result<Cow<'static, [u8]>> {
        match self {
            Source::Folder(path) => {
                let path = path.join(name);
                let found = std::fs::metadata(&path)?;
                if !found.is_file() {
                    return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
                }
                if found.len() > MAX_TEXT_BYTES {
                    let why = format!("{} bytes, more than the {MAX_TEXT_BYTES} allowed", found.len());
                    return Err(io::Error::new(io::ErrorKind::FileTooLarge, why));
                }
                std::fs::read(path).map(Cow::Owned)
            }
            Source::Embedded(files) => find(files, name).map(Cow::Borrowed),
        }
    }

    /// Names of all files, sorted; sub-folders are left out.
    ///
    /// # Errors
    /// When the folder cannot be listed.
    pub fn list(&self) -> io::Result<Vec<String>> {
        let mut names = match self {
            Source::Folder(path) => {
                let mut names = Vec::new();
                for entry in std::fs::read_dir(path)? {
                    let entry = entry?;
                    if !entry.path().is_dir() {
                        names.push(entry.file_name().to_string_lossy().into_owned());
                    }
                }
                names
            }
            Source::Embedded(files) => files.iter().map(|(name, _)| (*name).to_owned()).collect(),
        };
        names.sort();
        Ok(names)
    }
}

fn find(files: &[EmbeddedFile], name: &str) -> io::Result<&'static [u8]> {
    files
        .iter()
        .find(|(have, _)| *have == name)
        .map(|(_, bytes)| *bytes)
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no such file"))
}
