//! The next daemon's side of a handover: what it is given by the one that runs, or by the service
//! manager, which kept it.
//!
//! Owns what is asked of whoever runs, and what has to be the same for that: queues and sockets
//! cannot become others. If it is not, or is not understood, the daemon starts as after a crash.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tracing::{info, warn};

use super::giving::{self, CHECKS, SWITCH};
use super::state::State;
use super::{About, Ask, Descriptors, Reply, Talk, VERSION, Word};
use crate::daemon::control_socket;
use crate::daemon::kept::{self, Kept};
use crate::daemon::service::{DaemonError, Result, input, system};
use crate::daemon::status_socket::{self, StatusError};
use crate::daemon::viewers;
use crate::io::tun::{TunFeatures, TunOptions, TunQueue};
use crate::io::udp::{UdpOptions, UdpSocket};
use crate::kernel::{Host, namespace_dir};
use crate::model::runtime::HANDOVER_SOCKET;
use crate::settings::config::Config;

/// How long the last word of the daemon that runs may take.
const LAST_WORD: Duration = Duration::from_secs(5);

/// How long this daemon may take from when the other one stands still. Below [`SWITCH`], after
/// which the other one puts its own programs back.
const TAKEN: Duration = Duration::from_secs(12);

/// Why there is nothing to take over.
const STOPPED: &str = "the daemon that ran was stopped meanwhile, and has undone everything: start \
                       this one again";

/// How long the process of a daemon that was killed may take to end after it has hung up.
const HUNG_UP: Timespec = Timespec {
    tv_sec: 1,
    tv_nsec: 0,
};

/// What another daemon leaves to this one.
#[derive(Debug)]
pub(in crate::daemon) struct Inheritance {
    about: About,
    from: Giver,
    queues: Vec<OwnedFd>,
    sockets: Vec<OwnedFd>,
    state: Option<State>,
}

/// Who gives it.
#[derive(Debug)]
enum Giver {
    /// The daemon that runs.
    Daemon(Running),
    /// The service manager.
    Manager,
}

/// The daemon that runs, and hands itself over.
#[derive(Debug)]
struct Running {
    talk: Talk,
    /// The directory of the namespace, which goes when a daemon is stopped.
    dir: PathBuf,
    /// Its process.
    process: OwnedFd,
    /// Since when it carries no packets.
    stopped: Option<Instant>,
}

impl Running {
    /// Whether its process has ended. One that was killed hangs up a moment before.
    fn has_ended(&self) -> bool {
        let mut ended = [PollFd::new(&self.process, PollFlags::IN)];
        matches!(poll(&mut ended, Some(&HUNG_UP)), Ok(1..))
    }

    /// Waits until this daemon may be the one that runs. Whether the other one has said so; else
    /// it has ended without a word.
    ///
    /// # Errors
    /// If the other one goes on instead.
    fn lets_go(&self) -> Result<bool> {
        let is_late = self.stopped.is_some_and(|since| since.elapsed() > TAKEN);
        if is_late && !self.has_ended() {
            return Err(not_taken_over("this daemon was not ready in time"));
        }
        let patient = self.talk.patient(LAST_WORD);
        let told = patient.and_then(|()| self.talk.say(&Word::Taken, &[]));
        match told.and_then(|()| self.talk.hear_last::<Reply>()) {
            Ok(Reply::Go) => Ok(true),
            Ok(Reply::Offer(_) | Reply::State | Reply::Refused(_)) => {
                Err(not_taken_over("it goes on"))
            }
            Err(_) if self.has_ended() => Ok(false),
            Err(error) => Err(not_taken_over(error)),
        }
    }
}

/// The sockets on which a daemon listens.
#[derive(Debug)]
pub(in crate::daemon) struct Places {
    /// The lock of its directory, if another one shares it.
    pub(in crate::daemon) lock: Option<OwnedFd>,
    /// That of its state directory, if another one shares it.
    pub(in crate::daemon) state_dir: Option<OwnedFd>,
    /// Where `ipmoved status` connects.
    pub(in crate::daemon) status: UnixListener,
    /// Where the next daemon connects.
    pub(in crate::daemon) handover: UnixListener,
    /// Where commands connect.
    pub(in crate::daemon) commands: UnixListener,
    /// Where others connect who look at the daemon, if another one shares them.
    pub(in crate::daemon) viewers: Option<viewers::Sockets>,
}

