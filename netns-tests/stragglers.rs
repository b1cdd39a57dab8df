//! Who still comes is recorded, with real clients, and told.
//!
//! ```text
//!  203.0.113.10 curl ──────────┐
//!  203.0.113.11 openssl ───────┤─ router ── old server 192.0.2.1, records
//!  2001:db8:c::10 curl ────────┘              ║ tunnel
//!                                            new server 198.51.100.2, an HTTP server on port 8080
//! ```

use std::fs;
use std::net::{IpAddr, Ipv6Addr};
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::thread;
use std::time::Duration;

use ipmoved::internals::Role;
use ipmoved::lab::topology::{CLIENT, MOVED, MOVED6, NEW, NEW6};
use ipmoved::lab::traffic::{Client, listeners};
use ipmoved::lab::{DaemonSetup, Lab, LabError, Service, UdpService, poll_until};
use serde_json::Value;

use crate::behind_dnat::{has, shell};
use crate::stage::{FAMILIES, PATIENCE, Result, setup};

/// How long it takes until a visit is in the database: it settles for up to 5 s, is told of within
/// a second, and is written within two.
const RECORDED: Duration = Duration::from_secs(12);

/// `ipmoved verdict` says "not yet".
const NOT_YET: i32 = 1;

/// Runs a program on the clients' host, whatever becomes of it.
fn client(lab: &Lab, program: &str, args: &[&str]) -> Result<String> {
    let mut command = Command::new(program);
    command.args(args).stdin(std::process::Stdio::null());
    Ok(lab.clients().output(command, PATIENCE)?.stdout)
}

/// Who comes, as the old server says.
fn stragglers(setup: &DaemonSetup<'_>) -> Result<Vec<Value>> {
    let said = setup.run(Role::Old, &["stragglers", "--json"])?;
    let json: Value = serde_json::from_str(&said.stdout).unwrap_or_default();
    Ok(json["stragglers"].as_array().cloned().unwrap_or_default())
}

/// The names that somebody asked for, each with who did.
fn names(setup: &DaemonSetup<'_>) -> Result<Vec<String>> {
    let each = |it: &Value| format!("{} {}", it["client"], it["names"][0]).replace('"', "");
    let mut names: Vec<String> = stragglers(setup)?.iter().map(each).collect();
    names.sort_unstable();
    Ok(names)
}

fn unexpected(error: std::io::Error) -> LabError {
    LabError::unexpected(error.to_string())
}

