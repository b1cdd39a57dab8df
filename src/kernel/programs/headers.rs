//! Offsets of the header fields that programs read, in bytes from the start of each header, and the
//! values that they compare them with. The names are those of the RFCs and of `linux/bpf.h`.

/// `struct __sk_buff`.
pub(super) mod skb {
    pub(crate) const LEN: i16 = 0;
    pub(crate) const PKT_TYPE: i16 = 4;
    pub(crate) const MARK: i16 = 8;
    /// The EtherType, in network order.
    pub(crate) const PROTOCOL: i16 = 16;
    pub(crate) const VLAN_PRESENT: i16 = 20;
    pub(crate) const VLAN_TCI: i16 = 24;
    /// The interface that it came in by; 0 for what this host sends itself.
    pub(crate) const INGRESS_IFINDEX: i16 = 36;
    /// The interface where it is.
    pub(crate) const IFINDEX: i16 = 40;
    /// The socket that sends it, `struct bpf_sock *`.
    pub(crate) const SK: i16 = 168;
    /// How many segments it is.
    pub(crate) const GSO_SEGS: i16 = 164;
}

/// IEEE 802.1Q: the tag control information.
pub(super) mod vlan {
    /// The VLAN's number. A frame with number 0 belongs to no VLAN: its tag has a priority only.
    pub(crate) const ID_MASK: i32 = 0x0fff;
}

/// `struct bpf_sock`.
pub(super) mod sock {
    pub(crate) const BOUND_DEV_IF: i16 = 0;
    pub(crate) const TYPE: i16 = 8;
    pub(crate) const PROTOCOL: i16 = 12;
    /// The address it is bound to, as on the wire; 0 for any.
    pub(crate) const SRC_IP4: i16 = 24;
    /// Its port, in the order of this host.
    pub(crate) const SRC_IP6: i16 = 28;
    pub(crate) const SRC_PORT: i16 = 44;
    pub(crate) const STATE: i16 = 72;
    /// In `STATE`: it is connected.
    pub(crate) const ESTABLISHED: i32 = 1;
    /// In `STATE`: it is connected, and this host has closed (`TCP_FIN_WAIT1`, `TCP_FIN_WAIT2`), or
    /// the other one has (`TCP_CLOSE_WAIT`).
    pub(crate) const HALF_CLOSED: [i32; 3] = [4, 5, 8];
    /// In `STATE`: its connection is over, and the socket gone.
    pub(crate) const TIME_WAIT: i32 = 6;
    /// In `STATE`: it waits for connections.
    pub(crate) const LISTEN: i32 = 10;
}

/// `struct bpf_tcp_sock`.
pub(super) mod tcp_sock {
    pub(crate) const RCV_NXT: i16 = 16;
    pub(crate) const SND_NXT: i16 = 20;
    pub(crate) const SND_UNA: i16 = 24;
    /// Segments that have come.
    pub(crate) const SEGS_IN: i16 = 56;
    /// Segments that it has sent.
    pub(crate) const SEGS_OUT: i16 = 64;
}

/// `struct bpf_fib_lookup`.
pub(super) mod fib {
    pub(crate) const FAMILY: i16 = 0;
    pub(crate) const PROTOCOL: i16 = 1;
    /// Those of the source and of the destination, as on the wire.
    pub(crate) const PORTS: i16 = 2;
    pub(crate) const IFINDEX: i16 = 8;
    /// IPv4: the type of service. IPv6: the traffic class, where the header has it.
    pub(crate) const SERVICE: i16 = 12;
    pub(crate) const SOURCE: i16 = 16;
    pub(crate) const DESTINATION: i16 = 32;
    pub(crate) const LEN: i16 = 64;
    /// The results that name an interface: found; found, but the neighbour is not known yet; found,
    /// but the packet is too long.
    pub(crate) const FOUND: [i32; 3] = [0, 7, 8];
    /// A route says that no packet gets there: blackhole, unreachable, prohibit.
    pub(crate) const REFUSED: [i32; 3] = [1, 2, 3];
    /// It is not forwarded: its destination is this host's own, or no route leads there.
    pub(crate) const NOT_FORWARDED: i32 = 4;
    /// The interface that it arrived at does not forward.
    pub(crate) const FORWARDING_DISABLED: i32 = 5;
}

/// Ethernet II.
pub(super) mod ethernet {
    pub(crate) const TYPE: i32 = 12;
    pub(crate) const LEN: i32 = 14;
}

/// IPv4: RFC 791 section 3.1.
pub(super) mod ipv4 {
    pub(crate) const VERSION_AND_IHL: u32 = 0;
    pub(crate) const SERVICE: u32 = 1;
    pub(crate) const TOTAL_LENGTH: u32 = 2;
    pub(crate) const IDENTIFICATION: u32 = 4;
    pub(crate) const FLAGS_AND_OFFSET: u32 = 6;
    pub(crate) const PROTOCOL: u32 = 9;
    pub(crate) const CHECKSUM: u32 = 10;
    pub(crate) const SOURCE: u32 = 12;
    pub(crate) const DESTINATION: u32 = 16;
    /// Length without options.
    pub(crate) const LEN: u32 = 20;

    /// In the first byte: version 4, and the header's length in words.
    pub(crate) const VERSION_MASK: i32 = 0xf0;
    pub(crate) const VERSION_4: i32 = 0x40;
    pub(crate) const WITHOUT_OPTIONS: i32 = 0x45;
    pub(crate) const IHL_MASK: i32 = 0x0f;

