//! What the daemon gives up once it no longer needs it: copies of the key, privileges, system
//! calls. Whoever takes the daemon over through a bug in it finds little to work with.
//!
//! Owns nothing that the daemon needs to work: if the kernel cannot do one of these, the daemon
//! says so at DEBUG and goes on.
//!
//! The copies of a key that `clap`, `toml` and the standard library made of arguments and file, on
//! the heap and on the stack, are out of reach. They are freed, and overwritten only by what comes
//! next. A key in a file of its own (`--psk-file`) is read into one buffer that is wiped.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::process::DumpableBehavior;
use rustix::thread::{CapabilitySet, CapabilitySets};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};
use tracing::debug;
use zeroize::Zeroizing;

use crate::settings::psk::PSK_VARIABLE;

/// The privilege that the daemon needs after its start: it changes links and undoes its routes,
/// rules and filters. Before it gives up the others, it loads programs and makes the device.
const NEEDED: CapabilitySet = CapabilitySet::NET_ADMIN;

/// The highest capability there is (`CAP_CHECKPOINT_RESTORE`).
const LAST_CAPABILITY: u32 = 40;

/// Address families of the sockets that the daemon and the resolver of libc open.
const FAMILIES: [i32; 4] = [
    libc::AF_INET,
    libc::AF_INET6,
    libc::AF_NETLINK,
    libc::AF_UNIX,
];

/// System calls that the daemon never makes, and that lead out of it: to other programs, other
/// processes, other namespaces, files that are not its own, the kernel itself, or around this
/// filter. The list names what is forbidden, not what is allowed: one day a C library may undo our
/// routes with a call that we had not thought of, and must not be stopped half way. The systemd
/// unit has a list of what is allowed.
const FORBIDDEN: &[i64] = &[
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsmount,
    libc::SYS_open_by_handle_at,
    libc::SYS_mknodat,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_syslog,
    libc::SYS_personality,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_fork,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_vfork,
];

/// Overwrites the key where the kernel shows it to others: in the arguments (`ps`) and in the
/// environment (`/proc/PID/environ`) that the process was started with.
///
/// Call it while there is one thread, after the settings have been read.
pub fn forget_command_line() {
    if let Err(error) = forget() {
        debug!(%error, "arguments and environment of this process stay readable");
    }
}

fn forget() -> io::Result<()> {
    let stat = fs::read_to_string("/proc/self/stat")?;
    let [arguments, environment] = areas(&stat).ok_or(io::ErrorKind::InvalidData)?;
    // The process writes to itself through the file that the kernel has for that. Nobody holds the
    // strings that it overwrites: the standard library hands out copies.
    let memory = File::options()
        .read(true)
        .write(true)
        .open("/proc/self/mem")?;
    for (area, secrets) in [
        (arguments, secret_arguments as fn(&[u8]) -> _),
        (environment, secret_variables),
    ] {
        let mut bytes = Zeroizing::new(vec![0; (area.end - area.start) as usize]);
        memory.read_exact_at(&mut bytes, area.start)?;
        for secret in secrets(&bytes) {
            let blank = vec![b'x'; secret.len()];
            memory.write_all_at(&blank, area.start + secret.start as u64)?;
        }
    }
    Ok(())
}

/// Where arguments and environment lie: fields 48 to 51 of `/proc/PID/stat` (proc_pid_stat(5)).
fn areas(stat: &str) -> Option<[Range<u64>; 2]> {
    // The name in parentheses may hold anything; the fields behind it start with the third.
    let (_, fields) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
    let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
    let area = |first: usize| {
        let (start, end) = (field(first)?, field(first + 1)?);
        (start != 0 && start <= end).then_some(start..end)
    };
    Some([area(48)?, area(50)?])
}

/// The strings of such an area, each with its range.
fn strings(bytes: &[u8]) -> impl Iterator<Item = (Range<usize>, &[u8])> {
    let mut start = 0;
    bytes.split(|&byte| byte == 0).map(move |text| {
        let range = start..start + text.len();
        start = range.end + 1;
        (range, text)
    })
}

fn secret_arguments(bytes: &[u8]) -> Vec<Range<usize>> {
    const FLAG: &[u8] = b"--psk";
    let mut secrets = Vec::new();
    let mut follows = false;
    for (range, text) in strings(bytes) {
        if follows {
            secrets.push(range);
        } else if text.starts_with(b"--psk=") {
            secrets.push(range.start + FLAG.len() + 1..range.end);
        }
        follows = !follows && text == FLAG;
    }
    secrets
}

fn secret_variables(bytes: &[u8]) -> Vec<Range<usize>> {
    let name = format!("{PSK_VARIABLE}=");
    strings(bytes)
        .filter(|(_, text)| text.starts_with(name.as_bytes()))
        .map(|(range, _)| range.start + name.len()..range.end)
        .collect()
}

