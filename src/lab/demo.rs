//! `ipmoved demo`: the whole story on one machine, told to an administrator.
//!
//! Owns the order of the steps and their words. Each step does something with the real binary and
//! real sockets, and reports the result. It gets a ✓ only if we saw it work. Everything happens in
//! a [`Lab`], which goes away in every case: at the end, after a failure, and after Ctrl-C.

use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use super::daemon::{Daemon, DaemonSetup, Daemons};
use super::topology::{CLIENT, Leg, MOVED, NEW, OLD};
use super::traffic::{Client, listeners};
use super::{Lab, LabError, Output, Probe, Result, Service, Snapshot, UdpService, interrupt};
use crate::model::peer::Role;

/// Size of the download: more than any buffer on the path holds, and about a second's work.
const DOWNLOAD: u64 = 64 << 20;
/// Size of the upload.
const UPLOAD: u64 = 16 << 20;
/// Number of short connections.
const CONNECTIONS: usize = 200;
/// How long a port must send nothing to count as silent.
const PATIENCE: Duration = Duration::from_millis(700);
/// How long a connection may take to live on after a restart: TCP tries again after 0.2, 0.4, 0.8,
/// 1.6, 3.2 and 6.4 s (RFC 6298 doubles the interval each time).
const RECOVERY: Duration = Duration::from_secs(15);
/// How often a client connects while the service changes servers.
const EVERY: Duration = Duration::from_millis(20);
/// A sentence for the connection whose packets the tap looks at.
const SECRET: &[u8] = b"This sentence can be read by anybody on the way.";

const PICTURE: &str =
    "                                        ┌─ old server   192.0.2.1     holds the moved
   client ──────────── router ──────────┤                             address 192.0.2.5
   203.0.113.10                         └─ new server   198.51.100.2  runs the application
";

