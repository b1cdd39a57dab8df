//! What an administrator sees while it runs: flows, metrics, `status --watch` and `top`.
//!
//! ```text
//!  clients ── router ──┬── old server ◄── ipmoved flows, top, status --watch
//!                      └── new server ◄── scraper
//! ```

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::Command;
use std::time::Duration;

use ipmoved::internals::Role;
use ipmoved::lab::topology::{CLIENT, MOVED, NEW, OLD};
use ipmoved::lab::{DaemonSetup, Lab, LabError, Namespace, Service, patience, poll_until};
use rustix::process::Signal;
use serde_json::Value;

use crate::stage::{MEGABYTE, PATIENCE, Result, exe, moved, setup};

const PAUSE: Duration = Duration::from_millis(50);

/// Where metrics are served.
const METRICS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 9_185);

fn failed(error: impl std::fmt::Display) -> LabError {
    LabError::unexpected(error.to_string())
}

/// What `flows --json` says on one server.
fn flows(setup: &DaemonSetup<'_>, role: Role, args: &[&str]) -> Result<Value> {
    let said = setup.run(role, &[&["flows", "--json"], args].concat())?;
    if !said.status.success() {
        return Err(LabError::unexpected(format!("{said:?}")));
    }
    serde_json::from_str(&said.stdout).map_err(failed)
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or(0)
}

/// The only flow of a protocol.
fn only<'a>(list: &'a Value, protocol: &str) -> Result<&'a Value> {
    let all = list["flows"].as_array().into_iter().flatten();
    let mut of = all.filter(|flow| flow["protocol"] == protocol);
    match (of.next(), of.next()) {
        (Some(flow), None) => Ok(flow),
        _ => Err(LabError::unexpected(format!(
            "one flow of {protocol}: {list}"
        ))),
    }
}

#[test]
fn flows_of_real_clients_are_listed_on_both_servers() -> Result {
    moved(|on| {
        let client = on.lab.client();
        let mut talk = client.converse(MOVED)?;
        let asked = client.udp_socket((MOVED, 5_353))?;
        asked.send(&[0; 100]).map_err(failed)?;
        client.ping(MOVED, 56)?;
        talk.say(b"hello")?;
        for role in [Role::Old, Role::New] {
            let list = flows(&on.setup, role, &[])?;
            let tcp = only(&list, "tcp")?;
            assert_eq!(tcp["client"], CLIENT.to_string());
            assert_eq!(
                (&tcp["moved"], number(&tcp["moved_port"])),
                (&MOVED.to_string().into(), 80)
            );
            assert_eq!(tcp["state"], "established");
            let peer = if role == Role::Old { NEW } else { OLD };
            assert!(
                tcp["peer"].to_string().contains(&peer.to_string()),
                "{list}"
            );
            let delivery = format!("{NEW}:80");
            match role {
                Role::Old => assert!(tcp["delivery"].is_null(), "{list}"),
                Role::New => assert_eq!(tcp["delivery"], delivery),
            }
            assert!(
                number(&tcp["packets_in"]) >= 3 && number(&tcp["bytes_in"]) > 150,
                "{list}"
            );
            assert!(number(&tcp["packets_out"]) >= 1, "{list}");
            let udp = only(&list, "udp")?;
            assert_eq!(udp["moved_port"], 5_353);
            let counted = ["packets_in", "bytes_in", "packets_out"].map(|it| number(&udp[it]));
            assert_eq!(counted, [1, 128, 0], "{list}");
            let ping = only(&list, "icmp")?;
            let counted = ["packets_in", "bytes_in", "packets_out"].map(|it| number(&ping[it]));
            assert_eq!(counted, [1, 84, 1], "{list}");
            assert_eq!((number(&list["live"]), number(&list["matched"])), (3, 3));
            assert!(
                number(&udp["age_s"]) < 60 && number(&udp["idle_s"]) < 60,
                "{list}"
            );
        }
        // Super-packets count as what they stand for, on both servers alike: not as one packet
        // each, nor twice. What was sent again counts again, on a busy machine up to a fifth.
        client.download(MOVED, MEGABYTE)?;
        for role in [Role::Old, Role::New] {
            let list = flows(&on.setup, role, &["--sort", "bytes", "--top", "1"])?;
            let first = &list["flows"][0];
            let (bytes, packets) = (number(&first["bytes_out"]), number(&first["packets_out"]));
            assert!(
                (MEGABYTE..MEGABYTE * 19 / 10).contains(&bytes),
                "{role}: {list}"
            );
            assert!(bytes / packets <= 1_500, "{role}: {list}");
            let nobody = flows(&on.setup, role, &["--client", "198.51.100.0/24"])?;
            assert_eq!(
                (number(&nobody["live"]), number(&nobody["matched"])),
                (4, 0),
                "{nobody}"
            );
        }
        let said = on.setup.run(Role::Old, &["flows", "--sort", "age"])?;
        assert!(said.stdout.contains("CLIENT") && said.stdout.contains("the oldest first"));
        let refused = on.setup.run(Role::Old, &["flows", "--sort", "colour"])?;
        assert_eq!(refused.status.code(), Some(2));
        assert!(
            refused
                .stderr
                .contains("`colour` is none of bytes, age, rate"),
            "{refused:?}"
        );
        Ok(())
    })
}

