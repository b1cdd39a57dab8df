//! The steps of a cut-over: what comes after what, when it is given up, and the way back.
//!
//! ```text
//! check ──► hold ──► drain ──► stop ──► listen ──► deliver ──► watch ──► moved
//!   │         │        │        │         │           │          │
//!   │         └────────┴────────┴─ fails ─┴───────────┴──────────┘
//!   ▼                              │
//! refused                          ▼
//!                   restart, if --stop had begun ──► back ──► not moved
//! ```
//!
//! A machine without I/O: it is told what was seen, what became of what it asked for, and the time
//! since the start. Whatever happens it ends, and within a time that can be told before.
//!
//! Whether something listens on the new server cannot always be told: what answers may be in a
//! container or a virtual machine. What waits is then delivered, and the first connections show it.
//! No client is told of a refusal meanwhile ([`Request::Shield`]), so that one costs nothing but
//! time, and is waited out for as long as a listener would be waited for.
//!
//! If nobody is left to go back, since this process was killed or the host has crashed, the hold
//! ends by itself: it lasts no longer than the steps may.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use crate::model::progress::{Listens, lacking};
#[cfg(doc)]
use crate::model::request::Request;

/// How long the new server may take to say whether something listens, before it is taken for one
/// that does not say. It says so within a second of the hold.
const UNTOLD: Duration = Duration::from_secs(3);

/// How long the first connections are watched, where it was known that something listens. A client
/// whose first SYNs were lost has sent four by then (RFC 6298).
const WATCH: Duration = Duration::from_secs(10);

/// At least so long, since what is counted is counted every second.
const WATCH_LEAST: Duration = Duration::from_millis(1_500);

/// And no longer, where nobody comes.
const WATCH_QUIET: Duration = Duration::from_secs(3);

/// How long `--restart` may take.
const RESTART: Duration = Duration::from_secs(30);

/// What a hold lasts beyond the time that its steps may take.
const SLACK: Duration = Duration::from_secs(15);

/// How long steps may take, and what they do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Plan {
    /// For the old server's connections to end.
    pub(super) drain: Duration,
    /// For something to listen on the new server, `--stop` included.
    pub(super) within: Duration,
    /// There is a `--stop`.
    pub(super) stop: bool,
    /// There is a `--restart`.
    pub(super) restart: bool,
}

/// A step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Step {
    /// Is anything known to be wrong?
    Check,
    /// New connections wait from now on.
    Hold,
    /// The old server's connections end.
    Drain,
    /// The old server's service is stopped.
    Stop,
    /// Something listens on the new server.
    Listen,
    /// What waits goes to the new server.
    Deliver,
    /// Is it answered there?
    Watch,
    /// New connections wait while the old server's service starts again.
    Rehold,
    /// The old server's service starts again.
    Restart,
    /// New connections go to the old server.
    Back,
    /// It is over.
    Over,
}

impl Step {
    /// Its name in the output.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Check => "check",
            Self::Hold => "hold",
            Self::Drain => "drain",
            Self::Stop => "stop",
            Self::Listen => "listen",
            Self::Deliver => "deliver",
            Self::Watch => "watch",
            Self::Rehold | Self::Restart => "restart",
            Self::Back => "back",
            Self::Over => "over",
        }
    }
}

/// What became of the conversations with a port.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Watched {
    /// They were begun.
    pub(super) asked: u64,
    /// They were answered.
    pub(super) answered: u64,
    /// They were refused.
    pub(super) refused: u64,
    /// Its protocol need not answer.
    pub(super) may_be_silent: bool,
}

/// What both servers have of what is to move.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct View {
    /// What is wrong with the way to the new server.
    pub(super) trouble: Option<String>,
    /// What clients that wait for the new server's answer find there.
    pub(super) unanswered: Option<String>,
    /// All of it is held.
    pub(super) held: bool,
    /// All of it has moved.
    pub(super) moved: bool,
    /// TCP connections that the old server has.
    pub(super) here_tcp: u64,
    /// Everything that it has.
    pub(super) here_live: u64,
    /// Conversations that wait.
    pub(super) waiting: u64,
    /// Whether something listens on the new server, move by move.
    pub(super) listens: BTreeMap<String, Listens>,
    /// Where nothing was found there, of moves that name no ports.
    pub(super) lacks: BTreeMap<String, Vec<String>>,
    /// Conversations that were watched, by port.
    pub(super) watched: BTreeMap<String, Watched>,
    /// Conversations that asked the new server for something, also for what nobody serves.
    pub(super) asked: u64,
}

