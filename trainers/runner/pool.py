"""The runner pool: every episode in a process of its own, so many at a time, each with a deadline and a heartbeat.

An agent that raises, hangs, crashes or returns nonsense costs one attempt and is recorded with its outcome. What an
outcome means is the recipe's: `score` it, `retry` it as a new attempt, or `drop` it. Of all attempts at one (task,
sample) at most one counts: the last, if it is scored. Everything about an attempt is in the store before the pool
reports it, and a start whose counted attempt is already there is not run again. One thread, no polling; no child
outlives the pool.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import selectors
import tempfile
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import msgspec
from msgspec import Struct

from lightning_rl.automatic_rewards import AutomaticRules
from lightning_rl.episode import Episode, EpisodeStart, Outcome, Reward, Task
from lightning_rl.errors import LightningError
from lightning_rl.recipe.functions import Reference
from lightning_rl.redact import Redactor, environment_keys
from lightning_rl.store import Store
from trainers.runner.attempt import Attempt
from trainers.runner.fork_server import ForkServer
from trainers.runner.user_code import third_party_imports
from trainers.runner.words import Command, Done, FunctionAt, Job, Recorded, encode, plain

Policy = Literal["score", "retry", "drop"]
OutcomePolicy = Mapping[Outcome, Policy]
DEFAULT_POLICY: OutcomePolicy = {
    Outcome.COMPLETED: "score",
    Outcome.AGENT_ERROR: "drop",
    Outcome.TIMEOUT: "drop",
    Outcome.INFRASTRUCTURE_ERROR: "retry",
    Outcome.CANCELLED: "drop",
}
CHECK_SECONDS = 0.5
MAX_BEAT_SECONDS = 1.0
MAX_SEED = 1 << 63


class EpisodeResult(Struct, frozen=True, kw_only=True):
    """How one attempt ended; the store has the rest."""

    start: EpisodeStart
    outcome: Outcome
    counted: bool
    answer: Any = None
    error: str | None = None
    rewards: list[Reward] = []
    seconds: float = 0.0
    output: str = ""
    """The last of what it printed; "" for an attempt of an earlier run."""


def episode_id(phase: str, step: int, task_id: str, sample: int, attempt: int = 0) -> str:
    """The id of an attempt: unique, readable and safe in a URL path."""
    return f"{_slug(phase)}.{step}.{_slug(task_id)}.{sample}.{attempt}"


def next_attempt(start: EpisodeStart, *, draw_anew: bool) -> EpisodeStart:
    """The start of the next attempt. A failure of ours repeats the draws; the agent's own would just recur."""
    attempt = start.attempt + 1
    sampling = start.sampling
    if draw_anew and sampling.seed is not None:
        digest = hashlib.sha256(f"{sampling.seed}-{attempt}".encode()).digest()
        sampling = msgspec.structs.replace(sampling, seed=int.from_bytes(digest[:8], "big") % MAX_SEED)
    new_id = episode_id(start.phase, start.step, start.task.id, start.sample, attempt)
    return msgspec.structs.replace(start, id=new_id, attempt=attempt, sampling=sampling)


