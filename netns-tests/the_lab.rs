//! The lab itself, without any daemon. All other tests rely on it.
//!
//! ```text
//!  clients 203.0.113.10 and .11 ── router ──┬── old server 192.0.2.1, 192.0.2.5
//!                                           └── new server 198.51.100.2
//! ```

use std::time::Duration;

use ipmoved::lab::tap::PacketKind;
use ipmoved::lab::topology::{CLIENT, Leg, MOVED, MOVED6, NEW, NEW6, OLD, SECOND_CLIENT};
use ipmoved::lab::{Lab, Probe, Service, Snapshot, UdpService};

use crate::stage::{MEGABYTE, PATIENCE, Result, SILENCE};

#[test]
fn a_direct_client_is_answered_by_the_new_server() -> Result {
    let lab = Lab::new()?;
    let service = Service::start(lab.new_server(), NEW)?;
    let answer = lab.client().get(NEW)?;
    answer.is_answered_by(NEW)?.for_the_client_itself()?;
    lab.second_client().get(NEW)?.is_answered_by(NEW)?;
    let seen: Vec<_> = service.peers().iter().map(|peer| peer.ip()).collect();
    assert_eq!(seen, [CLIENT, SECOND_CLIENT]);
    Ok(())
}

#[test]
fn a_direct_client_is_answered_over_ipv6() -> Result {
    let lab = Lab::new()?;
    let _service = Service::start(lab.new_server(), NEW6)?;
    let answer = lab.client().get(NEW6)?;
    answer.is_answered_by(NEW6)?.for_the_client_itself()?;
    lab.client().ping(NEW6, 56)?;
    Ok(())
}

#[test]
fn before_the_move_the_old_server_answers_for_its_addresses() -> Result {
    let lab = Lab::new()?;
    let _service = Service::start(lab.old_server(), MOVED)?;
    lab.client().get(MOVED)?.is_answered_by(MOVED)?;
    lab.client().ping(MOVED, 56)?;
    lab.client().ping(MOVED6, 56)?;
    lab.client().ping(OLD, 1400)?;
    let refused = lab.client().probe_tcp(OLD, PATIENCE)?;
    assert_eq!(refused, Probe::Refused);
    Ok(())
}

#[test]
fn megabytes_arrive_whole_in_both_directions() -> Result {
    let lab = Lab::new()?;
    let _service = Service::start(lab.new_server(), NEW)?;
    lab.client().download(NEW, 16 * MEGABYTE + 13)?;
    lab.client().upload(NEW, 16 * MEGABYTE + 13)?;
    Ok(())
}

#[test]
fn datagrams_of_all_sizes_come_back() -> Result {
    let lab = Lab::new()?;
    let service = UdpService::start(lab.new_server(), (NEW, 53))?;
    for size in [0, 1, 512, 1472, 1473, 65_507] {
        lab.client().udp((NEW, 53), &vec![b'x'; size])?;
    }
    assert!(service.peers().iter().all(|peer| peer.ip() == CLIENT));
    Ok(())
}

#[test]
fn a_conversation_goes_on() -> Result {
    let lab = Lab::new()?;
    let _service = Service::start(lab.new_server(), NEW)?;
    let mut conversation = lab.client().converse(NEW)?;
    for words in [&b"hello"[..], b"still there?", &[0; 40_000]] {
        conversation.exchange(words, PATIENCE)?;
    }
    Ok(())
}

#[test]
fn a_path_that_fails_is_silent_and_comes_back() -> Result {
    let lab = Lab::new()?;
    let _service = Service::start(lab.new_server(), NEW)?;
    let mut conversation = lab.client().converse(NEW)?;
    lab.set_reachable(NEW, false)?;
    conversation.say(b"can you hear me?")?;
    assert!(conversation.hear(b"can you hear me?", SILENCE).is_err());
    assert_eq!(lab.client().probe_tcp(NEW, SILENCE)?, Probe::Silent);
    lab.set_reachable(NEW, true)?;
    conversation.hear(b"can you hear me?", PATIENCE)
}

