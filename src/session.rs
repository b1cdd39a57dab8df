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
//! handshake, which snow does not wipe, by [`Wiped`] and [`resolver`]; AEAD keys by AWS-LC, whose
//! `OPENSSL_free` cleanses each allocation it gives back. Copies that the compiler left in dead stack
//! frames are out of reach, as in every program.

use std::collections::HashSet;
use std::fmt;
use std::ops::Range;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use aws_lc_rs::aead::{
    AES_256_GCM, Aad, Algorithm, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey,
};
use aws_lc_rs::hkdf;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use blake2::Blake2sMac;
use blake2::digest::consts::U16;
use blake2::digest::{KeyInit, Mac};
use zeroize::{Zeroize, Zeroizing};

use crate::drops::DropReason;
use crate::peer::{PeerId, Role};
use crate::replay::{Fresh, Window};
use crate::wire::{
    self, CONTROL_LANE, DATA_HEADER_LEN, DATA_OVERHEAD, Data, Flags, INITIATION_LEN,
    INITIATION_PAYLOAD_LEN, Initiation, MAC_LEN, Message, RESPONSE_LEN, RESPONSE_PAYLOAD_LEN,
    Response, TAG_LEN,
};

mod noise;
pub(crate) use noise::{Initiating, Responding, SplitKeys};

/// Length of every secret here: PSK, split keys, AEAD keys.
pub const KEY_LEN: usize = 32;

/// Most datagrams sealed under one AES-256-GCM key before a new session is asked for. At 1,400 bytes
/// that is 2^34.5 blocks, which leaves an attacker an advantage of about 2^-60 over a random function
/// (Luykx and Paterson, "Limits on authenticated encryption use in TLS", 2017).
const REKEY_AFTER_AES: u64 = 1 << 28;
/// The same for ChaCha20-Poly1305, where only the counter's width matters: WireGuard's number.
const REKEY_AFTER_CHACHA: u64 = 1 << 60;
/// Sixteen times [`REKEY_AFTER_AES`]: more than 20 million datagrams a second for the life of a session.
const REJECT_AFTER_AES: u64 = 1 << 32;
/// Leaves room above, so that no number of lanes that run into the limit can make the counter wrap.
const REJECT_AFTER_CHACHA: u64 = 1 << 62;
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

impl PartialEq for Psk {
    /// In constant time, as befits a secret.
    fn eq(&self, other: &Self) -> bool {
        aws_lc_rs::constant_time::verify_slices_are_equal(&*self.0, &*other.0).is_ok()
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

impl fmt::Debug for PeerKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PeerKeys(..)")
    }
}

/// The door for handshake messages: one keyed hash per configured peer and nothing else.
///
/// Shared by all lanes, so that what a stranger sends never reaches the control task.
#[derive(Debug, Default)]
pub struct Door {
    peers: Vec<(PeerId, PeerKeys)>,
}

impl Door {
    /// Opens to these peers.
    pub fn new(peers: impl IntoIterator<Item = (PeerId, PeerKeys)>) -> Self {
        Self {
            peers: peers.into_iter().collect(),
        }
    }

    /// Finds the peer whose key made a handshake message. Allocates nothing.
    ///
    /// # Errors
    /// [`DropReason::WireMalformed`] and [`DropReason::WireVersion`] as [`Message::parse`] has them,
    /// [`DropReason::HandshakeAuth`] if it was made with no peer's key.
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
        self.peers
            .iter()
            .find(|(_, keys)| mac(&keys.mac, signed).verify(tag.into()).is_ok())
            .map(|&(peer, _)| Admitted { peer, message })
            .ok_or(DropReason::HandshakeAuth)
    }
}

/// A handshake message that was made with a peer's key, perhaps long ago.
#[derive(Clone, Debug)]
pub struct Admitted {
    peer: PeerId,
    message: Handshake,
}

#[derive(Clone, Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "12 bytes apart; it is copied through a queue without allocation"
)]
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
}

