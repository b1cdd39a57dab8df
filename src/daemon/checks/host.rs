//! What this system lets ipmoved do: privileges, the TUN, programs, filters. They are tried out in
//! a network namespace that vanishes with the try.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

use rustix::fs::Access;
use rustix::io::Errno;
use rustix::thread::CapabilitySet;

use super::words::{Words, quoted};
use crate::daemon::setup::raise_tun;
use crate::io::tun::{DEVICE, TunError, TunOptions, TunQueue};
use crate::io::udp::{UdpOptions, UdpSocket};
use crate::kernel::bpf::BpfError;
use crate::kernel::capture::Capture;
use crate::kernel::levers;
use crate::kernel::netlink::{Link, Netlink};
use crate::kernel::plan::PlanError;
use crate::kernel::programs::Own;
use crate::kernel::steer::Steering;
use crate::kernel::{Desired, namespace_dir};
use crate::model::finding::Finding;
use crate::model::peer::Role;
use crate::settings::config::Config;
use crate::settings::values::Listen;

/// Linux from which on everything was tried.
const TRIED: (u32, u32) = (5, 10);

/// Flows that there is room for in a try.
const FEW_FLOWS: u32 = 1_024;

/// `docker run` with everything that it takes.
const DOCKER: &str = "docker run --network host --cap-add NET_ADMIN --cap-add BPF \
                      --cap-add PERFMON --device /dev/net/tun IMAGE ipmoved --help";

/// What shows whether the kernel was built with what it takes.
const CONFIGURED: &str = "zgrep -E 'CONFIG_(BPF_SYSCALL|NET_CLS_BPF|NET_CLS_ACT|NET_SCH_INGRESS)=' \
                          /proc/config.gz /boot/config-$(uname -r)";

/// What makes the device node of the TUN where there is none (Documentation/networking/tuntap.rst).
const NODE: &str = "mkdir -p /dev/net && mknod -m 666 /dev/net/tun c 10 200";

/// What is missing of the privileges, if it is.
pub(super) fn privileges(words: &Words) -> Finding {
    let held = rustix::thread::capabilities(None).map(|sets| sets.effective);
    let is_root = rustix::process::geteuid().is_root();
    missing(held.unwrap_or(CapabilitySet::empty()), is_root, words)
}

fn missing(held: CapabilitySet, is_root: bool, words: &Words) -> Finding {
    let bpf = CapabilitySet::BPF.union(CapabilitySet::SYS_ADMIN);
    let missing: Vec<&str> = [
        ("CAP_NET_ADMIN", held.intersects(CapabilitySet::NET_ADMIN)),
        ("CAP_BPF", held.intersects(bpf)),
    ]
    .into_iter()
    .filter_map(|(name, held)| (!held).then_some(name))
    .collect();
    if missing.is_empty() {
        return Finding::ok(
            "privileges",
            "this process",
            "has CAP_NET_ADMIN and CAP_BPF",
        );
    }
    let text = format!("has not {}", missing.join(" and "));
    if is_root {
        let text = format!("{text}, though it is root: a container that was not given them");
        return Finding::fail("privileges", "this process", text, DOCKER);
    }
    let text = format!("{text}; what takes root was not looked at");
    let remedy = format!("sudo {}", words.again());
    Finding::fail("privileges", "this process", text, remedy)
}

/// Whether the kernel is one of those that everything was tried on.
pub(super) fn kernel() -> Finding {
    let release = levers::release().unwrap_or_default();
    is_tried(&release)
}

fn is_tried(release: &str) -> Finding {
    let mut numbers = release.split(['.', '-']).map(str::parse::<u32>);
    let object = format!("Linux {release}");
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= TRIED => {
            Finding::ok("kernel", object, "is new enough")
        }
        _ => {
            let text = "ipmoved is made for Linux 5.10 and newer: boot such a one, if it is there";
            Finding::warn("kernel", object, text, "ls /boot/vmlinuz-*")
        }
    }
}

/// Makes the TUN, loads the programs and puts them in their places, where nobody sees it.
/// `plan` says what is put on interfaces.
pub(super) fn levers(
    name: &str,
    lanes: u8,
    words: &Words,
    plan: impl FnOnce(&Netlink, &Link) -> Result<Vec<Desired>, PlanError> + Send,
) -> Vec<Finding> {
    match levers::apart(|| try_all(name, lanes, words, plan)) {
        Ok(found) => found,
        Err(error) => {
            let text = format!("could not be tried out ({error}): that takes CAP_SYS_ADMIN");
            vec![Finding::ok("levers", "TUN, BPF and tc", text)]
        }
    }
}

