//! The check that every handshake message has to pass first: the keyed hash at its end.
//!
//! Owns one key per configured peer, the memory of which messages came, and the budgets that bound
//! what all of it costs, whoever sends. Does not look into a message: `noise` reads what it says,
//! and `tunnel` judges it.
//!
//! ```text
//! message ─► peers known at its source    a hash each, from the peer's own share
//!            peers known at its address   a hash each, from a share for all peers
//!            all other peers              a hash each, from the strangers' budget
//!              │ whose it is
//!              ▼
//!            our own role?  seen before?  too many of this peer?  ─► the control task
//! ```

use std::fmt;
use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use super::PeerKeys;
use crate::channel::wire::{INITIATION_LEN, MAC_LEN, Message, RESPONSE_LEN, u64_at};
use crate::model::budget::{Budget, Limit};
use crate::model::drops::{DropReason, Dropped};
use crate::model::peer::{PeerId, Role};

/// Keyed hashes for messages that come from where no peer is known to be. A hash takes about half a
/// microsecond, so a second's worth takes 3 % of a processor. With one peer, 65,536 such messages a
/// second are looked at, with 256 peers 256. All of them may be spent within an eighth of a second.
const STRANGERS: Limit = Limit {
    per_second: 65_536,
    at_once: 8_192,
};

/// Keyed hashes for messages that come from where a peer is known to be, for each peer. A flood of
/// strangers cannot take them. The peer itself sends a few messages a minute.
const OWN_SHARE: Limit = Limit {
    per_second: 512,
    at_once: 64,
};

/// More such hashes, which all peers share: for what comes from another port of a peer's address
/// (perhaps from another peer behind it), and for floods in the name of one.
const SHARED: Limit = Limit {
    per_second: 16_384,
    at_once: 2_048,
};

/// Messages of one peer that go on to the control task, from where it is known to be. They cost an
/// AEAD there, and no more unless they are new to it.
const FROM_HOME: Limit = Limit {
    per_second: 256,
    at_once: 32,
};

/// Messages of one peer that go on to the control task, from anywhere else. Recordings that are
/// sent from there leave the peer's own way free.
const FROM_ELSEWHERE: Limit = Limit {
    per_second: 64,
    at_once: 16,
};

/// Most messages of one peer that are let through at once.
pub const MOST_AT_ONCE: u32 = FROM_HOME.at_once + FROM_ELSEWHERE.at_once;

/// Least time between two messages of our own role that a peer has let through. They make the
/// tunnel warn of a wrong set-up, once a minute.
const OWN_ROLE_PACE: Duration = Duration::from_secs(60);

/// Admits the handshake messages of configured peers, each of them once, and no more than its
/// budgets allow.
///
/// All lanes share it, so a stranger's message never reaches the control task. Nor does a recording
/// that is sent again and again: it costs no more than a stranger's message.
#[derive(Debug)]
pub struct MacCheck {
    own_role: Role,
    /// By [`PeerId`]; `None` where there is none any more.
    peers: RwLock<Vec<Option<KnownPeer>>>,
    /// Where which peer is known to be, in order.
    homes: RwLock<Vec<(SocketAddr, PeerId)>>,
    shared: Mutex<Budget>,
    /// Every message costs it the same, so that none is displaced by cheaper ones.
    strangers: Mutex<Budget>,
}

impl MacCheck {
    /// Admits the messages of these peers, numbered from 0, to a daemon of this role.
    pub fn new(own_role: Role, keys: impl IntoIterator<Item = PeerKeys>) -> Self {
        Self {
            own_role,
            peers: RwLock::new((keys.into_iter().map(KnownPeer::new).map(Some)).collect()),
            homes: RwLock::default(),
            shared: Mutex::new(Budget::new(SHARED)),
            strangers: Mutex::new(Budget::new(STRANGERS)),
        }
    }

