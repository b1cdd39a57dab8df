//! The handshake itself: `Noise_NNpsk0_25519_ChaChaPoly_BLAKE2s`, one message at a time.
//!
//! ```text
//! -> psk, e     InitiationPayload   read with the PSK alone, without a Diffie-Hellman
//! <- e, ee      ResponsePayload
//! ```
//!
//! The prologue binds the version and the role of the initiator. So if somebody sends a message
//! back to its maker, the handshake itself refuses it, not only the check of the header.

use snow::params::{CipherChoice, DHChoice, HashChoice};
use snow::resolvers::{CryptoResolver, DefaultResolver};
use snow::types::{Cipher, Dh, Hash, Random};
use snow::{Builder, HandshakeState};

use zeroize::{Zeroize, Zeroizing};

use super::keys::{Wiped, wipe_frames};
use super::{Entropy, InitiationPayload, KEY_LEN, PeerKeys, ResponsePayload, SessionIndex};
use crate::channel::wire::{
    self, INITIATION_LEN, INITIATION_PAYLOAD_LEN, Initiation, MAC_LEN, RESPONSE_LEN,
    RESPONSE_PAYLOAD_LEN, Response,
};
use crate::model::drops::DropReason;
use crate::model::peer::Role;

const PATTERN: &str = "Noise_NNpsk0_25519_ChaChaPoly_BLAKE2s";

/// What both sides hash before the first message.
fn prologue(initiator: Role) -> [u8; 9] {
    let mut bytes = *b"ipmoved\0\0";
    bytes[7] = wire::VERSION;
    bytes[8] = wire::role_byte(initiator);
    bytes
}

/// The result of a handshake: a key for each direction. They are on the heap, so that moving them
/// leaves no copies behind.
pub(crate) struct SplitKeys {
    /// Initiator to responder.
    pub(crate) initiator: Box<Zeroizing<[u8; KEY_LEN]>>,
    /// Responder to initiator.
    pub(crate) responder: Box<Zeroizing<[u8; KEY_LEN]>>,
}

/// A handshake that this side began.
pub(crate) struct Initiating {
    noise: Wiped<HandshakeState>,
    index: SessionIndex,
}

impl Initiating {
    /// Makes the first message; `None` if the system has no randomness to give.
    pub(crate) fn begin(
        keys: &PeerKeys,
        role: Role,
        index: SessionIndex,
        payload: &InitiationPayload,
        entropy: &Entropy,
    ) -> Option<(Self, [u8; INITIATION_LEN])> {
        let mut noise = handshake(keys.noise(), &prologue(role), true, entropy)?;
        let mut message = Initiation::write(role, index.value);
        noise
            .get_mut()
            .write_message(&payload.encode(), Initiation::noise_mut(&mut message))
            .ok()?;
        sign(keys, &mut message);
        Some((Self { noise, index }, message))
    }

    /// The index that a response has to name.
    pub(crate) fn index(&self) -> u32 {
        self.index.value
    }

    /// Reads the response. A wrong one leaves the handshake as it was, so that the right one can
    /// still come.
    pub(crate) fn read(
        &mut self,
        response: &Response<'_>,
    ) -> Result<(ResponsePayload, SplitKeys), DropReason> {
        let mut payload = [0; RESPONSE_PAYLOAD_LEN];
        let noise = self.noise.get_mut();
        let length = noise
            .read_message(response.noise(), &mut payload)
            .map_err(|_| DropReason::HandshakeAuth)?;
        let decoded = ResponsePayload::decode(&payload).filter(|_| length == payload.len());
        let keys = split(noise);
        Ok((decoded.ok_or(DropReason::WireMalformed)?, keys))
    }

    /// The index, which the session keeps.
    pub(crate) fn into_index(self) -> SessionIndex {
        self.index
    }
}

/// A handshake that the peer began.
pub(crate) struct Responding {
    noise: Wiped<HandshakeState>,
}

impl Responding {
    /// Reads the first message: hashes and one AEAD, no Diffie-Hellman.
    pub(crate) fn read(
        keys: &PeerKeys,
        initiation: &Initiation<'_>,
        entropy: &Entropy,
    ) -> Result<(Self, InitiationPayload), DropReason> {
        let mut noise = handshake(keys.noise(), &prologue(initiation.role()), false, entropy)
            .ok_or(DropReason::ControlBusy)?;
        let mut payload = [0; INITIATION_PAYLOAD_LEN];
        let length = noise
            .get_mut()
            .read_message(initiation.noise(), &mut payload)
            .map_err(|_| DropReason::HandshakeAuth)?;
        let decoded = InitiationPayload::decode(&payload)
            .filter(|_| length == payload.len())
            .ok_or(DropReason::WireMalformed)?;
        Ok((Self { noise }, decoded))
    }