fn try_all(
    name: &str,
    lanes: u8,
    words: &Words,
    plan: impl FnOnce(&Netlink, &Link) -> Result<Vec<Desired>, PlanError>,
) -> Vec<Finding> {
    let made = Netlink::new().map_err(|error| error.to_string());
    let netlink = match made {
        Ok(netlink) => netlink,
        Err(error) => {
            let remedy = "ip link";
            return vec![Finding::fail("tun", name, error, remedy)];
        }
    };
    let queues = usize::from(lanes);
    let (queues, features) = match TunQueue::create(name, queues, TunOptions::default()) {
        Ok(made) => made,
        Err(error) => return vec![no_tun(name, &error, words)],
    };
    let tun = match raise_tun(&netlink, name, 1_500) {
        Ok(tun) => tun,
        Err(error) => {
            return vec![Finding::fail("tun", name, error.to_string(), DOCKER)];
        }
    };
    let offloads = match features.uso {
        true => "",
        false => ", without UDP super-packets (Linux 6.2 has them)",
    };
    let queues = match queues.len() {
        1 => "a queue".to_owned(),
        more => format!("{more} queues"),
    };
    let text = format!("can be made, with {queues}{offloads}");
    let mut found = vec![Finding::ok("tun", name, text)];
    let tried = match plan(&netlink, &tun) {
        Ok(desired) => {
            let text = "the programs load";
            found.push(Finding::ok("bpf", "the kernel's verifier", text));
            levers::try_out(&netlink, &desired)
        }
        Err(error) => {
            found.push(no_programs(&error, words));
            return found;
        }
    };
    found.push(match tried {
        Ok(()) => Finding::ok("tc", "clsact and its filters", "can be made"),
        Err((change, why)) => {
            let remedy = "modprobe -a sch_ingress cls_bpf";
            Finding::fail("tc", change, format!("cannot be made: {why}"), remedy)
        }
    });
    found
}

/// Everything that this role of a tunnel has on an interface.
pub(super) fn plan(
    config: &Config,
    netlink: &Netlink,
    tun: &Link,
) -> Result<Vec<Desired>, PlanError> {
    let port = config.listen.port;
    match config.role {
        Role::Old => {
            let moves: Vec<_> = config
                .peers
                .iter()
                .flat_map(|it| &it.moves)
                .cloned()
                .collect();
            let capture = Capture::new(&moves, &moves, tun, port, Own::new()?)?;
            let mut desired = capture.on_tun(netlink)?;
            desired.extend(capture.on_entrance(netlink, tun)?);
            Ok(desired)
        }
        Role::New => {
            let flows = config.max_flows.min(FEW_FLOWS);
            let steering = Steering::new(netlink, &[], port, flows, &[])?;
            steering.on_link(netlink, tun, tun, true)
        }
    }
}

fn no_programs(error: &PlanError, words: &Words) -> Finding {
    let remedy = match error {
        // Root of a user namespace, as in a container without privileges: nothing in there helps.
        PlanError::Bpf(BpfError::Denied) => DOCKER.to_owned(),
        PlanError::Bpf(BpfError::LockedMemory) => {
            format!("ulimit -l unlimited && {}", words.again())
        }
        PlanError::Bpf(_)
        | PlanError::Netlink(_)
        | PlanError::LinkType { .. }
        | PlanError::ToMany(_)
        | PlanError::NoPriority(_) => CONFIGURED.to_owned(),
    };
    let text = format!("refuses the programs: {error}");
    Finding::fail("bpf", "the kernel", text, remedy)
}

fn no_tun(name: &str, error: &TunError, words: &Words) -> Finding {
    let remedy = match error {
        TunError::NoDriver if Path::new(DEVICE).exists() => "modprobe tun".to_owned(),
        // A container's /dev is its own. If there is no driver either, the next check says so.
        TunError::NoDriver => NODE.to_owned(),
        TunError::Permission(_) if rustix::process::geteuid().is_root() => DOCKER.to_owned(),
        TunError::Permission(_) => format!("sudo {}", words.again()),
        TunError::Exists(_) | TunError::Other(..) => "ls -l /dev/net/tun".to_owned(),
    };
    Finding::fail("tun", name, error.to_string(), remedy)
}

/// Whether the interface's name is free.
pub(super) fn name(netlink: &Netlink, tun: &str, words: &Words) -> Option<Finding> {
    let links = netlink.links().ok()?;
    let taken = |name: &str| links.iter().any(|link| link.name == name);
    if !taken(tun) {
        return None;
    }
    let free = (1..100).map(|number| format!("ipmoved{number}"));
    let free = free.into_iter().find(|name| !taken(name))?;
    let text = "exists already, and no ipmoved runs here that has made it";
    let remedy = words.with("tun", &[free]);
    Some(Finding::fail("name", tun, text, remedy))
}

