//! Somebody with the key in place of one of the servers: it makes a session like any peer, and then
//! sends what no daemon would.

#![allow(
    clippy::disallowed_methods,
    reason = "it talks to a real daemon, so it reads the real clock"
)]

use std::collections::HashMap;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use ipmoved::internals::{
    Announcement, CipherPolicy, DATA_HEADER_LEN, DATA_OVERHEAD, DEFAULT_PORT, Deliver, Endpoint,
    Event, Flags, MacCheck, Message, Move, Offer, PeerId, PeerKeys, Psk, Role, Session,
    SessionIndexes, Timers, Tunnel, TunnelConfig, entropy,
};
use ipmoved::lab::daemon::read_psk;
use ipmoved::lab::topology::{NEW, NEW6, OLD};
use ipmoved::lab::{Lab, LabError};

use crate::stage::{PATIENCE, Result};

/// An impostor with the key, on one of the servers.
pub(crate) struct Impostor {
    socket: UdpSocket,
    /// The server that it is on, and the other one's daemon.
    own: IpAddr,
    peer: SocketAddr,
    tunnel: Tunnel,
    mac_check: MacCheck,
    sessions: HashMap<u32, Arc<Session>>,
    sending: Option<Arc<Session>>,
}

fn failed(error: impl std::fmt::Display) -> LabError {
    LabError::unexpected(format!("the impostor failed: {error}"))
}

impl Impostor {
    /// Makes a session with the daemon of the new server, and announces that `moves` have moved.
    pub(crate) fn new(lab: &Lab, moves: &[&str]) -> Result<Self> {
        let moves: Vec<Move> = moves
            .iter()
            .map(|text| text.parse().map_err(failed))
            .collect::<Result<_>>()?;
        Self::start(
            lab,
            Role::Old,
            Announcement::Old {
                moves,
                mtu: 1_500,
                reached: None,
                outgoing: false,
            },
        )
    }

    /// Makes a session with the daemon of the old server, and announces that it delivers to the new
    /// one's addresses.
    pub(crate) fn on_the_new_server(lab: &Lab) -> Result<Self> {
        let deliver = Deliver::To {
            v4: Some(NEW),
            v6: Some(NEW6),
        };
        let announcement = Announcement::New {
            deliver,
            mtu: 1_500,
            error: None,
        };
        Self::start(lab, Role::New, announcement)
    }

    fn start(lab: &Lab, role: Role, announcement: Announcement) -> Result<Self> {
        let (host, own, peer) = match role {
            Role::Old => (lab.old_server(), OLD, NEW),
            Role::New => (lab.new_server(), NEW, OLD),
        };
        let psk: Psk = read_psk(&lab.dir().join("psk"))?.parse().map_err(failed)?;
        let keys = PeerKeys::derive(&psk);
        let socket = host.run(|| UdpSocket::bind((own, DEFAULT_PORT)).map_err(failed))?;
        socket
            .set_read_timeout(Some(Duration::from_millis(20)))
            .map_err(failed)?;
        let (own, peer) = (own.into(), SocketAddr::from((peer, DEFAULT_PORT)));
        let config = TunnelConfig {
            peer: PeerId(0),
            keys: keys.clone(),
            role,
            lanes: 1,
            offer: Offer::of_this_machine(CipherPolicy::default()),
            endpoint: Some(peer),
            announcement,
            max_datagram: None,
            timers: Timers::default(),
            indexes: SessionIndexes::default(),
            entropy: entropy::system(),
        };
        let mut impostor = Self {
            socket,
            own,
            peer,
            tunnel: Tunnel::new(config, Instant::now()).map_err(failed)?,
            mac_check: MacCheck::new(Role::Old, [keys]),
            sessions: HashMap::new(),
            sending: None,
        };
        let deadline = Instant::now() + PATIENCE;
        let mut introduced = false;
        while impostor.sending.is_none() || !introduced {
            if Instant::now() > deadline {
                return Err(failed("no session"));
            }
            introduced |= impostor.turn()?;
        }
        // The announcement is under way. The peer acknowledges it in a moment.
        for _ in 0..10 {
            impostor.turn()?;
        }
        Ok(impostor)
    }

    /// Sends bytes, a correct IP packet or not, as if a client or the application had sent them.
    pub(crate) fn send(&self, packet: &[u8]) -> Result {
        self.send_with(Flags::NONE, packet)
    }

    /// Sends bytes, and says this of them.
    pub(crate) fn send_with(&self, flags: Flags, packet: &[u8]) -> Result {
        let session = self.sending.as_ref().ok_or_else(|| failed("no session"))?;
        let sealer = session.sealer(0).ok_or_else(|| failed("no lane"))?;
        let mut counters = sealer.reserve(1).ok_or_else(|| failed("no counter"))?;
        let counter = counters.next().ok_or_else(|| failed("no counter"))?;
        let mut datagram = vec![0; packet.len() + DATA_OVERHEAD];
        datagram[DATA_HEADER_LEN..][..packet.len()].copy_from_slice(packet);
        (sealer.seal(counter, flags, &mut datagram)).map_err(|_| failed("not sealed"))?;
        self.socket
            .send_to(&datagram, self.peer)
            .map_err(failed)
            .map(drop)
    }

    /// Does what is due, and takes one datagram. Returns whether the peer has sent its
    /// announcement.
    fn turn(&mut self) -> Result<bool> {
        let now = Instant::now();
        self.tunnel.handle_timeout(now, SystemTime::now());
        let mut buffer = [0; 2_000];
        match self.socket.recv_from(&mut buffer) {
            Ok((len, from)) => self.take(now, &mut buffer[..len], from),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(failed(error)),
        }
        let mut introduced = false;
        while let Some(event) = self.tunnel.poll_event() {
            match event {
                Event::SessionInstalled(session) => {
                    self.sessions.insert(session.index(), session);
                }
                Event::SendOn(session) => self.sending = Some(session),
                Event::PeerConfig(_) => introduced = true,
                Event::SessionRemoved(_)
                | Event::SendOff
                | Event::Endpoint(_)
                | Event::Arrived(_)
                | Event::State(_)
                | Event::PeerSees { .. }
                | Event::PeerProgress { .. }
                | Event::PeerModes { .. }
                | Event::PeerAsks(_)
                | Event::PeerTells(_)
                | Event::Rtt(_)
                | Event::PathMtu(_)
                | Event::Warning(_) => {}
            }
        }
        while let Some(transmit) = self.tunnel.poll_transmit() {
            self.socket
                .send_to(&transmit.datagram, transmit.to.remote)
                .map_err(failed)?;
        }
        Ok(introduced)
    }

    fn take(&mut self, now: Instant, datagram: &mut [u8], from: SocketAddr) {
        let endpoint = Endpoint {
            remote: from,
            local: Some(self.own),
        };
        // An impostor ignores messages that are not for it.
        match Message::parse(datagram) {
            Ok(Message::Data(data)) => {
                let Some(session) = self.sessions.get(&data.receiver).cloned() else {
                    return;
                };
                let Ok(opened) = session.open(data, datagram) else {
                    return;
                };
                self.tunnel.session_heard(now, &session, endpoint);
                if opened.flags.has(Flags::CONTROL) {
                    let message = &datagram[opened.plaintext];
                    let _ = self.tunnel.handle_control(now, &session, message);
                }
            }
            Ok(Message::Initiation(_) | Message::Response(_)) => {
                if let Ok(admitted) = self.mac_check.admit(now, from, datagram) {
                    let _ = self.tunnel.handle_handshake(now, endpoint, &admitted);
                }
            }
            Err(_) => {}
        }
    }
}
