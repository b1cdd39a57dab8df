//! One page to show others: the decline, who is left, what comes directly, the verdict.
//!
//! Owns how it looks. What it says comes as a value ([`Page`]). It is one HTML file without
//! anything from outside, so that it can be mailed and archived. Colours are chosen by the style
//! sheet, so that the page is readable in the dark and printed.

use std::collections::BTreeMap;
use std::fmt;

use minijinja::value::{Serde, Value};
use minijinja::{Environment, context};
use plotters::coord::Shift;
use plotters::prelude::*;
use serde::Serialize;

use super::findings::{Findings, Straggler};
use super::tally::Arrived;
use super::text::{ago, number, place};
use super::time::{Day, minute, span};
use super::trend::{GONE, Trend, WINDOW};
use super::verdict::{DayCount, Verdict};

/// Size of a chart in its own units, which the page scales to its width.
const CHART: (u32, u32) = (860, 260);

/// Room for half a date on the right, as large as a phone shows it.
const LAST_DATE: u32 = 32;

/// So far ahead a chart follows a trend at most, in days: further out it says nothing.
const MAX_AHEAD: i64 = 60;

/// Colours that stand for roles; the style sheet has the real ones, and names these.
const RULE: RGBColor = RGBColor(0, 0, 1);
const BAR: RGBColor = RGBColor(0, 0, 2);
const TREND: RGBColor = RGBColor(0, 0, 3);

/// What the page says.
#[derive(Debug)]
pub struct Page<'a> {
    /// What has moved, as `--move` has it; empty if no daemon runs that could say it.
    pub moved: &'a [String],
    /// Whether the old server can be switched off.
    pub verdict: &'a Verdict,
    /// Who still comes.
    pub findings: &'a Findings,
    /// How each day's new conversations came to the new server, as far as it has told.
    pub arrived: &'a BTreeMap<Day, Arrived>,
}

/// A number with its name.
#[derive(Debug, Serialize)]
struct Number {
    what: &'static str,
    value: String,
}

/// A client that is left.
#[derive(Debug, Serialize)]
struct Left {
    client: String,
    asks_for: String,
    names: Vec<String>,
    how_often: String,
    connections: String,
    last_seen: String,
}

/// Why there is no page.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// A chart cannot be drawn.
    #[error("cannot draw the chart: {0}")]
    Chart(String),
    /// The page cannot be put together.
    #[error("cannot write the page: {0}")]
    Page(#[from] minijinja::Error),
}

impl Page<'_> {
    /// The page as HTML.
    ///
    /// # Errors
    /// [`ReportError`].
    pub fn to_html(&self) -> Result<String, ReportError> {
        let mut pages = Environment::new();
        // The name ends in .html, so whatever is put in is escaped: clients choose the names that
        // they ask for.
        pages.add_template("report.html", include_str!("report.html"))?;
        let Self {
            verdict, findings, ..
        } = self;
        let lines = verdict.to_sentences();
        let clients: Vec<Left> = (findings.stragglers.iter())
            .map(|it| Left::of(it, findings.at))
            .collect();
        let drawn = |chart: String| match chart.is_empty() {
            true => Value::UNDEFINED,
            false => chart.into(),
        };
        let decline = drawn(decline(&verdict.days, verdict.trend)?);
        let directly = drawn(directly(self.arrived)?);
        Ok(pages.get_template("report.html")?.render(context! {
            version => env!("CARGO_PKG_VERSION"),
            moved => Serde(&self.moved),
            written => minute(verdict.at),
            safe => verdict.safe,
            headline => lines.headline,
            because => Serde(&lines.because),
            trend => lines.trend,
            numbers => Serde(&self.numbers()),
            decline => decline,
            directly => directly,
            clients => Serde(&clients),
            more => findings.more,
            since => span(findings.at - findings.since),
            others => number(findings.others),
        })?)
    }

    fn numbers(&self) -> Vec<Number> {
        let of = |what, value: String| Number { what, value };
        let mut numbers = vec![
            of(
                "clients that are left",
                number(self.findings.clients as u64),
            ),
            of("on the last whole day", {
                let last = self.verdict.days.last();
                last.map_or("–".into(), |day| number(day.clients))
            }),
        ];
        let last = self.arrived.last_key_value();
        if let Some((&day, percent)) = last.and_then(|(day, it)| Some((day, it.percent()?))) {
            let what = if day == Day::of(self.verdict.at) {
                "of today's new connections came directly to the new server"
            } else {
                "of a day's new connections came directly to the new server, at last"
            };
            numbers.push(of(what, format!("{percent} %")));
        }
        numbers
    }
}

