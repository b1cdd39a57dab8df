//! Every kind of link that servers have, as the one by which clients and the tunnel come.
//!
//! ```text
//!                         ┌── link0 over eth0 ── old server ┐
//!  client ─── eth0 router ┤                                 ║ tunnel
//!                         └── link0 over eth0 ── new server ┘
//! ```
//!
//! Both servers have the kind of link that a test names, in the place of the Ethernet link of the
//! lab, which carries it where it needs one. A kernel without such links skips the test, and says
//! so; `contrib/vm/run` boots one that has them all.

use std::net::IpAddr;
use std::process::Command;
use std::thread;
use std::time::Duration;

use ipmoved::lab::topology::{Leg, MOVED, MOVED6, NEW};
use ipmoved::lab::{Lab, LabError, Namespace, Process, Service, poll_until};

use crate::behind_dnat::{has, shell};
use crate::follow::{all_is_served, both_families, services};
use crate::modes::{NAT, nat};
use crate::stage::{FAMILIES, MEGABYTE, PATIENCE, Result, is_before, setup};

/// The moved addresses of both families.
const BOTH: [IpAddr; 2] = [IpAddr::V4(MOVED), IpAddr::V6(MOVED6)];

/// One of the two legs with a server at its end.
struct End<'lab> {
    lab: &'lab Lab,
    host: &'lab Namespace,
    leg: Leg,
}

impl<'lab> End<'lab> {
    fn both(lab: &'lab Lab) -> [Self; 2] {
        [
            Self {
                lab,
                host: lab.old_server(),
                leg: Leg::Old,
            },
            Self {
                lab,
                host: lab.new_server(),
                leg: Leg::New,
            },
        ]
    }

    /// The interface of the router on this leg.
    fn port(&self) -> &'static str {
        self.leg.router_interface()
    }

    /// A number of this leg, for networks between router and server.
    fn number(&self) -> u8 {
        match self.leg {
            Leg::Clients => 0,
            Leg::Old => 1,
            Leg::New => 2,
        }
    }

    /// The server's own addresses with their prefix lengths, and those of the router.
    fn addresses(&self) -> (&'static [&'static str], [&'static str; 2]) {
        match self.leg {
            Leg::Clients | Leg::Old => (
                &[
                    "192.0.2.1/24",
                    "192.0.2.5/24",
                    "2001:db8:a::1/64",
                    "2001:db8:a::5/64",
                ],
                ["192.0.2.254/24", "2001:db8:a::fe/64"],
            ),
            Leg::New => (
                &["198.51.100.2/24", "2001:db8:b::2/64"],
                ["198.51.100.254/24", "2001:db8:b::fe/64"],
            ),
        }
    }

    /// Its own address and the router's, of IPv4.
    fn ppp_addresses(&self) -> (&'static str, &'static str) {
        match self.leg {
            Leg::Clients | Leg::Old => ("192.0.2.1", "192.0.2.254"),
            Leg::New => ("198.51.100.2", "198.51.100.254"),
        }
    }

    fn on_host(&self, script: &str) -> Result {
        shell(self.host, script)
    }

    fn on_router(&self, script: &str) -> Result {
        shell(self.lab.router(), script)
    }

    /// Moves the server's addresses, and its default routes, from eth0 to `link0`.
    fn settle_host(&self) -> Result {
        self.settle_host_on("link0")
    }

    fn settle_host_on(&self, link: &str) -> Result {
        let (addresses, gateways) = self.addresses();
        let mut script = format!("ip addr flush dev eth0 scope global; ip link set {link} up; ");
        for address in addresses {
            script += &format!("ip addr add {address} dev {link} {};", nodad(address));
        }
        for gateway in gateways {
            let family = if gateway.contains(':') { "-6" } else { "-4" };
            let via = gateway.split('/').next().unwrap_or_default();
            // As dhclient and network managers do, and for links that have no neighbours.
            script += &format!("ip {family} route del default || :;");
            script += &format!("ip {family} route add default via {via} dev {link} onlink;");
        }
        self.on_host(&script)
    }

    /// Moves the router's addresses of this leg to another interface of it.
    fn settle_router(&self, link: &str) -> Result {
        let (_, gateways) = self.addresses();
        let mut script = format!(
            "ip addr flush dev {} scope global; ip link set {link} up; ",
            self.port()
        );
        for gateway in gateways {
            script += &format!("ip addr add {gateway} dev {link} {};", nodad(gateway));
        }
        self.on_router(&script)
    }

    /// Makes `link0` on the server from eth0, such as a port, with these words of `ip link add`.
    fn stack(&self, words: &str) -> Result {
        self.on_host(&format!("ip link add {words}"))?;
        self.settle_host()
    }

    /// Gives eth0 addresses of a network between router and server, and makes `link0` over it at
    /// both ends. `words` are those of `ip link add`, with LOCAL and REMOTE in them, which become
    /// addresses of that network.
    fn tunnel(&self, words: &str) -> Result {
        let n = self.number();
        let v6 = words.contains("ip6");
        let of = |end: u8| {
            if v6 {
                format!("2001:db8:90:{n}::{end}")
            } else {
                format!("198.18.{}.{end}", 240 + n)
            }
        };
        let make = |link: &str, local: u8, remote: u8| {
            let words = words
                .replace("LOCAL", &of(local))
                .replace("REMOTE", &of(remote));
            format!("ip link add {link} type {words}; ip link set {link} up")
        };
        let prefix = if v6 { "64 nodad" } else { "24" };
        let link = format!("link{n}");
        self.on_router(&make(&link, 1, 2))?;
        self.settle_router(&link)?;
        self.on_router(&format!(
            "ip addr add {}/{prefix} dev {}",
            of(1),
            self.port()
        ))?;
        self.on_host(&make("link0", 2, 1))?;
        self.settle_host()?;
        self.on_host(&format!("ip addr add {}/{prefix} dev eth0", of(2)))
    }
}

