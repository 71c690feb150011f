"""One episode, in a process of its own: run the agent, then ask the reward function.

Everything that happens is told to the runner at once over a socket, so that what was recorded before a crash is not
lost. Nothing here may raise: whatever the agent or the reward function does becomes an outcome with a traceback.
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
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from lightning_rl.episode import Call, Episode, EpisodeStart, Outcome, Reward, Span
from tracers.context import Event, Rollout, running
from tracers.rollout import is_rollout
from tracers.spans import span
from trainers.user_code import installed_modules, load_function


class Job(Struct, frozen=True, kw_only=True):
    """What a child is to do."""

    start: EpisodeStart
    agent: tuple[str, str]
    """File and function."""
    reward: tuple[str, str]
    server_url: str
    api_key: str
    scored: list[Outcome]
    """The outcomes that the reward function judges."""
    ended: Outcome | None = None
    """Set when the agent's own process is gone and only the reward function is still to run."""
    error: str | None = None
    spans: list[Span] = []
    rewards: list[Reward] = []
    """What the agent emitted before its process went."""
    calls: list[Call] | None = None
    """What the server recorded of it; None while the agent is still to run."""


class Emitted(Struct, frozen=True, kw_only=True, tag=True):
    """A span or a reward, as the agent emitted it."""

    span: Span | None = None
    reward: Reward | None = None


class Ended(Struct, frozen=True, kw_only=True, tag=True):
    """The agent has ended and the reward function needs the calls: the runner answers with a list of them."""


class Done(Struct, frozen=True, kw_only=True, tag=True):
    """The last word of a child."""

    outcome: Outcome
    answer: Any = None
    error: str | None = None
    rewards: list[Reward] = []
    imported: list[str] = []
    """Installed modules that the child had to import itself, for the fork server to import once and for all."""


Word = Emitted | Ended | Done
Received = TypeVar("Received")
MAX_ERROR = 20_000
LENGTH = struct.Struct("!I")
decode_word = msgspec.msgpack.Decoder(Word).decode
encode = msgspec.msgpack.Encoder().encode


class NotJSON(Exception):
    """The agent's answer cannot be recorded."""


def main(connection: socket.socket) -> None:
    """Read a job, run it, and say how it went."""
    runner = connection.makefile("rb")
    job = _receive(runner, Job)
    loaded = set(sys.modules)
    lock = threading.Lock()

    def say(word: Word) -> None:
        payload = encode(word)
        with lock:
            connection.sendall(LENGTH.pack(len(payload)) + payload)

    spans, rewards = list(job.spans), list(job.rewards)

    def emit(event: Event) -> None:
        if isinstance(event, Span):
            spans.append(event)
            say(Emitted(span=event))
        else:
            rewards.append(event)
            say(Emitted(reward=event))

    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    _prepare(job)
    done = Done(outcome=job.ended, error=job.error) if job.ended else _run_agent(job, emit)
    if done.outcome in job.scored:
        calls = job.calls
        if calls is None:
            say(Ended())
            calls = _receive(runner, list[Call])
        record = Episode(
            start=job.start,
            calls=calls,
            spans=spans,
            rewards=rewards,
            outcome=done.outcome,
            answer=done.answer,
            error=done.error,
        )
        done = _with_rewards(job, done, record)
    say(msgspec.structs.replace(done, imported=installed_modules(set(sys.modules) - loaded)))


def _receive(stream: BinaryIO, kind: type[Received]) -> Received:
    (length,) = LENGTH.unpack(stream.read(LENGTH.size))
    return msgspec.msgpack.decode(stream.read(length), type=kind)


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
        with running(Rollout(job.start.id, emit, job.server_url, process_wide=True)):
            if is_rollout(agent):
                answer = _call(agent, task)
            else:
                with span(name, kind="agent"):
                    answer = _call(agent, task)
        return Done(outcome=Outcome.COMPLETED, answer=_checked_json(answer))
    except BaseException as error:  # SystemExit and the like are the agent's failures too
        infrastructure = any(_is_server_failure(cause, job.server_url) for cause in _causes(error))
        outcome = Outcome.INFRASTRUCTURE_ERROR if infrastructure else Outcome.AGENT_ERROR
        return Done(outcome=outcome, error=_traceback())


def _traceback() -> str:
    """The current exception's, at a length and in characters that can be recorded."""
    text = traceback.format_exc()
    return text[-MAX_ERROR:].encode(errors="backslashreplace").decode()


def _call(agent: Callable[..., Any], task: dict[str, Any]) -> Any:
    result = agent(task)
    if not inspect.isawaitable(result):
        return result

    async def finish() -> Any:
        return await result

    return asyncio.run(finish())


def _checked_json(answer: Any) -> Any:
    try:
        plain = json.loads(json.dumps(answer, allow_nan=False))
        encode(plain)  # also refuses integers of more than 64 bits
        return plain
    except (TypeError, ValueError, RecursionError, OverflowError) as error:
        raise NotJSON(
            f"the agent returned a {type(answer).__name__}, which is not JSON ({error}); "
            "return text, numbers, lists or dicts"
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
    """Whether an HTTP client says that our server failed or could not be reached: nothing that the agent did."""
    try:
        request = getattr(error, "request", None)
    except RuntimeError:  # httpx raises it where no request is attached
        return False
    if not str(getattr(request, "url", "")).startswith(f"{server_url}/"):
        return False
    status = getattr(error, "status_code", None) or getattr(getattr(error, "response", None), "status_code", None)
    return status is None or status >= 500


def _with_rewards(job: Job, done: Done, record: Episode) -> Done:
    path, name = job.reward
    try:
        score = load_function(Path(path), name)
        rewards = _as_rewards(score(job.start.task, record), job.start.id)
    except BaseException:
        message = f"the reward function {path}:{name} failed on outcome {done.outcome}\n{_traceback()}"
        return Done(outcome=Outcome.INFRASTRUCTURE_ERROR, answer=done.answer, error=message)
    return msgspec.structs.replace(done, rewards=rewards)


def _as_rewards(result: Any, episode_id: str) -> list[Reward]:
    now = time.time()
    if isinstance(result, dict):
        result = [Reward(episode_id=episode_id, name=name, value=value) for name, value in result.items()]
    rewards: list[Reward] = []
    for reward in result:
        if not isinstance(reward, Reward):
            raise TypeError(f"return {{name: value}} or a list of rewards, not {reward!r}")
        if not isinstance(reward.name, str) or not isinstance(reward.value, Real) or not math.isfinite(reward.value):
            raise ValueError(f"reward {reward.name!r} must be a finite number, not {reward.value!r}")
        value, at = float(reward.value), reward.time or now
        rewards.append(msgspec.structs.replace(reward, episode_id=episode_id, value=value, time=at))
    return rewards
