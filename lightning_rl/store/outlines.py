"""Episodes as those read them who look at one: everything that was said, without what a prompt repeats.

Prompts stay packed, experts are left out, and a message that many requests repeat is one object in all of them: so an episode costs
about what it says, not what its calls were sent. The records are those of `episode`, for reading only.
"""

from __future__ import annotations

import functools
import json
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct
from sqlalchemy import Connection, Select, func, select

from lightning_rl.episode import Episode
from lightning_rl.store.deltas import ID_BYTES, Texts
from lightning_rl.store.reading import EpisodeSummary, contents_of, filtered, load_episodes, load_summaries
from lightning_rl.store.rows import episode_of, outlined_call_of, reward_of, span_of, unpack_ids
from lightning_rl.store.schema import calls, episodes, rewards, spans

_HEAVY = ("experts", "entropies", "alternatives")
_COLUMNS = [column for column in calls.c if column.name not in _HEAVY]
_IN_ORDER = (calls.c.index, calls.c.id)


class Tokens(Struct, frozen=True):
    """What a call was sent and sampled, packed as `array("i")` packs."""

    sequence: bytes
    """Prompt, then sampled ids."""
    prompt: int
    """How many are of the prompt."""

    @property
    def total(self) -> int:
        return len(self.sequence) // ID_BYTES

    @property
    def sampled(self) -> int:
        return self.total - self.prompt

    def prompt_ids(self) -> list[int]:
        return unpack_ids(self.sequence[: self.prompt * ID_BYTES])


class Outline(Struct, frozen=True):
    episode: Episode
    """Its calls have no `prompt_ids` and no experts."""
    tokens: dict[str, Tokens]
    """By call id."""


def load_outline(connection: Connection, episode_id: str) -> Outline | None:
    row = connection.execute(select(episodes).where(episodes.c.id == episode_id)).one_or_none()
    if row is None:
        return None
    call_rows = connection.execute(select(*_COLUMNS).where(calls.c.episode_id == episode_id).order_by(*_IN_ORDER)).all()
    span_rows = connection.execute(select(spans).where(spans.c.episode_id == episode_id).order_by(spans.c.started_at))
    reward_rows = connection.execute(
        select(rewards).where(rewards.c.episode_id == episode_id).order_by(rewards.c.number)
    )
    contents = contents_of(call_rows)
    requests = _Requests()
    return Outline(
        episode_of(
            row,
            calls=[
                outlined_call_of(call, functools.partial(requests.request, contents[call.id].request))
                for call in call_rows
            ],
            spans=[span_of(span) for span in span_rows],
            rewards=[reward_of(reward) for reward in reward_rows],
        ),
        {id: Tokens(content.sequence, content.prompt_bytes // ID_BYTES) for id, content in contents.items()},
    )


def load_episode_of(connection: Connection, call_id: str) -> str | None:
    """The id of the episode that a call belongs to."""
    return connection.execute(select(calls.c.episode_id).where(calls.c.id == call_id)).scalar_one_or_none()


def load_chosen(connection: Connection, ids: Sequence[str]) -> list[EpisodeSummary]:
    """Those of these episodes that are there, in the order of a list."""
    return load_summaries(connection, select(episodes).where(episodes.c.id.in_(ids)))


def load_groups(connection: Connection, phase: str, step: int) -> list[str]:
    """The names of a step's groups, by the order of tasks."""
    of_step = _of_step(select(episodes.c.group, func.min(episodes.c.task_id)), phase, step).where(
        episodes.c.group != ""
    )
    query = of_step.group_by(episodes.c.group).order_by(func.min(episodes.c.task_id), episodes.c.group)
    return [row.group for row in connection.execute(query)]


def load_group_place(connection: Connection, group: str) -> tuple[str, int] | None:
    """Phase and step of a group. Names of groups begin with their step, as a rule, and then only that step is looked through."""
    query = select(episodes.c.phase, episodes.c.step).where(episodes.c.group == group).limit(1)
    step = group.partition("/")[0]
    likely = _of_step(query, "train", int(step)) if step.isascii() and step.isdigit() and len(step) < 10 else query
    row = connection.execute(likely).one_or_none() or connection.execute(query).one_or_none()
    return None if row is None else (row.phase, row.step)


def load_ended(connection: Connection, phase: str, step: int) -> list[tuple[str, str]]:
    """Ids and groups of a step's episodes that count: what is there of them changes no more."""
    query = (
        _of_step(select(episodes.c.id, episodes.c.group), phase, step).where(episodes.c.counted).order_by(episodes.c.id)
    )
    return [(row.id, row.group) for row in connection.execute(query)]


def load_step_tokens(connection: Connection, phase: str, step: int) -> int:
    """How many ids were sent and sampled in a step's episodes that count, without reading them."""
    of_call = calls.c.base_tokens + func.length(calls.c.prompt_ids) / ID_BYTES + calls.c.sampled_tokens
    query = select(func.coalesce(func.sum(of_call), 0)).select_from(calls.join(episodes))
    return int(connection.execute(_of_step(query, phase, step).where(episodes.c.counted)).scalar_one())


def load_for_credit(connection: Connection, phase: str, step: int) -> list[Episode]:
    """A step's episodes that count, without what no credit rule looks at: experts, entropies, alternatives."""
    return load_episodes(connection, filtered(select(episodes), phase, step, counted_only=True), without=_HEAVY)


def _of_step(query: Select[Any], phase: str, step: int) -> Select[Any]:
    return query.where(episodes.c.phase == phase, episodes.c.step == step)


class _Requests:
    """Reads requests one after the other. Most repeat what one of the last few said, and go on: only the rest is parsed then."""

    def __init__(self) -> None:
        self._made: dict[bytes, Any] = {}
        """Values by their JSON."""
        self._latest: deque[tuple[str, list[Any]]] = deque(maxlen=8)
        """Lists, with their JSON."""

    def request(self, texts: Texts) -> dict[str, Any]:
        return {
            key: self._list(text) if text.startswith("[") else self._value(text.encode()) for key, text in texts.items()
        }

    def _list(self, text: str) -> list[Any]:
        entries = next(filter(None, (self._longer(text, *known) for known in self._latest)), None) or self._entries(
            text
        )
        self._latest.appendleft((text, entries))
        return entries

    def _longer(self, text: str, known: str, entries: list[Any]) -> list[Any] | None:
        """If it says what is known, and perhaps more: behind the last entry there is a comma then instead of the bracket."""
        if not entries or not text.startswith(known[:-1]):
            return None
        match text[len(known) - 1 : len(known)]:
            case ",":
                return entries + self._entries("[" + text[len(known) :])
            case "]":
                return entries
            case _:
                return None

    def _entries(self, text: str) -> list[Any]:
        try:
            return [self._value(bytes(entry)) for entry in msgspec.json.decode(text, type=list[msgspec.Raw])]
        except msgspec.DecodeError:  # json knows NaN, and msgspec does not
            whole: list[Any] = json.loads(text)
            return whole

    def _value(self, text: bytes) -> Any:
        if text not in self._made:
            self._made[text] = json.loads(text)
        return self._made[text]
