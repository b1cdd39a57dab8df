//! UDP ports of the new server that belong to what has moved because its settings name them, and
//! how a client gets what is sent from there before it has spoken: telephony (RTP, RFC 3550) sends
//! media to where signalling said, and either side may be the first.
//!
//! What this host sends first is a conversation of its own, and no packet of the tunnel takes that
//! over: anybody can forge one. From such a port it speaks for what has moved. So once a client
//! answers it by the tunnel, that conversation is the tunnel's, unless the client has ever spoken
//! directly in it. Of an address that has moved whole no port is named, and nothing changes.
//!
//! It is asked only about datagrams of conversations that this host has begun, and where the answer
//! is no that costs less than 10 ns of some 250 ns, as BPF_PROG_TEST_RUN counts.
//!
//! ```text
//! named      by the upper bits of a port: u64, a bit for each port of these
//!
//! arrivals, without TCP:    if (it = lookup(own, key)) it->seen |= HEARD_DIRECTLY;
//! deliver, UDP:             if ((it = lookup(own, key)) && !(it->seen & HEARD_DIRECTLY)
//!                               && local port is named) { delete(own, key); goto new; }
//! ```

use std::collections::BTreeSet;

use Reg::{R0, R1, R10};

use super::flows::{FlowMaps, KEY_LAST, VALUE, enter, refused, remove};
use super::phrases::{PROTOCOL, look_up_at};
use super::sockets::load_port;
use crate::kernel::bpf::{
    Alu, Assembler, BpfError, Helper, If, Label, Map, MapKind, Reg, Shape, Size,
};
use crate::model::delivery_map::DeliveryMap;
use crate::model::moved::{Move, Transport, UDP};

/// Bits of a word.
const BITS: u16 = 64;

/// Words for all ports.
const WORDS: usize = 65_536 / BITS as usize;

/// Most ports of a range that names them. Who names more means all, and most of these are what this
/// host's own programs speak from.
const MOST: usize = 32_768;

/// The measures of the map.
const NAMED: Shape = Shape {
    kind: MapKind::Array,
    name: "ipmoved_named",
    key_size: 4,
    value_size: 8,
    max_entries: WORDS as u32,
};

/// In the time of an entry of `own` without TCP: its other end has spoken directly.
const HEARD_DIRECTLY: i32 = 1;

/// The ports.
#[derive(Debug)]
pub(super) struct Named {
    map: Map,
    /// What the map has.
    words: Vec<u64>,
}

impl Named {
    /// None at first.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub(super) fn new() -> Result<Self, BpfError> {
        Ok(Self {
            map: Map::new(NAMED)?,
            words: vec![0; WORDS],
        })
    }
}

impl FlowMaps {
    /// From now on these ports are those that are named.
    ///
    /// # Errors
    /// If the kernel refuses. Some of it may be in effect then.
    pub fn name_ports(&mut self, ports: &BTreeSet<(u16, u16)>) -> Result<(), BpfError> {
        let mut words = vec![0; WORDS];
        for port in ports.iter().flat_map(|&(first, last)| first..=last) {
            words[usize::from(port / BITS)] |= 1 << (port % BITS);
        }
        for (index, (known, word)) in (0..).zip(self.named.words.iter_mut().zip(words)) {
            if *known != word {
                self.named.map.set(index, word).map_err(refused)?;
                *known = word;
            }
        }
        Ok(())
    }
}

/// The UDP ports of this host that are named by what a peer has moved, and by where some of it is
/// delivered.
pub fn named_ports<'a>(
    moves: impl IntoIterator<Item = &'a Move>,
    maps: &[DeliveryMap],
) -> BTreeSet<(u16, u16)> {
    let mut named = BTreeSet::new();
    let of_udp = |transport: Option<Transport>| transport != Some(Transport::Tcp);
    let mapped = |map: &DeliveryMap| Some((map.moved, map.port?));
    let mapped: Vec<_> = maps.iter().filter_map(mapped).collect();
    for moved in moves.into_iter().filter(|it| of_udp(it.transport)) {
        let few = moved.ports.iter().filter(|it| it.len() <= MOST);
        named.extend(few.map(|it| (*it.start(), *it.end())));
        let of_it = mapped
            .iter()
            .filter(|(prefix, port)| of_udp(port.transport) && prefix.overlaps(&moved.prefix));
        named.extend(of_it.map(|(_, port)| (port.to, port.to)));
    }
    named
}

