//! The move itself: modes, from one to the next while clients come and go, and the cut-over.
//!
//! ```text
//!                                ┌── old server, serves 192.0.2.5 until it has moved
//!  clients, all the time ── router ──┤              ║ tunnel
//!                                └── new server, serves afterwards
//! ```

use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use ipmoved::internals::Role;
use ipmoved::lab::topology::{MOVED, MOVED6, NEW, NEW6};
use ipmoved::lab::traffic::{Client, Conversation, TIMEOUT};
use ipmoved::lab::{
    DaemonSetup, Lab, LabError, Output, Probe, Process, Service, UdpService, poll_until,
};
use rustix::process::Signal;

use crate::hairpin::client;
use crate::stage::{FAMILIES, PATIENCE, RECOVERY, Result, setup};

/// The moved address and the new server's, family by family.
pub(crate) const ENDS: [(IpAddr, IpAddr); 2] = [
    (IpAddr::V4(MOVED), IpAddr::V4(NEW)),
    (IpAddr::V6(MOVED6), IpAddr::V6(NEW6)),
];

const UDP: u16 = 53;

/// How often something is asked that takes a moment.
pub(crate) const PAUSE: Duration = Duration::from_millis(20);

/// Longer than a cut-over takes in which nothing has to be waited for.
pub(crate) const CUTOVER: Duration = Duration::from_secs(20);

/// Conversations that are begun in each mode, of each family.
const CONVERSATIONS: usize = 20;

/// Daemons of which the old server's leaves everything to its own service at first.
fn before(lab: &Lab) -> Result<DaemonSetup<'_>> {
    Ok(setup(lab)?
        .moves(&FAMILIES)
        .args(Role::Old, &["--start", "here"]))
}

/// A service of both families, TCP and UDP.
pub(crate) struct Services {
    _tcp: [Service; 2],
    udp: [UdpService; 2],
}

impl Services {
    pub(crate) fn old(lab: &Lab) -> Result<Self> {
        let host = lab.old_server();
        Ok(Self {
            _tcp: [Service::start(host, MOVED)?, Service::start(host, MOVED6)?],
            udp: [
                UdpService::start(host, (MOVED, UDP))?,
                UdpService::start(host, (MOVED6, UDP))?,
            ],
        })
    }

    pub(crate) fn new(lab: &Lab) -> Result<Self> {
        let host = lab.new_server();
        Ok(Self {
            _tcp: [Service::start(host, NEW)?, Service::start(host, NEW6)?],
            udp: [
                UdpService::start(host, (NEW, UDP))?,
                UdpService::start(host, (NEW6, UDP))?,
            ],
        })
    }

    /// How many UDP clients came.
    fn heard(&self) -> usize {
        self.udp.iter().map(|it| it.peers().len()).sum()
    }
}

/// One request of a client that asks all the time: when it began, and who answered.
pub(crate) struct Asked {
    pub(crate) begun: Instant,
    pub(crate) server: std::result::Result<IpAddr, String>,
}

/// Asks both families again and again, each time over a new connection, until it is over.
pub(crate) fn ask_all_the_time(client: Client<'_>, over: &AtomicBool, asked: &Mutex<Vec<Asked>>) {
    while !over.load(SeqCst) {
        for (moved, _) in ENDS {
            let begun = Instant::now();
            let server = client.get(moved).map(|answer| answer.server.ip());
            let server = server.map_err(|error| error.to_string());
            let mut all = asked.lock().unwrap_or_else(PoisonError::into_inner);
            all.push(Asked { begun, server });
        }
        std::thread::sleep(PAUSE);
    }
}

/// How many requests have begun since then and are over; one family follows the other.
fn asked_since(asked: &Mutex<Vec<Asked>>, since: Instant) -> usize {
    let all = asked.lock().unwrap_or_else(PoisonError::into_inner);
    all.iter().filter(|it| it.begun >= since).count()
}

/// Runs a command on the old server that is to work.
pub(crate) fn run(setup: &DaemonSetup<'_>, args: &[&str]) -> Result<Output> {
    let said = setup.run(Role::Old, args)?;
    match said.status.success() {
        true => Ok(said),
        false => Err(LabError::unexpected(format!("{args:?}: {said:?}"))),
    }
}

/// The modes of the moves.
pub(crate) fn modes(setup: &DaemonSetup<'_>) -> Result<Vec<String>> {
    let status = setup.status(Role::Old)?;
    let modes = status.tunnel()["modes"].as_array().cloned();
    let name = |mode: &serde_json::Value| mode["mode"].as_str().unwrap_or_default().to_owned();
    Ok(modes.unwrap_or_default().iter().map(name).collect())
}

