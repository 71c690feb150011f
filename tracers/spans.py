"""`span`: a node of the agent's own structure, recorded when it ends.

Outside of a rollout a span does nothing, so that an agent runs the same without us. Spans nest by context; a span that
fails keeps its traceback and lets the exception pass. Spans may end in any order, in any task or thread; one that nobody
ends is recorded when its rollout ends.
"""

from __future__ import annotations

import time
import traceback
from contextlib import ContextDecorator
from types import TracebackType
from typing import Any

from lightning_rl.episode import Span
from lightning_rl.errors import LightningError
from tracers.context import (
    OpenSpan,
    Rollout,
    current_place,
    current_rollout,
    is_out_of_reach,
    new_span_id,
    open_span,
    say_span_is_lost,
)

KINDS = ("agent", "chain", "tool", "handoff")


def span(name: str, kind: str = "chain", **attributes: Any) -> RecordedSpan:
    """Record what happens inside as a span; also a decorator. Attributes that are not JSON are kept as their repr."""
    return RecordedSpan(name, kind, attributes)


class RecordedSpan(ContextDecorator):
    """What `span` returns: a context manager that can be entered once."""

    def __init__(self, name: str, kind: str, attributes: dict[str, Any]) -> None:
        if not isinstance(name, str) or not name:
            raise ValueError(f"a span's name must be non-empty text, not {name!r}")
        if kind not in KINDS:
            raise ValueError(f"span kind must be one of {', '.join(KINDS)}, not {kind!r}")
        self._name, self._kind, self._attributes = name, kind, attributes
        self._entered: tuple[OpenSpan, Rollout | None] | None = None

    def _recreate_cm(self) -> RecordedSpan:
        return RecordedSpan(self._name, self._kind, self._attributes)

    def __enter__(self) -> OpenSpan:
        if self._entered is not None:
            raise LightningError(f"span {self._name!r} has been entered before", hint="call span(…) for each")
        rollout = current_rollout()
        if is_out_of_reach():
            say_span_is_lost(self._name)
            rollout = None
        parent = open_span.get() if rollout is not None else None
        place = current_place() if rollout is not None else None
        opened = OpenSpan(
            id=new_span_id(),
            is_root=place is None,
            agent=self._name if self._kind == "agent" else (place.agent if place else None),
            began=time.perf_counter(),
            parent=parent,
        )
        self._entered = opened, rollout
        if rollout is not None:
            rollout.begin(
                Span(
                    id=opened.id,
                    episode_id=rollout.episode_id,
                    name=self._name,
                    kind=self._kind,
                    parent_id=place.span_id if place else None,
                    started_at=time.time(),
                    attributes=self._attributes,
                )
            )
            open_span.set(opened)
        return opened

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._entered is None:
            raise LightningError(f"span {self._name!r} ends without having begun")
        opened, rollout = self._entered
        if rollout is None:
            return
        failed = error is not None and not isinstance(error, GeneratorExit)  # a generator that is closed has not failed
        rollout.end(opened.id, error="".join(traceback.format_exception(error)) if failed else None)
        innermost = open_span.get()
        while innermost is not None and not rollout.is_open(innermost.id):
            innermost = innermost.parent
        open_span.set(innermost)