impl Places {
    /// Opens those of a daemon that holds the lock of this directory.
    ///
    /// # Errors
    /// If they cannot be made.
    pub(in crate::daemon) fn open(dir: &Path) -> Result<Self> {
        Ok(Self {
            lock: None,
            state_dir: None,
            status: status_socket::listen(dir)?,
            handover: giving::listen(dir)?,
            commands: control_socket::listen(dir)?,
            viewers: None,
        })
    }
}

/// What was found at the start.
#[derive(Debug, Default)]
pub(in crate::daemon) struct Found {
    /// What can be gone on with.
    pub(in crate::daemon) inheritance: Option<Inheritance>,
    /// What a daemon that runs shares.
    pub(in crate::daemon) places: Option<Places>,
    /// The memory of an earlier daemon's programs.
    pub(in crate::daemon) memory: Vec<OwnedFd>,
}

impl Found {
    /// Looks for a daemon that leaves something: with `--takeover` one that runs, else one whose
    /// service manager `kept` it.
    ///
    /// # Errors
    /// If the daemon that runs does not hand itself over, or not for these settings.
    pub(in crate::daemon) fn new(
        config: &Config,
        base: &Path,
        kept: Kept,
        takeover: bool,
    ) -> Result<Self> {
        let is_left = kept.is_left();
        if is_left {
            // What is left of it must not be found once more, however much of it there is.
            kept::forget();
        }
        let Kept {
            memory,
            queues,
            sockets,
            state,
        } = kept;
        if let Some(state) = state {
            let read = State::read(state).and_then(|(about, state)| {
                let inheritance = Inheritance {
                    about,
                    from: Giver::Manager,
                    queues,
                    sockets,
                    state: Some(state),
                };
                inheritance.fits(config)?;
                Ok(inheritance)
            });
            let inheritance = read
                .map_err(|why| {
                    warn!(
                        why,
                        "starting as after a crash, since this daemon cannot go on with what the \
                         last one left; connections go on after a pause"
                    );
                })
                .ok();
            return Ok(Self {
                inheritance,
                memory,
                ..Self::default()
            });
        }
        if is_left {
            warn!(
                "starting as after a crash, since the service manager has not kept all that the \
                 last daemon left; connections go on after a pause"
            );
        }
        drop((queues, sockets));
        if takeover {
            return Self::from_running(config, base);
        }
        Ok(Self {
            memory,
            ..Self::default()
        })
    }

    fn from_running(config: &Config, base: &Path) -> Result<Self> {
        let dir = namespace_dir(base).map_err(system)?;
        let talk = match status_socket::connect(&dir.join(HANDOVER_SOCKET)) {
            Ok(stream) => Talk(stream),
            Err(StatusError::NotRunning(_)) => return Ok(Self::default()),
            Err(error) => return Err(DaemonError::Running(error.into())),
        };
        let broken = |error: io::Error| running(format!("the daemon that runs broke off: {error}"));
        talk.patient(SWITCH).map_err(broken)?;
        let ask = Ask::TakeOver { version: VERSION };
        talk.say(&ask, &[]).map_err(broken)?;
        let (about, given) = match talk.hear().map_err(broken)? {
            (Reply::Offer(about), given) => (about, given),
            (Reply::Refused(why), _) => return Err(running(why)),
            (Reply::State | Reply::Go, _) => return Err(running("it says something else")),
        };
        talk.patient(CHECKS).map_err(broken)?;
        let pid = about.pid;
        // While it talks, this number is its own.
        let process = process(pid).map_err(broken)?;
        let descriptors = Descriptors::of(&about, given);
        let descriptors = descriptors.ok_or_else(|| running("it gives something else"))?;
        let inheritance = Inheritance {
            about,
            from: Giver::Daemon(Running {
                talk,
                dir,
                process,
                stopped: None,
            }),
            queues: descriptors.queues,
            sockets: descriptors.sockets,
            state: None,
        };
        (inheritance.fits(config))
            .map_err(|why| input(format!("{why}, so this one cannot take over from it")))?;
        info!(pid, "taking over from the daemon that runs");
        Ok(Self {
            inheritance: Some(inheritance),
            places: Some(Places {
                lock: Some(descriptors.lock),
                state_dir: descriptors.state_dir,
                status: descriptors.status.into(),
                handover: descriptors.handover.into(),
                commands: descriptors.commands.into(),
                viewers: Some(viewers::Sockets::adopt(
                    descriptors.flows,
                    descriptors.metrics,
                )),
            }),
            memory: descriptors.memory,
        })
    }
}

