//! A policy routing rule `fwmark MARK lookup TABLE`.

use std::fmt;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::{ChangeError, Kind, Means, Presence, There, Undone, in_ip};
use crate::kernel::netlink::{Family, Netlink, Rule};

/// A rule that sends packets with a mark to a table.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MarkRule {
    /// IPv4 or IPv6.
    pub family: Family,
    /// The mark, compared whole.
    pub mark: u32,
    /// The table.
    pub table: u32,
    /// Preference; the kernel tries lower ones first.
    pub priority: u32,
}

impl MarkRule {
    fn rule(&self) -> Rule {
        Rule {
            mark: Some((self.mark, u32::MAX)),
            table: Some(self.table),
            ..Rule::of(self.family, self.priority)
        }
    }
}

impl MarkRule {
    /// The rule as ip takes it. `action` is what to do with it.
    fn in_ip(&self, action: &str) -> String {
        let Self {
            family,
            mark,
            table,
            priority,
        } = self;
        let ip = in_ip(*family);
        format!("{ip} rule {action} pref {priority} fwmark {mark:#x} lookup {table}")
    }
}

impl fmt::Display for MarkRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            family,
            mark,
            table,
            priority,
        } = self;
        write!(
            f,
            "{family} rule pref {priority}: fwmark {mark:#x} lookup {table}"
        )
    }
}

impl Kind for MarkRule {
    /// A rule has no values beside its identity: another preference makes it another rule.
    fn object(&self) -> String {
        format!("rule {self}")
    }

    fn to_make(&self) -> String {
        self.in_ip("add")
    }

    fn to_undo(&self) -> String {
        self.in_ip("del")
    }

    /// It has numbers only, and any may be right.
    fn check(&self) -> Result<(), String> {
        Ok(())
    }

    fn is_unmistakable(&self) -> bool {
        true
    }

    fn present(&self, there: &There<'_>) -> Result<Presence, ChangeError> {
        let rules = there.netlink.rules(self.family)?;
        Ok(Presence::of(rules.contains(&self.rule())))
    }

    fn make(&self, with: &Means<'_>) -> Result<(), ChangeError> {
        Ok(with.netlink.add_rule(&self.rule())?)
    }

    fn undo(&self, netlink: &Netlink) -> Result<Undone, ChangeError> {
        netlink.delete_rule(&self.rule())?;
        Ok(Undone::Gone)
    }

    fn remedy(&self, error: &ChangeError) -> Option<&'static str> {
        (error.errno() == Some(Errno::OPNOTSUPP))
            .then_some("the kernel needs CONFIG_IP_MULTIPLE_TABLES")
    }
}
