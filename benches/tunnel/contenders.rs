//! The ways in which clients of a moved address can reach the new server.
//!
//! Owns how to set up each of them in a lab, as a careful administrator would. All but the direct
//! path carry clients of 192.0.2.5 to the application on 198.51.100.2. All but the two-sided NAT
//! show it the client's own address.
//!
//! By hand what `translate` does, over any device that connects the two servers (VXLAN,
//! WireGuard):
//!
//! ```text
//!  old server: 192.0.2.5 off the interface, proxy ARP for it, route 192.0.2.5/32 → device,
//!              forwarding, MSS clamped to the device
//!  new server: packets from the device: connection mark 1, DNAT to 198.51.100.2; replies of marked
//!              connections: mark 1 → rule → table 100 → device, but for the old server itself
//! ```

use std::env;
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::Signal;

use ipmoved::internals::Role;
use ipmoved::lab::topology::{MOVED, NEW, OLD, UPLINK};
use ipmoved::lab::{DaemonSetup, Daemons, Lab, Namespace, Process, poll_until};

/// How long a command, or a process until its device is there, may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// The addresses of the device between the servers.
const OLD_INNER: &str = "10.99.0.1";
const NEW_INNER: &str = "10.99.0.2";
/// MTU of the device between the servers, for VXLAN: 50 bytes below the path's.
const VXLAN_MTU: u32 = 1_450;
/// MTU of the device between the servers, for WireGuard: 80 bytes below the path's, as wg-quick
/// sets it.
const WG_MTU: u32 = 1_420;
const WG_PORT: &str = "51820";

/// Everything that the bench can compare.
#[derive(Clone, Debug)]
pub(crate) enum Kind {
    /// The client goes to the new server itself: the ceiling.
    Direct,
    /// This project's binary, or another build of it.
    Ipmoved(Option<PathBuf>),
    /// This project's binary with the cipher that one must ask for.
    IpmovedAegis,
    /// By hand what `translate` does, in the kernel, in plaintext: the yardstick.
    Vxlan,
    /// By hand what `nat` does, in the kernel: DNAT and SNAT on the old server.
    TwoSidedNat,
    /// By hand what `translate` does, over WireGuard in userspace, by this program.
    WireGuard(&'static str),
}

impl Kind {
    /// All contenders, in the order of the table.
    pub(crate) fn all(against: &[PathBuf]) -> Vec<Self> {
        let mut all = vec![Self::Ipmoved(None)];
        all.extend(against.iter().cloned().map(|exe| Self::Ipmoved(Some(exe))));
        all.extend([
            Self::IpmovedAegis,
            Self::Vxlan,
            Self::WireGuard("wireguard-go"),
            Self::WireGuard("boringtun-cli"),
            Self::WireGuard("gotatun"),
            Self::TwoSidedNat,
            Self::Direct,
        ]);
        all
    }

    pub(crate) fn name(&self) -> String {
        match self {
            Self::Direct => "direct".into(),
            Self::Ipmoved(None) => "ipmoved".into(),
            Self::Ipmoved(Some(exe)) => format!("ipmoved {}", exe.display()),
            Self::IpmovedAegis => "ipmoved, aegis".into(),
            Self::Vxlan => "vxlan".into(),
            Self::TwoSidedNat => "nat by hand".into(),
            Self::WireGuard(program) => (*program).into(),
        }
    }

    pub(crate) fn is_ipmoved(&self) -> bool {
        matches!(self, Self::Ipmoved(_) | Self::IpmovedAegis)
    }

    /// Whether the bench samples its time and fills its flow table. Another cipher changes neither.
    fn is_looked_into(&self) -> bool {
        matches!(self, Self::Ipmoved(_))
    }

    /// Whether the bench searches its highest rate without loss, which takes long.
    fn is_searched(&self) -> bool {
        matches!(self, Self::Ipmoved(_) | Self::Vxlan | Self::Direct)
    }

    /// Whether the bench measures it on impaired paths, which takes long too.
    fn is_impaired(&self) -> bool {
        self.is_searched() || matches!(self, Self::WireGuard("wireguard-go"))
    }

    /// Whether `--quick` leaves it out: one of its kind is enough there.
    pub(crate) fn is_left_out_when_quick(&self) -> bool {
        matches!(
            self,
            Self::WireGuard("boringtun-cli" | "gotatun") | Self::IpmovedAegis
        )
    }
}

/// One contender, set up and running.
pub(crate) struct Contender<'lab> {
    kind: Kind,
    lab: &'lab Lab,
    running: Running<'lab>,
}

