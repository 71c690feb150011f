"""What those need who browse very many episodes: lists in columns, without reading what is long; and what was said, cut short.

An episode's place in the order of recording is SQLite's row id, which only grows; PostgreSQL has none, so there all ids are
read again whenever their number has changed. Callers read in pieces, each in a transaction of its own, so that a run that is
writing can tidy up its file in between.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from msgspec import Struct
from sqlalchemy import Connection, Select, bindparam, func, literal_column, select

from lightning_rl.store.schema import calls, episodes, rewards, spans

_PLACE: Any = literal_column("episodes.rowid")
_IN_ORDER = (episodes.c.started_at, episodes.c.id)
_LISTED = (
    "id",
    "phase",
    "step",
    "task_id",
    "sample",
    "attempt",
    "group",
    "started_at",
    "outcome",
    "counted",
    "ended_at",
)


class Listing(Struct, frozen=True, kw_only=True):
    """Episodes in columns, as they are stored."""

    id: list[str]
    phase: list[str]
    step: list[int]
    task: list[str]
    sample: list[int]
    attempt: list[int]
    group: list[str]
    started_at: list[float]
    outcome: list[str | None]
    counted: list[bool]
    ended_at: list[float]
    calls: list[int]
    tokens: list[int]
    """Sampled."""
    rewards: list[dict[str, float]]
    """By name; values of the same name are added up."""


class News(NamedTuple):
    ids: list[str]
    """In the order of recording; from PostgreSQL those that were known are among them."""
    mark: int


def number_of_episodes(connection: Connection) -> int:
    return connection.execute(select(func.count()).select_from(episodes)).scalar_one()


def first_episode(connection: Connection) -> tuple[str, float] | None:
    """Id and time: two stores at the same place, one after the other, do not agree in both."""
    order = (_PLACE,) if _is_sqlite(connection) else _IN_ORDER
    row = connection.execute(select(episodes.c.id, episodes.c.started_at).order_by(*order).limit(1)).one_or_none()
    return None if row is None else (row.id, row.started_at)


def recorded_since(connection: Connection, mark: int) -> News:
    """`mark` is that of the news before; 0 for all."""
    if _is_sqlite(connection):
        found = connection.execute(select(episodes.c.id, _PLACE).where(_PLACE.op(">")(mark)).order_by(_PLACE)).all()
        return News([row[0] for row in found], found[-1][1] if found else mark)
    count = number_of_episodes(connection)
    if count == mark:
        return News([], mark)
    return News(list(connection.execute(select(episodes.c.id).order_by(*_IN_ORDER)).scalars()), count)


def latest(connection: Connection, limit: int) -> list[str]:
    """Ids of the episodes that were recorded last, the last first."""
    order = (_PLACE,) if _is_sqlite(connection) else _IN_ORDER
    query = select(episodes.c.id).order_by(*(column.desc() for column in order)).limit(limit)
    return list(connection.execute(query).scalars())


def listing(connection: Connection, ids: Sequence[str]) -> Listing:
    """Of the episodes with these ids, in their order; those that are not there are left out."""
    columns = (episodes.c[name] for name in _LISTED)
    rows = {row[0]: row for row in _of(connection, select(*columns), episodes.c.id, ids)}
    found = [rows[id] for id in ids if id in rows]
    count_query = select(calls.c.episode_id, func.count(), func.sum(calls.c.sampled_tokens))
    counted = _of(connection, count_query.group_by(calls.c.episode_id), calls.c.episode_id, ids)
    counts = {row[0]: (row[1], int(row[2])) for row in counted}
    values: dict[str, dict[str, float]] = {}
    given = select(rewards.c.episode_id, rewards.c.name, rewards.c.value).order_by(rewards.c.number)
    for id, name, value in _of(connection, given, rewards.c.episode_id, ids):
        of_episode = values.setdefault(id, {})
        of_episode[name] = of_episode.get(name, 0.0) + value
    turned = [list(column) for column in zip(*found, strict=True)] or [[] for _ in _LISTED]
    named = dict(zip(("id", "phase", "step", "task", *_LISTED[4:]), turned, strict=True))
    return Listing(
        **named,
        calls=[counts.get(row[0], (0, 0))[0] for row in found],
        tokens=[counts.get(row[0], (0, 0))[1] for row in found],
        rewards=[values.get(row[0], {}) for row in found],
    )


class SaidSpan(NamedTuple):
    id: str
    name: str
    kind: str
    parent_id: str | None
    started_at: float
    attributes: str
    error: str | None


class SaidCall(NamedTuple):
    id: str
    span_id: str | None
    agent: str
    base_id: str | None
    versions: bytes
    request: str
    """As it is stored: what differs from the base's."""
    response: str


class Said(Struct, frozen=True, kw_only=True):
    """What task, agents, model and tools said in an episode, and who made its calls. Texts are JSON but for errors."""

    id: str
    is_over: bool
    task: str
    task_input: str
    answer: str | None
    error: str | None
    spans: list[SaidSpan]
    calls: Iterator[SaidCall]
    """In order; to be read before the next episode."""


def said(connection: Connection, ids: Sequence[str], longest: int) -> Iterator[Said]:
    """Of the episodes with these ids that are there. Of each text the first `longest` characters."""

    def cut(column: Any) -> Any:
        return func.substr(column, 1, longest)

    texts = (cut(episodes.c[name]) for name in ("task_input", "answer", "error"))
    starts = _of(connection, select(episodes.c.id, episodes.c.outcome, episodes.c.task_id, *texts), episodes.c.id, ids)
    places = [spans.c[name] for name in ("episode_id", *SaidSpan._fields[:5])]
    of_spans: dict[str, list[SaidSpan]] = {}
    for id, *rest in _of(
        connection, select(*places, *map(cut, spans.c["attributes", "error"])), spans.c.episode_id, ids
    ):
        of_spans.setdefault(id, []).append(SaidSpan(*rest))
    making = [calls.c[name] for name in SaidCall._fields[:5]]
    query = select(*making, *map(cut, calls.c["request", "response"])).where(calls.c.episode_id == bindparam("episode"))
    query = query.order_by(calls.c.index, calls.c.id)
    for id, outcome, task, task_input, answer, error in starts:
        with connection.execute(query, {"episode": id}) as rows:
            yield Said(
                id=id,
                is_over=outcome is not None,
                task=task,
                task_input=task_input,
                answer=answer,
                error=error,
                spans=of_spans.get(id, []),
                calls=(SaidCall(*row) for row in rows),
            )


def _of(connection: Connection, query: Select[Any], column: Any, ids: Sequence[str]) -> Sequence[Any]:
    """Rows of these episodes. One parameter for all ids: thousands would take SQLAlchemy longer than SQLite."""
    if not _is_sqlite(connection):
        return connection.execute(query.where(column.in_(ids))).all()
    wanted = func.json_each(bindparam("ids")).table_valued("value")
    return connection.execute(query.where(column.in_(select(wanted.c.value))), {"ids": json.dumps(ids)}).all()


def _is_sqlite(connection: Connection) -> bool:
    return connection.dialect.name == "sqlite"
