//! The screen of `top`, for any size of terminal.
//!
//! ```text
//! the verdict                                                          clock of the daemon
//! problems, with the first remedy of each
//! ┌ received 9.4 Gbit/s ─────────────┐┌ sent 92 Mbit/s ──────────────────────────────────┐
//! └──────────────────────────────────┘└──────────────────────────────────────────────────┘
//! ┌ flows ───────────────────────────────────────────────────┐┌ drops ───────────────────┐
//! │                                                          │┌ modes ───────────────────┐
//! └──────────────────────────────────────────────────────────┘└──────────────────────────┘
//! keys
//! ```
//!
//! A narrow terminal has drops and modes beside each other, below the flows.

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Cell, Paragraph, Row, Sparkline, Table};

use super::View;
use crate::command::flows::{HEADS, cells, in_short};
use crate::model::problems::{Problem, Severity};
use crate::model::rates::{Rates, bits, short};
use crate::model::status::{ModeStatus, Status, duration};

/// From so many columns on, drops and modes stand beside the flows.
const WIDE: u16 = 120;

/// Problems that are shown with their remedies; `status` shows all.
const PROBLEMS: usize = 3;

/// Lines of a curve of throughput, with its frame.
const CURVE: u16 = 5;

/// Lines of drops and modes on a narrow terminal, with their frames.
const LISTS: u16 = 7;

/// Columns of drops and modes on a wide one.
const SIDE: u16 = 46;

/// Draws everything.
pub(super) fn draw(frame: &mut Frame<'_>, view: &View) {
    let problems = view
        .status
        .as_ref()
        .map(|it| it.problems())
        .unwrap_or_default();
    let shown = problems_text(&problems, usize::from(frame.area().width));
    let [head, wrong, curves, below, keys] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(shown.len() as u16),
        Constraint::Length(CURVE),
        Constraint::Min(0),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    frame.render_widget(Paragraph::new(head_line(view, &problems)), head);
    frame.render_widget(Paragraph::new(shown), wrong);
    draw_curves(frame, view, curves);
    let [list, drops, modes] = if frame.area().width >= WIDE {
        let [list, side] =
            Layout::horizontal([Constraint::Min(0), Constraint::Length(SIDE)]).areas(below);
        let [drops, modes] =
            Layout::vertical([Constraint::Fill(1), Constraint::Fill(1)]).areas(side);
        [list, drops, modes]
    } else {
        let [list, low] =
            Layout::vertical([Constraint::Min(0), Constraint::Length(LISTS)]).areas(below);
        let [drops, modes] =
            Layout::horizontal([Constraint::Fill(1), Constraint::Fill(1)]).areas(low);
        [list, drops, modes]
    };
    draw_flows(frame, view, list);
    let status = view.status.as_deref();
    let lines = status.map_or_else(Vec::new, |it| {
        drop_lines(it, view.rates.as_ref(), drops.width)
    });
    draw_list(frame, " dropped, and a second ", lines, drops);
    let lines = status.map_or_else(Vec::new, mode_lines);
    draw_list(frame, " modes ", lines, modes);
    frame.render_widget(Paragraph::new(key_line(view)), keys);
}

/// The verdict, as large as it is bad.
fn head_line(view: &View, problems: &[Problem]) -> Line<'static> {
    let is_bad = |it: &Problem| it.severity == Severity::Fault;
    let (text, color) = match (&view.note, &view.status) {
        (Some(note), _) => (note.clone(), Color::Yellow),
        (None, Some(status)) if problems.iter().any(is_bad) => (status.verdict(), Color::Red),
        (None, Some(status)) => (status.verdict(), Color::Green),
        (None, None) => ("looking".into(), Color::Yellow),
    };
    let style = Style::new().fg(color).add_modifier(Modifier::BOLD);
    Line::styled(text, style)
}

