"""Who made each call of an episode, by name: the agent, what surrounds it, and the model that it asked for.

The names come from the spans, and the spans from the framework's own hooks; where no span says an agent, it is what the request
said of itself. A call whose span nobody knows (of a bare thread, another process, a plain HTTP client) is the episode's root's.
`fits` is how `agent.learns` and `agent.routes` of a recipe choose. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from msgspec import Struct

from lightning_rl.episode import Call, Episode, Span

_NAMED = ("agent", "chain")
"""Kinds of span whose names say who is at work; a tool's or a handoff's does not."""


class Caller(Struct, frozen=True, kw_only=True):
    agent: str | None
    """The innermost agent around the call, or the name that its request gave; None if nobody knows."""
    nodes: tuple[str, ...] = ()
    """Agents, chains and graph nodes around the call, innermost first; the agent is one of them."""
    model: str = ""
    """As the request asked for it; "" if it did not say."""

    @property
    def names(self) -> tuple[str, ...]:
        """All that globs are held against."""
        agent = () if self.agent is None or self.agent in self.nodes else (self.agent,)
        return (*agent, *self.nodes, self.model)


def callers(episode: Episode) -> dict[str, Caller]:
    """By call id. Spans that are missing, or that go round in a circle, end the way outwards."""
    spans = {span.id: span for span in episode.spans}
    root = root_agent(episode.spans)
    return {call.id: _caller(call, spans, root) for call in episode.calls}


def root_agent(spans: Sequence[Span]) -> Span | None:
    """The agent in which all of an episode happens: of those that are in no other span, the first to begin."""
    known = {span.id for span in spans}
    outermost = [span for span in spans if span.kind == "agent" and span.parent_id not in known]
    return min(outermost, key=lambda span: (span.started_at, span.id), default=None)


def fits(globs: Iterable[str], caller: Caller) -> bool:
    """Whether one of the globs fits one of the caller's names, case and all. `*` fits everybody."""
    names = caller.names
    return any(fnmatchcase(name, glob) for glob in globs for name in names)


def _caller(call: Call, spans: Mapping[str, Span], root: Span | None) -> Caller:
    agent: str | None = None
    nodes: list[str] = []
    seen: set[str] = set()
    span_id = call.span_id
    if span_id not in spans and root is not None:
        span_id = root.id
        agent = call.agent or None
    while span_id is not None and span_id in spans and span_id not in seen:
        seen.add(span_id)
        span = spans[span_id]
        if span.kind in _NAMED:
            nodes.append(span.name)
            if agent is None and span.kind == "agent":
                agent = span.name
        span_id = span.parent_id
    model = call.request.get("model")
    return Caller(agent=agent or call.agent or None, nodes=tuple(nodes), model=model if isinstance(model, str) else "")
