//! A look at this server, for the causes of silence: who listens where, and what the kernel counts
//! of packets that it throws away.
//!
//! Owns how to read that from `/proc/net`, and changes nothing. It is asked only while something is
//! not answered. What a cause is, and what to say of it, is not decided here.
//!
//! Files rather than `NETLINK_SOCK_DIAG` and `NETLINK_NETFILTER`: through those sockets a daemon
//! that was taken over could end others' connections and change the firewall.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::kernel::change::read_sysctl;
use crate::kernel::netlink::Link;
use crate::model::moved::{TCP, UDP};

/// Where the kernel shows the sockets and counters of this network namespace.
///
/// Only tests have threads in other namespaces than the process.
pub const PROC_NET: &str = if cfg!(test) {
    "/proc/thread-self/net"
} else {
    "/proc/self/net"
};

/// Most bytes of a list of sockets that are read: 20,000 sockets or so. In that of TCP those that
/// listen come first.
const MAX_LIST: usize = 4 << 20;

/// A list that took a while to read, as that of 20,000 UDP sockets, is not read again before so
/// many times as long: the control task has other things to do.
const PAUSE: u32 = 20;

/// TCP's state LISTEN, and that of a UDP socket that is not connected, as the lists show them.
const LISTEN: &str = "0A";
const UNCONNECTED: &str = "07";

/// What listens for packets to one end.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Listener {
    /// A socket bound to the address, or to any.
    Here,
    /// For an IPv4 address nothing but a socket bound to `::`, which may take IPv6 alone.
    OnIpv6,
    /// The port is bound at other addresses alone, such as this one.
    At(IpAddr),
    /// Nothing.
    Nobody,
}

/// Who listens on this server, as the lists of sockets say. Each list is read once for all ports,
/// and is good for [`PAUSE`] times as long as it took to read.
#[derive(Default, Debug)]
pub struct Listeners {
    tcp: Option<Lists>,
    udp: Option<Lists>,
}

/// At which addresses each port is bound.
type Bound = BTreeMap<u16, Vec<IpAddr>>;

/// The lists of a protocol.
#[derive(Debug)]
struct Lists {
    /// When they were read, and how long it took.
    read: Instant,
    took: Duration,
    /// They are `None` if they cannot be read to their end.
    v4: Option<Bound>,
    v6: Option<Bound>,
}

impl Listeners {
    /// Who listens for `protocol` at an address of this server; `None` if that cannot be known.
    pub fn listener(&mut self, now: Instant, protocol: u8, end: SocketAddr) -> Option<Listener> {
        self.lists(now, protocol)?.listener(end)
    }

    /// Who listens for `protocol`, port by port, as an address of this server sees it; `None` if
    /// that cannot be known.
    pub fn all(
        &mut self,
        now: Instant,
        protocol: u8,
        addr: IpAddr,
    ) -> Option<Vec<(u16, Listener)>> {
        let lists = self.lists(now, protocol)?;
        let both = [&lists.v4, &lists.v6].into_iter().flatten();
        let ports: BTreeSet<u16> = both.flat_map(Bound::keys).copied().collect();
        let each = |port| Some((port, lists.listener(SocketAddr::new(addr, port))?));
        ports.into_iter().map(each).collect()
    }

    /// The lists of a protocol, which are good for now.
    fn lists(&mut self, now: Instant, protocol: u8) -> Option<&Lists> {
        let (lists, name, state) = match protocol {
            TCP => (&mut self.tcp, "tcp", LISTEN),
            UDP => (&mut self.udp, "udp", UNCONNECTED),
            _ => return None,
        };
        if !lists.as_ref().is_some_and(|lists| lists.is_good(now)) {
            *lists = Some(Lists::read(now, name, state));
        }
        lists.as_ref()
    }
}

impl Lists {
    fn read(now: Instant, name: &str, state: &str) -> Self {
        let start = Instant::now();
        let v4 = bound(name, state);
        let v6 = bound(&format!("{name}6"), state).or_else(|| {
            // A kernel without IPv6 has no such list.
            let missing = !Path::new(&format!("{PROC_NET}/{name}6")).exists();
            missing.then(Bound::new)
        });
        Self {
            read: now,
            took: start.elapsed(),
            v4,
            v6,
        }
    }

    fn is_good(&self, now: Instant) -> bool {
        let age = now.saturating_duration_since(self.read);
        age.is_zero() || age < self.took * PAUSE
    }

