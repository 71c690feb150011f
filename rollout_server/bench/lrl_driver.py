"""Driver of our own engine: the real manager and worker processes, spoken to as the web process speaks to them.

`python -m rollout_server.bench.lrl_driver`, see `wire`. This is the level of vLLM's `AsyncLLM`: no HTTP, no text.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from rollout_server import messages as m
from rollout_server.api.engine.engine_client import EngineClient, Stream
from rollout_server.bench.scenarios import Scenario
from rollout_server.bench.session import Ask, Deliver
from rollout_server.bench.wire import Setup, drive
from rollout_server.config import EngineConfig


class LrlEngine:
    def __init__(self, client: EngineClient) -> None:
        self._client = client

    async def prepare(self, scenario: Scenario) -> None:
        """Nothing depends on the scenario."""

    async def ask(self, ask: Ask, deliver: Deliver) -> None:
        sampling = m.SamplingParams(max_tokens=ask.max_tokens, seed=ask.seed)
        with self._client.submit(ask.prompt, sampling, n=ask.n, adapter=ask.adapter) as generation:
            await asyncio.gather(*(_read(index, stream, deliver) for index, stream in enumerate(generation.streams)))

    async def prefill_tokens(self) -> int | None:
        """Raises EngineError `integrity` when pages, references or tree are broken."""
        return int((await self._client.stats(check=True))["prefill_tokens"])


async def _read(index: int, stream: Stream, deliver: Deliver) -> None:
    finished = False
    while not finished:
        tokens = await stream.read()
        deliver(index, tokens.ids, tokens.logprobs)
        finished = tokens.finish_reason is not None


@asynccontextmanager
async def start(setup: Setup) -> AsyncIterator[LrlEngine]:
    with tempfile.TemporaryDirectory(prefix="lrl-") as ipc_dir:
        config = Path(ipc_dir) / "config.json"
        config.write_text(json.dumps(msgspec.to_builtins(engine_config(setup, ipc_dir))))
        manager = subprocess.Popen(  # which starts the worker
            [sys.executable, "-m", "rollout_server.manager.process", str(config)], stdin=subprocess.DEVNULL
        )
        client = EngineClient(Path(ipc_dir))
        try:
            client.start()
            await client.stats()  # answered once the worker has loaded
            for version, (name, directory) in enumerate(sorted(setup.adapters.items()), start=1):
                await client.update_weights(m.Directory(path=directory), version, adapter=name)
            yield LrlEngine(client)
            client.close()
        finally:
            manager.send_signal(signal.SIGINT)
            manager.wait()


def engine_config(setup: Setup, ipc_dir: str) -> EngineConfig:
    plain = EngineConfig(
        ipc_dir=ipc_dir,
        model_dir=setup.model_dir,
        parent_pid=os.getpid(),
        dtype=setup.dtype,
        kv_tokens=setup.kv_tokens,
        max_batch=setup.max_sequences,
        threads=setup.threads,
        device="cpu",
    )
    return msgspec.structs.replace(plain, **setup.overrides)


if __name__ == "__main__":
    drive(start)
