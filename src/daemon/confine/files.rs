//! The files, ports and processes that a daemon which runs can still reach, by Landlock (Linux
//! 5.13, `Documentation/userspace-api/landlock.rst`).
//!
//! The daemon stays root, since the runtime directory and `ipmoved cleanup` are root's. Without
//! capabilities root may still write and read every file that belongs to root: `core_pattern`, a
//! crontab, `/root`. Landlock needs neither a user of its own nor a service manager, and what it
//! takes away nobody gets back. This is the one place that says what is left:
//!
//! | path | |
//! |---|---|
//! | `/proc/sys/net` | read and write: settings are made again and undone |
//! | [`PROC_NET`] | read: sockets and counters, for the causes of silence |
//! | the namespace's runtime directory | read, write, make and remove files: the journal |
//! | the state directory (old server) | the same: modes, and the database of clients |
//! | `/run`, or what is above the runtime directories | remove them at the end, empty ones alone |
//! | [`NAME_SERVERS`] | read: the hosts that this server itself cannot do without |
//! | [`OF_THE_RESOLVER`] | read, if a peer is given by name |
//!
//! `/etc` is readable as a whole then: files there are replaced by others of the same name, which a
//! rule for the single file would not cover. What is not there yet, as before the network is up, is
//! stood for by the directory above.
//!
//! Of TCP ports there is the resolver's alone. Signals and abstract sockets reach no other process
//! (Linux 6.12).

use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, LandlockStatus, NetPort,
    PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError,
    Scope, make_bitflags,
};
use tracing::debug;

use crate::kernel::look::PROC_NET;

/// The newest version whose restrictions are known here. Older kernels enforce what they can.
const KNOWN: ABI = ABI::V6;

/// Settings of this network namespace.
const SETTINGS: &str = "/proc/sys/net";

/// What the C library reads to look up a name: its files, and the modules that `nsswitch.conf`
/// names. Those that are not there are left out.
const OF_THE_RESOLVER: [&str; 6] = ["/etc", "/usr", "/lib", "/lib64", "/nix/store", "/gnu/store"];

/// Where name servers stand. It is a link on many hosts, and what it leads to is replaced by files
/// of the same name in the same place.
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// That file, and systemd-resolved's own, which names those that it asks itself.
const NAME_SERVERS: [&str; 2] = [RESOLV_CONF, "/run/systemd/resolve"];

/// Name servers' port.
const DNS: u16 = 53;

/// What the daemon needs beyond what it has open already.
#[derive(Clone, Copy, Debug)]
pub struct Needs<'a> {
    /// The directory of the network namespace.
    pub runtime_dir: &'a Path,
    /// Peers are given by name.
    pub names: bool,
    /// The state directory, if it is used: what outlives a boot.
    pub state_dir: Option<&'a Path>,
}

/// What holds as long as the daemon runs.
///
/// A rule holds for an inode, and procfs makes a new one for the same path once the kernel has
/// forgotten the old one. An open descriptor keeps it in mind.
#[derive(Debug, Default)]
pub(super) struct Anchors(Vec<PathFd>);

/// Takes away from the calling thread, and from those that it starts, whatever it does not need.
///
/// # Errors
/// Why not.
pub(super) fn close(needs: Needs<'_>) -> Result<Anchors, String> {
    try_close(needs).map_err(|error| match error {
        Failure::Ruleset(error) => error.to_string(),
        Failure::Lacking(reason) => reason.into(),
    })
}

