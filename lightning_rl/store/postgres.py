"""The episode store in a PostgreSQL database.

The URL is libpq's, `postgresql://USER:PASSWORD@HOST:PORT/DATABASE`. `${NAME}` in it stands for an environment variable, so
that recipes hold no passwords; messages never show one. `?run=NAME` puts a run into a schema of its own: ids are unique
within a run only. Processes that make the tables at the same moment wait for each other. A connection that is lost, by a
restart of the server for instance, is made anew for up to a minute.
"""

from __future__ import annotations

import os
import re
from typing import Any, Self
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, Table, create_engine, inspect, make_url
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.schema import CreateSchema

from lightning_rl.errors import MissingExtra, StoreError
from lightning_rl.store.schema import SCHEMA_VERSION, UPGRADES, metadata, version_table

SCHEMES = ("postgresql", "postgres", "postgresql+psycopg")
RUN = "run"
CONNECTING = {"connect_timeout": 10, "keepalives_idle": 30, "tcp_user_timeout": 30_000, "client_encoding": "utf8"}
FIRST_VERSION = 3
_PREPARING_LOCK = 0x4C524C  # any number that all processes agree on
_PASSING_STATES = {"40001", "40P01", "53300", "57P01", "57P02", "57P03"}
"""Serialisation, deadlock, too many connections, shut down, crashed, starting up."""
_TOLD = 20
_REFUSED = ("authentication failed", "does not exist", "no pg_hba.conf entry", "no password supplied")
HINTS = {
    "authentication failed": "check user and password in the URL",
    "no password supplied": "put the password into the URL, best as ${NAME} of an environment variable",
    "no pg_hba.conf entry": "the server does not let this user in from here: see its pg_hba.conf",
    "does not exist": "make it first, for instance with createdb or createuser",
    "permission denied": "the user must be allowed to create schemas and tables in this database",
    "Connection refused": "is the server running, and are host and port right?",
    "No such file or directory": "is the server running on this machine, with this socket directory?",
    "could not translate host name": "check the host in the URL",
    "No space left on device": "free some space on the server's disk, then go on with `lrl train --resume RUN`",
}


