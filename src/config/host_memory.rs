//! How much memory this process may still take: what the machine has available, and less where a container limits it
//! (cgroup v1 and v2, every level of the hierarchy). Parsing is pure; [`available`] alone touches files.

use std::path::{Path, PathBuf};

/// Bytes this process may take; `None` where the system does not say (not Linux).
pub fn available() -> Option<u64> {
    available_under(Path::new("/"))
}

/// [`available`] with `/proc` and `/sys` below `root`.
fn available_under(root: &Path) -> Option<u64> {
    let machine = mem_available(&std::fs::read_to_string(root.join("proc/meminfo")).ok()?)?;
    let groups = std::fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let limits =
        memory_groups(&groups).into_iter().filter_map(|group| group.left(&root.join("sys/fs/cgroup")));
    Some(limits.fold(machine, u64::min))
}

/// `MemAvailable` of /proc/meminfo, in bytes.
fn mem_available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// The files of one cgroup version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Version {
    /// Mount of the memory controller below /sys/fs/cgroup.
    mount: &'static str,
    limit: &'static str,
    usage: &'static str,
    /// Line of memory.stat that counts page cache the kernel gives back under pressure.
    reclaimable: &'static str,
}

const V1: Version = Version {
    mount: "memory",
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    reclaimable: "total_inactive_file",
};
const V2: Version =
    Version { mount: "", limit: "memory.max", usage: "memory.current", reclaimable: "inactive_file" };

/// One cgroup that may limit memory.
#[derive(Debug, PartialEq, Eq)]
struct Group {
    version: Version,
    /// Path below the mount, without a leading slash.
    path: PathBuf,
}

/// The groups of /proc/self/cgroup that count memory, with all their ancestors: a limit binds at every level. The
/// root is always among them, because inside a container it is the mount of the container's own group.
fn memory_groups(cgroup: &str) -> Vec<Group> {
    let mut groups = Vec::new();
    for line in cgroup.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(hierarchy), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let version = match controllers {
            "" if hierarchy == "0" => V2,
            list if list.split(',').any(|controller| controller == "memory") => V1,
            _ => continue,
        };
        let path = Path::new(path.trim_start_matches('/'));
        groups.extend(path.ancestors().map(|path| Group { version, path: path.to_path_buf() }));
    }
    groups
}

impl Group {
    /// Bytes left below this group's limit; `None` without a limit.
    fn left(&self, mount: &Path) -> Option<u64> {
        let folder = mount.join(self.version.mount).join(&self.path);
        let read = |name: &str| std::fs::read_to_string(folder.join(name)).ok();
        let limit: u64 = read(self.version.limit)?.trim().parse().ok()?;
        let usage: u64 = read(self.version.usage)?.trim().parse().ok()?;
        let cache =
            read("memory.stat").and_then(|stat| stat_line(&stat, self.version.reclaimable)).unwrap_or(0);
        Some(limit.saturating_sub(usage.saturating_sub(cache)))
    }
}

/// The value of one line of memory.stat.
fn stat_line(stat: &str, name: &str) -> Option<u64> {
    stat.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn meminfo_is_read() {
        let text = "MemTotal:       24684092 kB\nMemFree: 1 kB\nMemAvailable:   23648888 kB\n";
        assert_eq!(mem_available(text), Some(23_648_888 * 1024));
        for broken in
            ["", "MemAvailable: lots kB", "MemAvailable: 12", "MemAvailable: 99999999999999999999 kB"]
        {
            assert_eq!(mem_available(broken), None, "{broken}");
        }
        assert_eq!(mem_available(&format!("MemAvailable: {} kB", u64::MAX)), None);
    }

    #[test]
    fn groups_include_their_ancestors() {
        let paths = |text: &str| -> Vec<(bool, String)> {
            let path = |g: &Group| g.path.display().to_string();
            memory_groups(text).iter().map(|g| (g.version == V2, path(g))).collect()
        };
        let at = |v2, path: &str| (v2, path.to_owned());
        assert_eq!(paths("0::/a/b\n"), [at(true, "a/b"), at(true, "a"), at(true, "")]);
        let v1 = "9:name=systemd:/\n4:cpu,memory:/job\n2:cpuset:/x\n0::/\n";
        assert_eq!(paths(v1), [at(false, "job"), at(false, ""), at(true, "")]);
        assert_eq!(paths("garbage\n4:memory\n"), []);
    }

    #[test]
    fn stat_lines_match_whole_names() {
        let stat = "inactive_file_x 1\ntotal_inactive_file 2\ninactive_file 3\n";
        assert_eq!(stat_line(stat, "inactive_file"), Some(3));
        assert_eq!(stat_line(stat, "absent"), None);
    }

    /// A machine with 1000 MiB available and these files below its root.
    fn machine(files: &[(&str, String)]) -> Option<u64> {
        let root = tempfile::tempdir().unwrap();
        let meminfo = ("proc/meminfo", "MemAvailable: 1024000 kB\n".to_owned());
        for (path, text) in files.iter().chain([&meminfo]) {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        available_under(root.path()).map(|bytes| bytes / MIB)
    }

    fn file(path: &'static str, mib: u64) -> (&'static str, String) {
        (path, format!("{}\n", mib * MIB))
    }

    #[test]
    fn containers_limit_what_is_available() {
        assert_eq!(machine(&[]), Some(1000));

        let group = ("proc/self/cgroup", "0::/job/task\n".to_owned());
        let unlimited = ("sys/fs/cgroup/job/task/memory.max", "max\n".to_owned());
        let parent =
            [file("sys/fs/cgroup/job/memory.max", 600), file("sys/fs/cgroup/job/memory.current", 500)];
        let stat = ("sys/fs/cgroup/job/memory.stat", format!("anon 5\ninactive_file {}\n", 100 * MIB));
        let [limit, usage] = parent;
        assert_eq!(machine(&[group, unlimited, limit, usage, stat]), Some(200));

        let v1 = [
            ("proc/self/cgroup", "4:memory:/docker/0123\n".to_owned()),
            file("sys/fs/cgroup/memory/memory.limit_in_bytes", 300),
            file("sys/fs/cgroup/memory/memory.usage_in_bytes", 400),
        ];
        assert_eq!(machine(&v1), Some(0));
    }
}
