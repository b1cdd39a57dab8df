//! `cutover`: changes servers, a step after the other, and shows each.
//!
//! Owns the outside of [`steps`]: what both servers have is read from `status`, the daemon is asked
//! over one connection of the control socket, which keeps everybody else from changing these moves
//! meanwhile, and commands are run. It prints a line a step, and while it waits a bar on a terminal
//! and otherwise a line now and then.

mod checked;
mod served;
mod steps;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::IsTerminal;
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::signal::unix::{SignalKind, signal};

use self::checked::Checked;
use self::served::{Heard, Served as OldService};
use self::steps::{Action, Input, Plan, Step, Steps, View, Watched};
use super::orders::{connect, names, status};
use super::{FAILED, Failure, SYSTEM, here, print, stragglers};
use crate::daemon::control_socket::Client;
use crate::model::asked::Found;
use crate::model::move_index::MoveIndex;
use crate::model::moved::{Move, TCP, Transport, UDP};
use crate::model::progress::Listens;
use crate::model::request::{Answer, Request};
use crate::model::status::{Answers, ModeStatus, Served, State, Status, TunnelStatus, UNHEARD};
use crate::settings::args::CutoverArgs;

/// How long steps take unless told otherwise.
const DRAIN: u32 = 30;
const WITHIN: u32 = 60;

/// How often both servers are looked at. Where that takes long, as with very many connections, it
/// is done less often: the rest of the time is the servers' own.
const LOOK_EVERY: Duration = Duration::from_millis(250);
const LOOK_PART: u32 = 4;

/// How often a command that runs is asked for its end.
const CHILD_EVERY: Duration = Duration::from_millis(50);

/// How often a line says what is waited for, where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// How long a daemon that has crashed is waited for, to go back: a service manager starts it again
/// in a second or two.
const RETURN: Duration = Duration::from_secs(15);

/// How long a command may take to end once it is told to, and then once it has to.
const LAST: Duration = Duration::from_secs(2);

/// How much longer than `--within` clients are told of no refusal at most: the first connections
/// are watched, and going back takes a moment. It is over when this process is.
const SHIELD: Duration = Duration::from_secs(60);

/// Changes servers.
pub(super) fn run(args: CutoverArgs) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime.map_err(|error| Failure::new(FAILED, error))?;
    runtime.block_on(cut_over(args))
}