class Postgres:
    patience_s = 60.0

    def __init__(self, url: URL, run: str | None, *, create: bool) -> None:
        self._url = url
        self._run = run
        self._schema = f"_{run}" if run is not None and run.startswith("pg_") else run  # those are PostgreSQL's own
        self._create = create
        self._shown = url.set(drivername="postgresql", query={}).render_as_string(hide_password=True)
        self.place = self._shown if run is None else f"{self._shown}?{RUN}={run}"

    @classmethod
    def at(cls, place: str, *, create: bool) -> Self:
        """Raises StoreError for what is no PostgreSQL URL, or has a variable that is not set."""
        try:
            url = make_url(_with_environment(place))
        except (ArgumentError, ValueError):  # what they say may have the password in it
            raise StoreError(
                "the episode store's URL cannot be read",
                hint="it looks like postgresql://USER@HOST:PORT/DATABASE; characters such as @ / : in a password are "
                "percent-encoded, or come from an environment variable: postgresql://USER:${NAME}@HOST/DATABASE",
            ) from None
        if url.drivername not in SCHEMES:
            raise StoreError(
                f"the episode store cannot be in a database of the kind {url.drivername!r}",
                hint="give a path, sqlite:///PATH, or postgresql://USER@HOST/DATABASE",
            )
        query = dict(url.query)
        said = query.pop(RUN, None)
        run = said if said is None or isinstance(said, str) else said[0]
        if run is not None and re.fullmatch(r"(?!pg_.{60})[\w./:-]{1,63}", run, re.ASCII) is None:
            raise StoreError(f"{RUN}= in the episode store's URL must be a name of up to 63 letters, digits and ./:-_")
        return cls(url.set(drivername="postgresql+psycopg", query=query), run, create=create)

    def engines(self) -> tuple[Engine, Engine]:
        arguments: dict[str, Any] = {name: value for name, value in CONNECTING.items() if name not in self._url.query}
        if self._schema is not None:
            arguments["options"] = f'{self._url.query.get("options", "")} -csearch_path="{self._schema}"'.strip()
        try:
            engine = create_engine(self._url, connect_args=arguments, max_overflow=-1)
        except ModuleNotFoundError as error:
            raise MissingExtra(
                "an episode store in PostgreSQL needs psycopg", hint="pip install 'lightning-rl[postgres]'"
            ) from error
        return engine.execution_options(isolation_level="REPEATABLE READ"), engine

    def must_prepare(self, connection: Connection) -> bool:
        if not inspect(connection).has_table(version_table.name):
            if not self._create:
                raise self._nothing(connection)
            return True
        version = _version(connection)
        if not FIRST_VERSION <= version <= SCHEMA_VERSION:
            raise StoreError(
                f"{self.place} has version {version} of the episode store, this is version {SCHEMA_VERSION}",
                hint="open it with the release of Lightning RL that made it",
            )
        return version != SCHEMA_VERSION

    def prepare(self, connection: Connection) -> None:
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_PREPARING_LOCK})")
        if not self.must_prepare(connection):
            return
        if inspect(connection).has_table(version_table.name):
            for older in range(_version(connection), SCHEMA_VERSION):
                for statement in UPGRADES[older]:
                    connection.exec_driver_sql(statement)
            connection.execute(version_table.update().values(version=SCHEMA_VERSION))
            return
        encoding = connection.exec_driver_sql("SHOW server_encoding").scalar_one()
        if encoding not in ("UTF8", "SQL_ASCII"):
            raise StoreError(
                f"{self.place} keeps text as {encoding}, which cannot hold everything that agents say",
                hint="make the database with `createdb --encoding UTF8 --template template0 NAME`",
            )
        tables = inspect(connection)
        if self._schema is not None and not tables.has_schema(self._schema):
            connection.execute(CreateSchema(self._schema))
        foreign = [table for table in metadata.tables if tables.has_table(table)]
        if foreign:
            raise StoreError(
                f"{self.place} has tables of these names that are not the episode store's: {', '.join(foreign)}",
                hint=f"give it a database of its own, or add ?{RUN}=NAME to the URL for a schema of its own",
            )
        metadata.create_all(connection)
        version_table.create(connection)
        connection.execute(version_table.insert().values(version=SCHEMA_VERSION))

    def _nothing(self, connection: Connection) -> StoreError:
        query = "SELECT table_schema FROM information_schema.tables WHERE table_name = %(name)s"
        schemas = connection.exec_driver_sql(query, {"name": version_table.name}).scalars().all()
        runs = sorted(schema.removeprefix("_") if schema.startswith("_pg_") else schema for schema in schemas)
        named = ", ".join(runs[:_TOLD]) + (f" and {len(runs) - _TOLD} more" if len(runs) > _TOLD else "")
        return StoreError(
            f"there is no run {'' if self._run is None else f'{self._run} '}in {self._shown}",
            hint=f"there are, for ?{RUN}=NAME in the URL: {named}" if runs else "nor is there any other",
        )

    def insert_once(self, table: Table) -> Any:
        return insert(table).on_conflict_do_nothing()

    def is_passing(self, error: SQLAlchemyError) -> bool:
        if not isinstance(error, DBAPIError):
            return False
        state = getattr(error.orig, "sqlstate", None)
        if state is not None:
            return state in _PASSING_STATES or state.startswith("08")
        if error.connection_invalidated:
            return True
        is_refused = any(text in str(error.orig) for text in _REFUSED)
        return type(error.orig).__name__ in ("OperationalError", "ConnectionTimeout") and not is_refused

    def hint(self, error: Exception) -> str | None:
        reason = str(getattr(error, "orig", None) or error)
        return next((hint for text, hint in HINTS.items() if text in reason), None)


def _version(connection: Connection) -> int:
    return int(connection.execute(version_table.select()).scalar_one())


def run_url(url: str, run: str) -> str:
    """The place of one run's store in a database that several runs share; a URL that names a run is kept as it is."""
    if re.search(rf"[?&]{RUN}=", url):
        return url
    return f"{url}{'&' if '?' in url else '?'}{RUN}={quote(run)}"


def _with_environment(place: str) -> str:
    """A variable may hold the whole URL, which then may be added to, or a part of it: that is percent-encoded."""

    def value(found: re.Match[str]) -> str:
        name = found["name"]
        if name not in os.environ:
            raise StoreError(f"the environment variable {name}, which the episode store's URL names, is not set")
        known = os.environ[name]
        return known if found.start() == 0 else quote(known, safe="")

    expanded = re.sub(r"\$\{(?P<name>\w+)\}", value, place)
    if place.startswith("${"):
        address, mark, query = expanded.partition("?")
        return address + mark + query.replace("?", "&")
    return expanded
