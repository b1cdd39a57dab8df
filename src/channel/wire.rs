//! What a datagram between two daemons looks like: the layouts of `contrib/protocol.md`, byte by
//! byte.
//!
//! Owns the views over the three message types. Each `parse` checks length, type, version and
//! reserved bytes once; everything after it relies on that and cannot panic. Knows no keys: a view
//! says nothing about who wrote the bytes; `session` finds that out.
//!
//! ```text
//! Initiation  0 type 1 | 1 version | 2 role | 3 reserved | 4 sender index
//!             8 ephemeral (32) | 40 payload (48) + tag (16) | 104 mac (16)                   = 120
//! Response    0 type 2 | 1 version | 2 role | 3 reserved | 4 sender index | 8 receiver index
//!             12 ephemeral (32) | 44 payload (32) + tag (16) | 92 mac (16)                   = 108
//! Data        0 type 4 | 1 flags | 2 lane | 3 reserved | 4 receiver index | 8 counter
//!             16 ciphertext | tag (16)
//! ```
//!
//! All numbers are little-endian.

use crate::model::drops::DropReason;
use crate::model::peer::Role;

/// The version of the protocol that this daemon speaks, in byte 1 of both handshake messages.
pub const VERSION: u8 = 1;

/// Byte 0 of an [`Initiation`].
pub const TYPE_INITIATION: u8 = 1;
/// Byte 0 of a [`Response`].
pub const TYPE_RESPONSE: u8 = 2;
/// Byte 0 of a [`Data`] datagram.
pub const TYPE_DATA: u8 = 4;

/// Where the sender's lane lies in a [`Data`] datagram.
pub const LANE_AT: u32 = 2;
/// Length of the keyed hash at the end of both handshake messages: 128 bits, as WireGuard's `mac1`.
pub const MAC_LEN: usize = 16;
/// Length of the AEAD tag, which is the same for every cipher.
pub const TAG_LEN: usize = 16;
/// Length of an X25519 public key.
const EPHEMERAL_LEN: usize = 32;

/// Length of the payload of an initiation, without the tag.
pub const INITIATION_PAYLOAD_LEN: usize = 48;
/// Length of the payload of a response, without the tag.
pub const RESPONSE_PAYLOAD_LEN: usize = 32;
/// Length of an [`Initiation`], which is fixed.
pub const INITIATION_LEN: usize =
    INITIATION_NOISE + EPHEMERAL_LEN + INITIATION_PAYLOAD_LEN + TAG_LEN + MAC_LEN;
/// Length of a [`Response`], which is fixed. It is shorter than the initiation that asked for it,
/// so nobody can use it to amplify.
pub const RESPONSE_LEN: usize =
    RESPONSE_NOISE + EPHEMERAL_LEN + RESPONSE_PAYLOAD_LEN + TAG_LEN + MAC_LEN;

/// Where the Noise message starts in an initiation.
const INITIATION_NOISE: usize = 8;
/// Where the Noise message starts in a response.
const RESPONSE_NOISE: usize = 12;

/// Length of the header of a data datagram, all of which is associated data of the AEAD.
pub const DATA_HEADER_LEN: usize = 16;
/// How many bytes a data datagram adds to its plaintext.
pub const DATA_OVERHEAD: usize = DATA_HEADER_LEN + TAG_LEN;

/// The lane of the control task: no data lane has this number.
pub const CONTROL_LANE: u8 = 255;

/// What byte 1 of a data datagram says about its plaintext.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Flags(u8);

impl Flags {
    /// A whole IP packet with complete checksums.
    pub const NONE: Self = Self(0);
    /// The L4 checksum field holds the sum of the pseudo-header only (virtio `NEEDS_CSUM`).
    pub const CSUM_PARTIAL: Self = Self(1);
    /// A part of a packet that goes on in the datagram with the next counter of this lane.
    pub const MORE: Self = Self(2);
    /// A part of a packet that continues the datagram with the previous counter of this lane.
    pub const CONTINUES: Self = Self(4);
    /// A control message of the tunnel, not an IP packet; only on [`CONTROL_LANE`].
    pub const CONTROL: Self = Self(8);

