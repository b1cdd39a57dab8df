//! What a scraper gets is read as strictly as its specification is.

use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::model::status::tests::example;
use crate::model::status::{Cause, Served};

const ALERTS: &str = include_str!("../../../../contrib/prometheus/alerts.yml");
const DASHBOARD: &str = include_str!("../../../../contrib/grafana/ipmoved.json");
const README: &str = include_str!("../../../../README.md");

/// A status with something in each family.
fn full() -> Status {
    let mut status = example();
    status.drops.insert("handshake_auth".into(), 2);
    status.tunnels[0].drops.insert("handshake_auth".into(), 5);
    status.tunnels[0].served = vec![Served {
        what: "192.0.2.5:80/tcp".into(),
        state: Answers::Refused,
        expected: true,
        since_s: 1,
        asked: 1,
        answered: 0,
        refused: 1,
        clients: 1,
        causes: Vec::<Cause>::new(),
    }];
    status.tunnels[0].peer = "a \\ \"name\"\n:51850".into();
    status
}

type Series = BTreeMap<String, BTreeMap<Vec<(String, String)>, f64>>;

/// Reads the text as strictly as its specification is
/// (prometheus.io/docs/instrumenting/exposition_formats).
fn parse(text: &str) -> Series {
    assert!(text.ends_with('\n') && !text.contains("\n\n"), "{text}");
    let mut all = Series::new();
    let (mut helped, mut typed) = (BTreeSet::new(), BTreeMap::new());
    let mut current = String::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').unwrap();
            assert!(helped.insert(name.to_owned()), "two helps: {line}");
            assert!(
                help.len() > 10 && help.chars().next().unwrap().is_uppercase(),
                "{line}"
            );
            current = name.to_owned();
            continue;
        }
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert_eq!(name, current, "a type follows its help");
            assert!(["counter", "gauge"].contains(&kind), "{line}");
            assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
            assert!(typed.insert(name.to_owned(), kind).is_none(), "{line}");
            continue;
        }
        let (name, labels, value) = sample(line);
        assert_eq!(name, current, "families are not mixed: {line}");
        assert!(typed.contains_key(&name), "{line}");
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        assert!(
            name.starts_with("ipmoved_") && name.chars().all(plain),
            "{line}"
        );
        assert!(value.is_finite() && value >= 0.0, "{line}");
        let series = all.entry(name).or_default();
        assert!(series.insert(labels, value).is_none(), "twice: {line}");
    }
    all
}

/// `name{label="value",…} number`.
fn sample(line: &str) -> (String, Vec<(String, String)>, f64) {
    let (head, value) = line.rsplit_once(' ').unwrap();
    let value = value.parse().unwrap_or_else(|_| panic!("{line}"));
    let Some((name, labels)) = head.split_once('{') else {
        return (head.into(), Vec::new(), value);
    };
    let mut rest = labels.strip_suffix('}').unwrap();
    let mut found = Vec::new();
    while !rest.is_empty() {
        let (label, quoted) = rest.split_once("=\"").unwrap();
        let (mut text, mut chars) = (String::new(), quoted.char_indices());
        let end = loop {
            match chars.next().unwrap() {
                (at, '"') => break at,
                (_, '\\') => text.push(match chars.next().unwrap().1 {
                    'n' => '\n',
                    escaped @ ('\\' | '"') => escaped,
                    other => panic!("\\{other}: {line}"),
                }),
                (_, plain) => text.push(plain),
            }
        };
        found.push((label.to_owned(), text));
        rest = quoted[end + 1..]
            .strip_prefix(',')
            .unwrap_or(&quoted[end + 1..]);
    }
    (name.into(), found, value)
}

