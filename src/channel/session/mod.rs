//! One agreed session: its keys, its lanes, and how both are put together.
//!
//! The only module that uses `snow`, and the only one that holds keys. It knows one message at a
//! time. `tunnel` decides when to start a handshake, which of two sessions is used, and whether an
//! old timestamp is refused; `wire` knows what the bytes look like.
//!
//! ```text
//! PSK ──HKDF──► mac key    a stranger's handshake message fails at one keyed hash
//!       └─────► noise key  NNpsk0: without the PSK it fails at one AEAD, before any Diffie-Hellman
//!                  │ split
//!                  ├─► initiator → responder ──HKDF── one key per lane: Sealer here, Opener there
//!                  └─► responder → initiator ──HKDF── one key per lane: Opener here, Sealer there
//! ```
//!
//! | file | owns |
//! |---|---|
//! | `keys` | the PSK, the derivation, memory that is wiped |
//! | `mac_check` | the keyed hash that every handshake message has to pass first |
//! | `noise`, `payload`, `question` | the handshake, and what it says inside its encryption |
//! | `cipher` | the ciphers, and how two sides choose one |
//! | `aead`, `seal` | one key; the lanes' counters and windows |
//! | `activity` | when the peer was last heard and sent to |
//! | `index`, `entropy` | the numbers of sessions; where random bytes come from |
//! | `handed` | a session as one daemon leaves it to the next |
//!
//! The control task and all lanes share a [`Session`]. What lanes call takes no lock but the one of
//! a lane's replay window, and allocates nothing.
//!
//! Secrets are wiped when they are no longer needed:
//! * the PSK, and what is derived from it, by `zeroize` (`keys`);
//! * the state of a handshake, which snow does not wipe, by `keys::Wiped` and the resolver in
//!   `noise`;
//! * the keys of AES-GCM and ChaCha20 by AWS-LC, whose `OPENSSL_free` cleanses what it frees;
//! * those of AEGIS by `aead`, and the copies that its library makes on the stack by each thread
//!   that used them, once they are out of use ([`wipe_frames`]).
//!
//! Copies that the compiler left in other dead stack frames are out of reach, as in every program.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Instant;

use crate::channel::wire::{CONTROL_LANE, Data};
use crate::model::drops::DropReason;
use crate::model::peer::{PeerId, Role};

mod activity;
mod aead;
mod cipher;
mod entropy;
mod handed;
mod index;
mod keys;
mod mac_check;
mod noise;
mod payload;
mod question;
mod seal;

pub use activity::Activity;
pub use cipher::{Cipher, CipherPolicy, Ciphers, Offer};
pub use entropy::{Entropy, NoEntropy};
pub use index::SessionIndexes;
pub use keys::{FINGERPRINT_LEN, KEY_LEN, PeerKeys, Psk, PskError, wipe_frames};
pub use mac_check::{Admitted, MOST_AT_ONCE, MacCheck};
pub use seal::{OpenBatch, Opened, Sealer};

pub(crate) use handed::Heir;
pub(crate) use index::SessionIndex;
pub(crate) use noise::{Initiating, Responding, SplitKeys};
pub(crate) use payload::{Accepts, InitiationPayload, ResponsePayload};

use aead::LaneKey;
use keys::{WipedSlice, derive};
use seal::Opener;

/// Everything a [`Session`] is made of.
pub(crate) struct SessionSpec {
    /// Our index, which the peer puts into each datagram.
    pub(crate) index: SessionIndex,
    /// The peer's index.
    pub(crate) remote: u32,
    /// The cipher that both sides agreed on.
    pub(crate) cipher: Cipher,
    /// One key for each direction, from which the keys of the lanes are derived.
    pub(crate) keys: SplitKeys,
    /// The role of the side that sent the initiation.
    pub(crate) initiator: Role,
    /// The role of this side.
    pub(crate) own_role: Role,
    /// Lanes of this end.
    pub(crate) own_lanes: u8,
    /// Lanes of the peer.
    pub(crate) peer_lanes: u8,
    /// The peer.
    pub(crate) peer: PeerId,
    /// When the handshake was completed here.
    pub(crate) created: Instant,
    /// When the peer was last heard and sent to. It outlives the session.
    pub(crate) activity: Arc<Activity>,
}

