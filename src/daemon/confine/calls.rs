//! The system calls that a daemon which runs can no longer make.
//!
//! The list names what is forbidden, not what is allowed: one day a C library may undo our routes
//! with a call that we had not thought of, and must not be stopped half way. The systemd unit has
//! a list of what is allowed.
//!
//! None of the calls that carry packets is looked at twice: since Linux 5.11 the kernel keeps a
//! bitmap of the calls that a filter allows whatever their arguments are.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule,
};

/// Address families of the sockets that the daemon and the resolver of libc open.
const FAMILIES: [i32; 4] = [
    libc::AF_INET,
    libc::AF_INET6,
    libc::AF_NETLINK,
    libc::AF_UNIX,
];

/// Protocols of its IP sockets. Others make the kernel load modules that nobody needs.
const IP_PROTOCOLS: [i32; 3] = [0, libc::IPPROTO_TCP, libc::IPPROTO_UDP];

/// System calls that the daemon never makes, and that lead out of it: to other programs, other
/// processes, other namespaces, files that are not its own, the kernel itself, or around this
/// filter.
const FORBIDDEN: &[i64] = &[
    // Other programs.
    libc::SYS_execve,
    libc::SYS_execveat,
    // Other processes. All of root's are of the same user as this one.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_process_mrelease,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_send_signal,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_tgsigqueueinfo,
    libc::SYS_tkill,
    libc::SYS_kcmp,
    libc::SYS_setpriority,
    libc::SYS_ioprio_set,
    libc::SYS_migrate_pages,
    libc::SYS_move_pages,
    // What processes share by System V and POSIX names.
    libc::SYS_shmget,
    libc::SYS_shmat,
    libc::SYS_shmctl,
    libc::SYS_semget,
    libc::SYS_semctl,
    libc::SYS_semop,
    libc::SYS_semtimedop,
    libc::SYS_msgget,
    libc::SYS_msgctl,
    libc::SYS_msgsnd,
    libc::SYS_msgrcv,
    libc::SYS_mq_open,
    libc::SYS_mq_unlink,
    // Other namespaces and mounts.
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    OPEN_TREE_ATTR,
    libc::SYS_mount_setattr,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    // Attributes of files, which Landlock does not look at: a set-user-id shell, for example.
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    FCHMODAT2,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_setxattr,
    libc::SYS_lsetxattr,
    libc::SYS_fsetxattr,
    SETXATTRAT,
    libc::SYS_removexattr,
    libc::SYS_lremovexattr,
    libc::SYS_fremovexattr,
    REMOVEXATTRAT,
    FILE_SETATTR,
    libc::SYS_utimensat,
    // Landlock looks at this since Linux 6.2 only.
    libc::SYS_truncate,
    // Files that are not its own.
    libc::SYS_open_by_handle_at,
    libc::SYS_mknodat,
    libc::SYS_fanotify_init,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
    libc::SYS_acct,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    // The kernel itself.
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
    libc::SYS_kexec_file_load,
    libc::SYS_reboot,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_syslog,
    libc::SYS_vhangup,
    libc::SYS_personality,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_modify_ldt,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_uselib,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_fork,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_vfork,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_chmod,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_chown,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_lchown,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_utime,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_utimes,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_futimesat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_mknod,
];

// Newer than the C library's headers. From 424 on, numbers are the same on every architecture.
const FCHMODAT2: i64 = 452;
const SETXATTRAT: i64 = 463;
const REMOVEXATTRAT: i64 = 466;
const OPEN_TREE_ATTR: i64 = 467;
const FILE_SETATTR: i64 = 469;

/// System calls with arguments in memory, where a filter cannot look. A kernel that does not know
/// them says so, and the C library then makes the older call.
const UNKNOWN: [i64; 2] = [libc::SYS_clone3, libc::SYS_openat2];

/// System calls whose first argument is a process, with 0 for the caller.
const OF_A_PROCESS: [i64; 5] = [
    libc::SYS_prlimit64,
    libc::SYS_sched_setaffinity,
    libc::SYS_sched_setscheduler,
    libc::SYS_sched_setparam,
    libc::SYS_sched_setattr,
];

/// Commands of `bpf(2)` that concern the entries of a map, whose descriptor one must have: those of
/// linux/bpf.h from `BPF_MAP_LOOKUP_ELEM` on, and the same for many entries. And the one that runs
/// a program whose descriptor one must have (`BPF_PROG_TEST_RUN`): it sends no packet anywhere.
const BPF_COMMANDS: [u64; 9] = [1, 2, 3, 4, 10, 24, 25, 26, 27];

