//! What this server's firewall does with a packet, without one being sent.
//!
//! ```text
//!   nft      reads the chains, rules and sets of nftables, `iptables-nft` included
//!   legacy   reads the tables of legacy iptables
//!   xt       the matches that both of iptables' kinds have
//!   walk     goes through the chains of a hook with a packet
//! ```
//!
//! Owns the form in which rules of either kind are kept. A rule of which some part is not
//! understood counts as one that may match, so that nothing is said of a firewall that is not so.
//!
//! It is for commands that people run and for the daemon's start: a running daemon does not open
//! such sockets, through which whoever takes it over could change the firewall.

use std::fmt;
use std::net::SocketAddr;

mod legacy;
mod nft;
mod walk;
mod xt;

pub use walk::{Culprit, Fate, Packet};

/// Where a chain stands (`enum nf_inet_hooks`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hook {
    /// Packets that come in, before a route is chosen.
    Prerouting,
    /// Those for this server itself.
    Input,
    /// Those that it forwards.
    Forward,
    /// Those that it sends itself.
    Output,
    /// Packets that leave, after a route was chosen.
    Postrouting,
}

impl Hook {
    /// From the kernel's number, in the families of IP.
    fn from_raw(raw: u32) -> Option<Self> {
        let all = [
            Self::Prerouting,
            Self::Input,
            Self::Forward,
            Self::Output,
            Self::Postrouting,
        ];
        all.get(usize::try_from(raw).ok()?).copied()
    }
}

/// Whose a chain is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Owner {
    /// Of `nft`, or of `iptables-nft`: the kernel does not tell.
    Nft(&'static str),
    /// Of `iptables-legacy`, by the name of its command.
    Legacy(&'static str),
}

impl Owner {
    /// Its family as people write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nft(family) | Self::Legacy(family) => family,
        }
    }

    /// Whether it sees packets of that family.
    fn sees(self, v4: bool) -> bool {
        match self.name() {
            "inet" => true,
            "ip" | "iptables-legacy" => v4,
            "ip6" | "ip6tables-legacy" => !v4,
            _ => false,
        }
    }
}

/// A chain.
#[derive(Clone, PartialEq, Debug)]
struct Chain {
    owner: Owner,
    table: String,
    name: String,
    /// Where it stands, if packets come to it by themselves, and in which order.
    hook: Option<(Hook, i32)>,
    /// What no rule accepts is dropped.
    drops: bool,
    rules: Vec<Rule>,
}

/// A rule: what it asks, and what then happens, in order.
#[derive(Clone, PartialEq, Debug, Default)]
struct Rule(Vec<Expr>);

/// A part of a rule. Registers are named by the place of their first byte.
#[derive(Clone, PartialEq, Debug)]
enum Expr {
    /// Copies something of the packet into registers.
    Load {
        to: usize,
        what: Source,
        length: usize,
    },
    /// Asks whether registers compare so with a value.
    Compare {
        at: usize,
        how: Comparison,
        with: Vec<u8>,
    },
    /// Takes bits of registers, and turns some.
    Mask {
        from: usize,
        to: usize,
        mask: Vec<u8>,
        turn: Vec<u8>,
    },
    /// Turns numbers of this size around.
    Swap {
        from: usize,
        to: usize,
        length: usize,
        size: usize,
    },
    /// Asks whether registers lie between two values, or do not.
    Between {
        at: usize,
        not: bool,
        ends: [Vec<u8>; 2],
    },
    /// Looks registers up in a set, for their being there, or for what to do.
    Lookup {
        at: usize,
        set: Option<usize>,
        not: bool,
        acts: bool,
    },
    /// Asks for the addresses, interfaces and protocol of a legacy rule.
    Head(Vec<u8>),
    /// Asks as iptables does.
    Match { name: String, info: Vec<u8> },
    /// Acts.
    Act(Action),
    /// Sets a mark, of the packet or of its connection.
    Marks,
    /// Nothing that decides about a packet: a counter, a line in the log.
    Nothing,
    /// Not understood.
    Unknown,
}

/// Something of a packet, or of what the kernel knows about it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Source {
    /// `NFT_META_*`.
    Meta(u32),
    /// `NFT_CT_*`.
    Conntrack(u32),
    /// Bytes of the network header, from there.
    Network(usize),
    /// Bytes behind it, from there.
    Transport(usize),
    /// Something else.
    Other,
}

