"""Requests that wait for their grammars, which another thread compiles: the manager plans passes meanwhile.

A grammar that was compiled lately costs nothing. When one is ready, `pipe` is readable.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from concurrent.futures import Future
from dataclasses import dataclass, field

from rollout_server import messages as m
from rollout_server.grammar import Grammars, Matcher
from rollout_server.manager.masking import GrammarError


@dataclass(slots=True)
class Pending:
    submit: m.Submit
    future: Future[Matcher]
    cancelled: set[int] = field(default_factory=set)
    """Choices that are no longer wanted."""


@dataclass(frozen=True, slots=True)
class Compiled:
    submit: m.Submit
    grammar: Matcher | GrammarError
    cancelled: set[int]


class Compiling:
    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars
        self._pending: dict[str, Pending] = {}
        """By request id."""
        self.pipe, self._wake = os.pipe()
        os.set_blocking(self.pipe, False)
        os.set_blocking(self._wake, False)
        weakref.finalize(self, _close, self.pipe, self._wake)

    def __len__(self) -> int:
        return len(self._pending)

    def warm(self) -> None:
        """Prepare for the first grammar now, while nobody waits."""
        self._grammars.warm()

    def begin(self, submit: m.Submit) -> Matcher | None:
        """Its grammar, if that is known; None: `finished` will have it. Raises GrammarError."""
        known = self._grammars.kept(submit.grammar)
        if known is None:
            future = self._grammars.begin(submit.grammar)
            self._pending[submit.request_id] = Pending(submit, future)
            future.add_done_callback(self._done)
        return known

    def cancel(self, request_id: str, index: int | None) -> bool:
        """Whether the request waits here, and nothing else knows of it."""
        pending = self._pending.get(request_id)
        if pending is None:
            return False
        pending.cancelled |= set(range(pending.submit.n)) if index is None else {index}
        if len(pending.cancelled) >= pending.submit.n:
            pending.future.cancel()
            del self._pending[request_id]
        return True

    def finished(self) -> list[Compiled]:
        """Requests whose grammars are ready, or refused, in the order of their arrival."""
        try:
            os.read(self.pipe, 4096)
        except BlockingIOError:
            return []
        ready = [pending for pending in self._pending.values() if pending.future.done()]
        for pending in ready:
            del self._pending[pending.submit.request_id]
        return [Compiled(pending.submit, _result(pending.future), pending.cancelled) for pending in ready]

    def _done(self, future: Future[Matcher]) -> None:
        with contextlib.suppress(BlockingIOError):  # it is full of what has not been read yet
            os.write(self._wake, b"x")


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _result(future: Future[Matcher]) -> Matcher | GrammarError:
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, GrammarError):
        return error
    raise error
