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
    answered_once INTEGER NOT NULL, -- answered, without a connection, and the sender never came back
    unlisted      INTEGER NOT NULL, -- clients' conversations that were too many to list
    missed        INTEGER NOT NULL, -- conversations that were too many to look at
    unnamed       INTEGER NOT NULL  -- connections that were too many to look for a name in
) STRICT;

-- When somebody watched: a client that came at another time is not in here.
CREATE TABLE watched (
    since INTEGER PRIMARY KEY,
    until INTEGER NOT NULL
) STRICT;
