//! The check that every handshake message has to pass first: the keyed hash at its end.
//!
//! Owns one key per configured peer, and the memory of which messages it admitted. Does not look
//! into a message: `noise` reads what it says, and `tunnel` judges it.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::PeerKeys;
use crate::channel::wire::{INITIATION_LEN, MAC_LEN, Message, RESPONSE_LEN, u64_at};
use crate::model::drops::DropReason;
use crate::model::peer::PeerId;

/// Admits the handshake messages of configured peers, each of them once. A check costs one keyed
/// hash per peer, and nothing else.
///
/// All lanes share it, so a stranger's message never reaches the control task. Nor does a recording
/// that is sent again and again: it costs no more than a stranger's message.
#[derive(Debug, Default)]
pub struct MacCheck {
    peers: Vec<KnownPeer>,
}

impl MacCheck {
    /// Admits the messages of these peers.
    pub fn new(peers: impl IntoIterator<Item = (PeerId, PeerKeys)>) -> Self {
        Self {
            peers: peers
                .into_iter()
                .map(|(id, keys)| KnownPeer::new(id, keys))
                .collect(),
        }
    }

    /// Finds the peer whose key made a handshake message. Allocates nothing.
    ///
    /// # Errors
    /// [`DropReason::WireMalformed`] and [`DropReason::WireVersion`] as [`Message::parse`] has
    /// them, [`DropReason::HandshakeAuth`] if no peer's key made the message,
    /// [`DropReason::HandshakeReplay`] if the same message was admitted before.
    pub fn admit(&self, datagram: &[u8]) -> Result<Admitted, DropReason> {
        let message = match Message::parse(datagram)? {
            Message::Initiation(_) => datagram.try_into().map(Handshake::Initiation),
            Message::Response(_) => datagram.try_into().map(Handshake::Response),
            Message::Data(_) => return Err(DropReason::WireMalformed),
        }
        .map_err(|_| DropReason::WireMalformed)?;
        let (signed, mac) = datagram
            .split_last_chunk::<MAC_LEN>()
            .ok_or(DropReason::WireMalformed)?;
        let peer = self
            .peers
            .iter()
            .find(|peer| peer.keys.verify(signed, mac))
            .ok_or(DropReason::HandshakeAuth)?;
        if !peer.is_new(mac) {
            return Err(DropReason::HandshakeReplay);
        }
        Ok(Admitted {
            peer: peer.id,
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

    /// The message, parsed.
    pub(crate) fn message(&self) -> Result<Message<'_>, DropReason> {
        match &self.message {
            Handshake::Initiation(bytes) => Message::parse(bytes),
            Handshake::Response(bytes) => Message::parse(bytes),
        }
    }
}

/// How many handshake messages of a peer are remembered: those of some hours, for two come every
/// two minutes, and some more while the peer does not answer. The tunnel refuses replays that are
/// forgotten here.
const REMEMBERED: usize = 512;

struct KnownPeer {
    id: PeerId,
    keys: PeerKeys,
    /// A hash table of the macs that were admitted. The first half of a mac says in which slot its
    /// second half is kept. Only a holder of the key can make a mac, so a stranger cannot fill a
    /// slot and have the peer's next message refused.
    seen: Box<[AtomicU64]>,
}

impl KnownPeer {
    fn new(id: PeerId, keys: PeerKeys) -> Self {
        Self {
            id,
            keys,
            seen: (0..REMEMBERED).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Remembers the mac; true if no message with it was admitted before.
    fn is_new(&self, mac: &[u8; MAC_LEN]) -> bool {
        let (first, second) = (u64_at(mac, 0), u64_at(mac, 8));
        let slot = &self.seen[(first % REMEMBERED as u64) as usize];
        // An empty slot is 0. So one mac in 2^64 is refused although it is new; its sender tries
        // again.
        slot.swap(second, Relaxed) != second
    }
}

impl fmt::Debug for KnownPeer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KnownPeer")
            .field("id", &self.id)
            .finish_non_exhaustive()
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
    fn the_mac_check_finds_whose_key_it_was() {
        let keys = [1, 2, 3].map(|byte| PeerKeys::derive(&Psk(Zeroizing::new([byte; 32]))));
        let mac_check = MacCheck::new(
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
        assert_eq!(
            mac_check.admit(&signed(&keys[0])).unwrap().peer(),
            PeerId(0)
        );
        assert_eq!(
            mac_check.admit(&signed(&keys[1])).unwrap().peer(),
            PeerId(1)
        );
        assert_eq!(
            mac_check.admit(&signed(&keys[1])).unwrap_err(),
            DropReason::HandshakeReplay,
            "the same again"
        );
        assert_eq!(
            mac_check.admit(&signed(&keys[2])).unwrap_err(),
            DropReason::HandshakeAuth
        );
        let data = sealed(&ends(Cipher::Aes256Gcm, 1)[0], 0, b"x");
        assert_eq!(
            mac_check.admit(&data).unwrap_err(),
            DropReason::WireMalformed
        );
    }
}
