//! What `--dry-run` tells is what a daemon then changes and undoes: its commands, typed in order,
//! leave the kernel as the daemon does, and each of them changes something.
//!
//! ```text
//!  before ──► --dry-run ──► before
//!    ├──► its commands ──► after ──► its commands at the exit ──► before
//!    └──► the daemon ────► after ──► SIGTERM ───────────────────► before
//! ```

use std::collections::BTreeSet;
use std::process::Command;
use std::time::Duration;

use ipmoved::internals::{Role, TunOptions, TunQueue};
use ipmoved::lab::daemon::{COMMAND_TIMEOUT, UP_TIMEOUT};
use ipmoved::lab::topology::UPLINK;
use ipmoved::lab::{DaemonSetup, Lab, LabError, Namespace, Snapshot, poll_until};
use serde_json::Value;

use crate::stage::{FAMILIES, Result, setup};

/// A filter with a program that says nothing, in the place of one of ours: the latter is in no
/// file.
const NOTHING: &str = "bytecode '1,6 0 0 4294967295'";

/// The interface of these daemons.
const TUN: &str = "ipmoved0";

/// What a dry run told.
struct Told(Value);

impl Told {
    /// Asks on one server.
    fn by(setup: &DaemonSetup<'_>, role: Role, args: &[String]) -> Result<Self> {
        let mut command = setup.command();
        command.args(args).args(["--dry-run", "--json"]);
        let said = setup.host(role).output(command, COMMAND_TIMEOUT)?;
        assert!(said.status.success(), "{said:?}");
        let told = serde_json::from_str(&said.stdout);
        told.map(Self)
            .map_err(|error| LabError::unexpected(format!("{error}: {}", said.stdout)))
    }

    /// The commands of these lists, in order.
    fn commands(&self, lists: &[&str]) -> Vec<String> {
        let lists = lists.iter().flat_map(|list| self.0[*list].as_array());
        let command = |step: &Value| step["command"].as_str().unwrap_or_default().to_owned();
        lists.flatten().map(command).collect()
    }

    /// The places of filters, with the names of their programs.
    fn filters(&self) -> BTreeSet<String> {
        let all = self.commands(&["would_do"]).into_iter();
        let filters = all.filter(|command| command.starts_with("tc filter"));
        filters.map(|command| place(&command)).collect()
    }
}

/// `DEV SIDE PREF HANDLE NAME` of a command that adds a filter.
fn place(command: &str) -> String {
    let words: Vec<&str> = command.split(' ').collect();
    let after = |word| {
        let at = words.iter().position(|it| *it == word);
        at.and_then(|at| words.get(at + 1)).copied().unwrap_or("?")
    };
    let side = ["ingress", "egress"]
        .into_iter()
        .find(|side| words.contains(side))
        .unwrap_or("?");
    let name = after("object-pinned").rsplit('/').next().unwrap_or("?");
    let (dev, pref, handle) = (after("dev"), after("pref"), after("handle"));
    // As a shell takes it: what is within quotes, and a quote between two of those.
    let parts = dev.split(r"'\''").map(|part| part.trim_matches('\''));
    let dev = parts.collect::<Vec<_>>().join("'");
    let handle = handle.trim_start_matches("0x");
    format!("{dev} {side} {pref} {handle} {name}")
}

/// The same of each filter in a snapshot that has a program of ours.
fn places(snapshot: &Snapshot) -> BTreeSet<String> {
    let text = snapshot.to_string();
    let lines = text.lines().filter_map(|line| line.strip_prefix("filter "));
    let place = |line: &str| {
        let (at, rest) = line.split_once(" Filter {")?;
        let field = |name: &str| {
            let value = rest.split_once(&format!("{name}: "))?.1;
            value.split([',', ' ']).next()
        };
        let name = field("name")?
            .strip_prefix("Some(\"")?
            .trim_end_matches("\")");
        let handle: u32 = field("handle")?.parse().ok()?;
        let ours = name.starts_with("ipmoved_");
        ours.then(|| Some(format!("{at} {} {handle:x} {name}", field("priority")?)))?
    };
    let all: BTreeSet<String> = lines.filter_map(place).collect();
    // The older ingress qdisc lists what it has on either side.
    let is_twice = |place: &&String| {
        let other = place.replace(" egress ", " ingress ");
        other != **place && all.contains(&other)
    };
    all.iter()
        .filter(|place| !is_twice(place))
        .cloned()
        .collect()
}

