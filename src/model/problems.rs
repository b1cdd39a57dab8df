//! What is wrong, for whoever looks at three in the morning: the verdict in one line, and each
//! problem with what to do about it, the worst first.
//!
//! Owns which fact of a [`Status`] is a problem, how bad it is, and its remedy. It asks nobody:
//! what causes a silence is found out by the daemon, and stands in the status already.

use serde::{Deserialize, Serialize};

use super::peer::Role;
use super::status::{Answers, ModeStatus, Served, State, Status, TunnelStatus, UNHEARD, Way};

/// Problems of one kind that a person is shown.
const SHOWN: usize = 8;

/// How bad a problem is.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Clients are not served.
    Fault,
    /// Some are not, or will not be.
    Limit,
    /// It is to be known.
    #[default]
    Notice,
}

impl Severity {
    /// All, the worst first.
    pub const ALL: [Self; 3] = [Self::Fault, Self::Limit, Self::Notice];

    /// Its stable name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fault => "fault",
            Self::Limit => "limit",
            Self::Notice => "notice",
        }
    }
}

/// Something that is wrong.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Problem {
    /// The peer that it is about; `None` if it is about the daemon.
    pub peer: Option<String>,
    /// How bad it is.
    pub severity: Severity,
    /// What is wrong.
    pub text: String,
    /// What to do about it: the likeliest cause first, each other one with its name before it.
    pub remedies: Vec<String>,
}

impl Status {
    /// All that is wrong, the worst first.
    pub fn problems(&self) -> Vec<Problem> {
        let mut all: Vec<Problem> = self
            .tunnels
            .iter()
            .flat_map(|tunnel| tunnel.problems(self.way))
            .collect();
        if self.log_lines_lost > 0 {
            all.push(Problem {
                peer: None,
                severity: Severity::Notice,
                text: format!("{} log lines were lost", self.log_lines_lost),
                remedies: vec!["what reads the daemon's standard error is too slow".into()],
            });
        }
        all.sort_by_key(|problem| problem.severity);
        all
    }
}

impl TunnelStatus {
    /// What is wrong with what goes to and comes from this peer.
    fn problems(&self, way: Way) -> Vec<Problem> {
        let mut out = Vec::new();
        let mut add = |severity, text: String, remedies: Vec<String>| {
            out.push(Problem {
                peer: Some(self.peer.clone()),
                severity,
                text,
                remedies,
            });
        };
        if let Some((text, remedies)) = self.out_of_reach(way) {
            add(Severity::Fault, text, remedies);
        }
        let hold = |mode: &&ModeStatus| mode.mode == "held";
        for mode in self.modes.iter().filter(hold).take(SHOWN) {
            let wait = match mode.waiting {
                0 => String::new(),
                waiting => format!("; {waiting} wait"),
            };
            let left = mode
                .held_s
                .map_or_else(String::new, |it| format!(" for {it} s"));
            add(
                Severity::Notice,
                format!("new connections to {} are held{left}{wait}", mode.what),
                vec!["`ipmoved move` or `ipmoved back` ends it; it also ends by itself".into()],
            );
        }
        for served in self.served.iter().filter(|it| self.counts(it)) {
            let severity = if served.is_bad() {
                Severity::Fault
            } else {
                Severity::Notice
            };
            let since = super::status::duration(served.since_s);
            let text = format!("{}{}, for {since}", served.says(), served.waiting());
            add(severity, text, remedies(served));
        }
        for refused in self.refused.iter().take(SHOWN) {
            add(Severity::Limit, refused.why.clone(), Vec::new());
        }
        if let Some(more) = self.refused.len().checked_sub(SHOWN + 1) {
            let text = format!("{} more moves are not accepted", more + 1);
            add(
                Severity::Limit,
                text,
                vec!["see `ipmoved status --json`".into()],
            );
        }
        if !self.outgoing.is_empty() && self.peer_allows_outgoing == Some(false) {
            add(
                Severity::Limit,
                "the old server lets nothing out that begins here (--outgoing)".into(),
                vec!["add --allow-outgoing to the old server's settings".into()],
            );
        }
        if self.flows.refused > 0 {
            // What was once is no trouble of now.
            let severity = match self.flows.live >= self.flows.max {
                true => Severity::Limit,
                false => Severity::Notice,
            };
            add(
                severity,
                format!(
                    "{} new connections were refused since the start: all {} flows were in use",
                    self.flows.refused, self.flows.max
                ),
                vec!["`ipmoved flows --top 20` shows who has them; --max-flows allows more".into()],
            );
        }
        out
    }

    /// Whether a person has to be told of it beside the other things that are served.
    fn counts(&self, served: &Served) -> bool {
        served.is_bad()
            || served.is_early()
            || served.expected && served.state == Answers::Unanswered
            || served.expected && served.state == Answers::NothingIn && !served.causes.is_empty()
    }

