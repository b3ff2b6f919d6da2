//! What Linux knows about this process, from /proc.

use std::fs;

/// Figures of the moment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Process {
    /// User and system time.
    pub cpu_seconds: f64,
    pub resident_bytes: u64,
    pub virtual_bytes: u64,
    pub open_fds: usize,
    pub max_fds: u64,
    pub threads: u64,
    /// Seconds since 1970.
    pub start_unix_seconds: f64,
}

/// The figures now; `None` where /proc does not have them.
pub(super) fn read() -> Option<Process> {
    let stat = Stat::parse(&fs::read_to_string("/proc/self/stat").ok()?)?;
    let system = fs::read_to_string("/proc/stat").ok()?;
    let boot: f64 = system.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()?;
    let limits = fs::read_to_string("/proc/self/limits").ok()?;
    let ticks = ticks_per_second();
    Some(Process {
        cpu_seconds: stat.cpu_ticks as f64 / ticks,
        resident_bytes: stat.resident_pages * page_bytes(),
        virtual_bytes: stat.virtual_bytes,
        // One of them is the listing's own.
        open_fds: fs::read_dir("/proc/self/fd").ok()?.count().saturating_sub(1),
        max_fds: max_fds(&limits)?,
        threads: stat.threads,
        start_unix_seconds: boot + stat.start_ticks as f64 / ticks,
    })
}

/// The fields of /proc/self/stat that are used, as proc(5) numbers them.
#[derive(Debug, PartialEq)]
struct Stat {
    cpu_ticks: u64,
    threads: u64,
    start_ticks: u64,
    virtual_bytes: u64,
    resident_pages: u64,
}

impl Stat {
    /// The second field is the program's name in parentheses and may hold anything, so counting starts behind it.
    fn parse(line: &str) -> Option<Stat> {
        let (_, rest) = line.rsplit_once(')')?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
        Some(Stat {
            cpu_ticks: field(14)? + field(15)?,
            threads: field(20)?,
            start_ticks: field(22)?,
            virtual_bytes: field(23)?,
            resident_pages: field(24)?,
        })
    }
}

/// The soft limit; one that is unlimited is the largest number there is.
fn max_fds(limits: &str) -> Option<u64> {
    let soft =
        limits.lines().find_map(|line| line.strip_prefix("Max open files"))?.split_whitespace().next()?;
    if soft == "unlimited" { Some(u64::MAX) } else { soft.parse().ok() }
}

/// Linux has 100 on every architecture it serves user space on.
fn ticks_per_second() -> f64 {
    100.0
}

/// Of a page, from the auxiliary vector where it is told.
fn page_bytes() -> u64 {
    /// Entry of the vector that holds the page size.
    const PAGE_SIZE: u64 = 6;
    let vector = fs::read("/proc/self/auxv").unwrap_or_default();
    let word = |bytes: &[u8]| u64::from_ne_bytes(bytes.try_into().expect("8 bytes"));
    let entries = vector.chunks_exact(16).map(|pair| (word(&pair[..8]), word(&pair[8..])));
    entries.into_iter().find(|(key, _)| *key == PAGE_SIZE).map_or(4096, |(_, bytes)| bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_seen() {
        let process = read().expect("Linux has /proc");
        assert!(
            process.resident_bytes > 1 << 20 && process.virtual_bytes > process.resident_bytes,
            "{process:?}"
        );
        assert!(process.threads >= 1 && process.open_fds >= 3, "{process:?}");
        assert!(process.max_fds >= process.open_fds as u64, "{process:?}");
        // After 2020 and not in the future.
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
        assert!(process.start_unix_seconds > 1.5e9 && process.start_unix_seconds < now + 5.0, "{process:?}");
    }

    #[test]
    fn the_name_of_a_program_may_hold_anything() {
        let mut fields: Vec<String> = (3..=52).map(|n| n.to_string()).collect();
        fields[0] = "S".into();
        let line = format!("1 (a ) b) {}", fields.join(" "));
        let expected =
            Stat { cpu_ticks: 29, threads: 20, start_ticks: 22, virtual_bytes: 23, resident_pages: 24 };
        assert_eq!(Stat::parse(&line), Some(expected));
        assert_eq!(Stat::parse("1 (short) S 2"), None);
        assert_eq!(Stat::parse("nonsense"), None);
    }

    #[test]
    fn limits_are_read() {
        let of =
            |soft: &str| max_fds(&format!("Max cpu time  1  2  s\nMax open files   {soft}   4096   files\n"));
        assert_eq!((of("1024"), of("unlimited"), of("?")), (Some(1024), Some(u64::MAX), None));
    }
}
