//! A setting under `/proc/sys`, in the calling thread's network namespace.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, access};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::is_interface_name;
use super::{ChangeError, Interface, Kind, Means, Presence, There, Undone, typed};
use crate::kernel::netlink::{Link, Netlink};
use crate::packet::IPV6_MIN_MTU;

/// The settings of a whole network namespace that this program changes.
const OF_THE_NAMESPACE: [&str; 6] = [
    "net/ipv4/conf/lo/forwarding",
    "net/ipv6/conf/lo/forwarding",
    "net/ipv4/fwmark_reflect",
    "net/ipv6/fwmark_reflect",
    "net/ipv4/ip_local_reserved_ports",
    "net/ipv4/tcp_fwmark_accept",
];

/// The settings of one interface that this program changes.
const OF_AN_INTERFACE: [&str; 4] = [
    "accept_local",
    "arp_announce",
    "arp_ignore",
    "src_valid_mark",
];

/// Where the settings of interfaces are, by their names.
const CONF: &str = "net/ipv4/conf/";

/// The same of IPv6.
const CONF6: &str = "net/ipv6/conf/";

/// A setting and its value.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Sysctl {
    /// Path below `/proc/sys`, as in `net/ipv4/tcp_fwmark_accept`.
    pub path: String,
    /// The value before.
    pub from: String,
    /// The value that is wanted.
    pub to: String,
    /// The interface, for a setting of one. It may be renamed, and its settings with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on: Option<Interface>,
}

impl Sysctl {
    /// Whether both are the same setting, whatever its interface was called at the time.
    pub(super) fn is_same_setting(&self, other: &Self) -> bool {
        match (&self.on, &other.on) {
            (Some(on), Some(other_on)) => on.index == other_on.index && self.name() == other.name(),
            _ => self.path == other.path,
        }
    }

    /// Whether the kernel removes default routes when it is made, unless they are kept.
    pub(super) fn takes_routes_by_hand(&self) -> bool {
        removes_advertised(&self.path) && self.from != self.to
    }

    /// The last part of the path.
    fn name(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or_default()
    }

    /// The path at present.
    fn path_now(&self, netlink: &Netlink) -> Result<String, ChangeError> {
        let Some(on) = &self.on else {
            return Ok(self.path.clone());
        };
        let interface = netlink.link_name(on.index)?;
        Ok(format!("{CONF}{interface}/{}", self.name()))
    }

    /// The value at present.
    pub(super) fn value(&self, netlink: &Netlink) -> Result<String, ChangeError> {
        Ok(read_sysctl(&self.path_now(netlink)?)?)
    }
}

impl fmt::Display for Sysctl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = dotted(&self.path);
        write!(f, "sysctl {name}: {} → {}", self.from, self.to)
    }
}

/// The name of a setting as sysctl(8) writes it: dots between the parts, and a slash for a dot
/// within one.
fn dotted(path: &str) -> String {
    let turned = |c| match c {
        '/' => '.',
        '.' => '/',
        c => c,
    };
    path.chars().map(turned).collect()
}

/// The command that sets a setting.
pub(in crate::kernel) fn to_set(path: &str, value: &str) -> String {
    if value.is_empty() {
        // sysctl(8) takes no empty value.
        return format!("echo > {}", typed(&format!("/proc/sys/{path}")));
    }
    format!("sysctl -w {}", typed(&format!("{}={value}", dotted(path))))
}

/// A setting of an interface, in one family.
pub(in crate::kernel) struct OfLink {
    /// Path below `/proc/sys`.
    pub(in crate::kernel) path: String,
    /// Where the kernel has its present value; `None` if the interface is not to have it.
    at: Option<String>,
}

