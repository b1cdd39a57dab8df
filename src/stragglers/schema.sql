-- Who still comes to what has moved. All times are seconds since 1970, UTC; days are those of UTC.

-- A client's conversations of one day with one port of a moved address.
CREATE TABLE visits (
    day         TEXT    NOT NULL,   -- 2026-11-28
    client      TEXT    NOT NULL,   -- 203.0.113.9, or the /64 of an IPv6 address: 2001:db8:1:2::/64
    address     TEXT    NOT NULL,   -- what was asked for: 192.0.2.5
    port        INTEGER NOT NULL,   -- 443; 0 for protocols without ports
    protocol    TEXT    NOT NULL,   -- tcp, udp, icmp, …
    served_by   TEXT    NOT NULL,   -- old or new: the server that answered
    connections INTEGER NOT NULL,   -- conversations that began
    answered    INTEGER NOT NULL,   -- those that were answered
    went_on     INTEGER NOT NULL,   -- those whose client went on after the answer
    bytes_in    INTEGER NOT NULL,   -- payload from the client
    bytes_out   INTEGER NOT NULL,   -- payload to the client
    first       INTEGER NOT NULL,   -- first seen on this day
    last        INTEGER NOT NULL,   -- last seen on this day
    PRIMARY KEY (client, address, port, protocol, served_by, day)
) STRICT, WITHOUT ROWID;

CREATE INDEX visits_by_day ON visits (day);

-- When a client's last conversations began, with one port of a moved address.
CREATE TABLE arrivals (
    client      TEXT    NOT NULL,
    address     TEXT    NOT NULL,
    port        INTEGER NOT NULL,
    protocol    TEXT    NOT NULL,
    last        TEXT    NOT NULL,   -- the last 24 times, oldest first: 1795839600 1795839900
    PRIMARY KEY (client, address, port, protocol)
) STRICT, WITHOUT ROWID;

-- Which names a client asked for.
CREATE TABLE names (
    client      TEXT    NOT NULL,
    address     TEXT    NOT NULL,
    port        INTEGER NOT NULL,
    protocol    TEXT    NOT NULL,
    name        TEXT    NOT NULL,   -- of TLS (SNI) or HTTP (Host); '(none)' if it gave none there
    connections INTEGER NOT NULL,
    first       INTEGER NOT NULL,
    last        INTEGER NOT NULL,
    PRIMARY KEY (client, address, port, protocol, name)
) STRICT, WITHOUT ROWID;

-- What came on a day beside the clients that are listed: scans, floods, whatever was too much.
CREATE TABLE days (
    day           TEXT PRIMARY KEY,
    openings      INTEGER NOT NULL, -- conversations that began, clients' among them
    answered_once INTEGER NOT NULL, -- answered, and the sender neither went on nor came back
    unlisted      INTEGER NOT NULL, -- clients' conversations that were too many to list
    missed        INTEGER NOT NULL, -- conversations that were too many to look at
    unnamed       INTEGER NOT NULL, -- connections that were too many to look for a name in
    lost          INTEGER NOT NULL, -- conversations that could not be written in time
    displaced     INTEGER NOT NULL  -- senders of answered_once that were too many to remember
) STRICT;

-- What has moved: since when, and until when the daemon had it in its settings.
CREATE TABLE moves (
    what    TEXT    PRIMARY KEY,    -- as --move names it: 192.0.2.5:443/tcp
    since   INTEGER NOT NULL,
    until   INTEGER NOT NULL,
    current INTEGER NOT NULL        -- 1 if it still is, as far as the daemon has said
) STRICT, WITHOUT ROWID;

-- When somebody watched each move: a client that came at another time is not in here.
CREATE TABLE watched (
    what  TEXT    NOT NULL,
    since INTEGER NOT NULL,
    until INTEGER NOT NULL,
    PRIMARY KEY (what, since)
) STRICT, WITHOUT ROWID;

-- How each day's new conversations came to the new server, as it tells.
CREATE TABLE arrived (
    day       TEXT    NOT NULL,
    what      TEXT    NOT NULL,
    by_tunnel INTEGER NOT NULL,
    directly  INTEGER NOT NULL,
    PRIMARY KEY (day, what)
) STRICT, WITHOUT ROWID;

-- What clients have asked for, and nobody was ever answered, so that no visit shows it.
CREATE TABLE unanswered (
    what  TEXT    PRIMARY KEY,      -- 192.0.2.5:81/tcp
    first INTEGER NOT NULL,         -- asked for first
    last  INTEGER NOT NULL          -- asked for last, as far as that was seen
) STRICT, WITHOUT ROWID;
