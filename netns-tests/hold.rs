//! What waits while a move is held, and how it goes on afterwards.
//!
//! ```text
//!                                    ┌── old server: keeps first packets while 192.0.2.5 is held
//!  2,000 clients at once ── router ──┤              ║ tunnel
//!                                    └── new server: an application with a backlog of 511
//! ```

use std::collections::HashMap;
use std::fs::read_to_string;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use ipmoved::internals::Role;
use ipmoved::lab::topology::{MOVED, NEW};
use ipmoved::lab::{DaemonSetup, Lab, LabError, Namespace, UdpService, patience, poll_until};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::sockopt::socket_error;
use rustix::net::{
    AddressFamily, SocketFlags, SocketType, connect, getsockname, listen, socket_with,
};
use rustix::process::{Resource, getrlimit, setrlimit};

use crate::stage::{PATIENCE, Result, setup};
use crate::the_move::{CUTOVER, Script, start};

/// Clients that wait.
const CLIENTS: usize = 2_000;

/// And where fewer will do.
const FEW: usize = 250;

/// What the application has asked the kernel for: nginx's, far less than all of them.
const BACKLOG: i32 = 511;

/// How long all of them may take: a millisecond each, and some more on a busy machine.
const RELEASED: Duration = Duration::from_secs(8);

fn failed(what: &'static str) -> impl Fn(Errno) -> LabError {
    move |error| LabError::unexpected(format!("{what}: {error}"))
}

/// Begins a connection, and waits for nothing.
fn begin(to: SocketAddr) -> Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None);
    let socket = socket.map_err(failed("socket"))?;
    match connect(&socket, &to) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(error) => Err(failed("connect")(error)),
    }
}

/// Begins so many connections to the moved address.
fn begin_many(clients: &Namespace, count: usize) -> Result<Vec<OwnedFd>> {
    let begin_all = || (0..count).map(|_| begin((MOVED, 80).into())).collect();
    clients.run(begin_all)
}

/// Lets so many clients wait.
fn wait(lab: &Lab, setup: &DaemonSetup<'_>, count: usize) -> Result<Vec<OwnedFd>> {
    let mut sockets = Vec::new();
    while sockets.len() < count {
        // No more at once than the queue of the TUN takes: what is lost there comes later.
        sockets.extend(begin_many(lab.clients(), FEW)?);
        until_waiting(setup, sockets.len())?;
    }
    Ok(sockets)
}

/// At how many places somebody overtook another of these clients at an application.
fn overtaken(
    application: &Receiver<(SocketAddr, TcpStream)>,
    sockets: &[OwnedFd],
) -> Result<usize> {
    let mut overtaken = 0;
    for socket in sockets {
        let taken = application.recv_timeout(patience(PATIENCE));
        let (client, _) = taken.map_err(|_| LabError::unexpected("a client was not served"))?;
        overtaken += usize::from(client.port() != port_of(socket)?);
    }
    Ok(overtaken)
}

fn port_of(socket: &OwnedFd) -> Result<u16> {
    let name = getsockname(socket).map_err(failed("getsockname"))?;
    let name = SocketAddr::try_from(name).map_err(failed("getsockname"))?;
    Ok(name.port())
}

/// Waits until all are connected, or one is refused. Returns how many are by the end.
fn connected(sockets: &[OwnedFd], within: Duration) -> Result<usize> {
    let end = Instant::now() + patience(within);
    let mut waiting: Vec<&OwnedFd> = sockets.iter().collect();
    while !waiting.is_empty() && Instant::now() < end {
        let mut fds: Vec<_> = (waiting.iter())
            .map(|socket| PollFd::new(*socket, PollFlags::OUT))
            .collect();
        let pause = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 50_000_000,
        };
        poll(&mut fds, Some(&pause)).map_err(failed("poll"))?;
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        for (socket, _) in waiting.iter().zip(&ready).filter(|(_, ready)| **ready) {
            socket_error(socket)
                .map_err(failed("getsockopt"))?
                .map_err(failed("a client was refused"))?;
        }
        let mut ready = ready.into_iter();
        waiting.retain(|_| !ready.next().unwrap_or_default());
    }
    Ok(sockets.len() - waiting.len())
}

/// An application with that backlog, which tells each client that it takes, in order.
fn application(host: &Namespace, addr: SocketAddr) -> Result<Receiver<(SocketAddr, TcpStream)>> {
    let io = |error| LabError::unexpected(format!("listen on {addr}: {error}"));
    let listener = host.run(|| TcpListener::bind(addr).map_err(io))?;
    listen(&listener, BACKLOG).map_err(failed("listen"))?;
    let (took, taken) = channel();
    host.thread("application", move || {
        while let Ok((stream, client)) = listener.accept() {
            if took.send((client, stream)).is_err() {
                break;
            }
        }
        Ok(())
    })?;
    Ok(taken)
}