    /// All flags of `self` and of `other`.
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether every flag of `other` is set.
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// The byte as it stands on the wire.
    pub const fn bits(self) -> u8 {
        self.0
    }

    /// Refuses bits that have no meaning, and control messages that claim to be packets as well.
    const fn from_bits(bits: u8) -> Option<Self> {
        let flags = Self(bits);
        let more_than_control = flags.has(Self::CONTROL) && bits != Self::CONTROL.0;
        if bits > 0x0f || more_than_control {
            return None;
        }
        Some(flags)
    }
}

/// A datagram whose layout is right. Nothing in it is authenticated yet.
#[derive(Clone, Copy, Debug)]
pub enum Message<'a> {
    /// Asks for a session.
    Initiation(Initiation<'a>),
    /// Grants or refuses a session.
    Response(Response<'a>),
    /// A sealed packet or control message.
    Data(Data),
}

impl<'a> Message<'a> {
    /// Reads the layout of a datagram.
    ///
    /// # Errors
    /// [`DropReason::WireVersion`] if it is a handshake message of another version, otherwise
    /// [`DropReason::WireMalformed`].
    pub fn parse(datagram: &'a [u8]) -> Result<Self, DropReason> {
        match datagram.first() {
            Some(&TYPE_DATA) => Data::parse(datagram).map(Self::Data),
            Some(&TYPE_INITIATION) => Initiation::parse(datagram).map(Self::Initiation),
            Some(&TYPE_RESPONSE) => Response::parse(datagram).map(Self::Response),
            _ => Err(DropReason::WireMalformed),
        }
    }
}

/// View of an initiation.
#[derive(Clone, Copy, Debug)]
pub struct Initiation<'a> {
    bytes: &'a [u8; INITIATION_LEN],
    role: Role,
}

impl<'a> Initiation<'a> {
    fn parse(datagram: &'a [u8]) -> Result<Self, DropReason> {
        let role = handshake_role(datagram)?;
        let bytes = datagram.try_into().map_err(|_| DropReason::WireMalformed)?;
        Ok(Self { bytes, role })
    }

    /// The role that the sender, the initiator, claims.
    pub fn role(&self) -> Role {
        self.role
    }

    /// The index under which the initiator wants to receive.
    pub fn sender(&self) -> u32 {
        u32_at(self.bytes, 4)
    }

    /// The first message of the Noise pattern.
    pub fn noise(&self) -> &'a [u8] {
        &self.bytes[INITIATION_NOISE..INITIATION_LEN - MAC_LEN]
    }

    /// Lays out an initiation whose Noise message and mac are still to be written.
    pub fn write(role: Role, sender: u32) -> [u8; INITIATION_LEN] {
        let mut bytes = [0; INITIATION_LEN];
        bytes[0] = TYPE_INITIATION;
        bytes[1] = VERSION;
        bytes[2] = role_byte(role);
        bytes[4..8].copy_from_slice(&sender.to_le_bytes());
        bytes
    }

    /// Where [`write`](Self::write) left space for the Noise message.
    pub fn noise_mut(bytes: &mut [u8; INITIATION_LEN]) -> &mut [u8] {
        &mut bytes[INITIATION_NOISE..INITIATION_LEN - MAC_LEN]
    }
}

/// View of a response.
#[derive(Clone, Copy, Debug)]
pub struct Response<'a> {
    bytes: &'a [u8; RESPONSE_LEN],
    role: Role,
}

impl<'a> Response<'a> {
    fn parse(datagram: &'a [u8]) -> Result<Self, DropReason> {
        let role = handshake_role(datagram)?;
        let bytes = datagram.try_into().map_err(|_| DropReason::WireMalformed)?;
        Ok(Self { bytes, role })
    }

    /// The role that the sender, the responder, claims.
    pub fn role(&self) -> Role {
        self.role
    }

    /// The index under which the responder wants to receive.
    pub fn sender(&self) -> u32 {
        u32_at(self.bytes, 4)
    }

