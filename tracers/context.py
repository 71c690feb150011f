"""The rollout that this process is running, if any, and the innermost open span.

A process runs one rollout at a time, so the rollout is the process's: threads that an agent starts report to it too.
Spans nest within a thread or task, so the open span travels in a context variable. What becomes of events is the
sink's business.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from lightning_rl.episode import Reward, Span
from lightning_rl.errors import LightningError

Event = Reward | Span


@dataclass(frozen=True)
class Rollout:
    """One running episode, and where its spans and rewards go."""

    episode_id: str
    emit: Callable[[Event], None]
    """Called from any thread of the agent."""
    exclusive: bool = False
    """Whether another agent function beside it, rather than inside it, is a mistake."""


@dataclass(frozen=True)
class OpenSpan:
    """A span that has begun: the place where a reward can be put."""

    id: str
    is_root: bool


_lock = threading.Lock()
_rollout: Rollout | None = None
open_span: ContextVar[OpenSpan | None] = ContextVar("lightning_rl_open_span", default=None)


def current_rollout() -> Rollout | None:
    return _rollout


@contextmanager
def running(rollout: Rollout) -> Iterator[None]:
    """Make `rollout` this process's rollout."""
    global _rollout
    with _lock:
        if _rollout is not None:
            raise LightningError(
                f"a rollout is already running in this process ({_rollout.episode_id})",
                hint="run rollouts one after the other, or each in a process of its own as `lrl train` does",
            )
        _rollout = rollout
    try:
        yield
    finally:
        with _lock:
            _rollout = None


def new_span_id() -> str:
    """16 hex digits, as OpenTelemetry has them."""
    return uuid.uuid4().hex[:16]
