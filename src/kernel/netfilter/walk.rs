//! A packet's way through the chains of a hook.

use std::net::{IpAddr, SocketAddr};

use super::{Action, Chain, Comparison, Expr, Hook, Owner, Rule, Ruleset, Set, Source, xt};

/// Bytes of a register.
pub(super) const REGISTER: usize = 16;

/// Bytes of all registers.
const REGISTERS: usize = 4 * REGISTER;

/// Jumps within one another that are followed; the kernel takes as many (`NFT_JUMP_STACK_SIZE`).
const MAX_DEPTH: usize = 16;

/// `IFNAMSIZ`.
const NAME: usize = 16;

/// The first packet of a conversation.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Packet {
    /// The interface that it comes by.
    pub iif: Option<(u32, String)>,
    /// The interface that it leaves by.
    pub oif: Option<(u32, String)>,
    /// Its source and destination address.
    pub addrs: (IpAddr, IpAddr),
    /// The protocol: TCP (6) or UDP (17).
    pub protocol: u8,
    /// Its source and destination port.
    pub ports: (u16, u16),
}

/// What becomes of a packet at a hook.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Fate {
    /// It passes, as far as is known.
    Passes,
    /// It is turned to another end, which may not be known.
    Turned(Option<SocketAddr>),
    /// It is dropped or rejected, whatever is not known.
    Ends(Culprit),
}

/// Who ends a packet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Culprit {
    /// Whose chain that is.
    pub owner: Owner,
    /// Its table.
    pub table: String,
    /// The chain at the hook, from which a packet comes to the rule.
    pub base: String,
    /// The chain with the rule.
    pub chain: String,
    /// No rule ends it, but the chain's policy.
    pub policy: bool,
    /// The sender is told.
    pub rejects: bool,
}

/// What is not certain of a packet's way through a chain.
#[derive(Default)]
struct Doubt {
    accepted: bool,
}

/// What a chain makes of a packet.
enum Flow {
    /// The next rule, or the end of the chain.
    Next,
    /// Back to where it came from.
    Return,
    Accept,
    Turn(Option<SocketAddr>),
    End {
        chain: String,
        rejects: bool,
    },
}

/// What a rule knows.
struct Registers([Option<u8>; REGISTERS]);

impl Ruleset {
    /// What becomes of a packet at a hook: it meets each chain there, in their order.
    pub fn fate(&self, hook: Hook, packet: &Packet) -> Fate {
        let v4 = packet.addrs.0.is_ipv4();
        let mut chains: Vec<(i32, &Chain)> = (self.chains.iter())
            .filter(|chain| chain.owner.sees(v4))
            .filter_map(|chain| chain.hook.filter(|at| at.0 == hook).map(|at| (at.1, chain)))
            .collect();
        chains.sort_by_key(|(order, _)| *order);
        let mut turned = None;
        for (_, base) in chains {
            let mut doubt = Doubt::default();
            let ends = |chain: &str, policy, rejects| Culprit {
                owner: base.owner,
                table: base.table.clone(),
                base: base.name.clone(),
                chain: chain.to_owned(),
                policy,
                rejects,
            };
            let culprit = match self.run(base, packet, true, &mut doubt, 0) {
                Flow::Accept => continue,
                Flow::Turn(to) => {
                    turned = Some(to);
                    continue;
                }
                Flow::Next | Flow::Return if !base.drops => continue,
                Flow::Next | Flow::Return => ends(&base.name, true, false),
                Flow::End { chain, rejects } => ends(&chain, false, rejects),
            };
            if !doubt.accepted {
                return Fate::Ends(culprit);
            }
        }
        turned.map_or(Fate::Passes, Fate::Turned)
    }