impl Inheritance {
    /// Whether a daemon with these settings can go on with it.
    ///
    /// # Errors
    /// Why not.
    fn fits(&self, config: &Config) -> std::result::Result<(), String> {
        let About {
            role, tun, lanes, ..
        } = &self.about;
        if *role != config.role {
            return Err(format!("the last daemon was that of the {role} server"));
        }
        if *tun != config.tun {
            return Err(format!("the last daemon had --tun {tun}"));
        }
        if *lanes != usize::from(config.lanes) {
            return Err(format!("the last daemon had --lanes {lanes}"));
        }
        if [self.queues.len(), self.sockets.len()] != [*lanes; 2] {
            return Err("not all of what the last daemon had is left".into());
        }
        let first = self.sockets.first().and_then(|it| it.try_clone().ok());
        let bound = first.and_then(|it| std::net::UdpSocket::from(it).local_addr().ok());
        let bound = bound.ok_or("the last daemon had no UDP socket")?;
        let is_same = match config.listen.ip {
            Some(ip) => ip == bound.ip(),
            None => bound.ip().is_unspecified(),
        };
        if !is_same || config.listen.port != bound.port() {
            return Err(format!("the last daemon had --listen {bound}"));
        }
        Ok(())
    }

    /// The queues of the TUN.
    pub(in crate::daemon) fn take_queues(
        &mut self,
        options: TunOptions,
    ) -> (Vec<TunQueue>, TunFeatures) {
        let queues = std::mem::take(&mut self.queues).into_iter();
        let queues = queues.map(|queue| TunQueue::adopt(queue, options));
        let features = TunFeatures {
            uso: self.about.uso,
        };
        (queues.collect(), features)
    }

    /// The sockets of the tunnel.
    ///
    /// # Errors
    /// If they are none.
    pub(in crate::daemon) fn take_sockets(
        &mut self,
        options: UdpOptions,
    ) -> io::Result<Vec<UdpSocket>> {
        UdpSocket::adopt_lanes(std::mem::take(&mut self.sockets), options)
    }

    /// From now on the other daemon carries no packets. They wait until this one does. If it has
    /// died meanwhile, this one goes on as after a crash.
    ///
    /// # Errors
    /// If it does not stop, or its state is not understood: then it goes on. If it was stopped, and
    /// has undone everything.
    pub(in crate::daemon) fn stop_the_other(&mut self) -> Result<()> {
        let Giver::Daemon(other) = &mut self.from else {
            return Ok(());
        };
        let talk = &other.talk;
        let heard = match talk.say(&Word::Ready, &[]).and_then(|()| talk.hear()) {
            Err(_) if other.has_ended() && !other.dir.exists() => {
                return Err(not_taken_over(STOPPED));
            }
            Err(error) if other.has_ended() => {
                warn!(%error, "the daemon that ran has ended; going on as after a crash");
                return Ok(());
            }
            heard => heard,
        };
        other.stopped = Some(Instant::now());
        let state = match heard.map_err(not_taken_over)? {
            (Reply::State, mut given) => given.pop(),
            (Reply::Refused(why), _) => return Err(not_taken_over(why)),
            (Reply::Offer(_) | Reply::Go, _) => None,
        };
        let state = state.ok_or_else(|| not_taken_over("it gives no state"))?;
        self.state = Some(State::read(state).map_err(not_taken_over)?.1);
        Ok(())
    }

    /// Whether another daemon runs, and goes on if this one fails.
    pub(in crate::daemon) fn is_of_running(&self) -> bool {
        match &self.from {
            Giver::Daemon(_) => true,
            Giver::Manager => false,
        }
    }

    /// Wipes what the other daemon knew, in a copy of this process that does not need it.
    pub(in crate::daemon) fn forget_state(&mut self) {
        if let Some(mut state) = self.state.take() {
            state.wipe();
        }
    }

    /// What the other daemon knew.
    pub(in crate::daemon) fn state(&self) -> Option<&State> {
        self.state.as_ref()
    }