/// New namespaces, as flags of `clone(2)`.
const NEW_NAMESPACES: [i32; 7] = [
    libc::CLONE_NEWNS,
    libc::CLONE_NEWCGROUP,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWNET,
];

/// Requests of `fcntl(2)` that choose who is sent a signal, and which.
const SIGNALS_OF_FILES: [u64; 3] = [
    libc::F_SETOWN as u64,
    // F_SETSIG and F_SETOWN_EX of linux/fcntl.h.
    10,
    15,
];

/// Requests of `ioctl(2)`: typing into the terminal that the daemon was started from (`TIOCSTI`,
/// `TIOCLINUX`), making it one's own, other line disciplines, and the receiver of a signal
/// (`FIOSETOWN`, `SIOCSPGRP`).
const REQUESTS: [u64; 6] = [0x5412, 0x541c, 0x540e, 0x5423, 0x8901, 0x8902];

/// The first option of an IPv4 socket that is netfilter's: firewall rules, which need no more than
/// `CAP_NET_ADMIN`.
const NETFILTER_V4: u64 = 64;

/// The same of an IPv6 socket, among which are others: `IP6T_SO_SET_REPLACE` and
/// `IP6T_SO_SET_ADD_COUNTERS`.
const NETFILTER_V6: [u64; 2] = [64, 65];

/// Refuses those calls to the calling thread, and to those that it starts, for good.
pub(super) fn forbid() -> Result<(), String> {
    for program in programs().map_err(|error| error.to_string())? {
        seccompiler::apply_filter(&program).map_err(|error| error.to_string())?;
    }
    Ok(())
}

fn programs() -> Result<Vec<BpfProgram>, BackendError> {
    let unknown = UNKNOWN.into_iter().map(|call| (call, Vec::new()));
    Ok(vec![
        filter(rules()?, libc::EPERM)?,
        filter(unknown.collect(), libc::ENOSYS)?,
        #[cfg(target_arch = "x86_64")]
        without_x32(),
    ])
}

/// Answers the calls in `rules` with an error. A call of another architecture ends the process.
pub(super) fn filter(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    errno: i32,
) -> Result<BpfProgram, BackendError> {
    SeccompFilter::new(
        rules,
        SeccompAction::Allow,
        SeccompAction::Errno(errno as u32),
        std::env::consts::ARCH.try_into()?,
    )?
    .try_into()
}

fn rules() -> Result<BTreeMap<i64, Vec<SeccompRule>>, BackendError> {
    use SeccompCmpOp::{Eq, Ge, MaskedEq, Ne};
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        FORBIDDEN.iter().map(|&call| (call, Vec::new())).collect();

    let family = |family: i32| argument(0, Eq, family as u64);
    let protocols = |allowed: &[i32]| {
        let other = |&protocol: &i32| argument(2, Ne, protocol as u64);
        allowed.iter().map(other).collect::<Result<Vec<_>, _>>()
    };
    let others = FAMILIES.map(|family| argument(0, Ne, family as u64));
    let mut sockets = vec![others.into_iter().collect::<Result<Vec<_>, _>>()?];
    for (of, allowed) in [
        (libc::AF_INET, &IP_PROTOCOLS[..]),
        (libc::AF_INET6, &IP_PROTOCOLS[..]),
        // Not netfilter's, for example.
        (libc::AF_NETLINK, &[libc::NETLINK_ROUTE]),
    ] {
        let mut rule = protocols(allowed)?;
        rule.push(family(of)?);
        sockets.push(rule);
    }
    rules.insert(libc::SYS_socket, any_of(sockets)?);

    let thread = libc::CLONE_THREAD as u64;
    let mut clones = vec![vec![argument(0, MaskedEq(thread), 0)?]];
    for new in NEW_NAMESPACES.map(|flag| flag as u32 as u64) {
        clones.push(vec![argument(0, MaskedEq(new), new)?]);
    }
    rules.insert(libc::SYS_clone, any_of(clones)?);

    let own = u64::from(std::process::id());
    for call in [libc::SYS_kill, libc::SYS_tgkill] {
        rules.insert(call, any_of(vec![vec![argument(0, Ne, own)?]])?);
    }
    for call in OF_A_PROCESS {
        rules.insert(call, any_of(vec![vec![argument(0, Ne, 0)?]])?);
    }

    let commands = BPF_COMMANDS.map(|command| argument(0, Ne, command));
    let commands = commands.into_iter().collect::<Result<Vec<_>, _>>()?;
    rules.insert(libc::SYS_bpf, any_of(vec![commands])?);

    let each = |numbers: &[u64]| {
        let one = |&number: &u64| Ok(vec![argument(1, Eq, number)?]);
        any_of(
            numbers
                .iter()
                .map(one)
                .collect::<Result<_, BackendError>>()?,
        )
    };
    rules.insert(libc::SYS_fcntl, each(&SIGNALS_OF_FILES)?);
    rules.insert(libc::SYS_ioctl, each(&REQUESTS)?);

    let level = |level: i32| argument(1, Eq, level as u64);
    let mut options = vec![vec![level(libc::SOL_IP)?, argument(2, Ge, NETFILTER_V4)?]];
    for option in NETFILTER_V6 {
        options.push(vec![level(libc::SOL_IPV6)?, argument(2, Eq, option)?]);
    }
    rules.insert(libc::SYS_setsockopt, any_of(options)?);

    // As truncate: opening to read is enough for this, and Landlock looks at it since 6.2 only.
    let flags = (libc::O_TRUNC | libc::O_ACCMODE) as u64;
    let truncates = |at| argument(at, MaskedEq(flags), (libc::O_TRUNC | libc::O_RDONLY) as u64);
    rules.insert(libc::SYS_openat, any_of(vec![vec![truncates(2)?]])?);
    #[cfg(target_arch = "x86_64")]
    rules.insert(libc::SYS_open, any_of(vec![vec![truncates(1)?]])?);
    Ok(rules)
}

