//! Packets for the tests of programs, and a program's decision about one (`BPF_PROG_TEST_RUN`).

use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use super::headers::{icmpv4, icmpv6, ipv6};
use super::phrases::{TC_ACT_UNSPEC, keep_packet, verdict};
use super::stays::note_answered;
use super::{Facts, capture, note_own, now};
use crate::kernel::bpf::test_run::run;
use crate::kernel::bpf::{Assembler, Program};
use crate::model::moved::Move;

/// Verdict of `bpf_redirect`.
pub(super) const TC_ACT_REDIRECT: i32 = 7;

/// Length of the link-layer header of all frames in the tests.
pub(super) const L2: u32 = 14;

/// The kernel's time so long ago, which may be before the machine started: then it wraps, as what
/// programs subtract does.
pub(super) fn ago(time: Duration) -> Duration {
    let nanos = |time: Duration| time.as_nanos() as u64;
    Duration::from_nanos(nanos(now()).wrapping_sub(nanos(time)))
}

pub(super) fn moves(texts: &[&str]) -> Vec<Move> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

/// The programs of an old server, and what they know.
pub(super) struct OldServer {
    pub(super) facts: Facts,
    pub(super) capture: OwnedFd,
    pub(super) egress: OwnedFd,
    pub(super) answers: OwnedFd,
}

impl OldServer {
    pub(super) fn new(facts: Facts) -> Self {
        let load = |program: Program| program.load().unwrap();
        // The TUN has no link-layer header, but BPF_PROG_TEST_RUN wants one.
        let mut asm = Assembler::new();
        keep_packet(&mut asm);
        note_answered(&mut asm, L2, &facts.own, Some(&facts.modes));
        verdict(&mut asm, TC_ACT_UNSPEC);
        Self {
            capture: load(capture(&facts, L2, 1, Some(51820)).unwrap()),
            egress: load(note_own(&facts, L2, 1, Some(51820)).unwrap()),
            answers: load(asm.finish("ipmoved_test").unwrap()),
            facts,
        }
    }

    /// Comes from the wire, and goes to the daemon.
    pub(super) fn is_taken(&self, packet: &Packet) -> bool {
        taken(self.capture.as_fd(), packet)
    }

    /// This host sends it, or forwards it.
    pub(super) fn sends(&self, packet: &Packet) {
        assert!(!taken(self.egress.as_fd(), packet));
    }

    /// The new server answers.
    pub(super) fn answers(&self, packet: &Packet) {
        let outcome = run(self.answers.as_fd(), &frame(&packet.bytes()));
        assert_eq!(outcome.verdict, TC_ACT_UNSPEC, "{packet:?}");
    }
}

/// A frame for this host, as `lo` would receive it.
pub(super) fn frame(packet: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; 12];
    frame.extend(if packet[0] >> 4 == 4 {
        [8, 0]
    } else {
        [0x86, 0xdd]
    });
    frame.extend(packet);
    frame
}

#[derive(Clone, Debug)]
pub(super) struct Packet {
    pub(super) src: IpAddr,
    pub(super) dst: IpAddr,
    pub(super) protocol: u8,
    /// Words of IPv4 options, or 8-byte units of an IPv6 destination options header.
    pub(super) options: u8,
    /// Identification, offset in units of 8 bytes, and whether more fragments follow.
    pub(super) fragment: Option<(u16, u16, bool)>,
    pub(super) payload: Vec<u8>,
}

impl Packet {
    pub(super) fn new(src: &str, dst: &str, protocol: u8, payload: Vec<u8>) -> Self {
        Self {
            src: src.parse().unwrap(),
            dst: dst.parse().unwrap(),
            protocol,
            options: 0,
            fragment: None,
            payload,
        }
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let header = 20 + 4 * usize::from(self.options);
                let total = (header + self.payload.len()) as u16;
                let (id, offset, more) = self.fragment.unwrap_or((7, 0, false));
                out.extend([0x40 | (header / 4) as u8, 0]);
                out.extend(total.to_be_bytes());
                out.extend(id.to_be_bytes());
                out.extend((offset | u16::from(more) << 13).to_be_bytes());
                out.extend([64, self.protocol, 0, 0]);
                out.extend(src.octets());
                out.extend(dst.octets());
                out.resize(header, 1);
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let mut headers = Vec::new();
                let mut next = self.protocol;
                if let Some((id, offset, more)) = self.fragment {
                    let mut header = vec![next, 0];
                    header.extend((offset << 3 | u16::from(more)).to_be_bytes());
                    header.extend(u32::from(id).to_be_bytes());
                    headers = header;
                    next = ipv6::FRAGMENT;
                }
                if self.options > 0 {
                    let mut header = vec![1; 8 * usize::from(self.options)];
                    header[0] = next;
                    header[1] = self.options - 1;
                    header.extend(headers);
                    headers = header;
                    next = ipv6::DESTINATION_OPTIONS;
                }
                let length = (headers.len() + self.payload.len()) as u16;
                out.extend([0x60, 0, 0, 0]);
                out.extend(length.to_be_bytes());
                out.extend([next, 64]);
                out.extend(src.octets());
                out.extend(dst.octets());
                out.extend(headers);
            }
            _ => panic!("mixed families"),
        }
        out.extend(&self.payload);
        out
    }

    /// IPv6, with so many destination options headers before its payload, at least one.
    pub(super) fn behind_options(self, headers: usize) -> Self {
        // A `PadN` of four bytes fills the header.
        let options = |next| [next, 0, 1, 4, 0, 0, 0, 0];
        let mut payload = options(ipv6::DESTINATION_OPTIONS).repeat(headers - 1);
        payload.extend(options(self.protocol));
        payload.extend(self.payload);
        Self {
            protocol: ipv6::DESTINATION_OPTIONS,
            payload,
            ..self
        }
    }

    pub(super) fn icmp_error(from: &str, quoted: &Self) -> Self {
        let dst = quoted.src.to_string();
        let (protocol, kind) = if quoted.src.is_ipv4() {
            (icmpv4::PROTOCOL, 3)
        } else {
            (icmpv6::PROTOCOL, 1)
        };
        let mut payload = vec![kind, 3, 0, 0, 0, 0, 0, 0];
        payload.extend(quoted.bytes());
        Self::new(from, &dst, protocol, payload)
    }
}

pub(super) fn ports(src: u16, dst: u16) -> Vec<u8> {
    let mut out = Vec::from(src.to_be_bytes());
    out.extend(dst.to_be_bytes());
    out.resize(24, 0);
    out
}

/// The start of a TCP header.
pub(super) fn tcp(src: u16, dst: u16, flags: u8) -> Vec<u8> {
    let mut out = ports(src, dst);
    out[12] = 5 << 4;
    out[13] = flags;
    out
}

/// An ICMP message with an identifier.
pub(super) fn icmp(kind: u8, identifier: u16) -> Vec<u8> {
    let mut out = vec![kind, 0, 0, 0];
    out.extend(identifier.to_be_bytes());
    out.resize(24, 0);
    out
}

pub(super) fn taken(program: BorrowedFd<'_>, packet: &Packet) -> bool {
    match run(program, &frame(&packet.bytes())).verdict {
        TC_ACT_REDIRECT => true,
        TC_ACT_UNSPEC => false,
        other => panic!("verdict {other} for {packet:?}"),
    }
}
