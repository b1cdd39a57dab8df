//! Keys: what the shared secret becomes, the handshake that makes a session of it, and the sealing and
//! opening of datagrams under that session.
//!
//! The only room that uses `snow`, and the only one that holds keys. It knows one message at a time:
//! when to start a handshake, which of two sessions is used and whether an old timestamp is refused is
//! decided in `tunnel`; what the bytes look like is written in `wire`.
//!
//! ```text
//! PSK ──HKDF──► mac key    a stranger's handshake message dies here, at one keyed hash: Door
//!       └─────► noise key  NNpsk0: the first message dies at one AEAD check, before any DH
//!                  │ split
//!                  ├─► initiator → responder ──HKDF── one key per lane: Sealer here, Opener there
//!                  └─► responder → initiator ──HKDF── one key per lane: Opener here, Sealer there
//! ```
//!
//! A [`Session`] is shared by the control task and all lanes. What lanes call takes no lock but the one
//! of a lane's replay window, and allocates nothing.
//!
//! Secrets are wiped when done: the PSK and what is derived from it by `zeroize`; the state of a
//! handshake, which snow does not wipe, in `session::noise`; AEAD keys by AWS-LC, whose
//! `OPENSSL_free` cleanses each allocation it gives back, those of AEGIS, and the copies that its library makes, by `zeroize`. Copies that the compiler left in dead stack
//! frames are out of reach, as in every program.

use std::collections::HashSet;
use std::fmt;
use std::ops::Range;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use aegis::aegis256x4::Aegis256X4;
use aws_lc_rs::aead::{AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::hkdf;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use blake2::Blake2sMac;
use blake2::digest::consts::U16;
use blake2::digest::{KeyInit, Mac};
use zeroize::{Zeroize, Zeroizing};

use crate::channel::replay::{Fresh, Window};
use crate::channel::wire::{
    self, CONTROL_LANE, DATA_HEADER_LEN, Data, Flags, INITIATION_LEN, INITIATION_PAYLOAD_LEN,
    Initiation, MAC_LEN, Message, RESPONSE_LEN, RESPONSE_PAYLOAD_LEN, Response, TAG_LEN,
};
use crate::model::drops::DropReason;
use crate::model::peer::{PeerId, Role};

mod noise;
pub(crate) use noise::{Initiating, Responding, SplitKeys};

/// Length of every secret here: PSK, split keys, AEAD keys.
pub const KEY_LEN: usize = 32;

/// Most datagrams sealed under one AES-256-GCM key before a new session is asked for. At 1,400 bytes
/// that is 2^34.5 blocks, which leaves an attacker an advantage of about 2^-60 over a random function
/// (Luykx and Paterson, "Limits on authenticated encryption use in TLS", 2017).
const REKEY_AFTER_AES: u64 = 1 << 28;
/// The same for the others, where only the counter's width matters: WireGuard's number.
const REKEY_AFTER_OTHERS: u64 = 1 << 60;
/// Sixteen times [`REKEY_AFTER_AES`]: more than 20 million datagrams a second for the life of a session.
const REJECT_AFTER_AES: u64 = 1 << 32;
/// Leaves room above, so that no number of lanes that run into the limit can make the counter wrap.
const REJECT_AFTER_OTHERS: u64 = 1 << 62;
/// Added to a lane's counter when its session has ended: every reservation fails from then on.
const RETIRED: u64 = 1 << 63;

/// The secret that two daemons share: 32 bytes, as `wg genpsk` prints them.
#[derive(Clone)]
pub struct Psk(Zeroizing<[u8; KEY_LEN]>);

impl Psk {
    /// Makes a new secret.
    ///
    /// # Errors
    /// [`NoEntropy`] if the system has no randomness to give.
    pub fn generate(entropy: &Entropy) -> Result<Self, NoEntropy> {
        let mut bytes = Zeroizing::new([0; KEY_LEN]);
        entropy.fill(bytes.as_mut_slice())?;
        Ok(Self(bytes))
    }

    /// The base64 form that the other side is given. It is the secret itself.
    pub fn to_base64(&self) -> Zeroizing<String> {
        Zeroizing::new(STANDARD.encode(self.0.as_slice()))
    }
}

impl fmt::Debug for Psk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Psk(..)")
    }
}

/// Why a text is not a [`Psk`]. The text itself is never repeated.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PskError {
    /// Not 44 characters, the base64 form of 32 bytes.
    #[error(
        "the key has {0} characters where 44 are expected (32 bytes in base64); make one with `ipmoved genpsk`"
    )]
    Length(usize),
    /// Not base64.
    #[error("the key is not base64; make one with `ipmoved genpsk`")]
    Base64,
    /// The key is zero, which is what a file that was never filled in decodes to.
    #[error("the key is all zeros; make one with `ipmoved genpsk`")]
    Zero,
}

impl FromStr for Psk {
    type Err = PskError;

    fn from_str(text: &str) -> Result<Self, PskError> {
        /// 32 bytes, and no more than base64 rounds up to.
        const TEXT_LEN: usize = 44;
        let text = text.trim();
        if text.len() != TEXT_LEN {
            return Err(PskError::Length(text.chars().count()));
        }
        let mut buffer = Zeroizing::new([0; TEXT_LEN / 4 * 3]);
        let length = STANDARD
            .decode_slice(text, buffer.as_mut_slice())
            .map_err(|_| PskError::Base64)?;
        let mut bytes = Zeroizing::new([0; KEY_LEN]);
        if length != KEY_LEN {
            return Err(PskError::Base64);
        }
        bytes.copy_from_slice(&buffer[..KEY_LEN]);
        if bytes.iter().all(|&byte| byte == 0) {
            return Err(PskError::Zero);
        }
        Ok(Self(bytes))
    }
}

