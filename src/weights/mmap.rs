//! Maps a file read-only: the only `unsafe` of this module.
//!
//! A map of a file that shrinks turns reads beyond its new end into SIGBUS. Weights are therefore packed into memory of the run, and no
//! map is read once they are: a file truncated afterwards cannot hurt a running server.

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

impl FileBytes {
    /// The process gives back the memory of what it has read; the system's cache keeps it, and reading it again brings it back.
    pub fn forget(&self) {
        #[cfg(unix)]
        if let FileBytes::Mapped(map) = self {
            // SAFETY: pages of a shared, read-only map of a file have nothing that the file has not.
            let done = unsafe { map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
            if let Err(error) = done {
                tracing::debug!(%error, "memory of a checkpoint's map stays until it is closed");
            }
        }
    }
}

/// Has the system read part of a map in one go, if it is not in memory: page after page, as they are touched, would take a slow disk
/// much longer. Does not wait.
pub fn will_need(bytes: &[u8]) {
    #[cfg(unix)]
    {
        /// The smallest page there is: larger ones make this a hint that is refused, or one that starts a little late.
        const PAGE: usize = 4096;
        let start = bytes.as_ptr() as usize / PAGE * PAGE;
        let len = bytes.as_ptr() as usize + bytes.len() - start;
        // SAFETY: this advice changes no contents, of whatever memory it is given for.
        unsafe { libc::madvise(start as *mut libc::c_void, len, libc::MADV_WILLNEED) };
    }
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
    // could change or cut the file while weights are being packed; every engine that maps its weights accepts
    // that (cut: SIGBUS while loading; changed: other weights). All offsets used on it are checked against its length.
    let map = unsafe { memmap2::Mmap::map(&file)? };
    Ok(FileBytes::Mapped(map))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_forgotten_is_read_again() {
        let folder = tempfile::TempDir::new().unwrap();
        let path = folder.path().join("weights");
        let bytes: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let map = map(&path).unwrap();
        assert_eq!(*map, bytes[..]);
        map.forget();
        assert_eq!(*map, bytes[..]);
    }
}