    /// `certain`: the packet comes to this chain, whatever is not known.
    fn run(
        &self,
        chain: &Chain,
        packet: &Packet,
        certain: bool,
        doubt: &mut Doubt,
        depth: usize,
    ) -> Flow {
        if depth > MAX_DEPTH {
            doubt.accepted = true;
            return Flow::Return;
        }
        for rule in &chain.rules {
            let Some((act, fits)) = self.act(rule, packet) else {
                continue;
            };
            let certain = certain && fits;
            let flow = match act {
                Action::Continue => Flow::Next,
                Action::Return => Flow::Return,
                Action::Accept => Flow::Accept,
                // It may go on from there, or not.
                Action::Other => {
                    doubt.accepted = true;
                    Flow::Next
                }
                Action::Drop | Action::Reject => Flow::End {
                    chain: chain.name.clone(),
                    rejects: act == Action::Reject,
                },
                Action::Turn(to) => Flow::Turn(to),
                Action::Jump(ref name) | Action::Goto(ref name) => {
                    let Some(to) = self.chain(chain.owner, &chain.table, name) else {
                        continue;
                    };
                    let flow = self.run(to, packet, certain, doubt, depth + 1);
                    match (flow, matches!(act, Action::Goto(_))) {
                        (Flow::Next | Flow::Return, true) => Flow::Return,
                        (Flow::Next | Flow::Return, false) => Flow::Next,
                        (ended, _) => ended,
                    }
                }
            };
            match flow {
                Flow::Next => {}
                ended if certain => return ended,
                Flow::Accept | Flow::Turn(_) | Flow::Return => doubt.accepted = true,
                Flow::End { .. } => {}
            }
        }
        Flow::Next
    }

    /// What a rule does with a packet, and whether that is certain; `None` if it does not fit, or
    /// does nothing.
    fn act(&self, rule: &Rule, packet: &Packet) -> Option<(Action, bool)> {
        let mut registers = Registers([None; REGISTERS]);
        let mut certain = true;
        for expr in &rule.0 {
            let fits = match expr {
                Expr::Act(act) => return Some((act.clone(), certain)),
                Expr::Lookup { at, set, acts, not } => {
                    let set = set.and_then(|set| self.sets.get(set));
                    let found = set.map_or(Found::Unknown, |set| set.find(&registers, *at));
                    match (found, acts) {
                        (Found::There(Some(act)), true) => return Some((act, certain)),
                        (Found::There(_), _) => Some(!not),
                        (Found::Not, _) => Some(*not),
                        // It may be any of them.
                        (Found::Unknown, true) => return Some((Action::Other, false)),
                        (Found::Unknown, false) => None,
                    }
                }
                Expr::Load { .. }
                | Expr::Compare { .. }
                | Expr::Mask { .. }
                | Expr::Swap { .. }
                | Expr::Between { .. }
                | Expr::Head(_)
                | Expr::Match { .. }
                | Expr::Marks
                | Expr::Nothing
                | Expr::Unknown => registers.step(expr, packet),
            };
            match fits {
                Some(true) => {}
                Some(false) => return None,
                None => certain = false,
            }
        }
        None
    }
}

/// What a set says of a key.
enum Found {
    There(Option<Action>),
    Not,
    Unknown,
}

impl Set {
    fn find(&self, registers: &Registers, at: usize) -> Found {
        let Some(length) = self.elements.first().map(|it| it.key.len()) else {
            return if self.partial {
                Found::Unknown
            } else {
                Found::Not
            };
        };
        let Some(key) = registers.get(at, length) else {
            return Found::Unknown;
        };
        let found = if self.ranges {
            let last = self.elements.partition_point(|it| it.key <= key);
            // Where one range ends another may begin.
            let same = |at: &usize| self.elements[*at].key == self.elements[last - 1].key;
            let group = (0..last).rev().take_while(same);
            group
                .map(|at| &self.elements[at])
                .find(|element| !element.ends)
        } else {
            self.elements.iter().find(|element| element.key == key)
        };
        match found {
            Some(element) => Found::There(element.act.clone()),
            None if self.partial => Found::Unknown,
            None => Found::Not,
        }
    }
}

impl Registers {
    fn get(&self, at: usize, length: usize) -> Option<Vec<u8>> {
        self.0.get(at..at + length)?.iter().copied().collect()
    }