/// What one peer's PSK is used as: it is needed no longer once these exist.
#[derive(Clone)]
pub struct PeerKeys {
    mac: Zeroizing<[u8; KEY_LEN]>,
    noise: Zeroizing<[u8; KEY_LEN]>,
}

impl PeerKeys {
    /// Derives the keys of a peer.
    pub fn derive(psk: &Psk) -> Self {
        Self {
            mac: derive(psk.0.as_slice(), b"ipmoved v1 psk", &[b"mac"]),
            noise: derive(psk.0.as_slice(), b"ipmoved v1 psk", &[b"noise"]),
        }
    }

    fn mac_of(&self, message: &[u8]) -> [u8; MAC_LEN] {
        mac(&self.mac, message).finalize().into_bytes().into()
    }
}

impl PartialEq for PeerKeys {
    /// In constant time. Each half follows from the same secret, so one of them tells.
    fn eq(&self, other: &Self) -> bool {
        aws_lc_rs::constant_time::verify_slices_are_equal(&*self.mac, &*other.mac).is_ok()
    }
}

impl fmt::Debug for PeerKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PeerKeys(..)")
    }
}

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

/// How a session's datagrams are sealed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Cipher {
    /// AES-256-GCM: three times as fast where the processor has instructions for it.
    Aes256Gcm,
    /// ChaCha20-Poly1305.
    ChaCha20Poly1305,
    /// AEGIS-256X4 (draft-irtf-cfrg-aegis-aead), three times as fast again where the processor has
    /// instructions for AES on long vectors. Not a standard yet, so only for those who ask for it.
    Aegis256X4,
}

impl Cipher {
    /// All there are.
    const ALL: [Self; 3] = [Self::Aes256Gcm, Self::ChaCha20Poly1305, Self::Aegis256X4];

    /// The name as on the command line and in `status`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Aes256Gcm => "aes-256-gcm",
            Self::ChaCha20Poly1305 => "chacha20-poly1305",
            Self::Aegis256X4 => "aegis-256x4",
        }
    }

    /// Messages on one lane after which a new session is wanted.
    pub(crate) fn rekey_after(self) -> u64 {
        match self {
            Self::Aes256Gcm => REKEY_AFTER_AES,
            Self::ChaCha20Poly1305 | Self::Aegis256X4 => REKEY_AFTER_OTHERS,
        }
    }

    fn reject_after(self) -> u64 {
        match self {
            Self::Aes256Gcm => REJECT_AFTER_AES,
            Self::ChaCha20Poly1305 | Self::Aegis256X4 => REJECT_AFTER_OTHERS,
        }
    }

    /// The byte on the wire; also its bit in an offer.
    fn byte(self) -> u8 {
        match self {
            Self::Aes256Gcm => 1,
            Self::ChaCha20Poly1305 => 2,
            Self::Aegis256X4 => 4,
        }
    }

    fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|cipher| cipher.byte() == byte)
    }
}

impl fmt::Display for Cipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Which ciphers this side allows (`--cipher`).
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum CipherPolicy {
    /// Any, but of themselves two sides choose between the standard ones, the faster for both machines.
    #[default]
    Auto,
    /// This one or no session.
    Only(Cipher),
}

/// Not one of `auto`, `aes-256-gcm`, `chacha20-poly1305`, `aegis-256x4`.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("`{0}` is not a cipher; write auto, aes-256-gcm, chacha20-poly1305 or aegis-256x4")]
pub struct CipherError(String);

impl FromStr for CipherPolicy {
    type Err = CipherError;

    fn from_str(text: &str) -> Result<Self, CipherError> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        let named = Cipher::ALL.into_iter().find(|cipher| cipher.name() == text);
        named
            .map(Self::Only)
            .ok_or_else(|| CipherError(text.into()))
    }
}

impl<'de> serde::Deserialize<'de> for CipherPolicy {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

impl fmt::Display for CipherPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Only(cipher) => cipher.name(),
        })
    }
}

/// What one side says of its ciphers inside the handshake.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Offer {
    /// What it allows.
    pub ciphers: Ciphers,
    /// Whether its processor has instructions for AES and GCM.
    pub aes_hardware: bool,
}

/// A set of ciphers, none of them unknown.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ciphers(u8);

impl Ciphers {
    fn has(self, cipher: Cipher) -> bool {
        self.0 & cipher.byte() != 0
    }

    fn all() -> Self {
        Self(
            Cipher::ALL
                .iter()
                .fold(0, |all, cipher| all | cipher.byte()),
        )
    }
}

impl From<CipherPolicy> for Ciphers {
    fn from(policy: CipherPolicy) -> Self {
        match policy {
            CipherPolicy::Auto => Self::all(),
            CipherPolicy::Only(cipher) => Self(cipher.byte()),
        }
    }
}

impl fmt::Display for Ciphers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == 0 {
            return f.write_str("what this version does not know");
        }
        let allowed = Cipher::ALL.into_iter().filter(|&cipher| self.has(cipher));
        for (index, cipher) in allowed.enumerate() {
            let comma = if index > 0 { ", " } else { "" };
            write!(f, "{comma}{cipher}")?;
        }
        Ok(())
    }
}

impl Offer {
    /// The offer of a daemon on this processor.
    pub fn of_this_machine(policy: CipherPolicy) -> Self {
        Self {
            ciphers: policy.into(),
            aes_hardware: has_aes_hardware(),
        }
    }

