//! Either daemon may come first, go, crash and come back.
//!
//! ```text
//!                                        ┌── old server 192.0.2.1, daemon ✝
//!  client ─(tap)─────────────── router ──┤              ║
//!                                        └── new server 198.51.100.2, daemon ✝
//! ```

use std::io::{self, Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::Duration;

use ipmoved::internals::Role;
use ipmoved::lab::topology::{Leg, MOVED, MOVED6, NEW, NEW6, UPLINK};
use ipmoved::lab::{Daemon, Lab, LabError, Probe, Service, poll_until};

use crate::stage::{
    FAMILIES, MEGABYTE, Moved, PATIENCE, RECOVERY, Result, SILENCE, moved, setup, split,
};

#[test]
fn the_old_server_may_start_first() -> Result {
    either_first(Role::Old)
}

#[test]
fn the_new_server_may_start_first() -> Result {
    either_first(Role::New)
}

fn either_first(first: Role) -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?;
    let _application = Service::start(lab.new_server(), NEW)?;
    let mut first_daemon = setup.start(first)?;
    first_daemon.wait_for_state("connecting", PATIENCE)?;
    // Longer than its first message waits for a response.
    thread::sleep(Duration::from_millis(1500));
    let mut second_daemon = setup.start(first.other())?;
    second_daemon.wait_until_up()?;
    first_daemon.wait_until_up()?;
    lab.client().get(MOVED)?.is_answered_by(NEW)?;
    Ok(())
}

#[test]
fn the_old_servers_daemon_may_be_stopped_and_started() -> Result {
    moved(|on| restarted(on, Role::Old))
}

#[test]
fn the_new_servers_daemon_may_be_stopped_and_started() -> Result {
    moved(|on| restarted(on, Role::New))
}

fn restarted(on: Moved<'_>, role: Role) -> Result {
    on.lab.client().get(MOVED)?.is_answered_by(NEW)?;
    let (stopped, mut other) = split(on.daemons, role);
    stopped.terminate()?;
    let mut again = on.setup.start(role)?;
    again.wait_until_up()?;
    other.wait_until_up()?;
    on.lab.client().get(MOVED)?.is_answered_by(NEW)?;
    on.lab.client().download(MOVED, MEGABYTE)?;
    Ok(())
}

#[test]
fn a_connection_lives_on_when_the_old_servers_daemon_is_killed() -> Result {
    moved(|on| lives_on(on, Role::Old))
}

#[test]
fn a_connection_lives_on_when_the_new_servers_daemon_is_killed() -> Result {
    moved(|on| lives_on(on, Role::New))
}

/// Kills and restarts the daemon. Meanwhile the moved address is silent: no reset, no ICMP.
fn lives_on(on: Moved<'_>, role: Role) -> Result {
    let mut conversation = on.lab.client().converse(MOVED)?;
    conversation.exchange(b"before", PATIENCE)?;
    let (killed, mut other) = split(on.daemons, role);
    let tap = on.lab.tap(Leg::Clients)?;
    killed.kill()?;
    conversation.say(b"meanwhile")?;
    let probe = on.lab.client().probe_tcp(MOVED, SILENCE)?;
    assert_eq!(probe, Probe::Silent);
    let probe = on.lab.client().probe_udp((MOVED, 53), SILENCE)?;
    assert_eq!(probe, Probe::Silent);
    let seen = tap.stop()?;
    assert_eq!(
        seen.refusals_from(MOVED),
        0,
        "the moved address was not silent"
    );
    assert_eq!(
        seen.refusals_from(NEW),
        0,
        "the new server gave itself away"
    );
    let mut again = on.setup.start(role)?;
    again.wait_until_up()?;
    other.wait_until_up()?;
    conversation.hear(b"meanwhile", RECOVERY)?;
    conversation.exchange(b"after", RECOVERY)?;
    on.lab.client().get(MOVED)?.is_answered_by(NEW)?;
    Ok(())
}

