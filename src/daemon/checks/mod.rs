//! Whether it will work on this server, and what to do if not.
//!
//! ```text
//!   host        what the system lets ipmoved do
//!   links       uplinks, the way to the peer, what others have put on interfaces
//!   moved       the old server: where what has moved is, and what goes with it
//!   delivered   the new server: where it is delivered, and who is there
//!   whole       the same of an address that moves with all its ports
//!   firewall    what the firewall does with the tunnel and with clients
//!   managers    programs that manage firewalls, links and routes
//!   nat         `ipmoved nat`, which has no peer
//!   probe, peer asks the peer, and what is said of the answer
//!   words       what to type instead
//! ```
//!
//! Owns what is looked at, in which order, by `ipmoved check` and at the daemon's start. Nothing is
//! changed by it. What a daemon that runs already has made is not held against it.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::held::Held;
use super::login;
use super::setup::{Uplinks, resolve};
use super::status_socket;
use super::ways_back::{Said, WaysBack};
use crate::channel::session::Offer;
use crate::kernel::netfilter::Ruleset;
use crate::kernel::netlink::{Address, Link, Nature, Netlink, NetlinkError};
use crate::kernel::plan::PUBLIC;
use crate::kernel::{namespace_dir, processes};
use crate::model::finding::{Finding, Findings, Grade};
use crate::model::moved::Move;
use crate::model::peer::Role;
use crate::model::runtime::STATUS_SOCKET;
use crate::model::status::{State, Status, TunnelStatus};
use crate::settings::config::{Config, ConfigError, KEY_IS_SEEN, PeerConfig};

mod delivered;
mod firewall;
mod host;
mod links;
mod managers;
mod moved;
mod nat;
mod peer;
mod probe;
mod whole;
mod words;

pub use nat::look as look_nat;
pub use words::Words;
pub(super) use words::quoted;

use delivered::Delivered;
use moved::Place;

/// The file that the systemd unit reads.
const SETTINGS: &str = "/etc/ipmoved/ipmoved.toml";

/// An index that no interface has: the TUN is not there yet.
const NO_LINK: u32 = 0;

/// What is to be checked.
pub struct Given<'a> {
    /// The daemon's settings.
    pub config: &'a Config,
    /// What was typed.
    pub words: Words,
    /// Where its files are.
    pub runtime_dir: &'a Path,
    /// Where its key is, if that is a file.
    pub psk_file: Option<PathBuf>,
    /// The key could be read: without it no peer is asked.
    pub has_key: bool,
}

/// What can be said without settings: what is wrong with them.
pub fn without_settings(words: &Words, mistake: &ConfigError) -> Findings {
    let remedy = match mistake.wants_root() {
        true => format!("sudo {}", words.again()),
        // Those of the service, for whoever names none.
        false if words.are_bare() && Path::new(SETTINGS).exists() => {
            words.with("config", &[SETTINGS.to_owned()])
        }
        false => "ipmoved --help".to_owned(),
    };
    Findings::of(vec![
        Finding::fail("settings", "what was given", mistake.to_string(), remedy),
        host::privileges(words),
        host::kernel(),
    ])
}

/// Looks at everything.
pub fn look(given: &Given<'_>) -> Findings {
    let Given { config, words, .. } = given;
    let privileges = host::privileges(words);
    let may = privileges.result == Grade::Ok;
    let mut found = vec![privileges, host::kernel()];
    found.extend(config.warnings.iter().map(|it| warned(it, words)));
    let running = running(given.runtime_dir);
    match &running {
        Some(status) => found.push(runs_here(status)),
        None => found.extend(host::left(given.runtime_dir)),
    }
    if may {
        let plan = |netlink: &Netlink, tun: &Link| host::plan(config, netlink, tun);
        found.extend(host::levers(&config.tun, config.lanes, words, plan));
    }
    let endpoint = |peer: &PeerConfig| Some(resolve(peer.endpoint.as_ref()?, 0));
    match Server::read(config.peers.iter().map(endpoint).collect()) {
        Ok(server) => found.extend(server.checks(given, running.as_ref(), may)),
        Err(error) => found.push(unread(&error)),
    }
    Findings::of(found)
}

