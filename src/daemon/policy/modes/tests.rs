//! What commands and time make of modes.

use proptest::prelude::*;

use super::*;
use crate::model::mode::Percent;

const MOVES: [&str; 3] = ["192.0.2.5:80/tcp", "192.0.2.5:53", "2001:db8::5"];
const ME: Who = Who {
    connection: 1,
    pid: 7,
};
const OTHER: Who = Who {
    connection: 2,
    pid: 8,
};

fn clock(seconds: u64) -> Clock {
    Clock {
        now: Duration::from_secs(1_000 + seconds),
        wall: SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000 + seconds),
    }
}

fn moves(names: &[&str]) -> Vec<(PeerId, Move)> {
    let moved = |name: &&str| (PeerId(0), name.parse().unwrap());
    names.iter().map(moved).collect()
}

const KEY: ShareKey = ShareKey([1, 2]);

fn begin(start: Settled) -> Modes {
    Modes::new(moves(&MOVES), start, None, KEY, "boot", clock(0))
}

fn what(places: &[usize]) -> Vec<String> {
    places.iter().map(|&place| MOVES[place].into()).collect()
}

fn of(modes: &Modes) -> Vec<Mode<Duration>> {
    modes.moves.iter().map(|it| it.mode).collect()
}

fn requests() -> impl Strategy<Value = Request> {
    let places = prop::collection::vec(0..MOVES.len(), 0..4).prop_map(|it| what(&it));
    (places, 0_u8..101, 0_u32..40, 0..7).prop_map(|(what, percent, seconds, kind)| match kind {
        0 => Request::Move {
            what,
            percent: Percent::new(percent),
        },
        1 => Request::Hold { what, seconds },
        2 => Request::Back { what },
        3 => Request::Cutover {
            what,
            asks: Vec::new(),
        },
        4 => Request::Shield { what, seconds },
        5 => Request::Stopping { what },
        _ => Request::Forget { what },
    })
}

proptest! {
    /// Whatever is ordered and whenever the daemon is killed, what it begins with next time is
    /// what it had, and nothing but a command or the end of a hold changes a mode.
    #[test]
    fn nothing_but_commands_and_time_changes_a_mode(
        steps in prop::collection::vec((requests(), any::<bool>(), 0_u64..20), 1..30),
    ) {
        let (mut modes, mut at) = (begin(Settled::Moved), 0);
        for (request, mine, later) in steps {
            let before = modes.clone();
            let who = if mine { ME } else { OTHER };
            let about = modes.places(request.what()).unwrap();
            let result = modes.order(clock(at), who, &request);
            for place in 0..MOVES.len() {
                let (was, is) = (before.moves[place].mode, modes.moves[place].mode);
                let changes = matches!(request, Request::Move { .. } | Request::Back { .. });
                if result.is_err() || !about.contains(&place) {
                    prop_assert_eq!(was, is);
                } else if !changes {
                    prop_assert_eq!(was.settled, is.settled, "a hold keeps what follows");
                } else {
                    let waits = matches!(&result, Ok(done) if done.restarts.is_some());
                    prop_assert!(is.held_until.is_none() || waits);
                }
            }
            let record = modes.record(clock(at));
            let text = serde_json::to_string(&record).unwrap();
            let record: Record = serde_json::from_str(&text).unwrap();
            let (record, key) = (Some(&record), ShareKey([3, 4]));
            let (now, start) = (clock(at), Settled::Here);
            let again = Modes::new(moves(&MOVES), start, record, key, "boot", now);
            prop_assert_eq!(again.key(), KEY);
            prop_assert_eq!(of(&again), of(&modes));
            at += later;
            let (held, next) = (of(&modes), modes.next());
            let ended = modes.end_holds(clock(at));
            for (place, was) in held.into_iter().enumerate() {
                let is = modes.moves[place].mode;
                let over = was.held_until.is_some_and(|until| until <= clock(at).now);
                prop_assert_eq!(ended.contains(&place), over);
                prop_assert_eq!(is.settled, was.settled);
                prop_assert_eq!(is.held_until, was.held_until.filter(|_| !over));
            }
            prop_assert_eq!(ended.is_empty(), next.is_none_or(|next| next > clock(at).now));
        }
    }

    /// A reboot ends no hold early, and none lasts longer than was asked, whatever the clock.
    #[test]
    fn a_hold_survives_a_reboot_but_not_a_wrong_clock(
        seconds in 1_u32..3_600, away in 0_u64..5_000, wall in any::<u32>(),
    ) {
        let mut modes = begin(Settled::Here);
        let what = Vec::new();
        modes.order(clock(0), ME, &Request::Hold { what, seconds }).unwrap();
        let record = modes.record(clock(0));
        let begin = |wall| {
            let clock = Clock { now: Duration::from_secs(9), wall };
            let modes = moves(&MOVES);
            let modes = Modes::new(modes, Settled::Moved, Some(&record), KEY, "new", clock);
            let left = modes.moves[0].mode.held_until.map(|until| until - clock.now);
            (modes.moves[0].mode.settled, left.map_or(0, |left| left.as_secs()))
        };
        let left = u64::from(seconds).saturating_sub(away);
        prop_assert_eq!(begin(clock(away).wall), (Settled::Here, left));
        let wrong = SystemTime::UNIX_EPOCH + Duration::from_secs(wall.into());
        prop_assert!(begin(wrong).1 <= seconds.into());
    }
}

