//! A daemon takes over from another while transfers run, and nobody notices: after an upgrade, with
//! other settings, or through a service manager that restarts it.
//!
//! ```text
//!                                        ┌── old server 192.0.2.1, daemon ──► next daemon
//!  client ─(tap)─────────────── router ──┤              ║
//!                                        └── new server 198.51.100.2, daemon ──► next daemon
//! ```

use std::io::{self, BufRead, BufReader, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use ipmoved::internals::{Direction, FilterSlot, Netlink, Role};
use ipmoved::lab::daemon::{STOP_TIMEOUT, UP_TIMEOUT};
use ipmoved::lab::topology::{self, Leg, MOVED, NEW};
use ipmoved::lab::{Daemon, DaemonSetup, Lab, LabError, Process, Snapshot, poll_until};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::Signal;
use socket2::SockRef;

use crate::service_manager::service;
use crate::stage::{MEGABYTE, PATIENCE, RECOVERY, Result, setup, split};

/// Of what the daemons hand over.
const VERSION: u32 = 3;

const ROLES: [Role; 2] = [Role::Old, Role::New];

#[test]
fn a_daemon_takes_over_and_no_byte_and_no_datagram_is_lost() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?;
    let mut daemons = setup.start_both()?;
    let load = Load::start(&lab)?;
    let tap = lab.tap(Leg::Clients)?;
    // Twice, since the second time it is from a daemon that has taken over itself.
    for _ in 0..2 {
        for role in ROLES {
            load.goes_on()?;
            let (one, other) = split(daemons, role);
            let next = take_over(&setup, role, one)?;
            daemons = crate::stage::join(role, next, other);
            daemons.wait_until_up()?;
        }
    }
    load.goes_on()?;
    let carried = load.end()?;
    assert_eq!(carried.lost, 0, "of {} datagrams", carried.sent);
    assert_eq!(tap.stop()?.refusals_from(MOVED), 0);
    for daemon in [&daemons.old, &daemons.new] {
        let status = daemon.status()?;
        let lost: Vec<_> = (status.all_drops().into_iter())
            .filter(|(reason, _)| reason != "handshake_unexpected")
            .collect();
        assert_eq!(lost, [], "{status:?}");
    }
    // The last ones undo what the first ones made.
    daemons.terminate()?;
    assert_eq!(left_in(&lab.dir().join("run")), Vec::<PathBuf>::new());
    Ok(())
}

/// What only the daemon knows of a flow goes on, too: by which port it is told apart from another.
#[test]
fn flows_keep_the_ports_by_which_they_are_told_apart() -> Result {
    let lab = Lab::builder().moved(2).build()?;
    let both = [topology::moved(0), topology::moved(1)];
    let names = both.map(|addr| addr.to_string());
    let setup = setup(&lab)?.moves(&names.each_ref().map(String::as_str));
    let daemons = setup.start_both()?;
    let application = lab.new_server().run(|| bind(NEW, 7_000))?;
    let client = lab.clients().run(|| bind(Ipv4Addr::UNSPECIFIED, 5_000))?;
    for socket in [&application, &client] {
        socket.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
    }
    let ask = |moved: Ipv4Addr| -> Result<_> {
        client
            .send_to(b"who am I?", (moved, 7_000))
            .map_err(failed)?;
        let (_, seen) = application.recv_from(&mut [0; 100]).map_err(failed)?;
        application.send_to(b"you", seen).map_err(failed)?;
        let (_, from) = client.recv_from(&mut [0; 100]).map_err(failed)?;
        assert_eq!(from, (moved, 7_000).into());
        Ok(seen)
    };
    let before = [ask(both[0])?, ask(both[1])?];
    assert_ne!(before[0], before[1], "told apart");
    let (new, _old) = split(daemons, Role::New);
    let mut next = take_over(&setup, Role::New, new)?;
    next.wait_until_up()?;
    // In the other order: a daemon that knew nothing would give them the other's ports.
    let after = [ask(both[1])?, ask(both[0])?];
    assert_eq!(after, [before[1], before[0]]);
    Ok(())
}

