"""The worker process: one device, one model, one loop: receive a plan, run it, answer.

`python -m rollout_server.worker.process CONFIG.json`, started by `rollout_server.launch`.
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

import torch
import zmq

from lightning_rl.errors import ModelError
from lightning_rl.lifetime import die_with_parent
from lightning_rl.memory import keep_freed_memory
from rollout_server import messages as m
from rollout_server.config import EngineConfig, read_engine_config
from rollout_server.kernels import native, reference
from rollout_server.kernels.interface import Kernels
from rollout_server.models.checksum import checksum
from rollout_server.models.config import ModelConfig, read_config
from rollout_server.models.decoder import load_decoder
from rollout_server.worker.kv_cache import allocate
from rollout_server.worker.runner import Runner

log = logging.getLogger("lrl.worker")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_kernels(config: ModelConfig, page_size: int) -> Kernels:
    """The native kernels where they are built and fit the model; says once why not otherwise."""
    compiled = native.load()
    if compiled is None:
        log.warning("the C attention kernel is not built (no compiler at installation?): using plain torch, slower")
        return reference
    if page_size != native.PAGE_SIZE or not native.supports(config.heads, config.kv_heads, config.head_dim):
        log.warning(
            "the C attention kernel does not fit this model's head shape or page size: using plain torch, slower"
        )
        return reference
    return compiled


def build_runner(engine: EngineConfig) -> Runner:
    config = read_config(Path(engine.model_dir))
    dtype = DTYPES[engine.dtype]
    kernels = choose_kernels(config, engine.page_size)
    decoder = load_decoder(Path(engine.model_dir), config, dtype, kernels, batch_invariant=engine.batch_invariant)
    cache = allocate(config, engine.num_pages, engine.page_size, dtype)
    return Runner(decoder, cache, engine.page_size)


def serve(engine: EngineConfig) -> None:
    if engine.threads:
        torch.set_num_threads(engine.threads)
    runner = build_runner(engine)
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
    socket.connect(f"ipc://{engine.ipc_dir}/worker.ipc")
    socket.send(
        m.encode(
            m.Ready(
                num_pages=engine.num_pages,
                page_size=engine.page_size,
                max_positions=runner.decoder.config.max_positions,
                vocab_size=runner.decoder.config.vocab,
                eos_ids=list(runner.decoder.config.eos_ids),
                checksum=checksum(runner.decoder.export()),
            )
        )
    )
    while True:
        message = m.decode_to_worker(socket.recv())
        match message:
            case m.Forward(step=step, rows=rows):
                started = time.perf_counter()
                results = runner.forward(rows)
                socket.send(
                    m.encode(
                        m.Forwarded(
                            step=step,
                            ids=results.ids,
                            logprobs=results.logprobs,
                            top_logprobs=results.top_logprobs,
                            scores=results.scores,
                            seconds=time.perf_counter() - started,
                        )
                    )
                )
            case m.Load(path=path, version=version):
                error = None
                try:
                    runner.load(Path(path))
                except ModelError as failure:
                    error = str(failure)
                live = checksum(runner.decoder.export())
                socket.send(m.encode(m.Loaded(version=version, checksum=live, error=error)))
            case m.Shutdown():
                return


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    settings = read_engine_config(Path(sys.argv[1]))
    die_with_parent(settings.parent_pid)
    keep_freed_memory()
    serve(settings)