fn cutover(places: &[usize]) -> Request {
    let (what, asks) = (what(places), Vec::new());
    Request::Cutover { what, asks }
}

#[test]
fn while_a_cutover_runs_nobody_else_changes_its_moves() {
    let mut modes = begin(Settled::Here);
    modes.order(clock(0), ME, &cutover(&[0])).unwrap();
    for places in [&[0_usize][..], &[1, 0], &[]] {
        for request in [
            Request::Move {
                what: what(places),
                percent: None,
            },
            Request::Hold {
                what: what(places),
                seconds: 5,
            },
            cutover(places),
        ] {
            let refused = modes.order(clock(1), OTHER, &request).unwrap_err();
            assert!(!refused.is_input());
            let text = refused.to_string();
            assert!(text.contains("192.0.2.5:80/tcp"), "{text}");
            assert!(
                text.contains("process 7") && text.contains("`ipmoved back`"),
                "{text}"
            );
        }
    }
    let others = Request::Hold {
        what: what(&[1, 2]),
        seconds: 5,
    };
    assert!(modes.order(clock(1), OTHER, &others).is_ok());
    let own = Request::Hold {
        what: what(&[0]),
        seconds: 5,
    };
    assert!(modes.order(clock(1), ME, &own).is_ok());
    modes.gone(ME.connection);
    assert!(modes.order(clock(2), OTHER, &cutover(&[0])).is_ok());
}

#[test]
fn a_way_back_ends_a_cutover_which_can_do_nothing_more_but_go_back() {
    let mut modes = begin(Settled::Here);
    modes.order(clock(0), ME, &cutover(&[0, 1])).unwrap();
    let hold = Request::Hold {
        what: what(&[0, 1]),
        seconds: 60,
    };
    modes.order(clock(0), ME, &hold).unwrap();
    // Of something else, it ends nothing.
    let back = |places: &[usize]| Request::Back { what: what(places) };
    let done = modes.order(clock(1), OTHER, &back(&[2])).unwrap();
    assert!(done.ended.is_empty());
    let done = modes.order(clock(1), OTHER, &back(&[0])).unwrap();
    assert_eq!(done.ended, [ME.pid]);
    assert_eq!([0, 1].map(|place| modes.cutover_of(place)), [None; 2]);
    let names = |modes: &Modes| [0, 1].map(|place| modes.moves[place].name());
    assert_eq!(names(&modes), ["here", "held"]);
    let go_on = Request::Move {
        what: what(&[0, 1]),
        percent: None,
    };
    for request in [go_on.clone(), hold, cutover(&[1])] {
        let refused = modes.order(clock(1), ME, &request).unwrap_err();
        assert_eq!(refused, Refusal::Overruled { pid: OTHER.pid });
    }
    assert!(modes.order(clock(2), ME, &back(&[0, 1])).is_ok());
    assert_eq!(names(&modes), ["here", "here"]);
    assert!(modes.order(clock(2), OTHER, &go_on).is_ok());
}

