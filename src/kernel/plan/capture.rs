//! The kernel changes of the old server: packets to moved addresses go into the TUN, and packets
//! that the daemon writes to the TUN leave by their routes.
//!
//! ```text
//! every entrance: ingress ── capture ──► TUN
//!                              └─ of a conversation that this host has itself: the stack
//!                 egress ── note_own: what this host has itself
//! TUN: ingress ── return path ──► by the route for source and destination
//!                  └─ bounced: ingress of the uplink, past capture
//! ```
//!
//! An *entrance* is an interface by which packets for a moved address may reach this host: each one
//! that receives packets of its own, whatever addresses it has. The moved address may be on another
//! one, which receives nothing (a dummy, the loopback interface), and clients may be anywhere: on
//! the internet, in this host's network, in its containers.
//!
//! The addresses stay configured where they are, so the host goes on answering ARP and neighbour
//! discovery. The filters on the entrances outlive the daemon and then lead into nothing: moved
//! addresses fall silent instead of replying with resets.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use super::{ETHERNET_HEADER, PlanError, clsact, filter, for_ingress, l2_header};
use crate::flow::ended::HostFlow;
use crate::flow::modes::Taken;
use crate::kernel::Desired;
use crate::kernel::bpf::Loaded;
use crate::kernel::change::{Change, OfLink, Sysctl};
use crate::kernel::netlink::{Direction, Link, Netlink};
use crate::kernel::programs::{self, Facts, LO, MarkedWay, Own, Served};
use crate::model::drops::DropReason;
use crate::model::mode::{Mode, ShareKey};
use crate::model::moved::Move;
use crate::model::prefix::Prefix;

/// The programs of one old server, in the kernel, with what they know. They stay the same while
/// interfaces come and go.
#[derive(Debug)]
pub struct Capture {
    port: u16,
    tun: Link,
    facts: Facts,
    loaded: Loaded,
    /// How many drops were told.
    told: u64,
}