impl OfLink {
    /// `family` is `ipv4` or `ipv6`. An interface that is only planned will begin with the settings
    /// of `default` (`ip-sysctl`), and one with packets too small for IPv6 has none of that.
    pub(in crate::kernel) fn new(link: &Link, family: &str, name: &str) -> Self {
        let path = format!("net/{family}/conf/{}/{name}", link.name);
        let at = if !link.is_planned() {
            Some(path.clone())
        } else if family == "ipv6" && link.mtu < IPV6_MIN_MTU as u32 {
            None
        } else {
            Some(format!("net/{family}/conf/default/{name}"))
        };
        Self { path, at }
    }

    /// The value at present.
    pub(in crate::kernel) fn value(&self) -> io::Result<String> {
        let at = self.at.as_ref().ok_or(io::ErrorKind::NotFound)?;
        read_sysctl(at)
    }

    /// Whether it can be changed: in many containers it cannot.
    pub(in crate::kernel) fn may_write(&self) -> bool {
        let may = |at| access(format!("/proc/sys/{at}"), Access::WRITE_OK).is_ok();
        self.at.as_ref().is_some_and(may)
    }
}

impl Kind for Sysctl {
    fn object(&self) -> String {
        format!("sysctl {}", self.path)
    }

    fn to_make(&self) -> String {
        to_set(&self.path, &self.to)
    }

    fn to_undo(&self) -> String {
        to_set(&self.path, &self.from)
    }

    fn check(&self) -> Result<(), String> {
        if !is_ours(&self.path) {
            return Err(format!(
                "{:?} is no setting that ipmoved changes",
                self.path
            ));
        }
        if let Some(on) = &self.on {
            on.check()?;
            let interface = interface_and_name(&self.path).map(|(interface, _)| interface);
            if interface != Some(on.name.as_str()) {
                return Err(format!("{:?} is no setting of {:?}", self.path, on.name));
            }
        }
        // Numbers, and lists of ports.
        let is_value = |value: &&String| {
            let mut chars = value.chars();
            chars.all(|c| c.is_ascii_digit() || matches!(c, ',' | '-'))
        };
        match [&self.from, &self.to].into_iter().find(|it| !is_value(it)) {
            Some(value) => Err(format!("{value:?} is no value of {:?}", self.path)),
            None => Ok(()),
        }
    }

    /// A value that is there already may be an administrator's.
    fn is_unmistakable(&self) -> bool {
        false
    }

    fn present(&self, there: &There<'_>) -> Result<Presence, ChangeError> {
        Ok(Presence::of(self.value(there.netlink)? == self.to))
    }

    fn make(&self, with: &Means<'_>) -> Result<(), ChangeError> {
        let path = self.path_now(with.netlink)?;
        if removes_advertised(&path) {
            return Ok(with_advertised_kept(with.netlink, || {
                write_sysctl(&path, &self.to)
            })?);
        }
        Ok(write_sysctl(&path, &self.to)?)
    }

    /// A value that is neither ours nor the earlier one is somebody else's, and stays.
    fn undo(&self, netlink: &Netlink) -> Result<Undone, ChangeError> {
        let now = self.value(netlink)?;
        if now == self.from {
            return Ok(Undone::Gone);
        }
        if now != self.to {
            return Ok(Undone::Foreign(format!(
                "somebody has set it to {now} since; it stays so"
            )));
        }
        write_sysctl(&self.path_now(netlink)?, &self.from)?;
        Ok(Undone::Gone)
    }

    fn remedy(&self, error: &ChangeError) -> Option<&'static str> {
        if error.is_unsupported() {
            return Some("the kernel has no such setting");
        }
        (error.errno() == Some(Errno::ROFS)).then_some(
            "/proc/sys is read-only here, as in most containers; run `sysctl -w NAME=VALUE` on the \
             host (with `--network host`), or give a container with a network of its own `docker \
             run --sysctl NAME=VALUE`",
        )
    }
}

/// The value of a setting, without the final newline.
pub(in crate::kernel) fn read_sysctl(path: &str) -> io::Result<String> {
    Ok(fs::read_to_string(file(path)?)?.trim_end().to_owned())
}