    fn listener(&self, end: SocketAddr) -> Option<Listener> {
        let of = |list: &Option<Bound>| {
            let list = list.as_ref()?;
            Some(list.get(&end.port()).cloned().unwrap_or_default())
        };
        let v6 = of(&self.v6);
        let bound = match end {
            SocketAddr::V4(_) => of(&self.v4)?,
            SocketAddr::V6(_) => v6.clone()?,
        };
        let found = match_bound(end.ip(), &bound, v6.as_deref().unwrap_or_default());
        // Of what could not be read nobody knows what it says.
        (v6.is_some() || found == Listener::Here).then_some(found)
    }
}

fn match_bound(addr: IpAddr, bound: &[IpAddr], v6: &[IpAddr]) -> Listener {
    let same = |ip: &IpAddr| ip.to_canonical() == addr;
    let any = |ip: &IpAddr| ip.is_unspecified();
    let of_family = bound.iter().any(|ip| same(ip) || any(ip));
    if of_family || v6.iter().any(same) {
        return Listener::Here;
    }
    if v6.iter().any(any) {
        return Listener::OnIpv6;
    }
    bound
        .first()
        .map_or(Listener::Nobody, |&ip| Listener::At(ip))
}

/// Where sockets of a list are bound; `None` if it cannot be read, or not to its end.
fn bound(list: &str, state: &str) -> Option<Bound> {
    let file = File::open(format!("{PROC_NET}/{list}")).ok()?;
    read_bound(BufReader::new(file), state)
}

fn read_bound(list: impl BufRead, state: &str) -> Option<Bound> {
    let mut left = MAX_LIST;
    let mut found = Bound::new();
    for line in list.lines().skip(1) {
        let line = line.ok()?;
        left = left.checked_sub(line.len() + 1)?;
        let Some((local, in_state)) = read_socket(&line) else {
            continue;
        };
        // Behind those that listen come the connections, of which there may be a million.
        if state == LISTEN && in_state != LISTEN {
            break;
        }
        if in_state == state {
            found.entry(local.port()).or_default().push(local.ip());
        }
    }
    Some(found)
}

/// A line of `/proc/net/tcp` and its like: number, local end, remote end, state.
fn read_socket(line: &str) -> Option<(SocketAddr, &str)> {
    let mut words = line.split_ascii_whitespace().skip(1);
    let (local, state) = (words.next()?, words.nth(1)?);
    let (addr, port) = local.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |at: usize| {
        let digits = addr.get(8 * at..8 * at + 8)?;
        // Each word stands there as the machine reads it.
        u32::from_str_radix(digits, 16).ok().map(u32::to_ne_bytes)
    };
    let addr: IpAddr = if addr.len() == 8 {
        Ipv4Addr::from(word(0)?).into()
    } else {
        let words = [word(0)?, word(1)?, word(2)?, word(3)?];
        let octets: [u8; 16] = words.concat().try_into().ok()?;
        Ipv6Addr::from(octets).into()
    };
    Some((SocketAddr::new(addr, port), state))
}

/// What the kernel has counted since this network namespace began.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Counters {
    /// Packets that reverse path filtering dropped (`IPReversePathFilter`).
    pub rp_filter: u64,
    /// Connections that found the queue of the application full (`ListenOverflows`).
    pub overflows: u64,
}

impl Counters {
    /// Reads them; all are zero if they cannot be read.
    pub fn read() -> Self {
        let mut text = String::new();
        let file = File::open(format!("{PROC_NET}/netstat"));
        let read = file.and_then(|file| file.take(MAX_LIST as u64).read_to_string(&mut text));
        match read {
            Ok(_) => Self::parse(&text),
            Err(_) => Self::default(),
        }
    }

    /// A line of names stands before each line of numbers.
    fn parse(text: &str) -> Self {
        let lines: Vec<&str> = text.lines().collect();
        let count = |wanted: &str| {
            lines.chunks_exact(2).find_map(|pair| {
                let [names, numbers] = [pair[0], pair[1]].map(str::split_ascii_whitespace);
                let found = names.zip(numbers).find(|(name, _)| *name == wanted);
                found?.1.parse().ok()
            })
        };
        Self {
            rp_filter: count("IPReversePathFilter").unwrap_or(0),
            overflows: count("ListenOverflows").unwrap_or(0),
        }
    }
}

