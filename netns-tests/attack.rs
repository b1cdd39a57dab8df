//! Floods by strangers, floods of recorded datagrams, and floods by a peer with a key. None of them
//! harms anybody else.
//!
//! ```text
//!  clients (and strangers) ──── router ──┬── old server: the daemon, and beside it a mad peer
//!                                        │              ║ two tunnels
//!                                        └── new server: one daemon for both
//! ```

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use ipmoved::internals::Role;
use ipmoved::lab::daemon::{read_psk, write_psk};
use ipmoved::lab::topology::{CLIENT, MOVED, NEW, OLD};
use ipmoved::lab::{Lab, LabError, Process, Service, UdpService, patience, poll_until};

use crate::independent_peer::IndependentPeer;
use crate::protocol_text::{old_announcement, socket_to};
use crate::relay::{Dice, PORT};
use crate::stage::{MEGABYTE, Moved, PATIENCE, Result, moved, setup};
use crate::stream::Stream;

/// Datagrams of the strangers' flood, to each server.
const FLOOD: u64 = 60_000;

/// How much a process may grow under attack.
const GROWTH: u64 = 24 << 20;

/// How many bytes a daemon may log about it: a line a minute for each kind of trouble, and some
/// more.
const WORDS: usize = 8_192;

/// Resident memory of a process.
fn resident(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("VmRSS:"));
    let kib = line.and_then(|line| line.split_ascii_whitespace().nth(1)?.parse::<u64>().ok());
    kib.unwrap_or_default() << 10
}

/// Ticks of processor time that a process has used, in user space and in the kernel.
fn ticks(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields = text
        .rsplit_once(')')
        .map(|(_, fields)| fields)
        .unwrap_or_default();
    fields
        .split_ascii_whitespace()
        .skip(11)
        .take(2)
        .filter_map(|field| field.parse::<u64>().ok())
        .sum()
}

/// UDP datagrams and ICMP messages that the clients' host has received.
fn came_back(lab: &Lab) -> Result<u64> {
    let text = lab.clients().run(|| {
        fs::read_to_string("/proc/thread-self/net/snmp")
            .map_err(|error| LabError::unexpected(error.to_string()))
    })?;
    let field = |protocol: &str, name: &str| {
        let mut lines = text.lines().filter_map(|line| line.strip_prefix(protocol));
        let (names, values) = (lines.next()?, lines.next()?);
        let mut pairs = names
            .split_ascii_whitespace()
            .zip(values.split_ascii_whitespace());
        pairs.find(|(of, _)| *of == name)?.1.parse::<u64>().ok()
    };
    let fields = [
        ("Udp:", "InDatagrams"),
        ("Udp:", "NoPorts"),
        ("Udp:", "InErrors"),
        ("Icmp:", "InMsgs"),
    ];
    fields
        .iter()
        .map(|(protocol, name)| field(protocol, name))
        .sum::<Option<u64>>()
        .ok_or_else(|| LabError::unexpected("the kernel counts nothing"))
}

/// Ends a flood when it is dropped, whatever the reason.
struct Until<'a>(&'a AtomicBool);

impl Drop for Until<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// Leaves some of the machine's few processors to the daemons under attack.
fn pace(sent: u64) {
    if sent.is_multiple_of(16) {
        thread::sleep(Duration::from_micros(500));
    }
}