/// The worst problems, a line each, and what to do.
fn problems_text(problems: &[Problem], width: usize) -> Vec<Line<'static>> {
    let mut lines = Vec::new();
    for problem in problems.iter().take(PROBLEMS) {
        let color = match problem.severity {
            Severity::Fault => Color::Red,
            Severity::Limit | Severity::Notice => Color::Yellow,
        };
        let mut rows = rows_of(&format!("! {}", problem.text), width);
        lines.extend(
            rows.drain(..)
                .map(|row| Line::styled(row, Style::new().fg(color))),
        );
        if let Some(remedy) = problem.remedies.first() {
            lines.extend(
                rows_of(&format!("  → {remedy}"), width)
                    .into_iter()
                    .map(Line::raw),
            );
        }
    }
    if let Some(more @ 1..) = problems.len().checked_sub(PROBLEMS) {
        lines.push(Line::raw(format!("  {more} more: `ipmoved status`")));
    }
    lines
}

/// A text in rows of so many columns, which a remedy to copy needs.
fn rows_of(text: &str, width: usize) -> Vec<String> {
    let all: Vec<char> = text.chars().collect();
    all.chunks(width.max(1))
        .map(|row| row.iter().collect())
        .collect()
}

fn draw_curves(frame: &mut Frame<'_>, view: &View, area: Rect) {
    let halves: [Rect; 2] =
        Layout::horizontal([Constraint::Fill(1), Constraint::Fill(1)]).areas(area);
    for (at, (name, half)) in ["received", "sent"].into_iter().zip(halves).enumerate() {
        let room = usize::from(half.width.saturating_sub(2));
        let from = view.throughput.len().saturating_sub(room);
        let data: Vec<u64> = view.throughput.iter().skip(from).map(|it| it[at]).collect();
        let now = data.last().copied().unwrap_or(0);
        let most = data.iter().copied().max().unwrap_or(0);
        let title = format!(
            " {name} {}, at most {} ",
            bits(now as f64),
            bits(most as f64)
        );
        let curve = Sparkline::default()
            .block(Block::bordered().title(title))
            .style(Style::new().fg(Color::Cyan))
            .max(most.max(1))
            .data(data);
        frame.render_widget(curve, half);
    }
}

fn draw_flows(frame: &mut Frame<'_>, view: &View, area: Rect) {
    let rows: Vec<[String; HEADS.len()]> = view
        .flows
        .flows
        .iter()
        .skip(view.scroll)
        .map(cells)
        .collect();
    let sort = super::order_of(view.order);
    let title = match &view.flows_note {
        Some(note) => format!(" {note} "),
        None => format!(" {} ", in_short(&view.flows, sort)),
    };
    // What does not fit is left out from the least needed on.
    let mut columns: Vec<usize> = (0..HEADS.len()).collect();
    let width = |column: usize| {
        let cells = rows
            .iter()
            .take(usize::from(area.height))
            .map(|row| row[column].chars().count());
        cells.chain([HEADS[column].len()]).max().unwrap_or(0)
    };
    let room = usize::from(area.width.saturating_sub(2));
    for least in LEAST_NEEDED {
        let total: usize = columns.iter().map(|&column| width(column) + 1).sum();
        if total > room + 1 {
            columns.retain(|&column| column != least);
        }
    }
    let widths: Vec<Constraint> = columns
        .iter()
        .map(|&column| Constraint::Length(width(column) as u16))
        .collect();
    let pick = |row: &[String; HEADS.len()]| {
        let cells = columns
            .iter()
            .map(|&column| Cell::from(row[column].clone()));
        Row::new(cells.collect::<Vec<_>>())
    };
    let table = Table::new(rows.iter().map(pick), widths)
        .header(pick(&HEADS.map(String::from)).style(Style::new().add_modifier(Modifier::BOLD)))
        .column_spacing(1)
        .block(Block::bordered().title(title));
    frame.render_widget(table, area);
}