#[test]
fn other_settings_take_over_if_they_are_right_and_otherwise_nothing_changes() -> Result {
    let lab = Lab::builder().moved(2).build()?;
    let before = setup(&lab)?;
    let daemons = before.start_both()?;
    let load = Load::start(&lab)?;
    let takeover = |args: &[&str]| {
        before
            .clone()
            .args(Role::Old, &["--takeover"])
            .args(Role::Old, args)
    };
    for (args, says) in [
        (&["--lanes", "7"][..], "so this one cannot take over"),
        (&["--tun", "other0"], "--tun ipmoved0, so"),
        (&["--listen", "7000"], "--listen "),
        (&["--uplink", "nowhere"], "interface nowhere does not exist"),
    ] {
        let said = takeover(args).start(Role::Old)?.stop_by_itself()?;
        assert_eq!(said.status.code(), Some(2), "{said:?}");
        assert!(said.stderr.contains(says), "{said:?}");
        load.goes_on()?;
    }
    // Nor can either become the other server's.
    let others = [
        (Role::Old, before.clone().moves(&[])),
        (
            Role::New,
            before.clone().args(Role::New, &["--move", "192.0.2.9"]),
        ),
    ];
    for (role, other) in others {
        let next = other.args(role, &["--takeover"]).start(role)?;
        let said = next.stop_by_itself()?;
        assert_eq!(said.status.code(), Some(2), "{said:?}");
        let says = format!("that of the {role} server, so this one cannot take over");
        assert!(said.stderr.contains(&says), "{said:?}");
        load.goes_on()?;
    }
    // Without it a second one is refused as ever.
    let said = before.start(Role::Old)?.stop_by_itself()?;
    assert_eq!(said.status.code(), Some(4), "{said:?}");
    let more = topology::moved(1).to_string();
    let after = before.clone().args(Role::Old, &["--move", &more]);
    let (old, _new) = split(daemons, Role::Old);
    let mut next = take_over(&after, Role::Old, old)?;
    next.wait_until_up()?;
    let answer = poll_until(PATIENCE, Duration::from_millis(50), || {
        lab.client()
            .udp((topology::moved(1), 7_000), b"new here")
            .ok()
    });
    assert!(answer.is_some(), "what is new in the settings is served");
    load.goes_on()?;
    assert_eq!(load.end()?.lost, 0);
    Ok(())
}

/// Whoever was about to take over may die at any point of it.
#[test]
fn if_the_next_daemon_fails_the_one_that_runs_goes_on() -> Result {
    for role in ROLES {
        let lab = Lab::new()?;
        let setup = setup(&lab)?;
        let mut daemons = setup.start_both()?;
        let load = Load::start(&lab)?;
        let said = Successor::ask(&lab, &setup, role, VERSION + 1)?;
        let why = said.hears("refused")?;
        assert!(why.contains(&format!("version {VERSION}")), "{why}");
        assert!(why.contains("`kill -KILL "), "{why}");
        let modes = lab.dir().join("state/modes.json");
        for point in ["offer", "state"] {
            let mut next = Successor::ask(&lab, &setup, role, VERSION)?;
            next.hears("offer")?;
            if role == Role::Old {
                let said = setup.run(role, &["move"])?;
                assert!(
                    said.stderr.contains("about to take over: try again"),
                    "{said:?}"
                );
                // The next one may have kept modes of its own.
                std::fs::write(&modes, "another daemon's").map_err(failed)?;
            }
            if point == "state" {
                next.says("\"ready\"")?;
                next.hears("state")?;
                if role == Role::Old {
                    assert_eq!(notes_own(&setup, true)?, 0, "taken away");
                }
            }
            drop(next);
            load.goes_on()?;
            if role == Role::Old {
                let back = poll_until(PATIENCE, Duration::from_millis(20), || {
                    notes_own(&setup, false).ok().filter(|&there| there > 0)
                });
                assert!(back.is_some(), "what was taken away is not back");
                let kept = poll_until(PATIENCE, Duration::from_millis(20), || {
                    let text = std::fs::read_to_string(&modes).ok()?;
                    text.contains("192.0.2.5").then_some(())
                });
                assert!(kept.is_some(), "its modes are not kept again");
                let said = setup.run(role, &["move"])?;
                assert!(said.status.success(), "{said:?}");
            }
        }
        // It is not changed by that, and can still be taken over from.
        daemons.wait_until_up()?;
        let (one, _other) = split(daemons, role);
        let mut next = take_over(&setup, role, one)?;
        next.wait_until_up()?;
        load.goes_on()?;
        load.end()?;
    }
    Ok(())
}