/// Conversations in both families that go on.
fn begin(client: Client<'_>) -> Result<Vec<Conversation>> {
    let begin = |(moved, _)| (0..CONVERSATIONS).map(move |_| client.converse(moved));
    ENDS.into_iter().flat_map(begin).collect()
}

fn go_on(conversations: &mut [Conversation], patience: Duration) -> Result {
    for conversation in conversations.iter_mut() {
        conversation.say(b"still there?")?;
    }
    for (number, conversation) in conversations.iter_mut().enumerate() {
        let heard = conversation.hear(b"still there?", patience);
        heard.map_err(|error| LabError::unexpected(format!("conversation {number}: {error}")))?;
    }
    Ok(())
}

#[test]
fn nobody_is_refused_and_everything_goes_on_from_mode_to_mode() -> Result {
    let lab = Lab::new()?;
    let setup = before(&lab)?;
    let (old, new) = (Services::old(&lab)?, Services::new(&lab)?);
    let daemons = setup.start_both()?;
    let (mut old_daemon, new_daemon) = (Some(daemons.old), daemons.new);
    let client = lab.client();
    let over = AtomicBool::new(false);
    let asked: Mutex<Vec<Asked>> = Mutex::default();
    // From when to when who answers; `None` is either, but always the same one.
    let mut phases: Vec<(Instant, Instant, Option<[IpAddr; 2]>)> = Vec::new();
    let (here, there) = (ENDS.map(|it| it.0), ENDS.map(|it| it.1));
    let result = std::thread::scope(|scope| {
        scope.spawn(|| ask_all_the_time(client, &over, &asked));
        let mut all = || -> Result {
            let mut conversations = Vec::new();
            for (args, expected) in [
                (&[][..], Some(here)),
                (&["move", "--percent", "50"], None),
                (&["hold", "--for", "30"], None),
                (&["move"], Some(there)),
                (&["hold", "--for", "1"], None),
                (&["back"], Some(here)),
            ] {
                if !args.is_empty() {
                    run(&setup, args)?;
                }
                let since = Instant::now();
                let is_held = args.first() == Some(&"hold");
                if is_held {
                    // Long enough for somebody to come.
                    std::thread::sleep(Duration::from_millis(300));
                } else {
                    conversations.extend(begin(client)?);
                    let heard = [old.heard(), new.heard()];
                    for (moved, _) in ENDS {
                        client.udp((moved, UDP), b"question")?;
                    }
                    let came = [old.heard() - heard[0], new.heard() - heard[1]];
                    match expected {
                        Some(to) => assert_eq!(came, if to == here { [2, 0] } else { [0, 2] }),
                        None => assert_eq!(came.iter().sum::<usize>(), 2),
                    }
                }
                go_on(&mut conversations, PATIENCE)
                    .map_err(|error| LabError::unexpected(format!("after {args:?}: {error}")))?;
                if !is_held {
                    let both = || (asked_since(&asked, since) >= ENDS.len()).then_some(());
                    poll_until(PATIENCE, PAUSE, both)
                        .ok_or_else(|| LabError::unexpected("nobody asks".to_owned()))?;
                    phases.push((since, Instant::now(), expected));
                }
            }
            // What is the new server's, and what is the old one's, survives a daemon's crash.
            old_daemon.take().expect("it runs").kill()?;
            let again = old_daemon.insert(setup.start(Role::Old)?);
            again.wait_until_up()?;
            go_on(&mut conversations, RECOVERY)
        };
        let result = all();
        over.store(true, SeqCst);
        result
    });
    result?;
    let asked = asked.into_inner().unwrap_or_else(PoisonError::into_inner);
    let failed: Vec<&String> = asked
        .iter()
        .filter_map(|it| it.server.as_ref().err())
        .collect();
    assert!(failed.is_empty(), "{failed:?} of {}", asked.len());
    for (since, until, expected) in phases {
        let servers = asked
            .iter()
            .filter(|it| (since..until).contains(&it.begun))
            .filter_map(|it| it.server.as_ref().ok());
        let mut servers: Vec<IpAddr> = servers.copied().collect();
        servers.sort_unstable();
        servers.dedup();
        assert_eq!(servers.len(), 2, "one of each family: {servers:?}");
        if let Some(expected) = expected {
            assert!(
                servers.iter().all(|it| expected.contains(it)),
                "{servers:?}"
            );
        }
    }
    old_daemon.expect("it runs").terminate()?;
    new_daemon.terminate().map(drop)
}