#[test]
fn a_hundred_thousand_strangers_get_nothing_while_a_download_runs() -> Result {
    moved(|on: Moved<'_>| {
        let mut daemons = on.daemons;
        let pids = [daemons.old.process().id(), daemons.new.process().id()];
        let before = pids.map(resident);
        let came_before = came_back(on.lab)?;
        let done = AtomicBool::new(false);
        thread::scope(|scope| -> Result {
            let download = scope.spawn(|| {
                while !done.load(Relaxed) {
                    on.lab.client().download(MOVED, 4 * MEGABYTE)?;
                }
                Ok::<_, LabError>(())
            });
            let floods = [OLD, NEW].map(|server| {
                let socket = on.lab.second_client().udp_socket((server, PORT));
                scope.spawn(move || {
                    let socket = socket?;
                    let mut dice = Dice(9);
                    let mut buffer = [0u8; 1_472];
                    for byte in &mut buffer {
                        *byte = dice.next() as u8;
                    }
                    for n in 0..FLOOD {
                        // All lengths, and heads that look right: type, version, role, reserved.
                        let length = match n % 4 {
                            0 => 120,
                            1 => 108,
                            _ => dice.next() as usize % 1_473,
                        };
                        buffer[..4].copy_from_slice(&match n % 5 {
                            0 => [1, 1, 1 + (n % 2) as u8, 0],
                            1 => [2, 1, 1 + (n % 2) as u8, 0],
                            2 => [4, 0, 0, 0],
                            3 => [4, 8, 255, 0],
                            _ => (dice.next() as u32).to_le_bytes(),
                        });
                        buffer[8..16].copy_from_slice(&n.to_le_bytes());
                        let _ = socket.send(&buffer[..length]);
                    }
                    Ok::<_, LabError>(())
                })
            });
            let until = Until(&done);
            for flood in floods {
                flood.join().expect("the flood ends")?;
            }
            drop(until);
            download.join().expect("the download ends")
        })?;
        // The download is TCP, so every UDP datagram and every ICMP message would be a reply to a
        // stranger.
        assert_eq!(came_back(on.lab)?, came_before, "strangers were answered");
        for (role, (pid, before)) in [Role::Old, Role::New].iter().zip(pids.iter().zip(before)) {
            let status = on.setup.status(*role)?;
            let counted: u64 = [
                "wire_malformed",
                "wire_version",
                "handshake_auth",
                "session_unknown",
            ]
            .iter()
            .map(|reason| status.drops(reason))
            .sum();
            assert!(counted > FLOOD / 2, "{counted}: {:?}", status.all_drops());
            assert!(resident(*pid) < before + GROWTH, "{role} grew");
        }
        let said = daemons.new.process().stderr();
        assert!(said.len() < WORDS, "{said}");
        Ok(())
    })
}

/// Starts the new server's daemon with two peers: the old server, and one with a key of its own.
fn two_peers(lab: &Lab) -> Result<(Process, String)> {
    let setup = setup(lab)?;
    let mad = lab.dir().join("psk-mad");
    write_psk(&mad)?;
    let path = lab.dir().join("two.toml");
    let text = format!(
        "[[peers]]\npeer = \"{OLD}\"\npsk-file = {:?}\n[[peers]]\npsk-file = {mad:?}\n",
        setup.psk_file(Role::New)
    );
    let failed = |error: std::io::Error| LabError::unexpected(error.to_string());
    fs::write(&path, text).map_err(failed)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
    let mut command = setup.command();
    command.arg("--config").arg(path);
    Ok((lab.new_server().spawn(command)?, read_psk(&mad)?))
}

/// Checks that others are served, shake hands and get a status while `flood` runs again and again.
fn others_do_not_suffer(
    flood: impl Fn(&mut IndependentPeer, &Lab, &AtomicBool) -> Result<u64> + Sync,
) -> Result {
    let lab = Lab::new()?;
    let (new, psk) = two_peers(&lab)?;
    let setup = setup(&lab)?;
    let _application = Service::start(lab.new_server(), NEW)?;
    let _echo = UdpService::start(lab.new_server(), (NEW, 53))?;
    let mut old = setup.start(Role::Old)?;
    old.wait_until_up()?;
    let mut conversation = lab.client().converse(MOVED)?;
    conversation.exchange(b"before", PATIENCE)?;
    let mut mad = IndependentPeer::new(socket_to(lab.old_server(), NEW)?, &psk, 1);
    mad.shake_hands()?;
    mad.control(&old_announcement(1, &[[203, 0, 113, 200].into()]));
    mad.serve(PATIENCE, |it| it.heard(&[5]))?;
    let before = resident(new.id());
    let (stop, lab) = (AtomicBool::new(false), &lab);
    thread::scope(|scope| -> Result {
        let flooding = scope.spawn(|| flood(&mut mad, lab, &stop));
        {
            let _until = Until(&stop);
            let (began, ticks_before) = (Instant::now(), ticks(new.id()));
            thread::sleep(Duration::from_millis(500));
            // A new handshake gets through.
            old.process().signal(rustix::process::Signal::KILL)?;
            poll_until(PATIENCE, Duration::from_millis(5), || {
                old.process().exited()
            });
            old = setup.start(Role::Old)?;
            let restarted = Instant::now();
            old.wait_for_state("up", PATIENCE)?;
            let up = restarted.elapsed();
            // The daemon answers `status`.
            let asked = Instant::now();
            let status = setup.status(Role::New)?;
            let told = asked.elapsed();
            // It also carries packets.
            conversation.exchange(&[8; 200_000], PATIENCE)?;
            let stream = Stream::start(lab.client(), (MOVED, 53), 100, Duration::from_millis(5))?;
            thread::sleep(Duration::from_secs(1));
            let echoes = stream.stop()?;
            let ticks = ticks(new.id()) - ticks_before;
            println!(
                "up after {up:?}, told after {told:?}, {} of {} datagrams echoed, {ticks} ticks in \
                 {:?}, {:?}",
                echoes.back.len(),
                echoes.sent,
                began.elapsed(),
                status.0["tunnels"][1]["drops"]
            );
            assert!(told < patience(Duration::from_secs(1)), "{told:?}");
            // Only the mad peer's own messages were too many.
            let late = &setup.status(Role::New)?.0["tunnels"][0]["drops"]["control_busy"];
            assert!(late.is_null(), "the other peer had to wait: {late}");
            let echoed = echoes.back.len() as u64;
            assert!(
                echoed >= echoes.sent * 9 / 10,
                "{echoed} of {}",
                echoes.sent
            );
        }
        let sent = flooding.join().expect("the flood ends")?;
        println!("{sent} datagrams of the flood");
        // In the time that a slow machine takes for the rest, its flood is a slow one, too.
        let slowness = patience(Duration::from_secs(1)).as_secs();
        assert!(sent > 5_000 / slowness, "{sent} are no flood");
        Ok(())
    })?;
    assert!(resident(new.id()) < before + GROWTH, "the daemon grew");
    let said = new.stderr();
    assert!(said.len() < WORDS, "{said}");
    Ok(())
}

