//! Many flows, and many packets that never become flows.
//!
//! ```text
//!  clients ─┐
//!           ├─ router ──┬── old server
//!  10.x.y.z ┘           └── new server: flow table of --max-flows
//!  (nobody there)
//! ```

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, TcpListener};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use ipmoved::internals::Role;
use ipmoved::lab::topology::{MOVED, NEW};
use ipmoved::lab::{Lab, LabError, Service, UdpService, Wire, packets, patience, raw};

use crate::seeing::scrape;
use crate::stage::{MEGABYTE, PATIENCE, Result, setup};

/// The `n`th address and port of hosts that do not exist.
fn nobody(n: u32) -> (Ipv4Addr, u16) {
    let addr = Ipv4Addr::from(0x0a00_0000 + n % 0x00ff_0000 + 1);
    (addr, 1_024 + (n % 50_000) as u16)
}

/// Pause after [`BURST`] packets. An idle machine needs less time for them.
const PAUSE: Duration = Duration::from_millis(2);

/// As many as fit the queue of the TUN beside the packets of others.
const BURST: usize = 400;

/// Sends these packets, with a pause after each burst.
fn flood(wire: &Wire, pause: Duration, packets: impl Iterator<Item = Vec<u8>>) -> Result {
    for (index, packet) in packets.enumerate() {
        wire.send(&packet)?;
        if index % BURST == 0 {
            thread::sleep(pause);
        }
    }
    Ok(())
}

#[test]
fn a_flood_of_spoofed_syns_takes_nothing_from_anybody() -> Result {
    const FLOOD: u32 = 200_000;
    const MAX: u64 = 50_000;
    let lab = Lab::new()?;
    let setup = setup(&lab)?.args(Role::New, &["--max-flows", &MAX.to_string()]);
    let _application = Service::start(lab.new_server(), NEW)?;
    let _daemons = setup.start_both()?;
    // The new server's replies to nobody end at the router.
    lab.set_unreachable_net(Ipv4Addr::new(10, 0, 0, 0), 8)?;
    let mut conversations = (0..50)
        .map(|_| lab.client().converse(MOVED))
        .collect::<Result<Vec<_>>>()?;
    let wire = Wire::new(lab.router(), "old", lab.old_server(), "eth0")?;
    let client = lab.client();
    thread::scope(|scope| {
        let download = scope.spawn(|| client.download(MOVED, 32 * MEGABYTE));
        flood(
            &wire,
            PAUSE,
            (0..FLOOD).map(|n| packets::syn(nobody(n), (MOVED, 80))),
        )?;
        download.join().unwrap()
    })?;
    let status = setup.status(Role::New)?;
    assert!(status.live_flows() <= MAX, "{status:?}");
    let evicted = status.tunnel()["flows"]["evicted"].as_u64();
    assert!(evicted > Some(MAX), "{status:?}");
    for (number, conversation) in conversations.iter_mut().enumerate() {
        conversation.exchange(format!("still there, {number}?").as_bytes(), PATIENCE)?;
    }
    client.download(MOVED, MEGABYTE).map(drop)
}

/// One client fills the table with connections that are established, half-closed, and used this
/// moment. The next client is served at once.
#[test]
fn a_client_with_all_flows_keeps_nobody_else_out() -> Result {
    const MAX: usize = 300;
    let lab = Lab::new()?;
    let setup = setup(&lab)?.args(Role::New, &["--max-flows", &MAX.to_string()]);
    let _application = Service::start(lab.new_server(), NEW)?;
    let failed = |error: std::io::Error| LabError::unexpected(error.to_string());
    let listener = (lab.new_server()).run(|| TcpListener::bind((NEW, 81)).map_err(failed))?;
    let _daemons = setup.start_both()?;
    let mut held = Vec::new();
    for _ in 0..MAX {
        let client = lab.client().connect((MOVED, 81))?;
        let (application, _) = listener.accept().map_err(failed)?;
        client.shutdown(Shutdown::Write).map_err(failed)?;
        held.push((client, application));
    }
    let status = setup.status(Role::New)?;
    assert!(status.live_flows() >= MAX as u64 * 9 / 10, "{status:?}");
    for _ in 0..50 {
        lab.second_client().get(MOVED)?.is_answered_by(NEW)?;
    }
    let status = setup.status(Role::New)?;
    assert_eq!(status.tunnel()["flows"]["refused"], 0, "{status:?}");
    assert!(status.live_flows() <= MAX as u64, "{status:?}");
    // What is still there lives on in the direction that is open.
    let mut heard = 0;
    for (client, application) in &mut held {
        client
            .set_read_timeout(Some(Duration::from_millis(100)))
            .map_err(failed)?;
        application.write_all(b"more").map_err(failed)?;
        heard += usize::from(client.read_exact(&mut [0; 4]).is_ok());
    }
    assert!(heard >= MAX / 2, "{heard}");
    Ok(())
}

