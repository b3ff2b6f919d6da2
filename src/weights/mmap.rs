//! Maps a file read-only: the only `unsafe` of this module.
//!
//! A map of a file that shrinks turns reads beyond its new end into SIGBUS. Maps therefore live only as long as a
//! [`super::Checkpoint`], which a loader drops as soon as it has copied the weights out: a file truncated afterwards
//! cannot hurt a running server.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::path::Path;

/// The bytes of one file of a checkpoint.
#[derive(Debug)]
pub enum FileBytes {
    /// Mapped from a folder.
    Mapped(memmap2::Mmap),
    /// Part of the program, or of a file without bytes.
    Static(&'static [u8]),
}

impl Deref for FileBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            FileBytes::Mapped(map) => map,
            FileBytes::Static(bytes) => bytes,
        }
    }
}

/// Maps the regular file at `path`; symbolic links are followed, as hub caches are made of them.
///
/// # Errors
/// What the operating system says; `InvalidInput` for anything but a regular file (opening a pipe would block).
pub fn map(path: &Path) -> io::Result<FileBytes> {
    let found = std::fs::metadata(path)?;
    if !found.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    if found.len() == 0 {
        return Ok(FileBytes::Static(&[]));
    }
    let file = File::open(path)?;
    // SAFETY: the map is read-only and private to this process, which never writes checkpoint files. Another process
    // could change or cut the file while weights are being copied out; every engine that maps its weights accepts
    // that (cut: SIGBUS while loading; changed: other weights). All offsets used on it are checked against its length.
    let map = unsafe { memmap2::Mmap::map(&file)? };
    Ok(FileBytes::Mapped(map))
}
