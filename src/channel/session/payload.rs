//! The encrypted payloads of the two handshake messages (`contrib/protocol.md`, section 2).
//!
//! Owns the bytes of both. `tunnel` decides what they mean.

use super::{Cipher, Offer};
use crate::channel::wire::{INITIATION_PAYLOAD_LEN, RESPONSE_PAYLOAD_LEN, u64_at};

/// The initiator's payload, inside the first message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct InitiationPayload {
    /// Nanoseconds since 1970, and always more than in the last initiation. It tells a new
    /// initiation from a replayed one.
    pub(crate) timestamp: u64,
    /// The highest timestamp accepted from the peer, 0 if none.
    pub(crate) seen: u64,
    /// Names this run of the sender. It is drawn at random at the start, so that the peer sees a
    /// restart.
    pub(crate) run: u64,
    /// The ciphers it allows.
    pub(crate) offer: Offer,
    /// On how many data lanes it will send.
    pub(crate) lanes: u8,
}

impl InitiationPayload {
    pub(super) fn encode(&self) -> [u8; INITIATION_PAYLOAD_LEN] {
        let mut bytes = [0; INITIATION_PAYLOAD_LEN];
        bytes[..8].copy_from_slice(&self.timestamp.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.seen.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.run.to_le_bytes());
        bytes[24..26].copy_from_slice(&self.offer.bytes());
        bytes[26] = self.lanes;
        bytes
    }

    /// `None` if no peer of this version sends such bytes.
    pub(crate) fn decode(bytes: &[u8; INITIATION_PAYLOAD_LEN]) -> Option<Self> {
        let lanes = bytes[26];
        (lanes > 0).then_some(Self {
            timestamp: u64_at(bytes, 0),
            seen: u64_at(bytes, 8),
            run: u64_at(bytes, 16),
            offer: Offer::from_bytes([bytes[24], bytes[25]])?,
            lanes,
        })
    }
}

/// The responder's payload, inside the second message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct ResponsePayload {
    /// Names this run of the sender.
    pub(crate) run: u64,
    /// The cipher it chose; `None` refuses the session, since there is no common one.
    pub(crate) cipher: Option<Cipher>,
    /// The ciphers it allows.
    pub(crate) offer: Offer,
    /// On how many data lanes it will send.
    pub(crate) lanes: u8,
}

impl ResponsePayload {
    pub(super) fn encode(&self) -> [u8; RESPONSE_PAYLOAD_LEN] {
        let mut bytes = [0; RESPONSE_PAYLOAD_LEN];
        bytes[..8].copy_from_slice(&self.run.to_le_bytes());
        bytes[8] = self.cipher.map_or(0, Cipher::byte);
        bytes[9..11].copy_from_slice(&self.offer.bytes());
        bytes[11] = self.lanes;
        bytes
    }

    pub(super) fn decode(bytes: &[u8; RESPONSE_PAYLOAD_LEN]) -> Option<Self> {
        let cipher = match bytes[8] {
            0 => None,
            byte => Some(Cipher::from_byte(byte)?),
        };
        let lanes = bytes[11];
        (lanes > 0).then_some(Self {
            run: u64_at(bytes, 0),
            cipher,
            offer: Offer::from_bytes([bytes[9], bytes[10]])?,
            lanes,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::CipherPolicy;
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn payloads_survive_and_no_bytes_panic(
            bytes in proptest::array::uniform32(any::<u8>()),
            timestamp: u64, seen: u64, run: u64, lanes in 1u8..,
        ) {
            let offer = Offer { ciphers: CipherPolicy::Auto.into(), aes_hardware: true };
            let initiation = InitiationPayload { timestamp, seen, run, offer, lanes };
            prop_assert_eq!(InitiationPayload::decode(&initiation.encode()), Some(initiation));
            let response = ResponsePayload { run, cipher: None, offer, lanes };
            prop_assert_eq!(ResponsePayload::decode(&response.encode()), Some(response));
            let _ = ResponsePayload::decode(&bytes);
        }
    }
}
