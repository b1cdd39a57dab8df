//! The part of the daemon that keeps root's privileges: a process of its own, which reads the
//! configuration again and makes the kernel's programs for it, when the daemon asks.
//!
//! ```text
//! start ──┬── the daemon: gives up its privileges, carries packets, hears the network
//!         │        │ read again?     ▲ what the files say, or why they cannot be read
//!         │        │ make this?      │ descriptors of maps, programs and sockets
//!         └── the forge: sleeps ─────┘
//! ```
//!
//! A daemon that runs can neither open the configuration nor load a program
//! ([`confine`](super::confine)), so that whoever takes it over cannot either. All that such a one
//! can ask of the forge is to read the very files that the settings name, and to make ipmoved's own
//! programs, for moves and a port of the daemon's choice. The forge hears nobody else, and ends
//! with the daemon: when the socket between them is closed.

#![allow(
    unsafe_code,
    reason = "fork(2), signals and descriptors that another process has sent have no safe wrapper"
)]

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::process::DumpableBehavior;
use serde::{Deserialize, Serialize};
use tracing::debug;

use super::chosen::chosen;
use super::descriptors;
use super::follow::Programs;
use super::handover::taking::Inheritance;
use super::setup::bind;
use crate::kernel::capture::Capture;
use crate::kernel::netlink::{Link, Netlink};
use crate::kernel::recorded;
use crate::kernel::steer::Remade;
use crate::model::moved::Move;
use crate::settings::args::RunArgs;
use crate::settings::config::Config;
use crate::settings::files::{Files, Found};

/// How long the control task waits for it: no longer than peers are patient with this server.
const PATIENCE_OF_CONTROL: Duration = Duration::from_secs(5);

/// How long the daemon waits for files on a slow disk, or a verifier with much to do.
const PATIENCE: Duration = Duration::from_secs(60);

/// Longest message: the files that settings are made of.
const MAX_MESSAGE: u64 = 64 << 20;

/// What the daemon asks.
#[derive(Serialize, Deserialize)]
enum Ask {
    /// Read the files again.
    Read,
    /// Make this.
    Make(Wanted),
    /// Send the descriptors of what was made.
    Give,
    /// What was made last is in use, and the next is made of it.
    Used,
    /// Note the connections of hosts behind this one that these moves could capture (old server).
    NoteOthers(Vec<String>),
}

/// What is to be made of the settings that were read last.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Wanted {
    /// Everything that moves (old server).
    pub(super) moves: Vec<String>,
    /// Those of which the new server may begin connections (old server).
    pub(super) begin: Vec<String>,
    /// Programs.
    pub(super) programs: bool,
    /// A program for the loopback interface (new server).
    pub(super) own_calls: bool,
    /// Sockets for the port of the settings, in place of this one.
    pub(super) sockets: bool,
    /// The tunnel's port, as it is to be.
    pub(super) port: u16,
}

/// What the forge says.
#[derive(Serialize, Deserialize)]
enum Said {
    /// What the files say.
    Read(Found),
    /// So many descriptors follow.
    Made(usize),
    /// It is done.
    Done,
    /// It is not.
    Failed(String),
}

/// The daemon's end.
#[derive(Clone, Debug)]
pub(super) struct Forge(Arc<Mutex<BufReader<UnixStream>>>);

/// What the forge has made.
#[derive(Debug, Default)]
pub(super) struct Made {
    /// The maps and programs, in the order in which they are wanted.
    pub(super) programs: Vec<OwnedFd>,
    /// The sockets.
    pub(super) sockets: Vec<OwnedFd>,
}

