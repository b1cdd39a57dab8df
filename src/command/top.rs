//! `top`: throughput, flows, drops, modes and problems on the whole screen, as they change.
//!
//! Threads ask the daemon; this one draws what they bring and reads keys. What is drawn is a
//! function of [`View`] alone.

mod draw;

use std::collections::VecDeque;
use std::io::{self, IsTerminal};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

use super::watch::{Look, Looks};
use super::{BAD_INPUT, FAILED, Failure, OTHER_DAEMON, flows, orders, show};
use crate::lab::interrupt;
use crate::model::flow_list::{FlowList, FlowOrder, FlowsRequest};
use crate::model::rates::Rates;
use crate::model::status::Status;
use crate::settings::args::TopArgs;
use crate::settings::values::WatchSeconds;

/// Seconds between two looks, unless told otherwise.
const EVERY: u32 = 1;

/// Flows that are asked for: more than any screen shows.
const FLOWS: u32 = 200;

/// Pause between two lists of flows, each of which takes a second.
const FLOWS_PAUSE: Duration = Duration::from_secs(1);

/// How often signals and news are looked for while no key comes.
const KEYS_WITHIN: Duration = Duration::from_millis(100);

/// Looks whose throughput is drawn: more than any terminal has columns.
const HISTORY: usize = 512;

/// Runs until it is told to end.
pub(super) fn run(args: TopArgs) -> Result<(), Failure> {
    if !io::stdout().is_terminal() {
        return Err(Failure::new(
            BAD_INPUT,
            "`ipmoved top` draws on a terminal, and standard output is none; \
             use `ipmoved status --watch` or `ipmoved flows`",
        ));
    }
    // What is wrong is said before the screen is taken.
    let first = orders::status()?;
    let every = args.every.map_or(EVERY, WatchSeconds::get);
    let order = Arc::new(AtomicU8::new(0));
    let (tell, news) = channel();
    ask_for_status(Duration::from_secs(every.into()), tell.clone());
    ask_for_flows(Arc::clone(&order), tell);
    interrupt::watch();
    let failed = |error: io::Error| Failure::new(FAILED, error);
    // It restores the screen if this process panics, too.
    let mut terminal = ratatui::try_init().map_err(failed)?;
    let mut view = View::new(every);
    view.see_status(Instant::now(), Ok(show::prepared(first)));
    let result = attend(&mut terminal, &mut view, &news, &order);
    ratatui::restore();
    result.map_err(failed)
}

/// What threads bring.
enum News {
    Status(Instant, Result<Status, Failure>),
    Flows(Result<FlowList, Failure>),
}

/// Looks at the status, again and again.
fn ask_for_status(every: Duration, tell: Sender<News>) {
    std::thread::spawn(move || {
        loop {
            std::thread::sleep(every);
            let status = orders::status().map(show::prepared);
            if tell.send(News::Status(Instant::now(), status)).is_err() {
                return;
            }
        }
    });
}

/// Looks at the flows, again and again, in the order that `order` says.
fn ask_for_flows(order: Arc<AtomicU8>, tell: Sender<News>) {
    std::thread::spawn(move || {
        loop {
            let request = FlowsRequest {
                client: None,
                sort: order_of(order.load(Relaxed)),
                top: FLOWS,
            };
            if tell.send(News::Flows(flows::ask(&request))).is_err() {
                return;
            }
            std::thread::sleep(FLOWS_PAUSE);
        }
    });
}

fn order_of(number: u8) -> FlowOrder {
    FlowOrder::ALL[usize::from(number) % FlowOrder::ALL.len()]
}

/// Draws and reads keys.
fn attend(
    terminal: &mut ratatui::DefaultTerminal,
    view: &mut View,
    news: &Receiver<News>,
    order: &AtomicU8,
) -> io::Result<()> {
    while !view.ends && !interrupt::came() {
        for new in news.try_iter() {
            match new {
                _ if view.paused => {}
                News::Status(at, status) => view.see_status(at, status),
                News::Flows(flows) => view.see_flows(flows),
            }
        }
        terminal.draw(|frame| draw::draw(frame, view))?;
        // A change of size is an event, too: the next turn draws it.
        if event::poll(KEYS_WITHIN)?
            && let Event::Key(key) = event::read()?
            && key.kind != KeyEventKind::Release
        {
            view.press(key);
            order.store(view.order, Relaxed);
        }
    }
    Ok(())
}

