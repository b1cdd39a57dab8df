//! `ipmoved check`, and what the other server says or does not say: whether it is there, has the
//! same key, and knows the time.
//!
//! ```text
//!  old server            ║ handshakes    new server
//!     check ─────────────╫───────────────► daemon, or a second implementation of the protocol
//! ```

use std::net::UdpSocket;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, SystemTime};

use ipmoved::internals::{DEFAULT_PORT, Role};
use ipmoved::lab::daemon::read_psk;
use ipmoved::lab::topology::{NEW, OLD};
use ipmoved::lab::{Lab, LabError};
use rustix::process::Signal;
use serde_json::Value;

use crate::check_bench::{Bench, find};
use crate::independent_peer::IndependentPeer;
use crate::stage::{Result, setup};

#[test]
fn what_a_peer_says_or_does_not_say_is_told_apart() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?;
    let bench = Bench::new(setup.clone(), Role::Old)?;
    starts_there(&bench)?;
    let other = setup.clone().another_key(Role::New)?;
    let new = other.start(Role::New)?;
    bench.poll(&bench.line(&[]), ("key", "fail", "another key"))?;
    let old = setup.start(Role::Old)?;
    let apart = ("tunnel", "fail", "does not reach it");
    let found = bench.poll(&bench.line(&[]), apart)?;
    let remedy = find(&found, apart).map(|it| it["remedy"].clone());
    assert_eq!(remedy, Some("ipmoved status".into()));
    old.stop_by(Signal::TERM)?;
    new.stop_by(Signal::TERM)?;
    // Other ciphers.
    let aegis = (setup.clone()).args(Role::New, &["--cipher", "aegis-256x4"]);
    let new = aegis.start(Role::New)?;
    let line = bench.line(&["--cipher", "chacha20-poly1305"]);
    let apart = ("cipher", "fail", "give both the same --cipher");
    let found = bench.poll(&line, apart)?;
    let remedy = find(&found, apart).and_then(|it| it["remedy"].as_str());
    let mended = bench.check(remedy.unwrap_or_default(), &[])?;
    assert_eq!(find(&mended, ("cipher", "fail", "")), None, "{remedy:?}");
    assert!(find(&mended, ("peer", "ok", "")).is_some(), "{mended:#}");
    new.stop_by(Signal::TERM)?;
    // Another role, and moves that it does not accept.
    let same = setup.clone().args(Role::New, &["--move", "192.0.2.77"]);
    let new = same.start(Role::New)?;
    let told = bench.poll(&bench.line(&[]), ("peer", "fail", "--move as well"));
    let output = new.stop_by(Signal::TERM)?;
    told.map_err(|error| LabError::unexpected(format!("{error}: {}", output.stderr)))?;
    let strict = setup.clone().args(Role::New, &["--accept", "192.0.2.6"]);
    let new = strict.start(Role::New)?;
    bench.poll(&bench.line(&[]), ("accept", "fail", "--accept 192.0.2.5"))?;
    // Nothing of all that shows there.
    let status = strict.status(Role::New)?;
    assert_eq!(status.tunnel()["state"], "connecting");
    assert_eq!(status.tunnel()["endpoint"], Value::Null);
    // It calls, and hears nothing.
    let there = Bench::new(strict.clone(), Role::New)?;
    there.sh("nft 'table inet f {
            chain in { type filter hook input priority 0; udp dport 51850 drop; }
        }'")?;
    let calls = ("peer", "fail", "calls this server");
    let found = bench.poll(&bench.line(&[]), calls)?;
    let remedy = find(&found, calls).and_then(|it| it["remedy"].as_str());
    let shown = bench.shell(remedy.unwrap_or_default(), &[])?;
    assert!(shown.stdout.contains("udp dport 51850 drop"), "{shown:?}");
    there.sh("nft delete table inet f")?;
    bench.poll(&bench.line(&[]), ("peer", "ok", "has the same key"))?;
    new.stop_by(Signal::TERM)?;
    // No host at all.
    let nowhere = bench.line(&["--peer", "192.0.2.200"]);
    let nowhere = nowhere.replacen(&format!("'--peer' '{NEW}'"), "", 1);
    let found = bench.check(&nowhere, &[])?;
    let gone = find(&found, ("peer", "fail", "")).expect("nobody is there");
    assert!(
        gone["text"]
            .as_str()
            .is_some_and(|text| !text.contains("same key")),
        "{gone}"
    );
    Ok(())
}