/// Compares the lower half of an argument: all are flags or numbers of type `int`.
fn argument(at: u8, op: SeccompCmpOp, value: u64) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(at, SeccompCmpArgLen::Dword, op, value)
}

/// Rules of which one suffices; each needs all of its conditions.
fn any_of(rules: Vec<Vec<SeccompCondition>>) -> Result<Vec<SeccompRule>, BackendError> {
    rules.into_iter().map(SeccompRule::new).collect()
}

/// Refuses the x32 numbers: the same calls once more, under numbers of their own
/// (`Documentation/userspace-api/seccomp_filter.rst`, "Pitfalls").
#[cfg(target_arch = "x86_64")]
fn without_x32() -> BpfProgram {
    /// `__X32_SYSCALL_BIT` of asm/unistd.h.
    const X32: u32 = 0x4000_0000;
    let instruction = |code: u32, jf: u8, k: u32| seccompiler::sock_filter {
        code: code as u16,
        jt: 0,
        jf,
        k,
    };
    let answer = |action| instruction(libc::BPF_RET | libc::BPF_K, 0, action);
    vec![
        // The number is the first word of seccomp_data.
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        instruction(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, 1, X32),
        answer(libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        answer(libc::SECCOMP_RET_ALLOW),
    ]
}

#[cfg(test)]
mod tests {
    #![allow(unsafe_code, reason = "it makes bare system calls")]

    use super::*;

    /// Makes a call in a thread that the filter holds, and returns the error.
    fn errno_of(call: i64, arguments: [u64; 6]) -> i32 {
        let [a, b, c, d, e, f] = arguments;
        // SAFETY: the calls that tests make are refused by the filter before the kernel looks at
        // the arguments; those that are not have arguments with which they change nothing.
        let result = unsafe { libc::syscall(call, a, b, c, d, e, f) };
        if result >= 0 {
            return 0;
        }
        std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
    }

    /// Runs a test in a thread of its own, since a filter stays for good.
    fn forbidden(test: impl FnOnce() + Send + 'static) {
        let held = std::thread::spawn(|| {
            rustix::thread::set_no_new_privs(true).unwrap();
            forbid().unwrap();
            test();
        });
        held.join().unwrap();
    }

    /// No such descriptor, address, or flags: whatever is not refused fails all the same.
    const NONE: u64 = u64::MAX;

    #[test]
    fn every_forbidden_call_is_refused() {
        forbidden(|| {
            for &call in FORBIDDEN {
                assert_eq!(errno_of(call, [NONE; 6]), libc::EPERM, "call {call}");
            }
            for call in UNKNOWN {
                assert_eq!(errno_of(call, [NONE; 6]), libc::ENOSYS, "call {call}");
            }
        });
    }

    #[test]
    fn calls_are_refused_by_their_arguments() {
        const OTHER: u64 = 1;
        let (datagram, stream) = (libc::SOCK_DGRAM as u64, libc::SOCK_STREAM as u64);
        let socket = |family: i32, kind, protocol: i32| {
            let arguments = [family as u64, kind, protocol as u64, 0, 0, 0];
            (libc::SYS_socket, arguments)
        };
        let first = |call, first| (call, [first, NONE, NONE, NONE, NONE, NONE]);
        let second = |call, second| (call, [NONE, second, NONE, NONE, NONE, NONE]);
        let option = |level: i32, option| {
            let arguments = [NONE, level as u64, option, NONE, NONE, NONE];
            (libc::SYS_setsockopt, arguments)
        };
        let thread = libc::CLONE_THREAD as u64;
        let truncated = (libc::O_TRUNC | libc::O_RDONLY) as u64;
        let mut refused = vec![
            socket(libc::AF_PACKET, datagram, 0),
            socket(libc::AF_VSOCK, stream, 0),
            socket(libc::AF_INET, stream, libc::IPPROTO_SCTP),
            socket(libc::AF_INET, stream, libc::IPPROTO_MPTCP),
            socket(libc::AF_INET6, datagram, libc::IPPROTO_ICMPV6),
            socket(libc::AF_NETLINK, datagram, libc::NETLINK_NETFILTER),
            first(libc::SYS_clone, libc::SIGCHLD as u64),
            first(libc::SYS_clone, thread | libc::CLONE_NEWNET as u64),
            first(libc::SYS_kill, OTHER),
            (libc::SYS_tgkill, [OTHER, OTHER, 0, 0, 0, 0]),
            // BPF_PROG_LOAD.
            first(libc::SYS_bpf, 5),
            // Another program's map.
            first(libc::SYS_bpf, 14),
            second(libc::SYS_fcntl, libc::F_SETOWN as u64),
            option(libc::SOL_IP, 64),
            option(libc::SOL_IP, 0x481),
            option(libc::SOL_IPV6, 65),
            (libc::SYS_openat, [NONE, 0, truncated, 0, 0, 0]),
            #[cfg(target_arch = "x86_64")]
            (libc::SYS_open, [0, truncated, 0, 0, 0, 0]),
        ];
        refused.extend(REQUESTS.map(|request| second(libc::SYS_ioctl, request)));
        refused.extend(OF_A_PROCESS.map(|call| first(call, OTHER)));
        let allowed = [
            socket(libc::AF_INET, datagram, libc::IPPROTO_UDP),
            socket(libc::AF_INET6, stream, libc::IPPROTO_TCP),
            socket(libc::AF_NETLINK, datagram, libc::NETLINK_ROUTE),
            socket(libc::AF_UNIX, datagram, 0),
            (libc::SYS_kill, [std::process::id().into(), 0, 0, 0, 0, 0]),
            first(libc::SYS_bpf, 1),
            // BPF_PROG_TEST_RUN.
            first(libc::SYS_bpf, 10),
            second(libc::SYS_fcntl, libc::F_GETFD as u64),
            option(libc::SOL_IP, libc::IP_TOS as u64),
            option(libc::SOL_IPV6, libc::IPV6_TCLASS as u64),
            first(libc::SYS_prlimit64, 0),
            (libc::SYS_openat, [NONE, 0, libc::O_RDONLY as u64, 0, 0, 0]),
        ];
        forbidden(move || {
            for (call, arguments) in refused {
                let refusal = errno_of(call, arguments);
                assert_eq!(refusal, libc::EPERM, "call {call} {arguments:x?}");
            }
            for (call, arguments) in allowed {
                let answer = errno_of(call, arguments);
                let may_be = answer != libc::EPERM && answer != libc::ENOSYS;
                assert!(may_be, "call {call} {arguments:x?}: {answer}");
            }
        });
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn no_call_has_a_second_number() {
        forbidden(|| {
            for call in [libc::SYS_getpid, libc::SYS_execve] {
                assert_eq!(errno_of(call | 0x4000_0000, [0; 6]), libc::EPERM);
            }
            assert_eq!(errno_of(libc::SYS_getpid, [0; 6]), 0);
        });
    }

    #[test]
    fn threads_start_and_programs_do_not() {
        forbidden(|| {
            let thread = std::thread::spawn(|| std::fs::read("/proc/self/stat").is_ok());
            assert!(thread.join().unwrap());
            let error = std::process::Command::new("/bin/true").status();
            assert_eq!(error.unwrap_err().raw_os_error(), Some(libc::EPERM));
        });
    }
}