/// What both share must not be undone under the next one; if that fails, nobody is left but the one
/// that was stopped.
#[test]
fn who_is_stopped_while_another_takes_over_leaves_it_to_that_one() -> Result {
    for role in ROLES {
        let lab = Lab::new()?;
        let setup = setup(&lab)?;
        let host = setup.host(role);
        let before = Snapshot::of(host)?;
        let _other = setup.start(role.other())?;
        for next_fails in [false, true] {
            let mut one = setup.start(role)?;
            one.wait_until_up()?;
            let mut next = Successor::ask(&lab, &setup, role, VERSION)?;
            next.hears("offer")?;
            one.process().signal(Signal::TERM)?;
            let heard = poll_until(PATIENCE, Duration::from_millis(10), || {
                let log = one.process().stderr();
                log.contains("stopping if it fails").then_some(())
            });
            assert!(heard.is_some(), "{}", one.process().stderr());
            setup.status(role)?;
            if !next_fails {
                next.says("\"ready\"")?;
                next.hears("state")?;
                next.says("\"taken\"")?;
                next.hears("go")?;
            }
            drop(next);
            let said = one.stop_by_itself()?;
            assert!(said.status.success(), "{said:?}");
            let after = Snapshot::of(host)?;
            if next_fails {
                after.is_same_as(&before)?;
            } else {
                assert!(said.stderr.contains("has taken over"), "{said:?}");
                after.is_not_the_same_as(&before)?;
            }
        }
        // Whoever says it twice means it.
        let mut one = setup.start(role)?;
        one.wait_until_up()?;
        let next = Successor::ask(&lab, &setup, role, VERSION)?;
        next.hears("offer")?;
        for _ in 0..2 {
            one.process().signal(Signal::INT)?;
            let log = poll_until(PATIENCE, Duration::from_millis(10), || {
                let log = one.process().stderr();
                log.contains("stopping if it fails").then_some(())
            });
            assert!(log.is_some(), "it is not heard");
        }
        assert!(one.stop_by_itself()?.status.success());
        Snapshot::of(host)?.is_same_as(&before)?;
        drop(next);
    }
    Ok(())
}

/// A daemon of before there were handovers has no socket for them.
#[test]
fn from_an_older_daemon_the_next_one_goes_on_as_after_a_crash() -> Result {
    for role in ROLES {
        let lab = Lab::new()?;
        let setup = setup(&lab)?;
        let _application = ipmoved::lab::Service::start(lab.new_server(), NEW)?;
        let daemons = setup.start_both()?;
        let mut conversation = lab.client().converse(MOVED)?;
        conversation.exchange(b"before", PATIENCE)?;
        let (one, _other) = split(daemons, role);
        for socket in sockets_for_handovers(&lab)? {
            std::fs::remove_file(socket).map_err(failed)?;
        }
        let tap = lab.tap(Leg::Clients)?;
        let mut next = setup.clone().args(role, &["--takeover"]).start(role)?;
        let ended = one.stop_by_itself()?;
        assert!(!ended.status.success(), "it was killed: {ended:?}");
        next.wait_until_up()?;
        conversation.exchange(b"after", RECOVERY)?;
        assert_eq!(tap.stop()?.refusals_from(MOVED), 0);
        assert!(next.process().stderr().contains("cannot hand itself over"));
        next.terminate()?;
    }
    Ok(())
}