/// Enters the present time into `own`, as of a conversation of which nothing was heard directly.
pub(super) fn enter_begun(a: &mut Assembler, maps: &FlowMaps) {
    a.call(Helper::KtimeGetNs);
    a.alu(Alu::And, R0, !HEARD_DIRECTLY);
    a.store(Size::Dw, R10, VALUE, R0);
    enter(a, &maps.own);
}

/// Stores the time in R0 in an entry of `own`, of which the rest stays. Destroys R0 and R1.
pub(super) fn refresh_begun(a: &mut Assembler, entry: Reg) {
    a.load(Size::Dw, R1, entry, 0);
    a.alu(Alu::And, R1, HEARD_DIRECTLY);
    a.alu(Alu::And, R0, !HEARD_DIRECTLY);
    a.alu(Alu::Or, R0, R1);
    a.store(Size::Dw, entry, 0, R0);
}

/// Remembers in the entry of `own` at R0 that its other end has spoken directly. Destroys R1.
pub(super) fn hear_directly(a: &mut Assembler) {
    let known = a.label();
    a.load(Size::Dw, R1, R0, 0);
    a.jump_if(R1, If::Set, HEARD_DIRECTLY, known);
    a.alu(Alu::Or, R1, HEARD_DIRECTLY);
    a.store(Size::Dw, R0, 0, R1);
    a.bind(known);
}

