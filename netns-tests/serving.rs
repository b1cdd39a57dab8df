//! A client of the moved address is served by the new server, whatever it sends.
//!
//! ```text
//!                                        ┌── old server 192.0.2.1, holds 192.0.2.5 (moved)
//!  clients 203.0.113.10, .11 ── router ──┤              ║ tunnel
//!                                        └── new server 198.51.100.2:80, application
//! ```

use std::fs;
use std::thread;

use ipmoved::internals::Role;
use ipmoved::lab::topology::{CLIENT, MOVED, NEW, OLD, SECOND_CLIENT, moved as nth_moved};
use ipmoved::lab::{Lab, LabError, Probe, Service, UdpService};

use crate::stage::{MEGABYTE, PATIENCE, Result, SILENCE, moved, setup};

#[test]
fn a_client_of_the_moved_address_is_answered_by_the_new_server() -> Result {
    moved(|on| on.lab.client().get(MOVED)?.is_answered_by(NEW))
}

#[test]
fn the_application_sees_each_clients_own_address() -> Result {
    moved(|on| {
        on.lab.client().get(MOVED)?.for_the_client_itself()?;
        on.lab.second_client().get(MOVED)?.for_the_client_itself()?;
        let seen: Vec<_> = on
            .application
            .peers()
            .iter()
            .map(|peer| peer.ip())
            .collect();
        assert_eq!(seen, [CLIENT, SECOND_CLIENT]);
        Ok(())
    })
}

#[test]
fn megabytes_arrive_whole_in_both_directions() -> Result {
    moved(|on| {
        on.lab.client().download(MOVED, 48 * MEGABYTE + 13)?;
        on.lab.client().upload(MOVED, 48 * MEGABYTE + 13)
    })
}

#[test]
fn megabytes_arrive_whole_in_both_directions_at_once() -> Result {
    moved(|on| {
        let client = on.lab.client();
        thread::scope(|scope| {
            let down = scope.spawn(|| client.download(MOVED, 24 * MEGABYTE));
            let up = scope.spawn(|| client.upload(MOVED, 24 * MEGABYTE + 1));
            down.join().unwrap()?;
            up.join().unwrap()
        })
    })
}

#[test]
fn many_short_connections_are_all_answered() -> Result {
    moved(|on| {
        for answer in on.lab.client().get_many(MOVED, 500)? {
            answer.is_answered_by(NEW)?.for_the_client_itself()?;
        }
        Ok(())
    })
}

#[test]
fn connections_side_by_side_are_all_answered() -> Result {
    moved(|on| {
        let mut conversations = (0..100)
            .map(|_| on.lab.client().converse(MOVED))
            .collect::<Result<Vec<_>>>()?;
        for round in 0..3 {
            for (number, conversation) in conversations.iter_mut().enumerate() {
                let words = format!("round {round} of conversation {number}");
                conversation.exchange(words.as_bytes(), PATIENCE)?;
            }
        }
        Ok(())
    })
}

#[test]
fn udp_is_answered_and_seen_from_the_client() -> Result {
    moved(|on| {
        let echo = UdpService::start(on.lab.new_server(), (NEW, 53))?;
        for size in [0, 1, 512, 1200, 1372] {
            on.lab.client().udp((MOVED, 53), &vec![b'u'; size])?;
        }
        assert!(echo.peers().iter().all(|peer| peer.ip() == CLIENT));
        Ok(())
    })
}

#[test]
fn a_ping_is_answered() -> Result {
    moved(|on| {
        on.lab.client().ping(MOVED, 0)?;
        on.lab.client().ping(MOVED, 56)?;
        on.lab.second_client().ping(MOVED, 1000)
    })
}

#[test]
fn a_full_sized_ping_is_answered() -> Result {
    moved(|on| on.lab.client().ping(MOVED, 1472))
}

#[test]
fn a_closed_port_is_refused_by_the_new_server_through_the_tunnel() -> Result {
    moved(|on| {
        // The old server has a listener on this port, so a refusal shows that it was not asked.
        let _decoy = Service::start(on.lab.old_server(), (MOVED, 81))?;
        let probe = on.lab.client().probe_tcp((MOVED, 81), PATIENCE)?;
        assert_eq!(probe, Probe::Refused);
        Ok(())
    })
}

#[test]
fn a_client_uses_the_direct_and_the_moved_address_at_once() -> Result {
    moved(|on| {
        let client = on.lab.client();
        let mut through = client.converse(MOVED)?;
        let mut direct = client.converse(NEW)?;
        for words in [&b"one"[..], b"two", &[b'3'; 30_000]] {
            through.exchange(words, PATIENCE)?;
            direct.exchange(words, PATIENCE)?;
        }
        client
            .get(NEW)?
            .is_answered_by(NEW)?
            .for_the_client_itself()?;
        client.get(MOVED)?.is_answered_by(NEW)?;
        client.ping(NEW, 56)?;
        client.ping(MOVED, 56)?;
        Ok(())
    })
}

