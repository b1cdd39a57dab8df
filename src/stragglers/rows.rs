//! What is added to each table of the database.
//!
//! Owns the statements that add; what is there stays, so that nothing is counted twice or lost.

use rusqlite::{OptionalExtension, Transaction, params};

use super::rhythm;
use super::store::{protocol, times};
use super::tally::{self, Waiting};
use super::time::Day;
use super::watch::Watch;

/// Names that are kept of a client and a port. Whoever asks for ever new ones makes no more.
const MAX_NAMES: i64 = 8;

pub(super) fn write_visits(change: &Transaction<'_>, waiting: &Waiting) -> rusqlite::Result<()> {
    let mut add = change.prepare(
        "INSERT INTO visits VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13)
         ON CONFLICT DO UPDATE SET connections = connections + excluded.connections,
         answered = answered + excluded.answered, went_on = went_on + excluded.went_on,
         bytes_in = bytes_in + excluded.bytes_in, bytes_out = bytes_out + excluded.bytes_out,
         first = min(first, excluded.first), last = max(last, excluded.last)",
    )?;
    for (key, counts) in &waiting.visits {
        let (client, asked) = key.who;
        add.execute(params![
            key.day.to_string(),
            client.to_string(),
            asked.addr.to_string(),
            asked.port,
            protocol(asked.protocol),
            key.served_by.name(),
            number(counts.connections),
            number(counts.answered),
            number(counts.went_on),
            number(counts.bytes_in),
            number(counts.bytes_out),
            counts.first,
            counts.last,
        ])?;
    }
    Ok(())
}

pub(super) fn write_arrivals(change: &Transaction<'_>, waiting: &Waiting) -> rusqlite::Result<()> {
    let mut before = change.prepare(
        "SELECT last FROM arrivals
         WHERE client = ?1 AND address = ?2 AND port = ?3 AND protocol = ?4",
    )?;
    let mut put = change.prepare("INSERT OR REPLACE INTO arrivals VALUES (?1, ?2, ?3, ?4, ?5)")?;
    for ((client, asked), more) in &waiting.arrivals {
        let (client, address) = (client.to_string(), asked.addr.to_string());
        let protocol = protocol(asked.protocol);
        let key = params![client, address, asked.port, protocol];
        let known: Option<String> = before.query_row(key, |row| row.get(0)).optional()?;
        let mut all = times(&known.unwrap_or_default());
        all.extend(more);
        let kept = all.split_off(all.len().saturating_sub(rhythm::KEPT));
        let kept: Vec<String> = kept.iter().map(ToString::to_string).collect();
        put.execute(params![
            client,
            address,
            asked.port,
            protocol,
            kept.join(" ")
        ])?;
    }
    Ok(())
}

pub(super) fn write_names(change: &Transaction<'_>, waiting: &Waiting) -> rusqlite::Result<()> {
    let mut add = change.prepare(
        "INSERT INTO names SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8 WHERE ?9 > (
             SELECT count(*) FROM names WHERE client = ?1 AND address = ?2 AND port = ?3
             AND protocol = ?4 AND name != ?5)
         ON CONFLICT DO UPDATE SET connections = connections + excluded.connections,
         first = min(first, excluded.first), last = max(last, excluded.last)",
    )?;
    for (((client, asked), name), asks) in &waiting.names {
        add.execute(params![
            client.to_string(),
            asked.addr.to_string(),
            asked.port,
            protocol(asked.protocol),
            name,
            number(asks.connections),
            asks.first,
            asks.last,
            MAX_NAMES,
        ])?;
    }
    Ok(())
}

pub(super) fn write_days(change: &Transaction<'_>, waiting: &Waiting) -> rusqlite::Result<()> {
    let mut add = change.prepare(
        "INSERT INTO days VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)
         ON CONFLICT DO UPDATE SET openings = openings + excluded.openings,
         answered_once = answered_once + excluded.answered_once,
         unlisted = unlisted + excluded.unlisted, missed = missed + excluded.missed,
         unnamed = unnamed + excluded.unnamed, lost = lost + excluded.lost,
         displaced = displaced + excluded.displaced",
    )?;
    for (day, others) in &waiting.others {
        add.execute(params![
            day.to_string(),
            number(others.openings),
            others.answered_once,
            number(others.unlisted),
            number(others.missed),
            number(others.unnamed),
            number(others.lost),
            number(others.displaced),
        ])?;
    }
    Ok(())
}

