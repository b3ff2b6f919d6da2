//! Opens input files, counts what was read of them, and writes output files whole or not at all.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::{Error, Result};

/// Called now and then with the bytes read so far and those of the whole file.
pub type Progress = Arc<dyn Fn(u64, u64) + Send + Sync>;

/// Bytes of a file that may be held in memory at once, where a format has to be.
pub const MAX_IN_MEMORY: u64 = 1 << 30;

/// A file that is read, and its size.
pub type Source = BufReader<Watched>;

/// A file that tells how far it was read.
pub struct Watched {
    file: File,
    at: u64,
    bytes: u64,
    progress: Option<Progress>,
}

impl std::fmt::Debug for Watched {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watched").field("at", &self.at).field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

impl Watched {
    /// Bytes of the file; 0 for a pipe.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Read for Watched {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read(buffer)?;
        self.at += n as u64;
        if let Some(progress) = &self.progress {
            progress(self.at, self.bytes);
        }
        Ok(n)
    }
}

impl Seek for Watched {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.at = self.file.seek(to)?;
        Ok(self.at)
    }
}

/// Opens a file.
///
/// # Errors
/// [`Error::Io`].
pub fn open(path: &Path, progress: Option<Progress>) -> Result<Source> {
    let io = |source| Error::Io { path: path.into(), source };
    let file = File::open(path).map_err(io)?;
    let metadata = file.metadata().map_err(io)?;
    if metadata.is_dir() {
        return Err(Error::File { path: path.into(), why: "a folder, expected a file".into() });
    }
    Ok(BufReader::with_capacity(1 << 16, Watched { file, at: 0, bytes: metadata.len(), progress }))
}

/// A whole file, up to [`MAX_IN_MEMORY`].
///
/// # Errors
/// [`Error::Io`], [`Error::File`] when it is larger.
pub fn read_whole(path: &Path, progress: Option<Progress>) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut source = open(path, progress)?.take(MAX_IN_MEMORY + 1);
    source.read_to_end(&mut bytes).map_err(|source| Error::Io { path: path.into(), source })?;
    if bytes.len() as u64 > MAX_IN_MEMORY {
        let why = format!("more than {MAX_IN_MEMORY} bytes, the limit for this format; use .npy or a trace");
        return Err(Error::File { path: path.into(), why });
    }
    Ok(bytes)
}

/// A file under a temporary name beside its own until [`Output::finish`]; dropped before, it leaves nothing behind.
#[derive(Debug)]
pub struct Output {
    path: PathBuf,
    temporary: PathBuf,
    file: Option<BufWriter<File>>,
}

impl Output {
    /// Begins a file.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(path: &Path) -> Result<Self> {
        let mut name = path.as_os_str().to_owned();
        name.push(".tmp");
        let temporary = PathBuf::from(name);
        let file =
            File::create(&temporary).map_err(|source| Error::Io { path: temporary.clone(), source })?;
        Ok(Output { path: path.into(), temporary, file: Some(BufWriter::with_capacity(1 << 16, file)) })
    }

    /// The name that the file will have.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gives the file its name.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn finish(mut self) -> Result<()> {
        let file = self.file.take().expect("there until it is finished");
        let written = file.into_inner().map_err(io::IntoInnerError::into_error);
        written
            .and_then(|_| fs::rename(&self.temporary, &self.path))
            .inspect_err(|_| drop(fs::remove_file(&self.temporary)))
            .map_err(|source| Error::Io { path: self.path.clone(), source })
    }

    /// Gives the file its name when it holds `items` of something, at least one.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::File`] for an empty file, which no reader would take.
    pub fn finish_with(self, items: u64) -> Result<u64> {
        if items == 0 {
            let why = "not written: the input has no usable record".to_owned();
            return Err(Error::File { path: self.path.clone(), why });
        }
        self.finish().map(|()| items)
    }

    /// Wraps an error of writing.
    pub fn error(&self, source: io::Error) -> Error {
        Error::Io { path: self.path.clone(), source }
    }

    fn file(&mut self) -> &mut BufWriter<File> {
        self.file.as_mut().expect("there until it is finished")
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file().flush()
    }
}

impl Seek for Output {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file().seek(to)
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if self.file.take().is_some() {
            // Nobody is left to tell.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// Writes a text whole or not at all.
///
/// # Errors
/// [`Error::Io`].
pub fn write_text(path: &Path, text: &str) -> Result<()> {
    let mut output = Output::create(path)?;
    output.write_all(text.as_bytes()).map_err(|e| output.error(e))?;
    output.finish()
}
