//! Fuzz targets: one function for each place where other people's bytes come in.
//!
//! `contrib/fuzz` hands these functions to `cargo fuzz`. The tests below run the same ones, from
//! the same corpus, for a moment each, or for as long as `IPMOVED_FUZZ_SECONDS` says. No bytes may
//! make them panic, and each asserts what else must hold. The status socket is not among them:
//! nothing is ever read from it.

// The virtual clock of a fuzzer has to begin somewhere, and an `unwrap` that fails is a find.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, missing_docs)]

use std::cell::RefCell;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crate::channel::parts::{Part, Reassembler, Stream};
use crate::channel::session::{
    CipherPolicy, Entropy, Initiating, InitiationPayload, MacCheck, Offer, PeerKeys, Psk, Session,
    SessionIndexes,
};
use crate::channel::tunnel::{Announcement, Deliver, Event, Timers, Tunnel, TunnelConfig};
use crate::channel::wire::{DATA_OVERHEAD, Data, Message};
use crate::daemon::check_reloads;
use crate::flow::gate::{Gate, GateConfig};
use crate::flow::routes::Delivery;
use crate::flow::seed::Seed;
use crate::flow::translate::{Translator, TranslatorConfig};
use crate::io::entropy;
use crate::kernel::Change;
use crate::kernel::journal::understand;
use crate::model::accept::Accept;
use crate::model::moved::Move;
use crate::model::moved_list;
use crate::model::peer::{Endpoint, PeerId, Role};
use crate::packet::coalesce::{Coalescer, Push, Reach};
use crate::packet::ecn;
use crate::packet::icmp;
use crate::packet::segment::Segments;
use crate::packet::vnet::{Offload, VnetHdr};
use crate::packet::{Kind, Parsed, clamp_mss};
use crate::settings::args::RunArgs;
use crate::settings::config::Config;
use crate::settings::file::File;
use crate::settings::files::{Files, Found};
use crate::settings::values::DeliverTo;

const MOVED: &str = "192.0.2.5";
const MOVED_PORT: &str = "[2001:db8::5]:80/tcp";

/// A fuzz target, called with the bytes.
pub type Target = fn(&[u8]);

/// Every target, by the name of its corpus.
pub const TARGETS: [(&str, Target); 10] = [
    ("datagram", datagram),
    ("handshake", handshake),
    ("control", control),
    ("packet", packet),
    ("parts", parts),
    ("coalesce", coalesce),
    ("moved", moved),
    ("settings", settings),
    ("journal", journal),
    ("reload", reload),
];

/// A new server's tunnel that has a session with an old one's.
struct Bed {
    now: Instant,
    keys: PeerKeys,
    mac_check: MacCheck,
    new: Tunnel,
    session: Arc<Session>,
    entropy: Entropy,
}

impl Bed {
    fn new() -> Self {
        let psk: Psk = "AQIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyA="
            .parse()
            .unwrap();
        let keys = PeerKeys::derive(&psk);
        let now = Instant::now();
        let tunnel = |role: Role, announcement| {
            let config = TunnelConfig {
                peer: PeerId(0),
                keys: keys.clone(),
                role,
                lanes: 1,
                offer: offer(),
                endpoint: (role == Role::Old).then(|| endpoint(2).remote),
                announcement,
                max_datagram: Some(1_472),
                timers: Timers::default(),
                indexes: SessionIndexes::default(),
                entropy: entropy::system(),
            };
            Tunnel::new(config, now).unwrap()
        };
        let moves = vec![MOVED.parse().unwrap()];
        let mut old = tunnel(
            Role::Old,
            Announcement::Old {
                moves,
                mtu: 1_500,
                reached: None,
                outgoing: false,
            },
        );
        let deliver = Deliver::To { v4: None, v6: None };
        let announcement = Announcement::New {
            deliver,
            mtu: 1_500,
            error: None,
        };
        let mut new = tunnel(Role::New, announcement);
        let mac_check = MacCheck::new(Role::New, [keys.clone()]);
        let of_old = MacCheck::new(Role::Old, [keys.clone()]);
        let from = endpoint(1).remote;
        old.handle_timeout(now, SystemTime::UNIX_EPOCH);
        let initiation = old.poll_transmit().unwrap().datagram;
        let admitted = mac_check.admit(now, from, &initiation).unwrap();
        new.handle_handshake(now, endpoint(1), &admitted).unwrap();
        let response = new.poll_transmit().unwrap().datagram;
        let admitted = of_old.admit(now, from, &response).unwrap();
        old.handle_handshake(now, endpoint(2), &admitted).unwrap();
        let mut installed = None;
        while let Some(event) = new.poll_event() {
            if let Event::SessionInstalled(session) = event {
                installed = Some(session);
            }
        }
        let session = installed.unwrap();
        while let Some(mut transmit) = old.poll_transmit() {
            let data = Data::parse(&transmit.datagram).unwrap();
            let opened = session.open(data, &mut transmit.datagram).unwrap();
            new.session_heard(now, &session, endpoint(1));
            let message = &transmit.datagram[opened.plaintext];
            new.handle_control(now, &session, message).unwrap();
        }
        Self {
            now,
            keys,
            mac_check,
            new,
            session,
            entropy: entropy::system(),
        }
    }