    /// The cipher of a session between two sides: AES-GCM where both have it in hardware, otherwise
    /// ChaCha20, otherwise what one side insists on and the other allows.
    pub fn agree(self, other: Self) -> Option<Cipher> {
        use Cipher::{Aegis256X4, Aes256Gcm, ChaCha20Poly1305};
        let both = |cipher| self.ciphers.has(cipher) && other.ciphers.has(cipher);
        let order = if self.aes_hardware && other.aes_hardware {
            [Aes256Gcm, ChaCha20Poly1305, Aegis256X4]
        } else {
            [ChaCha20Poly1305, Aes256Gcm, Aegis256X4]
        };
        order.into_iter().find(|&cipher| both(cipher))
    }

    fn bytes(self) -> [u8; 2] {
        [self.ciphers.0, u8::from(self.aes_hardware)]
    }

    /// Bits that this version does not know are ciphers it cannot choose: they are passed over. With no
    /// others there is none in common, which the peer has to be told.
    fn from_bytes([allowed, hardware]: [u8; 2]) -> Option<Self> {
        (allowed != 0).then_some(Self {
            ciphers: Ciphers(allowed & Ciphers::all().0),
            aes_hardware: hardware & 1 == 1,
        })
    }
}

fn has_aes_hardware() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("aes")
        && std::arch::is_x86_feature_detected!("pclmulqdq");
    #[cfg(target_arch = "aarch64")]
    return std::arch::is_aarch64_feature_detected!("aes");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    return false;
}

/// What the initiator says inside its first message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Hello {
    /// Nanoseconds since 1970, but always above the last: tells a fresh initiation from a replayed one.
    pub(crate) timestamp: u64,
    /// The highest timestamp accepted from the peer, 0 if none.
    pub(crate) seen: u64,
    /// Drawn when the daemon started: tells that it was restarted.
    pub(crate) boot: u64,
    /// Its ciphers.
    pub(crate) offer: Offer,
    /// On how many data lanes it will send.
    pub(crate) lanes: u8,
}

impl Hello {
    fn encode(&self) -> [u8; INITIATION_PAYLOAD_LEN] {
        let mut bytes = [0; INITIATION_PAYLOAD_LEN];
        bytes[..8].copy_from_slice(&self.timestamp.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.seen.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.boot.to_le_bytes());
        bytes[24..26].copy_from_slice(&self.offer.bytes());
        bytes[26] = self.lanes;
        bytes
    }

    pub(crate) fn decode(bytes: &[u8; INITIATION_PAYLOAD_LEN]) -> Option<Self> {
        let lanes = bytes[26];
        (lanes > 0).then_some(Self {
            timestamp: u64_at(bytes, 0),
            seen: u64_at(bytes, 8),
            boot: u64_at(bytes, 16),
            offer: Offer::from_bytes([bytes[24], bytes[25]])?,
            lanes,
        })
    }
}

/// What the responder says inside its answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Answer {
    /// Drawn when the daemon started.
    pub(crate) boot: u64,
    /// The cipher it chose; `None` refuses, for want of a common one.
    pub(crate) cipher: Option<Cipher>,
    /// Its ciphers.
    pub(crate) offer: Offer,
    /// On how many data lanes it will send.
    pub(crate) lanes: u8,
}

impl Answer {
    fn encode(&self) -> [u8; RESPONSE_PAYLOAD_LEN] {
        let mut bytes = [0; RESPONSE_PAYLOAD_LEN];
        bytes[..8].copy_from_slice(&self.boot.to_le_bytes());
        bytes[8] = self.cipher.map_or(0, Cipher::byte);
        bytes[9..11].copy_from_slice(&self.offer.bytes());
        bytes[11] = self.lanes;
        bytes
    }

    fn decode(bytes: &[u8; RESPONSE_PAYLOAD_LEN]) -> Option<Self> {
        let cipher = match bytes[8] {
            0 => None,
            byte => Some(Cipher::from_byte(byte)?),
        };
        let lanes = bytes[11];
        (lanes > 0).then_some(Self {
            boot: u64_at(bytes, 0),
            cipher,
            offer: Offer::from_bytes([bytes[9], bytes[10]])?,
            lanes,
        })
    }
}

fn u64_at<const N: usize>(bytes: &[u8; N], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

/// When something was last heard from a peer and sent to it, on whatever session and lane.
///
/// Lanes write it once a batch; the tunnel's timers read it. Microseconds since an epoch, so that a
/// time fits an atomic: whether an answer came after its question is asked of peers that are a tenth of
/// a millisecond away.
#[derive(Debug)]
pub struct Activity {
    epoch: Instant,
    heard: AtomicU64,
    sent: AtomicU64,
    spoke: AtomicU64,
}

impl Activity {
    /// Pause between two writes of the lanes, in microseconds: they share the cell, and no timer is finer.
    const WRITE_PAUSE: u64 = 1_000;

    /// Starts a record at `epoch`: nothing heard, nothing sent.
    pub fn new(epoch: Instant) -> Self {
        Self {
            epoch,
            heard: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            spoke: AtomicU64::new(0),
        }
    }

    /// An authenticated datagram came in. Known to the millisecond while there are many.
    pub fn heard(&self, now: Instant) {
        self.raise(&self.heard, now);
    }

    /// A handshake or control message came in, of which there are few. Known exactly.
    pub fn answered(&self, now: Instant) {
        self.heard.fetch_max(self.micros(now), Relaxed);
    }

    /// A packet went out.
    pub fn sent(&self, now: Instant) {
        self.raise(&self.sent, now);
    }

    /// A control message went out.
    pub fn spoke(&self, now: Instant) {
        self.raise(&self.spoke, now);
    }

    /// When a datagram last came in; `None` if none did.
    pub fn last_heard(&self) -> Option<Instant> {
        self.read(&self.heard)
    }

    /// When a datagram last went out; `None` if none did.
    pub fn last_sent(&self) -> Option<Instant> {
        self.last_carried().max(self.read(&self.spoke))
    }

    /// When a packet last went out; `None` if none did.
    pub fn last_carried(&self) -> Option<Instant> {
        self.read(&self.sent)
    }

    fn raise(&self, cell: &AtomicU64, now: Instant) {
        let (micros, known) = (self.micros(now), cell.load(Relaxed));
        if known == 0 || known + Self::WRITE_PAUSE <= micros {
            cell.fetch_max(micros, Relaxed);
        }
    }

    /// One above, so that 0 can mean never.
    fn micros(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.epoch).as_micros() as u64 + 1
    }

    fn read(&self, cell: &AtomicU64) -> Option<Instant> {
        let micros = cell.load(Relaxed).checked_sub(1)?;
        self.epoch
            .checked_add(std::time::Duration::from_micros(micros))
    }
}

