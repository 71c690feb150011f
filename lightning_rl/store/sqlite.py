"""The episode store in an SQLite file.

A writer takes the write lock when its transaction begins (`BEGIN IMMEDIATE`), so that writers of different processes
queue for up to `BUSY_SECONDS` instead of failing half-way; readers never wait (WAL). Opening a file that is up to date is
reading, and what is not to be created is not touched before it is known to be ours. One that cannot be written to can be read,
if it is opened for no more.
"""

from __future__ import annotations

import os
import sqlite3
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, Table, create_engine, event
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.exc import SQLAlchemyError

from lightning_rl.errors import StoreError
from lightning_rl.store.schema import SCHEMA_VERSION, UPGRADES, metadata

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


class SQLite:
    patience_s = 0.0

    def __init__(self, path: str, *, create: bool, upgrade: bool = True) -> None:
        self.place = path
        self._create = create
        self._only_reads = not create and not upgrade

    def engines(self) -> tuple[Engine, Engine]:
        if not self._create and not Path(self.place).is_file():
            raise _nothing(self.place)
        is_for_reading = self._only_reads or (not self._create and not _is_writable(Path(self.place)))
        url = _reading_url(Path(self.place)) if is_for_reading else URL.create("sqlite", database=self.place)
        engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS}, max_overflow=-1)
        if self._create:
            event.listen(engine, "connect", _write_ahead)
        event.listen(engine, "connect", _configure)
        event.listen(engine, "begin", _begin)
        return engine, engine.execution_options(write_lock=True)

    def must_prepare(self, connection: Connection) -> bool:
        version = _version(connection)
        if not 0 <= version <= SCHEMA_VERSION:
            raise newer_version(self.place, version)
        if version == 0 and not self._create:
            raise _nothing(self.place)
        return version != SCHEMA_VERSION

    def prepare(self, connection: Connection) -> None:
        if not self.must_prepare(connection):
            return
        version = _version(connection)
        if version == 0:
            metadata.create_all(connection)
        else:
            for older in range(version, SCHEMA_VERSION):
                for statement in UPGRADES[older]:
                    connection.exec_driver_sql(statement)
        connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def insert_once(self, table: Table) -> Any:
        return insert(table).on_conflict_do_nothing()

    def is_passing(self, error: SQLAlchemyError) -> bool:
        return False

    def hint(self, error: Exception) -> str | None:
        reason = str(getattr(error, "orig", None) or error)
        return next((hint for text, hint in HINTS.items() if text in reason), None)


def newer_version(place: str, version: int) -> StoreError:
    return StoreError(
        f"{place} has version {version} of the episode store, this is version {SCHEMA_VERSION}",
        hint="open it with the release of Lightning RL that made it",
    )


def _nothing(place: str) -> StoreError:
    return StoreError(f"there is no episode store at {place}", hint="give a run's directory, or its episodes.db")


def _version(connection: Connection) -> int:
    return int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())


def log_of(path: Path) -> Path:
    """What was committed and is not in the file yet. A run that was killed leaves it behind."""
    return path.with_name(f"{path.name}-wal")


def _is_writable(path: Path) -> bool:
    return os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)


def _reading_url(path: Path) -> URL:
    """Beside a file that nobody has open there is nothing, and SQLite must be told that nothing need be made there.

    Then it must not change either: who reads for long looks for a log beside it (`log_of`), and opens it anew.
    """
    is_open = log_of(path).exists()
    how = {"mode": "ro"} if is_open else {"mode": "ro", "immutable": "1"}
    return URL.create("sqlite", database=f"file:{quote(os.fsencode(path.absolute()))}", query=how | {"uri": "true"})


def _configure(connection: sqlite3.Connection, _record: Any) -> None:
    connection.isolation_level = None  # the driver would otherwise decide by itself when a transaction begins
    for pragma in PRAGMAS:
        connection.execute(f"PRAGMA {pragma}")


def _write_ahead(connection: sqlite3.Connection, _record: Any) -> None:
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