/// The links that drop packets whose sender they would not reach, or who is not reached at all, by
/// name, and what `sysctl -w` takes to end that. The kernel takes the greater of two settings, and
/// the greatest is the loose one (`Documentation/networking/ip-sysctl.rst`): a strict link is made
/// loose, whatever `all` says, and one that drops though it is loose has to be let go by both.
pub fn rp_filters(links: &[Link]) -> Vec<(String, String)> {
    let value = |name: &str| {
        let text = read_sysctl(&format!("net/ipv4/conf/{name}/rp_filter")).ok()?;
        text.parse::<u8>().ok()
    };
    let all = value("all").unwrap_or(0);
    let of = |link: &Link| {
        let own = value(&link.name).unwrap_or(0);
        let set = rp_filter_settings(&link.name, own, all)?;
        Some((link.name.clone(), set))
    };
    links
        .iter()
        .filter(|link| !link.loopback)
        .filter_map(of)
        .collect()
}

/// What `sysctl -w` takes to end the filtering of a link, if there is any.
fn rp_filter_settings(link: &str, own: u8, all: u8) -> Option<String> {
    const LOOSE: u8 = 2;
    // `sysctl` takes each dot for a slash, unless there is a slash before it.
    let of = |name: &str, value: u8| match name.contains('.') {
        true => format!("net/ipv4/conf/{name}/rp_filter={value}"),
        false => format!("net.ipv4.conf.{name}.rp_filter={value}"),
    };
    match own.max(all) {
        0 => None,
        strict if strict < LOOSE => Some(of(link, LOOSE)),
        _ => {
            let filters = [("all", all), (link, own)].into_iter();
            let set = filters.filter(|&(_, value)| value > 0);
            let set: Vec<String> = set.map(|(name, _)| of(name, 0)).collect();
            Some(set.join(" "))
        }
    }
}