/// Gives up every privilege but those in `NEEDED`, every means to gain new ones, core dumps, and
/// the system calls in `FORBIDDEN`. Threads that start later inherit all of it.
pub fn drop_privileges() {
    let note = |what: &str, result: Result<(), String>| {
        if let Err(error) = result {
            debug!(error, "cannot give up {what}");
        }
    };
    let kernel = |result: rustix::io::Result<()>| result.map_err(|error| error.to_string());
    // A dump of this process would hold the keys of every session.
    let no_dump = rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable);
    note("core dumps", kernel(no_dump));
    note(
        "new privileges",
        kernel(rustix::thread::set_no_new_privs(true)),
    );
    note("privileges", kernel(drop_capabilities()));
    note("system calls", forbid());
}

fn drop_capabilities() -> rustix::io::Result<()> {
    for number in 0..=LAST_CAPABILITY {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        if !NEEDED.contains(capability) {
            // This fails for capabilities that the kernel does not know, and without CAP_SETPCAP.
            // Nothing can be regained from the set then either, since nothing can be executed.
            let _ = rustix::thread::remove_capability_from_bounding_set(capability);
        }
    }
    let held = rustix::thread::capabilities(None)?.permitted;
    rustix::thread::set_capabilities(
        None,
        CapabilitySets {
            effective: held & NEEDED,
            permitted: held & NEEDED,
            inheritable: CapabilitySet::empty(),
        },
    )
}

fn forbid() -> Result<(), String> {
    let filter = filter().map_err(|error| error.to_string())?;
    seccompiler::apply_filter(&filter).map_err(|error| error.to_string())
}

fn filter() -> Result<BpfProgram, seccompiler::BackendError> {
    let other_families = FAMILIES
        .iter()
        .map(|&family| {
            let (length, op) = (SeccompCmpArgLen::Dword, SeccompCmpOp::Ne);
            SeccompCondition::new(0, length, op, family as u64)
        })
        .collect::<Result<Vec<_>, _>>()?;
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        FORBIDDEN.iter().map(|&call| (call, Vec::new())).collect();
    rules.insert(libc::SYS_socket, vec![SeccompRule::new(other_families)?]);
    SeccompFilter::new(
        rules,
        SeccompAction::Allow,
        SeccompAction::Errno(libc::EPERM as u32),
        std::env::consts::ARCH.try_into()?,
    )?
    .try_into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(bytes: &[u8], secrets: fn(&[u8]) -> Vec<Range<usize>>) -> Vec<&[u8]> {
        secrets(bytes)
            .into_iter()
            .map(|range| &bytes[range])
            .collect()
    }

    #[test]
    fn the_key_is_found_among_the_arguments() {
        let line = b"ipmoved\0--psk\0KEY\0--peer\0--psk-file\0--psk=OTHER\0--psk\0--psk\0x\0";
        let expected: [&[u8]; 3] = [b"KEY", b"OTHER", b"--psk"];
        assert_eq!(found(line, secret_arguments), expected);
        assert!(found(b"ipmoved\0--psk-file\0/etc/psk\0", secret_arguments).is_empty());
        assert!(found(b"", secret_arguments).is_empty());
    }

    #[test]
    fn the_key_is_found_in_the_environment() {
        let environment = b"A=1\0IPMOVED_PSK=KEY\0IPMOVED_PSK_FILE=x\0B=2\0";
        assert_eq!(found(environment, secret_variables), [b"KEY"]);
    }

    #[test]
    fn the_areas_are_those_that_the_kernel_shows() {
        let stat = fs::read_to_string("/proc/self/stat").unwrap();
        let [arguments, environment] = areas(&stat).unwrap();
        let memory = File::open("/proc/self/mem").unwrap();
        for (area, file) in [
            (arguments, "/proc/self/cmdline"),
            (environment, "/proc/self/environ"),
        ] {
            let mut bytes = vec![0; (area.end - area.start) as usize];
            memory.read_exact_at(&mut bytes, area.start).unwrap();
            assert_eq!(bytes, fs::read(file).unwrap(), "{file}");
        }
        assert!(areas("1 (a) b) S 1").is_none());
    }

    #[test]
    fn forbidden_calls_are_refused_and_the_rest_work() {
        // It runs in a thread of its own, since a filter stays for good.
        std::thread::spawn(|| {
            forbid().unwrap();
            let refused = |result: rustix::io::Result<()>| {
                assert_eq!(result.unwrap_err(), rustix::io::Errno::PERM);
            };
            refused(rustix::process::chroot("/"));
            let socket = |domain: i32| {
                socket2::Socket::new(domain.into(), socket2::Type::DGRAM, None)
                    .map(drop)
                    .map_err(|error| error.raw_os_error())
            };
            assert_eq!(socket(libc::AF_PACKET), Err(Some(libc::EPERM)));
            assert_eq!(socket(libc::AF_INET), Ok(()));
            assert_eq!(socket(libc::AF_INET6), Ok(()));
            let error = std::process::Command::new("/bin/true").status();
            assert_eq!(error.unwrap_err().raw_os_error(), Some(libc::EPERM));
            assert!(fs::read("/proc/self/stat").is_ok());
        })
        .join()
        .unwrap();
    }
}