/// What is said of settings that can be, and should not.
fn warned(warning: &str, words: &Words) -> Finding {
    // The end of some is a command already.
    let (text, remedy) = match warning.split_once(": chmod ") {
        Some((text, file)) => (text, format!("chmod {file}")),
        None if warning == KEY_IS_SEEN => {
            let file = ["--psk-file", "/etc/ipmoved/psk"].map(str::to_owned);
            (warning, words.instead_of("psk", file))
        }
        None if words.hold("--outgoing") => {
            let example = ["192.0.2.5".to_owned()];
            (warning, words.with("accept", &example))
        }
        None => (warning, "ipmoved check --help".to_owned()),
    };
    Finding::warn("settings", "what was given", text, remedy)
}

/// That a daemon runs here.
fn runs_here(status: &Status) -> Finding {
    let text = format!(
        "runs here (pid {}): what it has made is not held against it",
        status.pid
    );
    Finding::ok("daemon", format!("ipmoved {}", status.version), text)
}

/// That this server's network is not known.
fn unread(error: &NetlinkError) -> Finding {
    let text = format!("cannot be asked for its network: {error}");
    Finding::fail("kernel", "this server", text, "ip link")
}

/// What an administrator has to know as the daemon starts, beside what was refused: a line each.
pub(super) fn at_start(
    config: &Config,
    words: &Words,
    endpoints: &[Option<SocketAddr>],
    uplinks: &Uplinks,
) -> Vec<String> {
    let endpoints = endpoints.iter().map(|it| it.map(Ok)).collect();
    let Ok(server) = Server::read(endpoints) else {
        return Vec::new();
    };
    let rules = Ruleset::read();
    let mut found = server.tunnels(config, &rules, Some(uplinks));
    let tun = server.tun(config);
    let named = config.uplink.as_deref();
    let carriers = links::carriers(&server.netlink, config.role, named, &tun, Some(uplinks));
    match config.role {
        Role::Old => {
            let moves = moves(config);
            found.extend(moved::ways_out(&server.netlink, &moves, &server.held));
            found.extend(moved::login(login::ends(), &moves, &server.held));
        }
        Role::New => {
            found.extend(server.delivered(config, words, None, &rules, &carriers, uplinks))
        }
    }
    let known_later = |it: &Finding| !matches!(it.name, "listener" | "forwarding" | "accept");
    let bad = found.into_iter().filter(|it| it.result > Grade::Ok);
    bad.filter(known_later).map(|it| it.line()).collect()
}

/// What a daemon of this network namespace says, if one runs.
fn running(runtime_dir: &Path) -> Option<Status> {
    let dir = namespace_dir(runtime_dir).ok()?;
    status_socket::ask(&dir.join(STATUS_SOCKET)).ok()
}

/// What has moved away from here.
fn moves(config: &Config) -> Vec<Move> {
    let moves = config.peers.iter().flat_map(|peer| &peer.moves);
    moves.cloned().collect()
}

/// Where each peer is, if its settings say so, or why that is not known.
type Endpoints = Vec<Option<Result<SocketAddr, String>>>;

/// What was read of this server.
struct Server {
    netlink: Netlink,
    links: Vec<Link>,
    natures: Vec<Nature>,
    addresses: Vec<Address>,
    held: Held,
    leased: Vec<IpAddr>,
    /// Where the peers are.
    endpoints: Endpoints,
}

impl Server {
    fn read(endpoints: Endpoints) -> Result<Self, NetlinkError> {
        let netlink = Netlink::new()?;
        let addresses = netlink.addresses()?;
        Ok(Self {
            links: netlink.links()?,
            natures: netlink.natures()?,
            held: Held::new(addresses.clone()),
            leased: netlink.leased()?,
            endpoints,
            addresses,
            netlink,
        })
    }

    /// The TUN, or what stands for it while it is not there.
    fn tun(&self, config: &Config) -> Link {
        let there = self.links.iter().find(|link| link.name == config.tun);
        there.cloned().unwrap_or_else(|| Link {
            index: NO_LINK,
            name: config.tun.clone(),
            mtu: 0,
            up: false,
            loopback: false,
            link_type: libc::ARPHRD_NONE,
            mac: None,
            port: false,
            big_tcp: false,
            to_many: false,
        })
    }

    /// Where the peers are that are known.
    fn known(&self) -> Vec<Option<SocketAddr>> {
        let known = |it: &Option<Result<SocketAddr, String>>| it.clone()?.ok();
        self.endpoints.iter().map(known).collect()
    }

