"""How the episode store reaches its database: places, connections, transactions, and errors that say how to go on.

A transaction is a function that is given a connection. If the connection is lost it is run anew, for as long as the caller has
patience, so it must be idempotent: it may have been committed although nobody heard of it. What is special about a
database stands in `store.sqlite` and `store.postgres`.
"""

from __future__ import annotations

import random
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from sqlalchemy import Connection, Engine, Table, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from lightning_rl.errors import StoreError
from lightning_rl.store.quick import NotQuick, Quick
from lightning_rl.store.sqlite import SQLite

T = TypeVar("T")
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 1.0


class Database(Protocol):
    """One kind of database at one place."""

    place: str
    """How messages name it: without secrets."""
    patience_s: float
    """For how long a lost connection is made anew."""

    def engines(self) -> tuple[Engine, Engine]:
        """For reading and for writing; both share the connections."""
        ...

    def must_prepare(self, connection: Connection) -> bool:
        """Raises StoreError for tables of a newer version, and for none where none may be made."""
        ...

    def prepare(self, connection: Connection) -> None:
        """Make the tables, or bring them up to date; others may be doing the same."""
        ...

    def insert_once(self, table: Table) -> Any:
        """An insertion that passes over rows that are there."""
        ...

    def is_passing(self, error: SQLAlchemyError) -> bool:
        """Whether trying again with a new connection may help."""
        ...

    def hint(self, error: Exception) -> str | None: ...


def database_at(place: Path | str, *, create: bool, upgrade: bool = True) -> Database:
    """A path is an SQLite file; a URL says itself. Raises StoreError for what is neither.

    Whoever neither creates nor upgrades a file gets connections that cannot write to it.
    """
    if isinstance(place, Path) or ("://" not in place and not place.startswith("${")):
        return SQLite(str(place), create=create, upgrade=upgrade)
    if not place.startswith("sqlite"):
        from lightning_rl.store.postgres import Postgres

        return Postgres.at(place, create=create)
    try:
        url = make_url(place)
    except (ArgumentError, ValueError):
        raise StoreError(f"not a database URL: {place}", hint="give a path, or sqlite:///PATH") from None
    if url.drivername not in ("sqlite", "sqlite+pysqlite") or url.database in (None, "", ":memory:"):
        raise StoreError(
            f"the episode store must be an SQLite file, not {url.render_as_string()}",
            hint="give a path, sqlite:///PATH, or postgresql://USER@HOST/DATABASE",
        )
    return SQLite(str(url.database), create=create, upgrade=upgrade)


class Transactions:
    """Runs transactions on a database. Raises StoreError, with a hint where there is one."""

    def __init__(self, database: Database) -> None:
        self.database = database
        try:
            self._reader, self._writer = database.engines()
        except (SQLAlchemyError, NoSuchModuleError) as error:
            raise _store_error(database, "open", error) from error
        self._quick = Quick(self._writer) if isinstance(database, SQLite) else None

    def read(self, work: Callable[[Connection], T], doing: str = "read", patience_s: float | None = None) -> T:
        return self._run(self._reader, work, doing, self.database.patience_s if patience_s is None else patience_s)

    def write(self, work: Callable[[Connection], T], doing: str = "write to", patience_s: float | None = None) -> T:
        return self._run(self._writer, work, doing, self.database.patience_s if patience_s is None else patience_s)

    def write_often(self, work: Callable[[Any], T]) -> T:
        """As `write`, for what everybody waits for: as quick as the database allows. `work` executes nothing but statements."""
        if self._quick is None:
            return self.write(work)
        try:
            return self._quick.write(work)
        except NotQuick:
            return self.write(work)
        except (sqlite3.Error, SQLAlchemyError, OverflowError) as error:
            raise _store_error(self.database, "write to", error) from error

    def close(self) -> None:
        if self._quick is not None:
            self._quick.close()
        self._reader.dispose()

    def _run(self, engine: Engine, work: Callable[[Connection], T], doing: str, patience_s: float) -> T:
        deadline = time.monotonic() + patience_s
        pause = _FIRST_PAUSE_S
        while True:
            try:
                with engine.begin() as connection:
                    return work(connection)
            except SQLAlchemyError as error:
                if time.monotonic() + pause > deadline or not self.database.is_passing(error):
                    raise _store_error(self.database, doing, error) from error
            except OverflowError as error:  # SQLite's driver says so of integers beyond 64 bits
                raise StoreError(f"cannot {doing} the episode store {self.database.place}: {error}") from error
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE_S)


def _store_error(database: Database, doing: str, error: Exception) -> StoreError:
    reason = str(getattr(error, "orig", None) or error).strip()
    return StoreError(f"cannot {doing} the episode store {database.place}: {reason}", hint=database.hint(error))
