"""The episode store: what agents, server and trainer record, in one database that all processes of a run share.

A path is an SQLite file, `postgresql://…` a database (see `store.postgres`). A write has returned only when it is committed,
so it survives the death of any process of ours at any moment. When the machine loses power, a file stays intact, but its
last commits may be missing (WAL with `synchronous=NORMAL`); PostgreSQL keeps them, unless its server is told otherwise. All
writes are idempotent: episodes and calls by id, spans by id within their episode, rewards by what they say, or by the span
of OpenTelemetry's that said them. So they are tried again when the connection to a server is lost. An episode that has ended
changes no more, since it may have been trained on: a call that comes later is refused, and what was on its way (calls that
were broken off, spans, links, rewards) is left out and logged. Threads and processes may use a store at once; a `Store`
itself must not be carried across a fork. What the records mean is in `episode`, the tables are in `store.schema`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from sqlalchemy import Connection, Row, Select, bindparam, func, select
from sqlalchemy.exc import SQLAlchemyError

from lightning_rl.episode import Call, CallLink, Episode, EpisodeStart, Outcome, Reward, Span
from lightning_rl.errors import EpisodeEnded, StoreError
from lightning_rl.otlp.read import Received
from lightning_rl.store.calls import CallWriter, Prepared
from lightning_rl.store.deltas import Base
from lightning_rl.store.engine import Transactions, database_at
from lightning_rl.store.reading import (
    EPISODE_ORDER,
    EpisodeSummary,
    filtered,
    load_base,
    load_call,
    load_calls,
    load_episodes,
    load_summaries,
)
from lightning_rl.store.received import Late, fold, link_calls, missing
from lightning_rl.store.rows import Values, as_stored, begins, end_row, reward_rows, span_row, start_of, start_row
from lightning_rl.store.schema import calls, episodes, rewards, spans

__all__ = ["EpisodeSummary", "Store"]

T = TypeVar("T")
OPENING_PATIENCE_S = 5.0
BROUGHT_UP_TO_DATE = (
    "`lrl traces list RUN` brings it up to date, once no older release uses it: older ones cannot go on with it then"
)
logger = logging.getLogger("lrl.store")

# Statements are made once: SQLAlchemy takes longer to make them than SQLite takes to run them.
_OUTCOME = select(episodes.c.outcome).where(episodes.c.id == bindparam("wanted"))
_OUTCOME_LOCKED = _OUTCOME.with_for_update(key_share=True)
_OUTCOME_SHARED = _OUTCOME.with_for_update(read=True)
_START = select(episodes).where(episodes.c.id == bindparam("wanted"))
_PLACE = calls.update().where(calls.c.id == bindparam("which")).values(span_id=bindparam("maker"))
_HIGHEST_INDEX = select(func.max(calls.c.index)).where(calls.c.episode_id == bindparam("wanted"))


class Store:
    """An open episode store. Every method is a transaction of its own and raises StoreError if it cannot be done."""

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions
        self._database = transactions.database
        self._calls = CallWriter(self._load_base)
        self._insertions = {
            table.name: self._database.insert_once(table) for table in (episodes, calls, spans, rewards)
        }

    @classmethod
    def open(cls, place: Path | str, *, create: bool = True, upgrade: bool = True) -> Self:
        """Open the file or database, and make what is missing in it. Also takes `sqlite:///PATH`.

        Without `create`, as for those who only read, it must be there; a file may be one that cannot be written to. One of an
        earlier version is brought up to date all the same, which takes the right to write, or without `upgrade` refused.
        With neither of them a file is opened so that it cannot be written to.
        """
        database = database_at(place, create=create, upgrade=upgrade)
        transactions = Transactions(database)
        patience_s = min(database.patience_s, OPENING_PATIENCE_S)
        try:
            if transactions.read(database.must_prepare, "open", patience_s):
                if not upgrade:
                    raise StoreError(f"{database.place} was recorded by an earlier version", hint=BROUGHT_UP_TO_DATE)
                _prepare(transactions, create, patience_s)
        except BaseException:
            transactions.close()
            raise
        return cls(transactions)

    @property
    def place(self) -> str:
        """For messages: a path, or a URL without secrets."""
        return self._database.place

    def close(self) -> None:
        self._transactions.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self, start: EpisodeStart) -> None:
        row = start_row(start)
        self._transactions.write(lambda connection: self._insert(connection, episodes, [row]))

    def add_call(self, call: Call) -> None:
        self.add_calls([call])

    def add_calls(self, calls: Sequence[Call], spans: Sequence[Span] = ()) -> None:
        """All of them or none. Whoever has to know which one is at fault adds them one by one.

        Raises EpisodeEnded for a new call of an episode that has ended; one that was broken off (`abort`) is left out.
        """
        prepared = self._calls.prepare(calls)
        span_rows = [span_row(span) for span in spans]

        def write(connection: Connection) -> list[Prepared]:
            self._insert_records(connection, span_rows=span_rows)
            return self._insert_calls(connection, prepared)

        self._calls.committed(self._transactions.write_often(write))

    def add_spans(self, spans: Iterable[Span]) -> None:
        rows = [span_row(span) for span in spans]
        self._transactions.write(lambda connection: self._insert_records(connection, span_rows=rows))

    def add_rewards(self, rewards: Iterable[Reward]) -> None:
        """Rewards that are equal in everything, their time included, count each if they are given in one call of this."""
        rows = reward_rows(list(rewards))
        self._transactions.write(lambda connection: self._insert_records(connection, reward_rows=rows))

    def add_links(self, links: Iterable[CallLink]) -> None:
        """Say which spans made calls. A link to a response that no recorded call gave changes nothing."""
        said = list(links)

        def write(connection: Connection) -> None:
            ended = self._ended(connection, {link.episode_id for link in said})
            _link(connection, [link for link in said if link.episode_id not in ended])

        self._transactions.write(write)

    def add_received(self, episode_id: str, received: Received) -> Late:
        """What the agent's own instrumentation says. Returns what is left out, since it came after the episode's end."""
        span_rows, rows = [span_row(span) for span in received.spans], reward_rows(received.rewards)
        rows = [row | {"key": key} for row, key in zip(rows, received.reward_keys, strict=True)]

        def write(connection: Connection) -> Late:
            if self._require(connection, episode_id, _OUTCOME_LOCKED).outcome is not None:
                return missing(connection, episode_id, span_rows, rows)
            self._insert_records(connection, span_rows=span_rows, reward_rows=rows)
            fold(connection, episode_id, received.folded)
            link_calls(connection, received.links)
            return Late()

        return self._transactions.write(write)

    def end(
        self,
        episode_id: str,
        outcome: Outcome,
        *,
        answer: Any = None,
        error: str | None = None,
        counted: bool,
        spans: Iterable[Span] = (),
        rewards: Iterable[Reward] = (),
        links: Iterable[CallLink] = (),
        ended_at: float,
    ) -> None:
        """Record how the episode ended, with its last spans, rewards and links; ending it so once more does nothing."""
        values = end_row(episode_id, outcome, answer, error, counted, ended_at)
        span_rows, rows, said = [span_row(span) for span in spans], reward_rows(list(rewards)), list(links)

        def write(connection: Connection) -> None:
            before = self._require(connection, episode_id, _OUTCOME_LOCKED).outcome
            if before is None:
                self._insert_records(connection, span_rows=span_rows, reward_rows=rows)
                _link(connection, said)
                connection.execute(episodes.update().where(episodes.c.id == episode_id).values(values))
            elif before != outcome.value:
                raise StoreError(f"episode {episode_id} has ended as {before} and cannot end again as {outcome.value}")

        self._transactions.write(write)
        self._calls.forget(episode_id)

    def add_episode(self, episode: Episode) -> None:
        """A whole episode, recorded elsewhere. One that is there must be the same, or the unfinished beginning of it.

        Raises StoreError, and leaves the store as it was, if what is there then would not be the episode that was given.
        """
        start, prepared = start_row(episode.start), self._calls.prepare(episode.calls)
        span_rows, rows = [span_row(span) for span in episode.spans], reward_rows(episode.rewards)
        end: Values = {}
        if episode.outcome is not None:
            end = end_row(episode.id, episode.outcome, episode.answer, episode.error, episode.counted, episode.ended_at)

        wanted = as_stored(episode)

        places = [{"which": call.id, "maker": call.span_id} for call in episode.calls]

        def there(connection: Connection) -> list[Episode]:
            return load_episodes(connection, select(episodes).where(episodes.c.id == episode.id))

        def write(connection: Connection) -> None:
            self._insert(connection, episodes, [start])
            self._require(connection, episode.id, _OUTCOME_LOCKED)
            (before,) = there(connection)
            if as_stored(before) == wanted:
                return
            if not begins(before, episode):
                raise StoreError(
                    f"{self.place} has another episode {episode.id}, with other content",
                    hint="episodes of two runs have the same ids: keep each run in a database, or schema (?run=NAME), of its own",
                )
            for table in (spans, rewards):  # links and folds have changed them since
                connection.execute(table.delete().where(table.c.episode_id == episode.id))
            self._insert_calls(connection, prepared)
            if places:
                connection.execute(_PLACE, places)
            self._insert_records(connection, span_rows=span_rows, reward_rows=rows)
            if end:
                connection.execute(episodes.update().where(episodes.c.id == episode.id).values(end))
            if [as_stored(one) for one in there(connection)] != [wanted]:
                raise StoreError(f"{self.place} does not give episode {episode.id} back as it is")

        self._transactions.write(write)

    def read(self, work: Callable[[Connection], T]) -> T:
        """For those who read by queries of their own (`store.browsing`). They must not write."""
        return self._transactions.read(work)

    def start_of(self, episode_id: str) -> EpisodeStart | None:
        wanted = {"wanted": episode_id}
        row = self._transactions.read(lambda connection: connection.execute(_START, wanted).one_or_none())
        return None if row is None else start_of(row)

    def has_ended(self, episode_id: str) -> bool:
        wanted = {"wanted": episode_id}
        return self._transactions.read(lambda connection: connection.execute(_OUTCOME, wanted).scalar()) is not None

    def call_count(self, episode_id: str) -> int:
        query = select(func.count()).select_from(calls).where(calls.c.episode_id == episode_id)
        return self._transactions.read(lambda connection: connection.execute(query).scalar_one())

    def next_call_index(self, episode_id: str) -> int:
        """One more than the highest; calls that were lost leave gaps."""
        wanted = {"wanted": episode_id}
        highest = self._transactions.read(lambda connection: connection.execute(_HIGHEST_INDEX, wanted).scalar_one())
        return 0 if highest is None else highest + 1

    def call(self, call_id: str) -> Call | None:
        return self._transactions.read(lambda connection: load_call(connection, call_id))

    def calls_beginning(self, episode_id: str, beginning: str) -> list[Call]:
        """The calls of an episode whose ids begin so, in order: costs as much as they hold."""
        return self._transactions.read(lambda connection: load_calls(connection, episode_id, beginning))

    def episode(self, episode_id: str) -> Episode:
        def read(connection: Connection) -> Episode:
            self._require(connection, episode_id)
            (episode,) = load_episodes(connection, select(episodes).where(episodes.c.id == episode_id))
            return episode

        return self._transactions.read(read)

    def episodes(
        self, *, phase: str | None = None, step: int | None = None, counted_only: bool = False
    ) -> list[Episode]:
        """In the order of step, task id, sample and attempt."""
        query = filtered(select(episodes), phase, step, counted_only)
        return self._transactions.read(lambda connection: load_episodes(connection, query))

    def episode_ids(
        self, *, phase: str | None = None, step: int | None = None, counted_only: bool = False
    ) -> list[str]:
        """Of `episodes`, in their order: for those who take them one by one."""
        query = filtered(select(episodes.c.id), phase, step, counted_only).order_by(*EPISODE_ORDER)
        return list(self._transactions.read(lambda connection: connection.execute(query).scalars().all()))

    def starts(self, *, phase: str | None = None, step: int | None = None) -> list[EpisodeSummary]:
        """As `episodes`, without the tokens."""
        query = filtered(select(episodes), phase, step, False)
        return self._transactions.read(lambda connection: load_summaries(connection, query))

    def _load_base(self, episode_id: str, call_id: str | None) -> Base | None:
        return self._transactions.read(lambda connection: load_base(connection, episode_id, call_id))

    def _insert(self, connection: Connection, table: Any, rows: Sequence[Values]) -> None:
        if rows:
            connection.execute(self._insertions[table.name], rows)

    def _insert_calls(self, connection: Connection, prepared: Sequence[Prepared]) -> list[Prepared]:
        ended = self._ended(connection, {ready.call.episode_id for ready in prepared})
        if ended:
            self._refuse_new(connection, [ready.call for ready in prepared if ready.call.episode_id in ended])
            prepared = [ready for ready in prepared if ready.call.episode_id not in ended]
        return self._calls.insert(connection, self._insertions[calls.name], prepared)

    def _refuse_new(self, connection: Connection, late: Sequence[Call]) -> None:
        there = select(calls.c.id).where(calls.c.id.in_([call.id for call in late]))
        known = set(connection.execute(there).scalars())  # they were committed before the connection was lost
        new = [call for call in late if call.id not in known]
        for call in new:
            if call.finish_reason != "abort":
                raise EpisodeEnded(f"episode {call.episode_id} has ended: it takes no more calls")
        for call in new:
            logger.info("call %s was broken off by the end of episode %s and is left out", call.id, call.episode_id)

    def _insert_records(
        self, connection: Connection, span_rows: Sequence[Values] = (), reward_rows: Sequence[Values] = ()
    ) -> None:
        ended = self._ended(connection, {row["episode_id"] for row in (*span_rows, *reward_rows)})
        for table, rows in ((spans, span_rows), (rewards, reward_rows)):
            kept = [row for row in rows if row["episode_id"] not in ended] if ended else rows
            if len(kept) < len(rows):
                logger.info("%s %s came after the end of their episode: left out", len(rows) - len(kept), table.name)
            self._insert(connection, table, kept)

    def _ended(self, connection: Connection, ids: Collection[str]) -> set[str]:
        """Those that have; the others do not before this transaction does."""
        return {id for id in ids if self._require(connection, id, _OUTCOME_SHARED).outcome is not None}

    def _require(self, connection: Connection, episode_id: str, query: Select[Any] = _OUTCOME) -> Row[Any]:
        row = connection.execute(query, {"wanted": episode_id}).one_or_none()
        if row is None:
            raise StoreError(f"no episode {episode_id} in {self.place}")
        return row


def _prepare(transactions: Transactions, create: bool, patience_s: float) -> None:
    database = transactions.database
    if create:
        transactions.write(database.prepare, "open", patience_s)
        return
    try:
        transactions.write(database.prepare, "bring up to date", patience_s)
    except StoreError as error:
        cause = error.__cause__
        if not isinstance(cause, SQLAlchemyError) or database.is_passing(cause):  # a lock is no lack of rights
            raise
        raise StoreError(
            str(error),
            hint="an earlier version of Lightning RL made it: open it once with the right to write (a file and its folder; in "
            "PostgreSQL as the owner of its tables), or read it with that version",
        ) from error


def _link(connection: Connection, links: Iterable[CallLink]) -> None:
    for link in links:
        if link.span_id and link.response_id:
            of_call = (calls.c.episode_id == link.episode_id, calls.c.response_id == link.response_id)
            connection.execute(calls.update().where(*of_call).values(span_id=link.span_id))
