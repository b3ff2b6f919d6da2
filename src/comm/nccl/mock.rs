//! NCCL made of host threads, for tests: rows travel between them through queues, calls return before they are done as the real
//! ones do, and what goes wrong can be chosen. Use of a communicator after its end stops the test program.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::ffi::{c_char, c_int, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex};

use super::library::{
    BYTES, Code, Config, Functions, Handle, IN_PROGRESS, Library, SUCCESS, Stream, UniqueId,
};
use crate::comm::local::lock;

const SYSTEM_ERROR: Code = 2;
const INVALID_USAGE: Code = 5;
const REMOTE_ERROR: Code = 6;

/// What goes wrong; all of it with rank 1.
pub const NOTHING: usize = 0;
pub const REFUSED: usize = 1;
pub const NEVER_CONNECTS: usize = 2;
pub const CALL_FAILS: usize = 3;
pub const FAILS_LATER: usize = 4;
pub const HANGS: usize = 5;
pub const NEVER_FINALIZES: usize = 6;
pub const OLD: usize = 7;
const WRONGS: usize = 8;
/// The exchange with which it goes wrong, from 0.
const FATAL: usize = 2;

/// Communicators that were neither destroyed nor aborted, by what goes wrong with them; and those aborted.
static OPEN: [AtomicUsize; WRONGS] = [const { AtomicUsize::new(0) }; WRONGS];
static ABORTED: [AtomicUsize; WRONGS] = [const { AtomicUsize::new(0) }; WRONGS];

/// (open, aborted) communicators of libraries where `wrong` goes wrong.
pub fn communicators(wrong: usize) -> (usize, usize) {
    (OPEN[wrong].load(Ordering::SeqCst), ABORTED[wrong].load(Ordering::SeqCst))
}

/// A library in which `WRONG` goes wrong.
pub fn library<const WRONG: usize>() -> Result<Arc<Library>, String> {
    let functions = Functions {
        get_version: get_version::<WRONG>,
        get_unique_id: get_unique_id::<WRONG>,
        get_error_string,
        get_last_error,
        comm_init,
        comm_finalize,
        comm_destroy,
        comm_abort,
        comm_async_error,
        group_start,
        group_end,
        send,
        receive,
        all_gather,
    };
    Library::of(functions, "mock".to_owned()).map(Arc::new)
}

/// The communicators of one unique id.
struct Group {
    wrong: usize,
    size: usize,
    joined: usize,
    /// Rows on their way, by sender and receiver.
    queues: HashMap<(usize, usize), VecDeque<Vec<u8>>>,
}

/// One communicator.
struct Member {
    group: Arc<Mutex<Group>>,
    rank: usize,
    exchanges: usize,
    /// Memory to be filled, in the order asked for.
    awaited: Vec<Awaited>,
    /// Overrides what the communicator would be in.
    state: Option<Code>,
    open: bool,
}

struct Awaited {
    from: usize,
    address: usize,
    bytes: usize,
}

enum Call {
    Send { to: usize, rows: Vec<u8> },
    Receive(Awaited),
}

/// Groups by the first bytes of their unique ids: a number, and what goes wrong.
type Groups = HashMap<[u8; 16], Arc<Mutex<Group>>>;

static GROUPS: LazyLock<Mutex<Groups>> = LazyLock::new(Mutex::default);
static NAMES: AtomicUsize = AtomicUsize::new(1);

thread_local! {
    /// Calls of the group being made in this thread, and of which communicator.
    static CALLS: RefCell<Option<(usize, Vec<Call>)>> = const { RefCell::new(None) };
}

/// Members are never freed, so that a late use is seen rather than undefined.
fn member<'a>(handle: Handle) -> &'a Mutex<Member> {
    assert!(!handle.is_null(), "a null communicator");
    // SAFETY: every handle comes from `comm_init`, which leaks what it points to.
    let member = unsafe { &*handle.cast::<Mutex<Member>>() };
    assert!(lock(member).open, "a communicator is used after its end");
    member
}

unsafe extern "C" fn get_version<const WRONG: usize>(version: *mut c_int) -> Code {
    // SAFETY: the caller's number.
    unsafe { *version = if WRONG == OLD { 2_10_03 } else { 2_30_04 } };
    SUCCESS
}

unsafe extern "C" fn get_unique_id<const WRONG: usize>(id: *mut UniqueId) -> Code {
    let name = NAMES.fetch_add(1, Ordering::Relaxed);
    // SAFETY: the caller's 128 bytes.
    let bytes = unsafe { &mut (*id).bytes };
    bytes[..8].copy_from_slice(&name.to_ne_bytes());
    bytes[8..16].copy_from_slice(&WRONG.to_ne_bytes());
    SUCCESS
}

unsafe extern "C" fn get_error_string(code: Code) -> *const c_char {
    match code {
        SYSTEM_ERROR => c"unhandled system error",
        INVALID_USAGE => c"invalid usage",
        REMOTE_ERROR => c"remote process exited or there was a network error",
        _ => c"another error",
    }
    .as_ptr()
}

unsafe extern "C" fn get_last_error(_: Handle) -> *const c_char {
    c"mock".as_ptr()
}

