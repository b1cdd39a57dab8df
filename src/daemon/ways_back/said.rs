//! What is said of the ways of replies: to the log, in `status` and by `check`.

use std::mem::discriminant;

use super::{ByMark, Doubt, Found, MAX_CLASSES};
use crate::daemon::held;
use crate::kernel::programs::{MAX_INSTEAD, MarkedWay};
use crate::model::finding::Finding;
use crate::model::prefix::Prefix;

/// How the lines begin that say that replies may leave by the wrong way.
pub(in crate::daemon) const UNKNOWN: &str = "replies may leave by the wrong way: ";

/// What is to be said of moved addresses.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(in crate::daemon) struct Said {
    /// Which.
    about: Vec<Prefix>,
    /// What is so.
    text: String,
    /// What to do, if something may be wrong.
    remedy: Option<String>,
}

impl Said {
    /// As a line of its own, if something may be wrong.
    pub(in crate::daemon) fn warning(&self) -> Option<String> {
        let Self {
            about,
            text,
            remedy,
        } = self;
        let remedy = remedy.as_ref()?;
        Some(format!("{UNKNOWN}{} {text}: {remedy}", held::names(about)))
    }

    /// As a line of its own, if all is well.
    pub(in crate::daemon) fn note(&self) -> Option<String> {
        let Self { about, text, .. } = self;
        self.remedy
            .is_none()
            .then(|| format!("{} {text}", held::names(about)))
    }

    /// As a finding of `check`.
    pub(in crate::daemon) fn finding(&self) -> Finding {
        let object = held::names(&self.about);
        match &self.remedy {
            None => Finding::ok("route", object, self.text.clone()),
            Some(remedy) => Finding::warn("route", object, self.text.clone(), remedy.clone()),
        }
    }
}

/// Whether both are told in one line.
pub(super) fn is_alike(one: &Found, other: &Found) -> bool {
    match (one, other) {
        (Found::Doubt(one, _), Found::Doubt(other, _)) => discriminant(one) == discriminant(other),
        (one, other) => one == other,
    }
}

/// What is said of those for which the like of that was found.
pub(super) fn in_words(
    found: &Found,
    about: &[(Prefix, Found)],
    name: &dyn Fn(u32) -> String,
) -> Option<Said> {
    let (first, _) = about.first()?;
    let ip = if first.is_ipv4() { "ip" } else { "ip -6" };
    let shown = |ByMark { mark, priority, .. }: &ByMark| format!("{priority} (fwmark {mark:#x})");
    let (text, remedy) = match found {
        Found::Nothing | Found::Way(MarkedWay { mark: 0, .. }, _) => return None,
        Found::Way(way, priority) => {
            let text = format!(
                "answers by {} with the mark {:#x}, as `ip rule` {priority} has it",
                name(way.link),
                way.mark
            );
            (text, None)
        }
        Found::Unasked => {
            let text = format!(
                "has replies of which it is not known what rules by mark mean for them, since the \
                 rules tell more than {MAX_CLASSES} kinds of sources apart"
            );
            let remedy = format!(
                "let a rule select a whole prefix instead of single addresses (`{ip} rule` lists \
                 them), or name the interface by which all replies leave (`--uplink`)"
            );
            (text, Some(remedy))
        }
        Found::Doubt(doubt, rule) => {
            let rule = shown(rule);
            let otherwise = "would answer by another interface than its own without a mark";
            let no_marks = "packets of moved addresses have no marks";
            let text = match doubt {
                Doubt::Gateways => format!(
                    "{otherwise}, and rules by mark lead out there by different gateways, such as \
                     `ip rule` {rule}; {no_marks}, so say which way it is"
                ),
                Doubt::Links => format!(
                    "{otherwise}, and `ip rule` {rule} leads out there by two interfaces at once; \
                     {no_marks}, so say which way it is"
                ),
                Doubt::TooMany => format!(
                    "{otherwise}, by one of more than {MAX_INSTEAD} gateways, and `ip rule` {rule} \
                     leads out by its own; {no_marks}, so say which way it is"
                ),
                Doubt::Homeless(link) => format!(
                    "is on no interface by which clients come, and {no_marks}, so that `ip rule` \
                     {rule}, which leads out by {}, is not asked; if clients come there",
                    name(*link)
                ),
                Doubt::Several(link) => format!(
                    "is on several interfaces by which clients may come, or its network is, and \
                     {no_marks}, so that `ip rule` {rule}, which leads out by {}, is not asked; \
                     if clients come there",
                    name(*link)
                ),
            };
            let by_source = |(prefix, found): &(Prefix, Found)| match found {
                Found::Doubt(_, rule) => {
                    let ByMark {
                        table, priority, ..
                    } = rule;
                    Some(format!(
                        "{ip} rule add pref {priority} from {prefix} lookup {table}"
                    ))
                }
                Found::Nothing | Found::Way(..) | Found::Unasked => None,
            };
            let named = about.iter().take(held::NAMED);
            let commands: Vec<String> = named.filter_map(by_source).collect();
            (text, Some(commands.join(" && ")))
        }
    };
    Some(Said {
        about: about.iter().map(|&(prefix, _)| prefix).collect(),
        text,
        remedy,
    })
}
