//! What the unit tests of translation share.

use std::time::Instant;

use crate::flow::routes::Delivery;
use crate::flow::translate::{Translator, TranslatorConfig};
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