    /// In `SERVICE`: without what congestion notification has there (RFC 3168).
    pub(crate) const DSCP: i32 = 0xfc;

    /// In `FLAGS_AND_OFFSET`.
    pub(crate) const MORE_FRAGMENTS: i32 = 0x2000;
    pub(crate) const OFFSET_MASK: i32 = 0x1fff;
    /// Every fragment has some of these bits set, and no other packet has.
    pub(crate) const FRAGMENTED: i32 = MORE_FRAGMENTS | OFFSET_MASK;
}

/// IPv6: RFC 8200 section 3.
pub(super) mod ipv6 {
    /// Version, traffic class and flow label.
    pub(crate) const FIRST_WORD: u32 = 0;
    pub(crate) const PAYLOAD_LENGTH: u32 = 4;
    pub(crate) const NEXT_HEADER: u32 = 6;
    pub(crate) const HOP_LIMIT: u32 = 7;
    pub(crate) const SOURCE: u32 = 8;
    pub(crate) const DESTINATION: u32 = 24;
    /// Length without extension headers.
    pub(crate) const LEN: u32 = 40;

    /// In `FIRST_WORD`: the traffic class, without what congestion notification has there.
    pub(crate) const DSCP: i32 = 0x0fc0_0000;

    /// The hop limit of what no router has forwarded.
    pub(crate) const OF_THE_LINK: i32 = 255;

    pub(crate) const HOP_BY_HOP: u8 = 0;
    pub(crate) const ROUTING: u8 = 43;
    pub(crate) const FRAGMENT: u8 = 44;
    pub(crate) const DESTINATION_OPTIONS: u8 = 60;
}

/// IPv6 extension headers but the fragment header: RFC 8200 sections 4.3, 4.4 and 4.6.
pub(super) mod extension {
    pub(crate) const NEXT_HEADER: u32 = 0;
    /// In units of 8 bytes, not counting the first.
    pub(crate) const LENGTH: u32 = 1;
}

/// The IPv6 fragment header: RFC 8200 section 4.5.
pub(super) mod fragment {
    pub(crate) const NEXT_HEADER: u32 = 0;
    pub(crate) const OFFSET_AND_M: u32 = 2;
    pub(crate) const IDENTIFICATION: u32 = 4;
    pub(crate) const LEN: u32 = 8;

    /// In `OFFSET_AND_M`.
    pub(crate) const MORE: i32 = 0x0001;
    pub(crate) const OFFSET_MASK: i32 = 0xfff8;
    /// An atomic fragment (RFC 6946), which is a whole packet, has none of these bits set.
    pub(crate) const FRAGMENTED: i32 = MORE | OFFSET_MASK;
}

/// TCP and UDP: RFC 9293 section 3.1, RFC 768.
pub(super) mod ports {
    pub(crate) const SOURCE: u32 = 0;
    pub(crate) const DESTINATION: u32 = 2;
    pub(crate) const LEN: u32 = 4;
}

/// TCP: RFC 9293 section 3.1.
pub(super) mod tcp {
    pub(crate) const SOURCE: u32 = 0;
    pub(crate) const DESTINATION: u32 = 2;
    pub(crate) const SEQUENCE: u32 = 4;
    pub(crate) const ACKNOWLEDGMENT: u32 = 8;
    pub(crate) const FLAGS: u32 = 13;
    pub(crate) const FLAGS_END: u32 = 14;
    pub(crate) const CHECKSUM: u32 = 16;
}

/// UDP: RFC 768.
pub(super) mod udp {
    pub(crate) const CHECKSUM: u32 = 6;
}

/// ICMP for both families: RFC 792, RFC 4443.
pub(super) mod icmp {
    pub(crate) const TYPE: u32 = 0;
    pub(crate) const CHECKSUM: u32 = 2;
    /// In an echo or timestamp message.
    pub(crate) const IDENTIFIER: u32 = 4;
    /// Where an error quotes the packet that caused it.
    pub(crate) const QUOTED: u32 = 8;
}

/// ICMP, the protocol and its messages: RFC 792.
pub(super) mod icmpv4 {
    pub(crate) const PROTOCOL: u8 = 1;
    /// Destination unreachable, time exceeded, parameter problem.
    pub(crate) const ERRORS: [i32; 3] = [3, 11, 12];
    /// Echo, timestamp.
    pub(crate) const QUERIES: [i32; 2] = [8, 13];
    /// Echo reply, timestamp reply.
    pub(crate) const REPLIES: [i32; 2] = [0, 14];
}

/// ICMPv6, the protocol and its messages: RFC 4443.
pub(super) mod icmpv6 {
    pub(crate) const PROTOCOL: u8 = 58;
    /// The errors are 1 to 4.
    pub(crate) const LAST_ERROR: i32 = 4;
    pub(crate) const ECHO_REQUEST: i32 = 128;
    pub(crate) const ECHO_REPLY: i32 = 129;
    /// Multicast listener discovery and neighbour discovery, which are the link's own business: 130
    /// to 137 and 143 (RFC 2710, 4861, 3810).
    pub(crate) const FIRST_OF_LINK: i32 = 130;
    pub(crate) const LAST_OF_LINK: i32 = 137;
    pub(crate) const LISTENER_REPORT_V2: i32 = 143;
}
