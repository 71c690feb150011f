"""Driver of `transformers.generate`, run by the interpreter of its own environment; see `rollout_server.bench.wire`.

What a careful user can do with it: all requests that are ready are generated together, left-padded, up to `MAX_ROWS`
rows at once; what becomes ready meanwhile waits. Each turn computes its whole prompt, and each of n samples too: `generate`
shares nothing between calls. Adapters (by PEFT) take turns, one at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from rollout_server.bench.scenarios import Scenario
from rollout_server.bench.session import Ask, Deliver
from rollout_server.bench.wire import Setup, drive

MAX_ROWS = 64
"""More rows at once are no faster: each step copies the cache of all of them."""
GATHER_S = 0.002
"""How long a batch waits for requests that are about to come."""


class Job(NamedTuple):
    ask: Ask
    deliver: Deliver
    done: asyncio.Future[None]


class TransformersEngine:
    def __init__(self, model: Any) -> None:
        self._model = model
        self._waiting: list[Job] = []
        self._arrived = asyncio.Event()
        self._prefilled = 0

    async def prepare(self, scenario: Scenario) -> None:
        """Nothing depends on the scenario."""

    async def ask(self, ask: Ask, deliver: Deliver) -> None:
        job = Job(ask, deliver, asyncio.get_running_loop().create_future())
        self._waiting.append(job)
        self._arrived.set()
        await job.done

    async def prefill_tokens(self) -> int | None:
        """Positions computed for prompts, padding included."""
        return self._prefilled

    async def serve(self) -> None:
        while True:
            await self._arrived.wait()
            await asyncio.sleep(GATHER_S)
            batch = self._take()
            try:
                await asyncio.to_thread(self._generate, batch, asyncio.get_running_loop())
            except Exception as error:
                for job in batch:
                    job.done.set_exception(error)
                raise
            for job in batch:
                job.done.set_result(None)

    def _take(self) -> list[Job]:
        """In order, as many as fit, for one adapter and one length."""
        first, rows, batch, rest = self._waiting[0].ask, 0, [], []
        for job in self._waiting:
            alike = (job.ask.adapter, job.ask.max_tokens) == (first.adapter, first.max_tokens)
            if alike and (not batch or rows + job.ask.n <= MAX_ROWS):
                batch.append(job)
                rows += job.ask.n
            else:
                rest.append(job)
        self._waiting = rest
        if not rest:
            self._arrived.clear()
        return batch

    def _generate(self, batch: list[Job], loop: asyncio.AbstractEventLoop) -> None:
        rows = [(job, index) for job in batch for index in range(job.ask.n)]
        longest = max(len(job.ask.prompt) for job in batch)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, (job, _) in enumerate(rows):
            ids[row, longest - len(job.ask.prompt) :] = torch.tensor(job.ask.prompt)
            mask[row, longest - len(job.ask.prompt) :] = 1
        self._prefilled += ids.numel()
        first = batch[0].ask
        if first.adapter:
            self._model.set_adapter(first.adapter)
        watch = Watch(rows, loop)
        torch.manual_seed(first.seed)
        self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=first.max_tokens,
            eos_token_id=None,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([watch.before]),
            stopping_criteria=StoppingCriteriaList([watch.after]),
        )


class Watch:
    """Delivers each step's ids and log-probs while `generate` runs in its thread."""

    def __init__(self, rows: list[tuple[Job, int]], loop: asyncio.AbstractEventLoop) -> None:
        self.before, self.after = KeepScores(), Step(self)
        self._rows, self._loop = rows, loop

    def step(self, sampled: torch.Tensor) -> None:
        scores = torch.log_softmax(self.before.scores.float(), dim=-1)
        logprobs = scores.gather(1, sampled.unsqueeze(1)).squeeze(1).tolist()
        self._loop.call_soon_threadsafe(self._deliver, sampled.tolist(), logprobs)

    def _deliver(self, ids: list[int], logprobs: list[float]) -> None:
        for (job, index), token, logprob in zip(self._rows, ids, logprobs, strict=True):
            job.deliver(index, [token], [logprob])


class KeepScores(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.scores = scores
        return scores


class Step(StoppingCriteria):
    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        self._watch.step(input_ids[:, -1])
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@asynccontextmanager
async def start(setup: Setup) -> AsyncIterator[TransformersEngine]:
    torch.set_num_threads(setup.threads)
    model = AutoModelForCausalLM.from_pretrained(setup.model_dir, dtype=getattr(torch, setup.dtype)).eval()
    model.generation_config.eos_token_id = None
    if setup.adapters:
        from peft import PeftModel

        (first, directory), *others = setup.adapters.items()
        model = PeftModel.from_pretrained(model, directory, adapter_name=first)
        for name, directory in others:
            model.load_adapter(directory, adapter_name=name)
    engine = TransformersEngine(model)
    service = asyncio.create_task(engine.serve())
    try:
        yield engine
    finally:
        service.cancel()
        with suppress(asyncio.CancelledError):
            await service


if __name__ == "__main__":
    drive(start)
