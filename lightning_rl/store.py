"""The episode store: what agents, server and trainer record, in one SQLite file that all processes of a run share.

A write has returned only when it is committed, so it survives the death of any process at any moment (after a power cut
the file is intact, but the last commits may be missing: WAL with `synchronous=NORMAL`). Episodes and calls are
idempotent by id, spans by id within their episode. Threads and processes may use the file at once; a `Store` itself
must not be carried across a fork. The tables are in `store_schema`; what the records mean is in `episode`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import msgspec
from msgspec import Struct
from sqlalchemy import Connection, Engine, Row, Select, Table, func, select
from sqlalchemy.dialects.sqlite import insert

from lightning_rl.episode import Call, Episode, EpisodeStart, Outcome, Reward, Span
from lightning_rl.errors import StoreError
from lightning_rl.store_engine import open_engine, store_errors, writing
from lightning_rl.store_schema import (
    SCHEMA_VERSION,
    UPGRADES,
    call_of,
    call_row,
    calls,
    dump_json,
    episode_of,
    episodes,
    metadata,
    reward_of,
    rewards,
    span_of,
    span_row,
    spans,
    start_of,
    start_row,
)

EPISODE_ORDER = (episodes.c.step, episodes.c.task_id, episodes.c.sample, episodes.c.attempt, episodes.c.id)


class EpisodeSummary(Struct, frozen=True, kw_only=True):
    """An episode in a list, without its tokens."""

    id: str
    phase: str
    step: int
    task_id: str
    sample: int
    attempt: int
    outcome: Outcome | None
    counted: bool
    calls: int
    sampled_tokens: int
    rewards: dict[str, float]
    """By name; values of the same name are added up."""
    started_at: float
    ended_at: float


class Store:
    """An open episode store. Every method is a transaction of its own and raises StoreError if it cannot be done."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._writer = writing(engine)

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Open the file, or make it. Also takes an SQLAlchemy URL, `sqlite:///PATH`."""
        store = cls(open_engine(path))
        try:
            with store._writing("open") as connection:
                _prepare(connection)
        except BaseException:
            store.close()
            raise
        return store

    def close(self) -> None:
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self, start: EpisodeStart) -> None:
        with self._writing() as connection:
            connection.execute(insert(episodes).values(start_row(start)).on_conflict_do_nothing())

    def add_call(self, call: Call) -> None:
        row = call_row(call)
        with self._writing() as connection:
            _require(connection, call.episode_id)
            connection.execute(insert(calls).values(row).on_conflict_do_nothing())

    def add_spans(self, spans: Iterable[Span]) -> None:
        with self._writing() as connection:
            _insert_spans(connection, list(spans))

    def add_rewards(self, rewards: Iterable[Reward]) -> None:
        with self._writing() as connection:
            _insert_rewards(connection, list(rewards))

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
        ended_at: float,
    ) -> None:
        """Record how the episode ended, with its last spans and rewards; ending it so once more does nothing."""
        values = {
            "outcome": outcome.value,
            "answer": None if answer is None else dump_json(answer, f"the answer of episode {episode_id}"),
            "error": error,
            "counted": counted,
            "ended_at": ended_at,
        }
        with self._writing() as connection:
            before = _require(connection, episode_id).outcome
            if before is None:
                connection.execute(episodes.update().where(episodes.c.id == episode_id).values(values))
                _insert_spans(connection, list(spans))
                _insert_rewards(connection, list(rewards))
            elif before != outcome.value:
                raise StoreError(f"episode {episode_id} has ended as {before} and cannot end again as {outcome.value}")

    def start_of(self, episode_id: str) -> EpisodeStart | None:
        with self._reading() as connection:
            row = connection.execute(select(episodes).where(episodes.c.id == episode_id)).one_or_none()
        return None if row is None else start_of(row)

    def call_count(self, episode_id: str) -> int:
        with self._reading() as connection:
            query = select(func.count()).select_from(calls).where(calls.c.episode_id == episode_id)
            return connection.execute(query).scalar_one()

    def next_call_index(self, episode_id: str) -> int:
        """One more than the highest; calls that were lost leave gaps."""
        with self._reading() as connection:
            query = select(func.max(calls.c.index)).where(calls.c.episode_id == episode_id)
            highest = connection.execute(query).scalar_one()
        return 0 if highest is None else highest + 1

    def episode(self, episode_id: str) -> Episode:
        with self._reading() as connection:
            _require(connection, episode_id)
            (episode,) = _load(connection, select(episodes).where(episodes.c.id == episode_id))
        return episode

    def episodes(
        self, *, phase: str | None = None, step: int | None = None, counted_only: bool = False
    ) -> list[Episode]:
        """In the order of step, task id, sample and attempt."""
        query = _filtered(select(episodes), phase, step)
        if counted_only:
            query = query.where(episodes.c.counted)
        with self._reading() as connection:
            return _load(connection, query)

    def starts(self, *, phase: str | None = None, step: int | None = None) -> list[EpisodeSummary]:
        """As `episodes`, without the tokens."""
        query = _filtered(select(episodes), phase, step)
        with self._reading() as connection:
            return _summaries(connection, query)

    @contextmanager
    def _writing(self, doing: str = "write to") -> Iterator[Connection]:
        with store_errors(self._engine.url, doing), self._writer.begin() as connection:
            yield connection

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        with store_errors(self._engine.url, "read"), self._engine.begin() as connection:
            yield connection


def _prepare(connection: Connection) -> None:
    """Make the tables of a new file, bring those of an older version up to date; refuse a file of a newer version."""
    version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
    if not 0 <= version <= SCHEMA_VERSION:
        raise StoreError(
            f"{connection.engine.url.database} has version {version} of the episode store, this is version "
            f"{SCHEMA_VERSION}",
            hint="open it with the release of Lightning RL that made it",
        )
    if version == 0:
        metadata.create_all(connection)
    else:
        for older in range(version, SCHEMA_VERSION):
            for statement in UPGRADES[older]:
                connection.exec_driver_sql(statement)
    if version != SCHEMA_VERSION:
        connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _require(connection: Connection, episode_id: str) -> Row[Any]:
    row = connection.execute(select(episodes.c.outcome).where(episodes.c.id == episode_id)).one_or_none()
    if row is None:
        raise StoreError(f"no episode {episode_id} in {connection.engine.url.database}")
    return row


def _insert_spans(connection: Connection, records: Sequence[Span]) -> None:
    for episode_id in {span.episode_id for span in records}:
        _require(connection, episode_id)
    if records:
        connection.execute(insert(spans).on_conflict_do_nothing(), [span_row(span) for span in records])


def _insert_rewards(connection: Connection, records: Sequence[Reward]) -> None:
    for reward in records:
        if not math.isfinite(reward.value):
            raise StoreError(f"reward {reward.name!r} of episode {reward.episode_id} is {reward.value}, not a number")
    for episode_id in {reward.episode_id for reward in records}:
        _require(connection, episode_id)
    if records:
        connection.execute(rewards.insert(), [msgspec.structs.asdict(reward) for reward in records])


def _filtered(query: Select[Any], phase: str | None, step: int | None) -> Select[Any]:
    if phase is not None:
        query = query.where(episodes.c.phase == phase)
    if step is not None:
        query = query.where(episodes.c.step == step)
    return query


def _load(connection: Connection, query: Select[Any]) -> list[Episode]:
    rows = connection.execute(query.order_by(*EPISODE_ORDER)).all()
    of_query = query.with_only_columns(episodes.c.id)

    def by_episode(table: Table, *order: Any) -> dict[str, list[Row[Any]]]:
        found: dict[str, list[Row[Any]]] = {row.id: [] for row in rows}
        for row in connection.execute(select(table).where(table.c.episode_id.in_(of_query)).order_by(*order)):
            found[row.episode_id].append(row)
        return found

    call_rows = by_episode(calls, calls.c.index, calls.c.id)
    span_rows = by_episode(spans, spans.c.started_at, spans.c.id)
    reward_rows = by_episode(rewards, rewards.c.number)
    return [
        episode_of(
            row,
            calls=[call_of(call) for call in call_rows[row.id]],
            spans=[span_of(span) for span in span_rows[row.id]],
            rewards=[reward_of(reward) for reward in reward_rows[row.id]],
        )
        for row in rows
    ]


def _summaries(connection: Connection, query: Select[Any]) -> list[EpisodeSummary]:
    of_query = query.with_only_columns(episodes.c.id)
    call_query = (
        select(calls.c.episode_id, func.count(), func.sum(calls.c.sampled_tokens))
        .where(calls.c.episode_id.in_(of_query))
        .group_by(calls.c.episode_id)
    )
    reward_query = (
        select(rewards.c.episode_id, rewards.c.name, func.sum(rewards.c.value))
        .where(rewards.c.episode_id.in_(of_query))
        .group_by(rewards.c.episode_id, rewards.c.name)
        .order_by(func.min(rewards.c.number))
    )
    counts = {episode_id: (number, tokens) for episode_id, number, tokens in connection.execute(call_query)}
    values: dict[str, dict[str, float]] = {}
    for episode_id, name, value in connection.execute(reward_query):
        values.setdefault(episode_id, {})[name] = value
    return [
        EpisodeSummary(
            id=row.id,
            phase=row.phase,
            step=row.step,
            task_id=row.task_id,
            sample=row.sample,
            attempt=row.attempt,
            outcome=None if row.outcome is None else Outcome(row.outcome),
            counted=row.counted,
            calls=counts.get(row.id, (0, 0))[0],
            sampled_tokens=counts.get(row.id, (0, 0))[1],
            rewards=values.get(row.id, {}),
            started_at=row.started_at,
            ended_at=row.ended_at,
        )
        for row in connection.execute(query.order_by(*EPISODE_ORDER))
    ]