/// Types a command on a host.
fn type_in(host: &Namespace, line: &str) -> Result {
    let line = match line.split_once("object-pinned ") {
        Some((place, _path)) => format!("{place}{NOTHING}"),
        None => line.to_owned(),
    };
    let mut shell = Command::new("sh");
    shell.args(["-ec", &line]);
    let said = host.output(shell, COMMAND_TIMEOUT)?;
    if said.status.success() {
        return Ok(());
    }
    let said = said.stderr;
    Err(LabError::unexpected(format!("`{line}` failed: {said}")))
}

/// A snapshot, and the queues of the TUN that is in it.
type Queued = (Snapshot, Option<Vec<TunQueue>>);

/// Types commands in order. Each of them has to change something. The interface that the first one
/// makes is opened as a daemon with so many lanes does: without that it has no carrier.
fn type_all(host: &Namespace, lines: &[String], lanes: usize) -> Result<Queued> {
    let mut before = Snapshot::of(host)?;
    let mut queues = None;
    for line in lines {
        type_in(host, line)?;
        if line.starts_with("ip tuntap add ") {
            queues = Some(host.run(|| {
                let opened = TunQueue::create(TUN, lanes, TunOptions::default());
                let opened = opened.map(|(queues, _)| queues);
                opened.map_err(|error| LabError::unexpected(error.to_string()))
            })?);
        }
        let after = Snapshot::of(host)?;
        assert!(after != before, "`{line}` changes nothing");
        before = after;
    }
    // The kernel's own routes to a new IPv6 address come a little later.
    loop {
        std::thread::sleep(Duration::from_millis(200));
        let after = Snapshot::of(host)?;
        if after == before {
            return Ok((before, queues));
        }
        before = after;
    }
}

/// What there is beyond, or instead of, what was before. What makes one TUN another one, and one
/// program, is left out.
fn changed(before: &Snapshot, after: &Snapshot) -> BTreeSet<String> {
    let lines = |snapshot: &Snapshot| -> BTreeSet<String> {
        snapshot.to_string().lines().map(str::to_owned).collect()
    };
    let index = lines(after).iter().find_map(|line| {
        let rest = line.strip_prefix("link ")?;
        let (index, rest) = rest.split_once(':')?;
        rest.contains(&format!("{TUN:?}")).then(|| index.to_owned())
    });
    let index = index.unwrap_or_default();
    let (known, all) = (lines(before), lines(after));
    let gone = known.difference(&all).map(|line| format!("- {line}"));
    let new = all.difference(&known).map(|line| format!("+ {line}"));
    gone.chain(new)
        .filter(|line| !line.starts_with(&format!("+ link {index}:")))
        .map(|line| {
            let line = line.replace(&format!("Oif({index})"), "Oif(TUN)");
            match line.split_once(", name: ") {
                Some((filter, _)) if line.starts_with("+ filter") => filter.to_owned(),
                _ => line,
            }
        })
        .collect()
}

/// The TUN as ip(8) shows it.
fn tun(host: &Namespace) -> Result<Value> {
    let mut show = Command::new("ip");
    show.args(["-details", "-json", "link", "show", "dev", TUN]);
    let said = host.output(show, COMMAND_TIMEOUT)?;
    let shown: Value = serde_json::from_str(&said.stdout)
        .map_err(|error| LabError::unexpected(format!("{error}: {said:?}")))?;
    let of = |names: &[&str], all: &Value| -> Value {
        let one = |name: &&str| ((*name).to_owned(), all[*name].clone());
        names
            .iter()
            .map(one)
            .collect::<serde_json::Map<_, _>>()
            .into()
    };
    let link = &shown[0];
    Ok(Value::Array(vec![
        of(
            &[
                "mtu",
                "txqlen",
                "link_type",
                "num_tx_queues",
                "inet6_addr_gen_mode",
            ],
            link,
        ),
        of(
            &["type", "pi", "vnet_hdr", "multi_queue"],
            &link["linkinfo"]["info_data"],
        ),
        link["flags"].clone(),
    ]))
}

