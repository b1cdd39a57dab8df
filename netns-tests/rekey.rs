//! Keys change while packets flow. Nothing is lost, and no nonce seals two datagrams under one key.
//!
//! ```text
//!                        ┌── old server, daemon --rekey-after 1
//!  client ──── router ───┤        ║ tunnel, through a relay where it says so
//!                        └── new server, daemon --rekey-after 1, runs the application
//! ```

use std::collections::{BTreeSet, HashSet};
use std::thread;
use std::time::{Duration, Instant};

use ipmoved::internals::Role;
use ipmoved::lab::topology::{MOVED, NEW};
use ipmoved::lab::{DaemonSetup, Lab, Service, UdpService, poll_until};

use crate::relay::{Dice, Fate, Relay};
use crate::stage::{MEGABYTE, PATIENCE, Result, setup};
use crate::stream::Stream;

/// How long the quick tests run, with new keys each second.
const QUICK: Duration = Duration::from_secs(11);

fn rekeying(setup: DaemonSetup<'_>) -> DaemonSetup<'_> {
    [Role::Old, Role::New]
        .into_iter()
        .fold(setup, |setup, role| {
            setup.args(role, &["--rekey-after", "1"])
        })
}

/// The drop reasons that a rekey could cause.
const CAUSES: [&str; 7] = [
    "no_session",
    "session_unknown",
    "session_expired",
    "open_auth",
    "replay",
    "send_failed",
    "control_busy",
];

fn nothing_was_dropped(setup: &DaemonSetup<'_>) -> Result {
    for role in [Role::Old, Role::New] {
        let status = setup.status(role)?;
        for cause in CAUSES {
            assert_eq!(status.drops(cause), 0, "{role}: {:?}", status.all_drops());
        }
        assert_eq!(status.state(), "up");
    }
    Ok(())
}

/// The sessions in a recording: the receivers' indexes of its data datagrams.
fn sessions(record: &[(Role, Vec<u8>)], from: Role) -> BTreeSet<u32> {
    record
        .iter()
        .filter(|(side, bytes)| *side == from && bytes[0] == 4)
        .map(|(_, bytes)| u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]))
        .collect()
}

/// Fails if two datagrams were sealed with the same key and nonce. The key depends on the
/// direction, the receiver's index and the lane; the nonce is the counter.
fn no_nonce_repeats(record: &[(Role, Vec<u8>)]) {
    let mut seen = HashSet::new();
    for (from, bytes) in record.iter().filter(|(_, bytes)| bytes[0] == 4) {
        let key = (*from == Role::Old, bytes[2], bytes[4..16].to_vec());
        assert!(
            seen.insert(key),
            "a nonce was used twice: {:?}",
            &bytes[..16]
        );
    }
    assert!(seen.len() > 1_000, "{}", seen.len());
}

fn a_stream_survives_rekeying(time: Duration) -> Result {
    let lab = Lab::new()?;
    let relay = Relay::start(&lab)?;
    let setup = rekeying(Relay::setup(&lab)?);
    let _echo = UdpService::start(lab.new_server(), (NEW, 53))?;
    let _application = Service::start(lab.new_server(), NEW)?;
    relay.record();
    let _daemons = setup.start_both()?;
    let stream = Stream::start(
        lab.client(),
        (MOVED, 53),
        1_000,
        Duration::from_micros(1_500),
    )?;
    let mut conversation = lab.client().converse(MOVED)?;
    let started = Instant::now();
    let mut slowest = Duration::ZERO;
    while started.elapsed() < time {
        slowest = slowest.max(conversation.exchange(&[7; 30_000], PATIENCE)?);
        thread::sleep(Duration::from_millis(10));
    }
    let echoes = stream.stop()?;
    let record = relay.recorded();
    println!(
        "{} datagrams, longest gap {:?}, slowest exchange {slowest:?}, sessions {}",
        echoes.sent,
        echoes.gap,
        sessions(&record, Role::Old).len()
    );
    echoes.complete()?;
    nothing_was_dropped(&setup)?;
    let expected = time.as_secs() as usize * 7 / 10;
    for from in [Role::Old, Role::New] {
        let sessions = sessions(&record, from).len();
        assert!(sessions >= expected, "{from}: only {sessions} sessions");
    }
    no_nonce_repeats(&record);
    Ok(())
}