#[test]
fn udp_to_the_direct_and_the_moved_address_is_answered_from_each() -> Result {
    moved(|on| {
        // The client's sockets are connected, so they receive no reply from another address.
        let _echo = UdpService::start(on.lab.new_server(), (NEW, 53))?;
        for _ in 0..5 {
            on.lab.client().udp((MOVED, 53), b"through")?;
            on.lab.client().udp((NEW, 53), b"direct")?;
        }
        Ok(())
    })
}

#[test]
fn direct_clients_do_not_enter_the_tunnel() -> Result {
    moved(|on| {
        on.lab.client().get_many(NEW, 20)?;
        let status = on.daemons.new.status()?;
        assert_eq!(status.tunnel()["rx"]["packets"], 0, "{status:?}");
        assert_eq!(status.live_flows(), 0);
        Ok(())
    })
}

#[test]
fn the_old_servers_own_address_stays_its_own() -> Result {
    moved(|on| {
        let _own = Service::start(on.lab.old_server(), OLD)?;
        on.lab.client().get(OLD)?.is_answered_by(OLD)?;
        on.lab.client().ping(OLD, 56)
    })
}

#[test]
fn it_works_under_strict_reverse_path_filtering_and_without_forwarding() -> Result {
    moved(|on| {
        on.lab.client().get(MOVED)?.is_answered_by(NEW)?;
        for host in [on.lab.old_server(), on.lab.new_server()] {
            for key in ["all", "default", "eth0"] {
                assert_eq!(host.sysctl(&format!("ipv4/conf/{key}/rp_filter"))?, "1");
            }
            assert_eq!(host.sysctl("ipv4/ip_forward")?, "0");
        }
        Ok(())
    })
}

#[test]
fn several_moved_addresses_are_served() -> Result {
    let lab = Lab::builder().moved(3).build()?;
    let moves: Vec<String> = (0..3).map(|n| nth_moved(n).to_string()).collect();
    let moves: Vec<&str> = moves.iter().map(String::as_str).collect();
    let setup = setup(&lab)?.moves(&moves);
    let _application = Service::start(lab.new_server(), NEW)?;
    let _daemons = setup.start_both()?;
    for n in 0..3 {
        let answer = lab.client().get(nth_moved(n))?;
        answer.is_answered_by(NEW)?.for_the_client_itself()?;
    }
    Ok(())
}

#[test]
fn only_the_ports_that_were_moved_move() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?.moves(&["192.0.2.5:80,443/tcp"]);
    let _new = Service::start(lab.new_server(), NEW)?;
    let _stays = Service::start(lab.old_server(), (MOVED, 8080))?;
    let _daemons = setup.start_both()?;
    lab.client().get(MOVED)?.is_answered_by(NEW)?;
    lab.client().get((MOVED, 8080))?.is_answered_by(MOVED)?;
    lab.client().ping(MOVED, 56)?;
    let closed = lab.client().probe_tcp((MOVED, 443), PATIENCE)?;
    assert_eq!(closed, Probe::Refused);
    Ok(())
}

#[test]
fn the_application_may_listen_on_an_address_that_is_named() -> Result {
    moved(|on| {
        on.daemons.new.terminate()?;
        let named = (on.setup.clone()).args(Role::New, &["--deliver-to", "198.51.100.2"]);
        let mut daemon = named.start(Role::New)?;
        daemon.wait_until_up()?;
        on.lab.client().get(MOVED)?.is_answered_by(NEW)
    })
}

#[test]
fn an_address_that_is_not_moved_is_not_served() -> Result {
    let lab = Lab::builder().moved(2).build()?;
    let _application = Service::start(lab.new_server(), NEW)?;
    let _daemons = setup(&lab)?.start_both()?;
    let other = lab.client().probe_tcp(nth_moved(1), SILENCE)?;
    assert_eq!(other, Probe::Refused, "the old server has nothing there");
    Ok(())
}

#[test]
fn the_kernel_reports_nothing_of_its_own_on_the_tun() -> Result {
    let lab = Lab::new()?;
    // A router's kernel joins the groups of all routers on its interfaces, and reports so.
    for host in [lab.old_server(), lab.new_server()] {
        host.set_sysctls(&[("ipv6/conf/all/forwarding", "1")])?;
    }
    let _daemons = setup(&lab)?.start_both()?;
    // No MLD report concerns these (RFC 3810, section 6).
    let all_nodes = ["ff01", "ff02"].map(|scope| format!("{scope}{:028x}", 1));
    for host in [lab.old_server(), lab.new_server()] {
        let groups = host.run(|| {
            fs::read_to_string("/proc/thread-self/net/igmp6")
                .map_err(|error| LabError::unexpected(error.to_string()))
        })?;
        let on_the_tun: Vec<_> = groups
            .lines()
            .filter(|line| line.contains("ipmoved0"))
            .collect();
        assert!(!on_the_tun.is_empty(), "{groups}");
        let reported = |line: &&&str| all_nodes.iter().all(|group| !line.contains(group));
        assert_eq!(on_the_tun.iter().find(reported), None);
    }
    Ok(())
}