/// Columns of flows in the order in which they are left out: where it goes to, idle, age, protocol,
/// state, the moved address, what went in.
const LEAST_NEEDED: [usize; 7] = [9, 8, 2, 7, 3, 4, 1];

fn draw_list(frame: &mut Frame<'_>, title: &'static str, lines: Vec<Line<'static>>, area: Rect) {
    frame.render_widget(
        Paragraph::new(lines).block(Block::bordered().title(title)),
        area,
    );
}

/// Drops of all peers together, those that grow first.
fn drop_lines(status: &Status, rates: Option<&Rates>, width: u16) -> Vec<Line<'static>> {
    // What is left of the frame, the count and the rate.
    let reasons = usize::from(width).saturating_sub(2 + 8 + 9);
    let mut all = std::collections::BTreeMap::<&String, (u64, f64)>::new();
    for (at, tunnel) in status.tunnels.iter().enumerate() {
        for (reason, count) in &tunnel.drops {
            let rate = rates.and_then(|it| it.tunnels.get(at)?.drops.get(reason).copied());
            let sum = all.entry(reason).or_default();
            *sum = (sum.0 + count, sum.1 + rate.unwrap_or(0.0));
        }
    }
    // Those of the only peer have them among theirs.
    if status.tunnels.len() > 1 {
        for (reason, count) in &status.drops {
            all.entry(reason).or_default().0 += count;
        }
    }
    let mut all: Vec<_> = all.into_iter().collect();
    all.sort_by(|one, other| {
        (other.1.1, other.1.0)
            .partial_cmp(&(one.1.1, one.1.0))
            .unwrap_or(std::cmp::Ordering::Equal)
    });
    let line = |(reason, (count, rate)): (&String, (u64, f64))| {
        let color = if rate > 0.0 {
            Color::Yellow
        } else {
            Color::Reset
        };
        let text = format!("{reason:<reasons$}{count:>9}{:>8}", short(rate));
        Line::styled(text, Style::new().fg(color))
    };
    all.into_iter().map(line).collect()
}

/// What each move does; on the new server, how far it has come.
fn mode_lines(status: &Status) -> Vec<Line<'static>> {
    let of_modes = status.tunnels.iter().flat_map(|tunnel| &tunnel.modes);
    let mode = |mode: &ModeStatus| {
        let count = |name: &str, many: Option<u64>| many.map(|many| format!(", {name} {many}"));
        let wait = (mode.waiting > 0).then_some(mode.waiting);
        let more = [
            count("wait", wait),
            count("here", mode.here_live),
            count("there", mode.there_live),
        ];
        let more: String = more.into_iter().flatten().collect();
        Line::raw(format!("{}: {}{more}", mode.what, mode.says()))
    };
    let mut lines: Vec<Line<'static>> = of_modes.map(mode).collect();
    if lines.is_empty() {
        let moved = status.tunnels.iter().flat_map(|tunnel| &tunnel.moved);
        lines.extend(moved.map(|what| Line::raw(what.clone())));
    }
    lines
}