#[test]
fn who_comes_is_recorded_with_the_name_that_was_asked_for_and_a_kill_loses_nothing_of_it() -> Result
{
    if !["curl", "openssl", "python3"].into_iter().all(has) {
        return Ok(());
    }
    let lab = Lab::new()?;
    let setup = setup(&lab)?.moves(&FAMILIES);
    let mut server = Command::new("python3");
    server.args(["-m", "http.server", "8080", "--bind", "::"]);
    let _server = lab.new_server().spawn(server)?;
    let listens = poll_until(PATIENCE, Duration::from_millis(20), || {
        let all = listeners(lab.new_server()).unwrap_or_default();
        all.iter().any(|it| it.port() == 8_080).then_some(())
    });
    assert!(listens.is_some(), "no HTTP server");
    let daemons = setup.start_both()?;
    let tls = [
        "--interface",
        "203.0.113.10",
        "-sko",
        "/dev/null",
        "-H",
        "Host: app.example.net",
    ];
    for _ in 0..3 {
        client(
            &lab,
            "curl",
            &[&tls[..], &["http://192.0.2.5:8080/"]].concat(),
        )?;
    }
    // It gets no TLS in reply, and has said what it wants.
    let hello = [
        "s_client",
        "-bind",
        "203.0.113.11",
        "-servername",
        "tls.example.net",
    ];
    client(
        &lab,
        "openssl",
        &[&hello[..], &["-connect", "192.0.2.5:8080"]].concat(),
    )?;
    let by_address = "http://[2001:db8:a::5]:8080/";
    client(&lab, "curl", &["-gso", "/dev/null", by_address])?;
    // A port that nobody serves is no visit.
    client(
        &lab,
        "curl",
        &["-so", "/dev/null", "http://192.0.2.5:8081/"],
    )?;
    let v6 = network_of(lab.client().address_towards(MOVED6));
    let mut expected = vec![
        "203.0.113.10 app.example.net".to_owned(),
        "203.0.113.11 tls.example.net".to_owned(),
        format!("{v6} (none)"),
    ];
    expected.sort_unstable();
    // The names come a moment after those who asked.
    let mut recorded = Vec::new();
    let all = poll_until(RECORDED, Duration::from_millis(200), || {
        recorded = names(&setup).ok()?;
        (recorded == expected).then_some(())
    });
    assert!(all.is_some(), "{recorded:?}");
    // Whatever else came by then, a kill takes nothing away that was recorded.
    daemons.old.kill()?;
    assert_eq!(names(&setup)?, expected);
    let curl = stragglers(&setup)?
        .into_iter()
        .find(|it| it["client"] == "203.0.113.10");
    let curl = curl.unwrap_or_default();
    assert_eq!(
        (&curl["connections"], &curl["went_on"]),
        (&3.into(), &3.into()),
        "{curl}"
    );
    assert_eq!(
        (&curl["port"], &curl["protocol"]),
        (&8_080.into(), &"tcp".into())
    );
    assert!(curl["bytes_out"].as_u64() > Some(300), "{curl}");
    let database = lab.dir().join("state/stragglers.sqlite");
    let mode = fs::metadata(&database)
        .map_err(unexpected)?
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);

    let csv = setup
        .run(Role::Old, &["stragglers", "--csv", "--top", "1"])?
        .stdout;
    assert!(
        csv.contains("203.0.113.10,192.0.2.5,8080,tcp,app.example.net,3,"),
        "{csv}"
    );
    let text = setup.run(Role::Old, &["stragglers"])?.stdout;
    assert!(
        text.contains("192.0.2.5:8080/tcp as app.example.net"),
        "{text}"
    );
    let said = setup.run(Role::Old, &["verdict"])?;
    assert_eq!(
        said.status.code(),
        Some(NOT_YET),
        "{}{}",
        said.stdout,
        said.stderr
    );
    // Nobody passes by before it is known who always came.
    assert!(
        said.stdout.starts_with("not yet: 3 clients came"),
        "{}",
        said.stdout
    );
    let all = [
        "verdict",
        "--ignore",
        "203.0.113.0/24",
        "--ignore",
        "2001:db8::/32",
        "--json",
    ];
    let said = setup.run(Role::Old, &all)?;
    let json: Value = serde_json::from_str(&said.stdout).unwrap_or_default();
    assert_eq!(
        (&json["safe"], &json["ignored"]),
        (&false.into(), &3.into()),
        "{json}"
    );
    let reasons = json["reasons"].as_array().cloned().unwrap_or_default();
    let little = reasons
        .iter()
        .any(|it| it["reason"] == "watched_too_little");
    assert!(little, "{json}");
    assert_eq!(json["moves"].as_array().map(Vec::len), Some(2), "{json}");

    let page = lab.dir().join("page.html");
    let page = page.to_string_lossy();
    let said = setup.run(Role::Old, &["report", &page, "--ignore", "203.0.113.10"])?;
    assert_eq!(said.stdout, format!("{page} is written\n"));
    let html = fs::read_to_string(&*page).map_err(unexpected)?;
    assert!(html.contains("tls.example.net"), "{html}");
    assert!(!html.contains("app.example.net"), "{html}");

    // The next daemon goes on from there.
    let mut again = setup.start(Role::Old)?;
    again.wait_until_up()?;
    client(
        &lab,
        "curl",
        &[&tls[..], &["http://192.0.2.5:8080/"]].concat(),
    )?;
    // In order: it tells what it knows at once.
    thread::sleep(Duration::from_millis(100));
    again.terminate()?;
    let after = stragglers(&setup)?
        .into_iter()
        .find(|it| it["client"] == "203.0.113.10");
    assert_eq!(after.unwrap_or_default()["connections"], 4);
    Ok(())
}

/// What counts as one client of IPv6.
fn network_of(addr: IpAddr) -> String {
    match addr {
        IpAddr::V4(addr) => addr.to_string(),
        IpAddr::V6(addr) => {
            let network = Ipv6Addr::from(addr.to_bits() & !u128::from(u64::MAX));
            format!("{network}/64")
        }
    }
}