#[test]
fn flows_of_nat_are_listed_and_counted_in_both_directions() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?;
    let _application = Service::start(lab.new_server(), NEW)?;
    let (moved, to) = (MOVED.to_string(), NEW.to_string());
    let args = ["--move", &moved, "--to", &to, "--metrics", "9185"];
    let mut daemon = setup.start_nat(&args)?;
    daemon.wait_until_up()?;
    let mut talk = lab.client().converse(MOVED)?;
    talk.say(b"hello")?;
    let list = flows(&setup, Role::Old, &[])?;
    let tcp = only(&list, "tcp")?;
    assert_eq!(
        (&tcp["client"], &tcp["peer"]),
        (&CLIENT.to_string().into(), &to.clone().into())
    );
    assert_eq!(
        (&tcp["state"], &tcp["delivery"]),
        (&"established".into(), &format!("{to}:80").into())
    );
    assert!(
        number(&tcp["packets_in"]) >= 3 && number(&tcp["packets_out"]) >= 1,
        "{list}"
    );
    let text = scrape(lab.old_server(), "GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")?;
    assert!(text.contains("ipmoved_flows{peer=\"all\"} 1"), "{text}");
    assert!(
        text.contains("role=\"nat\"") && text.contains("200 OK"),
        "{text}"
    );
    Ok(())
}

/// What the server answers to these bytes.
pub(crate) fn scrape(host: &Namespace, request: &str) -> Result<String> {
    host.run(|| {
        let mut stream = TcpStream::connect_timeout(&METRICS, PATIENCE).map_err(failed)?;
        stream
            .set_read_timeout(Some(patience(PATIENCE)))
            .map_err(failed)?;
        stream.write_all(request.as_bytes()).map_err(failed)?;
        let mut text = String::new();
        stream.read_to_string(&mut text).map_err(failed)?;
        Ok(text)
    })
}

