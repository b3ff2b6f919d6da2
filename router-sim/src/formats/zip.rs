//! Entries of a zip archive (`.npz`, PyTorch's `.pt`), each read as a stream of its own. Bounded: an entry never gives
//! more bytes than the directory promises, and its checksum is verified at its end.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use flate2::Crc;
use flate2::read::DeflateDecoder;
use zip::{CompressionMethod, ZipArchive};

use crate::{Error, Result};

/// First bytes of an archive with entries.
pub const MAGIC: &[u8] = b"PK\x03\x04";
/// Most entries of an archive.
const MAX_ENTRIES: usize = 1 << 20;

/// The directory of an archive.
#[derive(Debug)]
pub struct Archive {
    path: PathBuf,
    entries: Vec<Entry>,
}

/// Where an entry is.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Its name, `topk.npy` for instance.
    pub name: String,
    /// Its size once unpacked, in bytes.
    pub bytes: u64,
    packed_bytes: u64,
    start: u64,
    crc: u32,
    deflated: bool,
}

impl Archive {
    /// Reads the directory.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::File`] when it is no archive, or packed in a way that is not read.
    pub fn open(path: &Path) -> Result<Self> {
        let refuse = |why: String| Error::File { path: path.into(), why };
        let file = File::open(path).map_err(|source| Error::Io { path: path.into(), source })?;
        let mut archive = ZipArchive::new(BufReader::new(file)).map_err(|e| refuse(format!("zip: {e}")))?;
        if archive.len() > MAX_ENTRIES {
            return Err(refuse(format!("{} zip entries exceed the limit of {MAX_ENTRIES}", archive.len())));
        }
        let mut entries = Vec::with_capacity(archive.len());
        for index in 0..archive.len() {
            let entry = archive.by_index_raw(index).map_err(|e| refuse(format!("zip entry {index}: {e}")))?;
            let name = entry.name().map_err(|e| refuse(format!("zip entry {index}: {e}")))?.into_owned();
            let deflated = match entry.compression() {
                CompressionMethod::Stored => false,
                CompressionMethod::Deflated => true,
                other => {
                    return Err(refuse(format!(
                        "zip entry {name:?} is packed by {other}, which is not read"
                    )));
                }
            };
            let Some(start) = entry.data_start() else {
                return Err(refuse(format!("zip entry {name:?} has no data")));
            };
            entries.push(Entry {
                name,
                bytes: entry.size(),
                packed_bytes: entry.compressed_size(),
                start,
                crc: entry.crc32(),
                deflated,
            });
        }
        Ok(Archive { path: path.into(), entries })
    }

    /// All entries, in the order of the directory.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The first entry that the condition holds for.
    pub fn find(&self, condition: impl Fn(&str) -> bool) -> Option<&Entry> {
        self.entries.iter().find(|entry| condition(&entry.name))
    }

    /// The bytes of an entry.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn read(&self, entry: &Entry) -> Result<Box<dyn Read + Send>> {
        let io = |source| Error::Io { path: self.path.clone(), source };
        let mut file = File::open(&self.path).map_err(io)?;
        file.seek(SeekFrom::Start(entry.start)).map_err(io)?;
        let packed = BufReader::with_capacity(1 << 16, file).take(entry.packed_bytes);
        let data: Box<dyn Read + Send> = match entry.deflated {
            false => Box::new(packed),
            true => Box::new(DeflateDecoder::new(packed)),
        };
        Ok(Box::new(Checked { data, left: entry.bytes, crc: Crc::new(), expected: entry.crc }))
    }
}

/// Stops where the directory says and checks the sum there.
struct Checked {
    data: Box<dyn Read + Send>,
    left: u64,
    crc: Crc,
    expected: u32,
}

impl Read for Checked {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        if most == 0 {
            return Ok(0);
        }
        let n = self.data.read(&mut buffer[..most])?;
        self.crc.update(&buffer[..n]);
        self.left -= n as u64;
        if self.left == 0 && self.crc.sum() != self.expected {
            let why = format!("checksum {:08x}, but {:08x} was written", self.crc.sum(), self.expected);
            return Err(io::Error::new(io::ErrorKind::InvalidData, why));
        }
        Ok(n)
    }
}
