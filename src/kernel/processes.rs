//! Which programs run beside this one, in the same network namespace.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;

/// Most processes that are looked at.
const MAX_PROCESSES: usize = 100_000;

/// The names of the programs that run in the calling thread's network namespace, cut to 15 bytes as
/// the kernel has them. Of processes that this one may not look at the namespace is not known; they
/// are left out.
pub fn names() -> BTreeSet<String> {
    let inode = |path: &str| fs::metadata(path).ok().map(|it| it.ino());
    let Some(own) = inode("/proc/thread-self/ns/net") else {
        return BTreeSet::new();
    };
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let here = pids
        .take(MAX_PROCESSES)
        .filter(|pid| inode(&format!("/proc/{pid}/ns/net")) == Some(own));
    here.filter_map(|pid| fs::read_to_string(format!("/proc/{pid}/comm")).ok())
        .map(|name| name.trim_end().to_owned())
        .collect()
}