impl Left {
    fn of(straggler: &Straggler, now: i64) -> Self {
        let how_often = match (straggler.connections, straggler.rhythm) {
            (1, _) => "once".into(),
            (_, Some(rhythm)) => format!("every {}", span(rhythm.every_s)),
            (_, None) => format!("on {} days", straggler.days),
        };
        Self {
            client: straggler.client.to_string(),
            asks_for: place(&straggler.asked),
            names: straggler.names.clone(),
            how_often,
            connections: number(straggler.connections),
            last_seen: ago(now - straggler.last_seen),
        }
    }
}

/// The number of clients so many days behind a day, as the trend has it, and the last day of it
/// that a chart shows. `None` if nothing can be told.
fn line_of(trend: Trend, last: &DayCount) -> Option<(impl Fn(i64) -> f64, i64)> {
    let Trend::Declines {
        halves_in_days,
        gone,
    } = trend
    else {
        return None;
    };
    let ahead = gone.map(|gone| gone.0 - last.day.0);
    // It goes through the day on which the last one is gone, wherever that is.
    let from = ahead.map_or(last.clients as f64, |ahead| {
        GONE * 2_f64.powf(ahead as f64 / halves_in_days)
    });
    let at = move |days: i64| from * 0.5_f64.powf(days as f64 / halves_in_days);
    Some((at, ahead.unwrap_or(0).clamp(0, MAX_AHEAD)))
}

/// Bars for the clients of each day, and a line for where they lead.
fn decline(days: &[DayCount], trend: Trend) -> Result<String, ReportError> {
    let (Some(first), Some(last)) = (days.first(), days.last()) else {
        return Ok(String::new());
    };
    let line = line_of(trend, last);
    let ahead = line.as_ref().map_or(0, |&(_, ahead)| ahead);
    let behind = last.day.0 - first.day.0;
    let most = days.iter().map(|day| day.clients).max().unwrap_or(0).max(1) as f64;
    let until = behind + 1 + ahead;
    let mut out = String::new();
    {
        let area = SVGBackend::with_string(&mut out, CHART).into_drawing_area();
        let mut chart = framed(&area)
            .build_cartesian_2d(-0.5..until as f64 - 0.5, 0.0..most * 1.08)
            .map_err(refused)?;
        draw_axes(&mut chart, first.day, until, &|count| format!("{count:.0}"))?;
        // The last clients matter most: a day with any is seen.
        let least = most / 80.0;
        let bars = days.iter().map(|day| {
            let at = (day.day.0 - first.day.0) as f64;
            let height = match day.clients {
                0 => 0.0,
                some => (some as f64).max(least),
            };
            Rectangle::new([(at - 0.4, 0.0), (at + 0.4, height)], BAR.filled())
        });
        chart.draw_series(bars).map_err(refused)?;
        if let Some((at, ahead)) = line {
            // As far back as the trend looks.
            let back = behind.min(WINDOW);
            let points =
                (-back..=ahead).map(|day| ((behind + day) as f64, at(day).min(most * 1.08)));
            let dashes = DashedLineSeries::new(points, 6, 5, TREND.stroke_width(2));
            chart.draw_series(dashes).map_err(refused)?;
        }
        area.present().map_err(refused)?;
    }
    Ok(without_size(&out))
}

