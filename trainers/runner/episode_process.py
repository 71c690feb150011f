"""One episode, in a process of its own: run the agent, then see what it earned.

Everything that happens is told to the runner at once over a socket, so that what was recorded before a crash is not
lost, and a thread shows every second that the process lives. Nothing here may raise: whatever the agent or the reward
function does becomes an outcome with a traceback.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import shlex
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

import msgspec

from lightning_rl.episode import CallLink, Episode, Outcome, Reward, Span, linked
from lightning_rl.errors import LightningError
from lightning_rl.join import episode_url
from tracers.context import Event, Rollout, running
from tracers.install import install
from tracers.plain import DEEPEST
from tracers.rewards import reward
from tracers.rollout import is_rollout
from tracers.spans import span
from trainers.runner.command_agent import CommandExited, CommandFailed, CommandKilled, run_command
from trainers.runner.scoring import (
    NoReward,
    call_agent,
    judged,
    last_traceback,
    no_reward,
    recordable,
    returned_rewards,
)
from trainers.runner.threads import wait_for_threads
from trainers.runner.user_code import installed_modules, load_function
from trainers.runner.words import (
    LENGTH,
    Beat,
    Command,
    Done,
    Emitted,
    Ended,
    Job,
    Recorded,
    Word,
    encode,
    framed,
)

Received = TypeVar("Received")
REACH_SECONDS = 2.0


class NotJSON(LightningError):
    """The agent's answer cannot be recorded."""


def main(connection: socket.socket) -> None:
    """Read a job, run it, and say how it went."""
    runner = connection.makefile("rb")
    line = _Line(connection, runner)
    line.say(Beat())
    job = _receive(runner, Job)
    line.start_beating(job.beat_s)
    loaded = set(sys.modules)
    heard = _Heard(line.say, list(job.spans), list(job.rewards), list(job.links))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    environment = dict(os.environ)
    _prepare(job)
    done = Done(outcome=job.ended, error=job.error) if job.ended else _run_agent(job, heard)
    if done.outcome in job.scored:
        os.environ |= environment  # a reward function that asks a model asks the user's, not the policy
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        done = _scored(job, done, heard, line)
    line.say(msgspec.structs.replace(done, imported=installed_modules(set(sys.modules) - loaded)))


class _Line:
    """The connection to the runner, for any thread of the process."""

    def __init__(self, connection: socket.socket, runner: BinaryIO) -> None:
        self._connection, self._runner = connection, runner
        self._lock = threading.Lock()
        self._among_processes = tempfile.TemporaryFile()  # noqa: SIM115 - it goes with the process
        # An agent may fork: in its child the lock must not be held by a thread that is not there.
        os.register_at_fork(
            before=self._lock.acquire, after_in_parent=self._lock.release, after_in_child=self._lock.release
        )

    def say(self, word: Word) -> None:
        message = framed(word)
        with self._lock:
            fcntl.lockf(self._among_processes, fcntl.LOCK_EX)  # forked children speak here, too
            try:
                self._connection.sendall(message)
            finally:
                fcntl.lockf(self._among_processes, fcntl.LOCK_UN)

    def ask(self) -> Recorded:
        self.say(Ended())
        return _receive(self._runner, Recorded)

    def start_beating(self, every_s: float) -> None:
        threading.Thread(target=self._beat, args=(every_s,), name="lrl-heartbeat", daemon=True).start()

    def _beat(self, every_s: float) -> None:
        pause = threading.Event()
        with contextlib.suppress(OSError):  # nobody listens any more
            while not pause.wait(every_s):
                self.say(Beat())


@dataclass
class _Heard:
    """What the agent has emitted; each is told to the runner at once."""

    say: Callable[[Word], None]
    spans: list[Span] = field(default_factory=list)
    rewards: list[Reward] = field(default_factory=list)
    links: list[CallLink] = field(default_factory=list)

    def emit(self, event: Event) -> None:
        match event:
            case Span():
                self.spans.append(event)
                self.say(Emitted(span=event))
            case Reward():
                self.rewards.append(event)
                self.say(Emitted(reward=event))
            case CallLink():
                self.links.append(event)
                self.say(Emitted(link=event))


def _receive(stream: BinaryIO, kind: type[Received]) -> Received:
    (length,) = LENGTH.unpack(stream.read(LENGTH.size))
    return msgspec.msgpack.decode(stream.read(length), type=kind)


