//! The kinds of change in the kernel, one file for each.
//!
//! ```text
//!   clsact    the qdisc that carries filters
//!   filter    a BPF program on a side of an interface
//!   rule      a policy routing rule for a mark
//!   route     a default route in a table of our own
//!   sysctl    a setting under /proc/sys
//!   address   an address that the host holds, but never speaks from by itself
//!   local_prefix  a prefix of which the host holds every address
//! ```
//!
//! Each kind knows how to find, make and undo its object, and what a person can do when the kernel
//! refuses. [`Change`] hands on to it; only what undoing restores is known here,
//! since one kind alone restores anything. [`Host`](super::Host) owns the order of changes, and
//! what happens when one fails.
//!
//! A new kind is a new file, a variant of [`Change`] and a line in `Change::kind`. Each kind goes
//! into the journal as it stands here, so a renamed field must keep its old name there.

mod address;
mod clsact;
mod filter;
mod local_prefix;
mod route;
mod rule;
mod sysctl;
mod there;

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::netlink::{Family, Link, Netlink, NetlinkError};
use crate::io::privileges;

pub use address::QuietAddress;
pub use clsact::Clsact;
pub use filter::BpfFilter;
pub use local_prefix::LocalPrefix;
pub use route::DefaultRoute;
pub use rule::MarkRule;
pub use sysctl::Sysctl;

pub(super) use sysctl::{OfLink, read_sysctl, to_set};
pub(super) use there::There;

/// An interface, known by its index; the name is for people.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Interface {
    /// Interface index.
    pub index: u32,
    /// Its name when it was looked up.
    pub name: String,
}

impl From<&Link> for Interface {
    fn from(link: &Link) -> Self {
        Self {
            index: link.index,
            name: link.name.clone(),
        }
    }
}

impl Interface {
    fn check(&self) -> Result<(), String> {
        if is_interface_name(&self.name) {
            Ok(())
        } else {
            Err(format!("{:?} is no name of an interface", self.name))
        }
    }
}

/// Whether the kernel would take it as the name of an interface (`dev_valid_name`).
fn is_interface_name(name: &str) -> bool {
    let refused = |c: u8| matches!(c, b'/' | b':' | b' ' | b'\t'..=b'\r' | 0xa0 | 0);
    (1..libc::IFNAMSIZ).contains(&name.len())
        && !matches!(name, "." | "..")
        && !name.bytes().any(refused)
}

