"""The engine without its processes: scheduler and runner in one loop, for tests and in-process benches."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rollout_server.config import EngineConfig
from rollout_server.manager.scheduler import Scheduler
from rollout_server.messages import Forwarded, SamplingParams
from rollout_server.worker.process import build_runner


@dataclass
class Output:
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    scores: list[float] | None = None
    finish_reason: str | None = None


class LocalEngine:
    def __init__(self, model_dir: Path, dtype: str = "float32", **settings: object) -> None:
        self.config = EngineConfig(ipc_dir="", model_dir=str(model_dir), parent_pid=0, dtype=dtype, **settings)  # type: ignore[arg-type]
        self.runner = build_runner(self.config)
        self.scheduler = Scheduler(
            pages=self.config.num_pages,
            page_size=self.config.page_size,
            max_batch=self.config.max_batch,
            max_step_tokens=self.config.max_step_tokens,
        )
        self.outputs: dict[str, Output] = {}

    def submit(self, request_id: str, ids: list[int], sampling: SamplingParams | None) -> None:
        self.outputs[request_id] = Output()
        self.scheduler.submit(request_id, ids, sampling)

    def step(self) -> bool:
        forward = self.scheduler.plan()
        if forward is None:
            return False
        r = self.runner.forward(forward.rows)
        results = Forwarded(
            step=forward.step, ids=r.ids, logprobs=r.logprobs, top_logprobs=r.top_logprobs, scores=r.scores, seconds=0.0
        )
        for event in self.scheduler.apply(results):
            output = self.outputs[event.request_id]
            output.finish_reason = event.finish_reason
            if event.scores is not None:
                output.scores = event.scores
            else:
                output.ids.append(event.id)
                output.logprobs.append(event.logprob)
                output.versions.append(self.scheduler.version)
        return True

    def run(self) -> dict[str, Output]:
        while self.step():
            self.scheduler.check_integrity()
        return self.outputs
