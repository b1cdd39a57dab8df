//! Which chains of nftables drop or reject packets, for a person to look at.
//!
//! Owns how to read that. It is for commands that people run: a daemon does not open such a socket,
//! through which whoever takes it over could change the firewall.

use std::fmt;

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer};
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_NETFILTER;

use super::{NetlinkError, Result, attributes, text, verdict};

/// `NFNL_SUBSYS_NFTABLES`, in the upper byte of the type.
const NFTABLES: u16 = 10 << 8;
const GET_CHAIN: u16 = NFTABLES | 4;
const GET_RULE: u16 = NFTABLES | 7;

/// Most rules that are read: a firewall of 50,000 rules is no help to a person.
const MAX_RULES: usize = 50_000;

/// A chain that drops packets.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DropChain {
    /// The family as `nft` writes it.
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

/// The chains of this network namespace that drop packets, by policy or by rule. Rules that look a
/// verdict up in a map are not seen.
///
/// # Errors
/// Without nftables in the kernel, and without `CAP_NET_ADMIN`.
pub fn drop_chains() -> Result<Vec<DropChain>> {
    const TABLE: u16 = 1;
    const NAME: u16 = 3;
    const POLICY: u16 = 5;
    const EXPRESSIONS: u16 = 4;
    let mut all: Vec<DropChain> = Vec::new();
    let mut note = |family: u8, table: String, chain: String, policy: bool, rules: usize| {
        let Some(family) = name_of(family) else {
            return;
        };
        let is_it =
            |it: &&mut DropChain| it.family == family && it.table == table && it.chain == chain;
        match all.iter_mut().find(is_it) {
            Some(known) => {
                known.policy |= policy;
                known.rules += rules;
            }
            None => all.push(DropChain {
                family,
                table,
                chain,
                policy,
                rules,
            }),
        }
    };
    dump("list chains", GET_CHAIN, &mut |family, answer| {
        let (mut table, mut name, mut policy) = (String::new(), String::new(), None);
        for (kind, value) in attributes(answer) {
            match kind {
                TABLE => table = text(value),
                NAME => name = text(value),
                POLICY => policy = value.first_chunk().map(|raw| u32::from_be_bytes(*raw)),
                _ => {}
            }
        }
        // `NF_DROP`.
        if policy == Some(0) {
            note(family, table, name, true, 0);
        }
    })?;
    let mut left = MAX_RULES;
    dump("list rules", GET_RULE, &mut |family, answer| {
        let (mut table, mut chain, mut drops) = (String::new(), String::new(), false);
        for (kind, value) in attributes(answer) {
            match kind {
                TABLE => table = text(value),
                2 => chain = text(value),
                EXPRESSIONS => drops = drops_packets(value),
                _ => {}
            }
        }
        if drops && left > 0 {
            left -= 1;
            note(family, table, chain, false, 1);
        }
    })?;
    Ok(all)
}

/// Whether one of a rule's expressions is `reject`, or the immediate verdict `NF_DROP`.
fn drops_packets(expressions: &[u8]) -> bool {
    const NAME: u16 = 1;
    const DATA: u16 = 2;
    const IMMEDIATE_DATA: u16 = 2;
    const VERDICT: u16 = 2;
    const CODE: u16 = 1;
    let inner = |value: &'_ [u8], wanted: u16| -> Option<Vec<u8>> {
        let found = attributes(value).find(|(kind, _)| *kind == wanted);
        found.map(|(_, value)| value.to_vec())
    };
    attributes(expressions).any(|(_, expression)| {
        let name = inner(expression, NAME)
            .map(|name| text(&name))
            .unwrap_or_default();
        let code = || {
            let data = inner(&inner(expression, DATA)?, IMMEDIATE_DATA)?;
            let code = inner(&inner(&data, VERDICT)?, CODE)?;
            code.first_chunk().map(|raw| u32::from_be_bytes(*raw))
        };
        name == "reject" || (name == "immediate" && code() == Some(0))
    })
}

fn name_of(family: u8) -> Option<&'static str> {
    Some(match family {
        1 => "inet",
        2 => "ip",
        5 => "netdev",
        7 => "bridge",
        10 => "ip6",
        _ => return None,
    })
}

/// Asks for every object of a kind, and hands over the family and the attributes of each.
fn dump(request: &'static str, kind: u16, each: &mut dyn FnMut(u8, &[u8])) -> Result<()> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    // `struct nlmsghdr`, then `struct nfgenmsg` of any family.
    let mut message = Vec::new();
    message.extend_from_slice(&20_u32.to_ne_bytes());
    message.extend_from_slice(&kind.to_ne_bytes());
    message.extend_from_slice(&(NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    message.extend_from_slice(&[0; 12]);
    socket.send(&message, 0)?;
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        let mut rest = &datagram[..];
        while !rest.is_empty() {
            let answer = NetlinkBuffer::new_checked(rest)
                .map_err(|_| NetlinkError::Malformed { request })?;
            match answer.message_type() {
                NLMSG_ERROR | NLMSG_DONE => {
                    return match verdict(&answer) {
                        None => Ok(()),
                        Some((errno, detail)) => Err(NetlinkError::Refused {
                            request,
                            errno,
                            detail,
                        }),
                    };
                }
                _ => {
                    if let Some((header, attributes)) = answer.payload().split_first_chunk::<4>() {
                        each(header[0], attributes);
                    }
                }
            }
            let length = (answer.length() as usize).next_multiple_of(4);
            rest = rest.get(length..).unwrap_or_default();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::kernel::testing::in_fresh_namespace;

    #[test]
    fn chains_that_drop_are_found() {
        in_fresh_namespace(|| {
            assert_eq!(drop_chains().unwrap(), []);
            let rules = "table inet f {
                chain in { type filter hook input priority 0; policy drop; tcp dport 22 accept; }
                chain own { tcp dport 80 counter drop; tcp dport 81 reject; }
                chain fine { tcp dport 80 counter accept; ip saddr 192.0.2.1 jump own; }
            }";
            let nft = Command::new("nft")
                .arg(rules)
                .status()
                .expect("nft is installed");
            assert!(nft.success());
            let found: Vec<String> = drop_chains()
                .unwrap()
                .iter()
                .map(ToString::to_string)
                .collect();
            assert_eq!(
                found,
                [
                    "chain inet f in (policy drop)",
                    "chain inet f own (2 rules that drop)"
                ]
            );
        });
    }
}
