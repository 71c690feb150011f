"""What an agent's own instrumentation says of an episode, in the tables: it may come late, out of order, and again.

A folded span is none of the episode's (`otlp.read`): whatever pointed at it by then points at what takes its place. Links
fill what is empty, or what OpenTelemetry itself has said before, by `traceparent`; a span that the request named in our own
header is recorded at the episode's end, and stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, Table, bindparam, exists, or_, select

from lightning_rl.episode import CallLink
from lightning_rl.store.schema import calls, rewards, spans, visible

_AT_ONCE = 500
"""Folded spans that one query looks for."""
_POINTERS = [
    (spans, spans.c.id, spans.c.parent_id),
    (calls, calls.c.id, calls.c.span_id),
    (rewards, rewards.c.number, rewards.c.span_id),
]

_is_received = exists().where(spans.c.episode_id == calls.c.episode_id, spans.c.id == calls.c.span_id)


class Late(NamedTuple):
    """Names of what came after its episode's end."""

    spans: Sequence[str] = ()
    rewards: Sequence[str] = ()


_LINK = (
    calls.update()
    .where(
        calls.c.episode_id == bindparam("of_episode"),
        calls.c.response_id == bindparam("of_response"),
        or_(calls.c.span_id.is_(None), calls.c.span_id == "", _is_received),
    )
    .values(span_id=bindparam("maker"))
)


def link_calls(connection: Connection, links: Sequence[CallLink]) -> None:
    said = [
        {"of_episode": link.episode_id, "of_response": link.response_id, "maker": link.span_id}
        for link in links
        if link.span_id and link.response_id
    ]
    if said:
        connection.execute(_LINK, said)


def fold(connection: Connection, episode_id: str, folded: Mapping[str, str | None]) -> None:
    gone = list(folded)
    for table, key, pointer in _POINTERS:
        here = table.c.episode_id == episode_id
        update = table.update().where(here, key == bindparam("which")).values({pointer: bindparam("place")})
        for begin in range(0, len(gone), _AT_ONCE):
            some = pointer.in_(gone[begin : begin + _AT_ONCE])
            found = connection.execute(select(key, pointer).where(here, some)).all()
            if found:
                connection.execute(update, [{"which": which, "place": folded[old]} for which, old in found])


def missing(
    connection: Connection,
    episode_id: str,
    span_rows: Sequence[Mapping[str, Any]],
    reward_rows: Sequence[Mapping[str, Any]],
) -> Late:
    """What of this is not there."""

    def names(rows: Sequence[Mapping[str, Any]], table: Table, key: str) -> list[str]:
        query = select(table.c[key]).where(table.c.episode_id == episode_id)
        there = set(connection.execute(query).scalars()) if rows else set()
        return [row["name"] for row in rows if visible(row[key]) not in there]

    return Late(names(span_rows, spans, "id"), names(reward_rows, rewards, "key"))