/// With `nat`, one client has a thousand more conversations than there are ports to stand for
/// them, all in use. The next client gets one all the same.
#[test]
fn a_client_with_all_ports_keeps_nobody_else_out() -> Result {
    /// There are 16,384 ports.
    const PORTS: std::ops::Range<u16> = 10_000..27_500;
    let lab = Lab::new()?;
    let nat = ["--move", "192.0.2.5", "--to", "198.51.100.2"];
    let mut daemon = setup(&lab)?.start_nat(&nat)?;
    daemon.wait_until_up()?;
    let _echo = UdpService::start(lab.new_server(), (NEW, 53))?;
    lab.second_client().udp((MOVED, 53), b"before")?;
    let IpAddr::V4(greedy) = lab.client().address_towards(MOVED) else {
        return Err(LabError::unexpected("no IPv4 client"));
    };
    let wire = Wire::new(lab.router(), "old", lab.old_server(), "eth0")?;
    let datagram = |port| packets::udp((greedy.into(), port), (MOVED.into(), 53), b"mine");
    // Each is answered, and goes on after that. Some are lost where the machine is busy.
    let mut live = 0;
    for round in 0..20 {
        flood(&wire, PAUSE, PORTS.map(datagram))?;
        live = daemon.status()?.live_flows();
        if live > 16_300 && round >= 3 {
            break;
        }
    }
    assert!(live > 16_000, "{live}");
    for _ in 0..20 {
        lab.second_client().udp((MOVED, 53), b"and me?")?;
    }
    Ok(())
}

#[test]
fn a_million_flows_fit_in_160_bytes_each() -> Result {
    const FLOWS: u32 = 1_000_000;
    /// We send so many chunks, and a chunk again if too many of its packets were lost.
    const CHUNKS: u32 = 20;
    const TRIES: usize = 5;
    const MAX_PAUSE: Duration = Duration::from_millis(10);
    let lab = Lab::new()?;
    let metrics = ["--metrics", "9185"];
    let setup = setup(&lab)?
        .args(Role::Old, &metrics)
        .args(Role::New, &metrics);
    let _application = Service::start(lab.new_server(), NEW)?;
    let mut daemons = setup.start_both()?;
    let mut conversation = lab.client().converse(MOVED)?;
    let resident = |daemon: &mut ipmoved::lab::Daemon<'_>| {
        let path = format!("/proc/{}/status", daemon.process().id());
        let text = fs::read_to_string(&path).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok())
            .map(|kilobytes| kilobytes * 1024)
            .ok_or_else(|| LabError::unexpected(format!("no VmRSS in {path}")))
    };
    let before = [resident(&mut daemons.old)?, resident(&mut daemons.new)?];
    let wire = Wire::new(lab.router(), "old", lab.old_server(), "eth0")?;
    // Nothing listens there. The new server says so to a few senders, and is silent to the others.
    let datagram = |n| packets::udp((nobody(n).0.into(), nobody(n).1), (MOVED.into(), 9), b"");
    let (mut live, mut pause) = (0, PAUSE);
    for chunk in 1..=CHUNKS {
        let end = FLOWS / CHUNKS * chunk;
        for _ in 0..TRIES {
            flood(&wire, pause, (end - FLOWS / CHUNKS..end).map(datagram))?;
            live = setup.status(Role::New)?.live_flows();
            if live >= u64::from(end) * 99 / 100 {
                break;
            }
            // The machine is busy. We send the lost packets again, more slowly.
            pause = (pause * 3 / 2).min(MAX_PAUSE);
        }
    }
    assert!(live >= u64::from(FLOWS) * 99 / 100, "{live} flows");
    let after = [resident(&mut daemons.old)?, resident(&mut daemons.new)?];
    let grown = after[1].saturating_sub(before[1]);
    println!(
        "{live} flows, a burst in {pause:?}: {} bytes each; the old server grew by {} bytes",
        grown / live,
        after[0].saturating_sub(before[0])
    );
    // Of these, 40 are for what `ipmoved flows` shows.
    assert!(grown <= 160 * live, "{grown} bytes for {live} flows");
    // The old server keeps a word of a flow and has another one to spare, and 72 bytes for `flows`.
    assert!(after[0] < before[0] + (104 << 20), "{before:?} {after:?}");
    let known = setup.status(Role::Old)?.live_flows();
    assert!(known >= u64::from(FLOWS) * 98 / 100, "{known} flows");
    // A scraper is told of them, and who talks goes on talking meanwhile.
    for server in [lab.old_server(), lab.new_server()] {
        let text = scrape(server, "GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")?;
        let flows = text
            .lines()
            .filter(|line| line.starts_with("ipmoved_flows{"));
        let flows = flows.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok());
        let told: f64 = flows.sum();
        assert!(told >= f64::from(FLOWS) * 0.98, "{text}");
        conversation.exchange(b"and now?", PATIENCE)?;
    }
    conversation.exchange(b"still there?", PATIENCE)?;
    lab.client().get(MOVED)?.is_answered_by(NEW).map(drop)
}

