//! Which chains of legacy iptables drop or reject packets, for a person to look at.
//!
//! Owns how to read that: the names of the tables, and the kernel's blob of each. It reads no
//! matches, so whether a packet meets a rule it does not know. It is for commands that people run,
//! as [`firewall`](super::netlink::firewall), which sees what `iptables-nft` makes.

#![allow(unsafe_code, reason = "getsockopt of tables has no safe wrapper")]

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::os::fd::AsRawFd;

use super::look::PROC_NET;
use super::netlink::firewall::DropChain;

/// From linux/netfilter_ipv4/ip_tables.h; those of IPv6 have the same numbers.
const GET_INFO: libc::c_int = 64;
const GET_ENTRIES: libc::c_int = 65;

/// `XT_TABLE_MAXNAMELEN`.
const NAME: usize = 32;

/// `struct ipt_getinfo`: name, hooks, five entries, five underflows, number, size.
const INFO: usize = NAME + 4 + 20 + 20 + 4 + 4;

/// `struct ipt_get_entries` before the entries, which are aligned to counters.
const HEAD: usize = (NAME + 4).next_multiple_of(align_of::<u64>());

/// Largest table that is read. A rule takes some 200 bytes.
const MAX_TABLE: usize = 16 << 20;

/// The chains of the hooks, by their number.
const HOOKS: [&str; 5] = ["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"];

/// `-NF_DROP - 1`, as a standard target has it.
const DROP: i32 = -1;

/// What differs between the families.
struct Kind {
    any: IpAddr,
    /// The level of its socket options.
    level: libc::c_int,
    /// The file that lists the tables that are loaded.
    names: &'static str,
    /// What is shown as the family.
    family: &'static str,
    /// Where `target_offset` stands in an entry.
    offsets: usize,
}

const KINDS: [Kind; 2] = [
    Kind {
        any: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        level: libc::SOL_IP,
        names: "ip_tables_names",
        family: "iptables-legacy",
        offsets: 88,
    },
    Kind {
        any: IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        level: libc::SOL_IPV6,
        names: "ip6_tables_names",
        family: "ip6tables-legacy",
        offsets: 140,
    },
];

/// The chains of this network namespace that drop packets, by policy or by rule. What cannot be
/// read is left out: without `CAP_NET_ADMIN` everything.
pub fn drop_chains() -> Vec<DropChain> {
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

fn read_table(kind: &Kind, table: &str) -> io::Result<Vec<DropChain>> {
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

/// Goes through the entries of a table: `info` says where each hook's chain begins, and where its
/// policy stands; the chains that people made begin with an `ERROR` that holds their name.
fn chains(kind: &Kind, table: &str, info: &[u8], entries: &[u8]) -> Vec<DropChain> {
    const TARGET: usize = 32;
    let hooks = word(info, NAME).unwrap_or(0);
    let hook_at = |list: usize, at: usize| {
        let here = |hook: usize| {
            hooks & 1 << hook != 0 && word(info, list + 4 * hook) == u32::try_from(at).ok()
        };
        (0..HOOKS.len()).find(|&hook| here(hook))
    };
    let (begins, ends) = (NAME + 4, NAME + 24);
    let mut found: Vec<DropChain> = Vec::new();
    let mut chain = String::new();
    let mut at = 0;
    while let (Some(target), Some(next)) = (
        half(entries, at + kind.offsets),
        half(entries, at + kind.offsets + 2),
    ) {
        if let Some(hook) = hook_at(begins, at) {
            chain = HOOKS[hook].into();
        }
        let target = at + usize::from(target);
        let name = text(entries, target + 2);
        let verdict = word(entries, target + TARGET).map(u32::cast_signed);
        let drops = (name.is_empty() && verdict == Some(DROP)) || name == "REJECT";
        if name == "ERROR" {
            chain = text(entries, target + TARGET);
        } else if drops {
            let policy = hook_at(ends, at).is_some();
            match found.last_mut().filter(|last| last.chain == chain) {
                Some(last) => {
                    last.policy |= policy;
                    last.rules += usize::from(!policy);
                }
                None => found.push(DropChain {
                    family: kind.family,
                    table: table.into(),
                    chain: chain.clone(),
                    policy,
                    rules: usize::from(!policy),
                }),
            }
        }
        if next == 0 {
            break;
        }
        at += usize::from(next);
    }
    found
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let raw = bytes.get(at..)?.first_chunk()?;
    Some(u32::from_ne_bytes(*raw))
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    let raw = bytes.get(at..)?.first_chunk()?;
    Some(u16::from_ne_bytes(*raw))
}

/// A name that ends with a zero.
fn text(bytes: &[u8], at: usize) -> String {
    let name = bytes.get(at..).unwrap_or_default().iter().take(NAME);
    let name = name.take_while(|&&byte| byte != 0);
    name.map(|&byte| char::from(byte)).collect()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::kernel::testing::in_fresh_namespace;

    #[test]
    fn chains_of_legacy_tables_that_drop_are_found() {
        let there = |program| Command::new(program).arg("-V").output().is_ok();
        if !there("iptables-legacy") || !there("ip6tables-legacy") {
            return println!("SKIPPED: there is no iptables-legacy here");
        }
        in_fresh_namespace(|| {
            assert_eq!(drop_chains(), []);
            for (program, line) in [
                ("iptables-legacy", "-P FORWARD DROP"),
                ("iptables-legacy", "-N own"),
                ("iptables-legacy", "-A INPUT -p tcp --dport 22 -j own"),
                ("iptables-legacy", "-A own -s 192.0.2.1 -j DROP"),
                ("iptables-legacy", "-A own -j REJECT"),
                ("iptables-legacy", "-A OUTPUT -p udp -j ACCEPT"),
                ("iptables-legacy", "-t raw -A PREROUTING -p tcp -j DROP"),
                ("ip6tables-legacy", "-t mangle -A OUTPUT -p tcp -j DROP"),
                ("ip6tables-legacy", "-P OUTPUT ACCEPT"),
            ] {
                let mut command = Command::new(program);
                let status = command.args(line.split(' ')).status();
                assert!(status.expect("it is installed").success(), "{line}");
            }
            let mut found: Vec<String> = drop_chains().iter().map(ToString::to_string).collect();
            found.sort();
            assert_eq!(
                found,
                [
                    "chain ip6tables-legacy mangle OUTPUT (1 rule that drops)",
                    "chain iptables-legacy filter FORWARD (policy drop)",
                    "chain iptables-legacy filter own (2 rules that drop)",
                    "chain iptables-legacy raw PREROUTING (1 rule that drops)",
                ]
            );
        });
    }

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