impl Cipher {
    /// The name as on the command line and in `status`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Aes256Gcm => "aes-256-gcm",
            Self::ChaCha20Poly1305 => "chacha20-poly1305",
        }
    }

    /// Messages on one lane after which a new session is wanted.
    pub(crate) fn rekey_after(self) -> u64 {
        match self {
            Self::Aes256Gcm => REKEY_AFTER_AES,
            Self::ChaCha20Poly1305 => REKEY_AFTER_CHACHA,
        }
    }

    fn reject_after(self) -> u64 {
        match self {
            Self::Aes256Gcm => REJECT_AFTER_AES,
            Self::ChaCha20Poly1305 => REJECT_AFTER_CHACHA,
        }
    }

    fn algorithm(self) -> &'static Algorithm {
        match self {
            Self::Aes256Gcm => &AES_256_GCM,
            Self::ChaCha20Poly1305 => &CHACHA20_POLY1305,
        }
    }

    /// The byte on the wire; also its bit in an offer.
    fn byte(self) -> u8 {
        match self {
            Self::Aes256Gcm => 1,
            Self::ChaCha20Poly1305 => 2,
        }
    }

    fn from_byte(byte: u8) -> Option<Self> {
        [Self::Aes256Gcm, Self::ChaCha20Poly1305]
            .into_iter()
            .find(|cipher| cipher.byte() == byte)
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
    /// The faster one for the two machines.
    #[default]
    Auto,
    /// This one or no session.
    Only(Cipher),
}

/// Not one of `auto`, `aes-256-gcm`, `chacha20-poly1305`.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("`{0}` is not a cipher; write auto, aes-256-gcm or chacha20-poly1305")]
pub struct CipherError(String);

impl FromStr for CipherPolicy {
    type Err = CipherError;

    fn from_str(text: &str) -> Result<Self, CipherError> {
        match text {
            "auto" => Ok(Self::Auto),
            "aes-256-gcm" => Ok(Self::Only(Cipher::Aes256Gcm)),
            "chacha20-poly1305" => Ok(Self::Only(Cipher::ChaCha20Poly1305)),
            _ => Err(CipherError(text.into())),
        }
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
    pub policy: CipherPolicy,
    /// Whether its processor has instructions for AES and GCM.
    pub aes_hardware: bool,
}

impl Offer {
    /// The offer of a daemon on this processor.
    pub fn of_this_machine(policy: CipherPolicy) -> Self {
        Self {
            policy,
            aes_hardware: has_aes_hardware(),
        }
    }

    fn allows(self, cipher: Cipher) -> bool {
        self.policy == CipherPolicy::Auto || self.policy == CipherPolicy::Only(cipher)
    }

    /// The cipher of a session between two sides: AES where both have it in hardware, otherwise
    /// ChaCha20, otherwise what one side insists on and the other allows.
    pub fn agree(self, other: Self) -> Option<Cipher> {
        let both = |cipher| self.allows(cipher) && other.allows(cipher);
        let order = if self.aes_hardware && other.aes_hardware {
            [Cipher::Aes256Gcm, Cipher::ChaCha20Poly1305]
        } else {
            [Cipher::ChaCha20Poly1305, Cipher::Aes256Gcm]
        };
        order.into_iter().find(|&cipher| both(cipher))
    }

    fn bytes(self) -> [u8; 2] {
        let allowed = match self.policy {
            CipherPolicy::Auto => Cipher::Aes256Gcm.byte() | Cipher::ChaCha20Poly1305.byte(),
            CipherPolicy::Only(cipher) => cipher.byte(),
        };
        [allowed, u8::from(self.aes_hardware)]
    }