    /// The index that the initiation named.
    pub fn receiver(&self) -> u32 {
        u32_at(self.bytes, 8)
    }

    /// The second message of the Noise pattern.
    pub fn noise(&self) -> &'a [u8] {
        &self.bytes[RESPONSE_NOISE..RESPONSE_LEN - MAC_LEN]
    }

    /// Lays out a response whose Noise message and mac are still to be written.
    pub fn write(role: Role, sender: u32, receiver: u32) -> [u8; RESPONSE_LEN] {
        let mut bytes = [0; RESPONSE_LEN];
        bytes[0] = TYPE_RESPONSE;
        bytes[1] = VERSION;
        bytes[2] = role_byte(role);
        bytes[4..8].copy_from_slice(&sender.to_le_bytes());
        bytes[8..12].copy_from_slice(&receiver.to_le_bytes());
        bytes
    }

    /// Where [`write`](Self::write) left space for the Noise message.
    pub fn noise_mut(bytes: &mut [u8; RESPONSE_LEN]) -> &mut [u8] {
        &mut bytes[RESPONSE_NOISE..RESPONSE_LEN - MAC_LEN]
    }
}

/// The header of a data datagram, read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Data {
    /// How to read the plaintext.
    pub flags: Flags,
    /// The sender's lane, which chooses the key.
    pub lane: u8,
    /// The receiver's index of the session.
    pub receiver: u32,
    /// The sender's counter on that lane, which is the nonce.
    pub counter: u64,
}

impl Data {
    /// Reads the header. A datagram that passes is long enough for header and tag.
    ///
    /// # Errors
    /// [`DropReason::WireMalformed`] if it is too short, of another type, or has reserved bits set.
    pub fn parse(datagram: &[u8]) -> Result<Self, DropReason> {
        Self::read(datagram).ok_or(DropReason::WireMalformed)
    }

    fn read(datagram: &[u8]) -> Option<Self> {
        let header: &[u8; DATA_HEADER_LEN] = datagram.first_chunk()?;
        if datagram.len() < DATA_OVERHEAD || header[0] != TYPE_DATA || header[3] != 0 {
            return None;
        }
        let flags = Flags::from_bits(header[1])?;
        let lane = header[2];
        if flags.has(Flags::CONTROL) != (lane == CONTROL_LANE) {
            return None;
        }
        Some(Self {
            flags,
            lane,
            receiver: u32_at(header, 4),
            counter: u64_at(header, 8),
        })
    }

    /// The bytes of the header.
    pub fn encode(&self) -> [u8; DATA_HEADER_LEN] {
        let mut header = [0; DATA_HEADER_LEN];
        header[0] = TYPE_DATA;
        header[1] = self.flags.bits();
        header[2] = self.lane;
        header[4..8].copy_from_slice(&self.receiver.to_le_bytes());
        header[8..16].copy_from_slice(&self.counter.to_le_bytes());
        header
    }
}

/// The byte that stands for a role in a handshake message and in the prologue.
pub fn role_byte(role: Role) -> u8 {
    match role {
        Role::Old => 1,
        Role::New => 2,
    }
}

/// Checks the version and the reserved byte, and reads the role: both handshake messages begin
/// alike.
fn handshake_role(datagram: &[u8]) -> Result<Role, DropReason> {
    match datagram {
        [_, VERSION, 1, 0, ..] => Ok(Role::Old),
        [_, VERSION, 2, 0, ..] => Ok(Role::New),
        [_, version, ..] if *version != VERSION => Err(DropReason::WireVersion),
        _ => Err(DropReason::WireMalformed),
    }
}

