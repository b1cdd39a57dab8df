//! Any number of lanes on either side carries the same bytes, with or without each offload.
//!
//! ```text
//!  client ── router ──┬── old server 192.0.2.1, holds 192.0.2.5 (moved), lanes 1, 2 or 8
//!                     │              ║ one UDP port on either side
//!                     └── new server 198.51.100.2, lanes 1, 2 or 8
//! ```

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use ipmoved::internals::Role;
use ipmoved::lab::topology::{MOVED, NEW};
use ipmoved::lab::{Daemon, Lab, LabError, Namespace, Service, Tap, UdpService, patience, raw};

use crate::stage::{MEGABYTE, PATIENCE, Result, setup};

/// Connections that run side by side.
const STREAMS: usize = 6;

#[test]
fn two_lanes_on_either_side_carry_every_stream_whole() -> Result {
    streams_arrive_whole("2", "2")
}

#[test]
fn eight_lanes_and_one_carry_every_stream_whole() -> Result {
    streams_arrive_whole("8", "1")
}

#[test]
fn two_lanes_and_eight_carry_every_stream_whole() -> Result {
    streams_arrive_whole("2", "8")
}

fn streams_arrive_whole(old: &str, new: &str) -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?
        .args(Role::Old, &["--lanes", old])
        .args(Role::New, &["--lanes", new]);
    let _application = Service::start(lab.new_server(), NEW)?;
    let echo = UdpService::start(lab.new_server(), (NEW, 7))?;
    let daemons = setup.start_both()?;
    let late = out_of_order(lab.new_server())?;
    thread::scope(|scope| {
        let streams: Vec<_> = (0..STREAMS as u64)
            .map(|n| {
                let client = lab.client();
                scope.spawn(move || {
                    client.upload(MOVED, 4 * MEGABYTE + n)?;
                    client.download(MOVED, 4 * MEGABYTE + n)
                })
            })
            .collect();
        streams
            .into_iter()
            .try_for_each(|stream| match stream.join() {
                Ok(transfer) => transfer.map(drop),
                Err(_) => Err(LabError::Unexpected("a stream's thread panicked".into())),
            })
    })?;
    // A flow stays in its lane: six uploads of 4 MB are 17,000 segments.
    let late = out_of_order(lab.new_server())? - late;
    assert!(late < 170, "{late} segments came out of order");
    lab.client().get_many(MOVED, 50)?;
    for n in 0..20u8 {
        lab.client().udp((MOVED, 7), &[n; 100])?;
    }
    assert_eq!(echo.peers().len(), 20);
    for daemon in [&daemons.old, &daemons.new] {
        let status = daemon.status()?;
        assert_eq!(status.drops("open_auth"), 0);
        assert_eq!(status.drops("replay"), 0);
    }
    Ok(())
}

/// TCP segments that have reached a host out of order so far (`TCPOFOQueue`).
fn out_of_order(host: &Namespace) -> Result<u64> {
    host.run(|| {
        let text = fs::read_to_string("/proc/thread-self/net/netstat")
            .map_err(|error| LabError::Unexpected(error.to_string()))?;
        let mut lines = text.lines().filter(|line| line.starts_with("TcpExt:"));
        let (names, values) = (lines.next(), lines.next());
        names
            .into_iter()
            .flat_map(str::split_whitespace)
            .zip(values.into_iter().flat_map(str::split_whitespace))
            .find(|(name, _)| *name == "TCPOFOQueue")
            .and_then(|(_, value)| value.parse().ok())
            .ok_or_else(|| LabError::Unexpected("no TCPOFOQueue in netstat".into()))
    })
}

/// The old server's inbound direction moves to the helper thread while packets flow both ways, and
/// comes back.
#[test]
fn a_lane_has_a_helper_thread_as_long_as_it_needs_one() -> Result {
    /// Longer than a lane needs to see that its helper thread has nothing left to do.
    const CALM: Duration = Duration::from_millis(500);
    if thread::available_parallelism().is_ok_and(|processors| processors.get() < 2) {
        let skipped = "not tested: a lane has no helper thread on one processor, so run it on two";
        return Err(LabError::unexpected(skipped));
    }
    let lab = Lab::new()?;
    let one = ["--lanes", "1"];
    let setup = setup(&lab)?.args(Role::Old, &one).args(Role::New, &one);
    let _application = Service::start(lab.new_server(), NEW)?;
    let mut daemons = setup.start_both()?;
    let (client, pid) = (lab.client(), daemons.old.process().id());
    for round in 0..3 {
        let before = helper_runs(pid);
        assert!(before.is_some(), "the lane has a helper thread");
        // More than a lane can seal, to a port where nobody listens.
        let socket = client.udp_socket((MOVED, 9))?;
        raw::set_segment(&socket, 1_000)?;
        let asked = Instant::now();
        while helper_runs(pid) == before {
            for _ in 0..32 {
                // Packets that do not fit a queue are lost. An ICMP error shows in a later call.
                let _ = socket.send(&[0; 60_000]);
            }
            assert!(
                asked.elapsed() < patience(PATIENCE),
                "round {round}: not seen at work"
            );
        }
        client.upload(MOVED, 8 * MEGABYTE + round)?;
        client.download(MOVED, 8 * MEGABYTE + round)?;
        // If the machine keeps the lane from its processor for long, the lane looks busy once more.
        let sleeps = (0..10).any(|_| {
            thread::sleep(CALM);
            let before = helper_runs(pid);
            client.get_many(MOVED, 50).is_ok() && before == helper_runs(pid)
        });
        assert!(sleeps, "round {round}: not seen asleep");
    }
    for daemon in [&daemons.old, &daemons.new] {
        let drops = daemon.status()?.all_drops();
        for reason in ["replay", "open_auth", "session_unknown", "tun_write_failed"] {
            assert_eq!(drops.get(reason), None, "{drops:?}");
        }
    }
    daemons.terminate()
}