enum Failure {
    Ruleset(RulesetError),
    Lacking(&'static str),
}

impl From<RulesetError> for Failure {
    fn from(error: RulesetError) -> Self {
        Self::Ruleset(error)
    }
}

fn try_close(needs: Needs<'_>) -> Result<Anchors, Failure> {
    let mut anchors = Anchors::default();
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(KNOWN))?
        .handle_access(AccessNet::from_all(KNOWN))?
        .scope(scopes())?
        .create()?;
    let files = make_bitflags!(AccessFs::{ReadFile | ReadDir | WriteFile | Truncate});
    let directory = make_bitflags!(AccessFs::{MakeReg | RemoveFile});
    let dir = needs.runtime_dir;
    rules = allow(rules, &mut anchors, Path::new(SETTINGS), files)?;
    let read = AccessFs::ReadFile.into();
    rules = allow(rules, &mut anchors, Path::new(PROC_NET), read)?;
    rules = allow(rules, &mut anchors, dir, files | directory)?;
    if let Some(dir) = needs.state_dir {
        // It cannot be made any more afterwards. Whoever uses it says why it is not there.
        let _ = std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir);
        rules = allow(rules, &mut anchors, dir, files | directory)?;
    }
    // Whoever takes the daemon over can remove other empty directories there. That harms less than
    // what it can do to the network, and a daemon that ends leaves nothing behind.
    if let Some(above) = dir.ancestors().nth(2) {
        rules = allow(rules, &mut anchors, above, AccessFs::RemoveDir.into())?;
    }
    for path in NAME_SERVERS {
        let found = there(Path::new(path), 2).unwrap_or_else(|| path.into());
        rules = allow(rules, &mut anchors, &found, AccessFs::ReadFile.into())?;
    }
    if needs.names {
        let reading = make_bitflags!(AccessFs::{ReadFile | ReadDir});
        for path in of_the_resolver() {
            rules = allow(rules, &mut anchors, &path, reading)?;
        }
        rules = rules.add_rule(NetPort::new(DNS, AccessNet::ConnectTcp))?;
    }
    let status = rules.restrict_self()?;
    match status.landlock {
        LandlockStatus::NotEnabled => Err(Failure::Lacking(
            "this kernel has Landlock, but it is not enabled; `lsm=landlock,…` on the kernel's \
             command line does that",
        )),
        LandlockStatus::NotImplemented => Err(Failure::Lacking(
            "this kernel has no Landlock (Linux 5.13, CONFIG_SECURITY_LANDLOCK), or a filter hides \
             it",
        )),
        LandlockStatus::Available { effective_abi, .. } => {
            debug!(?effective_abi, "files are closed");
            Ok(anchors)
        }
    }
}

/// Allows `access` to what is there beneath `path`, if it exists.
fn allow(
    rules: RulesetCreated,
    anchors: &mut Anchors,
    path: &Path,
    access: BitFlags<AccessFs>,
) -> Result<RulesetCreated, RulesetError> {
    let Ok(fd) = PathFd::new(path) else {
        return Ok(rules);
    };
    let rules = rules.add_rule(PathBeneath::new(&fd, access))?;
    anchors.0.push(fd);
    Ok(rules)
}

/// What is there of a path, or of what a link there leads to: all of it, or else the directories
/// above, if there are as many as `least`. When the host starts, the files of the resolver are yet
/// to be made.
fn there(path: &Path, least: usize) -> Option<PathBuf> {
    let target = std::fs::read_link(path).ok();
    let beside = |target: PathBuf| path.parent().map(|dir| dir.join(target));
    let wanted = target.and_then(beside).unwrap_or_else(|| path.to_owned());
    let mut above = wanted.ancestors();
    let found = above.find_map(|path| std::fs::canonicalize(path).ok())?;
    // The root is the first component of a path.
    (found.components().count() > least).then_some(found)
}

fn of_the_resolver() -> impl Iterator<Item = PathBuf> {
    let target = std::fs::canonicalize(RESOLV_CONF).ok();
    let beside = target.and_then(|file| Some(file.parent()?.to_owned()));
    // Not everything there is, should somebody have it lead there.
    let beside = beside.filter(|dir| dir.parent().is_some_and(|above| above.parent().is_some()));
    let beside = beside.or_else(|| there(Path::new(RESOLV_CONF), 1));
    OF_THE_RESOLVER.map(PathBuf::from).into_iter().chain(beside)
}