/// A server before and after its daemon's commands were typed.
struct Typed {
    told: Told,
    before: Snapshot,
    after: Snapshot,
    tun: Value,
}

/// Asks what would be changed, and has it typed and undone.
fn typed(setup: &DaemonSetup<'_>, role: Role, args: &[String]) -> Result<Typed> {
    let host = setup.host(role);
    let before = Snapshot::of(host)?;
    let told = Told::by(setup, role, args)?;
    Snapshot::of(host)?.is_same_as(&before)?;
    for dir in ["run", "state"] {
        assert!(!setup.lab().dir().join(dir).exists(), "{dir} was made");
    }
    let lanes = args.iter().position(|arg| arg == "--lanes");
    let lanes = lanes.and_then(|at| args.get(at + 1)?.parse().ok());
    let lines = told.commands(&["would_do", "when_moved"]);
    let (after, queues) = type_all(host, &lines, lanes.unwrap_or(1))?;
    let tun = tun(host)?;
    let (end, _) = type_all(host, &told.commands(&["at_exit"]), 0)?;
    end.is_same_as(&before)?;
    drop(queues);
    Ok(Typed {
        told,
        before,
        after,
        tun,
    })
}

/// Waits until the daemon of that host has changed what was typed, and nothing else.
fn is_changed(host: &Namespace, typed: &Typed) -> Result {
    let wanted = changed(&typed.before, &typed.after);
    let mut last = BTreeSet::new();
    let is_so = poll_until(UP_TIMEOUT, Duration::from_millis(50), || {
        last = changed(&typed.before, &Snapshot::of(host).ok()?);
        (last == wanted).then_some(())
    });
    let lines = |some: &BTreeSet<String>, other: &BTreeSet<String>| {
        let lines: Vec<String> = some.difference(other).cloned().collect();
        lines.join("\n")
    };
    assert!(
        is_so.is_some(),
        "on the {}, told only:\n{}\nmade only:\n{}",
        host.name(),
        lines(&wanted, &last),
        lines(&last, &wanted)
    );
    assert_eq!(places(&Snapshot::of(host)?), typed.told.filters());
    assert_eq!(tun(host)?, typed.tun);
    Ok(())
}

/// Compares on both servers.
fn compare(setup: &DaemonSetup<'_>) -> Result<[Typed; 2]> {
    let roles = [Role::Old, Role::New];
    let [old, new] = roles.map(|role| typed(setup, role, &setup.daemon_args(role)));
    let both = [old?, new?];
    let daemons = setup.start_both()?;
    for (role, typed) in roles.into_iter().zip(&both) {
        is_changed(setup.host(role), typed)?;
    }
    // Whoever asks meanwhile is told as whoever starts a second one.
    let mut again = setup.daemon_args(Role::Old);
    again.push("--dry-run".into());
    let again: Vec<&str> = again.iter().map(String::as_str).collect();
    let refused = setup.run(Role::Old, &again)?;
    assert_eq!(refused.status.code(), Some(4), "{refused:?}");
    daemons.terminate()?;
    for (role, typed) in roles.into_iter().zip(&both) {
        Snapshot::of(setup.host(role))?.is_same_as(&typed.before)?;
    }
    std::fs::remove_dir_all(setup.lab().dir().join("state"))
        .map_err(|error| LabError::unexpected(error.to_string()))?;
    Ok(both)
}

