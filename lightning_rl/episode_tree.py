"""Where each span and call of an episode stands: a tree of agents, tools and handoffs, with the calls made in them.

All spans of one tool use are one node. A call whose span nobody knows is the root agent's. Parents that are missing leave a node
at the top, and of parents that go round in a circle the earliest is taken out of it, so every event is in the tree once. Pure, and
the same whatever order the records come in.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from msgspec import Struct

from lightning_rl.agents import root_agent
from lightning_rl.episode import Call, Episode, Span
from lightning_rl.tool_uses import ToolUse, tool_uses


class Node(Struct, frozen=True, kw_only=True):
    event: Span | Call
    """Of a tool use, the span of its run."""
    depth: int
    parent: str | None
    """Id of the span that is the event of a node before this one; None at the top."""
    use: ToolUse | None = None
    """What is known of the tool use that the span is."""

    @property
    def seen_by(self) -> tuple[str, ...]:
        """Ids of all spans that are this node."""
        return self.use.seen_by if self.use else (self.event.id,)


class _Event(Struct, frozen=True):
    event: Span | Call
    use: ToolUse | None
    parents: tuple[str | None, ...]
    """Spans that it may be in, the best first."""


def episode_tree(episode: Episode) -> list[Node]:
    """Depth first; what is side by side in order of time."""
    events = _events(episode)
    shown = {id: place for place, event in enumerate(events) for id in _spans_of(event)}
    parents = [_parent(place, event, shown) for place, event in enumerate(events)]
    _break_circles(parents)
    inside: dict[int | None, list[int]] = defaultdict(list)
    for place, parent in enumerate(parents):
        inside[parent].append(place)
    nodes = []
    waiting = [(place, 0) for place in reversed(inside[None])]
    while waiting:
        place, depth = waiting.pop()
        event, parent = events[place], parents[place]
        around = None if parent is None else events[parent].event.id
        nodes.append(Node(event=event.event, depth=depth, parent=around, use=event.use))
        waiting += [(other, depth + 1) for other in reversed(inside[place])]
    return nodes


def _events(episode: Episode) -> list[_Event]:
    """In order of time; a tool use stands where the first of its spans began."""
    spans = {span.id: span for span in episode.spans}
    uses = {id: use for use in tool_uses(episode) for id in use.seen_by}
    root = root_agent(episode.spans)
    seen: set[str] = set()
    events = []
    both: list[Span | Call] = [*episode.spans, *episode.calls]
    for event in sorted(both, key=_order):
        if isinstance(event, Call):
            outermost = root.id if root else None
            events.append(_Event(event, None, (event.span_id if event.span_id in spans else outermost,)))
        elif event.id not in seen:
            use = uses.get(event.id)
            run = spans[use.span_id] if use and use.span_id else event
            others = use.seen_by if use else (event.id,)
            seen.update(others)
            events.append(_Event(run, use, (run.parent_id, event.parent_id, *(spans[id].parent_id for id in others))))
    return events


def _order(event: Span | Call) -> tuple[float, int, int, str]:
    """Of what began at the same moment, spans come before the calls made in them."""
    return (
        (event.started_at, 1, event.index, event.id) if isinstance(event, Call) else (event.started_at, 0, 0, event.id)
    )


def _spans_of(event: _Event) -> Sequence[str]:
    if isinstance(event.event, Call):
        return ()
    return event.use.seen_by if event.use else (event.event.id,)


def _parent(place: int, event: _Event, shown: Mapping[str, int]) -> int | None:
    known = (shown[id] for id in event.parents if id is not None and id in shown)
    return next((parent for parent in known if parent != place), None)


def _break_circles(parents: list[int | None]) -> None:
    """Places are in order of time: the first of a circle that is met goes to the top."""
    done: set[int] = set()
    for start in range(len(parents)):
        path: list[int] = []
        on_path: set[int] = set()
        at: int | None = start
        while at is not None and at not in done and at not in on_path:
            path.append(at)
            on_path.add(at)
            at = parents[at]
        if at is not None and at in on_path:
            parents[min(path[path.index(at) :])] = None
        done |= on_path