/// How often the helper thread of a daemon's only lane has run.
fn helper_runs(pid: u32) -> Option<u64> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    let task = tasks.flatten().map(|task| task.path()).find(|task| {
        fs::read_to_string(task.join("comm")).is_ok_and(|name| name.trim() == "lane-0-in")
    })?;
    // Nanoseconds run, nanoseconds waited, slices (Documentation/scheduler/sched-stats.rst).
    let text = fs::read_to_string(task.join("schedstat")).ok()?;
    text.split_whitespace().nth(2)?.parse().ok()
}

#[test]
fn without_any_offload_the_same_bytes_arrive() -> Result {
    let lab = Lab::new()?;
    let without = ["--without", "udp-gso,udp-gro,tun-gso"];
    let setup = setup(&lab)?
        .args(Role::Old, &without)
        .args(Role::New, &without);
    let _application = Service::start(lab.new_server(), NEW)?;
    let daemons = setup.start_both()?;
    lab.client().upload(MOVED, 8 * MEGABYTE + 1)?;
    lab.client().download(MOVED, 8 * MEGABYTE + 1)?;
    for daemon in [&daemons.old, &daemons.new] {
        let text = daemon.status()?.0["offloads"].clone();
        for offload in ["udp_gso", "udp_gro", "tun_tso"] {
            assert_eq!(text[offload], false, "{offload} is shown as missing");
        }
    }
    Ok(())
}

#[test]
fn the_new_server_writes_more_at_once_than_a_length_field_can_tell() -> Result {
    assert!(longer_than_told(&[])? > 0);
    assert_eq!(longer_than_told(&["--without", "big-tcp"])?, 0);
    Ok(())
}

/// The number of super-packets with an IPv4 length of zero (BIG TCP) that left the new server's TUN
/// during an upload. It and a download must arrive whole.
fn longer_than_told(args: &[&str]) -> Result<usize> {
    let lab = Lab::new()?;
    let setup = setup(&lab)?.args(Role::New, args);
    let _application = Service::start(lab.new_server(), NEW)?;
    let daemons = setup.start_both()?;
    let client = lab.client();
    let tap = Tap::start(lab.new_server(), "ipmoved0")?;
    client.upload(MOVED, 32 * MEGABYTE + 1)?;
    let seen = tap.stop()?;
    client.download(MOVED, 8 * MEGABYTE + 1)?;
    let offloads = |daemon: &Daemon<'_>| daemon.status().map(|all| all.0["offloads"].clone());
    let (old, new) = (offloads(&daemons.old)?, offloads(&daemons.new)?);
    assert_eq!(
        old["tun_big_tcp"], false,
        "what the old server writes goes on to a link"
    );
    assert_eq!(new["tun_big_tcp"], args.is_empty());
    assert_eq!(new["tun_gso_fallbacks"], 0);
    let is_big = |frame: &&[u8]| frame.len() > 65_535 && frame[2..4] == [0, 0];
    Ok(seen.frames().filter(is_big).count())
}

#[test]
fn where_the_kernel_refuses_coalesced_packets_they_arrive_one_by_one() -> Result {
    let lab = Lab::new()?;
    let refused = ["--without", "joined-writes"];
    let setup = setup(&lab)?
        .args(Role::Old, &refused)
        .args(Role::New, &refused);
    let _application = Service::start(lab.new_server(), NEW)?;
    let daemons = setup.start_both()?;
    lab.client().upload(MOVED, 8 * MEGABYTE + 1)?;
    lab.client().download(MOVED, 8 * MEGABYTE + 1)?;
    for daemon in [&daemons.old, &daemons.new] {
        let status = daemon.status()?.0;
        let fallbacks = status["offloads"]["tun_gso_fallbacks"].as_u64();
        assert!(fallbacks > Some(0), "{status}");
    }
    Ok(())
}

#[test]
fn where_the_tun_takes_no_more_than_17_pages_less_is_coalesced() -> Result {
    let lab = Lab::new()?;
    // A flow that starves for seconds may change lanes, and each lane tries for itself.
    let setup = setup(&lab)?.args(Role::New, &["--lanes", "1", "--without", "long-writes"]);
    let _application = Service::start(lab.new_server(), NEW)?;
    let daemons = setup.start_both()?;
    lab.client().upload(MOVED, 32 * MEGABYTE + 1)?;
    let status = daemons.new.status()?.0;
    assert_eq!(
        status["offloads"]["tun_gso_fallbacks"], 1,
        "tried once a lane"
    );
    assert_eq!(status["offloads"]["tun_big_tcp"], false);
    Ok(())
}

#[test]
fn one_side_without_offloads_understands_the_other() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?.args(Role::New, &["--without", "udp-gso,udp-gro,tun-gso"]);
    let _application = Service::start(lab.new_server(), NEW)?;
    let _daemons = setup.start_both()?;
    lab.client().upload(MOVED, 8 * MEGABYTE + 1)?;
    lab.client().download(MOVED, 8 * MEGABYTE + 1)?;
    Ok(())
}
