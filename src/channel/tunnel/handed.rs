//! What one daemon leaves to the next of a tunnel: the sessions, so that packets go on without a
//! pause, and what the peer has said, so that the next one knows what to do with them.
//!
//! The next one is another run: it counts anew, and has to be told everything. So it asks for a
//! session of its own at once. Until it has one it carries packets on those that it was left, and
//! tells the peer nothing there, which would take it for the run before.

use std::time::{Duration, Instant};

use zeroize::Zeroizing;

use super::event::{Event, State};
use super::messages::Announcement;
use super::sessions::{AgreedSession, Origin};
use super::{Tunnel, pmtu};
use crate::channel::session::{FINGERPRINT_LEN, Heir, Session};
use crate::channel::wire::role_byte;
use crate::model::bytes::{put_address, take, take_address};
use crate::model::peer::{Endpoint, Role};

/// Room for what is handed over, but for the peer's announcement: four sessions of a few lanes. If
/// it has to grow, copies of keys are left behind in memory that was freed.
const ROOM: usize = 256 << 10;

impl Tunnel {
    /// All of it. Nothing may be sent or sealed here afterwards, unless the sessions are
    /// [given up](Self::give_up_sessions).
    pub fn hand_over(&self, now: Instant) -> Zeroizing<Vec<u8>> {
        let said = self.said.as_deref().unwrap_or_default();
        let mut out = Zeroizing::new(Vec::with_capacity(ROOM + said.len()));
        for number in [self.timestamp, self.seen, self.seen_run] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out.extend_from_slice(&self.path_mtu().to_le_bytes());
        out.push(match self.state {
            State::Connecting => 0,
            State::Up => 1,
            State::Down => 2,
        });
        // How long ago the peer's daemon was stopped, and one more; 0 if it was not.
        let stopped = self.stopped.map(|at| now.saturating_duration_since(at));
        let stopped = stopped.map_or(0, |ago| ago.as_nanos() as u64 + 1);
        out.extend_from_slice(&stopped.to_le_bytes());
        match &self.learned {
            None => out.push(0),
            Some(at) => {
                out.push(if at.local.is_some() { 2 } else { 1 });
                put_address(at.remote.ip(), &mut out);
                out.extend_from_slice(&at.remote.port().to_le_bytes());
                at.local
                    .into_iter()
                    .for_each(|ip| put_address(ip, &mut out));
            }
        }
        out.extend_from_slice(&(said.len() as u32).to_le_bytes());
        out.extend_from_slice(said);
        for agreed in self.sessions.iter() {
            let Origin {
                initiator,
                timestamp,
                seen,
            } = agreed.origin();
            let sending = self.sessions.is_current(agreed.session.index());
            let usable = u8::from(agreed.usable) + u8::from(sending);
            out.extend_from_slice(&[1, role_byte(initiator), usable]);
            for number in [timestamp, seen, agreed.peer_run] {
                out.extend_from_slice(&number.to_le_bytes());
            }
            agreed.session.put(now, &mut out);
        }
        out.push(0);
        out
    }

    /// Goes on, in a tunnel that was just made, with what another daemon handed over `then`. Of
    /// what is not understood nothing is taken; whether all of it was.
    pub fn take_over(&mut self, now: Instant, then: Instant, handed: &[u8]) -> bool {
        self.try_take_over(now, then, handed).is_some()
    }

    fn try_take_over(&mut self, now: Instant, then: Instant, handed: &[u8]) -> Option<()> {
        let mut rest = handed;
        let rest = &mut rest;
        let mut number = || Some(u64::from_le_bytes(take(rest)?));
        let [timestamp, seen, seen_run] = [number()?, number()?, number()?];
        let mtu = u16::from_le_bytes(take(rest)?);
        let [state] = take(rest)?;
        let stopped = u64::from_le_bytes(take(rest)?).checked_sub(1);
        let learned = match take(rest)? {
            [0] => None,
            [kind] => {
                let ip = take_address(rest)?;
                let remote = (ip, u16::from_le_bytes(take(rest)?)).into();
                let local = match kind {
                    2 => Some(take_address(rest)?),
                    _ => None,
                };
                Some(Endpoint { remote, local })
            }
        };
        let length = u32::from_le_bytes(take(rest)?) as usize;
        let (said, tail) = rest.split_at_checked(length)?;
        *rest = tail;
        let announcement = match said {
            [] => None,
            said => Some(Announcement::decode(said)?),
        };
        let heir = Heir {
            peer: self.config.peer,
            own_role: self.config.role,
            indexes: &self.config.indexes,
            activity: &self.activity,
            then,
        };
        let mut sessions = Vec::new();
        let mut sending = None;
        while take(rest)? == [1] {
            let [initiator, usable] = take(rest)?;
            let initiator = [Role::Old, Role::New]
                .into_iter()
                .find(|&role| role_byte(role) == initiator)?;
            let mut number = || Some(u64::from_le_bytes(take(rest)?));
            let (timestamp, seen, peer_run) = (number()?, number()?, number()?);
            let origin = Origin {
                initiator,
                timestamp,
                seen,
            };
            let session = Session::take(rest, &heir)?;
            if usable == 2 {
                sending = Some(session.index());
            }
            sessions.push(AgreedSession::inherited(
                session,
                origin,
                peer_run,
                usable > 0,
            ));
        }
        (self.timestamp, self.seen, self.seen_run) = (timestamp, seen, seen_run);
        self.sessions.inherit(sessions, sending, &mut self.events);
        if let Some(from) = learned {
            self.learn(now, from);
        }
        if let Some(limit) = &mut self.config.max_datagram {
            *limit = (*limit).max(mtu);
        }
        self.discover(|discovery| discovery.go_on_at(mtu.max(pmtu::BASE)));
        if state == 1 && self.sessions.is_sending() {
            self.activity.control_received(now);
            self.set_state(State::Up);
        }
        if state == 2 {
            self.stopped = stopped.and_then(|ago| then.checked_sub(Duration::from_nanos(ago)));
            self.set_state(State::Down);
        }
        if let Some(announcement) = announcement {
            self.said = Some(said.to_vec());
            self.events.push_back(Event::PeerConfig(announcement));
        }
        self.forced = true;
        self.next_attempt = now;
        Some(())
    }

    /// Ends every session, after they were handed over to a daemon that did not go on with them:
    /// what it may have sealed must not be sealed once more. A new one is asked for at once.
    pub fn give_up_sessions(&mut self, now: Instant) {
        self.sessions.clear(&mut self.events);
        self.sessions.stop_sending(&mut self.events);
        self.forced = true;
        self.hurry(now);
    }

    /// Tells its peer from others, to another daemon on this server.
    pub fn fingerprint(&self) -> [u8; FINGERPRINT_LEN] {
        self.config.keys.fingerprint()
    }

    /// Whether the session in use is this run's own, so that the peer may be told something on it.
    pub(super) fn tells(&self) -> bool {
        let current = self.sessions.current();
        current.is_some_and(|current| !current.inherited)
    }
}
