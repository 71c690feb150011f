"""The manager process: between the web's requests and the worker's passes. No torch here.

`python -m rollout_server.manager.process CONFIG.json`. While a pass runs, requests are taken in; a weight update
waits for the pass to end, and everything that arrives after it meets the new version.
"""

from __future__ import annotations

import logging
import sys
from collections import deque
from dataclasses import asdict
from pathlib import Path

import msgspec
import zmq

from lightning_rl.lifetime import die_with_parent
from rollout_server import messages as m
from rollout_server.config import EngineConfig, read_engine_config
from rollout_server.manager.scheduler import Sampled, Scheduler

log = logging.getLogger("lrl.manager")


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
        )
        self.updates: deque[m.UpdateWeights] = deque()
        self.busy = False
        """The worker has a message of ours that it has not answered."""

    def run(self) -> None:
        poller = zmq.Poller()
        poller.register(self.web, zmq.POLLIN)
        poller.register(self.worker, zmq.POLLIN)
        while True:
            events = dict(poller.poll())
            if self.worker in events:
                self._from_worker(m.decode_from_worker(self.worker.recv()))
            while self.web.poll(0):
                self._from_web(m.decode_to_manager(self.web.recv()))
            if not self.busy:
                self._next()

    def _next(self) -> None:
        update = self.updates[0] if self.updates else None
        message = m.Load(path=update.path, version=update.version) if update else self.scheduler.plan()
        if message is not None:
            self.worker.send(m.encode(message))
            self.busy = True

    def _from_web(self, message: m.ToManager) -> None:
        match message:
            case m.Submit(request_id=request_id, prompt_ids=ids, sampling=sampling, priority=priority):
                self._submit(request_id, ids, sampling, priority)
            case m.Score(request_id=request_id, ids=ids):
                self._submit(request_id, ids, None, 0)
            case m.Cancel(request_id=request_id):
                self.scheduler.cancel(request_id)
            case m.UpdateWeights():
                self.updates.append(message)
            case m.GetStats(request_id=request_id):
                self._send(m.Stats(request_id=request_id, values=self._stats()))

    def _submit(self, request_id: str, ids: list[int], sampling: m.SamplingParams | None, priority: int) -> None:
        limit = self.ready.max_positions
        length = len(ids) + (0 if sampling is None else 1)
        if not ids or length > limit:
            text = (
                "the prompt is empty" if not ids else f"the prompt has {len(ids)} tokens, the model's limit is {limit}"
            )
            self._send(m.Failed(request_id=request_id, code="context_length_exceeded", message=text))
            return
        if not 0 <= min(ids) <= max(ids) < self.ready.vocab_size:
            text = f"token ids must lie in 0 … {self.ready.vocab_size - 1}"
            self._send(m.Failed(request_id=request_id, code="invalid_token_ids", message=text))
            return
        if sampling is not None and len(ids) + sampling.max_tokens > limit:
            sampling = msgspec.structs.replace(sampling, max_tokens=limit - len(ids))
        try:
            self.scheduler.submit(request_id, ids, sampling, priority)
        except ValueError as error:
            self._send(m.Failed(request_id=request_id, code="too_large", message=str(error)))

    def _from_worker(self, message: m.FromWorker) -> None:
        self.busy = False
        match message:
            case m.Forwarded():
                for event in self.scheduler.apply(message):
                    self._send(self._answer(event))
            case m.Loaded(version=version, checksum=checksum, error=error):
                update = self.updates.popleft()
                if error is not None:
                    self._send(m.Failed(request_id=update.request_id, code="weights_rejected", message=error))
                    return
                self.scheduler.set_version(version)
                self._send(m.Updated(request_id=update.request_id, version=version, checksum=checksum))

    def _answer(self, event: Sampled) -> m.FromManager:
        if event.scores is not None:
            return m.Scored(request_id=event.request_id, logprobs=event.scores, version=self.scheduler.version)
        return m.Tokens(
            request_id=event.request_id,
            ids=[event.id],
            logprobs=[event.logprob],
            versions=[self.scheduler.version],
            top_logprobs=[event.top_logprobs] if event.top_logprobs else [],
            finish_reason=event.finish_reason,
            cached_tokens=event.cached_tokens,
        )

    def _stats(self) -> dict[str, float]:
        pool = self.scheduler.pool
        return {
            **asdict(self.scheduler.counters),
            "version": self.scheduler.version,
            "pages_total": pool.total,
            "pages_free": pool.free,
            "pages_cached": self.scheduler.tree.size,
            **self.scheduler.queue_lengths(),
        }

    def _send(self, message: m.FromManager) -> None:
        self.web.send(m.encode(message))


def serve(engine: EngineConfig) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    web, worker = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    for socket, name in ((web, "web"), (worker, "worker")):
        socket.set_hwm(0)  # nothing is ever dropped; what is in flight is bounded by the web's admission
        socket.bind(f"ipc://{engine.ipc_dir}/{name}.ipc")
    Manager(engine, web, worker).run()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    settings = read_engine_config(Path(sys.argv[1]))
    die_with_parent(settings.parent_pid)
    serve(settings)
