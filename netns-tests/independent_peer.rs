//! A second implementation of the channel, made from the text of `contrib/protocol.md` alone. It
//! uses the libraries for Noise, AEAD, HKDF and BLAKE2s directly, and none of the daemon's code.
//! Its work with a real daemon shows that the text is complete, and its deliberate mistakes show
//! what a daemon refuses.

use std::collections::HashMap;
use std::net::UdpSocket;
use std::time::{Duration, Instant, SystemTime};

use aegis::aegis256x4::Aegis256X4;
use aws_lc_rs::aead::{AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::hkdf;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use blake2::Blake2sMac;
use blake2::digest::consts::U16;
use blake2::digest::{KeyInit, Mac};
use ipmoved::lab::LabError;

use crate::stage::Result;

/// The control lane.
pub(crate) const CONTROL_LANE: u8 = 255;

/// Flag: the plaintext is a control message.
pub(crate) const CONTROL: u8 = 8;

/// Cipher bits of the handshake.
const AES: u8 = 1;
const CHACHA: u8 = 2;
const AEGIS: u8 = 4;

/// One side of a channel, on a socket that is connected to the daemon's.
pub(crate) struct IndependentPeer {
    socket: UdpSocket,
    role: u8,
    mac_key: [u8; 32],
    noise_psk: [u8; 32],
    run_id: u64,
    timestamp: u64,
    /// The highest timestamp accepted from the daemon.
    pub(crate) seen: u64,
    pub(crate) session: Option<Session>,
    /// Earlier sessions, on which it still accepts datagrams.
    earlier: Vec<Session>,
    /// Packets that came.
    pub(crate) packets: Vec<Vec<u8>>,
    pub(crate) announcement: HashMap<u8, Vec<u8>>,
    pub(crate) others: Vec<Vec<u8>>,
}

/// A session, after its handshake.
pub(crate) struct Session {
    pub(crate) cipher: u8,
    pub(crate) own_index: u32,
    pub(crate) remote_index: u32,
    send: [u8; 32],
    receive: [u8; 32],
    counters: HashMap<u8, u64>,
}

/// An initiation under way.
pub(crate) struct Initiation {
    noise: snow::HandshakeState,
    index: u32,
    pub(crate) bytes: Vec<u8>,
}

fn hkdf(salt: &[u8], secret: &[u8], info: &[u8]) -> [u8; 32] {
    let mut key = [0; 32];
    hkdf::Salt::new(hkdf::HKDF_SHA256, salt)
        .extract(secret)
        .expand(&[info], hkdf::HKDF_SHA256)
        .and_then(|okm| okm.fill(&mut key))
        .expect("32 bytes");
    key
}

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    aws_lc_rs::rand::fill(&mut bytes).expect("randomness");
    bytes
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

impl IndependentPeer {
    /// `role`: 1 old, 2 new.
    pub(crate) fn new(socket: UdpSocket, psk: &str, role: u8) -> Self {
        let psk = STANDARD.decode(psk.trim()).expect("a key");
        socket
            .set_read_timeout(Some(Duration::from_millis(100)))
            .expect("a timeout");
        Self {
            socket,
            role,
            mac_key: hkdf(b"ipmoved v1 psk", &psk, b"mac"),
            noise_psk: hkdf(b"ipmoved v1 psk", &psk, b"noise"),
            run_id: u64::from_le_bytes(random()),
            timestamp: 0,
            seen: 0,
            session: None,
            earlier: Vec::new(),
            packets: Vec::new(),
            announcement: HashMap::new(),
            others: Vec::new(),
        }
    }

    pub(crate) fn socket(&self) -> &UdpSocket {
        &self.socket
    }

    fn noise(&self, initiator_role: u8) -> snow::Builder<'_> {
        let pattern = "Noise_NNpsk0_25519_ChaChaPoly_BLAKE2s";
        snow::Builder::new(pattern.parse().expect("a pattern"))
            .psk(0, &self.noise_psk)
            .and_then(|builder| {
                builder.prologue(match initiator_role {
                    1 => b"ipmoved\x01\x01",
                    _ => b"ipmoved\x01\x02",
                })
            })
            .expect("settings")
    }

    fn mac(&self, message: &[u8]) -> [u8; 16] {
        let key: &[u8; 32] = &self.mac_key;
        let mut mac = <Blake2sMac<U16> as KeyInit>::new(key.into());
        mac.update(message);
        mac.finalize().into_bytes().into()
    }

    /// Section 2: the first message.
    pub(crate) fn initiation(&mut self) -> Initiation {
        let clock = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .expect("after 1970")
            .as_nanos() as u64;
        self.timestamp = clock.max(self.timestamp + 1).max(self.seen);
        let index = u32::from_le_bytes(random());
        let mut payload = [0; 48];
        payload[..8].copy_from_slice(&self.timestamp.to_le_bytes());
        payload[8..16].copy_from_slice(&self.seen.to_le_bytes());
        payload[16..24].copy_from_slice(&self.run_id.to_le_bytes());
        payload[24] = AES | CHACHA | AEGIS;
        payload[25] = 1;
        payload[26] = 2;
        let mut noise = self
            .noise(self.role)
            .build_initiator()
            .expect("an initiator");
        let mut bytes = vec![0; 120];
        bytes[..4].copy_from_slice(&[1, 1, self.role, 0]);
        bytes[4..8].copy_from_slice(&index.to_le_bytes());
        let written = noise.write_message(&payload, &mut bytes[8..104]);
        assert_eq!(written.expect("a message"), 96);
        let mac = self.mac(&bytes[..104]);
        bytes[104..].copy_from_slice(&mac);
        Initiation {
            noise,
            index,
            bytes,
        }
    }

    /// Sections 2 and 3: handles the response to an initiation. Returns whether it was the right
    /// one.
    pub(crate) fn read_response(&mut self, initiation: Initiation, bytes: &[u8]) -> bool {
        let Initiation {
            mut noise, index, ..
        } = initiation;
        let right = bytes.len() == 108
            && bytes[..4] == [2, 1, 3 - self.role, 0]
            && u32_at(bytes, 8) == index
            && self.mac(&bytes[..92]) == bytes[92..];
        let mut payload = [0; 32];
        if !right || noise.read_message(&bytes[12..92], &mut payload).ok() != Some(32) {
            return false;
        }
        let (k1, k2) = noise.dangerously_get_raw_split();
        assert_eq!(
            payload[8] & payload[9],
            payload[8],
            "it chose what it allows"
        );
        self.earlier.extend(self.session.take());
        self.session = Some(Session {
            cipher: payload[8],
            own_index: index,
            remote_index: u32_at(bytes, 4),
            send: k1,
            receive: k2,
            counters: HashMap::new(),
        });
        true
    }

    /// Asks the daemon for a session, and shows that it holds the keys.
    pub(crate) fn shake_hands(&mut self) -> Result {
        for _ in 0..10 {
            let initiation = self.initiation();
            self.socket.send(&initiation.bytes).expect("sent");
            if let Some(response) = self.await_datagram(|bytes| bytes[0] == 2)
                && self.read_response(initiation, &response)
            {
                self.control(&[1]);
                return Ok(());
            }
        }
        Err(LabError::unexpected("the daemon did not shake hands"))
    }

    /// Waits until the daemon asks for a session, and grants it one.
    pub(crate) fn grant(&mut self) -> Result {
        let deadline = Instant::now() + Duration::from_secs(10);
        while Instant::now() < deadline {
            // It does not say what its clock shows.
            if self.answer(0) {
                return Ok(());
            }
        }
        Err(LabError::unexpected("the daemon asked for no session"))
    }

    /// Waits a second for an initiation, and answers it with what its own clock shows. Whether one
    /// came.
    pub(crate) fn answer(&mut self, clock: u64) -> bool {
        let Some(bytes) = self.await_datagram(|bytes| bytes[0] == 1) else {
            return false;
        };
        let other = 3 - self.role;
        let right = bytes.len() == 120
            && bytes[..4] == [1, 1, other, 0]
            && self.mac(&bytes[..104]) == bytes[104..];
        assert!(
            right,
            "an initiation that is not as the text says: {bytes:?}"
        );
        let mut noise = self.noise(other).build_responder().expect("a responder");
        let mut payload = [0; 48];
        let read = noise.read_message(&bytes[8..104], &mut payload);
        assert_eq!(read.expect("readable"), 48);
        assert!(u64_at(&payload, 0) > self.seen, "timestamps rise");
        self.seen = u64_at(&payload, 0);
        let index = u32::from_le_bytes(random());
        let mut ours = [CHACHA, AES, AEGIS].into_iter();
        let cipher = ours.find(|bit| payload[24] & bit != 0);
        let cipher = cipher.expect("a cipher that we know");
        let mut answer = [0; 32];
        answer[..8].copy_from_slice(&self.run_id.to_le_bytes());
        // The chosen cipher, then those that we allow. We claim no instructions for AES.
        answer[8] = cipher;
        answer[9] = AES | CHACHA | AEGIS;
        answer[11] = 1;
        answer[12..20].copy_from_slice(&clock.to_le_bytes());
        let mut response = vec![0; 108];
        response[..4].copy_from_slice(&[2, 1, self.role, 0]);
        response[4..8].copy_from_slice(&index.to_le_bytes());
        response[8..12].copy_from_slice(&bytes[4..8]);
        let written = noise.write_message(&answer, &mut response[12..92]);
        assert_eq!(written.expect("a message"), 80);
        let mac = self.mac(&response[..92]);
        response[92..].copy_from_slice(&mac);
        let (k1, k2) = noise.dangerously_get_raw_split();
        self.session = Some(Session {
            cipher,
            own_index: index,
            remote_index: u32_at(&bytes, 4),
            send: k2,
            receive: k1,
            counters: HashMap::new(),
        });
        // Whoever asked may be gone.
        let _ = self.socket.send(&response);
        true
    }

    /// Section 4: seals a plaintext with the next counter of a lane.
    pub(crate) fn seal(&mut self, flags: u8, lane: u8, plaintext: &[u8]) -> Vec<u8> {
        let session = self.session.as_mut().expect("a session");
        let counter = session.counters.entry(lane).or_default();
        let mut header = [0; 16];
        header[..4].copy_from_slice(&[4, flags, lane, 0]);
        header[4..8].copy_from_slice(&session.remote_index.to_le_bytes());
        header[8..].copy_from_slice(&counter.to_le_bytes());
        let number = *counter;
        *counter += 1;
        let body = session.seal(lane, number, header, plaintext);
        [&header[..], &body].concat()
    }

    /// Sends an IP packet on lane 0.
    pub(crate) fn packet(&mut self, packet: &[u8]) {
        let datagram = self.seal(0, 0, packet);
        self.socket.send(&datagram).expect("sent");
    }

    /// Sends a control message.
    pub(crate) fn control(&mut self, message: &[u8]) {
        let datagram = self.seal(CONTROL, CONTROL_LANE, message);
        self.socket.send(&datagram).expect("sent");
    }

    /// Opens a datagram of the session: flags, lane and plaintext.
    pub(crate) fn open(&self, datagram: &[u8]) -> Option<(u8, u8, Vec<u8>)> {
        if datagram.len() < 32 || datagram[0] != 4 || datagram[3] != 0 {
            return None;
        }
        let session = self
            .session
            .iter()
            .chain(&self.earlier)
            .find(|session| session.own_index == u32_at(datagram, 4))?;
        let (flags, lane) = (datagram[1], datagram[2]);
        let plaintext = session.open(lane, datagram)?;
        Some((flags, lane, plaintext))
    }

    fn await_datagram(&mut self, wanted: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
        let mut buffer = vec![0; 65_536];
        let deadline = Instant::now() + Duration::from_secs(1);
        while Instant::now() < deadline {
            let Ok(n) = self.socket.recv(&mut buffer) else {
                continue;
            };
            if n > 0 && wanted(&buffer[..n]) {
                return Some(buffer[..n].to_vec());
            }
        }
        None
    }

    /// Does its duties of section 6 until `done` holds: replies to pings, parts and probes, and
    /// collects everything else.
    pub(crate) fn serve(
        &mut self,
        patience: Duration,
        mut done: impl FnMut(&mut Self) -> bool,
    ) -> Result {
        let mut buffer = vec![0; 65_536];
        let deadline = Instant::now() + patience;
        while !done(self) {
            if Instant::now() > deadline {
                return Err(LabError::unexpected(format!(
                    "the daemon said only {:?}, {:?} and {} packets",
                    self.announcement,
                    self.others,
                    self.packets.len()
                )));
            }
            let Ok(n) = self.socket.recv(&mut buffer) else {
                continue;
            };
            let Some((flags, lane, plaintext)) = self.open(&buffer[..n]) else {
                continue;
            };
            if flags & CONTROL == 0 {
                assert_ne!(lane, CONTROL_LANE);
                self.packets.push(plaintext);
                continue;
            }
            assert_eq!((flags, lane), (CONTROL, CONTROL_LANE));
            match plaintext[0] {
                2 => self.control(&[&[3], &plaintext[1..5]].concat()),
                4 => {
                    let (part, parts) = (plaintext[5], plaintext[6]);
                    assert!(part < parts);
                    self.announcement.insert(part, plaintext[7..].to_vec());
                    self.control(&[&[5], &plaintext[1..5], &[part]].concat());
                }
                7 => {
                    assert_eq!(
                        usize::from(u16::from_le_bytes([plaintext[1], plaintext[2]])),
                        n
                    );
                    self.control(&[8, plaintext[1], plaintext[2]]);
                }
                _ => self.others.push(plaintext),
            }
        }
        Ok(())
    }

    /// Whether a control message with this beginning came.
    pub(crate) fn heard(&self, start: &[u8]) -> bool {
        self.others.iter().any(|other| other.starts_with(start))
    }
}