    fn checks(&self, given: &Given<'_>, running: Option<&Status>, may: bool) -> Vec<Finding> {
        let Given { config, words, .. } = given;
        let mut found = Vec::new();
        if running.is_none() {
            found.extend(host::name(&self.netlink, &config.tun, words));
            found.push(host::port(config, words));
        }
        let known = self.known();
        let towards: Vec<IpAddr> = known.iter().flatten().map(SocketAddr::ip).collect();
        let named = config.uplink.as_deref();
        let moves = moves(config);
        let (uplinks, of_uplinks) =
            links::uplinks(&self.netlink, named, &moves, &towards, &config.tun, words);
        found.extend(of_uplinks);
        let tun = self.tun(config);
        let role = config.role;
        let carriers = links::carriers(&self.netlink, role, named, &tun, uplinks.as_ref());
        found.extend(links::filters(
            &self.netlink,
            role,
            &carriers,
            uplinks.as_ref(),
        ));
        let rules = Ruleset::read();
        let place = self.place(uplinks.as_ref());
        match role {
            Role::Old => {
                let local = moved::local_prefixes(&self.netlink);
                let covered = |it: &&Move| !local.iter().any(|all| all.covers(&it.prefix));
                let absent: Vec<Move> = moves.iter().filter(covered).cloned().collect();
                found.extend(moved::addresses(&absent, &place, words));
                found.extend(moved::own(&self.netlink, config, &known, words));
                found.extend(moved::ways_out(&self.netlink, &moves, &self.held));
                if named.is_none() {
                    match WaysBack::look(&self.netlink, &moves, &self.held, tun.index) {
                        Ok(ways) => found.extend(ways.said.iter().map(Said::finding)),
                        Err(error) => {
                            let text = format!("does not tell which way replies leave: {error}");
                            found.push(Finding::warn("route", "kernel", text, words.again()));
                        }
                    }
                }
                found.extend(moved::login(login::ends(), &moves, &self.held));
                // Whoever is not root cannot write there, and the daemon will be.
                if may {
                    found.push(host::state_dir(&config.state_dir));
                }
            }
            Role::New => {
                let of = uplinks.as_ref();
                for (at, peer) in config.peers.iter().enumerate() {
                    let delivered = self.delivered_of(peer, at, running, of);
                    found.extend(delivered::own(&delivered, &place, words));
                }
                if let Some(uplinks) = of {
                    let all = self.delivered(config, words, running, &rules, &carriers, uplinks);
                    found.extend(all);
                }
            }
        }
        if may {
            found.extend(self.tunnels(config, &rules, uplinks.as_ref()));
            let programs = processes::names();
            found.extend(managers::here(role, &programs, &rules, &self.natures));
        }
        found.extend(ask_all(given, running, &self.endpoints));
        found
    }

    fn place<'a>(&'a self, uplinks: Option<&'a Uplinks>) -> Place<'a> {
        Place {
            held: &self.held,
            leased: &self.leased,
            links: &self.links,
            natures: &self.natures,
            uplinks,
        }
    }

    /// Where this server's end of the tunnel to a peer is.
    fn own_end(&self, config: &Config, peer: SocketAddr) -> Option<SocketAddr> {
        let named = config.listen.ip.filter(|ip| !ip.is_unspecified());
        let chosen = || self.netlink.route_get(peer.ip(), None, None).ok()?.prefsrc;
        Some(SocketAddr::new(named.or_else(chosen)?, config.listen.port))
    }

    /// Whether the tunnels have a way, and pass the firewall.
    fn tunnels(&self, config: &Config, rules: &Ruleset, uplinks: Option<&Uplinks>) -> Vec<Finding> {
        let mut found = Vec::new();
        for peer in self.known().into_iter().flatten() {
            found.push(links::way_to_peer(&self.netlink, peer.ip()));
            let Some(own) = self.own_end(config, peer) else {
                continue;
            };
            let oif = self.netlink.route_get(peer.ip(), None, None).ok();
            let oif = oif.and_then(|route| route.oif);
            let by = self.links.iter().find(|link| Some(link.index) == oif);
            let by = by.or(uplinks.and_then(Uplinks::first));
            if let Some(link) = by {
                found.extend(firewall::tunnel(rules, link, own, peer));
            }
        }
        found
    }