enum Running<'lab> {
    /// There is nothing but the kernel.
    Kernel,
    Ipmoved {
        daemons: Box<Daemons<'lab>>,
        pids: [u32; 2],
    },
    /// The old server's process, and the new server's.
    WireGuard(Box<[WireGuard; 2]>),
}

impl<'lab> Contender<'lab> {
    pub(crate) fn start(kind: &Kind, lab: &'lab Lab, daemon_args: &[String]) -> Result<Self> {
        let running = match kind {
            Kind::Direct => Running::Kernel,
            Kind::Ipmoved(_) | Kind::IpmovedAegis => {
                let own = Path::new(env!("CARGO_BIN_EXE_ipmoved"));
                let exe = if let Kind::Ipmoved(Some(other)) = kind {
                    other
                } else {
                    own
                };
                let mut args: Vec<&str> = daemon_args.iter().map(String::as_str).collect();
                if matches!(kind, Kind::IpmovedAegis) {
                    args.extend(["--cipher", "aegis-256x4"]);
                }
                let mut daemons = DaemonSetup::new(lab, exe)?
                    .args(Role::Old, &args)
                    // Space for a million half-open flows and some more. Tables grow with their
                    // flows, not with this limit.
                    .args(Role::New, &["--max-flows", "1200000"])
                    .args(Role::New, &args)
                    .start_both()?;
                let pids = [daemons.old.process().id(), daemons.new.process().id()];
                Running::Ipmoved {
                    daemons: Box::new(daemons),
                    pids,
                }
            }
            Kind::Vxlan => {
                vxlan(lab)?;
                translate_by_hand(lab, ["vx0", "vx0"], VXLAN_MTU)?;
                Running::Kernel
            }
            Kind::TwoSidedNat => {
                two_sided_nat(lab)?;
                Running::Kernel
            }
            Kind::WireGuard(program) => {
                let ends = wireguard(lab, program)?;
                translate_by_hand(lab, [&ends[0].device, &ends[1].device], WG_MTU)?;
                Running::WireGuard(Box::new(ends))
            }
        };
        let contender = Self {
            kind: kind.clone(),
            lab,
            running,
        };
        // The first packets resolve neighbours and open tunnels.
        let target = contender.target();
        let answered = poll_until(PATIENCE, Duration::from_millis(50), || {
            lab.client().ping(target, 56).ok()
        });
        answered.with_context(|| format!("{target} does not answer a ping"))?;
        Ok(contender)
    }

    pub(crate) fn name(&self) -> String {
        self.kind.name()
    }

    pub(crate) fn kind(&self) -> &Kind {
        &self.kind
    }

    pub(crate) fn is_looked_into(&self) -> bool {
        self.kind.is_looked_into()
    }

    pub(crate) fn is_searched(&self) -> bool {
        self.kind.is_searched()
    }

    pub(crate) fn is_impaired(&self) -> bool {
        self.kind.is_impaired()
    }

    pub(crate) fn lab(&self) -> &'lab Lab {
        self.lab
    }

    /// The address that the client connects to.
    pub(crate) fn target(&self) -> Ipv4Addr {
        match self.kind {
            Kind::Direct => NEW,
            Kind::Ipmoved(_)
            | Kind::IpmovedAegis
            | Kind::Vxlan
            | Kind::TwoSidedNat
            | Kind::WireGuard(_) => MOVED,
        }
    }

    /// The tunnel's processes on the old and the new server.
    pub(crate) fn pids(&self) -> Option<[u32; 2]> {
        match &self.running {
            Running::Kernel => None,
            Running::Ipmoved { pids, .. } => Some(*pids),
            Running::WireGuard(ends) => Some([ends[0].process.id(), ends[1].process.id()]),
        }
    }

    /// The tunnel's devices on the old and the new server and its UDP port, if a process reads
    /// them.
    pub(crate) fn queues(&self) -> Option<([&str; 2], u16)> {
        match &self.running {
            Running::Kernel => None,
            Running::Ipmoved { .. } => Some((["ipmoved0"; 2], 51_850)),
            Running::WireGuard(ends) => Some(([&ends[0].device, &ends[1].device], 51_820)),
        }
    }

    /// The daemons, if the contender is ipmoved.
    pub(crate) fn daemons(&self) -> Option<&Daemons<'lab>> {
        match &self.running {
            Running::Ipmoved { daemons, .. } => Some(daemons),
            Running::Kernel | Running::WireGuard(_) => None,
        }
    }

    /// Takes it down.
    pub(crate) fn stop(self) -> Result<()> {
        match self.running {
            Running::Kernel | Running::WireGuard(_) => Ok(()),
            Running::Ipmoved { daemons, .. } => Ok(daemons.terminate()?),
        }
    }
}