/// It has nothing that a daemon with a tunnel could go on with, and would be lost.
#[test]
fn a_daemon_without_a_tunnel_is_not_killed() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?;
    let nat = setup.start_nat(&["--move", "192.0.2.5", "--to", "198.51.100.2"])?;
    let started = poll_until(UP_TIMEOUT, Duration::from_millis(50), || {
        nat.status().ok().map(drop)
    });
    assert!(started.is_some(), "it does not run");
    let next = setup.clone().args(Role::Old, &["--takeover"]);
    let said = next.start(Role::Old)?.stop_by_itself()?;
    assert_eq!(said.status.code(), Some(4), "{said:?}");
    assert!(said.stderr.contains("`ipmoved nat`"), "{said:?}");
    nat.status()?;
    Ok(())
}

#[test]
fn where_none_runs_there_is_nothing_to_take_over() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?
        .args(Role::Old, &["--takeover"])
        .args(Role::New, &["--takeover"]);
    setup.start_both()?.terminate()
}

#[test]
fn nothing_is_handed_over_while_connections_are_held() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?;
    let daemons = setup.start_both()?;
    let said = setup.run(Role::Old, &["hold", "--for", "60"])?;
    assert!(said.status.success(), "{said:?}");
    let next = setup.clone().args(Role::Old, &["--takeover"]);
    let said = next.start(Role::Old)?.stop_by_itself()?;
    assert_eq!(said.status.code(), Some(4), "{said:?}");
    assert!(said.stderr.contains("new connections are held"), "{said:?}");
    let said = setup.run(Role::Old, &["move"])?;
    assert!(said.status.success(), "{said:?}");
    let (old, _new) = split(daemons, Role::Old);
    take_over(&setup, Role::Old, old)?.wait_until_up()
}

/// As the systemd unit restarts the daemon: one ends before the other begins, and the manager keeps
/// what goes on.
#[test]
fn a_restart_by_the_service_manager_loses_no_connection() -> Result {
    for role in ROLES {
        let lab = Lab::new()?;
        let setup = setup(&lab)?;
        let manager = Manager::start(&lab)?;
        let _other = setup.start(role.other())?;
        let mut service = manager.starts(&setup, role)?;
        let load = Load::start(&lab)?;
        load.goes_on()?;
        let tap = lab.tap(Leg::Clients)?;
        for _ in 0..2 {
            let said = setup.run(role, &["handover"])?;
            assert!(said.status.success(), "{said:?}");
            let ended = service.wait(STOP_TIMEOUT)?;
            assert!(ended.status.success(), "{ended:?}");
            assert!(manager.has("ipmoved-state"), "{:?}", manager.names());
            service = manager.starts(&setup, role)?;
            load.goes_on()?;
            let left: Vec<_> = manager.names();
            assert!(left.iter().all(|name| name == "ipmoved-memory"), "{left:?}");
            assert!(
                service.stderr().contains("took over"),
                "{}",
                service.stderr()
            );
        }
        let carried = load.end()?;
        assert_eq!(carried.lost, 0, "of {} datagrams", carried.sent);
        assert_eq!(tap.stop()?.refusals_from(MOVED), 0);
        service.signal(Signal::TERM)?;
        let ended = service.wait(STOP_TIMEOUT)?;
        assert!(ended.status.success(), "{ended:?}");
    }
    Ok(())
}

/// A store may have too few places, or have lost some: the next one starts all the same, and leaves
/// nothing there that would be in the way of the one after it.
#[test]
fn a_store_that_keeps_only_a_part_of_it_is_emptied() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?;
    let manager = Manager::start(&lab)?;
    let _application = ipmoved::lab::Service::start(lab.new_server(), NEW)?;
    let _new = setup.start(Role::New)?;
    let mut service = manager.starts(&setup, Role::Old)?;
    let mut conversation = lab.client().converse(MOVED)?;
    conversation.exchange(b"before", RECOVERY)?;
    let memory = manager.names().len();
    for (kept, forgotten) in [(1, ""), (2, ""), (usize::MAX, "ipmoved-state")] {
        manager.has_room_for(memory.saturating_add(kept));
        let said = setup.run(Role::Old, &["handover"])?;
        assert!(said.status.success(), "{said:?}");
        service.wait(STOP_TIMEOUT)?;
        manager.forgets(forgotten);
        assert!(manager.names().len() > memory, "{:?}", manager.names());
        assert_eq!(manager.has("ipmoved-state"), forgotten.is_empty());
        service = manager.starts(&setup, Role::Old)?;
        let log = service.stderr();
        assert!(log.contains("as after a crash"), "{log}");
        let left = manager.names();
        assert!(left.iter().all(|name| name == "ipmoved-memory"), "{left:?}");
        conversation.exchange(b"after", RECOVERY)?;
    }
    Ok(())
}