/// Writes a value with a newline: without it, an empty value would be no write at all.
fn write_sysctl(path: &str, value: &str) -> io::Result<()> {
    fs::write(file(path)?, format!("{value}\n"))
}

/// Whether the kernel removes every default route that a router has advertised once somebody turns
/// this setting on, whichever interface it is of (`addrconf_fixup_forwarding` in
/// net/ipv6/addrconf.c). The next advertisement may be half an hour away (RFC 4861 section 6.2.1).
fn removes_advertised(path: &str) -> bool {
    path.starts_with(CONF6) && path.ends_with("/forwarding")
}

/// Does `work` while the kernel keeps these routes: it does where `accept_ra` is 2. For an
/// interface that does not forward that means the same as 1, so that nothing is amiss if this
/// process is killed in the midst of it.
fn with_advertised_kept(
    netlink: &Netlink,
    work: impl FnOnce() -> io::Result<()>,
) -> io::Result<()> {
    const ACCEPTS: &str = "1";
    const KEEPS: &str = "2";
    let links = netlink.links().unwrap_or_default().into_iter();
    let is = |path: &str, wanted| read_sysctl(path).is_ok_and(|value| value == wanted);
    let accepting = links
        .map(|link| format!("{CONF6}{}/", link.name))
        // One that forwards accepts none, but with 2 it would.
        .filter(|of| is(&format!("{of}forwarding"), "0"))
        .map(|of| format!("{of}accept_ra"))
        .filter(|path| is(path, ACCEPTS));
    let kept: Vec<String> = accepting
        .filter(|path| write_sysctl(path, KEEPS).is_ok())
        .collect();
    let done = work();
    for path in kept {
        // Unless it is gone by now.
        let _ = write_sysctl(&path, ACCEPTS);
    }
    done
}

/// The file of a setting. There is none outside `/proc/sys/net`, whoever asks.
fn file(path: &str) -> io::Result<PathBuf> {
    let mut parts = path.split('/');
    if parts.next() != Some("net") || parts.any(|part| matches!(part, "" | "." | "..")) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{path:?} is not below net/"),
        ));
    }
    Ok(Path::new("/proc/sys").join(path))
}

/// Whether this program changes the setting.
fn is_ours(path: &str) -> bool {
    if OF_THE_NAMESPACE.contains(&path) {
        return true;
    }
    interface_and_name(path).is_some_and(|(interface, name)| {
        // These two stand for no interface, but for many.
        let is_one = !matches!(interface, "all" | "default");
        is_one && is_interface_name(interface) && OF_AN_INTERFACE.contains(&name)
    })
}

