//! Why a packet was not carried: every reason has a name and a counter.
//!
//! The names are part of the `status --json` schema (`drops: {REASON: COUNT}`); a reason is added,
//! never renamed.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::model::peer::PeerId;

macro_rules! drop_reasons {
    ($($(#[doc = $doc:literal])+ $variant:ident = $name:literal,)+) => {
        /// The reason a packet or datagram was dropped.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        #[repr(u8)]
        pub enum DropReason {
            $($(#[doc = $doc])+ $variant,)+
        }

        impl DropReason {
            /// Every reason, in the order of declaration.
            pub const ALL: &[Self] = &[$(Self::$variant,)+];

            /// The stable name that `status` shows.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)+
                }
            }
        }
    };
}

drop_reasons! {
    // From the network: datagrams on the tunnel's UDP port.
    /// Shorter than its header says, or of no known message type.
    WireMalformed = "wire_malformed",
    /// A version of the protocol that this daemon does not speak.
    WireVersion = "wire_version",
    /// A handshake message that was not made with a key of a configured peer.
    HandshakeAuth = "handshake_auth",
    /// A handshake message that was seen before, or is older than one that was.
    HandshakeReplay = "handshake_replay",
    /// A handshake message that was not looked at, or went no further, because too many came: of
    /// strangers, or in the name of its peer.
    HandshakeLimited = "handshake_limited",
    /// A handshake message of a peer that claims the same role as this daemon (or our own,
    /// reflected).
    HandshakeRole = "handshake_role",
    /// A handshake response to no initiation that is under way.
    HandshakeUnexpected = "handshake_unexpected",
    /// A data datagram for a session that is not (or no longer) known.
    SessionUnknown = "session_unknown",
    /// A data datagram for a session that has passed its hard expiry.
    SessionExpired = "session_expired",
    /// A data datagram whose authentication tag is wrong.
    OpenAuth = "open_auth",
    /// A data datagram whose counter was seen before or lies behind the replay window.
    Replay = "replay",
    /// A part of a split packet whose other parts never came.
    ReassemblyIncomplete = "join_incomplete",

    // From the TUN or out of the tunnel: IP packets.
    /// Not an IPv4 or IPv6 packet, truncated, or with lengths that contradict each other.
    IpMalformed = "ip_malformed",
    /// A virtio header that contradicts the packet it came with.
    BadOffload = "bad_offload",
    /// The peer says that a checksum is partial, of a packet that is neither TCP nor UDP, or a
    /// fragment.
    BadChecksumFlag = "bad_checksum_flag",
    /// A TCP, UDP or ICMP header that is truncated or contradicts itself.
    L4Malformed = "l4_malformed",
    /// A source address that no packet may have here: loopback, multicast, the packet's own
    /// destination; a client's: link-local, or one of this server's own.
    BadSource = "bad_source",
    /// The new server sent it where no client can be: to a special address, or to one of the old
    /// server's own.
    BadDestination = "bad_destination",
    /// The new server sent it to somebody who did not ask for it: out of the old server goes only
    /// what answers a client.
    Unasked = "unasked",
    /// Sent on the new server from a moved address to somebody who did not ask for it, without
    /// `--outgoing`.
    OutgoingOff = "outgoing_off",
    /// Such a packet that the old server does not let out (`--allow-outgoing`).
    OutgoingNotAllowed = "outgoing_not_allowed",
    /// Chosen by its port (`--outgoing PORTS`), while it is not clear from which moved address it
    /// is to leave.
    OutgoingNoAddress = "outgoing_no_address",
    /// The new server began too many connections in a short time.
    OutgoingLimited = "outgoing_limited",
    /// The new server began a connection with the addresses and ports of one that the old server
    /// has itself, or another new server.
    OutgoingTaken = "outgoing_taken",
    /// It answers a connection that one of several new servers began before the old server's
    /// daemon was killed, and which one that was is not known until it speaks.
    OutgoingUnknown = "outgoing_unknown",
    /// A client's source address lies in a network of the new server's own.
    MartianSource = "martian_source",
    /// The destination is not an address that was moved.
    NotMoved = "not_moved",
    /// The moved address is known, but there is no address of its family to deliver to.
    NoDelivery = "no_delivery",
    /// A packet from the application's host that belongs to no flow through the tunnel.
    NoFlow = "no_flow",
    /// An application's answer from another port than the client asked, which has not moved: to
    /// the client it would be somebody else's.
    UnmovedPort = "unmoved_port",
    /// A fragment whose first fragment was not seen in time, or before too many waited.
    FragmentUnknown = "fragment_unknown",
    /// A fragment that writes over another one of its packet, or follows one that did.
    FragmentOverlap = "fragment_overlap",
    /// An ICMP message that is neither a query nor an error: it concerns one link only.
    IcmpUnsupported = "icmp_unsupported",
    /// An ICMP error that quotes no packet of a known flow.
    IcmpUnrelated = "icmp_unrelated",
    /// The flow table is full of flows that must not be evicted.
    FlowTableFull = "flow_table_full",
    /// What begins a flow in the moment in which a reload makes room for more of them. The client
    /// sends it again.
    FlowTableGrows = "flow_table_grows",
    /// Two flows would have become one after rewriting, and no port was left to tell them apart.
    FlowCollision = "flow_collision",
    /// `ipmoved nat`: every port that could stand for a new flow to its destination is in use.
    PortsExhausted = "ports_exhausted",
    /// `ipmoved nat`: a protocol without ports (or ICMP identifiers), so that replies to two
    /// clients could not be told apart.
    NoPorts = "no_ports",
    /// A first packet that came while what it asks for was held, and too many waited: of its flow,
    /// of its source, or in all.
    HoldFull = "hold_full",
    /// A first packet that was held until its client had given up.
    HoldExpired = "hold_expired",
    /// The new server refused a client while a cut-over was watched. The client is not told:
    /// whoever serves in the end answers it.
    RefusalWithheld = "refusal_withheld",
    /// Larger than the tunnel can carry, or than the next link, and must not be fragmented.
    TooBig = "too_big",
    /// A router marked congestion on a packet whose sender does not understand the mark (RFC 6040).
    EcnBroken = "ecn_broken",
    /// Hop limit used up.
    TtlExpired = "ttl_expired",
    /// An ICMP error about a packet that is too big, or whose hop limit is used up, was not sent:
    /// there were too many.
    ReplyLimited = "answer_limited",

    // Between this daemon and what it hands packets to: the peer, the kernel, the control task.
    /// There is no session with the peer (yet).
    NoSession = "no_session",
    /// The kernel refused to send the datagram.
    SendFailed = "send_failed",
    /// The kernel refused the packet written to the TUN.
    TunWriteFailed = "tun_write_failed",
    /// A handshake or control message that the control task did not take: it was too busy, or the
    /// peer sent too many.
    ControlBusy = "control_busy",
    /// A handshake or control message of our own that the socket had no room for. It is sent again,
    /// as one that is lost on the way.
    ControlUnsent = "control_unsent",

    // In the new server's kernel.
    /// The kernel's memory of flows is full, so that nothing would bring replies back.
    SteeringFull = "steering_full",
    /// TCP from a client with the addresses and ports of a connection that this server, or one
    /// behind it, has directly.
    DirectConnection = "direct_connection",
}

/// A packet that goes no further, and its peer, if that is known.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Dropped {
    /// The peer that it came from or was going to.
    pub peer: Option<PeerId>,
    /// Why.
    pub reason: DropReason,
}

impl Dropped {
    /// A dropped packet of `peer`.
    pub fn of(peer: PeerId, reason: DropReason) -> Self {
        Self {
            peer: Some(peer),
            reason,
        }
    }
}

impl From<DropReason> for Dropped {
    fn from(reason: DropReason) -> Self {
        Self { peer: None, reason }
    }
}

/// One counter per [`DropReason`].
#[derive(Debug)]
pub struct Drops([AtomicU64; DropReason::ALL.len()]);

impl Default for Drops {
    fn default() -> Self {
        Self(std::array::from_fn(|_| AtomicU64::new(0)))
    }
}

impl Drops {
    /// Counts one dropped packet.
    pub fn count(&self, reason: DropReason) {
        self.add(reason, 1);
    }

    /// Counts `packets` dropped packets.
    pub fn add(&self, reason: DropReason, packets: u64) {
        self.0[reason as usize].fetch_add(packets, Relaxed);
    }

    /// Nothing was dropped: another peer is here now.
    pub fn clear(&self) {
        self.0.iter().for_each(|count| count.store(0, Relaxed));
    }

    /// How many packets were dropped for `reason`.
    pub fn get(&self, reason: DropReason) -> u64 {
        self.0[reason as usize].load(Relaxed)
    }

    /// The reasons that occurred, with their counts.
    pub fn iter(&self) -> impl Iterator<Item = (DropReason, u64)> + '_ {
        DropReason::ALL
            .iter()
            .map(|&reason| (reason, self.get(reason)))
            .filter(|&(_, count)| count > 0)
    }
}
