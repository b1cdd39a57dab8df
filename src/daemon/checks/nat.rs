//! `ipmoved nat --check`: the old server alone, which has no peer to ask.
//!
//! Owns what is looked at where both addresses are translated: as of the old server of a tunnel,
//! and whether the new server's application answers this server, which is all that it will see.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use super::moved;
use super::words::{Words, quoted};
use super::{Server, host, links, managers, running};
use crate::daemon::login;
use crate::daemon::nat::{Unfit, judge_servers};
use crate::flow::nat::PORTS;
use crate::kernel::masquerade::{self, Towards};
use crate::kernel::netfilter::Ruleset;
use crate::kernel::netlink::{Link, Netlink};
use crate::kernel::plan::PlanError;
use crate::kernel::{Desired, processes};
use crate::model::finding::{Finding, Findings, Grade};
use crate::model::moved::{Move, TCP};
use crate::model::peer::Role;
use crate::settings::config::NatSettings;
use crate::settings::values::NewServer;

/// Most ports of the new server that are tried.
const MOST: usize = 8;

/// How long a port may take to answer: a SYN is sent again after a second.
const ANSWERS_WITHIN: Duration = Duration::from_secs(3);

/// Looks at everything. Nothing is changed; the ports of the application are connected to.
pub fn look(settings: &NatSettings, words: &Words, runtime_dir: &Path) -> Findings {
    let privileges = host::privileges(words);
    let may = privileges.result == Grade::Ok;
    let mut found = vec![privileges, host::kernel()];
    let runs = running(runtime_dir);
    match &runs {
        Some(status) => found.push(super::runs_here(status)),
        None => found.extend(host::left(runtime_dir)),
    }
    if may {
        let plan = |netlink: &Netlink, tun: &Link| plan(settings, netlink, tun);
        found.extend(host::levers(&settings.tun, 1, words, plan));
    }
    match Server::read(Vec::new()) {
        Ok(server) => found.extend(of_server(&server, settings, words, runs.is_some())),
        Err(error) => found.push(super::unread(&error)),
    }
    Findings::of(found)
}

/// Everything that is put on interfaces, on the one that is there.
fn plan(settings: &NatSettings, netlink: &Netlink, tun: &Link) -> Result<Vec<Desired>, PlanError> {
    let towards: Vec<Towards> = (settings.to.iter())
        .map(|to| Towards {
            to: to.ip,
            own: to.ip,
            link: tun.clone(),
        })
        .collect();
    let plan = masquerade::plan(netlink, &settings.moves, tun, &towards, tun, &PORTS)?;
    Ok(plan.first.into_iter().chain(plan.captures).collect())
}

fn of_server(server: &Server, settings: &NatSettings, words: &Words, runs: bool) -> Vec<Finding> {
    let netlink = &server.netlink;
    let mut found = Vec::new();
    if !runs {
        found.extend(host::name(netlink, &settings.tun, words));
    }
    let moves = &settings.moves;
    let towards: Vec<IpAddr> = settings.to.iter().map(|to| to.ip).collect();
    let named = settings.uplink.as_deref();
    let (uplinks, of_uplinks) =
        links::uplinks(netlink, named, moves, &towards, &settings.tun, words);
    found.extend(of_uplinks);
    if let Some(uplink) = uplinks.as_ref().and_then(|them| them.first()) {
        let carriers = std::slice::from_ref(uplink);
        found.extend(links::filters(
            netlink,
            Role::Old,
            carriers,
            uplinks.as_ref(),
        ));
    }
    found.extend(moved::addresses(
        moves,
        &server.place(uplinks.as_ref()),
        words,
    ));
    found.extend(moved::ways_out(netlink, moves, &server.held));
    found.extend(moved::login(login::ends(), moves, &server.held));
    let (fit, unfit) = judge_servers(netlink, settings, runs);
    found.extend(unfit.into_iter().map(refused));
    found.extend(fit.iter().map(|it| {
        let text = format!("clients' packets go by {}, from {}", it.link.name, it.own);
        Finding::ok("way", it.to, text)
    }));
    let fit: Vec<IpAddr> = fit.iter().map(|it| it.to).collect();
    found.extend(answers(&ends(moves, &settings.to, &fit)));
    let programs = processes::names();
    let rules = Ruleset::read();
    found.extend(managers::here(
        Role::Old,
        &programs,
        &rules,
        &server.natures,
    ));
    found
}

/// What a start would refuse.
fn refused(unfit: Unfit) -> Finding {
    let Unfit { to, why } = unfit;
    match to {
        Some(to) => Finding::fail("way", to, why, format!("ip route get {to}")),
        None => {
            let (first, last) = (PORTS.start(), PORTS.end());
            let remedy = format!("ss -anp '( sport >= :{first} and sport <= :{last} )'");
            Finding::fail("port", format!("ports {first}-{last}"), why, remedy)
        }
    }
}