    /// Why nothing passes, if nothing does.
    fn out_of_reach(&self, way: Way) -> Option<(String, Vec<String>)> {
        if way == Way::Nat {
            return None;
        }
        let other = self.role.other();
        let unheard = self.unheard_s.filter(|&unheard| unheard >= UNHEARD);
        let at = &self.peer;
        match self.state {
            State::Up => {
                let text = format!("nothing was heard of {at} for {} s", unheard?);
                let ask = format!("does `ping {}` answer?", host(at));
                let there = format!("on the {other} server: `ipmoved status`");
                Some((text, vec![ask, there]))
            }
            State::Connecting | State::Down => {
                let nothing = match self.role {
                    Role::Old => "no packet passes",
                    Role::New => "no packet comes",
                };
                if let (State::Down, Some(stopped)) = (self.state, self.stopped_s) {
                    let ago = super::status::duration(stopped);
                    let text = format!(
                        "{nothing}: the daemon of {at}, the {other} server, was stopped {ago} ago"
                    );
                    let start = format!("on the {other} server: `systemctl start ipmoved`");
                    return Some((text, vec![start]));
                }
                let text = format!("{nothing}: {at}, the {other} server, does not answer");
                let there = format!(
                    "on the {other} server: `systemctl status ipmoved`, or `ipmoved status`"
                );
                let port = "is this server's UDP port open to it, and its port to this one?";
                let key = "have both the same key? `sha256sum /etc/ipmoved/psk` on both";
                Some((text, vec![there, port.into(), key.into()]))
            }
        }
    }
}

/// What to do about something that is not answered.
fn remedies(served: &Served) -> Vec<String> {
    let line = |(at, cause): (usize, &super::status::Cause)| match at {
        0 => cause.remedy.clone(),
        _ => format!("or {}: {}", cause.text, cause.remedy),
    };
    served.causes.iter().enumerate().map(line).collect()
}

/// The host of `HOST:PORT`.
fn host(peer: &str) -> &str {
    let host = peer.rsplit_once(':').map_or(peer, |(host, _)| host);
    host.trim_start_matches('[').trim_end_matches(']')
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::status::tests::example;

    #[test]
    fn the_worst_comes_first_and_each_has_a_remedy() {
        let mut status = example();
        let tunnel = &mut status.tunnels[0];
        (tunnel.state, tunnel.flows.refused) = (State::Connecting, 7);
        tunnel.flows.live = tunnel.flows.max;
        tunnel.peer_allows_outgoing = Some(false);
        status.log_lines_lost = 2;
        let problems = status.problems();
        let said: Vec<(Severity, &str)> = problems
            .iter()
            .map(|it| (it.severity, it.text.as_str()))
            .collect();
        assert_eq!(
            said,
            [
                (
                    Severity::Fault,
                    "no packet comes: 192.0.2.1:51850, the old server, does not answer"
                ),
                (
                    Severity::Limit,
                    "192.0.2.77 is not accepted; give it --accept 192.0.2.77"
                ),
                (
                    Severity::Limit,
                    "the old server lets nothing out that begins here (--outgoing)"
                ),
                (
                    Severity::Limit,
                    "7 new connections were refused since the start: all 10 flows were in use"
                ),
                (
                    Severity::Notice,
                    "new connections to 192.0.2.5 are held for 9 s; 3 wait"
                ),
                (Severity::Notice, "2 log lines were lost"),
            ]
        );
        let has_remedy = |it: &Problem| !it.remedies.is_empty() || it.text.contains("--accept");
        assert!(problems.iter().all(has_remedy), "{problems:?}");
    }

    #[test]
    fn a_peer_that_was_stopped_is_not_looked_for_in_firewalls_and_keys() {
        let mut status = example();
        let tunnel = &mut status.tunnels[0];
        (tunnel.state, tunnel.stopped_s) = (State::Down, Some(9));
        let problems = status.problems();
        assert_eq!(
            problems[0].text,
            "no packet comes: the daemon of 192.0.2.1:51850, the old server, was stopped 9 s ago"
        );
        assert_eq!(
            problems[0].remedies,
            ["on the old server: `systemctl start ipmoved`"]
        );
    }

    #[test]
    fn who_is_well_has_no_problem() {
        let mut status = example();
        let tunnel = &mut status.tunnels[0];
        tunnel.refused.clear();
        tunnel.modes.clear();
        assert_eq!(status.problems(), []);
        status.tunnels[0].unheard_s = Some(UNHEARD);
        let said = status.problems();
        assert_eq!(said[0].text, "nothing was heard of 192.0.2.1:51850 for 8 s");
        assert!(said[0].remedies[0].contains("`ping 192.0.2.1`"), "{said:?}");
        status.way = Way::Nat;
        assert_eq!(status.problems(), [], "there is nobody to be heard of");
    }
}
