"""Whether the caller is still inside of the generator in which something began.

A generator that sets a context variable sets it for whoever asks for its next item. Between two items, and when nobody asks any
more (`break`), the variable says that the caller is where only the generator is. Pure.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
import weakref
from types import FrameType
from typing import Any

GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


class Step:
    """A step of a generator, by a task or a thread."""

    def __init__(self, frame: FrameType) -> None:
        self._frame: FrameType | None = frame
        self._thread = threading.get_ident()
        task = _task()
        self._task = weakref.ref(task) if task is not None else None

    def end(self) -> None:
        """What began in it is over."""
        self._frame = None

    def is_left(self) -> bool:
        """Whether the caller is the same task or thread, but outside of the generator. Others took up its context inside."""
        task = self._task() if self._task is not None else None
        if self._thread != threading.get_ident() or task is not _task() or (task is None and self._task is not None):
            return False
        frame = inspect.currentframe()
        while frame is not None:
            if frame is self._frame:
                return False
            frame = frame.f_back
        return True


def this_step() -> Step | None:
    """The innermost generator around the caller; one that is a context manager is not around what happens within."""
    frame = inspect.currentframe()
    while frame is not None:
        above = frame.f_back
        asked_by = above.f_code.co_name if above is not None else ""
        if frame.f_code.co_flags & GENERATOR and asked_by not in ("__enter__", "__aenter__"):
            return Step(frame)
        frame = above
    return None


def _task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None
