//! What is noted of a client's conversation with a moved address, for the list of those who still
//! come.

use crate::model::asked::Asked;
use crate::model::prefix::Prefix;

/// Bits of an IPv6 address that count as one client: hosts change the rest by themselves (RFC
/// 8981).
const IPV6_CLIENT: u8 = 64;

/// What there is to add about one conversation. `T` is a time, on whichever clock its owner has.
///
/// A conversation is told of several times: all counts are what has come since the time before.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Visit<T> {
    /// Who came ([`client`]).
    pub client: Prefix,
    /// What for.
    pub asked: Asked,
    /// Which server answered.
    pub served_by: ServedBy,
    /// When it began, if it is told of for the first time and its begin was seen.
    pub began: Option<T>,
    /// When it was seen last.
    pub last: T,
    /// It was answered: of TCP, not refused either.
    pub answered: bool,
    /// The client went on after the answer. Who forges its source does not see the answer.
    pub went_on: bool,
    /// So far nothing tells it from what a scan leaves, or a forged source: of TCP, no byte has
    /// followed the handshake; without connections, the client has not spoken after the answer.
    pub bare: bool,
    /// Bytes of payload from the client. Of TCP they are those of the sequence numbers; of others,
    /// of the packets that were looked at, which are a few.
    pub bytes_in: u64,
    /// Bytes of payload to the client.
    pub bytes_out: u64,
    /// The first bytes that the client sent over TCP; a name may be in them.
    pub first_bytes: Vec<u8>,
}

/// What clients have asked for, and whether anybody was ever answered.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct InVain {
    /// `192.0.2.5:80/tcp`.
    pub what: String,
    /// Somebody was: it was not in vain.
    pub answered: bool,
}

/// Which server answers a conversation.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum ServedBy {
    /// The old server's own service.
    Old,
    /// The new server.
    New,
}

/// What is to be told of all conversations.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Visited<T> {
    /// What there is to add about some.
    pub visits: Vec<Visit<T>>,
    /// How many began, answered or not.
    pub openings: u64,
    /// Conversations about which nothing was noted, since there were too many.
    pub missed: u64,
    /// Conversations whose name was not looked for, since there were too many.
    pub unnamed: u64,
}

impl ServedBy {
    /// Its name, in the database and in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Old => "old",
            Self::New => "new",
        }
    }
}

impl<T> Default for Visited<T> {
    fn default() -> Self {
        Self {
            visits: Vec::new(),
            openings: 0,
            missed: 0,
            unnamed: 0,
        }
    }
}

impl<T> Visited<T> {
    /// Adds what somebody else has seen.
    pub fn add(&mut self, more: Self) {
        self.visits.extend(more.visits);
        self.openings += more.openings;
        self.missed += more.missed;
        self.unnamed += more.unnamed;
    }
}

impl<T> Visit<T> {
    /// The same on another clock.
    pub fn map<U>(self, mut time: impl FnMut(T) -> U) -> Visit<U> {
        Visit {
            client: self.client,
            asked: self.asked,
            served_by: self.served_by,
            began: self.began.map(&mut time),
            last: time(self.last),
            answered: self.answered,
            went_on: self.went_on,
            bare: self.bare,
            bytes_in: self.bytes_in,
            bytes_out: self.bytes_out,
            first_bytes: self.first_bytes,
        }
    }
}

/// What counts as one client: an IPv4 address, or the /64 of an IPv6 one.
pub fn client(addr: std::net::IpAddr) -> Prefix {
    if addr.is_ipv4() {
        addr.into()
    } else {
        Prefix::of(addr, IPV6_CLIENT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_is_an_address_or_a_network_of_ipv6() {
        let name = |text: &str| client(text.parse().unwrap()).to_string();
        assert_eq!(name("203.0.113.9"), "203.0.113.9");
        assert_eq!(name("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::/64");
    }
}
