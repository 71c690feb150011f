"""`@rollout`: marks the function that is the agent.

Under `lrl train` it names the root span of the episode that the runner has opened. Run by hand it just calls the
function, unless LRL_STORE (an episode database) and LRL_SERVER (a rollout server's URL) are set: then it opens an
episode there, points OPENAI_BASE_URL at it for the length of the call, and records how it ended. Clients that were
built before the call keep the address that they were built with.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, overload

from lightning_rl.episode import EpisodeStart, Outcome, Reward, Span, Task
from lightning_rl.errors import LightningError
from tracers.context import Event, Rollout, current_rollout, running
from tracers.spans import span

Agent = TypeVar("Agent", bound=Callable[..., Any])
PHASE = "standalone"


@overload
def rollout(function: Agent) -> Agent: ...
@overload
def rollout(*, name: str | None = None) -> Callable[[Agent], Agent]: ...
def rollout(function: Agent | None = None, *, name: str | None = None) -> Any:
    """Mark a sync or async function as an agent: `@rollout` or `@rollout(name="solver")`."""
    if function is None:
        return functools.partial(_decorate, name=name)
    return _decorate(function, name=name)


def is_rollout(function: Callable[..., Any]) -> bool:
    """Whether the function opens its root span itself."""
    return getattr(function, "__lightning_rollout__", False)


def _decorate(function: Agent, *, name: str | None) -> Any:
    label = name or str(getattr(function, "__name__", "agent"))

    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def run_async(*args: Any, **kwargs: Any) -> Any:
            with _episode(label, args, kwargs) as record:
                return record(await function(*args, **kwargs))

        wrapped: Any = run_async
    else:

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with _episode(label, args, kwargs) as record:
                return record(function(*args, **kwargs))

        wrapped = run
    wrapped.__lightning_rollout__ = True
    return wrapped


@contextmanager
def _episode(label: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Callable[[Any], Any]]:
    """The episode around one call; what it yields is given the answer and gives it back."""
    address = os.environ.get("LRL_STORE"), os.environ.get("LRL_SERVER")
    current = current_rollout()
    if current is not None:
        with span(label, kind="agent"):
            yield lambda answer: answer
    elif all(address):
        with _standalone(str(address[0]), str(address[1]), label, args, kwargs) as record:
            yield record
    elif any(address):
        raise LightningError(
            "only one of LRL_STORE and LRL_SERVER is set", hint="set both to record the rollout, or neither"
        )
    else:
        yield lambda answer: answer


@contextmanager
def _standalone(
    store_path: str, server_url: str, label: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[Callable[[Any], Any]]:
    from lightning_rl.store import Store

    episode_id = f"{PHASE}-{uuid.uuid4().hex[:12]}"
    events: list[Event] = []
    answers: list[Any] = []

    def record(answer: Any) -> Any:
        answers.append(_json(answer))
        return answer

    with Store.open(store_path) as store, running(Rollout(episode_id, events.append, server_url)):
        task = Task(id=label, input={"args": _json(args), "kwargs": _json(kwargs)})
        store.begin(EpisodeStart(id=episode_id, task=task, phase=PHASE, started_at=time.time()))
        outcome, error = Outcome.COMPLETED, None
        variables = {"OPENAI_BASE_URL": f"{server_url.rstrip('/')}/e/{episode_id}/v1"}
        if "OPENAI_API_KEY" not in os.environ:
            variables["OPENAI_API_KEY"] = "lrl"
        try:
            with _environment(variables), span(label, kind="agent"):
                yield record
        except Exception:
            outcome, error = Outcome.AGENT_ERROR, traceback.format_exc()
            raise
        except BaseException:
            outcome, error = Outcome.CANCELLED, traceback.format_exc()
            raise
        finally:
            store.end(
                episode_id,
                outcome,
                answer=answers[0] if answers else None,
                error=error,
                counted=outcome is Outcome.COMPLETED,
                spans=[event for event in events if isinstance(event, Span)],
                rewards=[event for event in events if isinstance(event, Reward)],
                ended_at=time.time(),
            )


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _json(value: Any) -> Any:
    """The value as JSON; what JSON cannot hold becomes its repr, since this run is not for training."""
    return json.loads(json.dumps(value, default=repr))
