//! What the kernel's connection tracker knows of connections that hosts behind this one have:
//! containers and virtual machines whose addresses are translated, or that are reached by routes.
//!
//! Owns one dump and one request over `NETLINK_NETFILTER`
//! (linux/netfilter/nfnetlink_conntrack.h). Where nothing is tracked in this namespace it asks for
//! nothing, so that the kernel loads no module because of it.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP};
use netlink_sys::protocols::NETLINK_NETFILTER;

use crate::flow::ended::HostFlow;
use crate::kernel::netlink::ask;
use crate::model::moved::{TCP, UDP};

/// How many connections this namespace tracks.
const COUNT: &str = "/proc/sys/net/netfilter/nf_conntrack_count";

/// `NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_GET`, and the same of `IPCTNL_MSG_CT_DELETE`.
const CT_GET: u16 = 1 << 8 | 1;
const CT_DELETE: u16 = 1 << 8 | 2;

/// Length of `struct nfgenmsg`.
const NFGENMSG: usize = 4;

/// `NLA_F_NESTED`.
const NESTED: u16 = 1 << 15;

/// Attributes: of a connection, of a tuple, of its addresses and its ports, and of TCP.
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_PROTOINFO: u16 = 4;
const CTA_ZONE: u16 = 18;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
const CTA_IP_V6_SRC: u16 = 3;
const CTA_IP_V6_DST: u16 = 4;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;
const CTA_PROTOINFO_TCP: u16 = 1;
const CTA_PROTOINFO_TCP_STATE: u16 = 1;

/// `TCP_CONNTRACK_SYN_SENT` to `TCP_CONNTRACK_CLOSE_WAIT`: those that are not over.
const ALIVE: std::ops::RangeInclusive<u8> = 1..=5;

/// One direction of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Tuple {
    protocol: u8,
    src: SocketAddr,
    dst: SocketAddr,
}

/// TCP connections from or at an address that has `moved` whose end here is a host behind this one,
/// as the other end sees them, `most` of them. What a socket of this host may have is left out: it
/// can be asked itself. Those are the ones at an address that is `held` where neither address nor
/// port is translated: who is sent to another port here (`REDIRECT`) is not found by the first one.
///
/// # Errors
/// If the kernel tracks nothing here, or does not tell.
pub fn behind(
    moved: impl Fn(IpAddr) -> bool,
    held: impl Fn(IpAddr) -> bool,
    most: usize,
) -> io::Result<Vec<HostFlow>> {
    let mut found = Vec::new();
    if std::fs::read_to_string(COUNT)?.trim() == "0" {
        return Ok(found);
    }
    each(|connection| {
        if let Some(flow) = flow_of(connection, &moved, &held) {
            found.push(flow);
        }
        found.len() < most
    })?;
    Ok(found)
}

/// Ends of conversations, TCP and UDP, that others have begun with an address that has `moved`, as
/// they see it, each once and `most` of them: those of hosts behind this one, and of UDP those of
/// this host's own sockets as well, which tell of no client.
///
/// # Errors
/// If the kernel tracks nothing here, or does not tell.
pub fn served(
    moved: impl Fn(IpAddr) -> bool,
    most: usize,
) -> io::Result<BTreeSet<(u8, SocketAddr)>> {
    let mut found = BTreeSet::new();
    if std::fs::read_to_string(COUNT)?.trim() == "0" {
        return Ok(found);
    }
    each(|connection| {
        found.extend(served_of(connection, &moved));
        found.len() < most
    })?;
    Ok(found)
}

/// The end of one conversation, if it is such a one.
fn served_of(connection: &[u8], moved: &impl Fn(IpAddr) -> bool) -> Option<(u8, SocketAddr)> {
    let original = tuple(attribute(connection, CTA_TUPLE_ORIG)?)?;
    if original.protocol == UDP {
        return moved(original.dst.ip()).then_some((UDP, original.dst));
    }
    let flow = flow_of(connection, moved, &|_| true)?;
    Some((flow.protocol, flow.local))
}

/// Makes the kernel forget the conversations of hosts behind this one whose end here, as the other
/// end sees it, is `wanted`. It is for commands that people run. Returns how many there were.
///
/// # Errors
/// If the kernel tracks nothing here, or refuses.
pub fn forget_behind(wanted: impl Fn(u8, SocketAddr) -> bool) -> io::Result<u64> {
    if std::fs::read_to_string(COUNT)?.trim() == "0" {
        return Ok(0);
    }
    let mut found: Vec<Vec<u8>> = Vec::new();
    each(|connection| {
        if is_behind(connection, &wanted).unwrap_or(false) {
            found.push(naming(connection));
        }
        true
    })?;
    let mut forgotten = 0;
    for attributes in found {
        let original = attribute(&attributes, CTA_TUPLE_ORIG).and_then(tuple);
        let family = match original.is_some_and(|it| it.src.is_ipv4()) {
            true => libc::AF_INET,
            false => libc::AF_INET6,
        };
        let mut payload = vec![family as u8, 0, 0, 0];
        payload.extend(attributes);
        match ask(NETLINK_NETFILTER, CT_DELETE, NLM_F_ACK, &payload, |_| true) {
            // It is over meanwhile.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            result => {
                result?;
                forgotten += 1;
            }
        }
    }
    Ok(forgotten)
}

