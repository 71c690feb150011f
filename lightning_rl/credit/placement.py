"""Which call a reward belongs to.

A reward at a call is that call's. One at the span of a tool is the call's that asked for the tool; one at the span of an agent,
chain or handoff is the last call's that was made inside it before the reward was given, and if there is none, the call's that
asked for the tool of which the span is a part. What belongs to no call is the episode's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

from lightning_rl.episode import Call, Episode, Reward, Span
from lightning_rl.tool_uses import tool_uses


def placed(episode: Episode) -> list[tuple[Reward, str | None]]:
    """Every reward of the episode with the id of its call; None where it is the whole episode's."""
    if not any(reward.span_id and reward.call_id is None for reward in episode.rewards):
        return [(reward, reward.call_id) for reward in episode.rewards]
    spans = {span.id: span for span in episode.spans}
    asked = {id: use.call_id for use in tool_uses(episode) if use.call_id is not None for id in use.seen_by}
    inside = _calls_inside(episode, spans)

    def call_of(reward: Reward) -> str | None:
        if reward.call_id is not None or reward.span_id is None:
            return reward.call_id
        return (
            _asker(reward.span_id, spans, asked, through=("tool",))
            or _last(inside[reward.span_id], reward.time)
            or _asker(reward.span_id, spans, asked, through=("tool", "chain", "handoff"))
        )

    return [(reward, call_of(reward)) for reward in episode.rewards]


def _calls_inside(episode: Episode, spans: Mapping[str, Span]) -> dict[str, list[Call]]:
    """By span: the calls made in it or in a span inside it, in order of arrival."""
    inside: dict[str, list[Call]] = defaultdict(list)
    for call in sorted(episode.calls, key=lambda call: (call.index, call.id)):
        for span_id in _outwards(call.span_id, spans):
            inside[span_id].append(call)
    return inside


def _last(calls: list[Call], before: float) -> str | None:
    """The last that had begun by then; a reward without a time comes after all of them."""
    return next((call.id for call in reversed(calls) if not before or call.started_at <= before), None)


def _asker(span_id: str, spans: Mapping[str, Span], asked: Mapping[str, str], through: tuple[str, ...]) -> str | None:
    """The call that asked for the innermost tool around the span, itself included. Only spans of these kinds are looked out of:
    what an agent does inside a tool is its own."""
    for at in _outwards(span_id, spans):
        if at in asked:
            return asked[at]
        if at not in spans or spans[at].kind not in through:
            return None
    return None


def _outwards(span_id: str | None, spans: Mapping[str, Span]) -> Iterator[str]:
    """The span and those around it, each once, should they go round in a circle; one that nobody knows is the last."""
    seen: set[str] = set()
    while span_id is not None and span_id not in seen:
        seen.add(span_id)
        yield span_id
        span_id = spans[span_id].parent_id if span_id in spans else None
