//! Where the number of clients a day leads to.
//!
//! Clients that follow a stale name or an old setting are put right one by one, so their number
//! falls by a share of what is left: a line through its logarithm, by least squares. A trend is
//! only told where it is not likely to be chance.

use serde::Serialize;

use super::time::Day;

/// Days that are looked at: the last four weeks, so that weekends weigh the same.
pub(super) const WINDOW: i64 = 28;

/// Days from which on there is a trend at all.
pub const LEAST: usize = 5;

/// When so few clients come a day, the last one is gone.
pub(super) const GONE: f64 = 0.5;

/// A date further away than this is none.
const HORIZON: i64 = 365;

/// What the days say.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
#[serde(tag = "trend", rename_all = "snake_case")]
pub enum Trend {
    /// There are not enough whole days yet.
    TooFewDays {
        /// So many there are.
        days: usize,
        /// So many are needed.
        needed: usize,
    },
    /// The number does not fall, as far as can be told.
    NoDecline,
    /// It falls.
    Declines {
        /// Days in which it halves.
        halves_in_days: f64,
        /// When the last client is gone; `None` if that is more than a year away.
        gone: Option<Day>,
    },
}

/// The trend of these numbers of clients, by day, in order.
pub(super) fn of(days: &[(Day, u64)]) -> Trend {
    let too_few = Trend::TooFewDays {
        days: days.len(),
        needed: LEAST,
    };
    let Some(&(first, _)) = days.first().filter(|_| days.len() >= LEAST) else {
        return too_few;
    };
    let count = days.len() as f64;
    let points = days.iter().map(|&(day, clients)| {
        let x = (day.0 - first.0) as f64;
        (x, (clients as f64).max(GONE).ln())
    });
    let (sum_x, sum_y) = points
        .clone()
        .fold((0.0, 0.0), |(a, b), (x, y)| (a + x, b + y));
    let (mean_x, mean_y) = (sum_x / count, sum_y / count);
    let (mut xx, mut xy) = (0.0, 0.0);
    for (x, y) in points.clone() {
        xx += (x - mean_x) * (x - mean_x);
        xy += (x - mean_x) * (y - mean_y);
    }
    if xx <= 0.0 {
        return too_few;
    }
    let slope = xy / xx;
    let at_zero = mean_y - slope * mean_x;
    let off: f64 = points.map(|(x, y)| (y - at_zero - slope * x).powi(2)).sum();
    let freedom = count - 2.0;
    let error = (off / freedom / xx).sqrt();
    if slope + one_in_twenty(freedom) * error >= 0.0 {
        return Trend::NoDecline;
    }
    let gone = (GONE.ln() - at_zero) / slope;
    let last = days.last().map_or(first, |&(day, _)| day);
    let near = gone < (last.0 - first.0 + HORIZON) as f64;
    Trend::Declines {
        halves_in_days: (GONE.ln() / slope * 10.0).round() / 10.0,
        // What rounding adds is no day.
        gone: near.then(|| Day((first.0 + (gone - 1e-6).ceil() as i64).max(last.0 + 1))),
    }
}

/// Student's t that chance exceeds once in twenty times, one-sided: within 0.04 of the tables'.
fn one_in_twenty(freedom: f64) -> f64 {
    1.645 + 1.52 / freedom + 1.4 / (freedom * freedom)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn days(numbers: impl IntoIterator<Item = u64>) -> Vec<(Day, u64)> {
        numbers
            .into_iter()
            .zip(20_000..)
            .map(|(n, day)| (Day(day), n))
            .collect()
    }

    #[test]
    fn a_few_days_say_nothing() {
        let few = Trend::TooFewDays { days: 4, needed: 5 };
        assert_eq!(of(&days([80, 40, 20, 10])), few);
        let none = Trend::TooFewDays { days: 0, needed: 5 };
        assert_eq!(of(&[]), none);
        // One day, many times over, is one day.
        let same = vec![(Day(20_000), 7); 6];
        assert!(matches!(of(&same), Trend::TooFewDays { .. }));
    }

    #[test]
    fn halving_is_found_and_its_end() {
        let Trend::Declines {
            halves_in_days,
            gone,
        } = of(&days([64, 32, 16, 8, 4]))
        else {
            panic!("no decline");
        };
        // 64 is gone after seven halvings.
        assert_eq!((halves_in_days, gone), (1.0, Some(Day(20_007))));
    }

    #[test]
    fn what_does_not_fall_has_no_end() {
        for same in [
            [7, 7, 7, 7, 7, 7],
            [1, 2, 4, 8, 16, 32],
            [9, 2, 11, 3, 8, 9],
            [0; 6],
        ] {
            assert_eq!(of(&days(same)), Trend::NoDecline, "{same:?}");
        }
        let slow = (0..28).map(|day| 100_000 - day * 20);
        let slow = of(&days(slow));
        assert!(
            matches!(slow, Trend::Declines { gone: None, .. }),
            "{slow:?}"
        );
    }

    proptest! {
        #[test]
        fn a_steady_decline_leads_to_its_end(
            start in 50_f64..50_000.0, half in 1_f64..10.0,
            noise in proptest::collection::vec(0.9_f64..1.1, 12..28),
        ) {
            let numbers: Vec<u64> = noise.iter().zip(0..)
                .map(|(noise, day): (&f64, i32)| {
                    (start * 0.5_f64.powf(f64::from(day) / half) * noise).round() as u64
                })
                .collect();
            let found = of(&days(numbers.clone()));
            // As many as are gone already say little of the slope.
            if numbers.iter().all(|&n| n >= 5) {
                let Trend::Declines { halves_in_days, .. } = found else {
                    return Err(TestCaseError::fail(format!("{found:?} {numbers:?}")));
                };
                let off = (halves_in_days - half).abs();
                prop_assert!(off < half * 0.4 + 0.2, "{halves_in_days} {half}");
            }
        }

        #[test]
        fn no_numbers_lead_to_the_past(numbers in proptest::collection::vec(any::<u64>(), 0..40)) {
            let all = days(numbers);
            if let Trend::Declines { gone: Some(gone), halves_in_days } = of(&all) {
                prop_assert!(all.last().is_some_and(|&(last, _)| gone > last));
                prop_assert!(halves_in_days >= 0.0);
            }
        }
    }
}
