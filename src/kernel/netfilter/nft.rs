//! Reads nftables (linux/netfilter/nf_tables.h): numbers are big-endian there, but for what is in
//! registers.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};

use netlink_packet_core::NLM_F_DUMP;
use netlink_sys::protocols::NETLINK_NETFILTER;

use super::xt;
use super::{Action, Chain, Comparison, Element, Expr, Hook, Owner, Rule, Ruleset, Set, Source};
use crate::kernel::netlink::{ask, attributes, ip, text};

/// `NFNL_SUBSYS_NFTABLES`, in the upper byte of the type.
const NFTABLES: u16 = 10 << 8;
const GET_TABLE: u16 = NFTABLES | 1;
const GET_CHAIN: u16 = NFTABLES | 4;
const GET_RULE: u16 = NFTABLES | 7;
const GET_SET: u16 = NFTABLES | 10;
const GET_ELEMENTS: u16 = NFTABLES | 13;

/// Most rules that are read: a firewall of 50,000 rules is no help to a person.
const MAX_RULES: usize = 50_000;

/// Most elements of sets that are read: lists of banned addresses have more, and each takes some
/// hundred bytes.
const MAX_ELEMENTS: usize = 200_000;

/// Reads all of it into `ruleset`.
pub(super) fn read(ruleset: &mut Ruleset) {
    // A table that is asleep has no effect.
    let mut asleep: Vec<(u8, String)> = Vec::new();
    dump(GET_TABLE, &[], |family, answer| {
        let dormant = |value: &[u8]| number(value).is_some_and(|flags| flags & 1 != 0);
        if find(answer, 2).is_some_and(dormant) {
            asleep.extend(find(answer, 1).map(|name| (family, text(name))));
        }
    });
    let sleeps = |family: u8, table: &str| asleep.iter().any(|it| it.0 == family && it.1 == table);
    dump(GET_CHAIN, &[], |family, answer| {
        let Some(mut chain) = read_chain(family, answer) else {
            return;
        };
        if sleeps(family, &chain.table) {
            chain.hook = None;
            chain.drops = false;
        }
        ruleset.chains.push(chain);
    });
    let mut sets = Sets::read();
    let at: HashMap<(Owner, String, String), usize> = (ruleset.chains.iter().enumerate())
        .map(|(at, it)| ((it.owner, it.table.clone(), it.name.clone()), at))
        .collect();
    let mut left = MAX_RULES;
    dump(GET_RULE, &[], |family, answer| {
        let (Some(owner), Some(table), Some(chain)) =
            (owner(family), find(answer, 1), find(answer, 2))
        else {
            return;
        };
        let table = text(table);
        let exprs = find(answer, 4).unwrap_or_default();
        let rule = (attributes(exprs))
            .map(|(_, expr)| read_expr(expr, &mut |name| sets.place(family, &table, name)))
            .collect();
        if let Some(&at) = at.get(&(owner, table.clone(), text(chain)))
            && left > 0
        {
            left -= 1;
            ruleset.chains[at].rules.push(Rule(rule));
        }
    });
    ruleset.sets = sets.into_known();
}

fn owner(family: u8) -> Option<Owner> {
    Some(Owner::Nft(match family {
        1 => "inet",
        2 => "ip",
        5 => "netdev",
        7 => "bridge",
        10 => "ip6",
        _ => return None,
    }))
}

fn read_chain(family: u8, answer: &[u8]) -> Option<Chain> {
    const TABLE: u16 = 1;
    const NAME: u16 = 3;
    const HOOK: u16 = 4;
    const POLICY: u16 = 5;
    let owner = owner(family)?;
    let hook = find(answer, HOOK).and_then(|hook| {
        let place = Hook::from_raw(number(find(hook, 1)?)?)?;
        Some((place, number(find(hook, 2)?)?.cast_signed()))
    });
    // The hooks of bridges and devices have other numbers.
    let of_ip = matches!(owner.name(), "inet" | "ip" | "ip6");
    // `NF_DROP`.
    let drops = find(answer, POLICY).and_then(number) == Some(0);
    Some(Chain {
        owner,
        table: text(find(answer, TABLE)?),
        name: text(find(answer, NAME)?),
        hook: hook.filter(|_| of_ip),
        drops,
        rules: Vec::new(),
    })
}

/// The sets of all tables. Only those are read whole that a rule asks for.
struct Sets {
    /// Whether each has ranges.
    ranges: HashMap<(u8, String, String), bool>,
    places: HashMap<(u8, String, String), usize>,
    known: Vec<Set>,
    left: usize,
}

