//! Explicit congestion notification across the tunnel (RFC 6040, normal mode).
//!
//! At the tunnel's entry, the outer header takes the inner one's field. At its exit, a router's
//! mark on the outer header is carried over to the inner one. The rest of the traffic class stays
//! inside.

use crate::model::drops::DropReason;
use crate::packet::Parsed;

/// Not ECN-capable.
const NOT_ECT: u8 = 0;
/// ECN-capable, codepoint 1.
const ECT_1: u8 = 1;
/// Congestion experienced.
const CE: u8 = 3;

/// The packet's ECN field, which the outer header takes (RFC 6040 section 4.1).
pub fn inner(packet: &[u8], parsed: &Parsed) -> u8 {
    parsed.ecn(packet)
}

/// Whether [`carry_over`] leaves every packet as it is.
pub fn changes_nothing(outer: u8) -> bool {
    !matches!(outer, CE | ECT_1)
}

/// Carries the outer header's field over to the packet (RFC 6040 section 4.2, figure 4).
///
/// # Errors
/// [`DropReason::EcnBroken`] if a router marked a packet whose sender does not understand the mark.
/// It has to be dropped, as the router would have done.
pub fn carry_over(packet: &mut [u8], parsed: &Parsed, outer: u8) -> Result<(), DropReason> {
    let own = parsed.ecn(packet);
    let new = match (own, outer) {
        (NOT_ECT, CE) => return Err(DropReason::EcnBroken),
        (NOT_ECT, _) => NOT_ECT,
        (_, CE) => CE,
        (CE, _) => CE,
        (_, ECT_1) => ECT_1,
        (own, _) => own,
    };
    if new != own {
        parsed.set_ecn(packet, new);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::{Ipv4HeaderSlice, PacketBuilder};

    fn v4(ecn: u8) -> Vec<u8> {
        let mut packet = Vec::new();
        PacketBuilder::ipv4([192, 0, 2, 1], [198, 51, 100, 2], 64)
            .udp(1, 2)
            .write(&mut packet, b"x")
            .unwrap();
        let parsed = Parsed::parse(&packet).unwrap();
        parsed.set_ecn(&mut packet, ecn);
        packet
    }

    fn v6(ecn: u8) -> Vec<u8> {
        let mut packet = Vec::new();
        let (src, dst) = (
            [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
            [2; 16],
        );
        PacketBuilder::ipv6([0x20; 16].map(|_| 0x20), dst, 64)
            .udp(1, 2)
            .write(&mut packet, b"x")
            .unwrap();
        packet[8..24].copy_from_slice(&src);
        packet[24..40].copy_from_slice(&[0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
        packet[1] |= ecn << 4;
        packet
    }

    #[test]
    fn figure_4_of_rfc_6040() {
        // Rows: inner; columns: outer Not-ECT, ECT(1), ECT(0), CE.
        let table = [
            (0, [Some(0), Some(0), Some(0), None]),
            (2, [Some(2), Some(1), Some(2), Some(3)]),
            (1, [Some(1), Some(1), Some(1), Some(3)]),
            (3, [Some(3), Some(3), Some(3), Some(3)]),
        ];
        for make in [v4, v6] {
            for (own, columns) in table {
                for (outer, want) in [0, 1, 2, 3].into_iter().zip(columns) {
                    let mut packet = make(own);
                    let parsed = Parsed::parse(&packet).unwrap();
                    let got = carry_over(&mut packet, &parsed, outer)
                        .ok()
                        .map(|()| inner(&packet, &parsed));
                    assert_eq!(got, want, "inner {own}, outer {outer}");
                }
            }
        }
    }

    #[test]
    fn the_header_checksum_stays_right() {
        let mut packet = v4(2);
        let parsed = Parsed::parse(&packet).unwrap();
        carry_over(&mut packet, &parsed, 3).unwrap();
        let header = Ipv4HeaderSlice::from_slice(&packet).unwrap().to_header();
        assert_eq!(header.calc_header_checksum(), header.header_checksum);
    }

    #[test]
    fn what_changes_nothing_changes_nothing() {
        for (own, outer) in (0..4).flat_map(|own| (0..4).map(move |outer| (own, outer))) {
            let mut packet = v4(own);
            let (before, parsed) = (packet.clone(), Parsed::parse(&packet).unwrap());
            let same = carry_over(&mut packet, &parsed, outer).is_ok() && packet == before;
            assert!(same || !changes_nothing(outer), "{own} in {outer}");
        }
    }
}
