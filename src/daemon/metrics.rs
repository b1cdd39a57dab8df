//! `--metrics`: the status, as Prometheus and its like read it.
//!
//! Owns the HTTP server (hyper's) and what a scraper can cost. It has a thread of its own, so that
//! neither packets nor the control task wait for one: the control task is asked for a status twice
//! a second at most, however many ask, and what is sent is made once of it.
//!
//! ```text
//! scraper ──► this thread ──(a status, please)──► control task
//!         ◄── text ◄── metrics::text ◄────────────────┘
//! ```

mod text;

use std::convert::Infallible;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use hyper::body::{Bytes, Incoming};
use hyper::header::{ACCEPT, ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use socket2::{Domain, Socket, Type};
use tokio::sync::{Mutex, Semaphore, oneshot};
use tokio::time::{Instant, timeout};
use tracing::{debug, warn};

use self::text::Form;
use super::service::{self, Result, cannot, input};
use super::viewers::{Asks, Door};
use crate::settings::values::MetricsAddr;

/// Scrapers that are served at a time; more of them wait to be let in. Prometheus has one
/// connection for each of its servers.
const MAX_CONNECTIONS: usize = 16;

/// Scrapers that the kernel keeps beyond that.
const BACKLOG: i32 = 16;

/// Time for the head of a request.
const HEAD_WITHIN: Duration = Duration::from_secs(5);

/// Time for a whole connection, which brings one request: Prometheus gives up after ten seconds.
const SERVED_WITHIN: Duration = Duration::from_secs(15);

/// Buffer of a connection, and with it the longest head: hyper's least.
const BUFFER: usize = 8_192;

/// A status that is no older is shown once more.
const FRESH: Duration = Duration::from_millis(500);

/// Pause after a scraper could not be accepted, as for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Least time between two warnings of that.
const WARNING_PACE: Duration = Duration::from_secs(60);

/// Opens the socket. Call it while this process may still bind any port. `may_come`: this host may
/// not have the address yet, as before its network is up.
pub(super) fn listen(addr: MetricsAddr, may_come: bool) -> Result<TcpListener> {
    let open = || -> io::Result<TcpListener> {
        let kind = Type::STREAM.nonblocking();
        let socket = Socket::new(Domain::for_address(addr.0), kind, None)?;
        socket.set_reuse_address(true)?;
        match addr.0 {
            SocketAddr::V4(_) => socket.set_freebind_v4(may_come)?,
            SocketAddr::V6(_) => socket.set_freebind_v6(may_come)?,
        }
        socket.bind(&addr.0.into())?;
        socket.listen(BACKLOG)?;
        Ok(socket.into())
    };
    open().map_err(|error| match error.raw_os_error() {
        Some(libc::EADDRINUSE) => input(format!(
            "--metrics {}: this TCP port is in use by another program; choose another",
            addr.0
        )),
        Some(libc::EADDRNOTAVAIL) => input(format!(
            "--metrics {}: that is not an address of this server",
            addr.0
        )),
        _ => cannot(format!("serve metrics at {} (--metrics)", addr.0), error),
    })
}

/// Serves scrapers in a thread of its own, which ends with the process.
pub(super) fn serve(listener: TcpListener, asks: Asks, door: Door) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(service::failed)?;
    let thread = std::thread::Builder::new().name("metrics".into());
    let started = thread.spawn(move || {
        runtime.block_on(async {
            if let Err(error) = accept(listener, asks, door).await {
                warn!(%error, "metrics are served no longer");
            }
        });
    });
    started.map(drop).map_err(service::failed)
}

