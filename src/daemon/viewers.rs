//! Those who look at the daemon from outside beside `ipmoved status`: `ipmoved flows` and `top`,
//! and who scrapes metrics.
//!
//! Owns their sockets, which are opened before privileges are given up, and the queue over which
//! they ask the control task for a status.

use std::io;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};

use super::flows::{self, FlowsServer};
use super::metrics;
use super::service::{Result, failed};
use super::status_socket;
use crate::flow::listing::Flows;
use crate::model::runtime::FLOWS_SOCKET;
use crate::model::status::Status;
use crate::settings::values::MetricsAddr;

/// Questions that wait for the control task. Whoever asks more waits to ask.
const WAITING: usize = 4;

/// A question: where the status is to go.
pub(super) type Ask = oneshot::Sender<Status>;

/// Where questions go.
pub(super) type Asks = mpsc::Sender<Ask>;

/// Most who can be there at a time: more than both servers let in.
const VISITS: u32 = 1_024;

/// Where viewers are let in. It closes while another daemon takes over: whoever comes then waits in
/// the socket, and is let in there.
#[derive(Clone, Debug)]
pub(super) struct Door {
    open: watch::Receiver<bool>,
    inside: Arc<Semaphore>,
}

impl Door {
    /// Waits until it is open, and has it stay so until [`closes`](Self::closes), or until the
    /// visit is over; `None` if it is never opened any more.
    pub(super) async fn visit(&mut self) -> Option<OwnedSemaphorePermit> {
        self.open.wait_for(|&open| open).await.ok()?;
        Arc::clone(&self.inside).acquire_owned().await.ok()
    }

    /// Waits until it is to close.
    pub(super) async fn closes(&mut self) {
        // Where nobody can close it any more, the next visit says so.
        let _ = self.open.wait_for(|&open| !open).await;
    }

    /// Waits until everybody who was let in has gone, once it is closed.
    pub(super) async fn all_gone(&self) {
        let _ = self.inside.acquire_many(VISITS).await;
    }
}

/// The sockets.
#[derive(Debug)]
pub(super) struct Sockets {
    flows: UnixListener,
    metrics: Option<TcpListener>,
}

impl Sockets {
    /// Opens them, in the directory of this daemon's namespace, whose lock it holds. `may_come`:
    /// addresses of this host may not be there yet.
    pub(super) fn open(dir: &Path, metrics: Option<MetricsAddr>, may_come: bool) -> Result<Self> {
        let metrics = metrics.map(|addr| metrics::listen(addr, may_come));
        Ok(Self {
            flows: status_socket::listen_at(&dir.join(FLOWS_SOCKET))?,
            metrics: metrics.transpose()?,
        })
    }

    /// Those of another daemon that hands itself over.
    pub(super) fn adopt(flows: OwnedFd, metrics: Option<OwnedFd>) -> Self {
        Self {
            flows: flows.into(),
            metrics: metrics.map(TcpListener::from),
        }
    }

    /// The same, but for metrics at that address.
    pub(super) fn with(self, addr: Option<MetricsAddr>, may_come: bool) -> Result<Self> {
        let at = |it: &TcpListener| it.local_addr().ok() == addr.map(|addr| addr.0);
        let same = self.metrics.filter(at);
        let opened = || addr.map(|addr| metrics::listen(addr, may_come)).transpose();
        Ok(Self {
            flows: self.flows,
            metrics: match same {
                Some(same) => Some(same),
                None => opened()?,
            },
        })
    }

    /// A second handle to each, for the next daemon.
    ///
    /// # Errors
    /// If there is no descriptor left.
    pub(super) fn copies(&self) -> io::Result<(OwnedFd, Option<OwnedFd>)> {
        let metrics = self
            .metrics
            .as_ref()
            .map(TcpListener::try_clone)
            .transpose()?;
        Ok((self.flows.try_clone()?.into(), metrics.map(OwnedFd::from)))
    }

    /// Serves who comes. Call it inside the event loop.
    pub(super) fn serve(self, flows: Arc<dyn Flows>) -> Result<Viewers> {
        let (asks, questions) = mpsc::channel(WAITING);
        let (open, is_open) = watch::channel(true);
        let door = Door {
            open: is_open,
            inside: Arc::new(Semaphore::new(VISITS as usize)),
        };
        if let Some(listener) = self.metrics {
            metrics::serve(listener, asks.clone(), door.clone())?;
        }
        let server = flows::serve(self.flows, flows, asks, door.clone()).map_err(failed)?;
        Ok(Viewers {
            questions,
            door,
            open,
            _flows: server,
        })
    }
}

/// Who looks.
pub(super) struct Viewers {
    questions: mpsc::Receiver<Ask>,
    door: Door,
    open: watch::Sender<bool>,
    _flows: FlowsServer,
}

impl Viewers {
    /// The next question.
    pub(super) async fn asked(&mut self) -> Ask {
        match self.questions.recv().await {
            Some(ask) => ask,
            // Nobody can ask any more.
            None => std::future::pending().await,
        }
    }

    /// Lets nobody in any more. Returns the door behind which some may be.
    pub(super) fn close(&self) -> Door {
        self.open.send_replace(false);
        self.door.clone()
    }

    /// Lets them in again.
    pub(super) fn open(&self) {
        self.open.send_replace(true);
    }
}
