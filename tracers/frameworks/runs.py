"""What a framework says about its own runs, as spans: kept by the ids that the framework gives them.

A run belongs to the rollout of the run that started it, else to that of the context in which it begins; without a rollout it is
not remembered. A run that is not worth a span of its own (kind None) stands for the one around it: what happens in it belongs
there. Whether an unsettled run gets a span is seen by what happens in it. Runs that the framework never ends are the rollout's
to close, and when it is over they are forgotten.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from msgspec import structs

from lightning_rl.episode import CallLink, Reward, Span
from lightning_rl.errors import LightningError
from tracers.context import (
    Place,
    Rollout,
    current_rollout,
    new_span_id,
    open_span,
    place_sources,
    say_span_is_lost,
)
from tracers.frameworks.steps import Step


@dataclass(slots=True)
class _Run:
    rollout: Rollout
    parent: _Run | None
    around: Place | None
    """Where the context in which it began was, as everybody but this framework saw it."""
    span: Span | None
    """What is to be recorded; None if the run is not worth a span."""
    names: bool
    began: float
    settled: bool = False
    """Whether it is certain that `span` is recorded."""
    step: Step | None = None
    """Of the generator in which it began, where the framework's idea of the current run outlives that."""

    @property
    def is_left(self) -> bool:
        return self.step is not None and self.step.is_left()

    @property
    def outside(self) -> Place | None:
        parent = self.parent.place if self.parent is not None else None
        return _inner(parent, self.around)

    @property
    def place(self) -> Place | None:
        outside = self.outside
        if self.span is None or not self.settled:
            return outside
        agent = self.span.name if self.names else (outside.agent if outside is not None else None)
        return Place(self.span.id, agent, self.began)


class FrameworkSpans:
    """The runs of one framework. `source` says which of them the caller is in: the framework's own current run's id."""

    def __init__(self, source: Callable[[], Hashable | None]) -> None:
        self._runs: dict[Hashable, _Run] = {}
        self._of: dict[Rollout, list[Hashable]] = {}
        self._source = source
        place_sources.append(self.here)

    def begin(
        self,
        key: Hashable,
        parent: Hashable | None,
        name: str,
        kind: str | None,
        *,
        attributes: dict[str, Any] | None = None,
        names: bool | None = None,
        unsettled: bool = False,
        span_id: str | None = None,
        step: Step | None = None,
    ) -> None:
        """A run begins, in `parent` if that is known. `names`: whether calls in it are made under its name (agents' are)."""
        above = _entered(self._runs.get(parent)) if parent is not None else None
        if above is not None and above.rollout.ended:
            above = None
        rollout = above.rollout if above is not None else rollout_here()
        if rollout is None:
            return
        if rollout.out_of_reach:
            if kind is not None:
                say_span_is_lost(name)
            return
        span = None
        if kind is not None:
            span = Span(
                id=span_id or new_span_id(),
                episode_id=rollout.episode_id,
                name=name,
                kind=kind,
                started_at=time.time(),
                attributes=attributes or {},
            )
        names = kind == "agent" if names is None else names
        run = _Run(rollout, above, self._around(), span, names, time.perf_counter(), step=step)
        self._remember(key, run)
        if span is not None and not unsettled:
            _settle(run)

    def end(
        self,
        key: Hashable,
        *,
        name: str | None = None,
        kind: str | None = None,
        attributes: dict[str, Any] | None = None,
        error: str | None = None,
    ) -> None:
        """The run is over; `name` and `kind` if they are known better now."""
        run = self._runs.get(key)
        if run is None:
            return
        if run.step is not None:
            run.step.end()
        if run.span is None:
            return
        if not run.settled:
            run.span = None
        else:
            run.rollout.end(run.span.id, name=name, kind=kind, attributes=attributes, error=error)
            run.span = structs.replace(run.span, attributes={})  # only its name and id are still asked for

    def discard(self, key: Hashable) -> None:
        """An unsettled run turns out to need no span."""
        run = self._runs.get(key)
        if run is not None and not run.settled:
            run.span = None

    def link(self, key: Hashable, response_id: object) -> None:
        """The model's answer with this id came in the run `key`."""
        run = self._runs.get(key)
        if run is None or run.rollout.ended or not isinstance(response_id, str) or not response_id:
            return
        _settle(run)
        if (place := run.place) is not None:
            run.rollout.emit(
                CallLink(episode_id=run.rollout.episode_id, response_id=response_id, span_id=place.span_id)
            )

    def reward(self, key: Hashable, reward: Reward) -> None:
        """A reward that the framework's record of the run `key` says."""
        run = self._runs.get(key)
        if run is not None and not run.rollout.ended:
            _settle(run)
            place = run.place
            run.rollout.emit(structs.replace(reward, span_id=place.span_id if place is not None else None))

    def rollout(self, key: Hashable) -> Rollout | None:
        """The rollout of a run; None if it is over."""
        run = self._runs.get(key)
        return run.rollout if run is not None and not run.rollout.ended else None

    def here(self) -> Place | None:
        """The innermost span of this framework around the caller: a source of places."""
        key = self._source()
        run = _entered(self._runs.get(key)) if key is not None else None
        if run is None or run.rollout.ended:
            return None
        _settle(run)
        return run.place

    def _around(self) -> Place | None:
        own = open_span.get()
        place = Place(own.id, own.agent, own.began) if own is not None else None
        for source in place_sources:
            if source != self.here:
                place = _inner(place, source())
        return place

    def _remember(self, key: Hashable, run: _Run) -> None:
        self._runs[key] = run
        known = self._of.get(run.rollout)
        if known is None:
            mine: list[Hashable] = []
            known = self._of.setdefault(run.rollout, mine)
            if known is mine:
                run.rollout.when_closed(lambda: self._forget(run.rollout))
        known.append(key)

    def _forget(self, rollout: Rollout) -> None:
        for key in self._of.pop(rollout, ()):
            self._runs.pop(key, None)


def rollout_here() -> Rollout | None:
    """The current rollout; None also in a thread of which nobody knows which one it belongs to."""
    try:
        return current_rollout()
    except LightningError:
        return None


def _entered(run: _Run | None) -> _Run | None:
    """The innermost from `run` outwards in which the caller is."""
    while run is not None and run.is_left:
        run = run.parent
    return run


def _settle(run: _Run) -> None:
    """What happens in `run` belongs to its span, or to the nearest around it that has one: that one is recorded from now on."""
    within: _Run | None = run
    while within is not None and within.span is None:
        within = within.parent
    if within is None or within.span is None or within.settled:
        return
    if within.parent is not None:
        _settle(within.parent)
    outside = within.outside
    within.span = structs.replace(within.span, parent_id=outside.span_id if outside is not None else None)
    within.settled = True
    within.rollout.begin(within.span)


def _inner(one: Place | None, other: Place | None) -> Place | None:
    if one is None or other is None:
        return one or other
    return one if one.began >= other.began else other