    /// Takes what came of a message, and asserts that it stays within bounds.
    fn drain(&mut self, most: usize) {
        let mut out = 0;
        while self.new.poll_event().is_some() {
            out += 1;
        }
        while self.new.poll_transmit().is_some() {
            out += 1;
        }
        assert!(out <= most, "{out} from one message");
    }
}

fn offer() -> Offer {
    Offer {
        ciphers: CipherPolicy::Auto.into(),
        aes_hardware: true,
    }
}

fn endpoint(host: u8) -> Endpoint {
    Endpoint {
        remote: SocketAddr::from(([192, 0, 2, host], 51_850)),
        local: Some([198, 51, 100, 2].into()),
    }
}

fn with_bed(act: impl FnOnce(&mut Bed)) {
    thread_local!(static BED: RefCell<Bed> = RefCell::new(Bed::new()));
    BED.with_borrow_mut(act);
}

/// A datagram from a stranger.
pub fn datagram(bytes: &[u8]) {
    match Message::parse(bytes) {
        Ok(Message::Data(data)) => {
            assert!(bytes.len() >= DATA_OVERHEAD);
            assert_eq!(data.encode(), bytes[..16]);
        }
        Ok(Message::Initiation(view)) => assert_eq!(view.noise().len(), 96),
        Ok(Message::Response(view)) => assert_eq!(view.noise().len(), 80),
        Err(_) => {}
    }
    with_bed(|bed| {
        let admitted = bed.mac_check.admit(bed.now, endpoint(0).remote, bytes);
        assert!(admitted.is_err(), "nobody guesses a mac");
        let mut forged = bytes.to_vec();
        if forged.len() >= 8 {
            forged[..1].copy_from_slice(&[4]);
            forged[4..8].copy_from_slice(&bed.session.index().to_le_bytes());
        }
        if let Ok(data) = Data::parse(&forged) {
            assert!(bed.session.open(data, &mut forged).is_err());
        }
    });
}

/// Initiations of a peer that says whatever it likes in them.
pub fn handshake(bytes: &[u8]) {
    with_bed(|bed| {
        for payload in bytes.as_chunks::<48>().0.iter().take(8) {
            let Some(initiation) = InitiationPayload::decode(payload) else {
                continue;
            };
            let role = if payload[47] & 7 == 7 {
                Role::New
            } else {
                Role::Old
            };
            let index = SessionIndexes::default().draw(&bed.entropy).unwrap();
            let begun = Initiating::begin(&bed.keys, role, index, &initiation, &bed.entropy);
            let (_, message) = begun.unwrap();
            let from = endpoint(payload[45]);
            let admitted = bed.mac_check.admit(bed.now, from.remote, &message);
            bed.now += Duration::from_millis(u64::from(payload[46]) * 100);
            // Of our own role one a minute passes.
            if let Ok(admitted) = admitted {
                let _ = bed.new.handle_handshake(bed.now, from, &admitted);
            }
            bed.new.handle_timeout(bed.now, SystemTime::UNIX_EPOCH);
            bed.drain(40);
        }
        // The message may have ruined the clocks for good: begin anew.
        *bed = Bed::new();
    });
}

