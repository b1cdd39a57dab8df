//! The state of a daemon as bytes, in a file without a name that another process is given.
//!
//! ```text
//!   About as a line of JSON
//!   clock, age of the new server's translator
//!   for each peer: fingerprint, tunnel, gate (old server)        secret: wiped once it is read
//!   flows (new server)
//! ```
//!
//! Owns the order of these. What is in them is the business of those that wrote them: tunnels,
//! gates and flow tables.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, memfd_create};
use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};
use zeroize::{Zeroize, Zeroizing};

use super::{About, VERSION};
use crate::channel::session::FINGERPRINT_LEN;
use crate::flow::table::HandedFlow;
use crate::model::bytes::take;
use crate::model::peer::PeerId;

/// What a peer's part of it begins with.
pub(in crate::daemon) type Fingerprint = [u8; FINGERPRINT_LEN];

/// Most bytes that are read: sixteen million flows.
const MAX_STATE: u64 = 2 << 30;

/// The name that the kernel shows for the file.
const NAME: &str = "ipmoved-state";

/// What a daemon knows of a peer.
#[derive(Debug)]
pub(in crate::daemon) struct PeerState {
    /// Tells it from the others, wherever it stands in the settings.
    pub(in crate::daemon) fingerprint: Fingerprint,
    /// Its tunnel.
    pub(in crate::daemon) tunnel: Zeroizing<Vec<u8>>,
    /// Its clients (old server).
    pub(in crate::daemon) gate: Vec<u8>,
}

impl PeerState {
    /// At the place of a peer that is gone.
    pub(in crate::daemon) fn of_nobody() -> Self {
        Self {
            fingerprint: [0; FINGERPRINT_LEN],
            tunnel: Zeroizing::default(),
            gate: Vec::new(),
        }
    }
}

/// What a daemon knows.
#[derive(Debug)]
pub(in crate::daemon) struct State {
    /// When it was written.
    pub(in crate::daemon) then: Instant,
    /// For how long its translator, or those that it has taken over from, had been there.
    pub(in crate::daemon) age: Duration,
    /// Its peers.
    pub(in crate::daemon) peers: Vec<PeerState>,
    /// Its flows (new server).
    flows: Vec<u8>,
}

impl State {
    /// Of a daemon with these peers.
    pub(in crate::daemon) fn new(
        now: Instant,
        age: Duration,
        peers: Vec<PeerState>,
        flows: Vec<u8>,
    ) -> Self {
        Self {
            then: now,
            age,
            peers,
            flows,
        }
    }

    /// Writes it down for another process.
    ///
    /// # Errors
    /// If there is no memory.
    pub(in crate::daemon) fn write(&self, about: &About) -> io::Result<OwnedFd> {
        let mut file = File::from(unnamed_file()?);
        let mut line = serde_json::to_vec(about)?;
        line.push(b'\n');
        file.write_all(&line)?;
        for number in [nanos(self.then), self.age.as_nanos() as u64] {
            file.write_all(&number.to_le_bytes())?;
        }
        file.write_all(&(self.peers.len() as u16).to_le_bytes())?;
        for peer in &self.peers {
            file.write_all(&peer.fingerprint)?;
            for part in [peer.tunnel.as_slice(), &peer.gate] {
                file.write_all(&(part.len() as u32).to_le_bytes())?;
                file.write_all(part)?;
            }
        }
        file.write_all(&self.flows)?;
        file.rewind()?;
        // Whoever reads it is to overwrite it, so that may not be sealed, nor sealed by others.
        fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
        Ok(file.into())
    }