    /// What is delivered for a peer.
    fn delivered_of<'a>(
        &self,
        peer: &'a PeerConfig,
        at: usize,
        running: Option<&Status>,
        uplinks: Option<&Uplinks>,
    ) -> Delivered<'a> {
        let accepted = peer
            .accept
            .iter()
            .filter_map(|it| it.to_string().parse().ok());
        let mut moves: Vec<Move> = accepted.collect();
        // What has moved is told by the peer.
        let tunnels = running.map(|status| status.tunnels.as_slice());
        let tunnel = tunnels.and_then(|all| all.get(at));
        let named = tunnel.into_iter().flat_map(|it| &it.moved);
        let named: Vec<Move> = named.filter_map(|it| it.parse().ok()).collect();
        if !named.is_empty() {
            moves = named;
        }
        let known = self.known().get(at).copied().flatten();
        let chosen = known.and_then(|it| self.netlink.route_get(it.ip(), None, None).ok());
        let mut reached_at: Vec<IpAddr> = chosen.and_then(|it| it.prefsrc).into_iter().collect();
        // Of the other family, it is the first of the uplink's.
        let on = |it: &&Address| uplinks.is_some_and(|them| them.contains(it.index));
        for held in self.addresses.iter().filter(on) {
            let local = match held.addr {
                IpAddr::V4(addr) => addr.is_link_local(),
                IpAddr::V6(addr) => addr.is_unicast_link_local(),
            };
            let has = reached_at
                .iter()
                .any(|it| it.is_ipv4() == held.addr.is_ipv4());
            if !local && !has {
                reached_at.push(held.addr);
            }
        }
        if !moves.is_empty() {
            let moves = |v4| moves.iter().any(|it| it.prefix.is_ipv4() == v4);
            reached_at.retain(|it| moves(it.is_ipv4()));
        }
        Delivered {
            config: peer,
            moves,
            reached_at,
        }
    }

    /// Whether clients get to where it is delivered, and somebody is there (new server).
    fn delivered(
        &self,
        config: &Config,
        words: &Words,
        running: Option<&Status>,
        rules: &Ruleset,
        carriers: &[Link],
        uplinks: &Uplinks,
    ) -> Vec<Finding> {
        let mut found = Vec::new();
        let mut addrs = BTreeSet::new();
        let own = |addr| self.held.has(addr);
        // Packets are delivered on the interface that leads to their client.
        let way = |addr: IpAddr| {
            let client = PUBLIC
                .into_iter()
                .find(|it| it.is_ipv4() == addr.is_ipv4())?;
            let route = self.netlink.route_get(client, None, Some(addr)).ok();
            let oif = route.and_then(|it| it.oif);
            let by = self.links.iter().find(|link| Some(link.index) == oif);
            by.or_else(|| uplinks.first()).cloned()
        };
        for (at, peer) in config.peers.iter().enumerate() {
            let delivered = self.delivered_of(peer, at, running, Some(uplinks));
            found.extend(delivered::accepted(&delivered, words));
            let of_peer = delivered::ports(&self.netlink, &delivered, rules, &way, &own);
            found.extend(of_peer);
            found.extend(whole::served(&delivered, config.listen.port, &own));
            addrs.extend(delivered.reached_at.iter().copied());
        }
        let tun = self.tun(config).index;
        let carries = |index| index == tun || carriers.iter().any(|link| link.index == index);
        for addr in addrs {
            let ways = delivered::ways(&self.netlink, rules, addr, &carries);
            found.extend(ways);
        }
        found
    }
}

/// Asks each peer, or the daemon that runs here.
fn ask_all(
    given: &Given<'_>,
    running: Option<&Status>,
    endpoints: &[Option<Result<SocketAddr, String>>],
) -> Vec<Finding> {
    let config = given.config;
    let of = &|at: usize| -> Vec<Finding> {
        let peer = &config.peers[at];
        let tunnel = running.and_then(|status| status.tunnels.get(at));
        let mut found: Vec<Finding> = tunnel.map(peer::known).unwrap_or_default();
        match &endpoints[at] {
            None => {
                let text = "this server waits for it, since no --peer says where it is";
                found.push(Finding::ok("peer", "--peer", text));
            }
            Some(Err(error)) => {
                let name = peer.endpoint.as_ref().map(|it| it.host.clone());
                let name = name.unwrap_or_default();
                let remedy = format!("getent ahosts {}", quoted(&name));
                found.push(Finding::fail("peer", name, error, remedy));
            }
            Some(Ok(_)) if !given.has_key => {}
            Some(Ok(endpoint)) => {
                found.extend(ask(given, peer, *endpoint, running.is_none(), tunnel));
            }
        }
        found
    };
    // Those that do not answer are waited for side by side.
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..config.peers.len())
            .map(|at| scope.spawn(move || of(at)))
            .collect();
        let done = all.into_iter().filter_map(|it| it.join().ok());
        done.flatten().collect()
    })
}

