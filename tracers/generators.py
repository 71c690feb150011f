"""Generators that keep a context of their own from step to step.

The body of a generator runs in the context of whoever asks for its next item, so what it sets there would leak to its caller,
and another caller would not see it. Driven by these functions, every step of `body` runs in one context.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import AbstractAsyncContextManager
from contextvars import Context, copy_context
from typing import Any


def in_one_context(body: Generator[Any, Any, Any], yielded: Callable[[Any], None]) -> Generator[Any, Any, Any]:
    """`yielded` hears of every item before the caller gets it."""
    context = copy_context()
    step: Callable[[], Any] = lambda: next(body)  # noqa: E731
    while True:
        try:
            item = context.run(step)
        except StopIteration as stop:
            return stop.value
        yielded(item)
        try:
            sent = yield item
        except GeneratorExit:
            context.run(body.close)
            raise
        except BaseException as error:
            step = _bind(body.throw, error)
        else:
            step = _bind(body.send, sent)


Parts = tuple[AbstractAsyncContextManager[Any], AsyncGenerator[Any, Any], Callable[[Any], None]]


def in_one_context_async(parts: Callable[..., Parts]) -> Callable[..., AsyncGenerator[Any, Any]]:
    """An asynchronous generator function: `parts` makes of its arguments the context manager around the whole iteration, the
    body, and what hears of every item before the caller gets it."""

    async def run(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        around, body, yielded = parts(*args, **kwargs)
        context = copy_context()
        step: Callable[[], Awaitable[Any]] = body.__anext__
        async with _ManagerWithin(context, around):
            while True:
                try:
                    item = await _Within(context, step())
                except StopAsyncIteration:
                    return
                yielded(item)
                try:
                    sent = yield item
                except GeneratorExit:
                    await _Within(context, body.aclose())
                    raise
                except BaseException as error:
                    step = _bind(body.athrow, error)
                else:
                    step = _bind(body.asend, sent)

    return run


def _bind(function: Callable[[Any], Any], value: Any) -> Callable[[], Any]:
    return lambda: function(value)


class _Within:
    """An awaitable whose every step runs in a context, in the task that awaits it."""

    def __init__(self, context: Context, awaitable: Awaitable[Any]) -> None:
        self._context, self._awaitable = context, awaitable

    def __await__(self) -> Generator[Any, Any, Any]:
        steps: Any = self._awaitable.__await__()
        step: Callable[[], Any] = lambda: steps.send(None)  # noqa: E731
        while True:
            try:
                waiting_for = self._context.run(step)
            except StopIteration as stop:
                return stop.value
            try:
                answer = yield waiting_for
            except GeneratorExit:
                self._context.run(steps.close)
                raise
            except BaseException as error:
                step = _bind(steps.throw, error)
            else:
                step = _bind(steps.send, answer)


class _ManagerWithin:
    """A context manager that is entered and left within a context."""

    def __init__(self, context: Context, manager: AbstractAsyncContextManager[Any]) -> None:
        self._context, self._manager = context, manager

    async def __aenter__(self) -> Any:
        return await _Within(self._context, self._manager.__aenter__())

    async def __aexit__(self, *raised: Any) -> None:
        await _Within(self._context, self._manager.__aexit__(*raised))
