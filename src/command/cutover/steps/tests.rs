//! What a cut-over does, step by step, and whatever happens at each.

use proptest::prelude::*;

use super::*;

const PLAN: Plan = Plan {
    drain: Duration::from_secs(30),
    within: Duration::from_secs(60),
    stop: true,
    restart: false,
};

fn at(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn held() -> View {
    View {
        held: true,
        listens: of_one(Listens::Unknown),
        ..View::default()
    }
}

fn moved() -> View {
    View {
        moved: true,
        ..View::default()
    }
}

fn of_one(listens: Listens) -> BTreeMap<String, Listens> {
    [("192.0.2.5:80/tcp".into(), listens)].into()
}

/// The actions but for words.
fn actions(steps: &mut Steps) -> Vec<Action> {
    std::iter::from_fn(|| steps.poll_action())
        .filter(|it| !matches!(it, Action::Say(..)))
        .collect()
}

fn answered(asked: u64, answered: u64, refused: u64) -> View {
    let may_be_silent = false;
    let watched = Watched {
        asked,
        answered,
        refused,
        may_be_silent,
    };
    View {
        watched: [("192.0.2.5:80/tcp".into(), watched)].into(),
        ..moved()
    }
}

/// As far as the step of that name, after so many milliseconds.
fn until(wanted: Step, plan: Plan) -> Steps {
    let mut steps = Steps::new(plan);
    let listens = View {
        listens: of_one(Listens::Yes),
        ..held()
    };
    let inputs = [
        Input::Seen(View::default()),
        Input::Done,
        Input::Seen(View {
            here_tcp: 0,
            ..held()
        }),
        Input::Ended(Ok(())),
        Input::Seen(listens),
        Input::Done,
    ];
    let mut inputs = inputs.into_iter();
    while steps.step() != wanted {
        steps.handle(at(0), inputs.next().expect("no such step"));
    }
    actions(&mut steps);
    steps
}

#[test]
fn all_goes_well() {
    let mut steps = Steps::new(PLAN);
    steps.handle(at(0), Input::Seen(View::default()));
    assert_eq!(actions(&mut steps), [Action::Hold(105)]);
    steps.handle(at(10), Input::Done);
    let busy = View {
        here_tcp: 3,
        here_live: 3,
        waiting: 1,
        ..held()
    };
    steps.handle(at(20), Input::Seen(busy.clone()));
    steps.handle_timeout(at(29_000));
    assert_eq!(actions(&mut steps), []);
    steps.handle_timeout(at(30_010));
    assert_eq!(actions(&mut steps), [Action::Stop]);
    steps.handle(at(30_500), Input::Ended(Ok(())));
    let closed = View {
        listens: of_one(Listens::No),
        ..busy
    };
    steps.handle(at(31_000), Input::Seen(closed.clone()));
    // It said so before.
    steps.handle(
        at(32_000),
        Input::Seen(View {
            listens: of_one(Listens::Unknown),
            ..closed.clone()
        }),
    );
    steps.handle_timeout(at(90_000));
    assert_eq!(actions(&mut steps), []);
    steps.handle(
        at(90_001),
        Input::Seen(View {
            listens: of_one(Listens::Yes),
            ..closed
        }),
    );
    assert_eq!(actions(&mut steps), [Action::Move]);
    steps.handle(at(90_002), Input::Done);
    steps.handle(at(90_100), Input::Seen(answered(1, 1, 0)));
    assert_eq!(actions(&mut steps), []);
    steps.handle(at(92_000), Input::Seen(answered(1, 1, 0)));
    assert_eq!(actions(&mut steps), [Action::End(Ok(()))]);
}

#[test]
fn what_is_wrong_before_is_refused_and_nothing_is_changed() {
    for view in [
        View {
            trouble: Some("down".into()),
            ..View::default()
        },
        View {
            unanswered: Some("silent".into()),
            ..View::default()
        },
    ] {
        let mut steps = Steps::new(PLAN);
        steps.handle(at(0), Input::Seen(view));
        assert!(matches!(&actions(&mut steps)[..], [Action::End(Err(_))]));
    }
    let mut steps = until(Step::Hold, PLAN);
    steps.handle(at(1), Input::Refused("no".into()));
    assert_eq!(actions(&mut steps), [Action::End(Err("no".into()))]);
}

#[test]
fn each_failure_goes_back_with_its_reason() {
    let not_held = View {
        held: false,
        ..held()
    };
    let no_tunnel = View {
        trouble: Some("the tunnel is down".into()),
        ..held()
    };
    let waiting = Steps::new(PLAN).plan.within.as_millis() as u64;
    for (step, input, time, why) in [
        (
            Step::Drain,
            Some(Input::Seen(not_held.clone())),
            0,
            "no longer wait",
        ),
        (
            Step::Drain,
            Some(Input::Seen(no_tunnel.clone())),
            0,
            "the tunnel is down",
        ),
        (Step::Drain, Some(Input::Interrupted), 0, "interrupted"),
        (Step::Drain, Some(Input::Lost("eof".into())), 0, "eof"),
        (
            Step::Stop,
            Some(Input::Ended(Err("exit status: 3".into()))),
            0,
            "exit status: 3",
        ),
        (Step::Stop, None, waiting, "within 60 s"),
        (Step::Stop, Some(Input::Interrupted), 0, "interrupted"),
        (Step::Listen, None, waiting, "after 60 s"),
        (
            Step::Listen,
            Some(Input::Seen(not_held)),
            0,
            "no longer wait",
        ),
        (
            Step::Stop,
            Some(Input::Seen(no_tunnel.clone())),
            0,
            "the tunnel is down",
        ),
        (Step::Stop, Some(Input::Lost("eof".into())), 0, "eof"),
        (
            Step::Listen,
            Some(Input::Seen(no_tunnel.clone())),
            0,
            "the tunnel is down",
        ),
        (Step::Listen, Some(Input::Lost("eof".into())), 0, "eof"),
        (Step::Listen, Some(Input::Interrupted), 0, "interrupted"),
        (Step::Deliver, Some(Input::Lost("eof".into())), 0, "eof"),
        (Step::Watch, Some(Input::Lost("eof".into())), 0, "eof"),
        (
            Step::Deliver,
            Some(Input::Refused("disk".into())),
            0,
            "disk",
        ),
        (
            Step::Watch,
            Some(Input::Seen(answered(2, 0, 1))),
            3_000,
            "refuses 192.0.2.5:80/tcp",
        ),
        (
            Step::Watch,
            Some(Input::Seen(no_tunnel)),
            0,
            "the tunnel is down",
        ),
        (Step::Watch, Some(Input::Interrupted), 0, "interrupted"),
        (
            Step::Watch,
            Some(Input::Seen(View::default())),
            0,
            "another command",
        ),
    ] {
        for restart in [false, true] {
            let mut steps = until(step, Plan { restart, ..PLAN });
            match input.clone() {
                Some(input) => steps.handle(at(time), input),
                None => steps.handle_timeout(at(time)),
            }
            let mut did = actions(&mut steps);
            let kills = step == Step::Stop && !matches!(input, Some(Input::Ended(_)));
            assert_eq!(did.contains(&Action::Kill), kills || step == Step::Stop);
            did.retain(|it| *it != Action::Kill);
            let stopped = step != Step::Drain;
            if restart && stopped {
                assert_eq!(did, [Action::Hold(45)], "{step:?}");
                steps.handle(at(time), Input::Done);
                assert_eq!(actions(&mut steps), [Action::Restart]);
                steps.handle(at(time), Input::Ended(Err("no".into())));
                did = actions(&mut steps);
            }
            assert_eq!(did, [Action::Back], "{step:?}");
            steps.handle(at(time), Input::Interrupted);
            steps.handle(at(time), Input::Done);
            let did = actions(&mut steps);
            let [Action::End(Err(said))] = &did[..] else {
                panic!("{step:?}: {did:?}");
            };
            assert!(said.contains(why), "{said}");
            assert_eq!(
                said.contains("start the service"),
                stopped && !restart,
                "{said}"
            );
        }
    }
}

#[test]
fn a_port_that_is_not_answered_goes_back_when_the_watch_is_over() {
    let mut steps = until(Step::Watch, PLAN);
    steps.handle(at(9_000), Input::Seen(answered(3, 0, 0)));
    assert_eq!(actions(&mut steps), []);
    steps.handle_timeout(at(10_000));
    assert_eq!(actions(&mut steps), [Action::Back]);
    let mut steps = until(Step::Watch, PLAN);
    let mut quiet = answered(3, 0, 0);
    quiet
        .watched
        .values_mut()
        .for_each(|it| it.may_be_silent = true);
    steps.handle(at(3_000), Input::Seen(quiet));
    assert_eq!(actions(&mut steps), [Action::End(Ok(()))]);
    let mut steps = until(Step::Watch, PLAN);
    steps.handle(at(2_900), Input::Seen(moved()));
    assert_eq!(actions(&mut steps), []);
    steps.handle(at(3_000), Input::Seen(moved()));
    assert_eq!(actions(&mut steps), [Action::End(Ok(()))]);
}

#[test]
fn a_new_server_that_cannot_tell_is_given_its_time() {
    let mut steps = until(Step::Listen, PLAN);
    steps.handle(at(2_900), Input::Seen(held()));
    assert_eq!(actions(&mut steps), []);
    steps.handle(at(3_000), Input::Seen(held()));
    assert_eq!(actions(&mut steps), [Action::Move]);
}

/// As far as the watch, though nobody could tell whether something listens.
fn unsure(lacks: &[&str]) -> Steps {
    let mut steps = until(Step::Listen, PLAN);
    let lacks = lacks.iter().map(|it| it.to_string()).collect();
    let listens = View {
        lacks: [("192.0.2.5:80/tcp".into(), lacks)].into(),
        ..held()
    };
    steps.handle(at(100), Input::Seen(listens));
    assert_eq!(actions(&mut steps), [Action::Move]);
    steps.handle(at(200), Input::Done);
    steps
}

#[test]
fn where_a_container_may_answer_a_refusal_is_waited_out() {
    let mut steps = unsure(&["192.0.2.5:80/tcp"]);
    for second in 1..59 {
        steps.handle(at(second * 1_000), Input::Seen(answered(3, 0, 3)));
        steps.handle_timeout(at(second * 1_000));
        assert_eq!(actions(&mut steps), []);
    }
    let mut late = unsure(&["192.0.2.5:80/tcp"]);
    late.handle(at(59_000), Input::Seen(answered(4, 1, 3)));
    assert_eq!(actions(&mut late), [Action::End(Ok(()))]);
    steps.handle_timeout(at(60_000));
    assert_eq!(actions(&mut steps), [Action::Back]);
}

#[test]
fn a_second_interruption_does_not_wait_for_the_restart() {
    let mut steps = until(
        Step::Drain,
        Plan {
            restart: true,
            ..PLAN
        },
    );
    steps.handle_timeout(at(30_000));
    steps.handle(at(30_001), Input::Interrupted);
    steps.handle(at(30_002), Input::Done);
    assert_eq!(
        actions(&mut steps),
        [
            Action::Stop,
            Action::Kill,
            Action::Hold(45),
            Action::Restart
        ]
    );
    steps.handle(at(30_003), Input::Interrupted);
    assert_eq!(actions(&mut steps), [Action::Kill, Action::Back]);
}

fn views() -> impl Strategy<Value = View> {
    let listens = prop::sample::select(vec![Listens::Yes, Listens::No, Listens::Unknown]);
    let counts = (0_u64..3, 0_u64..3, 0_u64..2, any::<bool>());
    let mostly = |of: f64| prop::bool::weighted(of);
    (
        listens,
        0_u64..3,
        0_u64..2,
        counts,
        mostly(0.05),
        mostly(0.95),
    )
        .prop_map(
            |(listens, here_tcp, waiting, (asked, answered, refused, may_be_silent), bad, held)| {
                let watched = Watched {
                    asked,
                    answered,
                    refused,
                    may_be_silent,
                };
                View {
                    trouble: bad.then(|| "down".into()),
                    unanswered: None,
                    held,
                    moved: held,
                    lacks: BTreeMap::new(),
                    here_tcp,
                    here_live: here_tcp,
                    waiting,
                    listens: of_one(listens),
                    watched: [("it".into(), watched)].into(),
                    asked,
                }
            },
        )
}

#[derive(Clone, Debug)]
enum Event {
    Sees(View),
    Interrupts,
    Loses,
}

proptest! {
    /// Whatever happens and however the daemon and the commands behave: it ends in time; it is
    /// moved only if that was ordered last; and otherwise it went back, or never began.
    #[test]
    fn it_ends_either_moved_or_back(
        (stop, restart) in any::<(bool, bool)>(), drain in 0_u64..40, within in 1_u64..70,
        events in prop::collection::vec(
            prop_oneof![
                20 => views().prop_map(Event::Sees),
                1 => Just(Event::Interrupts),
                1 => Just(Event::Loses),
            ],
            1..60,
        ),
        well in prop::collection::vec(prop::bool::weighted(0.9), 12),
        dead in any::<bool>(),
    ) {
        let (drain, within) = (Duration::from_secs(drain), Duration::from_secs(within));
        let plan = Plan { drain, within, stop, restart: restart && stop };
        let mut steps = Steps::new(plan);
        let (mut now, mut orders) = (at(0), Vec::new());
        let (mut running, mut stop_ended) = (false, false);
        let (mut well, mut events) = (well.into_iter().cycle(), events.into_iter());
        let mut last = View::default();
        let result = 'all: loop {
            while let Some(action) = steps.poll_action() {
                let works = well.next().unwrap();
                match action {
                    Action::Hold(_) | Action::Move | Action::Back => {
                        if action == Action::Move {
                            prop_assert!(!stop || stop_ended, "the old service may still run");
                            prop_assert_ne!(&last.listens, &of_one(Listens::No));
                        }
                        if works {
                            orders.push(action);
                            steps.handle(now, Input::Done);
                        } else {
                            let is_back = action == Action::Back;
                            if is_back {
                                orders.push(action);
                            }
                            steps.handle(now, match dead && !is_back {
                                true => Input::Lost("gone".into()),
                                false => Input::Refused("no".into()),
                            });
                        }
                    }
                    Action::Stop | Action::Restart => {
                        prop_assert!(!running);
                        running = true;
                        if works {
                            running = false;
                            stop_ended |= action == Action::Stop;
                            steps.handle(now, Input::Ended(Ok(())));
                        }
                    }
                    Action::Kill => running = false,
                    Action::Say(..) => {}
                    Action::End(result) => break 'all result,
                }
            }
            match events.next() {
                Some(Event::Sees(view)) => {
                    last = view.clone();
                    steps.handle(now, Input::Seen(view));
                }
                Some(Event::Interrupts) => steps.handle(now, Input::Interrupted),
                Some(Event::Loses) => steps.handle(now, Input::Lost("gone".into())),
                None => {
                    let view = View { waiting: 0, watched: BTreeMap::new(), ..last.clone() };
                    steps.handle(now, Input::Seen(view));
                }
            }
            now += at(500);
            steps.handle_timeout(now);
            let most = drain + within + WATCH + RESTART + at(45_000);
            prop_assert!(now < most, "it does not end: {:?}", steps);
        };
        prop_assert!(!running, "a command is left behind");
        match (result, orders.last()) {
            (Ok(()), last) => prop_assert_eq!(last, Some(&Action::Move)),
            (Err(_), last) => prop_assert!(matches!(last, None | Some(Action::Back))),
        }
    }
}

#[test]
fn a_daemon_that_dies_keeps_nobody_from_starting_the_service_again() {
    let plan = Plan {
        drain: at(1_000),
        within: at(1_000),
        stop: true,
        restart: true,
    };
    let mut steps = until(Step::Listen, plan);
    steps.handle(at(500), Input::Lost("gone".into()));
    actions(&mut steps);
    assert_eq!(steps.step(), Step::Rehold);
    steps.handle(at(600), Input::Lost("gone".into()));
    assert_eq!(steps.step(), Step::Restart);
    assert!(actions(&mut steps).contains(&Action::Restart));
}