fn nodad(address: &str) -> &'static str {
    if address.contains(':') { "nodad" } else { "" }
}

/// Whether the kernel has such links; a test without it prints that it was skipped. `words` are
/// those of `ip link add`, with `under` for an interface that is there.
fn kernel_has(words: &str) -> Result<bool> {
    let somewhere = Namespace::new("somewhere")?;
    shell(&somewhere, "ip link add under type veth peer name other")?;
    let mut command = Command::new("sh");
    command.args(["-c", &format!("ip link add {words}")]);
    let said = somewhere.output(command, PATIENCE)?;
    if !said.status.success() {
        println!(
            "SKIPPED: this kernel has no such link (ip link add {words}: {})",
            said.stderr.trim()
        );
    }
    Ok(said.status.success())
}

/// Both servers are at a link of a kind, and what has moved is served.
fn served_at(probe: &str, addrs: &[IpAddr], make: impl Fn(&End<'_>) -> Result) -> Result {
    if !kernel_has(probe)? {
        return Ok(());
    }
    both_families(
        |lab| all_is_served(lab, addrs),
        |lab| End::both(lab).iter().try_for_each(make),
    )
}

/// What has moved is served: through the tunnel, and then by the old server alone.
fn served_either_way(prepare: impl FnOnce(&Lab) -> Result) -> Result {
    let lab = Lab::builder().without_rp_filter().build()?;
    prepare(&lab)?;
    let _application = Service::start(lab.new_server(), NEW)?;
    let _others = services(&lab)?;
    let both = setup(&lab)?.moves(&FAMILIES);
    let daemons = both.start_both()?;
    all_is_served(&lab, &BOTH)?;
    daemons.terminate()?;
    let alone = setup(&lab)?;
    let _daemon = nat(&alone, NAT)?;
    all_is_served(&lab, &BOTH)
}

#[test]
fn a_vlan() -> Result {
    served_at("link under name x type vlan id 7", &BOTH, |end| {
        let port = end.port();
        end.on_router(&format!(
            "ip link add link {port} name v-{port} type vlan id 7"
        ))?;
        end.settle_router(&format!("v-{port}"))?;
        end.stack("link eth0 name link0 type vlan id 7")
    })
}

#[test]
fn a_bridge() -> Result {
    served_at("x type bridge", &BOTH, |end| {
        end.stack("link0 type bridge; ip link set eth0 master link0")
    })
}

#[test]
fn macvlan() -> Result {
    served_at("link under name x type macvlan mode bridge", &BOTH, |end| {
        end.stack("link eth0 name link0 type macvlan mode bridge")
    })
}

#[test]
fn ipvlan() -> Result {
    served_at("link under name x type ipvlan mode l2", &BOTH, |end| {
        end.stack("link eth0 name link0 type ipvlan mode l2")
    })
}

/// A container whose link is one of the host's by address alone: it has no neighbours. (The host
/// itself does not reach such a link, so it has a namespace of its own.)
#[test]
fn ipvlan_at_layer_3() -> Result {
    if !kernel_has("link under name x type ipvlan mode l3")? {
        return Ok(());
    }
    let mut carriers = Vec::new();
    let make = |end: &End<'_>| {
        let (n, port) = (end.number(), end.port());
        let carrier = Namespace::new("carrier")?;
        let [to_carrier, to_host] = [&carrier, end.host].map(|host| {
            let mut sleep = Command::new("sleep");
            sleep.arg("inf");
            host.spawn(sleep)
        });
        let (to_carrier, to_host) = (to_carrier?, to_host?);
        end.on_host(&format!("ip link set eth0 netns {}", to_carrier.id()))?;
        shell(
            &carrier,
            &format!(
                "ip link set eth0 up; ip addr add 198.18.24{n}.2/24 dev eth0
                 ip addr add 2001:db8:90:{n}::2/64 dev eth0 nodad
                 ip route add default via 198.18.24{n}.1
                 ip route add default via 2001:db8:90:{n}::1
                 ip link add link eth0 name x type ipvlan mode l3
                 ip link set x netns {} name link0",
                to_host.id()
            ),
        )?;
        carriers.push(carrier);
        let mut host = "ip link set link0 up;".to_owned();
        let mut router = format!(
            "ip addr flush dev {port} scope global; ip addr add 198.18.24{n}.1/24 dev {port}
             ip addr add 2001:db8:90:{n}::1/64 dev {port} nodad;"
        );
        for address in end.addresses().0 {
            let addr = address.split('/').next().unwrap_or_default();
            let via = match addr.contains(':') {
                true => format!("2001:db8:90:{n}::2"),
                false => format!("198.18.24{n}.2"),
            };
            host += &format!("ip addr add {addr} dev link0 {};", nodad(addr));
            router += &format!("ip route add {addr} via {via};");
        }
        host += "ip route add default dev link0; ip -6 route add default dev link0";
        end.on_router(&router)?;
        end.on_host(&host)
    };
    served_either_way(|lab| End::both(lab).iter().try_for_each(make))
}

