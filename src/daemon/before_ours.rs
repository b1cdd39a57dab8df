//! A tc filter of others that packets meet before ipmoved's: what is said of it, by the daemon, in
//! `status` and by `check`.
//!
//! Owns the words alone. What stands where [`plan::before_ours`](crate::kernel::plan::before_ours)
//! and the checks find out.

use super::checks::quoted;
use crate::kernel::netlink::Direction;

/// Such a filter.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct BeforeOurs {
    /// The interface, and the side of it.
    pub(super) object: String,
    /// Which filter it is.
    what: String,
    /// The command that lists the filters there.
    list: String,
    /// The command that removes it.
    pub(super) remove: String,
}

impl BeforeOurs {
    /// A filter of this kind, at this preference.
    pub(super) fn new(interface: &str, direction: Direction, kind: &str, priority: u16) -> Self {
        let dev = quoted(interface);
        Self {
            object: format!("{interface} {direction}"),
            what: format!("a {kind} filter of others (pref {priority}) stands before ipmoved's"),
            list: format!("tc filter show dev {dev} {direction}"),
            remove: format!("tc filter del dev {dev} {direction} pref {priority}"),
        }
    }

    /// What it means, where the interface is named beside it.
    pub(super) fn meaning(&self) -> String {
        format!("{}: what it takes is not served", self.what)
    }

    /// The same as a line of its own, about what is not served.
    pub(super) fn warning(&self) -> String {
        let Self { object, what, .. } = self;
        format!("{what} on {object}: what it takes is not served")
    }

    /// As the cause of packets that do not come.
    pub(super) fn cause(&self) -> (String, String) {
        let Self {
            object,
            what,
            list,
            remove,
        } = self;
        let text = format!("{what} on {object}, and may take them");
        let remedy = format!("look at `{list}`; if nobody needs that filter, `{remove}`");
        (text, remedy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_said_alike_wherever_it_is_said() {
        let filter = BeforeOurs::new("eth0", Direction::Ingress, "u32", 1);
        let is = "a u32 filter of others (pref 1) stands before ipmoved's";
        assert!(filter.meaning().starts_with(is));
        assert!(
            filter
                .warning()
                .starts_with(&format!("{is} on eth0 ingress"))
        );
        let (text, remedy) = filter.cause();
        assert!(text.starts_with(&format!("{is} on eth0 ingress")));
        assert!(remedy.ends_with("`tc filter del dev eth0 ingress pref 1`"));
        assert_eq!(filter.remove, "tc filter del dev eth0 ingress pref 1");
    }
}