/// Control messages of a peer, each behind its length.
pub fn control(bytes: &[u8]) {
    with_bed(|bed| {
        let mut rest = bytes;
        for _ in 0..64 {
            let Some((&length, tail)) = rest.split_first() else {
                break;
            };
            let (message, tail) = tail.split_at(usize::from(length).min(tail.len()));
            rest = tail;
            let _ = bed.new.handle_control(bed.now, &bed.session, message);
            bed.drain(80);
        }
        if bed.new.session().is_none() {
            *bed = Bed::new();
        }
    });
    if let Some(read) = Announcement::decode(bytes) {
        assert_eq!(Announcement::decode(&read.encode()), Some(read));
    }
}

/// An IP packet out of the tunnel, and one from the TUN behind its virtio header.
pub fn packet(bytes: &[u8]) {
    thread_local!(static SERVERS: (Gate, Translator, Instant) = servers());
    SERVERS.with(|(gate, translator, now)| {
        let Ok(parsed) = Parsed::parse(bytes) else {
            return;
        };
        assert!(parsed.total() <= bytes.len() && parsed.payload() <= parsed.total());
        let _ = gate.check_captured(*now, &parsed, bytes);
        let _ = gate.check_returning(*now, &parsed, bytes, &[]);
        for partial in [false, true] {
            let (mut bytes, mut parsed) = (bytes.to_vec(), parsed);
            let _ = ecn::carry_over(&mut bytes, &parsed, 3);
            clamp_mss(&mut bytes, &parsed, 1_300, 1_280, partial);
            let inbound = translator.inbound(*now, PeerId(0), &mut bytes, &mut parsed, partial);
            let again = Parsed::parse(&bytes);
            assert!(inbound.is_err() || again.is_ok(), "{inbound:?} {again:?}");
            let _ = translator.outbound(*now, &mut bytes, &mut parsed, partial);
            let mut reply = [0; 2_048];
            let from: IpAddr = MOVED.parse().unwrap();
            let _ = icmp::too_big(&mut reply, &bytes, &parsed, from, 1_280);
            let _ = icmp::time_exceeded(&mut reply, &bytes, &parsed, from);
        }
    });
    if let Some((vnet, rest)) = bytes.split_first_chunk() {
        let mut packet = rest.to_vec();
        let Ok(parsed) = Parsed::parse(&packet) else {
            return;
        };
        let vnet = VnetHdr::read(vnet);
        let Ok(offload) = Offload::accept(&vnet, &mut packet, &parsed) else {
            return;
        };
        let mut segments = Segments::new(offload, &packet, &parsed, 1_400);
        let mut out = vec![0; 65_536];
        let mut count = 0;
        while let Some(segment) = segments.next_into(&mut out) {
            assert!(Parsed::parse(&out[..segment.len]).is_ok());
            count += 1;
            assert!(count <= 65_536);
        }
    }
}

fn servers() -> (Gate, Translator, Instant) {
    let now = Instant::now();
    let moves: Vec<Move> = vec![MOVED.parse().unwrap(), MOVED_PORT.parse().unwrap()];
    let translator = Translator::new(TranslatorConfig {
        shards: 1,
        max_flows: 1_000,
        seed: [1, 2],
        epoch: now,
        note_ended: false,
    });
    translator.set_moves(PeerId(0), &moves);
    let delivery = Delivery {
        v4: Some([198, 51, 100, 2].into()),
        v6: Some("2001:db8:b::2".parse().unwrap()),
        ..Delivery::default()
    };
    translator.set_delivery(PeerId(0), delivery);
    let config = GateConfig {
        max_flows: 1_000,
        seed: Seed::new([1, 2]),
        started: now,
        resumes: true,
    };
    let gate = Gate::new(&moves, config);
    (gate, translator, now)
}