#[test]
fn a_bond_goes_on_when_one_of_its_links_fails() -> Result {
    if !kernel_has("x type bond mode active-backup")? {
        return Ok(());
    }
    let prepare = |lab: &Lab| {
        End::both(lab).iter().try_for_each(|end| {
            let (port, n) = (end.port(), end.number());
            lab.add_leg(end.host, &format!("more{n}"), &[], &[])?;
            // A switch with two ports.
            end.on_router(&format!(
                "ip link add sw{n} type bridge; ip link set {port} master sw{n}
                 ip link set more{n} master sw{n}"
            ))?;
            end.settle_router(&format!("sw{n}"))?;
            end.on_host(&format!(
                "ip link add link0 type bond mode active-backup miimon 100
                 ip link set eth0 down; ip link set more{n} down
                 ip link set eth0 master link0; ip link set more{n} master link0
                 ip link set link0 up; ip link set eth0 up; ip link set more{n} up"
            ))?;
            end.settle_host()
        })
    };
    both_families(
        |lab| {
            all_is_served(lab, &BOTH)?;
            thread::scope(|scope| {
                let load = scope.spawn(|| lab.client().download(MOVED, 30 * MEGABYTE));
                for end in End::both(lab) {
                    fail_over(end.host)?;
                }
                load.join()
                    .map_err(|_| LabError::unexpected("the load panicked"))?
                    .map(drop)
            })?;
            all_is_served(lab, &BOTH)
        },
        prepare,
    )
}

/// Takes down the link of a bond that is in use, and waits until another one is.
fn fail_over(host: &Namespace) -> Result {
    let active = || {
        let mut cat = Command::new("cat");
        cat.arg("/proc/net/bonding/link0");
        let said = host.output(cat, PATIENCE)?;
        let line = |line: &str| {
            line.strip_prefix("Currently Active Slave: ")
                .map(str::to_owned)
        };
        said.stdout
            .lines()
            .find_map(line)
            .ok_or_else(|| LabError::unexpected(format!("no bond: {said:?}")))
    };
    let before = active()?;
    shell(host, &format!("ip link set {before} down"))?;
    poll_until(PATIENCE, Duration::from_millis(20), || {
        let now = active().ok()?;
        (now != before && now != "None").then_some(())
    })
    .ok_or_else(|| LabError::unexpected("the bond does not use its other link"))
}