/// A direction that never runs empty does not delay the other direction, nor the end of the daemon.
#[test]
fn a_flood_without_a_pause_holds_up_neither_the_way_back_nor_the_end() -> Result {
    /// Far longer than a turn, far shorter than the flood.
    const SOON: Duration = Duration::from_secs(2);
    let lab = Lab::new()?;
    // One lane and one processor, so that no other thread serves the way back.
    let setup = setup(&lab)?.args(Role::Old, &["--lanes", "1"]);
    let _echo = UdpService::start(lab.new_server(), (NEW, 7))?;
    let daemons = on_one_processor(|| setup.start_both())?;
    let client = lab.client();
    let stop = AtomicBool::new(false);
    let came_back = || {
        let status = setup.status(Role::Old)?;
        let packets = status.tunnel()["rx"]["packets"].as_u64();
        packets.ok_or_else(|| LabError::unexpected("no count of packets"))
    };
    let (before, after, took) = thread::scope(|scope| {
        // Super-packets: to send one costs a fraction of what it costs to segment and seal it.
        let floods: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| -> Result {
                    let socket = client.udp_socket((MOVED, 7))?;
                    raw::set_segment(&socket, 1_000)?;
                    while !stop.load(Relaxed) {
                        // Packets that do not fit a queue are lost, as in any flood.
                        let _ = socket.send(&[0; 60_000]);
                    }
                    Ok(())
                })
            })
            .collect();
        let result = (|| {
            thread::sleep(Duration::from_millis(500));
            let before = came_back()?;
            thread::sleep(SOON);
            let after = came_back()?;
            let asked = Instant::now();
            daemons.old.terminate()?;
            Ok((before, after, asked.elapsed()))
        })();
        stop.store(true, Relaxed);
        for flood in floods {
            flood.join().unwrap()?;
        }
        result
    })?;
    assert!(after > before + 1_000, "{before} to {after} packets back");
    assert!(took < patience(SOON), "ended after {took:?}");
    Ok(())
}

/// Runs `start` so that everything it starts has only the first of this thread's processors.
fn on_one_processor<T>(start: impl FnOnce() -> Result<T>) -> Result<T> {
    use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
    let failed = |error: rustix::io::Errno| LabError::unexpected(error.to_string());
    let before = sched_getaffinity(None).map_err(failed)?;
    let mut one = CpuSet::new();
    (0..CpuSet::MAX_CPU)
        .filter(|&cpu| before.is_set(cpu))
        .take(1)
        .for_each(|cpu| one.set(cpu));
    sched_setaffinity(None, &one).map_err(failed)?;
    let started = start();
    sched_setaffinity(None, &before).map_err(failed)?;
    started
}
