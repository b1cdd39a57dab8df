//! Programs that manage firewalls, links and routes: what each does with what ipmoved makes.

use std::collections::BTreeSet;

use crate::kernel::netfilter::Ruleset;
use crate::kernel::netlink::Nature;
use crate::model::finding::Finding;
use crate::model::peer::Role;

/// One of them, and what is known of it.
struct Manager {
    /// Its name for people.
    name: &'static str,
    /// The programs that it runs, as the kernel has their names.
    programs: &'static [&'static str],
    /// How the tables or chains begin that it makes.
    chains: &'static [&'static str],
    /// The kind of the interfaces that it makes.
    kind: Option<&'static str>,
    /// What it means on the old server, and on the new one.
    means: [&'static str; 2],
}

const OLD_FIREWALL: &str = "packets of what has moved do not pass its rules; the tunnel does";

const ALL: [Manager; 8] = [
    Manager {
        name: "firewalld",
        programs: &["firewalld"],
        chains: &["firewalld", "FWD", "IN_public"],
        kind: None,
        means: [
            OLD_FIREWALL,
            "clients come in by the zone of their interface; open their ports there, for good",
        ],
    },
    Manager {
        name: "ufw",
        programs: &[],
        chains: &["ufw-"],
        kind: None,
        means: [
            OLD_FIREWALL,
            "clients pass its rules as on their interface; open their ports with ufw",
        ],
    },
    Manager {
        name: "Docker",
        programs: &["dockerd"],
        chains: &["DOCKER"],
        kind: None,
        means: [
            "published ports of the moved address are taken before Docker's rules; its containers' \
             own connections stay with them",
            "publish ports as ever; containers see clients' own addresses",
        ],
    },
    Manager {
        name: "kube-proxy",
        programs: &["kube-proxy"],
        chains: &["KUBE-"],
        kind: None,
        means: [
            "what has moved is taken before its rules",
            "its marks and rules are met as on the interface of the clients",
        ],
    },
    Manager {
        name: "Tailscale",
        programs: &["tailscaled"],
        chains: &["ts-input", "ts-forward"],
        kind: None,
        means: [
            "its rules and marks meet nothing of what has moved",
            "its rules and marks divert no answers; those to clients in 100.64.0.0/10 it drops",
        ],
    },
    Manager {
        name: "WireGuard",
        programs: &[],
        chains: &[],
        kind: Some("wireguard"),
        means: [
            "clients behind it are served as well",
            "answers are taken also where its routes lead",
        ],
    },
    Manager {
        name: "systemd-networkd",
        programs: &["systemd-network"],
        chains: &[],
        kind: None,
        means: [
            "ipmoved adds no rule or route that it would remove",
            "routes and addresses of ipmoved that it removes are back within milliseconds",
        ],
    },
    Manager {
        name: "NetworkManager",
        programs: &["NetworkManager"],
        chains: &[],
        kind: None,
        means: [
            "it leaves the tunnel's interface alone",
            "it leaves the tunnel's interface alone",
        ],
    },
];

/// Those that are here.
pub(super) fn here(
    role: Role,
    programs: &BTreeSet<String>,
    rules: &Ruleset,
    natures: &[Nature],
) -> Vec<Finding> {
    let is_here = |manager: &&Manager| {
        let begins = |name: &str| manager.chains.iter().any(|it| name.starts_with(it));
        let has_kind = |it: &Nature| it.kind.as_deref() == manager.kind && manager.kind.is_some();
        manager.programs.iter().any(|it| programs.contains(*it))
            || rules.has_name(begins)
            || natures.iter().any(has_kind)
    };
    let means = |manager: &Manager| match role {
        Role::Old => manager.means[0],
        Role::New => manager.means[1],
    };
    ALL.iter()
        .filter(is_here)
        .map(|it| Finding::ok("manager", it.name, means(it)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn managers_are_known_by_their_programs_and_links() {
        let programs = ["dockerd", "systemd-network", "sshd"].map(str::to_owned);
        let wg = Nature {
            index: 7,
            kind: Some("wireguard".into()),
            master: None,
            lower: None,
        };
        let found = here(Role::New, &programs.into(), &Ruleset::default(), &[wg]);
        let names: Vec<&str> = found.iter().map(|it| it.object.as_str()).collect();
        assert_eq!(names, ["Docker", "WireGuard", "systemd-networkd"]);
        let none = here(Role::Old, &BTreeSet::new(), &Ruleset::default(), &[]);
        assert!(none.is_empty());
    }
}