    /// Makes the second message; `None` if the system has no randomness to give.
    pub(crate) fn respond(
        mut self,
        keys: &PeerKeys,
        role: Role,
        sender: u32,
        receiver: u32,
        payload: &ResponsePayload,
    ) -> Option<(SplitKeys, [u8; RESPONSE_LEN])> {
        let mut message = Response::write(role, sender, receiver);
        let noise = self.noise.get_mut();
        noise
            .write_message(&payload.encode(), Response::noise_mut(&mut message))
            .ok()?;
        let split = split(noise);
        sign(keys, &mut message);
        Some((split, message))
    }
}

fn handshake(
    psk: &[u8; KEY_LEN],
    prologue: &[u8],
    initiator: bool,
    entropy: &Entropy,
) -> Option<Wiped<HandshakeState>> {
    let resolver = Box::new(WipingResolver(entropy.clone()));
    let builder = Builder::with_resolver(PATTERN.parse().ok()?, resolver)
        .psk(0, psk)
        .and_then(|builder| builder.prologue(prologue))
        .ok()?;
    let noise = if initiator {
        builder.build_initiator()
    } else {
        builder.build_responder()
    };
    noise.ok().map(Wiped::new)
}

fn split(noise: &mut HandshakeState) -> SplitKeys {
    let mut keys = SplitKeys {
        initiator: Box::new(Zeroizing::new([0; KEY_LEN])),
        responder: Box::new(Zeroizing::new([0; KEY_LEN])),
    };
    let mut split = noise.dangerously_get_raw_split();
    keys.initiator.copy_from_slice(&split.0);
    keys.responder.copy_from_slice(&split.1);
    split.0.zeroize();
    split.1.zeroize();
    wipe_frames();
    keys
}

/// Writes the mac at the end of a message.
fn sign<const N: usize>(keys: &PeerKeys, message: &mut [u8; N]) {
    let (signed, tag) = message.split_at_mut(N - MAC_LEN);
    tag.copy_from_slice(&keys.mac_of(signed));
}

/// snow's own primitives, which overwrite their keys at the end: snow keeps them on the heap, where
/// [`Wiped`] does not reach. Randomness comes from us alone: snow is built without a source of its
/// own.
struct WipingResolver(Entropy);

impl CryptoResolver for WipingResolver {
    fn resolve_rng(&self) -> Option<Box<dyn Random>> {
        Some(Box::new(NoiseRandom(self.0.clone())))
    }

    fn resolve_dh(&self, choice: &DHChoice) -> Option<Box<dyn Dh>> {
        let dh = DefaultResolver.resolve_dh(choice)?;
        Some(Box::new(WipingDh { dh, secret: false }))
    }

    fn resolve_hash(&self, choice: &HashChoice) -> Option<Box<dyn Hash>> {
        DefaultResolver.resolve_hash(choice)
    }

    fn resolve_cipher(&self, choice: &CipherChoice) -> Option<Box<dyn Cipher>> {
        let cipher = DefaultResolver.resolve_cipher(choice)?;
        Some(Box::new(WipingCipher(cipher)))
    }
}

struct NoiseRandom(Entropy);

impl Random for NoiseRandom {
    fn try_fill_bytes(&mut self, dest: &mut [u8]) -> Result<(), snow::Error> {
        self.0.fill(dest).map_err(|_| snow::Error::Rng)
    }
}

struct WipingDh {
    dh: Box<dyn Dh>,
    /// Whether a key was set or made. Without one there is nothing to wipe, and wiping costs a
    /// multiplication.
    secret: bool,
}

impl Dh for WipingDh {
    fn name(&self) -> &'static str {
        self.dh.name()
    }

    fn pub_len(&self) -> usize {
        self.dh.pub_len()
    }

    fn priv_len(&self) -> usize {
        self.dh.priv_len()
    }

    fn set(&mut self, privkey: &[u8]) {
        self.secret = true;
        self.dh.set(privkey);
    }

    fn generate(&mut self, rng: &mut dyn Random) -> Result<(), snow::Error> {
        self.secret = true;
        self.dh.generate(rng)
    }

    fn pubkey(&self) -> &[u8] {
        self.dh.pubkey()
    }

    fn privkey(&self) -> &[u8] {
        self.dh.privkey()
    }

    fn dh(&self, pubkey: &[u8], out: &mut [u8]) -> Result<(), snow::Error> {
        self.dh.dh(pubkey, out)
    }

    fn dh_len(&self) -> usize {
        self.dh.dh_len()
    }
}

