//! The ciphers, and how two sides choose one.
//!
//! Owns their names, their bytes on the wire, and how many datagrams one key may seal.

use std::fmt;
use std::str::FromStr;

/// Most datagrams sealed under one AES-256-GCM key before a new session is asked for. At 1,400
/// bytes that is 2^34.5 blocks, which leaves an attacker an advantage of about 2^-60 over a random
/// function (Luykx and Paterson, "Limits on authenticated encryption use in TLS", 2017).
const REKEY_AFTER_AES: u64 = 1 << 28;

/// The same limit for the other ciphers, where only the counter's width matters: WireGuard's
/// number.
const REKEY_AFTER_OTHERS: u64 = 1 << 60;

/// Most datagrams sealed under one AES-256-GCM key: sixteen times [`REKEY_AFTER_AES`]. A session
/// that lives 180 s would reach it at more than 20 million datagrams a second.
pub(super) const REJECT_AFTER_AES: u64 = 1 << 32;

/// The same limit for the other ciphers. It is far enough below 2^63 that the counter cannot wrap,
/// however often a lane asks for one beyond it.
const REJECT_AFTER_OTHERS: u64 = 1 << 62;

/// How a session's datagrams are sealed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Cipher {
    /// AES-256-GCM: three times as fast where the processor has instructions for it.
    Aes256Gcm,
    /// ChaCha20-Poly1305.
    ChaCha20Poly1305,
    /// AEGIS-256X4 (draft-irtf-cfrg-aegis-aead), three times as fast again where the processor has
    /// instructions for AES on long vectors. It is not a standard yet, so it is used only if a
    /// server names it.
    Aegis256X4,
}

impl Cipher {
    /// Every cipher.
    pub(super) const ALL: [Self; 3] = [Self::Aes256Gcm, Self::ChaCha20Poly1305, Self::Aegis256X4];

    /// The name as on the command line and in `status`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Aes256Gcm => "aes-256-gcm",
            Self::ChaCha20Poly1305 => "chacha20-poly1305",
            Self::Aegis256X4 => "aegis-256x4",
        }
    }

    /// Datagrams on one lane after which a new session is wanted.
    pub(crate) fn rekey_after(self) -> u64 {
        match self {
            Self::Aes256Gcm => REKEY_AFTER_AES,
            Self::ChaCha20Poly1305 | Self::Aegis256X4 => REKEY_AFTER_OTHERS,
        }
    }

    pub(super) fn reject_after(self) -> u64 {
        match self {
            Self::Aes256Gcm => REJECT_AFTER_AES,
            Self::ChaCha20Poly1305 | Self::Aegis256X4 => REJECT_AFTER_OTHERS,
        }
    }

    /// The byte on the wire; also its bit in an offer.
    pub(super) fn byte(self) -> u8 {
        match self {
            Self::Aes256Gcm => 1,
            Self::ChaCha20Poly1305 => 2,
            Self::Aegis256X4 => 4,
        }
    }

    pub(super) fn from_byte(byte: u8) -> Option<Self> {
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
    /// Any. Two sides that both allow any choose the standard one that is faster on both machines.
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

impl fmt::Display for CipherPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Only(cipher) => cipher.name(),
        })
    }
}

/// What one side says about its ciphers in the handshake.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Offer {
    /// The ciphers it allows.
    pub ciphers: Ciphers,
    /// Whether its processor has instructions for AES and GCM.
    pub aes_hardware: bool,
}

/// A set of ciphers that this version knows.
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

    pub(super) fn bytes(self) -> [u8; 2] {
        [self.ciphers.0, u8::from(self.aes_hardware)]
    }

    /// Ignores bits that this version does not know: it cannot choose those ciphers. It still reads
    /// an offer of only such bits, so that the peer learns that there is no common cipher.
    pub(super) fn from_bytes([allowed, hardware]: [u8; 2]) -> Option<Self> {
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

#[cfg(test)]
mod tests {
    use super::*;

    const CIPHERS: [Cipher; 3] = Cipher::ALL;

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
}
