"""What OpenTelemetry spans say about an episode: our spans, links of calls, rewards. Pure.

A span that stands for the call of a model is no span of ours: the server has the call itself. It becomes a `CallLink` by the id of
the response, and is *folded*: whatever points at it points at its parent instead. Since a parent ends after its children,
it may come in a later request than they do; `Received.folded` says so to whoever keeps the episode. Nothing that an agent
sends is an error to us: what is wrong with a span is said beside it or in it, and never costs another one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from msgspec import Struct, field

from lightning_rl.episode import CallLink, Reward, Span
from lightning_rl.otlp import OK, UNSET, OtelEvent, OtelSpan
from lightning_rl.otlp.names import (
    EPISODE,
    NO_SPANS,
    RESPONSE_IDS,
    REWARD,
    TOOL_ATTRIBUTES,
    Kind,
    first,
    kind_of,
    name_of,
)

MAX_TEXT = 100_000
"""Characters of one attribute, of an error, of an event."""
MAX_SPAN_TEXT = 1_000_000
"""Characters of all of a span's attributes."""
MAX_NAME = 500
MAX_ATTRIBUTES = 256
MAX_EVENTS = 128
LATEST_NS = 2**63
"""In the year 2262."""
NEVER_ENDED = "never ended"
_MAX_ITEMS = 10_000
_AGL_REWARD = "agentlightning.reward."
"""Attributes `agentlightning.reward.<n>.name` and `.value`, as agentlightning 0.3 emits them."""


class Received(Struct, frozen=True, kw_only=True):
    """What a request says about one episode."""

    spans: list[Span] = field(default_factory=list)
    links: list[CallLink] = field(default_factory=list)
    rewards: list[Reward] = field(default_factory=list)
    reward_keys: list[str] = field(default_factory=list)
    """One each: the same whenever it is sent, though the span in whose place it was given may be known only later."""
    folded: dict[str, str | None] = field(default_factory=dict)
    """By the id of a span that is none of ours: the one that takes its place, or None for the episode."""
    refused: int = 0
    """Spans that were left out."""
    problems: list[str] = field(default_factory=list)
    """What is wrong, for people. A reward that is none is also recorded, as a failed span where it was."""


def episode_named(span: OtelSpan) -> str | None:
    """The episode that a span or its process says it belongs to."""
    said = span.attributes.get(EPISODE) or span.resource.get(EPISODE)
    return said if isinstance(said, str) else None


def received(spans: Iterable[OtelSpan], episode_id: str, folded: Mapping[str, str | None] | None = None) -> Received:
    """What the spans say about the episode; `folded` are those of earlier requests."""
    spans = list(spans)
    reading = _Reading(episode_id, {**(folded or {}), **_folds(spans)})
    for span in spans:
        reading.take(span)
    own = {span.id for span in spans}
    return Received(
        spans=reading.spans,
        links=reading.links,
        rewards=reading.rewards,
        reward_keys=reading.reward_keys,
        folded={id: reading.place(id) for id in reading.folded if id in own},
        refused=reading.refused,
        problems=reading.problems,
    )