    /// Reads what another process wrote, and wipes it.
    ///
    /// # Errors
    /// Why it is not understood.
    pub(in crate::daemon) fn read(file: OwnedFd) -> Result<(About, Self), String> {
        let mut file = File::from(file);
        let mut bytes = Zeroizing::new(Vec::new());
        let read = file.metadata().and_then(|metadata| {
            bytes.reserve_exact(metadata.len().min(MAX_STATE) as usize + 1);
            file.rewind()?;
            (&mut file).take(MAX_STATE).read_to_end(&mut bytes)
        });
        read.map_err(|error| format!("its state cannot be read: {error}"))?;
        let understood = understand(&bytes);
        // The service manager may hold it for a little longer.
        let secret = understood
            .as_ref()
            .map_or(bytes.len(), |(.., secret)| *secret);
        let wiped = file
            .rewind()
            .and_then(|()| io::copy(&mut io::repeat(0).take(secret as u64), &mut file))
            // Its memory is free from then on, though others may hold the file.
            .and_then(|_| {
                let whole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                Ok(fallocate(&file, whole, 0, bytes.len() as u64)?)
            });
        if let Err(error) = wiped {
            tracing::debug!(%error, "the state of the last daemon is not wiped");
        }
        let (about, state, _) = understood?;
        Ok((about, state))
    }

    /// Overwrites all of it.
    pub(in crate::daemon) fn wipe(&mut self) {
        for peer in &mut self.peers {
            peer.tunnel.zeroize();
            peer.gate.zeroize();
        }
        self.flows.zeroize();
    }

    /// What it knows of the peer with this fingerprint.
    pub(in crate::daemon) fn of(&self, fingerprint: &Fingerprint) -> Option<&PeerState> {
        self.peers
            .iter()
            .find(|peer| peer.fingerprint == *fingerprint)
    }

    /// The flows, by the peer's place with this daemon, which `place` says for the place with that
    /// one; those of no peer are at `None`.
    pub(in crate::daemon) fn flows(
        &self,
        place: impl Fn(usize) -> Option<PeerId>,
    ) -> Vec<(Option<PeerId>, Vec<HandedFlow>)> {
        let mut all: std::collections::BTreeMap<Option<PeerId>, Vec<HandedFlow>> =
            Default::default();
        let places: Vec<Option<PeerId>> = (0..self.peers.len()).map(place).collect();
        let mut rest = &*self.flows;
        while let Some(mut flow) = HandedFlow::take(&mut rest) {
            let peer = flow.outside.peer;
            if peer.is_inside() {
                all.entry(None).or_default().push(flow);
            } else if let Some(Some(peer)) = places.get(usize::from(peer.0)) {
                flow.outside.peer = *peer;
                all.entry(Some(*peer)).or_default().push(flow);
            }
        }
        all.into_iter().collect()
    }
}

/// A file in memory. Some hosts allow none that could be executed (`vm.memfd_noexec`), which only
/// kernels from 6.3 on know to tell apart.
fn unnamed_file() -> io::Result<OwnedFd> {
    let plain = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    match memfd_create(NAME, plain | MemfdFlags::NOEXEC_SEAL) {
        Err(Errno::INVAL) => Ok(memfd_create(NAME, plain)?),
        made => Ok(made?),
    }
}

/// What it says, and how many bytes of it are secret.
fn understand(bytes: &[u8]) -> Result<(About, State, usize), String> {
    let unread = || "its state is not understood".to_owned();
    let end = bytes
        .iter()
        .position(|&byte| byte == b'\n')
        .ok_or_else(unread)?;
    let about: serde_json::Value =
        serde_json::from_slice(&bytes[..end]).map_err(|error| error.to_string())?;
    let version = about["version"].as_u64();
    if version != Some(VERSION.into()) {
        let version = version.map_or_else(|| "unknown".to_owned(), |it| it.to_string());
        return Err(format!(
            "its state is of version {version}, and this ipmoved reads {VERSION}"
        ));
    }
    let about: About = serde_json::from_value(about).map_err(|error| error.to_string())?;
    let mut rest = &bytes[end + 1..];
    let state = read_state(&mut rest).ok_or_else(unread)?;
    let secret = bytes.len() - state.flows.len();
    Ok((about, state, secret))
}