/// Parts of packets in any order. Three bytes of each say what it is.
pub fn parts(bytes: &[u8]) {
    let mut reassembler = Reassembler::default();
    let mut given_up = 0;
    for part in bytes.as_chunks::<3>().0 {
        let stream = Stream {
            session: u32::from(part[0] >> 6),
            lane: part[0] >> 5 & 1,
        };
        let whole = reassembler.push(
            stream,
            Part {
                counter: u64::from(part[1]),
                continues: part[0] & 1 != 0,
                more: part[0] & 2 != 0,
                bytes: &vec![part[2]; usize::from(part[2]) * 100],
            },
        );
        assert!(whole.is_none_or(|packet| packet.len() <= 65_535));
        given_up += reassembler.take_incomplete();
    }
    assert!(given_up <= bytes.len() as u64);
}

/// Packets side by side in one slab, as they come out of a batch. Each lies behind its length. The
/// high bits of that say how often the packet comes again, as the next of its stream, and whether
/// its checksum is partial.
pub fn coalesce(bytes: &[u8]) {
    /// Enough to coalesce more than 64 KiB.
    const MOST: usize = 200_000;
    let reach = if bytes.len().is_multiple_of(3) {
        Reach::Here
    } else {
        Reach::Further
    };
    let uso = bytes.len().is_multiple_of(2);
    let (mut slab, mut ranges) = (Vec::new(), Vec::new());
    let mut rest = bytes;
    while let Some((length, after)) = rest.split_first_chunk::<2>() {
        let length = u16::from_le_bytes(*length);
        let (packet, after) = after.split_at(after.len().min(usize::from(length & 0x07ff)));
        rest = after;
        let again = u32::from(length >> 11 & 0xf) * 4;
        for copy in 0..=again {
            if slab.len() + packet.len() > MOST {
                break;
            }
            let start = slab.len();
            slab.extend_from_slice(packet);
            advance(&mut slab[start..], copy);
            ranges.push((start..slab.len(), length >> 15 == 1));
        }
    }

    // One follows without parsing where it can, the other parses all: both have to come to the
    // same.
    let (mut following, mut parsing) = (Coalescer::new(uso, reach), Coalescer::new(uso, reach));
    let mut twin = slab.clone();
    for (range, partial) in ranges {
        let parsed = Parsed::parse(&slab[range.clone()]);
        let followed = following.follow(&slab, range.clone(), partial);
        let Ok(parsed) = parsed else {
            assert!(!followed, "followed what does not parse");
            continue;
        };
        let range = range.start..range.start + parsed.total();
        if followed {
            let pushed = parsing.push(&twin, range, &parsed, partial);
            assert_eq!(pushed, Push::Coalesced);
            continue;
        }
        let pushed = following.push(&slab, range.clone(), &parsed, partial);
        assert_eq!(parsing.push(&twin, range.clone(), &parsed, partial), pushed);
        if pushed == Push::MustFlush {
            take_apart(&mut following, &mut slab);
            take_apart(&mut parsing, &mut twin);
            let _ = following.push(&slab, range.clone(), &parsed, partial);
            let _ = parsing.push(&twin, range, &parsed, partial);
        }
    }
    take_apart(&mut following, &mut slab);
    take_apart(&mut parsing, &mut twin);
    assert_eq!(slab, twin);
}

/// Makes of a packet the one that comes `copies` later in its stream.
fn advance(packet: &mut [u8], copies: u32) {
    let Ok(parsed) = Parsed::parse(packet) else {
        return;
    };
    let (at, payload) = (parsed.l4() + 4, parsed.payload_len() as u32);
    if parsed.kind() == Kind::Tcp
        && let Some(seq) = packet.get_mut(at..).and_then(<[u8]>::first_chunk_mut)
    {
        *seq = u32::from_be_bytes(*seq)
            .wrapping_add(payload.wrapping_mul(copies))
            .to_be_bytes();
    }
}

/// Finishes what is held, and takes it apart again.
fn take_apart(coalescer: &mut Coalescer, slab: &mut [u8]) {
    let Some(coalesced) = coalescer.finish(slab) else {
        return;
    };
    let (packets, total) = (coalesced.packets, coalesced.parsed.total());
    let sum: usize = coalesced.parts.iter().map(ExactSizeIterator::len).sum();
    assert_eq!(sum, total, "all of it and no more");
    assert!(packets >= 1 && coalesced.parts.len() >= packets.min(2));
    let (_, parts) = coalescer.take_apart(slab);
    for part in parts {
        assert!(Parsed::parse(&slab[part.clone()]).is_ok());
    }
}

