//! Both ends of the socket over which `ipmoved flows` and `ipmoved top` ask for the flows.
//!
//! Owns how a million flows are read without a packet waiting for it: by slices, which take some
//! microseconds each, in a thread that carries no packets, with pauses; one reader at a time. Only
//! the flows that are shown are kept. It reads twice, a second apart: the difference is the rate.
//!
//! A client sends a [`FlowsRequest`] on a line, and reads one [`FlowsAnswer`].

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::net::{UnixListener, UnixStream as Socket};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::{Mutex, Semaphore, oneshot};
use tracing::debug;

use super::status_socket::{self, StatusError, StatusListener};
use super::viewers::{Asks, Door};
use crate::flow::listing::{Flows, Place, Row};
use crate::model::flow_list::{
    FlowEntry, FlowList, FlowOrder, FlowsAnswer, FlowsRequest, MAX_LISTED,
};
use crate::model::moved::{TCP, UDP};
use crate::model::prefix::Prefix;
use crate::model::status::{Status, Way};
use crate::packet::{ICMP, ICMPV6};

/// Time between both readings.
const MEASURED: Duration = Duration::from_secs(1);

/// Slices between two pauses, and how long these are: a reading of a million flows takes some
/// 100 ms, and half a processor at most.
const SLICES: usize = 16;
const PAUSE: Duration = Duration::from_micros(100);

/// Clients that are served at a time, of which one reads; more of them wait to be let in.
const MAX_CLIENTS: usize = 4;

/// Longest request.
const MAX_REQUEST: u64 = 1_024;

/// Longest answer that a command reads: [`MAX_LISTED`] flows of 500 bytes.
const MAX_ANSWER: u64 = 64 << 20;

/// How long a client may take to ask.
const ASKS_WITHIN: Duration = Duration::from_secs(5);

/// How long a client may take to read.
const READS_WITHIN: Duration = Duration::from_secs(30);

/// How long a command waits for an answer, if all others are before it.
const PATIENCE: Duration = Duration::from_secs(60);

/// How often a command asks at most. A daemon that ends while it reads hangs up; if another one has
/// taken over from it, that answers.
const ATTEMPTS: usize = 3;

/// Asks the daemon that listens at `socket`.
pub fn ask(socket: &Path, request: &FlowsRequest) -> Result<FlowsAnswer, StatusError> {
    let mut text = String::new();
    for _ in 0..ATTEMPTS {
        let stream = status_socket::connect(socket)?;
        text = ask_at(stream, request).map_err(StatusError::Answer)?;
        if !text.is_empty() {
            break;
        }
    }
    serde_json::from_str(&text).map_err(|error| StatusError::Answer(error.into()))
}

/// Asks at the other end of this. It says nothing if it hangs up.
fn ask_at(mut stream: Socket, request: &FlowsRequest) -> io::Result<String> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut line = serde_json::to_string(request)?;
    line.push('\n');
    let mut text = String::new();
    let asked = stream.write_all(line.as_bytes());
    match asked.and_then(|()| stream.take(MAX_ANSWER).read_to_string(&mut text)) {
        Err(error) if hangs_up(&error) => Ok(String::new()),
        Err(error) => Err(error),
        Ok(_) => Ok(text),
    }
}

/// Whether the other end is gone.
fn hangs_up(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
    )
}

/// The daemon's end. Readings end with it.
pub(super) struct FlowsServer(Arc<AtomicBool>);

