//! What `ipmoved flows` asks the daemon, and what it gets: the JSON form of both.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Most flows that are listed: their JSON is some 40 MB.
pub const MAX_LISTED: u32 = 100_000;

/// Which flows are wanted.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FlowsRequest {
    /// Only those of clients in this prefix, as `--client` names it.
    pub client: Option<String>,
    /// Which come first.
    pub sort: FlowOrder,
    /// How many.
    pub top: u32,
}

/// Which flows come first.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FlowOrder {
    /// Those that have carried most.
    #[default]
    Bytes,
    /// The oldest.
    Age,
    /// Those that carry most at the moment.
    Rate,
}

impl FlowOrder {
    /// All.
    pub const ALL: [Self; 3] = [Self::Bytes, Self::Age, Self::Rate];

    fn name(self) -> &'static str {
        match self {
            Self::Bytes => "bytes",
            Self::Age => "age",
            Self::Rate => "rate",
        }
    }
}

impl fmt::Display for FlowOrder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// It is no order of flows.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("`{0}` is none of bytes, age, rate")]
pub struct FlowOrderError(String);

impl FromStr for FlowOrder {
    type Err = FlowOrderError;

    fn from_str(text: &str) -> Result<Self, FlowOrderError> {
        let mut all = Self::ALL.into_iter();
        let found = all.find(|order| order.name() == text);
        found.ok_or_else(|| FlowOrderError(text.into()))
    }
}

/// What the daemon says.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FlowsAnswer {
    /// The flows.
    Flows(FlowList),
    /// Not now, and why.
    Refused(String),
}

/// Some of the flows that there are.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct FlowList {
    /// How many there are.
    pub live: u64,
    /// How many of them are of the clients that were asked for.
    pub matched: u64,
    /// Seconds over which rates were measured.
    pub measured_s: f64,
    /// The first of them, in the order that was asked for.
    pub flows: Vec<FlowEntry>,
}

/// A flow. `in` is what the client sends, `out` what it gets.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct FlowEntry {
    /// The client's address.
    pub client: String,
    /// Its port, or the identifier of its queries; 0 for protocols without.
    pub client_port: u16,
    /// The moved address.
    pub moved: String,
    /// The port there; 0 for protocols without.
    pub moved_port: u16,
    /// `tcp`, `udp`, `icmp`, `icmpv6`, or a number.
    pub protocol: String,
    /// Of TCP `opening`, `established`, `half_closed`, `closing` or `reset`; of others
    /// `unanswered`, `answered`, `assured` (the client went on after an answer), or `begun` (by the
    /// new server, and not answered yet).
    pub state: String,
    /// Packets from the client.
    pub packets_in: u64,
    /// Their bytes.
    pub bytes_in: u64,
    /// Packets to the client.
    pub packets_out: u64,
    /// Their bytes.
    pub bytes_out: u64,
    /// Seconds since it began, as far as this daemon has seen it.
    pub age_s: u64,
    /// Seconds since its last packet; on the old server in steps of four.
    pub idle_s: u64,
    /// Bits a second from the client.
    pub bits_per_s_in: f64,
    /// Bits a second to the client.
    pub bits_per_s_out: f64,
    /// Where it is delivered, as `ADDR:PORT`; `null` on the old server, where that is not known.
    pub delivery: Option<String>,
    /// The peer that it goes to or comes from.
    pub peer: String,
}

impl FlowEntry {
    /// Bits a second of both directions.
    pub fn bits_per_s(&self) -> f64 {
        self.bits_per_s_in + self.bits_per_s_out
    }

    /// Both ends, for people: of protocols without ports the addresses alone.
    pub fn ends(&self) -> [String; 2] {
        let end = |addr: &str, port: u16| match (port, addr.contains(':')) {
            (0, _) => addr.to_owned(),
            (port, true) => format!("[{addr}]:{port}"),
            (port, false) => format!("{addr}:{port}"),
        };
        [
            end(&self.client, self.client_port),
            end(&self.moved, self.moved_port),
        ]
    }
}
