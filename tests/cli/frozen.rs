//! A thread of another process, held still: what a hung device or a lost machine looks like to the others.

use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::patience::eventually;

/// The thread is held until the drop.
pub struct Frozen {
    /// Its folder in /proc.
    thread: PathBuf,
    /// Traces it. A process of its own: tracing binds the thread that does it, and when the process ends, however this one
    /// does, the system lets go of what it traced.
    tracer: Child,
}

impl Frozen {
    /// Holds the thread of that name while it sleeps, when it holds no lock that others wait for. `None`, and said so, where
    /// the system does not allow it.
    pub fn thread(pid: u32, name: &str) -> Option<Frozen> {
        let named = || {
            let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
            let mut threads = threads.map(|entry| entry.unwrap().path());
            threads.find(|path| fs::read_to_string(path.join("comm")).is_ok_and(|comm| comm.trim() == name))
        };
        // A thread gives itself its name.
        eventually(name, || named().is_some());
        let thread = named().expect("it was there");
        let id: libc::pid_t = thread.file_name().unwrap().to_str().unwrap().parse().unwrap();
        eventually("it sleeps", || state(&thread) == Some('S'));
        let hold = move || {
            let done =
                |result: libc::c_long| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
            let mut status = 0;
            // SAFETY: plain system calls on a thread of a child that nobody has waited for; no pointers but one to a live status.
            unsafe {
                done(libc::ptrace(libc::PTRACE_SEIZE, id, 0, 0))?;
                done(libc::ptrace(libc::PTRACE_INTERRUPT, id, 0, 0))?;
                done(libc::waitpid(id, &raw mut status, libc::__WALL).into())
            }
        };
        let mut tracer = Command::new("cat");
        tracer.stdin(Stdio::piped()).stdout(Stdio::null());
        // SAFETY: between fork and exec there are system calls only; tracing outlives the exec.
        match unsafe { tracer.pre_exec(hold) }.spawn() {
            Ok(tracer) => Some(Frozen { thread, tracer }),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                println!("not tested: this system lets no process hold a thread of another");
                None
            }
            Err(error) => panic!("holding {name}: {error}"),
        }
    }

    /// Waits until the thread's process has ended it, held as it is, and lets go: before that, nobody sees the process end.
    pub fn killed(self) {
        eventually("its process ends", || matches!(state(&self.thread), None | Some('Z' | 'X')));
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = self.tracer.kill();
        let _ = self.tracer.wait();
    }
}

/// What a thread is doing, as /proc says; `None` when it is gone.
fn state(thread: &Path) -> Option<char> {
    let stat = fs::read_to_string(thread.join("stat")).ok()?;
    // The name before it stands in parentheses and may hold any character.
    stat.rsplit_once(") ")?.1.chars().next()
}
