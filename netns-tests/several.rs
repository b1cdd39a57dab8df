//! Several old servers, one new server, one daemon on it.
//!
//! ```text
//!            ┌── old server 1: 198.18.1.1, holds 198.18.1.5 (moved) ══╗
//!  clients ──┼── old server 2: 198.18.2.1, holds 198.18.2.5 (moved) ══╬══ new server 198.51.100.2
//!            └── old server 3: 198.18.3.1, holds 198.18.3.5 (moved) ══╝
//! ```

use std::fmt::Write as _;
use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use ipmoved::internals::{Netlink, Role};
use ipmoved::lab::daemon::write_psk;
use ipmoved::lab::topology::{NEW, UPLINK, more_moved, more_old};
use ipmoved::lab::{Lab, LabError, Namespace, Process, Service, UdpService, patience, poll_until};
use serde_json::Value;
use socket2::SockRef;

use crate::stage::{MEGABYTE, PATIENCE, RECOVERY, Result, setup};

const COUNT: u8 = 3;

/// How long a tunnel may take to come up.
const UP: Duration = Duration::from_secs(15);

struct Several<'lab> {
    lab: &'lab Lab,
    hosts: Vec<Namespace>,
    old: Vec<Process>,
    new: Process,
}

fn psk(lab: &Lab, n: u8) -> PathBuf {
    lab.dir().join(format!("psk-{n}"))
}

/// Starts an old server's daemon, which has moved `moves`.
fn old_daemon(lab: &Lab, host: &Namespace, n: u8, moves: &[String]) -> Result<Process> {
    let mut command = setup(lab)?.command();
    command.args(["--peer", &NEW.to_string(), "--psk-file"]);
    command.arg(psk(lab, n));
    command.env("IPMOVED_STATE_DIR", lab.dir().join(format!("state-{n}")));
    for moved in moves {
        command.args(["--move", moved]);
    }
    host.spawn(command)
}

/// Starts the new server's daemon, which knows all old servers; the last one only by its key.
fn new_daemon(lab: &Lab) -> Result<Process> {
    let mut text = String::new();
    for n in 1..=COUNT {
        let _ = writeln!(text, "[[peers]]\npsk-file = {:?}", psk(lab, n));
        if n < COUNT {
            let _ = writeln!(text, "peer = \"{}\"", more_old(n));
        }
    }
    let path = lab.dir().join("several.toml");
    let failed = |error: std::io::Error| LabError::unexpected(error.to_string());
    fs::write(&path, text).map_err(failed)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
    let mut command = setup(lab)?.command();
    command.arg("--config").arg(path);
    lab.new_server().spawn(command)
}

fn start(lab: &Lab) -> Result<Several<'_>> {
    let mut hosts = Vec::new();
    let mut old = Vec::new();
    for n in 1..=COUNT {
        write_psk(&psk(lab, n))?;
        hosts.push(lab.add_old_server(n)?);
    }
    let new = new_daemon(lab)?;
    for (n, host) in (1..).zip(&hosts) {
        old.push(old_daemon(lab, host, n, &[more_moved(n).to_string()])?);
    }
    let several = Several {
        lab,
        hosts,
        old,
        new,
    };
    several.wait(|tunnel| tunnel["state"] == "up" && tunnel["moved"][0].is_string())?;
    Ok(several)
}

impl Several<'_> {
    /// The tunnels in the status of the new server's daemon.
    fn tunnels(&self) -> Result<Vec<Value>> {
        let status = setup(self.lab)?.status(Role::New)?;
        Ok(status.0["tunnels"].as_array().cloned().unwrap_or_default())
    }

    fn wait(&self, is: impl Fn(&Value) -> bool) -> Result {
        let reached = poll_until(UP, Duration::from_millis(50), || {
            let tunnels = self.tunnels().ok()?;
            (tunnels.len() == usize::from(COUNT) && tunnels.iter().all(&is)).then_some(())
        });
        reached.ok_or_else(|| {
            LabError::unexpected(format!("{:?}: {}", self.tunnels(), self.new.stderr()))
        })
    }
}