impl Forge {
    /// Begins the process. Call it while there is one thread, and before privileges are given up.
    /// Without one the daemon does all but take a new configuration.
    /// What was `inherited` is the daemon's alone.
    pub(super) fn start(
        config: &Config,
        programs: &mut Programs,
        tun: &Link,
        inherited: Option<&mut Inheritance>,
    ) -> Option<Self> {
        let begun = UnixStream::pair().and_then(|(ours, theirs)| {
            ours.set_read_timeout(Some(PATIENCE))?;
            ours.set_write_timeout(Some(PATIENCE))?;
            // SAFETY: this process has one thread, so that no lock is held in the copy.
            match unsafe { libc::fork() } {
                0 => {
                    drop(ours);
                    // The copy would keep keys and clients for as long as it lives.
                    if let Some(inherited) = inherited {
                        inherited.forget_state();
                    }
                    let given = Arc::clone(&config.given);
                    let code = i32::from(serve(theirs, &given, programs, tun).is_err());
                    // SAFETY: it ends the process, and runs nothing that is the daemon's.
                    unsafe { libc::_exit(code) }
                }
                -1 => Err(io::Error::last_os_error()),
                _ => Ok(ours),
            }
        });
        begun
            .map(|ours| Self(Arc::new(Mutex::new(BufReader::new(ours)))))
            .map_err(|error| debug!(%error, "nothing reads the configuration again"))
            .ok()
    }

    /// What it made last is of no use, and it cannot be told: from now on it makes nothing.
    pub(super) fn give_up(&self) {
        let stream = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = stream.get_ref().shutdown(std::net::Shutdown::Both);
    }

    /// Reads the files again that the settings are made of.
    ///
    /// # Errors
    /// If it does not answer.
    pub(super) fn read(&self) -> Result<Files, String> {
        match self.ask(&Ask::Read, PATIENCE)? {
            (Said::Read(found), _) => Ok(Files::Given(found)),
            (said, _) => Err(said.unexpected()),
        }
    }

    /// Makes this for the settings that were read last.
    ///
    /// # Errors
    /// If it cannot, or does not answer.
    pub(super) fn make(&self, wanted: &Wanted, sockets: usize) -> Result<Made, String> {
        match self.ask(&Ask::Make(wanted.clone()), PATIENCE)? {
            (Said::Made(_), mut all) => {
                let programs = all
                    .len()
                    .saturating_sub(if wanted.sockets { sockets } else { 0 });
                let sockets = all.split_off(programs);
                Ok(Made {
                    programs: all,
                    sockets,
                })
            }
            (said, _) => Err(said.unexpected()),
        }
    }

    /// What it made last is in use.
    pub(super) fn used(&self) {
        if let Err(error) = self.ask(&Ask::Used, PATIENCE_OF_CONTROL) {
            debug!(error, "the next configuration will not be taken");
        }
    }

    /// Notes the connections of hosts behind this one that these moves could capture.
    pub(super) fn note_others(&self, moves: &[Move]) {
        let moves = moves.iter().map(ToString::to_string).collect();
        if let Err(error) = self.ask(&Ask::NoteOthers(moves), PATIENCE_OF_CONTROL) {
            debug!(error, "no connections of hosts behind this one are known");
        }
    }

    fn ask(&self, ask: &Ask, patience: Duration) -> Result<(Said, Vec<OwnedFd>), String> {
        let mut stream = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = stream.get_ref().set_read_timeout(Some(patience));
        let mut exchange = || {
            tell(stream.get_mut(), ask)?;
            let said: Said = hear(&mut stream)?.ok_or(io::ErrorKind::UnexpectedEof)?;
            let made = match said {
                Said::Made(count) => {
                    // They come alone: whatever is read ahead of a message has none.
                    tell(stream.get_mut(), &Ask::Give)?;
                    take(stream.get_ref().as_fd(), count)?
                }
                Said::Read(_) | Said::Done | Said::Failed(_) => Vec::new(),
            };
            Ok((said, made))
        };
        let answer: io::Result<_> = exchange();
        match answer {
            Ok((Said::Failed(why), _)) => Err(why),
            Ok(answer) => Ok(answer),
            Err(error) => {
                // Half an answer would be taken for the next one.
                let _ = stream.get_ref().shutdown(std::net::Shutdown::Both);
                Err(format!(
                    "the process that reads the configuration does not answer ({error}); restart \
                     the daemon"
                ))
            }
        }
    }
}

