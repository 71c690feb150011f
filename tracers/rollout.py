"""`@rollout`: marks the function that is the agent.

Under `lrl train` it names the root span of the episode that the runner has opened. Run by hand it just calls the
function, unless LRL_STORE (an episode database) and LRL_SERVER (a rollout server's URL) are set: then each call opens an
episode of its own there (`standalone`), any number of them at once. Inside another rollout it is a span.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator
from typing import Any, TypeVar, overload

from lightning_rl.errors import LightningError
from tracers.context import enclosing_rollout
from tracers.generators import Parts, in_one_context, in_one_context_async
from tracers.spans import span
from tracers.standalone import StandaloneEpisode, address

Agent = TypeVar("Agent", bound=Callable[..., Any])


@overload
def rollout(function: Agent) -> Agent: ...
@overload
def rollout(*, name: str | None = None) -> Callable[[Agent], Agent]: ...
def rollout(function: Agent | None = None, *, name: str | None = None) -> Any:
    """Mark an agent: `@rollout` or `@rollout(name="solver")`, on a sync or async function or generator.

    A generator's rollout lasts from its first item to its last; its answer is the list of its items, or what it returns. One that
    is closed before its end (`break`) is `cancelled`, with the items until then.
    """
    if function is None:
        return functools.partial(_decorate, name=name)
    return _decorate(function, name=name)


def is_rollout(function: Callable[..., Any]) -> bool:
    """Whether the function opens its root span itself."""
    return getattr(function, "__lightning_rollout__", False)


def _decorate(function: Callable[..., Any], *, name: str | None) -> Any:
    label = name or str(getattr(function, "__name__", "agent"))
    if inspect.isasyncgenfunction(function):
        wrapped = _async_generator(function, label)
    elif inspect.isgeneratorfunction(function):
        wrapped = _generator(function, label)
    elif inspect.iscoroutinefunction(function):
        wrapped = _coroutine(function, label)
    else:
        wrapped = _plain(function, label)
    functools.update_wrapper(wrapped, function)
    wrapped.__lightning_rollout__ = True  # type: ignore[attr-defined]
    return wrapped


class _Part:
    """A rollout inside another, or one that nobody records: a span. Takes an answer as `StandaloneEpisode` does."""

    def __init__(self, label: str) -> None:
        self._span = span(label, kind="agent")
        self.answer: Any = None

    def __enter__(self) -> _Part:
        self._span.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._span.__exit__(*raised)

    async def __aenter__(self) -> _Part:
        return self.__enter__()

    async def __aexit__(self, *raised: Any) -> None:
        self.__exit__(*raised)


def _around(
    label: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> StandaloneEpisode | _Part:
    place = address() if enclosing_rollout() is None else None
    if not place:
        return _Part(label)
    first = next(iter(inspect.signature(function).parameters), None)
    return StandaloneEpisode(place, label, args[1:] if first in ("self", "cls") else args, kwargs)


def _plain(function: Callable[..., Any], label: str) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with _around(label, function, args, kwargs) as around:
            around.answer = result = function(*args, **kwargs)
            if isinstance(around, StandaloneEpisode):
                _check_has_run(label, result)
            return result

    return run


def _coroutine(function: Callable[..., Any], label: str) -> Callable[..., Any]:
    async def run(*args: Any, **kwargs: Any) -> Any:
        async with _around(label, function, args, kwargs) as around:
            around.answer = result = await function(*args, **kwargs)
            return result

    return run


def _generator(function: Callable[..., Any], label: str) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        items: list[Any] = []

        def body() -> Generator[Any, Any, Any]:
            with _around(label, function, args, kwargs) as around:
                around.answer = items
                result = yield from function(*args, **kwargs)
                if result is not None:
                    around.answer = result
                return result

        return (yield from in_one_context(body(), items.append))

    return run


def _async_generator(function: Callable[..., Any], label: str) -> Callable[..., Any]:
    def parts(*args: Any, **kwargs: Any) -> Parts:
        items: list[Any] = []
        around = _around(label, function, args, kwargs)
        around.answer = items
        return around, function(*args, **kwargs), items.append

    return in_one_context_async(parts)


def _check_has_run(label: str, result: Any) -> None:
    """What a function returns unfinished would run after its episode has ended."""
    if inspect.isawaitable(result) or inspect.isgenerator(result) or inspect.isasyncgen(result):
        if inspect.iscoroutine(result):
            result.close()
        raise LightningError(
            f"rollout {label!r} returned a {type(result).__name__} that has not run yet",
            hint="put @rollout on the async function or generator itself",
        )
