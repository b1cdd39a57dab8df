//! One daemon takes over from another without a packet's loss: after an upgrade, or with other
//! settings.
//!
//! ```text
//!   next daemon                            the one that runs
//!        │ take over, version                    │
//!        ├──────────────────────────────────────►│ changes nothing in the kernel from now on
//!        │ lock, sockets, queues, memory         │
//!        │◄──────────────────────────────────────┤
//!        │ checks, loads its programs            │ carries packets
//!        │ ready                                 │
//!        ├──────────────────────────────────────►│ stops its lanes
//!        │ state (sessions, flows)               │
//!        │◄──────────────────────────────────────┤     packets wait in queues and sockets
//!        │ puts its programs in place            │
//!        │ taken                                 │
//!        ├──────────────────────────────────────►│
//!        │ go                                    │
//!        │◄──────────────────────────────────────┤ ends, and leaves everything as it is
//!        │ starts its lanes                      ✝
//! ```
//!
//! If the next one fails before the end of it, the one that runs goes on as if nothing had been:
//! its programs are put back, its lanes start again, and its sessions are made anew, since the
//! other may have sealed on them. If the one that runs dies in the midst of it, the next one goes
//! on: with the state if it has it, and else as after a crash.
//!
//! Whoever waits for the last word in vain closes its ear first and listens once more after that.
//! So either it has heard it, or whoever says it later is told that nobody hears it: never do both
//! go on, nor neither.
//!
//! Where a service manager restarts the daemon, one ends before the other begins. Then the
//! descriptors and the state wait with the manager ([`kept`](super::kept)), and packets in the
//! queues and sockets, while the programs go on to put them there. A signal cannot tell a restart
//! from a stop, which is to undo everything: the unit asks systemd which of the two it is doing,
//! and has the daemon [asked](giving::store) before the signal comes.
//!
//! `giving` is the socket at which a daemon is asked, `taking` the next daemon's side of it, and
//! `state` the bytes; `older` ends a daemon that knows none of this. What becomes of lanes and
//! kernel meanwhile is [`control`](super::control)'s business.

pub(super) mod giving;
pub(super) mod older;
pub(super) mod state;
pub(super) mod taking;

use std::io;
use std::net::Shutdown;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::descriptors;
use crate::model::peer::Role;

/// Of what is handed over, and of how. Whatever changes either gets another one, and a daemon that
/// does not know it starts as after a crash.
pub(super) const VERSION: u32 = 3;

/// What a daemon is that hands itself over, before anything else of it is read.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct About {
    /// [`VERSION`].
    pub(super) version: u32,
    /// Its process.
    pub(super) pid: u32,
    /// Its role.
    pub(super) role: Role,
    /// The name of its TUN.
    pub(super) tun: String,
    /// The TUN takes UDP super-packets.
    pub(super) uso: bool,
    /// How many lanes it has: a queue and a socket for each.
    pub(super) lanes: usize,
    /// How many descriptors are the memory of its programs.
    pub(super) memory: usize,
    /// Metrics have a socket.
    pub(super) metrics: bool,
    /// It has the lock of its state directory.
    pub(super) state_dir: bool,
}

/// The first thing that is asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "kebab-case")]
pub(super) enum Ask {
    /// Hand yourself over to who asks.
    TakeOver {
        /// The asker's [`VERSION`].
        version: u32,
    },
    /// Hand yourself over to the service manager.
    Store,
}

/// What is said to that.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Reply {
    /// This is mine. With it come the descriptors, in the order of [`Descriptors`].
    Offer(About),
    /// The state of this daemon comes with it, or is with the service manager.
    State,
    /// Not now, and why.
    Refused(String),
    /// You are the daemon now.
    Go,
}

/// What the next daemon says after the first.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Word {
    /// Stop, and give me your state.
    Ready,
    /// I have all of it.
    Taken,
}

/// The descriptors of a daemon.
#[derive(Debug)]
pub(super) struct Descriptors<T> {
    /// The lock of the namespace's directory.
    pub(super) lock: T,
    /// Where `ipmoved status` connects.
    pub(super) status: T,
    /// Where the next daemon connects.
    pub(super) handover: T,
    /// Where commands connect.
    pub(super) commands: T,
    /// Where `ipmoved flows` and `top` connect.
    pub(super) flows: T,
    /// Where metrics are scraped.
    pub(super) metrics: Option<T>,
    /// The lock of its state directory (old server).
    pub(super) state_dir: Option<T>,
    /// The memory of its programs.
    pub(super) memory: Vec<T>,
    /// Its queues.
    pub(super) queues: Vec<T>,
    /// Its sockets.
    pub(super) sockets: Vec<T>,
}