/// Something that has happened.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Input {
    /// What both servers have now.
    Seen(View),
    /// The daemon has done what it was asked for.
    Done,
    /// It has not, and this is why.
    Refused(String),
    /// The command that was run has ended well, or why not.
    Ended(Result<(), String>),
    /// An administrator wants it to end.
    Interrupted,
    /// The old server's daemon is gone.
    Lost(String),
}

/// Something to do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Action {
    /// Have the daemon hold new connections for so many seconds.
    Hold(u32),
    /// Have it send them to the new server.
    Move,
    /// Have it send them to the old server; wait for a daemon that is being restarted.
    Back,
    /// Run `--stop`.
    Stop,
    /// Run `--restart`.
    Restart,
    /// End the command that runs.
    Kill,
    /// Tell an administrator.
    Say(Step, String),
    /// It is over: moved, or why not.
    End(Result<(), String>),
}

/// A cut-over under way.
#[derive(Debug)]
pub(super) struct Steps {
    plan: Plan,
    step: Step,
    /// When the step has lasted long enough.
    until: Option<Duration>,
    /// The moves of which the new server has said once whether something listens.
    told: BTreeSet<String>,
    /// When new connections began to wait.
    held_at: Duration,
    /// `--stop` has begun.
    stopped: bool,
    /// Until when something has to listen.
    listens_by: Duration,
    /// It was delivered though nobody could tell whether something listens.
    unsure: bool,
    /// When what waited was delivered.
    delivered_at: Duration,
    /// The last that was seen, and what was seen before delivering.
    seen: View,
    before: View,
    /// Why it is not moved.
    why: String,
    actions: VecDeque<Action>,
}

impl Steps {
    /// Begins.
    pub(super) fn new(plan: Plan) -> Self {
        Self {
            plan,
            step: Step::Check,
            until: None,
            told: BTreeSet::new(),
            held_at: Duration::ZERO,
            stopped: false,
            listens_by: Duration::ZERO,
            unsure: false,
            delivered_at: Duration::ZERO,
            seen: View::default(),
            before: View::default(),
            why: String::new(),
            actions: VecDeque::new(),
        }
    }

    /// The step under way.
    pub(super) fn step(&self) -> Step {
        self.step
    }

    /// When [`Self::handle_timeout`] is wanted, since the start.
    pub(super) fn next_timeout(&self) -> Option<Duration> {
        self.until
    }

    /// The next thing to do.
    pub(super) fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// Takes in what has happened.
    pub(super) fn handle(&mut self, now: Duration, input: Input) {
        match input {
            Input::Seen(view) => {
                let told = view
                    .listens
                    .iter()
                    .filter(|(_, it)| **it != Listens::Unknown);
                self.told.extend(told.map(|(what, _)| what.clone()));
                self.seen = view;
                self.saw(now);
            }
            Input::Done => self.done(now),
            Input::Refused(why) => self.refused(now, why),
            Input::Ended(result) => self.ended(result),
            Input::Interrupted if self.step == Step::Restart => {
                self.actions.push_back(Action::Kill);
                self.say("it was interrupted: --restart is not waited for");
                self.back();
            }
            Input::Interrupted => self.give_up("it was interrupted".into()),
            // Nobody can be kept waiting then, and the service starts again all the same.
            Input::Lost(_) if self.step == Step::Rehold => self.restart(now),
            Input::Lost(why) => {
                self.give_up(format!("the daemon here does not answer any more ({why})"));
            }
        }
    }

