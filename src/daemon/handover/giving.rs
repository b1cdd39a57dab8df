//! The socket at which a daemon is asked to hand itself over, and the command that asks it to leave
//! itself to its service manager.
//!
//! The socket lies beside the status socket, where only root can enter. Owns the conversation; what
//! is handed over, and when, the control task says.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tracing::debug;

use super::{About, Ask, Descriptors, Reply, Talk, VERSION, Word};
use crate::daemon::service;
use crate::daemon::status_socket::{self, StatusError, StatusListener};
use crate::model::runtime::HANDOVER_SOCKET;

/// How long the next daemon may take for its checks. A name that no name server answers takes ten
/// seconds.
pub(in crate::daemon) const CHECKS: Duration = Duration::from_secs(30);

/// How long it may take from there until it stands. Packets wait meanwhile.
pub(in crate::daemon) const SWITCH: Duration = Duration::from_secs(15);

/// How long a first word may take, and somebody who does not read.
const PATIENCE: Duration = Duration::from_secs(5);

/// How a control task answers: `Err` says why not.
pub(in crate::daemon) type Answer<T> = oneshot::Sender<Result<T, String>>;

/// What happens in a handover, as the control task sees it.
pub(in crate::daemon) enum Step {
    /// The next daemon is there, and is to be told what this one has.
    Begin(Answer<(About, Descriptors<OwnedFd>)>),
    /// It has everything else: lanes are to stop, and the state is to be given.
    Stop(Answer<OwnedFd>),
    /// The service manager is to have everything.
    Store(Answer<()>),
    /// It is over; whether another daemon, or the service manager, has it now.
    Over(bool),
}

/// Opens the daemon's end in the directory of its namespace, whose lock it holds.
pub(in crate::daemon) fn listen(dir: &Path) -> service::Result<UnixListener> {
    status_socket::listen_at(&dir.join(HANDOVER_SOCKET))
}

/// Takes the socket into the event loop. Who comes is heard one after the other.
pub(in crate::daemon) fn serve(listener: UnixListener) -> io::Result<mpsc::Receiver<Step>> {
    let mut listener = StatusListener::new(listener)?;
    let (to_control, steps) = mpsc::channel(1);
    tokio::spawn(async move {
        loop {
            let client = listener.accept().await;
            let asks = to_control.clone();
            let conversation = tokio::task::spawn_blocking(move || {
                let heard = client
                    .into_std()
                    .and_then(|client| client.set_nonblocking(false).map(|()| Talk(client)))
                    .and_then(|talk| converse(&talk, &asks));
                heard.unwrap_or_else(|error| {
                    debug!(%error, "no handover");
                    false
                })
            });
            // However it ends, the control task hears of it: it may wait for that.
            let over = conversation.await.unwrap_or(false);
            let _ = to_control.send(Step::Over(over)).await;
            if over {
                // Whoever comes now is the next daemon's.
                return;
            }
        }
    });
    Ok(steps)
}

/// Whether the daemon was handed over.
fn converse(talk: &Talk, to_control: &mpsc::Sender<Step>) -> io::Result<bool> {
    talk.patient(PATIENCE)?;
    match talk.hear()?.0 {
        Ask::TakeOver { version } if version != VERSION => {
            let pid = std::process::id();
            let why = format!(
                "the daemon that runs hands itself over as version {VERSION} of that, and this one \
                 takes version {version}: `kill -KILL {pid}`, and start this one without \
                 --takeover; nothing is reset, and connections go on after a second or two"
            );
            talk.say(&Reply::Refused(why), &[])?;
            Ok(false)
        }
        Ask::TakeOver { .. } => {
            let Some((about, descriptors)) = ask(talk, to_control, Step::Begin)? else {
                return Ok(false);
            };
            let all = descriptors.into_all();
            let borrowed: Vec<_> = all.iter().map(AsFd::as_fd).collect();
            talk.say(&Reply::Offer(about), &borrowed)?;
            talk.patient(CHECKS)?;
            is_word(Word::Ready, talk.hear()?.0)?;
            let Some(state) = ask(talk, to_control, Step::Stop)? else {
                return Ok(false);
            };
            talk.patient(SWITCH)?;
            talk.say(&Reply::State, &[state.as_fd()])?;
            is_word(Word::Taken, talk.hear()?.0)?;
            talk.say(&Reply::Go, &[])?;
            Ok(true)
        }
        Ask::Store => {
            if ask(talk, to_control, Step::Store)?.is_none() {
                return Ok(false);
            }
            // Whoever asked may be gone: that changes nothing.
            let _ = talk.say(&Reply::State, &[]);
            Ok(true)
        }
    }
}

fn is_word(wanted: Word, said: Word) -> io::Result<()> {
    if wanted == said {
        return Ok(());
    }
    Err(io::Error::other("the next daemon does not keep the order"))
}

/// Asks the control task, and says so if it refuses.
fn ask<T>(
    talk: &Talk,
    to_control: &mpsc::Sender<Step>,
    step: impl FnOnce(Answer<T>) -> Step,
) -> io::Result<Option<T>> {
    let (answer, answered) = oneshot::channel();
    let gone = || io::Error::other("the daemon is ending");
    to_control.blocking_send(step(answer)).map_err(|_| gone())?;
    match answered.blocking_recv().map_err(|_| gone())? {
        Ok(given) => Ok(Some(given)),
        Err(why) => {
            talk.say(&Reply::Refused(why), &[])?;
            Ok(None)
        }
    }
}

/// Why a daemon did not leave itself to its service manager.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// There is none that could.
    #[error(transparent)]
    None(#[from] StatusError),
    /// It does not want to.
    #[error("the daemon goes on: {0}")]
    Refused(String),
    /// It broke off.
    #[error("the daemon does not answer: {0}")]
    Broken(#[from] io::Error),
}

/// Asks the daemon whose runtime directory this is to leave itself to its service manager, and to
/// end.
///
/// # Errors
/// See [`HandoverError`].
pub fn store(dir: &Path) -> Result<(), HandoverError> {
    let talk = Talk(status_socket::connect(&dir.join(HANDOVER_SOCKET))?);
    talk.patient(SWITCH)?;
    talk.say(&Ask::Store, &[])?;
    match talk.hear()?.0 {
        Reply::State => Ok(()),
        Reply::Refused(why) => Err(HandoverError::Refused(why)),
        Reply::Offer(_) | Reply::Go => Err(io::Error::other("it says something else").into()),
    }
}
