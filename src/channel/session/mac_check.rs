//! The check that every handshake message has to pass first: the keyed hash at its end.
//!
//! Owns what is known of each peer for that, and which messages came before. Knows nothing of what a
//! message says.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use blake2::digest::Mac;

use super::PeerKeys;
use super::keys::mac;
use super::payload::u64_at;
use crate::channel::wire::{INITIATION_LEN, MAC_LEN, Message, RESPONSE_LEN};
use crate::model::drops::DropReason;
use crate::model::peer::PeerId;

/// The door for handshake messages: one keyed hash per configured peer and nothing else.
///
/// Shared by all lanes, so that what a stranger sends never reaches the control task, nor what was let
/// in before: who sends a recording again and again costs no more than a stranger.
#[derive(Debug, Default)]
pub struct Door {
    peers: Vec<Admission>,
}

/// Handshake messages of a peer that are remembered: those of some hours, for there are two every two
/// minutes, and some more while the peer does not answer. What is forgotten is refused by the tunnel.
const REMEMBERED: usize = 512;

struct Admission {
    peer: PeerId,
    keys: PeerKeys,
    /// Half of each mac that came, at the place that the mac itself chooses. Nobody without the key can
    /// choose a mac, so nobody can have a message of the peer refused.
    seen: Box<[AtomicU64]>,
}

impl Admission {
    fn new(peer: PeerId, keys: PeerKeys) -> Self {
        Self {
            peer,
            keys,
            seen: (0..REMEMBERED).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Whether a message with this mac is one that was not let in before.
    fn is_new(&self, tag: &[u8; MAC_LEN]) -> bool {
        let (place, rest) = (u64_at(tag, 0), u64_at(tag, 8));
        let seen = &self.seen[(place % REMEMBERED as u64) as usize];
        // One in 2^64 messages has 0 here and is taken for one that came before: it is sent anew.
        seen.swap(rest, Relaxed) != rest
    }
}

impl fmt::Debug for Admission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Admission")
            .field("peer", &self.peer)
            .finish_non_exhaustive()
    }
}

impl Door {
    /// Opens to these peers.
    pub fn new(peers: impl IntoIterator<Item = (PeerId, PeerKeys)>) -> Self {
        Self {
            peers: peers
                .into_iter()
                .map(|(peer, keys)| Admission::new(peer, keys))
                .collect(),
        }
    }

    /// Finds the peer whose key made a handshake message. Allocates nothing.
    ///
    /// # Errors
    /// [`DropReason::WireMalformed`] and [`DropReason::WireVersion`] as [`Message::parse`] has them,
    /// [`DropReason::HandshakeAuth`] if it was made with no peer's key,
    /// [`DropReason::HandshakeReplay`] if the same one was let in before.
    pub fn admit(&self, datagram: &[u8]) -> Result<Admitted, DropReason> {
        let message = match Message::parse(datagram)? {
            Message::Initiation(_) => datagram.try_into().map(Handshake::Initiation),
            Message::Response(_) => datagram.try_into().map(Handshake::Response),
            Message::Data(_) => return Err(DropReason::WireMalformed),
        }
        .map_err(|_| DropReason::WireMalformed)?;
        let (signed, tag) = datagram
            .split_last_chunk::<MAC_LEN>()
            .ok_or(DropReason::WireMalformed)?;
        let admission = self
            .peers
            .iter()
            .find(|of| mac(&of.keys.mac, signed).verify(tag.into()).is_ok())
            .ok_or(DropReason::HandshakeAuth)?;
        if !admission.is_new(tag) {
            return Err(DropReason::HandshakeReplay);
        }
        Ok(Admitted {
            peer: admission.peer,
            message,
        })
    }
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

    pub(crate) fn message(&self) -> Result<Message<'_>, DropReason> {
        match &self.message {
            Handshake::Initiation(bytes) => Message::parse(bytes),
            Handshake::Response(bytes) => Message::parse(bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{ends, sealed};
    use super::super::{Cipher, Psk};
    use super::*;
    use crate::channel::wire::Initiation;
    use crate::model::peer::Role;
    use zeroize::Zeroizing;

    #[test]
    fn the_door_finds_whose_key_it_was() {
        let keys = [1, 2, 3].map(|byte| PeerKeys::derive(&Psk(Zeroizing::new([byte; 32]))));
        let door = Door::new(
            keys[..2]
                .iter()
                .cloned()
                .enumerate()
                .map(|(n, keys)| (PeerId(n as u16), keys)),
        );
        let signed = |keys: &PeerKeys| {
            let mut bytes = Initiation::write(Role::Old, 1);
            let (message, tag) = bytes.split_at_mut(INITIATION_LEN - MAC_LEN);
            tag.copy_from_slice(&keys.mac_of(message));
            bytes
        };
        assert_eq!(door.admit(&signed(&keys[0])).unwrap().peer(), PeerId(0));
        assert_eq!(door.admit(&signed(&keys[1])).unwrap().peer(), PeerId(1));
        assert_eq!(
            door.admit(&signed(&keys[1])).unwrap_err(),
            DropReason::HandshakeReplay,
            "the same again"
        );
        assert_eq!(
            door.admit(&signed(&keys[2])).unwrap_err(),
            DropReason::HandshakeAuth
        );
        let data = sealed(&ends(Cipher::Aes256Gcm, 1)[0], 0, b"x");
        assert_eq!(door.admit(&data).unwrap_err(), DropReason::WireMalformed);
    }
}