    /// From now on the peer has these keys, or there is no such peer.
    pub fn set_peer(&self, peer: PeerId, keys: Option<PeerKeys>) {
        let mut all = self.peers.write().unwrap_or_else(PoisonError::into_inner);
        let place = usize::from(peer.0);
        if all.len() <= place {
            all.resize_with(place + 1, || None);
        }
        all[place] = keys.map(KnownPeer::new);
    }

    /// The peer is known to be at these addresses, and at no others.
    pub fn set_homes(&self, peer: PeerId, homes: impl IntoIterator<Item = SocketAddr>) {
        let mut all = self.homes.write().unwrap_or_else(PoisonError::into_inner);
        all.retain(|&(_, of)| of != peer);
        all.extend(homes.into_iter().map(|home| (home, peer)));
        all.sort_unstable();
        all.dedup();
    }

    /// Finds the peer whose key made a handshake message that came from there. Allocates nothing.
    ///
    /// # Errors
    /// [`DropReason::WireMalformed`] and [`DropReason::WireVersion`] as [`Message::parse`] has
    /// them, [`DropReason::HandshakeLimited`] if a budget is used up, [`DropReason::HandshakeAuth`]
    /// if no peer's key made the message, [`DropReason::HandshakeRole`] if its sender has our own
    /// role, [`DropReason::HandshakeReplay`] if the same message came before.
    pub fn admit(
        &self,
        now: Instant,
        from: SocketAddr,
        datagram: &[u8],
    ) -> Result<Admitted, Dropped> {
        let (role, message) = match Message::parse(datagram)? {
            Message::Initiation(it) => (it.role(), datagram.try_into().map(Handshake::Initiation)),
            Message::Response(it) => (it.role(), datagram.try_into().map(Handshake::Response)),
            Message::Data(_) => return Err(DropReason::WireMalformed.into()),
        };
        let message = message.map_err(|_| DropReason::WireMalformed)?;
        let (signed, mac) = datagram
            .split_last_chunk::<MAC_LEN>()
            .ok_or(DropReason::WireMalformed)?;
        let peers = self.peers.read().unwrap_or_else(PoisonError::into_inner);
        let found = self.find(&peers, now, from, |keys| keys.verify(signed, mac))?;
        let known = peers
            .get(usize::from(found.peer.0))
            .and_then(Option::as_ref);
        let mut own = known.ok_or(DropReason::HandshakeAuth)?.own();
        if role == self.own_role {
            own.pass_own_role(now)
                .map_err(|reason| Dropped::of(found.peer, reason))?;
        }
        // What is refused for want of a budget is remembered too: its sender never sends the same
        // again, and a recording can spend the budget only once.
        if !own.seen.is_new(mac) {
            return Err(DropReason::HandshakeReplay.into());
        }
        let budget = match found.at_home {
            true => &mut own.from_home,
            false => &mut own.from_elsewhere,
        };
        if !budget.spend(now, 1) {
            return Err(Dropped::of(found.peer, DropReason::HandshakeLimited));
        }
        drop(own);
        // What is as it should be costs the strangers' budget nothing.
        if !found.at_home {
            lock(&self.strangers).give_back(cost_of_all(&peers));
        }
        Ok(Admitted {
            peer: found.peer,
            message,
        })
    }