fn ask(
    given: &Given<'_>,
    peer: &PeerConfig,
    endpoint: SocketAddr,
    is_free: bool,
    tunnel: Option<&TunnelStatus>,
) -> Vec<Finding> {
    let config = given.config;
    let any: IpAddr = match endpoint {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let named = config.listen.ip.filter(|ip| !ip.is_unspecified());
    let offer = Offer::of_this_machine(config.cipher);
    let probe = |is_free| probe::Probe {
        keys: peer.keys.clone(),
        role: config.role,
        offer,
        lanes: config.lanes,
        questions: questions(&peer.moves),
        peer: endpoint,
        own: SocketAddr::new(named.unwrap_or(any), config.listen.port),
        is_free,
    };
    // The port may be somebody else's, or another thread's that asks another peer.
    let asked = probe::ask(&probe(is_free)).map(|it| (it, is_free));
    let asked = asked.or_else(|_| probe::ask(&probe(false)).map(|it| (it, false)));
    let is_up = tunnel.is_some_and(|it| it.state == State::Up);
    match asked {
        // The daemon here hears of it, so that what this port meets tells nothing.
        Ok((probe::Answer::Nothing | probe::Answer::Refused(_), _)) if is_up => Vec::new(),
        Ok((answer, listened)) => {
            let own = peer::Own {
                role: config.role,
                offer,
                psk_file: given.psk_file.as_deref(),
                clock: probe::nanoseconds(SystemTime::now()),
                without_cipher: (given.words.hold("--cipher"))
                    .then(|| given.words.with("cipher", &[])),
                listened: listened || is_up,
            };
            let mut found = peer::judge(endpoint, &answer, &own);
            if let probe::Answer::Agrees { .. } = answer {
                found.extend(path(endpoint));
            }
            found
        }
        Err(error) => {
            let text = format!("cannot be asked: {error}");
            let remedy = format!("ip route get {}", endpoint.ip());
            vec![Finding::fail("peer", endpoint, text, remedy)]
        }
    }
}

/// What the new server is asked of these moves: their first ports, and not too many.
fn questions(moves: &[Move]) -> Vec<Move> {
    /// It answers sixteen at once.
    const MOST: usize = 8;
    let each = |moved: &Move| {
        let one = |ports: &[std::ops::RangeInclusive<u16>]| Move {
            ports: ports.to_vec(),
            ..moved.clone()
        };
        match moved.ports.as_slice() {
            [] => vec![one(&[])],
            some => some
                .iter()
                .map(|it| one(std::slice::from_ref(it)))
                .collect(),
        }
    };
    moves.iter().flat_map(each).take(MOST).collect()
}

/// How large a packet the path to a peer carries, as the kernel knows it once one was sent.
fn path(peer: SocketAddr) -> Option<Finding> {
    /// Routers on the way answer within this time, mostly.
    const ROUTERS: Duration = Duration::from_millis(150);
    let netlink = Netlink::new().ok()?;
    let route = netlink.route_get(peer.ip(), None, None).ok()?;
    let link = netlink.link_by_index(route.oif?).ok()??;
    let most = route.mtu.unwrap_or(link.mtu);
    let known = || {
        let route = netlink.route_get(peer.ip(), None, None).ok()?;
        route.learned_mtu
    };
    if known().is_none() {
        // It is of no session, so it is dropped there.
        let headers = if peer.is_ipv4() { 28 } else { 48 };
        let datagram = vec![0; most.saturating_sub(headers) as usize];
        let any: IpAddr = match peer {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let socket = UdpSocket::bind((any, 0)).ok()?;
        // It says itself if it is too long.
        let _ = socket.send_to(&datagram, peer);
        std::thread::sleep(ROUTERS);
    }
    Some(peer::path(peer, known().unwrap_or(most), link.mtu))
}
