"""How the episode store reaches SQLite: connections, transactions, and errors that say how to go on.

A writer takes the write lock when its transaction begins (`BEGIN IMMEDIATE`), so that writers of different processes
queue for up to `BUSY_SECONDS` instead of failing half-way; readers never wait (WAL).
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from lightning_rl.errors import StoreError

BUSY_SECONDS = 60
PRAGMAS = ("synchronous = NORMAL", "foreign_keys = ON")
HINTS = {
    "database or disk is full": "free some space on the disk, then go on with `lrl train --resume RUN`",
    "database is locked": "another process holds the write lock; is a program other than Lightning RL using the file?",
    "unable to open database file": "check that the folder exists and that you may write to it",
    "readonly database": "check that you may write to the file and to its folder",
    "file is not a database": "the file is damaged or something else; give the path of an episodes.db",
    "malformed": "the file is damaged; `sqlite3 FILE .recover` may save what is in it",
    "disk I/O error": "the disk failed or went away; the file must not be on a network file system",
}


def open_engine(place: Path | str) -> Engine:
    """An engine for a path, or for an SQLAlchemy URL of an SQLite file."""
    url = _url(place)
    with store_errors(url, "open"):
        engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS}, max_overflow=-1)
        event.listen(engine, "connect", _configure)
        event.listen(engine, "begin", _begin)
        return engine


def writing(engine: Engine) -> Engine:
    """The same engine, whose transactions take the write lock at once."""
    return engine.execution_options(write_lock=True)


@contextmanager
def store_errors(url: URL, doing: str) -> Iterator[None]:
    """Turn what the database raises into a StoreError with a hint."""
    try:
        yield
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error)
        hint = next((hint for text, hint in HINTS.items() if text in reason), None)
        raise StoreError(f"cannot {doing} the episode store {url.database}: {reason}", hint=hint) from error


def _url(place: Path | str) -> URL:
    if isinstance(place, Path) or "://" not in place:
        return URL.create("sqlite", database=str(place))
    try:
        url = make_url(place)
    except ArgumentError as error:
        raise StoreError(f"not a database URL: {place}", hint="give a path, or sqlite:///PATH") from error
    if url.drivername not in ("sqlite", "sqlite+pysqlite") or url.database in (None, "", ":memory:"):
        raise StoreError(
            f"the episode store must be an SQLite file, not {url.render_as_string()}",
            hint="give a path, or sqlite:///PATH",
        )
    return url


def _configure(connection: sqlite3.Connection, _record: Any) -> None:
    connection.isolation_level = None  # the driver would otherwise decide by itself when a transaction begins
    _write_ahead(connection)
    for pragma in PRAGMAS:
        connection.execute(f"PRAGMA {pragma}")


def _write_ahead(connection: sqlite3.Connection) -> None:
    """While another process does the same to a new file, SQLite refuses at once, whatever its timeout."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _begin(connection: Connection) -> None:
    write = connection.get_execution_options().get("write_lock", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
