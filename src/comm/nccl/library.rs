//! NCCL's own functions: the table this program calls, found in a library when it is asked for and never before.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::path::Path;

/// The oldest version whose functions and configuration are those declared here.
const OLDEST: c_int = 2_18_00;
/// From here on several ranks may share a GPU, where the environment allows it.
const SHARES_GPUS: c_int = 2_30_00;
/// What the loader is asked for, where the user names nothing.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

/// `ncclComm_t`.
pub(super) type Handle = *mut c_void;
/// `cudaStream_t`.
pub(super) type Stream = *mut c_void;
/// `ncclResult_t`.
pub(super) type Code = c_int;

pub(super) const SUCCESS: Code = 0;
pub(super) const IN_PROGRESS: Code = 7;
/// `ncclUint8`: rows travel as bytes.
pub(super) const BYTES: c_int = 1;

/// `ncclUniqueId`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub(super) struct UniqueId {
    pub bytes: [u8; 128],
}

/// `ncclConfig_t` as of 2.18; NCCL knows by `size` and `version` what a program does not.
#[repr(C)]
pub(super) struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
    /// Padding in 2.18, and a field of its own since.
    traffic_class: c_int,
}

const _: () = assert!(size_of::<Config>() == 48 && size_of::<UniqueId>() == 128);

impl Config {
    /// Calls return before they are done: what they came to is asked for, and a dead peer stops nobody.
    pub fn non_blocking() -> Config {
        let undefined = c_int::MIN;
        Config {
            size: size_of::<Config>(),
            magic: 0xcafe_beef,
            version: OLDEST as c_uint,
            blocking: 0,
            cga_cluster_size: undefined,
            min_ctas: undefined,
            max_ctas: undefined,
            net_name: std::ptr::null(),
            split_share: undefined,
            traffic_class: undefined,
        }
    }
}