impl Sets {
    fn read() -> Self {
        const INTERVAL: u32 = 4;
        let mut ranges = HashMap::new();
        dump(GET_SET, &[], |family, answer| {
            let (Some(table), Some(name)) = (find(answer, 1), find(answer, 2)) else {
                return;
            };
            let flags = find(answer, 3).and_then(number).unwrap_or(0);
            ranges.insert((family, text(table), text(name)), flags & INTERVAL != 0);
        });
        Self {
            ranges,
            places: HashMap::new(),
            known: Vec::new(),
            left: MAX_ELEMENTS,
        }
    }

    /// Where the set of that name will stand.
    fn place(&mut self, family: u8, table: &str, name: &str) -> Option<usize> {
        let key = (family, table.to_owned(), name.to_owned());
        if let Some(&place) = self.places.get(&key) {
            return Some(place);
        }
        let mut set = Set {
            ranges: *self.ranges.get(&key)?,
            ..Set::default()
        };
        let mut request = Vec::new();
        put(&mut request, 1, table);
        put(&mut request, 2, name);
        let left = &mut self.left;
        let whole = ask_all(family, GET_ELEMENTS, &request, |_, answer| {
            for (_, element) in find(answer, 3).into_iter().flat_map(attributes) {
                match read_element(element) {
                    Some(element) if *left > 0 => {
                        *left -= 1;
                        set.elements.push(element);
                    }
                    Some(_) | None => set.partial = true,
                }
            }
        });
        set.partial |= !whole;
        set.elements.sort_by(|a, b| a.key.cmp(&b.key));
        let place = self.known.len();
        self.known.push(set);
        self.places.insert(key, place);
        Some(place)
    }

    fn into_known(self) -> Vec<Set> {
        self.known
    }
}

/// `None` of one that stands for a range in several dimensions, or for whatever is no other.
fn read_element(element: &[u8]) -> Option<Element> {
    const KEY: u16 = 1;
    const DATA: u16 = 2;
    const FLAGS: u16 = 3;
    const KEY_END: u16 = 10;
    const ENDS: u32 = 1;
    let flags = find(element, FLAGS).and_then(number).unwrap_or(0);
    if flags & !ENDS != 0 || find(element, KEY_END).is_some() {
        return None;
    }
    Some(Element {
        key: find(find(element, KEY)?, 1)?.to_vec(),
        ends: flags & ENDS != 0,
        act: find(element, DATA).and_then(read_verdict),
    })
}

/// A verdict, of a map or of a rule.
fn read_verdict(data: &[u8]) -> Option<Action> {
    const VERDICT: u16 = 2;
    let verdict = find(data, VERDICT)?;
    let chain = || find(verdict, 2).map(text);
    Some(match number(find(verdict, 1)?)?.cast_signed() {
        0 => Action::Drop,
        1 => Action::Accept,
        -1 => Action::Continue,
        -3 => Action::Jump(chain()?),
        -4 => Action::Goto(chain()?),
        -5 => Action::Return,
        _ => Action::Other,
    })
}

/// One expression; `place` tells where a set stands.
fn read_expr(expr: &[u8], place: &mut dyn FnMut(&str) -> Option<usize>) -> Expr {
    let name = find(expr, 1).map(text).unwrap_or_default();
    let data = find(expr, 2).unwrap_or_default();
    read_known(&name, data, place).unwrap_or(Expr::Unknown)
}

