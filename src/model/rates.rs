//! How fast what is counted grows: from two looks at the status of one daemon.
//!
//! Owns the difference of two [`Status`], and its form for people. It reads no clock: whoever has
//! looked says how much time was between.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use super::status::{Status, Traffic, TunnelStatus};

/// Drops a second, by reason.
pub type DropRates = BTreeMap<String, f64>;

/// What grows how fast.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Rates {
    /// By the order of the status.
    pub tunnels: Vec<TunnelRates>,
    /// Of strangers' datagrams.
    pub drops: DropRates,
}

/// Those of one peer.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct TunnelRates {
    /// Out of the tunnel.
    pub rx: TrafficRate,
    /// Into the tunnel.
    pub tx: TrafficRate,
    /// By reason.
    pub drops: DropRates,
}

/// How much passes in a second.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct TrafficRate {
    /// IP packets.
    pub packets: f64,
    /// Bits of these.
    pub bits: f64,
}

impl Rates {
    /// What grew from `before` to `after` in this time; `None` if there is nothing to compare: it
    /// is another daemon, or no time has passed.
    pub fn between(before: &Status, after: &Status, time: Duration) -> Option<Self> {
        let seconds = time.as_secs_f64();
        if is_another(before, after) || seconds <= 0.0 {
            return None;
        }
        let tunnel = |after: &TunnelStatus| {
            let known = |it: &&TunnelStatus| it.peer == after.peer;
            let Some(before) = before.tunnels.iter().find(known) else {
                return TunnelRates::default();
            };
            TunnelRates {
                rx: TrafficRate::between(before.rx, after.rx, seconds),
                tx: TrafficRate::between(before.tx, after.tx, seconds),
                drops: drops(&before.drops, &after.drops, seconds),
            }
        };
        Some(Self {
            tunnels: after.tunnels.iter().map(tunnel).collect(),
            drops: drops(&before.drops, &after.drops, seconds),
        })
    }
}

/// Whether the daemon was started anew between two looks.
pub fn is_another(before: &Status, after: &Status) -> bool {
    before.pid != after.pid || after.uptime_s < before.uptime_s
}

impl TrafficRate {
    fn between(before: Traffic, after: Traffic, seconds: f64) -> Self {
        let per_second = |before, after| grown(before, after) / seconds;
        Self {
            packets: per_second(before.packets, after.packets),
            bits: 8.0 * per_second(before.bytes, after.bytes),
        }
    }
}

impl fmt::Display for TrafficRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} packets/s, {}", short(self.packets), bits(self.bits))
    }
}

fn drops(before: &BTreeMap<String, u64>, after: &BTreeMap<String, u64>, seconds: f64) -> DropRates {
    let rate = |(reason, &count): (&String, &u64)| {
        let known = before.get(reason).copied().unwrap_or(0);
        (reason.clone(), grown(known, count) / seconds)
    };
    after.iter().map(rate).collect()
}

fn grown(before: u64, after: u64) -> f64 {
    after.saturating_sub(before) as f64
}

/// A number for people, with three digits or so.
pub fn short(number: f64) -> String {
    scaled(number, ["", " k", " M", " G", " T"])
}

/// Bits a second, for people.
pub fn bits(number: f64) -> String {
    scaled(
        number,
        [" bit/s", " kbit/s", " Mbit/s", " Gbit/s", " Tbit/s"],
    )
}

fn scaled(number: f64, units: [&str; 5]) -> String {
    let (mut value, mut unit) = (number.max(0.0), 0);
    // What rounds to a thousand has the next unit.
    while value >= 999.5 && unit + 1 < units.len() {
        value /= 1_000.0;
        unit += 1;
    }
    let digits = usize::from(value < 99.95 && (unit > 0 || value.fract() > 0.0 && value < 10.0));
    format!("{value:.digits$}{}", units[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_short() {
        for (number, text) in [
            (0.0, "0"),
            (0.25, "0.2"),
            (7.0, "7"),
            (123.4, "123"),
            (999.6, "1.0 k"),
            (12_345.0, "12.3 k"),
            (123_456.0, "123 k"),
            (4_000_000.0, "4.0 M"),
            (2e15, "2000 T"),
            (-3.0, "0"),
        ] {
            assert_eq!(short(number), text, "{number}");
        }
        assert_eq!(bits(9_400_000_000.0), "9.4 Gbit/s");
    }

    #[test]
    fn a_rate_is_what_grew_in_the_time_between_two_looks() {
        let traffic = |packets, bytes| Traffic { packets, bytes };
        let two = TrafficRate::between(traffic(10, 1_000), traffic(30, 26_000), 2.0);
        assert_eq!((two.packets, two.bits), (10.0, 100_000.0));
        assert_eq!(two.to_string(), "10 packets/s, 100 kbit/s");
        // What was counted anew has not shrunk.
        let anew = TrafficRate::between(traffic(10, 1_000), traffic(3, 100), 2.0);
        assert_eq!(anew, TrafficRate::default());
    }
}
