"""The engine without its processes: scheduler and runner in one loop, for tests and in-process benches.

As in the manager process, up to `lookahead` passes are planned before the results of the one that runs are applied.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from rollout_server import messages as m
from rollout_server.config import EngineConfig
from rollout_server.grammar import Grammars
from rollout_server.manager.control import Control, ControlQueue
from rollout_server.manager.scheduler import Scheduler
from rollout_server.worker.process import build_runner


@dataclass
class Output:
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    scores: list[float] | None = None
    finish_reason: str | None = None
    failed: str | None = None
    """Why the request failed."""


class LocalEngine:
    def __init__(self, model_dir: Path, dtype: str = "float32", **settings: object) -> None:
        self.config = EngineConfig(ipc_dir="", model_dir=str(model_dir), parent_pid=0, dtype=dtype, **settings)  # type: ignore[arg-type]
        self.runner = build_runner(self.config)
        self.scheduler = Scheduler(
            pages=self.config.num_pages,
            page_size=self.config.page_size,
            vocab_size=self.runner.decoder.config.vocab,
            max_batch=self.config.max_batch,
            max_step_tokens=self.config.max_step_tokens,
            lookahead=self.config.lookahead,
            host_pages=self.config.host_pages,
        )
        self.control = ControlQueue(self.scheduler)
        self.grammars = _grammars(model_dir, self.runner.decoder.config.vocab)
        self.outputs: dict[str, Output] = {}
        """By request id; choices 1, 2, … of a request as `<id>/1`, `<id>/2`, …"""
        self._queued: deque[m.Forward] = deque()

    def submit(
        self,
        request_id: str,
        ids: list[int],
        sampling: m.SamplingParams | None,
        *,
        n: int = 1,
        adapter: str = "",
        priority: int = 0,
        flow: str = "",
        grammar: str = "",
    ) -> None:
        for index in range(n):
            self.outputs[_key(request_id, index)] = Output()
        masker = self.grammars.matcher(grammar) if grammar else None
        self.scheduler.submit(request_id, ids, sampling, priority, n, adapter, flow, masker)

    def cancel(self, request_id: str, index: int | None = None) -> None:
        self.scheduler.cancel(request_id, index)

    def step(self) -> bool:
        """Plan as far ahead as may be, and run the oldest pass; False when there is nothing to do."""
        while (forward := self.scheduler.plan()) is not None:
            self._queued.append(forward)
        if not self._queued and self.scheduler.waits_for_masks:
            self._take(self.scheduler.catch_up())
            return True
        return self._run_oldest()

    def run(self) -> dict[str, Output]:
        while self.step():
            self.scheduler.check_integrity()
        return self.outputs

    def load(
        self, source: m.WeightSource | Path, version: int, *, adapter: str = "", running: m.Running = "reprefill"
    ) -> m.Updated:
        """Weights from a directory or another source, live at once. Raises RuntimeError when they are rejected."""
        if isinstance(source, Path):
            source = m.Directory(path=str(source))
        update = m.UpdateWeights(request_id="update", source=source, version=version, adapter=adapter, running=running)
        reply = self.ask(update)
        if isinstance(reply, m.Failed):
            raise RuntimeError(reply.message)
        assert isinstance(reply, m.Updated)
        return reply

    def ask(self, control: Control) -> m.FromManager:
        """Carry out a control request as the manager process does: when nothing is in flight. Its answer."""
        while self._run_oldest():
            pass
        self.control.push(control)
        message, replies = self.control.next()
        if message is not None:
            replies = self._tell_worker(message)
        for reply in replies[:-1]:
            assert isinstance(reply, m.Failed)
            self._fail(reply)
        return replies[-1]

    def _fail(self, failed: m.Failed) -> None:
        for key, output in self.outputs.items():
            if key == failed.request_id or key.startswith(f"{failed.request_id}/"):
                output.failed = failed.code

    def _tell_worker(self, message: m.ToWorker) -> list[m.FromManager]:
        match message:
            case m.Load():
                return self.control.loaded(self.runner.load(message))
            case m.Unload():
                return self.control.acknowledged(self.runner.unload(message))
            case m.Release():
                return self.control.acknowledged(self.runner.release(message))
            case m.Reclaim():
                return self.control.acknowledged(self.runner.reclaim())
            case _:
                raise AssertionError(message)

    def _run_oldest(self) -> bool:
        if not self._queued:
            return False
        self._take(self.scheduler.apply(self.runner.execute(self._queued.popleft())))
        return True

    def _take(self, replies: Sequence[m.Tokens | m.Scored | m.Failed]) -> None:
        for reply in replies:
            if isinstance(reply, m.Failed):
                self._fail(reply)
                continue
            if isinstance(reply, m.Scored):
                output = self.outputs[reply.request_id]
                output.scores, output.finish_reason = reply.logprobs, "stop"
                continue
            output = self.outputs[_key(reply.request_id, reply.index)]
            output.ids += reply.ids
            output.logprobs += reply.logprobs
            output.versions += reply.versions
            output.entropies += reply.entropies
            output.top_logprobs += reply.top_logprobs
            output.finish_reason = reply.finish_reason


@cache
def _grammars(model_dir: Path, vocab_size: int) -> Grammars:
    return Grammars(model_dir, vocab_size)  # a second's work, and the same for every engine


def _key(request_id: str, index: int) -> str:
    return f"{request_id}/{index}" if index else request_id