#[test]
fn a_mode_outlives_the_daemon() -> Result {
    let lab = Lab::new()?;
    let setup = before(&lab)?;
    let _services = (Services::old(&lab)?, Services::new(&lab)?);
    let daemons = setup.start_both()?;
    let mut old = daemons.old;
    for (args, mode, server) in [
        (&["back"][..], "here", Some(0)),
        (&["move"], "moved", Some(1)),
        (&["move", "--percent", "50"], "shared", None),
        (&["hold", "--for", "600"], "held", None),
    ] {
        run(&setup, args)?;
        let serves = |when: &str| -> Result {
            assert_eq!(modes(&setup)?, [mode, mode], "{when}");
            for ends in ENDS {
                if let Some(server) = server {
                    let expected = [ends.0, ends.1][server];
                    lab.client().get(ends.0)?.is_answered_by(expected)?;
                }
            }
            Ok(())
        };
        serves("before")?;
        old.kill()?;
        old = setup.start(Role::Old)?;
        old.wait_until_up()?;
        serves("after a crash")?;
    }
    // What follows a hold is kept as well.
    let status = setup.status(Role::Old)?;
    let held = &status.tunnel()["modes"][0];
    assert_eq!(held["then"], "shared");
    assert!(held["held_s"].as_u64() > Some(500), "{held}");
    // Each by itself, and an orderly end changes nothing.
    run(&setup, &["back", FAMILIES[0]])?;
    old.terminate()?;
    let mut old = setup.start(Role::Old)?;
    old.wait_until_up()?;
    assert_eq!(modes(&setup)?, ["here", "held"]);
    old.terminate()?;
    daemons.new.terminate().map(drop)
}

#[test]
fn the_new_server_knows_the_mode_and_calls_whoever_serves() -> Result {
    let lab = Lab::new()?;
    let setup = before(&lab)?;
    let _services = (Services::old(&lab)?, Services::new(&lab)?);
    let daemons = setup.start_both()?;
    let inside = client(lab.new_server(), (NEW, NEW6));
    let mut all: Vec<Conversation> = Vec::new();
    for (args, mode) in [
        (&["back"][..], "here"),
        (&["move"], "moved"),
        (&["back"], "here"),
        (&["hold", "--for", "60"], "held"),
        (&["move"], "moved"),
    ] {
        run(&setup, args)?;
        let knows = || {
            let status = setup.status(Role::New).ok()?;
            let modes = status.tunnel()["peer_modes"].as_array().cloned();
            let modes = modes.unwrap_or_default();
            let is_it = match mode {
                "moved" => modes.is_empty(),
                _ => modes.len() == 2 && modes.iter().all(|it| it["mode"] == mode),
            };
            is_it.then_some(())
        };
        poll_until(PATIENCE, PAUSE, knows)
            .ok_or_else(|| LabError::unexpected(format!("it does not know of {mode}")))?;
        for (moved, new) in ENDS {
            match mode {
                "held" => {
                    let waits = inside.probe_tcp(moved, Duration::from_millis(300))?;
                    assert_eq!(waits, Probe::Silent);
                    continue;
                }
                "here" => inside.get(moved)?.is_answered_by(moved)?,
                _ => inside.get(moved)?.is_answered_by(new)?,
            };
            all.push(inside.converse(moved)?);
        }
        go_on(&mut all, PATIENCE)?;
    }
    // Another run of its daemon is told as well.
    run(&setup, &["back", FAMILIES[0]])?;
    daemons.new.kill()?;
    let mut new = setup.start(Role::New)?;
    new.wait_until_up()?;
    let knows = || {
        let modes = setup.status(Role::New).ok()?.tunnel()["peer_modes"].clone();
        let expected = serde_json::json!([{"what": FAMILIES[0], "mode": "here", "percent": 0}]);
        (modes == expected).then_some(())
    };
    poll_until(RECOVERY, PAUSE, knows).expect("it knows");
    new.terminate()?;
    daemons.old.terminate().map(drop)
}

/// A cut-over in which the test is the administrator's commands.
pub(crate) struct Script {
    pub(crate) dir: PathBuf,
}

impl Script {
    /// A shell command that says that it runs, and ends once the test lets it.
    pub(crate) fn line(&self, name: &str) -> String {
        let dir = self.dir.display();
        format!("touch {dir}/{name}; while ! [ -e {dir}/{name}-done ]; do sleep 0.02; done")
    }

    pub(crate) fn runs(&self, name: &str) -> Result {
        let path = self.dir.join(name);
        let runs = poll_until(CUTOVER, PAUSE, || path.exists().then_some(()));
        runs.ok_or_else(|| LabError::unexpected(format!("{name} is not run")))
    }