#[test]
fn whoever_the_old_server_serves_itself_is_recorded_as_well() -> Result {
    if !["curl", "nft"].into_iter().all(has) {
        return Ok(());
    }
    let lab = Lab::new()?;
    let setup = setup(&lab)?
        .moves(&FAMILIES)
        .args(Role::Old, &["--start", "here"]);
    let old = lab.old_server();
    let behind: IpAddr = "172.17.0.2".parse().expect("it is an address");
    let gateway = "172.17.0.1".parse().expect("it is an address");
    let (behind_of, gateway_of) = ([(behind, 16)], [(gateway, 16)]);
    let container = lab.add_behind(old, ("docker0", "port0"), &behind_of, &gateway_of)?;
    shell(
        old,
        "echo 1 > /proc/sys/net/ipv4/ip_forward
        nft 'table ip nat {
            chain in {
                type nat hook prerouting priority -100;
                iifname != docker0 tcp dport 8080 dnat to 172.17.0.2:8080
            }
        }'",
    )?;
    let _serves = (
        Service::start(old, MOVED)?,
        Service::start(old, MOVED6)?,
        UdpService::start(old, (MOVED, 53))?,
        Service::start(&container, (behind, 8_080))?,
    );
    let _new = (
        Service::start(lab.new_server(), NEW)?,
        Service::start(lab.new_server(), NEW6)?,
    );
    // Somebody whom the old server itself calls from the moved address.
    let called = Service::start(lab.clients(), (CLIENT, 8_000))?;
    let daemons = setup.start_both()?;
    let by_name = ["-so", "/dev/null", "-H", "Host: app.example.net"];
    let asks = |from: &str, port: u16| -> Result {
        let url = format!("http://192.0.2.5:{port}/");
        client(
            &lab,
            "curl",
            &[&by_name[..], &["--interface", from, &url]].concat(),
        )
        .map(drop)
    };
    asks("203.0.113.10", 80)?;
    asks("203.0.113.10", 80)?;
    asks("203.0.113.11", 8_080)?;
    client(
        &lab,
        "curl",
        &["-gso", "/dev/null", "http://[2001:db8:a::5]/"],
    )?;
    let flow = lab.client().udp_socket((MOVED, 53))?;
    for _ in 0..2 {
        flow.send(b"question").map_err(unexpected)?;
        flow.recv(&mut [0; 16]).map_err(unexpected)?;
    }
    let calls = Client::new(old, MOVED, MOVED6);
    calls.get((CLIENT, 8_000))?;
    assert_eq!(called.peers().len(), 1);
    // A port that nobody serves is no visit.
    client(&lab, "curl", &["-so", "/dev/null", "http://192.0.2.5:81/"])?;
    let each = |it: &Value| {
        let it = |key: &str| it[key].to_string().replace('"', "");
        let served = format!("{}+{}", it("by_old"), it("by_new"));
        format!(
            "{} {}/{} {served} {}",
            it("client"),
            it("port"),
            it("protocol"),
            it("names")
        )
    };
    let recorded = |expected: &[String]| -> Result {
        let mut expected = expected.to_vec();
        expected.sort_unstable();
        let mut all = Vec::new();
        let found = poll_until(RECORDED, Duration::from_millis(200), || {
            all = stragglers(&setup).ok()?.iter().map(each).collect();
            all.sort_unstable();
            (all == expected).then_some(())
        });
        assert!(found.is_some(), "{all:#?}");
        Ok(())
    };
    let v6 = network_of(lab.client().address_towards(MOVED6));
    let v4 = lab.client().address_towards(MOVED);
    let expected = vec![
        "203.0.113.10 80/tcp 2+0 [app.example.net]".to_owned(),
        "203.0.113.11 8080/tcp 1+0 [app.example.net]".to_owned(),
        format!("{v6} 80/tcp 1+0 [(none)]"),
        format!("{v4} 53/udp 1+0 []"),
    ];
    recorded(&expected)?;
    let tcp = stragglers(&setup)?;
    let tcp = tcp
        .iter()
        .find(|it| it["client"] == "203.0.113.10" && it["port"] == 80);
    let tcp = tcp.cloned().unwrap_or_default();
    assert_eq!(
        (&tcp["answered"], &tcp["went_on"]),
        (&2.into(), &2.into()),
        "{tcp}"
    );
    assert!(tcp["bytes_out"].as_u64() > Some(100), "{tcp}");

    // Whoever is in neither half is in the other one.
    for args in [&["move", "--percent", "50"][..], &["move"]] {
        let said = setup.run(Role::Old, args)?;
        assert!(said.status.success(), "{said:?}");
        asks("203.0.113.10", 80)?;
    }
    let sums = || {
        let all = stragglers(&setup).ok()?;
        let one = all
            .iter()
            .find(|it| it["client"] == "203.0.113.10" && it["port"] == 80)?;
        let [old, new] = ["by_old", "by_new"].map(|key| one[key].as_u64().unwrap_or(0));
        (old + new == 4 && new > 0).then_some(())
    };
    let all = poll_until(RECORDED, Duration::from_millis(200), sums);
    assert!(all.is_some(), "{:?}", stragglers(&setup)?);

    // That time counts as watched; at its end a daemon writes all of it.
    daemons.terminate()?;
    let said = setup.run(Role::Old, &["verdict", "--json"])?;
    let json: Value = serde_json::from_str(&said.stdout).unwrap_or_default();
    let moves = json["moves"].as_array().cloned().unwrap_or_default();
    assert_eq!(moves.len(), 2, "{json}");
    for one in moves {
        assert!(one["since"].is_i64(), "{one}");
    }
    Ok(())
}

#[test]
fn without_a_database_one_line_says_so() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?;
    for command in ["stragglers", "verdict"] {
        let said = setup.run(Role::Old, &[command, "--state-dir", "/nowhere"])?;
        assert_eq!((said.status.code(), said.stdout.as_str()), (Some(3), ""));
        let line = said.stderr.trim_end();
        assert!(
            line.contains("/nowhere/stragglers.sqlite does not exist"),
            "{line}"
        );
        assert_eq!(line.lines().count(), 1);
    }
    Ok(())
}
