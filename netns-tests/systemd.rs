//! The daemons as services of a real systemd, which is restarted, stopped and started as an
//! administrator does it.
//!
//! ```text
//!                                        ┌── old server: systemd ──► ipmoved.service
//!  client ─(tap)─────────────── router ──┤
//!                                        └── new server: systemd ──► ipmoved.service
//! ```
//!
//! systemd is process 1 of namespaces of its own, over what this machine has in its root directory:
//! what it writes vanishes with the test. It needs a machine with systemd and overlayfs, so it runs
//! on request: `cargo test --test netns -- --ignored systemd:: --nocapture`. IPMOVED_OLDER names a
//! binary that knows no handovers, which is then upgraded as well.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use ipmoved::internals::Role;
use ipmoved::lab::daemon::UP_TIMEOUT;
use ipmoved::lab::topology::{Leg, MOVED, NEW, OLD};
use ipmoved::lab::{Lab, LabError, Namespace, Output, Process, poll_until};

use crate::stage::{Result, exe, setup};
use crate::takeover::Load;

/// How long systemd may take for a job.
const JOB: Duration = Duration::from_secs(60);

#[test]
#[ignore = "needs systemd: cargo test --test netns -- --ignored systemd::"]
fn systemctl_restart_loses_no_connection_and_systemctl_stop_undoes_everything() -> Result {
    let lab = Lab::new()?;
    let [old, new] = boot(&lab, exe())?;
    let load = Load::start(&lab)?;
    load.goes_on()?;
    let tap = lab.tap(Leg::Clients)?;
    let rounds = [
        ("old", &old, 1),
        ("new", &new, 1),
        ("old", &old, 2),
        ("new", &new, 2),
    ];
    for (name, server, round) in rounds {
        let pid = server.says("systemctl show -P MainPID ipmoved")?;
        let begun = Instant::now();
        server.restarts()?;
        let took = begun.elapsed();
        assert_ne!(server.says("systemctl show -P MainPID ipmoved")?, pid);
        load.goes_on()?;
        let log = server.says("journalctl -u ipmoved -o cat")?;
        assert_eq!(log.matches("took over").count(), round, "{log}");
        println!("systemctl restart of the {name} server took {took:?}");
    }
    let carried = load.end()?;
    println!("{} of {} datagrams were lost", carried.lost, carried.sent);
    assert_eq!(tap.stop()?.refusals_from(MOVED), 0);
    for server in [&old, &new] {
        server.says("systemctl stop ipmoved")?;
        assert_eq!(
            server.says("ip -o link show type tun; ls /run/ipmoved")?,
            ""
        );
        let kept = server.says("systemctl show -P NFileDescriptorStore ipmoved")?;
        assert_eq!(kept.trim(), "0");
    }
    Ok(())
}

/// As a package does it: the next binary is there, and the unit knows of handovers.
#[test]
#[ignore = "needs systemd: cargo test --test netns -- --ignored systemd::"]
fn an_older_daemon_is_upgraded_and_nothing_is_reset() -> Result {
    let Some(older) = std::env::var_os("IPMOVED_OLDER") else {
        println!("IPMOVED_OLDER names no binary");
        return Ok(());
    };
    let lab = Lab::new()?;
    let servers = boot(&lab, Path::new(&older))?;
    let load = Load::start(&lab)?;
    load.goes_on()?;
    let tap = lab.tap(Leg::Clients)?;
    for server in &servers {
        server.says("mv /usr/local/sbin/ipmoved.next /usr/local/sbin/ipmoved")?;
        for handed in [0, 1] {
            server.restarts()?;
            load.goes_on()?;
            let log = server.says("journalctl -u ipmoved -o cat")?;
            assert_eq!(log.matches("took over").count(), handed, "{log}");
        }
    }
    let carried = load.end()?;
    println!("{} of {} datagrams were lost", carried.lost, carried.sent);
    assert_eq!(tap.stop()?.refusals_from(MOVED), 0);
    Ok(())
}

/// Boots the old and the new server with this binary, and waits until both are up.
fn boot<'lab>(lab: &'lab Lab, exe: &Path) -> Result<[Booted<'lab>; 2]> {
    let psk = setup(lab)?.psk_file(Role::Old).to_owned();
    let old = format!("peer = \"{NEW}\"\npsk-file = \"/etc/ipmoved/psk\"\nmove = [\"{MOVED}\"]\n");
    let new =
        format!("peer = \"{OLD}\"\npsk-file = \"/etc/ipmoved/psk\"\naccept = [\"{MOVED}\"]\n");
    let servers = [
        Booted::new(lab, lab.old_server(), [exe, &psk], &old)?,
        Booted::new(lab, lab.new_server(), [exe, &psk], &new)?,
    ];
    for server in &servers {
        let up = poll_until(UP_TIMEOUT, Duration::from_millis(100), || {
            let said = server.run("ipmoved status").ok()?.stdout;
            said.contains(": up").then_some(())
        });
        assert!(
            up.is_some(),
            "{:?}",
            server.run("systemctl status ipmoved")?
        );
    }
    Ok(servers)
}

