//! Reads legacy iptables: the names of the tables, and the kernel's blob of each.

#![allow(unsafe_code, reason = "getsockopt of tables has no safe wrapper")]

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::os::fd::AsRawFd;

use super::xt::{half, word};
use super::{Action, Chain, Expr, Hook, Owner, Rule, xt};
use crate::kernel::look::PROC_NET;

/// From linux/netfilter_ipv4/ip_tables.h; those of IPv6 have the same numbers.
const GET_INFO: libc::c_int = 64;
const GET_ENTRIES: libc::c_int = 65;

/// `XT_TABLE_MAXNAMELEN`.
const NAME: usize = 32;

/// `struct ipt_getinfo`: name, hooks, five entries, five underflows, number, size.
const INFO: usize = NAME + 4 + 20 + 20 + 4 + 4;

/// `struct ipt_get_entries` before the entries, which are aligned to counters.
const HEAD: usize = (NAME + 4).next_multiple_of(align_of::<u64>());

/// `struct xt_entry_match` and `struct xt_entry_target` before their data: length, name, revision.
const EXTENSION: usize = 32;

/// Largest table that is read. A rule takes some 200 bytes.
const MAX_TABLE: usize = 16 << 20;

/// The chains of the hooks, by their number.
const HOOKS: [&str; 5] = ["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"];

/// What differs between the families.
struct Kind {
    any: IpAddr,
    /// The level of its socket options.
    level: libc::c_int,
    /// The file that lists the tables that are loaded.
    names: &'static str,
    /// Its command.
    command: &'static str,
    /// Where `target_offset` stands in an entry.
    offsets: usize,
    /// Length of `struct ipt_ip` or `struct ip6t_ip6`.
    head: usize,
    /// Where its flags stand in that.
    flags: usize,
    /// `IPT_F_GOTO`, `IP6T_F_GOTO`.
    goes: u8,
    /// Length of an entry before its matches.
    entry: usize,
}

const KINDS: [Kind; 2] = [
    Kind {
        any: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        level: libc::SOL_IP,
        names: "ip_tables_names",
        command: "iptables-legacy",
        offsets: 88,
        head: 84,
        flags: 82,
        goes: 2,
        entry: 112,
    },
    Kind {
        any: IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        level: libc::SOL_IPV6,
        names: "ip6_tables_names",
        command: "ip6tables-legacy",
        offsets: 140,
        head: 136,
        flags: 131,
        goes: 4,
        entry: 168,
    },
];

/// The chains of this network namespace. What cannot be read is left out: without `CAP_NET_ADMIN`
/// everything.
pub(super) fn read() -> Vec<Chain> {
    let mut found = Vec::new();
    for kind in &KINDS {
        // A table that is asked for would be loaded.
        let tables = fs::read_to_string(format!("{PROC_NET}/{}", kind.names));
        for table in tables.unwrap_or_default().lines() {
            found.extend(read_table(kind, table).unwrap_or_default());
        }
    }
    found
}

fn read_table(kind: &Kind, table: &str) -> io::Result<Vec<Chain>> {
    let socket = UdpSocket::bind((kind.any, 0))?;
    let mut info = vec![0; INFO];
    if table.len() >= NAME {
        return Ok(Vec::new());
    }
    info[..table.len()].copy_from_slice(table.as_bytes());
    ask(&socket, kind.level, GET_INFO, &mut info)?;
    let size = word(&info, INFO - 4).unwrap_or(0);
    let length = size as usize;
    if length > MAX_TABLE {
        return Ok(Vec::new());
    }
    let mut entries = vec![0; HEAD + length];
    entries[..table.len()].copy_from_slice(table.as_bytes());
    entries[NAME..NAME + 4].copy_from_slice(&size.to_ne_bytes());
    ask(&socket, kind.level, GET_ENTRIES, &mut entries)?;
    Ok(chains(kind, table, &info, &entries[HEAD..]))
}

