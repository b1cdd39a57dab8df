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

use tokio::sync::{mpsc, oneshot};

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
        if let Some(listener) = self.metrics {
            metrics::serve(listener, asks.clone())?;
        }
        let server = flows::serve(self.flows, flows, asks).map_err(failed)?;
        Ok(Viewers {
            questions,
            _flows: server,
        })
    }
}

/// Who looks.
pub(super) struct Viewers {
    questions: mpsc::Receiver<Ask>,
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
}