    /// Finds the peer whose keys fit, as far as the budgets allow.
    fn find(
        &self,
        peers: &[Option<KnownPeer>],
        now: Instant,
        from: SocketAddr,
        fits: impl Fn(&PeerKeys) -> bool,
    ) -> Result<Found, DropReason> {
        let homes = self.homes.read().unwrap_or_else(PoisonError::into_inner);
        let start = homes.partition_point(|(home, _)| home.ip() < from.ip());
        let there = homes[start..].partition_point(|(home, _)| home.ip() == from.ip());
        let at_home = &homes[start..start + there];
        let exactly = |it: &&(SocketAddr, PeerId)| it.0 == from;
        let nearly = |it: &&(SocketAddr, PeerId)| it.0 != from;
        let tries = at_home.iter().filter(exactly).map(|it| (it, true));
        for (&(_, id), is_exact) in tries.chain(at_home.iter().filter(nearly).map(|it| (it, false)))
        {
            let Some(peer) = peers.get(usize::from(id.0)).and_then(Option::as_ref) else {
                continue;
            };
            let paid = is_exact && peer.own().share.spend(now, 1);
            if !paid && !lock(&self.shared).spend(now, 1) {
                return Err(DropReason::HandshakeLimited);
            }
            if fits(&peer.keys) {
                return Ok(Found {
                    peer: id,
                    at_home: true,
                });
            }
        }
        if !lock(&self.strangers).spend(now, cost_of_all(peers)) {
            return Err(DropReason::HandshakeLimited);
        }
        let known = (0..).map(PeerId).zip(peers);
        let known = known.filter_map(|(id, peer)| Some((id, peer.as_ref()?)));
        let (peer, _) = known
            .filter(|&(id, _)| at_home.iter().all(|&(_, tried)| tried != id))
            .find(|(_, peer)| fits(&peer.keys))
            .ok_or(DropReason::HandshakeAuth)?;
        Ok(Found {
            peer,
            at_home: false,
        })
    }
}

/// Hashes that a message of a stranger costs.
fn cost_of_all(peers: &[Option<KnownPeer>]) -> u32 {
    peers.iter().flatten().count() as u32
}

/// Whose a message is.
struct Found {
    peer: PeerId,
    /// It came from where the peer is known to be.
    at_home: bool,
}

/// A handshake message that was made with a peer's key, perhaps long ago.
#[derive(Clone, Debug)]
pub struct Admitted {
    peer: PeerId,
    message: Handshake,
}

#[derive(Clone, Debug)]
enum Handshake {
    Initiation([u8; INITIATION_LEN]),
    Response([u8; RESPONSE_LEN]),
}

impl Admitted {
    /// Whose key it was.
    pub fn peer(&self) -> PeerId {
        self.peer
    }

    /// The message, parsed.
    pub(crate) fn message(&self) -> Result<Message<'_>, DropReason> {
        match &self.message {
            Handshake::Initiation(bytes) => Message::parse(bytes),
            Handshake::Response(bytes) => Message::parse(bytes),
        }
    }
}

/// Sets of the memory of one peer's messages.
const SETS: usize = 4_096;

/// Messages that are remembered in one set.
const WAYS: usize = 4;

/// One peer: its keys, its shares, and what came of it.
struct KnownPeer {
    keys: PeerKeys,
    own: Mutex<Own>,
}

/// What a peer has for itself.
struct Own {
    share: Budget,
    from_home: Budget,
    from_elsewhere: Budget,
    /// When a message of our own role was let through last.
    own_role: Option<Instant>,
    seen: Seen,
}

impl KnownPeer {
    fn new(keys: PeerKeys) -> Self {
        Self {
            keys,
            own: Mutex::new(Own {
                share: Budget::new(OWN_SHARE),
                from_home: Budget::new(FROM_HOME),
                from_elsewhere: Budget::new(FROM_ELSEWHERE),
                own_role: None,
                seen: Seen::default(),
            }),
        }
    }

    fn own(&self) -> MutexGuard<'_, Own> {
        lock(&self.own)
    }
}

impl Own {
    fn pass_own_role(&mut self, now: Instant) -> Result<(), DropReason> {
        if self.own_role.is_some_and(|at| now < at + OWN_ROLE_PACE) {
            return Err(DropReason::HandshakeRole);
        }
        self.own_role = Some(now);
        Ok(())
    }
}

impl fmt::Debug for KnownPeer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KnownPeer").finish_non_exhaustive()
    }
}

/// Which messages came: the last [`WAYS`] of each set. One half of a mac says which set it belongs
/// to, the other is kept. Only a holder of the key can make a mac, so a stranger cannot displace
/// one.
///
/// To be let through again and again, recordings have to overflow a set: five of one set, which is
/// likely from about two thousand on. A listener hears a few of them in an hour.
#[derive(Debug)]
struct Seen(Box<[[u32; WAYS]]>);