async fn cut_over(args: CutoverArgs) -> Result<(), Failure> {
    let failed = |error: std::io::Error| Failure::new(FAILED, error);
    // From here on nothing ends this process between two steps.
    let mut signals = [
        SignalKind::interrupt(),
        SignalKind::terminate(),
        SignalKind::hangup(),
    ]
    .map(signal)
    .into_iter()
    .collect::<Result<Vec<_>, _>>()
    .map_err(failed)?;
    let mut daemon = connect()?;
    let untold = |error: std::io::Error| {
        let why = "cannot count the connections of this server (CONFIG_INET_DIAG)";
        let remedy = "`ipmoved hold`, `move` and `back` do without";
        Failure::new(SYSTEM, format!("{why}: {error}; {remedy}"))
    };
    let before = status()?;
    let all = match names(&args.what) {
        what if what.is_empty() => modes_of(&before).map(|it| it.what.clone()).collect(),
        what => what,
    };
    let asked = stragglers::asked_for(&before);
    let served = OldService::look(&all, before.port, &asked).map_err(untold)?;
    let request = Request::Cutover {
        what: names(&args.what),
        asks: served.asks(),
    };
    let all = super::orders::give(&mut daemon, &request)?;
    let all: HashSet<String> = all.into_iter().map(|it| it.what).collect();
    let mut shown = Shown::new(args.json);
    // From here on nobody else changes these modes.
    let mut found = status()?;
    here::count(&mut found).map_err(untold)?;
    let what: Vec<String> = of(&found, &all)
        .filter(|it| it.mode != "moved")
        .map(|it| it.what.clone())
        .collect();
    if what.is_empty() {
        shown.line(Step::Check, "all of it has moved already");
        return Ok(());
    }
    let seconds =
        |given: Option<u32>, default| Duration::from_secs(given.unwrap_or(default).into());
    let plan = Plan {
        drain: seconds(args.drain.map(|it| it.get()), DRAIN),
        within: seconds(args.within.map(|it| it.get()), WITHIN),
        stop: args.stop.is_some(),
        restart: args.restart.is_some(),
    };
    shown.line(Step::Check, &format!("moving {}", what.join(" ")));
    let is_theirs = |it: &&TunnelStatus| it.modes.iter().any(|mode| all.contains(&mode.what));
    // What is wrong with the way there is said by itself.
    if (found.tunnels.iter().filter(is_theirs)).all(|it| trouble(it).is_none()) {
        check(&mut shown, found.pid)?;
    }
    let mut cutover = Cutover {
        args,
        what: What::new(what),
        served,
        shield: plan.within + SHIELD,
        daemon: Some(daemon),
        steps: Steps::new(plan),
        child: None,
        shown,
    };
    let mut next_look = Instant::now();
    loop {
        while let Some(action) = cutover.steps.poll_action() {
            if let Some(result) = cutover.carry_out(action) {
                return cutover
                    .shown
                    .end(result)
                    .map_err(|why| Failure::new(FAILED, why));
            }
        }
        let now = cutover.shown.now();
        let mut wake = next_look;
        if let Some(until) = cutover.steps.next_timeout() {
            wake = wake.min(cutover.shown.started + until);
        }
        if cutover.child.is_some() {
            wake = wake.min(Instant::now() + CHILD_EVERY);
        }
        let [interrupt, terminate, hangup] = &mut signals[..] else {
            return Err(Failure::new(FAILED, "three signals are caught"));
        };
        tokio::select! {
            _ = interrupt.recv() => cutover.steps.handle(now, Input::Interrupted),
            _ = terminate.recv() => cutover.steps.handle(now, Input::Interrupted),
            _ = hangup.recv() => cutover.steps.handle(now, Input::Interrupted),
            () = tokio::time::sleep_until(wake.into()) => {}
        }
        cutover.look_at_child();
        if Instant::now() >= next_look {
            let begun = Instant::now();
            cutover.look();
            next_look = Instant::now() + LOOK_EVERY.max(begun.elapsed() * LOOK_PART);
        }
        let now = cutover.shown.now();
        cutover.steps.handle_timeout(now);
    }
}

/// Has `ipmoved check` look at this server and ask the new one, before anything changes.
fn check(shown: &mut Shown, daemon: u32) -> Result<(), Failure> {
    let Checked { warnings, failures } = match checked::look(daemon) {
        Ok(checked) => checked,
        Err(why) => {
            let text = format!("warning: `ipmoved check` could not look: {why}");
            shown.line(Step::Check, &text);
            return Ok(());
        }
    };
    for warning in warnings {
        shown.line(Step::Check, &format!("warning: {warning}"));
    }
    let Some(first) = failures.first() else {
        return Ok(());
    };
    for failure in &failures {
        shown.line(Step::Check, &format!("fail: {failure}"));
    }
    let why = format!("nothing has changed, since `ipmoved check` fails: {first}");
    shown.end(Err(why)).map_err(|why| Failure::new(FAILED, why))
}

/// A cut-over under way.
struct Cutover {
    args: CutoverArgs,
    what: What,
    /// What the old service serves.
    served: OldService,
    /// How long clients are told of no refusal at most.
    shield: Duration,
    /// Nobody else changes these moves as long as this is open.
    daemon: Option<Client>,
    steps: Steps,
    child: Option<Child>,
    shown: Shown,
}

impl Cutover {
    fn tell(&mut self, input: Input) {
        self.steps.handle(self.shown.now(), input);
    }

