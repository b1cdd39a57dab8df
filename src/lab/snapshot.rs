//! The kernel's network configuration of a namespace as text, for comparing before and after.
//!
//! Owns the decision which things belong to that configuration: links, addresses, routes of every
//! table, rules, qdiscs, filters on both sides of every interface, nft tables, and every file under
//! `/proc/sys/net`. It leaves out counters, ages, carrier and neighbours, which change by
//! themselves. It only reads.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::fs;
use std::io;
use std::path::Path;

use netlink_packet_core::{
    NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer, NetlinkHeader,
    NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use netlink_packet_route::route::{RouteAttribute, RouteMessage};
use netlink_packet_route::rule::RuleMessage;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::Socket;
use netlink_sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};

use super::{Doing, LabError, Namespace, Result};
use crate::kernel::netlink::{Direction, Netlink};

/// Sysctls that change by themselves, show the whole machine's memory, or are random.
const VOLATILE: &[&str] = &[
    "ipv4/route/flush",
    "ipv6/route/flush",
    "ipv4/tcp_fastopen_key",
    "netfilter/nf_conntrack_count",
    "nf_conntrack_count",
    // All namespaces of the machine share these: another test may change them, or anybody.
    "core/rmem_max",
    "core/wmem_max",
    "core/bpf_jit_limit",
    "ipv4/tcp_mem",
    "ipv4/udp_mem",
];

/// Most lines of a difference that we show.
const MAX_DIFF: usize = 40;

/// The state of one namespace: one line for each thing, with its identity as the key.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Snapshot {
    lines: BTreeMap<String, String>,
}

impl Snapshot {
    /// Reads the state of a namespace.
    pub fn of(namespace: &Namespace) -> Result<Self> {
        namespace.run(|| {
            let mut lines = BTreeMap::new();
            sysctls(Path::new("/proc/sys/net"), &mut lines)
                .doing(|| "read /proc/sys/net".into())?;
            configuration(&mut lines)
                .doing(|| format!("read the configuration of the {}", namespace.name()))?;
            Ok(Self { lines })
        })
    }

    /// The differences, as lines with `-` (only before) and `+` (only after); empty if there are
    /// none.
    pub fn diff(&self, after: &Self) -> String {
        let keys = self.lines.keys().chain(after.lines.keys());
        let mut keys: Vec<_> = keys.collect();
        keys.sort();
        keys.dedup();
        let mut diff = String::new();
        let mut shown = 0;
        for key in keys {
            let (before, after) = (self.lines.get(key), after.lines.get(key));
            if before == after {
                continue;
            }
            shown += 1;
            if shown > MAX_DIFF {
                diff.push_str("…\n");
                break;
            }
            for (sign, value) in [('-', before), ('+', after)] {
                if let Some(value) = value {
                    // Writing to a String cannot fail.
                    let _ = writeln!(diff, "{sign} {key}: {value}");
                }
            }
        }
        diff
    }

    /// Expects no difference.
    pub fn is_same_as(&self, before: &Self) -> Result<()> {
        let diff = before.diff(self);
        if diff.is_empty() {
            Ok(())
        } else {
            Err(LabError::unexpected(format!(
                "the kernel's state is not as before:\n{diff}"
            )))
        }
    }

    /// Expects a difference, so that a later [`Self::is_same_as`] means something.
    pub fn is_not_the_same_as(&self, before: &Self) -> Result<()> {
        if self == before {
            return Err(LabError::unexpected("nothing was changed in the kernel"));
        }
        Ok(())
    }

    /// The number of things in it.
    pub fn len(&self) -> usize {
        self.lines.len()
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }
}

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (key, value) in &self.lines {
            writeln!(f, "{key}: {value}")?;
        }
        Ok(())
    }
}

/// Every readable file below `dir`; the calling thread's namespace decides what is in it.
fn sysctls(dir: &Path, lines: &mut BTreeMap<String, String>) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            // An interface that goes takes its directory with it. The remaining lines show that it
            // went.
            match sysctls(&path, lines) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => continue,
            }
        }
        let key = path.strip_prefix("/proc/sys/net").unwrap_or(&path);
        let key = key.display().to_string();
        if VOLATILE.contains(&key.as_str()) {
            continue;
        }
        // Some files are write-only, and secrets that nobody has set cannot be read.
        if let Ok(value) = fs::read_to_string(&path) {
            lines.insert(format!("sysctl {key}"), value.trim_end().replace('\t', " "));
        }
    }
    Ok(())
}