/// How often its kernel had no place for a client.
fn overflows(host: &Namespace) -> Result<HashMap<String, u64>> {
    let io = |error| LabError::unexpected(format!("netstat: {error}"));
    let text = host.run(|| read_to_string("/proc/thread-self/net/netstat").map_err(io))?;
    let mut lines = text.lines();
    let (names, numbers) = (
        lines.next().unwrap_or_default(),
        lines.next().unwrap_or_default(),
    );
    let all = names.split_whitespace().zip(numbers.split_whitespace());
    let wanted = [
        "ListenOverflows",
        "ListenDrops",
        "TCPReqQFullDoCookies",
        "TCPReqQFullDrop",
    ];
    Ok(all
        .filter(|(name, _)| wanted.contains(name))
        .map(|(name, number)| (name.to_owned(), number.parse().unwrap_or_default()))
        .collect())
}

fn run(setup: &DaemonSetup<'_>, args: &[&str]) -> Result {
    let said = setup.run(Role::Old, args)?;
    match said.status.success() {
        true => Ok(()),
        false => Err(LabError::unexpected(format!("{args:?}: {said:?}"))),
    }
}

/// How many wait.
fn waiting(setup: &DaemonSetup<'_>) -> Result<u64> {
    let status = setup.status(Role::Old)?;
    Ok(status.tunnel()["modes"][0]["waiting"]
        .as_u64()
        .unwrap_or_default())
}

fn until_waiting(setup: &DaemonSetup<'_>, count: usize) -> Result {
    let all = || (waiting(setup).ok()? == count as u64).then_some(());
    let found = poll_until(PATIENCE, Duration::from_millis(20), all);
    found.ok_or_else(|| LabError::unexpected(format!("{:?} wait, not {count}", waiting(setup))))
}

#[test]
fn whoever_waits_is_served_in_order_and_nobody_is_refused() -> Result {
    let limit = getrlimit(Resource::Nofile);
    let more = rustix::process::Rlimit {
        current: limit.maximum,
        ..limit
    };
    setrlimit(Resource::Nofile, more).map_err(failed("setrlimit"))?;
    let lab = Lab::new()?;
    // Lanes do not wait for each other.
    let one = ["--lanes", "1"];
    let setup = setup(&lab)?
        .args(Role::Old, &["--start", "here"])
        .args(Role::Old, &one)
        .args(Role::New, &one);
    let taken = application(lab.new_server(), (NEW, 80).into())?;
    let own = application(lab.old_server(), (MOVED, 80).into())?;
    let udp = UdpService::start(lab.new_server(), (NEW, 53))?;
    let _daemons = setup.start_both()?;

    // A hold that nobody ends. Clients have asked again meanwhile, and do so as it ends.
    let seconds = patience(Duration::from_secs(2)).as_secs().to_string();
    run(&setup, &["hold", "--for", &seconds])?;
    let sockets = wait(&lab, &setup, FEW)?;
    let before = overflows(lab.old_server())?;
    assert_eq!(connected(&sockets, RELEASED)?, FEW);
    assert_eq!(overtaken(&own, &sockets)?, 0);
    assert_eq!(overflows(lab.old_server())?, before);
    assert!(taken.try_recv().is_err(), "not one went there");

    // To the new server, by a cut-over.
    let script = Script {
        dir: lab.dir().into(),
    };
    let stop = script.line("stop");
    let cutover = start(&setup, &["cutover", "--drain", "0", "--stop", &stop])?;
    script.runs("stop")?;
    let sockets = wait(&lab, &setup, CLIENTS)?;
    let datagrams = lab.client().udp_socket((MOVED, 53))?;
    // One more than the first few that are kept.
    for len in [10, 3_000, 20, 30, 40] {
        let sent = datagrams.send(&vec![b'd'; len]);
        sent.map_err(|error| LabError::unexpected(format!("send: {error}")))?;
    }
    until_waiting(&setup, CLIENTS + 1)?;
    let refused = || (setup.status(Role::Old).ok()?.drops("hold_full") == 1).then_some(());
    let refused = poll_until(PATIENCE, Duration::from_millis(20), refused);
    refused.ok_or_else(|| LabError::unexpected("a datagram too many is not counted"))?;
    assert_eq!(connected(&sockets, Duration::from_millis(100))?, 0);
    assert!(
        taken.try_recv().is_err() && udp.peers().is_empty(),
        "nobody came yet"
    );
    let before = overflows(lab.new_server())?;
    script.is_done("stop")?;
    assert_eq!(connected(&sockets, RELEASED)?, CLIENTS);
    let said = cutover.wait(CUTOVER)?;
    assert!(said.status.success(), "{said:?}");
    assert!(said.stdout.contains("and 2001 that waited"), "{said:?}");
    assert_eq!(overtaken(&taken, &sockets)?, 0);
    assert_eq!(overflows(lab.new_server())?, before);
    let mut answer = [0; 4_000];
    for len in [10, 3_000, 20, 30] {
        let heard = datagrams.recv(&mut answer);
        let heard = heard.map_err(|error| LabError::unexpected(format!("receive: {error}")))?;
        assert_eq!(heard, len);
    }
    until_waiting(&setup, 0)
}