impl Drop for WipingDh {
    fn drop(&mut self) {
        if self.secret {
            self.dh.set(&[0; KEY_LEN]);
        }
    }
}

struct WipingCipher(Box<dyn Cipher>);

impl Cipher for WipingCipher {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn set(&mut self, key: &[u8; KEY_LEN]) {
        self.0.set(key);
    }

    fn encrypt(&self, nonce: u64, authtext: &[u8], plaintext: &[u8], out: &mut [u8]) -> usize {
        self.0.encrypt(nonce, authtext, plaintext, out)
    }

    fn decrypt(
        &self,
        nonce: u64,
        authtext: &[u8],
        ciphertext: &[u8],
        out: &mut [u8],
    ) -> Result<usize, snow::Error> {
        self.0.decrypt(nonce, authtext, ciphertext, out)
    }
}

impl Drop for WipingCipher {
    fn drop(&mut self) {
        self.0.set(&[0; KEY_LEN]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(text: &str) -> Vec<u8> {
        (0..text.len())
            .step_by(2)
            .map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap())
            .collect()
    }

    fn fixed(bytes: Vec<u8>) -> Entropy {
        Entropy::of(move |out| out.copy_from_slice(&bytes))
    }

    /// The published vector of the pattern (cacophony, also in the snow repository), run through
    /// the builder, the resolver and the split that are shipped.
    #[test]
    fn published_vector_of_the_pattern() {
        let psk: [u8; KEY_LEN] =
            hex("54686973206973206d7920417573747269616e20706572737065637469766521")
                .try_into()
                .unwrap();
        let prologue = hex("4a6f686e2047616c74");
        let initiator = hex("893e28b9dc6ca8d611ab664754b8ceb7bac5117349a4439a6b0569da977c464a");
        let responder = hex("bbdb4cdbd309f1a1f2e1456967fe288cadd6f712d65dc7b7793d5e63da6b375b");
        let mut alice = handshake(&psk, &prologue, true, &fixed(initiator)).unwrap();
        let mut bob = handshake(&psk, &prologue, false, &fixed(responder)).unwrap();
        let mut step = |first: bool, payload: &str, expected: &str| {
            let (from, to) = if first {
                (&mut alice, &mut bob)
            } else {
                (&mut bob, &mut alice)
            };
            let mut message = [0; 256];
            let length = from
                .get_mut()
                .write_message(&hex(payload), &mut message)
                .unwrap();
            assert_eq!(message[..length], hex(expected));
            let mut read = [0; 256];
            let read_length = to
                .get_mut()
                .read_message(&message[..length], &mut read)
                .unwrap();
            assert_eq!(read[..read_length], hex(payload));
        };
        step(
            true,
            "4c756477696720766f6e204d69736573",
            "ca35def5ae56cec33dc2036731ab14896bc4c75dbb07a61f879f8e3afa4c7944\
             fda936bec35a8adfdff198386f7d5475880897edaaf7495314c99095a2e4d66a",
        );
        step(
            false,
            "4d757272617920526f746862617264",
            "95ebc60d2b1fa672c1f46a8aa265ef51bfe38e7ccb39ec5be34069f144808843\
             4cd2a371993ba41ea11448024fca32766b169183c9e691a7a433279da7e729",
        );
        assert_eq!(
            alice.get_mut().get_handshake_hash(),
            hex("b3e9c846d264120a4211e18307da91157a21e92e69b639c50f027f101db3e1a6")
        );
        // The transport messages of the vector show that the split keys are the right ones.
        let keys = split(alice.get_mut());
        let same = split(bob.get_mut());
        assert_eq!(**keys.initiator, **same.initiator);
        assert_eq!(**keys.responder, **same.responder);
        let transport = |key: &[u8; KEY_LEN], nonce: u64, payload: &str, expected: &str| {
            let mut cipher = DefaultResolver
                .resolve_cipher(&CipherChoice::ChaChaPoly)
                .unwrap();
            cipher.set(key);
            let mut out = [0; 64];
            let length = cipher.encrypt(nonce, &[], &hex(payload), &mut out);
            assert_eq!(out[..length], hex(expected));
        };
        transport(
            &keys.initiator,
            0,
            "462e20412e20486179656b",
            "bc44da303ae0beb08075fc4eb4e58235c67c2d1f53a4f2fff0bca7",
        );
        transport(
            &keys.responder,
            0,
            "4361726c204d656e676572",
            "416d1af83e9fa6966ce4e871156b131aa9bd7e9a1d6f8794f4872a",
        );
    }
}