/// Why the demo did not end well.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// The lab could not be built.
    #[error(transparent)]
    Lab(#[from] LabError),
    /// The story could not be printed.
    #[error("cannot print: {0}")]
    Print(#[from] io::Error),
    /// We did not see something work.
    #[error("{failed} of {of} steps were not seen to work")]
    Failed {
        /// Steps that failed.
        failed: usize,
        /// Steps that were tried.
        of: usize,
    },
    /// Stopped by SIGINT or SIGTERM.
    #[error("interrupted; everything has been removed")]
    Interrupted,
}

/// Tells the story with this `ipmoved` binary, step by step, on standard output.
///
/// # Errors
/// If any step was not seen to work. The lab is gone in any case.
pub fn demo(exe: &Path) -> Result<(), DemoError> {
    demo_to(exe, &mut io::stdout())
}

fn demo_to(exe: &Path, out: &mut dyn Write) -> Result<(), DemoError> {
    let started = Instant::now();
    interrupt::watch();
    let lab = Lab::new()?;
    writeln!(
        out,
        "Three hosts and a router in network namespaces of this machine:\n\n{PICTURE}"
    )?;
    let mut story = Story {
        out,
        steps: 0,
        failed: 0,
    };
    let told = tell(&mut story, &lab, exe);
    let (steps, failed) = (story.steps, story.failed);
    drop(lab);
    told?;
    if failed > 0 {
        return Err(DemoError::Failed { failed, of: steps });
    }
    writeln!(
        out,
        "\nAll {steps} steps were seen to work ({:.1} s). The namespaces are gone; nothing was \
         left behind.",
        started.elapsed().as_secs_f64()
    )?;
    Ok(())
}

/// Tells all steps in order. It stops at a step that the later ones depend on, if that fails.
fn tell(story: &mut Story<'_>, lab: &Lab, exe: &Path) -> Result<(), DemoError> {
    let client = lab.client();
    let hosts = [lab.old_server(), lab.new_server()];
    let before = [Snapshot::of(hosts[0])?, Snapshot::of(hosts[1])?];

    let Some(application) = story.step(
        "The application has moved: it now runs on the new server and listens on that server's \
         address alone",
        || {
            let application = Service::start(lab.new_server(), NEW)?;
            let listening = only_listener(lab, application.addr())?;
            Ok((format!("listening: {listening}"), application))
        },
    )?
    else {
        return Ok(());
    };
    story.step(
        "Clients still go to the old address, where nobody is left to answer",
        || match client.probe_tcp(MOVED, PATIENCE)? {
            Probe::Refused => Ok((format!("http://{MOVED}/: connection refused"), ())),
            other @ (Probe::Open | Probe::Unreachable | Probe::Silent) => {
                Err(LabError::unexpected(format!("http://{MOVED}/: {other:?}")))
            }
        },
    )?;

    let setup = DaemonSetup::new(lab, exe)?.accept_what_moves();
    let title = format!(
        "One command on each server moves the address\n      old: {}\n      new: {}",
        setup.command_line(Role::Old),
        setup.command_line(Role::New)
    );
    let Some(daemons) = story.step(&title, || {
        let started = Instant::now();
        let daemons = setup.start_both()?;
        let status = daemons.old.status()?;
        let cipher = status.tunnel()["cipher"].as_str().unwrap_or("?").to_owned();
        let took = started.elapsed().as_millis();
        Ok((
            format!("both say the tunnel is up after {took} ms, encrypted with {cipher}"),
            daemons,
        ))
    })?
    else {
        return Ok(());
    };
    served(story, lab, &application)?;
    carried(story, lab)?;
    private(story, lab)?;
    let Some(daemons) = survived(story, lab, &setup, daemons)? else {
        return Ok(());
    };
    changed(story, lab, &setup)?;

    story.step(
        "Both daemons are stopped (SIGTERM); each undoes what it changed",
        || {
            daemons.terminate()?;
            for (host, before) in hosts.into_iter().zip(&before) {
                Snapshot::of(host)?.is_same_as(before)?;
            }
            let compared: usize = before.iter().map(Snapshot::len).sum();
            Ok((
                format!(
                    "links, addresses, routes, rules, filters and sysctls of both servers are as \
                     before ({compared} compared)"
                ),
                (),
            ))
        },
    )?;
    story.step("The old address is the old server's again", || match client
        .probe_tcp(MOVED, PATIENCE)?
    {
        Probe::Refused => Ok((
            format!("http://{MOVED}/: connection refused, as at first"),
            (),
        )),
        other @ (Probe::Open | Probe::Unreachable | Probe::Silent) => {
            Err(LabError::unexpected(format!("http://{MOVED}/: {other:?}")))
        }
    })?;
    Ok(())
}

/// Shows which server replies, and whose address the application sees.
fn served(story: &mut Story<'_>, lab: &Lab, application: &Service) -> Result<(), DemoError> {
    let client = lab.client();
    story.step(&format!("The client asks http://{MOVED}/"), || {
        let answer = client.get(MOVED)?;
        let answer = answer.is_answered_by(NEW)?.for_the_client_itself()?;
        Ok((
            format!(
                "answered by the application on {}, which saw the client's own address {}",
                answer.server, answer.client_seen
            ),
            (),
        ))
    })?;
    story.step(
        "The application was not touched: one address, no proxy, no NAT in front of it",
        || {
            let listening = only_listener(lab, application.addr())?;
            let strangers: Vec<IpAddr> = application
                .peers()
                .iter()
                .map(SocketAddr::ip)
                .filter(|peer| *peer != CLIENT)
                .collect();
            if !strangers.is_empty() {
                return Err(LabError::unexpected(format!(
                    "it saw {strangers:?} instead of the client"
                )));
            }
            Ok((
                format!("still listening on {listening} and nothing else"),
                (),
            ))
        },
    )?;
    story.step(
        "The same client uses the old address and the new one at the same time",
        || {
            let mut moved = client.converse(MOVED)?;
            let mut direct = client.converse(NEW)?;
            for words in [&b"to and fro"[..], b"and once more"] {
                moved.exchange(words, RECOVERY)?;
                direct.exchange(words, RECOVERY)?;
            }
            client.get(NEW)?.is_answered_by(NEW)?;
            Ok((
                format!("connections to {MOVED} and {NEW} work side by side"),
                (),
            ))
        },
    )?;
    story.step("Other protocols: ping and UDP", || {
        let echo = UdpService::start(lab.new_server(), (NEW, 53))?;
        client.ping(MOVED, 56)?;
        let ping = client.ping(MOVED, 56)?.as_secs_f64() * 1e3;
        client.udp((MOVED, 53), b"anybody there?")?;
        let seen = echo.peers();
        if seen.iter().any(|peer| peer.ip() != CLIENT) {
            return Err(LabError::unexpected(format!(
                "the UDP service saw {seen:?}"
            )));
        }
        Ok((
            format!("ping {ping:.2} ms; UDP port 53 answered, seen from {CLIENT}"),
            (),
        ))
    })?;
    Ok(())
}

/// Shows how much gets through, and that it arrives whole.
fn carried(story: &mut Story<'_>, lab: &Lab) -> Result<(), DemoError> {
    let client = lab.client();
    story.step(&format!("{CONNECTIONS} short connections"), || {
        let started = Instant::now();
        for answer in client.get_many(MOVED, CONNECTIONS)? {
            answer.is_answered_by(NEW)?.for_the_client_itself()?;
        }
        Ok((
            format!("all answered in {} ms", started.elapsed().as_millis()),
            (),
        ))
    })?;
    story.step(
        &format!("{} MB down and {} MB up", DOWNLOAD >> 20, UPLOAD >> 20),
        || {
            let down = client.download(MOVED, DOWNLOAD)?;
            let up = client.upload(MOVED, UPLOAD)?;
            Ok((
                format!(
                    "SHA-256 right both ways; {:.0} and {:.0} Mbit/s",
                    down.mbit_per_s(),
                    up.mbit_per_s()
                ),
                (),
            ))
        },
    )?;
    Ok(())
}

/// Shows how little somebody on the path can read.
fn private(story: &mut Story<'_>, lab: &Lab) -> Result<(), DemoError> {
    story.step(
        "Somebody listens on the new server's line while the client talks",
        || {
            let tap = lab.tap(Leg::New)?;
            let mut conversation = lab.client().converse(MOVED)?;
            for _ in 0..20 {
                conversation.exchange(SECRET, RECOVERY)?;
            }
            drop(conversation);
            let seen = tap.stop()?;
            let (readable, moved) = (seen.frames_with(SECRET), seen.packets_with(MOVED));
            let between = seen.packets_with(OLD);
            if readable + moved > 0 || between < 40 {
                return Err(LabError::unexpected(format!(
                    "of {} packets {readable} can be read, {moved} show {MOVED}, {between} are \
                     between the servers",
                    seen.len()
                )));
            }
            Ok((
                format!(
                    "{} packets: none can be read, none shows {MOVED} or {CLIENT}",
                    seen.len()
                ),
                (),
            ))
        },
    )?;
    Ok(())
}

/// Shows a crash on either side, while a connection is open.
fn survived<'lab>(
    story: &mut Story<'_>,
    lab: &'lab Lab,
    setup: &DaemonSetup<'lab>,
    daemons: Daemons<'lab>,
) -> Result<Option<Daemons<'lab>>, DemoError> {
    let Daemons { old, new } = daemons;
    let new = story.step(
        "kill -9 of the new server's daemon with a connection open, and a restart",
        || crash(lab, setup, Role::New, new),
    )?;
    let old = story.step("The same on the old server", || {
        crash(lab, setup, Role::Old, old)
    })?;
    Ok(old.zip(new).map(|(old, new)| Daemons { old, new }))
}

