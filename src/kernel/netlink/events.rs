//! What the kernel tells of changes to links, addresses, routes, rules, filters and settings.
//!
//! Owns the subscription, and the choice of what is news: not what concerns single destinations (a
//! BGP daemon changes a million routes), nor classes and actions of traffic control, nor what the
//! daemon itself has done. It does not say what has changed. Whoever hears of something looks,
//! since messages may be lost, and since a look finds everything that came since the last one.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use netlink_packet_core::NetlinkBuffer;
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_ROUTE;

/// The groups (`RTNLGRP_*`, linux/rtnetlink.h).
const GROUPS: [u32; 10] = [
    1,  // LINK
    4,  // TC: qdiscs and filters
    5,  // IPV4_IFADDR
    7,  // IPV4_ROUTE
    8,  // IPV4_RULE
    9,  // IPV6_IFADDR
    11, // IPV6_ROUTE
    19, // IPV6_RULE
    24, // IPV4_NETCONF: forwarding, rp_filter
    25, // IPV6_NETCONF
];

/// Most messages that one call reads. The kernel keeps about as many of the shortest ones in a
/// socket's buffer of the usual 208 KiB, so one call empties it unless more come meanwhile. The
/// rest keeps the socket readable.
const MOST_AT_ONCE: usize = 512;

/// Space for one datagram: the kernel makes notifications of at most a page, but for links with
/// many virtual functions.
const DATAGRAM: usize = 16 * 1024;

/// A subscription of one network namespace. It never blocks.
#[derive(Debug)]
pub struct Events {
    socket: Socket,
    buffer: Vec<u8>,
    counts: EventCounts,
}

/// How much the kernel has told.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct EventCounts {
    /// Messages that were read.
    pub read: u64,
    /// How often the kernel had to drop messages, since nobody read them.
    pub overrun: u64,
}

