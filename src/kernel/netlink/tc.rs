//! Traffic control: the clsact qdisc, and programs as filters on it.

use std::fmt;
use std::os::fd::{AsRawFd, BorrowedFd};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{
    TcAttribute, TcBpfFlags, TcFilterBpfOption, TcHandle, TcMessage, TcOption,
};
use serde::{Deserialize, Serialize};

use super::{Netlink, Result, attributes, text, word};

/// `ETH_P_ALL` in the kernel's `tcm_info`: big-endian in the low half.
const PROTOCOL_ALL: u32 = (libc::ETH_P_ALL as u16).to_be() as u32;

/// Which side of an interface a filter sits on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// Packets that the interface has received.
    Ingress,
    /// Packets that it is about to send.
    Egress,
}

impl Direction {
    fn parent(self) -> TcHandle {
        TcHandle {
            major: TcHandle::CLSACT.major,
            minor: match self {
                Self::Ingress => TcHandle::MIN_INGRESS,
                Self::Egress => TcHandle::MIN_EGRESS,
            },
        }
    }
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        })
    }
}

/// A tc filter on the clsact qdisc of an interface.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Filter {
    /// Classifier: `bpf`, `u32`, `flower`, ….
    pub kind: String,
    /// Preference; the lower runs first.
    pub priority: u16,
    /// Handle, unique within the preference; 0 in the entry for the preference itself.
    pub handle: u32,
    /// The EtherType of the packets that it sees, in host order.
    pub protocol: u16,
    /// Chain; packets start in chain 0.
    pub chain: u32,
    /// Name of the program, for `bpf`.
    pub name: Option<String>,
    /// Id of the program, for `bpf`.
    pub program_id: Option<u32>,
}

/// The place of a cls_bpf filter: everything that tells it from another one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FilterSlot {
    /// Interface index.
    pub index: u32,
    /// Side of the interface.
    pub direction: Direction,
    /// Preference; the lower runs first.
    pub priority: u16,
    /// Handle, unique within the preference.
    pub handle: u32,
}