/// Declares the table and how it is filled from symbols.
macro_rules! functions {
    ($($field:ident = $symbol:literal: fn($($argument:ty),*) -> $result:ty;)*) => {
        /// One function of NCCL each, named after it.
        #[derive(Clone, Copy)]
        pub(super) struct Functions {
            $(pub $field: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        impl Functions {
            /// Takes every function from `library`, or names the first that is missing.
            fn of(library: &libloading::Library) -> Result<Functions, String> {
                Ok(Functions {
                    $($field: {
                        // SAFETY: the type is that of nccl.h, which NCCL keeps within major version 2.
                        let found = unsafe {
                            library.get::<unsafe extern "C" fn($($argument),*) -> $result>($symbol)
                        };
                        *found.map_err(|_| format!("it has no {}", String::from_utf8_lossy($symbol)))?
                    },)*
                })
            }
        }
    };
}

functions! {
    get_version = b"ncclGetVersion": fn(*mut c_int) -> Code;
    get_unique_id = b"ncclGetUniqueId": fn(*mut UniqueId) -> Code;
    get_error_string = b"ncclGetErrorString": fn(Code) -> *const c_char;
    get_last_error = b"ncclGetLastError": fn(Handle) -> *const c_char;
    comm_init = b"ncclCommInitRankConfig": fn(*mut Handle, c_int, UniqueId, c_int, *mut Config) -> Code;
    comm_finalize = b"ncclCommFinalize": fn(Handle) -> Code;
    comm_destroy = b"ncclCommDestroy": fn(Handle) -> Code;
    comm_abort = b"ncclCommAbort": fn(Handle) -> Code;
    comm_async_error = b"ncclCommGetAsyncError": fn(Handle, *mut Code) -> Code;
    group_start = b"ncclGroupStart": fn() -> Code;
    group_end = b"ncclGroupEnd": fn() -> Code;
    send = b"ncclSend": fn(*const c_void, usize, c_int, c_int, Handle, Stream) -> Code;
    receive = b"ncclRecv": fn(*mut c_void, usize, c_int, c_int, Handle, Stream) -> Code;
    all_gather = b"ncclAllGather": fn(*const c_void, *mut c_void, usize, c_int, Handle, Stream) -> Code;
}

/// NCCL, found and fit.
pub struct Library {
    pub(super) functions: Functions,
    version: c_int,
    name: String,
}

impl Library {
    /// Loads NCCL: the file `given`, or else what the system's loader finds by NCCL's usual names. It stays loaded.
    ///
    /// # Errors
    /// A sentence that tells what was tried and why each try failed.
    pub fn load(given: Option<&Path>) -> Result<Library, String> {
        let names: Vec<&Path> = match given {
            Some(path) => vec![path],
            None => NAMES.iter().map(Path::new).collect(),
        };
        let mut failures = Vec::new();
        for name in names {
            match Library::open(name) {
                Ok(library) => return Ok(library),
                Err(why) => failures.push(format!("{}: {why}", name.display())),
            }
        }
        Err(format!("NCCL cannot be loaded ({})", failures.join("; ")))
    }

    fn open(name: &Path) -> Result<Library, String> {
        // SAFETY: runs the initialisers of a library that the user or the system calls NCCL.
        let library = unsafe { libloading::Library::new(name) }.map_err(|error| error.to_string())?;
        let functions = Functions::of(&library)?;
        // NCCL keeps threads of its own: it must never be unloaded.
        std::mem::forget(library);
        Library::of(functions, name.display().to_string())
    }

    /// NCCL by its functions.
    pub(super) fn of(functions: Functions, name: String) -> Result<Library, String> {
        let mut version = 0;
        // SAFETY: writes one number.
        let code = unsafe { (functions.get_version)(&mut version) };
        if code != SUCCESS {
            return Err(format!("it does not tell its version: error {code}"));
        }
        if version < OLDEST {
            return Err(format!("expected version {} or newer, found {}", dotted(OLDEST), dotted(version)));
        }
        Ok(Library { functions, version, name })
    }

    /// Such as "NCCL 2.28.9 (libnccl.so.2)".
    pub fn describe(&self) -> String {
        format!("NCCL {} ({})", dotted(self.version), self.name)
    }

    /// Whether this version can put several ranks on one GPU.
    pub fn shares_gpus(&self) -> bool {
        self.version >= SHARES_GPUS
    }

    /// A name for a new group, known to nobody yet.
    pub(super) fn unique_id(&self) -> Result<UniqueId, String> {
        let mut id = UniqueId { bytes: [0; 128] };
        // SAFETY: writes 128 bytes.
        match unsafe { (self.functions.get_unique_id)(&mut id) } {
            SUCCESS => Ok(id),
            code => Err(self.error_text(code)),
        }
    }

    /// What NCCL calls an error.
    pub(super) fn error_text(&self, code: Code) -> String {
        // SAFETY: returns a static string for every number.
        text(unsafe { (self.functions.get_error_string)(code) })
    }

    /// What NCCL says of the last error in this thread or communicator; empty when nothing.
    pub(super) fn last_error(&self, handle: Handle) -> String {
        // SAFETY: `handle` is null or a live communicator; the string lives until the next error.
        text(unsafe { (self.functions.get_last_error)(handle) })
    }
}

fn text(string: *const c_char) -> String {
    if string.is_null() {
        return String::new();
    }
    // SAFETY: NCCL returns strings that end.
    unsafe { CStr::from_ptr(string) }.to_string_lossy().trim().to_owned()
}

/// 22809 is 2.28.9; before 2.9 the numbers had a digit less.
fn dotted(version: c_int) -> String {
    let (major, rest) = if version < 10_000 {
        (version / 1000, version % 1000)
    } else {
        (version / 10_000, version % 10_000)
    };
    format!("{major}.{}.{}", rest / 100, rest % 100)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_told_as_people_write_them() {
        for (version, expected) in [(22809, "2.28.9"), (21800, "2.18.0"), (2708, "2.7.8"), (23203, "2.32.3")]
        {
            assert_eq!(dotted(version), expected);
        }
    }

    #[test]
    fn what_is_not_nccl_is_named() {
        let missing = Library::load(Some(Path::new("/no/such/libnccl.so"))).err().unwrap();
        assert!(missing.starts_with("NCCL cannot be loaded (/no/such/libnccl.so: "), "{missing}");
        let other = Library::load(Some(Path::new("libc.so.6"))).err().unwrap();
        assert_eq!(other, "NCCL cannot be loaded (libc.so.6: it has no ncclGetVersion)");
    }
}
