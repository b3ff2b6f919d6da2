//! Runs the binary: to its end, or as a server that is stopped by a signal.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::client::Client;
use crate::patience::{PATIENCE, eventually};

/// What a run came to.
#[derive(Debug)]
pub struct Outcome {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Outcome {
    /// Standard output of a run that must have succeeded.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        self.stdout
    }

    /// The message of a run that must have been refused before anything listened, with each of `parts` in it.
    #[track_caller]
    pub fn refused(self, parts: &[&str]) -> String {
        assert_eq!(self.code, Some(2), "{}{}", self.stdout, self.stderr);
        assert!(!self.stderr.contains("listening"), "{}", self.stderr);
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        for part in parts {
            assert!(self.stderr.contains(part), "no {part:?} in: {}", self.stderr);
        }
        self.stderr
    }
}

/// Runs the binary in `folder` to its end.
pub fn moeyard_in<S: AsRef<OsStr>>(folder: &Path, arguments: impl IntoIterator<Item = S>) -> Outcome {
    let mut child = spawn(folder, arguments);
    let stdout = text_of(child.stdout.take().unwrap());
    let stderr = text_of(child.stderr.take().unwrap());
    let code = end_of(&mut child);
    let outcome = Outcome { code, stdout: stdout.join().unwrap(), stderr: stderr.join().unwrap() };
    assert!(outcome.code.is_some(), "ended by a signal or by the test's patience: {outcome:?}");
    outcome
}

/// Runs the binary to its end; no argument is a relative path.
pub fn moeyard<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Outcome {
    moeyard_in(Path::new("."), arguments)
}

fn spawn<S: AsRef<OsStr>>(folder: &Path, arguments: impl IntoIterator<Item = S>) -> Child {
    Command::new(env!("CARGO_BIN_EXE_moeyard"))
        .args(arguments)
        .current_dir(folder)
        .env_remove("MOEYARD_LOG")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary starts")
}

fn text_of(mut pipe: impl Read + Send + 'static) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        pipe.read_to_end(&mut bytes).expect("a pipe");
        String::from_utf8(bytes).expect("output is UTF-8")
    })
}

/// Waits for the end; kills what does not come to it.
pub fn end_of(child: &mut Child) -> Option<i32> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = child.try_wait().expect("a child") {
            return status.code();
        }
        if Instant::now() > deadline {
            child.kill().expect("a child");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// `moeyard serve` on a free port; killed when dropped.
pub struct Served {
    pub address: SocketAddr,
    child: Child,
    /// What was logged so far.
    log: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
}

impl Served {
    /// Starts it in `folder` and waits until it listens.
    pub fn start<S: AsRef<OsStr>>(folder: &Path, arguments: impl IntoIterator<Item = S>) -> Served {
        let always = ["serve", "--port", "0"].map(|s| OsStr::new(s).to_owned());
        let given = arguments.into_iter().map(|s| s.as_ref().to_owned());
        let mut child = spawn(folder, always.into_iter().chain(given));
        let mut lines = BufReader::new(child.stderr.take().unwrap());
        let mut log = String::new();
        // A server that ends instead closes the pipe.
        let address = loop {
            let before = log.len();
            assert!(lines.read_line(&mut log).expect("the log is UTF-8") > 0, "ended: {log}");
            if let Some((_, rest)) = log[before..].split_once("listening on http://") {
                break rest.split_whitespace().next().unwrap().parse().expect("an address");
            }
        };
        let log = Arc::new(Mutex::new(log));
        let more = Arc::clone(&log);
        let reader = std::thread::spawn(move || {
            for line in lines.lines() {
                let mut log = more.lock().unwrap();
                log.push_str(&line.expect("the log is UTF-8"));
                log.push('\n');
            }
        });
        Served { address, child, log, reader: Some(reader) }
    }

    /// Waits until the log has `part`.
    pub fn logged(&self, part: &str) {
        eventually(part, || self.log.lock().unwrap().contains(part));
    }

    pub fn client(&self) -> Client {
        Client::connect(self.address)
    }

    /// Sends SIGTERM.
    pub fn signal(&self) {
        // SAFETY: a plain system call; the child has not been waited for, so its id is its own.
        assert_eq!(unsafe { libc::kill(self.child.id() as i32, libc::SIGTERM) }, 0);
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends SIGTERM; the exit code and all that was logged.
    pub fn terminate(self) -> (Option<i32>, String) {
        self.signal();
        self.ended()
    }

    /// Waits until it ends by itself; the exit code and all that was logged.
    pub fn ended(mut self) -> (Option<i32>, String) {
        let code = end_of(&mut self.child);
        self.reader.take().unwrap().join().unwrap();
        (code, std::mem::take(&mut *self.log.lock().unwrap()))
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
