//! The programs at the interfaces, generated for the addresses and ports at hand.
//!
//! ```text
//!            old server                                      new server
//!   link ingress ── capture ──► TUN             TUN ingress ── deliver ──► link ingress
//!   TUN ingress ── return_path ──► link         link ingress ── arrivals ──► stack
//!                   └─ bounced: uplink ingress, link egress ── take_replies ──► TUN
//!                      past capture            link ingress ── callers ──► TUN
//!   link egress ── note_own ──► link            lo egress ── loopback ──► lo
//!
//!            old server alone, with `nat`
//!   uplink ingress ── capture, replies ──► TUN
//!   TUN ingress ── way_out ──► uplinks, or back into this host's own stack
//! ```
//!
//! `listens` stands on no interface: the daemon asks it who listens on the new server.
//!
//! One program a file, with a sketch of it in C at its head. A new one is a new file, with a line
//! in this one and a line in the test below that loads every program. They share:
//!
//! ```text
//!   headers   the offsets of header fields
//!   phrases   code that several programs share, and the registers that have names
//!   facts     what the old server's programs know of links and addresses
//!   moved     the moved addresses, and which scope one lies in
//!   marked    by which mark the replies of a moved address leave
//!   rights    what has moved of each, as the old server's programs decide by it
//!   flows     the memory of the steering programs
//!   directly  how many conversations come to the new server directly
//!   inside    what they know of calls from inside to moved addresses
//!   inports   which prefixes have which ports of what is served there, as far as it fits
//!   parse     how the steering programs and the one below read a packet
//!   places    what the new server's programs know of addresses
//!   outgoing  what begins on the new server
//!   named     its ports from which it may be the first to speak to a client
//!   own       what the old server remembers of the conversations that it has itself
//!   stays     which packets capture leaves to it
//!   another_port  which of them come from another port than it spoke to
//!   served_here  who is served by the old server itself, for those who ask who still comes
//!   begun     what the new server begins there from ports that have not moved
//!   modes     whose a packet is of which nothing is known
//! ```
//!
//! Owns what each program decides about a packet. Attaching them is the business of
//! [`plan`](super::plan).
//!
//! All packet reads go through `LD_ABS`/`LD_IND`, which reach into non-linear packets and let a
//! packet pass that ends too early, or copy a whole header with `bpf_skb_load_bytes`. A packet that
//! does not concern a program costs a handful of loads: in the old server's capture 35 ns as
//! BPF_PROG_TEST_RUN counts, with 1, 64 or 4,096 moves, unless its address lies among them (52 ns).
//! One to a moved address costs 130 ns, and 159 ns where its port decides, however many there are;
//! one to a port that has not moved costs 87 ns. Where the new server may begin something from any
//! port, that one costs 56 ns more, an answer 275 ns, and what the new server sends 100 to 160 ns
//! more. On the new server a datagram of the tunnel costs 55 ns in either direction, TCP from the
//! wire 35 ns, a reply 120 to 160 ns (TCP whose socket is known much less: nothing of it is read),
//! and what leaves directly 180 ns.
//!
//! Size: no program grows with the number of moves. The verifier gives up at 8,192 open branches,
//! and after it has looked at a million instructions. Without CAP_PERFMON, as in
//! most containers, it looks at more, takes no sum of a value's address and anything that varies by
//! path, and on kernels as old as 6.1 refuses some of them.

mod another_port;
mod arrivals;
mod begun;
mod callers;
mod capture;
mod deliver;
mod directly;
mod facts;
mod flows;
mod headers;
mod inports;
mod inside;
mod listens;
mod loopback;
mod marked;
mod modes;
mod moved;
mod named;
mod note_own;
mod outgoing;
mod own;
mod parse;
mod phrases;
mod places;
mod related;
mod replies;
mod return_path;
mod rights;
mod served_here;
mod shifted;
mod sockets;
mod stays;
mod take_replies;
#[cfg(test)]
mod testing;
mod way_out;

pub use arrivals::arrivals;
pub use callers::callers;
pub use capture::{CAPTURE, capture};
pub use deliver::deliver;
pub use facts::Facts;
pub use flows::{Counter, Entrance, FlowMaps, now};
pub use listens::Listening;
pub use loopback::{LOOPBACK, PeerTargets, loopback};
pub use marked::{Hop, MAX_INSTEAD, MarkedWay};
pub use named::named_ports;
pub use note_own::{NOTE_OWN, note_own};
pub use outgoing::Chosen;
pub use own::Own;
pub use places::Place;
pub use replies::{Pair, replies};
pub use return_path::{LO, return_path};
pub use served_here::{READ_EVERY, Served};
pub use stays::DHCP_CLIENTS;
pub use take_replies::{TAKE_REPLIES, take_replies};
pub use way_out::{Way, way_out};

