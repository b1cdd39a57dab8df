//! What the unit tests of translation share.

use std::net::IpAddr;
use std::time::Instant;

use crate::flow::routes::Delivery;
use crate::flow::translate::{Translator, TranslatorConfig};
use crate::model::delivery_map::{DeliveryMap, MappedPort};
use crate::model::peer::PeerId;
use crate::testing::epoch;

/// A translator for what `peer` has moved, and when it began.
pub(super) fn translator(
    peer: PeerId,
    moves: &[&str],
    delivery: Delivery,
) -> (Translator, Instant) {
    let now = epoch();
    let translator = Translator::new(TranslatorConfig {
        shards: 4,
        max_flows: 1000,
        seed: [1, 2],
        epoch: now,
        note_ended: true,
    });
    let moves: Vec<_> = moves.iter().map(|text| text.parse().unwrap()).collect();
    translator.set_moves(peer, &moves);
    translator.set_delivery(peer, delivery);
    (translator, now)
}

/// One port of a moved address, of TCP and UDP, that is delivered elsewhere.
pub(super) fn one_port(moved: IpAddr, port: u16, to: &str, to_port: u16) -> DeliveryMap {
    let port = MappedPort {
        transport: None,
        from: port,
        to: to_port,
    };
    DeliveryMap {
        moved: moved.into(),
        to: to.parse::<IpAddr>().unwrap().into(),
        port: Some(port),
    }
}
