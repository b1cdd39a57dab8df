//! The secret of two daemons, and the keys that follow from it.
//!
//! Owns the pre-shared key, the derivation (HKDF-SHA256), and [`Wiped`] for secrets of types that
//! do not wipe themselves. Every secret here is wiped when it is dropped, and is never printed.

use std::fmt;
use std::mem::MaybeUninit;
use std::num::NonZeroU64;
use std::ops::Deref;
use std::str::FromStr;

use aws_lc_rs::hkdf;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use blake2::Blake2sMac;
use blake2::digest::consts::U16;
use blake2::digest::{KeyInit, Mac};
use zeroize::{Zeroize, Zeroizing};

use super::{Entropy, NoEntropy};
use crate::channel::wire::MAC_LEN;

/// Length of every secret here: PSK, split keys, AEAD keys.
pub const KEY_LEN: usize = 32;

/// Length of a [fingerprint](PeerKeys::fingerprint).
pub const FINGERPRINT_LEN: usize = MAC_LEN;

/// The secret that two daemons share: 32 bytes, as `wg genpsk` prints them.
#[derive(Clone)]
pub struct Psk(pub(super) Zeroizing<[u8; KEY_LEN]>);

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

    /// The base64 form, to be given to the other server. It is the secret itself.
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
        "the key has {0} characters where 44 are expected (32 bytes in base64); \
         make one with `ipmoved genpsk`"
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
        /// The length of 32 bytes in base64.
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

/// The keys that one peer's PSK is used as. Once they exist, nobody needs the PSK itself.
#[derive(Clone)]
pub struct PeerKeys {
    mac: Zeroizing<[u8; KEY_LEN]>,
    noise: Zeroizing<[u8; KEY_LEN]>,
}

impl PeerKeys {
    /// Derives the keys of a peer.
    pub fn derive(psk: &Psk) -> Self {
        Self {
            mac: derived(psk.0.as_slice(), b"ipmoved v1 psk", &[b"mac"]),
            noise: derived(psk.0.as_slice(), b"ipmoved v1 psk", &[b"noise"]),
        }
    }

    /// Tells them from those of other peers, to another daemon on this server. They do not follow
    /// from it.
    pub fn fingerprint(&self) -> [u8; FINGERPRINT_LEN] {
        self.mac_of(b"ipmoved handover")
    }

    /// What tells this peer from others, in every run of the daemon. It says nothing of the keys.
    pub(crate) fn name(&self) -> NonZeroU64 {
        let [a, b, c, d, e, f, g, h, ..] = self.mac_of(b"ipmoved v1 peer");
        NonZeroU64::new(u64::from_le_bytes([a, b, c, d, e, f, g, h])).unwrap_or(NonZeroU64::MIN)
    }

    /// The keyed hash that ends a handshake message.
    pub(crate) fn mac_of(&self, message: &[u8]) -> [u8; MAC_LEN] {
        self.hash(message).finalize().into_bytes().into()
    }

    /// Whether `mac` is that of `message`; compares in constant time.
    pub(super) fn verify(&self, message: &[u8], mac: &[u8; MAC_LEN]) -> bool {
        self.hash(message).verify(mac.into()).is_ok()
    }

    /// The pre-shared key of the handshake.
    pub(super) fn noise(&self) -> &[u8; KEY_LEN] {
        &self.noise
    }

    fn hash(&self, message: &[u8]) -> Blake2sMac<U16> {
        let mut mac = <Blake2sMac<U16> as KeyInit>::new((&*self.mac).into());
        mac.update(message);
        mac
    }
}

impl PartialEq for PeerKeys {
    /// Compares in constant time. Both keys follow from the same secret, so comparing one is
    /// enough.
    fn eq(&self, other: &Self) -> bool {
        aws_lc_rs::constant_time::verify_slices_are_equal(&*self.mac, &*other.mac).is_ok()
    }
}

impl fmt::Debug for PeerKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PeerKeys(..)")
    }
}

fn derived(secret: &[u8], salt: &[u8], info: &[&[u8]]) -> Zeroizing<[u8; KEY_LEN]> {
    let mut key = Zeroizing::new([0; KEY_LEN]);
    derive(&mut key, secret, salt, info);
    key
}

/// Derives one key with HKDF-SHA256 (RFC 5869), written to where it stays: a value that is moved
/// leaves a copy behind, which nothing wipes.
pub(super) fn derive(key: &mut [u8; KEY_LEN], secret: &[u8], salt: &[u8], info: &[&[u8]]) {
    let filled = hkdf::Salt::new(hkdf::HKDF_SHA256, salt)
        .extract(secret)
        .expand(info, hkdf::HKDF_SHA256)
        .and_then(|okm| okm.fill(key));
    // Fails only for lengths that HKDF cannot give; 32 bytes is one block.
    assert!(filled.is_ok(), "HKDF-SHA256 gives 32 bytes");
    wipe_frames();
}

/// How much of the stack [`wipe_frames`] overwrites, in bytes: far more than any call takes that
/// works with keys, on any processor and with any compiler. (AEGIS takes up to 1,184 with NEON.)
const DEAD_FRAMES: usize = 32 << 10;

/// Overwrites the stack below the caller, where calls that have returned may have left copies of
/// secrets. For what is done once a handshake, or once a session has ended.
#[inline(never)]
pub fn wipe_frames() {
    let mut frames = [0_u64; DEAD_FRAMES / size_of::<u64>()];
    frames.zeroize();
}

/// A value whose memory is overwritten when it is dropped, whatever it is made of.
///
/// It holds the state of a handshake: snow keeps the PSK and the chaining key, from which all later
/// keys follow, in plain arrays that it does not wipe.
pub(super) struct Wiped<T>(Box<MaybeUninit<T>>);

