"""How episodes, single calls and lists are read from the episode store.

A call's prompt and request are put together from its base, the base's base, and so on (`store.deltas`): reading a call costs
as much as it holds, reading an episode as much as its calls hold. A base that is missing or does not fit is a StoreError.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from msgspec import Struct
from sqlalchemy import Connection, Row, Select, Table, bindparam, func, select

from lightning_rl.episode import Call, Episode, Outcome
from lightning_rl.errors import StoreError
from lightning_rl.store.deltas import ID_BYTES, Base, Texts, read_request
from lightning_rl.store.rows import UNREADABLE, call_of, damaged, episode_of, outcome_of, reward_of, span_of
from lightning_rl.store.schema import calls, episodes, rewards, spans

EPISODE_ORDER = (episodes.c.step, episodes.c.task_id, episodes.c.sample, episodes.c.attempt, episodes.c.id)
_LISTED = ("id", "phase", "step", "task_id", "sample", "attempt", "outcome", "counted", "started_at", "ended_at")
_CHAINED = ("id", "episode_id", "base_id", "base_tokens", "prompt_ids", "sampled_ids", "request")


def _chain_query() -> Select[Any]:
    chain = select(calls.c.id, calls.c.base_id).where(calls.c.id == bindparam("wanted")).cte("chain", recursive=True)
    chain = chain.union(select(calls.c.id, calls.c.base_id).where(calls.c.id == chain.c.base_id))
    return select(*(calls.c[name] for name in _CHAINED)).where(calls.c.id.in_(select(chain.c.id)))


_CHAIN = _chain_query()


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


class Content(Struct, frozen=True):
    """A call's prompt and request, put together."""

    sequence: bytes
    """Prompt + sampled ids, packed."""
    prompt_bytes: int
    request: Texts

    def call(self, row: Row[Any]) -> Call:
        prompt, sampled = self.sequence[: self.prompt_bytes], self.sequence[self.prompt_bytes :]
        return call_of(row, prompt, sampled, self.request)


def filtered(query: Select[Any], phase: str | None, step: int | None, counted_only: bool) -> Select[Any]:
    if phase is not None:
        query = query.where(episodes.c.phase == phase)
    if step is not None:
        query = query.where(episodes.c.step == step)
    if counted_only:
        query = query.where(episodes.c.counted)
    return query


def load_episodes(connection: Connection, query: Select[Any], without: Container[str] = ()) -> list[Episode]:
    """`query` selects rows of episodes; `without`: columns of their calls that are left where they are."""
    rows = connection.execute(query.order_by(*EPISODE_ORDER)).all()
    of_query = query.with_only_columns(episodes.c.id)

    def by_episode(table: Table, *order: Any) -> dict[str, list[Row[Any]]]:
        found: dict[str, list[Row[Any]]] = {row.id: [] for row in rows}
        columns = [column for column in table.c if column.name not in without]
        for row in connection.execute(select(*columns).where(table.c.episode_id.in_(of_query)).order_by(*order)):
            if row.episode_id in found:
                found[row.episode_id].append(row)
        return found

    call_rows = by_episode(calls, calls.c.index, calls.c.id)
    span_rows = by_episode(spans, spans.c.started_at, spans.c.id)
    reward_rows = by_episode(rewards, rewards.c.number)
    return [
        episode_of(
            row,
            calls=_calls_of(call_rows[row.id]),
            spans=[span_of(span) for span in span_rows[row.id]],
            rewards=[reward_of(reward) for reward in reward_rows[row.id]],
        )
        for row in rows
    ]


def load_call(connection: Connection, call_id: str) -> Call | None:
    row = connection.execute(select(calls).where(calls.c.id == call_id)).one_or_none()
    if row is None:
        return None
    return _last(_chain(connection, call_id), call_id).call(row)


def load_calls(connection: Connection, episode_id: str, beginning: str) -> list[Call]:
    """Those whose ids begin so, in order."""
    of_episode = (calls.c.episode_id == episode_id, calls.c.id.startswith(beginning, autoescape=True))
    ids = connection.execute(select(calls.c.id).where(*of_episode).order_by(calls.c.index, calls.c.id)).scalars().all()
    return [call for call in (load_call(connection, id) for id in ids) if call is not None]