/// A host with systemd.
struct Booted<'lab> {
    host: &'lab Namespace,
    systemd: Process,
    /// Process 1, as this one sees it.
    first: u32,
}

impl<'lab> Booted<'lab> {
    /// Boots, with the unit of `contrib` enabled.
    fn new(
        lab: &Lab,
        host: &'lab Namespace,
        [binary, psk]: [&Path; 2],
        settings: &str,
    ) -> Result<Self> {
        let dir = lab.dir().join(host.name());
        let failed = |error: std::io::Error| LabError::unexpected(error.to_string());
        std::fs::create_dir_all(&dir).map_err(failed)?;
        std::fs::write(dir.join("toml"), settings).map_err(failed)?;
        let unit = concat!(env!("CARGO_MANIFEST_DIR"), "/contrib/ipmoved.service");
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--pid", "--fork", "--uts", "--ipc", "--cgroup"])
            .args(["--kill-child", "--propagation", "private"])
            .args(["bash", "-ec", BOOT, "boot"])
            .args([&dir, binary, psk, Path::new(unit), exe()]);
        let systemd = host.spawn(command)?;
        let children = format!("/proc/{0}/task/{0}/children", systemd.id());
        let first = poll_until(UP_TIMEOUT, Duration::from_millis(50), || {
            let child: u32 = std::fs::read_to_string(&children)
                .ok()?
                .trim()
                .parse()
                .ok()?;
            let name = std::fs::read_to_string(format!("/proc/{child}/comm")).ok()?;
            (name.trim() == "systemd").then_some(child)
        });
        let said = || LabError::unexpected(format!("no systemd: {}", systemd.stderr()));
        let first = first.ok_or_else(said)?;
        Ok(Self {
            host,
            systemd,
            first,
        })
    }

    /// Runs a command line there.
    fn run(&self, line: &str) -> Result<Output> {
        let mut command = Command::new("nsenter");
        command
            .args(["-t", &self.first.to_string(), "-m", "-p", "-u", "-i", "-C"])
            .args(["sh", "-c", line]);
        self.host.output(command, JOB)
    }

    /// Restarts the service, which must start again.
    fn restarts(&self) -> Result {
        let said = self.run("systemctl restart ipmoved")?;
        match said.status.success() {
            true => Ok(()),
            false => Err(LabError::unexpected(format!("{said:?}"))),
        }
    }

    /// What a command line prints.
    fn says(&self, line: &str) -> Result<String> {
        Ok(self.run(line)?.stdout)
    }
}

impl Drop for Booted<'_> {
    fn drop(&mut self) {
        // With it goes its first child, and with that all others.
        let _ = self.systemd.signal(rustix::process::Signal::KILL);
    }
}

/// Boots systemd as process 1, with what it is given: a directory, the binary, the key, the unit,
/// and the next binary.
const BOOT: &str = r#"
dir=$1 exe=$2 psk=$3 unit=$4 next=$5
base=$dir/base; mkdir "$base"; mount -t tmpfs tmpfs "$base"
root=$base/root; mkdir "$base/upper" "$base/work" "$root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$base/upper,workdir=$base/work" "$root"
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
for here in run tmp dev; do mount -t tmpfs tmpfs "$root/$here"; done
mkdir "$root/dev/net" "$root/dev/pts" "$root/dev/shm"
for node in null zero full random urandom tty net/tun; do
  touch "$root/dev/$node"; mount --bind "/dev/$node" "$root/dev/$node"
done
mount -t devpts devpts "$root/dev/pts" -o newinstance,ptmxmode=666
ln -s pts/ptmx "$root/dev/ptmx"; touch "$root/dev/console"
units=$root/etc/systemd/system; rm -rf "$units" "$root/etc/fstab"
install -D -m 644 "$unit" "$units/ipmoved.service"
mkdir "$units/basic.target.wants"; ln -s ../ipmoved.service "$units/basic.target.wants"
install -D -m 755 "$exe" "$root/usr/local/sbin/ipmoved"
install -D -m 755 "$next" "$root/usr/local/sbin/ipmoved.next"
rm -rf "$root/etc/ipmoved" "$root/var/lib/ipmoved"
install -D -m 600 "$psk" "$root/etc/ipmoved/psk"
install -D -m 600 "$dir/toml" "$root/etc/ipmoved/ipmoved.toml"
cd "$root"; mkdir old; pivot_root . old; umount -l /old
container=other exec /lib/systemd/systemd --system --unit=basic.target
"#;