/// Everything a [`Session`] is made of.
pub(crate) struct SessionSpec {
    pub(crate) index: SessionIndex,
    pub(crate) remote: u32,
    pub(crate) cipher: Cipher,
    pub(crate) keys: SplitKeys,
    pub(crate) initiator: Role,
    pub(crate) own_role: Role,
    pub(crate) own_lanes: u8,
    pub(crate) peer_lanes: u8,
    pub(crate) peer: PeerId,
    pub(crate) created: Instant,
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
    /// Data lanes in order, then the control lane.
    sealers: Box<[Sealer]>,
    openers: Box<[Opener]>,
    heard: AtomicBool,
    retired: AtomicBool,
    activity: Arc<Activity>,
}

impl Session {
    /// `None` if the keys are refused, which lengths that are fixed here make impossible.
    pub(crate) fn new(spec: SessionSpec) -> Option<Arc<Self>> {
        let (tx, rx) = if spec.initiator == spec.own_role {
            (&spec.keys.initiator, &spec.keys.responder)
        } else {
            (&spec.keys.responder, &spec.keys.initiator)
        };
        let lanes = |count: u8| (0..count).chain([CONTROL_LANE]);
        let key = |split: &[u8; KEY_LEN], lane: u8| {
            let key = derive(split, b"ipmoved v1 lane", &[&[spec.cipher.byte()], &[lane]]);
            Key::new(spec.cipher, key)
        };
        let sealers = lanes(spec.own_lanes).map(|lane| {
            Some(Sealer {
                key: key(tx, lane)?,
                lane,
                remote: spec.remote,
                limit: spec.cipher.reject_after(),
                next: AtomicU64::new(0),
            })
        });
        let openers = lanes(spec.peer_lanes).map(|lane| {
            Some(Opener {
                key: key(rx, lane)?,
                window: Mutex::default(),
            })
        });
        Some(Arc::new(Self {
            sealers: sealers.collect::<Option<_>>()?,
            openers: openers.collect::<Option<_>>()?,
            index: spec.index,
            remote: spec.remote,
            peer: spec.peer,
            cipher: spec.cipher,
            initiator: spec.initiator,
            own_role: spec.own_role,
            created: spec.created,
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

    /// Most datagrams sealed on one of its lanes.
    pub fn messages(&self) -> u64 {
        self.sealers
            .iter()
            .map(|sealer| sealer.next.load(Relaxed) & !RETIRED)
            .max()
            .unwrap_or(0)
    }

    /// Ends the session: nothing is sealed or opened on it any more, even by a lane that still holds it.
    /// The keys are wiped when the last holder lets go.
    pub(crate) fn retire(&self) {
        self.retired.store(true, Relaxed);
        for sealer in &self.sealers {
            sealer.next.fetch_or(RETIRED, Relaxed);
        }
    }

    /// The sealer of one of this side's lanes, or of [`CONTROL_LANE`]; `None` if there is no such lane.
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

    /// Opens a batch of datagrams, taking the lock of a lane's window once as long as they come from
    /// one lane.
    pub fn open_batch(&self) -> OpenBatch<'_> {
        OpenBatch {
            session: self,
            window: None,
        }
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

/// The control lane is kept behind the data lanes.
fn at_lane<T>(lanes: &[T], lane: u8) -> Option<&T> {
    let (control, data) = lanes.split_last()?;
    if lane == CONTROL_LANE {
        return Some(control);
    }
    data.get(usize::from(lane))
}

/// Seals what one lane sends. Aligned so that the counters of two lanes never share a cache line, nor
/// the pair of lines that x86 fetches together.
#[repr(align(128))]
pub struct Sealer {
    key: Key,
    lane: u8,
    remote: u32,
    limit: u64,
    next: AtomicU64,
}

/// The right to seal one datagram. It cannot be copied, so no nonce is used twice.
#[derive(Debug)]
pub struct Counter(u64);

/// Consecutive counters of one lane.
#[derive(Debug)]
pub struct Reserved(Range<u64>);

impl Iterator for Reserved {
    type Item = Counter;

    fn next(&mut self) -> Option<Counter> {
        self.0.next().map(Counter)
    }
}

/// A datagram that could not be sealed: its buffer has no room for header and tag. It must not be sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("no room for header and tag")]
pub struct NotSealed;

impl Sealer {
    /// Reserves `count` consecutive counters; `None` once the key is used up or the session has ended.
    ///
    /// Two threads that share a lane never get the same one.
    pub fn reserve(&self, count: u32) -> Option<Reserved> {
        let first = self.next.fetch_add(u64::from(count), Relaxed);
        let end = first + u64::from(count);
        (end <= self.limit).then_some(Reserved(first..end))
    }

    /// Seals in place: `datagram` holds 16 bytes for the header, the plaintext, 16 bytes for the tag.
    ///
    /// # Errors
    /// [`NotSealed`] if it is too short for that.
    pub fn seal(
        &self,
        counter: Counter,
        flags: Flags,
        datagram: &mut [u8],
    ) -> Result<(), NotSealed> {
        let (header, body) = datagram
            .split_first_chunk_mut::<DATA_HEADER_LEN>()
            .ok_or(NotSealed)?;
        let (plaintext, tag) = body.split_last_chunk_mut::<TAG_LEN>().ok_or(NotSealed)?;
        let nonce = counter.0;
        *header = self.header(counter, flags);
        *tag = self.key.seal(nonce, header, plaintext).ok_or(NotSealed)?;
        Ok(())
    }

    fn header(&self, counter: Counter, flags: Flags) -> [u8; DATA_HEADER_LEN] {
        Data {
            flags,
            lane: self.lane,
            receiver: self.remote,
            counter: counter.0,
        }
        .encode()
    }
}

impl fmt::Debug for Sealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sealer")
            .field("lane", &self.lane)
            .field("next", &self.next)
            .finish_non_exhaustive()
    }
}

/// Opens what one lane of the peer sent.
#[repr(align(128))]
struct Opener {
    key: Key,
    window: Mutex<Window>,
}

/// A datagram that was opened.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Opened {
    /// What the plaintext is.
    pub flags: Flags,
    /// The peer's lane.
    pub lane: u8,
    /// The peer's counter on that lane.
    pub counter: u64,
    /// Where the plaintext lies in the datagram.
    pub plaintext: Range<usize>,
    /// It is the newest of its lane: its source is where the peer is now.
    pub newest: bool,
    /// It is the first on its session: the tunnel has to be told.
    pub first: bool,
}

/// Opens datagrams of one session. Keep it no longer than a batch: it may hold a lane's window.
#[derive(Debug)]
pub struct OpenBatch<'a> {
    session: &'a Session,
    window: Option<(u8, MutexGuard<'a, Window>)>,
}

impl OpenBatch<'_> {
    /// Opens `datagram`, whose header `data` was read from it, in place.
    ///
    /// # Errors
    /// [`DropReason::SessionUnknown`] if it is for another session, [`DropReason::SessionExpired`] after
    /// the session's end, [`DropReason::OpenAuth`] if it was not made by the peer,
    /// [`DropReason::Replay`] if it was seen before or is too old to tell.
    pub fn open(&mut self, data: Data, datagram: &mut [u8]) -> Result<Opened, DropReason> {
        let session = self.session;
        if data.receiver != session.index() {
            return Err(DropReason::SessionUnknown);
        }
        if session.retired.load(Relaxed) {
            return Err(DropReason::SessionExpired);
        }
        // A lane that the peer did not announce has no key: forging one costs no derivation.
        let opener = at_lane(&session.openers, data.lane).ok_or(DropReason::OpenAuth)?;
        let (header, body) = datagram
            .split_first_chunk_mut::<DATA_HEADER_LEN>()
            .ok_or(DropReason::WireMalformed)?;
        let length = opener
            .key
            .open(data.counter, header, body)
            .ok_or(DropReason::OpenAuth)?;
        let fresh = self
            .window_of(data.lane, opener)
            .accept(data.counter)
            .ok_or(DropReason::Replay)?;
        let first = !session.heard.load(Relaxed) && !session.heard.swap(true, Relaxed);
        Ok(Opened {
            flags: data.flags,
            lane: data.lane,
            counter: data.counter,
            plaintext: DATA_HEADER_LEN..DATA_HEADER_LEN + length,
            newest: fresh == Fresh::Newest,
            first,
        })
    }
}

impl<'a> OpenBatch<'a> {
    fn window_of(&mut self, lane: u8, opener: &'a Opener) -> &mut Window {
        // Let go before the next is taken: two threads can then never wait for each other.
        if self.window.as_ref().is_some_and(|(held, _)| *held != lane) {
            self.window = None;
        }
        let (_, window) = self.window.get_or_insert_with(|| {
            let window = opener.window.lock().unwrap_or_else(PoisonError::into_inner);
            (lane, window)
        });
        window
    }
}

impl fmt::Debug for Opener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Opener(..)")
    }
}