#[test]
fn a_stream_loses_nothing_while_keys_change_every_second() -> Result {
    a_stream_survives_rekeying(QUICK)
}

#[test]
#[ignore = "takes a minute: cargo test --test netns -- --ignored for_a_minute"]
fn a_stream_loses_nothing_while_keys_change_every_second_for_a_minute() -> Result {
    a_stream_survives_rekeying(Duration::from_secs(60))
}

#[test]
fn a_download_at_full_speed_survives_rekeying() -> Result {
    let lab = Lab::new()?;
    let setup = rekeying(setup(&lab)?);
    let _application = Service::start(lab.new_server(), NEW)?;
    let _daemons = setup.start_both()?;
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(4) {
        lab.client().download(MOVED, 50 * MEGABYTE)?;
        lab.client().upload(MOVED, 20 * MEGABYTE)?;
    }
    nothing_was_dropped(&setup)?;
    let age = setup.status(Role::Old)?.tunnel()["handshake_age_s"].as_u64();
    assert!(age <= Some(2), "{age:?}");
    Ok(())
}

#[test]
fn no_nonce_repeats_over_restarts_of_both_daemons() -> Result {
    let lab = Lab::new()?;
    let relay = Relay::start(&lab)?;
    let setup = rekeying(Relay::setup(&lab)?);
    let _echo = UdpService::start(lab.new_server(), (NEW, 53))?;
    relay.record();
    let mut daemons = setup.start_both()?;
    let stream = Stream::start(lab.client(), (MOVED, 53), 64, Duration::from_micros(700))?;
    for role in [Role::Old, Role::New, Role::Old] {
        thread::sleep(Duration::from_millis(1_200));
        let again = |old: &mut ipmoved::lab::Daemon<'_>| -> Result {
            old.process().signal(rustix::process::Signal::KILL)?;
            poll_until(PATIENCE, Duration::from_millis(5), || {
                old.process().exited()
            });
            Ok(())
        };
        match role {
            Role::Old => {
                again(&mut daemons.old)?;
                daemons.old = setup.start(role)?;
            }
            Role::New => {
                again(&mut daemons.new)?;
                daemons.new = setup.start(role)?;
            }
        }
        daemons.wait_until_up()?;
        stream.heard_again();
        let flows = poll_until(PATIENCE, Duration::from_millis(20), || {
            stream.heard_again().then_some(())
        });
        assert!(flows.is_some(), "the stream does not flow again");
    }
    let echoes = stream.stop()?;
    assert_eq!(echoes.twice, 0);
    no_nonce_repeats(&relay.recorded());
    Ok(())
}

#[test]
fn reordering_across_rekeys_loses_and_repeats_nothing() -> Result {
    let lab = Lab::new()?;
    let relay = Relay::start(&lab)?;
    let setup = rekeying(Relay::setup(&lab)?);
    let _echo = UdpService::start(lab.new_server(), (NEW, 53))?;
    let _daemons = setup.start_both()?;
    // A tenth of all datagrams come up to 0.4 s late, many of them after the next rekey.
    let mut dice = Dice(4);
    relay.rule(move |_, _| match dice.per_thousand(100) {
        true => Fate::Late(Duration::from_millis(dice.next() % 400)),
        false => Fate::Pass,
    });
    let stream = Stream::start(lab.client(), (MOVED, 53), 200, Duration::from_millis(1))?;
    thread::sleep(Duration::from_secs(4));
    let echoes = stream.stop()?;
    println!("{} datagrams, longest gap {:?}", echoes.sent, echoes.gap);
    echoes.complete()?;
    nothing_was_dropped(&setup)
}
