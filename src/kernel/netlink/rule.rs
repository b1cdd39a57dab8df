//! Policy routing rules.

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleHeader, RuleMessage};

use std::net::IpAddr;

use super::{Family, Netlink, Result, attributes, ip, word};

/// A policy routing rule, as far as this daemon makes them: `fwmark MARK/MASK lookup TABLE`.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Rule {
    /// IPv4 or IPv6.
    pub family: Family,
    /// Preference; the kernel tries lower ones first.
    pub priority: u32,
    /// Mark and mask.
    pub mark: Option<(u32, u32)>,
    /// The table in which it looks up a route; `None` for rules with another action.
    pub table: Option<u32>,
    /// Whether it also selects by something else than the mark (we read this and the rest, and
    /// never write it).
    pub selects_more: bool,
    /// It is about what it does not select.
    pub inverted: bool,
    /// The prefix of the sources that it selects; `None` for any.
    pub from: Option<(IpAddr, u8)>,
    /// Whether it selects by protocol, ports or DSCP.
    pub detailed: bool,
    /// The longest of the prefixes whose routes it does not take from its table.
    pub suppresses: Option<u32>,
}

impl Rule {
    /// A rule for every packet, whatever it is, that says nothing of a table.
    pub fn of(family: Family, priority: u32) -> Self {
        Self {
            family,
            priority,
            mark: None,
            table: None,
            selects_more: false,
            inverted: false,
            from: None,
            detailed: false,
            suppresses: None,
        }
    }
}

impl Netlink {
    /// Every policy routing rule of a family, in the order of preference.
    pub fn rules(&self, family: Family) -> Result<Vec<Rule>> {
        let mut message = RuleMessage::default();
        message.header.family = family.raw();
        let answers = self.dump("list rules", RouteNetlinkMessage::GetRule(message))?;
        Ok(answers
            .iter()
            .filter_map(|answer| read_rule(answer))
            .filter(|rule| rule.family == family)
            .collect())
    }

    /// Adds a rule. It is an error if the same one exists.
    pub fn add_rule(&self, rule: &Rule) -> Result<()> {
        let request = RouteNetlinkMessage::NewRule(rule_message(rule));
        self.acked("add rule", request, NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Deletes a rule.
    pub fn delete_rule(&self, rule: &Rule) -> Result<()> {
        self.acked(
            "delete rule",
            RouteNetlinkMessage::DelRule(rule_message(rule)),
            0,
        )
    }
}

fn rule_message(rule: &Rule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header = RuleHeader {
        family: rule.family.raw(),
        action: RuleAction::ToTable,
        ..RuleHeader::default()
    };
    message
        .attributes
        .push(RuleAttribute::Priority(rule.priority));
    if let Some((mark, mask)) = rule.mark {
        message.attributes.push(RuleAttribute::FwMark(mark));
        message.attributes.push(RuleAttribute::FwMask(mask));
    }
    message
        .attributes
        .extend(rule.table.map(RuleAttribute::Table));
    message
}

fn read_rule(payload: &[u8]) -> Option<Rule> {
    const FR_ACT_TO_TBL: u8 = 1;
    // From linux/fib_rules.h.
    const FRA_SRC: u16 = 2;
    const FRA_PRIORITY: u16 = 6;
    const FRA_FWMARK: u16 = 10;
    const FRA_SUPPRESS_PREFIXLEN: u16 = 14;
    const FRA_TABLE: u16 = 15;
    const FRA_FWMASK: u16 = 16;
    const FRA_PAD: u16 = 18;
    const FRA_PROTOCOL: u16 = 21;
    /// The protocol, and ranges of ports.
    const FRA_IP_PROTO: u16 = 22;
    const FRA_DPORT_RANGE: u16 = 24;
    const FRA_DSCP: u16 = 25;
    const FIB_RULE_INVERT: u32 = 2;
    let (header, rest) = payload.split_first_chunk::<12>()?;
    let inverted = word(&header[8..12])? & FIB_RULE_INVERT != 0;
    let service = header[3] > 0;
    let mut rule = Rule {
        table: Some(header[4].into()),
        selects_more: header[1] > 0 || header[2] > 0 || service || inverted,
        inverted,
        detailed: service,
        ..Rule::of(Family::from_raw(header[0])?, 0)
    };
    let (mut mark, mut mask) = (None, u32::MAX);
    for (kind, value) in attributes(rest) {
        match kind {
            FRA_PRIORITY => rule.priority = word(value)?,
            FRA_FWMARK => mark = word(value),
            FRA_FWMASK => mask = word(value)?,
            FRA_TABLE => rule.table = word(value),
            // Every rule without a suppressor says "suppress nothing".
            FRA_SUPPRESS_PREFIXLEN if word(value) == Some(u32::MAX) => {}
            FRA_SUPPRESS_PREFIXLEN => {
                rule.selects_more = true;
                rule.suppresses = word(value);
            }
            FRA_PAD | FRA_PROTOCOL => {}
            FRA_SRC => rule.from = Some((ip(value)?, header[2])),
            FRA_IP_PROTO..=FRA_DPORT_RANGE | FRA_DSCP => {
                rule.selects_more = true;
                rule.detailed = true;
            }
            _ => rule.selects_more = true,
        }
    }
    rule.mark = mark.map(|mark| (mark, mask));
    if header[7] != FR_ACT_TO_TBL {
        rule.table = None;
    }
    Some(rule)
}