/// A WireGuard process. Dropping it removes its socket under /run.
struct WireGuard {
    process: Process,
    device: String,
}

impl Drop for WireGuard {
    fn drop(&mut self) {
        // It removes its socket when told to end. If it leaves anything, we remove that here.
        let _ = self.process.signal(Signal::TERM);
        poll_until(
            Duration::from_millis(500),
            Duration::from_millis(10),
            || self.process.exited(),
        );
        let _ = fs::remove_file(format!("/run/wireguard/{}.sock", self.device));
    }
}

/// Connects the servers by a device without encryption.
fn vxlan(lab: &Lab) -> Result<()> {
    need("ip")?;
    let ends = [
        (lab.old_server(), OLD, NEW, OLD_INNER),
        (lab.new_server(), NEW, OLD, NEW_INNER),
    ];
    for (host, local, remote, inner) in ends {
        let add = format!(
            "link add vx0 type vxlan id 7 dstport 4789 local {local} remote {remote} dev {UPLINK}"
        );
        sh(host, &format!("ip {add}"))?;
        sh(host, &format!("ip link set vx0 mtu {VXLAN_MTU}"))?;
        sh(host, &format!("ip addr add {inner}/24 dev vx0"))?;
        sh(host, "ip link set vx0 up")?;
    }
    Ok(())
}

/// Connects the servers by a WireGuard tunnel of a userspace program.
fn wireguard(lab: &Lab, program: &'static str) -> Result<[WireGuard; 2]> {
    need(program)?;
    need("ip")?;
    need("wg")?;
    let hosts = [lab.old_server(), lab.new_server()];
    let mut ends = Vec::new();
    for (side, host) in hosts.into_iter().enumerate() {
        // The control socket's directory belongs to the machine, so we need names that collide with
        // nobody's.
        let initial = &program[..1];
        let device = format!("ipm{initial}{side}-{}", std::process::id());
        let mut command = Command::new(program);
        command.arg("-f");
        if program != "wireguard-go" {
            // Otherwise they become the user who logged in, who may not open the device, and they
            // end if nobody logged in.
            command.args(["--disable-drop-privileges", "-v", "error"]);
        }
        command.arg(&device).env("LOG_LEVEL", "error");
        let mut process = host.spawn(command)?;
        let there = poll_until(PATIENCE, Duration::from_millis(20), || {
            if let Some(status) = process.exited() {
                return Some(Err(status));
            }
            sh(host, &format!("wg show {device}")).ok().map(Ok)
        });
        match there {
            Some(Ok(_)) => {}
            Some(Err(status)) => bail!("it ended with {status}: {}", words(&process)),
            None => bail!("its device did not come up: {}", words(&process)),
        }
        ends.push(WireGuard { process, device });
    }
    let keys: Vec<PathBuf> = ends.iter().map(|end| lab.dir().join(&end.device)).collect();
    let mut public = Vec::new();
    for (host, key) in hosts.iter().zip(&keys) {
        let key = key.display();
        sh(host, &format!("umask 077; wg genkey > {key}"))?;
        public.push(sh(host, &format!("wg pubkey < {key}"))?);
    }
    let (addrs, inner) = ([OLD, NEW], [OLD_INNER, NEW_INNER]);
    for (side, host) in hosts.iter().enumerate() {
        let (device, other) = (&ends[side].device, 1 - side);
        sh(
            host,
            &format!(
                "wg set {device} listen-port {WG_PORT} private-key {} peer {} \
                 allowed-ips 0.0.0.0/0 endpoint {}:{WG_PORT}",
                keys[side].display(),
                public[other].trim(),
                addrs[other]
            ),
        )?;
        sh(
            host,
            &format!("ip addr add {}/24 dev {device}", inner[side]),
        )?;
        sh(host, &format!("ip link set {device} mtu {WG_MTU} up"))?;
    }
    ends.try_into()
        .map_err(|_| anyhow::anyhow!("there are two ends"))
}

/// The last line that a process wrote: wireguard-go begins with a banner.
fn words(process: &Process) -> String {
    let said = process.stderr() + &process.stdout();
    let line = said
        .lines()
        .rev()
        .find(|line| line.contains(char::is_alphabetic));
    line.unwrap_or("nothing was said").trim().to_owned()
}