#[test]
fn a_connection_on_which_only_the_server_speaks_lives_on_too() -> Result {
    moved(|on| {
        let mut conversation = on.lab.client().converse(MOVED)?;
        conversation.exchange(b"before", PATIENCE)?;
        // The echo is on its way back when the daemon is gone.
        let (killed, _other) = split(on.daemons, Role::New);
        let words = vec![b'w'; 600_000];
        conversation.say(&words[..300_000])?;
        killed.kill()?;
        let mut again = on.setup.start(Role::New)?;
        again.wait_until_up()?;
        conversation.hear(&words[..300_000], RECOVERY)
    })
}

/// What has moved, in both families: whole addresses, or ports.
const WHOLE_AND_PARTIAL: [[&str; 2]; 2] = [FAMILIES, ["192.0.2.5:80,53", "[2001:db8:a::5]:80,53"]];

/// The new server's application in two conversations, a connection and datagrams: it knows the
/// client, and is the next to speak.
struct Silence {
    client: TcpStream,
    server: TcpStream,
    asking: UdpSocket,
    answering: UdpSocket,
}

impl Silence {
    fn begin(lab: &Lab, moved: IpAddr, new: IpAddr) -> Result<Self> {
        let (listener, answering) = lab.new_server().run(|| {
            let listener = TcpListener::bind((new, 80)).map_err(unexpected)?;
            Ok((listener, UdpSocket::bind((new, 53)).map_err(unexpected)?))
        })?;
        let wait = Some(PATIENCE);
        answering.set_read_timeout(wait).map_err(unexpected)?;
        let client = lab.client().connect((moved, 80))?;
        let (mut server, _) = listener.accept().map_err(unexpected)?;
        (&client).write_all(b"?").map_err(unexpected)?;
        server.read_exact(&mut [0]).map_err(unexpected)?;
        let asking = lab.client().udp_socket((moved, 53))?;
        asking.send(b"?").map_err(unexpected)?;
        let (_, from) = answering.recv_from(&mut [0]).map_err(unexpected)?;
        answering.connect(from).map_err(unexpected)?;
        answering.send(b"!").map_err(unexpected)?;
        asking.recv(&mut [0]).map_err(unexpected)?;
        Ok(Self {
            client,
            server,
            asking,
            answering,
        })
    }

    /// The server speaks on the connection, while the client has said nothing.
    fn ends_on_the_connection(&mut self) -> Result {
        self.server.write_all(b"news").map_err(unexpected)?;
        let wait = Some(RECOVERY);
        self.client.set_read_timeout(wait).map_err(unexpected)?;
        let mut heard = [0; 4];
        self.client.read_exact(&mut heard).map_err(unexpected)?;
        assert_eq!(&heard, b"news");
        Ok(())
    }

    /// The server sends a datagram, while the client has said nothing.
    fn ends_with_a_datagram(&self) -> Result {
        self.answering.send(b"news").map_err(unexpected)?;
        let mut heard = [0; 4];
        self.asking.recv(&mut heard).map_err(unexpected)?;
        assert_eq!(&heard, b"news");
        Ok(())
    }
}

fn unexpected(error: io::Error) -> LabError {
    LabError::unexpected(error.to_string())
}

