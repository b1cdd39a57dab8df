//! Replies of UDP that come from another port or another address than the client asked.
//!
//! Owns which flow such a reply belongs to, and what becomes of it:
//!
//! * From another address of this host, by the same port (a socket that is bound to any address
//!   answers from the one that the route prefers): it is a packet of the client's flow, which is
//!   delivered there from now on. A server that connects its socket to the client hears it nowhere
//!   else.
//! * From another port (TFTP, RFC 1350 section 4): a flow of its own begins, from the same port of
//!   the moved address, which the client goes on with. If that port has not moved, the client would
//!   speak to somebody else there, so the reply is dropped, and an administrator is told.
//!
//! The kernel's programs say what may be such a reply at all (`kernel/programs/related.rs`).

use std::net::IpAddr;
use std::time::Instant;

use super::{Routes, Translator};
use crate::flow::lock;
use crate::flow::outgoing;
use crate::flow::table::{Inside, Outside};
use crate::model::drops::DropReason;
use crate::model::moved::UDP;
use crate::model::peer::PeerId;
use crate::packet::{Addr, Kind, Parsed};

/// An application answered from a port that has not moved.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct UnmovedPort {
    /// The moved address.
    pub moved: IpAddr,
    /// The port that a client asked there.
    pub asked: u16,
    /// The port that it was answered from.
    pub answered: u16,
}

impl Translator {
    /// For each peer, an application's answer from a port that has not moved, since the last call.
    pub fn take_unmoved_ports(&self) -> Vec<(PeerId, UnmovedPort)> {
        std::mem::take(&mut *lock(&self.unmoved_ports))
    }

    /// The flow of a packet from the application that has none by its addresses and ports.
    ///
    /// # Errors
    /// [`DropReason::UnmovedPort`]; others if the flow cannot begin.
    pub(super) fn related(
        &self,
        now: Instant,
        key: &Inside,
        parsed: &Parsed,
    ) -> Result<Option<Outside>, DropReason> {
        if parsed.kind() != Kind::Udp {
            return Ok(None);
        }
        let routes = self.routes.load();
        let mut table = self.table(key.client);
        let latest = table.latest(now, key.client, key.client_port);
        let same_port = latest.filter(|(inside, _)| inside.delivery_port == key.delivery_port);
        let last = same_port.map(|(inside, _)| inside.delivery);
        for delivery in last
            .into_iter()
            .chain(routes.deliveries_beside(key.delivery))
        {
            let at = Inside { delivery, ..*key };
            if let Some(outside) = table.application_packet(now, &at, 0, &self.limit) {
                table.deliver_to(&at, key.delivery);
                return Ok(Some(outside));
            }
        }
        drop(table);
        let Some((_, asked)) = latest else {
            return Ok(None);
        };
        let moved = match asked.peer {
            // What this host sends to a moved address is a call of its own.
            PeerId::SELF => return Ok(None),
            PeerId::BEHIND => {
                let of_it = routes.inside(asked.moved, UDP, Kind::Udp, asked.moved_port);
                of_it.and_then(Result::ok)
            }
            peer => routes.peer(peer).and_then(|it| it.moved(asked.moved)),
        };
        let port = moved.and_then(|moved| moved.asked_port(key.delivery, key.delivery_port));
        let Some(moved_port) = port else {
            // What a rule names answers nobody.
            if !asked.peer.is_inside() && !outgoing::is_by_port(&routes, key) {
                self.note_unmoved_port(&asked, key.delivery_port);
            }
            return Err(DropReason::UnmovedPort);
        };
        let outside = Outside {
            moved_port,
            ..asked
        };
        self.make_space(now, outside.peer, outside.client);
        let mut table = self.table(key.client);
        // Another lane may have been faster.
        match table.application_packet(now, key, 0, &self.limit) {
            Some(outside) => Ok(Some(outside)),
            None => table
                .reopen(now, key, &outside, 0, &self.limit)
                .map(|()| Some(outside)),
        }
    }

    /// The key of a packet as if it came from the address that packets are delivered to, if that is
    /// another one and the only one.
    pub(super) fn as_delivered(routes: &Routes, key: &Inside, parsed: &Parsed) -> Inside {
        let mut beside = routes.deliveries_beside(key.delivery);
        let only = (beside.next()).filter(|_| beside.next().is_none());
        match only {
            Some(delivery) if parsed.kind() == Kind::Udp && !routes.is_delivery(key.delivery) => {
                Inside { delivery, ..*key }
            }
            Some(_) | None => *key,
        }
    }

    #[cold]
    fn note_unmoved_port(&self, asked: &Outside, answered: u16) {
        let mut noted = lock(&self.unmoved_ports);
        if noted.iter().all(|&(peer, _)| peer != asked.peer) {
            let unmoved = UnmovedPort {
                moved: asked.moved.into(),
                asked: asked.moved_port,
                answered,
            };
            noted.push((asked.peer, unmoved));
        }
    }
}

impl Routes {
    /// The addresses that packets are delivered to, but for this one, of its family.
    fn deliveries_beside(&self, addr: Addr) -> impl Iterator<Item = Addr> + '_ {
        let deliveries = self.deliveries.iter().copied();
        deliveries.filter(move |it| *it != addr && it.family() == addr.family())
    }
}