/// Leads the moved address over a device and the replies back, as the module's head describes.
fn translate_by_hand(lab: &Lab, devices: [&str; 2], mtu: u32) -> Result<()> {
    let [on_old, on_new] = devices;
    let mss = mtu - 40;
    let old = lab.old_server();
    sh(old, &format!("ip addr del {MOVED}/24 dev {UPLINK}"))?;
    old.set_sysctls(&[
        ("ipv4/ip_forward", "1"),
        (&format!("ipv4/conf/{UPLINK}/proxy_arp"), "1"),
    ])?;
    sh(
        old,
        &format!("ip route add {MOVED}/32 via {NEW_INNER} dev {on_old}"),
    )?;
    firewall(
        old,
        &format!(
            "table ip translate {{
               chain forward {{ type filter hook forward priority mangle;
                 tcp flags syn tcp option maxseg size set {mss}; }}
             }}"
        ),
        &[&format!(
            "-t mangle -A FORWARD -p tcp --tcp-flags SYN,RST SYN -j TCPMSS --set-mss {mss}"
        )],
    )?;

    let new = lab.new_server();
    // Clients' packets come from the device, but their routes lead to the uplink: loose filtering
    // there.
    new.set_sysctls(&[(&format!("ipv4/conf/{on_new}/rp_filter"), "2")])?;
    firewall(
        new,
        &format!(
            "table ip translate {{
               chain marking {{ type filter hook prerouting priority mangle;
                 iifname \"{on_new}\" ct mark set 1; }}
               chain translate {{ type nat hook prerouting priority dstnat;
                 iifname \"{on_new}\" ip daddr {MOVED} dnat to {NEW}; }}
               chain replies {{ type route hook output priority mangle;
                 ct mark 1 meta mark set ct mark; }}
             }}"
        ),
        &[
            &format!("-t mangle -A PREROUTING -i {on_new} -j CONNMARK --set-mark 1"),
            &format!("-t nat -A PREROUTING -i {on_new} -d {MOVED} -j DNAT --to-destination {NEW}"),
            "-t mangle -A OUTPUT -m connmark --mark 1 -j CONNMARK --restore-mark",
        ],
    )?;
    // VXLAN routes its own datagrams by the mark of the inner packet. Without this rule that leads
    // into VXLAN itself.
    sh(new, &format!("ip rule add pref 90 to {OLD} lookup main"))?;
    sh(new, "ip rule add pref 100 fwmark 1 lookup 100")?;
    sh(
        new,
        &format!("ip route add default via {OLD_INNER} dev {on_new} table 100"),
    )?;
    Ok(())
}

/// Sets up two-sided NAT: the new server sees the old server's address instead of the client's.
fn two_sided_nat(lab: &Lab) -> Result<()> {
    let old = lab.old_server();
    old.set_sysctls(&[("ipv4/ip_forward", "1")])?;
    firewall(
        old,
        &format!(
            "table ip nat_by_hand {{
               chain there {{ type nat hook prerouting priority dstnat;
                 ip daddr {MOVED} dnat to {NEW}; }}
               chain source {{ type nat hook postrouting priority srcnat;
                 ip daddr {NEW} snat to {OLD}; }}
             }}"
        ),
        &[
            &format!("-t nat -A PREROUTING -d {MOVED} -j DNAT --to-destination {NEW}"),
            &format!("-t nat -A POSTROUTING -d {NEW} -j SNAT --to-source {OLD}"),
        ],
    )
}

/// Sets rules by `nft`, or by `iptables` if there is nothing else.
pub(crate) fn firewall(host: &Namespace, ruleset: &str, rules: &[&str]) -> Result<()> {
    if on_path("nft") {
        sh(host, &format!("nft -f - <<'END'\n{ruleset}\nEND"))?;
        return Ok(());
    }
    if !on_path("iptables") {
        bail!("neither nft nor iptables is on PATH");
    }
    for rule in rules {
        sh(host, &format!("iptables {rule}"))?;
    }
    Ok(())
}

/// Removes the rules of [`firewall`]: its table, or each of its rules.
pub(crate) fn firewall_off(host: &Namespace, table: &str, rules: &[&str]) -> Result<()> {
    if on_path("nft") {
        sh(host, &format!("nft delete table ip {table}"))?;
        return Ok(());
    }
    for rule in rules {
        sh(host, &format!("iptables {}", rule.replacen("-A", "-D", 1)))?;
    }
    Ok(())
}

/// Runs a line on a host and returns its output, or an error with its complaint.
pub(crate) fn sh(host: &Namespace, line: &str) -> Result<String> {
    let mut command = Command::new("sh");
    command.args(["-c", line]);
    let said = host.output(command, PATIENCE)?;
    if !said.status.success() {
        bail!("`{line}`: {}", said.stderr.trim());
    }
    Ok(said.stdout)
}

fn need(program: &str) -> Result<()> {
    if on_path(program) {
        return Ok(());
    }
    bail!("{program} is not on PATH")
}

fn on_path(program: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).any(|dir| dir.join(program).is_file())
}