fn read_state(rest: &mut &[u8]) -> Option<State> {
    let mut number = || Some(u64::from_le_bytes(take(rest)?));
    let (written, age) = (number()?, Duration::from_nanos(number()?));
    let now = Instant::now();
    let since = Duration::from_nanos(nanos(now).checked_sub(written)?);
    let count = u16::from_le_bytes(take(rest)?);
    let peers = (0..count).map(|_| {
        let fingerprint = take(rest)?;
        let mut part = || {
            let length = u32::from_le_bytes(take(rest)?) as usize;
            let (part, tail) = rest.split_at_checked(length)?;
            *rest = tail;
            Some(part.to_vec())
        };
        Some(PeerState {
            fingerprint,
            tunnel: Zeroizing::new(part()?),
            gate: part()?,
        })
    });
    Some(State {
        then: now.checked_sub(since)?,
        age,
        peers: peers.collect::<Option<_>>()?,
        flows: rest.to_vec(),
    })
}

/// A time on the clock that all processes share, which is that of [`Instant`] (clock_gettime(2)).
fn nanos(at: Instant) -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let now = now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64;
    now.saturating_sub(at.elapsed().as_nanos() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::peer::Role;

    fn about(version: u32) -> About {
        About {
            version,
            pid: 7,
            role: Role::New,
            tun: "ipmoved0".into(),
            uso: true,
            lanes: 2,
            memory: 3,
            metrics: false,
            state_dir: false,
        }
    }

    fn state() -> State {
        let peers = [3, 4].map(|byte| PeerState {
            fingerprint: [byte; FINGERPRINT_LEN],
            tunnel: Zeroizing::new(vec![byte; 300]),
            gate: vec![byte; 3],
        });
        let now = Instant::now();
        State::new(now, Duration::from_secs(9), peers.into(), vec![5; 128])
    }

    #[test]
    fn another_process_reads_what_was_written_once() {
        let before = state();
        let file = before.write(&about(VERSION)).unwrap();
        let same = file.try_clone().unwrap();
        let (told, after) = State::read(file).unwrap();
        assert_eq!(told, about(VERSION));
        assert_eq!((after.age, &after.flows), (before.age, &before.flows));
        assert_eq!(after.peers.len(), 2);
        for (before, after) in before.peers.iter().zip(&after.peers) {
            assert_eq!(before.fingerprint, after.fingerprint);
            assert_eq!(*before.tunnel, *after.tunnel);
            assert_eq!(before.gate, after.gate);
        }
        let late = after.then.saturating_duration_since(before.then);
        let early = before.then.saturating_duration_since(after.then);
        assert!(late.max(early) < Duration::from_millis(1), "one clock");
        assert!(State::read(same.try_clone().unwrap()).is_err(), "once");
        let mut left = File::from(same);
        assert!(
            left.set_len(0).is_err() && left.set_len(1 << 20).is_err(),
            "sealed"
        );
        let mut bytes = Vec::new();
        left.rewind()
            .and_then(|()| left.read_to_end(&mut bytes))
            .unwrap();
        assert!(
            !bytes.is_empty() && bytes.iter().all(|&byte| byte == 0),
            "wiped"
        );
    }

    #[test]
    fn what_another_version_wrote_is_refused_by_its_number() {
        let file = state().write(&about(VERSION + 1)).unwrap();
        let why = State::read(file).unwrap_err();
        assert!(why.contains(&format!("version {}", VERSION + 1)), "{why}");
    }

    #[test]
    fn no_bytes_are_believed_further_than_they_go() {
        let file = state().write(&about(VERSION)).unwrap();
        let mut bytes = Vec::new();
        File::from(file).read_to_end(&mut bytes).unwrap();
        let secret = understand(&bytes).unwrap().2;
        assert_eq!(secret, bytes.len() - 128);
        for end in 0..secret {
            assert!(understand(&bytes[..end]).is_err(), "{end}");
        }
    }
}