def bounded(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes as JSON that the store takes, with a note where something was too long to keep."""
    room = _Room(MAX_SPAN_TEXT)
    kept = {room.text(key, MAX_NAME): room.value(value) for key, value in list(attributes.items())[:MAX_ATTRIBUTES]}
    if len(attributes) > MAX_ATTRIBUTES:
        kept["lrl.left_out"] = f"{len(attributes) - MAX_ATTRIBUTES} more attributes"
    return kept


def cut(text: str, limit: int = MAX_TEXT) -> str:
    """The text, or its beginning and a note of its length."""
    return text if len(text) <= limit else f"{text[:limit]}… [the first {limit:,} of {len(text):,} characters]"


class _Room:
    """What is left of a span's room for text."""

    def __init__(self, characters: int) -> None:
        self._left = characters

    def text(self, text: str, limit: int = MAX_TEXT) -> str:
        kept = cut(text, max(0, min(limit, self._left)))
        self._left -= min(len(text), limit)
        return kept

    def value(self, value: Any) -> Any:
        match value:
            case str():
                return self.text(value)
            case float() if not math.isfinite(value):
                return str(value)
            case int() if not -(2**63) <= value < 2**63:
                return str(value)
            case list():
                kept = [self.value(item) for item in value[:_MAX_ITEMS]]
                return kept if len(value) <= _MAX_ITEMS else [*kept, f"… [{len(value) - _MAX_ITEMS:,} more]"]
            case dict():
                return {self.text(key, MAX_NAME): self.value(item) for key, item in list(value.items())[:_MAX_ITEMS]}
        return value


def _folds(spans: Iterable[OtelSpan]) -> dict[str, str | None]:
    return {span.id: span.parent_id for span in spans if _is_folded(span)}


def _is_folded(span: OtelSpan) -> bool:
    """Whether it is no span of ours: the call of a model, for instance, or a reward and nothing else."""
    return kind_of(span.attributes) in NO_SPANS or _is_reward(span)


def _is_reward(span: OtelSpan) -> bool:
    return span.name == REWARD or (span.name.startswith("agentlightning.") and bool(_agl_rewards(span)))


class _Reading:
    def __init__(self, episode_id: str, folded: dict[str, str | None]) -> None:
        self._episode_id = episode_id
        self.folded = folded
        self.spans: list[Span] = []
        self.links: list[CallLink] = []
        self.rewards: list[Reward] = []
        self.reward_keys: list[str] = []
        self.refused = 0
        self.problems: list[str] = []
        self._places: dict[str, str | None] = {}

    def place(self, span_id: str | None) -> str | None:
        """The span itself, or what stands in the place of one that is folded."""
        passed: set[str] = set()
        while span_id is not None and span_id in self.folded and span_id not in passed:
            if span_id in self._places:
                span_id = self._places[span_id]
                break
            passed.add(span_id)
            span_id = self.folded[span_id]
        place = None if span_id in passed else span_id
        self._places.update(dict.fromkeys(passed, place))
        return place

    def take(self, span: OtelSpan) -> None:
        if len(span.id) != 16 or not int(span.id, 16):
            self._refuse(f"a span {cut(span.name, 80)!r} without an id of 8 bytes")
            return
        kind = kind_of(span.attributes)
        self._take_rewards(span)
        if kind == "call":
            self._link(span)
        elif not _is_folded(span):
            self.spans.append(self._span(span, kind))

    def _refuse(self, problem: str) -> None:
        self.refused += 1
        self.problems.append(problem)

    def _link(self, span: OtelSpan) -> None:
        response_id, maker = first(span.attributes, RESPONSE_IDS), self.place(span.id)
        if isinstance(response_id, str) and response_id and maker is not None:
            self.links.append(
                CallLink(episode_id=self._episode_id, response_id=cut(response_id, MAX_NAME), span_id=maker)
            )

    def _span(self, span: OtelSpan, kind: Kind) -> Span:
        attributes = dict(span.attributes)
        if kind == "tool":
            attributes = _tool_attributes(attributes)
        error = _error(span)
        told = ("exception", REWARD) if error is not None else (REWARD,)  # one that was handled is an event like others
        others = [event for event in span.events if event.name not in told]
        if others:
            attributes["events"] = [_told(event) for event in others[:MAX_EVENTS]]
            if len(others) > MAX_EVENTS:
                attributes["events"].append(f"… [{len(others) - MAX_EVENTS} more]")
        if not span.end_ns:
            error = NEVER_ENDED if error is None else f"{NEVER_ENDED}; {error}"
        return Span(
            id=span.id,
            episode_id=self._episode_id,
            name=cut(name_of(kind, span.attributes) or span.name or kind, MAX_NAME),
            kind=kind,
            parent_id=self.place(span.parent_id),
            started_at=_seconds(span.start_ns),
            ended_at=_seconds(max(span.end_ns, span.start_ns)),
            attributes=bounded(attributes),
            error=error,
        )

    def _take_rewards(self, span: OtelSpan) -> None:
        if span.name == REWARD:
            self._reward(span, span.attributes, span.start_ns, "")
        for number, event in enumerate(span.events):
            if event.name == REWARD:
                self._reward(span, event.attributes, event.time_ns or span.start_ns, f"event {number}")
        for which, said in _agl_rewards(span).items():
            self._reward(span, said, span.start_ns, f"agentlightning {which}")

    def _reward(self, span: OtelSpan, said: Mapping[str, Any], time_ns: int, which: str) -> None:
        name, value = said.get("name", "reward"), said.get("value")
        place = self.place(span.id)
        problem = _problem(name, value)
        if problem is None:
            assert isinstance(value, int | float)
            self.rewards.append(
                Reward(
                    episode_id=self._episode_id, name=name, value=float(value), time=_seconds(time_ns), span_id=place
                )
            )
            said_by = f"{span.trace_id} {span.id} {which}"
            self.reward_keys.append(hashlib.blake2b(said_by.encode(), digest_size=12).hexdigest())
            return
        self.problems.append(problem)
        self.refused += span.name == REWARD
        self.spans.append(
            Span(
                id=hashlib.blake2b(f"{span.id} {which}".encode(), digest_size=8).hexdigest(),
                episode_id=self._episode_id,
                name=REWARD,
                kind="chain",
                parent_id=place,
                started_at=_seconds(time_ns),
                ended_at=_seconds(time_ns),
                attributes=bounded({"name": name, "value": value}),
                error=problem,
            )
        )


def _problem(name: Any, value: Any) -> str | None:
    if not isinstance(name, str) or not name or len(name) > MAX_NAME:
        return f"a reward's name must be text of at most {MAX_NAME} characters, not {cut(repr(name), 80)}"
    if not isinstance(value, int | float) or not math.isfinite(value):
        return f"the reward {cut(name, 80)!r} must be a finite number, not {cut(repr(value), 80)}"
    return None


def _agl_rewards(span: OtelSpan) -> dict[str, dict[str, Any]]:
    """By number, as name and value."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in span.attributes.items():
        if key.startswith(_AGL_REWARD):
            number, _, what = key.removeprefix(_AGL_REWARD).partition(".")
            if what in ("name", "value"):
                found.setdefault(number, {})[what] = value
    return {number: said for number, said in found.items() if "value" in said}


def _tool_attributes(attributes: dict[str, Any]) -> dict[str, Any]:
    """With our names for what every tool call has."""
    for ours, theirs in TOOL_ATTRIBUTES.items():
        if ours in attributes:
            continue
        name = next((name for name in theirs if attributes.get(name) is not None), None)
        if name is not None:
            attributes[ours] = attributes.pop(name)
    if isinstance(attributes.get("arguments"), str):
        attributes["arguments"] = _parsed(attributes["arguments"])
    return attributes


def _parsed(text: str) -> Any:
    """The object that the text is as JSON, or the text."""
    if len(text) > MAX_TEXT:
        return text
    try:
        value = msgspec.json.decode(text)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def _error(span: OtelSpan) -> str | None:
    """Traceback, or message, of a span that failed."""
    exceptions = [event.attributes for event in span.events if event.name == "exception"]
    if span.status in (OK, UNSET):
        return None
    said = exceptions[-1] if exceptions else {}
    trace, kind, message = (said.get(f"exception.{what}") for what in ("stacktrace", "type", "message"))
    if trace:
        return cut(str(trace))
    told = ": ".join(str(part) for part in (kind, message) if part)
    return cut(told or span.status_message or "failed")


def _told(event: OtelEvent) -> dict[str, Any]:
    return {"name": event.name, "time": _seconds(event.time_ns), **event.attributes}


def _seconds(time_ns: int) -> float:
    """Since the epoch. A time that is none, 64 bits of ones for instance, is cut to what anybody can send on."""
    return min(time_ns, LATEST_NS) / 1e9