/// Shows how a service changes servers while clients come: back to the old one, and over again.
fn changed(story: &mut Story<'_>, lab: &Lab, setup: &DaemonSetup<'_>) -> Result<(), DemoError> {
    let Some(service) = story.step(
        "The service runs on the old server once more, and there: ipmoved back",
        || {
            let service = Service::start(lab.old_server(), MOVED)?;
            ordered(setup, &["back"])?;
            lab.client().get(MOVED)?.is_answered_by(MOVED)?;
            Ok((
                format!("{MOVED} is answered by the old server itself"),
                service,
            ))
        },
    )?
    else {
        return Ok(());
    };
    let title = format!(
        "A client connects every {} ms while the service changes servers: ipmoved cutover",
        EVERY.as_millis()
    );
    story.step(&title, || {
        let over = AtomicBool::new(false);
        let (said, asked) = std::thread::scope(|scope| {
            let asks = scope.spawn(|| ask_until(lab.client(), &over));
            // Some come before, and some afterwards.
            std::thread::sleep(PATIENCE);
            let said = ordered(setup, &["cutover"]);
            std::thread::sleep(PATIENCE);
            over.store(true, Relaxed);
            (said, asks.join())
        });
        let asked = asked.map_err(|_| LabError::unexpected("the client crashed"))?;
        let said = said?;
        let took = last_second(&said.stdout).unwrap_or_default();
        drop(service);
        let by = |server: Ipv4Addr| {
            let answered = asked.iter().filter_map(|(it, _)| it.as_ref().ok());
            answered.filter(|it| **it == IpAddr::V4(server)).count()
        };
        let (old, new) = (by(MOVED), by(NEW));
        if let Some((Err(error), _)) = asked.iter().find(|(it, _)| it.is_err()) {
            return Err(LabError::unexpected(format!(
                "a client was not answered: {error}"
            )));
        }
        if old == 0 || new == 0 {
            return Err(LabError::unexpected(format!(
                "answered: {old} here, {new} there"
            )));
        }
        let longest = asked
            .iter()
            .map(|(_, took)| *took)
            .max()
            .unwrap_or_default();
        Ok((
            format!(
                "{} connections, none refused: {old} answered by the old server, {new} by the new \
                 one; the longest took {} ms, the cut-over {took} s",
                asked.len(),
                longest.as_millis()
            ),
            (),
        ))
    })?;
    Ok(())
}