fn u32_at<const N: usize>(bytes: &[u8; N], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// The little-endian word at `at`. The eight bytes from there must lie within `bytes`.
pub(crate) fn u64_at<const N: usize>(bytes: &[u8; N], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn golden_bytes_of_a_data_header() {
        let data = Data {
            flags: Flags::CSUM_PARTIAL.with(Flags::MORE),
            lane: 7,
            receiver: 0x0403_0201,
            counter: 0x0c0b_0a09_0807_0605,
        };
        let header = data.encode();
        assert_eq!(
            header,
            [4, 3, 7, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12],
            "the layout of contrib/protocol.md"
        );
        let datagram = [&header[..], &[0; TAG_LEN]].concat();
        assert_eq!(Data::parse(&datagram), Ok(data));
        assert_eq!(
            Data::parse(&datagram[..DATA_OVERHEAD - 1]),
            Err(DropReason::WireMalformed)
        );
    }

    #[test]
    fn golden_bytes_of_the_handshake() {
        assert_eq!((INITIATION_LEN, RESPONSE_LEN), (120, 108));
        let bytes = Initiation::write(Role::New, 0x0403_0201);
        assert_eq!(bytes[..8], [1, 1, 2, 0, 1, 2, 3, 4]);
        let view = Initiation::parse(&bytes).unwrap();
        assert_eq!((view.role(), view.sender()), (Role::New, 0x0403_0201));
        assert_eq!(view.noise().len(), 32 + INITIATION_PAYLOAD_LEN + TAG_LEN);
        let bytes = Response::write(Role::Old, 0x0403_0201, 0x0807_0605);
        assert_eq!(bytes[..12], [2, 1, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8]);
        let view = Response::parse(&bytes).unwrap();
        assert_eq!((view.role(), view.sender()), (Role::Old, 0x0403_0201));
        assert_eq!(view.receiver(), 0x0807_0605);
    }

    #[test]
    fn reserved_bytes_are_refused() {
        let refuse = |datagram: &[u8], at: usize, byte: u8| {
            let mut datagram = datagram.to_vec();
            datagram[at] = byte;
            Message::parse(&datagram).err()
        };
        let malformed = Some(DropReason::WireMalformed);
        let good = Initiation::write(Role::New, 1);
        assert_eq!(refuse(&good, 1, VERSION), None, "the unchanged one is good");
        assert_eq!(refuse(&good, 1, 2), Some(DropReason::WireVersion));
        assert_eq!(refuse(&good, 1, 0), Some(DropReason::WireVersion));
        assert_eq!(refuse(&good, 2, 3), malformed);
        assert_eq!(refuse(&good, 3, 1), malformed);
        assert_eq!(refuse(&good, 0, TYPE_RESPONSE), malformed, "length");
        assert_eq!(refuse(&good, 0, 3), malformed, "type");
        let data = Data {
            flags: Flags::NONE,
            lane: 0,
            receiver: 1,
            counter: 0,
        };
        let good = [&data.encode()[..], &[0; TAG_LEN]].concat();
        assert_eq!(refuse(&good, 1, 1), None);
        assert_eq!(refuse(&good, 1, 0x10), malformed, "unknown flag");
        assert_eq!(refuse(&good, 1, 6), None, "neither first nor last part");
        assert_eq!(refuse(&good, 1, 9), malformed, "control and more");
        assert_eq!(refuse(&good, 1, 8), malformed, "control on a data lane");
        assert_eq!(
            refuse(&good, 2, CONTROL_LANE),
            malformed,
            "data on the control lane"
        );
        assert_eq!(refuse(&good, 3, 1), malformed);
    }

    proptest! {
        #[test]
        fn no_bytes_make_parse_panic(
            kind in 0u8..6, version in 0u8..3, role in 0u8..4,
            bytes in proptest::collection::vec(any::<u8>(), 0..160),
        ) {
            let _ = Message::parse(&bytes);
            let mut bytes = bytes;
            for (byte, value) in bytes.iter_mut().zip([kind, version, role, 0]) {
                *byte = value;
            }
            match Message::parse(&bytes) {
                Ok(Message::Initiation(view)) => prop_assert_eq!(view.noise().len(), 96),
                Ok(Message::Response(view)) => prop_assert_eq!(view.noise().len(), 80),
                Ok(Message::Data(data)) => prop_assert_eq!(&data.encode()[..], &bytes[..16]),
                Err(_) => {}
            }
        }
    }
}