/// The start of all programs' names, by which the daemon recognises its own filters.
pub const NAME_PREFIX: &str = "ipmoved_";

#[cfg(test)]
mod tests {
    use super::testing::moves;
    use super::*;
    use crate::kernel::bpf::Program;
    use crate::kernel::testing::{capabilities_of_the_unit, in_fresh_namespace, keep_only};

    /// What leaves by its port: of anybody, of a user, and of a control group.
    fn chosen() -> [Chosen; 3] {
        let of = |ports: &str, user, cgroup_depth| Chosen {
            ports: ports.parse().unwrap(),
            user,
            cgroup_depth,
        };
        [
            of("25,465,587/tcp", None, None),
            of("from:20/tcp", Some(8), None),
            of("27000-27050", Some(8), Some(2)),
        ]
    }

    /// Each program for interfaces with and without a link-layer header, and the number of its
    /// instructions. Look twice when that grows: every packet runs through them.
    fn every_program() -> (FlowMaps, [Facts; 2], Vec<(Program, usize)>) {
        let moves = moves(&[
            "192.0.2.5",
            "192.0.2.6:80,443,8000-8100/tcp",
            "192.0.2.6:53/udp",
            "2001:db8::5",
            "[2001:db8::6]:80,443,8000-8100",
        ]);
        let facts = Facts::new(&moves).unwrap();
        let (own, to) = (
            "192.0.2.1".parse().unwrap(),
            "198.51.100.2".parse().unwrap(),
        );
        let (own6, to6) = (
            "2001:db8::1".parse().unwrap(),
            "2001:db8:b::2".parse().unwrap(),
        );
        let pairs = [Pair { own, to }, Pair { own: own6, to: to6 }];
        let maps = FlowMaps::new(1000).unwrap();
        let of = |l2_header, sizes: [usize; 9]| {
            let mac = [2, 3, 4, 5, 6, 7];
            let way = Way {
                ifindex: 1,
                l2_header,
                mac: (l2_header > 0).then_some(mac),
                captures: 2,
            };
            let programs = [
                capture(&facts, l2_header, 1, Some(51820)),
                return_path(&facts),
                note_own(&facts, l2_header, 1, Some(51820)),
                deliver(&maps, 2),
                take_replies(&maps, l2_header, 2, 51820, &chosen()),
                arrivals(&maps, l2_header, 51820),
                callers(&maps, l2_header, 2),
                replies(&pairs, &(40960..=57343), l2_header, 1),
                way_out(
                    way,
                    &[(to, way), (to6, way)],
                    &[(own, way), (own6, way)],
                    facts.own(),
                ),
            ];
            programs.map(Result::unwrap).into_iter().zip(sizes)
        };
        // Without a header, what arrives has its headers pulled, and is read from the IP header on.
        let mut all: Vec<_> = of(0, [1531, 1688, 1149, 1307, 2286, 946, 917, 320, 526]).collect();
        all.extend(of(14, [1513, 1688, 1149, 1307, 2286, 935, 897, 316, 576]));
        all.push((loopback(&maps, true).unwrap(), 1100));
        all.push((loopback(&maps, false).unwrap(), 1103));
        // Where the new server may begin connections from any port.
        let begins = Facts::remembering(&moves, &moves, Own::new().unwrap()).unwrap();
        for (program, size) in [
            (capture(&begins, 14, 1, Some(51820)), 2275),
            (return_path(&begins), 2462),
            (note_own(&begins, 14, 1, Some(51820)), 1149),
            (listens::listens(), 380),
        ] {
            all.push((program.unwrap(), size));
        }
        (maps, [facts, begins], all)
    }

    #[test]
    fn the_kernel_takes_every_program_with_what_the_unit_leaves() {
        in_fresh_namespace(|| {
            // A program refers to its maps by descriptor until it is loaded.
            let (_maps, _facts, programs) = every_program();
            keep_only(capabilities_of_the_unit());
            for (program, _) in programs {
                program.load().unwrap();
            }
        });
    }

    #[test]
    fn no_program_has_grown_unnoticed() {
        let (programs, expected): (Vec<_>, Vec<_>) = every_program().2.into_iter().unzip();
        let sizes: Vec<_> = programs
            .iter()
            .map(|program| program.code().len())
            .collect();
        assert_eq!(sizes, expected);
    }
}