def load_base(connection: Connection, episode_id: str, call_id: str | None) -> Base | None:
    """A call of the episode, by default its latest, as a base for the next; None if there is no such call."""
    query = select(calls.c.id).where(calls.c.episode_id == episode_id)
    if call_id is not None:
        query = query.where(calls.c.id == call_id)
    found = connection.execute(query.order_by(calls.c.index.desc(), calls.c.id).limit(1)).scalar_one_or_none()
    if found is None:
        return None
    content = _last(_chain(connection, found), found)
    return Base(found, content.sequence, content.request)


def load_summaries(connection: Connection, query: Select[Any]) -> list[EpisodeSummary]:
    """`query` selects rows of episodes."""
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
    counts = {episode_id: (number, int(tokens or 0)) for episode_id, number, tokens in connection.execute(call_query)}
    values: dict[str, dict[str, float]] = {}
    for episode_id, name, value in connection.execute(reward_query):
        values.setdefault(episode_id, {})[name] = value
    listed = query.with_only_columns(*(episodes.c[name] for name in _LISTED)).order_by(*EPISODE_ORDER)
    return [
        EpisodeSummary(
            **row._asdict() | {"outcome": outcome_of(row)},
            calls=counts.get(row.id, (0, 0))[0],
            sampled_tokens=counts.get(row.id, (0, 0))[1],
            rewards=values.get(row.id, {}),
        )
        for row in connection.execute(listed)
    ]


def _calls_of(rows: Sequence[Row[Any]]) -> list[Call]:
    contents = contents_of(rows)
    return [contents[row.id].call(row) for row in rows]


def _chain(connection: Connection, call_id: str) -> Sequence[Row[Any]]:
    """The call, its base, the base's base, and so on."""
    return connection.execute(_CHAIN, {"wanted": call_id}).all()


def _last(rows: Sequence[Row[Any]], call_id: str) -> Content:
    """Of a chain only the end is kept."""
    by_id = {row.id: row for row in rows}
    content = None
    for row in _from_root(by_id[call_id], by_id, known=()):
        content = _content(row, content)
    assert content is not None
    return content


def contents_of(rows: Sequence[Row[Any]]) -> dict[str, Content]:
    """By call id. Bases may stand anywhere among the rows."""
    by_id = {row.id: row for row in rows}
    contents: dict[str, Content] = {}
    for row in rows:
        for link in _from_root(row, by_id, known=contents):
            contents[link.id] = _content(link, contents.get(link.base_id))
    return contents


def _from_root(row: Row[Any], by_id: Mapping[str, Row[Any]], known: Container[str]) -> Iterable[Row[Any]]:
    """The bases of a call that are not known, and itself."""
    chain: dict[str, Row[Any]] = {}
    while row.id not in known:
        if row.id in chain:
            raise _damaged(row, "continues itself")
        chain[row.id] = row
        if row.base_id is None:
            break
        if row.base_id not in by_id:
            raise _damaged(row, f"continues call {row.base_id}, which is not there")
        row = by_id[row.base_id]
    return reversed(chain.values())


def _content(row: Row[Any], base: Content | None) -> Content:
    repeated = b""
    try:
        if base is not None:
            if row.base_tokens * ID_BYTES > len(base.sequence):
                raise _damaged(row, f"continues more tokens of call {row.base_id} than it has")
            repeated = base.sequence[: row.base_tokens * ID_BYTES]
        sequence = b"".join((repeated, row.prompt_ids, row.sampled_ids))
    except UNREADABLE as error:
        raise _damaged(row, f"has tokens that cannot be read: {error}") from error
    try:
        request = read_request(row.request, {} if base is None else base.request)
    except UNREADABLE as error:
        raise _damaged(row, f"has a request that cannot be read: {error}") from error
    return Content(sequence, len(repeated) + len(row.prompt_ids), request)


def _damaged(row: Row[Any], what: str) -> StoreError:
    return damaged(f"call {row.id} of episode {row.episode_id}", what)