/// Without a service manager there is nobody to leave anything to; and what a manager has of
/// another version is not believed.
#[test]
fn what_cannot_be_gone_on_with_makes_the_start_one_as_after_a_crash() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?;
    let _application = ipmoved::lab::Service::start(lab.new_server(), NEW)?;
    let daemons = setup.start_both()?;
    let said = setup.run(Role::Old, &["handover"])?;
    assert_eq!(said.status.code(), Some(1), "{said:?}");
    assert!(said.stderr.contains("--takeover"), "{said:?}");
    let (old, _new) = split(daemons, Role::Old);
    old.terminate()?;
    let said = setup.run(Role::Old, &["handover"])?;
    assert_eq!(said.status.code(), Some(4), "{said:?}");

    let manager = Manager::start(&lab)?;
    let service = manager.starts(&setup, Role::Old)?;
    let mut conversation = lab.client().converse(MOVED)?;
    conversation.exchange(b"before", PATIENCE)?;
    // Started beside it by hand, another one does not take what is the manager's.
    let next = setup.clone().args(Role::Old, &["--takeover"]);
    let said = next.start(Role::Old)?.stop_by_itself()?;
    assert!(said.stderr.contains("systemctl restart"), "{said:?}");
    assert!(setup.run(Role::Old, &["handover"])?.status.success());
    service.wait(STOP_TIMEOUT)?;
    manager.spoils("ipmoved-state")?;
    let service = manager.starts(&setup, Role::Old)?;
    conversation.exchange(b"after", RECOVERY)?;
    assert!(
        service.stderr().contains("as after a crash"),
        "{}",
        service.stderr()
    );
    Ok(())
}

/// Starts the next daemon of a side, and waits until the one that runs has ended.
pub(crate) fn take_over<'lab>(
    setup: &DaemonSetup<'lab>,
    role: Role,
    from: Daemon<'lab>,
) -> Result<Daemon<'lab>> {
    let next = setup.clone().args(role, &["--takeover"]).start(role)?;
    let said = from.stop_by_itself()?;
    if !said.status.success() || !said.stderr.contains("has taken over") {
        return Err(failed(format!("it was not taken over from: {said:?}")));
    }
    Ok(next)
}

fn bind(addr: Ipv4Addr, port: u16) -> Result<UdpSocket> {
    UdpSocket::bind((addr, port)).map_err(failed)
}

/// How many programs note on the old server what its own conversations are, which costs none of
/// the moved ones. Takes them away if that is wanted.
fn notes_own(setup: &DaemonSetup<'_>, take_away: bool) -> Result<usize> {
    setup.host(Role::Old).run(|| {
        let netlink = Netlink::new().map_err(failed)?;
        let mut there = 0;
        for link in netlink.links().map_err(failed)? {
            let on_link = || netlink.filters(link.index, Direction::Egress);
            // A link without a place for programs has none.
            for filter in on_link().unwrap_or_default() {
                if take_away && filter.handle != 0 {
                    let slot = FilterSlot {
                        index: link.index,
                        direction: Direction::Egress,
                        priority: filter.priority,
                        handle: filter.handle,
                    };
                    netlink.delete_filter(slot).map_err(failed)?;
                }
            }
            there += on_link().unwrap_or_default().len();
        }
        Ok(there)
    })
}