/// Runs a command of ours on the old server, which is to work.
fn ordered(setup: &DaemonSetup<'_>, args: &[&str]) -> Result<Output> {
    let said = setup.run(Role::Old, args)?;
    match said.status.success() {
        true => Ok(said),
        false => Err(LabError::unexpected(format!("{args:?}: {said:?}"))),
    }
}

/// The time in the last line of a cut-over.
fn last_second(said: &str) -> Option<&str> {
    said.lines().last()?.split_whitespace().next()
}

/// Connects again and again. Returns of each connection who answered, and how long that took.
fn ask_until(
    client: Client<'_>,
    over: &AtomicBool,
) -> Vec<(std::result::Result<IpAddr, String>, Duration)> {
    let mut asked = Vec::new();
    while !over.load(Relaxed) {
        let begun = Instant::now();
        let answer = client.get(MOVED);
        let server = answer.map(|it| it.server.ip());
        asked.push((server.map_err(|error| error.to_string()), begun.elapsed()));
        std::thread::sleep(EVERY.saturating_sub(begun.elapsed()));
    }
    asked
}

fn crash<'lab>(
    lab: &'lab Lab,
    setup: &DaemonSetup<'lab>,
    role: Role,
    daemon: Daemon<'lab>,
) -> Result<(String, Daemon<'lab>)> {
    let mut conversation = lab.client().converse(MOVED)?;
    conversation.exchange(b"before the crash", RECOVERY)?;
    let tap = lab.tap(Leg::Clients)?;
    daemon.kill()?;
    let killed = Instant::now();
    conversation.say(b"during the crash")?;
    let meanwhile = lab.client().probe_tcp(MOVED, PATIENCE)?;
    let refusals = tap.stop()?.refusals_from(MOVED);
    if meanwhile != Probe::Silent || refusals > 0 {
        return Err(LabError::unexpected(format!(
            "{MOVED} was not silent: a new connection was {meanwhile:?}, {refusals} resets or ICMP"
        )));
    }
    let mut daemon = setup.start(role)?;
    daemon.wait_until_up()?;
    conversation.hear(b"during the crash", RECOVERY)?;
    conversation.exchange(b"after the crash", RECOVERY)?;
    let took = killed.elapsed().as_secs_f64();
    Ok((
        format!("silence, no reset; the connection lived on {took:.1} s later and lost nothing"),
        daemon,
    ))
}

/// Expects that the new server listens on one TCP address and on no other.
fn only_listener(lab: &Lab, expected: SocketAddr) -> Result<SocketAddr> {
    let found = listeners(lab.new_server())?;
    if found != [expected] {
        return Err(LabError::unexpected(format!(
            "the new server listens on {found:?}, not on {expected} alone"
        )));
    }
    Ok(expected)
}

/// Numbers the steps, and reports the result of each.
struct Story<'out> {
    out: &'out mut dyn Write,
    steps: usize,
    failed: usize,
}

impl Story<'_> {
    /// Announces a step, does it, and reports the result. Returns `None` if it failed.
    fn step<T>(
        &mut self,
        title: &str,
        play: impl FnOnce() -> Result<(String, T)>,
    ) -> Result<Option<T>, DemoError> {
        self.steps += 1;
        writeln!(self.out, "{:3}. {title}", self.steps)?;
        self.out.flush()?;
        let seen = play();
        // The signal reaches the daemons too, so the result means nothing.
        if interrupt::came() {
            return Err(DemoError::Interrupted);
        }
        match seen {
            Ok((seen, value)) => {
                writeln!(self.out, "     ✓ {seen}")?;
                Ok(Some(value))
            }
            Err(error) => {
                self.failed += 1;
                writeln!(self.out, "     ✗ {error}")?;
                Ok(None)
            }
        }
    }
}