    /// Puts bytes there, or that they are not known.
    fn put(&mut self, at: usize, bytes: Option<&[u8]>, length: usize) {
        let places = self.0.iter_mut().skip(at).take(length);
        for (place, number) in places.zip(0..) {
            *place = bytes.and_then(|bytes| bytes.get(number).copied());
        }
    }

    /// One part of a rule; `Some(false)` if the packet does not fit, `None` if nobody knows.
    fn step(&mut self, expr: &Expr, packet: &Packet) -> Option<bool> {
        match expr {
            Expr::Load { to, what, length } => {
                let known = packet.get(*what, *length);
                self.put(*to, known.as_deref(), (*length).max(REGISTER));
                Some(true)
            }
            Expr::Compare { at, how, with } => {
                let order = self.get(*at, with.len())?.cmp(with);
                Some(match how {
                    Comparison::Equal => order.is_eq(),
                    Comparison::NotEqual => order.is_ne(),
                    Comparison::Less => order.is_lt(),
                    Comparison::LessOrEqual => order.is_le(),
                    Comparison::Greater => order.is_gt(),
                    Comparison::GreaterOrEqual => order.is_ge(),
                })
            }
            Expr::Mask {
                from,
                to,
                mask,
                turn,
            } => {
                let result: Vec<Option<u8>> = (mask.iter().zip(turn).zip(*from..))
                    .map(
                        |((mask, turn), at)| match (mask, self.0.get(at).copied()?) {
                            // Whatever was there.
                            (0, _) => Some(*turn),
                            (mask, known) => Some((known? & mask) ^ turn),
                        },
                    )
                    .collect();
                for (place, byte) in self.0.iter_mut().skip(*to).zip(result) {
                    *place = byte;
                }
                Some(true)
            }
            Expr::Swap {
                from,
                to,
                length,
                size,
            } => {
                let turned = self.get(*from, *length).filter(|_| *size > 0);
                let turned = turned.map(|bytes| -> Vec<u8> {
                    let parts = bytes.chunks(*size);
                    let turn = |part: &[u8]| part.iter().rev().copied().collect::<Vec<u8>>();
                    match cfg!(target_endian = "little") {
                        true => parts.flat_map(turn).collect(),
                        false => bytes,
                    }
                });
                self.put(*to, turned.as_deref(), *length);
                Some(true)
            }
            Expr::Between {
                at,
                not,
                ends: [first, last],
            } => {
                let value = self.get(*at, first.len())?;
                Some((*first <= value && value <= *last) != *not)
            }
            Expr::Head(head) => packet.fits_head(head),
            Expr::Match { name, info } => xt::fits(name, info, packet),
            Expr::Nothing | Expr::Marks => Some(true),
            // They are handled before.
            Expr::Lookup { .. } | Expr::Act(_) | Expr::Unknown => None,
        }
    }
}

impl Packet {
    /// Whether it only passes through this server.
    pub(super) fn is_forwarded(&self) -> bool {
        self.iif.is_some() && self.oif.is_some()
    }

    /// What the kernel would put into a register.
    fn get(&self, what: Source, length: usize) -> Option<Vec<u8>> {
        let padded = |bytes: &[u8]| {
            let mut padded = bytes.to_vec();
            padded.resize(padded.len().max(REGISTER), 0);
            padded
        };
        let link = |link: &Option<(u32, String)>| link.as_ref().map_or(0, |(index, _)| *index);
        let name = |link: &Option<(u32, String)>| {
            let name = link.as_ref().map_or("", |(_, name)| name);
            padded(name.as_bytes())
        };
        let v4 = self.addrs.0.is_ipv4();
        Some(match what {
            Source::Meta(key) => match key {
                1 => padded(&(if v4 { 0x0800_u16 } else { 0x86dd }).to_be_bytes()),
                // No mark, from another host.
                3 | 19 => padded(&[]),
                4 => padded(&link(&self.iif).to_ne_bytes()),
                5 => padded(&link(&self.oif).to_ne_bytes()),
                6 => name(&self.iif),
                7 => name(&self.oif),
                15 => padded(&[if v4 { 2 } else { 10 }]),
                16 => padded(&[self.protocol]),
                _ => return None,
            },
            Source::Conntrack(key) => match key {
                // The state: new.
                0 => padded(&8_u32.to_ne_bytes()),
                // Its status: it may have been turned on its way here.
                2 if self.is_forwarded() => return None,
                // Direction, status and mark: of the one who began, nothing yet.
                1..=3 => padded(&[]),
                _ => return None,
            },
            Source::Network(at) => self.network().get(at..at + length)?.to_vec(),
            Source::Transport(at) => self.transport().get(at..at + length)?.to_vec(),
            Source::Other => return None,
        })
    }