    /// Bits that this version does not know are ciphers it cannot choose: they are passed over.
    fn from_bytes([allowed, hardware]: [u8; 2]) -> Option<Self> {
        let policy = match allowed & 3 {
            3 => CipherPolicy::Auto,
            one => CipherPolicy::Only(Cipher::from_byte(one)?),
        };
        Some(Self {
            policy,
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

    fn decode(bytes: &[u8; INITIATION_PAYLOAD_LEN]) -> Option<Self> {
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
/// Lanes write it once a batch; the tunnel's timers read it. Milliseconds since an epoch, so that a
/// time fits an atomic.
#[derive(Debug)]
pub struct Activity {
    epoch: Instant,
    heard: AtomicU64,
    sent: AtomicU64,
}

impl Activity {
    /// Starts a record at `epoch`: nothing heard, nothing sent.
    pub fn new(epoch: Instant) -> Self {
        Self {
            epoch,
            heard: AtomicU64::new(0),
            sent: AtomicU64::new(0),
        }
    }

    /// An authenticated datagram came in.
    pub fn heard(&self, now: Instant) {
        self.raise(&self.heard, now);
    }

    /// A sealed datagram went out.
    pub fn sent(&self, now: Instant) {
        self.raise(&self.sent, now);
    }

    /// When a datagram last came in; `None` if none did.
    pub fn last_heard(&self) -> Option<Instant> {
        self.read(&self.heard)
    }

    /// When a datagram last went out; `None` if none did.
    pub fn last_sent(&self) -> Option<Instant> {
        self.read(&self.sent)
    }

    fn raise(&self, cell: &AtomicU64, now: Instant) {
        // One above, so that 0 can mean never.
        let millis = now.saturating_duration_since(self.epoch).as_millis() as u64 + 1;
        // The cell is shared by all lanes: write it only when the millisecond is a new one.
        if cell.load(Relaxed) < millis {
            cell.fetch_max(millis, Relaxed);
        }
    }

    fn read(&self, cell: &AtomicU64) -> Option<Instant> {
        let millis = cell.load(Relaxed).checked_sub(1)?;
        self.epoch
            .checked_add(std::time::Duration::from_millis(millis))
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
            let unbound = UnboundKey::new(spec.cipher.algorithm(), key.as_slice()).ok()?;
            Some(LessSafeKey::new(unbound))
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
    key: LessSafeKey,
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
        let nonce = nonce(counter.0);
        *header = self.header(counter, flags);
        let sealed = self
            .key
            .seal_in_place_separate_tag(nonce, Aad::from(&header[..]), plaintext)
            .map_err(|_| NotSealed)?;
        tag.copy_from_slice(sealed.as_ref());
        Ok(())
    }

    /// Seals `head` and then `payload` into `datagram`, which is exactly [`DATA_OVERHEAD`] longer than
    /// both: the payload goes from where it lies to the send batch in one pass.
    ///
    /// # Errors
    /// [`NotSealed`] if the lengths do not match.
    pub fn seal_from(
        &self,
        counter: Counter,
        flags: Flags,
        head: &[u8],
        payload: &[u8],
        datagram: &mut [u8],
    ) -> Result<(), NotSealed> {
        if datagram.len() != DATA_OVERHEAD + head.len() + payload.len() {
            return Err(NotSealed);
        }
        let (header, body) = datagram
            .split_first_chunk_mut::<DATA_HEADER_LEN>()
            .ok_or(NotSealed)?;
        let (sealed_head, rest) = body.split_at_mut_checked(head.len()).ok_or(NotSealed)?;
        let nonce = nonce(counter.0);
        *header = self.header(counter, flags);
        self.key
            .seal_out_of_place_scatter(
                nonce,
                Aad::from(&header[..]),
                head,
                sealed_head,
                payload,
                rest,
            )
            .map_err(|_| NotSealed)
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
    key: LessSafeKey,
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
            .open_in_place(nonce(data.counter), Aad::from(&header[..]), body)
            .map_err(|_| DropReason::OpenAuth)?
            .len();
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

/// The counter in the last eight bytes, as WireGuard has it.
fn nonce(counter: u64) -> Nonce {
    let mut bytes = [0; NONCE_LEN];
    bytes[NONCE_LEN - 8..].copy_from_slice(&counter.to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
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
    Test(Arc<Mutex<dyn FnMut(&mut [u8]) + Send>>),
}

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