    /// Does what is due.
    pub(super) fn handle_timeout(&mut self, now: Duration) {
        if self.until.is_none_or(|until| now < until) {
            return;
        }
        match self.step {
            Step::Drain => {
                let left = match self.seen.here_tcp {
                    1 => "1 connection is still here; it lasts until it ends".into(),
                    left => format!("{left} connections are still here; they last until they end"),
                };
                let stops = match self.plan.stop {
                    true => " or --stop ends them",
                    false => "",
                };
                self.say(format!("{left}{stops}"));
                self.drained(now);
            }
            Step::Stop => {
                self.actions.push_back(Action::Kill);
                let within = self.plan.within.as_secs();
                self.give_up(format!("--stop has not ended within {within} s (--within)"));
            }
            Step::Listen => {
                let within = self.plan.within.as_secs();
                let why = match self.not_listening(now) {
                    Some((what, Listens::No)) => {
                        format!("{what}: {}{}", lacking(what), self.lacks(what))
                    }
                    Some((what, Listens::Yes | Listens::Unknown)) => {
                        format!(
                            "the new server no longer says whether something listens for {what}"
                        )
                    }
                    None => "nothing listens on the new server".into(),
                };
                self.give_up(format!("{why}, after {within} s (--within)"));
            }
            Step::Watch => self.watched(),
            Step::Restart => {
                self.actions.push_back(Action::Kill);
                let took = RESTART.as_secs();
                self.say(format!("--restart has not ended within {took} s"));
                self.back();
            }
            Step::Check | Step::Hold | Step::Deliver | Step::Rehold | Step::Back | Step::Over => {}
        }
    }

    /// Where nothing was found for a move, in brackets.
    fn lacks(&self, what: &str) -> String {
        match self.seen.lacks.get(what).map(Vec::as_slice) {
            None | Some([]) => String::new(),
            Some(lacks) => format!(" (not at {}, which this server serves)", lacks.join(", ")),
        }
    }

    fn say(&mut self, text: impl Into<String>) {
        self.actions.push_back(Action::Say(self.step, text.into()));
    }

    /// Takes the next step.
    fn enter(&mut self, step: Step, until: Option<Duration>) {
        (self.step, self.until) = (step, until);
    }

    fn end(&mut self, result: Result<(), String>) {
        self.enter(Step::Over, None);
        self.actions.push_back(Action::End(result));
    }

    /// Something was seen.
    fn saw(&mut self, now: Duration) {
        let trouble = self.seen.trouble.clone();
        match self.step {
            Step::Check => match trouble.or_else(|| self.seen.unanswered.clone()) {
                Some(why) => self.end(Err(why)),
                None => {
                    self.say("both daemons are up");
                    self.enter(Step::Hold, None);
                    let all = self.plan.drain + self.plan.within + SLACK;
                    self.actions.push_back(Action::Hold(all.as_secs() as u32));
                }
            },
            Step::Drain | Step::Stop | Step::Listen => {
                if let Some(why) = trouble {
                    self.give_up(why);
                } else if !self.seen.held {
                    let why = "new connections no longer wait: another command has changed that";
                    self.give_up(why.into());
                } else if self.step == Step::Drain && self.seen.here_tcp == 0 {
                    let left = self.seen.here_live;
                    self.say(match left {
                        0 => "nothing is left on this server".into(),
                        _ => format!("no TCP is left on this server; {left} other conversations"),
                    });
                    self.drained(now);
                } else if self.step == Step::Listen {
                    self.listening(now);
                }
            }
            Step::Watch => match trouble {
                Some(why) => self.give_up(why),
                None if !self.seen.moved => {
                    let why = "new connections no longer go to the new server: another command \
                               has changed that";
                    self.give_up(why.into());
                }
                None => self.watching(now),
            },
            Step::Hold | Step::Deliver | Step::Rehold | Step::Restart | Step::Back | Step::Over => {
            }
        }
    }

    /// Nothing more is waited for on the old server.
    fn drained(&mut self, now: Duration) {
        self.listens_by = now + self.plan.within;
        let until = Some(self.listens_by);
        if self.plan.stop {
            self.enter(Step::Stop, until);
            self.stopped = true;
            self.actions.push_back(Action::Stop);
        } else {
            self.enter(Step::Listen, until);
        }
    }