impl Drop for FlowsServer {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// What the daemon's end is made of.
#[derive(Clone)]
struct Reader {
    flows: Arc<dyn Flows>,
    asks: Asks,
    ends: Arc<AtomicBool>,
    /// Held by who reads.
    turn: Arc<Mutex<()>>,
}

/// Takes the socket into the event loop.
pub(super) fn serve(
    listener: UnixListener,
    flows: Arc<dyn Flows>,
    asks: Asks,
    mut door: Door,
) -> io::Result<FlowsServer> {
    let mut listener = StatusListener::new(listener)?;
    let ends = Arc::new(AtomicBool::new(false));
    let reader = Reader {
        flows,
        asks,
        ends: Arc::clone(&ends),
        turn: Arc::default(),
    };
    let room = Arc::new(Semaphore::new(MAX_CLIENTS));
    tokio::spawn(async move {
        while let Ok(place) = Arc::clone(&room).acquire_owned().await {
            let Some(visit) = door.visit().await else {
                return;
            };
            let client = tokio::select! {
                client = listener.accept() => client,
                () = door.closes() => continue,
            };
            let reader = reader.clone();
            tokio::spawn(async move {
                if let Err(error) = reader.answer(client).await {
                    debug!(%error, "a client of the flows' socket went away");
                }
                drop((place, visit));
            });
        }
    });
    Ok(FlowsServer(ends))
}

impl Reader {
    async fn answer(&self, mut client: UnixStream) -> io::Result<()> {
        let mut line = String::new();
        let mut asking = BufReader::new((&mut client).take(MAX_REQUEST));
        let asked = tokio::time::timeout(ASKS_WITHIN, asking.read_line(&mut line)).await;
        asked.map_err(|_| io::ErrorKind::TimedOut)??;
        let answer = match Wanted::read(&line) {
            Ok(wanted) => FlowsAnswer::Flows(self.list(wanted).await?),
            Err(why) => FlowsAnswer::Refused(why),
        };
        let text = serde_json::to_vec(&answer)?;
        let sent = tokio::time::timeout(READS_WITHIN, client.write_all(&text)).await;
        sent.map_err(|_| io::ErrorKind::TimedOut)?
    }

    async fn list(&self, wanted: Wanted) -> io::Result<FlowList> {
        let ended = || io::Error::other("the daemon is ending");
        let (answer, status) = oneshot::channel();
        self.asks.send(answer).await.map_err(|_| ended())?;
        let status = status.await.map_err(|_| ended())?;
        let _turn = self.turn.lock().await;
        let wanted = Arc::new(wanted);
        let (flows, ends) = (Arc::clone(&self.flows), Arc::clone(&self.ends));
        let of_first = Arc::clone(&wanted);
        let first = tokio::task::spawn_blocking(move || First::read(&*flows, &of_first, &ends));
        let first = first.await.map_err(io::Error::other)?;
        tokio::time::sleep(MEASURED).await;
        let (flows, ends) = (Arc::clone(&self.flows), Arc::clone(&self.ends));
        let list = move || second(&*flows, &wanted, &first, &status, &ends);
        tokio::task::spawn_blocking(list)
            .await
            .map_err(io::Error::other)
    }
}

/// What is wanted, as it was read.
struct Wanted {
    client: Option<Prefix>,
    sort: FlowOrder,
    top: usize,
}

impl Wanted {
    fn read(line: &str) -> Result<Self, String> {
        let request: FlowsRequest = serde_json::from_str(line).map_err(|error| {
            format!(
                "this daemon does not understand the command ({error}); `ipmoved` and the daemon \
                 have to be of one version: restart the daemon"
            )
        })?;
        let client = request.client.map(|text| text.parse()).transpose();
        Ok(Self {
            client: client.map_err(|error: crate::model::prefix::PrefixError| error.to_string())?,
            sort: request.sort,
            top: request.top.min(MAX_LISTED) as usize,
        })
    }

