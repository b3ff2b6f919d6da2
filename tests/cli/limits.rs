//! The binary at the limits of its system, and when a part of it is lost.

use std::fs;
use std::time::Instant;

use serde_json::json;
use tempfile::TempDir;

use crate::client::Client;
use crate::frozen::Frozen;
use crate::patience::eventually;
use crate::process::Served;

const SMALL: [&str; 4] = ["--threads", "1", "--kv-cache-memory", "16MiB"];

/// Addresses that the process listens on, as /proc has them: hexadecimal.
fn listening(pid: u32) -> Vec<String> {
    let links = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let links = links.filter_map(|entry| fs::read_link(entry.unwrap().path()).ok());
    let inodes: Vec<String> = links
        .filter_map(|link| Some(link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned()))
        .collect();
    let mut found = Vec::new();
    for table in ["tcp", "tcp6", "udp", "udp6"] {
        let text = fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap_or_default();
        for line in text.lines().skip(1) {
            let fields: Vec<&str> = line.split_whitespace().collect();
            // 0A is a socket that listens; one of UDP has no such state.
            let listens = fields[3] == "0A" || table.starts_with("udp");
            if listens && inodes.iter().any(|inode| inode == fields[9]) {
                found.push(fields[1].to_owned());
            }
        }
    }
    found
}

/// CVE-2025-30202 and its kin: sockets between processes were open to everyone. There is one socket, where it was asked for,
/// with several ranks too.
#[test]
fn cve_2025_30202_only_the_asked_address_listens() {
    let folder = TempDir::new().unwrap();
    let server = Served::start(folder.path(), SMALL.iter().chain(&["--expert-parallel-size", "2"]));
    let own = format!("0100007F:{:04X}", server.address.port());
    assert_eq!(server.client().get("/readyz").status, 200);
    assert_eq!(listening(server.pid()), [own]);
}

/// Fault row 13: more connections than the process may have files open. It waits without spinning, serves those it has,
/// and takes others when some have left.
#[test]
fn open_files_run_out_and_come_back() {
    let folder = TempDir::new().unwrap();
    let server = Served::start(folder.path(), SMALL);
    let open = || fs::read_dir(format!("/proc/{}/fd", server.pid())).unwrap().count() as u64;
    let mut first = server.client();
    assert_eq!(first.get("/health").status, 200);
    let most = open() + 20;
    let limit = libc::rlimit { rlim_cur: most, rlim_max: most };
    // SAFETY: a plain system call on a child that has not been waited for, with a pointer to a live struct.
    let set = unsafe {
        libc::prlimit(
            server.pid() as libc::pid_t,
            libc::RLIMIT_NOFILE,
            &raw const limit,
            std::ptr::null_mut(),
        )
    };
    assert_eq!(set, 0);
    let began = Instant::now();
    // The system completes the hand-shake of those that nobody accepts.
    let idle: Vec<Client> = (0..60).map(|_| server.client()).collect();
    eventually("no more can be open", || open() >= most);
    server.logged("accepting a connection failed");
    assert_eq!(first.get("/health").status, 200, "who is connected is served");
    let ask = json!({"prompt": "Once", "max_tokens": 2, "temperature": 0});
    assert_eq!(first.post("/v1/completions", &ask).status, 200);
    drop(idle);
    assert_eq!(server.client().get("/health").status, 200, "others follow");
    let took = began.elapsed();
    drop(first);
    let (code, log) = server.terminate();
    assert_eq!(code, Some(0), "{log}");
    let failures = log.matches("accepting a connection failed").count();
    let most = took.as_millis() / 50 + 2;
    assert!(failures as u128 <= most, "{failures} failures in {took:?}: it spins");
}

/// CVE-2025-48956: huge headers ate memory. Far beyond the limit nothing is kept.
#[test]
fn cve_2025_48956_huge_headers_take_no_memory() {
    let folder = TempDir::new().unwrap();
    let server = Served::start(folder.path(), SMALL);
    let bytes = |what: &str| -> usize {
        let status = fs::read_to_string(format!("/proc/{}/status", server.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(what)).unwrap();
        line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() << 10
    };
    assert_eq!(server.client().get("/health").status, 200);
    let before = bytes("VmRSS:");
    let mut client = server.client();
    client.raw(b"GET /health HTTP/1.1\r\nHost: t\r\nX-Large: ");
    for _ in 0..512 {
        client.raw(&[b'x'; 64 << 10]);
    }
    client.raw(b"\r\n\r\n");
    assert_eq!(client.response().status, 431);
    let grown = bytes("VmHWM:").saturating_sub(before);
    assert!(grown < 8 << 20, "{grown} bytes for 32 MiB that nobody wants");
}

/// Fault row 23, from outside: a rank is lost, and with it a step. Every client hears of it, and the process ends with a code
/// that its supervisor sees, though the rank still hangs.
#[test]
fn a_lost_rank_is_503_an_error_chunk_and_exit_code_1() {
    let folder = TempDir::new().unwrap();
    let server = Served::start(folder.path(), SMALL.iter().chain(&["--step-timeout", "1"]));
    let ask = |tokens: usize, stream: bool| json!({"prompt": "Once", "max_tokens": tokens, "temperature": 0, "ignore_eos": true, "stream": stream});
    // How long steps take is known from now on; the first ones are given minutes.
    assert_eq!(server.client().post("/v1/completions", &ask(4, false)).status, 200);
    let Some(frozen) = Frozen::thread(server.pid(), "rank-0") else { return };
    let answer = server.client().post("/v1/completions", &ask(900, true));
    assert_eq!(answer.status, 200, "the stream had begun");
    let last = answer.chunks().pop().expect("an error");
    assert_eq!(last["error"]["code"], 500, "{last}");
    // The server stays for two seconds; a test that was held up for longer finds nobody.
    for path in ["/health", "/readyz"] {
        let answer = Client::try_connect(server.address).and_then(|mut client| client.try_get(path));
        assert!(answer.is_none_or(|answer| answer.status == 503), "{path}");
    }
    frozen.killed();
    let (code, log) = server.ended();
    assert_eq!(code, Some(1), "{log}");
    assert!(log.contains("ranks [0] have not answered"), "{log}");
}