/// Whether the tunnel's port is free.
pub(super) fn port(config: &Config, words: &Words) -> Finding {
    let Listen { ip, port } = config.listen;
    let options = UdpOptions::default();
    let open = |ip| UdpSocket::bind(SocketAddr::new(ip, port), false, options);
    let opened = match ip {
        Some(ip) => open(ip),
        None => open(Ipv6Addr::UNSPECIFIED.into()).or_else(|error| match error.raw_os_error() {
            Some(libc::EADDRINUSE) => Err(error),
            _ => open(Ipv4Addr::UNSPECIFIED.into()),
        }),
    };
    let object = format!("UDP port {port}");
    let Err(error) = opened else {
        return Finding::ok("port", object, "is free");
    };
    let (text, listen) = match (error.raw_os_error(), ip) {
        (Some(libc::EADDRINUSE), _) => {
            let other = port.checked_add(1).unwrap_or(port - 1);
            let at = |ip| SocketAddr::new(ip, other).to_string();
            let text = format!(
                "is another program's; give the other server's --peer that port, {other}, too"
            );
            (text, ip.map_or(other.to_string(), at))
        }
        (Some(libc::EADDRNOTAVAIL), Some(ip)) => (
            format!("{ip} is not an address of this server"),
            port.to_string(),
        ),
        _ => {
            let text = format!("cannot be opened: {error}");
            return Finding::fail("port", object, text, "ss -lunp");
        }
    };
    Finding::fail("port", object, text, words.with("listen", &[listen]))
}

/// Whether a daemon that was killed has left something.
pub(super) fn left(runtime_dir: &Path) -> Option<Finding> {
    let dir = namespace_dir(runtime_dir).ok()?;
    let journal = dir.join("journal");
    if !journal.exists() {
        return None;
    }
    let text = "an ipmoved that was killed has left what it changed; the next start takes it over";
    Some(Finding::warn(
        "left",
        journal.display(),
        text,
        "ipmoved cleanup",
    ))
}

/// Whether what outlives the daemon can be written (old server).
pub(super) fn state_dir(dir: &Path) -> Finding {
    let above = dir.ancestors().find(|it| it.exists()).unwrap_or(dir);
    let object = dir.display();
    match rustix::fs::access(above, Access::WRITE_OK | Access::EXEC_OK) {
        Ok(()) => Finding::ok("state", object, "can be written"),
        Err(error) => {
            let text = format!(
                "cannot be written ({error}): the modes of moves and who still comes are forgotten"
            );
            let above = quoted(&above.display().to_string());
            let remedy = match error {
                Errno::ROFS => format!("mount -o remount,rw $(findmnt -no TARGET -T {above})"),
                _ => format!("chown root: {above} && chmod u+rwx {above}"),
            };
            Finding::warn("state", object, text, remedy)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::finding::Grade;

    fn words() -> Words {
        let typed = ["ipmoved", "check", "--move", "192.0.2.5"];
        Words::new(typed.map(str::to_owned))
    }

    #[test]
    fn what_is_missing_is_named_and_how_to_have_it() {
        let all = CapabilitySet::NET_ADMIN.union(CapabilitySet::BPF);
        assert_eq!(missing(all, false, &words()).result, Grade::Ok);
        let sys_admin = CapabilitySet::NET_ADMIN.union(CapabilitySet::SYS_ADMIN);
        assert_eq!(missing(sys_admin, true, &words()).result, Grade::Ok);
        let none = missing(CapabilitySet::empty(), false, &words());
        assert_eq!(none.result, Grade::Fail);
        assert!(none.text.starts_with("has not CAP_NET_ADMIN and CAP_BPF"));
        let sudo = "sudo ipmoved check --move 192.0.2.5";
        assert_eq!(none.remedy.as_deref(), Some(sudo));
        let in_container = missing(CapabilitySet::NET_ADMIN, true, &words());
        assert!(in_container.text.contains("has not CAP_BPF, though"));
        assert!(in_container.remedy.unwrap().starts_with("docker run"));
    }

    #[test]
    fn versions_of_the_kernel_are_read() {
        for (release, grade) in [
            ("6.18.2-cloud-amd64", Grade::Ok),
            ("5.10.0-30-amd64", Grade::Ok),
            ("5.4.0-150-generic", Grade::Warn),
            ("4.19", Grade::Warn),
            ("unknown", Grade::Warn),
        ] {
            assert_eq!(is_tried(release).result, grade, "{release}");
        }
    }
}