impl Capture {
    /// Loads the programs for `moves`, with the TUN, which must exist, the tunnel's own UDP port on
    /// this host, and the memory of what is [this host's own](super::own::memory()). From the
    /// addresses of those moves that `begin` the new server may begin connections. This changes
    /// nothing yet.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn new(
        moves: &[Move],
        begin: &[Move],
        tun: &Link,
        port: u16,
        own: Own,
    ) -> Result<Self, PlanError> {
        let capture = Self {
            port,
            tun: tun.clone(),
            facts: Facts::remembering(moves, begin, own)?,
            loaded: Loaded::default(),
            told: 0,
        };
        // For interfaces that come later, too.
        for l2_header in [0, ETHERNET_HEADER] {
            capture.entrance(l2_header)?;
            capture.way_out(l2_header)?;
        }
        capture.facts.served().load(&[0, ETHERNET_HEADER])?;
        Ok(capture)
    }

    /// Programs for other moves, some of which `begin`, or another port of the tunnel, which share
    /// the memory of these. Nobody has told them yet where the uplink is, which ends the tunnel
    /// has and in which modes the moves are. This changes nothing yet.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn again(&self, moves: &[Move], begin: &[Move], port: u16) -> Result<Self, PlanError> {
        let own = self.facts.own().again()?;
        let again = Self::new(moves, begin, &self.tun, port, own)?;
        again.facts.follow_modes(&self.facts);
        // What lies on the TUN, too: it may be planned anew at any time.
        let back = programs::return_path(&again.facts)?;
        again.loaded.get(&back)?;
        Ok(again)
    }

    /// Takes in the connections of hosts behind this one that these moves could capture, and that
    /// are older than the programs which note new ones.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn note_others(&self, netlink: &Netlink, moves: &[Move]) -> Result<(), PlanError> {
        super::own::note_others(netlink, self.facts.own(), moves)
    }

    /// The program for entrances with such a link-layer header.
    fn entrance(&self, l2_header: u32) -> Result<(&'static str, OwnedFd), PlanError> {
        let (tun, port) = (self.tun.index, Some(self.port));
        let program = programs::capture(&self.facts, l2_header, tun, port)?;
        Ok((program.name(), self.loaded.get(&program)?))
    }

    /// The program for the other side of links with such a link-layer header.
    fn way_out(&self, l2_header: u32) -> Result<OwnedFd, PlanError> {
        let program = programs::note_own(&self.facts, l2_header, self.tun.index, Some(self.port))?;
        Ok(self.loaded.get(&program)?)
    }

    /// The memory that the next daemon needs, if this one is killed.
    pub fn memory(&self) -> Vec<BorrowedFd<'_>> {
        self.facts.own().lasting()
    }

    /// Packets to what has moved that stayed here, since the memory began.
    pub fn stayed(&self) -> u64 {
        self.facts.own().stayed()
    }

    /// What the programs have dropped since the last call.
    pub fn take_drops(&mut self) -> (DropReason, u64) {
        let refused = self.facts.refused();
        let before = std::mem::replace(&mut self.told, refused);
        (DropReason::OutgoingTaken, refused.saturating_sub(before))
    }

    /// From now on the moves are in these modes, in the order in which they were given; see
    /// [`Facts::set_modes`].
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_modes(&self, modes: &[Mode<Duration>], key: ShareKey) -> Result<(), PlanError> {
        Ok(self.facts.set_modes(modes, key)?)
    }

    /// Says that the daemon is alive. Call it every second.
    ///
    /// # Errors
    /// If the kernel refuses to tell which conversations are over.
    pub fn beat(&self) -> Result<(), PlanError> {
        Ok(self.facts.beat()?)
    }

    /// From now on the programs tell who is served by this host itself, or no longer do.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn tell_served(&self, on: bool) -> Result<(), PlanError> {
        Ok(self.facts.served().set(on)?)
    }

    /// Reads what they have told since the last time. Returns how many connections have begun
    /// since, and how much was lost since nothing had room for it.
    pub fn take_served(&self, each: impl FnMut(Served<'_>)) -> [u64; 2] {
        self.facts.served().take(each)
    }

    /// What the programs have noted of the flows that the new server has.
    pub fn taken(&self) -> Arc<dyn Taken> {
        self.facts.own().taken()
    }

    /// The conversations that this host, or one behind it, has at moved addresses, as far as no
    /// socket of this host can be asked.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn own_conversations(&self) -> Result<Vec<HostFlow>, PlanError> {
        Ok(self.facts.own().live()?)
    }

    /// Forgets those of them that are `wanted`, and returns how many there were.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn forget_own(&self, wanted: impl Fn(&HostFlow) -> bool) -> Result<u64, PlanError> {
        Ok(self.facts.own().forget_all(wanted)?)
    }

    /// How often such a conversation went on that could not be kept from giving way to new ones.
    pub fn own_full(&self) -> u64 {
        self.facts.own().full()
    }

    /// Takes in the connections of hosts behind this one that are older than these programs, unless
    /// the memory is a killed daemon's. Call it before the captures are made, and after all else.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn note_older(&self, netlink: &Netlink, moves: &[Move]) -> Result<(), PlanError> {
        super::own::note_older(netlink, self.facts.own(), moves)
    }

    /// From now on bounced packets arrive at `uplink`, and replies to which no route leads leave by
    /// it; all of them if it was `named`.
    pub fn set_uplink(&self, uplink: Option<&Link>, named: bool) {
        self.facts.set_uplink(uplink.map(|link| link.index), named);
    }

    /// From now on the tunnel has an end of its own at those of these addresses that have moved.
    /// Their datagrams are never captured.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_tunnel_ends(&self, addrs: impl Iterator<Item = IpAddr>) -> Result<(), PlanError> {
        Ok(self.facts.set_tunnel_ends(addrs)?)
    }

    /// From now on the host's routing rules are `detailed`: some go by protocol, ports or DSCP.
    pub fn set_detailed(&self, detailed: bool) {
        self.facts.set_detailed(detailed);
    }

    /// From now on the replies of these prefixes leave by marks.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_marked(&self, ways: &BTreeMap<Prefix, MarkedWay>) -> Result<(), PlanError> {
        Ok(self.facts.set_marked(ways)?)
    }

    /// The changes to the TUN: the return path. What its look-ups need goes with it, unless every
    /// reply leaves by a named uplink.
    ///
    /// # Errors
    /// If the kernel refuses the program.
    pub fn on_tun(&self, netlink: &Netlink) -> Result<Vec<Desired>, PlanError> {
        let tun = &self.tun;
        let lo = netlink.link_by_index(LO)?;
        let back = programs::return_path(&self.facts)?;
        let place = filter(netlink, tun, Direction::Ingress, back.name())?;
        let mut desired: Vec<Desired> = ["ipv4", "ipv6"]
            .into_iter()
            .filter(|_| !self.facts.is_named())
            .filter_map(|family| forwarding(lo.as_ref()?, family))
            .map(Desired::lasting)
            .collect();
        desired.push(Desired::with_tun(clsact(tun)));
        desired.push(Desired::with_tun(place).program(self.loaded.get(&back)?));
        Ok(desired)
    }

    /// Loads what otherwise waits until it is wanted.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn load_all(&self) -> Result<(), PlanError> {
        let back = programs::return_path(&self.facts)?;
        self.loaded.get(&back)?;
        Ok(())
    }

    /// Whether replies of IPv4 leave by their routes. Else they leave by the uplink.
    pub fn follows_routes(&self, netlink: &Netlink) -> bool {
        let lo = netlink.link_by_index(LO).ok().flatten();
        lo.is_some_and(|lo| forwarding(&lo, "ipv4").is_some())
    }

    /// The changes to one entrance: what notes this host's own, and at last the capture. An older
    /// ingress qdisc of others has no place for the former.
    ///
    /// # Errors
    /// If the programs cannot work on an interface like this, or there is no place for one.
    pub fn on_entrance(&self, netlink: &Netlink, link: &Link) -> Result<Vec<Desired>, PlanError> {
        let program = self.way_out(l2_header(link)?)?;
        let mut desired = for_ingress(netlink, link)?;
        if !desired.is_empty() {
            let place = super::own::place(netlink, link)?;
            desired.push(Desired::lasting(place).program(program));
        }
        let (name, program) = self.entrance(l2_header(link)?)?;
        let place = filter(netlink, link, Direction::Ingress, name)?;
        desired.push(Desired::lasting(place).program(program));
        Ok(desired)
    }
}

