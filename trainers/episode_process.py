"""One episode, in a process of its own: run the agent, then ask the reward function.

Everything that happens is told to the runner at once over a socket, so that what was recorded before a crash is not lost.
Nothing here may raise: whatever the agent or the reward function does becomes an outcome with a traceback.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import os
import random
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from numbers import Real
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from lightning_rl.episode import Episode, EpisodeStart, Outcome, Reward, Span
from lightning_rl.store import Store
from tracers.context import Event, Rollout, running
from tracers.rollout import is_rollout
from tracers.spans import span
from trainers.user_code import load_function


class Job(Struct, frozen=True, kw_only=True):
    """What a child is to do."""

    start: EpisodeStart
    agent: tuple[str, str]
    """File and function."""
    reward: tuple[str, str]
    store: str
    server_url: str
    api_key: str
    scored: list[Outcome]
    """The outcomes that the reward function judges."""
    ended: Outcome | None = None
    """Set when the agent's own process is gone and only the reward function is still to run."""
    error: str | None = None
    events: list[Event] = []
    """What the agent emitted before its process went."""


class Emitted(Struct, frozen=True, kw_only=True, tag=True):
    """Something that the agent emitted while it ran."""

    event: Event


class Done(Struct, frozen=True, kw_only=True, tag=True):
    """The last word of a child."""

    outcome: Outcome
    answer: Any = None
    error: str | None = None
    rewards: list[Reward] = []


Word = Emitted | Done
LENGTH = struct.Struct("!I")
decode_job = msgspec.msgpack.Decoder(Job).decode
decode_word = msgspec.msgpack.Decoder(Word).decode
encode = msgspec.msgpack.Encoder().encode


class NotJSON(Exception):
    """The agent's answer cannot be recorded."""


def main(connection: socket.socket) -> None:
    """Read a job, run it, and say how it went."""
    job = _read_job(connection)
    lock = threading.Lock()

    def say(word: Word) -> None:
        payload = encode(word)
        with lock:
            connection.sendall(LENGTH.pack(len(payload)) + payload)

    events: list[Event] = list(job.events)

    def emit(event: Event) -> None:
        events.append(event)
        say(Emitted(event=event))

    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    _prepare(job)
    done = Done(outcome=job.ended, error=job.error) if job.ended else _run_agent(job, emit)
    say(_with_rewards(job, done, events) if done.outcome in job.scored else done)


def _read_job(connection: socket.socket) -> Job:
    with connection.makefile("rb") as stream:
        (length,) = LENGTH.unpack(stream.read(LENGTH.size))
        return decode_job(stream.read(length))


def _prepare(job: Job) -> None:
    """Point the agent's SDK at this episode, and give the episode its own reproducible randomness."""
    host = urlsplit(job.server_url).hostname or ""
    no_proxy = [entry for entry in (os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), host) if entry]
    os.environ |= {
        "OPENAI_BASE_URL": f"{job.server_url}/e/{job.start.id}/v1",
        "OPENAI_API_KEY": job.api_key,
        "OPENAI_MODEL": "policy",
        "NO_PROXY": ",".join(no_proxy),
        "no_proxy": ",".join(no_proxy),
    }
    seed = job.start.sampling.seed
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(None if seed is None else seed % 2**32)


def _run_agent(job: Job, emit: Callable[[Event], None]) -> Done:
    path, name = job.agent
    task = {"id": job.start.task.id} | job.start.task.input
    try:
        agent = load_function(Path(path), name)
        with running(Rollout(job.start.id, emit)):
            if is_rollout(agent):
                answer = _call(agent, task)
            else:
                with span(name, kind="agent"):
                    answer = _call(agent, task)
        return Done(outcome=Outcome.COMPLETED, answer=_checked_json(answer))
    except BaseException as error:  # SystemExit and the like are the agent's failures too
        infrastructure = any(_is_server_failure(cause, job.server_url) for cause in _causes(error))
        outcome = Outcome.INFRASTRUCTURE_ERROR if infrastructure else Outcome.AGENT_ERROR
        return Done(outcome=outcome, error=traceback.format_exc())


def _call(agent: Callable[..., Any], task: dict[str, Any]) -> Any:
    result = agent(task)
    if not inspect.isawaitable(result):
        return result

    async def finish() -> Any:
        return await result

    return asyncio.run(finish())


def _checked_json(answer: Any) -> Any:
    try:
        return json.loads(json.dumps(answer, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise NotJSON(
            f"the agent returned a {type(answer).__name__} that is not JSON ({error}); return text, numbers, lists or dicts"
        ) from None


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    todo = [error]
    while todo:
        current = todo.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        todo += [cause for cause in (current.__cause__, current.__context__) if cause]
        if isinstance(current, BaseExceptionGroup):
            todo += current.exceptions


def _is_server_failure(error: BaseException, server_url: str) -> bool:
    """Whether an HTTP client says that our server could not be reached or failed: not what the agent did, but where it ran."""
    try:
        request = getattr(error, "request", None)
    except RuntimeError:  # httpx raises it where no request is attached
        return False
    if not str(getattr(request, "url", "")).startswith(server_url):
        return False
    status = getattr(error, "status_code", None) or getattr(getattr(error, "response", None), "status_code", None)
    return status is None or status >= 500


def _with_rewards(job: Job, done: Done, events: list[Event]) -> Done:
    path, name = job.reward
    try:
        score = load_function(Path(path), name)
        episode = _as_recorded(job, done, events)
        rewards = _as_rewards(score(job.start.task, episode), job.start.id)
    except BaseException:
        message = f"the reward function {path}:{name} failed on outcome {done.outcome}\n{traceback.format_exc()}"
        return Done(outcome=Outcome.INFRASTRUCTURE_ERROR, answer=done.answer, error=message)
    return msgspec.structs.replace(done, rewards=rewards)


def _as_recorded(job: Job, done: Done, events: list[Event]) -> Episode:
    with Store.open(job.store) as store:
        episode = store.episode(job.start.id)
    return msgspec.structs.replace(
        episode,
        spans=[event for event in events if isinstance(event, Span)],
        rewards=[event for event in events if isinstance(event, Reward)],
        outcome=done.outcome,
        answer=done.answer,
        error=done.error,
    )


def _as_rewards(result: Any, episode_id: str) -> list[Reward]:
    now = time.time()
    if isinstance(result, dict):
        result = [Reward(episode_id=episode_id, name=name, value=value) for name, value in result.items()]
    rewards = []
    for reward in result:
        if not isinstance(reward, Reward):
            raise TypeError(f"return {{name: value}} or a list of rewards, not {reward!r}")
        if not isinstance(reward.name, str) or not isinstance(reward.value, Real) or not math.isfinite(reward.value):
            raise ValueError(f"reward {reward.name!r} must be a finite number, not {reward.value!r}")
        value, at = float(reward.value), reward.time or now
        rewards.append(msgspec.structs.replace(reward, episode_id=episode_id, value=value, time=at))
    return rewards
