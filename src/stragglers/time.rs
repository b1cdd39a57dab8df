//! Days, and times for people. All of them are those of UTC, so that neither a time zone nor
//! summer time makes a day longer than another.

use std::fmt;

use jiff::Timestamp;
use jiff::civil::Date;

/// Seconds of a day.
pub(super) const DAY: i64 = 86_400;

/// A day of UTC, counted from 1 January 1970.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Day(pub i64);

impl Day {
    /// The day of a time.
    pub fn of(at: i64) -> Self {
        Self(at.div_euclid(DAY))
    }

    /// When it begins.
    pub fn start(self) -> i64 {
        self.0.saturating_mul(DAY)
    }

    /// `Nov 28`.
    pub(super) fn short(self) -> String {
        timestamp(self.start()).strftime("%b %-d").to_string()
    }

    /// Reads `2026-11-28`.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let date: Date = text.parse().ok()?;
        let since = date.duration_since(Date::constant(1970, 1, 1));
        Some(Self::of(since.as_secs()))
    }
}

impl fmt::Display for Day {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", timestamp(self.start()).strftime("%Y-%m-%d"))
    }
}

impl serde::Serialize for Day {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A time, to the minute.
pub(super) fn minute(at: i64) -> String {
    timestamp(at).strftime("%Y-%m-%d %H:%M").to_string()
}

/// The nearest time that a calendar has.
fn timestamp(at: i64) -> Timestamp {
    let last = Timestamp::MIN.as_second()..=Timestamp::MAX.as_second();
    Timestamp::from_second(at.clamp(*last.start(), *last.end())).unwrap_or_default()
}

/// How long something takes, roughly: `40 s`, `5 min`, `3 h`, `12 days`.
pub(super) fn span(seconds: i64) -> String {
    const MINUTE: i64 = 60;
    const HOUR: i64 = 3_600;
    let round = |unit: i64| (seconds + unit / 2) / unit;
    match seconds {
        ..90 => format!("{} s", seconds.max(0)),
        90..5_400 => format!("{} min", round(MINUTE)),
        5_400..129_600 => format!("{} h", round(HOUR)),
        _ => format!("{} days", round(DAY)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_those_of_utc() {
        let at = 1_795_839_600;
        assert_eq!(Day::of(at).to_string(), "2026-11-28");
        assert_eq!(Day::of(Day::of(at).start()), Day::of(at));
        assert_eq!(Day::of(Day::of(at).start() - 1).to_string(), "2026-11-27");
        assert_eq!(Day::parse("2026-11-28"), Some(Day::of(at)));
        assert_eq!(Day::parse("yesterday"), None);
        assert_eq!(Day::of(0).to_string(), "1970-01-01");
        // Whatever a clock says, days sort as their names do.
        let days = [i64::MIN, -1, 0, at, i64::MAX].map(|at| Day::of(at).to_string());
        assert!(days.is_sorted(), "{days:?}");
    }

    #[test]
    fn spans_are_rounded() {
        let texts = [7, 89, 90, 298, 3_600, 5_400, 86_400, 604_800].map(span);
        let wanted = [
            "7 s", "89 s", "2 min", "5 min", "60 min", "2 h", "24 h", "7 days",
        ];
        assert_eq!(texts, wanted);
    }
}
