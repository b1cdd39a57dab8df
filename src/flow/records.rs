//! Who the flows of an old server are, and how much each carries: for a reader, and for nobody
//! else.
//!
//! [`clients`](super::clients) knows a flow by a hash, which is all that it needs to let an answer
//! out, and from which no address comes back. So the ends of a flow and what it counts lie here, in
//! a record that the place of its word names. The lanes write without a lock, and a reader reads
//! without one.
//!
//! ```text
//! word of a flow ──► number of its record ──► client, moved address, ports, since when; counts
//! ```
//!
//! * A record is written as a flow begins, and read at any time. Whether it is whole, and still
//!   that flow's, its hash tells: the one that the word has.
//! * Counts are read and written, not added to in one step: a direction of a flow has one thread at
//!   a time. If it changes the thread meanwhile, the count of a packet may be lost.
//! * There are as many as flows. Where all are in use, a flow has none, and is not listed.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, OnceLock};

use crate::flow::lock;
use crate::flow::weight::Weight;
use crate::model::bytes::take;
use crate::packet::{Addr, Parsed};

/// Records that are allocated together: 18 KiB.
const CHUNK: usize = 256;

/// The number of no record.
pub(super) const NONE: u32 = u32::MAX;

/// Bits of a count of packets: a million a second fill it in twelve days.
const PACKETS: u32 = 40;
const PACKETS_MASK: u64 = (1 << PACKETS) - 1;

/// The ends of a flow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Ends {
    pub(super) client: Addr,
    pub(super) moved: Addr,
    /// Of ICMP queries both are the identifier.
    pub(super) client_port: u16,
    pub(super) moved_port: u16,
    pub(super) protocol: u8,
}

impl Ends {
    /// Those of a packet to the moved address.
    pub(super) fn of_client(parsed: &Parsed, bytes: &[u8]) -> Self {
        Self::new(
            [parsed.src(bytes), parsed.dst(bytes)],
            [parsed.src_port(), parsed.dst_port()],
            parsed,
        )
    }

    /// Those of a packet from the moved address.
    pub(super) fn of_server(parsed: &Parsed, bytes: &[u8]) -> Self {
        Self::new(
            [parsed.dst(bytes), parsed.src(bytes)],
            [parsed.dst_port(), parsed.src_port()],
            parsed,
        )
    }

    fn new([client, moved]: [Addr; 2], [client_port, moved_port]: [u16; 2], by: &Parsed) -> Self {
        // A query or reply has its identifier at one end only.
        let (client_port, moved_port) = match by.kind().has_ports() {
            true => (client_port, moved_port),
            false => (client_port | moved_port, client_port | moved_port),
        };
        Self {
            client,
            moved,
            client_port,
            moved_port,
            protocol: by.protocol(),
        }
    }
}

/// One flow's. Each direction may have a thread of its own that counts, so that the ends lie
/// between the counts: most records have them in different cache lines.
#[derive(Default)]
#[repr(C)]
pub(super) struct Record {
    /// Has the protocol above [`PACKETS`] bits of its packets.
    first: Count,
    /// The words of its addresses. Of a record that is free, the first is the next one's number.
    client: [AtomicU64; 2],
    moved: [AtomicU64; 2],
    /// Both ports, and above them the second in which it began.
    ports: AtomicU64,
    second: Count,
}

/// What passed in one direction.
#[derive(Default)]
#[repr(C)]
struct Count {
    bytes: AtomicU64,
    packets: AtomicU64,
}

/// What a record says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Read {
    pub(super) ends: Ends,
    /// Second since the table's epoch.
    pub(super) began: u32,
    pub(super) packets: [u64; 2],
    pub(super) bytes: [u64; 2],
}

impl Record {
    /// A flow begins in this second.
    pub(super) fn begin(&self, ends: &Ends, second: u32) {
        let put = |words: &[AtomicU64; 2], addr: Addr| {
            for (word, value) in words.iter().zip(addr.words()) {
                word.store(value, Relaxed);
            }
        };
        put(&self.client, ends.client);
        put(&self.moved, ends.moved);
        let ports = u64::from(ends.client_port) | u64::from(ends.moved_port) << 16;
        self.ports.store(ports, Relaxed);
        let protocol = u64::from(ends.protocol) << PACKETS;
        self.first.packets.store(protocol, Relaxed);
        self.restart(second);
    }

    /// Another conversation begins between the same ends.
    pub(super) fn restart(&self, second: u32) {
        let ports = self.ports.load(Relaxed) & u64::from(u32::MAX);
        self.ports.store(ports | u64::from(second) << 32, Relaxed);
        for Count { bytes, packets } in [&self.first, &self.second] {
            bytes.store(0, Relaxed);
            packets.store(packets.load(Relaxed) & !PACKETS_MASK, Relaxed);
        }
    }

    /// Counts what passed in one direction.
    #[inline]
    pub(super) fn count(&self, direction: usize, weight: Weight) {
        let Count { bytes, packets } = match direction & 1 {
            0 => &self.first,
            _ => &self.second,
        };
        let more = bytes.load(Relaxed).wrapping_add(weight.bytes.into());
        bytes.store(more, Relaxed);
        let before = packets.load(Relaxed);
        let more = before.wrapping_add(weight.packets.into());
        // Beyond its bits it begins at zero, and leaves what is above as it is.
        let more = before & !PACKETS_MASK | more & PACKETS_MASK;
        packets.store(more, Relaxed);
    }