fn configuration(lines: &mut BTreeMap<String, String>) -> io::Result<()> {
    for link in dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))? {
        if let RouteNetlinkMessage::NewLink(mut link) = link {
            link.attributes.retain(|attribute| {
                !matches!(
                    attribute,
                    LinkAttribute::Stats(_)
                        | LinkAttribute::Stats64(_)
                        | LinkAttribute::AfSpecUnspec(_)
                        | LinkAttribute::Promiscuity(_)
                        | LinkAttribute::OperState(_)
                        | LinkAttribute::Carrier(_)
                        | LinkAttribute::CarrierChanges(_)
                        | LinkAttribute::CarrierUpCount(_)
                        | LinkAttribute::CarrierDownCount(_)
                )
            });
            lines.insert(
                format!("link {}", link.header.index),
                format!("{:?} {:?}", link.header, link.attributes),
            );
        }
    }
    let mut listed = Vec::new();
    for address in dump(RouteNetlinkMessage::GetAddress(AddressMessage::default()))? {
        if let RouteNetlinkMessage::NewAddress(mut address) = address {
            address
                .attributes
                .retain(|attribute| !matches!(attribute, AddressAttribute::CacheInfo(_)));
            listed.push(("address", format!("{address:?}")));
        }
    }
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut request = RouteMessage::default();
        request.header.address_family = family;
        for route in dump(RouteNetlinkMessage::GetRoute(request))? {
            if let RouteNetlinkMessage::NewRoute(mut route) = route {
                route
                    .attributes
                    .retain(|attribute| !matches!(attribute, RouteAttribute::CacheInfo(_)));
                listed.push(("route", format!("{route:?}")));
            }
        }
        let mut request = RuleMessage::default();
        request.header.family = family;
        for rule in dump(RouteNetlinkMessage::GetRule(request))? {
            if let RouteNetlinkMessage::NewRule(rule) = rule {
                listed.push(("rule", format!("{rule:?}")));
            }
        }
    }
    let netlink = Netlink::new().map_err(io::Error::other)?;
    for link in netlink.links().map_err(io::Error::other)? {
        for qdisc in netlink.qdiscs(link.index).map_err(io::Error::other)? {
            listed.push(("qdisc", format!("{} {qdisc}", link.name)));
        }
        for side in [Direction::Ingress, Direction::Egress] {
            for filter in netlink
                .filters(link.index, side)
                .map_err(io::Error::other)?
            {
                listed.push(("filter", format!("{} {side} {filter:?}", link.name)));
            }
        }
    }
    for table in nft_tables()? {
        listed.push(("nft table", table));
    }
    // The kernel does not promise an order. Duplicates stay in the list.
    listed.sort();
    for (kind, text) in listed {
        let mut key = format!("{kind} {text}");
        while lines.contains_key(&key) {
            key.push_str(" (again)");
        }
        lines.insert(key, "present".into());
    }
    Ok(())
}

/// Everything of one kind, as netlink-packet-route reads it. That is complete, unlike our own
/// client, which reads only what it needs.
fn dump(request: RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(request));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    answers(NETLINK_ROUTE, &bytes)?
        .iter()
        .map(|answer| {
            let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(answer)
                .map_err(io::Error::other)?;
            let NetlinkPayload::InnerMessage(message) = message.payload else {
                return Err(io::Error::other(format!("unexpected answer {message:?}")));
            };
            Ok(message)
        })
        .collect()
}

/// Names of the nft tables; none on a kernel without nft.
fn nft_tables() -> io::Result<Vec<String>> {
    const NFNL_SUBSYS_NFTABLES: u16 = 10;
    const NFT_MSG_GETTABLE: u16 = 1;
    let mut request = Vec::new();
    request.extend_from_slice(&20u32.to_ne_bytes());
    request.extend_from_slice(&(NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETTABLE).to_ne_bytes());
    request.extend_from_slice(&(NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    request.extend_from_slice(&[0; 8]);
    // struct nfgenmsg: every family, version 0, no resource.
    request.extend_from_slice(&[0; 4]);
    match answers(NETLINK_NETFILTER, &request) {
        Ok(answers) => Ok(answers
            .iter()
            .map(|answer| String::from_utf8_lossy(&answer[20..]).into_owned())
            .map(|text| text.escape_debug().to_string())
            .collect()),
        Err(error)
            if [libc::EINVAL, libc::EOPNOTSUPP, libc::EPROTONOSUPPORT]
                .contains(&error.raw_os_error().unwrap_or(0)) =>
        {
            Ok(Vec::new())
        }
        Err(error) => Err(error),
    }
}

/// Sends a dump request and returns each answer as a whole message.
fn answers(protocol: isize, request: &[u8]) -> io::Result<Vec<Vec<u8>>> {
    let mut socket = Socket::new(protocol)?;
    socket.bind_auto()?;
    socket.send(request, 0)?;
    let mut answers = Vec::new();
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        let mut rest = &datagram[..];
        while !rest.is_empty() {
            let answer = NetlinkBuffer::new_checked(rest).map_err(io::Error::other)?;
            let length = answer.length() as usize;
            match answer.message_type() {
                NLMSG_DONE => return Ok(answers),
                NLMSG_ERROR => {
                    let code = answer.payload().first_chunk().copied();
                    return match code.map(i32::from_ne_bytes) {
                        Some(code) => Err(io::Error::from_raw_os_error(-code)),
                        None => Err(io::ErrorKind::InvalidData.into()),
                    };
                }
                _ => answers.push(rest[..length].to_vec()),
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}
