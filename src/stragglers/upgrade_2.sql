-- From form 2, which did not remember what nobody was answered.
CREATE TABLE unanswered (
    what  TEXT    PRIMARY KEY,
    first INTEGER NOT NULL,
    last  INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