#[test]
fn a_peer_that_floods_with_control_messages_disturbs_nobody_else() -> Result {
    others_do_not_suffer(|mad, _, stop| {
        let mut sent = 0;
        let mut dice = Dice(1);
        while !stop.load(Relaxed) {
            let id = dice.next().to_le_bytes();
            let message = match sent % 6 {
                0 => vec![1],
                1 => [&[2], &id[..4]].concat(),
                2 => old_announcement(2 + sent as u32, &[[203, 0, 113, id[0]].into()]),
                3 => [&[4], &id[..4], &[id[5] % 17, 17], &[7; 1_000]].concat(),
                4 => [&[7, 0xb0, 4], &[0; 1_100][..]].concat(),
                _ => id.to_vec(),
            };
            mad.control(&message);
            sent += 1;
            pace(sent);
        }
        Ok(sent)
    })
}

/// A peer that says that the clients of another one have moved, and thousands of addresses besides.
#[test]
fn a_peer_that_names_the_clients_of_another_shuts_nobody_out() -> Result {
    let lab = Lab::new()?;
    let (_new, psk) = two_peers(&lab)?;
    let setup = setup(&lab)?;
    let _application = Service::start(lab.new_server(), NEW)?;
    let _echo = UdpService::start(lab.new_server(), (NEW, 53))?;
    let mut old = setup.start(Role::Old)?;
    old.wait_until_up()?;
    let mut before = lab.client().converse(MOVED)?;
    let mut mad = IndependentPeer::new(socket_to(lab.old_server(), NEW)?, &psk, 1);
    mad.shake_hands()?;
    let mut id = 0;
    for round in 0..1_024_u32 {
        id += 1;
        let addr = |n| Ipv4Addr::from(0x0b00_0000 + round * 64 + n);
        let moves: Vec<_> = (0..64).map(addr).collect();
        mad.control(&old_announcement(id, &moves));
        pace(u64::from(id));
    }
    let clients: Vec<Ipv4Addr> = [lab.client(), lab.second_client()]
        .iter()
        .filter_map(|client| match client.address_towards(MOVED) {
            IpAddr::V4(addr) => Some(addr),
            IpAddr::V6(_) => None,
        })
        .collect();
    let served = poll_until(PATIENCE, Duration::from_millis(500), || {
        id += 1;
        mad.control(&old_announcement(id, &clients));
        mad.serve(PATIENCE, |it| it.heard(&[5])).ok()?;
        let status = setup.status(Role::New).ok()?;
        let moved = &status.0["tunnels"][1]["moved"];
        (moved[0] == clients[0].to_string()).then_some(())
    });
    assert!(served.is_some(), "{:?}", setup.status(Role::New));
    for client in [lab.client(), lab.second_client()] {
        client.get(MOVED)?.is_answered_by(NEW)?;
        client.udp((MOVED, 53), b"still served?")?;
    }
    before.exchange(b"still there?", PATIENCE)?;
    let drops = &setup.status(Role::New)?.0["tunnels"][0]["drops"];
    assert!(drops["bad_source"].is_null(), "{drops}");
    Ok(())
}