pub(super) fn write_arrived(change: &Transaction<'_>, waiting: &Waiting) -> rusqlite::Result<()> {
    let mut add = change.prepare(
        "INSERT INTO arrived VALUES (?1, ?2, ?3, ?4)
         ON CONFLICT DO UPDATE SET by_tunnel = by_tunnel + excluded.by_tunnel,
         directly = directly + excluded.directly",
    )?;
    for ((day, what), arrived) in &waiting.arrived {
        add.execute(params![
            day.to_string(),
            what,
            number(arrived.by_tunnel),
            number(arrived.directly),
        ])?;
    }
    Ok(())
}

pub(super) fn write_unanswered(
    change: &Transaction<'_>,
    waiting: &Waiting,
) -> rusqlite::Result<()> {
    let mut put = change.prepare(
        "INSERT INTO unanswered SELECT ?1, ?2, ?2
         WHERE ?3 > (SELECT count(*) FROM unanswered WHERE what != ?1)
         ON CONFLICT DO UPDATE SET last = max(last, excluded.last)",
    )?;
    let mut remove = change.prepare("DELETE FROM unanswered WHERE what = ?1")?;
    for (what, asked) in &waiting.unanswered {
        match asked {
            Some(last) => put.execute(params![what, last, tally::MAX_UNANSWERED as i64])?,
            None => remove.execute([what])?,
        };
    }
    Ok(())
}

/// The moves, and when each was watched. `all`: what came until now was written.
pub(super) fn write_watch(
    change: &Transaction<'_>,
    watch: &Watch,
    now: i64,
    all: bool,
) -> rusqlite::Result<()> {
    // What the clock showed when it was wrong is no later time.
    let mut put = change.prepare(
        "INSERT INTO moves VALUES (?1, ?2, ?2, 1)
         ON CONFLICT DO UPDATE SET since = min(since, excluded.since), until = excluded.until,
         current = 1",
    )?;
    let mut some = false;
    for what in watch.names() {
        put.execute(params![what, now])?;
        some = true;
    }
    // At the start nobody has said yet what has moved.
    if some {
        let gone = "UPDATE moves SET current = 0 WHERE current = 1 AND until != ?1";
        change.execute(gone, [now])?;
    }
    let mut put = change.prepare(
        "INSERT INTO watched VALUES (?1, ?2, ?3)
         ON CONFLICT DO UPDATE SET until = max(until, excluded.until)",
    )?;
    for it in watch.stretches(now, all) {
        put.execute(params![it.what, it.since, it.until])?;
    }
    Ok(())
}

/// Statements by which all that is later than `latest` has come `now`, and is not watched.
pub(super) fn brought_back(now: i64, latest: i64) -> String {
    let [today, last_day] = [now, latest].map(|at| Day::of(at).to_string());
    format!(
        "INSERT INTO visits
         SELECT '{today}', client, address, port, protocol, served_by, sum(connections),
                sum(answered), sum(went_on), sum(bytes_in), sum(bytes_out), min(min(first), {now}),
                {now}
         FROM visits WHERE day > '{last_day}'
         GROUP BY client, address, port, protocol, served_by
         ON CONFLICT DO UPDATE SET connections = connections + excluded.connections,
         answered = answered + excluded.answered, went_on = went_on + excluded.went_on,
         bytes_in = bytes_in + excluded.bytes_in, bytes_out = bytes_out + excluded.bytes_out,
         first = min(first, excluded.first), last = excluded.last;
         DELETE FROM visits WHERE day > '{last_day}';
         UPDATE visits SET first = min(first, {now}), last = {now} WHERE last > {latest};
         UPDATE names SET first = min(first, {now}), last = {now} WHERE last > {latest};
         UPDATE unanswered SET first = min(first, {now}), last = {now} WHERE last > {latest};
         INSERT INTO days
         SELECT '{today}', sum(openings), sum(answered_once), sum(unlisted), sum(missed),
                sum(unnamed), sum(lost), sum(displaced)
         FROM days WHERE day > '{last_day}' HAVING count(*) > 0
         ON CONFLICT DO UPDATE SET openings = openings + excluded.openings,
         answered_once = answered_once + excluded.answered_once,
         unlisted = unlisted + excluded.unlisted, missed = missed + excluded.missed,
         unnamed = unnamed + excluded.unnamed, lost = lost + excluded.lost,
         displaced = displaced + excluded.displaced;
         DELETE FROM days WHERE day > '{last_day}';
         DELETE FROM arrived WHERE day > '{last_day}';
         DELETE FROM watched WHERE since > {latest};
         UPDATE watched SET until = max(since, {now}) WHERE until > {latest};
         UPDATE moves SET since = min(since, {now}), until = {now} WHERE until > {latest};"
    )
}

/// A count as SQLite has it.
fn number(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