    /// Appends all that it holds, for the daemon that takes over.
    pub(super) fn put(&self, out: &mut Vec<u8>) {
        for word in self.words() {
            out.extend_from_slice(&word.load(Relaxed).to_le_bytes());
        }
    }

    /// Takes what another daemon's held off the front; `None` if there is no such.
    pub(super) fn take_up(&self, rest: &mut &[u8]) -> Option<()> {
        for word in self.words() {
            word.store(u64::from_le_bytes(take(rest)?), Relaxed);
        }
        Some(())
    }

    fn words(&self) -> impl Iterator<Item = &AtomicU64> {
        let ends = self.client.iter().chain(&self.moved);
        let counts = [&self.first, &self.second].into_iter();
        let counts = counts.flat_map(|Count { bytes, packets }| [bytes, packets]);
        ends.chain([&self.ports]).chain(counts)
    }

    /// What it says at this moment.
    pub(super) fn read(&self) -> Read {
        let addr = |words: &[AtomicU64; 2]| Addr::of_words(words.each_ref().map(load));
        let ports = self.ports.load(Relaxed);
        let counts = [&self.first, &self.second];
        let packets = counts.map(|it| load(&it.packets));
        Read {
            ends: Ends {
                client: addr(&self.client),
                moved: addr(&self.moved),
                client_port: ports as u16,
                moved_port: (ports >> 16) as u16,
                protocol: (packets[0] >> PACKETS) as u8,
            },
            began: (ports >> 32) as u32,
            packets: packets.map(|it| it & PACKETS_MASK),
            bytes: counts.map(|it| load(&it.bytes)),
        }
    }
}

fn load(word: &AtomicU64) -> u64 {
    word.load(Relaxed)
}

/// All records of one table. Shared by the lanes.
pub(super) struct Records {
    max: u32,
    chunks: Box<[OnceLock<Box<[Record; CHUNK]>>]>,
    free: Mutex<Free>,
}

/// Which are not in use.
struct Free {
    /// The first of those that are free again.
    first: u32,
    /// How many were ever in use.
    used: u32,
}

impl Records {
    /// None is in use yet; so many may be.
    pub(super) fn new(max: usize) -> Self {
        let max = u32::try_from(max).unwrap_or(NONE - 1);
        Self {
            max,
            chunks: (0..max.div_ceil(CHUNK as u32))
                .map(|_| OnceLock::new())
                .collect(),
            free: Mutex::new(Free {
                first: NONE,
                used: 0,
            }),
        }
    }

    /// The record with this number.
    #[inline]
    pub(super) fn get(&self, number: u32) -> Option<&Record> {
        let chunk = self.chunks.get(number as usize / CHUNK)?.get()?;
        Some(&chunk[number as usize % CHUNK])
    }

    /// One that nobody uses; [`NONE`] if there is none.
    pub(super) fn take(&self) -> u32 {
        let mut free = lock(&self.free);
        if let Some(first) = self.get(free.first) {
            let number = free.first;
            free.first = first.client[0].load(Relaxed) as u32;
            return number;
        }
        let number = free.used;
        if number >= self.max {
            return NONE;
        }
        free.used += 1;
        if let Some(chunk) = self.chunks.get(number as usize / CHUNK) {
            chunk.get_or_init(|| Box::new(std::array::from_fn(|_| Record::default())));
        }
        number
    }

    /// Nobody uses this one any more.
    pub(super) fn give_back(&self, number: u32) {
        let Some(record) = self.get(number) else {
            return;
        };
        let mut free = lock(&self.free);
        record.client[0].store(free.first.into(), Relaxed);
        free.first = number;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_used_by_one_at_a_time_and_there_are_no_more_than_said() {
        let records = Records::new(300);
        let mut all: Vec<u32> = (0..300).map(|_| records.take()).collect();
        assert_eq!(records.take(), NONE);
        records.give_back(NONE);
        for number in [7, 299, 0] {
            records.give_back(number);
        }
        let again = [(); 3].map(|()| records.take());
        assert_eq!(again, [0, 299, 7]);
        assert_eq!(records.take(), NONE);
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 300);
    }

    #[test]
    fn what_is_written_is_read() {
        let ends = Ends {
            client: "203.0.113.9".parse::<std::net::IpAddr>().unwrap().into(),
            moved: "2001:db8::5".parse::<std::net::IpAddr>().unwrap().into(),
            client_port: 40_000,
            moved_port: 65_535,
            protocol: 255,
        };
        let record = Record::default();
        record.begin(&ends, u32::MAX);
        let weight = Weight {
            tcp_flags: 0,
            packets: 3,
            bytes: 4_000,
        };
        record.count(0, weight);
        record.first.packets.fetch_or(PACKETS_MASK - 1, Relaxed);
        record.count(0, weight);
        record.count(1, weight);
        let read = record.read();
        assert_eq!((read.ends, read.began), (ends, u32::MAX));
        assert_eq!((read.packets, read.bytes), ([2, 3], [8_000, 4_000]));
        record.restart(5);
        let read = record.read();
        assert_eq!((read.ends, read.began), (ends, 5));
        assert_eq!((read.packets, read.bytes), ([0, 0], [0, 0]));
    }
}