/// The keys and counters of one agreed session, shared by the control task and the lanes.
pub struct Session {
    index: SessionIndex,
    remote: u32,
    peer: PeerId,
    cipher: Cipher,
    initiator: Role,
    own_role: Role,
    created: Instant,
    /// For a daemon that takes over: from them follow the keys of all lanes.
    keys: SplitKeys,
    /// Data lanes in order, then the control lane.
    sealers: WipedSlice<Sealer>,
    openers: WipedSlice<Opener>,
    heard: AtomicBool,
    retired: AtomicBool,
    activity: Arc<Activity>,
}

impl Session {
    /// `None` if the cipher refuses the keys, which cannot happen: their lengths are fixed here.
    pub(crate) fn new(spec: SessionSpec) -> Option<Arc<Self>> {
        let (tx, rx) = if spec.initiator == spec.own_role {
            (&spec.keys.initiator, &spec.keys.responder)
        } else {
            (&spec.keys.responder, &spec.keys.initiator)
        };
        let lanes = |count: u8| (0..count).chain([CONTROL_LANE]);
        let key = |split: &[u8; KEY_LEN], lane: u8| {
            LaneKey::new(spec.cipher, |key| {
                let info: [&[u8]; 2] = [&[spec.cipher.byte()], &[lane]];
                derive(key, split, b"ipmoved v1 lane", &info);
            })
        };
        let sealers = lanes(spec.own_lanes).map(|lane| {
            let limit = spec.cipher.reject_after();
            Some(Sealer::new(key(tx, lane)?, lane, spec.remote, limit))
        });
        let openers = lanes(spec.peer_lanes).map(|lane| Some(Opener::new(key(rx, lane)?)));
        Some(Arc::new(Self {
            sealers: WipedSlice::new(usize::from(spec.own_lanes) + 1, sealers)?,
            openers: WipedSlice::new(usize::from(spec.peer_lanes) + 1, openers)?,
            index: spec.index,
            remote: spec.remote,
            peer: spec.peer,
            cipher: spec.cipher,
            initiator: spec.initiator,
            own_role: spec.own_role,
            created: spec.created,
            keys: spec.keys,
            heard: AtomicBool::new(false),
            retired: AtomicBool::new(false),
            activity: spec.activity,
        }))
    }

    /// The index under which datagrams of this session arrive here.
    pub fn index(&self) -> u32 {
        self.index.value
    }

    /// The index under which the peer receives.
    pub fn remote_index(&self) -> u32 {
        self.remote
    }

    /// Whose session it is.
    pub fn peer(&self) -> PeerId {
        self.peer
    }

    /// The negotiated cipher.
    pub fn cipher(&self) -> Cipher {
        self.cipher
    }

    /// The role of the side that asked for the session.
    pub fn initiator(&self) -> Role {
        self.initiator
    }

    /// Whether this side asked for the session.
    pub fn is_initiator(&self) -> bool {
        self.initiator == self.own_role
    }

    /// When it was agreed.
    pub fn created(&self) -> Instant {
        self.created
    }

    /// Where lanes note, once a batch, that they heard from the peer or sent to it.
    pub fn activity(&self) -> &Activity {
        &self.activity
    }

    /// Whether an authenticated datagram has come in on this session.
    pub fn is_heard(&self) -> bool {
        self.heard.load(Relaxed)
    }

    /// The most datagrams sealed on any one of its lanes.
    pub fn messages(&self) -> u64 {
        let reserved = self.sealers.iter().map(Sealer::reserved);
        reserved.max().unwrap_or(0)
    }

    /// Ends the session: nothing is sealed or opened on it any more, even by a lane that still
    /// holds it. The keys are wiped when the last holder drops it.
    pub(crate) fn retire(&self) {
        self.retired.store(true, Relaxed);
        for sealer in self.sealers.iter() {
            sealer.retire();
        }
    }

