"""Requests that wait for their grammars, which another thread compiles: the manager plans passes meanwhile.

A grammar that was compiled lately costs nothing. When one is ready, `pipe` is readable.

Compiled grammars are large, so those of requests that wait for their turn are bounded: equal ones are one object, and beyond
`HELD_TEXT` a request waits here, as text, until others with grammars have been admitted or are gone. The flow that holds least is
next then, so that a flood of one does not keep out another.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, field

from rollout_server import messages as m
from rollout_server.grammar import Grammars, Matcher
from rollout_server.grammar_limits import MAX_TEXT
from rollout_server.manager.masking import GrammarError

HELD_TEXT = 16 * MAX_TEXT
"""Characters of grammars that requests wait with, compiled or about to be: about 50 bytes each."""
LEAST_TEXT = 1000
"""What the smallest one counts as."""


@dataclass(slots=True)
class Pending:
    submit: m.Submit
    future: Future[Matcher] | None = None
    """None: it is held back."""
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
        self._held_back: dict[str, Pending] = {}
        """Those of them that wait for others to let go."""
        self._shared: weakref.WeakValueDictionary[str, Matcher] = weakref.WeakValueDictionary()
        """What is compiled and waited with: the scheduler copies it for whoever is admitted."""
        self._text: Counter[str] = Counter()
        """Characters that each flow holds."""
        self.pipe, self._wake = os.pipe()
        os.set_blocking(self.pipe, False)
        os.set_blocking(self._wake, False)
        weakref.finalize(self, _close, self.pipe, self._wake)

    def __len__(self) -> int:
        return len(self._pending)

    def begin(self, submit: m.Submit) -> Matcher | None:
        """Its grammar at the beginning, never to be changed, if it is known; None: `finished` will have it. Raises GrammarError."""
        shared = self._shared.get(submit.grammar)
        if shared is not None:
            return shared
        pending = Pending(submit)
        if self._held_back or not self._fits(submit):
            self._pending[submit.request_id] = self._held_back[submit.request_id] = pending
            return None
        known = self._grammars.kept(submit.grammar)
        if known is not None:
            self._hold(submit)
            return self._share(submit, known)
        self._pending[submit.request_id] = pending
        self._start(pending)
        return None

    def resume(self) -> None:
        """Compile for those who were held back, as far as others have let go."""
        while self._held_back:
            pending = min(self._held_back.values(), key=lambda each: self._text[each.submit.flow])
            if not self._fits(pending.submit):
                return
            del self._held_back[pending.submit.request_id]
            self._start(pending)

    def cancel(self, request_id: str, index: int | None) -> bool:
        """Whether the request waits here, and nothing else knows of it."""
        pending = self._pending.get(request_id)
        if pending is None:
            return False
        pending.cancelled |= set(range(pending.submit.n)) if index is None else {index}
        if len(pending.cancelled) >= pending.submit.n:
            if pending.future is not None:
                pending.future.cancel()
                self._let_go(pending.submit.flow, _size(pending.submit))
            self._held_back.pop(request_id, None)
            del self._pending[request_id]
        return True

    def finished(self) -> list[Compiled]:
        """Requests whose grammars are ready, or refused, in the order of their arrival."""
        try:
            os.read(self.pipe, 4096)
        except BlockingIOError:
            return []
        ready = [
            (pending, pending.future)
            for pending in self._pending.values()
            if pending.future is not None and pending.future.done()
        ]
        for pending, _ in ready:
            del self._pending[pending.submit.request_id]
        return [
            Compiled(pending.submit, self._result(pending.submit, done), pending.cancelled) for pending, done in ready
        ]

    def _start(self, pending: Pending) -> None:
        self._hold(pending.submit)
        pending.future = self._grammars.begin(pending.submit.grammar)
        pending.future.add_done_callback(self._done)

    def _result(self, submit: m.Submit, future: Future[Matcher]) -> Matcher | GrammarError:
        error = future.exception()
        if error is None:
            return self._share(submit, future.result().fork())  # that object is the other thread's for a moment longer
        self._let_go(submit.flow, _size(submit))
        if isinstance(error, GrammarError):
            return error
        raise error

    def _fits(self, submit: m.Submit) -> bool:
        held = self._text.total()
        return not held or held + _size(submit) <= HELD_TEXT

    def _hold(self, submit: m.Submit) -> None:
        self._text[submit.flow] += _size(submit)

    def _share(self, submit: m.Submit, matcher: Matcher) -> Matcher:
        """What is held for it is let go with the last who waits with it."""
        shared = self._shared.get(submit.grammar)
        if shared is not None:
            self._let_go(submit.flow, _size(submit))
            return shared
        self._shared[submit.grammar] = matcher
        weakref.finalize(matcher, self._let_go, submit.flow, _size(submit)).atexit = False
        return matcher

    def _let_go(self, flow: str, size: int) -> None:
        self._text[flow] -= size
        if not self._text[flow]:
            del self._text[flow]

    def _done(self, future: Future[Matcher]) -> None:
        with contextlib.suppress(BlockingIOError):  # it is full of what has not been read yet
            os.write(self._wake, b"x")


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _size(submit: m.Submit) -> int:
    return max(LEAST_TEXT, len(submit.grammar))