    /// Looks at what both servers have.
    fn look(&mut self) {
        // Another one may be there already, which knows nothing of this cut-over.
        if self.daemon.as_ref().is_some_and(Client::is_gone) {
            self.daemon = None;
            return self.tell(Input::Lost("it has ended".into()));
        }
        let seen = status().and_then(|mut status| {
            here::count(&mut status).map_err(|error| Failure::new(FAILED, error))?;
            Ok(view(&status, &self.what, &self.served))
        });
        match seen {
            Ok(view) => {
                self.shown.waits(&self.steps, &view);
                self.tell(Input::Seen(view));
            }
            Err(error) => self.tell(Input::Lost(error.message)),
        }
    }

    /// Does what is to be done. Returns how it ends.
    fn carry_out(&mut self, action: Action) -> Option<Result<(), String>> {
        let what = self.what.names();
        match action {
            Action::Hold(seconds) => {
                self.ask(&Request::Hold { what, seconds });
                // What was seen before is no longer so.
                self.look();
            }
            Action::Move => self.deliver(what),
            Action::Back => self.go_back(&Request::Back { what }),
            Action::Stop => {
                if self.args.restart.is_some() {
                    // If the daemon is gone, that shows in the next look.
                    let _ = self.said(&Request::Stopping { what });
                }
                self.start(self.args.stop.clone());
            }
            Action::Restart => self.start(self.args.restart.clone()),
            Action::Kill => self.kill(),
            Action::Say(step, text) => self.shown.line(step, &text),
            Action::End(result) => return Some(result),
        }
        None
    }

    /// Sends new connections to the new server. Who is refused there is not told.
    fn deliver(&mut self, what: Vec<String>) {
        let shield = Request::Shield {
            what: what.clone(),
            seconds: u32::try_from(self.shield.as_secs()).unwrap_or(u32::MAX),
        };
        let percent = None;
        let mut input = self.said(&shield);
        if input == Input::Done {
            input = self.said(&Request::Move { what, percent });
        }
        self.tell(input);
    }

    fn ask(&mut self, request: &Request) {
        let input = self.said(request);
        self.tell(input);
    }

    /// What the daemon says to a request.
    fn said(&mut self, request: &Request) -> Input {
        let input = match self.daemon.as_mut().map(|daemon| daemon.ask(request)) {
            Some(Ok(answer)) => self.input(answer),
            Some(Err(error)) => Input::Lost(error.to_string()),
            None => Input::Lost("it has gone".into()),
        };
        if matches!(input, Input::Lost(_)) {
            self.daemon = None;
        }
        input
    }

    fn input(&mut self, answer: Answer) -> Input {
        match answer {
            Answer::Done { warnings, .. } => {
                for text in warnings {
                    self.shown
                        .line(self.steps.step(), &format!("warning: {text}"));
                }
                Input::Done
            }
            Answer::Reloaded { .. } => Input::Done,
            Answer::Refused { why, .. } => Input::Refused(why),
        }
    }

    /// Goes back, also by a daemon that has just been started again.
    fn go_back(&mut self, request: &Request) {
        let patient_until = Instant::now() + RETURN;
        let input = loop {
            let daemon = match &mut self.daemon {
                Some(daemon) => Ok(daemon),
                none => connect().map(|daemon| none.insert(daemon)),
            };
            let error = match daemon {
                Err(error) => error.message,
                Ok(daemon) => match daemon.ask(request) {
                    // What another one refuses it may do a moment later, such as one that has just
                    // been started.
                    Ok(Answer::Refused { input: false, why }) => why,
                    Ok(answer) => break self.input(answer),
                    Err(error) => error.to_string(),
                },
            };
            self.daemon = None;
            if Instant::now() >= patient_until {
                break Input::Refused(format!(
                    "{error}; once the daemon runs, `ipmoved back` does it, and the hold ends by \
                     itself"
                ));
            }
            std::thread::sleep(LOOK_EVERY);
        };
        self.tell(input);
    }

    // Commands.