/// `bpf_fib_lookup` answers only for an interface that forwards. The loopback interface has nothing
/// to forward: what this host sends itself has its route by the time it comes in there, and nobody
/// else sends to it. `None` without that family, and where the setting cannot be changed, as in
/// most containers: then replies leave by the uplink.
fn forwarding(lo: &Link, family: &str) -> Option<Change> {
    let setting = OfLink::new(lo, family, "forwarding");
    let from = setting.value().ok()?;
    (from == "1" || setting.may_write()).then(|| {
        Change::Sysctl(Sysctl {
            path: setting.path,
            from,
            to: "1".to_owned(),
            on: None,
        })
    })
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;
    use crate::kernel::Host;
    use crate::kernel::plan::{carriers, own};
    use crate::kernel::testing::{
        Router, Scratch, Tun, bound, in_fresh_namespace, strict_rp_filter,
    };
    use crate::model::mode::Settled;

    const HERE: [(&str, u8); 4] = [
        ("192.0.2.1", 24),
        ("192.0.2.5", 24),
        ("2001:db8:a::1", 64),
        ("2001:db8:a::5", 64),
    ];
    const GATEWAYS: [(&str, u8); 2] = [("192.0.2.254", 24), ("2001:db8:a::fe", 64)];
    /// Family by family: the moved address, and the router's address.
    const ENDS: [(&str, &str); 2] = [
        ("192.0.2.5", "192.0.2.254"),
        ("2001:db8:a::5", "2001:db8:a::fe"),
    ];

    fn start(netlink: &Netlink, moves: &[Move], tun: &Tun) -> Capture {
        let tun = netlink.link_by_index(tun.link.index).unwrap().unwrap();
        Capture::new(moves, moves, &tun, 51820, Own::new().unwrap()).unwrap()
    }

    /// The changes for every entrance that there is.
    fn everywhere(netlink: &Netlink, capture: &Capture) -> Vec<Desired> {
        let mut desired = capture.on_tun(netlink).unwrap();
        for link in carriers(netlink, &capture.tun).unwrap() {
            desired.extend(capture.on_entrance(netlink, &link).unwrap());
        }
        desired
    }

    fn end(addr: &str, port: u16) -> SocketAddr {
        SocketAddr::new(addr.parse().unwrap(), port)
    }

    /// The same packet on its way back. Exchanging its ends leaves every checksum right.
    fn turned(packet: &[u8]) -> Vec<u8> {
        let mut out = packet.to_vec();
        let (addrs, length, l4) = if packet[0] >> 4 == 4 {
            (12, 4, 20)
        } else {
            (8, 16, 40)
        };
        out[addrs..addrs + length].copy_from_slice(&packet[addrs + length..addrs + 2 * length]);
        out[addrs + length..addrs + 2 * length].copy_from_slice(&packet[addrs..addrs + length]);
        out[l4..l4 + 2].copy_from_slice(&packet[l4 + 2..l4 + 4]);
        out[l4 + 2..l4 + 4].copy_from_slice(&packet[l4..l4 + 2]);
        out
    }

    #[test]
    fn with_a_named_uplink_no_setting_is_changed_for_routes() {
        in_fresh_namespace(|| {
            let netlink = Netlink::new().unwrap();
            let tun = Tun::new(&netlink, "tun0", false);
            let capture = start(&netlink, &["192.0.2.5".parse().unwrap()], &tun);
            for (named, expected) in [(false, 2), (true, 0), (false, 2)] {
                capture.set_uplink(None, named);
                let desired = capture.on_tun(&netlink).unwrap();
                let is_setting = |it: &&Desired| matches!(it.change, Change::Sysctl(_));
                let settings = desired.iter().filter(is_setting).count();
                assert_eq!(settings, expected, "named: {named}");
            }
        });
    }

    #[test]
    fn a_moved_address_is_captured_and_its_replies_leave_by_the_uplink() {
        in_fresh_namespace(|| {
            strict_rp_filter();
            let netlink = Netlink::new().unwrap();
            let router = Router::new(&netlink, &HERE, &GATEWAYS);
            let tun = Tun::new(&netlink, "tun0", false);
            strict_rp_filter();
            let moves: Vec<Move> = vec![
                "192.0.2.5:53".parse().unwrap(),
                "2001:db8:a::5".parse().unwrap(),
            ];
            let scratch = Scratch::new();
            let mut host = Host::open(&scratch.0).unwrap();
            let capture = start(&netlink, &moves, &tun);
            capture.set_uplink(Some(&router.uplink), false);
            host.reconcile(everywhere(&netlink, &capture)).unwrap();

            for (moved, gateway) in ENDS {
                let own = bound(end(moved, 53));
                let client = router.udp(&end(gateway, 4000).to_string());
                // The router finds the address by ARP or neighbour discovery, which A still
                // answers.
                client.send_to(b"question", end(moved, 53)).unwrap();
                let (_, packet) = tun.read(|p| p.ends_with(b"question")).expect("captured");
                assert!(
                    own.recv(&mut [0; 100]).is_err(),
                    "A's own stack must not see it"
                );
                tun.write(&turned(&packet));
                let mut buffer = [0; 100];
                let (length, from) = client.recv_from(&mut buffer).expect("the way back");
                assert_eq!(
                    (&buffer[..length], from),
                    (&b"question"[..], end(moved, 53))
                );
            }
            // The other ports of the first address are still A's.
            let own = bound(end("192.0.2.5", 54));
            let client = router.udp("192.0.2.254:4001");
            client.send_to(b"for A", end("192.0.2.5", 54)).unwrap();
            assert_eq!(own.recv(&mut [0; 100]).unwrap(), 5);

            // A kill: the capture leads into nothing, and nothing replies.
            let remembered = capture.memory().len();
            drop((tun, host, capture));
            let links = std::slice::from_ref(&router.uplink);
            let memory = own::memory(&netlink, links, &[]).unwrap();
            assert!(memory.resumes(), "the next daemon finds what this one knew");
            assert_eq!(memory.lasting().len(), remembered);
            let own = bound(end("192.0.2.5", 53));
            client.send_to(b"question", end("192.0.2.5", 53)).unwrap();
            assert!(own.recv(&mut [0; 100]).is_err());
            Host::cleanup(&scratch.0).unwrap();
            client.send_to(b"question", end("192.0.2.5", 53)).unwrap();
            assert_eq!(own.recv(&mut [0; 100]).unwrap(), 8);
        });
    }

    #[test]
    fn who_is_bounced_is_this_hosts_own_once_it_has_answered() {
        in_fresh_namespace(|| {
            let netlink = Netlink::new().unwrap();
            let router = Router::new(&netlink, &HERE, &GATEWAYS);
            let tun = Tun::new(&netlink, "tun0", false);
            let moves: Vec<Move> = vec![
                "192.0.2.5:53/udp".parse().unwrap(),
                "2001:db8:a::5".parse().unwrap(),
            ];
            let scratch = Scratch::new();
            let mut host = Host::open(&scratch.0).unwrap();
            let capture = start(&netlink, &moves, &tun);
            capture.set_uplink(Some(&router.uplink), false);
            host.reconcile(everywhere(&netlink, &capture)).unwrap();
            // The next daemon finds the memory by the programs on the links.
            let links = carriers(&netlink, &capture.tun).unwrap();
            let found = own::memory(&netlink, &links, &[]).unwrap();
            assert!(found.resumes());

            capture.beat().unwrap();
            let [here, moved] = [Settled::Here, Settled::Moved].map(|it| [Mode::settled(it); 2]);
            let key = ShareKey([1, 2]);
            for (moved_to, gateway) in ENDS {
                capture.set_modes(&moved, key).unwrap();
                capture.set_modes(&here, key).unwrap();
                let own = bound(end(moved_to, 53));
                let client = router.udp(&end(gateway, 4000).to_string());
                let mut buffer = [0; 100];
                // The daemon is asked, since the new server had everything until now.
                client.send_to(b"question", end(moved_to, 53)).unwrap();
                let (_, packet) = tun.read(|p| p.ends_with(b"question")).expect("asked");
                tun.write(&packet);
                let (_, from) = own.recv_from(&mut buffer).unwrap();
                own.send_to(b"answer", from).unwrap();
                assert_eq!(client.recv(&mut buffer).unwrap(), 6);
                for modes in [&here, &moved] {
                    capture.set_modes(modes, key).unwrap();
                    client.send_to(b"more", end(moved_to, 53)).unwrap();
                    assert_eq!(own.recv(&mut buffer).unwrap(), 4, "{modes:?}");
                }
                let another = router.udp(&end(gateway, 4001).to_string());
                another.send_to(b"another", end(moved_to, 53)).unwrap();
                assert!(tun.read(|p| p.ends_with(b"another")).is_some());
            }
            host.undo_all().unwrap();
        });
    }

    #[test]
    fn a_bounced_packet_goes_up_into_the_hosts_own_stack() {
        in_fresh_namespace(|| {
            strict_rp_filter();
            let netlink = Netlink::new().unwrap();
            let router = Router::new(&netlink, &HERE, &GATEWAYS);
            let tun = Tun::new(&netlink, "tun0", false);
            strict_rp_filter();
            let moves = ["192.0.2.5", "2001:db8:a::5"];
            let moves: Vec<Move> = moves.iter().map(|text| text.parse().unwrap()).collect();
            let scratch = Scratch::new();
            let mut host = Host::open(&scratch.0).unwrap();
            let capture = start(&netlink, &moves, &tun);
            capture.set_uplink(Some(&router.uplink), false);
            host.reconcile(everywhere(&netlink, &capture)).unwrap();
            for (moved, gateway) in ENDS {
                let own = bound(end(moved, 53));
                let client = router.udp(&end(gateway, 4000).to_string());
                client.send_to(b"question", end(moved, 53)).unwrap();
                let (_, packet) = tun.read(|p| p.ends_with(b"question")).expect("captured");
                tun.write(&packet);
                assert_eq!(own.recv(&mut [0; 100]).unwrap(), 8, "{moved}");
            }
            host.undo_all().unwrap();
        });
    }
}