/// `NFT_CMP_*`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Comparison {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

/// What a rule does.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Action {
    Accept,
    Drop,
    Reject,
    Return,
    Continue,
    /// To the chain of that name in the same table, and back behind the rule.
    Jump(String),
    /// The same, and back behind the rule that led to this chain.
    Goto(String),
    /// Sends it elsewhere (DNAT), as far as that is known.
    Turn(Option<SocketAddr>),
    /// Something that is not followed.
    Other,
}

/// The elements of a set.
#[derive(Clone, PartialEq, Debug, Default)]
struct Set {
    /// Its elements are the ends of ranges.
    ranges: bool,
    /// The elements in their order.
    elements: Vec<Element>,
    /// It is not known whole.
    partial: bool,
}

/// One of them.
#[derive(Clone, PartialEq, Debug, Default)]
struct Element {
    key: Vec<u8>,
    /// A range ends before it.
    ends: bool,
    act: Option<Action>,
}

/// The rules of a network namespace.
#[derive(Clone, Debug, Default)]
pub struct Ruleset {
    chains: Vec<Chain>,
    sets: Vec<Set>,
}

/// A chain that drops packets.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DropChain {
    /// The family as `nft` writes it, or the command of legacy iptables.
    pub family: &'static str,
    /// The table.
    pub table: String,
    /// The chain.
    pub chain: String,
    /// What no rule accepts is dropped.
    pub policy: bool,
    /// Rules that drop or reject.
    pub rules: usize,
}

impl fmt::Display for DropChain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "chain {} {} {}", self.family, self.table, self.chain)?;
        match (self.policy, self.rules) {
            (true, 0) => f.write_str(" (policy drop)"),
            (true, rules) => write!(f, " (policy drop, {rules} rules that drop)"),
            (false, 1) => f.write_str(" (1 rule that drops)"),
            (false, rules) => write!(f, " ({rules} rules that drop)"),
        }
    }
}

impl Ruleset {
    /// Reads the rules of this network namespace. What the kernel does not have is left out, and
    /// without `CAP_NET_ADMIN` everything.
    pub fn read() -> Self {
        let mut ruleset = Self::default();
        nft::read(&mut ruleset);
        ruleset.chains.extend(legacy::read());
        ruleset
    }

    /// The chains that drop packets, by policy or by rule. Rules that look a verdict up in a map
    /// are not seen.
    pub fn drop_chains(&self) -> Vec<DropChain> {
        let drops = |rule: &&Rule| {
            let acts = |expr: &Expr| matches!(expr, Expr::Act(Action::Drop | Action::Reject));
            rule.0.iter().any(acts)
        };
        let all = self.chains.iter().map(|chain| DropChain {
            family: chain.owner.name(),
            table: chain.table.clone(),
            chain: chain.name.clone(),
            policy: chain.drops,
            rules: chain.rules.iter().filter(drops).count(),
        });
        all.filter(|chain| chain.policy || chain.rules > 0)
            .collect()
    }

    /// Whether a rule sets marks, of packets or of connections.
    pub fn sets_marks(&self) -> bool {
        let rules = self.chains.iter().flat_map(|chain| &chain.rules);
        rules.flat_map(|rule| &rule.0).any(|it| *it == Expr::Marks)
    }

    /// Whether legacy iptables has a table here.
    pub fn has_legacy(&self) -> bool {
        let legacy = |chain: &Chain| matches!(chain.owner, Owner::Legacy(_));
        self.chains.iter().any(legacy)
    }

    /// Whether a chain or table has a name of which this holds: whoever made it can be known by it.
    pub fn has_name(&self, is_it: impl Fn(&str) -> bool) -> bool {
        let named = |chain: &Chain| is_it(&chain.table) || is_it(&chain.name);
        self.chains.iter().any(named)
    }

    /// The chain of that name in a table.
    fn chain(&self, owner: Owner, table: &str, name: &str) -> Option<&Chain> {
        let is_it = |it: &&Chain| it.owner == owner && it.table == table && it.name == name;
        self.chains.iter().find(is_it)
    }
}

#[cfg(test)]
mod tests;