unsafe extern "C" fn comm_init(
    handle: *mut Handle,
    size: c_int,
    id: UniqueId,
    rank: c_int,
    _: *mut Config,
) -> Code {
    let (size, rank) = (size as usize, rank as usize);
    let key: [u8; 16] = id.bytes[..16].try_into().unwrap();
    let wrong = usize::from_ne_bytes(key[8..].try_into().unwrap());
    if wrong == REFUSED && rank == 1 {
        return INVALID_USAGE;
    }
    let new = || Arc::new(Mutex::new(Group { wrong, size, joined: 0, queues: HashMap::new() }));
    let group = Arc::clone(lock(&GROUPS).entry(key).or_insert_with(new));
    let stays_out = wrong == NEVER_CONNECTS && rank == 1;
    lock(&group).joined += usize::from(!stays_out);
    OPEN[wrong].fetch_add(1, Ordering::SeqCst);
    let member = Member { group, rank, exchanges: 0, awaited: Vec::new(), state: None, open: true };
    // SAFETY: the caller's handle.
    unsafe { *handle = Box::into_raw(Box::new(Mutex::new(member))).cast() };
    IN_PROGRESS
}

unsafe extern "C" fn comm_finalize(handle: Handle) -> Code {
    let mut member = lock(member(handle));
    let wrong = lock(&member.group).wrong;
    member.state = Some(if wrong == NEVER_FINALIZES && member.rank == 1 { IN_PROGRESS } else { SUCCESS });
    SUCCESS
}

unsafe extern "C" fn comm_destroy(handle: Handle) -> Code {
    end(handle, false)
}

unsafe extern "C" fn comm_abort(handle: Handle) -> Code {
    end(handle, true)
}

fn end(handle: Handle, aborted: bool) -> Code {
    let mut member = lock(member(handle));
    assert!(aborted || member.state == Some(SUCCESS), "destroyed before it was finalized");
    member.open = false;
    member.awaited.clear();
    let wrong = lock(&member.group).wrong;
    OPEN[wrong].fetch_sub(1, Ordering::SeqCst);
    ABORTED[wrong].fetch_add(usize::from(aborted), Ordering::SeqCst);
    SUCCESS
}

unsafe extern "C" fn comm_async_error(handle: Handle, state: *mut Code) -> Code {
    let mut member = lock(member(handle));
    let found = member.progress();
    // SAFETY: the caller's number.
    unsafe { *state = found };
    SUCCESS
}

impl Member {
    /// Fills what can be filled; the state after that.
    fn progress(&mut self) -> Code {
        if let Some(state) = self.state {
            return state;
        }
        let mut group = lock(&self.group);
        if group.joined < group.size {
            return IN_PROGRESS;
        }
        let rank = self.rank;
        self.awaited.retain(|awaited| {
            let rows = group.queues.get_mut(&(awaited.from, rank)).and_then(VecDeque::pop_front);
            if let Some(rows) = &rows {
                assert_eq!(rows.len(), awaited.bytes, "bytes from rank {} to rank {rank}", awaited.from);
                // SAFETY: the receiver keeps its memory until the communicator is idle or aborted.
                unsafe {
                    std::ptr::copy_nonoverlapping(rows.as_ptr(), awaited.address as *mut u8, rows.len())
                };
            }
            rows.is_none()
        });
        if self.awaited.is_empty() { SUCCESS } else { IN_PROGRESS }
    }
}

unsafe extern "C" fn group_start() -> Code {
    CALLS.with_borrow_mut(|calls| {
        assert!(calls.is_none(), "groups inside each other");
        *calls = Some((0, Vec::new()));
    });
    SUCCESS
}

fn note(handle: Handle, call: Call) -> Code {
    CALLS.with_borrow_mut(|calls| {
        let (of, calls) = calls.as_mut().expect("calls stand in groups");
        *of = handle as usize;
        calls.push(call);
    });
    SUCCESS
}

unsafe extern "C" fn send(
    data: *const c_void,
    bytes: usize,
    kind: c_int,
    to: c_int,
    handle: Handle,
    _: Stream,
) -> Code {
    assert_eq!(kind, BYTES);
    // SAFETY: the sender's memory, which the CPU has written by now.
    let rows = unsafe { std::slice::from_raw_parts(data.cast::<u8>(), bytes) }.to_vec();
    note(handle, Call::Send { to: to as usize, rows })
}

unsafe extern "C" fn receive(
    data: *mut c_void,
    bytes: usize,
    kind: c_int,
    from: c_int,
    handle: Handle,
    _: Stream,
) -> Code {
    assert_eq!(kind, BYTES);
    note(handle, Call::Receive(Awaited { from: from as usize, address: data as usize, bytes }))
}

unsafe extern "C" fn group_end() -> Code {
    let (handle, calls) = CALLS.take().expect("a group was started");
    let mut member = lock(member(handle as Handle));
    let rank = member.rank;
    let wrong = lock(&member.group).wrong;
    let fatal = rank == 1 && member.exchanges == FATAL;
    member.exchanges += 1;
    match wrong {
        CALL_FAILS if fatal => return SYSTEM_ERROR,
        FAILS_LATER if fatal => member.state = Some(REMOTE_ERROR),
        HANGS if fatal => member.state = Some(IN_PROGRESS),
        _ => {
            for call in calls {
                match call {
                    Call::Send { to, rows } => {
                        lock(&member.group).queues.entry((rank, to)).or_default().push_back(rows);
                    }
                    Call::Receive(awaited) => member.awaited.push(awaited),
                }
            }
        }
    }
    IN_PROGRESS
}

unsafe extern "C" fn all_gather(
    data: *const c_void,
    out: *mut c_void,
    bytes: usize,
    kind: c_int,
    handle: Handle,
    stream: Stream,
) -> Code {
    let size = {
        let member = lock(member(handle));
        lock(&member.group).size
    };
    // SAFETY: as the caller promises: `bytes` of data, room for those of every rank.
    unsafe {
        group_start();
        for r in 0..size {
            send(data, bytes, kind, r as c_int, handle, stream);
            receive(out.cast::<u8>().add(r * bytes).cast(), bytes, kind, r as c_int, handle, stream);
        }
        group_end()
    }
}