#[expect(
    unsafe_code,
    reason = "the memory has to outlive the value, to be wiped"
)]
impl<T> Wiped<T> {
    pub(super) fn new(value: T) -> Self {
        Self(Box::new(MaybeUninit::new(value)))
    }

    pub(super) fn get_mut(&mut self) -> &mut T {
        // SAFETY: `new` wrote the value, and nothing but `drop` takes it out.
        unsafe { self.0.assume_init_mut() }
    }
}

#[expect(
    unsafe_code,
    reason = "the memory has to outlive the value, to be wiped"
)]
impl<T> Drop for Wiped<T> {
    fn drop(&mut self) {
        // SAFETY: `new` wrote the value, and it is not touched as a `T` after this.
        unsafe { self.0.assume_init_drop() };
        self.0.as_mut().zeroize();
    }
}

/// Values whose memory is overwritten when they are dropped, also the bytes between their parts:
/// what is moved brings along there whatever its frame held, which may have been another key.
pub(super) struct WipedSlice<T>(Box<[MaybeUninit<T>]>);

impl<T> WipedSlice<T> {
    /// So many values, unless one cannot be made. Their memory is never moved.
    pub(super) fn new(count: usize, values: impl Iterator<Item = Option<T>>) -> Option<Self> {
        let mut all = Vec::with_capacity(count);
        for value in values.take(count) {
            all.push(MaybeUninit::new(value?));
        }
        Some(Self(all.into_boxed_slice()))
    }
}

#[expect(unsafe_code, reason = "as with `Wiped`")]
impl<T> Deref for WipedSlice<T> {
    type Target = [T];

    #[inline]
    fn deref(&self) -> &[T] {
        // SAFETY: `new` wrote every value, and nothing but `drop` takes them out.
        unsafe { &*(&raw const *self.0 as *const [T]) }
    }
}

#[expect(unsafe_code, reason = "as with `Wiped`")]
impl<T> Drop for WipedSlice<T> {
    fn drop(&mut self) {
        for value in &mut self.0 {
            // SAFETY: `new` wrote the value, and it is not touched as a `T` after this.
            unsafe { value.assume_init_drop() };
            value.zeroize();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let entropy = Entropy::seeded(1);
        let made = Psk::generate(&entropy).unwrap();
        let again: Psk = made.to_base64().parse().unwrap();
        assert_eq!(*again.0, *made.0);
        assert_ne!(*made.0, *Psk::generate(&entropy).unwrap().0);
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
        let lane = derived(&[1; 32], b"ipmoved v1 lane", &[&[1], &[0]]);
        assert_eq!(hex(lane.as_slice()), LANE_KEY);
    }

    /// Leaves `secret` at the far end of the stack that a call has taken.
    #[inline(never)]
    fn leave(secret: u64) -> u64 {
        // As deep as twice what any cipher takes, and some frames between it and the loop.
        let mut frame = [0_u64; DEAD_FRAMES / 2 / size_of::<u64>()];
        for (at, word) in frame.iter_mut().enumerate() {
            *word = secret ^ at as u64;
        }
        std::hint::black_box(&frame)
            .iter()
            .fold(0, |sum, word| sum ^ word)
    }

    /// How much of it is on this thread's stack.
    #[inline(never)]
    #[expect(clippy::disallowed_methods, reason = "a test looks at its own memory")]
    fn left(secret: u64) -> usize {
        let here = 0_u8;
        let address = &raw const here as usize;
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let range = maps.lines().find_map(|line| {
            let (range, _) = line.split_once(' ')?;
            let (start, end) = range.split_once('-')?;
            let [start, end] = [start, end].map(|it| usize::from_str_radix(it, 16).unwrap());
            (start..end).contains(&address).then_some(start..end)
        });
        let range = range.unwrap();
        let memory = std::fs::File::open("/proc/self/mem").unwrap();
        // Only what lies below this frame is dead.
        let start = range.start.max(address.saturating_sub(2 * DEAD_FRAMES)) & !7;
        let mut bytes = vec![0; address - start];
        let read = std::os::unix::fs::FileExt::read_at(&memory, &mut bytes, start as u64).unwrap();
        let words = bytes[..read].chunks_exact(8);
        // The secret itself is in use here.
        let ours = |word: u64| (1..DEAD_FRAMES as u64).contains(&(word ^ secret));
        words
            .filter(|word| ours(u64::from_ne_bytes((*word).try_into().unwrap())))
            .count()
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "a test with a stack of its own")]
    fn what_a_call_has_left_on_the_stack_is_wiped() {
        let secret = 0x5ec2_e75e_c2e7_0000;
        let thread = std::thread::spawn(move || {
            std::hint::black_box(leave(secret));
            let before = left(secret);
            std::hint::black_box(leave(secret));
            wipe_frames();
            (before, left(secret))
        });
        let (before, after) = thread.join().unwrap();
        assert!(before > 0, "the search finds nothing at all");
        assert_eq!(after, 0);
    }

    #[test]
    fn wiped_memory_is_zero() {
        let mut wiped = Wiped::new([0xa5_u8; 64]);
        assert_eq!(wiped.get_mut(), &[0xa5; 64]);
        wiped.0.as_mut().zeroize();
        assert_eq!(wiped.get_mut(), &[0; 64], "what drop does last");
    }

    const MAC_KEY: &str = "10e0b114f81ec6294097eadab38c22ab7a30c44f2edd1432f4b01f714b264def";
    const NOISE_KEY: &str = "f9b6fe85eae8b63780409f222066b9cde225f212057871475af43e367d076244";
    const MAC: &str = "1756ce573284abc96c3bccb87aecb4ea";
    const LANE_KEY: &str = "289f5cb0fc9baaa344a24795f241da892c5a21941f420a30038a9f9d1e39d4b5";
}