/// What is left in a directory.
fn left_in(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

/// Where both daemons of a lab hand themselves over.
fn sockets_for_handovers(lab: &Lab) -> Result<Vec<PathBuf>> {
    let dirs = left_in(&lab.dir().join("run")).into_iter();
    let all: Vec<_> = dirs.map(|dir| dir.join("handover.sock")).collect();
    Ok(all)
}

pub(crate) fn failed(error: impl std::fmt::Display) -> LabError {
    LabError::unexpected(error.to_string())
}

/// Transfers in both directions: a stream whose every byte is checked, and datagrams that are
/// counted.
pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    /// Bytes of the stream that came back.
    back: Arc<AtomicU64>,
    writer: JoinHandle<io::Result<u64>>,
    reader: JoinHandle<io::Result<u64>>,
    datagrams: JoinHandle<io::Result<(u64, u64)>>,
}

/// What a load has carried.
pub(crate) struct Carried {
    pub(crate) sent: u64,
    pub(crate) lost: u64,
}

impl Load {
    const PORT: u16 = 7_000;

    /// Starts an application that sends everything back, and a client of it.
    pub(crate) fn start(lab: &Lab) -> Result<Self> {
        let listener = lab
            .new_server()
            .run(|| TcpListener::bind((NEW, Self::PORT)).map_err(failed))?;
        let echo = lab.new_server().run(|| bind(NEW, Self::PORT))?;
        std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                let _ = SockRef::from(&stream).set_send_buffer_size(WINDOW);
                std::thread::spawn(move || io::copy(&mut &stream, &mut &stream));
            }
        });
        std::thread::spawn(move || {
            let mut datagram = [0; 100];
            while let Ok((length, from)) = echo.recv_from(&mut datagram) {
                let _ = echo.send_to(&datagram[..length], from);
            }
        });
        let (stop, back) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        // The new server may not know yet what has moved.
        let connected = poll_until(UP_TIMEOUT, Duration::from_millis(50), || {
            lab.client().connect((MOVED, Self::PORT)).ok()
        });
        let stream = connected.ok_or_else(|| failed("no connection"))?;
        (SockRef::from(&stream).set_send_buffer_size(WINDOW)).map_err(failed)?;
        let reading = stream.try_clone().map_err(failed)?;
        let socket = lab.client().udp_socket((MOVED, Self::PORT))?;
        let (told, count) = (Arc::clone(&stop), Arc::clone(&back));
        let writer = std::thread::spawn(move || write_until(stream, &told));
        let reader = std::thread::spawn(move || read_all(reading, &count));
        let told = Arc::clone(&stop);
        let datagrams = std::thread::spawn(move || count_datagrams(&socket, &told));
        Ok(Self {
            stop,
            back,
            writer,
            reader,
            datagrams,
        })
    }

    /// Waits until another megabyte has come back.
    pub(crate) fn goes_on(&self) -> Result {
        let wanted = self.back.load(Relaxed) + MEGABYTE;
        let more = poll_until(RECOVERY, Duration::from_millis(10), || {
            (self.back.load(Relaxed) >= wanted).then_some(())
        });
        more.ok_or_else(|| failed("the transfer does not go on"))
    }

    /// Ends the transfers, and checks that all came back as it was.
    pub(crate) fn end(self) -> Result<Carried> {
        self.stop.store(true, Relaxed);
        let [written, read] = [self.writer, self.reader]
            .map(|thread| thread.join().expect("it does not panic").map_err(failed));
        assert_eq!(written?, read?, "bytes");
        let (sent, lost) = self.datagrams.join().expect("no panic").map_err(failed)?;
        Ok(Carried { sent, lost })
    }
}

/// Pause between two blocks of a stream.
const PACE: Duration = Duration::from_millis(4);

/// Most bytes of a stream, and most datagrams, that are under way. So what waits while nobody
/// carries packets fits the queue of the TUN, which has room for 1,000, however long that is.
const WINDOW: usize = 256 << 10;
const DATAGRAMS: u64 = 200;

