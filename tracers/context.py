"""The rollouts that this process is running, which one the caller belongs to, and the innermost open span there.

A rollout belongs to a context (`contextvars`): tasks and threads that copy it report to it, so that many rollouts may run in one
process, side by side. A process that is given to one episode has a process-wide rollout, to which every thread reports. A span
that has begun is remembered and recorded even if nobody ends it. What becomes of events is the sink's business.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from msgspec import structs

from lightning_rl.episode import CallLink, Reward, Span
from lightning_rl.errors import LightningError
from tracers.environment import SPAWNER
from tracers.forking import after_fork
from tracers.plain import as_json

Event = Reward | Span | CallLink
NEVER_ENDED = "never ended"
"""The error of a span that was still open when its rollout ended."""


@dataclass
class _Course:
    """How far a rollout has come."""

    open: dict[str, Span] = field(default_factory=dict)
    ended: bool = False
    out_of_reach: bool = False
    """Whether this is a copy of it in a forked process."""
    root: str | None = None
    """The span that began first."""
    alone: bool = True
    """Whether no other rollout has run beside it in this process."""
    older_threads: set[threading.Thread] = field(default_factory=set)
    """Those that were there before it."""
    when_closed: list[Callable[[], None]] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Rollout:
    """One running episode, and where its spans, rewards and links go."""

    episode_id: str
    emit: Callable[[Event], None]
    """Called from any thread of the agent."""
    server_url: str = ""
    """The rollout server, without a path: requests there are told whose they are. "" if there is none."""
    process_wide: bool = False
    """Whether all that happens in this process belongs to it."""
    _course: _Course = field(default_factory=_Course, repr=False)

    @property
    def ended(self) -> bool:
        return self._course.ended

    @property
    def out_of_reach(self) -> bool:
        """Whether it runs in the parent of this process: what is emitted here would be lost."""
        return self._course.out_of_reach

    def when_closed(self, function: Callable[[], None]) -> None:
        """Call it when the rollout is over; now, if it is."""
        self._course.when_closed.append(function)
        if self.ended:
            function()

    def begin(self, span: Span) -> None:
        """Remember a span that has begun (`started_at` is set, `ended_at` not yet).

        In a process that is all the rollout's, one without a parent (of a bare thread) is in the one that began first."""
        if self.ended:
            return
        if self._course.root is None:
            self._course.root = span.id
        elif self.process_wide and span.parent_id is None:
            span = structs.replace(span, parent_id=self._course.root)
        self._course.open[span.id] = span

    def end(
        self,
        span_id: str,
        *,
        error: str | None = None,
        attributes: dict[str, Any] | None = None,
        ended_at: float = 0.0,
        name: str | None = None,
        kind: str | None = None,
    ) -> None:
        """Emit a span that has begun, `attributes` added to those it began with; once more, or when the rollout is over,
        nothing happens. What JSON cannot hold becomes its repr. `ended_at` is now by default; `name` and `kind` replace
        those it began with."""
        span = self._course.open.pop(span_id, None)
        if span is not None:
            self.emit(
                structs.replace(
                    span,
                    name=as_json(name or span.name),
                    kind=kind or span.kind,
                    ended_at=ended_at or time.time(),
                    attributes=as_json(span.attributes | (attributes or {})),
                    error=as_json(error or span.error),
                )
            )

    def is_open(self, span_id: str) -> bool:
        return span_id in self._course.open

    def close(self) -> None:
        """End the spans that nobody ended, the innermost first: what comes later is not recorded."""
        self._course.ended = True
        for span_id in reversed(list(self._course.open)):
            self.end(span_id, error=NEVER_ENDED)
        for function in self._course.when_closed:
            function()


@dataclass(frozen=True)
class OpenSpan:
    """A span that has begun: the place where a reward can be put."""

    id: str
    is_root: bool
    agent: str | None = None
    """The name of the innermost agent around it, itself included."""
    began: float = 0.0
    """`time.perf_counter()`."""
    parent: OpenSpan | None = None


@dataclass(frozen=True)
class Place:
    """Where the caller is in the agent's own structure, as one framework sees it."""

    span_id: str
    agent: str | None
    """Name of the innermost agent or graph node."""
    began: float
    """`time.perf_counter()` when that span began: of several frameworks' places, the latest is the innermost."""