impl Netlink {
    /// Adds the clsact qdisc to an interface. It is an error if there is one (or an ingress qdisc).
    pub fn add_clsact(&self, index: u32) -> Result<()> {
        let request = RouteNetlinkMessage::NewQueueDiscipline(clsact_message(index));
        self.acked("add qdisc clsact", request, NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Deletes the clsact qdisc of an interface with every filter on it.
    pub fn delete_clsact(&self, index: u32) -> Result<()> {
        let request = RouteNetlinkMessage::DelQueueDiscipline(clsact_message(index));
        self.acked("delete qdisc clsact", request, 0)
    }

    /// Kinds of the qdiscs on an interface, such as `noqueue` and `clsact`.
    pub fn qdiscs(&self, index: u32) -> Result<Vec<String>> {
        let mut message = TcMessage::with_index(index as i32);
        // clsact's parent is the ingress handle. Some kernels list it only on request.
        message.attributes.push(TcAttribute::DumpInvisible(true));
        let request = RouteNetlinkMessage::GetQueueDiscipline(message);
        let answers = self.dump("list qdiscs", request)?;
        Ok(answers
            .iter()
            .filter_map(|answer| read_tc(answer))
            .filter(|tc| tc.index == index)
            .map(|tc| tc.kind)
            .collect())
    }

    /// Whether an interface has the clsact qdisc.
    pub fn has_clsact(&self, index: u32) -> Result<bool> {
        Ok(self.qdiscs(index)?.iter().any(|kind| kind == "clsact"))
    }

    /// The filters on one side of an interface's clsact qdisc; none if it has no such qdisc.
    pub fn filters(&self, index: u32, direction: Direction) -> Result<Vec<Filter>> {
        let answers = self.list_filters(index, direction)?;
        let filters = answers.iter().filter_map(|answer| read_tc(answer));
        Ok(filters.map(Tc::into_filter).collect())
    }

    fn list_filters(&self, index: u32, direction: Direction) -> Result<Vec<Vec<u8>>> {
        let mut message = TcMessage::with_index(index as i32);
        message.header.parent = direction.parent();
        let request = RouteNetlinkMessage::GetTrafficFilter(message);
        match self.dump("list filters", request) {
            Err(error) if error.is_missing() => Ok(Vec::new()),
            other => other,
        }
    }

    /// The parent under which the filters on one side of an interface are listed, if there are any:
    /// an ingress qdisc knows its one side by several names.
    fn parent_of_filters(&self, index: u32, direction: Direction) -> Result<Option<TcHandle>> {
        let parent = |answer: &Vec<u8>| word(answer.get(12..16)?).map(TcHandle::from);
        Ok(self.list_filters(index, direction)?.iter().find_map(parent))
    }

    /// Attaches a program as a direct-action filter for all protocols. It is an error if the slot
    /// is taken. The filter keeps the program when `program` is closed.
    pub fn add_filter(&self, slot: FilterSlot, program: BorrowedFd<'_>, name: &str) -> Result<()> {
        let mut message = bpf_message(slot, program, name);
        // The kernel lists every filter of a place under the parent that was named last. Those of
        // others are to look as before.
        if let Some(parent) = self.parent_of_filters(slot.index, slot.direction)? {
            message.header.parent = parent;
        }
        let request = RouteNetlinkMessage::NewTrafficFilter(message);
        self.acked("add bpf filter", request, NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Puts a program into a slot in place of the one there, without a gap: every packet meets
    /// either the old program or the new one.
    pub fn replace_filter(
        &self,
        slot: FilterSlot,
        program: BorrowedFd<'_>,
        name: &str,
    ) -> Result<()> {
        let request = RouteNetlinkMessage::NewTrafficFilter(bpf_message(slot, program, name));
        self.acked("replace bpf filter", request, NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// Detaches a filter.
    pub fn delete_filter(&self, slot: FilterSlot) -> Result<()> {
        let mut message = slot_message(slot);
        message.attributes.push(TcAttribute::Kind("bpf".into()));
        self.acked(
            "delete filter",
            RouteNetlinkMessage::DelTrafficFilter(message),
            0,
        )
    }
}

fn clsact_message(index: u32) -> TcMessage {
    let mut message = TcMessage::with_index(index as i32);
    message.header.parent = TcHandle::CLSACT;
    message.header.handle = TcHandle {
        major: TcHandle::CLSACT.major,
        minor: 0,
    };
    message.attributes.push(TcAttribute::Kind("clsact".into()));
    message
}

fn slot_message(slot: FilterSlot) -> TcMessage {
    let mut message = TcMessage::with_index(slot.index as i32);
    message.header.parent = slot.direction.parent();
    message.header.handle = TcHandle::from(slot.handle);
    message.header.info = u32::from(slot.priority) << 16 | PROTOCOL_ALL;
    message
}

fn bpf_message(slot: FilterSlot, program: BorrowedFd<'_>, name: &str) -> TcMessage {
    let mut message = slot_message(slot);
    message.attributes = vec![
        TcAttribute::Kind("bpf".into()),
        TcAttribute::Options(vec![
            TcOption::Bpf(TcFilterBpfOption::ProgFd(program.as_raw_fd() as u32)),
            TcOption::Bpf(TcFilterBpfOption::ProgName(name.into())),
            TcOption::Bpf(TcFilterBpfOption::Flags(TcBpfFlags::DirectAction)),
        ]),
    ];
    message
}

/// A qdisc or filter from a list.
struct Tc {
    index: u32,
    handle: u32,
    info: u32,
    kind: String,
    chain: u32,
    name: Option<String>,
    program_id: Option<u32>,
}

impl Tc {
    fn into_filter(self) -> Filter {
        Filter {
            kind: self.kind,
            priority: (self.info >> 16) as u16,
            handle: self.handle,
            protocol: u16::from_be(self.info as u16),
            chain: self.chain,
            name: self.name,
            program_id: self.program_id,
        }
    }
}

fn read_tc(payload: &[u8]) -> Option<Tc> {
    const TCA_KIND: u16 = 1;
    const TCA_OPTIONS: u16 = 2;
    const TCA_CHAIN: u16 = 11;
    const TCA_BPF_NAME: u16 = 7;
    const TCA_BPF_ID: u16 = 11;
    let (header, rest) = payload.split_first_chunk::<20>()?;
    let mut tc = Tc {
        index: word(&header[4..8])?,
        handle: word(&header[8..12])?,
        info: word(&header[16..20])?,
        kind: String::new(),
        chain: 0,
        name: None,
        program_id: None,
    };
    for (kind, value) in attributes(rest) {
        match kind {
            TCA_KIND => tc.kind = text(value),
            TCA_CHAIN => tc.chain = word(value)?,
            TCA_OPTIONS if tc.kind == "bpf" => {
                for (option, value) in attributes(value) {
                    match option {
                        TCA_BPF_NAME => tc.name = Some(text(value)),
                        TCA_BPF_ID => tc.program_id = word(value),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    Some(tc)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::testing::{in_fresh_namespace, veth};

    #[test]
    fn clsact_is_seen() {
        in_fresh_namespace(|| {
            let netlink = Netlink::new().unwrap();
            let index = veth(&netlink).index;
            assert!(!netlink.has_clsact(index).unwrap());
            assert_eq!(netlink.filters(index, Direction::Ingress).unwrap(), []);
            netlink.add_clsact(index).unwrap();
            assert!(netlink.add_clsact(index).unwrap_err().is_exists());
            assert!(netlink.has_clsact(index).unwrap());
            assert_eq!(netlink.filters(index, Direction::Egress).unwrap(), []);
            netlink.delete_clsact(index).unwrap();
            assert!(!netlink.has_clsact(index).unwrap());
            let gone = netlink.delete_clsact(index).unwrap_err();
            assert!(gone.errno().is_some(), "{gone}");
        });
    }
}