/// The daemon of the other side does not run yet, and is started by what is shown.
fn starts_there(bench: &Bench<'_>) -> Result {
    let line = bench.line(&[]);
    let alone = ("peer", "warn", "nothing listens on its UDP port");
    let found = bench.poll(&line, alone)?;
    let remedy = find(&found, alone).and_then(|it| it["remedy"].as_str());
    let started = bench.shell(remedy.unwrap_or_default(), &[])?;
    assert!(started.status.success(), "{remedy:?}: {started:?}");
    bench.poll(&line, ("peer", "ok", "has the same key"))?;
    bench.sh(
        "ssh there 'kill $(cat '\"$(dirname \"$(command -v ssh)\")/daemon.pid\"')
        while grep -q :CA8A /proc/net/udp /proc/net/udp6; do :; done'",
    )
}

/// A second implementation of the protocol, on the new server: what its clock shows, and which
/// version it speaks, files beside the stand-ins say.
fn stands_for_the_new_server(lab: &Lab, psk: &str, bin: &Path, over: &AtomicBool) -> Result {
    let socket = lab.new_server().run(|| {
        let socket = UdpSocket::bind((NEW, DEFAULT_PORT)).map_err(failed)?;
        socket.connect((OLD, DEFAULT_PORT)).map_err(failed)?;
        Ok(socket)
    })?;
    let mut peer = IndependentPeer::new(socket, psk, 2);
    while !over.load(Relaxed) {
        if bin.join("wire").exists() {
            let mut bytes = peer.initiation().bytes;
            bytes[1] = 9;
            // Nobody may listen there.
            let _ = peer.socket().send(&bytes);
            std::thread::sleep(Duration::from_millis(100));
            continue;
        }
        let off = std::fs::read_to_string(bin.join("clock")).unwrap_or_default();
        let off: i64 = off.trim().parse().unwrap_or(0);
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let now = now.map_err(failed)?.as_nanos() as u64;
        peer.answer(now.saturating_add_signed(off * 1_000_000_000));
    }
    Ok(())
}

#[test]
fn a_peer_whose_clock_or_protocol_is_another_is_found() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?;
    let bench = Bench::new(setup.clone(), Role::Old)?;
    let psk = read_psk(setup.psk_file(Role::New))?;
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let serves = || stands_for_the_new_server(&lab, &psk, &bench.bin, &over);
        let peer = scope.spawn(serves);
        let tried = clock_and_protocol(&bench);
        over.store(true, Relaxed);
        let served = peer
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        tried.and(served)
    })
}

fn clock_and_protocol(bench: &Bench<'_>) -> Result {
    let found = bench.poll(&bench.line(&[]), ("peer", "ok", "has the same key"))?;
    for well in [
        ("clock", "ok", "the same time"),
        ("version", "ok", "does not say which"),
    ] {
        assert!(find(&found, well).is_some(), "{found:#}");
    }
    let at = "\"$(dirname \"$(command -v ssh)\")\"";
    let clock = |seconds: i32| format!("echo {seconds} > {at}/clock");
    // Whoever is behind sets its clock: this server, or the other one.
    for (seconds, says, remedy) in [
        (3_600, "s after this server's", "timedatectl set-ntp true"),
        (
            -3_600,
            "s before this server's",
            "ssh 198.51.100.2 timedatectl set-ntp true",
        ),
    ] {
        bench.sh(&clock(seconds))?;
        let apart = ("clock", "warn", says);
        let found = bench.poll(&bench.line(&[]), apart)?;
        let finding = find(&found, apart).map(|it| it["remedy"].clone());
        assert_eq!(finding, Some(remedy.into()));
        let set = bench.shell(remedy, &[])?;
        assert!(set.status.success(), "{set:?}");
        bench.poll(&bench.line(&[]), ("clock", "ok", "the same time"))?;
    }
    bench.sh(&format!(": > {at}/wire"))?;
    let other = ("version", "fail", "another version of the protocol");
    let found = bench.poll(&bench.line(&[]), other)?;
    let remedy = find(&found, other).and_then(|it| it["remedy"].as_str());
    let shown = bench.shell(remedy.unwrap_or_default(), &[])?;
    assert!(
        shown.stdout.starts_with("ipmoved "),
        "{remedy:?}: {shown:?}"
    );
    bench.sh(&format!("rm {at}/wire"))?;
    bench.poll(&bench.line(&[]), ("peer", "ok", "has the same key"))?;
    Ok(())
}