    pub(crate) fn is_done(&self, name: &str) -> Result {
        let written = fs::write(self.dir.join(format!("{name}-done")), "");
        written.map_err(|error| LabError::unexpected(error.to_string()))
    }
}

/// Starts a command on the old server.
pub(crate) fn start(setup: &DaemonSetup<'_>, args: &[&str]) -> Result<Process> {
    let mut command = setup.command();
    command.args(args);
    setup.host(Role::Old).spawn(command)
}

/// Waits for a cut-over that fails, and expects these words in its last line.
fn fails(setup: &DaemonSetup<'_>, cutover: Process, why: &str) -> Result {
    let said = cutover.wait(CUTOVER)?;
    assert_eq!(said.status.code(), Some(1), "{said:?}");
    assert_eq!(said.stderr.lines().count(), 1, "{said:?}");
    assert!(said.stderr.contains(why), "{why}: {said:?}");
    assert_eq!(modes(setup)?, ["here", "here"]);
    Ok(())
}

#[test]
fn a_cutover_refuses_nobody() -> Result {
    let lab = Lab::new()?;
    let moves = ["192.0.2.5:80/tcp", "[2001:db8:a::5]:80/tcp"];
    let setup = setup(&lab)?
        .moves(&moves)
        .args(Role::Old, &["--start", "here"]);
    let old = Services::old(&lab)?;
    let daemons = setup.start_both()?;
    let client = lab.client();
    let (over, asked) = (AtomicBool::new(false), Mutex::default());
    let script = Script {
        dir: lab.dir().into(),
    };
    let (moved, new) = std::thread::scope(|scope| -> Result<_> {
        scope.spawn(|| ask_all_the_time(client, &over, &asked));
        let all = || {
            let mut lasting = begin(client)?;
            let stop = script.line("stop");
            let args = ["cutover", "--drain", "1", "--stop", &stop];
            let cutover = start(&setup, &args)?;
            script.runs("stop")?;
            go_on(&mut lasting, PATIENCE)?;
            drop((old, lasting));
            script.is_done("stop")?;
            // Nobody is delivered before somebody is there.
            let stopped = || cutover.stdout().contains("has ended well").then_some(());
            poll_until(CUTOVER, PAUSE, stopped).expect("it says so");
            std::thread::sleep(Duration::from_millis(700));
            assert_eq!(modes(&setup)?, ["held", "held"]);
            let new = Services::new(&lab)?;
            let said = cutover.wait(CUTOVER)?;
            assert!(said.status.success(), "{said:?}");
            for step in [
                "check", "hold", "drain", "stop", "listen", "deliver", "watch", "over",
            ] {
                let is_it = |line: &str| line.split_whitespace().nth(2) == Some(step);
                assert!(said.stdout.lines().any(is_it), "{step}: {}", said.stdout);
            }
            let moved = Instant::now();
            std::thread::sleep(Duration::from_millis(200));
            Ok((moved, new))
        };
        let result = all();
        over.store(true, SeqCst);
        result
    })?;
    let asked = asked.into_inner().unwrap_or_else(PoisonError::into_inner);
    let failed: Vec<&String> = asked
        .iter()
        .filter_map(|it| it.server.as_ref().err())
        .collect();
    assert!(failed.is_empty(), "{failed:?} of {}", asked.len());
    let late = asked.iter().filter(|it| it.begun > moved);
    let servers: Vec<&IpAddr> = late.filter_map(|it| it.server.as_ref().ok()).collect();
    let there = ENDS.map(|it| it.1);
    assert!(
        !servers.is_empty() && servers.iter().all(|it| there.contains(it)),
        "{servers:?}"
    );
    assert_eq!(modes(&setup)?, ["moved", "moved"]);
    // Again is no more than that.
    let said = run(&setup, &["cutover", "--json"])?;
    let line: serde_json::Value = serde_json::from_str(said.stdout.trim()).expect("it is JSON");
    assert_eq!(line["text"], "all of it has moved already");
    drop(new);
    daemons.terminate()
}