/// What the provider routes to the server: its addresses are not those of the network that it is
/// in. The new server has only its IPv4 address there, the one that the tunnel comes to; what else
/// is delivered to, `--deliver-to` would have to say.
#[test]
fn addresses_on_a_dummy_behind_a_link_with_others() -> Result {
    served_at("x type dummy", &BOTH, |end| {
        let (n, port) = (end.number(), end.port());
        let mut host = format!(
            "ip link add link0 type dummy; ip link set link0 up
             ip -4 addr flush dev eth0; ip addr add 198.18.24{n}.2/24 dev eth0
             ip addr add 2001:db8:90:{n}::2/64 dev eth0 nodad;"
        );
        let mut router = format!(
            "ip -4 addr flush dev {port}; ip addr add 198.18.24{n}.1/24 dev {port}
             ip addr add 2001:db8:90:{n}::1/64 dev {port} nodad;"
        );
        let v4_only = end.leg == Leg::New;
        for address in end.addresses().0 {
            let addr = address.split('/').next().unwrap_or_default();
            let via = if !addr.contains(':') {
                format!("198.18.24{n}.2")
            } else if v4_only {
                continue;
            } else {
                host += &format!("ip addr del {address} dev eth0;");
                format!("2001:db8:90:{n}::2")
            };
            host += &format!("ip addr add {addr} dev link0 {};", nodad(addr));
            router += &format!("ip route add {addr} via {via};");
        }
        let (own, _) = end.addresses();
        let own = own[0].split('/').next().unwrap_or_default();
        host += &format!("ip route replace default via 198.18.24{n}.1 src {own};");
        if !v4_only {
            host += "ip -6 route del default;";
            host += &format!("ip route add default via 2001:db8:90:{n}::1 src 2001:db8:a::1;");
        }
        end.on_router(&router)?;
        end.on_host(&host)
    })
}

#[test]
fn gre() -> Result {
    served_at(
        "x type gre local 198.18.0.1 remote 198.18.0.2 ttl 64",
        &BOTH,
        |end| end.tunnel("gre local LOCAL remote REMOTE ttl 64"),
    )
}

#[test]
fn gre_with_all_its_options() -> Result {
    served_at(
        "x type gre local 198.18.0.1 remote 198.18.0.2 key 7",
        &BOTH,
        |end| end.tunnel("gre local LOCAL remote REMOTE ttl 64 key 7 csum seq"),
    )
}

#[test]
fn gre_with_ethernet_in_it() -> Result {
    served_at(
        "x type gretap local 198.18.0.1 remote 198.18.0.2",
        &BOTH,
        |end| end.tunnel("gretap local LOCAL remote REMOTE ttl 64"),
    )
}

/// Linux before 5.16 cannot redirect to such a link, which is left alone there.
#[test]
fn gre_over_ipv6() -> Result {
    if is_before((5, 16)) {
        println!("SKIPPED: ipmoved leaves GRE over IPv6 alone before Linux 5.16");
        return Ok(());
    }
    served_at(
        "x type ip6gre local 2001:db8::1 remote 2001:db8::2",
        &BOTH,
        |end| end.tunnel("ip6gre local LOCAL remote REMOTE"),
    )
}

#[test]
fn ipip() -> Result {
    served_at(
        "x type ipip local 198.18.0.1 remote 198.18.0.2",
        &BOTH[..1],
        |end| end.tunnel("ipip local LOCAL remote REMOTE ttl 64"),
    )
}

#[test]
fn sit() -> Result {
    served_at(
        "x type sit local 198.18.0.1 remote 198.18.0.2 mode any",
        &BOTH,
        |end| end.tunnel("sit local LOCAL remote REMOTE ttl 64 mode any"),
    )
}

#[test]
fn any_ip_over_ipv6() -> Result {
    served_at(
        "x type ip6tnl mode any local 2001:db8::1 remote 2001:db8::2",
        &BOTH,
        |end| end.tunnel("ip6tnl mode any local LOCAL remote REMOTE"),
    )
}