/// The interface of a setting, and the setting's name.
fn interface_and_name(path: &str) -> Option<(&str, &str)> {
    path.strip_prefix(CONF)?.split_once('/')
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv6Addr, SocketAddrV6};
    use std::time::Duration;

    use socket2::{Domain, Protocol, Socket, Type};

    use super::*;
    use crate::kernel::netlink::{Family, TABLE_MAIN};
    use crate::kernel::testing::{Tun, in_fresh_namespace, sysctl as set, veth};
    use crate::lab::poll_until;

    fn sysctl(path: &str, from: &str) -> Sysctl {
        Sysctl {
            path: path.into(),
            from: from.into(),
            to: "1".into(),
            on: None,
        }
    }

    #[test]
    fn only_settings_that_this_program_changes_are_taken_from_a_journal() {
        for path in [
            "net/ipv4/tcp_fwmark_accept",
            "net/ipv6/fwmark_reflect",
            "net/ipv6/conf/lo/forwarding",
            "net/ipv4/conf/eth0.5/arp_ignore",
            "net/ipv4/conf/fifteen.letters/src_valid_mark",
        ] {
            assert_eq!(sysctl(path, "0").check(), Ok(()), "{path}");
        }
        for path in [
            "",
            "/etc/environment",
            "kernel/core_pattern",
            "net/ipv4/ip_forward",
            "net/../kernel/core_pattern",
            "net/ipv4/conf/../ip_forward",
            "net/ipv4/conf/../../../kernel/arp_ignore",
            "net/ipv4/conf/all/arp_ignore",
            "net/ipv4/conf/default/arp_ignore",
            "net/ipv4/conf//arp_ignore",
            "net/ipv4/conf/sixteen.letters_/arp_ignore",
            "net/ipv4/conf/eth0/forwarding",
            "net/ipv4/conf/eth0/arp_ignore/",
            "/proc/sys/net/ipv4/tcp_fwmark_accept",
        ] {
            let refused = sysctl(path, "0").check().unwrap_err();
            assert!(refused.contains(&format!("{path:?}")), "{refused}");
        }
        assert!(sysctl("net/ipv4/fwmark_reflect", "0\n1").check().is_err());
        for (path, interface, is_its) in [
            ("net/ipv4/conf/eth0/arp_ignore", "eth0", true),
            ("net/ipv4/conf/eth0/arp_ignore", "eth1", false),
            ("net/ipv4/conf/eth0/arp_ignore", "../all", false),
            ("net/ipv4/fwmark_reflect", "eth0", false),
        ] {
            let on = Some(Interface {
                index: 2,
                name: interface.into(),
            });
            let sysctl = Sysctl {
                on,
                ..sysctl(path, "0")
            };
            assert_eq!(sysctl.check().is_ok(), is_its, "{path} {interface}");
        }
    }

    /// What a router says: it is a default router for half an hour (RFC 4861 section 4.2).
    const ADVERTISEMENT: [u8; 16] = [134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0];

    #[test]
    fn a_default_route_that_a_router_has_advertised_stays() {
        in_fresh_namespace(|| {
            set("net/ipv6/conf/default/accept_dad", "0");
            let netlink = Netlink::new().unwrap();
            let host = veth(&netlink);
            let router = netlink.link_by_name("v1").unwrap().unwrap();
            set("net/ipv6/conf/v1/forwarding", "1");
            let tun = Tun::new(&netlink, "tun0", false);
            let socket = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6)).unwrap();
            socket.set_multicast_hops_v6(255).unwrap();
            socket.bind_device(Some(b"v1")).unwrap();
            let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
            let to = SocketAddrV6::new(all_nodes, 0, 0, router.index).into();
            let routes = || {
                let all = netlink.routes(Family::V6, TABLE_MAIN).unwrap();
                let on_host = all.into_iter().filter(|it| it.dev == Some(host.index));
                on_host.filter(|it| it.dst.1 == 0).count()
            };
            let advertised = poll_until(Duration::from_secs(10), Duration::from_millis(50), || {
                let _ = socket.send_to(&ADVERTISEMENT, &to);
                (routes() == 1).then_some(())
            });
            assert!(advertised.is_some(), "no route came of the advertisement");
            let change = sysctl(&format!("net/ipv6/conf/{}/forwarding", tun.link.name), "0");
            let with = Means {
                netlink: &netlink,
                program: None,
            };
            change.make(&with).unwrap();
            assert_eq!(change.value(&netlink).unwrap(), "1");
            assert_eq!(routes(), 1, "it is gone");
            let accepts = read_sysctl("net/ipv6/conf/v0/accept_ra");
            assert_eq!(accepts.unwrap(), "1", "it is as it was");
        });
    }

    #[test]
    fn nothing_outside_of_net_is_read_or_written() {
        let file = std::env::temp_dir().join(format!("ipmoved-sysctl-{}", std::process::id()));
        fs::write(&file, "1\n").unwrap();
        let absolute = file.display().to_string();
        let climbing = format!("net/../../..{absolute}");
        for path in [
            absolute.as_str(),
            &climbing,
            "kernel/osrelease",
            "net//ipv4",
        ] {
            let error = read_sysctl(path).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{path}");
            assert!(write_sysctl(path, "2").is_err(), "{path}");
        }
        assert_eq!(fs::read_to_string(&file).unwrap(), "1\n");
        fs::remove_file(file).unwrap();
    }
}
