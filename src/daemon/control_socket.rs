//! Both ends of the control socket, over which commands ask the old server's daemon for something.
//!
//! The socket lies beside the status socket, where only root can enter. A client sends one
//! [`Request`] a line, and reads one [`Answer`] a line. What belongs to a connection, as a cut-over
//! does, ends with it.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tracing::debug;

use super::policy::modes::Who;
use super::service;
use super::status_socket::{self, StatusError, StatusListener};
use crate::model::request::{Answer, Request};
use crate::model::runtime::CONTROL_SOCKET;

/// How long a command waits for a daemon that does not answer. It writes to the disk meanwhile.
const PATIENCE: Duration = Duration::from_secs(10);

/// Longest line: a request or an answer with every move that there can be.
const MAX_LINE: u64 = 8 << 20;

/// Commands under way at the same time; more of them wait to be let in.
const MAX_CLIENTS: usize = 16;

/// Requests that wait for the control task.
const WAITING: usize = 16;

/// What a connection brings.
pub(super) enum Order {
    /// A request, and where its answer goes.
    Request {
        /// Whose it is.
        who: Who,
        /// What it says.
        request: Request,
        /// Takes the answer.
        answer: oneshot::Sender<Answer>,
    },
    /// The connection has ended.
    Gone(u64),
}

/// Opens the daemon's end in the directory of its namespace, whose lock it holds.
pub(super) fn listen(dir: &Path) -> service::Result<UnixListener> {
    status_socket::listen_at(&dir.join(CONTROL_SOCKET))
}

/// Takes the socket into the event loop. What clients ask for comes out of the queue.
pub(super) fn serve(listener: UnixListener) -> io::Result<mpsc::Receiver<Order>> {
    let mut listener = StatusListener::new(listener)?;
    let (to_control, orders) = mpsc::channel(WAITING);
    let room = Arc::new(Semaphore::new(MAX_CLIENTS));
    tokio::spawn(async move {
        for connection in 0.. {
            let Ok(place) = Arc::clone(&room).acquire_owned().await else {
                return;
            };
            let client = listener.accept().await;
            let to_control = to_control.clone();
            tokio::spawn(async move {
                let pid = client.peer_cred().ok().and_then(|it| it.pid()).unwrap_or(0);
                let who = Who { connection, pid };
                if let Err(error) = converse(client, who, &to_control).await {
                    debug!(%error, "a client of the control socket went away");
                }
                let _ = to_control.send(Order::Gone(connection)).await;
                drop(place);
            });
        }
    });
    Ok(orders)
}

/// Answers a client until it hangs up.
async fn converse(
    mut client: tokio::net::UnixStream,
    who: Who,
    to_control: &mpsc::Sender<Order>,
) -> io::Result<()> {
    let (reading, mut writing) = client.split();
    let mut reading = tokio::io::BufReader::new(reading);
    loop {
        let mut line = String::new();
        let mut bounded = (&mut reading).take(MAX_LINE);
        if bounded.read_line(&mut line).await? == 0 {
            return Ok(());
        }
        let answer = match serde_json::from_str(&line) {
            Err(error) => Answer::Refused {
                input: true,
                why: format!(
                    "this daemon does not understand the command ({error}); `ipmoved` and the \
                     daemon have to be of one version: restart the daemon"
                ),
            },
            Ok(request) => {
                let (answer, answered) = oneshot::channel();
                let order = Order::Request {
                    who,
                    request,
                    answer,
                };
                if to_control.send(order).await.is_err() {
                    return Ok(());
                }
                // Without an answer the daemon is ending.
                match answered.await {
                    Ok(answer) => answer,
                    Err(_) => return Ok(()),
                }
            }
        };
        let mut text = serde_json::to_string(&answer)?;
        text.push('\n');
        writing.write_all(text.as_bytes()).await?;
    }
}

/// A command's end.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects to the daemon that listens at `socket`.
    ///
    /// # Errors
    /// If there is none, or not for this user.
    pub fn connect(socket: &Path) -> Result<Self, StatusError> {
        let stream = status_socket::connect(socket)?;
        let patient = stream
            .set_read_timeout(Some(PATIENCE))
            .and_then(|()| stream.set_write_timeout(Some(PATIENCE)));
        patient.map_err(StatusError::Answer)?;
        Ok(Self {
            stream: BufReader::new(stream),
        })
    }

    /// The same, which waits for so long for each answer.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn patient(self, patience: Duration) -> Result<Self, StatusError> {
        let set = self.stream.get_ref().set_read_timeout(Some(patience));
        set.map_err(StatusError::Answer)?;
        Ok(self)
    }

    /// Whether the daemon has hung up.
    pub fn is_gone(&self) -> bool {
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        match recv(self.stream.get_ref(), &mut [0], flags) {
            Ok((read, _)) => read == 0,
            Err(error) => error != Errno::AGAIN,
        }
    }

    /// Asks for something, and waits for the answer.
    ///
    /// # Errors
    /// If the daemon does not answer.
    pub fn ask(&mut self, request: &Request) -> Result<Answer, StatusError> {
        let mut ask = || {
            let mut text = serde_json::to_string(request)?;
            text.push('\n');
            self.stream.get_mut().write_all(text.as_bytes())?;
            let mut line = String::new();
            let mut bounded = (&mut self.stream).take(MAX_LINE);
            if bounded.read_line(&mut line)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            Ok(serde_json::from_str(&line)?)
        };
        ask().map_err(StatusError::of_answer)
    }
}