fn key_line(view: &View) -> Line<'static> {
    let bold = Style::new().add_modifier(Modifier::BOLD);
    let mut spans = Vec::new();
    for (key, what) in [
        ("q", "end"),
        ("p", if view.paused { "go on" } else { "pause" }),
        ("←→", "sort"),
        ("↑↓", "flows"),
    ] {
        spans.push(Span::styled(key, bold));
        spans.push(Span::raw(format!(" {what}   ")));
    }
    let state = match (&view.status, view.paused) {
        (_, true) => "paused".to_owned(),
        (Some(status), false) => format!(
            "ipmoved {}, up {}, every {} s",
            status.version,
            duration(status.uptime_s),
            view.every
        ),
        (None, false) => String::new(),
    };
    spans.push(Span::raw(state));
    Line::from(spans)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::command::top::View;
    use crate::model::flow_list::{FlowEntry, FlowList};
    use crate::model::status::tests::example;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    fn view() -> View {
        let mut view = View::new(1);
        let mut status = example();
        status.tunnels[0].refused.clear();
        view.see_status(Instant::now(), Ok(status.clone()));
        status.tunnels[0].rx.bytes += 1_000_000_000;
        status.tunnels[0].drops.insert("replay".into(), 900);
        view.see_status(
            Instant::now() + std::time::Duration::from_secs(1),
            Ok(status),
        );
        let flow = |n: u64| FlowEntry {
            client: format!("203.0.113.{n}"),
            client_port: 40_000,
            moved: "192.0.2.5".into(),
            moved_port: 80,
            protocol: "tcp".into(),
            state: "established".into(),
            packets_in: 1,
            bytes_in: 100,
            packets_out: 2,
            bytes_out: 3_000,
            age_s: 5,
            idle_s: 0,
            bits_per_s_in: 0.0,
            bits_per_s_out: 24_000.0,
            delivery: Some("198.51.100.2:80".into()),
            peer: "192.0.2.1:51850".into(),
        };
        let flows = (1..100).map(flow).collect();
        let (live, matched) = (99, 99);
        view.see_flows(Ok(FlowList {
            live,
            matched,
            measured_s: 1.0,
            flows,
        }));
        view
    }

    /// The lines of a screen of that size.
    fn screen(view: &View, width: u16, height: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, view)).unwrap();
        let buffer = terminal.backend().buffer().clone();
        let line = |row: &[ratatui::buffer::Cell]| row.iter().map(|cell| cell.symbol()).collect();
        buffer.content().chunks(width.into()).map(line).collect()
    }

    #[test]
    fn all_of_it_is_seen_at_80_and_at_200_columns() {
        for (width, height) in [(80, 24), (200, 50)] {
            let lines = screen(&view(), width, height);
            let text = lines.join("\n");
            for part in [
                "tunnel to old server 192.0.2.1:51850: up",
                "! new connections to 192.0.2.5 are held for 9 s; 3 wait",
                "ipmoved move",
                " received ",
                "Gbit/s",
                " sent 0 bit/s",
                "CLIENT",
                "203.0.113.1:40000",
                "24.0 kbit/s",
                "replay",
                "192.0.2.5: held for 9 s at most",
                "q end",
                "p pause",
            ] {
                assert!(text.contains(part), "{part} at {width}: {text}");
            }
            assert_eq!(text.contains("198.51.100.2:80"), width == 200, "{text}");
            assert!(
                lines
                    .iter()
                    .all(|line| line.chars().count() == usize::from(width))
            );
        }
    }

    #[test]
    fn no_size_is_too_small() {
        let view = view();
        for width in 1..40 {
            for height in 1..16 {
                screen(&view, width, height);
            }
        }
        screen(&View::new(1), 80, 24);
    }

    #[test]
    fn keys_sort_scroll_pause_and_end() {
        use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
        let mut view = view();
        let press = |view: &mut View, code| view.press(KeyEvent::new(code, KeyModifiers::NONE));
        press(&mut view, KeyCode::Right);
        press(&mut view, KeyCode::Down);
        let text = screen(&view, 200, 50).join("\n");
        assert!(text.contains("the oldest first"), "{text}");
        assert!(!text.contains("203.0.113.1:40000") && text.contains("203.0.113.2:40000"));
        press(&mut view, KeyCode::Left);
        press(&mut view, KeyCode::Left);
        assert!(
            screen(&view, 200, 50)
                .join("\n")
                .contains("the fastest first")
        );
        press(&mut view, KeyCode::Char('p'));
        assert!(view.paused && screen(&view, 80, 24).join("\n").contains("paused"));
        press(&mut view, KeyCode::Char('x'));
        assert!(!view.ends);
        view.press(KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL));
        assert!(view.ends);
    }
}