#[test]
fn who_ends_a_cutover_that_has_stopped_the_service_lets_clients_wait_for_it() {
    let mut modes = begin(Settled::Here);
    modes.order(clock(0), ME, &cutover(&[0, 1])).unwrap();
    let stopping = Request::Stopping {
        what: what(&[0, 1]),
    };
    modes.order(clock(0), ME, &stopping).unwrap();
    let back = Request::Back { what: what(&[0]) };
    let done = modes.order(clock(1), OTHER, &back).unwrap();
    assert_eq!((done.ended, done.restarts), (vec![ME.pid], Some(RESTART)));
    let held = Mode {
        settled: Settled::Here,
        held_until: Some(clock(1 + u64::from(RESTART)).now),
    };
    assert_eq!(modes.moves[0].mode, held);
    // It has started the service, or somebody does not want to wait.
    for who in [ME, OTHER] {
        let mut modes = modes.clone();
        assert_eq!(modes.order(clock(2), who, &back).unwrap().restarts, None);
        assert_eq!(modes.moves[0].mode, Mode::settled(Settled::Here));
    }
}

#[test]
fn clients_are_shielded_as_long_as_a_cutover_lasts_and_nobody_goes_back() {
    let shield = Request::Shield {
        what: what(&[0]),
        seconds: 70,
    };
    let go_on = Request::Move {
        what: what(&[0]),
        percent: None,
    };
    let until = |modes: &Modes| modes.moves[0].shielded_until();
    for back in [false, true] {
        let mut modes = begin(Settled::Here);
        modes.order(clock(0), ME, &shield).unwrap();
        modes.order(clock(1), ME, &go_on).unwrap();
        assert_eq!(until(&modes), Some(clock(70).now));
        assert_eq!(modes.moves[1].shielded_until(), None);
        assert!(!modes.gone(OTHER.connection));
        if back {
            let back = Request::Back { what: Vec::new() };
            modes.order(clock(2), OTHER, &back).unwrap();
        } else {
            assert!(modes.gone(ME.connection));
        }
        assert_eq!(until(&modes), None);
    }
}

/// It is not quadratic: with 16,384 moves that would be far more than a test may take.
#[test]
fn very_many_moves_whose_ports_have_changed_keep_their_modes() {
    let moves = |last: u16| -> Vec<(PeerId, Move)> {
        let moved = |number: u16| {
            let [high, low] = number.to_be_bytes();
            let text = format!("198.51.{high}.{low}:80,{last}/tcp");
            (PeerId(0), text.parse().unwrap())
        };
        (0..16_384).map(moved).collect()
    };
    let begin = |moves, record: Option<&Record>| {
        Modes::new(moves, Settled::Moved, record, KEY, "boot", clock(0))
    };
    let mut modes = begin(moves(443), None);
    for (number, one) in modes.moves.iter_mut().enumerate() {
        let percent = Percent::new((number % 100) as u8);
        one.mode = Mode::settled(percent.map_or(Settled::Here, Settled::Shared));
    }
    let again = begin(moves(8_443), Some(&modes.record(clock(0))));
    assert_eq!(of(&again), of(&modes));
}

#[test]
fn what_is_no_move_is_refused_with_what_is() {
    let mut modes = begin(Settled::Moved);
    for wrong in ["192.0.2.5", "192.0.2.5:80", "203.0.113.1", "www", ""] {
        let what = vec![MOVES[0].into(), wrong.into()];
        let refused = modes
            .order(clock(0), ME, &Request::Back { what })
            .unwrap_err();
        assert!(refused.is_input());
        let text = refused.to_string();
        assert!(
            text.starts_with(&format!("`{wrong}` is not moved here")),
            "{text}"
        );
        assert!(
            text.contains("192.0.2.5:80/tcp, 192.0.2.5:53, 2001:db8::5"),
            "{text}"
        );
    }
    assert_eq!(of(&modes), of(&begin(Settled::Moved)));
    // Another way to write one is no other.
    let what = vec!["[2001:DB8:0::5]".into()];
    assert!(modes.order(clock(0), ME, &Request::Back { what }).is_ok());
    for seconds in [0, MAX_HOLD + 1] {
        let hold = Request::Hold {
            what: Vec::new(),
            seconds,
        };
        assert_eq!(modes.order(clock(0), ME, &hold), Err(Refusal::Seconds));
    }
}