#[test]
fn a_peer_whose_name_nobody_knows_is_found() -> Result {
    const NAME: &str = "new.example.net";
    let lab = Lab::new()?;
    let hosts = lab.dir().join("hosts");
    let setup = setup(&lab)?.peer_by_name(Role::Old, NAME, &hosts);
    let bench = Bench::new(setup.clone(), Role::Old)?;
    let _new = setup.start(Role::New)?;
    let (hosts, resolver) = (
        hosts.display(),
        lab.dir().join("resolv").display().to_string(),
    );
    // Nobody answers at the resolver's port.
    bench.sh(&format!(
        ": > '{hosts}'; echo nameserver 127.0.0.1 > '{resolver}'; ip link set lo up"
    ))?;
    let names =
        format!("mount --bind {hosts} /etc/hosts; mount --bind {resolver} /etc/resolv.conf");
    let found = bench.apart(&names, &[], "")?;
    let finding = find(&found, ("peer", "fail", NAME)).unwrap_or_else(|| panic!("{found:#}"));
    let remedy = finding["remedy"].as_str().unwrap_or_default();
    let shows = format!("unshare --mount sh -c '{names}; {remedy}'");
    let shown = bench.shell(&shows, &[])?;
    assert!(!shown.status.success(), "{shown:?}");
    bench.sh(&format!("echo 198.51.100.2 {NAME} > '{hosts}'"))?;
    let shown = bench.shell(&shows, &[])?;
    assert!(shown.stdout.contains("198.51.100.2"), "{shown:?}");
    let found = bench.apart(&names, &[], "")?;
    let well = ("peer", "ok", "has the same key");
    assert!(find(&found, well).is_some(), "{found:#}");
    Ok(())
}

#[test]
fn without_privileges_it_says_what_it_can_and_bad_settings_are_a_finding() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?;
    let bench = Bench::new(setup, Role::Old)?;
    let line = bench.line(&[]);
    // The key is readable for root alone.
    let output = bench.shell(&format!("setpriv --reuid 65534 --clear-groups {line}"), &[])?;
    let found = Bench::read(&output)?;
    let denied = find(&found, ("privileges", "fail", "CAP_NET_ADMIN")).expect("it says so");
    assert!(
        find(&found, ("uplink", "ok", "eth0")).is_some(),
        "{found:#}"
    );
    assert_eq!(output.status.code(), Some(2));
    // What only root may is no fault of the server's, and nobody has typed a key.
    for (name, result) in [("state", "warn"), ("settings", "warn")] {
        assert_eq!(find(&found, (name, result, "")), None, "{found:#}");
    }
    let sudo = denied["remedy"].as_str().unwrap_or_default();
    let mended = Bench::read(&bench.shell(sudo, &[])?)?;
    assert_eq!(find(&mended, ("privileges", "fail", "")), None);
    // Root in a container that was given nothing.
    let bound = format!("setpriv --bounding-set=-net_admin,-bpf,-sys_admin {line}");
    let found = bench.check(&bound, &[])?;
    let denied = find(&found, ("privileges", "fail", "though it is root"));
    let remedy = denied
        .map(|it| it["remedy"].to_string())
        .unwrap_or_default();
    assert!(remedy.contains("--cap-add NET_ADMIN"), "{found:#}");
    let bad = bench.check(
        "ipmoved check --json --psk-file /none --peer 192.0.2.1",
        &[],
    )?;
    assert!(
        find(&bad, ("settings", "fail", "/none")).is_some(),
        "{bad:#}"
    );
    // A key that everybody can see, and the file that it is better in.
    let psk = bench.setup.psk_file(Role::Old);
    let typed = format!("--psk '{}'", read_psk(psk)?.trim());
    let typed = line.replace(&format!("'--psk-file' '{}'", psk.display()), &typed);
    let seen = ("settings", "warn", "can be read by every user");
    let found = bench.check(&typed, &[])?;
    let finding = find(&found, seen).unwrap_or_else(|| panic!("{found:#}"));
    let remedy = finding["remedy"].as_str().unwrap_or_default();
    let etc = format!(
        "mount -t tmpfs none /etc; mkdir /etc/ipmoved; cp {} /etc/ipmoved/psk",
        psk.display()
    );
    let mended = format!("unshare --mount sh -c '{etc}; {remedy}'");
    let mended = bench.check(&mended, &[])?;
    assert_eq!(find(&mended, ("settings", "warn", "")), None, "{mended:#}");
    assert_eq!(find(&mended, ("settings", "fail", "")), None, "{mended:#}");
    // Whoever names no settings is told of those of the service, where there are some.
    let etc = "mount -t tmpfs none /etc; mkdir /etc/ipmoved; : > /etc/ipmoved/ipmoved.toml";
    let bare = format!("unshare --mount sh -c '{etc}; ipmoved check --json'");
    let bare = bench.check(&bare, &[])?;
    let none = find(&bare, ("settings", "fail", "--peer is missing"));
    let remedy = none.and_then(|it| it["remedy"].as_str());
    let file = "ipmoved check --json --config /etc/ipmoved/ipmoved.toml";
    assert_eq!(remedy, Some(file), "{bare:#}");
    let text = bench.shell(&line.replace(" --json", ""), &[])?.stdout;
    let lines: Vec<&str> = text.lines().collect();
    let grades = |line: &&str| ["ok", "warn", "fail"].iter().any(|it| line.starts_with(it));
    assert!(!lines.is_empty() && lines.iter().all(grades), "{text}");
    Ok(())
}

fn failed(error: impl std::fmt::Display) -> LabError {
    LabError::unexpected(error.to_string())
}