/// A word as a shell takes it. Names of interfaces may contain almost anything.
pub(super) fn typed(word: &str) -> String {
    let is_plain = |c: u8| c.is_ascii_alphanumeric() || b"._-+,:/=@".contains(&c);
    if word.bytes().all(is_plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// The program of iproute2, for one family.
fn in_ip(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip -6",
    }
}

/// One change to the kernel's state.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "change", rename_all = "snake_case")]
pub enum Change {
    /// The clsact qdisc on an interface.
    Clsact(Clsact),
    /// A BPF program on a clsact qdisc.
    Filter(BpfFilter),
    /// A policy routing rule.
    Rule(MarkRule),
    /// A default route.
    #[serde(rename = "default")]
    Route(DefaultRoute),
    /// A setting under `/proc/sys`.
    Sysctl(Sysctl),
    /// An address.
    Address(QuietAddress),
    /// A prefix.
    LocalPrefix(LocalPrefix),
}

impl Change {
    fn kind(&self) -> &dyn Kind {
        match self {
            Self::Clsact(change) => change,
            Self::Filter(change) => change,
            Self::Rule(change) => change,
            Self::Route(change) => change,
            Self::Sysctl(change) => change,
            Self::Address(change) => change,
            Self::LocalPrefix(change) => change,
        }
    }

    /// Whether a daemon can have made this change. What a journal says may have been written by
    /// anybody who took the daemon over; undoing must not lead further than making did.
    ///
    /// # Errors
    /// Why not. The text quotes what the journal says, escaped.
    pub(super) fn check(&self) -> Result<(), String> {
        self.kind().check()
    }

    /// The index of the interface that the object is on, if it goes with that.
    pub fn interface(&self) -> Option<u32> {
        match self {
            Self::Clsact(change) => Some(change.on.index),
            Self::Filter(change) => Some(change.on.index),
            Self::Address(change) => Some(change.on.index),
            Self::LocalPrefix(change) => Some(change.on.index),
            Self::Rule(_) | Self::Route(_) | Self::Sysctl(_) => None,
        }
    }

    /// Whether the host may have thousands of this kind. They do not depend on each other, so that
    /// all of a row can be looked for, and written down, before the first of them is made.
    pub(super) fn is_one_of_many(&self) -> bool {
        matches!(self, Self::Address(_) | Self::LocalPrefix(_))
    }

    /// The same for two changes that concern the same object, and for no others; `None` if only
    /// [`same_object`](Self::same_object) knows.
    pub(super) fn object(&self) -> Option<String> {
        let known = !matches!(self, Self::Sysctl(_));
        known.then(|| self.kind().object())
    }

    /// Whether both concern the same object, perhaps with other values.
    pub fn same_object(&self, other: &Self) -> bool {
        if let (Self::Sysctl(one), Self::Sysctl(other)) = (self, other) {
            return one.is_same_setting(other);
        }
        std::mem::discriminant(self) == std::mem::discriminant(other)
            && self.kind().object() == other.kind().object()
    }

    /// Whether this change replaces an `earlier` one without a trace: it is the same object in the
    /// same place.
    pub(super) fn takes_the_place_of(&self, earlier: &Self) -> bool {
        self.same_object(earlier) && self.kind().place() == earlier.kind().place()
    }

    /// Whether the object bears ipmoved's own name or number. Then it is ours even if the journal
    /// that recorded it is lost.
    pub(super) fn is_unmistakable(&self) -> bool {
        self.kind().is_unmistakable()
    }

    /// Whether asking for the object may take long, so that it is better to make it without asking.
    pub(super) fn is_costly_to_find(&self) -> bool {
        self.kind().is_costly_to_find()
    }

    /// Takes over what an `earlier` change of the same object would restore when it is undone.
    pub(super) fn keep_original(&mut self, earlier: &Self) {
        if let (Self::Sysctl(change), Self::Sysctl(earlier)) = (self, earlier) {
            change.from.clone_from(&earlier.from);
        }
    }

    /// From now on, undoing this change restores the present value.
    pub(super) fn renew_original(&mut self, netlink: &Netlink) -> Result<(), ChangeError> {
        if let Self::Sysctl(change) = self {
            change.from = change.value(netlink)?;
        }
        Ok(())
    }

    /// The command that makes it. Where a program is part of it, a path stands for that.
    pub(super) fn to_make(&self) -> String {
        self.kind().to_make()
    }

    /// Whether that command, typed by hand, removes default routes that routers have advertised.
    pub(super) fn takes_routes_by_hand(&self) -> bool {
        matches!(self, Self::Sysctl(sysctl) if sysctl.takes_routes_by_hand())
    }

    /// The command that brings it up to date if it is there, where that does anything.
    pub(super) fn to_renew(&self) -> Option<String> {
        self.kind().to_renew()
    }

    /// The command that undoes it.
    pub(super) fn to_undo(&self) -> String {
        self.kind().to_undo()
    }

    /// Whether the object is there on an interface that was only just made: a setting may begin
    /// with the wanted value.
    pub(super) fn present_at_first(&self) -> Presence {
        match self {
            Self::Sysctl(sysctl) => Presence::of(sysctl.from == sysctl.to),
            Self::Clsact(_)
            | Self::Filter(_)
            | Self::Rule(_)
            | Self::Route(_)
            | Self::Address(_)
            | Self::LocalPrefix(_) => Presence::Absent,
        }
    }

    /// Whether the object is there, and whose it is.
    pub(super) fn present(&self, there: &There<'_>) -> Result<Presence, ChangeError> {
        self.kind().present(there)
    }

    /// Makes the object, which must not be there.
    pub(super) fn make(&self, with: &Means<'_>) -> Result<(), ChangeError> {
        self.kind().make(with)
    }

    /// Brings the object that is there up to date.
    pub(super) fn renew(&self, with: &Means<'_>) -> Result<(), ChangeError> {
        self.kind().renew(with)
    }

    /// Undoes it. It is no error if the object is gone already.
    pub(super) fn undo(&self, netlink: &Netlink) -> Result<Undone, ChangeError> {
        match self.kind().undo(netlink) {
            Err(error) if error.is_missing() => Ok(Undone::Gone),
            other => other,
        }
    }

    /// The kernel's reason, and what a person can do about it.
    pub(super) fn remedy(&self, error: &ChangeError) -> String {
        let remedy = if error.errno() == Some(Errno::NODEV) {
            Some("the interface is gone")
        } else {
            self.kind().remedy(error)
        };
        match remedy {
            Some(remedy) => format!("{error}; {remedy}"),
            None if error.is_denied() => {
                let remedy = privileges::remedy("CAP_NET_ADMIN", "--cap-add NET_ADMIN");
                format!("{error}; {remedy}")
            }
            None => error.to_string(),
        }
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.kind().fmt(f)
    }
}

/// What each kind of change must be able to do. `Display` writes it as people do.
trait Kind: fmt::Display {
    /// Names the object, whatever its values.
    fn object(&self) -> String;

    /// See [`Change::to_make`].
    fn to_make(&self) -> String;

    /// See [`Change::to_renew`].
    fn to_renew(&self) -> Option<String> {
        None
    }

    /// See [`Change::to_undo`].
    fn to_undo(&self) -> String;

    /// See [`Change::check`].
    fn check(&self) -> Result<(), String>;

    /// Where the object stands, if there are several places for it.
    fn place(&self) -> Option<(u16, u32)> {
        None
    }

    /// See [`Change::is_unmistakable`].
    fn is_unmistakable(&self) -> bool;

    /// See [`Change::is_costly_to_find`].
    fn is_costly_to_find(&self) -> bool {
        false
    }

    /// See [`Change::present`].
    fn present(&self, there: &There<'_>) -> Result<Presence, ChangeError>;

    /// See [`Change::make`].
    fn make(&self, with: &Means<'_>) -> Result<(), ChangeError>;

    /// See [`Change::renew`].
    fn renew(&self, _with: &Means<'_>) -> Result<(), ChangeError> {
        Ok(())
    }

    /// Undoes the change. Errors that say the object is missing count as success.
    fn undo(&self, netlink: &Netlink) -> Result<Undone, ChangeError>;

    /// What a person can do about an error, beyond the advice that fits every kind.
    fn remedy(&self, error: &ChangeError) -> Option<&'static str>;
}

/// The means to make a change.
pub(super) struct Means<'a> {
    /// The kernel.
    pub(super) netlink: &'a Netlink,
    /// The program, for a filter.
    pub(super) program: Option<BorrowedFd<'a>>,
}

/// Whether an object is there.
pub(super) enum Presence {
    /// It is not there.
    Absent,
    /// It is there, with the wanted values.
    AsWanted,
    /// Something of others is in the way; the text says what.
    Foreign(String),
}

impl Presence {
    fn of(there: bool) -> Self {
        if there { Self::AsWanted } else { Self::Absent }
    }
}

/// The result of undoing.
pub(super) enum Undone {
    /// The object is gone, or has its old value again.
    Gone,
    /// It stays, rightly: somebody else relies on it.
    Foreign(String),
}

/// Why a change could not be looked for, made or undone.
#[derive(Debug, thiserror::Error)]
pub(super) enum ChangeError {
    /// The kernel refused.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// A file under `/proc/sys` could not be read or written.
    #[error(transparent)]
    File(#[from] io::Error),
    /// The program of a new filter was not loaded.
    #[error("its program is not loaded")]
    NoProgram,
}

impl ChangeError {
    /// The kernel's error number, if it was the kernel that refused.
    fn errno(&self) -> Option<Errno> {
        match self {
            Self::Netlink(error) => error.errno(),
            Self::File(error) => Errno::from_io_error(error),
            Self::NoProgram => None,
        }
    }

    /// The object exists already.
    pub(super) fn is_exists(&self) -> bool {
        matches!(self, Self::Netlink(error) if error.is_exists())
    }

    /// The object, or what it belongs to, does not exist.
    fn is_missing(&self) -> bool {
        match self {
            Self::Netlink(error) => error.is_missing(),
            Self::File(error) => {
                // The file, or the interface that it is of.
                error.kind() == io::ErrorKind::NotFound
                    || error.raw_os_error() == Some(libc::ENODEV)
            }
            Self::NoProgram => false,
        }
    }

    /// As [`is_missing`](Self::is_missing), or the kernel does not know this kind of object.
    fn is_unsupported(&self) -> bool {
        self.is_missing() || self.errno() == Some(Errno::OPNOTSUPP)
    }

    /// Privileges are missing.
    fn is_denied(&self) -> bool {
        matches!(self.errno(), Some(Errno::PERM | Errno::ACCESS))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::netlink::{Direction, Family};

    #[test]
    fn changes_read_as_people_write_them() {
        let eth0 = Interface {
            index: 2,
            name: "eth0".into(),
        };
        for (change, text) in [
            (
                Change::Clsact(Clsact { on: eth0.clone() }),
                "qdisc clsact on eth0",
            ),
            (
                Change::Filter(BpfFilter {
                    on: eth0.clone(),
                    direction: Direction::Ingress,
                    priority: 40,
                    handle: 1,
                    program: "ipmoved_capture".into(),
                }),
                "filter on eth0 ingress pref 40 handle 0x1: bpf ipmoved_capture",
            ),
            (
                Change::Rule(MarkRule {
                    family: Family::V6,
                    mark: 0x6970_6d76,
                    table: 7,
                    priority: 100,
                }),
                "IPv6 rule pref 100: fwmark 0x69706d76 lookup 7",
            ),
            (
                Change::Route(DefaultRoute {
                    family: Family::V4,
                    table: 7,
                    dev: None,
                    metric: 4_000_000,
                }),
                "IPv4 route in table 7: blackhole default metric 4000000",
            ),
            (
                Change::Sysctl(Sysctl {
                    path: "net/ipv4/tcp_fwmark_accept".into(),
                    from: "0".into(),
                    to: "1".into(),
                    on: None,
                }),
                "sysctl net.ipv4.tcp_fwmark_accept: 0 → 1",
            ),
            (
                Change::Sysctl(Sysctl {
                    path: "net/ipv4/conf/eth0.5/src_valid_mark".into(),
                    from: "0".into(),
                    to: "1".into(),
                    on: None,
                }),
                "sysctl net.ipv4.conf.eth0/5.src_valid_mark: 0 → 1",
            ),
            (
                Change::Address(QuietAddress {
                    on: eth0,
                    addr: "192.0.2.5".parse().unwrap(),
                    prefix: 32,
                }),
                "address 192.0.2.5/32 on eth0",
            ),
        ] {
            assert_eq!(change.to_string(), text);
        }
    }
}