/// The key of one lane and direction.
enum Key {
    /// Wiped by AWS-LC.
    AwsLc(LessSafeKey),
    /// As it is: the cipher sets itself up anew for each datagram, which takes it some nanoseconds. Where it
    /// stays, so that moving the lane leaves no copy behind.
    Aegis(Box<Zeroizing<[u8; KEY_LEN]>>),
}

impl Key {
    fn new(cipher: Cipher, key: Zeroizing<[u8; KEY_LEN]>) -> Option<Self> {
        let algorithm = match cipher {
            Cipher::Aes256Gcm => &AES_256_GCM,
            Cipher::ChaCha20Poly1305 => &CHACHA20_POLY1305,
            Cipher::Aegis256X4 => {
                // Copied, not moved: what is moved from is not wiped.
                let mut kept = Box::new(Zeroizing::new([0; KEY_LEN]));
                kept.copy_from_slice(key.as_slice());
                return Some(Self::Aegis(kept));
            }
        };
        let unbound = UnboundKey::new(algorithm, key.as_slice()).ok()?;
        Some(Self::AwsLc(LessSafeKey::new(unbound)))
    }

    /// Encrypts `text`; gives the tag of it and of `header`. It fails for no length there is.
    fn seal(
        &self,
        counter: u64,
        header: &[u8; DATA_HEADER_LEN],
        text: &mut [u8],
    ) -> Option<[u8; TAG_LEN]> {
        match self {
            Self::AwsLc(key) => {
                let nonce = Nonce::assume_unique_for_key(nonce(counter));
                let tag = key.seal_in_place_separate_tag(nonce, Aad::from(header), text);
                tag.ok()?.as_ref().try_into().ok()
            }
            Self::Aegis(key) => {
                let tag = aegis_seal(key, counter, header, text);
                wipe_stack();
                Some(tag)
            }
        }
    }

