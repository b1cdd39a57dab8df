//! An impaired path: it drops packets, or lets others overtake them, towards the new server.
//!
//! ```text
//!  client ── router ══════> new server     impaired in this direction: where the router sends
//!              │
//!              └── old server
//! ```
//!
//! Each packet with data crosses that link once, whether it goes straight to the new server or
//! comes in a tunnel from the old one; acknowledgements do not cross it. Super-packets are
//! segmented before: to drop one would drop up to 64 KiB at once, and of a tunnel other data than
//! of the direct path. The way back is a delay line; [`crate::delay`] says why.
//!
//! Owns its changes to the path, and undoes them, since others use the labs again.

use anyhow::{Context, Result, bail};

use ipmoved::lab::topology::UPLINK;
use ipmoved::lab::{Lab, Namespace};

use crate::contenders::{firewall, firewall_off, sh};
use crate::counters::sent_by;
use crate::delay::Delay;

/// The router's interface to the new server.
const SEGMENT: &str = "new";
/// Most bytes of one frame there: the MTU and the Ethernet header.
const FRAME: u32 = 1_514;
/// The rules' table.
const TABLE: &str = "impaired";

/// Length of a cycle, in packets. [`SLOW`] of them take the slow class.
const PERIOD: u32 = 60;
/// So many packets in a row of each [`PERIOD`] take the slow class (5 %). The first finds it idle
/// and goes at once; each of the others waits for the one before.
const SLOW: u32 = 3;
/// The slow class's rate, in Mbit/s: a full packet takes 40 µs, in which others overtake the next
/// one. It stays above the rate of 5 % of all packets, so that nothing gathers in the class.
const SLOW_RATE: u32 = 300;

/// What the path does to packets.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Impairment {
    /// It segments super-packets and does nothing else: the yardstick of the others.
    Nothing,
    /// It drops so many of 1,000, at random.
    Loss { per_mille: u32 },
    /// It lets some packets be overtaken by others, and drops none.
    Reordering,
}

/// Finds out whether this machine's programs and kernel can do all of these.
pub(crate) fn probe(lab: &Lab) -> Result<()> {
    impaired(lab, Impairment::Loss { per_mille: 1 }, || Ok(()))?;
    impaired(lab, Impairment::Reordering, || Ok(()))
}

/// Runs `measure` while the path is impaired. Afterwards the path is as it was.
pub(crate) fn impaired<T>(
    lab: &Lab,
    impairment: Impairment,
    measure: impl FnOnce() -> Result<T>,
) -> Result<T> {
    let senders = [lab.clients(), lab.old_server()];
    let segments = [max_segments(senders[0])?, max_segments(senders[1])?];
    let measured: Result<T> = (|| {
        for sender in senders {
            set_max_segments(sender, 1)?;
        }
        let delay = Delay::start(lab.router(), SEGMENT)?;
        impairment.begin(lab.router())?;
        let measured = checked(lab.router(), measure)?;
        delay.stop()?;
        Ok(measured)
    })();
    let mut undone = impairment.end(lab.router());
    for (sender, segments) in senders.into_iter().zip(segments) {
        undone = undone.and(set_max_segments(sender, segments));
    }
    // The first failure explains the others.
    let measured = measured?;
    undone.context("the path could not be mended")?;
    Ok(measured)
}

impl Impairment {
    /// Changes the router. Its queues are the same for each impairment, so the yardstick bears
    /// their cost too.
    fn begin(self, router: &Namespace) -> Result<()> {
        // Packets without a class of their own pass by all others.
        sh(
            router,
            &format!("tc qdisc add dev {SEGMENT} root handle 1: htb"),
        )?;
        sh(
            router,
            &format!(
                "tc class add dev {SEGMENT} parent 1: classid 1:2 htb \
                 rate {SLOW_RATE}mbit burst {FRAME} cburst {FRAME} quantum {FRAME}"
            ),
        )?;
        match self.rules() {
            None => Ok(()),
            Some(rules) => firewall(router, &rules.nft, &rules.iptables()),
        }
    }

    /// Undoes these changes, as far as they were made.
    fn end(self, router: &Namespace) -> Result<()> {
        let unruled = match self.rules() {
            None => Ok(()),
            Some(rules) => firewall_off(router, TABLE, &rules.iptables()),
        };
        // Packets that wait in the slow class are lost now. Nobody measures any more.
        sh(router, &format!("tc qdisc del dev {SEGMENT} root"))?;
        unruled
    }

    fn rules(self) -> Option<Rules> {
        match self {
            Self::Nothing => None,
            Self::Loss { per_mille } => Some(Rules::loss(per_mille)),
            Self::Reordering => Some(Rules::reordering()),
        }
    }
}

/// The same rules for two programs.
struct Rules {
    nft: String,
    iptables: Vec<String>,
}

impl Rules {
    /// Drops packets at random.
    fn loss(per_mille: u32) -> Self {
        let share = f64::from(per_mille) / 1e3;
        Self {
            nft: format!(
                "table ip {TABLE} {{
                   chain lose {{ type filter hook forward priority filter;
                     oifname \"{SEGMENT}\" numgen random mod 1000 < {per_mille} counter drop; }}
                 }}"
            ),
            iptables: vec![format!(
                "-t filter -A FORWARD -o {SEGMENT} -m statistic --mode random \
                 --probability {share} -j DROP"
            )],
        }
    }

    /// Sends packets to the slow class.
    fn reordering() -> Self {
        let nth = |n| {
            format!(
                "-t mangle -A POSTROUTING -o {SEGMENT} -m statistic --mode nth \
                 --every {PERIOD} --packet {n} -j CLASSIFY --set-class 1:2"
            )
        };
        Self {
            nft: format!(
                "table ip {TABLE} {{
                   chain slow {{ type filter hook postrouting priority mangle;
                     oifname \"{SEGMENT}\" numgen inc mod {PERIOD} < {SLOW} \
                       counter meta priority set \"1:2\"; }}
                 }}"
            ),
            iptables: (0..SLOW).map(nth).collect(),
        }
    }

    fn iptables(&self) -> Vec<&str> {
        self.iptables.iter().map(String::as_str).collect()
    }
}

/// Refuses a measurement in which super-packets crossed the link unsegmented.
fn checked<T>(router: &Namespace, measure: impl FnOnce() -> Result<T>) -> Result<T> {
    let before = sent_by(router, SEGMENT)?;
    let measured = measure()?;
    let after = sent_by(router, SEGMENT)?;
    // Without packets, this is not a number, which is not too large either.
    let size = (after.bytes - before.bytes) as f64 / (after.packets - before.packets) as f64;
    if size > f64::from(FRAME) {
        bail!("packets on the impaired path were not segmented: {size:.0} bytes on average");
    }
    Ok(measured)
}

/// How many segments a super-packet may have when it leaves a host.
fn max_segments(host: &Namespace) -> Result<u32> {
    let shown = sh(host, &format!("ip -details link show dev {UPLINK}"))?;
    let mut words = shown
        .split_ascii_whitespace()
        .skip_while(|word| *word != "gso_max_segs");
    words
        .nth(1)
        .and_then(|number| number.parse().ok())
        .with_context(|| format!("`ip` does not say gso_max_segs of {UPLINK}"))
}

fn set_max_segments(host: &Namespace, segments: u32) -> Result<()> {
    sh(
        host,
        &format!("ip link set dev {UPLINK} gso_max_segs {segments}"),
    )?;
    Ok(())
}