/// Conversations that fall silent, for each way to move an address, over an end of the old server's
/// daemon and the start of another one.
fn silent_over(
    end: fn(Daemon<'_>) -> Result<()>,
    then: impl Fn(&Daemon<'_>, &mut [Silence; 2]) -> Result<()>,
) -> Result {
    for moves in WHOLE_AND_PARTIAL {
        let lab = Lab::new()?;
        let setup = setup(&lab)?.moves(&moves);
        let mut daemons = setup.start_both()?;
        let mut silences = [
            Silence::begin(&lab, MOVED.into(), NEW.into())?,
            Silence::begin(&lab, MOVED6.into(), NEW6.into())?,
        ];
        end(daemons.old)?;
        let mut again = setup.start(Role::Old)?;
        again.wait_until_up()?;
        daemons.new.wait_until_up()?;
        then(&again, &mut silences)?;
    }
    Ok(())
}

#[test]
fn after_a_crash_of_the_old_server_the_new_one_may_be_the_first_to_speak() -> Result {
    silent_over(
        |old| old.kill(),
        |again, silences| {
            for silence in silences {
                silence.ends_with_a_datagram()?;
                silence.ends_on_the_connection()?;
            }
            let status = again.status()?;
            assert_eq!(status.drops("unasked"), 0, "{status:?}");
            Ok(())
        },
    )
}

#[test]
fn after_a_restart_of_the_old_server_the_new_one_may_go_on_with_connections() -> Result {
    silent_over(
        |old| old.terminate().map(drop),
        |again, silences| {
            let unasked = |count: u64| {
                poll_until(PATIENCE, Duration::from_millis(10), || {
                    let status = again.status().ok()?;
                    (status.drops("unasked") == count).then_some(())
                })
            };
            for (count, silence) in (1..).zip(silences) {
                silence.ends_on_the_connection()?;
                // A datagram answers nobody, until the client is heard of again.
                silence.answering.send(b"lost").map_err(unexpected)?;
                assert!(unasked(count).is_some(), "{:?}", again.status());
                silence.asking.send(b"?").map_err(unexpected)?;
                silence.answering.recv(&mut [0]).map_err(unexpected)?;
                silence.ends_with_a_datagram()?;
            }
            Ok(())
        },
    )
}

#[test]
fn a_download_survives_a_crash_on_the_old_server() -> Result {
    moved(|on| download_through_a_crash(on, Role::Old))
}

#[test]
fn a_download_survives_a_crash_on_the_new_server() -> Result {
    moved(|on| download_through_a_crash(on, Role::New))
}

fn download_through_a_crash(on: Moved<'_>, role: Role) -> Result {
    let client = on.lab.client();
    let (killed, _other) = split(on.daemons, role);
    thread::scope(|scope| {
        let download = scope.spawn(|| client.download(MOVED, 400 * MEGABYTE));
        thread::sleep(Duration::from_millis(150));
        assert!(!download.is_finished(), "too fast to be interrupted");
        killed.kill()?;
        let mut again = on.setup.start(role)?;
        again.wait_until_up()?;
        let done = download.join();
        done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            .map(drop)
    })
}

#[test]
fn both_daemons_may_be_killed_at_once() -> Result {
    moved(|on| {
        let mut conversation = on.lab.client().converse(MOVED)?;
        conversation.exchange(b"before", PATIENCE)?;
        on.daemons.old.kill()?;
        on.daemons.new.kill()?;
        conversation.say(b"meanwhile")?;
        let _daemons = on.setup.start_both()?;
        conversation.hear(b"meanwhile", RECOVERY)
    })
}

#[test]
fn a_path_that_was_cut_comes_back_by_itself() -> Result {
    moved(|on| {
        let mut conversation = on.lab.client().converse(MOVED)?;
        conversation.exchange(b"before", PATIENCE)?;
        on.lab.set_reachable(NEW, false)?;
        conversation.say(b"meanwhile")?;
        thread::sleep(Duration::from_secs(2));
        on.lab.set_reachable(NEW, true)?;
        conversation.hear(b"meanwhile", RECOVERY)
    })
}

#[test]
fn where_packets_are_delivered_outlives_a_crash() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?.moves(&FAMILIES);
    // The servers speak IPv4 with each other, so nothing but the order tells which address of the
    // other family it is.
    let _application = Service::start(lab.new_server(), NEW6)?;
    let daemons = setup.start_both()?;
    let mut conversation = lab.client().converse(MOVED6)?;
    conversation.exchange(b"before", PATIENCE)?;
    let first: IpAddr = "2001:db8:b::1".parse().expect("an address");
    lab.set_address(lab.new_server(), UPLINK, first, 64, true)?;
    let (killed, mut other) = split(daemons, Role::New);
    killed.kill()?;
    let mut again = setup.start(Role::New)?;
    again.wait_until_up()?;
    other.wait_until_up()?;
    conversation.exchange(b"after", RECOVERY)?;
    lab.client().get(MOVED6)?.is_answered_by(NEW6)?;
    // After an orderly end it is chosen anew.
    again.terminate()?;
    let mut again = setup.start(Role::New)?;
    again.wait_until_up()?;
    let _another = Service::start(lab.new_server(), first)?;
    let served = poll_until(PATIENCE, Duration::from_millis(20), || {
        lab.client().get(MOVED6).ok()
    });
    let served = served.ok_or_else(|| LabError::unexpected("not served"))?;
    served.is_answered_by(first)?;
    Ok(())
}