impl Session {
    /// Section 3: the key of a direction and lane.
    fn key(&self, split: &[u8; 32], lane: u8) -> [u8; 32] {
        hkdf(b"ipmoved v1 lane", split, &[self.cipher, lane])
    }

    fn aws_lc(&self, key: &[u8; 32]) -> LessSafeKey {
        let algorithm = match self.cipher {
            AES => &AES_256_GCM,
            _ => &CHACHA20_POLY1305,
        };
        LessSafeKey::new(UnboundKey::new(algorithm, key).expect("a key"))
    }

    /// Section 4: ciphertext and tag.
    fn seal(&self, lane: u8, counter: u64, header: [u8; 16], plaintext: &[u8]) -> Vec<u8> {
        let key = self.key(&self.send, lane);
        let mut body = plaintext.to_vec();
        if self.cipher == AEGIS {
            let aegis = Aegis256X4::<16>::new(&key, &nonce(counter));
            let tag = aegis.encrypt_in_place(&mut body, &header);
            body.extend(tag);
        } else {
            let nonce = Nonce::assume_unique_for_key(nonce(counter));
            self.aws_lc(&key)
                .seal_in_place_append_tag(nonce, Aad::from(header), &mut body)
                .expect("sealed");
        }
        body
    }

    /// Section 4: the plaintext.
    fn open(&self, lane: u8, datagram: &[u8]) -> Option<Vec<u8>> {
        let key = self.key(&self.receive, lane);
        let (header, body) = datagram.split_at(16);
        let counter = u64_at(datagram, 8);
        let mut body = body.to_vec();
        if self.cipher == AEGIS {
            let tag: [u8; 16] = body.split_off(body.len() - 16).try_into().ok()?;
            let aegis = Aegis256X4::<16>::new(&key, &nonce(counter));
            aegis.decrypt_in_place(&mut body, &tag, header).ok()?;
            return Some(body);
        }
        let nonce = Nonce::assume_unique_for_key(nonce(counter));
        let key = self.aws_lc(&key);
        let opened = key.open_in_place(nonce, Aad::from(header), &mut body);
        opened.ok().map(|plaintext| plaintext.to_vec())
    }

    /// Its secrets on both sides: the split keys, and the keys of the first lane and of the control
    /// lane.
    pub(crate) fn secrets(&self) -> Vec<[u8; 32]> {
        let lanes = [0, CONTROL_LANE].into_iter();
        let keys =
            lanes.flat_map(|lane| [&self.send, &self.receive].map(|split| self.key(split, lane)));
        keys.chain([self.send, self.receive]).collect()
    }
}

fn nonce<const N: usize>(counter: u64) -> [u8; N] {
    let mut bytes = [0; N];
    bytes[N - 8..].copy_from_slice(&counter.to_le_bytes());
    bytes
}