    /// The sealer of one of this side's lanes, or of [`CONTROL_LANE`]; `None` if there is no such
    /// lane.
    pub fn sealer(&self, lane: u8) -> Option<&Sealer> {
        at_lane(&self.sealers, lane)
    }

    /// Opens one datagram in place: see [`OpenBatch::open`].
    ///
    /// # Errors
    /// As [`OpenBatch::open`].
    pub fn open(&self, data: Data, datagram: &mut [u8]) -> Result<Opened, DropReason> {
        self.open_batch().open(data, datagram)
    }

    /// Opens a batch of datagrams. It takes the lock of a lane's window once for as long as they
    /// come from one lane.
    pub fn open_batch(&self) -> OpenBatch<'_> {
        OpenBatch::new(self)
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("index", &self.index())
            .field("remote", &self.remote)
            .field("peer", &self.peer)
            .field("cipher", &self.cipher)
            .field("initiator", &self.initiator)
            .finish_non_exhaustive()
    }
}

/// The entry of a lane. That of the control lane lies behind those of the data lanes.
fn at_lane<T>(lanes: &[T], lane: u8) -> Option<&T> {
    let (control, data) = lanes.split_last()?;
    if lane == CONTROL_LANE {
        return Some(control);
    }
    data.get(usize::from(lane))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;
    use zeroize::Zeroizing;

    use super::*;
    use crate::channel::wire::{DATA_HEADER_LEN, DATA_OVERHEAD, Flags};
    use crate::testing::epoch;

    /// Two ends of one session, without a handshake.
    pub(super) fn ends(cipher: Cipher, lanes: u8) -> [Arc<Session>; 2] {
        let now = epoch();
        let end = |own_role: Role, index: u32, remote: u32| {
            let entropy = Entropy::of(move |bytes| bytes.copy_from_slice(&index.to_le_bytes()));
            Session::new(SessionSpec {
                index: SessionIndexes::default().draw(&entropy).unwrap(),
                remote,
                cipher,
                keys: SplitKeys {
                    initiator: Box::new(Zeroizing::new([1; 32])),
                    responder: Box::new(Zeroizing::new([2; 32])),
                },
                initiator: Role::Old,
                own_role,
                own_lanes: lanes,
                peer_lanes: lanes,
                peer: PeerId(0),
                created: now,
                activity: Arc::new(Activity::new(now)),
            })
            .unwrap()
        };
        [end(Role::Old, 11, 22), end(Role::New, 22, 11)]
    }

    pub(super) fn sealed(session: &Session, lane: u8, plaintext: &[u8]) -> Vec<u8> {
        let sealer = session.sealer(lane).unwrap();
        let flags = if lane == CONTROL_LANE {
            Flags::CONTROL
        } else {
            Flags::NONE
        };
        let mut datagram = vec![0; DATA_OVERHEAD + plaintext.len()];
        datagram[DATA_HEADER_LEN..DATA_HEADER_LEN + plaintext.len()].copy_from_slice(plaintext);
        let counter = sealer.reserve(1).unwrap().next().unwrap();
        sealer.seal(counter, flags, &mut datagram).unwrap();
        datagram
    }

    fn opened(session: &Session, datagram: &[u8]) -> Result<(Opened, Vec<u8>), DropReason> {
        let mut datagram = datagram.to_vec();
        let data = Data::parse(&datagram)?;
        let opened = session.open(data, &mut datagram)?;
        let plaintext = datagram[opened.plaintext.clone()].to_vec();
        Ok((opened, plaintext))
    }

    const CIPHERS: [Cipher; 3] = Cipher::ALL;

    #[test]
    fn lanes_and_directions_have_keys_of_their_own() {
        for cipher in CIPHERS {
            let [old, new] = ends(cipher, 3);
            let mut seen = HashSet::new();
            for session in [&old, &new] {
                for lane in [0, 1, 2, CONTROL_LANE] {
                    let datagram = sealed(session, lane, b"the same plaintext");
                    assert!(seen.insert(datagram[DATA_HEADER_LEN..].to_vec()));
                    let other = if session.index() == old.index() {
                        &new
                    } else {
                        &old
                    };
                    let (opened, plaintext) = opened(other, &datagram).unwrap();
                    assert_eq!((opened.lane, opened.counter), (lane, 0));
                    assert_eq!(plaintext, b"the same plaintext");
                }
            }
            assert!(old.sealer(3).is_none());
            // A datagram of a lane that was not announced, forged from one of a lane that was.
            let mut forged = sealed(&old, 0, b"x");
            forged[2] = 3;
            assert_eq!(opened(&new, &forged), Err(DropReason::OpenAuth));
            let reflected = sealed(&old, 0, b"x");
            assert_eq!(opened(&old, &reflected), Err(DropReason::SessionUnknown));
        }
    }

    #[test]
    fn a_datagram_is_accepted_once() {
        for cipher in CIPHERS {
            let [old, new] = ends(cipher, 1);
            let datagrams = (0..3).map(|n| sealed(&old, 0, &[n])).collect::<Vec<_>>();
            assert!(!new.is_heard());
            let (first, _) = opened(&new, &datagrams[0]).unwrap();
            assert!(first.first && first.newest && new.is_heard());
            let (third, _) = opened(&new, &datagrams[2]).unwrap();
            assert!(!third.first && third.newest);
            let (second, _) = opened(&new, &datagrams[1]).unwrap();
            assert!(!second.newest, "it was overtaken");
            for datagram in &datagrams {
                assert_eq!(opened(&new, datagram), Err(DropReason::Replay));
            }
        }
    }

    #[test]
    fn a_forged_counter_does_not_move_the_window() {
        let [old, new] = ends(Cipher::Aes256Gcm, 1);
        let datagram = sealed(&old, 0, b"x");
        let mut forged = datagram.clone();
        forged[14] = 1;
        assert_eq!(opened(&new, &forged), Err(DropReason::OpenAuth));
        assert!(!new.is_heard());
        assert!(opened(&new, &datagram).is_ok());
    }

    #[test]
    fn a_bit_changed_anywhere_is_noticed() {
        for cipher in CIPHERS {
            let [old, new] = ends(cipher, 1);
            let datagram = sealed(&old, 0, &[7; 100]);
            for bit in 0..datagram.len() * 8 {
                let mut forged = datagram.clone();
                forged[bit / 8] ^= 1 << (bit % 8);
                assert!(opened(&new, &forged).is_err(), "{cipher}, bit {bit}");
            }
            assert!(!new.is_heard());
            assert!(opened(&new, &datagram).is_ok());
        }
    }

    #[test]
    fn a_batch_over_several_lanes() {
        let [old, new] = ends(Cipher::Aes256Gcm, 2);
        let mut batch = new.open_batch();
        for n in 0..10u8 {
            let mut datagram = sealed(&old, n / 2 % 2, &[n]);
            let data = Data::parse(&datagram).unwrap();
            let opened = batch.open(data, &mut datagram.clone()).unwrap();
            assert_eq!(opened.plaintext, 16..17);
            assert_eq!(batch.open(data, &mut datagram), Err(DropReason::Replay));
        }
    }

    #[test]
    fn a_retired_session_neither_seals_nor_opens() {
        let [old, new] = ends(Cipher::Aes256Gcm, 1);
        let datagram = sealed(&old, 0, b"x");
        old.retire();
        new.retire();
        old.retire();
        assert!(old.sealer(0).unwrap().reserve(1).is_none());
        assert!(old.sealer(CONTROL_LANE).unwrap().reserve(1).is_none());
        assert_eq!(opened(&new, &datagram), Err(DropReason::SessionExpired));
        assert_eq!(old.messages(), 2, "the failed reservation counts");
    }

    proptest! {
        #[test]
        fn a_sealed_plaintext_opens_to_the_same(
            plaintext in proptest::collection::vec(any::<u8>(), 0..1600),
            cipher in proptest::sample::select(CIPHERS.to_vec()),
        ) {
            let [old, new] = ends(cipher, 1);
            prop_assert_eq!(opened(&new, &sealed(&old, 0, &plaintext)).unwrap().1, plaintext);
        }
    }
}
