//! `flows`: the flows that the daemon carries, as a table or as JSON.

use super::{FAILED, Failure, SYSTEM, orders, print, print_json};
use crate::daemon::flows as daemon_flows;
use crate::model::flow_list::{FlowEntry, FlowList, FlowOrder, FlowsAnswer, FlowsRequest};
use crate::model::rates::bits;
use crate::model::runtime::FLOWS_SOCKET;
use crate::model::status::{duration, size};
use crate::settings::args::FlowsArgs;
use crate::settings::values::FlowsTop;

/// How many are shown, unless told otherwise.
const TOP: u32 = 20;

/// Shows them.
pub(super) fn run(args: FlowsArgs) -> Result<(), Failure> {
    let request = FlowsRequest {
        client: args.client.as_ref().map(ToString::to_string),
        sort: args.sort,
        top: args.top.map_or(TOP, FlowsTop::get),
    };
    let list = ask(&request)?;
    if args.json {
        print_json(&list)
    } else {
        print(&to_text(&list, args.sort))
    }
}

/// Asks the daemon.
pub(super) fn ask(request: &FlowsRequest) -> Result<FlowList, Failure> {
    let answer = daemon_flows::ask(&orders::dir()?.join(FLOWS_SOCKET), request);
    match answer.map_err(orders::unanswered)? {
        FlowsAnswer::Flows(list) => Ok(list),
        FlowsAnswer::Refused(why) => Err(Failure::new(SYSTEM, why)),
    }
}

/// The heads of the columns.
pub(super) const HEADS: [&str; 10] = [
    "CLIENT", "MOVED", "PROTO", "STATE", "IN", "OUT", "RATE", "AGE", "IDLE", "TO",
];

/// The cells of a flow.
pub(super) fn cells(flow: &FlowEntry) -> [String; 10] {
    let [client, moved] = flow.ends();
    let carried = |packets, bytes| format!("{} ({packets})", size(bytes));
    [
        client,
        moved,
        flow.protocol.clone(),
        flow.state.clone(),
        carried(flow.packets_in, flow.bytes_in),
        carried(flow.packets_out, flow.bytes_out),
        bits(flow.bits_per_s()),
        duration(flow.age_s),
        duration(flow.idle_s),
        flow.delivery.clone().unwrap_or_else(|| flow.peer.clone()),
    ]
}

fn to_text(list: &FlowList, sort: FlowOrder) -> String {
    let mut rows = vec![HEADS.map(String::from)];
    rows.extend(list.flows.iter().map(cells));
    let mut widths = [0; HEADS.len()];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let mut out = String::new();
    for row in &rows {
        let padded = row
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:<width$}"));
        let line = padded.collect::<Vec<_>>().join("  ");
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out.push_str(&in_short(list, sort));
    out.push_str("; IN and OUT: bytes (packets) from and to the client\n");
    out
}

/// How many there are, and in which order.
pub(super) fn in_short(list: &FlowList, sort: FlowOrder) -> String {
    let order = match sort {
        FlowOrder::Bytes => "most bytes first",
        FlowOrder::Age => "the oldest first",
        FlowOrder::Rate => "the fastest first",
    };
    let (shown, matched, live) = (list.flows.len(), list.matched, list.live);
    let of = match matched == live {
        true => format!("{live} flows"),
        false => format!("{matched} flows of these clients, of {live} in all"),
    };
    format!("{shown} of {of}, {order}")
}

/// A failure of `top`, which goes on.
pub(super) fn said(failure: &Failure) -> String {
    match failure.code {
        FAILED => format!("the flows are not known: {}", failure.message),
        _ => failure.message.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A flow as the new server has it.
    fn flow() -> FlowEntry {
        FlowEntry {
            client: "2001:db8::9".into(),
            client_port: 40_000,
            moved: "2001:db8::5".into(),
            moved_port: 443,
            protocol: "tcp".into(),
            state: "established".into(),
            packets_in: 12,
            bytes_in: 3_400,
            packets_out: 900,
            bytes_out: 1_200_000,
            age_s: 125,
            idle_s: 0,
            bits_per_s_in: 1_000.0,
            bits_per_s_out: 11_000.0,
            delivery: Some("[2001:db8:2::2]:8443".into()),
            peer: "192.0.2.1:51850".into(),
        }
    }

    #[test]
    fn a_flow_is_a_line_under_its_heads() {
        let ping = FlowEntry {
            moved_port: 0,
            protocol: "icmpv6".into(),
            delivery: None,
            ..flow()
        };
        let list = FlowList {
            live: 7,
            matched: 2,
            measured_s: 1.0,
            flows: vec![flow(), ping],
        };
        let text = to_text(&list, FlowOrder::Rate);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].starts_with("CLIENT               MOVED              PROTO   STATE"));
        let words: Vec<&str> = lines[1].split("  ").filter(|it| !it.is_empty()).collect();
        assert_eq!(
            words.iter().map(|word| word.trim()).collect::<Vec<_>>(),
            [
                "[2001:db8::9]:40000",
                "[2001:db8::5]:443",
                "tcp",
                "established",
                "3.4 KB (12)",
                "1.2 MB (900)",
                "12.0 kbit/s",
                "2 min 5 s",
                "0 s",
                "[2001:db8:2::2]:8443",
            ]
        );
        assert!(lines[2].contains(" 2001:db8::5 ") && lines[2].ends_with("192.0.2.1:51850"));
        assert!(lines[3].starts_with("2 of 2 flows of these clients, of 7 in all, the fastest"));
    }
}