    /// Decrypts `text` before the tag at its end, if that is the tag of it and of `header`; its length.
    fn open(&self, counter: u64, header: &[u8; DATA_HEADER_LEN], text: &mut [u8]) -> Option<usize> {
        match self {
            Self::AwsLc(key) => {
                let nonce = Nonce::assume_unique_for_key(nonce(counter));
                let opened = key.open_in_place(nonce, Aad::from(header), text);
                opened.ok().map(|opened| opened.len())
            }
            Self::Aegis(key) => {
                let (text, tag) = text.split_last_chunk_mut::<TAG_LEN>()?;
                let opened = aegis_open(key, counter, header, text, tag);
                wipe_stack();
                opened.then_some(text.len())
            }
        }
    }
}

/// In a frame of its own: the library copies the key there, and [`wipe_stack`] comes after it.
#[inline(never)]
fn aegis_seal(
    key: &[u8; KEY_LEN],
    counter: u64,
    header: &[u8; DATA_HEADER_LEN],
    text: &mut [u8],
) -> [u8; TAG_LEN] {
    Aegis256X4::<TAG_LEN>::new(key, &nonce(counter)).encrypt_in_place(text, header)
}

/// See [`aegis_seal`].
#[inline(never)]
fn aegis_open(
    key: &[u8; KEY_LEN],
    counter: u64,
    header: &[u8; DATA_HEADER_LEN],
    text: &mut [u8],
    tag: &[u8; TAG_LEN],
) -> bool {
    let aegis = Aegis256X4::<TAG_LEN>::new(key, &nonce(counter));
    aegis.decrypt_in_place(text, tag, header).is_ok()
}

/// Overwrites the stack where the frame of the last call was: more than key, nonce and what is saved take
/// there twice.
#[inline(never)]
fn wipe_stack() {
    let mut frame = [0u64; 48];
    frame.zeroize();
}

/// The counter in the last eight bytes, as WireGuard has it, zeros before it.
fn nonce<const N: usize>(counter: u64) -> [u8; N] {
    let mut bytes = [0; N];
    bytes[N - 8..].copy_from_slice(&counter.to_le_bytes());
    bytes
}

/// HKDF-SHA256 (RFC 5869) to one key.
fn derive(secret: &[u8], salt: &[u8], info: &[&[u8]]) -> Zeroizing<[u8; KEY_LEN]> {
    let mut key = Zeroizing::new([0; KEY_LEN]);
    let filled = hkdf::Salt::new(hkdf::HKDF_SHA256, salt)
        .extract(secret)
        .expand(info, hkdf::HKDF_SHA256)
        .and_then(|okm| okm.fill(key.as_mut_slice()));
    // Fails only for lengths that HKDF cannot give; 32 bytes is one block.
    assert!(filled.is_ok(), "HKDF-SHA256 gives 32 bytes");
    key
}

fn mac(key: &[u8; KEY_LEN], message: &[u8]) -> Blake2sMac<U16> {
    let mut mac = <Blake2sMac<U16> as KeyInit>::new(key.into());
    mac.update(message);
    mac
}

/// The session indexes that are in use, over all peers of a daemon.
#[derive(Clone, Default, Debug)]
pub struct SessionIndexes(Arc<Mutex<HashSet<u32>>>);

impl SessionIndexes {
    /// Draws an index that is not in use. It is free again when the returned value is dropped.
    pub(crate) fn draw(&self, entropy: &Entropy) -> Result<SessionIndex, NoEntropy> {
        let mut used = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let mut bytes = [0; 4];
            entropy.fill(&mut bytes)?;
            let value = u32::from_le_bytes(bytes);
            if used.insert(value) {
                return Ok(SessionIndex {
                    value,
                    used: self.clone(),
                });
            }
        }
    }

    /// How many are in use.
    pub fn len(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Whether none is in use.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A drawn index.
#[derive(Debug)]
pub(crate) struct SessionIndex {
    pub(crate) value: u32,
    used: SessionIndexes,
}

impl Drop for SessionIndex {
    fn drop(&mut self) {
        self.used
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&self.value);
    }
}

/// Where random bytes come from: the system, or in tests a source that gives the same ones each run.
#[derive(Clone)]
pub struct Entropy(Source);

#[derive(Clone)]
enum Source {
    System,
    #[cfg(test)]
    Test(TestSource),
}

#[cfg(test)]
type TestSource = Arc<Mutex<dyn FnMut(&mut [u8]) + Send>>;

/// The system had no randomness to give.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the system's random number generator failed")]
pub struct NoEntropy;

impl Entropy {
    /// The system's random number generator.
    pub fn system() -> Self {
        Self(Source::System)
    }

    /// Fills `bytes`.
    ///
    /// # Errors
    /// [`NoEntropy`] if the source failed.
    pub fn fill(&self, bytes: &mut [u8]) -> Result<(), NoEntropy> {
        match &self.0 {
            Source::System => aws_lc_rs::rand::fill(bytes).map_err(|_| NoEntropy),
            #[cfg(test)]
            Source::Test(source) => {
                (source.lock().unwrap())(bytes);
                Ok(())
            }
        }
    }