impl Default for Seen {
    /// 64 KiB that the system gives only as they are written to.
    fn default() -> Self {
        Self(vec![[0; WAYS]; SETS].into())
    }
}

impl Seen {
    /// Remembers the mac; true if it is not remembered already.
    fn is_new(&mut self, mac: &[u8; MAC_LEN]) -> bool {
        let set = &mut self.0[(u64_at(mac, 0) % SETS as u64) as usize];
        // An empty place is 0. One mac in a thousand million is refused although it is new; its
        // sender tries again.
        let tag = (u64_at(mac, 8) as u32).max(1);
        let known = set.iter().position(|&seen| seen == tag);
        // The newest stands first.
        set[..=known.unwrap_or(WAYS - 1)].rotate_right(1);
        set[0] = tag;
        known.is_none()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{ends, sealed};
    use super::super::{Cipher, Psk};
    use super::*;
    use crate::channel::wire::Initiation;
    use crate::model::peer::Role;
    use crate::testing::epoch;
    use std::net::{IpAddr, Ipv4Addr};
    use zeroize::Zeroizing;

    const HOME: SocketAddr = addr([192, 0, 2, 1], 51_850);
    const NEXT_DOOR: SocketAddr = addr([192, 0, 2, 1], 1_024);
    const ELSEWHERE: SocketAddr = addr([203, 0, 113, 9], 51_850);

    const fn addr([a, b, c, d]: [u8; 4], port: u16) -> SocketAddr {
        SocketAddr::new(IpAddr::V4(Ipv4Addr::new(a, b, c, d)), port)
    }

    fn keys(number: u8) -> PeerKeys {
        PeerKeys::derive(&Psk(Zeroizing::new([number ^ 0x5a; 32])))
    }

    /// A new server's, with so many peers; the first is at [`HOME`].
    fn mac_check(peers: u16) -> MacCheck {
        let mac_check = MacCheck::new(Role::New, (0..peers).map(|peer| keys(peer as u8)));
        mac_check.set_homes(PeerId(0), [HOME]);
        mac_check
    }

    /// An initiation of this peer, another one for each number.
    fn signed(peer: u8, role: Role, number: u32) -> Vec<u8> {
        let mut bytes = Initiation::write(role, number);
        let (message, tag) = bytes.split_at_mut(INITIATION_LEN - MAC_LEN);
        tag.copy_from_slice(&keys(peer).mac_of(message));
        bytes.to_vec()
    }

    fn junk() -> Vec<u8> {
        Initiation::write(Role::Old, 0).to_vec()
    }

    fn reason(result: Result<Admitted, Dropped>) -> Option<DropReason> {
        result.err().map(|dropped| dropped.reason)
    }

    /// How many of the messages get so far.
    fn count(
        reasons: impl IntoIterator<Item = Option<DropReason>>,
        wanted: Option<DropReason>,
    ) -> usize {
        reasons.into_iter().filter(|&it| it == wanted).count()
    }

    #[test]
    fn the_mac_check_finds_whose_key_it_was() {
        let (mac_check, now) = (mac_check(2), epoch());
        for (number, from) in [HOME, NEXT_DOOR, ELSEWHERE].into_iter().enumerate() {
            for peer in [0, 1] {
                let number = number as u32;
                let message = signed(peer, Role::Old, number);
                let admitted = mac_check.admit(now, from, &message).unwrap();
                assert_eq!(admitted.peer(), PeerId(u16::from(peer)));
                let again = mac_check.admit(now, from, &message);
                assert_eq!(reason(again), Some(DropReason::HandshakeReplay));
            }
            let foreign = mac_check.admit(now, from, &signed(2, Role::Old, 1));
            assert_eq!(reason(foreign), Some(DropReason::HandshakeAuth));
        }
        let data = sealed(&ends(Cipher::Aes256Gcm, 1)[0], 0, b"x");
        let refused = mac_check.admit(now, HOME, &data);
        assert_eq!(reason(refused), Some(DropReason::WireMalformed));
    }

    #[test]
    fn messages_of_our_own_role_go_on_once_a_minute_to_be_warned_of() {
        let (mac_check, now) = (mac_check(1), epoch());
        let passed = (0..600u32).filter(|&second| {
            let at = now + Duration::from_secs(u64::from(second));
            let message = signed(0, Role::New, second);
            match mac_check.admit(at, HOME, &message) {
                Ok(_) => true,
                Err(dropped) => {
                    assert_eq!(dropped, Dropped::of(PeerId(0), DropReason::HandshakeRole));
                    false
                }
            }
        });
        assert_eq!(passed.count(), 10);
    }

    #[test]
    fn junk_costs_no_more_hashes_than_the_budgets_allow_whatever_the_number_of_peers() {
        for peers in [1, 10, 256] {
            let (mac_check, now) = (mac_check(peers), epoch());
            let flood = 20_000u64;
            let hashed = |from| {
                let tried = (0..flood).map(|n| {
                    let at = now + Duration::from_nanos(n * 1_000_000_000 / flood);
                    reason(mac_check.admit(at, from, &junk()))
                });
                count(tried, Some(DropReason::HandshakeAuth)) as u64
            };
            let most = u64::from(STRANGERS.per_second + STRANGERS.at_once);
            let looked_at = hashed(ELSEWHERE);
            assert!(looked_at * u64::from(peers) <= most, "{peers}: {looked_at}");
            assert!(
                (looked_at + 2) * u64::from(peers) > most || looked_at == flood,
                "{peers}: only {looked_at}"
            );
        }
    }

    #[test]
    fn a_flood_of_junk_leaves_a_peer_at_home_its_own_share() {
        let (mac_check, now) = (mac_check(256), epoch());
        for n in 0..100_000u64 {
            let at = now + Duration::from_micros(10 * n);
            let _ = mac_check.admit(at, ELSEWHERE, &junk());
            if n % 10_000 == 0 {
                let message = signed(0, Role::Old, n as u32);
                assert_eq!(reason(mac_check.admit(at, HOME, &message)), None, "{n}");
            }
        }
    }

    /// How many tries a peer needs that sends each second (and up to a third more), while `flood`
    /// messages a second of junk come.
    fn tries_until_admitted(
        mac_check: &MacCheck,
        from: SocketAddr,
        junk_from: SocketAddr,
        seed: u64,
    ) -> u32 {
        const FLOOD: u64 = 20_000;
        let start = epoch();
        let mut random = seed;
        let (mut tries, mut next) = (0, Duration::from_millis(500));
        for n in 0.. {
            let at = Duration::from_nanos(n * 1_000_000_000 / FLOOD);
            let _ = mac_check.admit(start + at, junk_from, &junk());
            if at >= next {
                random = random
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                // A moment that the flood does not know.
                let when = start + at + Duration::from_nanos(random >> 33 & 0x7fff);
                tries += 1;
                let message = signed(0, Role::Old, tries);
                if mac_check.admit(when, from, &message).is_ok() {
                    return tries;
                }
                next = at + Duration::from_millis(1_000 + (random >> 40) % 333);
            }
        }
        unreachable!()
    }

    #[test]
    fn a_peer_from_elsewhere_gets_through_a_flood_after_as_many_tries_as_the_text_says() {
        // 65,536 hashes a second for 32 peers: one message in ten of this flood is looked at.
        let mean = 20_000.0 * 32.0 / f64::from(STRANGERS.per_second);
        let rounds = 12;
        let tries: u32 = (0..rounds)
            .map(|seed| tries_until_admitted(&mac_check(32), ELSEWHERE, HOME, seed * 77 + 5))
            .sum();
        let found = f64::from(tries) / rounds as f64;
        assert!(found < 2.5 * mean, "{found} tries, {mean} expected");
    }

    #[test]
    fn junk_in_the_name_of_a_peers_own_address_does_not_keep_it_out() {
        for seed in 0..3 {
            assert!(tries_until_admitted(&mac_check(1), HOME, HOME, seed) == 1);
        }
    }

    #[test]
    fn a_peer_that_floods_keeps_no_other_out_that_is_behind_the_same_address() {
        let (mac_check, now) = (mac_check(2), epoch());
        mac_check.set_homes(PeerId(1), [NEXT_DOOR]);
        for n in 0..50_000u32 {
            let at = now + Duration::from_micros(20 * u64::from(n));
            let _ = mac_check.admit(at, NEXT_DOOR, &signed(1, Role::Old, n));
            if n % 5_000 == 0 {
                let message = signed(0, Role::Old, n);
                assert_eq!(reason(mac_check.admit(at, HOME, &message)), None, "{n}");
            }
        }
    }

    #[test]
    fn recordings_are_refused_however_they_are_arranged() {
        let (mac_check, now) = (mac_check(1), epoch());
        // Half an hour's recordings always have two that fall on one place.
        let recorded: Vec<_> = (0..1_000).map(|n| signed(0, Role::Old, n)).collect();
        let mut admitted = 0;
        for round in 0..20u64 {
            for (n, message) in recorded.iter().enumerate() {
                let at = now + Duration::from_micros(round * 10_000 + n as u64 * 10);
                admitted += u32::from(mac_check.admit(at, HOME, message).is_ok());
            }
        }
        // Each of them came once, and then no more; the first round took what may come at once.
        assert!(admitted <= FROM_HOME.at_once + 3, "{admitted}");
        // So they delay the peer by one retry at most.
        let at = now + Duration::from_secs(1);
        let message = signed(0, Role::Old, 1_000_000);
        assert_eq!(reason(mac_check.admit(at, HOME, &message)), None);
    }

    #[test]
    fn recordings_from_elsewhere_leave_the_way_from_home_free() {
        let (mac_check, now) = (mac_check(1), epoch());
        // More than are remembered.
        for n in 0..40_000u32 {
            let at = now + Duration::from_micros(u64::from(n) * 25);
            let _ = mac_check.admit(at, ELSEWHERE, &signed(0, Role::Old, n));
            if n % 10_000 == 0 {
                let message = signed(0, Role::Old, 1 << 30 | n);
                assert_eq!(reason(mac_check.admit(at, HOME, &message)), None, "{n}");
            }
        }
        let later = now + Duration::from_secs(2);
        let passed = (0..40_000)
            .map(|n| reason(mac_check.admit(later, ELSEWHERE, &signed(0, Role::Old, n))));
        let passed = count(passed, None);
        assert!(passed <= FROM_ELSEWHERE.at_once as usize, "{passed}");
    }

    #[test]
    fn peers_come_and_go_and_have_other_keys() {
        let (check, now) = (mac_check(2), epoch());
        let peer = |from, message: &[u8]| check.admit(now, from, message).map(|it| it.peer());
        // Other keys: those of before admit nothing, and the other peer is not concerned.
        check.set_peer(PeerId(0), Some(keys(7)));
        let auth = Err(DropReason::HandshakeAuth.into());
        assert_eq!(peer(HOME, &signed(0, Role::Old, 1)), auth);
        assert_eq!(peer(HOME, &signed(7, Role::Old, 2)), Ok(PeerId(0)));
        assert_eq!(peer(ELSEWHERE, &signed(1, Role::Old, 3)), Ok(PeerId(1)));
        // One that is gone, though its home is still known; and one that comes.
        check.set_peer(PeerId(0), None);
        assert_eq!(peer(HOME, &signed(7, Role::Old, 4)), auth);
        check.set_peer(PeerId(4), Some(keys(9)));
        assert_eq!(peer(HOME, &signed(9, Role::Old, 5)), Ok(PeerId(4)));
        assert_eq!(peer(HOME, &signed(1, Role::Old, 6)), Ok(PeerId(1)));
    }
}