    /// Runs a command of the administrator's, in a process group of its own: ^C is for us alone.
    fn start(&mut self, command: Option<String>) {
        let line = command.unwrap_or_default();
        self.shown.pause();
        self.shown
            .line(self.steps.step(), &format!("running: {line}"));
        let mut shell = Command::new("/bin/sh");
        shell
            .args(["-c", &line])
            .stdin(Stdio::null())
            .process_group(0);
        if self.shown.json {
            // Standard output is for lines of JSON alone.
            shell.stdout(std::io::stderr());
        }
        match shell.spawn() {
            Ok(child) => self.child = Some(child),
            Err(error) => self.tell(Input::Ended(Err(error.to_string()))),
        }
    }

    fn look_at_child(&mut self) {
        let Some(child) = &mut self.child else { return };
        let result = match child.try_wait() {
            Ok(None) => return,
            Ok(Some(status)) if status.success() => Ok(()),
            Ok(Some(status)) => Err(status.to_string()),
            Err(error) => Err(error.to_string()),
        };
        self.child = None;
        self.tell(Input::Ended(result));
    }

    /// Ends the command that runs, and whatever it has started.
    fn kill(&mut self) {
        let Some(mut child) = self.child.take() else {
            return;
        };
        let Some(group) = Pid::from_raw(child.id() as i32) else {
            return;
        };
        // It may have ended meanwhile.
        let _ = kill_process_group(group, Signal::TERM);
        let patient_until = Instant::now() + LAST;
        while matches!(child.try_wait(), Ok(None)) && Instant::now() < patient_until {
            std::thread::sleep(CHILD_EVERY);
        }
        let _ = kill_process_group(group, Signal::KILL);
        let patient_until = Instant::now() + LAST;
        while matches!(child.try_wait(), Ok(None)) {
            // One that waits for a disk or a server cannot be ended; clients cannot wait for it.
            if Instant::now() >= patient_until {
                let pid = child.id();
                let text = format!("process {pid} does not end, and is left alone");
                return self.shown.line(self.steps.step(), &text);
            }
            std::thread::sleep(CHILD_EVERY);
        }
    }
}

fn modes_of(status: &Status) -> impl Iterator<Item = &ModeStatus> {
    let all = status.tunnels.iter().flat_map(|tunnel| &tunnel.modes);
    all.filter(|it| !it.leaving)
}

/// The modes of these moves.
fn of<'a>(status: &'a Status, what: &'a HashSet<String>) -> impl Iterator<Item = &'a ModeStatus> {
    modes_of(status).filter(|it| what.contains(&it.what))
}

/// The moves of a cut-over.
struct What {
    names: HashSet<String>,
    index: MoveIndex,
}

impl What {
    fn new(names: Vec<String>) -> Self {
        let moves = names.iter().filter_map(|it| it.parse().ok()).collect();
        Self {
            index: MoveIndex::new(moves),
            names: names.into_iter().collect(),
        }
    }

    /// For a request.
    fn names(&self) -> Vec<String> {
        self.names.iter().cloned().collect()
    }

    /// Whether clients ask for one of them who ask for this.
    fn takes(&self, served: &Served) -> bool {
        let Ok(Move {
            prefix,
            ports,
            transport: Some(transport),
        }) = served.what.parse()
        else {
            return self.names.contains(&served.what);
        };
        let protocol = match transport {
            Transport::Tcp => TCP,
            Transport::Udp => UDP,
        };
        ports.first().is_some_and(|ports| {
            let end = SocketAddr::new(prefix.first(), *ports.start());
            self.index.find(protocol, end).is_some()
        })
    }
}