/// A move, as it is typed, announced and accepted.
pub fn moved(bytes: &[u8]) {
    if let Ok(accept) = std::str::from_utf8(bytes).unwrap_or_default().parse() {
        let accept: Accept = accept;
        assert_eq!(accept.to_string().parse().as_ref(), Ok(&accept));
    }
    if let Some(moved) = std::str::from_utf8(bytes)
        .ok()
        .and_then(|text| text.parse::<Move>().ok())
    {
        let again: Move = moved.to_string().parse().unwrap();
        assert_eq!(again, moved);
        assert!(moved.overlaps(&again));
        let accept: Accept = moved.to_string().parse().unwrap();
        assert!(Accept::all_accept(&[accept], &moved));
        let mut encoded = Vec::new();
        moved_list::encode(std::slice::from_ref(&moved), &mut encoded);
        assert_eq!(moved_list::decode(&encoded), Some(vec![moved]));
    }
    if let Some(moves) = moved_list::decode(bytes) {
        let mut encoded = Vec::new();
        moved_list::encode(&moves, &mut encoded);
        assert_eq!(moved_list::decode(&encoded), Some(moves));
    }
    if let Some(moved) = Move::decode(&mut &bytes[..]) {
        let mut encoded = Vec::new();
        moved.encode(&mut encoded);
        assert_eq!(Move::decode(&mut &encoded[..]), Some(moved));
    }
}

/// What a configuration file means; `None` where it is refused, in one line.
fn config(text: &str) -> Option<Config> {
    let mut file = match File::parse(text) {
        Ok(file) => file,
        Err(mistake) => {
            assert!(!mistake.message.contains('\n'), "{mistake}");
            if let Some((line, column)) = mistake.at {
                let line = text.split('\n').nth(line - 1).expect("a line of the text");
                assert!(column <= line.chars().count() + 1, "{mistake}");
            }
            return None;
        }
    };
    file.peer.psk_file = None;
    for table in &mut file.peers {
        table.peer.psk_file = None;
    }
    let nothing = Files::Given(Found::default());
    let given = Arc::new(RunArgs::default());
    let merged = Config::merge(&given, file, &nothing, Vec::new());
    let refused = |error: &dyn std::error::Error| {
        assert!(!error.to_string().contains('\n'), "{error}");
    };
    merged.inspect_err(|error| refused(error)).ok()
}

/// A configuration file. The files it names are not opened.
pub fn settings(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let Some(config) = config(text) else {
        return;
    };
    assert!(!config.peers.is_empty() && config.lanes > 0 && config.max_flows > 0);
    for peer in &config.peers {
        if let Some(endpoint) = &peer.endpoint {
            assert_eq!(endpoint.to_string().parse().as_ref(), Ok(endpoint));
        }
        for map in &peer.deliver {
            assert_eq!(map.to_string().parse().as_ref(), Ok(map));
        }
        for accept in &peer.accept {
            assert_eq!(accept.to_string().parse().as_ref(), Ok(accept));
        }
        for prefix in &peer.clients_from {
            assert_eq!(prefix.to_string().parse().as_ref(), Ok(prefix));
        }
        assert!(peer.deliver_to != DeliverTo::Keep || !peer.accept.is_empty());
        assert!(peer.moves.is_empty() || config.role == Role::Old);
    }
}

/// Configurations one after the other, each behind a line of dashes: what a daemon that runs by the
/// first makes of the others.
pub fn reload(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let all: Vec<Config> = text.split("\n---\n").take(8).filter_map(config).collect();
    check_reloads(&all);
}