/// The lines of the log are counted: what one peer causes is a few lines a minute.
#[test]
fn a_peer_that_announces_something_else_all_the_time_fills_no_log() -> Result {
    let lab = Lab::new()?;
    let (new, psk) = two_peers(&lab)?;
    let setup = setup(&lab)?;
    let mut old = setup.start(Role::Old)?;
    old.wait_until_up()?;
    let mut mad = IndependentPeer::new(socket_to(lab.old_server(), NEW)?, &psk, 1);
    mad.shake_hands()?;
    let began = Instant::now();
    let mut id = 0;
    while began.elapsed() < Duration::from_secs(20) {
        id += 1;
        // One of two moves that nobody else has, and one that is the other old server's.
        let free = [203, 0, 113, 200 + (id % 2) as u8];
        mad.control(&old_announcement(id, &[free.into(), MOVED]));
        thread::sleep(Duration::from_millis(10));
    }
    let said = new.stderr();
    // Those of the start and of the other old server came in before or beside.
    let others = format!("peer=\"{OLD}:{PORT}\"");
    let lines = said.lines().filter(|line| !line.contains(&others));
    let lines: Vec<&str> = lines.collect();
    println!("{} lines for {id} announcements", lines.len());
    assert!(lines.len() <= 15, "{}", lines.join("\n"));
    assert!(
        lines.iter().any(|line| line.contains("203.0.113.20")),
        "{said}"
    );
    // The last of them counts, and what others say is still logged.
    let last = format!("203.0.113.{}", 200 + id % 2);
    let served = poll_until(PATIENCE, Duration::from_millis(50), || {
        let status = setup.status(Role::New).ok()?;
        (status.0["tunnels"][1]["moved"][0] == last).then_some(())
    });
    assert!(served.is_some(), "{:?}", setup.status(Role::New)?);
    old.terminate()?;
    let heard = poll_until(PATIENCE, Duration::from_millis(50), || {
        new.stderr().contains("tunnel down").then_some(())
    });
    assert!(heard.is_some(), "{}", new.stderr());
    Ok(())
}

#[test]
fn a_peer_that_floods_with_handshakes_disturbs_nobody_else() -> Result {
    others_do_not_suffer(|mad, _, stop| {
        let mut sent = 0;
        while !stop.load(Relaxed) {
            let initiation = mad.initiation();
            let _ = mad.socket().send(&initiation.bytes);
            sent += 1;
        }
        Ok(sent)
    })
}

#[test]
fn handshakes_that_are_recorded_and_sent_again_disturb_nobody() -> Result {
    others_do_not_suffer(|mad, lab, stop| {
        let recorded: Vec<_> = (0..2_000).map(|_| mad.initiation().bytes).collect();
        let sent = AtomicU64::new(0);
        thread::scope(|scope| {
            for client in [lab.client(), lab.second_client()] {
                let socket = client.udp_socket((NEW, PORT));
                let (recorded, sent) = (&recorded, &sent);
                scope.spawn(move || {
                    let Ok(socket) = socket else { return };
                    while !stop.load(Relaxed) {
                        for bytes in recorded {
                            let _ = socket.send(bytes);
                            pace(sent.fetch_add(1, Relaxed));
                        }
                    }
                });
            }
        });
        Ok(sent.into_inner())
    })
}

#[test]
fn forged_data_for_a_known_session_disturbs_nobody() -> Result {
    others_do_not_suffer(|mad, lab, stop| {
        let mut forged = mad.seal(0, 0, &[0; 1_300]);
        forged[20] ^= 1;
        let socket = lab.client().udp_socket((NEW, PORT))?;
        let mut sent = 0;
        while !stop.load(Relaxed) {
            let _ = socket.send(&forged);
            sent += 1;
            pace(sent);
        }
        Ok(sent)
    })
}

#[test]
fn nobody_finds_a_session_by_guessing_its_index() -> Result {
    moved(|on| {
        let stranger = on.lab.client().udp_socket((NEW, PORT))?;
        let mut dice = Dice(3);
        for _ in 0..20_000 {
            let mut datagram = [0; 60];
            datagram[0] = 4;
            datagram[4..8].copy_from_slice(&(dice.next() as u32).to_le_bytes());
            let _ = stranger.send(&datagram);
        }
        thread::sleep(Duration::from_millis(300));
        let status = on.daemons.new.status()?;
        assert!(status.drops("session_unknown") > 10_000);
        assert_eq!(status.drops("open_auth"), 0);
        assert_ne!(status.endpoint(), CLIENT.to_string());
        Ok(())
    })
}
