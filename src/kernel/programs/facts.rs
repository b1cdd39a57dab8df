//! What the programs of the old server know that may change while they run: what has moved, at
//! which moved addresses the tunnel has an end of its own, by which interface packets leave, and
//! what is [this host's own](super::own).
//!
//! Owns the memory, its layout, and the phrases by which programs read it. The daemon writes it at
//! any time, without a new program. What has moved is in [`Rights`].
//!
//! ```text
//! u32 uplink;   // where bounced packets arrive, and replies without a route leave
//! u32 always;   // not 0: every reply leaves by the uplink, whatever its route is
//! u32 detailed; // not 0: routing rules go by protocol, ports or DSCP
//! u32 marked;   // not 0: some replies leave by a mark
//! ```

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::time::Duration;

use super::begun::Begun;
use super::marked::{Marked, MarkedWay};
use super::modes::Modes;
use super::own::Own;
use super::rights::Rights;
use super::served_here::ServedHere;
use crate::kernel::bpf::{Assembler, BpfError, If, Label, Reg, Size, Words};
use crate::model::mode::{Mode, ShareKey};
use crate::model::moved::Move;
use crate::model::prefix::Prefix;

/// The words.
const UPLINK: usize = 0;
const ALWAYS: usize = 1;
const DETAILED: usize = 2;
const MARKED: usize = 3;
const WORDS: usize = 4;

/// The memory of one old server's programs.
#[derive(Debug)]
pub struct Facts {
    words: Words,
    pub(super) rights: Rights,
    /// Whether the new server may begin something from a port that has not moved, and how often
    /// that was refused.
    pub(super) begun: Option<Begun>,
    pub(super) modes: Modes,
    /// Whose replies leave by a mark.
    pub(super) marked: Marked,
    /// What is this host's own.
    pub(super) own: Own,
    /// Who is served by this host itself.
    pub(super) served: Rc<ServedHere>,
}

impl Facts {
    /// The memory for these moves. Nothing is known at first.
    #[cfg(test)]
    pub fn new(moves: &[Move]) -> Result<Self, BpfError> {
        Self::remembering(moves, &[], Own::new()?)
    }

    /// The memory for these moves, with what is known of this host's own. From the addresses of
    /// those that `begin` the new server may begin connections, whatever port they have.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn remembering(moves: &[Move], begin: &[Move], mut own: Own) -> Result<Self, BpfError> {
        let rights = Rights::new(moves, begin)?;
        let begun = match rights.begins() {
            true => Some(Begun::new(&mut own)?),
            false => None,
        };
        Ok(Self {
            words: Words::new("ipmoved_facts", WORDS)?,
            rights,
            begun,
            modes: Modes::new(moves)?,
            marked: Marked::new()?,
            served: own.served_here()?,
            own,
        })
    }

    /// Packets that began a connection of the new server which this host has itself, and were
    /// dropped, since these programs were made.
    pub fn refused(&self) -> u64 {
        self.begun.as_ref().map_or(0, Begun::refused)
    }

    /// What is this host's own.
    pub fn own(&self) -> &Own {
        &self.own
    }

    /// Who is served by this host itself.
    pub fn served(&self) -> &ServedHere {
        &self.served
    }

    /// From now on the uplink is the interface with this index, if there is one. If it was `named`,
    /// every reply leaves by it; else only those to which no route leads.
    pub fn set_uplink(&self, index: Option<u32>, named: bool) {
        self.words.set(UPLINK, index.unwrap_or(0));
        self.words.set(ALWAYS, u32::from(named));
    }

    /// Whether every reply leaves by the uplink.
    pub fn is_named(&self) -> bool {
        self.words.get(ALWAYS) != 0
    }

    /// From now on a routing rule goes by protocol, ports or DSCP, or none does.
    pub fn set_detailed(&self, detailed: bool) {
        self.words.set(DETAILED, u32::from(detailed));
    }

    /// From now on the replies of these prefixes leave by marks.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_marked(&self, ways: &BTreeMap<Prefix, MarkedWay>) -> Result<(), BpfError> {
        if ways.is_empty() {
            self.words.set(MARKED, 0);
        }
        self.marked.update(ways)?;
        self.words.set(MARKED, u32::from(!ways.is_empty()));
        Ok(())
    }

    /// From now on the tunnel's own ends are at those of these addresses that have moved.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_tunnel_ends(&self, addrs: impl Iterator<Item = IpAddr>) -> Result<(), BpfError> {
        self.rights.set_tunnel_ends(addrs)
    }

    /// From now on the moves are in these modes, in the order in which they were given. Times are
    /// the kernel's ([`now`](super::now)). Everything is moved at first.
    ///
    /// Whoever changes both tells the [gates](crate::flow::gate) first: what these programs hand
    /// over is judged there.
    ///
    /// # Errors
    /// If the kernel refuses. Some of it may be in effect then; the next call makes good for it.
    pub fn set_modes(&self, modes: &[Mode<Duration>], key: ShareKey) -> Result<(), BpfError> {
        self.modes.set(modes, key)
    }

    /// These moves were those of other facts before: for how long the daemon is to be asked after
    /// a change of modes goes on.
    pub fn follow_modes(&self, before: &Self) {
        self.modes.follow(&before.modes);
    }

    /// The daemon is alive, so it may be asked; and what is over is forgotten. Call it every
    /// second.
    ///
    /// # Errors
    /// If the kernel refuses to tell what is over.
    pub fn beat(&self) -> Result<(), BpfError> {
        self.modes.beat();
        self.own.sweep()
    }

    /// `dst` = the index of the uplink, or 0.
    pub(super) fn load_uplink(&self, a: &mut Assembler, dst: Reg) {
        self.load(a, dst, UPLINK);
    }

    /// Jumps if every reply leaves by the uplink. Destroys `scratch`.
    pub(super) fn jump_if_always(&self, a: &mut Assembler, scratch: Reg, to: Label) {
        self.load(a, scratch, ALWAYS);
        a.jump_if(scratch, If::Ne, 0, to);
    }

    /// Jumps if no routing rule goes by more than addresses. Destroys `scratch`.
    pub(super) fn jump_unless_detailed(&self, a: &mut Assembler, scratch: Reg, to: Label) {
        self.load(a, scratch, DETAILED);
        a.jump_if(scratch, If::Eq, 0, to);
    }

    /// Jumps if no reply leaves by a mark. Destroys `scratch`.
    pub(super) fn jump_unless_marked(&self, a: &mut Assembler, scratch: Reg, to: Label) {
        self.load(a, scratch, MARKED);
        a.jump_if(scratch, If::Eq, 0, to);
    }

    fn load(&self, a: &mut Assembler, dst: Reg, word: usize) {
        a.load_address(dst, self.words.as_fd(), Words::offset(word));
        a.load(Size::W, dst, dst, 0);
    }
}