    pub(crate) fn u64(&self) -> Result<u64, NoEntropy> {
        let mut bytes = [0; 8];
        self.fill(&mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    #[cfg(test)]
    pub(crate) fn of(source: impl FnMut(&mut [u8]) + Send + 'static) -> Self {
        Self(Source::Test(Arc::new(Mutex::new(source))))
    }

    /// SplitMix64 (Steele, Lea, Flood, 2014).
    #[cfg(test)]
    pub(crate) fn seeded(mut state: u64) -> Self {
        Self::of(move |bytes| {
            for chunk in bytes.chunks_mut(8) {
                state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
                let mut z = state;
                z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
                let word = (z ^ (z >> 31)).to_le_bytes();
                chunk.copy_from_slice(&word[..chunk.len()]);
            }
        })
    }
}

impl fmt::Debug for Entropy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Entropy(..)")
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::channel::wire::DATA_OVERHEAD;
    use proptest::prelude::*;

    pub(crate) fn mac_of(keys: &PeerKeys, message: &[u8]) -> [u8; MAC_LEN] {
        keys.mac_of(message)
    }

    /// Two ends of one session, without a handshake.
    fn ends(cipher: Cipher, lanes: u8) -> [Arc<Session>; 2] {
        #[expect(clippy::disallowed_methods, reason = "only as a stamp")]
        let now = Instant::now();
        let end = |own_role: Role, index: u32, remote: u32| {
            let entropy = Entropy::of(move |bytes| bytes.copy_from_slice(&index.to_le_bytes()));
            Session::new(SessionSpec {
                index: SessionIndexes::default().draw(&entropy).unwrap(),
                remote,
                cipher,
                keys: SplitKeys {
                    initiator: Zeroizing::new([1; 32]),
                    responder: Zeroizing::new([2; 32]),
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

    fn sealed(session: &Session, lane: u8, plaintext: &[u8]) -> Vec<u8> {
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
    fn what_was_heard_is_known_to_the_millisecond_and_answers_exactly() {
        #[expect(clippy::disallowed_methods, reason = "only as a beginning")]
        let epoch = Instant::now();
        let activity = Activity::new(epoch);
        let at = |micros| epoch + std::time::Duration::from_micros(micros);
        assert_eq!(activity.last_heard(), None);
        activity.heard(at(300));
        assert_eq!(activity.last_heard(), Some(at(300)), "the first");
        activity.heard(at(1_299));
        assert_eq!(activity.last_heard(), Some(at(300)), "within the pause");
        activity.heard(at(1_300));
        assert_eq!(activity.last_heard(), Some(at(1_300)));
        activity.answered(at(1_400));
        assert_eq!(activity.last_heard(), Some(at(1_400)));
        activity.answered(at(1_350));
        assert_eq!(
            activity.last_heard(),
            Some(at(1_400)),
            "a later one was first"
        );
        assert_eq!(
            (activity.last_carried(), activity.last_sent()),
            (None, None)
        );
        activity.spoke(at(0));
        assert_eq!(activity.last_sent(), Some(at(0)));
    }

    #[test]
    fn a_psk_is_32_bytes_in_base64_and_never_printed() {
        let text = "AQIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyA=";
        let psk: Psk = format!("{text}\n").parse().unwrap();
        assert_eq!(psk.to_base64().as_str(), text);
        assert_eq!(format!("{psk:?}"), "Psk(..)");
        assert_eq!(format!("{:?}", PeerKeys::derive(&psk)), "PeerKeys(..)");
        let refused = |text: &str| text.parse::<Psk>().unwrap_err();
        assert_eq!(refused(""), PskError::Length(0));
        assert_eq!(refused(&text[..43]), PskError::Length(43));
        assert_eq!(refused(&text.replace('A', "?")), PskError::Base64);
        assert_eq!(refused(&"A".repeat(44)), PskError::Base64, "33 bytes");
        let zero = format!("{}=", "A".repeat(43));
        assert_eq!(refused(&zero), PskError::Zero);
        let made = Psk::generate(&Entropy::system()).unwrap();
        let again: Psk = made.to_base64().parse().unwrap();
        assert_eq!(*again.0, *made.0);
        assert_ne!(*made.0, *Psk::generate(&Entropy::system()).unwrap().0);
    }

    /// Computed with an independent implementation (Python's hmac and hashlib) from the text of
    /// contrib/protocol.md.
    #[test]
    fn derived_keys_are_those_of_the_protocol_text() {
        let psk: Psk = "AQIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyA="
            .parse()
            .unwrap();
        let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
        let keys = PeerKeys::derive(&psk);
        assert_eq!(hex(keys.mac.as_slice()), MAC_KEY);
        assert_eq!(hex(keys.noise.as_slice()), NOISE_KEY);
        assert_eq!(hex(&keys.mac_of(b"ipmoved")), MAC);
        let lane = derive(&[1; 32], b"ipmoved v1 lane", &[&[1], &[0]]);
        assert_eq!(hex(lane.as_slice()), LANE_KEY);
    }

    /// The draft's test vectors of AEGIS-256X4: earlier drafts defined another cipher by this name. The
    /// ciphertext of the second is that of 05060708, not of the 04050607 that it prints.
    #[test]
    fn aegis_is_that_of_the_draft() {
        let key: [u8; 32] = std::array::from_fn(|at| at as u8);
        let nonce: [u8; 32] = std::array::from_fn(|at| at as u8 + 16);
        let aegis = || Aegis256X4::<TAG_LEN>::new(&key, &nonce);
        let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
        let tag = aegis().encrypt_in_place(&mut [], &[]);
        assert_eq!(hex(&tag), "3b7fee6cee7bf17888ad11ed2397beb4");
        let mut text: [u8; 120] = std::array::from_fn(|at| at as u8 % 4 + 5);
        let tag = aegis().encrypt_in_place(&mut text, &[1, 2, 3, 4, 1, 2, 3, 4]);
        assert_eq!(hex(&text), AEGIS_TEXT);
        assert_eq!(hex(&tag), "ec44b512d713f745547be345bcc66b6c");
    }

    const AEGIS_TEXT: &str = "bec109547f8316d598b3b7d947ad4c0ef5b98e217cffa0d858ad49ae34109a95\
        abc5b5fada820c4d6ae2fca0f5e2444e52a04a1edb7bec71408de3e199500521\
        94506be3ba6a4de51a15a577ea0e4c14f7539a13e751a555f48d0f49fecffb22\
        0525e60d381e2efa803b09b7164ba59fdc66656affd51e06";

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
            // A lane that was not announced, forged from one that was.
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
    fn nonces_do_not_repeat_over_threads_and_end_at_the_limit() {
        let [old, _] = ends(Cipher::Aes256Gcm, 1);
        let sealer = old.sealer(0).unwrap();
        let counters = std::thread::scope(|scope| {
            let take = || {
                let reserve = |n: u32| sealer.reserve(n % 5 + 1).unwrap().map(|counter| counter.0);
                (0..1_000).flat_map(reserve).collect::<Vec<_>>()
            };
            let threads = [scope.spawn(take), scope.spawn(take)];
            threads.map(|thread| thread.join().unwrap()).concat()
        });
        let unique = counters.iter().collect::<HashSet<_>>();
        assert_eq!((unique.len(), counters.len()), (6_000, 6_000));
        sealer.next.store(REJECT_AFTER_AES - 2, Relaxed);
        assert!(sealer.reserve(2).is_some());
        assert!(sealer.reserve(1).is_none());
        assert!(sealer.reserve(1).is_none());
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

    #[test]
    fn what_has_no_room_is_not_sealed() {
        let [old, _] = ends(Cipher::Aes256Gcm, 1);
        let sealer = old.sealer(0).unwrap();
        let mut counters = sealer.reserve(100).unwrap();
        for length in 0..DATA_OVERHEAD {
            let counter = counters.next().unwrap();
            assert_eq!(
                sealer.seal(counter, Flags::NONE, &mut vec![0; length]),
                Err(NotSealed)
            );
        }
    }

    #[test]
    fn indexes_are_unique_while_in_use() {
        let indexes = SessionIndexes::default();
        let mut draws = [5u32, 5, 5, 6].into_iter();
        let entropy = Entropy::of(move |bytes| {
            bytes.copy_from_slice(&draws.next().unwrap().to_le_bytes());
        });
        let first = indexes.draw(&entropy).unwrap();
        let second = indexes.draw(&entropy).unwrap();
        assert_eq!((first.value, second.value, indexes.len()), (5, 6, 2));
        drop(first);
        assert_eq!(indexes.len(), 1);
    }

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

    #[test]
    fn offers_survive_the_wire_and_agree_the_same_from_both_sides() {
        let only = CIPHERS.map(CipherPolicy::Only);
        let policies = [CipherPolicy::Auto, only[0], only[1], only[2]];
        for policy in policies {
            assert_eq!(policy.to_string().parse(), Ok(policy));
            for aes_hardware in [false, true] {
                let offer = Offer {
                    ciphers: policy.into(),
                    aes_hardware,
                };
                assert_eq!(Offer::from_bytes(offer.bytes()), Some(offer));
                for policy in policies {
                    let other = Offer {
                        ciphers: policy.into(),
                        aes_hardware: true,
                    };
                    assert_eq!(offer.agree(other), other.agree(offer));
                }
            }
        }
        assert_eq!(Offer::from_bytes([0, 1]), None);
        let later = Offer::from_bytes([8, 1]).unwrap();
        assert_eq!(later.ciphers.to_string(), "what this version does not know");
        assert_eq!(
            later.agree(Offer::of_this_machine(CipherPolicy::Auto)),
            None
        );
        let earlier = Offer::from_bytes([3, 1]).unwrap();
        let aegis = Offer {
            ciphers: only[2].into(),
            aes_hardware: true,
        };
        assert_eq!(
            earlier.agree(aegis),
            None,
            "a version that does not know it"
        );
        assert_eq!(
            earlier.ciphers.to_string(),
            "aes-256-gcm, chacha20-poly1305"
        );
        assert!("rot13".parse::<CipherPolicy>().is_err());
    }

    proptest! {
        #[test]
        fn payloads_survive_and_no_bytes_panic(
            bytes in proptest::array::uniform32(any::<u8>()),
            timestamp: u64, seen: u64, boot: u64, lanes in 1u8..,
        ) {
            let offer = Offer { ciphers: CipherPolicy::Auto.into(), aes_hardware: true };
            let hello = Hello { timestamp, seen, boot, offer, lanes };
            prop_assert_eq!(Hello::decode(&hello.encode()), Some(hello));
            let answer = Answer { boot, cipher: None, offer, lanes };
            prop_assert_eq!(Answer::decode(&answer.encode()), Some(answer));
            let _ = Answer::decode(&bytes);
        }

        #[test]
        fn what_is_sealed_opens_to_the_same(
            plaintext in proptest::collection::vec(any::<u8>(), 0..1600),
            cipher in proptest::sample::select(CIPHERS.to_vec()),
        ) {
            let [old, new] = ends(cipher, 1);
            prop_assert_eq!(opened(&new, &sealed(&old, 0, &plaintext)).unwrap().1, plaintext);
        }
    }

    const MAC_KEY: &str = "10e0b114f81ec6294097eadab38c22ab7a30c44f2edd1432f4b01f714b264def";
    const NOISE_KEY: &str = "f9b6fe85eae8b63780409f222066b9cde225f212057871475af43e367d076244";
    const MAC: &str = "1756ce573284abc96c3bccb87aecb4ea";
    const LANE_KEY: &str = "289f5cb0fc9baaa344a24795f241da892c5a21941f420a30038a9f9d1e39d4b5";
}