#[test]
fn a_scraper_gets_names_with_units_help_and_a_type() {
    let text = write(&full(), Form::Prometheus).unwrap();
    let all = parse(&text);
    let one = |name: &str, labels: &[(&str, &str)]| {
        let own = |(name, value): &(&str, &str)| (name.to_string(), value.to_string());
        let labels: Vec<_> = labels.iter().map(own).collect();
        all[name].get(&labels).copied()
    };
    let peer = "a \\ \"name\"\n:51850";
    assert_eq!(one("ipmoved_peer_up", &[("peer", peer)]), Some(1.0));
    assert_eq!(
        one("ipmoved_received_bytes_total", &[("peer", peer)]),
        Some(3_000.0)
    );
    let dropped = |reason| {
        one(
            "ipmoved_dropped_total",
            &[("peer", peer), ("reason", reason)],
        )
    };
    assert_eq!(dropped("replay"), Some(1.0));
    assert_eq!(
        dropped("no_session"),
        Some(0.0),
        "it is there before the first"
    );
    // What strangers sent counts once, though `status` shows it in two places.
    assert_eq!(dropped("handshake_auth"), Some(3.0));
    let of_strangers = &[("reason", "handshake_auth")];
    assert_eq!(
        one("ipmoved_strangers_dropped_total", of_strangers),
        Some(2.0)
    );
    assert_eq!(one("ipmoved_flows", &[("peer", "all")]), Some(3.0));
    let direct = &[("peer", peer), ("move", "192.0.2.5"), ("way", "direct")];
    assert_eq!(one("ipmoved_move_arrivals_total", direct), Some(810.0));
    for (what, mode) in [("192.0.2.5", "held"), ("192.0.2.6", "shared")] {
        for name in MODES {
            let labels = &[("peer", peer), ("move", what), ("mode", name)];
            assert_eq!(one("ipmoved_move_mode", labels), Some(flag(name == mode)));
        }
    }
    let failing = &[("peer", peer), ("service", "192.0.2.5:80/tcp")];
    assert_eq!(one("ipmoved_service_failing", failing), Some(1.0));
    assert_eq!(one("ipmoved_problems", &[("severity", "fault")]), Some(1.0));
}

#[test]
fn open_metrics_has_the_same_series_and_an_end() {
    let classic = write(&full(), Form::Prometheus).unwrap();
    let open = write(&full(), Form::OpenMetrics).unwrap();
    assert!(open.ends_with("# EOF\n") && open.matches("# EOF").count() == 1);
    assert!(
        open.contains("# UNIT ipmoved_uptime_seconds seconds\n"),
        "{open}"
    );
    let samples = |text: &str| -> Vec<String> {
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        lines.map(str::to_owned).collect()
    };
    assert_eq!(samples(&classic), samples(&open));
    assert_eq!(Form::asked_for("*/*"), Form::Prometheus);
    let prometheus = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;q=0.2";
    assert_eq!(Form::asked_for(prometheus), Form::OpenMetrics);
}

#[test]
fn alerts_dashboard_and_readme_use_names_that_there_are() {
    let all = parse(&write(&full(), Form::Prometheus).unwrap());
    for (file, text) in [
        ("alerts", ALERTS),
        ("dashboard", DASHBOARD),
        ("README", README),
    ] {
        let mut used = 0;
        for (at, _) in text.match_indices("ipmoved_") {
            let before = text[..at].chars().next_back();
            let name: String = text[at..]
                .chars()
                .take_while(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || *c == '_')
                .collect();
            // A part of another name, or a program's in a path.
            if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == '/') {
                continue;
            }
            used += 1;
            assert!(all.contains_key(&name), "{file}: {name}");
        }
        assert!(used > 0, "{file} names none");
    }
    let dashboard: serde_json::Value = serde_json::from_str(DASHBOARD).unwrap();
    assert!(dashboard["panels"].as_array().unwrap().len() > 5);
}

#[test]
fn the_series_of_a_large_configuration_are_bounded() {
    let mut status = full();
    let tunnel = &mut status.tunnels[0];
    let mode = tunnel.modes[0].clone();
    tunnel.modes = (0..16_384)
        .map(|n| {
            let mut mode = mode.clone();
            mode.what = format!("192.0.2.5:{n}");
            mode
        })
        .collect();
    let all = parse(&write(&status, Form::Prometheus).unwrap());
    assert_eq!(all["ipmoved_move_mode"].len(), MODES.len() * MAX_MOVES);
    let series: usize = all.values().map(BTreeMap::len).sum();
    assert!(series < 2_500, "{series}");
}

#[test]
fn a_form_that_is_refused_or_wanted_less_is_not_sent() {
    let open = "application/openmetrics-text";
    let prometheus = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,\
                      application/openmetrics-text;version=0.0.1;q=0.5,\
                      text/plain;version=0.0.4;q=0.3,*/*;q=0.2";
    for accept in [
        open.to_owned(),
        prometheus.to_owned(),
        format!("text/plain, {open}"),
        format!("{open}; version=1.0.0; q=0.1"),
        "Application/OpenMetrics-Text; Q=0.5, */*; q=0.1".into(),
        format!("{open};q=nonsense"),
    ] {
        assert_eq!(Form::asked_for(&accept), Form::OpenMetrics, "{accept}");
    }
    for accept in [
        String::new(),
        "*/*".into(),
        "text/plain".into(),
        format!("{open};q=0"),
        format!("{open}; version=1.0.0; q=0.000, text/plain"),
        format!("text/plain, {open};q=0.5"),
        format!("*/*, {open};q=0.5"),
        "application/openmetrics-texts".into(),
        format!("text/html;of={open}"),
    ] {
        assert_eq!(Form::asked_for(&accept), Form::Prometheus, "{accept}");
    }
}