#[test]
fn what_is_told_is_what_is_changed_and_undone() -> Result {
    let lab = Lab::new()?;
    // Somebody else's filter stands first, somebody else's qdisc is there, and a name needs care.
    type_in(
        lab.old_server(),
        &format!("tc qdisc add dev {UPLINK} clsact"),
    )?;
    type_in(
        lab.old_server(),
        &format!("tc filter add dev {UPLINK} ingress pref 7 protocol all bpf {NOTHING}"),
    )?;
    for host in [lab.old_server(), lab.new_server()] {
        lab.add_link(host, "a.b'c", &[])?;
    }
    type_in(lab.old_server(), "tc qdisc add dev \"a.b'c\" ingress")?;
    // The TUN begins with such a setting.
    let forwards = [("ipv6/conf/default/forwarding", "1")];
    lab.new_server().set_sysctls(&forwards)?;

    let all = setup(&lab)?.moves(&FAMILIES).accept_what_moves();
    let keeps = all
        .clone()
        .args(Role::Old, &["--lanes", "2"])
        .args(Role::New, &["--deliver-to", "keep", "--lanes", "1"]);
    let [old, new] = compare(&keeps)?;
    let old = old.told.commands(&["would_do"]).join("\n");
    assert!(
        old.contains(&format!("dev {UPLINK} ingress protocol all pref 6 ")),
        "{old}"
    );
    let new = new.told.commands(&["when_moved"]).join("\n");
    assert!(
        new.contains("'net.ipv4.conf.a/b'\\''c.arp_ignore=3'"),
        "{new}"
    );

    let outgoing = all
        .args(Role::New, &["--outgoing", "--lanes", "2"])
        .args(Role::Old, &["--allow-outgoing", "--lanes", "1"]);
    compare(&outgoing).map(drop)
}

#[test]
fn a_server_without_default_routes_is_told_of_those_it_gets() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?.args(Role::New, &["--uplink", UPLINK, "--lanes", "1"]);
    let setup = setup.args(Role::Old, &["--lanes", "1"]);
    for family in ["-4", "-6"] {
        type_in(lab.new_server(), &format!("ip {family} route del default"))?;
    }
    type_in(
        lab.new_server(),
        "ip route add 192.0.2.0/24 via 198.51.100.254",
    )?;
    let [_, new] = compare(&setup)?;
    let routes = new.told.commands(&["would_do"]).into_iter();
    let routes = routes.filter(|line| line.contains("route add default dev ipmoved0"));
    assert_eq!(routes.count(), 2);
    Ok(())
}

#[test]
fn what_is_told_of_mode_nat_is_what_is_changed_and_undone() -> Result {
    let lab = Lab::new()?;
    let ports = [("ipv4/ip_local_reserved_ports", "8080")];
    lab.old_server().set_sysctls(&ports)?;
    let setup = setup(&lab)?;
    let args = ["--move", FAMILIES[0], "--to", "198.51.100.2"];
    let words: Vec<String> = ["nat"]
        .iter()
        .chain(&args)
        .map(ToString::to_string)
        .collect();
    let typed = typed(&setup, Role::Old, &words)?;
    let daemon = setup.start_nat(&args)?;
    is_changed(lab.old_server(), &typed)?;
    daemon.terminate()?;
    Snapshot::of(lab.old_server())?.is_same_as(&typed.before)
}

#[test]
fn what_a_killed_daemon_left_is_told_as_what_the_next_start_does_with_it() -> Result {
    let lab = Lab::new()?;
    let setup = setup(&lab)?.moves(&FAMILIES).accept_what_moves();
    let keeps = setup.clone().args(Role::New, &["--deliver-to", "keep"]);
    let daemons = keeps.start_both()?;
    daemons.new.kill()?;
    let left = Snapshot::of(lab.new_server())?;
    let told = Told::by(&setup, Role::New, &setup.daemon_args(Role::New))?;
    Snapshot::of(lab.new_server())?.is_same_as(&left)?;
    let commands = told.commands(&["would_do"]).join("\n");
    assert!(
        commands.contains("tc filter replace dev eth0 egress "),
        "{commands}"
    );
    assert!(!commands.contains("tc filter add dev eth0 "), "{commands}");
    assert!(
        commands.contains("ip address del 192.0.2.5/32 dev lo"),
        "{commands}"
    );
    assert!(
        commands.contains("net.ipv4.conf.eth0.arp_ignore=0"),
        "{commands}"
    );
    // It has changed nothing: the next start finds what was there.
    let new = setup.start(Role::New)?;
    let gone = poll_until(UP_TIMEOUT, Duration::from_millis(50), || {
        let now = Snapshot::of(lab.new_server()).ok()?.to_string();
        now.contains("sysctl ipv4/conf/eth0/arp_ignore: 0")
            .then_some(())
    });
    assert!(gone.is_some());
    new.terminate().map(drop)
}
