-- From form 1, which did not know which move was watched: nobody can tell that any more.
DROP TABLE watched;
ALTER TABLE days ADD COLUMN lost INTEGER NOT NULL DEFAULT 0;
ALTER TABLE days ADD COLUMN displaced INTEGER NOT NULL DEFAULT 0;
CREATE TABLE moves (
    what    TEXT    PRIMARY KEY,
    since   INTEGER NOT NULL,
    until   INTEGER NOT NULL,
    current INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE watched (
    what  TEXT    NOT NULL,
    since INTEGER NOT NULL,
    until INTEGER NOT NULL,
    PRIMARY KEY (what, since)
) STRICT, WITHOUT ROWID;
CREATE TABLE arrived (
    day       TEXT    NOT NULL,
    what      TEXT    NOT NULL,
    by_tunnel INTEGER NOT NULL,
    directly  INTEGER NOT NULL,
    PRIMARY KEY (day, what)
) STRICT, WITHOUT ROWID;