/// Forgets the conversation whose entry of `own` is at `entry`, and jumps to `taken`, if this host
/// began it from a port that is named and its other end was never heard directly. Goes on
/// otherwise.
pub(super) fn take_over(a: &mut Assembler, maps: &FlowMaps, entry: Reg, taken: Label) {
    let no = a.label();
    a.jump_if(PROTOCOL, If::Ne, i32::from(UDP), no);
    a.load(Size::Dw, R0, entry, 0);
    a.jump_if(R0, If::Set, HEARD_DIRECTLY, no);
    load_port(a, KEY_LAST + 2);
    a.mov(R0, R1);
    a.alu(Alu::Rsh, R0, BITS.ilog2());
    a.store(Size::W, R10, VALUE, R0);
    look_up_at(a, &maps.named.map, VALUE);
    a.jump_if_wide(R0, If::Eq, 0, no);
    a.load(Size::Dw, R0, R0, 0);
    a.jump_if_wide(R0, If::Eq, 0, no);
    a.mov(entry, R0);
    load_port(a, KEY_LAST + 2);
    a.alu(Alu::And, R1, i32::from(BITS - 1));
    a.alu(Alu::Rsh, entry, R1);
    a.alu(Alu::And, entry, 1);
    a.jump_if_wide(entry, If::Eq, 0, no);
    remove(a, &maps.own);
    a.jump(taken);
    a.bind(no);
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::os::fd::AsFd;

    use super::*;
    use crate::kernel::bpf::test_run::{nanoseconds, run};
    use crate::kernel::programs::deliver::deliver_behind;
    use crate::kernel::programs::testing::{L2, Packet, frame, ports, taken};
    use crate::kernel::programs::{arrivals, take_replies};
    use crate::kernel::testing::in_fresh_namespace;

    #[test]
    fn ports_are_named_by_moves_and_by_where_they_are_delivered() {
        let moves: Vec<Move> = [
            "192.0.2.5:5060,10000-20000/udp",
            "192.0.2.6",
            "192.0.2.7:80,443/tcp",
            "192.0.2.8:53",
            "192.0.2.9:1024-65535/udp",
        ]
        .map(|it| it.parse().unwrap())
        .into();
        let maps: Vec<DeliveryMap> = [
            "192.0.2.6:3478=198.51.100.2:3479",
            "192.0.2.6:81/tcp=198.51.100.2:82",
            "192.0.2.66:1=198.51.100.2:2",
        ]
        .map(|it| it.parse().unwrap())
        .into();
        let named = named_ports(&moves, &maps);
        let expected = [(53, 53), (3_479, 3_479), (5_060, 5_060), (10_000, 20_000)];
        assert_eq!(named, expected.into());
    }

    #[test]
    fn what_this_host_sent_first_from_a_named_port_is_the_clients_that_answers_by_the_tunnel() {
        in_fresh_namespace(|| {
            let _media = UdpSocket::bind("[::]:10002").unwrap();
            for (client, here) in [
                ("203.0.113.7", "198.51.100.2"),
                ("2001:db8:c::7", "2001:db8:b::2"),
            ] {
                let mut maps = FlowMaps::new(1000).expect("run the tests as root");
                let deliver = deliver_behind(L2, &maps, 1).unwrap().load().unwrap();
                let ingress = arrivals(&maps, L2, 51820).unwrap().load().unwrap();
                let egress = take_replies(&maps, L2, 1, 51820, &[]).unwrap();
                let egress = egress.load().unwrap();
                let out = |from: u16, to: u16| {
                    let packet = Packet::new(here, client, UDP, ports(from, to));
                    taken(egress.as_fd(), &packet)
                };
                let into = |from: u16, to: u16| Packet::new(client, here, UDP, ports(from, to));
                let by_tunnel = |from, to| run(deliver.as_fd(), &frame(&into(from, to).bytes()));
                let directly = |from, to| run(ingress.as_fd(), &frame(&into(from, to).bytes()));
                // Nothing is named.
                assert!(!out(10_002, 40_000));
                by_tunnel(40_000, 10_002);
                assert!(!out(10_002, 40_000));
                maps.name_ports(&[(5_060, 5_060), (10_000, 10_063)].into())
                    .unwrap();
                for port in [10_000, 10_002, 10_063] {
                    assert!(!out(port, 40_002), "nobody is known to be there");
                    by_tunnel(40_002, port);
                    assert!(out(port, 40_002), "{port}");
                    assert!(out(port, 40_002), "{port}");
                }
                for port in [9_999, 10_064, 5_061] {
                    assert!(!out(port, 40_002));
                    by_tunnel(40_002, port);
                    assert!(!out(port, 40_002), "{port} is not named");
                }
                // Whoever has spoken directly does so whatever comes by the tunnel.
                assert!(!out(10_002, 40_004));
                directly(40_004, 10_002);
                for _ in 0..2 {
                    by_tunnel(40_004, 10_002);
                    assert!(!out(10_002, 40_004));
                }
                maps.name_ports(&BTreeSet::new()).unwrap();
                assert!(!out(10_002, 40_006));
                by_tunnel(40_006, 10_002);
                assert!(!out(10_002, 40_006), "it is named no more");
            }
        });
    }

    #[test]
    #[ignore = "a measurement: cargo test --lib -- --ignored --nocapture what_a_named_port_costs"]
    fn what_a_named_port_costs() {
        in_fresh_namespace(|| {
            for (client, here) in [
                ("203.0.113.7", "198.51.100.2"),
                ("2001:db8:c::7", "2001:db8:b::2"),
            ] {
                let mut maps = FlowMaps::new(1000).unwrap();
                let deliver = deliver_behind(L2, &maps, 1).unwrap().load().unwrap();
                let egress = take_replies(&maps, L2, 1, 51820, &[]).unwrap();
                let egress = egress.load().unwrap();
                let out =
                    |port| frame(&Packet::new(here, client, UDP, ports(port, 40_000)).bytes());
                let into =
                    |port| frame(&Packet::new(client, here, UDP, ports(40_000, port)).bytes());
                for (what, names) in [("nothing", None), ("one port", Some((5_060, 5_060)))] {
                    maps.name_ports(&names.into_iter().collect()).unwrap();
                    for port in [5_061, 5_060] {
                        let began = nanoseconds(egress.as_fd(), &out(port));
                        let asked = nanoseconds(deliver.as_fd(), &into(port));
                        eprintln!(
                            "{here}, with {what} named: {began} ns out of {port}, where nobody \
                             spoke before, and {asked} ns what comes for it by the tunnel"
                        );
                    }
                }
            }
        });
    }
}