    /// A move for which nothing listens yet, as far as is known.
    fn not_listening(&self, now: Duration) -> Option<(&str, Listens)> {
        let is_early = now < self.held_at + UNTOLD;
        let waits = |(what, listens): &(&String, &Listens)| match listens {
            Listens::Yes => false,
            Listens::No => true,
            // That nothing was found, though something may be there, is all that is to be known.
            Listens::Unknown if self.seen.lacks.contains_key(*what) => false,
            Listens::Unknown => is_early || self.told.contains(*what),
        };
        let found = self.seen.listens.iter().find(waits);
        found.map(|(what, listens)| (what.as_str(), *listens))
    }

    /// Is somebody there to whom what waits can be delivered?
    fn listening(&mut self, now: Duration) {
        if self.not_listening(now).is_some() {
            return;
        }
        let unknown = |(_, it): &(&String, &Listens)| **it == Listens::Unknown;
        let unknown = self.seen.listens.iter().find(unknown).map(|(what, _)| what);
        self.unsure = unknown.is_some();
        let none_at = |what: &String| self.seen.lacks.get(what).map(|it| it.join(", "));
        self.say(match unknown {
            None => {
                let besides: Vec<String> = self.seen.lacks.keys().filter_map(none_at).collect();
                match &besides[..] {
                    [] => "something listens on the new server".into(),
                    _ => format!(
                        "something listens on the new server, though not at {}",
                        besides.join(", ")
                    ),
                }
            }
            Some(what) => match none_at(what) {
                Some(ports) => format!(
                    "nothing was found at {ports}, but a container or virtual machine may answer: \
                     what waits is delivered, and whoever is refused tries again"
                ),
                None => format!(
                    "the new server cannot tell whether something listens for {what}: what waits \
                     is delivered, and whoever is refused tries again"
                ),
            },
        });
        self.before = self.seen.clone();
        self.enter(Step::Deliver, None);
        self.actions.push_back(Action::Move);
    }

    /// What each port has been asked for since delivering.
    fn since(&self) -> Vec<(&String, Watched)> {
        let since = |(what, now): (_, &Watched)| {
            let before = self.before.watched.get(what).copied().unwrap_or_default();
            let since = Watched {
                asked: now.asked.saturating_sub(before.asked),
                answered: now.answered.saturating_sub(before.answered),
                refused: now.refused.saturating_sub(before.refused),
                may_be_silent: now.may_be_silent,
            };
            (what, since)
        };
        self.seen.watched.iter().map(since).collect()
    }

    /// Are the first connections answered?
    fn watching(&mut self, now: Duration) {
        let since = self.since();
        let lasted = now.saturating_sub(self.delivered_at);
        // One client alone may be unwelcome.
        let refused = |it: &Watched| it.refused > 0 && it.answered == 0 && lasted >= WATCH_LEAST;
        let refused = |it: &Watched| !self.unsure && refused(it);
        if let Some((what, _)) = since.iter().find(|(_, it)| refused(it)) {
            let why = format!("the new server refuses {what}");
            return self.give_up(why);
        }
        let asked: Vec<_> = since.iter().filter(|(_, it)| it.asked > 0).collect();
        let all_well = asked
            .iter()
            .all(|(_, it)| it.answered > 0 || it.may_be_silent);
        let answered: u64 = since.iter().map(|(_, it)| it.answered).sum();
        // Those that waited may have wanted what nobody serves, as scans do.
        let reached = self.before.waiting == 0 || self.seen.asked > self.before.asked;
        if !asked.is_empty() && all_well && lasted >= WATCH_LEAST {
            self.say(format!(
                "the first are answered on the new server: {answered} of those watched"
            ));
            self.end(Ok(()));
        } else if asked.is_empty() && reached && lasted >= WATCH_QUIET {
            self.say(match self.unsure {
                false => "nobody has asked for anything meanwhile",
                true => "nobody has asked for anything meanwhile: try it",
            });
            self.end(Ok(()));
        }
    }