impl<T> Descriptors<T> {
    /// All of them, in the order in which they are sent.
    fn into_all(self) -> Vec<T> {
        let mut all = vec![
            self.lock,
            self.status,
            self.handover,
            self.commands,
            self.flows,
        ];
        all.extend(self.metrics);
        all.extend(self.state_dir);
        all.extend(self.memory);
        all.extend(self.queues);
        all.extend(self.sockets);
        all
    }

    /// What they are; `None` if there are more or fewer.
    fn of(about: &About, all: Vec<T>) -> Option<Self> {
        let mut all = all.into_iter();
        let found = Self {
            lock: all.next()?,
            status: all.next()?,
            handover: all.next()?,
            commands: all.next()?,
            flows: all.next()?,
            metrics: if about.metrics {
                Some(all.next()?)
            } else {
                None
            },
            state_dir: if about.state_dir {
                Some(all.next()?)
            } else {
                None
            },
            memory: all.by_ref().take(about.memory).collect(),
            queues: all.by_ref().take(about.lanes).collect(),
            sockets: all.by_ref().take(about.lanes).collect(),
        };
        let complete = found.sockets.len() == about.lanes && all.next().is_none();
        complete.then_some(found)
    }
}

/// Longest message.
const MAX_LINE: usize = 4_096;

/// One end of a conversation between two daemons.
#[derive(Debug)]
pub(super) struct Talk(UnixStream);

impl Talk {
    /// Waits that long for the other end from now on.
    fn patient(&self, patience: Duration) -> io::Result<()> {
        self.0.set_read_timeout(Some(patience))?;
        self.0.set_write_timeout(Some(patience))
    }

    /// Says something, and gives descriptors with it.
    fn say(&self, what: &impl Serialize, given: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut text = serde_json::to_string(what)?;
        text.push('\n');
        // A line is shorter than any buffer of a socket, so it goes whole.
        match descriptors::send(&self.0, text.as_bytes(), given)? {
            sent if sent == text.len() => Ok(()),
            _ => Err(io::ErrorKind::WriteZero.into()),
        }
    }

    /// Hears what the other end says at last. If that does not come, nothing can be said to this
    /// end any more, and what was said before that is still heard.
    fn hear_last<T: for<'de> Deserialize<'de>>(&self) -> io::Result<T> {
        let heard = self.hear().or_else(|_| {
            self.0.shutdown(Shutdown::Read)?;
            self.hear()
        });
        heard.map(|(said, _)| said)
    }

    /// Hears what the other end says, and takes the descriptors that come with it.
    fn hear<T: for<'de> Deserialize<'de>>(&self) -> io::Result<(T, Vec<OwnedFd>)> {
        let (mut line, mut given) = (Vec::new(), Vec::new());
        while line.last() != Some(&b'\n') {
            let mut part = [0; MAX_LINE];
            let received = descriptors::receive(&self.0, &mut part, &mut given)?;
            if received == 0 || line.len() + received > MAX_LINE {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            line.extend_from_slice(&part[..received]);
        }
        Ok((serde_json::from_slice(&line)?, given))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> [Talk; 2] {
        let (one, other) = UnixStream::pair().unwrap();
        [Talk(one), Talk(other)]
    }

    #[test]
    fn a_last_word_is_heard_or_cannot_be_said() {
        let [one, other] = pair();
        one.patient(Duration::from_millis(1)).unwrap();
        assert!(one.hear_last::<Reply>().is_err());
        let said = other.say(&Reply::Go, &[]).unwrap_err();
        assert_eq!(said.kind(), io::ErrorKind::BrokenPipe);

        let [one, other] = pair();
        other.say(&Reply::Go, &[]).unwrap();
        assert_eq!(one.hear_last::<Reply>().unwrap(), Reply::Go);

        // It came between the end of the wait and the closing.
        let [one, other] = pair();
        other.say(&Reply::Go, &[]).unwrap();
        one.0.shutdown(Shutdown::Read).unwrap();
        assert_eq!(one.hear_last::<Reply>().unwrap(), Reply::Go);
    }
}
