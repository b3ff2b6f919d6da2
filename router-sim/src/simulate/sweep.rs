//! Sweeps: many runs in parallel, and a file that keeps the finished ones, so that a sweep that was interrupted goes on
//! where it stopped.
//!
//! The file holds JSON, a line each: first what all runs share, then one finished run after another. A line is written at
//! once; a line that a kill cut is dropped when the file is opened again.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc;
use std::thread;

use serde::{Deserialize, Serialize};

use crate::report::data::Run;
use crate::{Error, Result};

/// Runs all points on so many threads and hands over each result, with its index, as it comes. The first error ends the
/// sweep once the runs under way have ended.
///
/// # Errors
/// That of a run or of `finished`.
pub fn sweep<P: Sync>(
    points: &[P],
    threads: usize,
    run: impl Fn(&P) -> Result<Run> + Sync,
    mut finished: impl FnMut(usize, Run) -> Result<()>,
) -> Result<()> {
    let next = AtomicUsize::new(0);
    let (results, incoming) = mpsc::channel();
    thread::scope(|scope| {
        for _ in 0..threads.clamp(1, points.len().max(1)) {
            let (results, next, run) = (results.clone(), &next, &run);
            scope.spawn(move || {
                loop {
                    let index = next.fetch_add(1, Relaxed);
                    let Some(point) = points.get(index) else { return };
                    // Nobody listens any more after an error.
                    if results.send((index, run(point))).is_err() {
                        return;
                    }
                }
            });
        }
        drop(results);
        for (index, result) in incoming {
            let handed_over = result.and_then(|run| finished(index, run));
            if handed_over.is_err() {
                next.store(points.len(), Relaxed);
                return handed_over;
            }
        }
        Ok(())
    })
}

/// The first line.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Shared {
    /// What all runs share, in words.
    sweep: String,
}

/// Any other line.
#[derive(Debug, Serialize, Deserialize)]
struct Finished {
    point: String,
    run: Run,
}

/// The file of a sweep.
#[derive(Debug)]
pub struct SweepFile {
    path: PathBuf,
    file: File,
}

impl SweepFile {
    /// Opens a sweep's file, or begins one, and gives the runs that it has, by point. `sweep` says in words what all runs
    /// share; a file that says otherwise is refused.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::File`] for a file of another sweep or of something else.
    pub fn open(path: &Path, sweep: &str) -> Result<(SweepFile, BTreeMap<String, Run>)> {
        let io = |source| Error::Io { path: path.into(), source };
        let refuse = |why: String| Error::File { path: path.into(), why };
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(io)?;
        let text = std::io::read_to_string(&file).map_err(io)?;
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        file.set_len(whole as u64).map_err(io)?;
        file.seek(std::io::SeekFrom::End(0)).map_err(io)?;
        let mut this = SweepFile { path: path.into(), file };
        let mut lines = text[..whole].lines();
        let shared = Shared { sweep: sweep.to_owned() };
        match lines.next() {
            None => this.write(&shared)?,
            Some(line) => {
                let found: Shared =
                    serde_json::from_str(line).map_err(|e| refuse(format!("not a sweep's file: {e}")))?;
                if found != shared {
                    return Err(refuse(format!(
                        "holds another sweep: {}; this one is: {sweep}",
                        found.sweep
                    )));
                }
            }
        }
        let mut finished = BTreeMap::new();
        for (number, line) in lines.enumerate() {
            let Finished { point, run } = serde_json::from_str(line).map_err(|why| Error::Record {
                path: path.into(),
                record: number as u64 + 1,
                why: why.to_string(),
            })?;
            finished.insert(point, run);
        }
        Ok((this, finished))
    }

    /// Keeps a finished run.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn push(&mut self, point: &str, run: &Run) -> Result<()> {
        self.write(&Finished { point: point.to_owned(), run: run.clone() })
    }

    fn write(&mut self, line: &impl Serialize) -> Result<()> {
        let mut text = serde_json::to_string(line).expect("plain data");
        text.push('\n');
        self.file.write_all(text.as_bytes()).map_err(|source| Error::Io { path: self.path.clone(), source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(name: &str) -> Run {
        Run { name: name.to_owned(), slots: 7, ..Run::default() }
    }

    #[test]
    fn a_sweep_hands_over_every_result_and_stops_at_an_error() {
        let points: Vec<usize> = (0..20).collect();
        for threads in [0, 1, 3, 50] {
            let mut seen = [0; 20];
            let handed = |index: usize, run: Run| {
                assert_eq!(run.name, index.to_string());
                seen[index] += 1;
                Ok(())
            };
            sweep(&points, threads, |point| Ok(run(&point.to_string())), handed).unwrap();
            assert_eq!(seen, [1; 20]);
        }
        let fails = |point: &usize| match point {
            5 => Err(Error::Impossible("five".into())),
            _ => Ok(run("")),
        };
        assert_eq!(sweep(&points, 2, fails, |_, _| Ok(())).unwrap_err().to_string(), "five");
        sweep(&[] as &[usize], 2, fails, |_, _| panic!("there is nothing")).unwrap();
    }

    #[test]
    fn a_file_keeps_what_is_finished() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sweep.jsonl");
        let (mut file, finished) = SweepFile::open(&path, "a").unwrap();
        assert!(finished.is_empty());
        file.push("one", &run("x")).unwrap();
        drop(file);
        // A kill in the middle of a line.
        let mut torn = OpenOptions::new().append(true).open(&path).unwrap();
        torn.write_all(b"{\"point\": \"two\", \"ru").unwrap();
        let (mut file, finished) = SweepFile::open(&path, "a").unwrap();
        assert_eq!(finished.into_iter().collect::<Vec<_>>(), [("one".to_owned(), run("x"))]);
        file.push("two", &run("y")).unwrap();
        assert_eq!(SweepFile::open(&path, "a").unwrap().1.len(), 2);
        let other = SweepFile::open(&path, "b").unwrap_err().to_string();
        assert!(other.contains("holds another sweep: a; this one is: b"), "{other}");
        std::fs::write(&path, "[1, 2]\n").unwrap();
        assert!(SweepFile::open(&path, "a").unwrap_err().to_string().contains("not a sweep's file"));
        std::fs::write(&path, "{\"sweep\": \"a\"}\n{}\n").unwrap();
        assert!(SweepFile::open(&path, "a").unwrap_err().to_string().contains("record 1"));
    }
}