impl Said {
    fn unexpected(&self) -> String {
        "the process that reads the configuration answers something else; restart the daemon".into()
    }
}

fn tell(stream: &mut UnixStream, message: &impl Serialize) -> io::Result<()> {
    let mut text = zeroize::Zeroizing::new(serde_json::to_string(message)?);
    text.push('\n');
    stream.write_all(text.as_bytes())
}

/// The next message; `None` at the end.
fn hear<T: for<'de> Deserialize<'de>>(stream: &mut BufReader<UnixStream>) -> io::Result<Option<T>> {
    let mut line = zeroize::Zeroizing::new(String::new());
    if stream.take(MAX_MESSAGE).read_line(&mut line)? == 0 {
        return Ok(None);
    }
    Ok(Some(serde_json::from_str(&line)?))
}

/// Sends descriptors, one byte with each message.
fn give(stream: BorrowedFd<'_>, all: &[OwnedFd]) -> io::Result<()> {
    for part in all.chunks(descriptors::MOST) {
        let part: Vec<BorrowedFd<'_>> = part.iter().map(AsFd::as_fd).collect();
        descriptors::send(stream, b".", &part)?;
    }
    Ok(())
}

/// Receives so many descriptors.
fn take(stream: BorrowedFd<'_>, count: usize) -> io::Result<Vec<OwnedFd>> {
    let mut all = Vec::new();
    while all.len() < count {
        let before = all.len();
        let read = descriptors::receive(stream, &mut [0], &mut all)?;
        if read == 0 || all.len() == before {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(all)
}

// The process.

/// Serves the daemon until it is gone.
fn serve(
    mut daemon: UnixStream,
    given: &Arc<RunArgs>,
    programs: &mut Programs,
    tun: &Link,
) -> io::Result<()> {
    settle(&daemon)?;
    let mut reading = BufReader::new(daemon.try_clone()?);
    let mut smith = Smith {
        given,
        programs,
        tun,
        config: None,
        next: None,
    };
    let mut made = Vec::new();
    while let Some(ask) = hear::<Ask>(&mut reading)? {
        let said = match ask {
            Ask::Read => Ok(Said::Read(smith.read())),
            Ask::Make(wanted) => smith.make(&wanted).map(|all| {
                made = all;
                Said::Made(made.len())
            }),
            Ask::Give => {
                give(daemon.as_fd(), &std::mem::take(&mut made))?;
                continue;
            }
            Ask::Used => {
                smith.used();
                Ok(Said::Done)
            }
            Ask::NoteOthers(moves) => smith.note_others(&moves).map(|()| Said::Done),
        };
        tell(&mut daemon, &said.unwrap_or_else(Said::Failed))?;
    }
    Ok(())
}

/// Leaves to the daemon all that is the daemon's: what it has open, and the signals.
fn settle(daemon: &UnixStream) -> io::Result<()> {
    for number in [
        libc::SIGTERM,
        libc::SIGINT,
        libc::SIGHUP,
        libc::SIGQUIT,
        libc::SIGPIPE,
    ] {
        // SAFETY: to ignore a signal runs no code of ours.
        unsafe { libc::signal(number, libc::SIG_IGN) };
    }
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    let _ = rustix::thread::set_name(c"ipmoved-forge");
    let null = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    // It is closed below, as everything is.
    let null = null.into_raw_fd();
    for number in 0..3 {
        // SAFETY: the three are open or free, and no value of this process owns them.
        if unsafe { libc::dup2(null, number) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    let mut open = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        open.extend(
            entry?
                .file_name()
                .to_str()
                .and_then(|name| name.parse::<i32>().ok()),
        );
    }
    for number in open {
        let leads = std::fs::read_link(format!("/proc/self/fd/{number}")).unwrap_or_default();
        let leads = leads.to_string_lossy();
        let is_bpf = leads.starts_with("anon_inode:") && leads.contains("bpf");
        if number > 2 && number != daemon.as_raw_fd() && !is_bpf {
            // A lock or a TUN that outlives the daemon would be in the way of the next one.
            // SAFETY: whatever owned it in this copy of the process is never used or dropped.
            unsafe { libc::close(number) };
        }
    }
    Ok(())
}

/// What the process works on.
struct Smith<'a> {
    given: &'a Arc<RunArgs>,
    /// The programs that the daemon uses, and their memory.
    programs: &'a mut Programs,
    tun: &'a Link,
    /// The settings that were read last, with their files, if they are good.
    config: Option<(Config, Files)>,
    /// The programs that were made last (old server).
    next: Option<Capture>,
}

impl Smith<'_> {
    fn read(&mut self) -> Found {
        let files = Files::on_disk();
        let config = Config::again(self.given, &files);
        if let Ok(config) = &config {
            // It reads what it needs as well.
            let _ = chosen(config, &files);
        }
        let found = files.into_found();
        self.config = config
            .ok()
            .map(|config| (config, Files::Given(found.clone())));
        found
    }

    fn make(&mut self, wanted: &Wanted) -> Result<Vec<OwnedFd>, String> {
        // What leaves is made of what runs, whatever the file says meanwhile.
        let read = &self.config;
        let settings = || read.as_ref().ok_or("no settings were read");
        // Whatever may be refused comes before programs of the new server, which are final.
        let sockets = match wanted.sockets {
            true => bind(&settings()?.0, false).map_err(|error| error.to_string())?,
            false => Vec::new(),
        };
        let mut made = Vec::new();
        if wanted.programs {
            let text = |error: &dyn std::error::Error| error.to_string();
            match &mut *self.programs {
                Programs::Old(capture) => {
                    let (moves, begin) = (parsed(&wanted.moves)?, parsed(&wanted.begin)?);
                    let again = || capture.again(&moves, &begin, wanted.port);
                    let (again, all) = recorded(again);
                    self.next = Some(again.map_err(|error| text(&error))?);
                    made = all;
                }
                Programs::New(steering) => {
                    let (config, files) = settings()?;
                    let (outgoing, _) = chosen(config, files).map_err(|error| text(&error))?;
                    let remade = Remade {
                        outgoing,
                        tunnel_port: wanted.port,
                        max_flows: config.max_flows,
                    };
                    let lo = wanted.own_calls.then(loopback).transpose()?;
                    let again = || steering.remake(self.tun, lo.as_ref(), remade);
                    let (again, all) = recorded(again);
                    again.map_err(|error| text(&error))?;
                    made = all;
                }
            }
        }
        for socket in &sockets {
            let copy = socket.as_fd().try_clone_to_owned();
            made.push(copy.map_err(|error| error.to_string())?);
        }
        Ok(made)
    }

    fn used(&mut self) {
        if let (Programs::Old(capture), Some(next)) = (&mut *self.programs, self.next.take()) {
            **capture = next;
        }
    }

    fn note_others(&mut self, moves: &[String]) -> Result<(), String> {
        let moves = parsed(moves)?;
        let netlink = Netlink::new().map_err(|error| error.to_string())?;
        match &self.programs {
            Programs::Old(capture) => {
                (capture.note_others(&netlink, &moves)).map_err(|it| it.to_string())
            }
            Programs::New(_) => Ok(()),
        }
    }
}

fn parsed(moves: &[String]) -> Result<Vec<Move>, String> {
    let moves = moves.iter().map(|text| text.parse::<Move>());
    let moves = moves.collect::<Result<_, _>>();
    moves.map_err(|error| error.to_string())
}

/// The loopback interface.
fn loopback() -> Result<Link, String> {
    let links = Netlink::new().and_then(|netlink| netlink.links());
    let mut links = links.map_err(|error| error.to_string())?.into_iter();
    let found = links.find(|link| link.loopback);
    found.ok_or_else(|| "this server has no loopback interface".into())
}