#[test]
fn metrics_say_what_status_says_and_a_hostile_scraper_does_no_harm() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?.args(Role::Old, &["--metrics", "9185"]);
    let _application = Service::start(lab.new_server(), NEW)?;
    let _daemons = setup.start_both()?;
    lab.client().download(MOVED, MEGABYTE)?;
    let old = lab.old_server();
    let status = setup.status(Role::Old)?;
    let received = number(&status.tunnel()["rx"]["bytes"]);
    let get = "GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n";
    let text = scrape(old, get)?;
    let value = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name));
        let value = line.and_then(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok());
        value.unwrap_or(-1.0)
    };
    assert!(
        value("ipmoved_received_bytes_total{") >= received as f64,
        "{text}"
    );
    assert!(
        value("ipmoved_flows{") >= 1.0 && value("ipmoved_peer_up{").abs() == 1.0,
        "{text}"
    );
    assert!(value("ipmoved_move_mode{") >= 0.0 && value("ipmoved_dropped_total{") >= 0.0);
    assert!(
        !text.contains(&CLIENT.to_string()),
        "clients are nobody's business: {text}"
    );
    assert!(text.contains("text/plain; version=0.0.4"), "{text}");
    let open = "GET /metrics HTTP/1.1\r\nHost: a\r\nAccept: application/openmetrics-text\r\n\r\n";
    assert!(scrape(old, open)?.ends_with("# EOF\n"));
    // Who says nothing, says too much, or something else.
    let idle = old.run(|| {
        let connect = |_| TcpStream::connect_timeout(&METRICS, PATIENCE).map_err(failed);
        (0..12).map(connect).collect::<Result<Vec<_>>>()
    })?;
    for (request, answer) in [
        (
            "POST /metrics HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n",
            "405 ",
        ),
        ("GET / HTTP/1.1\r\nHost: a\r\n\r\n", "404 "),
        ("\u{0}\u{1}\u{2}\r\n\r\n", ""),
        (
            &format!("GET /metrics HTTP/1.1\r\nA: {}\r\n\r\n", "a".repeat(20_000)),
            "",
        ),
    ] {
        // A connection that is reset says nothing either.
        let said = scrape(old, request).unwrap_or_default();
        assert!(
            said.contains(answer) && !said.contains("200 OK"),
            "{request:.60}: {said}"
        );
    }
    assert!(scrape(old, get)?.contains("ipmoved_build_info"));
    lab.client().get(MOVED)?.is_answered_by(NEW)?;
    assert_eq!(setup.status(Role::Old)?.state(), "up");
    drop(idle);
    // It is this server's own business.
    let outside = SocketAddr::new(OLD.into(), METRICS.port());
    let refused = old.run(|| Ok(TcpStream::connect_timeout(&outside, PATIENCE).is_err()))?;
    assert!(refused, "loopback alone");
    Ok(())
}

#[test]
fn watching_goes_on_over_a_restart_and_ends_well() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?;
    let _application = Service::start(lab.new_server(), NEW)?;
    let daemons = setup.start_both()?;
    let mut command = setup.command();
    command.args(["status", "--watch", "1"]);
    let watching = lab.old_server().spawn(command)?;
    let mut command = setup.command();
    command.args(["status", "--watch=1", "--json"]);
    let in_json = lab.old_server().spawn(command)?;
    let says = |what: &'static str| {
        let said = poll_until(6 * PATIENCE, PAUSE, || {
            watching.stdout().contains(what).then_some(())
        });
        said.ok_or_else(|| LabError::unexpected(format!("{what}: {}", watching.stdout())))
    };
    says("packets/s, ")?;
    says("\n\ntunnel to new server")?;
    daemons.old.terminate()?;
    says("waiting for it")?;
    let _old = setup.start(Role::Old)?;
    says("ipmoved was started anew (process ")?;
    let lines = || (in_json.stdout().lines().count() >= 2).then_some(());
    poll_until(6 * PATIENCE, PAUSE, lines).expect("it says how it goes twice");
    for process in [watching, in_json] {
        process.signal(Signal::INT)?;
        let said = process.wait(PATIENCE)?;
        assert_eq!(said.status.code(), Some(0), "{said:?}");
        assert!(!said.stdout.contains('\u{1b}'), "no terminal: {said:?}");
        if said.stdout.starts_with('{') {
            let lines: Vec<Value> = said
                .stdout
                .lines()
                .map(|line| serde_json::from_str(line).unwrap())
                .collect();
            assert!(
                lines.len() >= 2 && lines[0]["verdict"].is_string(),
                "{said:?}"
            );
        }
    }
    Ok(())
}

/// A program in a terminal of that size, and the keys that it gets.
struct Terminal {
    process: ipmoved::lab::Process,
    keys: std::fs::File,
    size: (u16, u16),
}