impl Events {
    /// Subscribes in the calling thread's network namespace.
    ///
    /// # Errors
    /// If the kernel refuses the socket. Groups that it does not know are left out.
    pub fn new() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.set_non_blocking(true)?;
        for group in GROUPS {
            // A kernel without IPv6, for example.
            let _ = socket.add_membership(group);
        }
        Ok(Self {
            socket,
            buffer: Vec::with_capacity(DATAGRAM),
            counts: EventCounts::default(),
        })
    }

    /// Reads what has come, at most `MOST_AT_ONCE` messages. Returns whether there is news:
    /// somebody but the sockets with the port ids `own` has changed something, or messages were
    /// lost.
    ///
    /// # Errors
    /// If the socket cannot be read; [`io::ErrorKind::WouldBlock`] if nothing at all has come.
    pub fn read(&mut self, own: &[u32]) -> io::Result<bool> {
        let mut news = false;
        for number in 0..MOST_AT_ONCE {
            self.buffer.clear();
            match self.socket.recv(&mut self.buffer, 0) {
                Ok(_) => {
                    self.counts.read += 1;
                    news |= is_news(&self.buffer, own);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return if number == 0 { Err(error) } else { Ok(news) };
                }
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    self.counts.overrun += 1;
                    news = true;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(news)
    }

    /// How much the kernel has told so far.
    pub fn counts(&self) -> EventCounts {
        self.counts
    }
}

impl AsRawFd for Events {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

/// Whether a datagram holds a message that is news. One that cannot be read may be.
fn is_news(datagram: &[u8], own: &[u32]) -> bool {
    let mut rest = datagram;
    while !rest.is_empty() {
        let Ok(message) = NetlinkBuffer::new_checked(rest) else {
            return true;
        };
        let asked_by_us = own.contains(&message.port_number());
        if !asked_by_us && concerns_us(message.message_type(), message.payload()) {
            return true;
        }
        let length = (message.length() as usize).next_multiple_of(4);
        rest = rest.get(length..).unwrap_or_default();
    }
    false
}

/// Whether a message may concern the daemon.
fn concerns_us(kind: u16, payload: &[u8]) -> bool {
    // linux/rtnetlink.h
    const RTM_NEWNETCONF: u16 = 80;
    const RTM_DELNETCONF: u16 = 81;
    match kind {
        // Only default routes tell where replies leave; what leads to a peer is asked every second.
        // Those of tables of our own are default routes, too.
        libc::RTM_NEWROUTE | libc::RTM_DELROUTE => {
            let prefix = payload.get(1);
            prefix == Some(&0)
        }
        libc::RTM_NEWLINK
        | libc::RTM_DELLINK
        | libc::RTM_NEWADDR
        | libc::RTM_DELADDR
        | libc::RTM_NEWRULE
        | libc::RTM_DELRULE
        | libc::RTM_NEWQDISC
        | libc::RTM_DELQDISC
        | libc::RTM_NEWTFILTER
        | libc::RTM_DELTFILTER
        | RTM_NEWNETCONF
        | RTM_DELNETCONF => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;
    use std::net::IpAddr;

    use super::*;
    use crate::kernel::netlink::{Address, Direction, Netlink, Route, RouteKind};
    use crate::kernel::testing::{delete_link, in_fresh_namespace, set_link_down, veth};
    use crate::lab::wiring::Wiring;

    /// Whether there is news since the last call.
    fn heard(events: &mut Events, own: &[u32]) -> bool {
        let mut news = false;
        loop {
            match events.read(own) {
                Ok(some) => news |= some,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return news,
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// A route that leads nowhere, and needs no link.
    fn hole(addr: IpAddr, prefix: u8) -> Route {
        Route {
            kind: RouteKind::Blackhole,
            ..Route::to(addr, prefix)
        }
    }

    #[test]
    fn what_others_change_is_news_and_what_we_change_is_not() {
        in_fresh_namespace(|| {
            let mut events = Events::new().unwrap();
            let (others, ours) = (Netlink::new().unwrap(), Netlink::new().unwrap());
            let own = [ours.port_id()];
            // Nothing happens by itself as long as no link is up.
            const LO: u32 = 1;
            let (network, everywhere) = ([198, 51, 100, 0].into(), [0; 4].into());
            others.add_route(&hole(network, 24)).unwrap();
            assert!(!heard(&mut events, &own), "a route to one network");
            others.add_route(&hole(everywhere, 0)).unwrap();
            assert!(heard(&mut events, &own), "a default route came");
            others.delete_route(&hole(everywhere, 0)).unwrap();
            assert!(heard(&mut events, &own), "it went");
            ours.add_route(&hole(everywhere, 0)).unwrap();
            ours.add_clsact(LO).unwrap();
            assert!(!heard(&mut events, &own), "our own doing");
            others.delete_clsact(LO).unwrap();
            assert!(heard(&mut events, &own), "the qdisc went");
            assert_eq!(ours.filters(LO, Direction::Ingress).unwrap(), []);
            assert!(!heard(&mut events, &own), "a question");

            let index = veth(&others).index;
            assert!(heard(&mut events, &own), "a link came");
            let address = Address {
                index,
                addr: "192.0.2.1".parse().unwrap(),
                prefix: 24,
            };
            others.add_address(&address).unwrap();
            assert!(heard(&mut events, &own), "an address came");
            set_link_down(&others, index).unwrap();
            assert!(heard(&mut events, &own), "a link went down");
            delete_link(&others, index).unwrap();
            assert!(heard(&mut events, &own), "a link went");
            assert!(events.counts().read > 5 && events.counts().overrun == 0);
        });
    }

    #[test]
    fn what_was_lost_is_news() {
        in_fresh_namespace(|| {
            let mut events = Events::new().unwrap();
            let others = Netlink::new().unwrap();
            let network = |n: u16| hole([10, (n >> 8) as u8, n as u8, 0].into(), 24);
            // More routes than the socket holds messages; none of them is news by itself.
            for n in 0..4_000 {
                others.add_route(&network(n)).unwrap();
            }
            assert!(heard(&mut events, &[]));
            assert_eq!(events.counts().overrun, 1);
            others.delete_route(&network(0)).unwrap();
            assert!(!heard(&mut events, &[]), "the flood is over");
        });
    }
}