    /// The network header: that of IPv4 without options.
    fn network(&self) -> Vec<u8> {
        let mut bytes = match self.addrs.0 {
            IpAddr::V4(_) => {
                let mut bytes = vec![0; 12];
                (bytes[0], bytes[8], bytes[9]) = (0x45, 64, self.protocol);
                bytes
            }
            IpAddr::V6(_) => vec![0x60, 0, 0, 0, 0, 20, self.protocol, 64],
        };
        for addr in [self.addrs.0, self.addrs.1] {
            match addr {
                IpAddr::V4(addr) => bytes.extend(addr.octets()),
                IpAddr::V6(addr) => bytes.extend(addr.octets()),
            }
        }
        bytes
    }

    /// What stands behind it: ports, and of TCP that it is a SYN.
    fn transport(&self) -> Vec<u8> {
        const FLAGS: usize = 13;
        let mut bytes = vec![0; 20];
        bytes[..2].copy_from_slice(&self.ports.0.to_be_bytes());
        bytes[2..4].copy_from_slice(&self.ports.1.to_be_bytes());
        if self.protocol == 6 {
            (bytes[12], bytes[FLAGS]) = (0x50, 2);
        }
        bytes
    }

    /// Whether it fits `struct ipt_ip` or `struct ip6t_ip6`: addresses, masks, interfaces, masks,
    /// protocol, and which of them is inverted.
    fn fits_head(&self, head: &[u8]) -> Option<bool> {
        let network = self.network();
        let v4 = self.addrs.0.is_ipv4();
        let (length, source) = if v4 { (4, 12) } else { (16, 8) };
        let masked = |at: usize, from: usize| {
            let (value, mask) = (head.get(at..at + length)?, head.get(at + 2 * length..)?);
            let own = network.get(from..from + length)?;
            let both = own.iter().zip(mask).map(|(own, mask)| own & mask);
            Some(both.eq(value.iter().copied()))
        };
        let links = 4 * length;
        let on = |at: usize, link: &Option<(u32, String)>| {
            let (value, mask) = (head.get(at..at + NAME)?, head.get(at + 2 * NAME..)?);
            let mut own = link
                .as_ref()
                .map_or("", |(_, name)| name)
                .as_bytes()
                .to_vec();
            own.resize(NAME, 0);
            let both = own.iter().zip(mask).map(|(own, mask)| own & mask);
            let wanted = value.iter().zip(mask).map(|(value, mask)| value & mask);
            Some(both.eq(wanted))
        };
        let behind = links + 4 * NAME;
        let protocol = u16::from_ne_bytes(*head.get(behind..)?.first_chunk()?);
        // Of IPv6 the class of traffic stands between.
        let (flags, turned) = if v4 { (2, 3) } else { (3, 4) };
        let (flags, turned) = (*head.get(behind + flags)?, *head.get(behind + turned)?);
        let is = |fits: bool, bit: u8| fits != (turned & bit != 0);
        // `IP6T_F_PROTO`: without it no protocol is meant.
        let any = protocol == 0 || (!v4 && flags & 1 == 0);
        let fits = is(masked(0, source)?, 0x08)
            && is(masked(length, source + length)?, 0x10)
            && is(on(links, &self.iif)?, 0x01)
            && is(on(links + NAME, &self.oif)?, 0x02)
            && (any || is(protocol == u16::from(self.protocol), 0x40));
        // Fragments alone.
        let of_fragments = v4 && flags & 1 != 0;
        Some(fits && !of_fragments)
    }
}