_lock = threading.Lock()
_running: list[Rollout] = []
_rollout: ContextVar[Rollout | None] = ContextVar("lightning_rl_rollout", default=None)
open_span: ContextVar[OpenSpan | None] = ContextVar("lightning_rl_open_span", default=None)

place_sources: list[Callable[[], Place | None]] = []
"""One for each framework whose hooks are installed; None where it has no span open."""


def current_rollout() -> Rollout | None:
    """The rollout of this context. In a thread without one: that of the whole process, or the one during which it was
    started, if no other has run beside that one.

    None in what a rollout has left running after its end. Raises LightningError where several rollouts may be meant.
    """
    rollout = enclosing_rollout()
    if rollout is not None or _rollout.get() is not None or not _running:
        return rollout
    thread = threading.current_thread()
    with _lock:
        possible = [running for running in _running if thread not in running._course.older_threads]
    if len(possible) == 1 and possible[0]._course.alone:
        return possible[0]
    if possible:
        raise LightningError(
            "several rollouts run in this process, and nothing says to which of them this thread belongs",
            hint="start threads with contextvars.copy_context().run, or use asyncio.to_thread or a thread pool",
        )
    return None


def enclosing_rollout() -> Rollout | None:
    """The rollout of this context or of the whole process: what runs here is a part of it."""
    rollout = _rollout.get()
    if rollout is not None:
        return None if rollout.ended else rollout
    return next((running for running in list(_running) if running.process_wide), None)


def running_rollouts() -> list[Rollout]:
    with _lock:
        return list(_running)


def ended_rollout() -> Rollout | None:
    """The rollout that this task or thread belonged to, if it is over."""
    rollout = _rollout.get()
    return rollout if rollout is not None and rollout.ended else None


def is_out_of_reach() -> bool:
    """Whether this process was started by one that runs rollouts, and the caller belongs to none of its own."""
    rollout = _rollout.get()
    if rollout is not None:
        return rollout.out_of_reach
    return not _running and any(name in os.environ for name in ("LRL_EPISODE", SPAWNER))


def say_span_is_lost(name: str) -> None:
    warnings.warn(
        f"span {name!r} is not recorded: its rollout runs in the process that started this one; open spans there",
        RuntimeWarning,
        stacklevel=3,
    )


def current_place() -> Place | None:
    """The innermost open span, whichever framework opened it."""
    own = open_span.get()
    places = [Place(own.id, own.agent, own.began)] if own is not None else []
    places += [place for source in place_sources if (place := source()) is not None]
    return max(places, key=lambda place: place.began, default=None)


@contextmanager
def running(rollout: Rollout) -> Iterator[None]:
    """Make `rollout` that of this context, and close it afterwards.

    Raises LightningError inside another, or beside a process-wide one.
    """
    before = _rollout.get()
    if before is not None and not before.ended:
        raise LightningError(f"a rollout is already running here ({before.episode_id})")
    with _lock:
        alone = next((other for other in _running if other.process_wide or rollout.process_wide), None)
        if alone is not None:
            raise LightningError(f"this process is given to the rollout {alone.episode_id}")
        for other in _running:
            other._course.alone = rollout._course.alone = False
        rollout._course.older_threads.update(threading.enumerate())
        _running.append(rollout)
    place = open_span.get()
    _rollout.set(rollout)
    open_span.set(None)
    try:
        yield
    finally:
        _rollout.set(before)
        open_span.set(place)
        with _lock:
            _running.remove(rollout)
        rollout.close()
        rollout._course.older_threads.clear()


def carried(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as work of the caller's rollout and span, in whichever thread it runs."""
    rollout, place = _rollout.get(), open_span.get()
    if rollout is None:
        return function

    def run(*args: Any, **kwargs: Any) -> Any:
        before, place_before = _rollout.get(), open_span.get()
        _rollout.set(rollout)
        open_span.set(place)
        try:
            return function(*args, **kwargs)
        finally:
            _rollout.set(before)
            open_span.set(place_before)

    return run


def new_span_id() -> str:
    """16 hex digits, as OpenTelemetry has them."""
    return os.urandom(8).hex()


@after_fork
def _forget() -> None:
    """In a forked child: the parent's rollouts run on there, except one that is given the whole process and what it starts."""
    global _lock
    _lock = threading.Lock()
    for rollout in _running:
        rollout._course.out_of_reach = not rollout.process_wide
    _running[:] = [rollout for rollout in _running if rollout.process_wide]