#[test]
fn each_old_servers_clients_are_served() -> Result {
    let lab = Lab::new()?;
    let several = start(&lab)?;
    let _application = Service::start(lab.new_server(), NEW)?;
    let _echo = UdpService::start(lab.new_server(), (NEW, 53))?;
    for n in 1..=COUNT {
        let answer = lab.client().get(more_moved(n))?.is_answered_by(NEW)?;
        answer.for_the_client_itself()?;
        lab.client().udp((more_moved(n), 53), &[n; 100])?;
        lab.client().download(more_moved(n), MEGABYTE)?;
    }
    // Status lists each with its own data.
    let tunnels = several.tunnels()?;
    for (n, tunnel) in (1..=COUNT).zip(&tunnels) {
        assert_eq!(tunnel["state"], "up");
        assert_eq!(tunnel["moved"][0], more_moved(n).to_string());
        let endpoint = tunnel["endpoint"].as_str().unwrap_or_default();
        assert!(endpoint.starts_with(&more_old(n).to_string()), "{endpoint}");
        assert!(tunnel["rx"]["packets"].as_u64() > Some(5), "{tunnel}");
        assert!(tunnel["tx"]["bytes"].as_u64() > Some(MEGABYTE), "{tunnel}");
    }
    drop(several.hosts);
    Ok(())
}

/// The same client uses the same port to all moved addresses at once. After the moved address is
/// rewritten, these four-tuples would be the same.
#[test]
fn one_client_is_served_through_all_of_them_at_once() -> Result {
    let lab = Lab::new()?;
    let _several = start(&lab)?;
    let _application = Service::start(lab.new_server(), NEW)?;
    let _echo = UdpService::start(lab.new_server(), (NEW, 53))?;
    let mut conversations = Vec::new();
    for n in 1..=COUNT {
        conversations.push(lab.client().converse(more_moved(n))?);
    }
    for round in 0..5 {
        for (n, conversation) in conversations.iter_mut().enumerate() {
            conversation.exchange(&vec![n as u8; 1_000 * round + 1], PATIENCE)?;
        }
    }
    // There is one socket, so one source port. Each reply comes from the address of its request.
    let socket = lab.clients().run(|| {
        std::net::UdpSocket::bind((ipmoved::lab::topology::CLIENT, 0))
            .map_err(|error| LabError::unexpected(error.to_string()))
    })?;
    socket
        .set_read_timeout(Some(patience(PATIENCE)))
        .expect("a timeout");
    for round in 0..5u8 {
        for n in 1..=COUNT {
            socket
                .send_to(&[n, round], (more_moved(n), 53))
                .expect("sent");
        }
        for _ in 1..=COUNT {
            let mut answer = [0; 8];
            let (length, from) = socket.recv_from(&mut answer).expect("an answer");
            assert_eq!((length, answer[1]), (2, round));
            assert_eq!(from, (more_moved(answer[0]), 53).into());
        }
    }
    Ok(())
}

#[test]
fn the_death_of_one_does_not_touch_the_others() -> Result {
    let lab = Lab::new()?;
    let mut several = start(&lab)?;
    let _application = Service::start(lab.new_server(), NEW)?;
    let mut conversations = Vec::new();
    for n in 1..=COUNT {
        conversations.push(lab.client().converse(more_moved(n))?);
    }
    let dead = several.old.remove(0);
    drop(dead);
    for (n, conversation) in conversations.iter_mut().enumerate().skip(1) {
        let took = conversation.exchange(&[7; 100_000], PATIENCE)?;
        assert!(took < patience(Duration::from_secs(2)), "{n}: {took:?}");
    }
    assert_eq!(several.tunnels()?[1]["state"], "up");
    // After its return, its own connection goes on.
    let host = &several.hosts[0];
    let again = old_daemon(&lab, host, 1, &[more_moved(1).to_string()])?;
    several.old.insert(0, again);
    conversations[0].exchange(b"after", RECOVERY)?;
    Ok(())
}