    /// This daemon has all of it, and is the one that runs from now on. Call it before the first
    /// packet is carried.
    ///
    /// # Errors
    /// If the other one goes on instead.
    pub(in crate::daemon) fn take_charge(&self, host: &mut Host) -> Result<()> {
        let from = self.about.pid;
        let mut is_handed = true;
        if let Giver::Daemon(running) = &self.from {
            is_handed = running.lets_go()?;
            if let Err(error) = host.take_charge() {
                warn!(%error, "the lock names the last daemon");
            }
        }
        if self.state.is_none() {
            warn!(
                pid = from,
                "took over from a daemon that died; connections go on after a pause"
            );
        } else if is_handed {
            info!(pid = from, "took over; no connection was lost");
        } else {
            warn!(
                pid = from,
                "took over from a daemon that died in the midst of it"
            );
        }
        Ok(())
    }
}

/// A handle to a process.
pub(super) fn process(pid: u32) -> io::Result<OwnedFd> {
    let number = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let number = number.ok_or(io::ErrorKind::InvalidInput)?;
    Ok(pidfd_open(number, PidfdFlags::empty())?)
}

/// Why a daemon that is a service does not hand itself over to another one.
pub(in crate::daemon) const OF_A_MANAGER: &str =
    "it is a service, which its manager would start again: `systemctl restart ipmoved` takes over";

pub(super) fn running(why: impl Into<String>) -> DaemonError {
    DaemonError::Running(format!("cannot take over: {}", why.into()).into())
}

/// This daemon could not take over, and the other one goes on.
pub(in crate::daemon) fn not_taken_over(why: impl ToString) -> DaemonError {
    DaemonError::NotTakenOver(why.to_string().into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::model::peer::Role;

    /// What a daemon shares whose process this is, and that daemon's end.
    fn shared(process: OwnedFd) -> (Inheritance, Talk) {
        let (one, other) = UnixStream::pair().unwrap();
        let about = About {
            version: VERSION,
            pid: 7,
            role: Role::Old,
            tun: "ipmoved0".into(),
            uso: true,
            lanes: 0,
            memory: 0,
            metrics: false,
            state_dir: false,
        };
        let running = Running {
            dir: "/".into(),
            talk: Talk(one),
            process,
            stopped: None,
        };
        let inheritance = Inheritance {
            about,
            from: Giver::Daemon(running),
            queues: Vec::new(),
            sockets: Vec::new(),
            state: None,
        };
        (inheritance, Talk(other))
    }

    fn this_process() -> OwnedFd {
        process(std::process::id()).unwrap()
    }

    fn ended() -> OwnedFd {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let handle = process(child.id()).unwrap();
        child.wait().unwrap();
        handle
    }

    fn running(inheritance: &Inheritance) -> &Running {
        match &inheritance.from {
            Giver::Daemon(running) => running,
            Giver::Manager => unreachable!("it is of a daemon"),
        }
    }

    #[test]
    fn a_daemon_that_died_is_gone_on_with_and_one_that_lives_goes_on() {
        for (process, has_died) in [(this_process(), false), (ended(), true)] {
            let (mut inheritance, other) = shared(process);
            drop(other);
            assert_eq!(inheritance.stop_the_other().is_ok(), has_died);
            assert!(inheritance.state().is_none());
            match running(&inheritance).lets_go() {
                Ok(told) => assert!(has_died && !told),
                Err(error) => assert!(!has_died, "{error}"),
            }
        }
    }

    #[test]
    fn whoever_lets_go_says_so() {
        let (inheritance, other) = shared(this_process());
        other.say(&Reply::Go, &[]).unwrap();
        assert!(running(&inheritance).lets_go().unwrap());
        assert_eq!(other.hear::<Word>().unwrap().0, Word::Taken);
    }

    #[test]
    fn whoever_was_not_ready_in_time_does_not_say_that_it_is() {
        let (mut inheritance, other) = shared(this_process());
        other.say(&Reply::Go, &[]).unwrap();
        let Giver::Daemon(running) = &mut inheritance.from else {
            unreachable!("it is of a daemon");
        };
        let long_ago = Instant::now().checked_sub(TAKEN + Duration::from_secs(1));
        running.stopped = Some(long_ago.expect("the machine runs for longer"));
        assert!(running.lets_go().is_err());
        other.patient(Duration::from_millis(1)).unwrap();
        assert!(other.hear::<Word>().is_err(), "it says nothing");
    }
}