#[test]
fn a_move_that_changed_its_name_keeps_its_mode() {
    let mut modes = begin(Settled::Here);
    let percent = Percent::new(30);
    let share = Request::Move {
        what: what(&[1]),
        percent,
    };
    modes.order(clock(0), ME, &share).unwrap();
    let record = modes.record(clock(0));
    let names = [
        "192.0.2.5:80,443/tcp",
        "192.0.2.5:53/udp",
        "192.0.2.5:22",
        "192.0.2.6",
    ];
    let again = |names: &[&str], record: Record| {
        Modes::new(
            moves(names),
            Settled::Moved,
            Some(&record),
            KEY,
            "boot",
            clock(9),
        )
    };
    let modes = again(&names, record);
    let settled: Vec<Settled> = of(&modes).iter().map(|it| it.settled).collect();
    let shared = Settled::Shared(percent.unwrap());
    assert_eq!(
        settled,
        [Settled::Here, shared, Settled::Moved, Settled::Moved]
    );
    assert_eq!(modes.moves[0].since, clock(9).unix().as_secs());
    // What is taken out of the settings for a while has its mode when it is back.
    let without = again(&names[1..], modes.record(clock(9)));
    let back = again(&names, without.record(clock(9)));
    assert_eq!(of(&back), of(&modes));
    // Of two that become one, the old server keeps what it has.
    let one = again(&["192.0.2.5"], modes.record(clock(9)));
    assert_eq!(one.moves[0].mode.settled, Settled::Here);
}

#[test]
fn the_file_is_text_that_people_can_read() {
    let mut modes = begin(Settled::Here);
    let hold = Request::Hold {
        what: what(&[0]),
        seconds: 60,
    };
    modes.order(clock(0), ME, &hold).unwrap();
    let share = Request::Move {
        what: what(&[1]),
        percent: Percent::new(5),
    };
    modes.order(clock(0), ME, &share).unwrap();
    let json = serde_json::to_value(modes.record(clock(0))).unwrap();
    let expected = serde_json::json!({
        "share_key": [1, 2],
        "boot": "boot",
        "moves": [
            {
                "move": "192.0.2.5:80/tcp", "mode": "here", "since": 1_700_000_000,
                "held": {
                    "until_ms": 1_060_000, "until_unix_ms": 1_700_000_060_000_u64,
                    "seconds": 60
                }
            },
            { "move": "192.0.2.5:53", "mode": { "shared": 5 }, "since": 1_700_000_000 },
            { "move": "2001:db8::5", "mode": "here", "since": 1_700_000_000 },
        ]
    });
    assert_eq!(json, expected);
}

#[test]
fn other_moves_leave_the_modes_of_the_rest_and_a_cut_over_of_them() {
    let mut modes = begin(Settled::Moved);
    let order = |modes: &mut Modes, who, request: Request| modes.order(clock(1), who, &request);
    order(&mut modes, ME, Request::Back { what: what(&[1]) }).unwrap();
    order(
        &mut modes,
        ME,
        Request::Hold {
            what: what(&[2]),
            seconds: 60,
        },
    )
    .unwrap();
    order(
        &mut modes,
        ME,
        Request::Cutover {
            what: what(&[0, 2]),
            asks: Vec::new(),
        },
    )
    .unwrap();
    let next = ["2001:db8::5", "192.0.2.9", "192.0.2.5:53"];
    modes.set_moves(moves(&next), Settled::Here, clock(11));
    let held = Mode {
        settled: Settled::Moved,
        held_until: Some(clock(61).now),
    };
    let here = Mode::settled(Settled::Here);
    assert_eq!(of(&modes), [held, here, here]);
    assert_eq!(modes.next(), Some(clock(61).now));
    let all = |names: &[&str]| Request::Move {
        what: names.iter().map(|&name| name.into()).collect(),
        percent: None,
    };
    assert!(
        order(&mut modes, OTHER, all(&next[..1])).is_err(),
        "its cut-over goes on"
    );
    order(&mut modes, OTHER, all(&next[1..])).unwrap();
    // It comes back as it was.
    modes.set_moves(moves(&MOVES), Settled::Here, clock(12));
    assert_eq!(modes.moves[0].mode, Mode::settled(Settled::Moved));
}