/// What both servers have of these moves, where the old one serves this.
fn view(status: &Status, what: &What, old: &OldService) -> View {
    let is_it = |it: &ModeStatus| what.names.contains(&it.what);
    let is_theirs = |tunnel: &&TunnelStatus| tunnel.modes.iter().any(is_it);
    let tunnels: Vec<&TunnelStatus> = status.tunnels.iter().filter(is_theirs).collect();
    let modes = || of(status, &what.names);
    let served = tunnels.iter().flat_map(|tunnel| &tunnel.served);
    // Scans ask for what nobody is meant to serve.
    let is_meant = |it: &&Served| it.expected || old.serves(&it.what);
    let asked = served
        .clone()
        .filter(|it| what.takes(it))
        .map(|it| it.asked)
        .sum();
    let served = served.filter(|it| is_meant(it) && what.takes(it));
    let progress = tunnels.iter().flat_map(|tunnel| &tunnel.progress);
    let said: HashMap<&str, Listens> = progress
        .map(|of| (of.what.as_str(), of.progress.listens))
        .collect();
    let looked_for = tunnels.iter().flat_map(|tunnel| &tunnel.looked_for);
    let found: BTreeMap<String, Found> =
        looked_for.map(|it| (it.what.clone(), it.listens)).collect();
    let heard: Vec<(String, Heard)> = modes()
        .map(|it| {
            let listens = said.get(it.what.as_str()).copied().unwrap_or_default();
            let heard = old.heard(&it.what, &found).unwrap_or(Heard {
                listens,
                lacks: Vec::new(),
            });
            (it.what.clone(), heard)
        })
        .collect();
    // Where nobody is sent to the new server, what is known of its answers is of an earlier try.
    let goes_there = modes().any(|it| it.percent > 0);
    let unanswered = served.clone().find(|it| {
        let bad = matches!(it.state, Answers::Silent | Answers::Refused);
        goes_there && bad && it.clients > 0
    });
    View {
        trouble: tunnels.iter().find_map(|tunnel| trouble(tunnel)),
        unanswered: unanswered.map(|it| {
            let cause = it.causes.first();
            let why = cause.map_or_else(String::new, |it| format!(": {}; {}", it.text, it.remedy));
            format!("the new server does not answer clients of {}{why}", it.what)
        }),
        // Whoever goes back in its place may let new connections wait a moment longer.
        held: modes().all(|it| it.mode == "held" && it.cutover.is_some()),
        moved: modes().all(|it| it.mode == "moved" && it.cutover.is_some()),
        here_tcp: modes().filter_map(|it| it.here_tcp).sum(),
        here_live: modes().filter_map(|it| it.here_live).sum(),
        waiting: modes().map(|it| it.waiting).sum(),
        listens: heard
            .iter()
            .map(|(what, heard)| (what.clone(), heard.listens))
            .collect(),
        lacks: heard
            .into_iter()
            .filter(|(_, heard)| !heard.lacks.is_empty())
            .map(|(what, heard)| (what, heard.lacks))
            .collect(),
        watched: served
            .map(|it| {
                let watched = Watched {
                    asked: it.asked,
                    answered: it.answered,
                    refused: it.refused,
                    may_be_silent: !it.what.ends_with("/tcp"),
                };
                (it.what.clone(), watched)
            })
            .collect(),
        asked,
    }
}

/// What is wrong with the way to a new server.
fn trouble(tunnel: &TunnelStatus) -> Option<String> {
    let peer = &tunnel.peer;
    match (tunnel.state, tunnel.unheard_s) {
        (State::Up, Some(unheard)) if unheard >= UNHEARD => Some(format!(
            "nothing was heard of the new server {peer} for {unheard} s"
        )),
        (State::Up, _) => None,
        (State::Down, _) if tunnel.stopped_s.is_some() => Some(format!(
            "the tunnel to the new server {peer} is down: its daemon was stopped; start it there"
        )),
        (State::Connecting | State::Down, _) => Some(format!(
            "the tunnel to the new server {peer} is down: is its daemon running? (`ipmoved status` \
             there)"
        )),
    }
}

/// What is printed.
struct Shown {
    json: bool,
    started: Instant,
    bar: Option<ProgressBar>,
    next_line: Duration,
    last: View,
}

impl Shown {
    fn new(json: bool) -> Self {
        Self {
            json,
            started: Instant::now(),
            bar: (!json && std::io::stderr().is_terminal()).then(|| {
                let bar = ProgressBar::no_length();
                let style = ProgressStyle::with_template("  {spinner} {bar:24} {msg}");
                style.into_iter().for_each(|style| bar.set_style(style));
                bar
            }),
            next_line: LINE_EVERY,
            last: View::default(),
        }
    }

