//! One key of an AEAD: seals and opens a text in place under a counter.
//!
//! Owns the key's bytes from their derivation until they are wiped, and the stack on which a cipher
//! works with them.

use aegis::aegis256x4::Aegis256X4;
use aws_lc_rs::aead::{AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use zeroize::Zeroizing;

use super::{Cipher, KEY_LEN};
use crate::channel::wire::{DATA_HEADER_LEN, TAG_LEN};

/// The key of one lane and direction.
pub(super) enum LaneKey {
    /// Wiped by AWS-LC.
    AwsLc(LessSafeKey),
    /// The plain bytes: the cipher sets itself up anew for each datagram, which takes some
    /// nanoseconds. They are boxed, so that moving the lane leaves no copy behind.
    Aegis(Box<Zeroizing<[u8; KEY_LEN]>>),
}

impl LaneKey {
    /// The key that `derive` writes; `None` if the cipher refuses it.
    pub(super) fn new(cipher: Cipher, derive: impl FnOnce(&mut [u8; KEY_LEN])) -> Option<Self> {
        // On the heap from the beginning: a key that is moved stays in the frame it is moved from,
        // and what is built there next may take it along in bytes that it does not use.
        let mut key = Box::new(Zeroizing::new([0; KEY_LEN]));
        derive(&mut key);
        let algorithm = match cipher {
            Cipher::Aes256Gcm => &AES_256_GCM,
            Cipher::ChaCha20Poly1305 => &CHACHA20_POLY1305,
            Cipher::Aegis256X4 => return Some(Self::Aegis(key)),
        };
        let unbound = UnboundKey::new(algorithm, key.as_slice()).ok()?;
        Some(Self::AwsLc(LessSafeKey::new(unbound)))
    }

    /// Encrypts `text`; returns the tag of it and of `header`. It fails for no length that occurs.
    pub(super) fn seal(
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
            Self::Aegis(key) => Some(aegis_seal(key, counter, header, text)),
        }
    }

    /// Decrypts `text`, which ends with its tag. Returns the length of the plaintext if the tag is
    /// that of it and of `header`.
    pub(super) fn open(
        &self,
        counter: u64,
        header: &[u8; DATA_HEADER_LEN],
        text: &mut [u8],
    ) -> Option<usize> {
        match self {
            Self::AwsLc(key) => {
                let nonce = Nonce::assume_unique_for_key(nonce(counter));
                let opened = key.open_in_place(nonce, Aad::from(header), text);
                opened.ok().map(|opened| opened.len())
            }
            Self::Aegis(key) => {
                let (text, tag) = text.split_last_chunk_mut::<TAG_LEN>()?;
                aegis_open(key, counter, header, text, tag).then_some(text.len())
            }
        }
    }
}

/// It has a frame of its own, since the library copies the key there; how much of the stack that
/// takes depends on the processor and the compiler. While the session is in use its key is in
/// memory anyway; once sessions have ended, each thread that sealed or opened overwrites what is
/// left of their keys ([`wipe_frames`](super::wipe_frames)).
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

/// The counter in the last eight bytes, as WireGuard has it, with zeros before it.
fn nonce<const N: usize>(counter: u64) -> [u8; N] {
    let mut bytes = [0; N];
    bytes[N - 8..].copy_from_slice(&counter.to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The draft's test vectors of AEGIS-256X4: earlier drafts defined another cipher by this name.
    /// The draft prints 04050607 as the second plaintext, but its ciphertext is that of 05060708.
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
}