/// Has the kernel fill in what an option is about.
fn ask(socket: &UdpSocket, level: i32, option: i32, buffer: &mut [u8]) -> io::Result<()> {
    let mut length = buffer.len() as libc::socklen_t;
    // SAFETY: the kernel reads and writes at most `length` bytes of `buffer`, which has that size.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            option,
            buffer.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// In which order the tables are asked at a hook (`enum nf_ip_hook_priorities`).
fn order(table: &str) -> i32 {
    match table {
        "raw" => -300,
        "mangle" => -150,
        "nat" => -100,
        "security" => 50,
        _ => 0,
    }
}

/// Goes through the entries of a table: `info` says where each hook's chain begins, and where its
/// policy stands; the chains that people made begin with an `ERROR` that holds their name, and a
/// jump names the entry behind it.
fn chains(kind: &Kind, table: &str, info: &[u8], entries: &[u8]) -> Vec<Chain> {
    let hooks = word(info, NAME).unwrap_or(0);
    let hook_at = |list: usize, at: usize| {
        let here = |hook: usize| {
            hooks & 1 << hook != 0 && word(info, list + 4 * hook) == u32::try_from(at).ok()
        };
        (0..HOOKS.len()).find(|&hook| here(hook))
    };
    let (begins, ends) = (NAME + 4, NAME + 24);
    let chain = |name: String, hook| Chain {
        owner: Owner::Legacy(kind.command),
        table: table.into(),
        name,
        hook,
        drops: false,
        rules: Vec::new(),
    };
    let mut found: Vec<Chain> = Vec::new();
    // Where each chain begins.
    let mut starts: Vec<(usize, String)> = Vec::new();
    let mut at = 0;
    while let (Some(target), Some(next)) = (
        half(entries, at + kind.offsets),
        half(entries, at + kind.offsets + 2),
    ) {
        let next = usize::from(next);
        if let Some(hook) = hook_at(begins, at) {
            let place = Hook::from_raw(hook as u32).map(|hook| (hook, order(table)));
            found.push(chain(HOOKS[hook].into(), place));
            starts.push((at, HOOKS[hook].into()));
        }
        let target = at + usize::from(target);
        let name = text(entries, target + 2);
        if name == "ERROR" {
            let name = text(entries, target + EXTENSION);
            starts.push((at + next, name.clone()));
            found.push(chain(name, None));
        } else if let Some(last) = found.last_mut() {
            let flags = entries.get(at + kind.flags).copied().unwrap_or(0);
            let act = act(entries, target, &name, flags & kind.goes != 0);
            if hook_at(ends, at).is_some() {
                last.drops = act == Some(Action::Drop);
            } else {
                let mut rule = asks(kind, entries, at, target);
                rule.push(match act {
                    Some(act) => Expr::Act(act),
                    None if matches!(name.as_str(), "MARK" | "CONNMARK") => Expr::Marks,
                    None if is_harmless(&name) => Expr::Nothing,
                    None => Expr::Act(Action::Other),
                });
                last.rules.push(Rule(rule));
            }
        }
        if next == 0 {
            break;
        }
        at += next;
    }
    name_jumps(&mut found, &starts);
    found
}

/// What a rule asks for.
fn asks(kind: &Kind, entries: &[u8], at: usize, target: usize) -> Vec<Expr> {
    let mut exprs = Vec::new();
    let head = entries.get(at..at + kind.head);
    exprs.extend(head.map(|head| Expr::Head(head.to_vec())));
    let mut at = at + kind.entry;
    while at + EXTENSION <= target {
        let length = usize::from(half(entries, at).unwrap_or(0));
        let info = entries.get(at + EXTENSION..at + length);
        exprs.push(info.map_or(Expr::Unknown, |info| Expr::Match {
            name: text(entries, at + 2),
            info: info.to_vec(),
        }));
        if length == 0 {
            break;
        }
        at += length;
    }
    exprs
}

/// What a rule does. A jump names the place that it leads to.
fn act(entries: &[u8], target: usize, name: &str, goes: bool) -> Option<Action> {
    let data = target + EXTENSION;
    Some(match name {
        // `NF_DROP`, `NF_ACCEPT`, `NF_REPEAT` (which stands for a return), less one and negative.
        "" => match word(entries, data)?.cast_signed() {
            -1 => Action::Drop,
            -2 => Action::Accept,
            -5 => Action::Return,
            place if place >= 0 && goes => Action::Goto(place.to_string()),
            place if place >= 0 => Action::Jump(place.to_string()),
            _ => Action::Other,
        },
        "REJECT" => Action::Reject,
        "DNAT" => Action::Turn(entries.get(data..).and_then(xt::destination)),
        "REDIRECT" => Action::Turn(None),
        _ => return None,
    })
}

/// Whether a target lets a packet go on.
fn is_harmless(target: &str) -> bool {
    let known = ["LOG", "NFLOG", "TCPMSS", "TRACE", "CT", "TOS", "DSCP"];
    known.contains(&target)
}

/// Gives jumps the names of the chains that they lead to.
fn name_jumps(chains: &mut [Chain], starts: &[(usize, String)]) {
    let rules = chains.iter_mut().flat_map(|chain| &mut chain.rules);
    for expr in rules.flat_map(|rule| &mut rule.0) {
        if let Expr::Act(Action::Jump(to) | Action::Goto(to)) = expr {
            let place = to.parse::<usize>().ok();
            let mut starts = starts.iter();
            match starts.find(|(start, _)| Some(*start) == place) {
                Some((_, name)) => to.clone_from(name),
                // To the rule behind it, as the kernel has it for a rule without a target.
                None => *expr = Expr::Nothing,
            }
        }
    }
}

/// A name that ends with a zero.
fn text(bytes: &[u8], at: usize) -> String {
    let name = bytes.get(at..).unwrap_or_default().iter().take(NAME);
    let name = name.take_while(|&&byte| byte != 0);
    name.map(|&byte| char::from(byte)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_bytes_make_it_panic_or_go_on_for_ever() {
        let mut entries = vec![0xff; 400];
        for kind in &KINDS {
            assert_eq!(chains(kind, "filter", &[0xff; INFO], &entries), []);
            entries[kind.offsets + 2..kind.offsets + 4].fill(0);
            assert_eq!(chains(kind, "filter", &[], &entries), []);
            assert_eq!(chains(kind, "filter", &[], &entries[..3]), []);
        }
    }
}