def _prepare(job: Job) -> None:
    """Point the agent's SDK at this episode, and give the episode its own reproducible randomness."""
    base = episode_url(job.server_url, job.start.id)
    host = urlsplit(job.server_url).hostname or ""
    no_proxy = [entry for entry in (os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), host) if entry]
    os.environ |= {
        "OPENAI_BASE_URL": f"{base}/v1",
        "OPENAI_API_KEY": job.api_key,
        "OPENAI_MODEL": "policy",
        "ANTHROPIC_BASE_URL": base,
        "ANTHROPIC_API_KEY": job.api_key,
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{base}/v1/traces",
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        "OTEL_METRICS_EXPORTER": os.environ.get("OTEL_METRICS_EXPORTER", "none"),
        "OTEL_LOGS_EXPORTER": os.environ.get("OTEL_LOGS_EXPORTER", "none"),
        "LRL_EPISODE": job.start.id,
        "NO_PROXY": ",".join(no_proxy),
        "no_proxy": ",".join(no_proxy),
    }
    seed = job.start.sampling.seed
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(None if seed is None else seed % 2**32)


def _run_agent(job: Job, heard: _Heard) -> Done:
    try:
        rollout = Rollout(job.start.id, heard.emit, job.server_url, process_wide=True)
        answer = _run_command(job, rollout) if isinstance(job.agent, Command) else _run_function(job, rollout)
        judged_by_itself = job.reward is None and not isinstance(job.agent, Command)
        rewards = returned_rewards(answer, job.start.id, job.reward_names) if judged_by_itself else []
        return Done(outcome=Outcome.COMPLETED, answer=_checked_json(answer), rewards=rewards)
    except CommandKilled as error:
        return Done(outcome=Outcome.INFRASTRUCTURE_ERROR, error=recordable(str(error)))
    except (CommandFailed, NoReward, NotJSON) as error:
        down = isinstance(error, CommandExited) and not _is_reachable(job.server_url)
        outcome = Outcome.INFRASTRUCTURE_ERROR if down else Outcome.AGENT_ERROR
        return Done(outcome=outcome, error=recordable(f"{error}; the server cannot be reached" if down else str(error)))
    except BaseException as error:  # SystemExit and the like are the agent's failures too
        infrastructure = any(_is_server_failure(cause, job.server_url) for cause in _causes(error))
        outcome = Outcome.INFRASTRUCTURE_ERROR if infrastructure else Outcome.AGENT_ERROR
        return Done(outcome=outcome, error=last_traceback())


def _run_function(job: Job, rollout: Rollout) -> Any:
    assert not isinstance(job.agent, Command)
    path, name, module = job.agent
    install()
    agent = load_function(Path(path), name, module)
    with running(rollout):
        if is_rollout(agent):
            answer = call_agent(agent, _task(job))
        else:
            with span(name, kind="agent"):
                answer = call_agent(agent, _task(job))
        wait_for_threads()
        return answer


def _run_command(job: Job, rollout: Rollout) -> Any:
    assert isinstance(job.agent, Command)
    with running(rollout), span(shlex.join(job.agent.words), kind="agent"):
        return run_command(job.agent, _task(job), Path(job.task_file), reward)


def _task(job: Job) -> dict[str, Any]:
    return {"id": job.start.task.id} | job.start.task.input


def _scored(job: Job, done: Done, heard: _Heard, line: _Line) -> Done:
    """`done` with the rewards that the recipe adds; without a function of its own, the agent must have given some itself."""
    gives = done.outcome is not Outcome.COMPLETED or bool(done.rewards or heard.rewards) or not job.must_reward
    if job.reward is None and gives and not job.automatic.given:
        return done
    recorded = job.recorded or line.ask()
    if job.reward is None and not gives and not recorded.rewards:
        said = str(no_reward(done.answer, is_command=isinstance(job.agent, Command)))
        return Done(outcome=Outcome.AGENT_ERROR, answer=done.answer, error=said)
    spans = {span.id: span for span in [*recorded.spans, *heard.spans]}
    record = Episode(
        start=job.start,
        calls=linked(recorded.calls, heard.links),
        spans=sorted(spans.values(), key=lambda span: span.started_at),
        rewards=[*recorded.rewards, *heard.rewards],
        outcome=done.outcome,
        answer=done.answer,
        error=done.error,
    )
    return judged(done, job.reward, record, job.automatic, job.adapters)


def _checked_json(answer: Any) -> Any:
    try:
        plain = json.loads(json.dumps(answer, allow_nan=False, default=_plain_number))
        encode(plain)  # also refuses integers of more than 64 bits
        if _depth(plain) > DEEPEST:
            raise ValueError(f"nested in more than {DEEPEST} levels")
        return plain
    except (TypeError, ValueError, RecursionError, OverflowError) as error:
        raise NotJSON(
            f"the agent returned a {type(answer).__name__}, which is not JSON ({error}); "
            "return text, numbers, lists or dicts"
        ) from None


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(_depth, inner), default=0)


def _plain_number(value: Any) -> int | float:
    """Numbers of other libraries, such as NumPy's."""
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    raise TypeError(f"a {type(value).__name__} is no JSON")


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


def _is_reachable(server_url: str) -> bool:
    """Whether somebody listens there: a program's exit code does not say why it failed."""
    address = urlsplit(server_url)
    try:
        socket.create_connection((address.hostname or "", address.port or 80), REACH_SECONDS).close()
    except OSError:
        return False
    return True