impl Terminal {
    fn start(setup: &DaemonSetup<'_>, args: &str, (columns, rows): (u16, u16)) -> Result<Self> {
        let keys = setup
            .lab()
            .dir()
            .join(format!("keys-{columns}-{}", args.len()));
        let mut made = Command::new("mkfifo");
        made.arg(&keys);
        made.status().map_err(failed)?;
        let exe = exe().display();
        let run = format!(
            "exec script -qefc 'stty cols {columns} rows {rows}; exec {exe} {args}' /dev/null < {}",
            keys.display()
        );
        let mut command = setup.beside("sh");
        command.env("TERM", "xterm-256color").args(["-c", &run]);
        let process = setup.host(Role::Old).spawn(command)?;
        // Both ways, so that it does not wait for a reader.
        let mut open = std::fs::OpenOptions::new();
        let keys = open.read(true).write(true).open(&keys).map_err(failed)?;
        Ok(Self {
            process,
            keys,
            size: (columns, rows),
        })
    }

    fn press(&mut self, keys: &[u8]) -> Result {
        self.keys.write_all(keys).map_err(failed)
    }

    /// What is on the screen.
    fn screen(&self) -> vt100::Parser {
        let mut screen = vt100::Parser::new(self.size.1, self.size.0, 0);
        screen.process(self.process.stdout().as_bytes());
        screen
    }

    fn shows(&self, what: &str) -> Result {
        let shown = poll_until(6 * PATIENCE, PAUSE, || {
            self.screen()
                .screen()
                .contents()
                .contains(what)
                .then_some(())
        });
        let seen = || self.screen().screen().contents();
        shown
            .ok_or_else(|| LabError::unexpected(format!("{what} is not on the screen: {}", seen())))
    }
}

#[test]
fn top_and_watch_draw_on_terminals_of_80_and_200_columns_and_leave_them_as_they_were() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?;
    let _application = Service::start(lab.new_server(), NEW)?;
    let _daemons = setup.start_both()?;
    let mut talk = lab.client().converse(MOVED)?;
    talk.say(b"hello")?;
    let client = format!("{CLIENT}:");
    let [mut narrow, mut wide] =
        [(80, 24), (200, 50)].map(|size| Terminal::start(&setup, "top", size));
    let (narrow, wide) = (
        narrow.as_mut().map_err(failed)?,
        wide.as_mut().map_err(failed)?,
    );
    let watch = Terminal::start(&setup, "status --watch 1", (80, 24))?;
    for terminal in [&*narrow, &*wide] {
        for what in [
            "tunnel to new server",
            " received ",
            "CLIENT",
            &client,
            "q end",
            " modes ",
        ] {
            terminal.shows(what)?;
        }
        assert!(terminal.screen().screen().alternate_screen());
    }
    narrow.press(b"p")?;
    narrow.shows("paused")?;
    narrow.press(b"p\x1b[C")?;
    narrow.shows("the oldest first")?;
    watch.shows("packets/s")?;
    watch.shows("every 1 s, ^C ends it")?;
    // By a key, by ^C and by a signal.
    narrow.press(b"q")?;
    wide.press(b"\x03")?;
    for terminal in [narrow, wide] {
        let ended = poll_until(PATIENCE, PAUSE, || terminal.process.exited());
        assert!(ended.is_some_and(|it| it.success()), "{ended:?}");
        let screen = terminal.screen();
        assert!(!screen.screen().alternate_screen() && !screen.screen().hide_cursor());
    }
    let mut third = Terminal::start(&setup, "top --every 1", (100, 30))?;
    third.shows("CLIENT")?;
    let mut kill = Command::new("pkill");
    kill.args(["-TERM", "-P", &third.process.id().to_string()]);
    kill.status().map_err(failed)?;
    let ended = poll_until(PATIENCE, PAUSE, || third.process.exited());
    assert!(ended.is_some(), "SIGTERM ends it");
    assert!(!third.screen().screen().alternate_screen());
    // Without a terminal it says so.
    let said = setup.run(Role::Old, &["top"])?;
    assert_eq!(said.status.code(), Some(2), "{said:?}");
    assert!(said.stderr.contains("status --watch") && said.stderr.lines().count() == 1);
    Ok(())
}