#[test]
fn a_cutover_that_fails_goes_back() -> Result {
    let lab = Lab::new()?;
    let setup = before(&lab)?;
    let _old = Services::old(&lab)?;
    let mut daemons = setup.start_both()?;
    let script = Script {
        dir: lab.dir().into(),
    };
    let cutover = ["cutover", "--drain", "0", "--within", "5"];

    // Nothing listens on the new server, which refuses whoever is delivered: a client that waits
    // is answered here in the end, if it tries again.
    let asks = std::thread::scope(|scope| -> Result<_> {
        let restart = script.line("restart");
        let more = ["--stop", "true", "--restart", &restart];
        let fails_there = start(&setup, &[&cutover[..], &more].concat())?;
        let client = lab.client();
        let held = || (modes(&setup).ok()?[0] == "held").then_some(());
        poll_until(CUTOVER, PAUSE, held).expect("it holds");
        let asks = scope.spawn(move || client.probe_tcp(MOVED, TIMEOUT));
        script.runs("restart")?;
        assert_eq!(
            modes(&setup)?,
            ["held", "held"],
            "until the old service is there again"
        );
        script.is_done("restart")?;
        fails(&setup, fails_there, "new server")?;
        Ok(asks.join())
    })?;
    asks.expect("the client does not panic")?;
    lab.client().get(MOVED)?.is_answered_by(MOVED)?;

    // The daemon here crashes, and is started again.
    let stops = script.line("crash");
    let crashes = start(&setup, &[&cutover[..], &["--stop", &stops]].concat())?;
    script.runs("crash")?;
    daemons.old.kill()?;
    daemons.old = setup.start(Role::Old)?;
    daemons.old.wait_until_up()?;
    fails(&setup, crashes, "the daemon here does not answer any more")?;

    // The command itself is killed: the hold lasts until its end, and others may end it.
    let stops = script.line("killed");
    let killed = start(&setup, &[&cutover[..], &["--stop", &stops]].concat())?;
    script.runs("killed")?;
    killed.signal(Signal::KILL)?;
    killed.wait(CUTOVER)?;
    script.is_done("killed")?;
    let status = setup.status(Role::Old)?;
    let held = &status.tunnel()["modes"][0];
    assert_eq!(
        (&held["mode"], &held["then"]),
        (&"held".into(), &"here".into()),
        "{held}"
    );
    assert!(held["held_s"].as_u64() <= Some(20), "{held}");
    run(&setup, &["back"])?;

    // The tunnel is gone: before it is refused, later it goes back.
    daemons.new.terminate()?;
    daemons.old.wait_for_state("down", PATIENCE)?;
    let said = setup.run(Role::Old, &cutover)?;
    assert_eq!(said.status.code(), Some(1), "{said:?}");
    assert!(
        said.stderr.contains("the tunnel to the new server"),
        "{said:?}"
    );
    let said = run(&setup, &["move", FAMILIES[0]])?;
    assert!(said.stderr.contains("does not answer"), "{said:?}");
    daemons.old.terminate().map(drop)
}

#[test]
fn what_check_finds_ends_a_cutover_before_anything_changes() -> Result {
    let lab = Lab::new()?;
    // The new server accepts something else.
    let setup = before(&lab)?.args(Role::New, &["--accept", "192.0.2.9"]);
    let _old = Services::old(&lab)?;
    let daemons = setup.start_both()?;
    let said = setup.run(Role::Old, &["cutover", "--drain", "0"])?;
    assert_eq!(said.status.code(), Some(1), "{said:?}");
    let why = "nothing has changed, since `ipmoved check` fails: accept";
    assert!(said.stderr.contains(why), "{said:?}");
    assert!(said.stdout.contains("check    fail: accept"), "{said:?}");
    assert_eq!(modes(&setup)?, ["here", "here"]);
    daemons.terminate()
}

#[test]
fn a_cut_leaves_nothing_here() -> Result {
    let lab = Lab::new()?;
    let setup = before(&lab)?;
    let _services = (Services::old(&lab)?, Services::new(&lab)?);
    let daemons = setup.start_both()?;
    let mut lasting = begin(lab.client())?;
    go_on(&mut lasting, PATIENCE)?;
    let live = || -> Result<Vec<Option<u64>>> {
        let status = setup.status(Role::Old)?;
        let modes = [0, 1].map(|at| status.tunnel()["modes"][at]["here_tcp"].as_u64());
        Ok(modes.into())
    };
    assert_eq!(live()?, [Some(CONVERSATIONS as u64); 2]);
    run(&setup, &["move"])?;
    go_on(&mut lasting, PATIENCE)?;
    let said = run(&setup, &["move", "--cut"])?;
    assert!(
        said.stdout
            .contains("ended: 40 conversations of this server"),
        "{said:?}"
    );
    assert_eq!(live()?, [Some(0); 2]);
    for conversation in &mut lasting {
        // A reset has come, so that no client waits in vain.
        let result = conversation.exchange(b"gone", PATIENCE);
        assert!(result.is_err());
    }
    for (moved, new) in ENDS {
        lab.client().get(moved)?.is_answered_by(new)?;
    }
    daemons.terminate()
}
