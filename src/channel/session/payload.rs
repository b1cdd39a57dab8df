//! The encrypted payloads of the two handshake messages (`contrib/protocol.md`, section 2).
//!
//! Owns the bytes of both. `tunnel` decides what they mean.

use super::{Cipher, Offer, question};
use crate::channel::wire::{INITIATION_PAYLOAD_LEN, RESPONSE_PAYLOAD_LEN, u64_at};
use crate::model::moved::Move;

/// Bit of the byte whose lowest bit says what the processor has: it only asks.
const CHECKS: u8 = 0b10;

/// Whether the responder accepts what it was asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Accepts {
    /// It does not say: nothing was asked, or it is older.
    Unsaid,
    /// It does.
    Yes,
    /// Its settings accept other moves.
    No,
}

/// The initiator's payload, inside the first message.
#[derive(Clone, PartialEq, Eq, Debug)]
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
    /// It only asks (`ipmoved check`): nothing is to be sent on the session.
    pub(crate) checks: bool,
    /// On how many data lanes it will send.
    pub(crate) lanes: u8,
    /// It asks whether the receiver would accept this.
    pub(crate) question: Option<Move>,
}

impl InitiationPayload {
    pub(super) fn encode(&self) -> [u8; INITIATION_PAYLOAD_LEN] {
        let mut bytes = [0; INITIATION_PAYLOAD_LEN];
        bytes[..8].copy_from_slice(&self.timestamp.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.seen.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.run.to_le_bytes());
        bytes[24..26].copy_from_slice(&self.offer.bytes());
        bytes[25] |= if self.checks { CHECKS } else { 0 };
        bytes[26] = self.lanes;
        bytes[27..47].copy_from_slice(&question::encode(self.question.as_ref()));
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
            checks: bytes[25] & CHECKS != 0,
            lanes,
            question: bytes[27..].first_chunk().and_then(question::decode),
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
    /// What its clock shows, in nanoseconds since 1970; 0 if it does not say.
    pub(crate) clock: u64,
    /// The version of its program; zeros if it does not say.
    pub(crate) version: [u8; 3],
    /// The answer to the question in the initiation.
    pub(crate) accepts: Accepts,
}

impl ResponsePayload {
    pub(super) fn encode(&self) -> [u8; RESPONSE_PAYLOAD_LEN] {
        let mut bytes = [0; RESPONSE_PAYLOAD_LEN];
        bytes[..8].copy_from_slice(&self.run.to_le_bytes());
        bytes[8] = self.cipher.map_or(0, Cipher::byte);
        bytes[9..11].copy_from_slice(&self.offer.bytes());
        bytes[11] = self.lanes;
        bytes[12..20].copy_from_slice(&self.clock.to_le_bytes());
        bytes[20..23].copy_from_slice(&self.version);
        bytes[23] = match self.accepts {
            Accepts::Unsaid => 0,
            Accepts::Yes => 1,
            Accepts::No => 2,
        };
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
            clock: u64_at(bytes, 12),
            version: [bytes[20], bytes[21], bytes[22]],
            accepts: match bytes[23] {
                1 => Accepts::Yes,
                2 => Accepts::No,
                _ => Accepts::Unsaid,
            },
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
            timestamp: u64, seen: u64, run: u64, lanes in 1u8.., checks: bool, clock: u64,
            version: [u8; 3],
        ) {
            let offer = Offer { ciphers: CipherPolicy::Auto.into(), aes_hardware: true };
            let question = "192.0.2.5:80/tcp".parse().ok();
            let initiation =
                InitiationPayload { timestamp, seen, run, offer, checks, lanes, question };
            prop_assert_eq!(InitiationPayload::decode(&initiation.encode()), Some(initiation));
            let (cipher, accepts) = (None, Accepts::No);
            let response = ResponsePayload { run, cipher, offer, lanes, clock, version, accepts };
            prop_assert_eq!(ResponsePayload::decode(&response.encode()), Some(response));
            let _ = ResponsePayload::decode(&bytes);
        }
    }
}
