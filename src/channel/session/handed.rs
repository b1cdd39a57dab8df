//! A session as one daemon leaves it to the next, which goes on with its keys, its counters and
//! its windows, so that neither the peer nor what is in flight notices.
//!
//! Owns the bytes of it. They are as secret as the keys. Whoever hands a session over seals nothing
//! on it afterwards: two that count on from the same place would use a nonce twice.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use zeroize::Zeroizing;

use super::{Activity, Cipher, KEY_LEN, Session, SessionIndexes, SessionSpec, SplitKeys};
use crate::channel::replay::Window;
use crate::model::bytes::take;
use crate::model::peer::{PeerId, Role};

/// What a session becomes part of.
pub(crate) struct Heir<'a> {
    /// The peer's place with this daemon.
    pub(crate) peer: PeerId,
    /// This side's role.
    pub(crate) own_role: Role,
    /// Where its index is taken.
    pub(crate) indexes: &'a SessionIndexes,
    /// When the peer was last heard and sent to.
    pub(crate) activity: &'a Arc<Activity>,
    /// When it was handed over.
    pub(crate) then: Instant,
}

impl Session {
    /// Appends the session to `out`. Nothing may be sealed on it afterwards.
    pub(crate) fn put(&self, now: Instant, out: &mut Vec<u8>) {
        let age = now.saturating_duration_since(self.created);
        out.extend_from_slice(&self.index().to_le_bytes());
        out.extend_from_slice(&self.remote.to_le_bytes());
        let by_us = u8::from(self.is_initiator());
        let heard = u8::from(self.is_heard());
        let [own, peers] = [self.sealers.len(), self.openers.len()].map(|lanes| lanes as u8);
        out.extend_from_slice(&[self.cipher.byte(), by_us, heard, own, peers]);
        out.extend_from_slice(&(age.as_nanos() as u64).to_le_bytes());
        out.extend_from_slice(self.keys.initiator.as_slice());
        out.extend_from_slice(self.keys.responder.as_slice());
        for sealer in self.sealers.iter() {
            out.extend_from_slice(&sealer.reserved().to_le_bytes());
        }
        for opener in self.openers.iter() {
            opener.window().put(out);
        }
    }

    /// Takes a session off the front; `None` if there is none, or its index is in use.
    pub(crate) fn take(rest: &mut &[u8], heir: &Heir<'_>) -> Option<Arc<Self>> {
        let index = u32::from_le_bytes(take(rest)?);
        let remote = u32::from_le_bytes(take(rest)?);
        let [cipher, by_us, heard, own, peers] = take(rest)?;
        let age = Duration::from_nanos(u64::from_le_bytes(take(rest)?));
        let initiator = Box::new(Zeroizing::new(take::<KEY_LEN>(rest)?));
        let responder = Box::new(Zeroizing::new(take::<KEY_LEN>(rest)?));
        let session = Self::new(SessionSpec {
            index: heir.indexes.claim(index)?,
            remote,
            cipher: Cipher::from_byte(cipher)?,
            keys: SplitKeys {
                initiator,
                responder,
            },
            initiator: if by_us == 1 {
                heir.own_role
            } else {
                heir.own_role.other()
            },
            own_role: heir.own_role,
            // The control lane is one more.
            own_lanes: own.checked_sub(1)?,
            peer_lanes: peers.checked_sub(1)?,
            peer: heir.peer,
            created: heir.then.checked_sub(age)?,
            activity: Arc::clone(heir.activity),
        })?;
        session.heard.store(heard == 1, Relaxed);
        for sealer in session.sealers.iter() {
            sealer.go_on_at(u64::from_le_bytes(take(rest)?));
        }
        for opener in session.openers.iter() {
            *opener.window() = Window::take(rest)?;
        }
        Some(session)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{ends, sealed};
    use super::*;
    use crate::channel::wire::{CONTROL_LANE, Data};
    use crate::model::drops::DropReason;

    fn handed(session: &Session, peer: PeerId, now: Instant) -> Arc<Session> {
        let mut bytes = Vec::new();
        session.put(now, &mut bytes);
        let mut rest = &*bytes;
        let heir = Heir {
            peer,
            own_role: session.own_role,
            indexes: &SessionIndexes::default(),
            activity: &Arc::new(Activity::new(now)),
            then: now,
        };
        let session = Session::take(&mut rest, &heir).unwrap();
        assert_eq!(rest, &[0; 0]);
        for end in 0..bytes.len() {
            let heir = Heir {
                indexes: &SessionIndexes::default(),
                ..heir
            };
            assert!(Session::take(&mut &bytes[..end], &heir).is_none());
        }
        session
    }

    fn open(session: &Session, datagram: &[u8]) -> Result<(u8, u64), DropReason> {
        let mut datagram = datagram.to_vec();
        let data = Data::parse(&datagram)?;
        let opened = session.open(data, &mut datagram)?;
        Ok((opened.lane, opened.counter))
    }

    #[test]
    fn a_session_goes_on_with_its_counters_and_its_windows() {
        for cipher in Cipher::ALL {
            let [old, new] = ends(cipher, 2);
            let first = sealed(&old, 1, b"first");
            let late = sealed(&old, 1, b"under way");
            assert_eq!(open(&new, &first), Ok((1, 0)));
            let created = new.created();
            let now = created + Duration::from_secs(7);
            let new = handed(&new, PeerId(3), now);
            assert_eq!((new.peer(), new.is_heard()), (PeerId(3), true));
            assert_eq!(new.created(), created);
            assert_eq!(open(&new, &first), Err(DropReason::Replay));
            assert_eq!(open(&new, &late), Ok((1, 1)));
            let old = handed(&old, PeerId(0), now);
            let [next, control] = [1, CONTROL_LANE].map(|lane| sealed(&old, lane, b"more"));
            assert_eq!(open(&new, &next), Ok((1, 2)), "no nonce is used twice");
            assert_eq!(open(&new, &control), Ok((CONTROL_LANE, 0)));
            let back = sealed(&new, 0, b"back");
            assert_eq!(open(&old, &back), Ok((0, 0)));
        }
    }
}