/// A line through the part of each day's new conversations that came directly.
fn directly(arrived: &BTreeMap<Day, Arrived>) -> Result<String, ReportError> {
    let shares = arrived.iter();
    let shares: Vec<(Day, u64)> = shares
        .filter_map(|(&day, it)| Some((day, it.percent()?)))
        .collect();
    let (Some(&(first, _)), Some(&(last, _))) = (shares.first(), shares.last()) else {
        return Ok(String::new());
    };
    let days = last.0 - first.0 + 1;
    let mut out = String::new();
    {
        let area = SVGBackend::with_string(&mut out, CHART).into_drawing_area();
        let mut chart = framed(&area)
            .build_cartesian_2d(-0.5..days as f64 - 0.5, 0.0..104.0)
            .map_err(refused)?;
        draw_axes(&mut chart, first, days, &|share| format!("{share:.0} %"))?;
        let points = shares.iter();
        let points: Vec<(f64, f64)> = points
            .map(|&(day, share)| ((day.0 - first.0) as f64, share as f64))
            .collect();
        let line = LineSeries::new(points.iter().copied(), BAR.stroke_width(2));
        chart.draw_series(line).map_err(refused)?;
        let dots = points.iter().map(|&at| Circle::new(at, 4, BAR.filled()));
        chart.draw_series(dots).map_err(refused)?;
        area.present().map_err(refused)?;
    }
    Ok(without_size(&out))
}

/// With room for the amounts on the left and the dates below.
fn framed<'a, 'b>(
    area: &'a DrawingArea<SVGBackend<'b>, Shift>,
) -> ChartBuilder<'a, 'b, SVGBackend<'b>> {
    let mut builder = ChartBuilder::on(area);
    builder
        .margin(8)
        .margin_right(LAST_DATE)
        .x_label_area_size(28)
        .y_label_area_size(64);
    builder
}

/// A chart of days.
type Chart<'a, 'b> = ChartContext<
    'a,
    SVGBackend<'b>,
    Cartesian2d<plotters::coord::types::RangedCoordf64, plotters::coord::types::RangedCoordf64>,
>;

fn draw_axes(
    chart: &mut Chart<'_, '_>,
    first: Day,
    days: i64,
    amount: &dyn Fn(&f64) -> String,
) -> Result<(), ReportError> {
    // As many dates as have room beside each other, each in the middle of its day.
    const DATES: i64 = 9;
    let date = |at: &f64| {
        let days = at.round() as i64;
        let is_day = (at - days as f64).abs() < 0.01 && days >= 0;
        if is_day {
            Day(first.0 + days).short()
        } else {
            String::new()
        }
    };
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(RULE)
        .axis_style(RULE)
        .x_labels(days.min(DATES) as usize)
        .y_labels(5)
        .x_label_formatter(&date)
        .y_label_formatter(&amount)
        .label_style(("sans-serif", 13))
        .draw()
        .map_err(refused)
}

/// The page decides how wide a picture is.
fn without_size(svg: &str) -> String {
    let (width, height) = CHART;
    let size = format!("<svg width=\"{width}\" height=\"{height}\"");
    svg.replacen(&size, "<svg role=\"img\"", 1)
}