#[test]
fn a_port_is_open_or_closed() -> Result {
    let lab = Lab::new()?;
    let _service = Service::start(lab.new_server(), NEW)?;
    let _echo = UdpService::start(lab.new_server(), (NEW, 53))?;
    let client = lab.client();
    assert_eq!(client.probe_tcp(NEW, PATIENCE)?, Probe::Open);
    assert_eq!(client.probe_tcp((NEW, 81), PATIENCE)?, Probe::Refused);
    assert_eq!(client.probe_udp((NEW, 53), PATIENCE)?, Probe::Open);
    assert_eq!(client.probe_udp((NEW, 54), PATIENCE)?, Probe::Refused);
    Ok(())
}

#[test]
fn a_tap_sees_what_passes_and_nothing_else() -> Result {
    let lab = Lab::new()?;
    let _service = Service::start(lab.new_server(), NEW)?;
    let tap = lab.tap(Leg::New)?;
    let mut conversation = lab.client().converse(NEW)?;
    conversation.exchange(b"a readable sentence", PATIENCE)?;
    lab.client().probe_tcp((NEW, 81), PATIENCE)?;
    lab.client().ping(OLD, 56)?;
    let seen = tap.stop()?;
    assert_eq!(seen.frames_with(b"a readable sentence"), 2);
    assert_eq!(seen.frames_with(b"an unsaid sentence"), 0);
    assert!(seen.packets_with(CLIENT) > 6);
    assert_eq!(seen.packets_with(OLD), 0);
    assert_eq!(seen.refusals_from(NEW), 1);
    assert_eq!(seen.refusals_from(CLIENT), 0);
    assert!(seen.packets().any(|packet| packet.kind == PacketKind::Arp));
    Ok(())
}

#[test]
fn the_kernels_state_stays_the_same_by_itself() -> Result {
    let lab = Lab::new()?;
    let _service = Service::start(lab.new_server(), NEW)?;
    let hosts = [lab.old_server(), lab.new_server(), lab.clients()];
    let before = hosts.map(Snapshot::of);
    let tap = lab.tap(Leg::New)?;
    lab.client().download(NEW, MEGABYTE)?;
    lab.client().ping(OLD, 56)?;
    tap.stop()?;
    std::thread::sleep(Duration::from_secs(3));
    for (host, before) in hosts.into_iter().zip(before) {
        let before = before?;
        assert!(before.len() > 500, "{before}");
        Snapshot::of(host)?.is_same_as(&before)?;
    }
    Ok(())
}

#[test]
fn a_change_in_the_kernel_is_seen_and_named() -> Result {
    let lab = Lab::new()?;
    let host = lab.new_server();
    let before = Snapshot::of(host)?;
    host.set_sysctls(&[("ipv4/tcp_fwmark_accept", "1")])?;
    let after = Snapshot::of(host)?;
    after.is_not_the_same_as(&before)?;
    let error = after.is_same_as(&before).unwrap_err().to_string();
    assert!(
        error.contains("- sysctl ipv4/tcp_fwmark_accept: 0"),
        "{error}"
    );
    assert!(
        error.contains("+ sysctl ipv4/tcp_fwmark_accept: 1"),
        "{error}"
    );
    assert_eq!(error.lines().count(), 3, "{error}");
    Ok(())
}

#[test]
fn both_servers_filter_reverse_paths_strictly_and_forward_nothing() -> Result {
    let lab = Lab::new()?;
    for host in [lab.old_server(), lab.new_server()] {
        for interface in ["all", "default", "eth0"] {
            assert_eq!(
                host.sysctl(&format!("ipv4/conf/{interface}/rp_filter"))?,
                "1"
            );
            assert_eq!(
                host.sysctl(&format!("ipv4/conf/{interface}/forwarding"))?,
                "0"
            );
            assert_eq!(
                host.sysctl(&format!("ipv6/conf/{interface}/forwarding"))?,
                "0"
            );
        }
    }
    Ok(())
}

#[test]
fn links_have_the_mtu_that_was_asked_for() -> Result {
    let lab = Lab::builder()
        .mtu(Leg::Clients, 1280)
        .mtu(Leg::New, 9000)
        .build()?;
    let _service = Service::start(lab.new_server(), NEW)?;
    lab.client().download(NEW, MEGABYTE)?;
    lab.client().upload(NEW, MEGABYTE)?;
    let mtu = |host: &ipmoved::lab::Namespace| host.sysctl("ipv6/conf/eth0/mtu");
    assert_eq!(mtu(lab.clients())?, "1280");
    assert_eq!(mtu(lab.old_server())?, "1500");
    assert_eq!(mtu(lab.new_server())?, "9000");
    Ok(())
}