    /// The time since the start.
    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Nothing but lines for a while, since somebody else prints as well.
    fn pause(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    /// A line of a step.
    fn line(&mut self, step: Step, text: &str) {
        let now = self.now();
        let line = match self.json {
            true => self.object(step, "says", Some(text)),
            false => format!("{:6.1} s  {:<8} {text}", now.as_secs_f64(), step.name()),
        };
        self.write(&line);
    }

    fn write(&self, line: &str) {
        // Whoever read it may have gone; the cut-over is not over for that.
        let write = || print(&format!("{line}\n"));
        let _ = match &self.bar {
            Some(bar) => bar.suspend(write),
            None => write(),
        };
    }

    fn object(&self, step: Step, event: &str, text: Option<&str>) -> String {
        let View {
            here_live,
            here_tcp,
            waiting,
            listens,
            ..
        } = &self.last;
        serde_json::json!({
            "seconds": (self.now().as_secs_f64() * 1_000.0).round() / 1_000.0,
            "step": step.name(),
            "event": event,
            "text": text,
            "here_live": here_live,
            "here_tcp": here_tcp,
            "waiting": waiting,
            "listens": listens,
        })
        .to_string()
    }

    /// What is waited for.
    fn waits(&mut self, steps: &Steps, view: &View) {
        self.last = view.clone();
        let Some(until) = steps.next_timeout() else {
            return;
        };
        let (step, now) = (steps.step(), self.now());
        if self.json {
            return self.write(&self.object(step, "waits", None));
        }
        let left = until.saturating_sub(now).as_secs_f64().ceil();
        let text = format!(
            "{} connections here, {} wait; {left} s left",
            view.here_tcp, view.waiting
        );
        match &self.bar {
            // The bar is as wide as the wait is long.
            Some(bar) if !matches!(step, Step::Stop | Step::Restart) => {
                bar.set_length(until.as_millis() as u64);
                bar.set_position(now.as_millis() as u64);
                bar.set_message(format!("{}: {text}", step.name()));
                bar.tick();
            }
            Some(_) => {}
            None if now >= self.next_line => {
                self.next_line = now + LINE_EVERY;
                self.line(step, &text);
            }
            None => {}
        }
    }

    /// The last line, and the result.
    fn end(&mut self, result: Result<(), String>) -> Result<(), String> {
        self.pause();
        self.bar = None;
        let why = match &result {
            Ok(()) => {
                if self.json {
                    self.write(&self.object(Step::Over, "moved", None));
                } else {
                    self.line(Step::Over, "moved");
                }
                return result;
            }
            Err(why) => why,
        };
        if self.json {
            self.write(&self.object(Step::Over, "not_moved", Some(why)));
        }
        result.map_err(|why| format!("not moved: {why}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_moves_now_says_whether_it_is_answered() {
        let served = |what: &str| Served {
            what: what.into(),
            state: Answers::Ok,
            expected: true,
            since_s: 0,
            asked: 1,
            answered: 1,
            refused: 0,
            clients: 0,
            causes: Vec::new(),
        };
        let names = ["192.0.2.5:80,443/tcp", "2001:db8::/64"];
        let what = What::new(names.map(String::from).to_vec());
        for (text, takes) in [
            ("192.0.2.5:80/tcp", true),
            ("192.0.2.5:443/tcp", true),
            ("192.0.2.5:80/udp", false),
            ("192.0.2.5:22/tcp", false),
            ("192.0.2.6:80/tcp", false),
            ("[2001:db8::7]:53/udp", true),
            ("[2001:db8:1::7]:53/udp", false),
            ("2001:db8::/64", true),
            ("192.0.2.5", false),
        ] {
            assert_eq!(what.takes(&served(text)), takes, "{text}");
        }
    }
}
