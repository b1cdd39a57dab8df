//! The kernel's counters of devices, sockets, processes and the machine, as /proc shows them.

use std::fs;

use anyhow::{Context, Result, bail};

use ipmoved::lab::{LabError, Namespace};

/// Ticks a second of the times in /proc. The kernel's interface to programs fixes this number.
const TICKS: f64 = 100.0;

/// Packets for a process that did not fit the queue of its TUN device.
pub(crate) fn queue_drops(host: &Namespace, device: &str) -> Result<u64> {
    Ok(sent_by(host, device)?.dropped)
}

/// The counters of a device's sending side.
pub(crate) struct Sent {
    pub(crate) bytes: u64,
    /// Packets sent. Super-packets count as one.
    pub(crate) packets: u64,
    /// Packets that the device did not take.
    dropped: u64,
}

/// Reads the counters of a device's sending side.
pub(crate) fn sent_by(host: &Namespace, device: &str) -> Result<Sent> {
    let text = read(host, "/proc/thread-self/net/dev")?;
    // Receive: bytes packets errs drop fifo frame compressed multicast. Transmit: bytes packets
    // errs drop.
    let line = text
        .lines()
        .find_map(|line| line.trim_start().strip_prefix(device)?.strip_prefix(':'))
        .with_context(|| format!("no counters of {device}"))?;
    let numbers: Vec<u64> = line
        .split_ascii_whitespace()
        .map(str::parse)
        .collect::<Result<_, _>>()?;
    match numbers[..] {
        [_, _, _, _, _, _, _, _, bytes, packets, _, dropped, ..] => Ok(Sent {
            bytes,
            packets,
            dropped,
        }),
        _ => bail!("the counters of {device} are not eight each way"),
    }
}

/// Datagrams that did not fit the buffers of a port's sockets.
pub(crate) fn socket_drops(host: &Namespace, port: u16) -> Result<u64> {
    let mut drops = 0;
    for table in ["udp", "udp6"] {
        let text = read(host, &format!("/proc/thread-self/net/{table}"))?;
        for line in text.lines().skip(1) {
            let mut fields = line.split_ascii_whitespace();
            let local = fields.nth(1).and_then(|local| local.rsplit(':').next());
            let is_it = local.and_then(|hex| u16::from_str_radix(hex, 16).ok()) == Some(port);
            if let Some(count) = fields.last().filter(|_| is_it) {
                drops += count.parse::<u64>()?;
            }
        }
    }
    Ok(drops)
}

fn read(host: &Namespace, path: &str) -> Result<String> {
    Ok(host.run(|| {
        fs::read_to_string(path)
            .map_err(|error| LabError::unexpected(format!("cannot read {path}: {error}")))
    })?)
}

/// CPU seconds that a process has used, in user space and in the kernel.
pub(crate) fn cpu_of(pid: u32) -> Result<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name may hold anything, and ends with the last parenthesis. Fields 14 and 15 are utime
    // and stime.
    let (_, fields) = text.rsplit_once(')').context("a stat without a name")?;
    let ticks: u64 = fields
        .split_ascii_whitespace()
        .skip(11)
        .take(2)
        .filter_map(|field| field.parse::<u64>().ok())
        .sum();
    Ok(ticks as f64 / TICKS)
}

/// CPU seconds that the machine has been busy.
pub(crate) fn cpu_of_machine() -> Result<f64> {
    let text = fs::read_to_string("/proc/stat")?;
    let line = text.lines().next().unwrap_or_default();
    let fields: Vec<u64> = line
        .split_ascii_whitespace()
        .skip(1)
        .filter_map(|field| field.parse().ok())
        .collect();
    // user nice system idle iowait irq softirq
    let busy: u64 = [0, 1, 2, 5, 6]
        .iter()
        .filter_map(|&at| fields.get(at))
        .sum();
    Ok(busy as f64 / TICKS)
}

/// Bytes of memory that a process holds.
pub(crate) fn resident(pid: u32) -> Result<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kilobytes = text
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:")?.split_ascii_whitespace().next())
        .and_then(|text| text.parse::<f64>().ok());
    Ok(kilobytes.context("a process without memory")? * 1024.0)
}