/// What there is to see.
struct View {
    every: u32,
    looks: Looks,
    status: Option<Box<Status>>,
    rates: Option<Rates>,
    /// What has become of the daemon.
    note: Option<String>,
    flows: FlowList,
    flows_note: Option<String>,
    /// Bits a second into and out of this server's tunnels, the newest last.
    throughput: VecDeque<[u64; 2]>,
    paused: bool,
    ends: bool,
    order: u8,
    /// The first flow that is shown.
    scroll: usize,
}

impl View {
    fn new(every: u32) -> Self {
        Self {
            every,
            looks: Looks::default(),
            status: None,
            rates: None,
            note: None,
            flows: FlowList::default(),
            flows_note: None,
            throughput: VecDeque::new(),
            paused: false,
            ends: false,
            order: 0,
            scroll: 0,
        }
    }

    /// A look at the status.
    fn see_status(&mut self, at: Instant, status: Result<Status, Failure>) {
        let look = match status {
            Ok(status) => self.looks.take(at, status),
            Err(Failure { code, message }) => {
                let gone = if code == OTHER_DAEMON {
                    "; waiting for it"
                } else {
                    ""
                };
                self.looks.gone(format!("{message}{gone}"))
            }
        };
        match look {
            Look::Runs {
                status,
                rates,
                news,
            } => {
                if let Some(rates) = &rates {
                    let sum = |of: fn(&crate::model::rates::TunnelRates) -> f64| {
                        rates.tunnels.iter().map(of).sum::<f64>() as u64
                    };
                    self.throughput
                        .push_back([sum(|it| it.rx.bits), sum(|it| it.tx.bits)]);
                }
                if self.throughput.len() > HISTORY {
                    self.throughput.pop_front();
                }
                (self.status, self.rates, self.note) = (Some(status), rates, news);
            }
            Look::Gone { why, .. } => {
                (self.rates, self.note) = (None, Some(why));
                self.throughput.push_back([0, 0]);
            }
        }
    }

    /// A look at the flows.
    fn see_flows(&mut self, flows: Result<FlowList, Failure>) {
        match flows {
            Ok(flows) => {
                (self.flows, self.flows_note) = (flows, None);
                let last = self.flows.flows.len().saturating_sub(1);
                self.scroll = self.scroll.min(last);
            }
            Err(failure) => self.flows_note = Some(flows::said(&failure)),
        }
    }

    /// A key.
    fn press(&mut self, key: KeyEvent) {
        let orders = FlowOrder::ALL.len() as u8;
        let is_control = key.modifiers.contains(KeyModifiers::CONTROL);
        #[expect(
            clippy::wildcard_enum_match_arm,
            reason = "a keyboard has keys that mean nothing here"
        )]
        match key.code {
            KeyCode::Char('c') if is_control => self.ends = true,
            KeyCode::Char('q' | 'Q') | KeyCode::Esc => self.ends = true,
            KeyCode::Char('p' | 'P' | ' ') => self.paused = !self.paused,
            KeyCode::Right | KeyCode::Char('s' | '>') => {
                self.order = (self.order + 1) % orders;
            }
            KeyCode::Left | KeyCode::Char('<') => {
                self.order = (self.order + orders - 1) % orders;
            }
            KeyCode::Down | KeyCode::Char('j') => {
                let last = self.flows.flows.len().saturating_sub(1);
                self.scroll = (self.scroll + 1).min(last);
            }
            KeyCode::Up | KeyCode::Char('k') => self.scroll = self.scroll.saturating_sub(1),
            KeyCode::Home => self.scroll = 0,
            _ => {}
        }
    }
}