fn refused(error: impl fmt::Display) -> ReportError {
    ReportError::Chart(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::model::asked::Asked;
    use crate::model::moved::TCP;
    use crate::stragglers::history::{Beside, Watched};
    use crate::stragglers::rhythm::Rhythm;
    use crate::stragglers::time::DAY;
    use crate::stragglers::verdict::Reason;

    const NOW: i64 = 1_795_856_400;

    fn straggler(name: &str) -> Straggler {
        Straggler {
            client: "203.0.113.9".parse().unwrap(),
            asked: Asked {
                addr: "192.0.2.5".parse().unwrap(),
                protocol: TCP,
                port: 443,
            },
            names: vec![name.into()],
            connections: 2_016,
            by_old: 0,
            by_new: 2_016,
            answered: 2_016,
            went_on: 2_016,
            bytes_in: 1,
            bytes_out: 2,
            first_seen: NOW - 7 * DAY,
            last_seen: NOW - 2 * 3_600,
            days: 7,
            rhythm: Some(Rhythm {
                every_s: 300,
                spread_s: 2,
            }),
        }
    }

    fn watched() -> Watched {
        Watched {
            from: NOW - 7 * DAY,
            to: NOW,
            seconds: 7 * DAY,
            since: Some(NOW - 7 * DAY),
            last: Some(NOW),
        }
    }

    fn verdict(days: i64) -> Verdict {
        let day = |at| DayCount {
            day: Day(Day::of(NOW).0 - days + at),
            clients: 4_000_u64 >> (at / 4),
        };
        Verdict {
            at: NOW,
            safe: false,
            reasons: vec![Reason::Clients {
                count: 3,
                last_seen: NOW - 2 * 3_600,
            }],
            watched: watched(),
            moves: Vec::new(),
            gone: Vec::new(),
            clients: 3,
            newcomers: 0,
            stragglers: Vec::new(),
            passers_by: Vec::new(),
            ignored: 0,
            unknown: 0,
            answered_once: 0,
            others: 0,
            trend: Trend::Declines {
                halves_in_days: 4.0,
                gone: Some(Day(Day::of(NOW).0 + 14)),
            },
            around: Some(Day(Day::of(NOW).0 + 21)),
            days: (0..days).map(day).collect(),
        }
    }

    fn findings(stragglers: Vec<Straggler>) -> Findings {
        Findings {
            at: NOW,
            since: NOW - 7 * DAY,
            watched: watched(),
            moves: Vec::new(),
            clients: 3,
            stragglers,
            more: 2,
            beside: Beside::default(),
            others: 12_345,
        }
    }

    fn page(days: i64, stragglers: Vec<Straggler>) -> String {
        let page = Page {
            moved: &["192.0.2.5:443/tcp".into()],
            verdict: &verdict(days),
            findings: &findings(stragglers),
            arrived: &arrived(days),
        };
        page.to_html().unwrap()
    }

    /// More and more come directly.
    fn arrived(days: i64) -> BTreeMap<Day, Arrived> {
        let day = |at: i64| {
            let arrived = Arrived {
                by_tunnel: 4_000 >> (at / 4),
                directly: 100 * at as u64,
            };
            (Day(Day::of(NOW).0 - days + at + 1), arrived)
        };
        (0..days).map(day).collect()
    }

    fn full_page() -> String {
        page(40, vec![straggler("<script>alert(1)</script>")])
    }

    #[test]
    fn a_page_says_what_it_is_told_and_takes_nothing_from_outside() {
        let html = full_page();
        for text in [
            "192.0.2.5:443",
            "Not yet",
            "3 clients came, the last one 2 h ago",
            "every 5 min",
            "2 more;",
            "12,345",
            "99 %",
            "id=\"directly\"",
            "clients halve in 4.0 days",
        ] {
            assert!(html.contains(text), "{text}: {html}");
        }
        assert!(!html.contains("<script"), "{html}");
        for outside in ["src=", "href=", "@import", "url("] {
            assert!(!html.contains(outside), "{outside}");
        }
        assert_eq!(html.matches("<svg").count(), 2);
    }

    #[test]
    fn there_is_a_page_on_the_first_day_and_with_nothing_at_all() {
        assert!(page(1, Vec::new()).contains("id=\"decline\""));
        let html = page(0, Vec::new());
        assert!(html.contains("No whole day has been watched"), "{html}");
        assert!(html.contains("None."), "{html}");
        assert!(!html.contains("id=\"directly\""), "{html}");
    }

    /// What a browser shows, as the script in [`looked_at`] says.
    #[derive(Debug, serde::Deserialize)]
    struct Seen {
        /// The page is this much wider than the window, in pixels.
        overflow: i32,
        /// The least contrast of a text with what is behind it (WCAG 2.2, 1.4.3).
        contrast: f64,
        /// Whether the background is dark.
        dark: bool,
        /// Heights of the bars, in pixels.
        bars: Vec<f64>,
        /// How far down the dots are of those who come directly, in pixels.
        dots: Vec<f64>,
        /// Widths of the charts, in pixels.
        charts: Vec<f64>,
        /// Height of the smallest text of a chart, in pixels.
        label: f64,
        /// Whether the table has turned into cards.
        cards: bool,
        /// All that can be read.
        text: String,
    }

    /// What Chromium shows of the page in a window so wide, or prints if there is none.
    fn looked_at(html: &str, window: Option<u32>, dark: bool) -> Seen {
        const SCRIPT: &str = concat!("<script>", include_str!("looked_at.js"), "</script>");
        use base64::Engine as _;
        let dir = std::env::temp_dir().join(format!("ipmoved-page-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let (file, paper) = (dir.join("page.html"), dir.join("page.pdf"));
        std::fs::write(&file, html.replace("</body>", &format!("{SCRIPT}</body>"))).unwrap();
        let mut browser = std::process::Command::new("chromium");
        browser.args(["--headless", "--no-sandbox", "--disable-gpu"]);
        if dark {
            browser.arg("--force-dark-mode");
        }
        match window {
            Some(width) => browser
                .arg("--dump-dom")
                .arg(format!("--window-size={width},900")),
            None => browser
                .arg("--enable-logging=stderr")
                .arg(format!("--print-to-pdf={}", paper.display())),
        };
        browser.arg(format!("--user-data-dir={}", dir.join("profile").display()));
        let done = browser.arg(format!("file://{}", file.display())).output();
        let done = done.expect("chromium");
        let said = match window {
            Some(_) => done.stdout,
            None => {
                let paper = std::fs::read(&paper).unwrap();
                let pages = paper
                    .windows(12)
                    .filter(|it| *it == b"/Type /Page\n")
                    .count();
                assert!((1..8).contains(&pages), "{pages} pages");
                done.stderr
            }
        };
        std::fs::remove_dir_all(&dir).unwrap();
        let said = String::from_utf8(said).unwrap();
        let (_, seen) = said.split_once("seen:").expect(&said);
        let (seen, _) = seen.split_once(['<', '"']).unwrap();
        let seen = base64::prelude::BASE64_STANDARD.decode(seen).unwrap();
        serde_json::from_slice(&seen).unwrap()
    }

    #[test]
    #[ignore = "needs chromium"]
    fn in_a_browser_all_of_it_is_seen_on_any_screen_and_on_paper() {
        let html = full_page();
        for (window, dark) in [
            (Some(1_200), false),
            (Some(1_200), true),
            (Some(500), false),
            (Some(500), true),
            (None, false),
            (None, true),
        ] {
            let seen = looked_at(&html, window, dark);
            // Paper is light, whatever the screen is.
            assert_eq!(seen.dark, dark && window.is_some(), "{seen:?}");
            // What is printed is laid out anew, for paper, which has no window.
            assert!(window.is_none() || seen.overflow <= 0, "{seen:?}");
            let paper = 8.5 * 96.0;
            assert!(window.is_some() || seen.charts.iter().all(|&it| it <= paper));
            assert!(seen.contrast >= 4.5, "{seen:?}");
            assert_eq!(seen.cards, window.is_some_and(|it| it < 640), "{seen:?}");
            assert!(seen.label >= 8.0, "{seen:?}");
            assert_eq!(seen.charts.len(), 2);
            assert!(seen.charts.iter().all(|&it| it > 300.0), "{seen:?}");
            // A bar for each day, none higher than the one before.
            assert_eq!(seen.bars.len(), 40, "{seen:?}");
            assert!(seen.bars[0] > 50.0 && seen.bars.is_sorted_by(|a, b| a >= b));
            assert!(seen.bars[39] > 1.0, "{seen:?}");
            // A dot for each day, none lower than the one before.
            assert_eq!(seen.dots.len(), 40, "{seen:?}");
            assert!(seen.dots.is_sorted_by(|a, b| a >= b), "{seen:?}");
            assert!(seen.dots[0] - seen.dots[39] > 50.0, "{seen:?}");
            for text in ["Not yet", "<script>alert(1)</script>", "203.0.113.9"] {
                assert!(seen.text.contains(text), "{text}: {seen:?}");
            }
        }
    }
}