/// Lets scrapers in.
async fn accept(listener: TcpListener, asks: Asks, mut door: Door) -> io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let page = Arc::new(Page {
        asks,
        last: Mutex::new(None),
    });
    let mut warned: Option<Instant> = None;
    loop {
        let Ok(place) = Arc::clone(&room).acquire_owned().await else {
            return Ok(());
        };
        let Some(visit) = door.visit().await else {
            return Ok(());
        };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = door.closes() => continue,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                let now = Instant::now();
                if warned.is_none_or(|at| now >= at + WARNING_PACE) {
                    warned = Some(now);
                    warn!(%error, "no scraper of metrics can be accepted; trying again");
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let page = Arc::clone(&page);
        tokio::spawn(async move {
            let answer = service_fn(|request| page.answer(request));
            let mut http = http1::Builder::new();
            http.timer(TokioTimer::new())
                .header_read_timeout(HEAD_WITHIN)
                .max_buf_size(BUFFER)
                .keep_alive(false);
            let connection = http.serve_connection(TokioIo::new(stream), answer);
            match timeout(SERVED_WITHIN, connection).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => debug!(%error, "a scraper of metrics went away"),
                Err(_) => debug!("a scraper of metrics was too slow"),
            }
            drop((place, visit));
        });
    }
}

/// What scrapers get.
struct Page {
    asks: Asks,
    last: Mutex<Option<Made>>,
}

/// Made of one status, in both forms.
#[derive(Clone)]
struct Made {
    at: Instant,
    prometheus: Bytes,
    open_metrics: Bytes,
}

impl Page {
    async fn answer(&self, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
        let refused = |status, text: &'static str| {
            let mut response = Response::new(Body::from(Bytes::from_static(text.as_bytes())));
            *response.status_mut() = status;
            response
        };
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            let mut response = refused(StatusCode::METHOD_NOT_ALLOWED, "only GET\n");
            let allow = HeaderValue::from_static("GET, HEAD");
            response.headers_mut().insert(ALLOW, allow);
            return Ok(response);
        }
        if request.uri().path() != "/metrics" {
            return Ok(refused(StatusCode::NOT_FOUND, "see /metrics\n"));
        }
        let accept = request.headers().get_all(ACCEPT).iter();
        let accept: Vec<&str> = accept.filter_map(|value| value.to_str().ok()).collect();
        let form = Form::asked_for(&accept.join(","));
        let Some(text) = self.made(form).await else {
            let text = "the daemon is ending\n";
            return Ok(refused(StatusCode::SERVICE_UNAVAILABLE, text));
        };
        let mut response = Response::new(Body::from(text));
        let content_type = HeaderValue::from_static(form.content_type());
        response.headers_mut().insert(CONTENT_TYPE, content_type);
        Ok(response)
    }

    /// The text, made anew unless it is fresh.
    async fn made(&self, form: Form) -> Option<Bytes> {
        let mut last = self.last.lock().await;
        let fresh = last.take().filter(|made| made.at.elapsed() < FRESH);
        let made = match fresh {
            Some(made) => made,
            None => {
                let (answer, status) = oneshot::channel();
                self.asks.send(answer).await.ok()?;
                let status = status.await.ok()?;
                let write = |form| text::write(&status, form).ok().map(Bytes::from);
                Made {
                    at: Instant::now(),
                    prometheus: write(Form::Prometheus)?,
                    open_metrics: write(Form::OpenMetrics)?,
                }
            }
        };
        let text = match form {
            Form::Prometheus => made.prometheus.clone(),
            Form::OpenMetrics => made.open_metrics.clone(),
        };
        *last = Some(made);
        Some(text)
    }
}

/// A text that is sent whole.
struct Body(Option<Bytes>);

impl From<Bytes> for Body {
    fn from(bytes: Bytes) -> Self {
        Self(Some(bytes))
    }
}

impl hyper::body::Body for Body {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<hyper::body::Frame<Bytes>, Infallible>>> {
        std::task::Poll::Ready(self.0.take().map(|all| Ok(hyper::body::Frame::data(all))))
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_none()
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        let len = self.0.as_ref().map_or(0, |bytes| bytes.len() as u64);
        hyper::body::SizeHint::with_exact(len)
    }
}