#[test]
fn an_address_moves_from_one_old_server_only_and_both_sides_say_so() -> Result {
    let lab = Lab::new()?;
    let mut several = start(&lab)?;
    let _application = Service::start(lab.new_server(), NEW)?;
    // The second one claims an address that has moved from the first.
    drop(several.old.remove(1));
    let moves = [more_moved(2).to_string(), more_moved(1).to_string()];
    let liar = old_daemon(&lab, &several.hosts[1], 2, &moves)?;
    let said = |process: &Process| {
        let words = format!(
            "{} has moved here from another old server already",
            more_moved(1)
        );
        process.stderr().contains(&words)
    };
    let told = poll_until(UP, Duration::from_millis(50), || {
        (said(&liar) && said(&several.new)).then_some(())
    });
    assert!(
        told.is_some(),
        "old: {} new: {}",
        liar.stderr(),
        several.new.stderr()
    );
    // Each keeps carrying its own addresses.
    several.wait(|tunnel| tunnel["state"] == "up")?;
    let tunnels = several.tunnels()?;
    assert_eq!(
        tunnels[0]["moved"],
        serde_json::json!([more_moved(1).to_string()])
    );
    assert_eq!(
        tunnels[1]["moved"],
        serde_json::json!([more_moved(2).to_string()])
    );
    for n in 1..=COUNT {
        lab.client().get(more_moved(n))?.is_answered_by(NEW)?;
    }
    // Once the first one gives it up, the second one has it.
    drop(several.old.remove(0));
    let _first = old_daemon(&lab, &several.hosts[0], 1, &["198.18.1.5:9/udp".to_owned()])?;
    let handed_over = poll_until(UP, Duration::from_millis(50), || {
        let moved = several.tunnels().ok()?[1]["moved"].as_array()?.len();
        (moved == 1).then_some(())
    });
    assert!(handed_over.is_some());
    drop(liar);
    Ok(())
}

#[test]
fn a_binary_without_a_key_of_its_own_for_each_peer_is_refused() -> Result {
    let lab = Lab::new()?;
    write_psk(&psk(&lab, 1))?;
    let path = lab.dir().join("twice.toml");
    let peer = format!("[[peers]]\npsk-file = {:?}\n", psk(&lab, 1));
    fs::write(&path, peer.repeat(2)).map_err(|error| LabError::unexpected(error.to_string()))?;
    let mut command: Command = setup(&lab)?.command();
    command.arg("--config").arg(&path);
    let said = lab.new_server().output(command, PATIENCE)?;
    assert_eq!(said.status.code(), Some(2));
    assert!(
        said.stderr.contains("two peers have the same key"),
        "{}",
        said.stderr
    );
    Ok(())
}

/// An old server that says that its clients' link is narrow shrinks its own flows, and no others.
#[test]
fn a_narrow_link_of_one_is_no_concern_of_the_others_clients() -> Result {
    let lab = Lab::new()?;
    let mut several = start(&lab)?;
    fn failed(error: impl std::fmt::Display) -> LabError {
        LabError::unexpected(error.to_string())
    }
    several.old.remove(0);
    for (host, name) in [(&several.hosts[0], UPLINK), (lab.router(), "old1")] {
        host.run(|| {
            let netlink = Netlink::new().map_err(failed)?;
            let link = netlink.link_by_name(name).map_err(failed)?;
            let link = link.ok_or_else(|| failed("no such link"))?;
            netlink.set_link_mtu(link.index, 1_280).map_err(failed)
        })?;
    }
    let again = old_daemon(&lab, &several.hosts[0], 1, &[more_moved(1).to_string()])?;
    several.old.insert(0, again);
    several.wait(|tunnel| tunnel["state"] == "up" && tunnel["moved"][0].is_string())?;
    // Each search of the path is over.
    let settled = poll_until(2 * UP, Duration::from_millis(100), || {
        let tunnels = several.tunnels().ok()?;
        let mtu = |n: usize| tunnels[n]["mtu"].as_u64();
        (mtu(0)? < 1_280 && mtu(1)? > 1_400).then_some(())
    });
    assert!(settled.is_some(), "{:?}", several.tunnels()?);
    let listener = lab
        .new_server()
        .run(|| TcpListener::bind((NEW, 80)).map_err(failed))?;
    let mut sizes = Vec::new();
    for n in [1, 2] {
        let _client = lab.client().connect(more_moved(n))?;
        let (server, _) = listener.accept().map_err(failed)?;
        sizes.push(SockRef::from(&server).tcp_mss().map_err(failed)?);
    }
    assert!(sizes[0] <= 1_280 - 40, "{sizes:?}");
    assert!(sizes[1] >= 1_380, "{sizes:?}");
    // The TUN takes full-size packets.
    let tun = lab.new_server().run(|| {
        let netlink = Netlink::new().map_err(failed)?;
        let link = netlink.link_by_name("ipmoved0").map_err(failed)?;
        Ok(link.map(|link| link.mtu))
    })?;
    assert_eq!(tun, Some(1_500));
    drop(listener);
    let _application = Service::start(lab.new_server(), NEW)?;
    let _echo = UdpService::start(lab.new_server(), (NEW, 53))?;
    for (n, size) in [(1, 1_200), (2, 1_472)] {
        lab.client().udp((more_moved(n), 53), &vec![n; size])?;
        lab.client().download(more_moved(n), MEGABYTE)?;
    }
    Ok(())
}