    fn takes(&self, row: &Row) -> bool {
        let of = |prefix: &Prefix| prefix.contains(IpAddr::from(row.client));
        self.client.as_ref().is_none_or(of)
    }
}

/// Reads all flows, one after the other, in the order of their places.
fn read(flows: &dyn Flows, ends: &AtomicBool, mut each: impl FnMut(Row)) {
    let (mut rows, mut next) = (Vec::new(), Some(Place::default()));
    while next.is_some() {
        for _ in 0..SLICES {
            let Some(place) = next else { break };
            next = flows.slice(Instant::now(), place, &mut rows);
            rows.drain(..).for_each(&mut each);
        }
        if ends.load(Relaxed) {
            return;
        }
        std::thread::sleep(PAUSE);
    }
}

/// What each flow had carried at the first reading: 24 bytes for each.
struct First {
    at: Instant,
    bytes: Vec<(Place, [u64; 2])>,
}

impl First {
    fn read(flows: &dyn Flows, wanted: &Wanted, ends: &AtomicBool) -> Self {
        // Each flow's two readings are as far from each other as the beginnings of both.
        let at = Instant::now();
        let mut bytes = Vec::new();
        read(flows, ends, |row| {
            if wanted.takes(&row) {
                bytes.push((row.place, row.bytes));
            }
        });
        Self { at, bytes }
    }
}

/// A flow and its place in the order: the greatest first.
struct Ranked {
    rank: u64,
    row: Row,
    rates: [f64; 2],
}

impl PartialEq for Ranked {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Ranked {}

impl PartialOrd for Ranked {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Ranked {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        // Of equal ones the order stays the same from one list to the next.
        let key = |it: &Self| (it.rank, Reverse(it.row.place));
        key(self).cmp(&key(other))
    }
}

/// Reads all flows once more, and keeps those that come first.
fn second(
    flows: &dyn Flows,
    wanted: &Wanted,
    first: &First,
    status: &Status,
    ends: &AtomicBool,
) -> FlowList {
    let mut list = FlowList::default();
    let mut kept: BinaryHeap<Reverse<Ranked>> = BinaryHeap::new();
    let mut before = first.bytes.iter().peekable();
    let passed = first.at.elapsed();
    read(flows, ends, |row| {
        list.live += 1;
        if !wanted.takes(&row) {
            return;
        }
        list.matched += 1;
        while before.next_if(|(place, _)| *place < row.place).is_some() {}
        let known = before.next_if(|(place, _)| *place == row.place);
        let rates = rates(&row, known.map(|(_, bytes)| *bytes), passed);
        let rank = match wanted.sort {
            FlowOrder::Bytes => row.bytes.iter().sum(),
            FlowOrder::Age => row.age.as_secs(),
            FlowOrder::Rate => (rates[0] + rates[1]) as u64,
        };
        kept.push(Reverse(Ranked { rank, row, rates }));
        if kept.len() > wanted.top {
            kept.pop();
        }
    });
    list.measured_s = passed.as_secs_f64();
    // Reversed, the last is the least.
    let sorted = kept.into_sorted_vec();
    list.flows = sorted.iter().map(|Reverse(it)| entry(it, status)).collect();
    list
}

/// Bits a second in each direction, from what a flow had carried `passed` ago. One that was not
/// there, or is another one by now, has carried all of it since.
fn rates(row: &Row, before: Option<[u64; 2]>, passed: Duration) -> [f64; 2] {
    let same = before.filter(|before| (0..2).all(|at| before[at] <= row.bytes[at]));
    let is_new = row.age < passed;
    let seconds = passed.as_secs_f64().max(f64::EPSILON);
    let carried = |at: usize| match same {
        Some(before) => row.bytes[at] - before[at],
        None if is_new => row.bytes[at],
        // It was not in the reading before because its place was read before it had it.
        None => 0,
    };
    [0, 1].map(|at| 8.0 * carried(at) as f64 / seconds)
}

fn entry(Ranked { row, rates, .. }: &Ranked, status: &Status) -> FlowEntry {
    let client = IpAddr::from(row.client);
    let peer = match status.way {
        Way::Tunnel => status.tunnels.iter().find(|it| it.place == row.peer.0),
        Way::Nat => status.tunnels.iter().find(|tunnel| {
            let to = tunnel.peer.parse::<IpAddr>();
            to.is_ok_and(|to| to.is_ipv4() == client.is_ipv4())
        }),
    };
    let delivery = row.delivery.map(|(addr, port)| match port {
        0 => IpAddr::from(addr).to_string(),
        port => SocketAddr::new(addr.into(), port).to_string(),
    });
    FlowEntry {
        client: client.to_string(),
        client_port: row.client_port,
        moved: IpAddr::from(row.moved).to_string(),
        moved_port: row.moved_port,
        protocol: match row.protocol {
            TCP => "tcp".into(),
            UDP => "udp".into(),
            ICMP => "icmp".into(),
            ICMPV6 => "icmpv6".into(),
            other => other.to_string(),
        },
        state: row.state.into(),
        packets_in: row.packets[0],
        bytes_in: row.bytes[0],
        packets_out: row.packets[1],
        bytes_out: row.bytes[1],
        age_s: row.age.as_secs(),
        idle_s: row.idle.as_secs(),
        bits_per_s_in: rates[0].round(),
        bits_per_s_out: rates[1].round(),
        delivery,
        // A call of this server's own, or of one behind it, goes to no peer.
        peer: peer.map_or_else(|| "this server".into(), |tunnel| tunnel.peer.clone()),
    }
}
