"""The worker process: one device, one model, one loop: receive a plan, run it, answer.

`python -m rollout_server.worker.process CONFIG.json MANAGER_PID ADDRESS`, started by the manager (`manager.worker_process`),
which ends it by SIGKILL.
"""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections import deque
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
from rollout_server.worker.kv_cache import KVCache
from rollout_server.worker.runner import Launched, Runner
from rollout_server.worker.slots import Slots

log = logging.getLogger("lrl.worker")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_LAUNCHED_AHEAD = 1
"""Passes that a GPU is given beyond the one whose results are waited for."""
_GLANCE_S = 50e-6
"""How often a worker that waits for its GPU looks for messages: a fraction of the shortest decode pass."""


def choose_device(device: str) -> torch.device:
    """Raises ModelError when the device is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device {device!r}: torch sees no GPU", hint="use device cpu, or a CUDA build of torch")
    if chosen.type not in ("cpu", "cuda"):
        raise ModelError(f"device {device!r} is not served", hint="use cpu, cuda, cuda:1, …")
    return torch.device("cuda", chosen.index or 0) if chosen.type == "cuda" else chosen


def choose_kernels(config: ModelConfig, page_size: int, device: torch.device, *, batch_invariant: bool) -> Kernels:
    """The fastest that fit device and model; says once why it is not the device's own."""
    if device.type == "cuda":
        from rollout_server.kernels.triton import backend, invariant

        return invariant if batch_invariant else backend
    compiled = native.load()
    if compiled is None:
        log.warning("the C kernels are not built (no compiler at installation?): using plain torch, slower")
        return reference
    odd = config.hidden % 2 or config.intermediate % 2 or (config.moe is not None and config.moe.intermediate % 2)
    if page_size != native.PAGE_SIZE or odd or not native.supports(config.heads, config.kv_heads, config.head_dim):
        log.warning("the C kernels do not fit this model's widths, head shape or page size: using plain torch, slower")
        return reference
    return compiled


def build_runner(engine: EngineConfig) -> Runner:
    """Raises ModelError when the model cannot be read or the device is not there, ServerError when the host tier of keys
    and values has no room."""
    device = choose_device(engine.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    config = read_config(Path(engine.model_dir))
    dtype = DTYPES[engine.dtype]
    kernels = choose_kernels(config, engine.page_size, device, batch_invariant=engine.batch_invariant)
    decoder = load_decoder(
        Path(engine.model_dir),
        config,
        dtype,
        kernels,
        batch_invariant=engine.batch_invariant,
        device=device,
        max_adapters=engine.max_adapters,
    )
    host_dir = None if engine.host_kv_dir is None else Path(engine.host_kv_dir)
    cache = KVCache(
        lambda pages: kernels.allocate(config, pages, engine.page_size, dtype, device),
        engine.num_pages,
        host_pages=engine.host_pages,
        host_dir=host_dir,
    )
    slots = Slots(engine.max_batch, -(-config.max_positions // engine.page_size), cache.scratch, config.vocab, device)
    return Runner(decoder, cache, slots, engine.page_size, shared_prefix=engine.shared_prefix, park_dir=host_dir)


def ready(runner: Runner, engine: EngineConfig) -> m.Ready:
    config = runner.decoder.config
    return m.Ready(
        num_pages=engine.num_pages,
        page_size=engine.page_size,
        host_pages=engine.host_pages,
        max_positions=config.max_positions,
        vocab_size=config.vocab,
        eos_ids=list(config.eos_ids),
        checksum=checksum(runner.decoder.export()),
    )


def serve(engine: EngineConfig, address: str) -> None:
    """Answer the manager at `address` until it says `Shutdown`. Answers come in the order of the messages."""
    if engine.threads:
        torch.set_num_threads(engine.threads)
    runner = build_runner(engine)
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
    socket.connect(address)
    socket.send(m.encode(ready(runner, engine)))
    under_way: deque[Launched] = deque()

    def answer_oldest() -> None:
        socket.send(m.encode(runner.collect(under_way.popleft())))

    while True:
        _wait(socket, under_way)
        while under_way and (under_way[0].ready() or len(under_way) > _LAUNCHED_AHEAD):
            answer_oldest()
        if under_way and not socket.poll(0):
            continue
        message = m.decode_to_worker(socket.recv())
        if isinstance(message, m.Forward):
            under_way.append(runner.launch(message))
            continue
        while under_way:
            answer_oldest()
        match message:
            case m.Load():
                socket.send(m.encode(runner.load(message)))
            case m.Unload():
                socket.send(m.encode(runner.unload(message)))
            case m.Release():
                socket.send(m.encode(runner.release(message)))
            case m.Reclaim():
                socket.send(m.encode(runner.reclaim()))
            case m.Shutdown():
                return


def _wait(socket: zmq.Socket[bytes], under_way: deque[Launched]) -> None:
    """Until the oldest pass is finished, or a message is there that may be taken."""
    while under_way and not under_way[0].ready():
        if len(under_way) <= _LAUNCHED_AHEAD and socket.poll(0):
            return
        time.sleep(_GLANCE_S)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    settings = read_engine_config(Path(sys.argv[1]))
    die_with_parent(int(sys.argv[2]))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # may come to all processes at once; the manager ends this one
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_freed_memory()
    serve(settings, sys.argv[3])