/// A journal that anybody may have written.
pub fn journal(bytes: &[u8]) {
    let Ok(recorded) = understand(bytes) else {
        return;
    };
    for change in &recorded.changes {
        if let Change::Sysctl(sysctl) = change {
            assert!(sysctl.path.starts_with("net/") && !sysctl.path.contains("/../"));
        }
    }
    // What was understood is understood again, without a word.
    let again = serde_json::json!({ "version": 1, "boot_id": "", "changes": recorded.changes });
    let again = understand(&serde_json::to_vec(&again).unwrap()).unwrap();
    assert_eq!((&again.changes, again.skipped), (&recorded.changes, 0));
    assert!(again.notes.into_lines().is_empty());
    let notes = recorded.notes.into_lines();
    assert!(recorded.skipped == 0 || !notes.is_empty());
    assert!(notes.len() <= 17 && notes.iter().all(|note| note.len() < 1_200));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::path::PathBuf;

    /// How long each target is run for unless told otherwise.
    const MOMENT: Duration = Duration::from_millis(300);

    fn corpus(target: &str) -> PathBuf {
        PathBuf::from(env!("CARGO_MANIFEST_DIR"))
            .join("contrib/fuzz/corpus")
            .join(target)
    }

    fn run(target: usize) {
        let (name, act) = TARGETS[target];
        let mut inputs: Vec<Vec<u8>> = fs::read_dir(corpus(name))
            .unwrap()
            .map(|entry| fs::read(entry.unwrap().path()).unwrap())
            .collect();
        inputs.sort();
        assert!(!inputs.is_empty(), "the corpus of {name}");
        inputs.iter().for_each(|input| act(input));
        let seconds = std::env::var("IPMOVED_FUZZ_SECONDS")
            .ok()
            .and_then(|text| text.parse().ok());
        let time = seconds.map_or(MOMENT, Duration::from_secs);
        let seed = seconds.map_or(7, |_| entropy::system().u64().unwrap());
        let dice = Entropy::seeded(seed);
        let roll = |below: usize| (dice.u64().unwrap() % below.max(1) as u64) as usize;
        let started = Instant::now();
        let mut runs = 0u64;
        while started.elapsed() < time {
            let mut input = inputs[roll(inputs.len())].clone();
            for _ in 0..=roll(8) {
                mutate(&mut input, &inputs, &roll);
            }
            let result = std::panic::catch_unwind(|| act(&input));
            assert!(result.is_ok(), "{name}, seed {seed}: {input:?}");
            runs += 1;
            // An input that is new in length or kind may lead on to others.
            if runs.is_multiple_of(64) && inputs.len() < 4_096 {
                inputs.push(input);
            }
        }
        println!(
            "{name}: {runs} runs in {:?}, seed {seed}",
            started.elapsed()
        );
    }

    fn mutate(input: &mut Vec<u8>, others: &[Vec<u8>], roll: &dyn Fn(usize) -> usize) {
        const TELLING: [u8; 12] = [0, 1, 2, 4, 6, 17, 58, 0x40, 0x45, 0x60, 0x7f, 0xff];
        let at = roll(input.len());
        match roll(8) {
            0 if !input.is_empty() => input[at] ^= 1 << roll(8),
            1 if !input.is_empty() => input[at] = roll(256) as u8,
            2 if !input.is_empty() => input[at] = TELLING[roll(TELLING.len())],
            3 => input.insert(at, roll(256) as u8),
            4 if !input.is_empty() => drop(input.remove(at)),
            5 => input.truncate(at),
            6 => {
                let other = &others[roll(others.len())];
                let from = roll(other.len());
                input.truncate(at);
                input.extend_from_slice(&other[from..]);
            }
            _ => {
                let repeat = input[at..].to_vec();
                input.extend_from_slice(&repeat[..repeat.len().min(200)]);
            }
        }
        input.truncate(4_096);
    }

    #[test]
    fn datagrams() {
        run(0);
    }

    #[test]
    fn handshakes() {
        run(1);
    }

    #[test]
    fn control_messages() {
        run(2);
    }

    #[test]
    fn packets() {
        run(3);
    }

    #[test]
    fn parts_of_packets() {
        run(4);
    }

    #[test]
    fn packets_side_by_side() {
        run(5);
    }

    #[test]
    fn moves() {
        run(6);
    }

    #[test]
    fn configuration_files() {
        run(7);
    }

    #[test]
    fn journals() {
        run(8);
    }

    #[test]
    fn reloaded_configurations() {
        run(9);
    }
}