/// Whether a connection is one of a host behind this one with a `wanted` end.
fn is_behind(connection: &[u8], wanted: &impl Fn(u8, SocketAddr) -> bool) -> Option<bool> {
    let original = tuple(attribute(connection, CTA_TUPLE_ORIG)?)?;
    let reply = tuple(attribute(connection, CTA_TUPLE_REPLY)?)?;
    // Began there, or came in for it.
    let out = original.src != reply.dst && wanted(original.protocol, reply.dst);
    let came = original.dst != reply.src && wanted(original.protocol, original.dst);
    Some(out || came)
}

/// The attributes that name a connection to the kernel.
fn naming(connection: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (kind, nested) in [(CTA_TUPLE_ORIG, NESTED), (CTA_ZONE, 0)] {
        if let Some(value) = attribute(connection, kind) {
            bytes.extend((value.len() as u16 + 4).to_ne_bytes());
            bytes.extend((kind | nested).to_ne_bytes());
            bytes.extend(value);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
    }
    bytes
}

/// The flow of one connection, if it is such a one.
fn flow_of(
    connection: &[u8],
    moved: &impl Fn(IpAddr) -> bool,
    held: &impl Fn(IpAddr) -> bool,
) -> Option<HostFlow> {
    let original = tuple(attribute(connection, CTA_TUPLE_ORIG)?)?;
    let reply = tuple(attribute(connection, CTA_TUPLE_REPLY)?)?;
    if original.protocol != TCP || !ALIVE.contains(&tcp_state(connection)?) {
        return None;
    }
    // Who began it, seen from outside, is where replies go; whom it reached is where it was sent.
    let (inside, local, remote) = if moved(reply.dst.ip()) {
        (original.src, reply.dst, reply.src)
    } else if moved(original.dst.ip()) {
        (reply.src, original.dst, original.src)
    } else {
        return None;
    };
    let is_behind = inside != local || !held(local.ip());
    is_behind.then_some(HostFlow {
        protocol: TCP,
        local,
        remote,
    })
}

fn tcp_state(connection: &[u8]) -> Option<u8> {
    let tcp = attribute(attribute(connection, CTA_PROTOINFO)?, CTA_PROTOINFO_TCP)?;
    attribute(tcp, CTA_PROTOINFO_TCP_STATE)?.first().copied()
}

fn tuple(bytes: &[u8]) -> Option<Tuple> {
    let (ip, proto) = (
        attribute(bytes, CTA_TUPLE_IP)?,
        attribute(bytes, CTA_TUPLE_PROTO)?,
    );
    let addr = |v4, v6| -> Option<IpAddr> {
        if let Some(bytes) = attribute(ip, v4) {
            return Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?).into());
        }
        let bytes = <[u8; 16]>::try_from(attribute(ip, v6)?).ok()?;
        Some(Ipv6Addr::from(bytes).into())
    };
    let port = |kind| {
        let bytes = attribute(proto, kind).and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(0, u16::from_be_bytes)
    };
    Some(Tuple {
        protocol: attribute(proto, CTA_PROTO_NUM)?.first().copied()?,
        src: SocketAddr::new(
            addr(CTA_IP_V4_SRC, CTA_IP_V6_SRC)?,
            port(CTA_PROTO_SRC_PORT),
        ),
        dst: SocketAddr::new(
            addr(CTA_IP_V4_DST, CTA_IP_V6_DST)?,
            port(CTA_PROTO_DST_PORT),
        ),
    })
}

/// The value of the first attribute of this kind.
fn attribute(mut bytes: &[u8], kind: u16) -> Option<&[u8]> {
    /// `NLA_F_NESTED` and `NLA_F_NET_BYTEORDER` are no part of the kind.
    const KIND: u16 = 0x3fff;
    loop {
        let word = |at: usize| Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
        let length = usize::from(word(0)?);
        let value = bytes.get(4..length)?;
        if word(2)? & KIND == kind {
            return Some(value);
        }
        bytes = bytes.get(length.next_multiple_of(4)..)?;
    }
}