/// Where the application is to answer TCP, as far as the moves name ports.
fn ends(moves: &[Move], to: &[NewServer], fit: &[IpAddr]) -> Vec<SocketAddr> {
    let mut ends = Vec::new();
    for moved in moves {
        let of_family = |it: &&NewServer| it.ip.is_ipv4() == moved.prefix.is_ipv4();
        let Some(to) = to.iter().find(of_family).filter(|it| fit.contains(&it.ip)) else {
            continue;
        };
        let ports = moved.ports.iter().map(|range| *range.start());
        for port in ports.filter(|&port| moved.takes(TCP, Some(port))) {
            ends.push(SocketAddr::new(to.ip, to.port.unwrap_or(port)));
        }
    }
    ends.sort_unstable();
    ends.dedup();
    ends.truncate(MOST);
    ends
}

/// Tries them, all at a time.
fn answers(ends: &[SocketAddr]) -> Vec<Finding> {
    std::thread::scope(|scope| {
        let tries = ends.iter().map(|&end| {
            let connects = move || TcpStream::connect_timeout(&end, ANSWERS_WITHIN).map(drop);
            (end, scope.spawn(connects))
        });
        let tries: Vec<_> = tries.collect();
        let crashed = |_| Err(io::Error::other("the try crashed"));
        let each = |(end, tried): (SocketAddr, std::thread::ScopedJoinHandle<'_, _>)| {
            judge(end, tried.join().unwrap_or_else(crashed))
        };
        tries.into_iter().map(each).collect()
    })
}

fn judge(end: SocketAddr, connected: io::Result<()>) -> Finding {
    const NAME: &str = "listener";
    let (object, ip, port) = (format!("{end}/tcp"), end.ip(), end.port());
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "others are told in the kernel's words"
    )]
    match connected {
        Ok(()) => Finding::ok(NAME, object, "answers this server"),
        Err(error) => match error.kind() {
            ErrorKind::ConnectionRefused => {
                let text = "nothing listens there for this server: start the application, or let \
                            it listen on that address";
                let show = quoted(&format!("ss -ltn 'sport = :{port}'"));
                Finding::warn(NAME, object, text, format!("ssh {ip} {show}"))
            }
            ErrorKind::TimedOut | ErrorKind::WouldBlock => {
                let text = "does not answer this server: its firewall has to let this server in, \
                            which clients will come from";
                Finding::warn(NAME, object, text, format!("ssh {ip} nft list ruleset"))
            }
            _ => {
                let text = format!("cannot be reached: {error}");
                Finding::warn(NAME, object, text, format!("ip route get {ip}"))
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_tried_is_where_clients_will_be_sent() {
        let moves = [
            "192.0.2.5:80,443/tcp",
            "192.0.2.6:80",
            "192.0.2.7:53/udp",
            "[2001:db8::5]:80",
            "192.0.2.8",
        ];
        let moves = moves.map(|text| text.parse().unwrap());
        let ends = |to: &[&str], fit: &[&str]| -> Vec<String> {
            let to: Vec<NewServer> = to.iter().map(|text| text.parse().unwrap()).collect();
            let fit: Vec<IpAddr> = fit.iter().map(|text| text.parse().unwrap()).collect();
            let all = ends(&moves, &to, &fit);
            all.iter().map(ToString::to_string).collect()
        };
        let (v4, v6) = ("198.51.100.2", "2001:db8:b::2");
        assert_eq!(
            ends(&[v4, v6], &[v4, v6]),
            ["198.51.100.2:80", "198.51.100.2:443", "[2001:db8:b::2]:80"]
        );
        assert_eq!(ends(&["198.51.100.2:8080"], &[v4]), ["198.51.100.2:8080"]);
        assert!(ends(&[v4], &[]).is_empty());
    }

    #[test]
    fn why_it_does_not_answer_is_told_apart() {
        let end = "198.51.100.2:80".parse().unwrap();
        for (kind, says) in [
            (ErrorKind::ConnectionRefused, "nothing listens"),
            (ErrorKind::TimedOut, "firewall"),
            (ErrorKind::HostUnreachable, "cannot be reached"),
        ] {
            let finding = judge(end, Err(kind.into()));
            assert_eq!(finding.result, Grade::Warn);
            assert!(finding.text.contains(says), "{finding:?}");
            assert!(finding.remedy.is_some());
        }
        assert_eq!(judge(end, Ok(())).result, Grade::Ok);
    }
}