fn scopes() -> BitFlags<Scope> {
    // A service manager may listen at an abstract socket (sd_notify(3)).
    let notified = std::env::var_os("NOTIFY_SOCKET");
    if notified.is_some_and(|name| name.as_encoded_bytes().starts_with(b"@")) {
        return Scope::Signal.into();
    }
    Scope::from_all(KNOWN)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io;
    use std::net::{TcpListener, TcpStream, ToSocketAddrs};

    use super::*;
    use crate::stragglers::history::History;
    use crate::stragglers::writer::{Settings, Writer};

    /// Runs a test in a thread of its own that Landlock holds, since it stays for good.
    fn closed(names: bool, test: impl FnOnce(&Path) + Send + 'static) {
        let base =
            std::env::temp_dir().join(format!("ipmoved-files-{}-{names}", std::process::id()));
        let dir = base.join("net-1");
        fs::create_dir_all(&dir).unwrap();
        let runtime_dir = dir.clone();
        let held = std::thread::spawn(move || {
            let needs = Needs {
                runtime_dir: &runtime_dir,
                names,
                state_dir: None,
            };
            let _anchors = close(needs).unwrap();
            test(&runtime_dir);
        });
        let result = held.join();
        let _ = fs::remove_dir_all(&base);
        result.unwrap();
    }

    fn refused<T: std::fmt::Debug>(result: io::Result<T>) {
        let error = result.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}");
    }

    fn writing(path: &str) -> io::Result<fs::File> {
        fs::OpenOptions::new().write(true).open(path)
    }

    #[test]
    fn what_is_not_there_yet_is_stood_for_by_what_is_above() {
        let base = std::env::temp_dir().join(format!("ipmoved-there-{}", std::process::id()));
        fs::create_dir_all(base.join("run")).unwrap();
        let base = fs::canonicalize(&base).unwrap();
        let link = base.join("resolv.conf");
        std::os::unix::fs::symlink("run/resolve/stub", &link).unwrap();
        assert_eq!(there(&link, 2), Some(base.join("run")));
        fs::create_dir(base.join("run/resolve")).unwrap();
        assert_eq!(there(&link, 2), Some(base.join("run/resolve")));
        fs::write(base.join("run/resolve/stub"), "").unwrap();
        assert_eq!(there(&link, 2), Some(base.join("run/resolve/stub")));
        fs::remove_dir_all(&base).unwrap();
        // Not everything there is.
        assert_eq!(there(Path::new("/nowhere/at/all"), 1), None);
        assert_eq!(there(Path::new("/proc/nowhere"), 1), Some("/proc".into()));
        assert_eq!(there(Path::new("/proc/nowhere"), 2), None);
    }

    #[test]
    fn root_without_landlock_may_open_what_is_roots() {
        // Without it the tests below would show nothing.
        drop(writing("/proc/sys/kernel/core_pattern").unwrap());
        drop(fs::File::open("/etc/shadow").unwrap());
    }

    #[test]
    fn nothing_but_network_settings_and_the_runtime_directory_is_left() {
        closed(false, |dir| {
            for path in [
                "/proc/sys/kernel/core_pattern",
                "/proc/sys/kernel/hostname",
                "/proc/sys/vm/drop_caches",
                "/etc/passwd",
                "/dev/null",
                "/dev/net/tun",
            ] {
                refused(writing(path));
            }
            for path in [
                "/etc/shadow",
                "/etc/hosts",
                "/proc/self/maps",
                "/proc/1/environ",
            ] {
                refused(fs::read(path));
            }
            for path in ["/root/x", "/etc/x", "/run/x", "/tmp/x"] {
                refused(fs::write(path, "x"));
            }
            refused(fs::read_dir("/root"));
            refused(fs::remove_file("/etc/passwd"));
            refused(std::os::unix::fs::symlink("/etc/shadow", dir.join("x")));

            assert!(fs::read(RESOLV_CONF).is_ok());
            for _ in 0..2 {
                let counters = fs::read_to_string(format!("{PROC_NET}/netstat")).unwrap();
                assert!(counters.contains("TcpExt:"));
            }
            let value = fs::read_to_string("/proc/sys/net/ipv4/fwmark_reflect").unwrap();
            fs::write("/proc/sys/net/ipv4/fwmark_reflect", value).unwrap();
            let (next, journal) = (dir.join("journal.next"), dir.join("journal"));
            fs::write(&next, "1").unwrap();
            fs::rename(&next, &journal).unwrap();
            assert_eq!(fs::read(&journal).unwrap(), b"1");
            refused(fs::rename(&journal, "/etc/x"));
            refused(fs::hard_link(&journal, "/root/x"));
            fs::remove_file(&journal).unwrap();
            fs::remove_dir(dir).unwrap();
            fs::remove_dir(dir.parent().unwrap()).unwrap();
            refused(fs::remove_dir("/root"));
        });
    }

    #[test]
    fn where_the_kernel_has_no_landlock_it_is_said() {
        let held = std::thread::spawn(|| {
            rustix::thread::set_no_new_privs(true).unwrap();
            let absent = [(libc::SYS_landlock_create_ruleset, Vec::new())];
            let filter = super::super::calls::filter(absent.into(), libc::ENOSYS).unwrap();
            seccompiler::apply_filter(&filter).unwrap();
            let needs = Needs {
                runtime_dir: Path::new("/run/ipmoved/net-1"),
                names: true,
                state_dir: None,
            };
            super::super::confine(needs).lacking
        });
        let lacking = held.join().unwrap();
        assert_eq!(lacking.len(), 1, "{lacking:?}");
        assert!(lacking[0].contains("every file of root's"), "{lacking:?}");
        assert!(lacking[0].contains("Linux 5.13"), "{lacking:?}");
    }

    #[test]
    fn clients_are_recorded_by_a_daemon_that_is_confined() {
        let base = std::env::temp_dir().join(format!("ipmoved-state-{}", std::process::id()));
        let dir = base.join("made/for/it");
        let settings = Settings {
            dir: dir.clone(),
            keep: 90,
        };
        let confined = std::thread::spawn(move || {
            let needs = Needs {
                runtime_dir: Path::new("/run/ipmoved/net-1"),
                names: false,
                state_dir: Some(&settings.dir),
            };
            let _confinement = super::super::confine(needs);
            refused(fs::write(settings.dir.with_file_name("beside"), ""));
            let mut writer = Writer::start(settings).unwrap();
            writer.end();
            writer.wait();
            writer.trouble()
        });
        let trouble = confined.join().unwrap();
        let opened = History::open(&dir, std::time::SystemTime::now(), None);
        let _ = fs::remove_dir_all(&base);
        assert_eq!(trouble, None);
        assert!(opened.is_ok(), "{opened:?}");
    }

    #[test]
    fn names_are_looked_up_if_a_peer_has_one() {
        closed(true, |_| {
            assert!(("localhost", 1).to_socket_addrs().is_ok());
            assert!(fs::read("/etc/hosts").is_ok());
            refused(writing("/etc/hosts"));
            refused(fs::read_dir("/root"));
        });
    }

    #[test]
    fn no_tcp_port_is_left_but_the_resolvers() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let there = listener.local_addr().unwrap();
        closed(true, move |_| {
            if !ports_are_closed() {
                return;
            }
            refused(TcpStream::connect(there));
            refused(TcpListener::bind("127.0.0.1:0"));
            // Nobody listens, and that is what is said.
            let error = TcpStream::connect("127.0.0.1:53").unwrap_err();
            assert_ne!(error.kind(), io::ErrorKind::PermissionDenied, "{error}");
        });
    }

    /// Whether this kernel's Landlock knows of ports (Linux 6.7).
    fn ports_are_closed() -> bool {
        use landlock::CompatLevel::HardRequirement;
        let ruleset = Ruleset::default().set_compatibility(HardRequirement);
        ruleset.handle_access(AccessNet::ConnectTcp).is_ok()
    }

    #[test]
    fn settings_stay_reachable_when_the_kernel_forgets_their_inodes() {
        // Once is not enough for what was in use a moment ago.
        let forget = || (0..12).for_each(|_| fs::write("/proc/sys/vm/drop_caches", "2").unwrap());
        let (ask, asked) = std::sync::mpsc::channel();
        let (tell, told) = std::sync::mpsc::channel::<()>();
        let forgetting = std::thread::spawn(move || {
            while asked.recv().is_ok() {
                forget();
                tell.send(()).unwrap();
            }
        });
        closed(false, move |_| {
            for _ in 0..4 {
                assert!(fs::read("/proc/sys/net/ipv4/fwmark_reflect").is_ok());
                ask.send(()).unwrap();
                told.recv().unwrap();
            }
            assert!(fs::read("/proc/sys/net/ipv4/fwmark_reflect").is_ok());
        });
        forgetting.join().unwrap();
    }
}