class RunnerPool:
    """Runs episodes; a context manager that ends its processes."""

    def __init__(
        self,
        *,
        agent_function: tuple[Path, str] | Reference | None = None,
        agent_command: Command | None = None,
        reward_function: tuple[Path, str] | Reference | None = None,
        automatic: AutomaticRules | None = None,
        adapters: Collection[str] = (),
        must_reward: bool = True,
        reward_names: Collection[str] = (),
        store: Store,
        server_url: str,
        api_key: str = "lrl",
        concurrency: int = 16,
        timeout_s: float = 120.0,
        heartbeat_s: float = 30.0,
        max_attempts: int = 2,
        outcome_policy: OutcomePolicy = DEFAULT_POLICY,
        redactor: Redactor | None = None,
    ) -> None:
        """The agent is a function or a command. Without a reward function it gives its rewards itself; `must_reward` says whether
        one that gives none has failed, and a dict that it returns is rewards if it has one of `reward_names`. `automatic`
        rewards are given beside, for what the models in `adapters` did not answer."""
        self._agent: FunctionAt | Command = agent_command or _function_at(agent_function)
        self._reward = None if reward_function is None else _function_at(reward_function)
        self._automatic, self._adapters = automatic or AutomaticRules(), list(adapters)
        self._must_reward, self._reward_names = must_reward, list(reward_names)
        self._redactor = redactor or Redactor((), [api_key, *environment_keys(os.environ)])
        self._scratch = tempfile.TemporaryDirectory(prefix="lrl-tasks-")
        self._store = store
        self._server_url = server_url.rstrip("/")
        self._api_key = api_key
        self._concurrency = concurrency
        self._timeout_s = timeout_s
        self._heartbeat_s = heartbeat_s
        self._looked_at = 0.0
        self._max_attempts = max_attempts
        self._policy = {**DEFAULT_POLICY, **outcome_policy}
        functions = [function for function in (agent_function, reward_function) if function is not None]
        self._forks = ForkServer(third_party_imports([path for path, *_ in functions]))

    def __enter__(self) -> RunnerPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._forks.close()
        self._scratch.cleanup()

    def run(
        self,
        starts: Sequence[EpisodeStart],
        on_end: Callable[[EpisodeResult], None] = lambda result: None,
        check: Callable[[], None] = lambda: None,
        on_begin: Callable[[EpisodeStart], None] = lambda start: None,
    ) -> list[EpisodeResult]:
        """Run every start to its last attempt; the results are in the order of `starts`.

        `on_begin` hears of every attempt when it is in the store and its agent has not begun, `on_end` when it is over; what
        they raise ends the run. `check` is called at least twice a second; what it raises ends the run,
        as Ctrl-C does: all children are killed and their episodes recorded as cancelled.
        """
        final: list[EpisodeResult | None] = [None] * len(starts)
        waiting = deque(_Turn(place, start, tries=1) for place, start in enumerate(starts))
        running: dict[Attempt, _Turn] = {}
        with selectors.DefaultSelector() as selector:
            try:
                while waiting or running:
                    check()
                    while waiting and len(running) < self._concurrency:
                        turn = self._earlier(waiting.popleft())
                        if turn.settled is None:
                            turn = self._refused(turn, on_end)
                        if turn.settled is not None:
                            final[turn.place] = turn.settled
                        else:
                            running[self._launch(turn.start, selector, on_begin)] = turn
                    for attempt in self._wait(selector, running):
                        turn = running.pop(attempt)
                        attempt.close()
                        if self._must_score(attempt):
                            running[self._score_later(attempt, selector)] = turn
                            continue
                        result = self._record(attempt, *attempt.verdict())
                        on_end(result)
                        again = self._again(turn, result.outcome)
                        if again is None:
                            final[turn.place] = result
                        else:
                            waiting.appendleft(again)
            except BaseException:
                self._cancel(running)
                raise
        return [result for result in final if result is not None]

    def _earlier(self, turn: _Turn) -> _Turn:
        """Follow the attempts that an interrupted run left in the store: to the one that settled it, or past them."""
        while (known := self._store.start_of(turn.start.id)) is not None:
            episode = self._store.episode(known.id)
            outcome = episode.outcome or Outcome.CANCELLED
            if episode.outcome is None:
                error = "the run was interrupted"
                self._store.end(known.id, outcome, error=error, counted=False, ended_at=time.time())
            ours = outcome is Outcome.INFRASTRUCTURE_ERROR and self._policy[outcome] == "retry"
            if (
                outcome is Outcome.CANCELLED or ours
            ):  # whoever resumes a run has mended what was broken: tries begin anew
                turn = replace(turn, start=next_attempt(turn.start, draw_anew=False))
                continue
            again = self._again(turn, outcome)
            if episode.counted or again is None:
                return replace(turn, settled=_result_of(episode, outcome))
            turn = again
        return turn

    def _again(self, turn: _Turn, outcome: Outcome) -> _Turn | None:
        """The attempt that follows one with this outcome, if the recipe wants one."""
        if self._policy[outcome] != "retry" or turn.tries >= self._max_attempts:
            return None
        start = next_attempt(turn.start, draw_anew=outcome is not Outcome.INFRASTRUCTURE_ERROR)
        return _Turn(turn.place, start, turn.tries + 1)

    def _refused(self, turn: _Turn, on_end: Callable[[EpisodeResult], None]) -> _Turn:
        """Settle a turn whose task cannot be recorded or sent: its own failure, recorded without the task."""
        try:
            encode(turn.start)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            task = Task(id=turn.start.task.id, input={})
            start = msgspec.structs.replace(turn.start, task=task, started_at=time.time())
            outcome, why = Outcome.INFRASTRUCTURE_ERROR, f"the task cannot be recorded: {error}"
            self._store.begin(start)
            self._store.end(start.id, outcome, error=why, counted=False, ended_at=start.started_at)
            result = EpisodeResult(start=start, outcome=outcome, counted=False, error=why)
            on_end(result)
            return replace(turn, settled=result)
        return turn

    def _launch(
        self, start: EpisodeStart, selector: selectors.BaseSelector, on_begin: Callable[[EpisodeStart], None]
    ) -> Attempt:
        start = msgspec.structs.replace(start, started_at=time.time())
        self._store.begin(start)
        try:
            on_begin(start)
        except BaseException:
            error = "the run was stopped"
            self._store.end(start.id, Outcome.CANCELLED, error=error, counted=False, ended_at=time.time())
            raise
        return self._attempt(self._job(start), selector)

    def _attempt(self, job: Job, selector: selectors.BaseSelector) -> Attempt:
        return Attempt(job, self._forks, self._recorded, self._timeout_s, self._heartbeat_s, selector)

    def _recorded(self, episode_id: str) -> Recorded:
        """What others than the agent's process have put into the store."""
        episode = self._store.episode(episode_id)
        recorded = Recorded(calls=episode.calls, spans=episode.spans, rewards=episode.rewards)
        try:
            encode(recorded)
        except (ValueError, OverflowError, RecursionError):  # a policy may write any number into a tool's arguments
            return plain(recorded)
        return recorded

    def _must_score(self, attempt: Attempt) -> bool:
        """Whether the agent's process is gone, could not score itself, and is to be scored all the same."""
        outcome, _ = attempt.verdict()
        return attempt.done is None and not attempt.scoring and self._policy[outcome] == "score"

    def _score_later(self, attempt: Attempt, selector: selectors.BaseSelector) -> Attempt:
        """Another process in which only the reward function runs."""
        outcome, error = attempt.verdict()
        job = msgspec.structs.replace(
            attempt.job,
            ended=outcome,
            error=error,
            spans=attempt.spans,
            rewards=attempt.rewards,
            links=attempt.links,
            recorded=self._recorded(attempt.job.start.id),
        )
        return self._attempt(job, selector)

    def _job(self, start: EpisodeStart) -> Job:
        return Job(
            start=start,
            agent=self._agent,
            reward=self._reward,
            server_url=self._server_url,
            api_key=self._api_key,
            scored=[outcome for outcome, policy in self._policy.items() if policy == "score"],
            automatic=self._automatic,
            adapters=self._adapters,
            must_reward=self._must_reward,
            reward_names=self._reward_names,
            beat_s=min(MAX_BEAT_SECONDS, self._heartbeat_s / 4),
            task_file=str(Path(self._scratch.name, f"{start.id}.json")),
        )

    def _wait(self, selector: selectors.BaseSelector, running: Iterable[Attempt]) -> list[Attempt]:
        """Sleep until something happens; returns the attempts whose process is gone.

        While nobody listens, no attempt is silent: an absence of our own does not count.
        """
        away = time.monotonic() - self._looked_at
        if away > 2 * CHECK_SECONDS:
            for attempt in running:
                attempt.heard_at = min(attempt.heard_at + away, time.monotonic())
        soonest = min((attempt.deadline for attempt in running), default=0.0)
        for key, _ in selector.select(min(CHECK_SECONDS, max(0.0, soonest - time.monotonic()))):
            key.data()
        self._looked_at = now = time.monotonic()
        for attempt in running:
            if attempt.deadline <= now:
                attempt.time_out()
        return [attempt for attempt in running if attempt.ended]

    def _record(self, attempt: Attempt, outcome: Outcome, error: str | None) -> EpisodeResult:
        start, done = attempt.job.start, attempt.done or Done(outcome=outcome)
        self._forks.preload(done.imported)
        redact = self._redactor
        result = EpisodeResult(
            start=start,
            outcome=outcome,
            counted=attempt.done is not None and self._policy[outcome] == "score",
            answer=redact.value(done.answer),
            error=None if error is None else redact.text(error),
            rewards=redact.rewards([*attempt.rewards, *done.rewards]),
            seconds=time.time() - start.started_at,
            output=redact.text(attempt.output),
        )
        self._store.end(
            start.id,
            outcome,
            answer=result.answer,
            error=result.error,
            counted=result.counted,
            spans=redact.spans(attempt.spans),
            rewards=result.rewards,
            links=attempt.links,
            ended_at=start.started_at + result.seconds,
        )
        return result

    def _cancel(self, running: Iterable[Attempt]) -> None:
        """Kill what runs and record it. A store that fails now must not hide why the run ends."""
        for attempt in running:
            attempt.kill()
        for attempt in running:
            with contextlib.suppress(Exception):
                attempt.close()
                attempt.done = None
                self._record(attempt, Outcome.CANCELLED, "the run was stopped")


@dataclass(frozen=True)
class _Turn:
    """An attempt to be made: the place of its result, its start, and which try it is in this run."""

    place: int
    start: EpisodeStart
    tries: int
    settled: EpisodeResult | None = None
    """The result, when an earlier run has settled it."""


def _function_at(function: tuple[Path, str] | Reference | None) -> FunctionAt:
    if function is None:
        raise LightningError("a pool needs an agent: a function or a command")
    path, name, *module = function
    return str(path.resolve()), name, "".join(module)


def _result_of(episode: Episode, outcome: Outcome) -> EpisodeResult:
    return EpisodeResult(
        start=episode.start,
        outcome=outcome,
        counted=episode.counted,
        answer=episode.answer,
        error=episode.error,
        rewards=episode.rewards,
        seconds=episode.ended_at - episode.start.started_at,
    )


def _slug(text: str) -> str:
    """The text itself where it is safe in a URL path, else a digest of it."""
    safe = re.fullmatch(r"[A-Za-z0-9_-]{1,64}", text)
    return text if safe else hashlib.sha256(text.encode()).hexdigest()[:16]
