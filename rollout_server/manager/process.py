"""The manager process: between the web's requests and the worker's passes. No torch here.

`python -m rollout_server.manager.process CONFIG.json`. The worker has up to `lookahead` passes queued beyond the one that
runs. When results arrive, the next pass is planned and sent before the web hears of them; requests are taken in while
passes run. The answers of a pass go to the web as one multi-part ZeroMQ message, a part each: it wakes up once.
"""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import zmq

from lightning_rl.lifetime import die_with_parent
from rollout_server import messages as m
from rollout_server.config import EngineConfig, read_engine_config
from rollout_server.manager.control import ControlQueue
from rollout_server.manager.refusal import Refused
from rollout_server.manager.scheduler import Scheduler

GARBAGE_THRESHOLD = 100_000
"""Objects made between two searches for garbage cycles. Nothing here makes cycles by the pass; each search is a pause."""


class Manager:
    def __init__(self, engine: EngineConfig, web: zmq.Socket[bytes], worker: zmq.Socket[bytes]) -> None:
        self.web, self.worker = web, worker
        ready = m.decode_from_worker(worker.recv())
        assert isinstance(ready, m.Ready), ready
        self.ready = ready
        self.scheduler = Scheduler(
            pages=ready.num_pages,
            page_size=ready.page_size,
            max_batch=engine.max_batch,
            max_step_tokens=engine.max_step_tokens,
            lookahead=engine.lookahead,
            host_pages=ready.host_pages,
        )
        self.control = ControlQueue(self.scheduler)

    def run(self) -> None:
        poller = zmq.Poller()
        poller.register(self.web, zmq.POLLIN)
        poller.register(self.worker, zmq.POLLIN)
        while True:
            poller.poll()
            self.turn()

    def turn(self) -> None:
        """Take in all that has arrived. The worker's results come first: it must not wait."""
        while (frame := _receive(self.worker)) is not None:
            replies = self._from_worker(m.decode_from_worker(frame))
            if not self.control.holds_planning:  # otherwise what it answers comes after these
                self._feed()
            self._reply(replies)
        while (frame := _receive(self.web)) is not None:
            self._reply(self._from_web(m.decode_to_manager(frame)))
        self._feed()

    def _feed(self) -> None:
        """Queue passes at the worker as far as results and look-ahead allow, or what must have it for itself."""
        while self.control.holds_planning:
            message, replies = self.control.next()
            self._reply(replies)
            if message is not None:
                self.worker.send(m.encode(message))
            elif not replies:
                return
        while (forward := self.scheduler.plan()) is not None:
            self.worker.send(m.encode(forward))

    def _from_web(self, message: m.ToManager) -> Sequence[m.FromManager]:
        match message:
            case m.Submit():
                return self._submit(message)
            case m.Score(request_id=key, ids=[_], adapter=adapter) if adapter in self.scheduler.versions:
                return [m.Scored(request_id=key, logprobs=[], version=self.scheduler.versions[adapter])]
            case m.Score(request_id=key, ids=ids, adapter=adapter):
                return self._enqueue(key, ids, None, adapter=adapter)
            case m.Cancel(request_id=key):
                self.scheduler.cancel(key)
                return []
            case m.GetStats(request_id=key, check=check):
                return [self._stats(key, check)]
            case _:
                self.control.push(message)
                return []

    def _from_worker(self, message: m.FromWorker) -> Sequence[m.FromManager]:
        match message:
            case m.Forwarded():
                return self.scheduler.apply(message)
            case m.Loaded():
                return self.control.loaded(message)
            case m.Acknowledged():
                return self.control.acknowledged(message)
            case m.Ready():
                raise RuntimeError("the worker was ready before: it must have been restarted")

    def _submit(self, submit: m.Submit) -> list[m.FromManager]:
        room = self.ready.max_positions - len(submit.prompt_ids)
        sampling = submit.sampling
        if room < sampling.max_tokens:
            sampling = msgspec.structs.replace(sampling, max_tokens=max(1, room))
        return self._enqueue(submit.request_id, submit.prompt_ids, sampling, submit.priority, submit.n, submit.adapter)

    def _enqueue(
        self,
        key: str,
        ids: list[int],
        sampling: m.SamplingParams | None,
        priority: int = 0,
        n: int = 1,
        adapter: str = "",
    ) -> list[m.FromManager]:
        try:
            self._check(ids, sampling)
            if n < 1 or (sampling is not None and sampling.max_tokens < 1):
                raise Refused("invalid_sampling", "n and max_tokens must be at least 1")
            self.scheduler.submit(key, ids, sampling, priority, n, adapter)
        except Refused as refused:
            return [m.Failed(request_id=key, code=refused.code, message=str(refused))]
        return []

    def _check(self, ids: list[int], sampling: m.SamplingParams | None) -> None:
        limit = self.ready.max_positions
        if not ids:
            raise Refused("context_length_exceeded", "the prompt is empty")
        if len(ids) + (sampling is not None) > limit:
            raise Refused("context_length_exceeded", f"the prompt has {len(ids)} tokens, the model's limit is {limit}")
        if not 0 <= min(ids) <= max(ids) < self.ready.vocab_size:
            raise Refused("invalid_token_ids", f"token ids must lie in 0 … {self.ready.vocab_size - 1}")

    def _stats(self, key: str, check: bool) -> m.FromManager:
        if check:
            try:
                self.scheduler.check_integrity()
            except AssertionError as broken:
                return m.Failed(request_id=key, code="integrity", message=str(broken))
        return m.Stats(request_id=key, values=self.scheduler.stats())

    def _reply(self, replies: Sequence[m.FromManager]) -> None:
        if replies:
            self.web.send_multipart([m.encode(reply) for reply in replies], copy=True)


def _receive(socket: zmq.Socket[bytes]) -> bytes | None:
    try:
        return socket.recv(zmq.NOBLOCK)
    except zmq.Again:
        return None


def serve(engine: EngineConfig) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    web, worker = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    for socket, name in ((web, "web"), (worker, "worker")):
        socket.set_hwm(0)  # nothing is ever dropped; what is in flight is bounded by the web's admission
        socket.bind(f"ipc://{engine.ipc_dir}/{name}.ipc")
    manager = Manager(engine, web, worker)
    gc.freeze()
    gc.set_threshold(GARBAGE_THRESHOLD)
    manager.run()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    settings = read_engine_config(Path(sys.argv[1]))
    die_with_parent(settings.parent_pid)
    serve(settings)