/// Whether this server forwards packets of a family, as containers behind DNAT need it.
pub fn forwards(v4: bool) -> Option<bool> {
    let path = if v4 {
        "net/ipv4/ip_forward"
    } else {
        "net/ipv6/conf/all/forwarding"
    };
    read_sysctl(path).ok().map(|value| value != "0")
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use super::*;

    #[test]
    fn a_strict_link_is_made_loose_and_a_loose_one_let_go() {
        let set = |link, own, all| rp_filter_settings(link, own, all).unwrap_or_default();
        assert_eq!(set("eth0", 0, 0), "");
        for (own, all) in [(1, 0), (0, 1), (1, 1)] {
            assert_eq!(set("eth0", own, all), "net.ipv4.conf.eth0.rp_filter=2");
        }
        assert_eq!(set("eth0.7", 1, 0), "net/ipv4/conf/eth0.7/rp_filter=2");
        assert_eq!(set("eth0", 2, 0), "net.ipv4.conf.eth0.rp_filter=0");
        assert_eq!(
            set("eth0", 1, 2),
            "net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.eth0.rp_filter=0"
        );
    }
    use crate::kernel::netlink::Netlink;
    use crate::kernel::testing::{in_fresh_namespace, sysctl, veth};

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn listeners_are_found_where_they_are() {
        in_fresh_namespace(|| {
            // `lo` is down.
            sysctl("net/ipv4/ip_nonlocal_bind", "1");
            sysctl("net/ipv6/ip_nonlocal_bind", "1");
            let end = |text: &str| text.parse::<SocketAddr>().unwrap();
            let listener = |protocol, end| {
                let mut listeners = Listeners::default();
                listeners.listener(Instant::now(), protocol, end)
            };
            let here = end("127.0.0.2:80");
            assert_eq!(listener(TCP, here), Some(Listener::Nobody));
            let _other = TcpListener::bind("127.0.0.1:80").unwrap();
            assert_eq!(listener(TCP, here), Some(Listener::At(ip("127.0.0.1"))));
            assert_eq!(listener(TCP, end("127.0.0.1:80")), Some(Listener::Here));
            assert_eq!(listener(UDP, here), Some(Listener::Nobody));
            // Each has a port of its own: what another thread has just forked may still hold the
            // one before.
            let _any = TcpListener::bind("0.0.0.0:82").unwrap();
            assert_eq!(listener(TCP, end("127.0.0.2:82")), Some(Listener::Here));
            let _any6 = TcpListener::bind("[::]:83").unwrap();
            assert_eq!(listener(TCP, end("127.0.0.2:83")), Some(Listener::OnIpv6));
            assert_eq!(listener(TCP, end("[::1]:83")), Some(Listener::Here));
            assert_eq!(listener(TCP, end("[::1]:81")), Some(Listener::Nobody));
            let _udp = UdpSocket::bind("[::1]:53").unwrap();
            assert_eq!(listener(UDP, end("[::1]:53")), Some(Listener::Here));
            assert_eq!(
                listener(UDP, end("[2001:db8::1]:53")),
                Some(Listener::At(ip("::1")))
            );
            assert_eq!(listener(47, here), None);
        });
    }

    #[test]
    fn lines_of_the_lists_are_read() {
        let line = "  0: 0100007F:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000";
        let read = read_socket(line);
        if cfg!(target_endian = "little") {
            assert_eq!(read, Some(("127.0.0.1:80".parse().unwrap(), "0A")));
        }
        for wrong in [
            "",
            "sl local_address rem_address st",
            "0: 01:50 0:0 0A",
            "0: x",
        ] {
            assert_eq!(read_socket(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_list_that_is_cut_says_nothing() {
        let line = "0: 0100007F:0050 00000000:0000 07 00000000:00000000 00:00000000 00000000\n";
        let list = |lines: usize| format!("head\n{}", line.repeat(lines));
        let read = |lines| read_bound(list(lines).as_bytes(), UNCONNECTED);
        let fit = MAX_LIST / line.len();
        assert_eq!(read(fit).unwrap()[&80].len(), fit);
        assert_eq!(read(fit + 1), None);
        let (read, took, addr) = (Instant::now(), Duration::ZERO, ip("127.0.0.1"));
        let mut lists = Lists {
            read,
            took,
            v4: Some([(80, vec![addr])].into()),
            v6: None,
        };
        let port = |port| SocketAddr::new(addr, port);
        assert_eq!(lists.listener(port(80)), Some(Listener::Here));
        assert_eq!(lists.listener(port(81)), None, "the other list may have it");
        lists.v6 = Some(Bound::new());
        assert_eq!(lists.listener(port(81)), Some(Listener::Nobody));
        lists.v4 = None;
        assert_eq!(lists.listener(port(81)), None);
    }

    #[test]
    fn a_list_that_is_long_to_read_is_kept_for_long() {
        let start = Instant::now();
        let lists = |took| Lists {
            read: start,
            took,
            v4: None,
            v6: None,
        };
        let good = |took, after| {
            let now = start + Duration::from_millis(after);
            lists(Duration::from_millis(took)).is_good(now)
        };
        assert_eq!([good(0, 0), good(0, 1_000)], [true, false]);
        assert_eq!([good(500, 9_000), good(500, 10_000)], [true, false]);
    }

    #[test]
    fn counters_are_found_by_name() {
        let text = "TcpExt: SyncookiesSent ListenOverflows IPReversePathFilter\n\
                    TcpExt: 1 2 3\nIpExt: InNoRoutes\nIpExt: 4\n";
        let counters = Counters::parse(text);
        assert_eq!((counters.overflows, counters.rp_filter), (2, 3));
        assert_eq!(Counters::parse("nonsense"), Counters::default());
        in_fresh_namespace(|| {
            let text = std::fs::read_to_string(format!("{PROC_NET}/netstat")).unwrap();
            assert!(text.contains(" IPReversePathFilter "), "{text}");
        });
    }

    #[test]
    fn the_setting_that_filters_is_named() {
        in_fresh_namespace(|| {
            let netlink = Netlink::new().unwrap();
            let link = veth(&netlink);
            sysctl("net/ipv4/conf/all/rp_filter", "0");
            sysctl(&format!("net/ipv4/conf/{}/rp_filter", link.name), "0");
            assert_eq!(rp_filters(std::slice::from_ref(&link)), []);
            let named = |settings: String| vec![(link.name.clone(), settings)];
            let own = format!("net.ipv4.conf.{}.rp_filter", link.name);
            sysctl("net/ipv4/conf/all/rp_filter", "1");
            let found = rp_filters(std::slice::from_ref(&link));
            assert_eq!(found, named(format!("{own}=2")));
            sysctl(&format!("net/ipv4/conf/{}/rp_filter", link.name), "2");
            let found = rp_filters(std::slice::from_ref(&link));
            let both = format!("net.ipv4.conf.all.rp_filter=0 {own}=0");
            assert_eq!(found, named(both));
        });
    }
}