    /// The watch is over, and not all are answered.
    fn watched(&mut self) {
        let silent = |it: &&(&String, Watched)| it.1.asked > 0 && it.1.answered == 0;
        let why = match self.since().iter().find(silent) {
            Some((what, _)) => format!("nobody is answered on the new server: {what}"),
            None => "what waited did not reach the new server".into(),
        };
        self.give_up(why);
    }

    /// The daemon has done what it was asked for.
    fn done(&mut self, now: Duration) {
        match self.step {
            Step::Hold => {
                let all = self.plan.drain + self.plan.within + SLACK;
                self.say(format!("new connections wait, {} s at most", all.as_secs()));
                self.held_at = now;
                self.enter(Step::Drain, Some(now + self.plan.drain));
            }
            Step::Deliver => {
                let waiting = self.before.waiting;
                self.say(match waiting {
                    0 => "the new server gets new connections".into(),
                    1 => "the new server gets new connections, and the one that waited".into(),
                    _ => format!("the new server gets new connections, and {waiting} that waited"),
                });
                self.delivered_at = now;
                let until = match self.unsure {
                    false => now + WATCH,
                    true => self.listens_by.max(now + WATCH_QUIET),
                };
                self.enter(Step::Watch, Some(until));
            }
            Step::Rehold => self.restart(now),
            Step::Back => self.went_back(None),
            Step::Check
            | Step::Drain
            | Step::Stop
            | Step::Listen
            | Step::Watch
            | Step::Restart
            | Step::Over => {}
        }
    }

    /// The daemon has not done what it was asked for.
    fn refused(&mut self, now: Duration, why: String) {
        match self.step {
            Step::Hold => self.end(Err(why)),
            // Nobody waits then, and the service starts again all the same.
            Step::Rehold => self.restart(now),
            Step::Back => self.went_back(Some(why)),
            Step::Check
            | Step::Drain
            | Step::Stop
            | Step::Listen
            | Step::Deliver
            | Step::Watch
            | Step::Restart
            | Step::Over => self.give_up(why),
        }
    }

    /// A command has ended.
    fn ended(&mut self, result: Result<(), String>) {
        match (self.step, result) {
            (Step::Stop, Ok(())) => {
                self.say("--stop has ended well");
                let until = self.until;
                self.enter(Step::Listen, until);
            }
            (Step::Stop, Err(why)) => self.give_up(format!("--stop failed: {why}")),
            (Step::Restart, result) => {
                match result {
                    Ok(()) => self.say("--restart has ended well"),
                    Err(why) => self.say(format!("--restart failed: {why}")),
                }
                self.back();
            }
            // It was given up before.
            _ => {}
        }
    }

    /// It fails: the way back.
    fn give_up(&mut self, why: String) {
        match self.step {
            Step::Check => return self.end(Err(why)),
            // It is on its way back already.
            Step::Rehold | Step::Restart | Step::Back | Step::Over => return,
            Step::Stop => self.actions.push_back(Action::Kill),
            Step::Hold | Step::Drain | Step::Listen | Step::Deliver | Step::Watch => {}
        }
        self.say(format!("{why}: going back"));
        self.why = why;
        if self.stopped && self.plan.restart {
            self.enter(Step::Rehold, None);
            self.actions
                .push_back(Action::Hold((RESTART + SLACK).as_secs() as u32));
        } else {
            self.back();
        }
    }

    fn restart(&mut self, now: Duration) {
        self.enter(Step::Restart, Some(now + RESTART));
        self.actions.push_back(Action::Restart);
    }

    fn back(&mut self) {
        self.enter(Step::Back, None);
        self.actions.push_back(Action::Back);
    }

    fn went_back(&mut self, refused: Option<String>) {
        let mut why = std::mem::take(&mut self.why);
        match refused {
            None => self.say("new connections go to this server"),
            Some(refused) => why.push_str(&format!("; and it could not go back: {refused}")),
        }
        if self.stopped && !self.plan.restart {
            why.push_str("; --stop was run: start the service here again, if it is not running");
        }
        self.end(Err(why));
    }
}

#[cfg(test)]
mod tests;