#[test]
fn wireguard_of_the_kernel() -> Result {
    if !has("wg") {
        return Ok(());
    }
    served_at("x type wireguard", &BOTH, |end| {
        end.tunnel("wireguard")?;
        let dir = end.lab.dir().display();
        let n = end.number();
        let keys = |who: &str| {
            let key = format!("{dir}/{who}{n}");
            format!("(umask 077; wg genkey > {key}); wg pubkey < {key} > {key}.pub")
        };
        end.on_host(&keys("host"))?;
        end.on_router(&keys("router"))?;
        let set = |link: &str, who: &str, other: &str, at: u8| {
            format!(
                "wg set {link} listen-port 5182{n} private-key {dir}/{who}{n} \
                 peer $(cat {dir}/{other}{n}.pub) allowed-ips 0.0.0.0/0,::/0 \
                 endpoint 198.18.24{n}.{at}:5182{n}"
            )
        };
        end.on_router(&set(&format!("link{n}"), "router", "host", 2))?;
        end.on_host(&set("link0", "host", "router", 1))
    })
}

#[test]
fn ppp() -> Result {
    served_by_ppp("socat", |end| {
        let (dir, n) = (end.lab.dir().display(), end.number());
        let line = |who: &str| format!("{dir}/{who}{n}");
        let mut socat = Command::new("socat");
        for who in ["router", "host"] {
            socat.arg(format!("PTY,link={},raw,echo=0", line(who)));
        }
        let socat = end.lab.router().spawn(socat)?;
        poll_until(PATIENCE, Duration::from_millis(10), || {
            std::path::Path::new(&line("host")).exists().then_some(())
        });
        let (own, gateway) = end.ppp_addresses();
        let pppd = |who: &str, link: &str, addresses: String| {
            let mut pppd = pppd(&[&line(who)], link);
            pppd.args(["local", "nolock", &addresses]);
            pppd
        };
        let far = pppd("router", &format!("link{n}"), format!("{gateway}:{own}"));
        let near = pppd("host", "link0", format!("{own}:{gateway}"));
        let far = end.lab.router().spawn(far)?;
        Ok(vec![socat, far, end.host.spawn(near)?])
    })
}

/// As DSL has it: the provider's end is made for whoever asks, over Ethernet.
#[test]
fn ppp_over_ethernet() -> Result {
    served_by_ppp("pppoe-server", |end| {
        let (dir, n) = (end.lab.dir().display(), end.number());
        let (own, gateway) = end.ppp_addresses();
        let options = format!("{dir}/pppoe{n}");
        let words = format!("noauth\nnodefaultroute\nnoproxyarp\n+ipv6\nifname link{n}\n");
        std::fs::write(&options, words).map_err(|it| LabError::unexpected(it.to_string()))?;
        let mut server = Command::new("pppoe-server");
        server.args(["-F", "-N", "1", "-I", end.port(), "-O", &options]);
        server.args(["-L", gateway, "-R", own]);
        let server = end.lab.router().spawn(server)?;
        let mut near = pppd(&["plugin", "pppoe.so", "nic-eth0"], "link0");
        near.args(["noipdefault", "persist", "holdoff", "1"]);
        Ok(vec![server, end.host.spawn(near)?])
    })
}

/// A `pppd` for this line that makes the link `link`.
fn pppd(line: &[&str], link: &str) -> Command {
    let mut pppd = Command::new("pppd");
    pppd.args(line).args(["ifname", link]);
    pppd.args([
        "nodetach",
        "noauth",
        "nodefaultroute",
        "noproxyarp",
        "+ipv6",
    ]);
    pppd
}

/// Both servers are at a PPP link that `dial` makes with `program`, and what has moved is served.
fn served_by_ppp(program: &str, dial: impl Fn(&End<'_>) -> Result<Vec<Process>>) -> Result {
    if !has("pppd") || !has(program) {
        return Ok(());
    }
    if !std::path::Path::new("/dev/ppp").exists() {
        println!("SKIPPED: this kernel has no PPP (/dev/ppp)");
        return Ok(());
    }
    let mut running = Vec::new();
    let up = |host: &Namespace, link: &str| {
        let up = format!("ip -4 addr show dev {link} | grep -q inet");
        poll_until(PATIENCE, Duration::from_millis(50), || {
            shell(host, &up).ok()
        })
        .ok_or_else(|| LabError::unexpected(format!("{link} of {} is not up", host.name())))
    };
    let prepare = |lab: &Lab| {
        for end in End::both(lab) {
            running.extend(dial(&end)?);
            let link = format!("link{}", end.number());
            up(lab.router(), &link)?;
            up(end.host, "link0")?;
            end.settle_router(&link)?;
            end.settle_host()?;
        }
        Ok(())
    };
    served_either_way(prepare)
}