fn read_known(
    name: &str,
    data: &[u8],
    place: &mut dyn FnMut(&str) -> Option<usize>,
) -> Option<Expr> {
    let value = |kind| number(find(data, kind)?);
    let size = |kind| usize::try_from(value(kind)?).ok();
    let bytes = |kind| Some(find(find(data, kind)?, 1)?.to_vec());
    let register = |kind| register(value(kind)?);
    // `NFT_META_MARK` and `NFT_CT_MARK` have the same number.
    let writes = value(1).is_none();
    Some(match name {
        "meta" | "ct" if writes && value(2) == Some(3) => Expr::Marks,
        "meta" | "ct" if writes => Expr::Nothing,
        "meta" => Expr::Load {
            to: register(1)?,
            what: Source::Meta(value(2)?),
            length: super::walk::REGISTER,
        },
        "ct" => Expr::Load {
            to: register(1)?,
            what: Source::Conntrack(value(2)?),
            length: super::walk::REGISTER,
        },
        "payload" => Expr::Load {
            to: register(1)?,
            what: match value(2)? {
                1 => Source::Network(size(3)?),
                2 => Source::Transport(size(3)?),
                _ => Source::Other,
            },
            length: size(4)?,
        },
        "cmp" => Expr::Compare {
            at: register(1)?,
            how: match value(2)? {
                0 => Comparison::Equal,
                1 => Comparison::NotEqual,
                2 => Comparison::Less,
                3 => Comparison::LessOrEqual,
                4 => Comparison::Greater,
                5 => Comparison::GreaterOrEqual,
                _ => return None,
            },
            with: bytes(3)?,
        },
        "bitwise" => Expr::Mask {
            from: register(1)?,
            to: register(2)?,
            mask: bytes(4)?,
            turn: bytes(5)?,
        },
        "byteorder" => Expr::Swap {
            from: register(1)?,
            to: register(2)?,
            length: size(4)?,
            size: size(5)?,
        },
        "range" => Expr::Between {
            at: register(1)?,
            not: value(2)? == 1,
            ends: [bytes(3)?, bytes(4)?],
        },
        "lookup" => Expr::Lookup {
            set: place(&text(find(data, 1)?)),
            at: register(2)?,
            not: value(5).is_some_and(|flags| flags & 1 != 0),
            // Into the register of verdicts, or into one that nothing is known of.
            acts: match value(3) {
                None => false,
                Some(0) => true,
                Some(_) => return None,
            },
        },
        "immediate" => match value(1)? {
            0 => Expr::Act(read_verdict(find(data, 2)?)?),
            register => Expr::Mask {
                from: 0,
                to: self::register(register)?,
                mask: vec![0; bytes(2)?.len()],
                turn: bytes(2)?,
            },
        },
        "reject" => Expr::Act(Action::Reject),
        "match" => Expr::Match {
            name: text(find(data, 1)?),
            info: find(data, 3)?.to_vec(),
        },
        "target" => match text(find(data, 1)?).as_str() {
            "REJECT" => Expr::Act(Action::Reject),
            "DNAT" => Expr::Act(Action::Turn(xt::destination(find(data, 3)?))),
            "REDIRECT" => Expr::Act(Action::Turn(None)),
            "MARK" | "CONNMARK" => Expr::Marks,
            "LOG" | "NFLOG" | "TCPMSS" | "TRACE" | "CT" => Expr::Nothing,
            _ => return None,
        },
        // What it leads to stands in registers.
        "nat" if value(1)? == 1 => Expr::Act(Action::Turn(None)),
        "redir" => Expr::Act(Action::Turn(None)),
        "nat" | "masq" => Expr::Act(Action::Accept),
        "counter" | "log" | "notrack" | "tracing" => Expr::Nothing,
        _ => return None,
    })
}

/// The place of a register's first byte: there are four of 16 bytes (1 to 4), which are also
/// sixteen of four (8 to 23).
fn register(number: u32) -> Option<usize> {
    Some(match number {
        1..=4 => 16 * (number as usize - 1),
        8..=23 => 4 * (number as usize - 8),
        _ => return None,
    })
}

/// Where a NAT leads to, from an address of either family and a port.
pub(super) fn end(addr: &[u8], port: u16) -> Option<SocketAddr> {
    let addr: IpAddr = ip(addr)?;
    (!addr.is_unspecified()).then(|| SocketAddr::new(addr, port))
}

fn find(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    let mut all = attributes(bytes);
    all.find(|(found, _)| *found == kind)
        .map(|(_, value)| value)
}

fn number(value: &[u8]) -> Option<u32> {
    value.first_chunk().map(|raw| u32::from_be_bytes(*raw))
}

/// Adds a text as an attribute.
fn put(to: &mut Vec<u8>, kind: u16, text: &str) {
    let length = 4 + text.len() + 1;
    to.extend((length as u16).to_ne_bytes());
    to.extend(kind.to_ne_bytes());
    to.extend(text.as_bytes());
    to.resize(to.len() + 1 + length.next_multiple_of(4) - length, 0);
}

/// Asks for every object of a kind, and hands over the family and the attributes of each.
fn dump(kind: u16, request: &[u8], each: impl FnMut(u8, &[u8])) {
    ask_all(0, kind, request, each);
}

/// The same in one family; whether all came.
fn ask_all(family: u8, kind: u16, request: &[u8], mut each: impl FnMut(u8, &[u8])) -> bool {
    // `struct nfgenmsg`.
    let mut message = vec![family, 0, 0, 0];
    message.extend(request);
    let asked = ask(NETLINK_NETFILTER, kind, NLM_F_DUMP, &message, |answer| {
        if let Some((header, attributes)) = answer.split_first_chunk::<4>() {
            each(header[0], attributes);
        }
        true
    });
    asked.is_ok()
}
