//! Whether somebody comes regularly, as a monitor or a job does, and how often.

use serde::Serialize;

/// Arrivals that are kept of each client: enough to tell a rhythm, and a few bytes each.
pub(super) const KEPT: usize = 24;

/// Intervals from which on there is a rhythm at all.
const LEAST: usize = 5;

/// Arrivals so close to each other may be one, in seconds: some check several things at a time.
const TOGETHER: [i64; 3] = [0, 5, 60];

/// How regularly somebody comes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct Rhythm {
    /// The median of the intervals between its last arrivals, in seconds.
    pub every_s: i64,
    /// How far the intervals are from it: the median of the differences, in seconds.
    pub spread_s: i64,
}

/// The rhythm of these arrivals, if there is one: the intervals differ from their median by a tenth
/// of it, half of them by less, and three of four by a fifth at most.
pub(super) fn of(arrivals: &[i64]) -> Option<Rhythm> {
    let mut arrivals = arrivals.to_vec();
    arrivals.sort_unstable();
    TOGETHER.into_iter().find_map(|apart| {
        let mut arrivals = arrivals.clone();
        // The first of those that are together stands for all.
        let mut before = None;
        arrivals.retain(|&at| {
            let close = before
                .replace(at)
                .is_some_and(|before| at - before <= apart);
            !close
        });
        steady(&arrivals)
    })
}

fn steady(arrivals: &[i64]) -> Option<Rhythm> {
    let intervals: Vec<i64> = arrivals.windows(2).map(|pair| pair[1] - pair[0]).collect();
    if intervals.len() < LEAST {
        return None;
    }
    let every = median(intervals.clone());
    let off: Vec<i64> = intervals.iter().map(|it| (it - every).abs()).collect();
    let near = off.iter().filter(|&&off| off <= (every / 5).max(1)).count();
    let spread = median(off);
    let regular = every >= 2 && spread <= (every / 10).max(1) && near * 4 >= intervals.len() * 3;
    regular.then_some(Rhythm {
        every_s: every,
        spread_s: spread,
    })
}

fn median(mut values: Vec<i64>) -> i64 {
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn few_arrivals_have_no_rhythm() {
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[0, 300, 600, 900, 1_200]), None);
        assert_eq!(
            of(&[0, 300, 600, 900, 1_200, 1_500]),
            Some(Rhythm {
                every_s: 300,
                spread_s: 0
            })
        );
    }

    #[test]
    fn several_checks_at_a_time_are_one_and_a_beat_may_be_missing() {
        let twice: Vec<i64> = (0..12).flat_map(|n| [n * 60, n * 60 + 1]).collect();
        assert_eq!(of(&twice).map(|it| it.every_s), Some(60));
        let missing: Vec<i64> = (0..20).filter(|n| n % 7 != 3).map(|n| n * 300).collect();
        assert_eq!(of(&missing).map(|it| it.every_s), Some(300));
    }

    proptest! {
        #[test]
        fn a_jittery_clock_is_regular(
            every in 30_i64..90_000, jitter in proptest::collection::vec(-5_i64..=5, 8..KEPT),
            start in 0_i64..2_000_000_000,
        ) {
            let arrivals: Vec<i64> = jitter.iter().zip(0..)
                .map(|(off, n): (&i64, i64)| start + n * every + off * every / 200)
                .collect();
            let rhythm = of(&arrivals);
            prop_assert!(rhythm.is_some(), "{arrivals:?}");
            let found = rhythm.map_or(0, |it| it.every_s);
            prop_assert!((found - every).abs() <= every / 10 + 1, "{found} of {every}");
        }

        #[test]
        fn whoever_comes_by_chance_is_not(seed in any::<[u64; 23]>()) {
            // Intervals between independent arrivals are exponential.
            let mut at = 0;
            let mut arrivals = vec![0];
            for word in seed {
                let chance = ((word >> 11) as f64 + 1.0) / (1_u64 << 53) as f64;
                at += (-chance.ln() * 100_000.0) as i64 + 61;
                arrivals.push(at);
            }
            let off = arrivals.windows(2).filter(|pair| {
                let every = 69_000;
                ((pair[1] - pair[0]) - every).abs() > every / 2
            });
            // Chance may be regular; then not by far.
            if off.count() >= 8 {
                prop_assert_eq!(of(&arrivals), None);
            }
        }

        #[test]
        fn any_arrivals_do(mut arrivals in proptest::collection::vec(any::<i32>(), 0..60)) {
            let wide: Vec<i64> = arrivals.iter().map(|&at| at.into()).collect();
            arrivals.reverse();
            let back: Vec<i64> = arrivals.iter().map(|&at| at.into()).collect();
            prop_assert_eq!(of(&wide), of(&back));
        }
    }
}