/// Bytes that no other place of the stream has.
fn block(number: u64) -> Vec<u8> {
    (0..2_048_u64)
        .flat_map(|word| (number * 2_048 + word).to_le_bytes())
        .collect()
}

fn write_until(mut stream: TcpStream, stop: &AtomicBool) -> io::Result<u64> {
    let mut written = 0;
    for number in 0.. {
        if stop.load(Relaxed) {
            break;
        }
        let block = block(number);
        stream.write_all(&block)?;
        written += block.len() as u64;
        std::thread::sleep(PACE);
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    Ok(written)
}

fn read_all(mut stream: TcpStream, count: &AtomicU64) -> io::Result<u64> {
    stream.set_read_timeout(Some(RECOVERY))?;
    let mut came = vec![0; block(0).len()];
    for number in 0.. {
        match stream.read(&mut came[..1])? {
            0 => break,
            _ => stream.read_exact(&mut came[1..])?,
        }
        if came != block(number) {
            return Err(io::Error::other("other bytes came back"));
        }
        count.fetch_add(came.len() as u64, Relaxed);
    }
    Ok(count.load(Relaxed))
}

/// What is sent last, once nothing is counted any more.
const LAST: u64 = u64::MAX;

/// Sends datagrams. Returns how many it sent, and how many of them did not come back before what
/// was sent after them.
fn count_datagrams(socket: &UdpSocket, stop: &AtomicBool) -> io::Result<(u64, u64)> {
    socket.set_nonblocking(true)?;
    let (mut sent, mut came) = (0_u64, 0);
    let mut number = [0; 8];
    let mut hear = |came: &mut u64| {
        while socket.recv(&mut number).is_ok() {
            if u64::from_le_bytes(number) == LAST {
                return true;
            }
            *came += 1;
        }
        false
    };
    while !stop.load(Relaxed) {
        if sent - came < DATAGRAMS {
            socket.send(&sent.to_le_bytes())?;
            sent += 1;
        }
        std::thread::sleep(Duration::from_millis(5));
        hear(&mut came);
    }
    let over = poll_until(RECOVERY, Duration::from_millis(5), || {
        socket.send(&LAST.to_le_bytes()).ok()?;
        hear(&mut came).then_some(())
    });
    match over {
        Some(()) => Ok((sent, sent - came)),
        None => Err(io::Error::other("no datagram comes back any more")),
    }
}

/// A next daemon that fails when the test wants it.
struct Successor {
    stream: UnixStream,
}

impl Successor {
    /// Asks the daemon of this side, by this version.
    fn ask(lab: &Lab, setup: &DaemonSetup<'_>, role: Role, version: u32) -> Result<Self> {
        let netns = || std::fs::metadata("/proc/thread-self/ns/net").map_err(failed);
        let inode = setup.host(role).run(|| Ok(netns()?.ino()))?;
        let dir = lab.dir().join("run").join(format!("net-{inode}"));
        let socket = dir.join("handover.sock");
        let mut next = Self {
            stream: UnixStream::connect(socket).map_err(failed)?,
        };
        next.says(&format!(r#"{{"ask":"take-over","version":{version}}}"#))?;
        Ok(next)
    }

    fn says(&mut self, line: &str) -> Result {
        writeln!(self.stream, "{line}").map_err(failed)
    }

    /// Waits for a line with this word.
    fn hears(&self, word: &str) -> Result<String> {
        self.stream
            .set_read_timeout(Some(RECOVERY))
            .map_err(failed)?;
        let mut line = String::new();
        let mut lines = BufReader::new(&self.stream);
        lines.read_line(&mut line).map_err(failed)?;
        if line.contains(word) {
            return Ok(line);
        }
        Err(failed(format!("the daemon says {line}")))
    }
}

/// A service manager with a store for descriptors, as systemd has it: it keeps what it is given
/// until it is told to forget it, whether the service lives or not.
pub(crate) struct Manager {
    path: PathBuf,
    store: Arc<Mutex<Vec<(String, OwnedFd)>>>,
    /// Most that it keeps.
    room: Arc<AtomicUsize>,
    ready: Arc<AtomicU64>,
}

impl Manager {
    pub(crate) fn start(lab: &Lab) -> Result<Self> {
        let path = lab.dir().join("notify");
        let socket = UnixDatagram::bind(&path).map_err(failed)?;
        let manager = Self {
            path,
            store: Arc::default(),
            room: Arc::new(AtomicUsize::new(usize::MAX)),
            ready: Arc::default(),
        };
        let room = Arc::clone(&manager.room);
        let (store, ready) = (Arc::clone(&manager.store), Arc::clone(&manager.ready));
        std::thread::spawn(move || {
            while let Ok((text, given)) = hear(&socket) {
                let is = |line: &str| text.lines().any(|it| it == line);
                let name = text.lines().find_map(|line| line.strip_prefix("FDNAME="));
                let name = name.unwrap_or("stored").to_owned();
                let mut store = store.lock().expect("no panic");
                if is("FDSTORE=1") {
                    let left = room.load(Relaxed).saturating_sub(store.len());
                    store.extend(given.into_iter().take(left).map(|fd| (name.clone(), fd)));
                } else if is("FDSTOREREMOVE=1") {
                    store.retain(|(kept, _)| *kept != name);
                }
                // A barrier ends with the descriptor that came with it.
                drop(store);
                ready.fetch_add(u64::from(is("READY=1")), Relaxed);
            }
        });
        Ok(manager)
    }

    /// The names of what it keeps.
    fn names(&self) -> Vec<String> {
        let store = self.store.lock().expect("no panic");
        store.iter().map(|(name, _)| name.clone()).collect()
    }

    /// From now on it keeps no more than so many.
    fn has_room_for(&self, most: usize) {
        self.room.store(most, Relaxed);
    }

    /// Loses what it keeps under a name.
    fn forgets(&self, name: &str) {
        let mut store = self.store.lock().expect("no panic");
        store.retain(|(kept, _)| kept != name);
    }

    fn has(&self, name: &str) -> bool {
        self.names().iter().any(|it| it == name)
    }

    /// Makes what it keeps under a name that of another version.
    fn spoils(&self, name: &str) -> Result {
        use std::io::Seek;
        let store = self.store.lock().expect("no panic");
        let (_, fd) = store
            .iter()
            .find(|(it, _)| it == name)
            .expect("it is there");
        let mut file = std::fs::File::from(fd.try_clone().map_err(failed)?);
        file.rewind().map_err(failed)?;
        file.write_all(br#"{"version":9"#).map_err(failed)
    }

    /// Starts the service with what it keeps, and waits until it is ready.
    pub(crate) fn starts(&self, setup: &DaemonSetup<'_>, role: Role) -> Result<Process> {
        let before = self.ready.load(Relaxed);
        let mut process = setup.host(role).spawn(self.command(setup, role))?;
        let ready = poll_until(UP_TIMEOUT, Duration::from_millis(10), || {
            let is_ready = self.ready.load(Relaxed) > before;
            (is_ready || process.exited().is_some()).then_some(is_ready)
        });
        match ready {
            Some(true) => Ok(process),
            _ => Err(failed(format!("it is not ready: {}", process.stderr()))),
        }
    }

    fn command(&self, setup: &DaemonSetup<'_>, role: Role) -> Command {
        let store = self.store.lock().expect("no panic");
        let names: Vec<_> = store.iter().map(|(name, _)| name.as_str()).collect();
        let kept = store.iter().map(|(_, fd)| fd);
        let mut command = service(setup, role, &self.path, kept);
        command.env("LISTEN_FDNAMES", names.join(":"));
        command
    }
}

/// The next message to a service manager, and what comes with it.
fn hear(socket: &UnixDatagram) -> io::Result<(String, Vec<OwnedFd>)> {
    let (mut text, mut space) = ([0; 1_000], [MaybeUninit::uninit(); 512]);
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut text)];
    let length = recvmsg(socket, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?.bytes;
    let mut all = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(given) = message {
            all.extend(given);
        }
    }
    Ok((String::from_utf8_lossy(&text[..length]).into_owned(), all))
}