/// Hands over each connection that is tracked, until `go_on` says no.
fn each(mut go_on: impl FnMut(&[u8]) -> bool) -> io::Result<()> {
    // Any family, version 0, no resource.
    let header = [0; NFGENMSG];
    ask(NETLINK_NETFILTER, CT_GET, NLM_F_DUMP, &header, |answer| {
        go_on(answer.get(NFGENMSG..).unwrap_or_default())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::testing::attribute;

    /// One direction of TCP, from and to these.
    fn tuple(kind: u16, src: &str, dst: &str) -> Vec<u8> {
        tuple_of(TCP, kind, src, dst)
    }

    /// One direction, from and to these.
    fn tuple_of(protocol: u8, kind: u16, src: &str, dst: &str) -> Vec<u8> {
        let [src, dst] = [src, dst].map(|end| end.parse::<SocketAddr>().unwrap());
        let octets = |end: SocketAddr| match end.ip() {
            IpAddr::V4(addr) => addr.octets().to_vec(),
            IpAddr::V6(addr) => addr.octets().to_vec(),
        };
        let kinds = if src.is_ipv4() {
            [CTA_IP_V4_SRC, CTA_IP_V4_DST]
        } else {
            [CTA_IP_V6_SRC, CTA_IP_V6_DST]
        };
        let ends = [
            attribute(kinds[0], &octets(src)),
            attribute(kinds[1], &octets(dst)),
        ];
        let proto = [
            attribute(CTA_PROTO_NUM, &[protocol]),
            attribute(CTA_PROTO_SRC_PORT, &src.port().to_be_bytes()),
            attribute(CTA_PROTO_DST_PORT, &dst.port().to_be_bytes()),
        ];
        let parts = [
            attribute(CTA_TUPLE_IP, &ends.concat()),
            attribute(CTA_TUPLE_PROTO, &proto.concat()),
        ];
        attribute(kind, &parts.concat())
    }

    /// A connection as it began, and as its replies come.
    fn connection(original: [&str; 2], reply: [&str; 2]) -> Vec<u8> {
        let state = attribute(CTA_PROTOINFO_TCP, &attribute(CTA_PROTOINFO_TCP_STATE, &[3]));
        [
            tuple(CTA_TUPLE_ORIG, original[0], original[1]),
            tuple(CTA_TUPLE_REPLY, reply[0], reply[1]),
            attribute(CTA_PROTOINFO, &state),
        ]
        .concat()
    }

    #[test]
    fn what_others_have_begun_is_served_of_udp_by_this_host_as_well() {
        let moved = |addr: IpAddr| addr == "192.0.2.5".parse::<IpAddr>().unwrap();
        const CLIENT: &str = "203.0.113.7:40000";
        for (protocol, to, from, served) in [
            (UDP, "192.0.2.5:53", "10.8.0.2:53", true),
            (UDP, "192.0.2.5:53", "192.0.2.5:53", true),
            (UDP, "192.0.2.1:53", "192.0.2.1:53", false),
            (TCP, "192.0.2.5:80", "10.8.0.2:80", true),
            (TCP, "192.0.2.5:80", "192.0.2.5:80", false),
        ] {
            let state = attribute(CTA_PROTOINFO_TCP, &attribute(CTA_PROTOINFO_TCP_STATE, &[3]));
            let connection = [
                tuple_of(protocol, CTA_TUPLE_ORIG, CLIENT, to),
                tuple_of(protocol, CTA_TUPLE_REPLY, from, CLIENT),
                attribute(CTA_PROTOINFO, &state),
            ];
            let expected = served.then(|| (protocol, to.parse().unwrap()));
            assert_eq!(served_of(&connection.concat(), &moved), expected, "{from}");
        }
        // What this host asks for itself is nothing that it serves.
        let asks = [
            tuple_of(UDP, CTA_TUPLE_ORIG, "192.0.2.5:40000", "203.0.113.7:53"),
            tuple_of(UDP, CTA_TUPLE_REPLY, "203.0.113.7:53", "192.0.2.5:40000"),
        ];
        assert_eq!(served_of(&asks.concat(), &moved), None);
    }

    #[test]
    fn what_the_wires_addresses_do_not_find_is_behind() {
        const CLIENT: &str = "203.0.113.7:40000";
        const SERVICE: &str = "192.0.2.5:80";
        let held: [IpAddr; 2] = ["192.0.2.1", "192.0.2.5"].map(|addr| addr.parse().unwrap());
        for (original, reply, local, why) in [
            ([CLIENT, SERVICE], [SERVICE, CLIENT], None, "a socket here"),
            (
                [CLIENT, SERVICE],
                ["192.0.2.5:8080", CLIENT],
                Some(SERVICE),
                "another port",
            ),
            (
                [CLIENT, SERVICE],
                ["10.8.0.2:80", CLIENT],
                Some(SERVICE),
                "a container",
            ),
            (
                ["192.0.2.1:5000", CLIENT],
                [CLIENT, "192.0.2.5:5000"],
                Some("192.0.2.5:5000"),
                "SNAT",
            ),
            (
                ["192.0.2.5:5000", CLIENT],
                [CLIENT, "192.0.2.5:5000"],
                None,
                "a socket here",
            ),
            (
                ["192.0.2.5:5000", CLIENT],
                [CLIENT, "192.0.2.5:5001"],
                Some("192.0.2.5:5001"),
                "SNAT",
            ),
            (
                ["192.0.2.1:5000", CLIENT],
                [CLIENT, "192.0.2.1:5000"],
                None,
                "not moved",
            ),
        ] {
            let moved = |addr: IpAddr| addr == held[1];
            let found = flow_of(&connection(original, reply), &moved, &|addr| {
                held.contains(&addr)
            });
            let expected = local.map(|local| HostFlow {
                protocol: TCP,
                local: local.parse().unwrap(),
                remote: CLIENT.parse().unwrap(),
            });
            assert_eq!(found, expected, "{why}");
        }
    }
}
