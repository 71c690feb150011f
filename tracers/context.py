"""The rollouts that this process is running, which one the caller belongs to, and the innermost open span there.

A rollout belongs to a context (`contextvars`): tasks and threads that copy it report to it, so that many rollouts may run in one
process, side by side. A process that is given to one episode has a process-wide rollout, to which every thread reports. What
becomes of events is the sink's business.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from lightning_rl.episode import CallLink, Reward, Span
from lightning_rl.errors import LightningError

Event = Reward | Span | CallLink


@dataclass(frozen=True)
class Rollout:
    """One running episode, and where its spans, rewards and links go."""

    episode_id: str
    emit: Callable[[Event], None]
    """Called from any thread of the agent."""
    server_url: str = ""
    """The rollout server, without a path: requests there are told whose they are. "" if there is none."""
    process_wide: bool = False
    """Whether all that happens in this process belongs to it."""


@dataclass(frozen=True)
class OpenSpan:
    """A span that has begun: the place where a reward can be put."""

    id: str
    is_root: bool
    agent: str | None = None
    """The name of the innermost agent around it, itself included."""
    began: float = 0.0
    """`time.perf_counter()`."""


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
    """The rollout of this context; in a thread without one, that of the whole process, or the only one that runs.

    Raises LightningError where several run and nothing says which one is meant.
    """
    rollout = _rollout.get()
    if rollout is not None:
        return rollout
    with _lock:
        running_now = list(_running)
    if len(running_now) > 1:
        raise LightningError(
            f"{len(running_now)} rollouts are running in this process, and this thread belongs to none of them",
            hint="start threads with contextvars.copy_context().run, or use asyncio.to_thread",
        )
    return running_now[0] if running_now else None


def current_place() -> Place | None:
    """The innermost open span, whichever framework opened it."""
    own = open_span.get()
    places = [Place(own.id, own.agent, own.began)] if own is not None else []
    places += [place for source in place_sources if (place := source()) is not None]
    return max(places, key=lambda place: place.began, default=None)


@contextmanager
def running(rollout: Rollout) -> Iterator[None]:
    """Make `rollout` that of this context. Raises LightningError inside another, or beside a process-wide one."""
    if _rollout.get() is not None:
        raise LightningError(f"a rollout is already running here ({rollout.episode_id})")
    with _lock:
        alone = next((other for other in _running if other.process_wide or rollout.process_wide), None)
        if alone is not None:
            raise LightningError(f"this process is given to the rollout {alone.episode_id}")
        _running.append(rollout)
    token = _rollout.set(rollout)
    try:
        yield
    finally:
        _rollout.reset(token)
        with _lock:
            _running.remove(rollout)


def new_span_id() -> str:
    """16 hex digits, as OpenTelemetry has them."""
    return uuid.uuid4().hex[:16]
